"""Attention by two products on tensor cores and a softmax between them: any mask and bias, heads of any size.

attention.products   scores of all queries and keys are in memory, in float32, and weights in halves

It takes heads of halves whose sizes are multiples of 8. Where there are more scores than are worth their
memory, or none, the node is :mod:`warp_attention`'s; sizes known at run time only decide then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import mathfn, storage
from netlathe.backends.tvm.cuda import grids, tensor, warp_attention
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.operands import HALVES
from netlathe.backends.tvm.cuda.tensor import Batch, Finish, Side
from netlathe.backends.tvm.tir import (
    Code,
    Expr,
    Index,
    const,
    flat_index,
    i64,
    idiv,
    known,
    select,
    unflatten,
)
from netlathe.backends.tvm.values import Lazy, Ready

if TYPE_CHECKING:
    from netlathe.backends.tvm.kernel import Kernel
    from netlathe.backends.tvm.kernels.attention import Spec
    from netlathe.backends.tvm.kernels.reduce import Combine
    from netlathe.backends.tvm.values import Store, Value

D = ir.DataType
MOST_SCORES = 1 << 28  # 1 GiB of them, and half as much of weights
# What weights, at most 1, are stored times: of many keys each would be too small for a float16.
_LARGER = {D.FLOAT16: 2.0**15, D.BFLOAT16: 1.0}


def suits(q: Value, k: Value, v: Value) -> bool:
    """Whether products take heads like these: [b, h, s, d], [b, kv, t, d] and [b, kv, t, v]."""
    widths = (q.shape[3], v.shape[3])
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in HALVES
        and all(isinstance(width, int) and width > 0 and width % 8 == 0 for width in widths)
    )


def attention(
    kernel: Kernel, code: GpuCode, spec: Spec, combines: Mapping[str, Combine], store: Store
) -> str:
    """store([b, h, query, v], element), of queries, keys and values in memory."""
    batch, heads, queries = kernel.shape(spec.q.shape[:3])
    keys = kernel.size(spec.k.shape[2])
    filled = idiv(keys + i64(7), 8) * i64(8)  # lines of whole pieces, as copies need
    count = batch * heads * queries * filled

    def products() -> None:
        _products(kernel, code, spec, combines, store, filled)

    def warps() -> None:
        warp_attention.attention(kernel, code, spec, combines, store)

    number = known(count)
    if number is None:
        code.branch(_fits(count), products, warps)
    elif 0 < number <= MOST_SCORES:
        products()
    else:
        return warp_attention.attention(kernel, code, spec, combines, store)
    return "attention.products"


def _fits(count: Expr) -> Expr:
    return tirx.And(count > i64(0), count <= i64(MOST_SCORES))


def _products(
    kernel: Kernel,
    code: GpuCode,
    spec: Spec,
    combines: Mapping[str, Combine],
    store: Store,
    filled: Expr,
) -> None:
    q, k, v = (kernel.read(x) for x in (spec.q, spec.k, spec.v) if isinstance(x, Ready))
    batch, heads, queries, depth = kernel.shape(spec.q.shape)
    keys, width = kernel.shape(spec.v.shape[2:])
    groups, half = i64(spec.groups), HALVES[spec.q.dtype]
    parts = [batch * idiv(heads, groups), groups]
    count = batch * heads * queries * filled
    size = count if known(count) is not None else select(_fits(count), count, i64(1))
    scores = kernel.workspace(size, "float32")
    weights = kernel.workspace(size, storage.STORED[spec.q.dtype])

    def own(buffer: object, line: Expr) -> Side:
        """A matrix for each head, of a line for each query."""
        return Side(code.address(buffer), line, False, (groups * queries * line, queries * line))

    def shared(buffer: object, line: Expr, down: bool) -> Side:
        """A matrix for all heads that share keys, of a line for each of these."""
        return Side(code.address(buffer), line, down, (keys * line, None))

    def scored(number: Expr) -> Finish:
        top = code.bind(number * queries)
        return lambda row, key, value: code.store(scores, (top + row) * filled + key, value)

    sizes = (queries, depth, keys)
    sides = own(q, depth), shared(k, depth, down=False)
    tensor.of_matrices(code, half, *sides, sizes, Batch(parts, scored))

    def element(code: Code, at: Index) -> Expr:
        place = flat_index(at, [batch, heads, queries, filled])
        value = tirx.BufferLoad(scores, [place]) * const(spec.scale, "float32")
        if spec.softcap:
            cap = const(spec.softcap, "float32")
            value = mathfn.tanh(code, value / cap) * cap
        if spec.bias is not None:
            value = value + spec.bias(code, *at)
        if spec.allowed is not None:
            value = select(spec.allowed(code, *at), value, const(float("-inf"), "float32"))
        return value

    def weigh(code: Code, at: Index, value: Expr) -> None:
        value = value * const(_LARGER[spec.q.dtype], "float32")
        place = flat_index(at, [batch, heads, queries, filled])
        code.store(weights, place, storage.store(code, spec.q.dtype, value))

    masked = Lazy(D.FLOAT, (*spec.q.shape[:3], spec.k.shape[2]), element)
    lead = [batch, heads, queries]
    grids.softmax(code, masked, lead, keys, "float32", False, combines, weigh, masked=True)

    def finish(number: Expr) -> Finish:
        where = [code.bind(i) for i in unflatten(number, [batch, heads])]
        scale = const(1 / _LARGER[spec.q.dtype], "float32")
        return lambda row, column, value: store(code, [*where, row, column], value * scale)

    sizes = (queries, keys, width)
    sides = own(weights, filled), shared(v, width, down=True)
    tensor.of_matrices(code, half, *sides, sizes, Batch(parts, finish))
