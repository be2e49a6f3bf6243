"""Raises eager attention to Attention on ``q [b,h,s,d]``, ``k, v [b,kv,t,d]`` with an additive mask.

    scores = MatMul(q, k^T)            times or over a constant: scale (none: 1)
    cap * tanh(scores / cap)           softcap
    scores + m, where(c, scores, fill) in any order and number: one mask
    MatMul(softmax(scores), v)         the softmax possibly in float32
    where(isnan(p), 0, p)              around the softmax p: rows without a key, which Attention makes 0

A ``where`` with a fill becomes ``scores + where(c, 0, fill)``: the same for a fill that swallows any score,
so that one that swallows usual ones becomes such a one (and for -inf in every row that keeps a key; the
others are NaN before). Attention over ``[n,s,d]`` whose operands were merged from ``[b,h,s,d]`` is raised
on those; other three-dim attention becomes one head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.passes.normalize.match import (
    NoMatch,
    attribute,
    node_of,
    number_of,
    operands,
    shown,
    used_elsewhere,
)
from netlathe.passes.normalize.rewrite import (
    Builder,
    Dims,
    Proposal,
    broadcasts_to,
    dims_of,
    text_of,
)

_SWALLOWS = -1e9  # float32 steps by 64 there: adding any usual score leaves a fill as it is
# Steps by 2**77: any score leaves it as it is, and rows that keep no key stay even.
_FAR = -(2.0**100)
_BETWEEN = ("Cast", "Reshape")  # what may stand between the softmax and the product with v
_BEFORE = ("Add", "Mul", "Div", "Where", "Tanh", "Cast", "Reshape")
_HOPS = 12


@dataclass(frozen=True)
class _Scores:
    """``softcap(scale * q @ kt) + mask``."""

    product: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    mask: ir.Value | None = None
    grouped: Dims | None = None  # [b,h,s,t] where merged scores [b*h,s,t] were split for the mask


class Attentions:
    """Attention written as MatMul, Softmax, MatMul."""

    def anchors(self, graph: ir.Graph) -> Iterable[ir.Node]:
        """Every Softmax whose result a MatMul takes as its first operand."""
        for node in graph:
            if node.domain == "" and node.op_type == "Softmax":
                if _product_with_v(_guarded(node.outputs[0])) is not None:
                    yield node

    def propose(self, anchor: ir.Node) -> Proposal:
        """Attention in place of the products around the softmax ``anchor``.

        Raises:
            NoMatch: what stands there is something else.
        """
        weights = _guarded(anchor.outputs[0])
        rank = len(dims_of(anchor.outputs[0]))
        axis = attribute(anchor, "axis", -1)
        if axis % rank != rank - 1:
            raise NoMatch(f"softmax over axis {axis % rank} of {rank}, not over the keys", anchor)
        by_v = _product_with_v(weights)
        assert by_v is not None
        _only_for(weights, by_v)
        build = Builder()
        scores = _scores(build, operands(anchor)[0])
        q, kt = operands(scores.product)
        v = operands(by_v)[1]
        _only_for(scores.product.outputs[0], anchor)
        if scores.scale <= 0:
            raise NoMatch(f"the scores are scaled by {scores.scale:g}", scores.product)
        if len(dims_of(q)) == 3:
            return _merged(build, scores, q, kt, v, by_v)
        attended = _attend(build, scores, q, _keys(build, kt), v)
        return _proposal(build, by_v.outputs[0], *attended)


def _attend(
    build: Builder, scores: _Scores, q: ir.Value, k: ir.Value, v: ir.Value
) -> tuple[ir.Value, str]:
    """The Attention node's output ``[b,h,s,v]`` and what the ledger says of it."""
    (b, h, s, d), (kb, kv, t, kd), (vb, vv, vt, vd) = (dims_of(x, rank=4) for x in (q, k, v))
    if not (b == kb == vb and d == kd and t == vt):
        shapes = " ".join(text_of(dims_of(x)) for x in (q, k, v))
        raise NoMatch(f"q, k, v are {shapes}: not [b,h,s,d] [b,kv,t,d] [b,kv,t,v]", scores.product)
    if kv != vv or not (kv == h or kv == 1):
        raise NoMatch(f"{h} query heads over {kv} key and {vv} value heads", scores.product)
    mask = scores.mask
    if mask is not None:
        held, wanted = dims_of(mask), (b, h, s, t)
        if not held or not broadcasts_to(held, wanted) or held[-1] != t:
            raise NoMatch(f"a mask {text_of(held)} does not broadcast to {text_of(wanted)}")
        mask = mask_per_query(build, mask, q)
    attributes: dict[str, Any] = {
        "scale": scores.scale,
        "softcap": scores.softcap,
        "is_causal": 0,
        "qk_matmul_output_mode": 0,
    }
    raised = build.op("Attention", q, k, v, mask, shape=(b, h, s, vd), **attributes)
    masked = "no mask" if mask is None else f"a mask {text_of(dims_of(mask))}"
    return raised, f"Attention of {h} heads of {d}, scale {scores.scale:g}, {masked}"


def _proposal(build: Builder, root: ir.Value, raised: ir.Value, says: str) -> Proposal:
    if dims_of(root) != dims_of(raised):
        raise NoMatch(f"the result is {text_of(dims_of(root))}, not {text_of(dims_of(raised))}")
    return Proposal("Attention", {root: raised}, build, says)


def mask_per_query(build: Builder, mask: ir.Value, q: ir.Value) -> ir.Value:
    """``mask`` with a row per query: ONNX Runtime's kernel takes none that broadcasts over them."""
    dims, queries = dims_of(mask), dims_of(q, rank=4)[2]
    if len(dims) < 2:
        return mask_per_query(build, build.unsqueeze(mask, 0), q)
    axis = len(dims) - 2
    return mask if dims[axis] == queries else build.expand(mask, axis, queries, q, 2)


# -- forward: from the softmax to the product with the values -------------------------------------


def _guarded(weights: ir.Value) -> ir.Value:
    """``where(isnan(weights), 0, weights)`` where that is all that reads the weights, else themselves."""
    if weights.is_graph_output():
        return weights
    readers = {node.op_type: node for node, _ in weights.uses()}
    test, choice = readers.get("IsNaN"), readers.get("Where")
    if len(readers) != 2 or test is None or choice is None or choice.outputs[0].shape is None:
        return weights
    condition, when_nan, otherwise = operands(choice)
    is_guard = condition is test.outputs[0] and otherwise is weights and number_of(when_nan) == 0.0
    return choice.outputs[0] if is_guard and not used_elsewhere(condition, choice) else weights


def _product_with_v(weights: ir.Value) -> ir.Node | None:
    """The MatMul that takes the attention weights, possibly cast or reshaped, as its first operand."""
    value = weights
    for _ in range(3):
        readers = [(node, index) for node, index in value.uses()]
        products = [n for n, i in readers if n.op_type == "MatMul" and n.domain == "" and i == 0]
        if products:
            return products[0]
        onward = [node for node, _ in readers if node.op_type in _BETWEEN and node.domain == ""]
        if not onward:
            return None
        value = onward[0].outputs[0]
    return None


def _only_for(value: ir.Value, end: ir.Node) -> None:
    """Refuse where ``value``, or what is made of it on the way to ``end``, is read by others too."""
    while True:
        readers = [node for node, _ in value.uses()]
        other = used_elsewhere(value, *readers[:1])
        if other:
            what = "attention weights" if end.op_type == "MatMul" else "scores"
            raise NoMatch(f"the {what} {value.name} are also used by {other}", value.producer())
        if readers[0] is end:
            return
        value = readers[0].outputs[0]


# -- backward: from the softmax to the product of queries and keys --------------------------------


def _scores(build: Builder, value: ir.Value) -> _Scores:
    """How ``value`` is made of one product of queries and keys."""
    node = value.producer()
    if node is None or not _leads_to_product(value, _HOPS):
        raise NoMatch("no product of queries and keys behind the softmax", node)
    if node.op_type == "MatMul":
        return _Scores(node)
    if node.op_type == "Cast":
        return _scores(build, operands(node)[0])
    if node.op_type == "Reshape":
        return _regrouped(build, node)
    if node.op_type == "Add":
        inner, term = _split(node)
        scores = _scores(build, inner)
        return _with_mask(scores, term if scores.mask is None else _sum(build, scores.mask, term))
    if node.op_type == "Where":
        return _filled(build, node)
    if node.op_type in ("Mul", "Div"):
        inner, factor = _factor(node)
        tanh = node_of(inner, "Tanh")
        if tanh is not None:
            return _softcapped(build, tanh, factor)
        scores = _scores(build, inner)
        if scores.softcap:
            raise NoMatch("the scores are scaled after the softcap", node)
        mask = scores.mask
        if mask is not None:
            literal: npt.NDArray[Any] = np.array(factor, _float(mask))
            mask = build.op("Mul", mask, build.constant(literal, "scale"), shape=dims_of(mask))
        return _Scores(scores.product, scores.scale * factor, 0.0, mask, scores.grouped)
    raise NoMatch(f"{node.op_type} between the scores and the softmax", node)


def _leads_to_product(value: ir.Value, hops: int) -> bool:
    """Whether a MatMul of two computed values stands behind ``value``."""
    node = node_of(value, "MatMul", *_BEFORE)
    if node is None or hops == 0:
        return False
    if node.op_type == "MatMul":
        return not any(v.const_value is not None for v in operands(node))
    return any(_leads_to_product(v, hops - 1) for v in operands(node))


def _split(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The operand of an Add that leads to the scores, and the other."""
    a, b = operands(node)
    return (a, b) if _leads_to_product(a, _HOPS) else (b, a)


def _factor(node: ir.Node) -> tuple[ir.Value, float]:
    """The computed operand of a Mul or Div by a constant, and the constant as a factor."""
    a, b = operands(node)
    if node.op_type == "Mul" and number_of(a) is not None:
        a, b = b, a
    number = number_of(b)
    if number is None:
        raise NoMatch(f"the scores are scaled by {shown(b)}, which is no constant", node)
    return a, (1 / number if node.op_type == "Div" else number)


def _softcapped(build: Builder, tanh: ir.Node, cap: float) -> _Scores:
    inner, factor = (
        _factor(node)
        if (node := node_of(operands(tanh)[0], "Mul", "Div")) is not None
        else (operands(tanh)[0], 1.0)
    )
    scores = _scores(build, inner)
    if scores.mask is not None or scores.softcap:
        raise NoMatch("a mask is added before the softcap", tanh)
    # cap * tanh(f * x) is a softcap of x * (f * cap)
    return _Scores(scores.product, scores.scale * factor * cap, cap, None, scores.grouped)


def _with_mask(scores: _Scores, mask: ir.Value | None) -> _Scores:
    return _Scores(scores.product, scores.scale, scores.softcap, mask, scores.grouped)


def _filled(build: Builder, node: ir.Node) -> _Scores:
    """``where(c, scores, fill)`` or ``where(c, fill, scores)``."""
    condition, yes, no = operands(node)
    kept_if = _leads_to_product(yes, _HOPS)
    inner, fill = (yes, no) if kept_if else (no, yes)
    number = number_of(fill)
    if number is None or number > _SWALLOWS:
        raise NoMatch(f"masked scores become {shown(fill)}, which added to a score differs", node)
    scores = _scores(build, inner)
    dtype = fill.dtype
    assert dtype is not None
    if number > _FAR and dtype != ir.DataType.FLOAT16:
        fill = build.constant(np.full((), _FAR, _float(fill)), "fill")
    kept = scores.mask
    if kept is None:
        kept = build.constant(np.zeros((), _float(fill)), "zero")
    branches = (kept, fill) if kept_if else (fill, kept)
    dims = _broadcast(dims_of(condition), dims_of(kept))
    return _with_mask(scores, build.op("Where", condition, *branches, shape=dims, dtype=dtype))


def _sum(build: Builder, a: ir.Value, b: ir.Value) -> ir.Value:
    return build.op("Add", a, b, shape=_broadcast(dims_of(a), dims_of(b)))


def _broadcast(a: Dims, b: Dims) -> Dims:
    rank = max(len(a), len(b))
    left, right = ((*[1] * (rank - len(dims)), *dims) for dims in (a, b))
    for x, y in zip(left, right, strict=True):
        if x != y and 1 not in (x, y):
            raise NoMatch(f"masks {text_of(a)} and {text_of(b)} are not known to broadcast")
    return tuple(y if x == 1 else x for x, y in zip(left, right, strict=True))


def _float(value: ir.Value) -> type:
    dtype = value.dtype
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        raise NoMatch(f"a mask of {dtype}")
    return ir.DataType(dtype).numpy().type


def _keys(build: Builder, kt: ir.Value) -> ir.Value:
    """``k [.., t, d]`` of ``kt [.., d, t]``."""
    rank = len(dims_of(kt))
    return build.transpose(kt, [*range(rank - 2), rank - 1, rank - 2])


# -- three dims: heads merged into the batch ------------------------------------------------------


def _regrouped(build: Builder, node: ir.Node) -> _Scores:
    """Scores that were split into or merged from ``[b,h,s,t]``."""
    before, after = dims_of(operands(node)[0]), dims_of(node.outputs[0])
    scores = _scores(build, operands(node)[0])
    if before == after:
        return scores
    if len(before) == 3 and len(after) == 4 and before[1:] == after[2:] and scores.mask is None:
        return _Scores(scores.product, scores.scale, scores.softcap, None, after)
    if len(before) == 4 and len(after) == 3 and before == scores.grouped:
        return scores
    raise NoMatch(f"the scores are reshaped from {text_of(before)} to {text_of(after)}", node)


def _merged(
    build: Builder, scores: _Scores, q: ir.Value, kt: ir.Value, v: ir.Value, by_v: ir.Node
) -> Proposal:
    """Attention over ``[n,s,d]``: on ``[b,h,s,d]`` where q, k and v come from there, else as one head."""
    root = by_v.outputs[0]
    parts = [_four_dims(build, x) for x in (q, kt, v)]
    split = next((node for node, _ in root.uses()), None)
    if split is not None and split.op_type == "Reshape" and not used_elsewhere(root, split):
        q4, kt4, v4 = parts
        if q4 is not None and kt4 is not None and v4 is not None:
            attended = _attend(build, scores, q4, _keys(build, kt4), v4)
            return _proposal(build, split.outputs[0], *attended)
    if scores.grouped is not None:
        raise NoMatch("the heads that the mask is added to are not those of q, k and v", by_v)
    mask = scores.mask
    if mask is not None and len(dims_of(mask)) == 3:
        mask = build.unsqueeze(mask, 1)
    q4, k4, v4 = (build.unsqueeze(x, 1) for x in (q, _keys(build, kt), v))
    raised, says = _attend(build, _with_mask(scores, mask), q4, k4, v4)
    n, _, s, d = dims_of(raised)
    axes = build.constant(np.array([1], np.int64), "axes")
    return _proposal(build, root, build.op("Squeeze", raised, axes, shape=(n, s, d)), says)


def _four_dims(build: Builder, value: ir.Value) -> ir.Value | None:
    """The ``[b,h,s,d]`` (or, transposed, ``[b,h,d,t]``) that was merged to ``value [b*h,s,d]``."""
    node = node_of(value, "Reshape", "Transpose")
    if node is None:
        return None
    read = operands(node)[0]
    if node.op_type == "Transpose":
        merged = _four_dims(build, read) if list(attribute(node, "perm", ())) == [0, 2, 1] else None
        return None if merged is None else build.transpose(merged, (0, 1, 3, 2))
    dims = dims_of(read)
    return read if len(dims) == 4 and dims[2:] == dims_of(value)[1:] else None
