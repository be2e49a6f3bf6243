"""Gives every dim of every value its axis: walks the graph once and applies each node's signature.

Nothing is guessed. A node without a signature pins every axis it touches; so do the graph's inputs and
outputs, positions that are used as numbers, and views of an axis that no term expresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import onnx_ir as ir

from netlathe.analysis.axes import algebra, pattern
from netlathe.analysis.axes.algebra import Axis, Space
from netlathe.analysis.axes.bind import Binder, Relation, Staying
from netlathe.analysis.axes.signature import (
    Contents,
    NoSignature,
    Signature,
    Site,
    SizeOf,
    Spot,
    Stated,
    origin,
)
from netlathe.analysis.axes.signatures import TABLE
from netlathe.ir import edit, types
from netlathe.ir.dims import Dim
from netlathe.ir.provenance import location

Edit: TypeAlias = Literal["delete", "permute"]
EVERY: frozenset[Edit] = frozenset({"delete", "permute"})
MOVING: frozenset[Edit] = frozenset({"permute"})
DELETING: frozenset[Edit] = frozenset({"delete"})


@dataclass(frozen=True)
class Pin:
    """Why an axis may not be edited."""

    edits: frozenset[Edit]  # what is forbidden
    reason: str  # "Conv slides a window along it"
    node: ir.Node | None = None
    caller: bool = False  # it is only that the caller numbers the positions

    @property
    def where(self) -> str:
        """Module path and source line of the node that pins."""
        return "" if self.node is None else location(self.node)


ALONE = Pin(DELETING, "it is the only position of a dim")


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


@dataclass(frozen=True)
class Lookup:
    """A Gather that looks positions of ``axis`` up by integers that the caller gives (input 1)."""

    node: ir.Node
    axis: Axis
    ids: ir.Value  # the graph input


@dataclass
class Related:
    """The axes of a model, before they are sorted into groups."""

    model: ir.Model
    boundary: bool  # whether graph inputs and outputs pin
    axes: dict[ir.Value, tuple[Axis, ...]] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    pins: list[tuple[Axis, Pin]] = field(default_factory=list)
    least: list[tuple[Axis, int]] = field(default_factory=list)
    positions: dict[ir.Value, Axis] = field(default_factory=dict)  # integers that index an axis
    caches: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)  # graph input and output
    data: set[ir.Value] = field(default_factory=set)  # what becomes more than a list of sizes
    # Readers of a shared constant whose elements are all equal, each of which has its own axes for it.
    copies: dict[tuple[ir.Node, int], tuple[Axis, ...]] = field(default_factory=dict)


def relate(model: ir.Model, *, boundary: bool = True) -> Related:
    """Find the axes of ``model``, which is in normal form with types recorded.

    Without ``boundary`` the graph's inputs and outputs pin nothing: what a part of a graph allows.
    """
    known: dict[tuple[ir.Node, str], Staying] = {}
    while True:
        walk = _Walk(model, boundary, known)
        related = walk.run()
        if not walk.news:
            return related
        # Had it been known what stays, other views of the same positions would have been free.
        known |= walk.news


class _Walk:
    def __init__(
        self, model: ir.Model, boundary: bool, known: Mapping[tuple[ir.Node, str], Staying]
    ) -> None:
        self.found = Related(model, boundary)
        self.known = known  # of letters of nodes, by what is `apart` in their signatures
        self.news: dict[tuple[ir.Node, str], Staying] = {}
        self.graph = model.graph
        self.boundary = boundary
        self.space = Space(self._misfit, self._stays)
        self.node: ir.Node | None = None  # the one whose signature is applied
        self.lists: set[tuple[ir.Node, int]] = set()  # operands that list sizes
        self.dynamic: list[Use] = []  # elements of those of which nothing static is known yet

    def run(self) -> Related:
        if self.boundary:
            self.found.caches = list(caches(self.graph))
        state = {value for pair in self.found.caches for value in pair}
        for value in (*self.graph.inputs, *self.graph.initializers.values()):
            if not _is_blank(value):
                self._fresh(value)
        for value in self.graph.inputs if self.boundary else ():
            if value not in state:
                self._pin_value(value, f"graph input {value.name} has it")
        for node in self.graph:
            self.node = node
            try:
                signature = signature_of(node, self._contents)
                self._apply(signature)
            except NoSignature as why:
                self._pin_node(f"{_op(node)} {why}")
        self._settle_dynamic()
        self._keep_apart()
        self.node = None
        for value in self.graph.outputs if self.boundary else ():
            if value not in state:
                self._pin_value(value, f"graph output {value.name} has it", caller=True)
            if value in self.found.positions:
                self._pin(self.found.positions[value], f"graph output {value.name} holds positions")
        self._find_data()
        return self.found

    def _find_data(self) -> None:
        """Walk back from the outputs: what only becomes lists of sizes is no data."""
        data = self.found.data
        data.update(self.graph.outputs)
        for node in reversed(self.graph):
            if data.isdisjoint(node.outputs):
                continue
            listed: set[ir.Value | None] = set()
            tensors: set[ir.Value | None] = set()
            for index, value in enumerate(node.inputs):
                (listed if (node, index) in self.lists else tensors).add(value)
            data.update(value for value in reads(node) if value not in listed - tensors)

    # -- pins -------------------------------------------------------------------------------------

    def _pin(
        self, axis: Axis, reason: str, edits: frozenset[Edit] = EVERY, *, caller: bool = False
    ) -> None:
        pin = Pin(edits, reason, self.node, caller)
        self.found.pins.append((axis, pin))
        if "delete" in edits and not caller:
            algebra.hold(axis, pin)

    def _misfit(self, axis: Axis, of: Sequence[Axis]) -> None:
        """Pin an axis that no term expresses, unless what it is of is pinned already."""
        assert self.node is not None
        found = [atom for each in of for atom in algebra.atoms(each)]
        pins = [a.stays for a in found if isinstance(a.stays, Pin) and a.stays.edits == EVERY]
        rows = sum(atom.size == 1 and atom.stays is ALONE for atom in found)
        if pins and len(pins) + rows == len(found):
            algebra.hold(axis, pins[0])
            return
        self._pin(axis, f"{_op(self.node)} looks at it in a way that no common split expresses")

    def _stays(self, axis: Axis) -> None:
        assert self.node is not None
        self._pin(axis, f"{_op(self.node)} sees it as one row of several")

    def _pin_value(self, value: ir.Value, reason: str, *, caller: bool = False) -> None:
        for axis in self._axes(value) or ():
            self._pin(axis, reason, caller=caller)

    def _pin_node(self, reason: str) -> None:
        """Pin everything that a node reads, makes, or whose positions it holds."""
        assert self.node is not None
        for value in self.node.outputs:
            self._fresh(value)
        for value in dict.fromkeys((*reads(self.node), *self.node.outputs)):
            self._pin_value(value, reason)
            if value in self.found.positions:
                self._pin(self.found.positions[value], reason)

    @cached_property
    def _inference(self) -> types.Inference:
        return types.infer(self.found.model)

    def _contents(self, value: ir.Value) -> Sequence[Dim] | None:
        """The elements of a computed list of sizes: only asked for where there is one."""
        return self._inference.contents(value)

    # -- axes of values ---------------------------------------------------------------------------

    def _fresh(self, value: ir.Value) -> None:
        """Axes of their own for a value; none where its shape is not known."""
        axes = _fresh(value)
        if axes is not None:
            self.found.axes[value] = axes

    def _axes(self, value: ir.Value) -> tuple[Axis, ...] | None:
        return self.found.axes.get(value)

    # -- one node ---------------------------------------------------------------------------------

    def _apply(self, signature: Signature) -> None:
        assert self.node is not None
        node = self.node
        inputs: list[tuple[Axis, ...]] = []
        for index, value in enumerate(node.inputs):
            axes = () if value is None else self._axes(value)
            if axes is None and value is not None and _is_blank(value):
                axes = _fresh(value)
                assert axes is not None  # a constant has a shape
                self.found.copies[node, index] = axes
            if axes is None:
                raise NoSignature(f"has an operand {value.name if value else ''} of unknown shape")
            inputs.append(axes)
        outputs = []
        for value in node.outputs:
            shape = types.recorded(value).shape
            if (shape is None or None in shape) and (value.uses() or value.is_graph_output()):
                raise NoSignature("makes a value of unknown shape")
            outputs.append(shape or ())
        stays = {
            letter: self.known[node, letter]
            for letter in signature.apart
            if (node, letter) in self.known
        }
        bound = Binder(node, signature, self.space, stays)
        relation, made = bound.bind(inputs, outputs)
        self.found.relations.append(relation)
        for value, axes in zip(node.outputs, made, strict=True):
            self.found.axes[value] = axes
        for axes in (*inputs, *made):
            for axis in axes:
                self._keep_rows(axis)
        for index, value in enumerate(node.inputs):
            if value is not None and index in bound.unseen:
                self._pin_value(value, f"{_op(node)} reads {value.name} as a list")
                self.lists.add((node, index))
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

    def _keep_rows(self, axis: Axis) -> None:
        """A row that all positions of a dim are in has to stay, or the dim would be empty."""
        if isinstance(algebra.find(axis).form, algebra.Product):
            for row in algebra.factors(axis):
                if row.size == 1 and row.stays is None:
                    algebra.hold(row, ALONE)

    def _keep_apart(self) -> None:
        """Pin what stands in two axes of a node of which one deletion takes only one."""
        for relation in self.found.relations:
            for letter, names in relation.signature.apart.items():
                others = [axis for name in names.split() if (axis := relation.axes[name]).size != 1]
                if relation.axes[letter].size == 1 or not others:
                    continue
                own = list(algebra.atoms(relation.axes[letter]))
                theirs = {atom for axis in others for atom in algebra.atoms(axis)}
                shared = [atom for atom in own if atom in theirs]
                self.node = relation.node
                reason = f"{_op(self.node)} has it in the number of its groups and in the channels of each"
                for atom in shared:
                    self._pin(atom, reason, DELETING)
                if shared or all(atom.stays is not None for atom in own):
                    self._learn(relation, letter, shared or own)

    def _learn(self, relation: Relation, letter: str, staying: Sequence[Axis]) -> None:
        """Note which positions of a letter stay with these atoms, if more do than was known."""
        found = algebra.positions(relation.axes[letter], staying)
        known = self.known.get((relation.node, letter), Staying(frozenset(), None))
        if not found <= known.positions:
            every = found | known.positions
            self.news[relation.node, letter] = Staying(every, staying[0].stays)

    def _use(self, spot: Spot, axis: Axis) -> None:
        """Note a use of a size."""
        assert self.node is not None
        use = Use(self.node, spot, axis)
        if isinstance(spot, str):
            self.found.uses.append(use)
        elif _has_static(axis):
            self._settle(use)
        else:  # a dynamic size, computed from shapes: no edit changes it
            self.dynamic.append(use)

    def _settle_dynamic(self) -> None:
        """Settle sizes that were dynamic when they were met, and have turned out to be (batch heads)."""
        while found := [use for use in self.dynamic if _has_static(use.axis)]:
            self.dynamic = [use for use in self.dynamic if use not in found]
            for use in found:
                self._settle(use)

    def _settle(self, use: Use) -> None:
        """Note an element that edits must set; pin the axis where the number comes out of a computation."""
        self.node = use.node
        assert not isinstance(use.spot, str)
        operand, element = use.spot
        value = use.node.inputs[operand]
        assert value is not None
        source = origin(value, element)
        if isinstance(source, Stated):
            self.found.uses.append(use)
        elif isinstance(source, SizeOf) and source.value in self.found.axes:
            self.space.join(use.axis, self.found.axes[source.value][source.dim])
        else:
            self._pin(use.axis, f"{_op(use.node)} gets its size from a computation, {value.name}")

    def _positions(self, relation: Relation) -> None:
        """Follow integers that are positions of an axis; used otherwise, they pin it."""
        node, signature, known = relation.node, relation.signature, self.found.positions
        moved = linear_inputs(signature.linear) if signature.moves else []
        if node.inputs and (value := node.inputs[0]) in known and _keeps(node, known[value]):
            known[node.outputs[0]] = known[value]
            return
        for index, letter in signature.reads.items():
            value, axis = node.inputs[index], relation.axes[letter]
            assert value is not None
            if value in known:
                self.space.join(known[value], axis)
            elif index not in signature.lists:
                source = _source(value)
                given = source.is_graph_input() and node.op_type == "Gather"
                if given:
                    self.found.lookups.append(Lookup(node, axis, source))
                reason = f"{_op(node)} looks up positions that {source_of(value)}"
                self._pin(axis, reason, caller=given)
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


def _keeps(node: ir.Node, axis: Axis) -> bool:
    """Whether a Clip has bounds that every position of an axis is within.

    Routers of experts clip the ids of the experts that they picked, for the sake of other devices.
    """
    if node.op_type != "Clip" or node.domain != "" or not isinstance(axis.size, int):
        return False
    bounds = [*node.inputs[1:], None, None][:2]
    for bound, limit, sign in zip(bounds, (0, axis.size - 1), (1, -1), strict=True):
        if bound is None:
            continue
        number = edit.const_array(bound)
        if number is None or number.size != 1 or sign * number.item() > sign * limit:
            return False
    return True


def _fresh(value: ir.Value) -> tuple[Axis, ...] | None:
    """New axes for a value; None where its shape is not known."""
    shape = types.recorded(value).shape
    if shape is None or None in shape:
        return None
    return tuple(Axis(size) for size in shape if size is not None)


_MOST_BLANK = 1 << 16  # elements of a vector that is looked at to see whether all are equal


def _is_blank(value: ir.Value) -> bool:
    """Whether a constant is a vector of equal elements that several nodes read.

    Exporters share the zeros of absent biases, and folding a scale leaves ones: that two layers read
    the same vector of ones does not make their widths one.
    """
    tensor = value.const_value
    if tensor is None or value.is_graph_input() or len(value.uses()) < 2:
        return False
    if len(tensor.shape) != 1 or not 1 < tensor.size <= _MOST_BLANK or value.is_graph_output():
        return False
    if not tensor.dtype.is_floating_point():
        return False
    array = tensor.numpy()
    return bool((array == array[0]).all())


# -- what a node stands for ---------------------------------------------------------------------------


def signature_of(node: ir.Node, contents: Contents = lambda value: None) -> Signature:
    """The signature of a node; ``contents`` knows the elements of computed lists of sizes.

    Raises:
        NoSignature: its operator has none, or not for this node.
    """
    entry = TABLE.get(node.op_type) if node.domain == "" else None
    if entry is None:
        raise NoSignature("has no axis signature")
    return entry if isinstance(entry, Signature) else entry(Site(node, contents))


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
    value = _source(value)
    node = value.producer()
    if node is None:
        kind = "graph input" if value.is_graph_input() else "constant"
        return f"{kind} {value.name} holds"
    return f"{_op(node)} computes ({value.name})"


def _source(value: ir.Value) -> ir.Value:
    """The value whose elements these are, perhaps moved about."""
    while True:
        node = value.producer()
        keeps = node is not None and node.domain == "" and node.op_type in _KEEP_ELEMENTS
        if node is None or not keeps or node.inputs[0] is None:
            return value
        value = node.inputs[0]


_KEEP_ELEMENTS = frozenset(
    {"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)


def _has_static(axis: Axis) -> bool:
    return any(isinstance(atom.size, int) for atom in algebra.atoms(axis))


def _op(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
