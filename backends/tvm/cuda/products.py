"""Products and convolutions on a GPU: which kernel takes which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.cuda import grids, hopper, packing, skinny, tensor
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    Code,
    Expr,
    Index,
    cast,
    const,
    i64,
    known,
    select,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Pending, Ready, Store, Value
from netlathe.ir import dims, weights
from netlathe.ir.dims import Shape

D = ir.DataType


def of_values(kernel: Kernel, a: Value, b: Value, batch: Sequence[Expr], store: Store) -> str:
    """store([*batch, row, column], product).

    ``a`` is [*batch, rows, inner], ``b`` [*batch, inner, columns].
    """
    code = kernel.code
    assert isinstance(code, GpuCode)
    sizes = (kernel.size(a.shape[-2]), kernel.size(a.shape[-1]), kernel.size(b.shape[-1]))
    return grids.product(
        kernel,
        code,
        batch,
        sizes,
        storage.computed(a.dtype),
        lambda where, row, k: a.at(code, [*where, row, k]),
        lambda where, k, column: b.at(code, [*where, k, column]),
        store,
    )


def of_constant(low: Lowering, a: Ready, constant: ir.Value, dtype: D, shape: Shape) -> Pending:
    """``a`` [..., K] times a constant [K, N]."""
    if (half := _half(a, constant.dtype)) is not None:
        return _of_half(low, a, constant, half, shape)
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

        return grids.product(
            kernel,
            code,
            [],
            (kernel.size(flat.shape[0]), kernel.size(inner), kernel.size(columns)),
            storage.computed(dtype),
            lambda _, row, k: flat.at(code, [row, k]),
            lambda _, k, column: weight.at(code, [k, column]),
            put,
        )

    return Pending(dtype, shape, build)


def _half(a: Ready, dtype: D | None) -> str | None:
    """The tensor cores' name for the type of both operands, where rows are whole pieces of 16 bytes."""
    inner = a.shape[-1]
    fits = a.dtype == dtype and isinstance(inner, int) and inner % 8 == 0
    return {D.BFLOAT16: "bf16", D.FLOAT16: "f16"}.get(a.dtype) if fits else None


def _of_half(low: Lowering, a: Ready, constant: ir.Value, half: str, shape: Shape) -> Pending:
    """Both operands of one half type."""
    columns, inner = int(shape[-1]), int(a.shape[-1])  # type: ignore[arg-type]
    assert constant.name is not None
    recipe = Recipe(packing.transposed, (constant.name,))
    key = (constant, "transposed")
    weight = low.parameter(constant.name, a.dtype, (columns, inner), recipe, key)
    return _on_tensor_cores(low, a, half, shape, lambda kernel: tensor.Weight(kernel.read(weight)))


def of_quantized(low: Lowering, a: Ready, value: ir.Value, shape: Shape) -> Pending | None:
    """``a`` [..., K] times a constant [K, N] of 8 or 4 bits that stays so; None where no kernel takes it.

    ``value`` is what a DequantizeLinear makes of it, in the type of ``a``: with a scale for each column, for
    all of them, or for every so many rows of K in a column; zero points where there are 4 bits.
    """
    node, half = value.producer(), _half(a, value.dtype)
    if half is None or node is None or node.op_type != "DequantizeLinear":
        return None
    data, scale, zero = (*node.inputs, None)[:3]
    if data is None or scale is None or not all(weights.is_weight(v) for v in node.inputs if v):
        return None
    bits = {D.INT8: 8, D.INT4: 4, D.UINT4: 4}.get(data.dtype or D.UNDEFINED)
    if bits is None or (bits == 8 and zero is not None) or len(data.shape or ()) != 2:
        return None
    columns, inner = int(shape[-1]), int(a.shape[-1])  # type: ignore[arg-type]
    block = node.attributes.get_int("block_size", 0) or 0
    axis = (node.attributes.get_int("axis", 1) or 0) % 2
    if block and (axis or block % skinny.chunk(bits) or inner % block):
        return None
    single = tuple(scale.shape or ()) in ((), (1,))
    if not block and axis == 0 and not single:
        return None
    blocks = inner // block if block else 1
    padded = -(-inner // skinny.chunk(bits)) * skinny.chunk(bits)
    names = [v.name or "" for v in (data, scale, zero) if v is not None]
    values = low.parameter(
        names[0],
        D.INT8,
        (packing.padded(columns), padded * bits // 8),
        Recipe(packing.quantized, (names[0],), (bits,)),
        (data, "skinny"),
    )
    scales = low.parameter(
        names[1],
        a.dtype,
        (blocks, packing.padded(columns)),
        Recipe(packing.group_values, (names[1],), (blocks, columns)),
        (scale, "by group", blocks),
    )
    plain = 8 if data.dtype == D.INT4 else 0
    zeros: Ready | None = None
    if zero is not None:
        base = 0x4300 if half == "bf16" else 0x6400
        zeros = low.parameter(
            names[2],
            D.UINT16,
            (blocks, packing.padded(columns)),
            Recipe(packing.group_zeros, (names[2],), (blocks, columns, plain, base)),
            (zero, "by group", blocks),
        )

    def made(kernel: Kernel) -> tensor.Weight:
        read = None if zeros is None else kernel.read(zeros)
        return tensor.Weight(kernel.read(values), bits, kernel.read(scales), read, block, plain)

    return _on_tensor_cores(low, a, half, shape, made)


def _on_tensor_cores(
    low: Lowering, a: Ready, half: str, shape: Shape, made: Callable[[Kernel], tensor.Weight]
) -> Pending:
    """``a`` [..., inner] times a weight [columns, inner], by the kernel that fits the rows there are."""
    columns, inner = int(shape[-1]), int(a.shape[-1])  # type: ignore[arg-type]
    flat = a.viewed((dims.product(a.shape[:-1]), inner))
    lead = shape[:-1] if a.rank > 1 else ()

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        machine = low.machine
        assert isinstance(code, GpuCode) and isinstance(machine, Gpu)
        outer = kernel.shape(lead)
        rows = kernel.size(flat.shape[0])
        read, weight = kernel.read(flat), made(kernel)

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            store(code, [*(code.bind(i) for i in unflatten(row, outer)), column], value)

        def few(tiles: int) -> None:
            sizes = (rows, inner, columns)
            tensor.few_rows(code, half, read, weight, sizes, tiles, finish)

        def many() -> None:
            values = weight.values
            if weight.bits != 16:
                values = tensor.expanded(code, half, weight, inner, columns)
            sizes = (rows, i64(inner), i64(columns))
            if machine.has_wgmma:
                tensor.warpgroups(code, hopper.Shape(), half, read, values, sizes, finish)
            else:
                tensor.warps(code, half, read, values, sizes, finish)

        number = known(rows)
        if number is not None:
            few(1) if number <= 8 else few(2) if number <= skinny.MOST_ROWS else many()
        else:
            most = i64(skinny.MOST_ROWS)
            more = lambda: code.branch(rows <= most, lambda: few(2), many)  # noqa: E731
            code.branch(rows <= i64(8), lambda: few(1), more)
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
        return grids.product(kernel, code, [i64(groups)], sizes_, computed, gathered, factor, put)

    return Pending(dtype, shape, build)
