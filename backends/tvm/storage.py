"""How elements lie in memory and in which type they are computed with.

======================  ===============  ==============  ==========================================
ONNX type               in memory        computed in     note
======================  ===============  ==============  ==========================================
FLOAT, DOUBLE, ints     the same         the same
BOOL                    bool             bool
FLOAT16                 float16          float32         rounded after every operator
BFLOAT16                uint16 (bits)    float32         likewise, to nearest even
FLOAT8*, FLOAT4E2M1     uint8 (bits)     float32         likewise
INT4, UINT4, INT2, ...  int8, uint8      the same        one element a byte
======================  ===============  ==============  ==========================================
"""

from __future__ import annotations

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import bits, packing
from netlathe.backends.tvm.tir import Code, Expr, broadcast, cast, const

D = ir.DataType

STORED = packing.STORED


def computed(dtype: D) -> str:
    """The TIR dtype that values of ``dtype`` have in expressions."""
    if dtype in packing.BITS or dtype == D.FLOAT16:
        return "float32"
    return STORED[dtype]


def load(code: Code, dtype: D, stored: Expr) -> Expr:
    """A stored element as the value it is computed with."""
    if dtype == D.FLOAT16:
        return cast(stored, "float32")
    if dtype == D.BFLOAT16:
        return bits.from_bfloat16(stored)
    if dtype in bits.FORMATS:
        return bits.from_small(code, stored, bits.FORMATS[dtype])
    return stored


def load_vector(dtype: D, stored: Expr, computed_as: str, lanes: int) -> Expr:
    """:func:`load` for a vector of plain, integer, float16 or bfloat16 elements."""

    def vector(element: str) -> str:
        return element if lanes == 1 else f"{element}x{lanes}"

    if dtype == D.BFLOAT16:
        shift = broadcast(const(16, "int32"), lanes)
        return tirx.reinterpret(vector("float32"), cast(stored, vector("int32")) << shift)
    return cast(stored, vector(computed_as))


def store(code: Code, dtype: D, value: Expr) -> Expr:
    """A computed value as it is stored: rounded to nearest even."""
    if dtype == D.FLOAT16:
        return cast(value, "float16")
    if dtype == D.BFLOAT16:
        return bits.to_bfloat16(code, value)
    if dtype in bits.FORMATS:
        return bits.to_small(code, value, bits.FORMATS[dtype], saturate=False)
    return cast(value, STORED[dtype])


def rounded(code: Code, dtype: D, value: Expr) -> Expr:
    """A computed value as it is after it was stored and loaded."""
    if dtype in packing.BITS or dtype == D.FLOAT16:
        return load(code, dtype, store(code, dtype, value))
    return value
