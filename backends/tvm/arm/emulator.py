"""Runs aarch64 programs: as they are on an aarch64 machine, else in qemu's user mode, if it is installed."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache

from netlathe.backends.tvm.arm.cores import Core

_NAMES = ("qemu-aarch64", "qemu-aarch64-static")


def command(core: Core) -> tuple[str, ...] | None:
    """What comes before a program that is run on ``core``; None where nothing can run it.

    qemu's CPU is ``core``, or where it does not know the core (Neoverse-V1 before 8.1) one with everything.
    """
    if platform.machine() == "aarch64":
        return ()
    for name in _NAMES:
        if (found := shutil.which(name)) is not None:
            return (found, "-cpu", core.name if core.name in _known(found) else "max")
    return None


@lru_cache(maxsize=2)
def _known(qemu: str) -> frozenset[str]:
    """The CPUs that a qemu can be."""
    told = subprocess.run([qemu, "-cpu", "help"], capture_output=True, text=True, check=False)
    return frozenset(told.stdout.split())


def run(core: Core, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; :func:`command` must have found a way."""
    before = command(core)
    assert before is not None
    return subprocess.run([*before, *words], capture_output=True, text=True, check=False)
