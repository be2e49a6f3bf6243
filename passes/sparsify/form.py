"""How a weight is seen as a matrix of rows that a product sums over, whatever operator reads it.

    MatMul    [k, n]           rows n        columns k
    Conv      [o, i/g, *kernel]  rows o        columns kernel x i/g, input channels fastest
    experts   [e, k, n]        rows e x n    columns k

Groups of N:M and tiles run along one axis of the weight, the one that columns go through fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from netlathe.ir.sparsity import Pattern

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Form:
    """Which axes of a weight of ``dims`` are rows, and which are summed over; both slowest first."""

    dims: tuple[int, ...]
    kept: tuple[int, ...]
    summed: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The axis that groups and tiles run along."""
        return self.summed[-1]

    @property
    def rows(self) -> int:
        """The axis that tiles are high along."""
        return self.kept[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return (
            math.prod(self.dims[at] for at in self.kept),
            math.prod(self.dims[at] for at in self.summed),
        )

    def matrix(self, array: Array) -> Array:
        """The weight as ``[rows, columns]``."""
        return np.transpose(array, self.kept + self.summed).reshape(self.shape)

    def back(self, matrix: Array) -> Array:
        """The reverse of :meth:`matrix`."""
        order = self.kept + self.summed
        moved = matrix.reshape([self.dims[at] for at in order])
        return np.ascontiguousarray(np.transpose(moved, np.argsort(order)))

    def problem(self, pattern: Pattern) -> str:
        """Why the pattern does not fit; empty where it does."""
        for axis, multiple, what in (
            (self.axis, pattern.column_multiple, "are summed over"),
            (self.rows, pattern.row_multiple, "are outputs"),
        ):
            size = self.dims[axis]
            if size % multiple:
                return (
                    f"{pattern} needs a multiple of {multiple}, and the {size} elements of axis {axis}"
                    f" that {what} are none; {_offer(size, pattern)}"
                )
        return ""


def form_of(dims: Sequence[int], sums: frozenset[int]) -> Form | None:
    """The form for a product that sums over ``sums``; None where it keeps no axis.

    Of several axes that are summed over (a convolution's) the first are the channels.
    """
    kept = tuple(axis for axis in range(len(dims)) if axis not in sums)
    channels, *kernel = sorted(sums)
    return Form(tuple(dims), kept, (*kernel, channels)) if kept else None


def _offer(size: int, pattern: Pattern) -> str:
    if pattern.kind == "n:m":
        share = pattern.n / pattern.m
        fits = [m for m in (2, 4, 8, 16) if not size % m and float(share * m).is_integer()]
        if fits:
            return f"{', '.join(f'{int(share * m)}:{m}' for m in fits)} would fit"
    return "unstructured would fit"
