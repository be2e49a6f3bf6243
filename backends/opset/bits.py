"""Bitwise ops on integers (opset 18) as arithmetic on their two's complement digits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .builder import Builder, Gap

OPS = ("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor")
INT64 = ir.DataType.INT64


def bitwise(b: Builder) -> list[ir.Value]:
    """Any of OPS. The binary ones take every bit apart: 64 times the memory, fit for flags."""
    dtype = b.dtype(b.need(0))
    if dtype == ir.DataType.UINT64:
        raise Gap(f"{b.node.op_type} of uint64 exists since opset 18")
    if b.node.op_type == "BitwiseNot":
        # -1 - x for signed integers, max - x for unsigned ones.
        ones = np.iinfo(dtype.numpy()).max if dtype.name.startswith("U") else -1
        flipped = b("Sub", b.const(ones), b.cast(b.need(0), INT64))
        return [b.cast(flipped, dtype)]
    x, y = (_digits(b, b.cast(b.need(i), INT64)) for i in (0, 1))
    both, total = b("Mul", x, y), b("Add", x, y)
    digits = {
        "BitwiseAnd": lambda: both,
        "BitwiseOr": lambda: b("Sub", total, both),
        "BitwiseXor": lambda: b("Sub", total, b("Add", both, both)),
    }[b.node.op_type]()
    terms = b("Mul", digits, b.const([2**i for i in range(63)] + [-(2**63)]))
    # Two sums of 32 terms each: ONNX Runtime adds int64 in float64, which is exact for 53 bits only.
    halves = [b.slice(terms, -1, 0, 32), b.slice(terms, -1, 32, 64)]
    low, high = (b("ReduceSum", half, b.const([-1]), keepdims=0) for half in halves)
    return [b.cast(b("Add", low, high), dtype)]


def _digits(b: Builder, x: ir.Value) -> ir.Value:
    """[*s] int64 -> [*s, 64] zeros and ones, lowest bit first, the sign last."""
    column = b.unsqueeze(x, [-1])
    powers = b.const([2**i for i in range(63)])
    # Mod follows the divisor's sign, so x - x mod 2^i is the multiple below x: floor division.
    below = b("Sub", column, b("Mod", column, powers))
    digits = b("Mod", b("Div", below, powers), b.const(2))
    sign = b.cast(b("Less", column, b.const(0)), INT64)
    return b("Concat", digits, sign, axis=-1)
