"""Cast, CastLike and BitCast between all element types but strings."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from . import host
from .row import Row, onnx_dtype, row
from .storage import FLOAT8, NARROW_BITS, TORCH_DTYPE

# float4e2m1 levels are 0, .5, 1, 1.5, 2, 3, 4, 6. The midpoints between them, and whether a tie goes
# up (to the level with the even mantissa).
_FLOAT4_STEPS = (
    (0.25, False, 0.5),
    (0.75, True, 0.5),
    (1.25, False, 0.5),
    (1.75, True, 0.5),
    (2.5, False, 1.0),
    (3.5, True, 1.0),
    (5.0, False, 2.0),
)


def cast_to(x: Tensor, to: ir.DataType, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """``x`` converted to the ONNX type ``to``, in its storage type."""
    target = TORCH_DTYPE[to]
    if to == ir.DataType.FLOAT8E8M0:
        return _to_e8m0(x, saturate, round_mode)
    if to == ir.DataType.FLOAT4E2M1:
        return _to_float4(x)
    if to in NARROW_BITS:
        return _to_narrow(x, to)
    if target in FLOAT8:
        return _to_float8(x, target, saturate)
    if x.dtype in FLOAT8 and not target.is_floating_point:
        x = x.to(torch.float32)  # torch converts float8 to floats only
    return x.to(target)


def _to_float8(x: Tensor, target: torch.dtype, saturate: bool) -> Tensor:
    if x.dtype in FLOAT8:
        x = x.to(torch.float32)
    if saturate:
        limit = torch.finfo(target).max
        return x.to(torch.float32).clamp(-limit, limit).to(target)
    wide = x.to(torch.float32)
    if target == torch.float8_e4m3fn:
        # It has no infinity: what would round to more than 448 is NaN. Versions of torch differ here.
        wide = torch.where(wide.abs() > 464, torch.nan, wide)
    return wide.to(target)


def _to_e8m0(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """A power of two: the float32 exponent, rounded by the mantissa. The sign is lost."""
    bits = x.to(torch.float32).contiguous().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    mantissa = bits & 0x7FFFFF
    if round_mode == "up":
        increment = mantissa > 0
    elif round_mode == "nearest":  # a tie goes up, except to the smallest normal from below it
        half = 0x400000
        increment = (mantissa > half) | ((mantissa == half) & (exponent > 0))
    else:
        increment = torch.zeros_like(mantissa, dtype=torch.bool)
    special = exponent == 0xFF
    increment = increment & ~special
    if saturate:
        increment = increment & (exponent != 0xFE)
    return (exponent + increment).to(torch.uint8).view(torch.float8_e8m0fnu)


def _to_float4(x: Tensor) -> Tensor:
    """Round to nearest even and saturate. NaN has no encoding and becomes zero."""
    wide = x.to(torch.float32)
    magnitude = wide.abs()
    level = torch.zeros_like(magnitude)
    for middle, up, step in _FLOAT4_STEPS:
        above = magnitude >= middle if up else magnitude > middle
        level = level + above * step
    return torch.copysign(level, wide).to(torch.float8_e4m3fn)


def _to_narrow(x: Tensor, to: ir.DataType) -> Tensor:
    """Higher bits are dropped; signed types are sign-extended into their storage."""
    bits = NARROW_BITS[to]
    if x.dtype in FLOAT8:
        x = x.to(torch.float32)
    low = x.to(torch.int32) & ((1 << bits) - 1)
    if to in (ir.DataType.INT4, ir.DataType.INT2):
        low = ((low ^ (1 << (bits - 1))) - (1 << (bits - 1))).to(torch.int32)
    return low.to(TORCH_DTYPE[to])


def cast(input: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Cast."""
    return cast_to(input, ir.DataType(to), bool(saturate), round_mode)


def cast_like(
    input: Tensor,
    target_type: Tensor,
    *,
    input_dtypes: Sequence[ir.DataType | None],
    saturate: int = 1,
    round_mode: str = "up",
) -> Tensor:
    """CastLike: Cast to the ONNX type of ``target_type``, whose contents do not matter."""
    return cast_to(input, onnx_dtype(target_type, input_dtypes[1]), bool(saturate), round_mode)


def bit_cast(input: Tensor, *, to: int, input_dtypes: Sequence[ir.DataType | None]) -> Tensor:
    """BitCast. Sub-byte types are a byte in storage: the bits are moved, then sign-extended anew."""
    source, target = onnx_dtype(input, input_dtypes[0]), ir.DataType(to)
    if target in NARROW_BITS and source in NARROW_BITS:
        return _to_narrow(input, target)
    if source == ir.DataType.BOOL or target == ir.DataType.BOOL:
        return input.view(torch.uint8).view(TORCH_DTYPE[target])
    return input.contiguous().view(TORCH_DTYPE[target])


ROWS: dict[str, Row] = {
    "Cast": row(cast, on_host=host.cast),
    "CastLike": row(cast_like, on_host=host.cast, facts=("input_dtypes",)),
    "BitCast": row(bit_cast, facts=("input_dtypes",)),
}
