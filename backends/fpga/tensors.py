"""What layers are made of: tensors in memory or on the chip, windows, scales and tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Image:
    """An int8 tensor: pixels of ``vectors`` vectors; channels beyond the last are arbitrary.

    It lies in memory, or in the scratchpad ``hidden``, where pixels stand ``pitch`` vectors apart, or in
    both; -1 says that it does not.
    """

    address: int  # in beats
    height: int
    width: int
    channels: int
    vectors: int
    group: int = 1  # 4: 32-bit sums, whose bytes lie in vectors of their own
    hidden: int = -1  # in vectors
    pitch: int = 0

    @property
    def pixels(self) -> int:
        """How many."""
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass(frozen=True)
class Place:
    """Where a result lies: in memory, in ``hidden`` from that vector on (-1: not there), or in both."""

    stored: bool = True
    hidden: int = -1


MEMORY = Place()


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image: (vertical, horizontal) each; pads are top, left, bottom, right."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Size of what comes out."""
        top, left, bottom, right = self.pads
        return (
            (height + top + bottom - self.span(0)) // self.strides[0] + 1,
            (width + left + right - self.span(1)) // self.strides[1] + 1,
        )

    def span(self, axis: int) -> int:
        """Pixels from the first to the last tap."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def taken(self, axis: int, count: int) -> int:
        """Pixels under ``count`` outputs."""
        return (count - 1) * self.strides[axis] + self.span(axis)


@dataclass(frozen=True)
class Scale:
    """Requantization: per output channel ``multiplier`` / 2^``shift``, then ``zero`` and perhaps a table.

    ``bias`` is added to the sums; all three are int64 [channels]. ``table``: int8 [256], for -128 to 127.
    """

    bias: Array
    multiplier: Array
    shift: Array
    zero: int = 0
    table: Array | None = None


@dataclass(frozen=True)
class Tile:
    """Outputs that are computed together: pixels from ``top``, ``left`` on."""

    top: int
    left: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """How many."""
        return self.height * self.width


def tiles(height: int, width: int, down: int, across: int) -> Iterator[Tile]:
    """Of an output, row by row; those at the ends may be smaller."""
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield Tile(top, left, min(down, height - top), min(across, width - left))
