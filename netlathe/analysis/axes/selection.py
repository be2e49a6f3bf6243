"""Which positions of every axis are left, and in which order, once some atoms have lost or moved theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from netlathe.analysis.axes.algebra import Axis, Product, Size, atoms, find, parts

Positions: TypeAlias = npt.NDArray[np.int64]


class Selection:
    """Old positions in their new order, given those of some atoms."""

    def __init__(self, of: Mapping[Axis, Positions]) -> None:
        self._atoms = {find(atom): positions for atom, positions in of.items()}
        self._known: dict[Axis, Positions | None] = {}

    def of(self, axis: Axis) -> Positions | None:
        """The positions of an axis that are left; None where the axis stays as it is."""
        axis = find(axis)
        if axis not in self._known:
            self._known[axis] = self._positions(axis)
        return self._known[axis]

    def size(self, axis: Axis) -> Size:
        """How many positions are left."""
        positions = self.of(axis)
        return axis.size if positions is None else len(positions)

    def _positions(self, axis: Axis) -> Positions | None:
        if axis.form is None:
            return self._atoms.get(axis)
        if not any(atom in self._atoms for atom in atoms(axis)):
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
    """The size of an axis beside an edited one: beside a dynamic one, nothing is edited."""
    if not isinstance(axis.size, int):
        raise ValueError("an axis of unknown size stands beside an edited one")
    return axis.size
