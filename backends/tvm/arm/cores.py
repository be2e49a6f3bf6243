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
    """A core: the name that LLVM and qemu have for it, and the features that its kernels may use."""

    name: str
    features: tuple[str, ...]
    attributes: tuple[str, ...]  # for LLVM: what the core has and kernels do without

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
        Core("cortex-a72", _BASE, ()),
        Core("neoverse-n1", _V8_2, ()),
        Core("neoverse-v1", (*_V8_2, "fcma", "asimdfhm", "i8mm"), ("-sve",)),
    )
}
