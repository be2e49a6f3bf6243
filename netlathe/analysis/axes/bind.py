"""Binds the letters of a signature to the axes of one node's operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import onnx_ir as ir

from netlathe.analysis.axes import algebra, pattern
from netlathe.analysis.axes.algebra import Axis, Size, Space
from netlathe.analysis.axes.pattern import BROADCAST, Letter, One, Run, Term, Then, Times
from netlathe.analysis.axes.signature import NoSignature, Signature, Site, Spot
from netlathe.ir import dims
from netlathe.ir.dims import Dim


@dataclass(frozen=True)
class Slot:
    """A dim of an operand of a node."""

    output: bool
    operand: int
    dim: int

    def value(self, node: ir.Node) -> ir.Value:
        """The value that has the dim."""
        value = (node.outputs if self.output else node.inputs)[self.operand]
        assert value is not None
        return value


@dataclass(frozen=True)
class Staying:
    """Positions of a letter that are known to stay, and why."""

    positions: frozenset[int]
    why: object


@dataclass(frozen=True)
class Relation:
    """A node with its signature, the axis of each letter, and the dims in which the letter stands."""

    node: ir.Node
    signature: Signature
    axes: Mapping[str, Axis]
    slots: Mapping[str, tuple[Slot, ...]]
    runs: Mapping[str, tuple[str, ...]]  # the letters of each run of dims

    def letters(self, names: str) -> list[str]:
        """Single letters for names of letters and runs, as a signature's fields give them."""
        return [letter for name in names.split() for letter in self.runs.get(name, (name,))]


class Binder:
    """Binds the letters of a signature to the axes of one node's operands."""

    def __init__(
        self,
        node: ir.Node,
        signature: Signature,
        space: Space,
        stays: Mapping[str, Staying],
    ) -> None:
        self.node = node
        self.stays = stays
        self.signature = signature
        self.space = space
        self.axes: dict[str, Axis] = {}
        self.sizes: dict[str, Size] = {}
        self.slots: dict[str, list[Slot]] = {}
        self.runs: dict[str, tuple[str, ...]] = {}
        self.unseen: list[int] = []  # inputs whose axes mean nothing

    def bind(
        self, inputs: Sequence[tuple[Axis, ...]], outputs: Sequence[Sequence[Dim]]
    ) -> tuple[Relation, list[tuple[Axis, ...]]]:
        """The relation, and the axes of the outputs."""
        rule = pattern.parse(self.signature.rule)
        if len(inputs) > len(rule.inputs) or len(outputs) > len(rule.outputs):
            raise NoSignature("has more operands than its signature")
        seen = []
        for index, (operand, axes) in enumerate(zip(rule.inputs, inputs, strict=False)):
            if operand.dims is None:
                self.unseen.append(index)
            elif self.node.inputs[index] is not None:
                seen.append((index, self._spread(operand.dims, len(axes)), axes))
        made = [
            self._spread(operand.dims or (), len(shape))
            for operand, shape in zip(rule.outputs, outputs, strict=False)
        ]
        found: list[tuple[Term, Dim]] = []
        for _, terms, axes in seen:
            found += zip(terms, (axis.size for axis in axes), strict=True)
        for terms, shape in zip(made, outputs, strict=False):
            found += zip(terms, shape, strict=True)
        self._measure(found)
        for index, terms, axes in seen:
            for dim, (term, axis) in enumerate(zip(terms, axes, strict=True)):
                self._see(term, axis, Slot(False, index, dim))
        results = []
        for index, terms in enumerate(made):
            results.append(tuple(self.build(term) for term in terms))
            for dim, term in enumerate(terms):
                for letter in pattern.letters(term):
                    self.slots.setdefault(letter, []).append(Slot(True, index, dim))
        slots = {letter: tuple(found) for letter, found in self.slots.items()}
        return Relation(self.node, self.signature, self.axes, slots, self.runs), results

    def _spread(self, of: Sequence[pattern.Dim], rank: int) -> list[Term]:
        """The dims of an operand with a letter for every dim of a run."""
        runs = sum(isinstance(dim, Run) for dim in of)
        count = rank - (len(of) - runs)
        if runs > 1 or count < 0 or (not runs and count):
            raise NoSignature(f"has an operand of {rank} dims, which its signature lacks")
        terms: list[Term] = []
        for dim in of:
            if not isinstance(dim, Run):
                terms.append(dim)
                continue
            # What broadcasts is aligned at its end: letters count from there.
            order = range(count - 1, -1, -1) if dim == BROADCAST else range(count)
            letters = tuple(f"{dim.name}{index}" for index in order)
            if len(letters) >= len(self.runs.get(dim.name, ())):
                self.runs[dim.name] = letters
            terms += [Letter(letter) for letter in letters]
        return terms

    # -- sizes ------------------------------------------------------------------------------------

    def _measure(self, found: list[tuple[Term, Dim]]) -> None:
        """Find the size of every letter from the dims, and from the attributes that are sizes."""
        self.sizes.update(self.signature.sizes)
        for spot, text in self.signature.uses.items():
            if (size := self._stated(spot)) is not None:
                found.append((pattern.parse_term(text), size))
        left = [(term, size) for term, size in found if size is not None]
        for term, size in left:
            if isinstance(term, Letter) and self.sizes.get(term.name, 1) == 1:
                self.sizes[term.name] = size  # of what broadcasts, the size that is not 1
        left = [(term, size) for term, size in left if isinstance(term, Times | Then)]
        while left:
            rest = [(term, size) for term, size in left if not self._solve(term, size)]
            if len(rest) == len(left):
                raise NoSignature(f"has dims that do not fit its signature, {rest[0][1]}")
            left = rest
        for term, size in found:  # a single position is one of each of its factors
            for letter in pattern.letters(term) if size == 1 else ():
                self.sizes.setdefault(letter, 1)

    def _solve(self, term: Term, size: Size) -> bool:
        """Find the one unknown size within a term; whether there is none now."""
        if isinstance(term, Letter):
            self.sizes.setdefault(term.name, size)
            return True
        if isinstance(term, One):
            return True
        known = [self._size(part) for part in term.terms]
        unknown = [part for part, held in zip(term.terms, known, strict=True) if held is None]
        if not unknown or size == 1:
            return True
        if len(unknown) > 1:
            return False
        rest: Dim = size
        for held in known:
            if held is not None and isinstance(term, Times):
                rest = algebra.divide(rest, held) if rest is not None else None
            elif held is not None:
                rest = dims.subtract(rest, held)
        return rest is not None and self._solve(unknown[0], rest)

    def _size(self, term: Term) -> Dim:
        if isinstance(term, Letter):
            return self.sizes.get(term.name)
        if isinstance(term, One):
            return 1
        sizes = [self._size(part) for part in term.terms]
        if None in sizes:
            return None
        if isinstance(term, Times):
            return dims.product(sizes)
        total: Dim = 0
        for size in sizes:
            total = dims.add(total, size)
        return total

    def _stated(self, spot: Spot) -> int | None:
        """The size that an attribute or a constant operand states."""
        if isinstance(spot, str):
            return self.node.attributes.get_int(spot, 0) or None
        listed = Site(self.node).ints(spot[0])
        return None if listed is None else listed[spot[1]]

    # -- axes -------------------------------------------------------------------------------------

    def _see(self, term: Term, axis: Axis, slot: Slot) -> None:
        """Match an input's dim with its term."""
        if isinstance(term, One) or (axis.size == 1 and self._size(term) != 1):
            return  # one position for all: it broadcasts
        if isinstance(term, Letter):
            self.slots.setdefault(term.name, []).append(slot)
            if term.name in self.axes:
                self.space.join(self.axes[term.name], axis)
            else:
                self.axes[term.name] = axis
            return
        sizes = [self._known(part) for part in term.terms]
        if isinstance(term, Then):
            see = self.space.cut(axis, sizes)
        elif any(isinstance(part, Letter) and part.name in self.stays for part in term.terms):
            see = [self._held(part, size) for part, size in zip(term.terms, sizes, strict=True)]
            self.space.join(algebra.product(see), axis)
        else:
            see = self.space.regroup([axis], sizes)
        for part, inner in zip(term.terms, see, strict=True):
            self._see(part, inner, slot)

    def _held(self, term: Term, size: Size) -> Axis:
        """A new axis, of which the positions stay that are known to."""
        axis = Axis(size)
        stays = self.stays.get(term.name) if isinstance(term, Letter) else None
        if stays is not None and isinstance(size, int):
            runs = [list(run) for _, run in groupby(range(size), stays.positions.__contains__)]
            for piece, run in zip(self.space.cut(axis, [*map(len, runs)]), runs, strict=True):
                if run[0] in stays.positions:
                    algebra.hold(piece, stays.why)
        return axis

    def build(self, term: Term) -> Axis:
        """The axis of a term, with new atoms for letters that no input has."""
        if isinstance(term, One):
            return Axis(1)
        if isinstance(term, Letter):
            if term.name not in self.axes:
                self.axes[term.name] = Axis(self._known(term))
            return self.axes[term.name]
        inner = [self.build(part) for part in term.terms]
        return algebra.segments(inner) if isinstance(term, Then) else algebra.product(inner)

    def _known(self, term: Term) -> Size:
        size = self._size(term)
        if size is None:
            raise NoSignature("has an operand whose size nothing tells")
        return size
