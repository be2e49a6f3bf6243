"""Convolutions of halves over two dims on tensor cores: products that gather one operand as they copy it.

The input lies with channels last, padded to a multiple of 8, so that 16 bytes are neighbouring channels of
one place (or of two, where a row of a window is one piece); the weight is [outputs, taps, channels]. A row of
the product is a place of the result, K are taps by channels (implicit GEMM; arXiv 1410.0759, section 3).
Windows of one element that take all places are products of matrices as they lie. Groups of channels are
bundled (:mod:`groups`).

conv.warpgroups   sm_90a: boxes of places by the copy engine (:mod:`conv_boxes`)
conv.warps        every GPU: 128 places by 128 outputs, 16 bytes a thread (:mod:`ampere`)
conv.depthwise    4 channels of a place a thread (:mod:`windows`)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.cuda import ampere, conv_boxes, conv_hopper, packing, tensor
from netlathe.backends.tvm.cuda import windows as small
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.groups import PIECE, Groups
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.cuda.operands import HALVES
from netlathe.backends.tvm.cuda.windows import Windows, narrow
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Expr,
    cast,
    const,
    i64,
    idiv,
    imod,
    known,
    unflatten,
)
from netlathe.backends.tvm.values import Pending, Ready, Store, Value
from netlathe.ir.dims import Dim, Shape

D = ir.DataType
DEPTHWISE = (D.FLOAT, *HALVES)


def of_halves(
    low: Lowering,
    x: Value,
    constant: ir.Value,
    windows: Windows,
    plain: bool,
    groups: Groups,
    shape: Shape,
) -> Pending:
    """The convolution of ``x`` [b, h, w, channels] with a constant [outputs, channels of a group, r, s].

    Both are of one half type. ``shape`` is [b, rows, columns, outputs]; ``plain``: windows are one element
    each, and all are taken.
    """
    assert constant.name is not None
    dtype, outputs = HALVES[x.dtype], groups.count * groups.outputs
    machine = low.machine
    assert isinstance(machine, Gpu)
    inputs = -(-groups.count * groups.inputs // PIECE) * PIECE
    down, across = (stride <= conv_hopper.MOST_STRIDE for stride in windows.strides)
    narrow_ = inputs <= conv_hopper.NARROW and groups.count == 1 and _joins(windows, x.shape, shape)
    joined = machine.has_wgmma and down and narrow_
    boxes = machine.has_wgmma and down and (across or joined)
    if joined:
        # Windows and rows begin at multiples of 16 bytes: 4 channels will do for every other column.
        piece = small.LANES if windows.strides[1] % 2 == 0 else PIECE
        inputs = -(-groups.inputs // piece) * piece
        groups = replace(groups, inputs=windows.kernel[1] * inputs)
        reach = -(-_reach(windows, shape) // 2) * 2
        held = low.force(_padded(x, inputs, windows.begins[1], reach))
        taps = windows.kernel[0]
        recipe = Recipe(packing.rows_by_channels, (constant.name,), (inputs, groups.deep))
    else:
        held = low.force(_padded(x, inputs, 0, x.shape[2]))
        taps = prod(windows.kernel)
        numbers = (groups.deep, groups.count, groups.together)
        recipe = Recipe(packing.taps_by_channels, (constant.name,), numbers)
    key = (constant, recipe)
    weight = low.parameter(constant.name, x.dtype, (outputs, taps * groups.deep), recipe, key)

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        assert isinstance(code, GpuCode)
        out, sizes = kernel.shape(shape), kernel.shape(held.shape)
        rows = out[0] * out[1] * out[2]
        operands = (kernel.read(held), kernel.read(weight))

        def finish(index: list[Expr], column: Expr, value: Expr) -> None:
            store(code, [*index, column], value)

        def finish_row(row: Expr, column: Expr, value: Expr) -> None:
            finish(unflatten(row, out[:3]) if plain else narrow(code, row, out[:3]), column, value)

        if boxes and plain:
            whole = rows * sizes[3]
            lines = conv_boxes.Source([i64(1), i64(1), rows, sizes[3]], [sizes[3], whole, whole])
            flat = [i64(1), i64(1), rows, out[3]]

            def finish_flat(index: list[Expr], column: Expr, value: Expr) -> None:
                finish_row(index[2], column, value)

            conv_boxes.convolve(code, dtype, operands, lines, windows, groups, flat, finish_flat)
        elif boxes:
            source = conv_boxes.Source(
                sizes, [sizes[3], sizes[2] * sizes[3], sizes[1] * sizes[2] * sizes[3]]
            )
            cut = windows
            if joined:
                source, cut = source.joined(windows, out[2])
            conv_boxes.convolve(code, dtype, operands, source, cut, groups, out, finish)
        elif plain and groups.count == 1:
            tensor.warps(code, dtype, *operands, (rows, i64(inputs), i64(outputs)), finish_row)
            return "gemm.warps"
        else:
            _gathered(code, dtype, operands, windows, groups, sizes, out, finish_row)
            return "conv.warps"
        return "conv.warpgroups"

    return Pending(x.dtype, shape, build)


def _joins(windows: Windows, x: Shape, out: Shape) -> bool:
    """Whether what a row of a window reads can lie in one piece, and takes more than one step otherwise."""
    wide, known_ = windows.kernel[1], isinstance(x[2], int) and isinstance(out[2], int)
    return known_ and wide > 1 and windows.dilations[1] == 1 and windows.begins[1] >= 0


def _reach(windows: Windows, out: Shape) -> int:
    """The columns that windows cover, with the border before them."""
    return (int(out[2]) - 1) * windows.strides[1] + windows.kernel[1]  # type: ignore[arg-type]  # a number


def depthwise(low: Lowering, x: Value, taps: Ready, cut: Windows, shape: Shape) -> Pending:
    """The convolution of each channel of ``x`` [b, h, w, channels] with a window of its own.

    ``taps`` is [taps, channels], ``shape`` [b, rows, columns, channels].
    """
    held = low.force(x)

    def build(kernel: Kernel, store: Store) -> str:
        return small.depthwise(kernel, held, taps, cut, kernel.shape(shape), store)

    return Pending(x.dtype, shape, build)


def _padded(x: Value, channels: int, before: int, width: Dim) -> Value:
    """``x`` with zeros for channels and columns it does not have, ``before`` of them in front of its rows.

    A thread writes all channels of a place, 4 at a time.
    """
    last, lanes = x.shape[3], small.LANES
    if (last, x.shape[2], before) == (channels, width, 0):
        return x
    assert isinstance(last, int)
    shape = (*x.shape[:2], width, channels)

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        assert isinstance(code, GpuCode)
        sizes, out = kernel.shape(x.shape), kernel.shape(shape)
        with code.loop(out[0] * out[1] * out[2], PARALLEL) as at:
            b, row, place = narrow(code, at, out[:3])
            column = code.bind(tirx.max(tirx.min(place - i64(before), sizes[2] - i64(1)), i64(0)))
            inside = column == place - i64(before)
            for first in range(0, channels, lanes):
                with code.lanes(lanes) as lane:
                    value = const(0.0, "float32")
                    if first < last:
                        channel = tirx.min(i64(first) + lane, i64(last - 1))
                        item = x.at(code, [b, row, column, channel])
                        held = tirx.And(inside, i64(first) + lane < i64(last))
                        value = tirx.Select(held, item, value)
                    store(code, [b, row, place, i64(first) + lane], value)
        return "conv.padded"

    return Pending(x.dtype, shape, build)


def _gathered(
    code: GpuCode,
    dtype: str,
    operands: tuple[Expr, Expr],
    windows: Windows,
    groups: Groups,
    x: list[Expr],
    out: list[Expr],
    finish: Callable[[Expr, Expr, Expr], None],
) -> None:
    """A block makes 128 places by 128 outputs, as :mod:`ampere` does, on every GPU."""
    rows, columns = out[0] * out[1] * out[2], out[3]
    inputs = known(x[3])
    text = source(dtype)
    down = idiv(rows + i64(ampere.TILE - 1), ampere.TILE)
    tiles = groups.tiles(ampere.TILE)
    across = i64(groups.bundles * tiles)
    numbers = [inputs, groups.deep, windows.kernel[1], prod(windows.kernel)]
    numbers += [*windows.strides, *windows.dilations, *windows.begins]
    convolve = f"netlathe_conv_{dtype}::convolve<{', '.join(map(str, numbers))}>"
    with code.launch(down * across, ampere.THREADS, least=2) as (block, thread):
        memory = code.alloc([ampere.SHARED_BYTES], "uint8", scope="shared.dyn")
        shared = code.address(memory)
        # Neighbouring blocks read the same places.
        top = code.bind(idiv(block, across) * i64(ampere.TILE))
        tile = code.bind(imod(block, across))
        bundle, begin = code.bind(idiv(tile, tiles)), imod(tile, tiles) * i64(ampere.TILE)
        left = code.bind(bundle * i64(groups.wide) + begin)
        end = tirx.min((bundle + i64(1)) * i64(groups.wide), columns)
        pointers = [code.address(operand) for operand in operands]
        first = bundle * i64(groups.together * groups.inputs)
        given = (x[1], x[2], out[1], out[2], rows, columns, top, left, first)
        code.run(convolve, text, shared, *pointers, *(cast(number, "int32") for number in given))
        tensor.tile_results(code, dtype, shared, thread, (top, left), (rows, end), finish)


def source(dtype: str) -> str:
    """The device functions; ``dtype`` is ``bf16`` or ``f16``."""
    return f"""{ampere.source(dtype)}
#ifndef NETLATHE_CONV_{dtype}
#define NETLATHE_CONV_{dtype}
namespace netlathe_conv_{dtype} {{
using namespace netlathe_ampere_{dtype};
// Sums of 128 places from `top` on by 128 outputs from `left` on, left in shared memory. A thread copies two
// pieces of 8 channels in each stage, of the same two places in all of them: kDeep of kInputs, from
// `first_channel` on. The last bundle of groups may have fewer: zeros.
template <int kInputs, int kDeep, int kWide, int kTaps, int kDown, int kAcross, int kDilatedDown,
          int kDilatedAcross, int kAbove, int kBefore>
__device__ __forceinline__ void convolve(
    uint8_t* shared, const void* x_, const void* weight, int height, int width, int out_height, int out_width,
    int rows, int columns, int top, int left, int first_channel) {{
  const uint16_t* x = static_cast<const uint16_t*>(x_) + first_channel;
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
      const int tap = ((int)k + at * 8) / kDeep, channel = ((int)k + at * 8) % kDeep;
      const int row = first_row[part] + tap / kWide * kDilatedDown;
      const int column = first_column[part] + tap % kWide * kDilatedAcross;
      const bool on_image = (unsigned)row < (unsigned)height && (unsigned)column < (unsigned)width;
      const bool exists = kInputs % kDeep == 0 || first_channel + channel < kInputs;
      const bool inside = tap < kTaps && on_image && exists;
      const uint16_t* from = inside ? image[part] + ((int64_t)row * width + column) * kInputs + channel : x;
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                   ::"r"(piece(tile, number / 4, at)), "l"(from), "r"(inside ? 16 : 0) : "memory");
    }}
  }};
  const int64_t inner = kTaps * kDeep;
  const Side<> b{{static_cast<const uint16_t*>(weight), inner, columns, inner, left}};
  tile_product(shared, gather, b, inner);
}}
}}  // namespace
#endif
"""
