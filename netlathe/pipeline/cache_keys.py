"""What a result depends on besides the model: the code, the versions and the machine that make it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import netlathe
from netlathe.pipeline import registry
from netlathe.pipeline.pass_ import Pass

# What computes, or decides what is computed. Those that are not installed take no part.
_PACKAGES = (
    "ml-dtypes",
    "networkx",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "scipy",
    "sympy",
    "tokenizers",
    "torch",
    "transformers",
)
_SOURCES = (".py", ".c", ".cpp")
_REQUIREMENT = re.compile(r"\s*([\w.-]+)")


@functools.cache
def toolchain() -> dict[str, Any]:
    """Versions, the code of NetLathe itself, and the CPU, whose instructions decide how sums round."""
    return {
        "python": platform.python_version(),
        "machine": [platform.system(), platform.machine(), _cpu()],
        "netlathe": netlathe.__version__,
        "code": code_digest(Path(netlathe.__file__).parent),
        "packages": versions(_PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_of(thing: Any) -> dict[str, Any] | None:
    """What the code behind an object of somebody else's class is; None where it lies in no file.

    That is every source file of the package that the class is in, and the versions of what its
    distribution requires, so that an edit counts before its author raises a version.
    """
    name = type(thing).__module__
    top = name.partition(".")[0]
    if top == netlathe.__name__:
        return {}  # part of the toolchain
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    package = getattr(sys.modules.get(top), "__file__", None)
    inside = package is not None and Path(package).name == "__init__.py"
    place = Path(package).parent if inside and package is not None else Path(file)
    return {"code": code_digest(place), "requires": _required(thing)}


def code_digest(place: Path) -> str:
    """SHA-256 over the names and contents of the source files in a folder, or of one file."""
    state = hashlib.sha256()
    files = [place]
    if place.is_dir():
        files = [
            Path(folder, name)
            for folder, _, names in os.walk(place, followlinks=True)
            for name in names
            if name.endswith(_SOURCES)
        ]
    for file in sorted(files):
        contents = file.read_bytes()
        state.update(f"{file.relative_to(place)} {len(contents)}\n".encode())
        state.update(contents)
    return state.hexdigest()


def _required(thing: Any) -> dict[str, str]:
    if not isinstance(thing, Pass):
        return {}
    name = registry.distribution_of(thing).partition(" ")[0]
    try:
        required = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # a module that is part of no distribution
        return {}
    names = (_REQUIREMENT.match(line) for line in required)
    return versions(sorted({match[1] for match in names if match}))


def _cpu() -> str:
    """A name for the kind of CPU: its model and the instructions it has, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = {line.partition(":")[0].strip(): line for line in text.splitlines()}
    told = [lines[name] for name in wanted if name in lines]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
