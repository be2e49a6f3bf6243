"""Axis groups: everything that must change together, and what may be done to it.

    axes = analyse(model)
    for group in axes.groups:
        print(axes.show(group), group.size, group.allows("delete"), group.pins)

A group is an atom that :mod:`netlathe.analysis.axes.relate` is left with: deleting one of its positions
deletes it in every weight, attribute and literal that has the axis, be it whole, as a factor of a
product or as a segment. Two groups never need each other, but for dims that are made of segments of
both and must keep a position.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from netlathe.analysis.axes import algebra
from netlathe.analysis.axes.algebra import Axis, find
from netlathe.analysis.axes.bind import Relation
from netlathe.analysis.axes.relate import (
    EVERY,
    Edit,
    Listing,
    Pin,
    Related,
    Use,
    relate,
)
from netlathe.ir.provenance import module_path


@dataclass(frozen=True)
class Member:
    """A dim of a weight, or of a cache that the model takes and gives back."""

    value: ir.Value
    dim: int

    @property
    def where(self) -> str:
        """Module path of the member."""
        return module_path(self.value)


@dataclass(frozen=True, eq=False)
class Group:
    """Dims that share an axis, with everything that knows its size."""

    name: str
    size: int
    members: tuple[Member, ...]
    uses: tuple[Use, ...]
    listings: tuple[Listing, ...]
    pins: tuple[Pin, ...]
    least: int  # how many positions must stay
    interface: tuple[str, ...]  # graph inputs and outputs whose shape an edit changes
    atom: Axis

    def allows(self, edit: Edit) -> bool:
        """Whether nothing forbids the edit."""
        return not any(edit in pin.edits for pin in self.pins) and (
            edit != "delete" or self.size > self.least
        )

    def forbidding(self, edit: Edit) -> list[Pin]:
        """The pins that forbid an edit."""
        return [pin for pin in self.pins if edit in pin.edits]


@dataclass(frozen=True)
class Axes:
    """The axis analysis of a model; it holds until the model changes."""

    related: Related
    groups: tuple[Group, ...]

    @property
    def model(self) -> ir.Model:
        """The model that was analysed."""
        return self.related.model

    @cached_property
    def by_atom(self) -> Mapping[Axis, Group]:
        """The group of each atom."""
        return {group.atom: group for group in self.groups}

    @cached_property
    def letters(self) -> Mapping[Axis, list[tuple[Relation, str]]]:
        """For each atom, the letters of signatures whose axis has it."""
        found: dict[Axis, list[tuple[Relation, str]]] = defaultdict(list)
        for relation in self.related.relations:
            for letter, axis in relation.axes.items():
                for atom in algebra.atoms(axis):
                    found[atom].append((relation, letter))
        return found

    def of(self, value: ir.Value, dim: int) -> tuple[Group, ...]:
        """The groups that a dim is made of, in order; atoms of unknown size belong to none."""
        axis = self.related.axes[value][dim]
        return tuple(self.by_atom[atom] for atom in algebra.atoms(axis) if atom in self.by_atom)

    def term(self, value: ir.Value, dim: int) -> str:
        """A dim in terms of its groups, such as ``(g4 g5)`` or ``[g7 | g7]``."""
        return algebra.show(self.related.axes[value][dim], self._name)

    def _name(self, atom: Axis) -> str:
        group = self.by_atom.get(atom)
        return str(atom.size) if group is None else group.name


def analyse(model: ir.Model, *, boundary: bool = True) -> Axes:
    """Find the axis groups of a model in normal form.

    Without ``boundary``, graph inputs and outputs pin nothing.
    """
    return sort(relate(model, boundary=boundary))


def sort(related: Related) -> Axes:
    """Sort related axes into groups."""
    members = _members(related)
    uses, listings = defaultdict(list), defaultdict(list)
    for use in related.uses:
        for atom in algebra.atoms(use.axis):
            uses[atom].append(use)
    for listing in related.listings:
        for atom in algebra.atoms(listing.axis):
            listings[atom].append(listing)
    pins, least = _pins(related), _least(related)
    held = {value: value.name or "" for pair in related.caches for value in pair}
    groups: list[Group] = []
    for atom, found in members.items():
        if not isinstance(atom.size, int) or (atom.size == 1 and not atom.row):
            continue
        inputs = [member.value for member in found if member.value in held] if held else []
        outputs = [out for past, out in related.caches if past in inputs]
        groups.append(
            Group(
                name=f"g{len(groups)}",
                size=atom.size,
                members=tuple(found),
                uses=tuple(uses[atom]),
                listings=tuple(listings[atom]),
                pins=tuple(dict.fromkeys((*pins[atom], *_held(atom)))),
                least=least[atom],
                interface=tuple(dict.fromkeys(held[value] for value in (*inputs, *outputs))),
                atom=atom,
            )
        )
    return Axes(related, tuple(groups))


def _members(related: Related) -> dict[Axis, list[Member]]:
    """Dims of weights and caches by atom, in the order in which nodes read them."""
    graph = related.model.graph
    owned = {value for value in graph.initializers.values() if not value.is_graph_input()}
    owned |= {past for past, _ in related.caches}
    read = (value for node in graph for value in node.inputs if value is not None)
    members: dict[Axis, list[Member]] = defaultdict(list)
    copies: dict[ir.Value, list[tuple[Axis, ...]]] = defaultdict(list)
    for (node, index), axes in related.copies.items():
        if (value := node.inputs[index]) is not None:
            copies[value].append(axes)
    known: dict[Axis, tuple[Axis, ...]] = {}
    for value in dict.fromkeys(read):
        if value not in owned or value not in related.data:
            continue
        for axes in copies.get(value) or [related.axes.get(value, ())]:
            for dim, axis in enumerate(axes):
                member = Member(value, dim)
                for atom in _atoms(axis, known):
                    members[atom].append(member)
    shared = any(len(each) > 1 for each in copies.values())
    return {atom: list(dict.fromkeys(at)) if shared else at for atom, at in members.items()}


def _atoms(axis: Axis, known: dict[Axis, tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """The atoms of an axis, found once for all that it stands in."""
    axis = find(axis)
    if axis not in known:
        known[axis] = tuple(algebra.atoms(axis))
    return known[axis]


def _pins(related: Related) -> dict[Axis, list[Pin]]:
    pins: dict[Axis, list[Pin]] = defaultdict(list)
    for axis, pin in related.pins:
        for atom in algebra.atoms(axis):
            pins[atom].append(pin)
    for axis, count in related.least:
        if not algebra.is_atom(axis):
            reason = f"{count} positions of an axis that it is a part of must stay"
            for atom in algebra.atoms(axis):
                pins[atom].append(Pin(EVERY - {"permute"}, reason))
    return pins


def _held(atom: Axis) -> Iterator[Pin]:
    """Why an atom stays that is part of what stays, but stands in none of its terms any more."""
    if isinstance(atom.stays, Pin):
        yield atom.stays


def _least(related: Related) -> dict[Axis, int]:
    """How many positions of each atom must stay, so that no dim is empty and TopK finds its k."""
    least: dict[Axis, int] = defaultdict(int)
    for axis, count in related.least:
        least[find(axis)] = max(least[find(axis)], count)
    known: dict[Axis, frozenset[Axis]] = {}
    for axes in related.axes.values():
        for axis in axes:
            for atom in _vital(find(axis), known):
                least[atom] = max(least[atom], 1)
    return least


def _vital(axis: Axis, known: dict[Axis, frozenset[Axis]]) -> frozenset[Axis]:
    """Atoms without which nothing of the axis is left."""
    if axis not in known:
        if axis.form is None:
            found = frozenset({axis})
        elif isinstance(axis.form, algebra.Product):
            found = frozenset().union(*(_vital(find(f), known) for f in axis.form.factors))
        elif len({part for part in algebra.parts(axis) if algebra.is_atom(part)}) > 1:
            found = frozenset()  # either of two atoms may go
        else:
            each = [_vital(part, known) for part in algebra.parts(axis)]
            found = each[0].intersection(*each[1:])
        known[axis] = found
    return known[axis]
