"""What flash attention does to scores: a cap, and a bias or a mask in the one form that its kernels read.

That is a tensor of halves or float32 whose lines, one for each query, begin at multiples of what the kernel
reads at once. A mask that lies so is read where it is; any other is written so first. Flags become 0 or -inf,
and for the copy engine a line that all queries share is there 64 times, as often as a copy has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.operands import HALVES
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Expr,
    cast,
    const,
    i64,
    idiv,
    imod,
    known,
    select,
    unflatten,
)

if TYPE_CHECKING:
    from netlathe.backends.tvm.kernel import Kernel
    from netlathe.backends.tvm.values import Ready

D = ir.DataType
BYTES = {"bf16": 2, "f16": 2, "f32": 4}  # of an element
_SECOND = "__half2float(__ushort_as_half(pair >> 16))"
# How two neighbouring elements are read, and each as a float; a bfloat16 is the upper half of one.
_PAIRS = {
    "bf16": (
        "uint16_t",
        "uint32_t",
        "__uint_as_float(pair << 16)",
        "__uint_as_float(pair & 0xffff0000u)",
    ),
    "f16": ("uint16_t", "uint32_t", _SECOND.replace(">> 16", "& 0xffffu"), _SECOND),
    "f32": ("float", "float2", "pair.x", "pair.y"),
}


def source(bias: str, capped: bool) -> str:
    """The device functions, for a kernel that has ``power``, of 2."""
    scaled = "return x * scale;"
    if capped:  # tanh(y) = 1 - 2 / (1 + exp(2 y))
        scaled = """float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + power(x * scale)));
  return fmaf(-2.0f * cap, y, cap);"""
    text = f"""
// `scale` is what the node says, or, with a cap, what makes the exponent of 2 in the tanh.
__device__ __forceinline__ float scaled(float x, float scale, float cap) {{
  {scaled}
}}"""
    if bias:
        element, pair, first, second = _PAIRS[bias]
        # Flags, which are halves here, hide a key whatever its score is, even Inf or NaN.
        hides = "" if bias == "f32" else "bias == -INFINITY ? bias : "
        text += f"""
using Element = {element};
using Pair = {pair};
__device__ __forceinline__ float of(Pair pair, int e) {{ return e ? {second} : {first}; }}
__device__ __forceinline__ float biased(float score, float bias) {{ return {hides}score + bias; }}"""
    return text


def suffix(bias: str, capped: bool) -> str:
    """What the names of kernels end in."""
    return f"{bias and '_' + bias}{'_capped' if capped else ''}"


@dataclass(frozen=True)
class Bias:
    """Head h of sequence b has matrix b * by[0] + h * by[1], and query i its row i * by[2]."""

    dtype: str  # bf16, f16 or f32
    pointer: Expr
    sizes: tuple[Expr, Expr, Expr]  # keys, rows and matrices
    line: Expr  # elements from one row to the next
    by: tuple[Expr, Expr, Expr]

    @property
    def bytes(self) -> int:
        """Of an element."""
        return BYTES[self.dtype]


def kind(mask: Ready, half: ir.DataType) -> str:
    """The type of a mask's elements as they are read: flags become those of ``half``."""
    return HALVES.get(half if mask.dtype == D.BOOL else mask.dtype, "f32")


def bias(
    kernel: Kernel,
    code: GpuCode,
    mask: Ready,
    half: ir.DataType,
    align: int,
    least: int,
    taken: Expr | None = None,
) -> Bias:
    """A mask [b or 1, h or 1, s or 1, t] in memory, written there by a launch where it has to be.

    Lines begin at multiples of ``align`` bytes; one that all queries share is there ``least`` times. Where
    it is not ``taken``, it needs no memory: another kernel runs.
    """
    batch, heads, rows, keys = kernel.shape(mask.shape)
    many = [known(size) != 1 for size in (batch, heads, rows)]
    dtype = kind(mask, half)
    piece = max(align // BYTES[dtype], 1)
    high = rows if many[2] else i64(least)
    # There is no descriptor of empty lines, nor one of no memory.
    line = idiv(tirx.max(keys, i64(1)) + i64(piece - 1), piece) * i64(piece)
    by = (heads if many[0] else i64(0), i64(int(many[1])), i64(int(many[2])))

    def made(pointer: Expr) -> Bias:
        return Bias(dtype, pointer, (keys, high, batch * heads), line, by)

    own, number = kernel.read(mask), known(keys)
    readable = (many[2] or least == 1) and (mask.dtype in HALVES or mask.dtype == D.FLOAT)
    if readable and (piece == 1 or (number is not None and number % piece == 0)):
        return made(code.address(own))
    count, size = batch * heads * high * keys, batch * heads * high * line
    decides = readable and number is None  # at run time
    fits = imod(keys, piece) == i64(0)
    if decides:
        count, size = select(fits, i64(0), count), select(fits, i64(1), size)
    size = size if taken is None else select(taken, size, i64(1))
    stored = {"bf16": D.BFLOAT16, "f16": D.FLOAT16, "f32": D.FLOAT}[dtype]
    work = kernel.workspace(tirx.max(size, i64(1)), storage.STORED[stored])
    with code.loop(count, PARALLEL) as at:
        b, h, i, j = (code.bind(item) for item in unflatten(at, [batch, heads, high, keys]))
        value = mask.at(code, [b, h, i if many[2] else i64(0), j])
        if mask.dtype == D.BOOL:
            value = select(value, const(0.0, "float32"), const(float("-inf"), "float32"))
        place = ((b * heads + h) * high + i) * line + j
        code.store(work, place, storage.store(code, stored, cast(value, "float32")))
    if not decides:
        return made(code.address(work))
    there, written = (tirx.reinterpret("uint64", code.address(buffer)) for buffer in (own, work))
    return made(tirx.reinterpret("handle", select(fits, there, written)))
