"""Which TVM and which linker there are, found out without loading any of them.

Generated code is checked against `apache-tvm` 0.27.0.post1. With `apache-tvm-ffi` 0.1.15 that wheel
crashes the process, which no exception handler sees, so versions are read from package metadata first.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata

from netlathe.diagnostics import Diagnostic, LowerError, missing_extra

TVM_VERSION = "0.27.0.post1"
FFI_LEAST = (0, 1, 14, 0)  # 0.1.14.post0
FFI_BELOW = (0, 1, 15)
_COMPILERS = ("g++", "clang++", "c++")
_SHOWN = 12  # first lines of what a compiler that failed printed


def installed() -> tuple[str, str]:
    """Versions of apache-tvm and apache-tvm-ffi.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    found = []
    for package in ("apache-tvm", "apache-tvm-ffi"):
        try:
            found.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            raise missing_extra("tvm", package, "generating machine code") from None
    return found[0], found[1]


def check() -> None:
    """Refuse versions that are known to crash; nothing is loaded before this.

    Raises:
        MissingExtraError: TVM is not installed.
        LowerError: it is, in versions that do not work together.
    """
    tvm, ffi = installed()
    problems = []
    if tvm != TVM_VERSION:
        problems.append(
            Diagnostic(
                "tvm.version",
                f"apache-tvm {tvm} is installed, and the backend is built for {TVM_VERSION}",
                help=f"pip install apache-tvm=={TVM_VERSION} 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'",
            )
        )
    if not _ffi_works(ffi):
        problems.append(
            Diagnostic(
                "tvm.ffi_version",
                f"apache-tvm-ffi {ffi} crashes apache-tvm {TVM_VERSION}; nothing was loaded",
                notes=("versions 0.1.14.post0 up to, not including, 0.1.15 work",),
                help="pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'",
            )
        )
    if problems:
        raise LowerError(problems)


def _ffi_works(version: str) -> bool:
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:\.post(\d+))?", version)
    if match is None:
        return False
    major, minor, patch, post = (int(part) if part is not None else -1 for part in match.groups())
    return FFI_LEAST <= (major, minor, patch, post) and (major, minor, patch) < FFI_BELOW


def compiler() -> str:
    """The C++ compiler that links the kernels.

    Raises:
        LowerError: there is none.
    """
    for name in _COMPILERS:
        if (found := shutil.which(name)) is not None:
            return found
    raise LowerError(
        Diagnostic(
            "tvm.compiler",
            "linking the kernels needs a C++ compiler, and none is installed",
            notes=("looked for " + ", ".join(_COMPILERS),),
            help="install g++ (apt-get install g++, dnf install gcc-c++)",
        )
    )


def run(command: Sequence[str]) -> None:
    """Run a compiler or linker.

    Raises:
        LowerError: it failed, with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[:_SHOWN]
        raise LowerError(
            Diagnostic(
                "tvm.compiler",
                f"{command[0]} failed (exit code {done.returncode})",
                notes=tuple(f"it printed: {line}" for line in said),
                help="report this with the model; target onnx does not use TVM",
            )
        )


def compiler_version() -> str:
    """The first line of what that compiler says about itself.

    Raises:
        LowerError: there is none.
    """
    told = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    return told.stdout.partition("\n")[0].strip()
