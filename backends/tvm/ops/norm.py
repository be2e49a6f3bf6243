"""Softmax and the normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import tirx

from netlathe.backends.tvm import mathfn, storage
from netlathe.backends.tvm.cuda import products as cuda_products
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import rows
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops.elementwise import like
from netlathe.backends.tvm.ops.op import Op, Rule, combine, read
from netlathe.backends.tvm.ops.reduction import arg_extreme, reduced
from netlathe.backends.tvm.tir import Code, Expr, Index, cast, i64, select, unflatten
from netlathe.backends.tvm.values import Lazy, Pending, Ready, Store, Value
from netlathe.ir import dims


def _softmax(op: Op) -> Sequence[Value]:
    log = op.node.op_type == "LogSoftmax"
    x = op.operand(0)
    return [softmax(op.low, x, op.axis(x.rank, -1), log)]


def log_softmax(low: Lowering, x: Value, axis: int) -> Value:
    """The logarithm of the softmax of ``x`` along ``axis``."""
    return softmax(low, x, axis, log=True)


def softmax(low: Lowering, x: Value, axis: int, log: bool = False) -> Value:
    """Softmax of ``x``, which is not pending, along ``axis``."""
    if axis != x.rank - 1:
        return _softmax_inside(low, low.force(x), axis, log)

    def build(kernel: Kernel, store: Store) -> str:
        shape = kernel.shape(x.shape)
        dtype = storage.computed(x.dtype)
        return rows.softmax(kernel, x, shape[:-1], shape[-1], dtype, log, store)

    return Pending(x.dtype, x.shape, build)


def _softmax_inside(low: Lowering, x: Value, axis: int, log: bool) -> Value:
    dtype = x.dtype
    largest = low.force(reduced(low, x, [axis], "max", True))
    power = combine(low, lambda code, a, b: mathfn.exp(code, a - b), [x, largest], x.dtype, x.shape)
    if log:
        whole = low.force(reduced(low, power, [axis], "sum", True))
        return combine(
            low,
            lambda code, a, b, c: a - b - mathfn.log(code, c),
            [x, largest, whole],
            dtype,
            x.shape,
        )
    power = low.force(power)
    whole = low.force(reduced(low, power, [axis], "sum", True))
    return combine(low, lambda code, a, b: a / b, [power, whole], dtype, x.shape)


def _hardmax(op: Op) -> Sequence[Value]:
    x = op.ready(0)
    axis = op.axis(x.rank, -1)
    first = op.low.force(arg_extreme(op.low, x, axis, "max", False, True))

    def element(code: Code, index: Index) -> Expr:
        at = first.at(code, [*index[:axis], i64(0), *index[axis + 1 :]])
        dtype = storage.computed(x.dtype)
        return select(at == index[axis], tirx.const(1, dtype), tirx.const(0, dtype))

    return [Lazy(x.dtype, x.shape, element)]


def _norm(op: Op) -> Sequence[Value]:
    """LayerNormalization and RMSNormalization over the axes from ``axis`` on."""
    centred = op.node.op_type == "LayerNormalization"
    x = op.operand(0)
    axis = op.axis(x.rank, -1)
    if op.wants(1) or op.wants(2):
        return _norm_with_statistics(op, x, axis)
    scale = op.operand(1)
    bias = op.operand(2) if op.has(2) else None
    epsilon = op.real("epsilon", 1e-5)
    shape, dtype = x.shape, op.dtype()
    computed = storage.computed(x.dtype)
    length = dims.product(shape[axis:])

    def build(kernel: Kernel, store: Store) -> str:
        tail = kernel.shape(shape[axis:])

        def place(index: Index, j: Expr) -> Index:
            return [*index, *(unflatten(j, tail) if len(tail) > 1 else [j])]

        def load(code: Code, index: Index, j: Expr) -> Expr:
            return x.at(code, place(index, j))

        def finish(code: Code, index: Index, j: Expr, value: Expr) -> None:
            at = place(index, j)
            value = storage.rounded(code, x.dtype, value)
            value = value * cast(read(code, scale, at, shape), computed)
            if bias is not None:
                value = value + cast(read(code, bias, at, shape), computed)
            store(code, at, value)

        constants = [
            (kernel.read(value), np.dtype(storage.STORED[value.dtype]).itemsize)
            for value in (scale, bias)
            if isinstance(value, Ready)
            and value.shape == shape[axis:]
            and op.low.is_constant(value)
        ]
        return rows.normalize(
            kernel,
            load,
            kernel.shape(shape[:axis]),
            kernel.size(length),
            computed,
            epsilon,
            centred,
            finish,
            constants,
        )

    made = Pending(dtype, shape, build)
    if not centred and axis == x.rank - 1 and isinstance(op.low.machine, Gpu):
        return [cuda_products.inside(op, x, scale, epsilon, made) or made]
    return [made]


def _norm_with_statistics(op: Op, x: Value, axis: int) -> Sequence[Value]:
    low = op.low
    x = low.force(x)
    axes = list(range(axis, x.rank))
    wide = op.dtype(1) if op.wants(1) else op.dtype(2)
    epsilon = op.real("epsilon", 1e-5)
    computed = storage.computed(wide)
    source = combine(low, lambda code, a: cast(a, computed), [x], wide, x.shape)
    mean = low.force(reduced(low, source, axes, "mean", True))
    centred = combine(low, lambda code, a, m: cast(a, computed) - m, [x, mean], wide, x.shape)
    square = combine(low, lambda code, a: a * a, [centred], wide, x.shape)
    variance = reduced(low, square, axes, "mean", True)
    inverse = low.force(
        combine(
            low,
            lambda code, v: like(v, 1.0) / tirx.sqrt(v + like(v, epsilon)),
            [variance],
            wide,
            variance.shape,
        )
    )
    operands = [centred, inverse, op.operand(1)] + ([op.operand(2)] if op.has(2) else [])

    def finish(code: Code, c: Expr, i: Expr, s: Expr, *b: Expr) -> Expr:
        value = storage.rounded(code, x.dtype, c * i) * s
        return value + b[0] if b else value

    y = combine(low, finish, operands, op.dtype(), x.shape)
    return [y, mean, inverse]


def affine(op: Op, x: Value, mean: Value, inverse: Value, axis_values: Sequence[Value]) -> Value:
    """(x - mean) * inverse, then a scale and bias per channel (axis 1)."""

    def finish(code: Code, a: Expr, m: Expr, i: Expr, *scale: Expr) -> Expr:
        value = (a - m) * i
        if scale:
            value = value * scale[0] + scale[1]
        return value

    operands = [x, mean, inverse, *axis_values]
    return combine(op.low, finish, operands, op.dtype(), x.shape)


def channel(value: Value, rank: int) -> Value:
    """A vector per channel, shaped to broadcast against [batch, channel, ...]."""
    shape = (value.shape[0], *([1] * (rank - 2)))
    return Lazy(value.dtype, shape, lambda code, index: value.at(code, [index[0]]), cheap=True)


def _group_normalization(op: Op) -> Sequence[Value]:
    x = op.ready(0)
    groups = op.integer("num_groups") if op.node.op_type == "GroupNormalization" else None
    low = op.low
    channels = x.shape[1]
    if groups is None:
        if not isinstance(channels, int):
            raise op.gap("an unknown number of channels")
        groups = channels
    rest = dims.product([dims.divide(channels, groups), *x.shape[2:]])
    grouped = x.viewed((x.shape[0], groups, rest))
    mean = low.force(reduced(low, grouped, [2], "mean", True))
    square = combine(
        low, lambda code, a, m: (a - m) * (a - m), [grouped, mean], x.dtype, grouped.shape
    )
    variance = reduced(low, square, [2], "mean", True)
    epsilon = op.real("epsilon", 1e-5)
    inverse = low.force(
        combine(
            low,
            lambda code, v: like(v, 1.0) / tirx.sqrt(v + like(v, epsilon)),
            [variance],
            x.dtype,
            variance.shape,
        )
    )
    size = dims.divide(channels, groups)

    def per_group(value: Value) -> Value:
        shape = (x.shape[0], channels, *([1] * (x.rank - 2)))

        def element(code: Code, index: Index) -> Expr:
            group = tirx.floordiv(index[1], code.kernel.size(size))
            return value.at(code, [index[0], group, i64(0)])

        return Lazy(value.dtype, shape, element, cheap=True)

    scale, bias = op.operand(1), op.operand(2)
    return [
        affine(
            op,
            x,
            per_group(mean),
            per_group(inverse),
            [channel(scale, x.rank), channel(bias, x.rank)],
        )
    ]


def _batch_normalization(op: Op) -> Sequence[Value]:
    if op.integer("training_mode"):
        raise op.gap("training mode")
    x = op.value(0)
    epsilon = op.real("epsilon", 1e-5)
    parts = [channel(op.operand(i), x.rank) for i in range(1, 5)]

    def finish(code: Code, a: Expr, s: Expr, b: Expr, m: Expr, v: Expr) -> Expr:
        factor = s / tirx.sqrt(v + like(v, epsilon))
        return (a - m) * cast(factor, str(a.ty.dtype)) + b

    return [combine(op.low, finish, [x, *parts], op.dtype(), x.shape)]


def _mean_variance(op: Op) -> Sequence[Value]:
    x = op.ready(0)
    axes = [axis % x.rank for axis in op.integers("axes") or (0, 2, 3)]
    low = op.low
    mean = low.force(reduced(low, x, axes, "mean", True))
    square = combine(low, lambda code, a, m: (a - m) * (a - m), [x, mean], x.dtype, x.shape)
    variance = low.force(reduced(low, square, axes, "mean", True))
    return [
        combine(
            low,
            lambda code, a, m, v: (a - m) / (tirx.sqrt(v) + like(v, 1e-9)),
            [x, mean, variance],
            op.dtype(),
            x.shape,
        )
    ]


def _lp_normalization(op: Op) -> Sequence[Value]:
    x = op.ready(0)
    axis = op.axis(x.rank, -1)
    low = op.low
    length = low.force(reduced(low, x, [axis], "l1" if op.integer("p", 2) == 1 else "l2", True))

    def divide(code: Code, a: Expr, n: Expr) -> Expr:
        zero = n == like(n, 0.0)
        return select(zero, like(a, 0.0), a / select(zero, like(n, 1.0), n))

    return [combine(low, divide, [x, length], op.dtype(), x.shape)]


def _lrn(op: Op) -> Sequence[Value]:
    x = op.ready(0)
    size, alpha = op.integer("size"), op.real("alpha", 1e-4)
    beta, bias = op.real("beta", 0.75), op.real("bias", 1.0)
    before = (size - 1) // 2

    def element(code: Code, index: Index) -> Expr:
        channels = code.kernel.size(x.shape[1])
        total = None
        for offset in range(-before, size - before):
            at = index[1] + i64(offset)
            inside = tirx.And(at >= i64(0), at < channels)
            held = tirx.max(tirx.min(at, channels - i64(1)), i64(0))
            item = x.at(code, [index[0], held, *index[2:]])
            item = select(inside, item * item, like(item, 0.0))
            total = item if total is None else total + item
        assert total is not None
        base = like(total, bias) + total * like(total, alpha / size)
        return x.at(code, index) / tirx.pow(base, like(total, beta))

    return [Lazy(op.dtype(), x.shape, element, cost=size)]


ROWS: dict[str, Rule] = {
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Hardmax": _hardmax,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _group_normalization,
    "BatchNormalization": _batch_normalization,
    "MeanVarianceNormalization": _mean_variance,
    "LpNormalization": _lp_normalization,
    "LRN": _lrn,
}
