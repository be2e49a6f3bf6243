"""Quantized ops: scales and zero points per tensor, per axis or per block, and integer products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from .cast import cast_to
from .linear import conv
from .row import Row, along, onnx_dtype, row
from .storage import FLOAT8, TORCH_DTYPE

# The range that QuantizeLinear saturates to.
_RANGE = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
}


def _spread(scale: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point shaped to broadcast against ``x``."""
    if scale.dim() == 0 or (scale.numel() == 1 and scale.dim() == 1):
        return scale.reshape(())
    axis %= x.dim()
    if block_size == 0:
        return along(scale, axis, x.dim())
    # The last block may be shorter than the others.
    return scale.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])


def _as_integers(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype in FLOAT8 else x.to(torch.int32)


def dequantize_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """DequantizeLinear: (x - zero point) * scale.

    The difference is exact in int32; the product is taken in float32 for the half types (a 16-bit
    difference may not fit them) and rounded once.
    """
    target = TORCH_DTYPE[ir.DataType(output_dtype)] if output_dtype else x_scale.dtype
    values = _as_integers(x)
    if x_zero_point is not None:
        values = values - _spread(_as_integers(x_zero_point), x, axis, block_size)
    wide = torch.promote_types(target, torch.float32)
    scale = x_scale.to(wide)
    return (values.to(wide) * _spread(scale, x, axis, block_size)).to(target)


def quantize_linear(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    input_dtypes: Sequence[ir.DataType | None],
) -> Tensor:
    """QuantizeLinear: saturate(round to even(x / scale) + zero point)."""
    target = ir.DataType.UINT8
    if output_dtype:
        target = ir.DataType(output_dtype)
    elif y_zero_point is not None:
        target = onnx_dtype(y_zero_point, input_dtypes[2])
    division = TORCH_DTYPE[ir.DataType(precision)] if precision else y_scale.dtype
    if division in FLOAT8:
        division = torch.float32
    ratio = x.to(division) / _spread(y_scale.to(division), x, axis, block_size)
    if target not in _RANGE:
        return cast_to(ratio, target, bool(saturate))
    low, high = _RANGE[target]
    rounded = torch.round(ratio.to(torch.promote_types(division, torch.float32)))
    if y_zero_point is not None:
        rounded = rounded + _spread(_as_integers(y_zero_point), x, axis, block_size)
    return rounded.clamp(low, high).to(torch.int32).to(TORCH_DTYPE[target])


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear: uint8 over the range of ``x`` widened to contain zero."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    # An all-zero tensor has no scale; anything divides zero.
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round((-low / divisor).clamp(0, 255))
    y = (torch.round(x / divisor) + zero_point).clamp(0, 255)
    return y.to(torch.uint8), scale, zero_point.to(torch.uint8)


def _centred(x: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """x - zero point in float64, which holds every integer product of 8-bit values exactly.

    float64 and not int32: torch has no integer convolution, and integer products only on the CPU.
    """
    wide = x.to(torch.float64)
    if zero_point is None:
        return wide
    zero = zero_point.to(torch.float64)
    return wide - (along(zero, axis, x.dim()) if zero.dim() == 1 and zero.numel() > 1 else zero)


def matmul_integer(
    a: Tensor,
    b: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
) -> Tensor:
    """MatMulInteger: int32; zero points per row of A and per column of B, or for all."""
    return (_centred(a, a_zero_point, -2) @ _centred(b, b_zero_point, -1)).to(torch.int32)


def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """ConvInteger: int32; padding adds the zero point, that is zero once centred."""
    y = conv(_centred(x, x_zero_point, 1), _centred(w, w_zero_point, 0), **attributes)
    return torch.round(y).to(torch.int32)


def _requantized(y: Tensor, zero_point: Tensor) -> Tensor:
    info = torch.iinfo(zero_point.dtype)
    rounded = torch.round(y) + zero_point.to(y.dtype)
    return rounded.clamp(info.min, info.max).to(zero_point.dtype)


def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """QLinearMatMul."""
    product = _centred(a, a_zero_point, -2) @ _centred(b, b_zero_point, -1)
    left = a_scale.unsqueeze(-1) if a_scale.dim() == 1 and a_scale.numel() > 1 else a_scale
    factor = left.to(torch.float64) * b_scale.to(torch.float64) / y_scale.to(torch.float64)
    return _requantized(product * factor, y_zero_point)


def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    b: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """QLinearConv: weights quantized per tensor or per output channel; the bias is int32, in the
    scale x_scale * w_scale."""
    bias = None if b is None else b.to(torch.float64)
    y = conv(_centred(x, x_zero_point, 1), _centred(w, w_zero_point, 0), bias, **attributes)
    weight = w_scale.to(torch.float64)
    if weight.dim() == 1 and weight.numel() > 1:
        weight = along(weight, 1, x.dim())
    return _requantized(y * (x_scale.to(torch.float64) * weight / y_scale), y_zero_point)


ROWS: dict[str, Row] = {
    "DequantizeLinear": row(dequantize_linear),
    "QuantizeLinear": row(quantize_linear, facts=("input_dtypes",)),
    "DynamicQuantizeLinear": row(dynamic_quantize_linear),
    "MatMulInteger": row(matmul_integer),
    "ConvInteger": row(conv_integer),
    "QLinearMatMul": row(qlinear_matmul),
    "QLinearConv": row(qlinear_conv),
}
