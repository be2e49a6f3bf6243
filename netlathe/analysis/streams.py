"""Residual streams: all values that are added together along one axis, who writes to them, who reads.

A stream grows from one value, through whatever combines whole positions of it with the same factors for
all channels: sums, moves, joins along other axes, sums over other axes, products with one number a
position. So what holds for every writer and survives such combinations (a mean of zero over the
channels, a common change of basis) holds for every value of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from netlathe.analysis import channels
from netlathe.analysis.axes.signature import tells_other_sizes

NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


@dataclass(frozen=True)
class Use:
    """A node that reads a value, at one of its inputs; the channels lie along ``axis`` of the value."""

    node: ir.Node
    index: int
    value: ir.Value
    axis: int


@dataclass
class Stream:
    """One stream of ``width`` channels; value -> axis of the channels.

    ``members`` are made from other values of the stream, ``writers`` come from elsewhere; ``entries``
    says where each writer enters. ``norms`` are the normalizations over the channels that read values
    of the stream (a writer among them), ``others`` whatever else reads a member (None: the graph's
    outputs). A writer may be read by anything.
    """

    width: int
    members: dict[ir.Value, int] = field(default_factory=dict)
    writers: dict[ir.Value, int] = field(default_factory=dict)
    entries: dict[ir.Value, list[Use]] = field(default_factory=dict)
    norms: list[Use] = field(default_factory=list)
    others: list[tuple[ir.Value, ir.Node | None]] = field(default_factory=list)

    def leaves(self, writer: ir.Value) -> list[ir.Node | None]:
        """What reads a writer outside of the stream (None: the graph's outputs)."""
        inside = {(use.node, use.index) for use in self.entries.get(writer, ())}
        rest: list[ir.Node | None] = [
            node for node, index in writer.uses() if (node, index) not in inside
        ]
        return [*rest, None] if writer.is_graph_output() else rest


def grow(value: ir.Value, axis: int) -> Stream | None:
    """The stream that ``value`` belongs to; None where its width is not fixed."""
    width = channels.width(value, axis)
    if width is None:
        return None
    stream = Stream(width)
    uses: list[Use] = []
    stack = [(value, axis)]
    while stack:
        current, at = stack.pop()
        if current in stream.members or current in stream.writers:
            continue
        terms = _terms(current, at, width)
        (stream.members if terms else stream.writers)[current] = at
        uses += terms
        stack += [(use.value, use.axis) for use in terms]
        if (
            current.producer() is not None or current.is_graph_input()
        ):  # tables: only as they came up
            stack += _follow(stream, current, at, uses)
    for use in uses:
        if use.value in stream.writers:
            entries = stream.entries.setdefault(use.value, [])
            if use not in entries:
                entries.append(use)
    return stream


def _follow(
    stream: Stream, value: ir.Value, axis: int, uses: list[Use]
) -> Iterator[tuple[ir.Value, int]]:
    """Sort the readers of a value of the stream; yields the values that readers in it make."""
    writes = value in stream.writers
    for node, index in value.uses():
        use = Use(node, index, value, axis)
        inside = node.graph is value.graph
        after = _joins(use, stream.width) if inside else None
        if inside and _normalizes(use):
            stream.norms.append(use)
            uses.append(use)
        elif after is not None:
            yield from ((output, after) for output in node.outputs)
        elif not writes and not tells_other_sizes(node, axis):
            stream.others.append((value, node))
    if value.is_graph_output() and not writes:
        stream.others.append((value, None))


def _normalizes(use: Use) -> bool:
    """Whether the node normalizes exactly the channels, which are the last axis."""
    node = use.node
    if node.domain or node.op_type not in NORMS or use.index:
        return False
    last = (channels.rank(use.value) or 0) - 1
    return use.axis == last and node.attributes.get_int("axis", -1) in (last, -1)


def _joins(use: Use, width: int) -> int | None:
    """The channel axis of what the node makes of a value of the stream, if that is one as well."""
    node = use.node
    if node.domain or not node.outputs:
        return None
    output = node.outputs[0]
    after = channels.mixed(node).get(use.axis) if use.index == 0 else None
    if after is None:
        after = channels.aligned(output, use.value, use.axis)
        if node.op_type == "Concat":
            after = use.axis
    if after is None:
        return None
    terms = _terms(output, after, width)
    return after if any(t.index == use.index and t.axis == use.axis for t in terms) else None


def _terms(value: ir.Value, axis: int, width: int) -> list[Use]:
    """The operands that ``value`` combines with the same factors for all channels; else nothing."""
    node = value.producer()
    if node is None or node.domain or channels.width(value, axis) != width:
        return []
    if node.op_type in ("Add", "Sub"):
        terms = [_term(node, index, value, axis) for index in (0, 1)]
        whole = all(channels.width(term.value, term.axis) == width for term in terms)
        return terms if whole else []
    if node.op_type == "Concat":
        if node.attributes.get_int("axis", 0) == axis:
            return []
        return [Use(node, i, v, axis) for i, v in enumerate(node.inputs) if v is not None]
    if node.op_type in ("Mul", "Div"):
        a, b = (_term(node, index, value, axis) for index in (0, 1))
        if _one_for_all(b):
            return [a]
        return [b] if node.op_type == "Mul" and _one_for_all(a) else []
    source = node.inputs[0] if node.inputs else None
    before = [a for a, b in channels.mixed(node).items() if b == axis]
    return [Use(node, 0, source, before[0])] if source is not None and before else []


def _term(node: ir.Node, index: int, value: ir.Value, axis: int) -> Use:
    operand = node.inputs[index]
    assert operand is not None
    at = channels.aligned(operand, value, axis)
    return Use(node, index, operand, -1 if at is None else at)


def _one_for_all(use: Use) -> bool:
    """Whether an operand has the same number for all channels."""
    known = channels.rank(use.value) is not None
    return known and (use.axis < 0 or channels.width(use.value, use.axis) == 1)
