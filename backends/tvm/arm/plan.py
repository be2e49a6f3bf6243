"""Where every tensor of a program without a runtime lies: one arena, planned when it is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from netlathe.backends.tvm.packing import Parameter

ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Place:
    """An argument of a kernel: ``index`` of an input, output or weight, or ``index`` bytes into the arena."""

    kind: str  # "input", "output", "weight" or "arena"
    index: int


@dataclass(frozen=True)
class Step:
    """One call of a kernel; of the kernel "" a copy of ``size`` bytes from the second place to the first."""

    kernel: str
    places: tuple[Place, ...]
    size: int = 0


@dataclass(frozen=True)
class Program:
    """Calls in order. ``object`` has the kernels, as machine code that calls nothing but the C library."""

    steps: tuple[Step, ...]
    parameters: tuple[Parameter, ...]
    arena: int  # bytes
    tensors: int  # bytes that lie in the arena, each tensor by itself
    object: bytes
    kernels: int


@dataclass
class Span:
    """A tensor of ``size`` bytes, alive from step ``first`` to step ``last``."""

    size: int
    first: int
    last: int
    offset: int = 0

    @property
    def end(self) -> int:
        """The first byte after it, aligned."""
        return self.offset + aligned(self.size)


def aligned(size: int) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(spans: Sequence[Span]) -> int:
    """Give every span an offset, so that none alive together overlap; the bytes that takes.

    Large ones first, each into the lowest gap that holds it (arXiv 2001.03288, sec. 5.2).
    """
    placed: list[Span] = []
    for span in sorted(spans, key=lambda s: (-s.size, s.first, s.last)):
        span.offset = 0
        for other in sorted(placed, key=lambda s: s.offset):
            if other.last < span.first or span.last < other.first:
                continue
            if span.end <= other.offset:
                break
            span.offset = max(span.offset, other.end)
        placed.append(span)
    return max((span.end for span in placed), default=0)
