"""Convolutions of halves over two dims on tensor cores: products that gather one operand as they copy it.

The input lies with channels last, padded to a multiple of 8, so that 16 bytes are neighbouring channels of
one place; the weight is [outputs, taps, channels]. A row of the product is a place of the result, K are taps
by channels (implicit GEMM; arXiv 1410.0759, section 3). Windows of one element that take all places are
products of matrices as they lie.

conv.warpgroups   sm_90a: boxes of places by the copy engine (:mod:`conv_hopper`)
conv.warps        every GPU: 128 places by 128 outputs, 16 bytes a thread (:mod:`ampere`)
conv.depthwise    4 channels of a place a thread (:mod:`windows`)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.cuda import ampere, conv_hopper, packing, tensor
from netlathe.backends.tvm.cuda import windows as small
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.cuda.windows import Windows, narrow
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
    PARALLEL,
    SERIAL,
    VECTORIZED,
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
HALVES = {D.BFLOAT16: "bf16", D.FLOAT16: "f16"}
DEPTHWISE = (D.FLOAT, *HALVES)


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
    dtype, outputs = HALVES[x.dtype], int(shape[3])  # type: ignore[arg-type]
    machine = low.machine
    assert isinstance(machine, Gpu)
    inputs = -(-int(x.shape[3]) // 8) * 8  # type: ignore[arg-type]
    joined = machine.has_wgmma and inputs <= conv_hopper.NARROW and _joins(windows, x.shape, shape)
    if joined:
        held = low.force(_padded(x, inputs, windows.begins[1], _reach(windows, shape)))
    else:
        held = low.force(_padded(x, inputs, 0, x.shape[2]))
    taps = prod(windows.kernel)
    recipe = Recipe(packing.taps_by_channels, (constant.name,), (inputs,))
    key = (constant, "taps by channels")
    weight = low.parameter(constant.name, x.dtype, (outputs, taps * inputs), recipe, key)

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

        if machine.has_wgmma and plain:
            whole = rows * sizes[3]
            lines = _Source([i64(1), i64(1), rows, sizes[3]], [sizes[3], whole, whole])
            flat = [i64(1), i64(1), rows, out[3]]

            def finish_flat(index: list[Expr], column: Expr, value: Expr) -> None:
                finish_row(index[2], column, value)

            _boxes(code, dtype, operands, lines, windows, flat, finish_flat)
        elif machine.has_wgmma:
            source = _Source(sizes, [sizes[3], sizes[2] * sizes[3], sizes[1] * sizes[2] * sizes[3]])
            cut = windows
            if joined:
                source, cut = source.joined(windows, out[2])
            _boxes(code, dtype, operands, source, cut, out, finish)
        elif plain:
            tensor.warps(code, dtype, *operands, (rows, i64(inputs), i64(outputs)), finish_row)
            return "gemm.warps"
        else:
            _gathered(code, dtype, operands, windows, sizes, out, finish_row)
            return "conv.warps"
        return "conv.warpgroups"

    return Pending(x.dtype, shape, build)


def _joins(windows: Windows, x: Shape, out: Shape) -> bool:
    """Whether what a row of a window reads can lie in one piece, and takes more than one step otherwise."""
    wide, known_ = windows.kernel[1], isinstance(x[2], int) and isinstance(out[2], int)
    return known_ and wide > 1 and windows.dilations[1] == 1 and windows.begins[1] >= 0


def _reach(windows: Windows, out: Shape) -> int:
    """The columns that windows cover, with the border before them."""
    return (int(out[2]) - 1) * windows.strides[1] + windows.kernel[1]  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Source:
    """What places are copied from: sizes [b, h, w, channels], and how far apart w, h and b are."""

    sizes: list[Expr]
    strides: list[Expr]

    def joined(self, windows: Windows, columns: Expr) -> tuple[_Source, Windows]:
        """The same with a window's row in one piece: places of a row of the result overlap.

        The border before the rows of the input is part of it.
        """
        b, h, _, channels = self.sizes
        wide = i64(windows.kernel[1]) * channels
        step = i64(windows.strides[1]) * channels
        cut = Windows(*((v[0], n) for v, n in zip(windows.each, (1, 1, 1, 0), strict=True)))
        return _Source([b, h, columns, wide], [step, *self.strides[1:]]), cut


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


def _boxes(
    code: GpuCode,
    dtype: str,
    operands: tuple[Expr, Expr],
    x: _Source,
    windows: Windows,
    out: list[Expr],
    finish: Callable[[list[Expr], Expr, Expr], None],
) -> None:
    """finish([image, row, column], output, sum) for all of ``out`` [b, rows, columns, outputs], on sm_90a.

    The grid is as large as the GPU; a block walks over tiles, one warpgroup copying ahead while two multiply.
    """
    inputs, outputs = known(x.sizes[3]), known(out[3])
    assert inputs is not None and outputs is not None
    steps = prod(windows.kernel) * -(-inputs // conv_hopper.DEEP)
    images, high, wide = (known(size) for size in out[:3])
    square = 64 if high == 1 else 8  # where sizes are known at run time only
    box = conv_hopper.box(images or 1, high or 8, wide or square, windows.strides)
    each = (box.images, box.rows, box.columns)
    counts = [idiv(n + i64(size - 1), size) for n, size in zip(out[:3], each, strict=True)]
    shape = conv_hopper.chosen(known(counts[0] * counts[1] * counts[2]), outputs, steps)
    text = conv_hopper.source(shape, dtype)

    def named(function: str) -> str:
        return conv_hopper.name(shape, dtype, function)

    def int32(value: Expr | int) -> Expr:
        return cast(i64(value), "int32")

    cluster = shape.cluster
    across = -(-outputs // shape.columns)
    boxes = counts[0] * counts[1] * counts[2]
    tiles = idiv(boxes + i64(2 * cluster - 1), 2 * cluster) * i64(across)
    groups = tirx.min(tiles, i64(tensor.PROCESSORS * shape.blocks // cluster))
    covered = [(n - 1) * step + 1 for n, step in zip(each[1:], windows.strides, strict=True)]
    box_x = (conv_hopper.DEEP, covered[1], covered[0], box.images)
    stepping = (1, windows.strides[1], windows.strides[0], 1)
    map_x = code.tensor_map(operands[0], x.sizes[::-1], x.strides, box_x, 2, steps=stepping)
    taps = prod(windows.kernel)
    sizes_w = [i64(n) for n in (inputs, taps, outputs)]
    box_w = (conv_hopper.DEEP, 1, shape.columns // cluster)
    map_w = code.tensor_map(operands[1], sizes_w, [i64(inputs), i64(taps * inputs)], box_w, 2)
    numbers = [*each, *windows.strides, *windows.dilations, *windows.begins]
    produce = f"produce<{', '.join(map(str, numbers))}>"
    launch = code.launch(groups * i64(cluster), conv_hopper.THREADS, cluster, least=shape.blocks)
    with launch as (block, thread):
        shared = code.address(code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn"))
        code.run(named("start"), text, shared)
        first = code.bind(idiv(block, cluster))

        def copy() -> None:
            maps = (tirx.address_of(map_x), tirx.address_of(map_w))
            walk = [int32(n) for n in (first, groups, tiles, across, counts[1], counts[2])]
            window = [int32(n) for n in (*windows.kernel, inputs)]
            code.run(named(produce), text, shared, *maps, *walk, *window)

        def multiply() -> None:
            code.run(named("prepare"), text)
            sums = code.alloc([shape.columns // 2], "float32")
            member = code.bind(imod(thread, conv_hopper.GROUP))
            group = code.bind(cast(idiv(thread, conv_hopper.GROUP) - i64(1), "int32"))
            with code.loop(idiv(tiles - first + groups - i64(1), groups)) as number:
                code.run(
                    named("consume"), text, shared, code.address(sums), int32(number), int32(steps)
                )
                tile = code.bind(first + number * groups)
                held = code.call(
                    named("box_number"), text, "int32", int32(tile), int32(across), group
                )
                where = narrow(code, held, counts)
                corner = [code.bind(w * i64(n)) for w, n in zip(where, each, strict=True)]
                # Columns are products without a name: vectors must see what they are multiples of.
                left = code.bind(imod(tile, across)) * i64(shape.columns)

                def results(part: int, inside: bool) -> None:
                    threads = 64 // conv_hopper.LANES  # to a row
                    count = conv_hopper.GROUP // threads
                    kind = (
                        VECTORIZED if inside else SERIAL
                    )  # every step's conditions take registers
                    with code.loop(conv_hopper.PLACES // count, kind) as step:
                        line = code.bind(step * i64(count) + idiv(member, threads))
                        at = code.bind(imod(member, threads)) * i64(conv_hopper.LANES)
                        moved = narrow(code, line, [i64(n) for n in each])
                        index = [code.bind(c + m) for c, m in zip(corner, moved, strict=True)]
                        column = left + i64(part * 64) + at

                        def all_() -> None:
                            _quad(
                                code,
                                named("staged"),
                                text,
                                (shared, line, at),
                                outputs,
                                column,
                                lambda c, v: finish(index, c, v),
                            )

                        if inside:
                            all_()
                            return
                        fits = tirx.And(line < i64(box.places), column < i64(outputs))
                        for i, size in zip(index, out[:3], strict=True):
                            fits = tirx.And(fits, i < size)
                        with code.when(fits):
                            all_()

                # Without conditions loads and stores of all steps may overlap.
                whole = left + i64(shape.columns) <= i64(outputs)
                for c, n, size in zip(corner, each, out[:3], strict=True):
                    whole = tirx.And(whole, c + i64(n) <= size)
                for part in range(shape.columns // 64):
                    code.run(named("stage"), text, shared, code.address(sums, part * 32))
                    if box.places < conv_hopper.PLACES:
                        results(part, False)
                    else:
                        code.branch(
                            whole,
                            lambda part=part: results(part, True),  # type: ignore[misc]
                            lambda part=part: results(part, False),  # type: ignore[misc]
                        )
                    code.run(named("unstage"), text)

        code.branch(thread < i64(conv_hopper.GROUP), copy, multiply)
        code.run(named("finish"), text)


def _quad(
    code: GpuCode,
    staged: str,
    text: str,
    where: tuple[Expr, Expr, Expr],
    outputs: int,
    column: Expr,
    finish: Callable[[Expr, Expr], None],
) -> None:
    """finish(column, value) for neighbouring results of a thread: in one piece where rows are whole ones."""
    lanes = conv_hopper.LANES
    quad = code.alloc([lanes], "float32")
    code.vstore(quad, 0, code.call(staged, text, f"float32x{lanes}", *where), lanes)
    if outputs % lanes == 0:
        with code.lanes(lanes) as lane:
            finish(column + lane, tirx.BufferLoad(quad, [lane]))
        return
    with code.loop(lanes, VECTORIZED) as lane, code.when(column + lane < i64(outputs)):
        finish(code.bind(column + lane), tirx.BufferLoad(quad, [lane]))


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
