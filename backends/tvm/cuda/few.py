"""Products of few rows of halves: the kernels around :mod:`stream`, :mod:`skinny` and :mod:`mixed`.

Up to 16 rows the weight is read once, in 16, 8 or 4 bits. On sm_90a it streams through shared memory
(:mod:`stream`, whose device code multiplies by :mod:`halves`, :mod:`limbs` or :mod:`pairs`, and may keep and
normalize x by :mod:`held`); elsewhere it goes to registers (:mod:`skinny`). With more rows a weight
of 8 or 4 bits becomes halves in registers on sm_90a (:mod:`mixed`), if K is a multiple of 64 and groups fit
stages. The rest is :mod:`tensor`'s, for which a quantized weight is expanded first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.cuda import (
    held,
    hopper,
    mixed,
    packing,
    pairs,
    skinny,
    stream,
    tilings,
    warpgroup,
)
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.machine import PROCESSORS
from netlathe.backends.tvm.cuda.tensor import Finish, added_results, unless_empty
from netlathe.backends.tvm.tir import PARALLEL, VECTORIZED, Expr, cast, i64, idiv, imod, known


@dataclass(frozen=True)
class Weight:
    """A constant right operand [columns, inner]: halves (16 bits), or packed integers of 8 or 4 bits.

    Columns of packed integers, ``scales`` and ``zeros`` are padded to a multiple of 64. ``scales`` [groups,
    columns] are halves, one for every ``group`` elements; ``group`` 0: one for a column. ``zeros``
    likewise, or None where 4 bits stand for zero as ``zero``.
    """

    values: Any
    bits: int = 16
    scales: Any = None
    zeros: Any = None
    group: int = 0
    zero: int = 8

    @property
    def parameters(self) -> str:
        """Template parameters that device functions have in common."""
        return f"{self.group}, {self.zero if self.zeros is None else -1}"

    def facts(self, inner: int) -> tuple[int, int, bool, int]:
        """What decides on a tile, besides bits and columns: see :func:`stream.chosen`."""
        return self.padded(inner), self.group, self.zeros is not None, self.zero

    def padded(self, inner: int) -> int:
        """What a row has of K in memory."""
        chunk = skinny.chunk(self.bits)
        return inner if self.bits == 16 else -(-inner // chunk) * chunk


@dataclass(frozen=True)
class Norm:
    """RMSNormalization of the left operand: ``gain``, halves, is a constant as long as a row."""

    gain: Any
    epsilon: float


# A kernel for at most so many rows: how many, and what launches it.
Few = tuple[int, Callable[[], None]]


def by_rows(
    code: GpuCode, rows: Expr, kernels: Sequence[Few], otherwise: Callable[[], None]
) -> None:
    """The first of ``kernels`` that takes so many rows, else ``otherwise``, as known when it runs."""
    if not kernels:
        otherwise()
        return
    (most, these), *others = kernels
    number = known(rows)
    if number is None:
        code.branch(rows <= i64(most), these, lambda: by_rows(code, rows, others, otherwise))
    elif number <= most:
        these()
    else:
        by_rows(code, rows, others, otherwise)


def kernels(
    code: GpuCode,
    dtype: str,
    a: Any,
    weight: Weight,
    sizes: tuple[Expr, int, int],
    finish: Finish,
    together: int = 1,
) -> list[Few]:
    """finish(row, column, sum over k of a[row, k] * weight[column, k]): kernels in order of rows.

    Those for up to 16 rows, then those of :func:`shapes_of_more`. The last one's number is the most that they
    take, which what :func:`by_rows` does otherwise may rely on (``products`` does): there are more rows.
    ``a`` [rows, inner] is a flat buffer of halves; inner is a multiple of 8.
    """
    inner, columns = sizes[1:]

    def kernel(tiles: int) -> Few:
        shape = None
        if code.has_wgmma and inner % 64 == 0:  # whole swizzled rows
            facts = weight.facts(inner)
            if weight.bits < 16 and tiles == pairs.TILES:
                shape = stream.chosen_pairs(weight.bits, columns, *facts)
            shape = shape or stream.chosen(weight.bits, tiles, columns, *facts)

        def launched() -> None:
            with unless_empty(code, sizes[0]):
                done = _scaled(code, dtype, weight, finish, together)
                if shape is None:
                    _loaded(code, dtype, a, weight, sizes, tiles, done, together)
                else:
                    _streamed(code, dtype, a, weight, sizes, shape, done, together)

        return 8 * tiles, launched

    def more(most: int, shape: mixed.Shape) -> Few:
        def launched() -> None:
            done = _scaled(code, dtype, weight, finish, together)
            _mixed(code, dtype, a, weight, sizes, shape, i64(1), done, together)

        return most, launched

    shapes = shapes_of_more(code.has_wgmma, weight, *sizes)
    return [kernel(tiles) for tiles in (1, 2)] + [more(*each) for each in shapes]


def many(
    code: GpuCode,
    dtype: str,
    a: Any,
    weight: Weight,
    sizes: tuple[Expr, int, int],
    finish: Finish,
    together: int = 1,
) -> Callable[[], None] | None:
    """The same for more rows than those kernels take, where a weight of integers is not expanded first."""
    rows, inner, columns = sizes
    shapes = tiles_of_many(code.has_wgmma, weight, inner, columns)
    if not shapes:
        return None
    done = _scaled(code, dtype, weight, finish, together)

    def launched(shape: mixed.Shape, down: Expr) -> None:
        _mixed(code, dtype, a, weight, sizes, shape, down, done, together)

    return lambda: tilings.looked_up(code, rows, shapes, mixed.rows_of, launched)


def tiles_of_many(
    has_wgmma: bool, weight: Weight, inner: int, columns: int
) -> Sequence[tilings.Tiling[mixed.Shape]]:
    """How more than 128 rows become tiles by a weight of integers; none where that is expanded."""
    if not has_wgmma or weight.bits == 16 or inner % 64:
        return ()
    return mixed.tiled(weight.bits, columns, *weight.facts(inner))


def shapes_of_more(
    has_wgmma: bool, weight: Weight, rows: Expr, inner: int, columns: int
) -> list[tuple[int, mixed.Shape]]:
    """Tiles for 17 to 128 rows by a weight of integers, and the most rows of each, in order.

    If their number is known there is one at most.
    """
    if not has_wgmma or weight.bits == 16 or inner % 64:
        return []
    number = known(rows)
    counts = mixed.ROWS if number is None else (number,)
    facts = (columns, *weight.facts(inner))
    shapes = [
        (most, mixed.chosen(weight.bits, most, *facts))
        for most in counts
        if skinny.MOST_ROWS < most <= mixed.ROWS[-1]
    ]
    return [(most, shape) for most, shape in shapes if shape is not None]


def kernels_that_hold(
    code: GpuCode,
    dtype: str,
    a: Any,
    weight: Weight,
    sizes: tuple[Expr, int, int],
    finish: Finish,
    together: int = 1,
    norm: Norm | None = None,
) -> list[Few]:
    """The same by kernels that keep all of ``a`` in shared memory, after ``norm`` if there is one."""
    inner, columns = sizes[1:]

    def kernel(most: int, shape: stream.Shape) -> Few:
        def launched() -> None:
            with unless_empty(code, sizes[0]):
                done = _scaled(code, dtype, weight, finish, together)
                _streamed(code, dtype, a, weight, sizes, shape, done, together, norm)

        return most, launched

    shapes = shapes_that_hold(code.has_wgmma, weight, inner, columns, norm is not None)
    return [kernel(most, shape) for most, shape in shapes]


def shapes_that_hold(
    has_wgmma: bool, weight: Weight, inner: int, columns: int, normed: bool
) -> list[tuple[int, stream.Shape]]:
    """Those there are: halves stay halves only if they are ``normed``, integers have no zero points."""
    signed = weight.bits == 8 or (weight.bits == 4 and weight.zeros is None and weight.zero == 8)
    if not has_wgmma or not (signed or (weight.bits == 16 and normed and inner % 64 == 0)):
        return []
    facts = (weight.bits, 1, columns, *weight.facts(inner))
    shapes = [(most, stream.chosen(*facts, most, normed)) for most in held.ROWS]
    return [(most, shape) for most, shape in shapes if shape is not None]


def _scaled(code: GpuCode, dtype: str, weight: Weight, finish: Finish, together: int) -> Finish:
    """``finish`` of sums times the scales of their columns, if the weight has such."""
    kind = ir.DataType.BFLOAT16 if dtype == "bf16" else ir.DataType.FLOAT16

    def scaled(row: Expr, column: Expr, *values: Expr) -> None:
        if weight.scales is not None and weight.group == 0:
            places = [column * i64(together) + i64(i) for i in range(together)]
            loads = [tirx.BufferLoad(weight.scales, [place]) for place in places]
            scales = [storage.load(code, kind, load) for load in loads]
            values = tuple(code.bind(v * s) for v, s in zip(values, scales, strict=True))
        finish(row, column, *values)

    return scaled


def _streamed(
    code: GpuCode,
    dtype: str,
    a: Any,
    weight: Weight,
    sizes: tuple[Expr, int, int],
    shape: stream.Shape,
    finish: Finish,
    together: int,
    norm: Norm | None = None,
) -> None:
    """On sm_90a: weights through shared memory."""
    rows, inner, columns = sizes
    text = stream.source(shape, dtype)

    def named(function: str) -> str:
        return stream.name(shape, dtype, function)

    def small(value: Expr | int) -> Expr:
        return cast(i64(value), "int32")

    end, across = weight.padded(inner), packing.padded(columns)
    tiles = -(-columns // shape.columns)
    clusters = min(tiles, stream.CLUSTERS[shape.splits])
    records = _recorded(code, dtype, a, weight, sizes, shape) if shape.pairs else None
    map_a = _nothing()
    if not shape.held and not shape.pairs:
        map_a = _slabs(code, a, rows, inner, 8 * shape.tiles, shape.deep)
    if weight.bits == 16:
        lines = _slabs(code, weight.values, i64(columns), inner, shape.columns, shape.deep)
        maps = [lines, _nothing(), _nothing()]
    else:
        maps = _packed_maps(code, weight, sizes, shape)

    wide = shape.slice // together
    count = wide * shape.rows
    apart, rest = divmod(shape.multiplying, wide)  # rows between two that a thread finishes
    assert not rest, "a thread has one column"
    steps = -(-shape.rows // apart)
    summing = min(-(-count // 32), shape.multiplying // 32)  # warps; they take turns, tile by tile
    blocks = i64(clusters * shape.splits)
    launch = code.launch(blocks, shape.threads, shape.splits, least=1 + shape.beside, waits=False)
    with launch as (block, thread):
        shared = code.address(code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn"))
        code.run(named("start"), text, shared, small(summing))
        first = code.bind(idiv(block, shape.splits))

        def copy() -> None:
            numbers = [small(item) for item in (first, clusters, tiles, end)]
            given = map_a if records is None else code.address(records)
            code.run(named("produce"), text, shared, given, *maps, *numbers)

        own = code.bind(imod(block, shape.splits) * i64(shape.slice))

        def ask(number: Expr) -> None:
            """For the scales of a tile's columns, which are read last."""
            if weight.scales is not None and not weight.group:
                left = (first + number * i64(clusters)) * i64(shape.columns) + own
                there = thread < i64(shape.slice)
                # Where all tiles are whole this would make one row of int8 a tenth slower.
                if across % shape.columns:
                    there = tirx.And(there, left + thread < i64(across))
                with code.when(there):
                    code.ahead(weight.scales, left + thread)

        def multiply() -> None:
            ask(i64(0))
            if shape.held:
                gain = code.null() if norm is None else code.address(norm.gain)
                epsilon = tirx.const(0.0 if norm is None else norm.epsilon, "float32")
                numbers = (epsilon, small(rows), small(inner))
                code.run(named("prepare"), text, shared, code.address(a), gain, *numbers)
            last = i64(0)
            if tiles > clusters:
                last = code.bind(idiv(i64(tiles - 1) - first, clusters))
            with code.loop(last + i64(1)) as number:
                ask(number)
                turns = map(small, (number, end, summing))
                code.run(named("consume"), text, shared, *turns)
                left = (first + number * i64(clusters)) * i64(shape.columns) + own
                left = code.bind(idiv(left, together))
                before = imod(number * i64(32 * summing), shape.multiplying)
                turn = code.bind(imod(thread + i64(shape.multiplying) - before, shape.multiplying))
                first_row, within = (code.bind(op(turn, wide)) for op in (idiv, imod))
                column = code.bind(left + within)
                with code.when(tirx.And(turn < i64(count), column < i64(columns // together))):
                    # All of a thread's sums are read before the first result waits for anything.
                    sums = code.alloc([steps * together], "float32")
                    with code.loop(steps, VECTORIZED) as step, code.loop(together, VECTORIZED) as i:
                        place = (first_row + step * i64(apart), within * i64(together) + i)
                        value = code.call(named("sum"), text, "float32", shared, *place)
                        code.store(sums, step * i64(together) + i, value)
                    with code.loop(steps, VECTORIZED) as step:
                        row = code.bind(first_row + step * i64(apart))
                        with code.when(row < rows):
                            places = [step * i64(together) + i64(i) for i in range(together)]
                            values = [tirx.BufferLoad(sums, [place]) for place in places]
                            finish(row, column, *map(code.bind, values))
                with code.when(tirx.And(number < last, turn < i64(32 * summing))):
                    code.run(named("release"), text, shared)

        code.branch(thread >= i64(shape.multiplying), copy, multiply)


def _nothing() -> Expr:
    """In place of a descriptor that a kernel does not use."""
    return tirx.const(0, "uint64")


def _slabs(code: GpuCode, source: Any, lines: Expr, inner: int, box: int | Expr, deep: int) -> Expr:
    """The descriptor of ``source`` [lines, inner] for copies of ``box`` swizzled lines, ``deep`` of K."""
    row = mixed.SLAB  # elements of K in a swizzled row of 128 bytes; a stage has several
    sizes = [i64(row), lines, i64(inner // row)]
    made = code.tensor_map(
        code.address(source), sizes, [i64(inner), i64(row)], (row, box, deep // row), 2
    )
    return tirx.address_of(made)


def _packed_maps(
    code: GpuCode, weight: Weight, sizes: tuple[Expr, int, int], shape: stream.Shape | mixed.Shape
) -> list[Expr]:
    """The descriptors of a packed weight, of its scales and of its zero points, for a stage of each."""
    end, across = weight.padded(sizes[1]), packing.padded(sizes[2])
    chunks = end // skinny.chunk(weight.bits)
    whole = [i64(size) for size in (256, 4, chunks, across // 64)]
    strides = [i64(size) for size in (256, 1024, 1024 * chunks)]
    sixteens = shape.columns // shape.boxes // 16
    box = (256, min(4, sixteens), shape.down, max(1, sixteens // 4))
    made = code.tensor_map(code.address(weight.values), whole, strides, box, 4, swizzled=False)
    maps = [tirx.address_of(made)]
    for buffer, given in ((weight.scales, weight.group > 0), (weight.zeros, True)):
        if buffer is None or not given:
            maps.append(_nothing())
            continue
        rows = [i64(across), i64(end // weight.group if weight.group else 1)]
        by = (shape.columns, shape.groups)
        made = code.tensor_map(code.address(buffer), rows, rows[:1], by, 2, swizzled=False)
        maps.append(tirx.address_of(made))
    return maps


def _mixed(
    code: GpuCode,
    dtype: str,
    a: Any,
    weight: Weight,
    sizes: tuple[Expr, int, int],
    shape: mixed.Shape,
    down: Expr,
    finish: Finish,
    together: int,
) -> None:
    """On sm_90a, rows of ``down`` tiles: a cluster of blocks, which share K, for each tile."""
    rows, inner, columns = sizes
    text, splits = mixed.source(shape, dtype), shape.splits

    def named(function: str) -> str:
        return mixed.name(shape, dtype, function)

    def small(value: Expr | int) -> Expr:
        return cast(i64(value), "int32")

    down = code.given(down)
    # As many rows for each tile: filling rows with zeros takes longer than copying them.
    high = code.given(idiv(idiv(rows + down - i64(1), down) + i64(7), 8) * i64(8))
    # Products read rows behind the last one, too.
    step = i64(hopper.STEP)
    wide = tirx.max(idiv(high + step - i64(1), step) * step, i64(shape.widths[-1]))
    room = i64(shape.room) - (wide - high) * i64(warpgroup.ROW_BYTES)
    stages = idiv(room, high * i64(2 * shape.deep) + i64(shape.front_bytes))
    stages = code.given(tirx.min(stages, i64(hopper.MOST_STAGES)))
    maps = [
        _slabs(code, a, rows, inner, high, shape.deep),
        *_packed_maps(code, weight, sizes, shape),
    ]
    tiles, steps = -(-columns // shape.columns), -(-inner // shape.deep)
    blocks = i64(tiles * splits) * down
    launch = code.launch(blocks, shape.threads, splits, least=1, waits=False)
    with launch as (block, thread):
        shared = code.address(code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn"))
        code.run(named("start"), text, shared)
        rank, tile = code.bind(imod(block, splits)), code.bind(idiv(block, splits))
        # Tiles of the same columns are side by side.
        top = code.bind(imod(tile, down) * high)
        left = code.bind(idiv(tile, down) * i64(shape.columns))
        first = code.bind(idiv(i64(steps) * rank, splits))
        count = code.bind(idiv(i64(steps) * (rank + i64(1)), splits) - first)

        def copy() -> None:
            places = [small(n) for n in (high, top, left, first, count, stages)]
            code.run(named("produce"), text, shared, *maps, *places)
            code.run(named("meet"), text)

        def multiply() -> None:
            code.run(named("prepare"), text)
            sums = code.address(code.alloc([shape.rows // 2], "float32"))
            numbers = [small(n) for n in (high, count, stages)]
            code.run(named("consume"), text, shared, sums, *numbers)
            code.run(named("put"), text, shared, sums, small(high))
            code.run(named("meet"), text)
            code.run(named("add_up"), text, shared, small(high))
            code.follow()

            def total(row: Expr, column: Expr) -> Expr:
                return code.call(named("total"), text, "float32", shared, row, column)

            def place(row: Expr, column: Expr, *values: Expr) -> None:
                finish(code.bind(top + row), column, *values)

            lines = code.bind(tirx.min(rows - top, high))
            taken, of = (shape.rows, shape.columns, shape.warpgroups), (rank, splits, left)
            added_results(code, thread, taken, of, (lines, i64(columns)), total, place, together)

        code.branch(thread < i64(warpgroup.GROUP), copy, multiply)
        code.run(named("meet"), text)


def _recorded(
    code: GpuCode,
    dtype: str,
    a: Any,
    weight: Weight,
    sizes: tuple[Expr, int, int],
    shape: stream.Shape,
) -> Any:
    """``a`` as pairs of bytes in scratch memory, in whole stages, written by a launch of its own."""
    rows, inner, _ = sizes
    text = stream.source(shape, dtype)
    count = -(-weight.padded(inner) // shape.deep) * (shape.deep // pairs.DEEP)
    made = code.kernel.workspace(i64(count * pairs.RECORD), "uint8")
    with code.launch(i64(count), pairs.THREADS) as (block, _):
        numbers = [cast(item, "int32") for item in (block, rows, i64(inner))]
        front = stream.name(shape, dtype, "front")
        code.run(front, text, code.address(a), code.address(made), *numbers)
    return made


def _loaded(
    code: GpuCode,
    dtype: str,
    a: Any,
    weight: Weight,
    sizes: tuple[Expr, int, int],
    tiles: int,
    finish: Finish,
    together: int,
) -> None:
    """On every GPU: weights into registers."""
    rows, inner, columns = sizes
    text = skinny.source(dtype)
    # Twice the columns halve what a block reads of x, where there are blocks enough.
    wide = 2 if columns >= 4 * PROCESSORS * skinny.COLUMNS else 1
    across = wide * skinny.COLUMNS
    blocks = i64(-(-columns // across))
    with code.launch(blocks, skinny.THREADS, least=2) as (block, thread):
        count = skinny.WARPS * skinny.MOST_ROWS * across
        sums = code.address(code.alloc([count], "float32", scope="shared"))
        pointers = [code.address(a), code.address(weight.values)]
        for buffer in (weight.scales, weight.zeros):
            pointers.append(code.null() if buffer is None else code.address(buffer))
        first = code.bind(block * i64(across))
        numbers = [cast(item, "int32") for item in (rows, i64(inner), i64(weight.padded(inner)))]
        numbers += [cast(item, "int32") for item in (i64(columns), first)]
        product = skinny.name(
            dtype, f"product<{weight.bits}, {tiles}, {wide}, {weight.parameters}>"
        )
        code.run(product, text, *pointers, sums, *numbers)
        code.barrier()
        with code.loop(-(-wide // together), VECTORIZED) as step:
            at = code.bind(step * i64(skinny.THREADS) + thread)
            row, within = (code.bind(op(at, across // together)) for op in (idiv, imod))
            column = code.bind(idiv(first, together) + within)
            # Of one column in two there are threads beyond the last row that has sums.
            with code.when(tirx.And(row < rows, column < i64(columns // together))):
                total = skinny.name(dtype, f"sum<{wide}>")
                places = [within * i64(together) + i64(i) for i in range(together)]
                values = [code.call(total, text, "float32", sums, row, place) for place in places]
                finish(row, column, *map(code.bind, values))


def expanded(
    code: GpuCode, dtype: str, weight: Weight, sizes: tuple[Expr, int, int], beyond: int
) -> Any:
    """A quantized weight as halves [columns, inner] in scratch memory, written by a launch of its own.

    It is made for more rows than ``beyond``. With fewer the memory is not asked for, either.
    """
    rows, inner, columns = sizes
    text = skinny.source(dtype)
    used = tirx.max(tirx.min(rows - i64(beyond), i64(1)), i64(0))
    made = code.kernel.workspace(used * i64(columns * inner - 1) + i64(1), "uint16")
    pieces = packing.padded(columns) * weight.padded(inner) * weight.bits // 128
    with code.loop(pieces, PARALLEL) as piece:
        pointers = [code.address(weight.values), code.address(weight.scales)]
        pointers += [code.null() if weight.zeros is None else code.address(weight.zeros)]
        expand = skinny.name(dtype, f"expand<{weight.bits}, {weight.parameters}>")
        numbers = (i64(inner), i64(weight.padded(inner)), i64(columns), piece)
        code.run(expand, text, *pointers, code.address(made), *numbers)
    return made
