"""Scales a dim that is made of several groups, each of its positions by a factor of its own.

    x: [b, s, (n h)]    n heads of h positions     a factor for every pair of head and position
    x: [b, c, y, x]     one group                  as `to_scale`
    x: [b, s, (n r h)]  r queries share a head     a factor for every (n, h), the same for all r

What `to_scale` says of each group alone holds for them jointly if it names the same values with the same
exponents: then every product that has one of the letters has them all, and what the laws ask of exponents
they ask at every position. A group along which nothing can be scaled has one factor for all positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes import algebra
from netlathe.analysis.axes.algebra import Axis, Product, find
from netlathe.analysis.axes.basis import Stretch, to_scale
from netlathe.analysis.axes.groups import Axes, Group
from netlathe.diagnostics import PassError
from netlathe.ir import weights

Index = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Joint:
    """Values that are scaled together, and the number of free factors.

    ``values`` maps each to its exponent: where factor f belongs to an element, it is multiplied by
    f ** exponent.
    """

    axes: Axes
    stretches: tuple[Stretch, ...]  # one a group, in the order of the dim that was asked about
    values: Mapping[ir.Value, int]

    @property
    def count(self) -> int:
        """How many factors there are."""
        return math.prod(stretch.group.size for stretch in self.stretches)

    @property
    def weights(self) -> dict[ir.Value, int]:
        """The weights that change, with their exponents."""
        return {v: exponent for v, exponent in self.values.items() if weights.is_weight(v)}

    def index(self, value: ir.Value) -> Index:
        """Which factor belongs to each element, -1 where none does; broadcasts to the value's shape."""
        rank = len(self.axes.related.axes[value])
        found, inside = np.zeros([1] * rank, np.int64), np.ones([1] * rank, np.bool_)
        for stretch in self.stretches:
            (dim,) = (at for held, at in stretch.exponents if held is value)
            axis = self.axes.related.axes[value][dim]
            own = _positions(axis, stretch.group.atom)
            own = own.reshape([-1 if at == dim else 1 for at in range(rank)])
            found = found * stretch.group.size + own
            inside = inside & (own >= 0)
        return np.where(inside, found, -1)

    def channels(self, value: ir.Value, dim: int) -> Index:
        """:meth:`index` of a value that has all groups in one dim, along it."""
        found = self.index(value)
        assert found.size == found.shape[dim], f"{value.name} has them in several dims"
        return found.reshape(-1)

    def multiplier(self, value: ir.Value, factors: Vector) -> Vector:
        """What a value is multiplied by; broadcasts to its shape."""
        at = self.index(value)
        powers = np.append(np.asarray(factors, np.float64) ** self.values[value], 1.0)
        return np.asarray(powers[at])  # the last one, which is 1, where there is no factor


def to_scale_jointly(
    axes: Axes, value: ir.Value, dim: int, *, keep: Sequence[ir.Value] = ()
) -> list[Joint | str]:
    """For each segment of a dim what must change for it to be scaled, or why it cannot be.

    The values of ``keep`` stay as they are.
    """
    if value not in axes.related.axes:
        return [f"nothing is known of the axes of {value.name}"]
    found: list[Joint | str] = []
    seen: set[tuple[Axis, ...]] = set()
    for part in algebra.parts(axes.related.axes[value][dim]):
        atoms = tuple(algebra.atoms(part))
        if atoms in seen:  # a segment that stands there twice
            continue
        seen.add(atoms)
        groups = [axes.by_atom[atom] for atom in atoms if atom in axes.by_atom]
        found.append(_joint(axes, groups, value, dim, keep))
    return found


def _joint(
    axes: Axes, groups: Sequence[Group], value: ir.Value, dim: int, keep: Sequence[ir.Value]
) -> Joint | str:
    stretches: list[Stretch] = []
    why = f"{value.name} has one position"
    for group in groups:
        try:
            stretches.append(to_scale(axes, group, value, dim, keep=keep))
        except PassError as error:
            why = error.diagnostics[0].message
    if not stretches:
        return why
    # Positions of the group with most of them count most, where not all go together.
    first = max(stretches, key=lambda stretch: stretch.group.size)
    wanted = _exponents(first)
    if wanted is None:
        return f"{first.group.name} stands in two dims of one value"
    alike = tuple(stretch for stretch in stretches if _exponents(stretch) == wanted)
    return Joint(axes, alike, wanted)


def _exponents(stretch: Stretch) -> dict[ir.Value, int] | None:
    found: dict[ir.Value, int] = {}
    for (value, _), exponent in stretch.exponents.items():
        if value in found:
            return None
        found[value] = exponent
    return found


def scale_jointly(joint: Joint, factors: Vector) -> None:
    """Multiply what a joint names by ``factors`` (``[count]``, not 0) to the power of its exponents.

    Weights become recipes: float64 products whenever they are read.
    """
    by = np.asarray(factors, np.float64)
    if by.shape != (joint.count,) or not np.all(np.isfinite(by)) or np.any(by == 0):
        raise ValueError(f"takes {joint.count} factors, none of them 0")
    if any(stretch.positive for stretch in joint.stretches) and np.any(by < 0):
        raise ValueError("a stretch that passes a Relu takes positive factors")
    for value in joint.weights:
        base, multiplier = value.const_value, joint.multiplier(value, by)
        assert base is not None

        def change(array: npt.NDArray[Any], by: Vector = multiplier) -> npt.NDArray[Any]:
            return np.asarray((array.astype(np.float64) * by).astype(array.dtype))

        shape = base.shape.numpy()
        value.const_value = weights.derived(base, change, base.dtype, shape, value.name or "")


def _positions(axis: Axis, atom: Axis) -> Index:
    """For every position of an axis which one of the atom it is, -1 where it is none."""
    axis = find(axis)
    if not isinstance(axis.size, int):
        raise ValueError("an axis of unknown size stands beside a scaled one")
    if axis is find(atom):
        return np.arange(axis.size)
    if axis.form is None:
        return np.full(axis.size, -1, np.int64)
    if not isinstance(axis.form, Product):
        return np.concatenate([_positions(part, atom) for part in algebra.parts(axis)])
    found = np.full(1, -1, np.int64)
    for factor in axis.form.factors:
        inner = _positions(factor, atom)
        outer = found[:, None]
        found = np.where(outer >= 0, outer, inner[None, :]).reshape(-1)
    return found
