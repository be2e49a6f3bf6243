"""Constant right operands of products of halves: which are taken, and how several lie side by side.

Products that have the left operand in common are one kernel: it reads that operand once, and is one launch.
The columns of their weights lie one weight after the other, where results go to tensors of their own, or in
turn, where one element of each meets in the next operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from netlathe.backends.tvm.cuda import few, packing, skinny
from netlathe.backends.tvm.cuda.operands import HALVES
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.packing import Array, Recipe
from netlathe.backends.tvm.values import Ready, Value
from netlathe.ir import weights

D = ir.DataType
_BASES = {"bf16": 0x4300, "f16": 0x6400}  # halves whose last bits count ones


@dataclass(frozen=True)
class Kind:
    """What weights of one kernel have in common; ``data`` is the type of their elements.

    ``block`` rows of K share a scale, 0: all of a column.
    """

    half: str
    inner: int
    data: D
    block: int = 0
    zeros: bool = False

    @property
    def bits(self) -> int:
        """Of an element in memory."""
        return {D.INT8: 8, D.INT4: 4, D.UINT4: 4}.get(self.data, 16)

    @property
    def plain(self) -> int:
        """What stands for zero where no zero point is given."""
        return 8 if self.data == D.INT4 else 0

    @property
    def padded(self) -> int:
        """What a column has of K in memory, where it is quantized."""
        chunk = skinny.chunk(self.bits)
        return -(-self.inner // chunk) * chunk


@dataclass(frozen=True)
class Factor:
    """A constant [K, ``columns``] of halves, or one of integers with scales and perhaps zero points."""

    kind: Kind
    columns: int
    values: ir.Value
    scales: ir.Value | None = None
    zeros: ir.Value | None = None


def factor(a: Value, value: ir.Value) -> Factor | None:
    """``value`` as a factor [K, N] of ``a`` [..., K]; None where tensor cores do not take both as halves.

    Of what a DequantizeLinear makes, those with a scale for each column, for all of them, or for every so
    many rows of K in a column are taken; with zero points where there are 4 bits.
    """
    inner, half = a.shape[-1], HALVES.get(a.dtype)
    # Rows are whole pieces of 16 bytes.
    if half is None or value.dtype != a.dtype or not isinstance(inner, int) or inner % 8:
        return None
    columns = value.shape[1] if value.shape is not None and len(value.shape) == 2 else None
    if not inner or not isinstance(columns, int) or not columns:
        return None
    if weights.is_weight(value):
        return Factor(Kind(half, inner, a.dtype), columns, value)
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    data, scale, zero = (*node.inputs, None)[:3]
    if data is None or scale is None or not all(weights.is_weight(v) for v in node.inputs if v):
        return None
    if data.dtype is None or data.dtype not in (D.INT8, D.INT4, D.UINT4):
        return None
    if data.dtype == D.INT8 and zero is not None:
        return None
    if scale.dtype != a.dtype:  # output_dtype: what is dequantized has another type
        return None
    block = node.attributes.get_int("block_size", 0) or 0
    axis = (node.attributes.get_int("axis", 1) or 0) % 2
    kind = Kind(half, inner, data.dtype, block, zero is not None)
    if block and (axis or block % skinny.chunk(kind.bits) or inner % block):
        return None
    single = tuple(scale.shape or ()) in ((), (1,))
    return (
        None if not block and axis == 0 and not single else Factor(kind, columns, data, scale, zero)
    )


def weight(
    low: Lowering, factors: Sequence[Factor], in_turn: bool = False
) -> Callable[[Kernel], few.Weight]:
    """Factors of one kind side by side as a kernel reads them; ``in_turn``: column by column of each."""
    kind, half = (
        factors[0].kind,
        next(d for d, name in HALVES.items() if name == factors[0].kind.half),
    )
    counts = tuple(each.columns for each in factors)
    columns = sum(counts)
    blocks = kind.inner // kind.block if kind.block else 1

    def parameter(
        role: str, dtype: D, shape: Sequence[int], function: Callable[..., Array], *numbers: int
    ) -> Ready:
        values: list[ir.Value] = [getattr(each, role) for each in factors]
        names = tuple(value.name or role for value in values)
        joined = function if len(factors) == 1 else packing.Joined(function, counts, in_turn)
        recipe = Recipe(joined, names, numbers)
        return low.parameter(names[0], dtype, shape, recipe, (*values, role, blocks, in_turn))

    if kind.bits == 16:
        held = parameter("values", half, (columns, kind.inner), packing.transposed)
        return lambda kernel: few.Weight(kernel.read(held))
    wide = packing.padded(columns)
    size = (wide, kind.padded * kind.bits // 8)
    values = parameter("values", D.INT8, size, packing.quantized, kind.bits)
    scales = parameter("scales", half, (blocks, wide), packing.group_values, blocks, columns)
    zeros: Ready | None = None
    if kind.zeros:
        numbers = (blocks, columns, kind.plain, _BASES[kind.half])
        zeros = parameter("zeros", D.UINT16, (blocks, wide), packing.group_zeros, *numbers)

    def made(kernel: Kernel) -> few.Weight:
        read = None if zeros is None else kernel.read(zeros)
        held = kernel.read(values)
        return few.Weight(held, kind.bits, kernel.read(scales), read, kind.block, kind.plain)

    return made
