"""Matrix products in all their spellings."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import gemm
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops.op import D, Op, Rule, broadcast_index, is_cheap
from netlathe.backends.tvm.tir import Code, Expr, Index
from netlathe.backends.tvm.values import Lazy, Pending, Ready, Store, Value
from netlathe.ir import dims, weights
from netlathe.ir.dims import Shape


def _matmul(op: Op) -> Sequence[Value]:
    constant = op.node.inputs[1]
    a = op.value(0)
    if (
        constant is not None
        and weights.is_weight(constant)
        and constant.shape is not None
        and len(constant.shape) == 2
        and a.rank >= 1
        and constant.const_value is not None
    ):
        return [by_constant(op.low, op.ready(0), constant, op.dtype(), op.shape())]
    return [product(op.low, op.operand(0), op.operand(1), op.dtype())]


def by_constant(low: Lowering, a: Ready, constant: ir.Value, dtype: D, shape: Shape) -> Pending:
    """``a`` [..., K] times a constant [K, N], packed at compile time."""
    tensor = constant.const_value
    assert tensor is not None
    inner, columns = tensor.shape.numpy()
    cut = gemm.panels(low.machine, columns, storage.computed(dtype))
    weight = low.parameter(
        constant.name or "weight",
        tensor.dtype,
        (cut.count, inner, cut.width),
        lambda: gemm.pack(storage.array(tensor), cut),
        (constant, "packed", cut),
    )
    flat = a.viewed((dims.product(a.shape[:-1]), inner))
    lead = shape[:-1] if a.rank > 1 else ()

    def build(kernel: Kernel, store: Store) -> str:
        return gemm.packed(kernel, flat, weight, cut, kernel.shape(lead), inner, store)

    return Pending(dtype, shape, build)


def product(low: Lowering, a: Value, b: Value, dtype: D) -> Value:
    """A numpy matmul of two computed values."""
    left = _padded(a, (1,) * (2 - a.rank) + a.shape if a.rank < 2 else a.shape)
    right = _padded(b, (*b.shape, 1) if b.rank < 2 else b.shape)
    batch = _batch(left.shape[:-2], right.shape[:-2])
    # Each element is read by many tiles.
    left, right = (v if is_cheap(v) else low.force(v) for v in (left, right))
    whole = (*batch, left.shape[-2], right.shape[-1])
    columns = right.shape[-1]
    cut = gemm.panels(
        low.machine, columns if isinstance(columns, int) else 1 << 20, storage.computed(dtype)
    )

    def spread(value: Value) -> Lazy:
        shape = (*batch, *value.shape[-2:])

        def element(code: Code, index: Index) -> Expr:
            item = value.at(code, broadcast_index(code, value, index, shape))
            return _as(item, storage.computed(dtype))

        return Lazy(dtype, shape, element, cheap=True)

    wide_left, wide_right = spread(left), spread(right)

    def build(kernel: Kernel, store: Store) -> str:
        return gemm.batched(kernel, wide_left, wide_right, cut, kernel.shape(batch), store)

    result = Pending(dtype, whole, build)
    shape = (
        tuple(batch) + (a.shape[-2:-1] if a.rank > 1 else ()) + (b.shape[-1:] if b.rank > 1 else ())
    )
    return result if shape == whole else low.force(result).viewed(shape)


def _as(item: Expr, dtype: str) -> Expr:
    return item if str(item.ty.dtype) == dtype else tirx.Cast(dtype, item)


def _batch(a: Shape, b: Shape) -> Shape:
    return dims.broadcast([a, b]).shape


def _padded(value: Value, shape: Shape) -> Value:
    if shape == value.shape:
        return value
    if isinstance(value, Ready):
        return value.viewed(shape)
    leading = shape[-value.rank :] == value.shape if value.rank else True

    def element(code: Code, index: Index) -> Expr:
        return value.at(code, index[-value.rank :] if leading else index[: value.rank])

    return Lazy(value.dtype, shape, element, cheap=is_cheap(value))


def _gemm(op: Op) -> Sequence[Value]:
    from netlathe.backends.tvm.ops.elementwise import like
    from netlathe.backends.tvm.ops.movement import transposed
    from netlathe.backends.tvm.ops.op import combine

    a, b = op.operand(0), op.operand(1)
    if op.integer("transA"):
        a = transposed(op, a, [1, 0])
    if op.integer("transB"):
        b = transposed(op, b, [1, 0])
    alpha, beta = op.real("alpha", 1.0), op.real("beta", 1.0)
    made: Value = product(op.low, a, b, op.dtype())
    if alpha != 1.0:
        made = combine(op.low, lambda code, x: x * like(x, alpha), [made], op.dtype(), made.shape)
    if op.has(2):
        made = combine(
            op.low,
            lambda code, x, c: x + (c if beta == 1.0 else c * like(c, beta)),
            [made, op.value(2)],
            op.dtype(),
            op.shape(),
        )
    return [made]


ROWS: dict[str, Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
}
