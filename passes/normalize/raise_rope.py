"""Raises rotary position embeddings to RotaryEmbedding on ``[b,h,s,d]`` with cos and sin ``[b,s,d/2]``.

    x * cos + concat(-x2, x1) * sin          x1, x2 the halves of x; cos, sin [.., s, d], both halves alike
    concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)                     cos, sin [.., s, d/2]
    x * cos + stack(-x_odd, x_even) * sin    interleaved; cos, sin with every entry twice
    concat(rope(x[..r]), x[r..])             partial: becomes rotary_embedding_dim=r

cos and sin are followed back to where their two halves were joined, so that the angles are computed once
at half width. They are expanded over the batch: ONNX Runtime takes no cache that broadcasts. An ``x`` in
the layout ``[b,s,h,d]`` is transposed around the op.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from netlathe.ir.edit import const_array
from netlathe.passes.normalize.match import (
    NoMatch,
    attribute,
    node_of,
    numbers_of,
    operands,
    shown,
)
from netlathe.passes.normalize.rewrite import Builder, Dims, Proposal, dims_of, text_of

_ELEMENTWISE = frozenset({"Cos", "Sin", "Cast", "Mul", "Add", "Sub", "Div", "Neg", "Identity"})


@dataclass(frozen=True)
class _Part:
    """``source`` from ``start`` to ``stop`` by ``step`` along its last axis, whose size is ``width``."""

    source: ir.Value
    start: int
    stop: int
    step: int
    width: int

    def is_half(self, second: bool, interleaved: bool) -> bool:
        """Whether this is the first or second half (or the even or odd entries) of the source."""
        if interleaved:
            return (self.start, self.step) == (int(second), 2) and self.width % 2 == 0
        middle = self.width // 2
        wanted = (middle, self.width) if second else (0, middle)
        return (self.start, self.stop, self.step) == (*wanted, 1) and self.width % 2 == 0


@dataclass(frozen=True)
class _Rope:
    """``root`` is ``x`` rotated by the angles behind ``cos`` and ``sin``."""

    root: ir.Value
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    halved: bool  # cos and sin are d/2 wide already


class Ropes:
    """Every spelling of a rotary embedding."""

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """Every join of two parts of one value that were swapped or mixed."""
        for node in graph:
            if node.op_type != "Concat" or node.domain != "" or len(node.inputs) != 2:
                continue
            a, b = operands(node)
            if _swapped(a, b) or (node_of(a, "Sub") and node_of(b, "Add") and _mixed(a, b)):
                yield node

    def propose(self, anchor: ir.Node) -> Proposal:
        """RotaryEmbedding in place of the rotation around ``anchor``.

        Raises:
            NoMatch: what stands there is something else.
        """
        a, b = operands(anchor)
        rope = (
            _mixed_halves(anchor) if node_of(a, "Sub") and node_of(b, "Add") else _rotated(anchor)
        )
        return _proposal(rope)


# -- finding the rotation -------------------------------------------------------------------------


def _part(value: ir.Value) -> _Part | None:
    """What slice of the last axis ``value`` is."""
    node = node_of(value, "Slice", "Split")
    if node is None:
        return None
    source = operands(node)[0]
    width = None if source.shape is None else source.shape[-1]
    if source.shape is None or not isinstance(width, int):
        return None
    last = len(source.shape) - 1
    if node.op_type == "Split":
        if attribute(node, "axis", 0) % (last + 1) != last or value.shape is None:
            return None
        sizes = [v.shape[-1] if v.shape is not None else None for v in node.outputs]
        index = list(node.outputs).index(value)
        before = [size for size in sizes[:index] if isinstance(size, int)]
        size = sizes[index]
        if len(before) != index or not isinstance(size, int):
            return None
        return _Part(source, sum(before), sum(before) + size, 1, width)
    starts, stops = numbers_of(node.inputs[1]), numbers_of(node.inputs[2])
    axes = numbers_of(node.inputs[3]) if len(node.inputs) > 3 else tuple(range(len(starts or ())))
    steps = numbers_of(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    if starts is None or stops is None or steps is None or axes is None or len(axes) != 1:
        return None
    if axes[0] % (last + 1) != last or steps[0] < 1:
        return None
    start, stop, _ = slice(starts[0], stops[0]).indices(width)
    return _Part(source, start, stop, steps[0], width)


def _peeled(value: ir.Value) -> ir.Value:
    """``value`` before a trailing dim of one was added (how entries are interleaved)."""
    node = node_of(value, "Unsqueeze", "Reshape")
    if node is not None and value.shape is not None and value.shape[-1] == 1:
        inner = operands(node)[0]
        if inner.shape is not None and list(inner.shape) == list(value.shape)[:-1]:
            return inner
    return value


def _swapped(a: ir.Value, b: ir.Value) -> bool:
    """Two parts of one value, exactly one of them negated."""
    a, b = _peeled(a), _peeled(b)
    negated = [node_of(value, "Neg") for value in (a, b)]
    if (negated[0] is None) == (negated[1] is None):
        return False
    parts = [
        _part(value if node is None else operands(node)[0])
        for value, node in zip((a, b), negated, strict=True)
    ]
    return parts[0] is not None and parts[1] is not None and parts[0].source is parts[1].source


def _rotated(join: ir.Node) -> _Rope:
    """``x * cos + rotated(x) * sin`` around ``rotated(x)``, which ``join`` makes."""
    a, b = operands(join)
    interleaved = _peeled(a) is not a and _peeled(b) is not b
    negated, plain = node_of(_peeled(a), "Neg"), _part(_peeled(b))
    minus = None if negated is None else _part(operands(negated)[0])
    if minus is None or plain is None:
        raise NoMatch("the negated part comes second: a rotation by the opposite angle", join)
    x = plain.source
    if not minus.is_half(True, interleaved) or not plain.is_half(False, interleaved):
        kind = "odd and even entries" if interleaved else "second and first half"
        raise NoMatch(f"the parts of {x.name} that are joined are not its {kind}", join)
    rotated = join.outputs[0]
    if interleaved:
        flat = _only_reader(rotated, "Reshape")
        if dims_of(flat.outputs[0]) != dims_of(x):
            raise NoMatch("the entries are not interleaved back into the shape they had", flat)
        rotated = flat.outputs[0]
    elif attribute(join, "axis", -1) % len(dims_of(x)) != len(dims_of(x)) - 1:
        raise NoMatch("the halves are joined along another axis than the last", join)
    by_sin = _only_reader(rotated, "Mul")
    add = _only_reader(by_sin.outputs[0], "Add")
    sin = _other(by_sin, rotated)
    by_cos = node_of(_other(add, by_sin.outputs[0]), "Mul")
    if by_cos is None or x not in by_cos.inputs:
        raise NoMatch(f"expected {x.name} * cos beside rotated * sin", add)
    return _Rope(add.outputs[0], x, _other(by_cos, x), sin, interleaved, halved=False)


def _mixed(difference: ir.Value, total: ir.Value) -> bool:
    """``a*c - b*s`` and ``b*c + a*s`` of two parts of one value, as far as their shape goes."""
    sources = set()
    for value in (difference, total):
        node = value.producer()
        terms = [] if node is None else [node_of(v, "Mul") for v in operands(node)]
        for term in terms:
            parts = (
                [] if term is None else [p for v in operands(term) if (p := _part(v)) is not None]
            )
            if len(parts) != 1:
                return False
            sources.add(parts[0].source)
    return len(sources) == 1


def _mixed_halves(join: ir.Node) -> _Rope:
    """``concat(x1*cos - x2*sin, x2*cos + x1*sin)``, which ``join`` makes."""
    difference, total = (value.producer() for value in operands(join))
    assert difference is not None and total is not None
    (x1, cos), (x2, sin) = (_factors(v) for v in operands(difference))
    part1, part2 = _part(x1), _part(x2)
    assert part1 is not None and part2 is not None
    x = part1.source
    if not part1.is_half(False, False) or not part2.is_half(True, False):
        raise NoMatch(f"the parts of {x.name} are not its first and second half", join)
    if attribute(join, "axis", -1) % len(dims_of(x)) != len(dims_of(x)) - 1:
        raise NoMatch("the halves are joined along another axis than the last", join)
    terms = [_factors(v) for v in operands(total)]
    if terms not in ([(x2, cos), (x1, sin)], [(x1, sin), (x2, cos)]):
        raise NoMatch("the second half is not x2 * cos + x1 * sin", total)
    return _Rope(join.outputs[0], x, cos, sin, interleaved=False, halved=True)


def _factors(term: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The part of x and the other factor of a product, for products that :func:`_mixed` accepted."""
    a, b = operands(_producer(term))
    return (a, b) if _part(a) is not None else (b, a)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _only_reader(value: ir.Value, op_type: str) -> ir.Node:
    readers = [node for node, _ in value.uses()]
    if len(readers) != 1 or value.is_graph_output() or readers[0].op_type != op_type:
        found = ", ".join(sorted(node.op_type for node in readers)) or "nothing"
        raise NoMatch(
            f"expected one {op_type} to read {value.name}, found {found}", _producer(value)
        )
    return readers[0]


def _other(node: ir.Node, value: ir.Value) -> ir.Value:
    others = [operand for operand in operands(node) if operand is not value]
    if len(others) != 1:
        raise NoMatch(f"{node.op_type} reads {value.name} twice", node)
    return others[0]


# -- cos and sin at half width --------------------------------------------------------------------


def _halved(build: Builder, value: ir.Value, interleaved: bool) -> ir.Value:
    """The value of which ``value`` holds every entry of the last axis twice.

    Raises:
        NoMatch: the two halves (or neighbours) are not known to be equal.
    """
    dims = dims_of(value)
    array = const_array(value)
    if array is not None:
        first, second = (
            np.split(array, 2, -1) if not interleaved else (array[..., ::2], array[..., 1::2])
        )
        if not np.array_equal(first, second):
            raise NoMatch(f"the two halves of {value.name} differ")
        return build.constant(first, f"{value.name}.half")
    node = value.producer()
    if node is None or node.domain != "":
        raise NoMatch(f"{shown(value)} is not known to repeat itself along its last axis", node)
    width = dims[-1]
    assert isinstance(width, int)
    half_dims = [*dims[:-1], width // 2]

    def again(*inputs: ir.Value) -> ir.Value:
        output = build.op(node.op_type, *inputs, shape=half_dims, dtype=value.dtype)
        build.nodes[-1].attributes.update(node.attributes)
        return output

    joined = _joined_twice(node, interleaved)
    if joined is not None:
        return (
            joined
            if dims_of(joined)[:-1] == dims[:-1]
            else build.reshape(joined, [0] * (len(dims) - 1) + [width // 2], half_dims)
        )
    if node.op_type in _ELEMENTWISE:
        return again(
            *(
                v if not v.shape or v.shape[-1] == 1 else _halved(build, v, interleaved)
                for v in operands(node)
            )
        )
    read = operands(node)[0]
    keeps_last = read.shape is not None and len(read.shape) > 0 and read.shape[-1] == width
    rest = list(operands(node)[1:])
    if node.op_type in ("Unsqueeze", "Squeeze") and keeps_last:
        axes = numbers_of(rest[0]) if rest else None
        if axes is not None and all(axis % len(dims) != len(dims) - 1 for axis in axes):
            return again(_halved(build, read, interleaved), *rest)
    if node.op_type == "Slice" and keeps_last:
        axes = numbers_of(rest[2]) if len(rest) > 2 else tuple(range(len(dims) - 1))
        if axes is not None and all(axis % len(dims) != len(dims) - 1 for axis in axes):
            return again(_halved(build, read, interleaved), *rest)
    if (
        node.op_type == "Transpose"
        and keeps_last
        and attribute(node, "perm", ())[-1:] == (len(dims) - 1,)
    ):
        return again(_halved(build, read, interleaved))
    if node.op_type == "Gather" and keeps_last and attribute(node, "axis", 0) == 0:
        return again(_halved(build, read, interleaved), *rest)
    if node.op_type in ("Reshape", "Expand") and keeps_last:
        target = numbers_of(rest[0])
        if target is not None and target[-1] in (0, 1, -1, width):
            last = width // 2 if target[-1] == width else target[-1]
            literal = build.constant(np.array([*target[:-1], last], np.int64), "shape")
            return again(_halved(build, read, interleaved), literal)
    raise NoMatch(f"{shown(value)} is not known to repeat itself along its last axis", node)


def _joined_twice(node: ir.Node, interleaved: bool) -> ir.Value | None:
    """``f`` where the node makes ``concat(f, f)``, or with ``interleaved`` every entry of ``f`` twice."""
    if not interleaved:
        same = (
            node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        )
        output = node.outputs[0]
        assert output.shape is not None
        last = attribute(node, "axis", -1) % len(output.shape) == len(output.shape) - 1
        return operands(node)[0] if same and last else None
    if node.op_type != "Reshape":  # [.., n, 1] -> [.., n, 2] -> [.., 2n]
        return None
    pairs = node_of(node.inputs[0], "Expand", "Concat", "Tile")
    if pairs is None:
        return None
    output, read = pairs.outputs[0], operands(pairs)[0]
    if pairs.op_type == "Concat" and any(value is not read for value in pairs.inputs):
        return None
    single = _peeled(read)
    if single is read or output.shape is None or single.shape is None or output.shape[-1] != 2:
        return None
    return single if list(output.shape)[:-1] == list(single.shape) else None


# -- building the op ------------------------------------------------------------------------------


def _proposal(rope: _Rope) -> Proposal:
    dims = dims_of(rope.x, rank=4)
    build = Builder()
    tables, heads_first = [], True
    for value in (rope.cos, rope.sin):
        table = value if rope.halved else _halved(build, value, rope.interleaved)
        table, heads_first = _per_position(build, table, dims)
        tables.append(table)
    root, x, width = _whole(rope)
    full = dims_of(x, rank=4)
    b, h, s, d = full if heads_first else (full[0], full[2], full[1], full[3])
    cos, sin = (
        table if dims_of(table)[0] == b else build.expand(table, 0, b, x, 0) for table in tables
    )
    swap = (0, 1, 2, 3) if heads_first else (0, 2, 1, 3)
    rotated = build.op(
        "RotaryEmbedding",
        build.transpose(x, swap),
        cos,
        sin,
        shape=(b, h, s, d),
        interleaved=int(rope.interleaved),
        num_heads=0,
        rotary_embedding_dim=0 if width == d else width,
    )
    kind = "interleaved" if rope.interleaved else "halves"
    says = f"RotaryEmbedding of {width} of {d} dims, {kind}"
    return Proposal("RotaryEmbedding", {root: build.transpose(rotated, swap)}, build, says)


def _per_position(build: Builder, table: ir.Value, dims: Dims) -> tuple[ir.Value, bool]:
    """``table`` as [b or 1, s, d/2], and whether x is [b,h,s,d] rather than [b,s,h,d]."""
    held = dims_of(table)
    padded = (*[1] * (4 - len(held)), *held)
    if len(padded) != 4 or padded[0] not in (1, dims[0]):
        raise NoMatch(f"a table {text_of(held)} does not fit x {text_of(dims)}")
    for heads, positions in ((1, 2), (2, 1)):
        if padded[heads] == 1 and padded[positions] == dims[positions]:
            break
    else:
        raise NoMatch(
            f"a table {text_of(held)} does not hold one row per position of {text_of(dims)}"
        )
    wanted = (padded[0], padded[positions], padded[3])
    if held == wanted:
        return table, heads == 1
    node = node_of(table, "Unsqueeze", "Reshape")
    if node is not None and dims_of(operands(node)[0]) == wanted:
        return operands(node)[0], heads == 1
    if len(held) == 2:
        return build.unsqueeze(table, 0), heads == 1
    axis = heads - (4 - len(held))
    axes = build.constant(np.array([axis], np.int64), "axes")
    squeezed = build.op("Squeeze", table, axes, shape=[*held[:axis], *held[axis + 1 :]])
    return (build.unsqueeze(squeezed, 0) if len(held) == 3 else squeezed), heads == 1


def _whole(rope: _Rope) -> tuple[ir.Value, ir.Value, int]:
    """The root, x and rotary width, after joining the part of x that is not rotated."""
    part = _part(rope.x)
    width = dims_of(rope.x)[-1]
    assert isinstance(width, int)
    readers = [node for node, _ in rope.root.uses()]
    if part is None or len(readers) != 1 or rope.root.is_graph_output():
        return rope.root, rope.x, width
    join = readers[0]
    if join.op_type != "Concat" or len(join.inputs) != 2 or join.inputs[0] is not rope.root:
        return rope.root, rope.x, width
    passed = _part(operands(join)[1])
    if passed is None or passed.source is not part.source:
        return rope.root, rope.x, width
    covers = (part.start, part.stop, passed.start, passed.stop) == (0, width, width, part.width)
    last = attribute(join, "axis", -1) % 4 == 3
    if not covers or not last or (part.step, passed.step) != (1, 1):
        return rope.root, rope.x, width
    return join.outputs[0], part.source, width
