"""Products of 8-bit activations with constant signed bytes, four at a time where the CPU can.

    sum (x - zero) w = sum x_u w - zero_u sum w         x_u = x, or x + 128 where x is signed

as the instruction multiplies unsigned bytes with signed ones. Signed activations are stored as x + 128
from the start, and whoever reads them otherwise takes the 128 off again. Depthwise convolutions have no
sums over channels; they are done in float32, in which these are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from netlathe.backends.tvm import packing
from netlathe.backends.tvm.arm import conv as arm
from netlathe.backends.tvm.arm import products
from netlathe.backends.tvm.cuda import eight
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import conv, gemm, tile
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops.norm import channel
from netlathe.backends.tvm.ops.op import D, Op, channels_last, combine
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import Code, Expr, Index, cast, const, total, unflatten
from netlathe.backends.tvm.values import (
    ChannelsLast,
    Lazy,
    Pending,
    Ready,
    Scalar,
    Store,
    Value,
    to_last,
)
from netlathe.ir import dims, weights
from netlathe.ir.dims import Shape

_BYTES = (D.INT8, D.UINT8)


@dataclass(frozen=True)
class Pair:
    """A DequantizeLinear: 8-bit numbers, their scale, and their zero point."""

    data: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    axis: int


def pair(value: ir.Value | None) -> Pair | None:
    """The DequantizeLinear of bytes, not by block, that makes ``value``."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain:
        return None
    data, scale, *rest = node.inputs
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)
    if data is None or scale is None or data.dtype not in _BYTES or value is None:
        return None
    if value.dtype != D.FLOAT or block:
        return None
    return Pair(data, scale, rest[0] if rest else None, axis or 0)


def is_signed_weight(value: ir.Value | None, zero: ir.Value | None) -> bool:
    """Whether ``value`` is constant signed bytes around zero."""
    if value is None or value.dtype != D.INT8 or not weights.is_weight(value):
        return False
    if zero is None:
        return True
    tensor = zero.const_value
    if tensor is None or not weights.is_weight(zero) or isinstance(tensor, ir.ExternalTensor):
        return False
    return not tensor.numpy().any()


def unsigned(low: Lowering, value: Value) -> Value:
    """``value``, 8-bit numbers, as unsigned ones in memory."""
    if value not in low.shifted:
        low.shifted[value] = in_memory(low, shifted(low, value))
    return low.shifted[value]


def in_memory(low: Lowering, value: Value) -> Value:
    """``value`` as it lies or will lie there, channels last or not."""
    if isinstance(value, ChannelsLast):
        value.last = low.force(value.last)
        return value
    return low.force(value)


def stored(low: Lowering, value: Value) -> Value:
    """An activation that is dequantized, in memory; bytes as the products want them."""
    if value.dtype != D.INT8 or not low.machine.dot_bytes:
        return in_memory(low, value)
    return unshifted(low, unsigned(low, value), value)


def shifted(low: Lowering, value: Value) -> Value:
    """``value`` as it is to lie in memory: signed bytes by 128 above, for products of unsigned ones."""
    if value.dtype != D.INT8 or not low.machine.dot_bytes:
        return value
    return combine(low, lambda code, x: _moved(x, 128, "uint8"), [value], D.UINT8, value.shape)


def unshifted(low: Lowering, held: Value, value: Value) -> Value:
    """``value``, of which :func:`shifted` lies in memory as ``held``."""
    if held.dtype == value.dtype:
        return held
    made = combine(low, lambda code, x: _moved(x, -128, "int8"), [held], value.dtype, value.shape)
    inner = made.last if isinstance(made, ChannelsLast) else made
    if isinstance(inner, Lazy):
        inner.cheap = True
    low.shifted[made] = held
    return made


def _moved(x: Expr, by: int, dtype: str) -> Expr:
    return cast(cast(x, "int32") + const(by, "int32"), dtype)


def _zero(value: Value, zero: Value | None, moved: bool = True) -> Callable[[Code], Expr]:
    """The zero point, in int32: of the unsigned numbers if ``moved``."""
    shift = 128 if moved and value.dtype == D.INT8 else 0

    def element(code: Code) -> Expr:
        if zero is None:
            return const(shift, "int32")
        if isinstance(zero, Scalar):
            return const(int(zero.value) + shift, "int32")
        return cast(zero.at(code, [const(0, "int64")] * zero.rank), "int32") + const(shift, "int32")

    return element


def _without_zero(
    low: Lowering, made: Value, value: Value, zero: Value | None, weight: ir.Value, groups: int
) -> Value:
    """The sums over x - zero, from those over x; ``made`` has the weight's columns as channels, or last."""
    known = zero is None or isinstance(zero, Scalar)
    offset = _zero(value, zero)
    factor = (128 if value.dtype == D.INT8 else 0) + int(getattr(zero, "value", 0)) if known else 1
    if factor == 0:
        return made
    assert weight.name is not None  # the IR has no constant without one
    columns = made.shape[1] if groups else made.shape[-1]
    assert isinstance(columns, int)
    recipe = Recipe(packing.dot_sums, (weight.name,), (groups, factor))
    sums: Value = low.parameter(
        weight.name, D.INT32, (columns,), recipe, (weight, "sums", groups, factor)
    )
    if groups:
        sums = channel(sums, 4)

    def subtract(code: Code, x: Expr, s: Expr) -> Expr:
        return x - s if known else x - s * offset(code)

    return combine(low, subtract, [made, sums], D.INT32, made.shape)


# -- matrix products ----------------------------------------------------------------------------------


def product(
    low: Lowering, x: Value, zero: Value | None, weight: ir.Value, shape: Shape
) -> Value | None:
    """sum (x - zero) w in int32 of ``x`` [..., K] and a constant [K, N]; None where that is for others."""
    sizes = tuple(weight.shape.numpy()) if weight.shape is not None else ()
    if isinstance(low.machine, Gpu):
        return eight.by_integers(low, x, zero, weight, shape)
    if len(sizes) == 2 and (made := products.by_integers(low, x, zero, weight, shape)) is not None:
        return made
    if not low.machine.dot_bytes or len(sizes) != 2 or sizes[0] % 4 or x.rank < 2:
        return None
    if x.dtype not in _BYTES or (zero is not None and not zero.is_one):
        return None
    inner, columns = sizes
    held = low.force(unsigned(low, x))
    cut = tile.panels(low.machine, columns, "int32")
    packed = _packed(low, weight, 0, 1, inner, cut)
    flat = held.viewed((dims.product(held.shape[:-1]), inner))

    def build(kernel: Kernel, store: Store) -> str:
        return gemm.dots(kernel, flat, packed, cut, kernel.shape(shape[:-1]), inner, store)

    made = Pending(D.INT32, shape, build)
    return _without_zero(low, made, x, zero, weight, 0)


def _packed(
    low: Lowering, weight: ir.Value, groups: int, taps: int, inputs: int, cut: tile.Panels
) -> Ready:
    assert weight.name is not None
    shape = (max(groups, 1), cut.count, taps * inputs // 4, cut.width, 4)
    recipe = Recipe(
        packing.dot_panels, (weight.name,), (groups, taps, inputs, cut.count, cut.width)
    )
    return low.parameter(weight.name, D.INT8, shape, recipe, (weight, "dots", groups, inputs, cut))


def pair_product(op: Op) -> Value | None:
    """A MatMul of a dequantized activation and a dequantized weight, scaled after the sum."""
    x, w = pair(op.node.inputs[0]), pair(op.node.inputs[1])
    if x is None or w is None or not _scales_fit(x, w, 1):
        return None
    low = op.low
    zero = low.operand(low.value(x.zero)) if x.zero is not None else None
    made = product(low, low.value(x.data), zero, w.data, op.shape())
    if made is None:
        return None
    return _scaled(low, made, x.scale, w.scale, -1)


def _scales_fit(x: Pair, w: Pair, axis: int) -> bool:
    """Whether the activation has one scale, and the weight, around zero, one or one per output."""
    rank = len(w.data.shape or ())
    one = x.scale.shape is not None and all(dim == 1 for dim in x.scale.shape.numpy())
    if not one or not is_signed_weight(w.data, w.zero) or w.scale.shape is None:
        return False
    sizes = w.scale.shape.numpy()
    return all(dim == 1 for dim in sizes) or (len(sizes) == 1 and w.axis % rank == axis)


def _scaled(low: Lowering, made: Value, x: ir.Value, w: ir.Value, axis: int) -> Value:
    """The sums times the scales of both, of which the second may have one per element along ``axis``."""
    columns = made.shape[axis]
    assert isinstance(columns, int) and x.name is not None and w.name is not None
    if weights.is_weight(x):
        recipe = Recipe(packing.products, (x.name, w.name), (columns,))
        factors: Value = low.parameter(w.name, D.FLOAT, (columns,), recipe, (x, w, "products"))
        one: Value = Scalar(D.FLOAT, (), 1.0)
    else:
        factors, held = low.operand(low.value(w)), low.operand(low.value(x))
        zeros = [const(0, "int64")] * held.rank
        one = Lazy(D.FLOAT, (), lambda code, at: held.at(code, zeros), cheap=True)
    if axis == 1 and not factors.is_one:
        factors = channel(factors, 4)

    def scale(code: Code, sum_: Expr, a: Expr, b: Expr) -> Expr:
        return cast(sum_, "float32") * (b if isinstance(one, Scalar) else a * b)

    return combine(low, scale, [made, one, factors], D.FLOAT, made.shape)


# -- convolutions -------------------------------------------------------------------------------------


def convolution(
    op: Op, x: Value, zero: Value | None, weight: ir.Value, begins: tuple[int, int]
) -> Value | None:
    """The convolution of ``x`` - ``zero`` with a constant; None where that is for others.

    The sums are int32, or float32 with the same values.
    """
    low, shape = op.low, op.shape()
    sizes = tuple(weight.shape.numpy()) if weight.shape is not None else ()
    geometry = _geometry(op, sizes)
    if geometry is None or x.dtype not in _BYTES or (zero is not None and not zero.is_one):
        return None
    if geometry.is_depthwise and _has_depthwise(low):
        return _depthwise(op, x, zero, weight, geometry, begins)
    pads = op.integers("pads") or (0, 0, 0, 0)
    turned = tuple(to_last(shape))
    last = channels_last(low, x, 4)
    if (on_arm := arm.by_integers(low, last, zero, weight, geometry, pads, turned)) is not None:
        return ChannelsLast(D.INT32, shape, on_arm)
    groups = geometry.groups
    if not low.machine.dot_bytes or (groups > 1 and geometry.inputs % 4):
        return None
    source = low.operand(channels_last(low, unsigned(low, x), 4))
    offset = _zero(x, zero)
    inputs = -(-geometry.inputs // 4) * 4
    plane = dims.product(turned[1:3])
    plain = geometry.taps == 1 and geometry.strides == (1, 1) and not any(pads)
    wide = conv.Geometry(
        groups,
        inputs,
        geometry.outputs,
        geometry.kernel,
        geometry.strides,
        geometry.dilations,
    )
    rows = plane if plain else turned[2]
    number = rows if isinstance(rows, int) else None
    cut = tile.panels(low.machine, geometry.outputs, "int32", number)
    packed = _packed(low, weight, groups, geometry.taps, inputs, cut)
    if any(pads) or inputs != geometry.inputs:
        source = _bordered(low, source, pads, inputs * groups, offset)
    held = low.force(source)

    def build(kernel: Kernel, store: Store) -> str:
        out = kernel.shape(turned)
        if not plain:
            return conv.direct(kernel, held, packed, cut, wide, out, tile.DOTS, store)

        def give(code: Code, at: Index, element: Expr) -> None:
            store(code, [*unflatten(at[0], out[:3]), at[1]], element)

        flat = held.viewed((dims.product(held.shape[:-1]), inputs))
        return gemm.dots(kernel, flat, packed, cut, [total(out[:3])], inputs, give, number or 0)

    made = ChannelsLast(D.INT32, shape, Pending(D.INT32, turned, build))
    return _without_zero(low, made, x, zero, weight, groups)


def _two(values: Sequence[int] | None) -> tuple[int, int]:
    return (values[0], values[1]) if values else (1, 1)


def _bordered(
    low: Lowering, x: Value, pads: Sequence[int], channels: int, border: Callable[[Code], Expr]
) -> Ready:
    """``x`` within a border of its zero point, and so many channels."""
    top, left, bottom, right = pads
    b, h, w, _ = x.shape
    whole = (b, dims.add(h, top + bottom), dims.add(w, left + right), channels)

    def build(kernel: Kernel, store: Store) -> str:
        return conv.padded(
            kernel,
            x,
            (top, left),
            kernel.shape(whole),
            lambda code: cast(border(code), "uint8"),
            store,
        )

    return low.force(Pending(D.UINT8, whole, build))


def _has_depthwise(low: Lowering) -> bool:
    """Whether bytes are convolved as floats one channel at a time: where they are else multiplied as bytes.

    On ARM even where they are not: there too, sums are those of the integers, and scaled after.
    """
    return low.machine.dot_bytes or low.machine.architecture == "aarch64"


def _depthwise(
    op: Op,
    x: Value,
    zero: Value | None,
    weight: ir.Value,
    geometry: conv.Geometry,
    begins: tuple[int, int],
) -> Value:
    low, turned = op.low, tuple(to_last(op.shape()))
    inner = low.machine.dot_bytes  # short vectors: converting each element once takes less
    source = low.force(channels_last(low, unsigned(low, x) if inner else _floats(low, x, zero), 4))
    offset = _zero(x, zero)
    assert weight.name is not None
    taps = low.parameter(
        weight.name,
        D.FLOAT,
        (geometry.taps, geometry.groups),
        Recipe(packing.taps_first_float, (weight.name,)),
        (weight, "taps", "float"),
    )

    def build(kernel: Kernel, store: Store) -> str:
        return conv.depthwise(
            kernel,
            source,
            taps,
            geometry,
            begins,
            kernel.shape(turned),
            "float32",
            store,
            (lambda code: cast(offset(code), "float32")) if inner else None,
        )

    return ChannelsLast(D.FLOAT, op.shape(), Pending(D.FLOAT, turned, build))


def _floats(low: Lowering, x: Value, zero: Value | None) -> Value:
    """``x`` - ``zero`` in float32."""
    offset = _zero(x, zero, moved=False)
    return combine(
        low,
        lambda code, e: cast(cast(e, "int32") - offset(code), "float32"),
        [x],
        D.FLOAT,
        x.shape,
    )


def pair_convolution(op: Op, begins: tuple[int, int] | None) -> Value | None:
    """A Conv of a dequantized activation and a dequantized weight, scaled after the sum, without its bias.

    The weight of a depthwise one may be floats.
    """
    x, w = pair(op.node.inputs[0]), pair(op.node.inputs[1])
    if x is None or begins is None:
        return None
    low = op.low
    zero = low.operand(low.value(x.zero)) if x.zero is not None else None
    if w is None:
        return _depthwise_by_floats(op, x, zero, begins)
    if not _scales_fit(x, w, 0):
        return None
    made = convolution(op, low.value(x.data), zero, w.data, begins)
    if made is None:
        return None
    return _scaled(low, made, x.scale, w.scale, 1)


def _depthwise_by_floats(
    op: Op, x: Pair, zero: Value | None, begins: tuple[int, int]
) -> Value | None:
    """A depthwise Conv of bytes, which no copy in float32 is made of, by constant floats."""
    low, weight = op.low, op.node.inputs[1]
    if weight is None or not weights.is_weight(weight) or weight.dtype != D.FLOAT:
        return None
    one = x.scale.shape is not None and all(dim == 1 for dim in x.scale.shape.numpy())
    geometry = _geometry(op, tuple(weight.shape.numpy()) if weight.shape is not None else ())
    if not one or (zero is not None and not zero.is_one) or not _has_depthwise(low):
        return None
    if geometry is None or not geometry.is_depthwise:
        return None
    made = _depthwise(op, low.value(x.data), zero, weight, geometry, begins)
    scale = low.operand(low.value(x.scale))
    return combine(low, lambda code, a, b: a * b, [made, scale], D.FLOAT, made.shape)


def _geometry(op: Op, sizes: tuple[int, ...]) -> conv.Geometry | None:
    """That of a Conv whose weight has these sizes, if it is over planes."""
    if len(sizes) != 4:
        return None
    groups = op.integer("group", 1)
    return conv.Geometry(
        groups,
        sizes[1],
        sizes[0] // groups,
        (sizes[2], sizes[3]),
        _two(op.integers("strides")),
        _two(op.integers("dilations")),
    )
