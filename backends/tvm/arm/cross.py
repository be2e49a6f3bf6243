"""What compiles and links for aarch64 here: GCC's cross compiler, or zig, which pip installs."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

from netlathe.diagnostics import Diagnostic, LowerError

_PREFIX = "aarch64-linux-gnu-"
_ZIG_TARGET = "aarch64-linux-gnu.2.28"  # the glibc that TVM's aarch64 wheel wants at least


def compiler() -> tuple[str, ...]:
    """The command that compiles C and links for aarch64.

    Raises:
        LowerError: there is none.
    """
    name = "gcc" if platform.machine() == "aarch64" else _PREFIX + "gcc"
    if (found := shutil.which(name)) is not None:
        return (found,)
    return (str(_zig()), "cc", "-target", _ZIG_TARGET)


def archiver() -> tuple[str, ...]:
    """The command that makes static libraries of aarch64 objects.

    Raises:
        LowerError: there is none.
    """
    name = "ar" if platform.machine() == "aarch64" else _PREFIX + "ar"
    if (found := shutil.which(name)) is not None:
        return (found,)
    return (str(_zig()), "ar")


def version() -> str:
    """The first line of what the compiler says about itself.

    Raises:
        LowerError: there is none.
    """
    command = compiler()
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return told.stdout.partition("\n")[0].strip()


def _zig() -> Path:
    spec = importlib.util.find_spec("ziglang")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "zig"
    raise LowerError(
        Diagnostic(
            "tvm.cross_compiler",
            "linking for aarch64 needs a cross compiler, and none is installed",
            notes=(f"looked for {_PREFIX}gcc and for the Python package ziglang",),
            help="pip install 'netlathe[arm]', or apt-get install gcc-aarch64-linux-gnu",
        )
    )
