"""Gives every dim of every value its axis: walks the graph once and applies each node's signature.

Nothing is guessed. A node without a signature pins every axis it touches; so do the graph's inputs and
outputs, positions that are used as numbers, and views of an axis that no term expresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import onnx_ir as ir

from netlathe.analysis.axes import algebra, pattern
from netlathe.analysis.axes.algebra import Axis, Size, Space
from netlathe.analysis.axes.pattern import BROADCAST, Letter, One, Run, Term, Then, Times
from netlathe.analysis.axes.signature import (
    NoSignature,
    Signature,
    Site,
    SizeOf,
    Spot,
    Stated,
    origin,
)
from netlathe.analysis.axes.signatures import TABLE
from netlathe.ir import dims, types
from netlathe.ir.dims import Dim
from netlathe.ir.provenance import location

Edit: TypeAlias = Literal["delete", "permute"]
EVERY: frozenset[Edit] = frozenset({"delete", "permute"})
MOVING: frozenset[Edit] = frozenset({"permute"})


@dataclass(frozen=True)
class Pin:
    """Why an axis may not be edited."""

    edits: frozenset[Edit]  # what is forbidden
    reason: str  # "Conv slides a window along it"
    node: ir.Node | None = None

    @property
    def where(self) -> str:
        """Module path and source line of the node that pins."""
        return "" if self.node is None else location(self.node)


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


@dataclass(frozen=True)
class Use:
    """An attribute or an element of an operand that is the size of an axis."""

    node: ir.Node
    spot: Spot
    axis: Axis


@dataclass(frozen=True)
class Listing:
    """A constant operand that lists positions of ``axis``, one for each position of ``order``."""

    node: ir.Node
    operand: int
    axis: Axis
    order: Axis


@dataclass
class Related:
    """The axes of a model, before they are sorted into groups."""

    model: ir.Model
    boundary: bool  # whether graph inputs and outputs pin
    axes: dict[ir.Value, tuple[Axis, ...]] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)
    pins: list[tuple[Axis, Pin]] = field(default_factory=list)
    least: list[tuple[Axis, int]] = field(default_factory=list)
    positions: dict[ir.Value, Axis] = field(default_factory=dict)  # integers that index an axis
    caches: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)  # graph input and output
    data: set[ir.Value] = field(default_factory=set)  # what is read for more than a list of sizes


def relate(model: ir.Model, *, boundary: bool = True) -> Related:
    """Find the axes of ``model``, which is in normal form with types recorded.

    Without ``boundary`` the graph's inputs and outputs pin nothing: what a part of a graph allows.
    """
    return _Walk(model, boundary).run()


class _Walk:
    def __init__(self, model: ir.Model, boundary: bool) -> None:
        self.found = Related(model, boundary)
        self.graph = model.graph
        self.boundary = boundary
        self.space = Space(self._misfit)
        self.node: ir.Node | None = None  # the one whose signature is applied

    def run(self) -> Related:
        if self.boundary:
            self.found.caches = list(caches(self.graph))
        state = {value for pair in self.found.caches for value in pair}
        for value in (*self.graph.inputs, *self.graph.initializers.values()):
            self._fresh(value)
        for value in self.graph.inputs if self.boundary else ():
            if value not in state:
                self._pin_value(value, f"graph input {value.name} has it")
        for node in self.graph:
            self.node = node
            try:
                signature = signature_of(node)
                self._apply(signature)
            except NoSignature as why:
                self._pin_node(f"{_op(node)} {why}")
        self.node = None
        for value in self.graph.outputs if self.boundary else ():
            if value not in state:
                self._pin_value(value, f"graph output {value.name} has it")
            if value in self.found.positions:
                self._pin(self.found.positions[value], f"graph output {value.name} holds positions")
        return self.found

    # -- pins -------------------------------------------------------------------------------------

    def _pin(self, axis: Axis, reason: str, edits: frozenset[Edit] = EVERY) -> None:
        self.found.pins.append((axis, Pin(edits, reason, self.node)))

    def _misfit(self, axis: Axis) -> None:
        assert self.node is not None
        self._pin(axis, f"{_op(self.node)} looks at it in a way that no common split expresses")

    def _pin_value(self, value: ir.Value, reason: str) -> None:
        for axis in self._axes(value) or ():
            self._pin(axis, reason)

    def _pin_node(self, reason: str) -> None:
        """Pin everything that a node reads, makes, or whose positions it holds."""
        assert self.node is not None
        for value in self.node.outputs:
            self._fresh(value)
        for value in dict.fromkeys((*reads(self.node), *self.node.outputs)):
            self.found.data.add(value)
            self._pin_value(value, reason)
            if value in self.found.positions:
                self._pin(self.found.positions[value], reason)

    # -- axes of values ---------------------------------------------------------------------------

    def _fresh(self, value: ir.Value) -> None:
        """Axes of their own for a value; none where its shape is not known."""
        shape = types.recorded(value).shape
        if shape is not None and None not in shape:
            self.found.axes[value] = tuple(Axis(size) for size in shape if size is not None)

    def _axes(self, value: ir.Value) -> tuple[Axis, ...] | None:
        return self.found.axes.get(value)

    # -- one node ---------------------------------------------------------------------------------

    def _apply(self, signature: Signature) -> None:
        assert self.node is not None
        node = self.node
        inputs = []
        for value in node.inputs:
            axes = () if value is None else self._axes(value)
            if axes is None:
                raise NoSignature("reads a value of unknown shape")
            inputs.append(axes)
        outputs = []
        for value in node.outputs:
            shape = types.recorded(value).shape
            if (shape is None or None in shape) and (value.uses() or value.is_graph_output()):
                raise NoSignature("makes a value of unknown shape")
            outputs.append(shape or ())
        bound = _Binder(node, signature, self.space)
        relation, made = bound.bind(inputs, outputs)
        self.found.relations.append(relation)
        for value, axes in zip(node.outputs, made, strict=True):
            self.found.axes[value] = axes
        for index, value in enumerate(node.inputs):
            if value is not None and index in bound.unseen:
                self._pin_value(value, f"{_op(node)} reads {value.name} as a list")
            elif value is not None:
                self.found.data.add(value)
        for names, reason in signature.fixed.items():
            for letter in relation.letters(names):
                self._pin(relation.axes[letter], f"{_op(node)} {reason}")
        for names, reason in signature.ordered.items():
            for letter in relation.letters(names):
                self._pin(relation.axes[letter], f"{_op(node)} {reason}", MOVING)
        for letter, least in signature.least.items():
            self.found.least.append((relation.axes[letter], least))
        for spot, text in signature.uses.items():
            self._use(spot, bound.build(pattern.parse_term(text)))
        for operand, texts in signature.lists.items():
            axis, order = (bound.build(pattern.parse_term(text)) for text in texts)
            self.found.listings.append(Listing(node, operand, axis, order))
        self._positions(relation)

    def _use(self, spot: Spot, axis: Axis) -> None:
        """Note a use of a size; pin the axis where the number comes out of a computation."""
        assert self.node is not None
        use = Use(self.node, spot, axis)
        if isinstance(spot, str):
            self.found.uses.append(use)
            return
        if all(not isinstance(atom.size, int) for atom in algebra.atoms(axis)):
            return  # a dynamic size, computed from shapes: no edit changes it
        value = self.node.inputs[spot[0]]
        assert value is not None
        source = origin(value, spot[1])
        if isinstance(source, Stated):
            self.found.uses.append(use)
        elif isinstance(source, SizeOf) and source.value in self.found.axes:
            self.space.join(axis, self.found.axes[source.value][source.dim])
        else:
            self._pin(axis, f"{_op(self.node)} gets its size from a computation, {value.name}")

    def _positions(self, relation: Relation) -> None:
        """Follow integers that are positions of an axis; used otherwise, they pin it."""
        node, signature, known = relation.node, relation.signature, self.found.positions
        moved = linear_inputs(signature.linear) if signature.moves else []
        for index, letter in signature.reads.items():
            value, axis = node.inputs[index], relation.axes[letter]
            assert value is not None
            if value in known:
                self.space.join(known[value], axis)
            elif index not in signature.lists:
                self._pin(axis, f"{_op(node)} looks up positions that {source_of(value)}")
        held = [value for index in moved if (value := node.inputs[index]) in known]
        if held and len(held) == len(moved):
            first = known[held[0]]
            for value in held[1:]:
                self.space.join(first, known[value])
            known.update({value: first for value in node.outputs})
            held = []
        for index, value in enumerate(node.inputs):
            if value in known and index not in signature.reads and (index not in moved or held):
                self._pin(known[value], f"{_op(node)} computes with its positions")
        for index, letter in signature.makes.items():
            if index < len(node.outputs):
                known[node.outputs[index]] = relation.axes[letter]


class _Binder:
    """Binds the letters of a signature to the axes of one node's operands."""

    def __init__(self, node: ir.Node, signature: Signature, space: Space) -> None:
        self.node = node
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
        see = self.space.cut(axis, sizes) if isinstance(term, Then) else None
        see = see or self.space.regroup([axis], sizes)
        for part, inner in zip(term.terms, see, strict=True):
            self._see(part, inner, slot)

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


# -- what a node stands for ---------------------------------------------------------------------------


def signature_of(node: ir.Node) -> Signature:
    """The signature of a node.

    Raises:
        NoSignature: its operator has none, or not for this node.
    """
    entry = TABLE.get(node.op_type) if node.domain == "" else None
    if entry is None:
        raise NoSignature("has no axis signature")
    return entry if isinstance(entry, Signature) else entry(Site(node))


def linear_inputs(formula: str) -> list[int]:
    """The inputs that a formula such as ``0*1 + 2`` names, in order."""
    return sorted({int(factor) for term in terms_of(formula) for factor in term})


def terms_of(formula: str) -> list[list[int]]:
    """``0*1 + 2`` as ``[[0, 1], [2]]``."""
    return [[int(f) for f in term.split("*")] for term in formula.split("+")] if formula else []


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, captures of its subgraphs included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from (value for value in inner.inputs if value is not None)
            yield from attribute.as_graph().outputs


def caches(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Graph inputs and outputs that hold a state from one call to the next.

    Such an output is the input with more appended: ``present = Concat(past, new)``, or the caches of
    an Attention. The caller hands one back as the other, so their widths are the model's own affair.
    """
    for past in graph.inputs:
        readers = [node for node, _ in past.uses() if node.op_type != "Shape"]
        if len(readers) != 1 or past.is_graph_output():
            continue
        (node,) = readers
        index = list(node.inputs).index(past)
        present: ir.Value | None = None
        if node.op_type == "Concat" and node.domain == "" and index == 0:
            present = node.outputs[0]
        elif node.op_type == "Attention" and node.domain == "" and index in (4, 5):
            present = node.outputs[index - 3] if len(node.outputs) > index - 3 else None
        if present is not None and present.is_graph_output():
            yield past, present


def source_of(value: ir.Value) -> str:
    """Where a value comes from, to complete "positions that ..."."""
    while True:
        node = value.producer()
        if node is None:
            kind = "graph input" if value.is_graph_input() else "constant"
            return f"{kind} {value.name} holds"
        keeps = node.domain == "" and node.op_type in _KEEP_ELEMENTS
        if not keeps or node.inputs[0] is None:
            return f"{_op(node)} computes ({value.name})"
        value = node.inputs[0]


_KEEP_ELEMENTS = frozenset(
    {"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)


def _op(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
