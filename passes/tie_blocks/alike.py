"""Which weight of one block stands where which weight of another does, and whether they can be one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from netlathe.analysis import operators
from netlathe.analysis.cost import is_parameter
from netlathe.ir import weights
from netlathe.passes.drop.candidates import Candidate

_NORMS = operators.NORMS | {"BatchNormalization", "InstanceNormalization"}
Pairs = Mapping[ir.Value, ir.Value]  # weight of one block -> the one that stands there in the other


class Unlike(Exception):
    """Two blocks do not compute the same function of their streams and weights; says why."""


def matched(one: Candidate, other: Candidate) -> Pairs:
    """The weights of ``one`` that can be those of ``other``: all but the norms', which stay its own.

    Both are walked through side by side, from what they add back to the stream that they read.

    Raises:
        Unlike: operators, attributes, shapes or dtypes differ.
    """
    if [b.kind for b in one.branches] != [b.kind for b in other.branches]:
        raise Unlike(f"{other.shown} has other branches")
    found: dict[ir.Value, ir.Value] = {}
    for a, b in zip(one.branches, other.branches, strict=True):
        stack, seen = [(a.value, b.value)], {(a.split, b.split)}
        while stack:
            pair = stack.pop()
            if pair in seen or pair[0] is pair[1]:
                continue
            seen.add(pair)
            stack += _before(*pair, other)
            if _can_be_one(pair[0]):
                if found.setdefault(*pair) is not pair[1]:
                    raise Unlike(f"{pair[0].name} stands for two weights of {other.shown}")
    return found


def _before(a: ir.Value, b: ir.Value, other: Candidate) -> Iterator[tuple[ir.Value, ir.Value]]:
    """What two values that stand for each other are made from."""
    x, y = a.producer(), b.producer()
    if x is None or y is None:
        stored = weights.is_weight(a)
        if (x, y) != (None, None) or stored != weights.is_weight(b) or a.dtype != b.dtype:
            raise Unlike(f"{other.shown} reads {b.name} where this reads {a.name}")
        if stored and a.shape != b.shape:
            raise Unlike(f"{a.name} has the shape {a.shape}, and {b.name} {b.shape}")
        return
    same = x.op_identifier() == y.op_identifier() and len(x.inputs) == len(y.inputs)
    if not same or a.index() != b.index() or _attributes(x) != _attributes(y):
        raise Unlike(f"{other.shown} has another {y.op_type} where this has {x.op_type}")
    for left, right in zip(x.inputs, y.inputs, strict=True):
        if left is not None and right is not None:
            yield left, right
        elif left is not right:
            raise Unlike(f"{x.op_type} takes fewer inputs in one of this and {other.shown}")


def _attributes(node: ir.Node) -> list[tuple[str, str]]:
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            raise Unlike(f"{node.op_type} holds graphs, which are not compared")
    return sorted((a.name, repr(a.value)) for a in node.attributes.values())


def _can_be_one(value: ir.Value) -> bool:
    if not weights.is_weight(value) or not is_parameter(value):
        return False
    return not any(node.op_type in _NORMS for node in value.consumers())


def hindrance(candidate: Candidate, pairs: Pairs) -> str:
    """Why a block cannot give its weights up; empty where it can."""
    if not pairs:
        return "it has no weights of its own but its norms'"
    inside = {node for branch in candidate.branches for node in branch.region}
    for weight in pairs:
        assert weight.dtype is not None
        if not (weight.dtype.is_floating_point() and weight.dtype.bitwidth >= 16):
            return f"{weight.name} is quantized: tie before"
        outside = [node for node in weight.consumers() if not _leads_into(node, inside)]
        if outside or weight.is_graph_output():
            return f"{weight.name} is read outside of it as well"
    return ""


def _leads_into(node: ir.Node, inside: set[ir.Node]) -> bool:
    """Whether nothing but ``inside`` reads what a node makes: it may stand on the way from a weight."""
    stack = [node]
    while stack:
        at = stack.pop()
        if at in inside:
            continue
        readers = [reader for value in at.outputs for reader in value.consumers()]
        if not readers or any(value.is_graph_output() for value in at.outputs):
            return False
        stack += readers
    return True


def neighbours(count: int, distance: int) -> Sequence[tuple[int, int]]:
    """Pairs (one, other) of that many blocks that lie at most so far apart."""
    return [
        (one, other)
        for one in range(count)
        for other in range(max(0, one - distance), min(count, one + distance + 1))
        if one != other
    ]
