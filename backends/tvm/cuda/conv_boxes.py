"""Convolutions on sm_90a: the kernel around :mod:`conv_hopper`, with whatever follows the product."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

from tvm import tirx

from netlathe.backends.tvm.cuda import conv_hopper, tensor
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.groups import Groups
from netlathe.backends.tvm.cuda.machine import PROCESSORS
from netlathe.backends.tvm.cuda.warpgroup import GROUP, THREADS, Staging
from netlathe.backends.tvm.cuda.windows import Windows, narrow
from netlathe.backends.tvm.tir import (
    SERIAL,
    VECTORIZED,
    Expr,
    cast,
    i64,
    idiv,
    imod,
    known,
)


@dataclass(frozen=True)
class Source:
    """What places are copied from: sizes [b, h, w, channels], and how far apart w, h and b are."""

    sizes: list[Expr]
    strides: list[Expr]

    def joined(self, windows: Windows, columns: Expr) -> tuple[Source, Windows]:
        """The same with a window's row in one piece: places of a row of the result overlap.

        The border before the rows of the input is part of it.
        """
        b, h, _, channels = self.sizes
        wide = i64(windows.kernel[1]) * channels
        step = i64(windows.strides[1]) * channels
        cut = Windows(*((v[0], n) for v, n in zip(windows.each, (1, 1, 1, 0), strict=True)))
        return Source([b, h, columns, wide], [step, *self.strides[1:]]), cut


def convolve(
    code: GpuCode,
    dtype: str,
    operands: tuple[Expr, Expr],
    x: Source,
    windows: Windows,
    channels: Groups,
    out: list[Expr],
    finish: Callable[[list[Expr], Expr, Expr], None],
) -> None:
    """finish([image, row, column], output, sum) for all of ``out`` [b, rows, columns, outputs], on sm_90a.

    The grid is as large as the GPU; a block walks over tiles, one warpgroup copying ahead while two multiply.
    """
    with tensor.unless_empty(code, out[0] * out[1] * out[2]):
        _convolve(code, dtype, operands, x, windows, channels, out, finish)


def _convolve(
    code: GpuCode,
    dtype: str,
    operands: tuple[Expr, Expr],
    x: Source,
    windows: Windows,
    channels: Groups,
    out: list[Expr],
    finish: Callable[[list[Expr], Expr, Expr], None],
) -> None:
    inputs, outputs = channels.deep, channels.count * channels.outputs
    steps = prod(windows.kernel) * -(-inputs // conv_hopper.DEEP)
    images, high, wide = (known(size) for size in out[:3])
    square = 64 if high == 1 else 8  # where sizes are known at run time only
    box = conv_hopper.box(images or 1, high or 8, wide or square, windows.strides)
    each = (box.images, box.rows, box.columns)
    counts = [idiv(n + i64(size - 1), size) for n, size in zip(out[:3], each, strict=True)]
    shape = conv_hopper.chosen(known(counts[0] * counts[1] * counts[2]), channels, steps)
    text = conv_hopper.source(shape, dtype)

    def named(function: str) -> str:
        return conv_hopper.name(shape, dtype, function)

    def int32(value: Expr | int) -> Expr:
        return cast(i64(value), "int32")

    cluster = shape.cluster
    tiles_each = channels.tiles(shape.columns)
    across = channels.bundles * tiles_each
    boxes = counts[0] * counts[1] * counts[2]
    tiles = idiv(boxes + i64(2 * cluster - 1), 2 * cluster) * i64(across)
    groups = tirx.min(tiles, i64(PROCESSORS * shape.blocks // cluster))
    covered = [(n - 1) * step + 1 for n, step in zip(each[1:], windows.strides, strict=True)]
    box_x = (conv_hopper.DEEP, covered[1], covered[0], box.images)
    stepping = (1, windows.strides[1], windows.strides[0], 1)
    map_x = code.tensor_map(
        code.address(operands[0]), x.sizes[::-1], x.strides, box_x, 2, steps=stepping
    )
    taps = prod(windows.kernel)
    sizes_w = [i64(n) for n in (inputs, taps, outputs)]
    box_w = (conv_hopper.DEEP, 1, shape.columns // cluster)
    map_w = code.tensor_map(
        code.address(operands[1]), sizes_w, [i64(inputs), i64(taps * inputs)], box_w, 2
    )
    numbers = [*each, *windows.strides, *windows.dilations, *windows.begins]
    produce = f"produce<{', '.join(map(str, numbers))}>"
    launch = code.launch(groups * i64(cluster), THREADS, cluster, least=shape.blocks)
    with launch as (block, thread):
        shared = code.address(code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn"))
        staging = Staging(code, shared, shape.stages * shape.stage_bytes)
        code.run(named("start"), text, shared)
        first = code.bind(idiv(block, cluster))

        def copy() -> None:
            maps = (tirx.address_of(map_x), tirx.address_of(map_w))
            walk = [int32(n) for n in (first, groups, tiles, across, counts[1], counts[2])]
            window = [int32(n) for n in windows.kernel]
            apart = channels.together * channels.inputs
            bundle = [int32(n) for n in (tiles_each, apart, inputs, channels.wide)]
            code.run(named(produce), text, shared, *maps, *walk, *window, *bundle)

        def multiply() -> None:
            code.run(named("prepare"), text)
            sums = code.alloc([shape.columns // 2], "float32")
            member = code.bind(imod(thread, GROUP))
            group = code.bind(cast(idiv(thread, GROUP) - i64(1), "int32"))
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
                over, end = code.bind(imod(tile, across)), i64(outputs)
                left = code.bind(imod(over, tiles_each)) * i64(shape.columns)
                if channels.bundles > 1:
                    bundle = code.bind(idiv(over, tiles_each))
                    left = bundle * i64(channels.wide) + left
                    end = code.bind(tirx.min((bundle + i64(1)) * i64(channels.wide), end))
                in_whole = all(n % conv_hopper.LANES == 0 for n in (outputs, channels.wide))
                is_full = channels.wide % shape.columns == outputs % channels.wide == 0

                def results(first: int, wide: int, inside: bool) -> None:
                    threads = wide // conv_hopper.LANES  # to a row
                    count = GROUP // threads
                    kind = (
                        VECTORIZED if inside else SERIAL
                    )  # every step's conditions take registers
                    with code.loop(conv_hopper.PLACES // count, kind) as step:
                        line = code.bind(step * i64(count) + idiv(member, threads))
                        at = code.bind(imod(member, threads)) * i64(conv_hopper.LANES)
                        moved = narrow(code, line, [i64(n) for n in each])
                        index = [code.bind(c + m) for c, m in zip(corner, moved, strict=True)]
                        column = left + i64(first) + at

                        def all_() -> None:
                            quad = staging.at(f"float32x{conv_hopper.LANES}", line, at)
                            _quad(code, quad, in_whole, end, column, partial(finish, index))

                        if inside:
                            with contextlib.nullcontext() if is_full else code.when(column < end):
                                all_()
                            return
                        fits = tirx.And(line < i64(box.places), column < end)
                        for i, size in zip(index, out[:3], strict=True):
                            fits = tirx.And(fits, i < size)
                        with code.when(fits):
                            all_()

                # Of columns, each thread asks once where they are whole pieces.
                whole = None if in_whole else left + i64(shape.columns) <= end
                for c, n, size in zip(corner, each, out[:3], strict=True):
                    fits = c + i64(n) <= size
                    whole = fits if whole is None else tirx.And(whole, fits)
                full = whole if box.places == conv_hopper.PLACES else None
                staging.bring_out(sums, shape.columns, full, results)

        code.branch(thread < i64(GROUP), copy, multiply)
        code.run(named("finish"), text)


def _quad(
    code: GpuCode,
    values: Expr,
    in_whole: bool,
    end: Expr,
    column: Expr,
    finish: Callable[[Expr, Expr], None],
) -> None:
    """finish(column, value) for neighbouring results of a thread: in one piece, or each up to ``end``."""
    lanes = conv_hopper.LANES
    quad = code.alloc([lanes], "float32")
    code.vstore(quad, 0, values, lanes)
    if in_whole:
        with code.lanes(lanes) as lane:
            finish(column + lane, tirx.BufferLoad(quad, [lane]))
        return
    with code.loop(lanes, VECTORIZED) as lane, code.when(column + lane < end):
        finish(code.bind(column + lane), tirx.BufferLoad(quad, [lane]))
