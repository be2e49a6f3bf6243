"""Cuts residual streams into segments, each of which may have an orthogonal basis of its own.

A stream ``x = x + f(norm(x))`` turns as a whole: its writers, its norms' readers and the sums between
them follow one rotation (:func:`netlathe.analysis.axes.to_rotate`). Where a matrix stands on an edge of
it, an *adapter*, the stream before and after the edge may turn by different ones. Adapters stand

* on the joins: where a value that norms read goes on into a sum (SliceGPT's ``Q_prev' Q_next``), if
  every block is to have its own basis;
* on the ways in and out of what cannot turn: a LayerNormalization that stays, an activation.

An adapter is the identity when it is put in, so the model is still the function it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from netlathe.analysis import channels, streams
from netlathe.analysis.axes import Axes, Group, Stretch, analyse, to_rotate
from netlathe.analysis.streams import Stream
from netlathe.diagnostics import PassError
from netlathe.ir import edit, weights
from netlathe.ir.provenance import module_path

CREATED_BY = "slice"
_FOLD_FIRST = "run fold_norms first, which makes of norms RMSNormalization without a scale"
_NO_BASIS = "; prune or drop need no change of basis"


@dataclass(frozen=True, order=True)
class Edge:
    """An operand of a node, by the name of the node's first output: it holds in copies of the model."""

    reader: str
    operand: int


@dataclass
class Segment:
    """What turns by one matrix: ``points`` are where the stream is read, in order, ``norms`` by what."""

    points: list[str]
    norms: list[str]  # outputs of RMSNormalizations over it
    stretch: Stretch
    where: str

    @property
    def group(self) -> Group:
        """Its channels."""
        return self.stretch.group


@dataclass
class Layout:
    """A copy of the model with its adapters, cut into segments; holds until the copy is edited."""

    model: ir.Model
    axes: Axes
    edges: list[Edge]  # where the adapters stand
    segments: list[Segment] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)  # (value, why, module path)


def lay_out(model: ir.Model, *, cut: bool | Collection[Edge]) -> Layout:
    """The segments of all residual streams of ``model``, which stays as it is.

    With ``cut`` every block has its own, or the stream is cut at these joins; else a stream is one, but for
    what stands in subgraphs.
    """
    edges: list[Edge] = []
    points: list[tuple[str, int]] = []
    refused: list[tuple[str, str, str]] = []
    for stream in _streams(model.graph):
        joins = _joins(stream)
        why = _post_norm(stream)
        if not joins and not why:
            continue
        found = why or _judge(model, stream)
        first = next(v for v in stream.members if v.name)
        if isinstance(found, str):
            refused.append((first.name or "", found, module_path(first)))
            continue
        entries, exits, fixed = found
        read = [at for at in _points(stream, [*exits, *joins]) if at[0] not in fixed]
        aside = [(value, axis) for value, axis in read if axis != len(value.shape or ()) - 1]
        if aside:
            value, axis = aside[0]
            reason = (
                f"its channels are dim {axis} of {value.name}: only those of a last dim are turned"
            )
            refused.append((first.name or "", reason, module_path(value)))
            continue
        at = joins if isinstance(cut, bool) else [join for join in joins if join in cut]
        edges += [*entries, *exits, *(at if cut else ())]
        points += [(value.name or "", axis) for value, axis in read]
    order = {v.name: at for at, v in enumerate(v for n in model.graph for v in n.outputs)}
    points.sort(key=lambda point: order.get(point[0], -1))
    layout = _bind(model, sorted(set(edges)), points)
    idle = _idle(layout)
    if idle:  # both sides of the adapter turn together anyway
        layout = _bind(model, [edge for edge in layout.edges if edge not in idle], points)
    layout.refused = refused
    return layout


def _bind(model: ir.Model, edges: Sequence[Edge], points: Sequence[tuple[str, int]]) -> Layout:
    copy = model.clone()
    insert(copy, edges)
    layout = Layout(copy, analyse(copy), list(edges))
    values = {v.name: v for node in copy.graph for v in node.outputs}
    known: dict[frozenset[tuple[ir.Value, int]], Segment] = {}
    for name, axis in points:
        stretch = stretch_at(layout.axes, values[name], axis)
        segment = known.setdefault(
            frozenset(stretch.exponents), Segment([], [], stretch, module_path(values[name]))
        )
        if name not in segment.points:
            segment.points.append(name)
            segment.norms += [
                node.outputs[0].name or ""
                for node, index in values[name].uses()
                if node.op_type == "RMSNormalization" and index == 0 and not node.domain
            ]
    layout.segments = list(known.values())
    return layout


def stretch_at(axes: Axes, value: ir.Value, axis: int) -> Stretch:
    """What turns with the channels of a value.

    Raises:
        PassError: they are made of several axes, or something does not turn.
    """
    groups = axes.of(value, axis)
    return to_rotate(axes, groups[0], value, axis)


def insert(model: ir.Model, edges: Sequence[Edge]) -> list[ir.Value]:
    """Put an identity matrix on each edge; the matrices, in order."""
    graph, taken = model.graph, edit.names_in(model.graph)
    readers = {node.outputs[0].name: node for node in graph}
    made = []
    for edge in edges:
        reader = readers[edge.reader]
        value = reader.inputs[edge.operand]
        assert value is not None and value.shape is not None and value.dtype is not None
        width = value.shape[-1]
        assert isinstance(width, int)
        name = edit.unique_name(graph, f"{value.name}_turn", taken)
        matrix = edit.constant(graph, _identity(width, value.dtype, name), name, taken)
        turn = edit.node(
            "MatMul",
            [value, matrix],
            name=edit.unique_name(graph, f"{value.name}_turned", taken),
            dtype=value.dtype,
            shape=value.shape,
            like=reader,
            created_by=CREATED_BY,
        )
        graph.insert_before(reader, turn)
        reader.replace_input_with(edge.operand, turn.outputs[0])
        made.append(matrix)
    return made


def _identity(width: int, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    one = ir.tensor(np.ones((), dtype.numpy()))
    return weights.derived(one, lambda a: np.eye(width, dtype=a.dtype), dtype, [width, width], name)


# -- streams ------------------------------------------------------------------------------------------


def _streams(graph: ir.Graph) -> Iterator[Stream]:
    seen: set[ir.Value] = set()
    for node in graph:
        if node.domain or node.op_type not in streams.NORMS:
            continue
        value = node.inputs[0]
        last = (channels.rank(value) or 0) - 1
        if value is None or value in seen or last < 0:
            continue
        stream = streams.grow(value, last)
        if stream is not None:
            seen.update(stream.members, stream.writers)
            yield stream


def _joins(stream: Stream) -> list[Edge]:
    """Where values that norms read go on into a sum."""
    read = {use.value for use in stream.norms}
    todo = list(read)
    while todo:  # what is only moved before a norm reads it
        node = todo.pop().producer()
        if node is not None and node.op_type not in ("Add", "Sub"):
            before = [v for v in node.inputs if v in stream.members and v not in read]
            read.update(v for v in before if v is not None)
            todo += [v for v in before if v is not None]
    found = []
    for value in read:
        for node, index in value.uses():
            if node.op_type not in ("Add", "Sub") or node.outputs[0] not in stream.members:
                continue
            other = node.inputs[1 - index]
            if other is not None and not weights.is_weight(other):
                found.append(Edge(node.outputs[0].name or "", index))
    return found


def _points(stream: Stream, edges: Sequence[Edge]) -> Iterator[tuple[ir.Value, int]]:
    """Values that are read as they are: by norms and by what stands behind an edge."""
    wanted = {(edge.reader, edge.operand) for edge in edges}
    for value, axis in {**stream.members, **stream.writers}.items():
        for node, index in value.uses():
            by_norm = any(use.node is node and use.value is value for use in stream.norms)
            inside = value in stream.members or by_norm
            if by_norm or (inside and (node.outputs[0].name, index) in wanted):
                yield value, axis
                break


def _post_norm(stream: Stream) -> str:
    """Why a stream that norms write to cannot turn; empty if none does."""
    for writer in stream.writers:
        maker = writer.producer()
        if maker is not None and not maker.domain and maker.op_type in streams.NORMS:
            return (
                f"post-norm: {maker.op_type} {writer.name} writes to the stream, and its scale"
                f" acts on each channel by itself{_NO_BASIS}"
            )
    return ""


def _judge(model: ir.Model, stream: Stream) -> tuple[list[Edge], list[Edge], set[ir.Value]] | str:
    """The edges into and out of the stream that need adapters, or why it should not turn.

    And the values before an adapter that leads in: a norm that reads one of them keeps all directions.
    """
    entries, exits, why = _stuck(model, stream)
    fixed = _before(stream, entries)
    kept = {(node.outputs[0].name, index) for value in fixed for node, index in value.uses()}
    exits = [edge for edge in exits if (edge.reader, edge.operand) not in kept]
    leaving = {(edge.reader, edge.operand) for edge in exits}
    turning = sum(
        use.value not in fixed and (use.node.outputs[0].name, use.index) not in leaving
        for use in stream.norms
    )
    if entries + exits and len(entries) + len(exits) > turning:
        most = len(entries) + len(exits)
        return f"{most} adapters for {turning} norms that turn: {why}; {_FOLD_FIRST}"
    return entries, exits, fixed


def _before(stream: Stream, entries: Sequence[Edge]) -> set[ir.Value]:
    """What stands before the edges, up to what enters the stream there."""
    wanted = {(edge.reader, edge.operand) for edge in entries}
    values = {**stream.members, **stream.writers}
    todo = [
        value
        for value in values
        for node, index in value.uses()
        if (node.outputs[0].name, index) in wanted
    ]
    found: set[ir.Value] = set()
    while todo:
        value = todo.pop()
        found.add(value)
        maker = value.producer()
        if value not in stream.writers and maker is not None:
            todo += [v for v in maker.inputs if v is not None and v in values]
    return found


def _stuck(model: ir.Model, stream: Stream) -> tuple[list[Edge], list[Edge], str]:
    """Edges into and out of the stream behind which nothing turns, and why."""
    entries = _entries(stream)
    leaving = [(use.node, use.index) for use in stream.norms]
    leaving += [
        (node, index)
        for value, reader in stream.others
        if reader is not None
        for node, index in value.uses()
        if node is reader
    ]
    exits = [Edge(node.outputs[0].name or "", index) for node, index in leaving]
    for value, reader in stream.others:
        if reader is None:
            return entries, exits * 2, f"{value.name} of the stream is an output of the model"
    copy = model.clone()
    edges = list(dict.fromkeys([*entries, *exits]))
    insert(copy, edges)
    axes = analyse(copy)
    readers = {node.outputs[0].name: node for node in copy.graph}
    stuck: dict[Edge, str] = {}
    for edge in edges:
        turn = readers[edge.reader].inputs[edge.operand]
        node = turn.producer() if turn is not None else None
        assert turn is not None and node is not None and node.inputs[0] is not None
        value = node.inputs[0] if edge in entries else turn
        last = (channels.rank(value) or 0) - 1
        try:
            stretch_at(axes, value, last)
        except PassError as error:
            stuck[edge] = error.diagnostics[0].message
    why = next(iter(stuck.values()), "")
    return [e for e in entries if e in stuck], [e for e in exits if e in stuck], why


def _entries(stream: Stream) -> list[Edge]:
    """Where values that are no weights enter; behind the moves that bring their channels to the end."""
    found = []
    for value, axis in stream.writers.items():
        if weights.is_weight(value):
            continue
        todo = [(value, axis)]
        while todo:
            current, at = todo.pop()
            last = at == (channels.rank(current) or 0) - 1
            for node, index in current.uses():
                if node.outputs[0] not in stream.members:
                    continue
                if last:
                    found.append(Edge(node.outputs[0].name or "", index))
                else:
                    todo.append((node.outputs[0], stream.members[node.outputs[0]]))
    return found


def _idle(layout: Layout) -> set[Edge]:
    """Adapters whose two sides turn together."""
    readers = {node.outputs[0].name: node for node in layout.model.graph}
    idle = set()
    for edge in layout.edges:
        turn = readers[edge.reader].inputs[edge.operand]
        assert turn is not None
        maker = turn.producer()
        assert maker is not None
        matrix = maker.inputs[1]
        if any({(matrix, 0), (matrix, 1)} <= s.stretch.exponents.keys() for s in layout.segments):
            idle.add(edge)
    return idle
