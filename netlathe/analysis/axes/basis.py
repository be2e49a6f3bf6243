"""Changes the basis of an axis along a stretch of the graph; the function stays as it is.

`scale` multiplies the positions of a value by factors, `rotate` by an orthogonal matrix: what makes the
value is changed so that it does, and what uses it up so that nobody notices.

    h = x W1;  y = relu(h) W2     scaled at h by s > 0:   W1 diag(s),  diag(1/s) W2
    h = x W1;  y = (h + b) W2     rotated at h by Q:      W1 Q,  b Q,  Q' W2

Unlike a deletion this does not concern all of a group. It spreads from the value over the nodes that are
linear in it, and must end in weights. A signature states outputs as sums of products of inputs. So
each letter of a node relates its places: exponents of s add up in a product, are equal across a sum, and
cancel in what is summed over; a rotation passes from an input to the output or across a contraction.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes.algebra import Axis, Product, find, parts
from netlathe.analysis.axes.bind import Relation
from netlathe.analysis.axes.groups import Axes, Group
from netlathe.analysis.axes.pattern import BROADCAST
from netlathe.analysis.axes.relate import linear_inputs, reads, terms_of
from netlathe.analysis.axes.signature import tells_other_sizes
from netlathe.diagnostics import Diagnostic, PassError
from netlathe.ir import edit, weights
from netlathe.ir.provenance import location

Array = npt.NDArray[Any]
Place: TypeAlias = tuple[ir.Value, int]  # a dim of a value


@dataclass(frozen=True)
class Stretch:
    """The places that change together; a scale enters each with its exponent, a rotation as it is."""

    group: Group
    exponents: Mapping[Place, int]
    positive: bool  # factors must be positive

    @property
    def weights(self) -> list[Place]:
        """The weights that change."""
        return [place for place in self.exponents if weights.is_weight(place[0])]


def to_scale(
    axes: Axes,
    group: Group,
    value: ir.Value,
    dim: int | None = None,
    *,
    keep: Sequence[ir.Value] = (),
) -> Stretch:
    """What must change for a value to be scaled along a group, while the values of ``keep`` stay.

    Raises:
        PassError: the stretch runs into something that is not linear, or leaves the model.
    """
    kept = {place: 0 for held in keep for place in _places(axes, group, held)}
    return _Scaling(_Laws(axes, group)).stretch(_place(axes, group, value, dim), kept)


def to_rotate(axes: Axes, group: Group, value: ir.Value, dim: int | None = None) -> Stretch:
    """What must change for a value to be rotated along a group.

    Raises:
        PassError: the stretch runs into something that a rotation does not pass, or leaves the model.
    """
    return _Rotation(_Laws(axes, group)).stretch(_place(axes, group, value, dim))


def scale(axes: Axes, stretch: Stretch, factors: Sequence[float]) -> None:
    """Multiply the positions of the group by factors where the exponent of the stretch is 1."""
    by = np.asarray(factors, np.float64)
    if by.shape != (stretch.group.size,) or not np.all(np.isfinite(by)) or np.any(by == 0):
        raise ValueError(f"{stretch.group.name} takes {stretch.group.size} factors, none of them 0")
    if stretch.positive and np.any(by < 0):
        raise ValueError("a stretch that passes a Relu takes positive factors")

    def apply(array: Array, dim: int, exponent: int) -> Array:
        return array * (by**exponent).reshape([-1 if at == dim else 1 for at in range(array.ndim)])

    _change(axes, stretch, apply)


def rotate(axes: Axes, stretch: Stretch, matrix: Array) -> None:
    """Let a row x along the group be x Q: ``matrix`` must be orthogonal (to 1e-6, as float32 allows)."""
    turn = np.asarray(matrix, np.float64)
    size = stretch.group.size
    if turn.shape != (size, size) or np.abs(turn @ turn.T - np.eye(size)).max() > 1e-6:
        raise ValueError(f"{stretch.group.name} takes an orthogonal matrix of {size} x {size}")

    def apply(array: Array, dim: int, _: int) -> Array:
        return np.moveaxis(np.tensordot(array, turn, axes=(dim, 0)), -1, dim)

    _change(axes, stretch, apply)


def _place(axes: Axes, group: Group, value: ir.Value, dim: int | None) -> Place:
    if value not in axes.related.axes:
        raise PassError(Diagnostic("axes.basis", f"{value.name} is a constant that others share"))
    dims = [at for _, at in _places(axes, group, value)]
    if dim is None and len(dims) == 1:
        return value, dims[0]
    if dim not in dims:
        raise ValueError(f"{value.name} has {group.name} in the dims {dims}")
    return value, dim


def _places(axes: Axes, group: Group, value: ir.Value) -> list[Place]:
    dims = range(len(axes.related.axes.get(value, ())))
    return [(value, dim) for dim in dims if group in axes.of(value, dim)]


def _change(axes: Axes, stretch: Stretch, apply: Callable[[Array, int, int], Array]) -> None:
    """Rewrite the weights of a stretch as recipes, each dim that is concerned in turn."""
    for (value, dim), exponent in stretch.exponents.items():
        base, axis = value.const_value, axes.related.axes[value][dim]
        if not weights.is_weight(value) or base is None or not exponent:
            continue

        def change(array: Array, axis: Axis = axis, dim: int = dim, n: int = exponent) -> Array:
            wide = array.astype(np.float64)
            changed = along(wide, dim, axis, stretch.group.atom, lambda a, at: apply(a, at, n))
            return changed.astype(array.dtype)

        shape = base.shape.numpy()
        value.const_value = weights.derived(base, change, base.dtype, shape, value.name or "")


def along(
    array: Array, dim: int, axis: Axis, atom: Axis, apply: Callable[[Array, int], Array]
) -> Array:
    """Apply a function, which may change the size, along every appearance of an atom in a dim."""
    axis = find(axis)
    if axis is atom:
        return apply(array, dim)
    if axis.form is None:
        return array
    if isinstance(axis.form, Product):
        shape = array.shape
        sizes = [int(factor.size) for factor in axis.form.factors]
        array = array.reshape(*shape[:dim], *sizes, *shape[dim + 1 :])
        for index, factor in enumerate(axis.form.factors):
            array = along(array, dim + index, factor, atom, apply)
        return array.reshape(*shape[:dim], -1, *shape[dim + 1 :])
    pieces, start = [], 0
    for part in parts(axis):
        end = start + int(part.size)
        piece = np.take(array, range(start, end), axis=dim)
        pieces.append(along(piece, dim, part, atom, apply))
        start = end
    return np.concatenate(pieces, axis=dim)


# -- what a node says about one group ---------------------------------------------------------------------


class Blocked(Exception):
    """Why a stretch ends where it must not."""

    def __init__(self, reason: str, node: ir.Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Side:
    """A product of inputs that is (a term of) an output, or that is summed over the letter."""

    factors: tuple[Place, ...]
    output: Place | None
    summed: bool = False  # the letter ends here: it is in the factors alone


@dataclass(frozen=True)
class Law:
    """What one node says about the places of one of its letters."""

    relation: Relation
    places: tuple[Place, ...]
    sides: tuple[Side, ...]
    apart: tuple[Place, ...]  # places in no product: the node is not linear in them
    turned: tuple[Place, Place] | None  # turn together, if what `uniform` holds is all equal
    uniform: ir.Value | None

    @property
    def positive(self) -> bool:
        """Whether the node is linear for positive factors only."""
        return self.relation.signature.positive


class _Laws:
    """All laws about one group, by the places they concern."""

    def __init__(self, axes: Axes, group: Group) -> None:
        self.axes, self.group = axes, group
        self.of: dict[Place, list[Law]] = defaultdict(list)
        for relation, letter in axes.letters[group.atom]:
            slots = relation.slots.get(letter, ())
            if all(tells_other_sizes(relation.node, slot.dim) for slot in slots):
                continue
            law = self._without_zeros(_law(relation, letter))
            for place in law.places:
                self.of[place].append(law)

    def _without_zeros(self, law: Law) -> Law:
        """A law without products by zeros that several nodes read: these are the same in every basis."""
        known = self.axes.related.axes
        shared = {place[0] for side in law.sides for place in side.factors} - known.keys()
        zeros = {value for value in shared if not weights.array(value).any()}
        if not zeros:
            return law
        sides = [s for s in law.sides if zeros.isdisjoint(value for value, _ in s.factors)]
        return dataclasses.replace(law, sides=tuple(sides))

    @cached_property
    def outside(self) -> frozenset[ir.Value]:
        """Values that others see as they are: graph inputs and outputs, operands of opaque nodes."""
        related, graph = self.axes.related, self.axes.model.graph
        known = {relation.node for relation in related.relations}
        opaque = [node for node in graph if node not in known]
        seen = {value for node in opaque for value in (*reads(node), *node.outputs)}
        return frozenset(seen | {*graph.inputs, *graph.outputs} if related.boundary else seen)

    def check(self, place: Place) -> None:
        """Whether a place may change at all."""
        value, dim = place
        if value not in self.axes.related.axes:
            raise Blocked(f"{value.name} is shared with other axes")
        if self.group not in self.axes.of(value, dim):  # the only position of its dim
            raise Blocked(f"{value.name} has one position for it", value.producer())
        if value in self.outside:
            raise Blocked(f"{value.name} is seen from outside", value.producer())
        if value.dtype is None or not value.dtype.is_floating_point():
            raise Blocked(f"{value.name} does not hold floats", value.producer())
        maker = value.producer()
        if maker is not None and all(law.relation.node is not maker for law in self.of[place]):
            # a row that Unsqueeze adds and Concat puts beside others: sin and cos, stacked
            raise Blocked(f"{maker.op_type} makes it of nothing that has it", maker)


def _law(relation: Relation, letter: str) -> Law:
    signature, node = relation.signature, relation.node
    slots = relation.slots.get(letter, ())
    inputs = {slot.operand: (slot.value(node), slot.dim) for slot in slots if not slot.output}
    outputs = {slot.operand: (slot.value(node), slot.dim) for slot in slots if slot.output}
    places = tuple(dict.fromkeys((*inputs.values(), *outputs.values())))
    held = [*signature.fixed, *signature.ordered, *signature.reads.values()]
    if any(letter in relation.letters(names) for names in held):
        return Law(relation, places, (), places, None, None)
    terms = terms_of(signature.linear)
    inner = terms_of(signature.inner)
    copied = signature.moves and not letter.startswith(BROADCAST.name)
    sides = []
    for index in range(len(node.outputs)) if terms else ():
        for term in terms:
            factors = tuple(inputs[i] for i in term if i in inputs)
            output = outputs.get(index)
            elsewhere = copied and any(i in inputs for other in terms for i in other)
            if copied and (output is None or (not factors and elsewhere)):
                continue  # the output has other elements than those of this input
            sides.append(Side(factors, output, summed=output is None))
    for term in inner:
        factors = tuple(inputs[i] for i in term if i in inputs)
        sides.append(Side(factors, None, summed=not outputs and len(factors) == len(inputs)))
    named = {*linear_inputs(signature.linear), *linear_inputs(signature.inner)}
    apart = tuple(place for index, place in inputs.items() if index not in named)
    if not terms:
        apart = places
    turned = uniform = None
    if letter in relation.letters(signature.turns) and 0 in outputs:
        turned, uniform = (inputs[0], outputs[0]), node.inputs[1]
    return Law(relation, places, tuple(sides), apart, turned, uniform)


def _failure(group: Group, what: str, why: Blocked) -> PassError:
    return PassError(
        Diagnostic(
            "axes.basis",
            f"{group.name} cannot be {what} here: {why}",
            at="" if why.node is None else why.node.name or "",
            where="" if why.node is None else location(why.node),
        )
    )


# -- scaling --------------------------------------------------------------------------------------------


class _Scaling:
    """Finds exponents that satisfy every law, starting from one place; as few as the laws allow."""

    def __init__(self, laws: _Laws) -> None:
        self.laws = laws

    def stretch(self, start: Place, kept: Mapping[Place, int]) -> Stretch:
        """The stretch in which ``start`` has the exponent 1, and ``kept`` what it is given."""
        try:
            found = self._extend({}, [*kept.items(), (start, 1)])
        except Blocked as why:
            raise _failure(self.laws.group, "scaled", why) from None
        exponents = {place: exponent for place, exponent in found.items() if exponent}
        positive = any(law.positive for place in exponents for law in self.laws.of[place])
        return Stretch(self.laws.group, exponents, positive)

    def _extend(
        self, known: Mapping[Place, int], more: list[tuple[Place, int]]
    ) -> dict[Place, int]:
        """Follow what ``more`` implies; where a law leaves a choice, try one after the other."""
        exponents, todo = dict(known), list(more)
        while todo:
            place, exponent = todo.pop()
            if place in exponents:
                if exponents[place] != exponent:
                    raise Blocked(
                        f"{place[0].name} would be scaled in two ways", place[0].producer()
                    )
                continue
            if exponent:
                self.laws.check(place)
            exponents[place] = exponent
            for law in self.laws.of[place]:
                todo += self._implied(law, exponents)
        for place in exponents:
            for law in self.laws.of[place]:
                for side in law.sides:
                    if options := self._options(side, exponents):
                        return self._try(exponents, options)
        return exponents

    def _try(
        self, exponents: dict[Place, int], options: list[list[tuple[Place, int]]]
    ) -> dict[Place, int]:
        for option in options[:-1]:
            try:
                return self._extend(exponents, option)
            except Blocked:
                continue
        return self._extend(exponents, options[-1])

    def _implied(self, law: Law, exponents: Mapping[Place, int]) -> Iterator[tuple[Place, int]]:
        for place in law.apart:
            if exponents.get(place):
                op = law.relation.node.op_type
                raise Blocked(f"{op} is not linear in {place[0].name}", law.relation.node)
        for side in law.sides:
            unknown = [p for p in _members(side) if p not in exponents]
            if len(unknown) > 1:
                continue
            missing = _missing(side, exponents)
            if not unknown and missing:
                op = law.relation.node.op_type
                raise Blocked(f"{op} would not undo it", law.relation.node)
            if unknown:
                yield unknown[0], missing if unknown[0] in side.factors else -missing

    def _options(self, side: Side, exponents: Mapping[Place, int]) -> list[list[tuple[Place, int]]]:
        """Ways to satisfy a product of which several exponents are open; none where it is."""
        open_ = [place for place in side.factors if place not in exponents]
        missing = _missing(side, exponents)
        if not missing or not open_:
            return []
        if side.output is not None and side.output not in exponents:
            return [[(place, 0) for place in open_]]  # the output follows what is known
        if len(open_) == 1:
            return []
        return [[(p, missing if p is chosen else 0) for p in open_] for chosen in open_]


def _members(side: Side) -> tuple[Place, ...]:
    return side.factors if side.output is None else (*side.factors, side.output)


def _missing(side: Side, exponents: Mapping[Place, int]) -> int:
    """What the open exponents of a product must add up to."""
    target = 0 if side.output is None else exponents.get(side.output, 0)
    return target - sum(exponents.get(place, 0) for place in side.factors)


# -- rotation -------------------------------------------------------------------------------------------


class _Rotation:
    """Collects the places that turn together with one, or finds what does not turn."""

    def __init__(self, laws: _Laws) -> None:
        self.laws = laws

    def stretch(self, start: Place) -> Stretch:
        """The stretch that turns with ``start``."""
        found: dict[Place, int] = {}
        todo = [start]
        try:
            while todo:
                place = todo.pop()
                if place in found:
                    continue
                self.laws.check(place)
                found[place] = 1
                for law in self.laws.of[place]:
                    todo += self._follow(law, place)
        except Blocked as why:
            raise _failure(self.laws.group, "rotated", why) from None
        return Stretch(self.laws.group, found, positive=False)

    def _follow(self, law: Law, place: Place) -> list[Place]:
        """The other places of a law that must turn with one of them."""
        node = law.relation.node
        if law.turned is not None:
            if place not in law.turned:
                raise Blocked(f"{node.op_type} does not turn with its scale", node)
            held = edit.const_array(law.uniform)
            if held is None or held.size == 0 or not np.all(held == held.reshape(-1)[0]):
                raise Blocked(f"{node.op_type} has a scale of its own per position", node)
            return list(law.turned)
        # Scores that have the letter weigh the elements of each of its positions by themselves.
        weighed = any(
            side.output is None and side.factors and not side.summed for side in law.sides
        )
        if law.apart or law.positive or weighed:
            raise Blocked(f"{node.op_type} acts on each position by itself", node)
        follow: list[Place] = []
        for side in law.sides:
            passed = len(side.factors) == 1 and side.output is not None
            contracted = len(side.factors) == 2 and side.summed
            if place in _members(side) and not passed and not contracted:
                raise Blocked(f"{node.op_type} acts on each position by itself", node)
            if place in _members(side):
                follow += _members(side)
        return follow
