"""Element-by-element arithmetic, comparison, logic and bit ops, with numpy broadcasting.

torch promotes mixed types; ONNX never has them, except in Pow, whose result has the base's type.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import host
from .row import Row, row
from .storage import UNSIGNED, widened


def div(a: Tensor, b: Tensor) -> Tensor:
    """Div: integers are truncated towards zero, as in C."""
    if a.is_floating_point() or a.is_complex():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def power(x: Tensor, y: Tensor) -> Tensor:
    """Pow: computed in the common type, given back in the base's."""
    base = x.to(torch.int64) if x.dtype in UNSIGNED else x
    exponent = y.to(torch.int64) if y.dtype in UNSIGNED else y
    return torch.pow(base, exponent).to(x.dtype)


def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Mod: the sign follows the divisor, or with ``fmod`` the dividend."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """BitShift: by 0..bits-1 a shift; by any other amount what shifting everything out leaves.

    torch leaves out-of-range amounts undefined. uint16..64 are computed in int64, where the right
    shift of a uint64 must not copy the sign bit.
    """
    dtype = x.dtype
    bits = dtype.itemsize * 8
    if dtype in UNSIGNED:
        x, y = x.to(torch.int64), y.to(torch.int64)
    valid = (y >= 0) & (y < bits)
    by = torch.where(valid, y, 0)
    emptied = torch.zeros_like(x)
    if direction == "LEFT":
        shifted = torch.bitwise_left_shift(x, by)
    else:
        shifted = torch.bitwise_right_shift(x, by)
        if dtype == torch.uint64:
            copied = torch.bitwise_left_shift(torch.full_like(by, -1), 64 - by.clamp(min=1))
            shifted = torch.where(by > 0, shifted & ~copied, shifted)
        elif dtype.is_signed:
            emptied = torch.where(x < 0, -1, emptied)
    return torch.where(valid, shifted, emptied).to(dtype)


def sign(x: Tensor) -> Tensor:
    """Sign: NaN stays NaN, where torch gives 0."""
    return torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x)


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """IsInf, of the signs asked for."""
    if x.dtype.itemsize == 1:
        x = x.to(torch.float32)  # torch has no test for float8
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_positive:
        return torch.isposinf(x)
    return torch.isneginf(x) if detect_negative else torch.zeros_like(x, dtype=torch.bool)


def is_nan(x: Tensor) -> Tensor:
    """IsNaN."""
    return torch.isnan(x.to(torch.float32) if x.dtype.itemsize == 1 else x)


def clip(
    input: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None
) -> Tensor:
    """Clip: where min > max the result is max. Bounds were attributes before opset 11."""
    result = input
    if min is not None:
        result = torch.maximum(result, torch.as_tensor(min, dtype=input.dtype, device=input.device))
    if max is not None:
        result = torch.minimum(result, torch.as_tensor(max, dtype=input.dtype, device=input.device))
    return result


def maximum(*data: Tensor) -> Tensor:
    """Max of any number of tensors; NaN wins."""
    return functools.reduce(torch.maximum, data)


def minimum(*data: Tensor) -> Tensor:
    """Min of any number of tensors; NaN wins."""
    return functools.reduce(torch.minimum, data)


def total(*data: Tensor) -> Tensor:
    """Sum of any number of tensors."""
    return functools.reduce(torch.add, data)


def mean(*data: Tensor) -> Tensor:
    """Mean of any number of tensors."""
    return total(*data) / len(data)


ROWS: dict[str, Row] = {
    # arithmetic
    "Add": row(widened(torch.add), on_host=host.add),
    "Sub": row(widened(torch.sub), on_host=host.sub),
    "Mul": row(widened(torch.mul), on_host=host.mul),
    "Div": row(widened(div), on_host=host.div),
    "Mod": row(widened(mod), on_host=host.mod),
    "Pow": row(power),
    "Neg": row(torch.neg, on_host=host.neg),
    "Abs": row(widened(torch.abs), on_host=host.absolute),
    "Sign": row(widened(sign)),
    "Reciprocal": row(torch.reciprocal),
    "Sqrt": row(torch.sqrt),
    "Exp": row(torch.exp),
    "Log": row(torch.log),
    "Erf": row(torch.erf),
    "Ceil": row(torch.ceil),
    "Floor": row(torch.floor),
    "Round": row(torch.round),  # halves to even, in torch too
    "Clip": row(widened(clip)),
    "Max": row(widened(maximum), on_host=host.maximum),
    "Min": row(widened(minimum), on_host=host.minimum),
    "Sum": row(total),
    "Mean": row(mean),
    # trigonometry
    "Sin": row(torch.sin),
    "Cos": row(torch.cos),
    "Tan": row(torch.tan),
    "Asin": row(torch.asin),
    "Acos": row(torch.acos),
    "Atan": row(torch.atan),
    "Sinh": row(torch.sinh),
    "Cosh": row(torch.cosh),
    "Tanh": row(torch.tanh),
    "Asinh": row(torch.asinh),
    "Acosh": row(torch.acosh),
    "Atanh": row(torch.atanh),
    # comparison
    "Equal": row(widened(torch.eq), on_host=host.equal),
    "Less": row(widened(torch.lt), on_host=host.less),
    "LessOrEqual": row(widened(torch.le), on_host=host.less_or_equal),
    "Greater": row(widened(torch.gt), on_host=host.greater),
    "GreaterOrEqual": row(widened(torch.ge), on_host=host.greater_or_equal),
    "IsInf": row(is_inf),
    "IsNaN": row(is_nan),
    "Where": row(widened(torch.where), on_host=host.where),
    # logic and bits
    "And": row(torch.logical_and, on_host=host.logical_and),
    "Or": row(torch.logical_or, on_host=host.logical_or),
    "Xor": row(torch.logical_xor),
    "Not": row(torch.logical_not, on_host=host.logical_not),
    "BitShift": row(bit_shift),
    "BitwiseAnd": row(widened(torch.bitwise_and)),
    "BitwiseOr": row(widened(torch.bitwise_or)),
    "BitwiseXor": row(widened(torch.bitwise_xor)),
    "BitwiseNot": row(widened(torch.bitwise_not)),
}
