"""Which positions of every axis are left, and in which order, once some atoms have lost or moved theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from netlathe.analysis.axes.algebra import Axis, Product, Size, atoms, find, parts, resized

Positions: TypeAlias = npt.NDArray[np.int64]


class Selection:
    """Old positions in their new order, given those of some atoms."""

    def __init__(self, of: Mapping[Axis, Positions]) -> None:
        self._atoms = {find(atom): positions for atom, positions in of.items()}
        self._known: dict[Axis, Positions | None] = {}
        self._sizes: dict[Axis, Size | None] = {a: len(at) for a, at in self._atoms.items()}

    def of(self, axis: Axis) -> Positions | None:
        """The positions of an axis that are left; None where it stays as it is, or has a dynamic size."""
        axis = find(axis)
        if axis not in self._known:
            self._known[axis] = self._positions(axis)
        return self._known[axis]

    def size(self, axis: Axis) -> Size:
        """How many positions are left; of an axis with a dynamic part, as an expression."""
        size = resized(axis, self._sizes)
        return axis.size if size is None else size

    def _positions(self, axis: Axis) -> Positions | None:
        if axis.form is None:
            return self._atoms.get(axis)
        if not isinstance(axis.size, int) or not any(atom in self._atoms for atom in atoms(axis)):
            return None
        if isinstance(axis.form, Product):
            found = np.zeros(1, np.int64)
            for factor in axis.form.factors:
                found = (found[:, None] * _fixed(factor) + self._all(factor)).reshape(-1)
            return found
        pieces, start = [], 0
        for part in parts(axis):
            pieces.append(start + self._all(part))
            start += _fixed(part)
        return np.concatenate(pieces)

    def _all(self, axis: Axis) -> Positions:
        positions = self.of(axis)
        return np.arange(_fixed(axis)) if positions is None else positions


def _fixed(axis: Axis) -> int:
    """The size of a part of an axis whose size is a number."""
    assert isinstance(axis.size, int)
    return axis.size
