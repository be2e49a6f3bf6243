"""Quantization: scales are per tensor, per axis or blocked, zero points have their scale's shape."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.shapes.contract import product_shape
from netlathe.ir.types import Site, Type

_STALE = "slice the scales and zero points together with the quantized weight"


def _check_scale(s: Site) -> None:
    """Input 1, the scale, fits input 0; input 2, the zero point, has the scale's shape."""
    shape, scale, zero = s.shape(), s.shape(1), s.shape(2)
    if scale is not None and zero is not None:
        # One zero point for one scale may be a scalar or [1].
        if len(zero) != len(scale) and any(
            dims.same(dims.product(x), 1) is False for x in (scale, zero)
        ):
            s.fail("rank", "the zero point needs its scale's shape", *s.show(1, 2), help=_STALE)
        for axis, (own, wanted) in enumerate(zip(zero, scale, strict=False)):
            what = f"axis {axis} of the zero point {s.name(2)} must be the scale's"
            s.equal(own, wanted, "width", what, *s.show(1, 2), help=_STALE)
    if shape is None or scale is None or not scale or dims.product(scale) == 1:
        return  # unknown, or one scale for the whole tensor
    axis, block = s.integer("axis", 1), s.integer("block_size")
    if len(shape) == 1 and not block:
        axis = 0
    axis = s.checked_axis(axis, len(shape))
    if not block:
        s.rank(1, 1)
        what = f"the scale {s.name(1)} needs one element per position of axis {axis} of {s.name(0)}"
        s.equal(shape[axis], scale[0], "width", what, *s.show(0, 1), help=_STALE)
        return
    if block < 0:
        s.fail("attribute", f"block_size={block} is negative")
    s.rank(1, len(shape))
    for position, (own, wanted) in enumerate(zip(scale, shape, strict=True)):
        if position == axis:
            what = (
                f"the scale {s.name(1)} needs one element per block of {block} "
                f"along axis {axis} of {s.name(0)}"
            )
            s.equal(dims.ceil_divide(wanted, block), own, "block", what, *s.show(0, 1), help=_STALE)
        else:
            what = f"axis {position} of the blocked scale {s.name(1)} must be that of {s.name(0)}"
            s.equal(wanted, own, "width", what, *s.show(0, 1), help=_STALE)


def _quantize(s: Site) -> list[Type]:
    _check_scale(s)
    stated = s.data_type("output_dtype")
    zero = s.dtype(2) if s.has(2) else None
    if stated is not None and zero is not None and stated != zero:
        message = f"output_dtype is {stated.name}, the zero point {s.name(2)} {zero.name}"
        s.fail("dtype", message)
    dtype = stated or zero or (None if s.has(2) else ir.DataType.UINT8)
    return [Type(dtype, s.shape())]


def _dequantize(s: Site) -> list[Type]:
    _check_scale(s)
    if s.has(2) and None not in (s.dtype(), s.dtype(2)) and s.dtype() != s.dtype(2):
        s.fail("dtype", f"{s.name(0)} and its zero point {s.name(2)} differ in dtype")
    return [Type(s.data_type("output_dtype") or s.dtype(1), s.shape())]


def _dynamic_quantize(s: Site) -> list[Type]:
    scalar = Type(ir.DataType.FLOAT, ())
    return [Type(ir.DataType.UINT8, s.shape()), scalar, Type(ir.DataType.UINT8, ())]


def _qlinear_matmul(s: Site) -> list[Type]:
    for scale, zero in ((1, 2), (4, 5), (6, 7)):
        a, b = s.shape(scale), s.shape(zero)
        if a is not None and b is not None and len(a) == len(b):
            for own, wanted in zip(b, a, strict=True):
                what = f"the zero point {s.name(zero)} must have its scale's shape"
                s.equal(wanted, own, "width", what, *s.show(scale, zero), help=_STALE)
    rows, columns, scale_a, scale_b = s.shape(0), s.shape(3), s.shape(1), s.shape(4)
    if rows is not None and len(rows) > 1 and scale_a and len(scale_a) == 1 and scale_a != (1,):
        what = f"{s.name(1)} scales the rows of {s.name(0)}"
        s.equal(rows[-2], scale_a[0], "width", what, *s.show(0, 1), help=_STALE)
    if columns is not None and len(columns) > 1 and scale_b and len(scale_b) == 1:
        if scale_b != (1,):
            what = f"{s.name(4)} scales the columns of {s.name(3)}"
            s.equal(columns[-1], scale_b[0], "width", what, *s.show(3, 4), help=_STALE)
    return [Type(s.dtype(7), product_shape(s, 0, 3))]


RULES = {
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantize,
}
