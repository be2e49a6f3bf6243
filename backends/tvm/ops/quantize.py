"""Quantization: scales and zero points per tensor, per axis or per block, and integer products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import packing, storage
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.ops import dots
from netlathe.backends.tvm.ops.contraction import product
from netlathe.backends.tvm.ops.elementwise import convert, is_float, like
from netlathe.backends.tvm.ops.movement import is_apart
from netlathe.backends.tvm.ops.norm import channel
from netlathe.backends.tvm.ops.op import D, Op, Rule, combine, is_cheap
from netlathe.backends.tvm.ops.reduction import reduced
from netlathe.backends.tvm.ops.window import biased, convolved, plain_begins
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    Code,
    Expr,
    Index,
    cast,
    const,
    dtype_of,
    i64,
    idiv,
    known,
    select,
)
from netlathe.backends.tvm.values import ChannelsLast, Lazy, Pending, Ready, Value
from netlathe.ir import weights
from netlathe.ir.dims import Shape

_RANGE: Mapping[D, tuple[int, int]] = {
    D.INT8: (-128, 127),
    D.UINT8: (0, 255),
    D.INT16: (-32768, 32767),
    D.UINT16: (0, 65535),
    D.INT4: (-8, 7),
    D.UINT4: (0, 15),
    D.INT2: (-2, 1),
    D.UINT2: (0, 3),
}


@dataclass(frozen=True)
class _Grid:
    """The scale and the zero point of a whole tensor, constants: float32, and integers of a few bits.

    ``held`` has the numbers of :func:`packing.grid` in memory, so that layers which differ in nothing but
    these share a kernel; where it is None they are literals.
    """

    literals: tuple[float, ...]
    zero: int
    held: Ready | None

    def _numbers(self, code: Code) -> list[Expr]:
        if self.held is None:
            return [const(number, "float32") for number in self.literals]
        buffer = code.kernel.read(self.held)
        return [code.early(buffer, place) for place in range(len(self.literals))]

    def offset(self, code: Code) -> Expr:
        """The zero point, in int32; that of what is never negative is a literal: nothing is added."""
        if self.held is None or self.zero == 0:
            return const(self.zero, "int32")
        buffer = code.kernel.read(self.held)
        return tirx.reinterpret("int32", code.early(buffer, len(self.literals)))

    def dequantizing(self, code: Code) -> tuple[Expr, Expr]:
        """Scale, and zero point in int32."""
        return self._numbers(code)[0], self.offset(code)

    def divided(self, code: Code, x: Expr) -> Expr:
        """x / scale, held between what codes stand for, without a division, and as exact.

        P. Markstein, IBM J. Res. Dev. 34 (1990), 111: a quotient by the rounded reciprocal, and one step. It
        is x that is held: what the limits times the scale, rounded, give is nearest to the limits.
        """
        scale, inverse, low, high = self._numbers(code)
        x = code.bind(_between(code, x, low, high))
        quotient = code.bind(x * inverse)
        return quotient + (x - quotient * scale) * inverse


def _grid(op: Op, number: D) -> _Grid | None:
    """That of a QuantizeLinear or DequantizeLinear to or from ``number``; None where there is none."""
    scale, zero = op.node.inputs[1], op.node.inputs[2] if op.has(2) else None
    single = op.integer("precision") in (0, int(D.FLOAT)) and not op.integer("block_size")
    if number not in _RANGE or scale is None or scale.dtype != D.FLOAT or not single:
        return None
    settings = [value for value in (scale, zero) if value is not None]
    if not all(is_literal(value) for value in settings):
        return None
    tensors = [value.const_value for value in settings if value.const_value is not None]
    numbers = packing.grid(*tensors, *_RANGE[number])
    held = None
    if op.low.machine.architecture == "x86_64" and not isinstance(op.low.machine, Gpu):
        names = tuple(value.name or "" for value in settings)
        recipe = Recipe(packing.grid, names, _RANGE[number])
        held = op.low.parameter(
            names[0], D.FLOAT, numbers.shape, recipe, (*settings, number, "grid")
        )
    *literals, zero_bits = numbers
    return _Grid(tuple(map(float, literals)), int(zero_bits.view(np.int32)), held)


def is_literal(value: ir.Value) -> bool:
    """Whether ``value`` is a constant of one element."""
    shape = value.shape.numpy() if value.shape is not None else (0,)
    return weights.is_weight(value) and all(dim == 1 for dim in shape)


def _spread(value: Value, shape: Shape, axis: int, block: int) -> Value:
    """A scale or zero point under the index of the tensor that it belongs to."""
    if value.is_one:
        zeros = [i64(0)] * value.rank
        return Lazy(
            value.dtype, shape, lambda code, at: value.at(code, zeros), flat=True, cheap=True
        )

    def element(code: Code, at: Index) -> Expr:
        if block:
            return value.at(
                code, [idiv(item, block) if a == axis else item for a, item in enumerate(at)]
            )
        return value.at(code, [at[axis]])

    return Lazy(value.dtype, shape, element, cheap=is_cheap(value))


def _integers(x: Expr) -> Expr:
    return x if is_float(x) else cast(x, "int32")


def _dequantize(op: Op) -> Sequence[Value]:
    constant = weights.is_weight(op.node.inputs[0]) if op.node.inputs[0] is not None else False
    if constant and (folded := _constant_vector(op)) is not None:
        return [folded]
    if constant:
        x = op.operand(0)
    elif _goes_on(op):
        if (made := _rounded(op)) is not None:
            return [made]
        x = op.value(0)
    elif is_apart(op.low, op.node.inputs[0]):
        x = op.operand(0)
    else:
        x = dots.stored(op.low, op.value(0))
    axis = op.axis(max(x.rank, 1), 1) if x.rank else 0
    block = op.integer("block_size")
    target = op.dtype()
    wide = storage.computed(target)
    grid = None if constant or target != D.FLOAT else _grid(op, x.dtype)
    operands = [x]
    if grid is None:
        operands.append(_spread(op.operand(1), x.shape, axis, block))
        if op.has(2):
            operands.append(_spread(op.operand(2), x.shape, axis, block))

    def dequantize(code: Code, value: Expr, *settings: Expr) -> Expr:
        held = _integers(value)
        scale, *zero = settings if grid is None else grid.dequantizing(code)
        if zero:
            held = held - _integers(zero[0])
        return cast(held, wide) * cast(scale, wide)

    made = combine(op.low, dequantize, operands, target, x.shape)
    inner = made.last if isinstance(made, ChannelsLast) else made
    if isinstance(inner, Lazy) and (constant or op.operand(1).is_one):
        inner.cheap = True  # it is scaled where it is read, not written out
    return [made]


def _goes_on(op: Op) -> bool:
    """Whether the kernel that makes the integers can do what is done with the floats: a sum, and no other.

    Of two such only the first: a kernel has one end, and the other's numbers are shorter than its floats.
    """
    users = [user for user, _ in op.node.outputs[0].uses()]
    given, result = op.node.inputs[0], op.node.outputs[0]
    alone = given is not None and len(given.uses()) == 1 and not given.is_graph_output()
    added = len(users) == 1 and users[0].op_type == "Add" and not result.is_graph_output()
    if not _is_pending(op.value(0)) or not alone or not added:
        return False
    others = (op.low.values.get(value) for value in users[0].inputs if value is not None)
    return not any(other is not None and _is_pending(other) for other in others)


def _is_pending(value: Value) -> bool:
    return isinstance(value.last if isinstance(value, ChannelsLast) else value, Pending)


def _rounded(op: Op) -> Value | None:
    """What was quantized by constants for this alone, to the nearest of what codes stand for, all in float32.

    The codes themselves are not made: they are between two integers that float32 holds. None where they
    were made in another way.
    """
    node = op.node.inputs[0].producer() if op.node.inputs[0] is not None else None
    if node is None or node.op_type != "QuantizeLinear" or node.domain:
        return None
    made = Op(op.low, node)
    x, target = made.value(0), made.dtype()
    by, back = _grid(made, target), _grid(op, target)
    if by is None or back is None or by.zero != back.zero or {x.dtype, op.dtype()} != {D.FLOAT}:
        return None
    divided, dequantizing = by.divided, back.dequantizing

    def nearest_code(code: Code, value: Expr) -> Expr:
        return _to_integer(divided(code, value)) * dequantizing(code)[0]

    return combine(op.low, nearest_code, [x], D.FLOAT, x.shape)


def _constant_vector(op: Op) -> Value | None:
    """A quantized bias as floats, made when it is packed."""
    data, scale = op.node.inputs[:2]
    if data is None or scale is None or op.has(2) or op.integer("block_size"):
        return None
    shape = tuple(data.shape.numpy()) if data.shape is not None else ()
    if data.dtype != D.INT32 or len(shape) != 1 or op.dtype() != D.FLOAT:
        return None
    if not weights.is_weight(scale) or data.name is None or scale.name is None:
        return None
    recipe = Recipe(packing.dequantized, (data.name, scale.name))
    return op.low.parameter(data.name, D.FLOAT, shape, recipe, (data, scale, "floats"))


def _quantize(op: Op) -> Sequence[Value]:
    x = op.value(0)
    axis = op.axis(max(x.rank, 1), 1) if x.rank else 0
    block = op.integer("block_size")
    scale = op.operand(1)
    target = op.dtype()
    if (grid := _grid(op, target)) is not None:

        def by_grid(code: Code, value: Expr) -> Expr:
            codes = _last_bits(grid.divided(code, cast(value, "float32")))
            return cast(codes + grid.offset(code), storage.computed(target))

        return [combine(op.low, by_grid, [x], target, x.shape)]
    precision = op.integer("precision")
    division = storage.computed(D(precision) if precision else scale.dtype)
    narrow = D(precision) if precision else scale.dtype
    operands = [x, _spread(scale, x.shape, axis, block)]
    if op.has(2):
        operands.append(_spread(op.operand(2), x.shape, axis, block))

    def quantize(code: Code, value: Expr, factor: Expr, *zero: Expr) -> Expr:
        value, factor = cast(value, division), cast(factor, division)
        ratio = value / factor
        if narrow in (D.FLOAT16, D.BFLOAT16):
            ratio = storage.rounded(code, narrow, ratio)
        if target not in _RANGE:
            return convert(code, ratio, scale.dtype, target, bool(op.integer("saturate", 1)))
        offset = _offset(zero[0]) if zero else const(0, "int32")
        moved = known(offset)
        low, high = (
            cast(const(end, "int32") - offset, division)
            if moved is None
            else like(ratio, float(end - moved))
            for end in _RANGE[target]
        )
        if division != "float32":
            found = cast(nearest(code, ratio, low, high), "int32")
        else:
            found = _last_bits(_between(code, ratio, low, high))
        return cast(found + offset, storage.computed(target))

    return [combine(op.low, quantize, operands, target, x.shape)]


# Added and taken off again, it leaves the nearest integer, halves to even, of what is small beside it.
_ROUNDER = {"float32": 1.5 * 2**23, "float64": 1.5 * 2**52}


def nearest(code: Code, x: Expr, low: Expr, high: Expr) -> Expr:
    """``x`` held between two integers, and rounded to the nearest."""
    return _to_integer(_between(code, x, low, high))


def _to_integer(x: Expr) -> Expr:
    rounder = like(x, _ROUNDER[dtype_of(x)])
    return (x + rounder) - rounder


def _offset(zero: Expr) -> Expr:
    """A zero point in int32; a literal stays one."""
    number = known(zero)
    return cast(zero, "int32") if number is None else const(number, "int32")


def _last_bits(x: Expr) -> Expr:
    """An int32 whose last 16 bits are those of ``x``, below 2^22 and rounded to the nearest, halves to even.

    They are the last of the sum with 1.5 * 2^23, whatever the first are.
    """
    return tirx.reinterpret("int32", x + like(x, _ROUNDER["float32"]))


def _between(code: Code, x: Expr, low: Expr, high: Expr) -> Expr:
    x = code.bind(x)
    x = code.bind(select(x < low, low, x))
    return select(x > high, high, x)


def _held(code: Code, x: Expr, low: float, high: float) -> Expr:
    x = code.bind(x)
    return select(x < like(x, low), like(x, low), select(x > like(x, high), like(x, high), x))


def _dynamic_quantize(op: Op) -> Sequence[Value]:
    x = op.ready(0)
    low = op.low
    axes = list(range(x.rank))
    least = low.force(reduced(low, x, axes, "min", False))
    most = low.force(reduced(low, x, axes, "max", False))

    def scale_of(code: Code, a: Expr, b: Expr) -> Expr:
        zero = like(a, 0.0)
        return (select(b > zero, b, zero) - select(a < zero, a, zero)) / like(a, 255.0)

    scale = low.force(combine(low, scale_of, [least, most], D.FLOAT, ()))

    def divisor(s: Expr) -> Expr:
        return select(s == like(s, 0.0), like(s, 1.0), s)

    def zero_of(code: Code, a: Expr, s: Expr) -> Expr:
        bottom = select(a < like(a, 0.0), a, like(a, 0.0))
        held = _held(code, (like(a, 0.0) - bottom) / divisor(s), 0, 255)
        return cast(cast(tirx.nearbyint(held), "int32"), "uint8")

    zero = low.force(combine(low, zero_of, [least, scale], D.UINT8, ()))

    def quantize(code: Code, a: Expr, s: Expr, z: Expr) -> Expr:
        offset = cast(z, "float32")
        ends = (like(a, end) - offset for end in (0, 255))
        return cast(cast(nearest(code, a / divisor(s), *ends) + offset, "int32"), "uint8")

    y = combine(low, quantize, [x, scale, zero], D.UINT8, x.shape)
    return [y, scale, zero]


# -- products ---------------------------------------------------------------------------------------


def _centred(op: Op, index: int, zero_index: int, axis: int) -> Value:
    """x - zero point in int32; the zero point is for all, or along ``axis``."""
    x = op.operand(index)
    operands = [x]
    if zero_index >= 0 and op.has(zero_index):
        zero = op.operand(zero_index)
        if not zero.is_one and zero.rank > 1:
            operands.append(zero)
        else:
            operands.append(_spread(zero, x.shape, axis % max(x.rank, 1), 0))

    def subtract(code: Code, value: Expr, *zero_: Expr) -> Expr:
        held = cast(value, "int32")
        return held - cast(zero_[0], "int32") if zero_ else held

    return op.low.force(combine(op.low, subtract, operands, D.INT32, x.shape))


def _zero(op: Op, index: int) -> Value | None:
    return op.operand(index) if op.has(index) else None


def _signed_weight(op: Op, index: int, zero_index: int) -> ir.Value | None:
    """The constant at ``index``, if it is signed bytes around zero."""
    value = op.node.inputs[index]
    zero = op.node.inputs[zero_index] if op.has(zero_index) else None
    return value if dots.is_signed_weight(value, zero) else None


def _dots(op: Op, x: int, x_zero: int, w: int, w_zero: int, conv: bool) -> Value | None:
    """The sums by dot products of bytes, in int32, where there are such."""
    constant = _signed_weight(op, w, w_zero)
    if constant is None:
        return None
    zero = _zero(op, x_zero)
    if not conv:
        return dots.product(op.low, op.value(x), zero, constant, op.shape())
    begins = plain_begins(op)
    made = dots.convolution(op, op.value(x), zero, constant, begins) if begins else None
    if made is None or made.dtype == D.INT32:
        return made
    return combine(op.low, lambda code, e: cast(e, "int32"), [made], D.INT32, made.shape)


def _matmul_integer(op: Op) -> Sequence[Value]:
    if (made := _dots(op, 0, 2, 1, 3, conv=False)) is not None:
        return [made]
    return [product(op.low, _centred(op, 0, 2, -2), _centred(op, 1, 3, -1), D.INT32)]


def _conv_integer(op: Op) -> Sequence[Value]:
    if (made := _dots(op, 0, 2, 1, 3, conv=True)) is not None:
        return [made]
    x, w = _centred(op, 0, 2, 1), _centred(op, 1, 3, 0)
    return [convolved(op, x, w, None, D.INT32, op.shape())]


def _requantized(op: Op, made: Value, scales: Sequence[Value], zero: Value) -> Value:
    target = op.dtype()
    low, high = _RANGE[target]

    def requantize(code: Code, x: Expr, a: Expr, b: Expr, y: Expr, z: Expr) -> Expr:
        factor = cast(a, "float64") * cast(b, "float64") / cast(y, "float64")
        offset = cast(z, "float64")
        value = cast(x, "float64") * factor
        ends = (like(value, end) - offset for end in (low, high))
        return cast(cast(nearest(code, value, *ends) + offset, "int32"), storage.computed(target))

    return combine(op.low, requantize, [made, *scales, zero], target, made.shape)


def _qlinear_matmul(op: Op) -> Sequence[Value]:
    made = _dots(op, 0, 2, 3, 5, conv=False)
    if made is None:
        made = product(op.low, _centred(op, 0, 2, -2), _centred(op, 3, 5, -1), D.INT32)
    left, right = op.operand(1), op.operand(4)
    scales = [
        left if left.rank > 1 else _spread(left, made.shape, made.rank - 2, 0),
        right if right.rank > 1 else _spread(right, made.shape, made.rank - 1, 0),
        op.operand(6),
    ]
    return [_requantized(op, made, scales, op.operand(7))]


def _qlinear_conv(op: Op) -> Sequence[Value]:
    bias = op.operand(8) if op.has(8) else None
    made = _dots(op, 0, 2, 3, 5, conv=True)
    if made is None:
        x, w = _centred(op, 0, 2, 1), _centred(op, 3, 5, 0)
        made = convolved(op, x, w, bias, D.INT32, op.shape())
    else:
        made = biased(op.low, made, bias)
    weight = op.operand(4)
    if not weight.is_one:
        weight = channel(weight, made.rank)
    return [_requantized(op, made, [op.operand(1), weight, op.operand(6)], op.operand(7))]


ROWS: dict[str, Rule] = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "ConvInteger": _conv_integer,
    "QLinearMatMul": _qlinear_matmul,
    "QLinearConv": _qlinear_conv,
}
