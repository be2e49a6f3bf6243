"""Products on a GPU: which kernel takes which.

few      halves by a constant (:mod:`factors`), up to 16 rows; by most of integers any number on sm_90a
tensor   halves by a constant, more rows; two computed matrices of halves (:mod:`matrices`)
blocks   everything else, convolutions that :mod:`conv` does not take among it

Operands of 8 bits go by :mod:`eight` to :mod:`tensor`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.cuda import blocks, factors, few, tensor
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.factors import Factor
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import general
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.tir import (
    Code,
    Expr,
    Index,
    cast,
    const,
    i64,
    select,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Joinable, Normed, Pending, Ready, Store, Value
from netlathe.ir import dims
from netlathe.ir.dims import Shape

if TYPE_CHECKING:
    from netlathe.backends.tvm.ops.op import Op

D = ir.DataType


def of_values(kernel: Kernel, a: Value, b: Value, batch: Sequence[Expr], store: Store) -> str:
    """store([*batch, row, column], product).

    ``a`` is [*batch, rows, inner], ``b`` [*batch, inner, columns].
    """
    code = kernel.code
    assert isinstance(code, GpuCode)
    sizes = (kernel.size(a.shape[-2]), kernel.size(a.shape[-1]), kernel.size(b.shape[-1]))
    return blocks.product(
        code,
        batch,
        sizes,
        storage.computed(a.dtype),
        lambda where, row, k: a.at(code, [*where, row, k]),
        lambda where, k, column: b.at(code, [*where, k, column]),
        store,
    )


def of_constant(
    low: Lowering, a: Ready | Normed, constant: ir.Value, dtype: D, shape: Shape
) -> Pending:
    """``a`` [..., K] times a constant [K, N]."""
    if (found := factors.factor(a, constant)) is not None:
        return _of_factor(low, a, found, shape)
    a = low.force(a)
    weight = low.value(constant)
    inner, columns = weight.shape
    flat = a.viewed((dims.product(a.shape[:-1]), inner))
    lead = shape[:-1] if a.rank > 1 else ()

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        assert isinstance(code, GpuCode)
        outer = kernel.shape(lead)

        def put(code: Code, index: Index, value: Expr) -> None:
            store(code, [*(code.bind(i) for i in unflatten(index[0], outer)), index[1]], value)

        return blocks.product(
            code,
            [],
            (kernel.size(flat.shape[0]), kernel.size(inner), kernel.size(columns)),
            storage.computed(dtype),
            lambda _, row, k: flat.at(code, [row, k]),
            lambda _, k, column: weight.at(code, [k, column]),
            put,
        )

    return Pending(dtype, shape, build)


def of_quantized(low: Lowering, a: Ready | Normed, value: ir.Value, shape: Shape) -> Pending | None:
    """``a`` [..., K] times a constant [K, N] of 8 or 4 bits that stays so; None where no kernel takes it.

    ``value`` is what a DequantizeLinear makes of it, in the type of ``a``.
    """
    found = factors.factor(a, value)
    return None if found is None else _of_factor(low, a, found, shape)


def _of_factor(low: Lowering, a: Ready | Normed, found: Factor, shape: Shape) -> Pending:
    """A product that may become one kernel with another of the same left operand, column by column."""

    def paired(other: Joinable) -> Pending | None:
        second = other.operands
        assert isinstance(second, tuple)
        if second[0] is not a or second[1].kind != found.kind or second[1].columns != found.columns:
            return None
        weight = factors.weight(low, [found, second[1]], in_turn=True)
        return on_tensor_cores(low, a, found, shape, weight, 2)

    alone = on_tensor_cores(low, a, found, shape, factors.weight(low, [found]))
    return Joinable(a.dtype, shape, alone.build, operands=(a, found), paired=paired)


def left(op: Op) -> Ready | Normed:
    """The left operand in memory, unless products that read it normalize it."""
    value = op.value(0)
    return value if isinstance(value, Normed) else op.ready(0)


def beside(op: Op) -> Value | None:
    """The product that ``op`` is, by one kernel with all others of its left operand; None if it has none.

    They are those whose results are moved next, so that each is in memory: nothing could be appended to it.
    """
    low = op.low
    given = op.node.inputs[0]
    assert given is not None
    read = op.value(0)
    members: list[tuple[ir.Node, Factor]] = []
    for node, index in given.uses():
        if (
            node.op_type == "MatMul"
            and index == 0
            and node.graph is op.node.graph
            and node.outputs[0] not in low.values  # it is made, by another kernel
            and _is_moved(node)
        ):
            value = node.inputs[1]
            found = None if value is None else factors.factor(read, value)
            if found is not None:
                members.append((node, found))
    kind = next((found.kind for node, found in members if node is op.node), None)
    members = [(node, found) for node, found in members if found.kind == kind]
    if kind is None or len(members) < 2:
        return None
    a = left(op)
    ends = list(itertools.accumulate(found.columns for _, found in members))
    weight = factors.weight(low, [found for _, found in members])
    whole = Factor(kind, ends[-1], members[0][1].values)
    lead = op.shape()[:-1]
    made = on_tensor_cores(low, a, whole, (*lead, ends[-1]), weight, scattered=True)
    kernel = Kernel(low)
    shapes = [(*lead, found.columns) for _, found in members]
    stores = [
        general.into(kernel.write(a.dtype, shape), a.dtype, kernel.shape(shape)) for shape in shapes
    ]

    def store(code: Code, index: Index, value: Expr) -> None:
        """To the tensor that the column belongs to."""
        *row, column = index
        first = i64(0)
        for end, into in zip(ends, stores, strict=True):
            with code.when(tirx.And(column >= first, column < i64(end))):
                into(code, [*row, column - first], value)
            first = i64(end)

    results = kernel.finish(made.build(kernel, store))
    for (node, _), result in zip(members, results, strict=True):
        low.made[node] = [result]
    return low.made.pop(op.node)[0]


def inside(op: Op, x: Value, gain: Value, epsilon: float, made: Pending) -> Normed | None:
    """The RMSNormalization ``op``, which is ``made``, done by the product behind it; None if it may not.

    It may where what reads it is one kernel of few rows: a single product with a constant; two with as many
    columns, as a gate and its partner have, which would both do it if they did not meet after all; or those
    that lie side by side (see :func:`beside`).
    """
    low, output = op.low, op.node.outputs[0]
    machine = low.machine
    assert isinstance(machine, Gpu)
    if not isinstance(x, Ready) or not isinstance(gain, Ready) or not low.is_constant(gain):
        return None
    if gain.dtype != x.dtype or gain.shape != x.shape[-1:] or output.is_graph_output():
        return None
    products = [node for node, index in output.uses() if node.op_type == "MatMul" and index == 0]
    values = [node.inputs[1] for node in products if node.graph is op.node.graph]
    found = [factors.factor(x, value) for value in values if value is not None]
    if not found or len(found) != len(output.uses()):
        return None
    first, *others = found
    if first is None or any(other is None or other.kind != first.kind for other in others):
        return None
    gate = len(found) == 2 and len({each.columns for each in found if each is not None}) == 1
    if len(found) > 1 and not gate and not all(map(_is_moved, products)):
        return None
    kind = first.kind
    plain = few.Weight(None, kind.bits, None, kind.zeros or None, kind.block, kind.plain)
    if not few.shapes_that_hold(machine.has_wgmma, plain, kind.inner, first.columns, normed=True):
        return None
    return Normed(made.dtype, made.shape, made.build, x=x, gain=gain, epsilon=epsilon)


# What reads a product from memory, whatever computed it.
_MOVES = {"Reshape", "Transpose", "Attention", "RotaryEmbedding"}


def _is_moved(node: ir.Node) -> bool:
    output = node.outputs[0]
    readers = [reader.op_type for reader, _ in output.uses()]
    return bool(readers) and _MOVES.issuperset(readers) and not output.is_graph_output()


def on_tensor_cores(
    low: Lowering,
    a: Ready | Normed,
    found: Factor,
    shape: Shape,
    made: Callable[[Kernel], few.Weight],
    together: int = 1,
    scattered: bool = False,
) -> Pending:
    """``a`` [..., inner] times a weight [columns, inner], by the kernel that fits the rows there are.

    ``together`` neighbouring columns of the weight are one of the result: all their sums go to the store.
    Where neighbouring results may go to different tensors, they are ``scattered``: stored one by one.
    With more rows than a kernel normalizes itself, the norm is a launch of its own in front.
    """
    half, inner, columns = found.kind.half, found.kind.inner, together * found.columns
    given = a.x if isinstance(a, Normed) else a
    flat = given.viewed((dims.product(a.shape[:-1]), inner))
    lead = shape[:-1] if a.rank > 1 else ()

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        machine = low.machine
        assert isinstance(code, GpuCode) and isinstance(machine, Gpu)
        outer = kernel.shape(lead)
        rows = kernel.size(flat.shape[0])
        read, weight = kernel.read(flat), made(kernel)

        def finish(row: Expr, column: Expr, *values: Expr) -> None:
            index = [*(code.bind(i) for i in unflatten(row, outer)), column]
            store(code, index, *values)

        how = (weight, (rows, inner, columns), finish, together)

        def plain(operand: Any) -> None:
            fewer = few.kernels(code, half, operand, *how)

            def many() -> None:
                values = weight.values
                if weight.bits != 16:
                    beyond = fewer[-1][0]
                    values = few.expanded(code, half, weight, (rows, inner, columns), beyond)
                sizes = (rows, i64(inner), i64(columns))
                if machine.has_wgmma:
                    constant = weight.bits == 16
                    rest = (finish, together, constant, scattered)
                    tensor.warpgroups(code, half, operand, values, sizes, *rest)
                else:
                    tensor.warps(code, half, operand, values, sizes, finish, together)

            few.by_rows(code, rows, fewer, few.many(code, half, operand, *how) or many)

        if isinstance(a, Normed):
            normed = a
            norm = few.Norm(kernel.read(normed.gain), normed.epsilon)

            def apart() -> None:
                made = kernel.workspace(rows * i64(inner), storage.STORED[normed.dtype])
                into = general.into(made, normed.dtype, kernel.shape(normed.shape))
                normed.build(kernel, into)
                plain(made)

        else:
            norm, apart = None, lambda: plain(read)
        those = few.kernels_that_hold(code, half, read, *how, norm)
        few.by_rows(code, rows, those, apart)
        return "gemm.warpgroups" if machine.has_wgmma else "gemm.warps"

    return Pending(a.dtype, shape, build)


def convolution(
    x: Value,
    weight: Value,
    strides: Sequence[int],
    dilations: Sequence[int],
    begins: Sequence[int],
    groups: int,
    dtype: D,
    shape: Shape,
) -> Pending:
    """A convolution over any number of dims as a product that gathers its left operand as it goes.

    ``x`` [b, groups * inputs, ...], ``weight`` [groups * outputs, inputs, *taps], and the result is
    [b, groups * outputs, ...].
    """
    count, inputs, *taps = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    outputs = count // groups
    computed = storage.computed(dtype)

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        assert isinstance(code, GpuCode)
        sizes, out = kernel.shape(x.shape), kernel.shape(shape)
        places = [out[0], *out[2:]]

        def gathered(where: Index, row: Expr, k: Expr) -> Expr:
            b, *position = (code.bind(i) for i in unflatten(row, places))
            channel, *tap = (code.bind(i) for i in unflatten(k, [i64(inputs), *map(i64, taps)]))
            inside = const(True, "bool")
            at = []
            for axis, size in enumerate(sizes[2:]):
                here = position[axis] * i64(strides[axis]) + tap[axis] * i64(dilations[axis])
                here = code.bind(here - i64(begins[axis]))
                inside = tirx.And(inside, tirx.And(here >= i64(0), here < size))
                at.append(tirx.max(tirx.min(here, size - i64(1)), i64(0)))
            item = x.at(code, [b, where[0] * i64(inputs) + channel, *at])
            return select(inside, cast(item, computed), const(0, computed))

        def factor(where: Index, k: Expr, column: Expr) -> Expr:
            index = unflatten(k, [i64(inputs), *map(i64, taps)])
            return cast(weight.at(code, [where[0] * i64(outputs) + column, *index]), computed)

        def put(code: Code, index: Index, value: Expr) -> None:
            group, row, column = index
            b, *position = (code.bind(i) for i in unflatten(row, places))
            store(code, [b, group * i64(outputs) + column, *position], value)

        sizes_ = (total(places), i64(inputs * prod(taps)), i64(outputs))
        return blocks.product(code, [i64(groups)], sizes_, computed, gathered, factor, put)

    return Pending(dtype, shape, build)
