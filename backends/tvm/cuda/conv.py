"""Convolutions of halves over two dims on tensor cores: products that gather one operand as they copy it.

The input lies with channels last, padded to a multiple of 8, so that 16 bytes are neighbouring channels of
one place; the weight is [outputs, taps, channels]. A row of the product is a place of the result, K are taps
by channels (implicit GEMM; arXiv 1410.0759, section 3). Windows of one element that take all places are
products of matrices as they lie, by whatever kernel takes those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.cuda import ampere, hopper, packing, tensor
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.lowering import Lowering
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
    imod,
    known,
    select,
)
from netlathe.backends.tvm.values import Lazy, Pending, Store, Value
from netlathe.ir import dims
from netlathe.ir.dims import Shape

D = ir.DataType
HALVES = {D.BFLOAT16: "bf16", D.FLOAT16: "f16"}


@dataclass(frozen=True)
class Windows:
    """Windows over (rows, columns): their size, and where the first begins before the input."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    begins: tuple[int, int]


def of_halves(
    low: Lowering,
    x: Value,
    constant: ir.Value,
    windows: Windows,
    plain: bool,
    shape: Shape,
) -> Pending:
    """The convolution of ``x`` [b, h, w, channels] with a constant [outputs, channels, r, s] in one group.

    Both are of one half type. ``shape`` is [b, rows, columns, outputs]; ``plain``: windows are one element
    each, and all are taken.
    """
    assert constant.name is not None
    dtype = HALVES[x.dtype]
    channels = int(x.shape[3])  # type: ignore[arg-type]
    held = low.force(_padded(x, -(-channels // 8) * 8))
    inputs, outputs = int(held.shape[3]), int(shape[3])  # type: ignore[arg-type]
    taps = prod(windows.kernel)
    recipe = Recipe(packing.taps_by_channels, (constant.name,), (inputs,))
    key = (constant, "taps by channels")
    weight = low.parameter(constant.name, x.dtype, (outputs, taps * inputs), recipe, key)
    source = held.viewed((dims.product(held.shape[:3]), inputs)) if plain else held

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        assert isinstance(code, GpuCode)
        out = kernel.shape(shape)
        rows = out[0] * out[1] * out[2]
        a, b = kernel.read(source), kernel.read(weight)

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            store(code, [*_place(code, row, out), column], value)

        sizes = (rows, i64(taps * inputs), i64(outputs))
        if plain and code.has_wgmma:
            tensor.warpgroups(code, _cut(outputs), dtype, a, b, sizes, finish)
            return "gemm.warpgroups"
        if plain:
            tensor.warps(code, dtype, a, b, sizes, finish)
            return "gemm.warps"
        _gathered(code, dtype, (a, b), windows, kernel.shape(held.shape), out, finish)
        return "conv.warps"

    return Pending(x.dtype, shape, build)


def _padded(x: Value, channels: int) -> Value:
    """``x`` with zeros for channels it does not have."""
    last = x.shape[3]
    if last == channels:
        return x
    assert isinstance(last, int)

    def element(code: Code, at: Index) -> Expr:
        value = x.at(code, [*at[:3], tirx.min(at[3], i64(last - 1))])
        return select(at[3] < i64(last), value, const(0, dtype_of(value)))

    return Lazy(x.dtype, (*x.shape[:3], channels), element, cost=2)


def _cut(outputs: int) -> hopper.Shape:
    """A tile no wider than the result needs."""
    return next(
        (hopper.Shape(columns) for columns in (64, 128) if outputs <= columns), hopper.Shape()
    )


def _place(code: GpuCode, row: Expr, out: list[Expr]) -> list[Expr]:
    """The indices of row ``row`` of the product in [b, rows, columns]: 32 bits divide faster than 64."""
    whole = known(out[1] * out[2])
    if whole is None:
        each = [code.bind(out[1] * out[2]), out[2]]
        b = code.bind(idiv(row, each[0]))
        within = code.bind(row - b * each[0])
        return [b, code.bind(idiv(within, each[1])), code.bind(imod(within, each[1]))]
    width = known(out[2])
    assert width is not None
    narrow = code.bind(cast(row, "int32"))
    plane, line = tirx.IntImm("int32", whole), tirx.IntImm("int32", width)
    b = code.bind(tirx.truncdiv(narrow, plane))
    within = code.bind(narrow - b * plane)
    i = code.bind(tirx.truncdiv(within, line))
    return [cast(b, "int64"), cast(i, "int64"), cast(code.bind(within - i * line), "int64")]


def _gathered(
    code: GpuCode,
    dtype: str,
    operands: tuple[Expr, Expr],
    windows: Windows,
    x: list[Expr],
    out: list[Expr],
    finish: Callable[[Expr, Expr, Expr], None],
) -> None:
    """A block makes 128 places by 128 outputs, as :mod:`ampere` does, on every GPU."""
    rows, columns = out[0] * out[1] * out[2], out[3]
    inputs = known(x[3])
    text = source(dtype)
    down = idiv(rows + i64(ampere.TILE - 1), ampere.TILE)
    across = idiv(columns + i64(ampere.TILE - 1), ampere.TILE)
    numbers = [inputs, windows.kernel[1], prod(windows.kernel)]
    numbers += [*windows.strides, *windows.dilations, *windows.begins]
    convolve = f"netlathe_conv_{dtype}::convolve<{', '.join(map(str, numbers))}>"
    with code.launch(down * across, ampere.THREADS, least=2) as (block, thread):
        memory = code.alloc([ampere.SHARED_BYTES], "uint8", scope="shared.dyn")
        shared = code.address(memory)
        # Neighbouring blocks read the same places.
        top = code.bind(idiv(block, across) * i64(ampere.TILE))
        left = code.bind(imod(block, across) * i64(ampere.TILE))
        pointers = [code.address(operand) for operand in operands]
        sizes = [cast(size, "int32") for size in (x[1], x[2], out[1], out[2], rows, columns)]
        code.run(convolve, text, shared, *pointers, *sizes, cast(top, "int32"), cast(left, "int32"))
        tensor.tile_results(code, dtype, shared, thread, (top, left), (rows, columns), finish)


def source(dtype: str) -> str:
    """The device functions; ``dtype`` is ``bf16`` or ``f16``."""
    return f"""{ampere.source(dtype)}
#ifndef NETLATHE_CONV_{dtype}
#define NETLATHE_CONV_{dtype}
namespace netlathe_conv_{dtype} {{
using namespace netlathe_ampere_{dtype};
// Sums of 128 places from `top` on by 128 outputs from `left` on, left in shared memory. A thread copies two
// pieces of 8 channels in each stage, of the same two places in all of them.
template <int kInputs, int kWide, int kTaps, int kDown, int kAcross, int kDilatedDown, int kDilatedAcross,
          int kAbove, int kBefore>
__device__ __forceinline__ void convolve(
    uint8_t* shared, const void* x_, const void* weight, int height, int width, int out_height, int out_width,
    int rows, int columns, int top, int left) {{
  const uint16_t* x = static_cast<const uint16_t*>(x_);
  const uint16_t* image[2];
  int first_row[2], first_column[2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {{
    const int row = top + (part * {ampere.THREADS} + threadIdx.x) / 4, plane = out_height * out_width;
    const int within = row % plane;
    image[part] = x + (int64_t)(row / plane) * height * width * kInputs;
    first_row[part] = row < rows ? within / out_width * kDown - kAbove : -(1 << 24);  // outside: zeros
    first_column[part] = within % out_width * kAcross - kBefore;
  }}
  auto gather = [&](uint32_t tile, int64_t k) {{
#pragma unroll
    for (int part = 0; part < 2; ++part) {{
      const int number = part * {ampere.THREADS} + threadIdx.x, at = number % 4;
      const int tap = ((int)k + at * 8) / kInputs, channel = ((int)k + at * 8) % kInputs;
      const int row = first_row[part] + tap / kWide * kDilatedDown;
      const int column = first_column[part] + tap % kWide * kDilatedAcross;
      const bool on_image = (unsigned)row < (unsigned)height && (unsigned)column < (unsigned)width;
      const bool inside = tap < kTaps && on_image;
      const uint16_t* from = inside ? image[part] + ((int64_t)row * width + column) * kInputs + channel : x;
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                   ::"r"(piece(tile, number / 4, at)), "l"(from), "r"(inside ? 16 : 0) : "memory");
    }}
  }};
  tile_product(shared, gather, static_cast<const uint16_t*>(weight), kTaps * kInputs, columns, left);
}}
}}  // namespace
#endif
"""
