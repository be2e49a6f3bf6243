"""Conversions of the narrow float formats, in integer arithmetic that vectorizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.tir import NAMED, Code, Expr, cast, const, is_nan, select


@dataclass(frozen=True)
class Format:
    """A float of at most 8 bits: sign, exponent, mantissa."""

    mantissa: int  # bits
    bias: int
    largest: int  # code of the largest finite value, without the sign
    inf: int | None  # code of infinity
    nan: int | None  # code of a NaN, whole
    sign: int = 0x80
    zero_is_unsigned: bool = False  # the FNUZ types, whose -0 is the NaN


FORMATS: Mapping[ir.DataType, Format] = {
    ir.DataType.FLOAT8E4M3FN: Format(3, 7, 0x7E, None, 0x7F),
    ir.DataType.FLOAT8E4M3FNUZ: Format(3, 8, 0x7F, None, 0x80, zero_is_unsigned=True),
    ir.DataType.FLOAT8E5M2: Format(2, 15, 0x7B, 0x7C, 0x7F),
    ir.DataType.FLOAT8E5M2FNUZ: Format(2, 16, 0x7F, None, 0x80, zero_is_unsigned=True),
    ir.DataType.FLOAT4E2M1: Format(1, 1, 0x7, None, None, sign=0x8),
}


def _int(value: int) -> Expr:
    return const(value - (1 << 32) if value >= 1 << 31 else value, "int32")


def as_int(value: Expr) -> Expr:
    """The bits of a float32."""
    return tirx.reinterpret("int32", value)


def as_float(value: Expr) -> Expr:
    """The float32 with these bits."""
    return tirx.reinterpret("float32", value)


def from_bfloat16(stored: Expr) -> Expr:
    """bfloat16 bits as float32."""
    return as_float(cast(stored, "int32") << _int(16))


def to_bfloat16(code: Code, value: Expr) -> Expr:
    """float32 as bfloat16 bits, to nearest even."""
    if isinstance(code, GpuCode):
        return code.bfloat16(value)
    value = code.bind(value, NAMED)
    whole = code.bind(as_int(value), NAMED)
    odd = (whole >> _int(16)) & _int(1)
    nearest = (whole + _int(0x7FFF) + odd) >> _int(16)
    result = select(is_nan(value), _int(0x7FC0), nearest)
    return cast(result & _int(0xFFFF), "uint16")


def from_small(code: Code, stored: Expr, form: Format) -> Expr:
    """The float32 that a code stands for."""
    pattern = code.bind(cast(stored, "int32"), NAMED)
    size = code.bind(pattern & _int(form.sign - 1), NAMED)
    shift = _int(23 - form.mantissa)
    normal = as_float((size << shift) + _int((127 - form.bias) << 23))
    tiny = cast(size, "float32") * const(2.0 ** (1 - form.bias - form.mantissa), "float32")
    result = select(size < _int(1 << form.mantissa), tiny, normal)
    if form.inf is not None:
        result = select(size == _int(form.inf), const(float("inf"), "float32"), result)
        result = select(size > _int(form.inf), const(float("nan"), "float32"), result)
    elif form.nan is not None and not form.zero_is_unsigned:
        result = select(size == _int(form.nan), const(float("nan"), "float32"), result)
    # The sign bit is moved, so that -0 stays -0.
    sign = select((pattern & _int(form.sign)) != _int(0), _int(-(1 << 31)), _int(0))
    result = as_float(as_int(result) | sign)
    if form.zero_is_unsigned:
        result = select(pattern == _int(0x80), const(float("nan"), "float32"), result)
    return result


def to_small(code: Code, value: Expr, form: Format, *, saturate: bool) -> Expr:
    """The nearest code, ties to even; what is too large becomes the largest, or inf or NaN."""
    whole = code.bind(as_int(code.bind(value, NAMED)), NAMED)
    bits = code.bind(whole & _int(0x7FFFFFFF), NAMED)
    size = code.bind(as_float(bits), NAMED)
    shift = 23 - form.mantissa
    odd = (bits >> _int(shift)) & _int(1)
    rounded = (bits + _int((1 << (shift - 1)) - 1) + odd) >> _int(shift)
    normal = rounded - _int((127 - form.bias) << form.mantissa)
    # Below the least normal number the codes are multiples of one step; 2**23 rounds to them.
    steps = size * const(2.0 ** (form.bias - 1 + form.mantissa), "float32")
    steps = select(steps < const(2.0**22, "float32"), steps, const(0.0, "float32"))
    lifted = code.bind(steps + const(2.0**23, "float32"), NAMED)
    tiny = cast(lifted - const(2.0**23, "float32"), "int32")
    least = const(2.0 ** (1 - form.bias), "float32")
    result = code.bind(select(size < least, tiny, normal), NAMED)
    too_large = result > _int(form.largest)
    if saturate:
        beyond = form.largest
    else:
        special = form.inf if form.inf is not None else form.nan
        beyond = form.largest if special is None else special & 0x7F
    held = code.bind(select(too_large, _int(beyond), result), NAMED)
    signed = select(whole < _int(0), held | _int(form.sign), held)
    if form.zero_is_unsigned:
        signed = select(held == _int(0), _int(0), signed)
        if not saturate:
            signed = select(too_large, _int(0x80), signed)
    # A NaN has no code in some formats: it becomes zero there.
    signed = select(bits > _int(0x7F800000), _int(0 if form.nan is None else form.nan), signed)
    return cast(signed, "uint8")
