"""Where a tensor has its scales: how it is seen as a matrix of rows, and how ONNX is told.

DequantizeLinear knows one scale for all, one per position of one axis, or one per block along one axis.
Where an output sums over several axes (a convolution), groups need these to be one: codes are then kept
``[outputs, the rest]`` and get their shape back by a Reshape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from netlathe.passes.quantize.scheme import GroupAxis

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How the scales of a tensor of ``dims`` lie.

    ``block`` elements along ``axis`` share a scale, apart for all other axes; with 0 all elements at a
    position of ``axis`` do, and where ``axis`` is None all there are. ``flat`` means that ``axis`` 1
    stands for all axes from 1 on.
    """

    dims: tuple[int, ...]
    axis: int | None
    block: int = 0
    flat: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """The dims in which codes are kept."""
        return (self.dims[0], math.prod(self.dims[1:])) if self.flat else self.dims

    @property
    def scale_dims(self) -> tuple[int, ...]:
        """The dims of the scales that DequantizeLinear is given."""
        if self.axis is None:
            return ()
        if not self.block:
            return (self.stored[self.axis],)
        return tuple(n // self.block if at == self.axis else n for at, n in enumerate(self.stored))

    @property
    def groups(self) -> int:
        """How many scales there are."""
        return math.prod(self.scale_dims)

    @property
    def size(self) -> int:
        """Elements that share a scale."""
        return math.prod(self.dims) // max(1, self.groups)

    @property
    def words(self) -> str:
        """What a scale is for."""
        if self.axis is None:
            return "one for all"
        if not self.block:
            return f"one per position of axis {self.axis}"
        if self.block < self.stored[self.axis]:
            axis = "the axes from 1 on" if self.flat else f"axis {self.axis}"
            return f"one per {self.block} elements along {axis}"
        rest = [str(at) for at in range(len(self.stored)) if at != self.axis]
        return f"one per position of axes {', '.join(rest)}"

    def view(self, array: Array) -> Array:
        """``array`` (of ``dims`` or ``stored`` dims) with what shares a scale at its end: no copy.

        A slice of its first axis holds whole groups, ``[groups, size]`` once it is reshaped so. Groups of
        one output follow each other, so a reshape of the whole gives the matrix ``[outputs, columns]``.
        """
        if self.axis is None:
            return array.reshape(1, -1)
        return np.moveaxis(array.reshape(self.stored), self.axis, -1 if self.block else 0)

    def spread(self, per_group: Array) -> Array:
        """Scales or zero points of the groups of :meth:`view`, one for every element, in ``stored`` dims."""
        whole = np.empty(self.stored, per_group.dtype)
        view = self.view(whole)
        view[...] = np.repeat(per_group, self.size).reshape(view.shape)
        return whole

    def scales(self, per_group: Array) -> Array:
        """Scales or zero points, one for each group of :meth:`view`, in the shape that ONNX wants."""
        if self.axis is None or not self.block:
            return per_group.reshape(self.scale_dims)
        dims = self.scale_dims
        first = dims[: self.axis] + dims[self.axis + 1 :]
        moved = per_group.reshape(*first, dims[self.axis])
        return np.ascontiguousarray(np.moveaxis(moved, -1, self.axis))


def layout(
    dims: Sequence[int],
    sums: frozenset[int],
    group_size: int = 0,
    per_tensor: bool = False,
    along: GroupAxis = "input",
) -> Layout:
    """The layout for a reader that sums over ``sums``: one scale per output, or per group of one.

    Groups run ``along`` what is summed over, or along outputs.

    Raises:
        Ragged: ``group_size`` does not divide what groups run along.
        Scattered: they would have to run over axes that do not lie side by side.
    """
    dims = tuple(dims)
    kept = [axis for axis in range(len(dims)) if axis not in sums and dims[axis] > 1]
    summed = [axis for axis in sorted(sums) if dims[axis] > 1]
    if per_tensor:
        return Layout(dims, None)
    rest = kept or [axis for axis in range(len(dims)) if axis not in sums] or [0]
    outputs = max(rest, key=lambda axis: dims[axis])
    if group_size and along == "output":
        if dims[outputs] % group_size:
            raise Ragged(dims[outputs], group_size, "outputs")
        return Layout(dims, outputs, group_size)
    if group_size:
        length = math.prod(dims[axis] for axis in sums)
        if length % group_size:
            raise Ragged(length, group_size)
        if len(summed) <= 1:
            return Layout(dims, (summed or sorted(sums))[0], group_size)
        if summed == [axis for axis in range(1, len(dims)) if dims[axis] > 1]:
            return Layout(dims, 1, group_size, flat=True)
        raise Scattered(summed)
    if len(kept) > 1 and len(summed) == 1:
        return Layout(dims, summed[0], dims[summed[0]])
    return Layout(dims, outputs)


class Unfit(Exception):
    """Why a tensor has no layout of the kind that was asked for."""


class Ragged(Unfit):
    """The group size does not divide the length."""

    def __init__(
        self, length: int, group_size: int, of: str = "elements that are summed over"
    ) -> None:
        fits = [n for n in range(256, 7, -8) if length % n == 0 and n & (n - 1) == 0]
        offer = (
            f"group_size={', '.join(map(str, fits[:3]))} would" if fits else "no power of 2 does"
        )
        super().__init__(f"groups of {group_size} do not divide the {length} {of}; {offer}")


class Scattered(Unfit):
    """Groups would have to run over axes that do not follow each other."""

    def __init__(self, summed: Sequence[int]) -> None:
        axes = ", ".join(map(str, summed))
        super().__init__(f"groups cannot run over the axes {axes}, which do not lie side by side")
