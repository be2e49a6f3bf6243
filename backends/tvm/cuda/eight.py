"""Products of 8-bit activations with constant weights of 8 bits: integers, and floats from sm_89 on.

    sum (x - z) w = sum x w - z sum w        integers, in int32
    sum x w                                  floats, in float32

The kernels are those of :mod:`netlathe.backends.tvm.cuda.tensor`, whatever number of rows there is. A
DequantizeLinear on either side becomes a factor of the sum. Weights lie as [columns, K]: on tensor cores
what is summed over lies together in both operands.
"""

from __future__ import annotations

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import packing as constants
from netlathe.backends.tvm.cuda import factors, few, packing, products, tensor
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.cuda.operands import HALVES, Operands, of_types
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops.op import Op, combine
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    Code,
    Expr,
    Index,
    cast,
    const,
    dtype_of,
    i64,
    select,
    unflatten,
)
from netlathe.backends.tvm.values import Lazy, Normed, Pending, Ready, Scalar, Store, Value
from netlathe.ir import dims, weights
from netlathe.ir.dims import Shape

D = ir.DataType


def _kind(low: Lowering, x: D, weight: ir.Value) -> Operands | None:
    """The operands of a product by ``weight``, if it is a constant matrix that tensor cores take."""
    kind, machine = of_types(x, weight.dtype), low.machine
    if kind is None or kind.bytes != 1 or len(weight.shape or ()) != 2:
        return None
    assert isinstance(machine, Gpu)
    fits = weights.is_weight(weight) and (machine.has_float8 or not kind.is_float8)
    return kind if fits else None


def _sums(low: Lowering, x: Value, weight: ir.Value, kind: Operands, shape: Shape) -> Pending:
    """sum x w, in int32 or float32."""
    assert weight.name is not None and weight.shape is not None and weight.dtype is not None
    columns = int(weight.shape.numpy()[1])
    a = _whole_rows(low, x)
    depth = a.shape[-1]
    assert isinstance(depth, int)
    recipe = Recipe(packing.transposed, (weight.name,), (depth,))
    held = low.parameter(weight.name, weight.dtype, (columns, depth), recipe, (weight, "columns"))
    dtype = D.INT32 if kind.sums == "int32" else D.FLOAT
    flat = a.viewed((dims.product(a.shape[:-1]), depth))
    lead = shape[:-1] if a.rank > 1 else ()

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        assert isinstance(code, GpuCode)
        outer = kernel.shape(lead)

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            store(code, [*(code.bind(i) for i in unflatten(row, outer)), column], value)

        operands = kernel.read(flat), kernel.read(held)
        sizes = (kernel.size(flat.shape[0]), i64(depth), i64(columns))
        if code.has_wgmma:
            tensor.warpgroups(code, kind.name, *operands, sizes, finish)
            return "gemm.warpgroups"
        tensor.warps(code, kind.name, *operands, sizes, finish)
        return "gemm.warps"

    return Pending(dtype, shape, build)


def _whole_rows(low: Lowering, x: Value) -> Ready:
    """``x`` [..., K] in memory, with zeros behind its rows up to whole pieces of 16 bytes, as copies need."""
    inner = x.shape[-1]
    assert isinstance(inner, int)  # the sizes of constants are known
    padded = -(-inner // 16) * 16
    if padded == inner:
        return low.force(x)
    source = low.operand(x)

    def element(code: Code, at: Index) -> Expr:
        value = source.at(code, [*at[:-1], tirx.min(at[-1], i64(inner - 1))])
        return select(at[-1] < i64(inner), value, const(0, dtype_of(value)))

    return low.force(Lazy(x.dtype, (*x.shape[:-1], padded), element, cost=2))


def by_integers(
    low: Lowering, x: Value, zero: Value | None, weight: ir.Value, shape: Shape
) -> Value | None:
    """sum (x - zero) w in int32, of bytes ``x`` [..., K] and a constant [K, N] of signed ones around zero."""
    kind = _kind(low, x.dtype, weight)
    if kind is None or kind.sums != "int32" or x.rank < 2 or (zero and not zero.is_one):
        return None
    made = _sums(low, x, weight, kind, shape)
    factor = int(zero.value) if isinstance(zero, Scalar) else 1
    if zero is None or factor == 0:
        return made
    assert weight.name is not None and weight.shape is not None
    columns = int(weight.shape.numpy()[1])
    recipe = Recipe(constants.dot_sums, (weight.name,), (0, factor))
    sums = low.parameter(weight.name, D.INT32, (columns,), recipe, (weight, "sums", factor))
    moved: list[Value] = [] if isinstance(zero, Scalar) else [zero]

    def subtract(_: Code, sum_: Expr, all_: Expr, *by: Expr) -> Expr:
        return sum_ - (all_ * cast(by[0], "int32") if by else all_)

    return combine(low, subtract, [made, sums, *moved], D.INT32, shape)


def of_pair(op: Op) -> Value | None:
    """A MatMul of an activation and a constant, both dequantized from 8 bits; None where that is for others.

    The activation has one scale, or one for each row; the constant one, or one for each column.
    """
    low, shape = op.low, op.shape()
    x, w = (dequantized(value) for value in op.node.inputs)
    if x is None or w is None:
        return None
    assert x.inputs[0] is not None and w.inputs[0] is not None and x.inputs[0].dtype is not None
    kind = _kind(low, x.inputs[0].dtype, w.inputs[0])
    if kind is None or not _has_row_scales(x) or not _has_column_scales(w) or _zero(w) is not None:
        return None
    zero, data = _zero(x), low.value(x.inputs[0])
    if kind.is_float8:
        made: Value | None = (
            None if zero is not None else _sums(low, data, w.inputs[0], kind, shape)
        )
    else:
        held = None if zero is None else low.operand(low.value(zero))
        made = by_integers(low, data, held, w.inputs[0], shape)
    if made is None:
        return None
    scales = [low.operand(low.value(node.inputs[1])) for node in (x, w) if node.inputs[1]]

    def scaled(_: Code, sum_: Expr, a: Expr, b: Expr) -> Expr:
        return cast(sum_, "float32") * (a * b)

    return combine(low, scaled, [made, *scales], op.dtype(), shape)


def of_weight(low: Lowering, a: Ready | Normed, value: ir.Value, shape: Shape) -> Pending | None:
    """``a`` [..., K], halves, times a constant [K, N] dequantized from 8-bit floats; None where it is none.

    It has one scale, or one for each column, and is dequantized when it is packed: then it takes 16 bits.
    """
    node, half, inner = dequantized(value), HALVES.get(a.dtype), a.shape[-1]
    if node is None or half is None or value.dtype != a.dtype or not isinstance(inner, int):
        return None
    data, scale = node.inputs[:2]
    assert data is not None
    of_floats = data.dtype in (D.FLOAT8E4M3FN, D.FLOAT8E5M2) and len(data.shape or ()) == 2
    if not of_floats or inner % 8 or not _has_column_scales(node) or _zero(node) is not None:
        return None
    if scale is None or not weights.is_weight(data) or not weights.is_weight(scale):
        return None
    assert data.name is not None and scale.name is not None and data.shape is not None
    columns = int(data.shape.numpy()[1])
    recipe = Recipe(packing.dequantized, (data.name, scale.name))
    held = low.parameter(data.name, a.dtype, (columns, inner), recipe, (data, scale, "dequantized"))
    found = factors.Factor(factors.Kind(half, inner, a.dtype), columns, data)
    return products.on_tensor_cores(
        low, a, found, shape, lambda kernel: few.Weight(kernel.read(held))
    )


def dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes ``value``."""
    node = value.producer() if value is not None else None
    fits = node is not None and node.op_type == "DequantizeLinear" and not node.domain
    return node if fits and node is not None and node.inputs[0] is not None else None


def _zero(node: ir.Node) -> ir.Value | None:
    """The zero point of a DequantizeLinear, unless it is known to be zero."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = zero.const_value if zero is not None and weights.is_weight(zero) else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return zero
    return zero if constants.array(tensor).any() else None


def _has_row_scales(node: ir.Node) -> bool:
    """Whether an activation has one scale, or a block of its own for each row."""
    data, scale = node.inputs[:2]
    assert data is not None and scale is not None
    if data.shape is None or scale.shape is None or len(data.shape) < 2:
        return False
    if all(dim == 1 for dim in scale.shape):
        return True
    axis, block = _blocks(node, len(data.shape))
    whole = axis == len(data.shape) - 1 and block == data.shape[-1]
    return whole and len(scale.shape) == len(data.shape)


def _has_column_scales(node: ir.Node) -> bool:
    """Whether a matrix has one scale, or one for each column."""
    scale, (axis, block) = node.inputs[1], _blocks(node, 2)
    if scale is None or scale.shape is None or block:
        return False
    return all(dim == 1 for dim in scale.shape) or (len(scale.shape) == 1 and axis == 1)


def _blocks(node: ir.Node, rank: int) -> tuple[int, int]:
    """The axis of a DequantizeLinear, and how many elements along it share a scale; 0: no blocks."""
    axis, block = (node.attributes.get_int(name, n) for name, n in (("axis", 1), ("block_size", 0)))
    assert axis is not None and block is not None
    return axis % rank, block
