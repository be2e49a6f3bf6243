"""Attention and rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm import tirx

from netlathe.backends.tvm import mathfn, storage
from netlathe.backends.tvm.cuda import decode, early, flash, masks, product_attention
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.attention import Plain, Spec, attention
from netlathe.backends.tvm.ops.contraction import product
from netlathe.backends.tvm.ops.elementwise import like
from netlathe.backends.tvm.ops.movement import concatenated, transposed
from netlathe.backends.tvm.ops.norm import softmax
from netlathe.backends.tvm.ops.op import D, Op, Rule, broadcast_index, combine, is_cheap
from netlathe.backends.tvm.ops.reduction import reduced
from netlathe.backends.tvm.tir import Code, Expr, Index, cast, const, dtype_of, i64, idiv, select
from netlathe.backends.tvm.values import Lazy, Pending, Placed, Ready, Scalar, Store, Value
from netlathe.ir import dims
from netlathe.ir.dims import Shape


def heads(op: Op, value: Value, count: int) -> Value:
    """[b, s, h * d] as [b, h, s, d]: an index of the same memory."""
    source = op.low.force(value)
    b, s, width = source.shape
    split = source.viewed((b, s, count, dims.divide(width, count)))
    shape = (b, count, s, dims.divide(width, count))
    return Lazy(
        source.dtype,
        shape,
        lambda code, at: split.at(code, [at[0], at[2], at[1], at[3]]),
        cheap=True,
        unit=True,
    )


def _joined(op: Op, first: Value, second: Value) -> Ready:
    """Two caches one after the other along axis 2."""
    axis = dims.add(first.shape[2], second.shape[2])
    shape = (*second.shape[:2], axis, second.shape[3])
    return concatenated(op.low, second.dtype, [first, second], shape, 2)


def _attention(op: Op) -> Sequence[Value]:
    low = op.low
    q = op.operand(0)
    k, v = (op.value(i) if isinstance(op.value(i), Placed) else op.operand(i) for i in (1, 2))
    packed = q.rank == 3
    if packed:
        q = heads(op, q, op.integer("q_num_heads"))
        k, v = heads(op, k, op.integer("kv_num_heads")), heads(op, v, op.integer("kv_num_heads"))
    past: dims.Dim = 0
    if op.has(4):
        past_key, past_value = op.operand(4), op.operand(5)
        k, v = low.operand(k), low.operand(v)
        past = past_key.shape[2]
        k, v = _joined(op, past_key, k), _joined(op, past_value, v)
    tensor_cores = _on_tensor_cores(op, q, k, v, past)
    cache = None
    if tensor_cores is not None:
        _hold(op, q, k)
        is_whole = not packed and not op.has(4) and q.shape[3] in decode.CODED_DEPTHS
        cache = masks.coded(op) if is_whole else None
        if cache:
            q = low.force(q)
        else:
            q, k, v = low.together([q, k, v])
    elif isinstance(low.machine, Gpu) and product_attention.suits(q, k, v):
        q, k, v = low.together([q, k, v])
    else:
        q, k = (x if is_cheap(x) else low.force(x) for x in (q, k))
        # Values are read along the last axis, a vector at a time.
        unit = isinstance(v, Ready) or (isinstance(v, Lazy) and v.unit and v.cheap)
        v = v if unit else low.force(v)
    presents = [_present(op, 1, k), _present(op, 2, v)]
    if tensor_cores is not None:
        cap = op.real("softcap")
        spec = Spec(
            q, k, v, *_grouped(op, q, k), cap, None, None, None, plain=tensor_cores, coded=cache
        )
    else:
        spec = _spec(op, q, k, v, past)
    if op.wants(3) or op.integer("softmax_precision", 1) not in (0, 1, 10, 16):
        y, scores = _in_steps(op, spec)
        if packed:
            y = low.force(transposed(op, y, [0, 2, 1, 3])).viewed(op.shape())
        return [y, *presents, scores]
    batch, count, queries, _ = q.shape
    shape: Shape = (batch, count, queries, v.shape[3])

    def build(kernel: Kernel, store: Store) -> str:
        return attention(kernel, spec, store)

    result: Value = Pending(op.dtype(), shape, build)
    if packed:
        assert isinstance(result, Pending)
        turned = (batch, queries, count, v.shape[3])
        result = result.then(
            lambda code, at, e: e, op.dtype(), turned, lambda at: [at[0], at[2], at[1], at[3]]
        )
        result = low.force(result).viewed(op.shape())
    return [result, *presents]


def _in_steps(op: Op, spec: Spec) -> tuple[Value, Value]:
    """The result and the scores, of which a matrix is in memory: for nodes that give scores out."""
    low, dtype = op.low, spec.q.dtype

    def spread(value: Value, perm: Sequence[int]) -> Value:
        """Keys or values, repeated for the query heads, their last two axes in the order of ``perm``."""
        b, _, *sizes = value.shape
        shape = (b, spec.q.shape[1], *(sizes[axis] for axis in perm))

        def element(code: Code, at: Index) -> Expr:
            inner = [at[2 + perm.index(axis)] for axis in range(2)]
            return value.at(code, [at[0], idiv(at[1], spec.groups), *inner])

        return Lazy(value.dtype, shape, element, cheap=True)

    stages = []
    made = product(low, spec.q, spread(spec.k, [1, 0]), dtype)
    shape = made.shape
    scale = Scalar(D.FLOAT, (), spec.scale)
    made = low.force(
        combine(low, lambda code, x, f: x * cast(f, dtype_of(x)), [made, scale], dtype, shape)
    )
    stages.append(made)
    if spec.softcap:
        made = low.force(combine(low, _capped(spec.softcap), [made], dtype, shape))
    stages.append(made)
    raw = made

    def masked(code: Code, at: Index) -> Expr:
        value = raw.at(code, at)
        if spec.bias is not None:
            value = value + cast(spec.bias(code, *at), dtype_of(value))
        if spec.allowed is not None:
            value = select(spec.allowed(code, *at), value, like(value, float("-inf")))
        return value

    held = low.force(Lazy(dtype, shape, masked, cost=8))
    stages.append(held)
    largest = low.force(reduced(low, held, [3], "max", True))
    precise = op.integer("softmax_precision", 0)
    wide = D.DOUBLE if precise == D.DOUBLE else dtype
    source = combine(low, lambda code, x: cast(x, storage.computed(wide)), [held], wide, shape)
    weights = low.force(softmax(low, source, 3))

    def emptied(code: Code, w: Expr, m: Expr) -> Expr:
        value = cast(w, storage.computed(dtype))
        return select(m == like(m, float("-inf")), like(value, 0.0), value)

    final = low.force(combine(low, emptied, [weights, largest], dtype, shape))
    stages.append(final)
    y = product(low, final, spread(spec.v, [0, 1]), op.dtype())
    return y, stages[op.integer("qk_matmul_output_mode")]


def _capped(cap: float) -> Callable[[Code, Expr], Expr]:
    return lambda code, x: mathfn.tanh(code, x / like(x, cap)) * like(x, cap)


def _present(op: Op, output: int, value: Value) -> Value:
    """A cache output; it is written only where it is read."""
    return op.low.force(value) if op.wants(output) else value


def _on_tensor_cores(op: Op, q: Value, k: Value, v: Value, past: dims.Dim) -> Plain | None:
    """What the node lets its queries see, if a GPU's tensor cores take it."""
    machine = op.low.machine
    if not isinstance(machine, Gpu) or not flash.suits(machine, q, k, v):
        return None
    if op.wants(3) or op.integer("softmax_precision", 1) not in (0, 1, 10, 16):
        return None
    return masks.plain(op, (*q.shape[:3], k.shape[2]), past) if _scale(op, q) > 0 else None


def _hold(op: Op, q: Value, k: Value) -> None:
    """Let several nodes that decode ask for caches of the caller's before kernels in front have ended."""
    queries = q.shape[2]
    several = sum(node.op_type == "Attention" for node in op.node.graph or ()) > 1
    is_few = not isinstance(queries, int) or queries * _grouped(op, q, k)[0] <= flash.MOST_ROWS
    is_few = is_few and flash.splits_keys(q.shape[3])
    machine = op.low.machine
    if several and is_few and isinstance(machine, Gpu) and machine.has_wgmma:
        early.hold(op.low)


def _grouped(op: Op, q: Value, k: Value) -> tuple[int, float]:
    """How many query heads share a head of keys, and what scores are multiplied with."""
    groups = dims.divide(q.shape[1], k.shape[1])
    if not isinstance(groups, int):
        raise op.gap("an unknown number of heads")
    return groups, _scale(op, q)


def _scale(op: Op, q: Value) -> float:
    scale = op.real("scale", 0.0)
    if not scale:
        width = q.shape[3]
        if not isinstance(width, int):
            raise op.gap("an unknown size of a head")
        scale = 1 / math.sqrt(width)
    return scale


def _spec(op: Op, q: Value, k: Value, v: Value, past: dims.Dim) -> Spec:
    groups, scale = _grouped(op, q, k)
    mask = op.operand(3) if op.has(3) else None
    if mask is not None and not is_cheap(mask):
        mask = op.low.force(mask)
    lengths = op.operand(6) if op.has(6) else None
    left, right = op.integer("left_window_size", -1), op.integer("right_window_size", -1)
    if op.integer("is_causal"):
        right = 0 if right < 0 else min(right, 0)
    whole = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])

    def offset(code: Code, b: Expr) -> Expr:
        if lengths is not None:
            length = cast(lengths.at(code, [b]), "int64")
            return code.kernel.size(past) + length - code.kernel.size(q.shape[2])
        return code.kernel.size(past)

    def masked(code: Code, b: Expr, h: Expr, i: Expr, j: Expr) -> Expr:
        """The mask's element; a mask that ends before the keys is padded."""
        assert mask is not None
        at, shape = [b, h, i, j][4 - mask.rank :], whole[4 - mask.rank :]
        width = mask.shape[-1]
        if width == 1 or dims.same(width, whole[3]) is True:
            return mask.at(code, broadcast_index(code, mask, at, shape))
        size = code.kernel.size(width)
        at = [*at[:-1], tirx.max(tirx.min(j, size - i64(1)), i64(0))]
        item = mask.at(code, broadcast_index(code, mask, at, (*shape[:-1], width)))
        inside = j < size
        if mask.dtype == D.BOOL:
            return tirx.And(inside, item)
        return select(inside, item, const(float("-inf"), dtype_of(item)))

    bias: Callable[[Code, Expr, Expr, Expr, Expr], Expr] | None = None
    if mask is not None and mask.dtype != D.BOOL:
        bias = lambda code, b, h, i, j: cast(masked(code, b, h, i, j), "float32")  # noqa: E731
    conditions: list[Callable[[Code, Expr, Expr, Expr, Expr], Expr]] = []
    if mask is not None and mask.dtype == D.BOOL:
        conditions.append(masked)
    if lengths is not None:
        held = lengths
        conditions.append(lambda code, b, h, i, j: j < cast(held.at(code, [b]), "int64"))
    if left >= 0:
        conditions.append(lambda code, b, h, i, j: j >= i + offset(code, b) - i64(left))
    if right >= 0:
        conditions.append(lambda code, b, h, i, j: j <= i + offset(code, b) + i64(right))

    def allowed(code: Code, b: Expr, h: Expr, i: Expr, j: Expr) -> Expr:
        result = conditions[0](code, b, h, i, j)
        for condition in conditions[1:]:
            result = tirx.And(result, condition(code, b, h, i, j))
        return result

    def limit(code: Code, b: Expr, i: Expr) -> Expr:
        return i + offset(code, b) + i64(right + 1)

    return Spec(
        q,
        k,
        v,
        groups,
        scale,
        op.real("softcap"),
        bias,
        allowed if conditions else None,
        limit if right >= 0 else None,
    )


def _rotary_embedding(op: Op) -> Sequence[Value]:
    x = op.operand(0)
    packed = x.rank == 3
    source = op.low.force(x) if packed or not is_cheap(x) else x
    if packed:
        source = heads(op, source, op.integer("num_heads"))
    width = source.shape[3]
    if not isinstance(width, int):
        raise op.gap("an unknown size of a head")
    turned = op.integer("rotary_embedding_dim") or width
    half = turned // 2
    interleaved = bool(op.integer("interleaved"))
    cos, sin = op.operand(1), op.operand(2)
    positions = op.operand(3) if op.has(3) else None

    def angle(code: Code, cache: Value, b: Expr, s: Expr, at: Expr) -> Expr:
        if positions is not None:
            row = cast(positions.at(code, [b, s]), "int64")
            return cache.at(code, [row, at])
        shape = (source.shape[0], source.shape[2], half)
        return cache.at(code, broadcast_index(code, cache, [b, s, at], shape))

    def element(code: Code, index: Index) -> Expr:
        b, h, s, d = index
        if interleaved:
            at = tirx.floordiv(d, i64(2))
            first = tirx.floormod(d, i64(2)) == i64(0)
            partner = select(first, d + i64(1), d - i64(1))
        else:
            first = d < i64(half)
            at = select(first, d, d - i64(half))
            partner = select(first, d + i64(half), d - i64(half))
        if turned < width:
            at = tirx.min(at, i64(half - 1))
            partner = tirx.min(partner, i64(width - 1))
        c, s_ = angle(code, cos, b, s, at), angle(code, sin, b, s, at)
        own = source.at(code, index)
        other = source.at(code, [b, h, s, partner])
        result = select(first, c * own - s_ * other, s_ * other + c * own)
        return select(d < i64(turned), result, own) if turned < width else result

    result = Lazy(op.dtype(), source.shape, element, cost=8)
    if not packed:
        return [result]
    b, count, s, d = source.shape

    def split(code: Code, at: Index) -> Expr:
        return result.at(code, [at[0], at[2], at[1], at[3]])

    whole = Lazy(op.dtype(), (b, s, count, d), split, cost=9)
    return [op.low.force(whole).viewed(op.shape())]


ROWS: dict[str, Rule] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary_embedding,
}
