"""Attention, rotary embeddings, key-value caches and linear attention."""

from __future__ import annotations

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.shapes.elementwise import same_dtype
from netlathe.ir.types import Site, Type

_HEADS = "delete whole groups of query heads together with their key/value head"


def _attention(s: Site) -> list[Type]:
    """b (kv r) s h, b kv t h, b kv t v -> b (kv r) s v; with the heads packed in 3-D form.

    The past adds to t; the mask broadcasts to [b, kv r, s, past + t] and may be shorter at the end.
    """
    query_key = same_dtype(s, (0, 1, 4))
    value_dtype = same_dtype(s, (2, 5))
    shapes = [s.shape(index) for index in range(3)]
    if any(shape is None for shape in shapes):
        rank = next((len(shape) for shape in shapes if shape is not None), None)
        unknown = None if rank is None else (None,) * rank
        cache: Shape = (None,) * 4
        return [
            Type(query_key, unknown),
            Type(query_key, cache),
            Type(value_dtype, cache),
            Type(query_key, cache),
        ]
    for index in range(3):
        s.rank(index, 3, 4)
    packed = len(shapes[0] or ()) == 3
    if len({len(shape or ()) for shape in shapes}) > 1:
        s.fail("rank", "query, key and value must all be 3-D or all 4-D", *s.show(0, 1, 2))
    heads = (s.integer("q_num_heads"), s.integer("kv_num_heads"), s.integer("kv_num_heads"))
    if packed and not (heads[0] > 0 and heads[1] > 0):
        s.fail("attribute", "q_num_heads and kv_num_heads are needed for 3-D inputs")
    q, k, v = (_unpacked(s, index, heads[index]) for index in range(3))

    batch = s.equal(q[0], k[0], "width", "query and key need one batch size", *s.show(0, 1))
    batch = s.equal(batch, v[0], "width", "query and value need one batch size", *s.show(0, 2))
    kv_heads = s.equal(k[1], v[1], "heads", "key and value heads must match", *s.show(1, 2))
    if isinstance(q[1], int) and isinstance(kv_heads, int) and (kv_heads == 0 or q[1] % kv_heads):
        message = f"{q[1]} query heads cannot share {kv_heads} key/value heads evenly"
        s.fail("heads", message, *s.show(0, 1, 2), help=_HEADS)
    for index, shape in enumerate((q, k, v)):
        declared = heads[min(index, 1)]
        if not packed and declared > 0:
            name = "kv_num_heads" if index else "q_num_heads"
            what = f"{name} must be the number of heads of {s.name(index)}"
            s.equal(declared, shape[1], "heads", what, *s.show(index))
    what = "query and key heads need one size"
    head_size = s.equal(q[3], k[3], "width", what, *s.show(0, 1))
    length = s.equal(k[2], v[2], "width", "key and value need one length", *s.show(1, 2))

    total = length
    for index, size in ((4, head_size), (5, v[3])):
        past = s.shape(index)
        if past is None:
            if s.has(index):
                total = None
            continue
        s.rank(index, 4)
        name = s.name(index)
        s.equal(
            past[0], batch, "width", f"the cache {name} needs the batch size", *s.show(0, index)
        )
        s.equal(past[1], kv_heads, "heads", f"the cache {name} needs the heads", *s.show(1, index))
        s.equal(past[3], size, "width", f"the cache {name} needs the head size", *s.show(1, index))
        if index == 4:
            total = dims.add(length, past[2])
        else:
            what = "the key and the value cache need one length"
            s.equal(total, dims.add(length, past[2]), "width", what, *s.show(4, 5))
    _check_mask(s, (batch, q[1], q[2], total))
    s.vector(6, batch, "nonpad_kv_seqlen counts per sample")

    out = (batch, q[2], dims.product((q[1], v[3]))) if packed else (batch, q[1], q[2], v[3])
    return [
        Type(query_key, out),
        Type(query_key, (batch, kv_heads, total, head_size)),
        Type(value_dtype, (batch, kv_heads, total, v[3])),
        Type(query_key, (batch, q[1], q[2], total)),
    ]


def _unpacked(s: Site, index: int, heads: int) -> tuple[Dim, Dim, Dim, Dim]:
    """[batch, heads, length, head size] of a query, key or value in either form."""
    shape = s.shape(index)
    assert shape is not None
    if len(shape) == 4:
        b, n, t, h = shape
        return b, n, t, h
    b, t, width = shape
    if isinstance(width, int) and width % heads:
        s.fail(
            "heads",
            f"{heads} heads do not divide the width {width} of {s.name(index)}",
            *s.show(index),
            help="the number of heads or the projection before it is stale",
        )
    return b, heads, t, dims.divide(width, heads)


def _check_mask(s: Site, wanted: tuple[Dim, Dim, Dim, Dim]) -> None:
    mask = s.shape(3)
    if mask is None:
        return
    s.rank(3, 1, 2, 3, 4)
    names = ("batch size", "query heads", "query length", "total length")
    for axis in range(1, len(mask) + 1):
        own, width, name = mask[-axis], wanted[-axis], names[-axis]
        if own == 1 or own is None or width is None:
            continue
        shorter = axis == 1 and dims.same(own, width) is not True
        if shorter:
            # Keys beyond the mask's end are masked: it may be shorter, not longer.
            over = dims.subtract(own, width)
            if isinstance(over, int) and over > 0:
                s.fail("width", f"the mask {s.name(3)} has {own} keys of {width}", *s.show(1, 3))
            continue
        what = f"axis -{axis} of the mask {s.name(3)} must be 1 or the {name}"
        s.equal(own, width, "width", what, *s.show(0, 3))


def _rotary(s: Site) -> list[Type]:
    """The caches are [positions, r/2] with position_ids, else [b, s, r/2], r the rotated width."""
    x = s.shape()
    dtype = same_dtype(s, range(3))
    if x is None:
        return [Type(dtype, None)]
    s.rank(0, 3, 4)
    if len(x) == 4:
        batch, heads, length, head_size = x
        declared = s.integer("num_heads")
        if declared > 0:
            what = f"num_heads must be the number of heads of {s.name(0)}"
            s.equal(declared, heads, "heads", what, *s.show(0))
    else:
        batch, length, width = x
        count = s.integer("num_heads")
        if count <= 0:
            s.fail("attribute", "num_heads is needed for a 3-D input")
        if isinstance(width, int) and width % count:
            s.fail("heads", f"{count} heads do not divide the width {width}", *s.show(0))
        head_size = dims.divide(width, count)
    rotated: Dim = s.integer("rotary_embedding_dim") or head_size
    if isinstance(rotated, int) and rotated % 2:
        s.fail("width", f"the rotated width {rotated} is odd", *s.show(0))
    if isinstance(rotated, int) and isinstance(head_size, int) and rotated > head_size:
        s.fail("width", f"rotary_embedding_dim={rotated} exceeds the head size", *s.show(0))
    half = dims.divide(rotated, 2)
    with_positions = s.has(3)
    for index in (1, 2):
        cache = s.shape(index)
        if cache is None:
            continue
        name = s.name(index)
        s.rank(index, 2 if with_positions else 3)
        what = f"the cache {name} must be half as wide as the rotated part of {s.name(0)}"
        help = "recompute the cache for the new head size, or keep the head size"
        s.equal(half, cache[-1], "width", what, *s.show(0, index), help=help)
        if not with_positions:
            what = f"the cache {name} needs the batch size"
            s.equal(batch, cache[0], "width", what, *s.show(0, index))
            what = f"the cache {name} needs the sequence length"
            s.equal(length, cache[1], "width", what, *s.show(0, index))
    cos, sin = s.shape(1), s.shape(2)
    if cos is not None and sin is not None:
        s.equal(cos[0], sin[0], "width", "the two caches must have one length", *s.show(1, 2))
    positions = s.shape(3)
    if positions is not None:
        s.rank(3, 2)
        what = "position_ids are one per sample and position"
        s.equal(batch, positions[0], "width", what, *s.show(0, 3))
        s.equal(length, positions[1], "width", what, *s.show(0, 3))
    return [Type(dtype, x)]


def _tensor_scatter(s: Site) -> list[Type]:
    """The update has the cache's shape but for the sequence axis, where it is no longer."""
    cache, update = s.shape(), s.shape(1)
    dtype = same_dtype(s, (0, 1))
    if cache is None:
        return [Type(dtype, None)]
    axis = s.axis(len(cache), -2)
    if axis == 0:
        s.fail("axis", "the sequence axis cannot be 0, the batch")
    if update is not None:
        s.rank(1, len(cache))
        for position, (own, new) in enumerate(zip(cache, update, strict=True)):
            if position != axis:
                what = f"axis {position} of the update must be the cache's"
                s.equal(own, new, "width", what, *s.show(0, 1))
            elif isinstance(own, int) and isinstance(new, int) and new > own:
                s.fail("width", f"an update of {new} positions for a cache of {own}", *s.show(0, 1))
    s.vector(2, cache[0], "write_indices has one index per sample")
    return [Type(dtype, cache)]


def _linear_attention(s: Site) -> list[Type]:
    """b s (q h), b s (kv h), b s (kv v) -> b s (q v), and the state [b, kv, h, v]."""
    q, k, v = s.shape(0), s.shape(1), s.shape(2)
    dtype, state_dtype = same_dtype(s, range(3)), s.dtype(3) if s.has(3) else s.dtype()
    if q is None or k is None or v is None:
        return [Type(dtype, (None,) * 3), Type(state_dtype, (None,) * 4)]
    for index in range(3):
        s.rank(index, 3)
    heads, kv_heads = s.integer("q_num_heads"), s.integer("kv_num_heads")
    if heads <= 0 or kv_heads <= 0 or heads % kv_heads:
        s.fail("heads", f"{heads} query heads cannot share {kv_heads} heads evenly", help=_HEADS)
    _, _, _, size = _unpacked(s, 0, heads)
    _, _, _, key_size = _unpacked(s, 1, kv_heads)
    _, _, _, value_size = _unpacked(s, 2, kv_heads)
    s.equal(size, key_size, "width", "query and key heads need one size", *s.show(0, 1))
    out = (q[0], q[1], dims.product((heads, value_size)))
    return [Type(dtype, out), Type(state_dtype, (q[0], kv_heads, size, value_size))]


def _causal_conv(s: Site) -> list[Type]:
    """b c t, c 1 k -> b c t, and the state [b, c, k - 1]."""
    x, weight = s.shape(), s.shape(1)
    dtype = same_dtype(s, range(4))
    if x is None or weight is None:
        return [Type(dtype, x), Type(dtype, (None,) * 3)]
    s.rank(0, 3)
    s.rank(1, 3)
    s.equal(x[1], weight[0], "width", "one kernel per channel is needed", *s.show(0, 1))
    s.equal(weight[1], 1, "width", "the convolution is depthwise", *s.show(1))
    s.vector(2, x[1], "the bias has one element per channel")
    return [Type(dtype, x), Type(dtype, (x[0], x[1], dims.subtract(weight[2], 1)))]


RULES = {
    "Attention": _attention,
    "CausalConvWithState": _causal_conv,
    "LinearAttention": _linear_attention,
    "RotaryEmbedding": _rotary,
    "TensorScatter": _tensor_scatter,
}
