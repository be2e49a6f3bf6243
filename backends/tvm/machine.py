"""What the CPU offers: vector widths and how many registers there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from netlathe.diagnostics import Diagnostic, OptionError, did_you_mean

# Feature level -> (LLVM's mcpu, flags that /proc/cpuinfo must show, LLVM features). The levels are
# x86-64-v3 and v4 of the psABI, both of which include FMA, and v4 with dot products of bytes. LLVM
# would split some operators on 512-bit vectors, for CPUs that these slow down.
_V3 = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_WIDE = "-prefer-256-bit"
LEVELS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "avx2": ("x86-64-v3", _V3, ()),
    "avx512": ("x86-64-v4", _V4, (_WIDE,)),
    "avx512vnni": ("x86-64-v4", (*_V4, "avx512_vnni"), (_WIDE, "+avx512vnni")),
}


@dataclass(frozen=True)
class Machine:
    """A feature level: ``vector_bytes`` of a vector register, and how many ``registers`` there are."""

    level: str
    mcpu: str
    features: tuple[str, ...]
    vector_bytes: int
    registers: int
    architecture: str = "x86_64"  # as `uname -m` says
    attributes: tuple[str, ...] = ()  # LLVM features switched on (+) or off (-)

    @property
    def dot_bytes(self) -> bool:
        """Whether one instruction adds four products of bytes to each 32-bit lane (VNNI)."""
        return "avx512_vnni" in self.features

    def lanes(self, dtype: str) -> int:
        """How many elements of a TIR dtype one vector holds."""
        width = 1 if dtype == "bool" else np.dtype(dtype).itemsize
        return self.vector_bytes // max(width, 4)  # narrower ones are widened to be computed with


def machine(level: str) -> Machine:
    """The machine of a feature level; ``native`` is the best one that this CPU has.

    Raises:
        OptionError: there is no such level, or none that this CPU has.
    """
    if level == "native":
        level = native()
    if level not in LEVELS:
        raise OptionError(
            Diagnostic(
                "tvm.features",
                f"there is no feature level {level!r}",
                help=did_you_mean(level, [*LEVELS, "native"]),
            )
        )
    mcpu, features, attributes = LEVELS[level]
    wide = level != "avx2"
    return Machine(
        level, mcpu, features, 64 if wide else 32, 32 if wide else 16, attributes=attributes
    )


def native() -> str:
    """The best feature level that this CPU has.

    Raises:
        OptionError: it has none.
    """
    from netlathe.backends.tvm.runtime import cpu_features

    have = cpu_features()
    for level in reversed(list(LEVELS)):
        if have.issuperset(LEVELS[level][1]):
            return level
    raise OptionError(
        Diagnostic(
            "tvm.cpu",
            "this CPU lacks AVX2 or FMA, the least that kernels are generated for",
            help="choose features='avx2' to build for another machine",
        )
    )
