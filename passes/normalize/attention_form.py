"""Brings every Attention to the IR's form: 4-D, heads not repeated, one scale, a mask per query.

Attention(q [b,s,h*d], ..., q_num_heads=h)      -> transposed to [b,h,s,d] before, back after
k = repeat_interleave(k [b,kv,t,d], over heads) -> k itself: Attention groups query heads
Attention(c * q, k, scale=z)                    -> Attention(q, k, scale=c*z)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.passes.normalize.match import (
    NoMatch,
    attribute,
    node_of,
    number_of,
    numbers_of,
    operands,
)
from netlathe.passes.normalize.raise_attention import mask_per_query
from netlathe.passes.normalize.rewrite import Builder, Dims, Proposal, dims_of, text_of


class AttentionForms:
    """Every Attention node that is not in the IR's form yet."""

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """Every Attention node that a rule below may change."""
        for node in graph:
            if node.domain == "" and node.op_type == "Attention":
                q, k, v = operands(node)[:3]
                merged = q.shape is not None and len(q.shape) == 3
                changed = _repeats(k) or _repeats(v) or _is_scaled(q) or _is_scaled(k)
                if merged or changed or _mask_broadcasts(node):
                    yield node

    def propose(self, anchor: ir.Node) -> Proposal:
        """The same attention in the IR's form.

        Raises:
            NoMatch: the operands are neither 3-D nor 4-D, or heads are repeated in another way.
        """
        build = Builder()
        says: list[str] = []
        q, k, v = operands(anchor)[:3]
        attributes = {name: held.value for name, held in anchor.attributes.items()}
        three_dims = len(dims_of(q)) == 3
        if three_dims:
            q, k, v = _heads_apart(build, anchor, q, k, v)
            says.append("operands brought to [b,h,s,d]")
            for name in ("q_num_heads", "kv_num_heads"):
                attributes.pop(name, None)
        dims = dims_of(q, rank=4)
        attributes["scale"] = scale = float(attribute(anchor, "scale", None) or _default(dims))
        (q, by_q), (k, by_k) = _unscaled(build, q), _unscaled(build, k)
        if by_q * by_k != 1.0 and by_q * by_k > 0:
            attributes["scale"] = scale * by_q * by_k
            says.append(f"scale {scale:g} became {scale * by_q * by_k:g}")
        else:
            q, k = (q, k) if by_q == by_k == 1.0 else operands(anchor)[:2]
        if _repeats(k) or _repeats(v):
            k, v, repeats = _unrepeated(k, v)
            says.append(f"key and value heads are no longer repeated {repeats} times")
        rest = list(anchor.inputs)[3:]
        if _mask_broadcasts(anchor):
            mask = operands(anchor)[3]
            rest[0] = mask_per_query(build, mask, q)
            says.append(f"a mask {text_of(dims_of(mask))} has a row per query")
        if not says:
            raise NoMatch("the scale before it cannot move into it", anchor)
        return _rebuilt(build, anchor, [q, k, v, *rest], attributes, three_dims, "; ".join(says))


def _rebuilt(
    build: Builder,
    anchor: ir.Node,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any],
    three_dims: bool,
    says: str,
) -> Proposal:
    q, v = inputs[0], inputs[2]
    assert q is not None and v is not None
    (b, h, s, _), width = dims_of(q, rank=4), dims_of(v, rank=4)[3]
    attended = build.op("Attention", *inputs, shape=(b, h, s, width), **attributes)
    node = build.nodes[-1]
    outputs = {anchor.outputs[0]: attended}
    if len(anchor.outputs) > 1:
        node.resize_outputs(len(anchor.outputs))
        for old, new in zip(anchor.outputs[1:], node.outputs[1:], strict=True):
            new.type, new.shape = old.type, old.shape
            outputs[old] = new
    if three_dims:
        merged = dims_of(anchor.outputs[0], rank=3)
        last = merged[2] if isinstance(merged[2], int) else -1
        apart = build.transpose(attended, (0, 2, 1, 3))
        outputs[anchor.outputs[0]] = build.reshape(apart, [0, 0, last], merged)
    return Proposal("Attention", outputs, build, says)


def _default(dims: Dims) -> float:
    if not isinstance(dims[3], int):
        raise NoMatch(f"the width of heads {text_of(dims)} is not fixed, and no scale is given")
    return 1.0 / float(np.sqrt(dims[3]))


def _mask_broadcasts(node: ir.Node) -> bool:
    """Whether the mask has one row for all queries, and there are several."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    q = node.inputs[0]
    if mask is None or mask.shape is None or q is None or q.shape is None:
        return False
    queries = q.shape[-2]
    return queries != 1 and (len(mask.shape) == 1 or mask.shape[-2] == 1)


# -- three dims -----------------------------------------------------------------------------------


def _heads_apart(
    build: Builder, anchor: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """q, k and v as ``[b,h,s,d]``."""
    counts = [attribute(anchor, name, 0) for name in ("q_num_heads", "kv_num_heads")]
    apart: list[ir.Value] = []
    for value, heads in zip((q, k, v), (counts[0], counts[1], counts[1]), strict=True):
        b, s, width = dims_of(value, rank=3)
        if not isinstance(width, int) or heads < 1 or width % heads:
            raise NoMatch(f"{text_of(dims_of(value))} does not split into {heads} heads", anchor)
        size = width // heads
        split = build.reshape(value, [0, 0, heads, size], (b, s, heads, size))
        apart.append(build.transpose(split, (0, 2, 1, 3)))
    return apart[0], apart[1], apart[2]


# -- scale ----------------------------------------------------------------------------------------


def _is_scaled(value: ir.Value) -> bool:
    node = node_of(value, "Transpose", "Reshape", "RotaryEmbedding", "Mul", "Div")
    if node is None:
        return False
    if node.op_type in ("Mul", "Div"):
        return any(
            number_of(v) is not None for v in operands(node)[0 if node.op_type == "Mul" else 1 :]
        )
    return _is_scaled(operands(node)[0])


def _unscaled(build: Builder, value: ir.Value) -> tuple[ir.Value, float]:
    """``value`` without the constant that it is multiplied by, and that constant.

    The moves and the rotation between are linear: they are built again on the unscaled value.
    """
    if not _is_scaled(value):
        return value, 1.0
    node = value.producer()
    assert node is not None
    if node.op_type in ("Mul", "Div"):
        a, b = operands(node)
        if node.op_type == "Mul" and number_of(a) is not None:
            a, b = b, a
        number = number_of(b)
        assert number is not None
        if number == 0 or dims_of(a) != dims_of(value):
            return value, 1.0
        inner, factor = _unscaled(build, a)
        return inner, factor / number if node.op_type == "Div" else factor * number
    read, *rest = operands(node)
    inner, factor = _unscaled(build, read)
    if factor == 1.0:
        return value, 1.0
    if node.op_type == "Transpose":
        return build.transpose(inner, attribute(node, "perm", ())), factor
    again = build.op(node.op_type, inner, *rest, shape=dims_of(value))
    build.nodes[-1].attributes.update(node.attributes)
    return again, factor


# -- repeated heads -------------------------------------------------------------------------------


def _repeats(value: ir.Value) -> bool:
    """Whether ``value`` looks like heads that were copied."""
    node = node_of(value, "Reshape", "Gather", "Concat", "Tile", "Expand")
    if node is None:
        return False
    if node.op_type == "Reshape":
        return node_of(node.inputs[0], "Expand", "Concat", "Tile") is not None and (
            node.inputs[0] is not None
            and node.inputs[0].shape is not None
            and len(node.inputs[0].shape) == 5
        )
    read = operands(node)[0]
    if value.shape is None or read.shape is None or len(value.shape) != 4 or len(read.shape) != 4:
        return False
    if node.op_type == "Concat":
        return attribute(node, "axis", 0) == 1 and all(v is read for v in node.inputs)
    return value.shape[1] != read.shape[1]


def _unrepeated(k: ir.Value, v: ir.Value) -> tuple[ir.Value, ir.Value, int]:
    """k and v before every head was copied, and how often each was.

    Raises:
        NoMatch: the copies of one head are not neighbours, or k and v are not repeated alike.
    """
    (k1, by_k), (v1, by_v) = _source_of_copies(k), _source_of_copies(v)
    if by_k != by_v:
        raise NoMatch(f"key heads are repeated {by_k} times, value heads {by_v} times")
    return k1, v1, by_k


def _source_of_copies(value: ir.Value) -> tuple[ir.Value, int]:
    node = node_of(value, "Reshape", "Gather", "Concat", "Tile", "Expand")
    if node is None or not _repeats(value):
        return value, 1
    b, heads, t, d = dims_of(value, rank=4)
    read = operands(node)[0]
    if node.op_type != "Reshape":
        return _source_without_fifth_dim(node, read, heads)
    copies = node_of(read, "Expand", "Concat", "Tile")
    assert copies is not None
    one, many = dims_of(operands(copies)[0], rank=5), dims_of(read, rank=5)
    if copies.op_type == "Concat" and any(v is not copies.inputs[0] for v in copies.inputs):
        raise NoMatch("what is joined are not copies of one value", copies)
    kv = many[1]
    if one[1] == 1 and many[1] != 1 and many[2] != 1:
        raise NoMatch("heads are repeated as a tile (a b a b), not each in place (a a b b)", copies)
    repeats = many[2]
    in_place = one == (b, kv, 1, t, d) and many == (b, kv, repeats, t, d)
    if not in_place or not isinstance(kv, int) or not isinstance(repeats, int):
        raise NoMatch(f"{text_of(one)} to {text_of(many)} does not repeat heads in place", copies)
    if kv * repeats != heads:
        raise NoMatch(f"{text_of(many)} does not merge to {heads} heads", node)
    split = node_of(operands(copies)[0], "Unsqueeze", "Reshape")
    if split is None or dims_of(operands(split)[0]) != (b, kv, t, d):
        raise NoMatch("the repeated value is not [b,kv,t,d] with a dim added", copies)
    return operands(split)[0], repeats


def _source_without_fifth_dim(
    node: ir.Node, read: ir.Value, heads: ir.SymbolicDim | int
) -> tuple[ir.Value, int]:
    """Copies made along the head axis itself: by index, or of a single head."""
    kv = dims_of(read, rank=4)[1]
    if not isinstance(heads, int) or not isinstance(kv, int) or heads % kv:
        raise NoMatch(f"{kv} heads become {heads}", node)
    repeats = heads // kv
    if node.op_type == "Gather":
        index = numbers_of(node.inputs[1])
        if attribute(node, "axis", 0) != 1 or index is None:
            raise NoMatch("heads are gathered by an index that is not known", node)
        if index != tuple(int(i) for i in np.repeat(np.arange(kv), repeats)):
            raise NoMatch(f"heads are gathered as {list(index)}, not each repeated in place", node)
    elif kv != 1:
        raise NoMatch("heads are repeated as a tile (a b a b), not each in place (a a b b)", node)
    return read, repeats
