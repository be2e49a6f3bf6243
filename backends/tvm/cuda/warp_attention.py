"""Attention of any kind, right and slow: any type, mask, bias and size of a head.

attention.warp   a warp for each query: 32 keys at a time, softmax as it goes (arXiv 1805.02867)

What tensor cores take is :mod:`flash`'s and :mod:`product_attention`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tvm import tirx

from netlathe.backends.tvm import mathfn
from netlathe.backends.tvm.cuda.code import THREADS, GpuCode
from netlathe.backends.tvm.cuda.grids import WARP, Team, pieces
from netlathe.backends.tvm.tir import (
    VECTORIZED,
    Expr,
    cast,
    const,
    i64,
    idiv,
    imod,
    known,
    select,
    unflatten,
)

if TYPE_CHECKING:
    from netlathe.backends.tvm.kernel import Kernel
    from netlathe.backends.tvm.kernels.attention import Spec
    from netlathe.backends.tvm.kernels.reduce import Combine
    from netlathe.backends.tvm.values import Store


def attention(
    kernel: Kernel, code: GpuCode, spec: Spec, combines: Mapping[str, Combine], store: Store
) -> str:
    """store([b, h, query, v], element): any mask, bias and size of a head."""
    shape = kernel.shape(spec.q.shape)
    batch, heads, queries, depth = shape
    keys, width = kernel.size(spec.k.shape[2]), kernel.size(spec.v.shape[3])
    count = batch * heads * queries
    each = THREADS // WARP
    low = const(float("-inf"), "float32")
    zero = const(0.0, "float32")
    parts = known(pieces(width, WARP))
    assert parts is not None, "a head of unknown size"
    if parts == 0:
        return "attention.warp"  # no elements

    with code.launch(pieces(count, each), THREADS) as (block, thread):
        task = code.bind(block * i64(each) + idiv(thread, WARP))
        lane = code.bind(imod(thread, WARP))
        team = Team(code, WARP, lane)
        with code.when(task < count):
            b, h, i = (code.bind(x) for x in unflatten(task, [batch, heads, queries]))
            kv = h if spec.groups == 1 else code.bind(idiv(h, i64(spec.groups)))
            length = keys
            if spec.limit is not None:
                length = code.bind(tirx.max(tirx.min(spec.limit(code, b, i), keys), i64(0)))
            sums = code.alloc([parts], "float32")
            state = code.alloc([2], "float32")  # the largest score so far, the sum of weights
            with code.loop(parts, VECTORIZED) as part:
                code.store(sums, part, zero)
            code.store(state, 0, low)
            code.store(state, 1, zero)

            def score(t: Expr) -> Expr:
                dot = code.alloc([1], "float32")
                code.store(dot, 0, zero)
                with code.loop(depth) as d:
                    q = cast(spec.q.at(code, [b, h, i, d]), "float32")
                    k = cast(spec.k.at(code, [b, kv, t, d]), "float32")
                    code.store(dot, 0, tirx.BufferLoad(dot, [i64(0)]) + q * k)
                value = tirx.BufferLoad(dot, [i64(0)]) * const(spec.scale, "float32")
                if spec.softcap:
                    cap = const(spec.softcap, "float32")
                    value = mathfn.tanh(code, value / cap) * cap
                if spec.bias is not None:
                    value = value + spec.bias(code, b, h, i, t)
                if spec.allowed is not None:
                    value = select(spec.allowed(code, b, h, i, t), value, low)
                return value

            with code.loop(pieces(length, WARP)) as number:
                first = code.bind(number * i64(WARP))
                t = code.bind(first + lane)
                own = code.alloc([1], "float32")
                code.store(own, 0, low)
                with code.when(t < length):
                    code.store(own, 0, score(t))
                held = code.bind(tirx.BufferLoad(own, [i64(0)]))
                before = code.bind(tirx.BufferLoad(state, [i64(0)]))
                top = team.together(held, "float32", combines["max"])
                top = code.bind(combines["max"].function(before, top))
                # Where nothing may be attended all scores are -inf, and the result is zero.
                base = code.bind(select(top == low, zero, top))
                weight = code.bind(mathfn.exp(code, held - base))
                scale = code.bind(mathfn.exp(code, before - base))
                whole = team.together(weight, "float32", combines["sum"])
                code.store(state, 0, top)
                code.store(state, 1, tirx.BufferLoad(state, [i64(1)]) * scale + whole)
                with code.loop(parts, VECTORIZED) as part:
                    code.store(sums, part, tirx.BufferLoad(sums, [part]) * scale)
                with code.loop(tirx.min(i64(WARP), length - first)) as other:
                    factor = code.bind(code.broadcasted(weight, other))
                    with code.loop(parts, VECTORIZED) as part:
                        column = code.bind(part * i64(WARP) + lane)
                        with code.when(column < width):
                            v = cast(spec.v.at(code, [b, kv, first + other, column]), "float32")
                            code.store(sums, part, tirx.BufferLoad(sums, [part]) + factor * v)
            whole = code.bind(tirx.BufferLoad(state, [i64(1)]))
            factor = code.bind(select(whole == zero, zero, const(1.0, "float32") / whole))
            with code.loop(parts, VECTORIZED) as part:
                column = code.bind(part * i64(WARP) + lane)
                with code.when(column < width):
                    store(code, [b, h, i, column], tirx.BufferLoad(sums, [part]) * factor)
    return "attention.warp"
