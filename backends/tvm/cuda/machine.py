"""What a GPU offers to the kernels, by compute capability, and for which ones an artifact is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from netlathe.backends.tvm.machine import Machine
from netlathe.diagnostics import Diagnostic, OptionError, did_you_mean

# Architecture -> (compute capability, bytes of shared memory that one block may have): the tables of
# technical specifications in the CUDA C++ Programming Guide. The `a` of sm_90a unlocks wgmma.
ARCHITECTURES: Mapping[str, tuple[int, int]] = {
    "sm_80": (80, 163 << 10),
    "sm_86": (86, 99 << 10),
    "sm_89": (89, 99 << 10),
    "sm_90a": (90, 227 << 10),
}
PROCESSORS = 132  # of an H100 or H200; on another GPU walks over tiles are only less even


@dataclass(frozen=True)
class Gpu(Machine):
    """The architectures that the embedded binaries are for; kernels use only what all of them have.

    One thread computes one element at a time: there are no vector lanes to schedule for.
    """

    archs: tuple[str, ...] = ()

    @property
    def has_wgmma(self) -> bool:
        """Whether every architecture has warpgroup products and the tensor copy engine."""
        return all(arch == "sm_90a" for arch in self.archs)

    @property
    def has_float8(self) -> bool:
        """Whether the tensor cores of every architecture multiply floats of 8 bits."""
        return all(ARCHITECTURES[arch][0] >= 89 for arch in self.archs)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block may have on all of the architectures."""
        return min(ARCHITECTURES[arch][1] for arch in self.archs)

    def lanes(self, dtype: str) -> int:
        """One: a thread is a lane of its warp."""
        return 1


def gpu(names: Sequence[str]) -> Gpu:
    """The machine of one or several architectures.

    Raises:
        OptionError: one of them is unknown, or there is none.
    """
    if not names:
        raise OptionError(
            Diagnostic("cuda.arch", "archs names no architecture", help=", ".join(ARCHITECTURES))
        )
    for name in names:
        if name not in ARCHITECTURES:
            raise OptionError(
                Diagnostic(
                    "cuda.arch",
                    f"there are no kernels for architecture {name!r}",
                    help=did_you_mean(name, list(ARCHITECTURES)),
                )
            )
    archs = tuple(sorted(set(names)))
    # The host's part is the launches: it uses nothing beyond what every x86-64 CPU has.
    return Gpu(",".join(archs), "x86-64", (), 4, 16, archs=archs)
