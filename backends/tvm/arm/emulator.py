"""Runs aarch64 programs: as they are on an aarch64 machine, else in qemu's user mode, if it is installed."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence

from netlathe.backends.tvm.arm.cores import Core

_NAMES = ("qemu-aarch64", "qemu-aarch64-static")


def command(core: Core) -> tuple[str, ...] | None:
    """What comes before a program that is run on ``core``; None where nothing can run it.

    qemu's CPU has the instructions of ``core``, or if it does not know the core all that it has.
    """
    if platform.machine() == "aarch64":
        return ()
    for name in _NAMES:
        if (found := shutil.which(name)) is not None:
            return (found, "-cpu", core.emulated)
    return None


def run(core: Core, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; :func:`command` must have found a way."""
    before = command(core)
    assert before is not None
    return subprocess.run([*before, *words], capture_output=True, text=True, check=False)
