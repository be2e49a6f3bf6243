"""The aarch64 cores that code is generated for, and what each of them can do.

Features have the names of Linux (see ``HWCAPS`` in :mod:`netlathe.backends.tvm.runtime`). SVE stays off
where a core has it: every kernel is written for 16-byte registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from netlathe.backends.tvm.machine import Machine

_BASE = ("fp", "asimd")
_V8_2 = (*_BASE, "fphp", "asimdhp", "asimdrdm", "asimddp")


@dataclass(frozen=True)
class Core:
    """A core: LLVM's name for it, the features that its kernels may use, and what qemu calls it."""

    name: str
    features: tuple[str, ...]
    attributes: tuple[str, ...]  # for LLVM: what the core has and kernels do without
    emulated: str  # qemu's -cpu

    @property
    def machine(self) -> Machine:
        """The core as kernels see it."""
        return Machine(
            self.name,
            self.name,
            self.features,
            vector_bytes=16,
            registers=32,
            architecture="aarch64",
            attributes=self.attributes,
        )


CORES: Mapping[str, Core] = {
    core.name: core
    for core in (
        Core("cortex-a72", _BASE, (), "cortex-a72"),
        Core("neoverse-n1", _V8_2, (), "neoverse-n1"),
        # Debian's qemu 7.2 has no neoverse-v1.
        Core("neoverse-v1", (*_V8_2, "fcma", "asimdfhm", "i8mm"), ("-sve",), "max"),
    )
}
