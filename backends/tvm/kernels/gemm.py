"""Matrix products by register tiles (:mod:`netlathe.backends.tvm.kernels.tile`).

gemm.packed    B is a constant, packed at compile time as [panels, K, width]
gemm.dots      both are bytes: four products at a time, summed in int32
gemm.batched   B is computed: each task packs its panel, then runs down the rows

Tasks (row block, panel) run in parallel; a task goes down its rows a tile at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import gemv, limbs
from netlathe.backends.tvm.kernels.tile import DOTS, Panels, Tiles, by_rows, panels
from netlathe.backends.tvm.tir import (
    PARALLEL,
    VECTORIZED,
    Code,
    Expr,
    broadcast,
    cast,
    const,
    flat_index,
    i64,
    idiv,
    imod,
    known,
    select,
    unflatten,
)
from netlathe.backends.tvm.values import Ready, Store, Value

# Bytes of A that one task works on: most of a level-2 cache.
_BLOCK_BYTES = 3 << 18
_ROW_BLOCKS = (32, 512)  # the least and the most rows of a task
_LINE = 64  # bytes of a cache line
_WORKERS = 4  # threads that get equal shares
_FEW_PANELS = 16  # which do not see to that by themselves


_Load = Callable[
    [Expr], Callable[[list[Expr], int], Expr]
]  # panel -> (index, vector) -> its elements


@dataclass(frozen=True)
class Weight:
    """A packed constant: [panels, K, width], and for a quantized one its scales and zero points.

    These are [panels, blocks, width] in float32, one block for every ``block`` rows of K. With one block
    in all, the scale is applied to the sums, else to every element. ``words`` says how values lie in words,
    which are int32 [panels, K / words.rows, width].
    """

    values: Ready
    scales: Ready | None = None
    zeros: Ready | None = None
    block: int = 0
    blocks: int = 1
    words: gemv.Words | None = None


def packed(
    kernel: Kernel,
    a: Ready,
    weight: Weight,
    cut: Panels,
    lead: list[Expr],
    inner: int,
    store: Store,
    at_least: int = 0,
) -> str:
    """store([*lead, column], sum over k of a[row, k] * weight); ``a`` is [rows, inner].

    There are no rows, or ``at_least`` so many.
    """
    code = kernel.code
    rows = kernel.size(a.shape[0])
    dtype = storage.computed(a.dtype)
    read_b = kernel.read(weight.values)
    machine = kernel.lowering.machine
    item = np.dtype(storage.STORED[weight.values.dtype]).itemsize
    layout = weight.words
    deep = 1 if layout is None else layout.rows  # rows of K in one of the panel's
    panel_rows = inner // deep

    def of_block(buffer: Ready, k: Expr, panel: Expr, number: int) -> Expr:
        """The scales or zero points of a vector of the panel, in row k."""
        block = idiv(k, weight.block) if weight.blocks > 1 else i64(0)
        row = panel * i64(weight.blocks) + block
        at = row * i64(cut.width) + i64(number * cut.lanes)
        return code.vload(kernel.read(buffer), at, cut.lanes)

    def stored(panel: Expr, k: Expr, number: int) -> Expr:
        """Where a vector of the panel lies in row k; rows of words count as one."""
        return (panel * i64(panel_rows) + k) * i64(cut.width) + i64(number * cut.lanes)

    def load(panel: Expr) -> Callable[[list[Expr], int], Expr]:
        def vector(index: list[Expr], number: int) -> Expr:
            at = code.bind(stored(panel, index[0], number))
            if cut.lanes * item == _LINE and layout is None:
                gemv.ask(code, read_b, at + i64(gemv.AHEAD // item))
            held = code.vload(read_b, at, cut.lanes)
            k = index[0]
            if layout is not None:
                k = index[0] * i64(deep) + index[1]
                value = layout.numbers(machine, held, cast(index[1], "int32"), cut.lanes)
            else:
                value = storage.load_vector(weight.values.dtype, held, dtype, cut.lanes)
            if weight.zeros is not None:
                value = value - of_block(weight.zeros, k, panel, number)
            if weight.scales is not None and weight.blocks > 1:
                value = value * of_block(weight.scales, k, panel, number)
            return value

        return vector

    def element(row: Expr, index: list[Expr]) -> Expr:
        k = index[0] if layout is None else index[0] * i64(deep) + index[1]
        return a.at(code, [row, k])

    def finish(row: Expr, column: Expr, value: Expr) -> None:
        if weight.scales is not None and weight.blocks == 1:
            value = value * tirx.BufferLoad(kernel.read(weight.scales), [column])
        store(code, [*unflatten(row, lead), column], value)

    extents = [i64(inner)] if layout is None else [i64(panel_rows), i64(deep)]
    job = Tiles(code, cut.lanes, dtype, extents, rows, element, finish)

    def unpacked(panel: Expr) -> Callable[[list[Expr], int], Expr]:
        """The panel as floats in the cache, for many rows."""
        held = code.alloc([inner * cut.width], dtype, scope="global")
        get = load(panel)

        def unpack(index: list[Expr]) -> None:
            k = flat_index(index, extents)
            for number in range(cut.vectors):
                at = k * i64(cut.width) + i64(number * cut.lanes)
                code.vstore(held, at, get(index, number), cut.lanes)

        with code.loop(panel_rows) as k:
            if layout is None:
                unpack([k])
            else:
                with code.loop(deep) as place:
                    unpack([k, place])
        return lambda index, number: code.vload(
            held, index[0] * i64(cut.width) + i64(number * cut.lanes), cut.lanes
        )

    def whole(row: Expr, index: list[Expr]) -> Expr:
        return a.at(code, [row, index[0]])

    floats = Tiles(code, cut.lanes, dtype, [i64(inner)], rows, whole, finish)

    def many() -> None:
        in_cache = (floats, unpacked) if weight.scales is not None else None
        _tasks(job, cut, 4 * inner, load, at_least, in_cache)

    block = weight.block or inner
    if dtype != "float32" or not block or block % gemv.STEP or inner % block or at_least > 1:
        many()
        return "gemm.packed"

    def words(panel: Expr, k: Expr, number: int) -> Expr:
        return code.vload(read_b, stored(panel, idiv(k, deep), number), cut.lanes)

    def numbers(panel: Expr, k: Expr, number: int) -> Callable[[int], Expr]:
        if (packed := layout) is not None:
            held = [
                code.bind(words(panel, k + i64(first), number))
                for first in range(0, gemv.STEP, deep)
            ]
            return lambda place: packed.numbers(
                machine, held[place // deep], const(place % deep, "int32"), cut.lanes
            )
        return lambda place: storage.load_vector(
            weight.values.dtype,
            code.vload(read_b, stored(panel, k + i64(place), number), cut.lanes),
            dtype,
            cut.lanes,
        )

    def block_of(buffer: Ready | None) -> Callable[[Expr, Expr, int], Expr] | None:
        if buffer is None:
            return None
        return lambda panel, number, vector: of_block(buffer, number * i64(block), panel, vector)

    def ahead(panel: Expr, k: Expr) -> None:
        for line in range(-(-gemv.STEP // deep * cut.width * item // _LINE)):
            start = stored(panel, idiv(k, deep), 0)
            gemv.ask(code, read_b, start + i64((line * _LINE + gemv.AHEAD) // item))

    def single() -> None:
        scales = block_of(weight.scales) if weight.blocks > 1 else None
        first = lambda k: a.at(code, [i64(0), k])  # noqa: E731
        give = lambda column, value: finish(i64(0), column, value)  # noqa: E731
        if layout is not None and machine.dot_bytes:
            limbs.single(
                code,
                cut,
                inner,
                block,
                layout,
                first,
                words,
                scales,
                block_of(weight.zeros),
                give,
            )
            return
        gemv.single(
            code,
            cut,
            inner,
            block,
            first,
            numbers,
            scales,
            block_of(weight.zeros),
            ahead,
            give,
        )

    number = known(rows)
    if number is None:
        code.branch(rows == i64(1), single, many)
    elif number == 1:
        single()
    else:
        many()
    return "gemm.packed"


def dots(
    kernel: Kernel,
    a: Ready,
    weight: Ready,
    cut: Panels,
    lead: list[Expr],
    inner: int,
    store: Store,
    at_least: int = 0,
) -> str:
    """store([*lead, column], sum over k of a[row, k] * weight) in int32.

    ``a`` is unsigned bytes [rows, inner], ``weight`` signed ones [panels, inner / 4, width, 4].
    """
    code = kernel.code
    rows = kernel.size(a.shape[0])
    left, right = kernel.read(a), kernel.read(weight)

    def load(panel: Expr) -> Callable[[list[Expr], int], Expr]:
        base = code.bind(panel * i64(inner * cut.width))

        def vector(index: list[Expr], number: int) -> Expr:
            at = base + (index[0] * i64(cut.width) + i64(number * cut.lanes)) * i64(4)
            return DOTS.vector(code, right, at, cut.lanes)

        return vector

    def element(row: Expr, index: list[Expr]) -> Expr:
        return DOTS.element(code, left, row * i64(inner) + index[0] * i64(4))

    def finish(row: Expr, column: Expr, value: Expr) -> None:
        store(code, [*unflatten(row, lead), column], value)

    job = Tiles(code, cut.lanes, "int32", [i64(inner // 4)], rows, element, finish, DOTS.add)
    _tasks(job, cut, inner, load, at_least)
    return "gemm.dots"


def _tasks(
    job: Tiles,
    cut: Panels,
    row_bytes: int,
    load: _Load,
    at_least: int,
    in_cache: tuple[Tiles, _Load] | None = None,
) -> None:
    """All blocks of rows and panels; ``load`` gives the vectors of a panel.

    Where there are rows for whole tiles, ``in_cache`` is taken for both.
    """
    code, rows = job.code, job.rows

    def panel_tasks(tile_rows: int) -> None:
        size = code.bind(_row_block(rows, row_bytes, tile_rows, cut.count))
        blocks = idiv(rows + size - i64(1), size)
        with code.loop(blocks * i64(cut.count), PARALLEL) as task:
            block = code.bind(idiv(task, i64(cut.count)))
            panel = code.bind(imod(task, i64(cut.count)))
            first = code.bind(block * size)
            end = code.bind(tirx.min(first + size, rows))
            tiles, get = (job, load) if in_cache is None or tile_rows < cut.rows else in_cache
            tiles.panel(tile_rows, first, end, cut, panel, get(panel))

    by_rows(code, rows, cut.rows, panel_tasks, at_least)


def _row_block(rows: Expr, row_bytes: int, tile_rows: int, panels: int) -> Expr:
    """Rows of A that one task works on: whole tiles, and of all blocks about as many.

    Each thread takes equally many tasks, one after the other. So where there are few panels, and enough
    rows, blocks are as many as make the tasks a multiple of four, for as many threads or fewer.
    """
    least, most = _ROW_BLOCKS
    fitting = max(least, min(most, _BLOCK_BYTES // max(row_bytes, 1)))
    fitting = max(fitting // tile_rows, 1) * tile_rows
    tiles = tirx.max(idiv(rows + i64(tile_rows - 1), tile_rows), i64(1))
    blocks = tirx.max(idiv(rows + i64(fitting - 1), fitting), i64(1))
    together = _WORKERS // math.gcd(_WORKERS, panels)
    if panels < _FEW_PANELS and together > 1:
        even = idiv(blocks + i64(together - 1), together) * i64(together)
        blocks = select(tiles >= i64(3) * even, even, blocks)
    return idiv(tiles + blocks - i64(1), blocks) * i64(tile_rows)


def batched(
    kernel: Kernel, a: Value, b: Value, cut: Panels | None, batch: list[Expr], store: Store
) -> str:
    """store([*batch, row, column], product); ``a`` is [*batch, rows, inner], ``b`` [*batch, inner, columns].

    ``cut.columns`` does not matter: the number of columns may be a size of the model.
    """
    assert cut is not None
    code = kernel.code
    rows, inner = kernel.size(a.shape[-2]), kernel.size(a.shape[-1])
    columns = kernel.size(b.shape[-1])
    dtype = storage.computed(a.dtype)
    width = cut.width
    count = code.bind(idiv(columns + i64(width - 1), i64(width)))
    total = count
    for dim in batch:
        total = total * dim

    def tasks(tile_rows: int) -> None:
        with code.loop(total, PARALLEL) as task:
            where = [code.bind(i) for i in unflatten(idiv(task, count), batch)]
            column = code.bind(imod(task, count) * i64(width))
            panel = code.alloc([inner * i64(width)], dtype, scope="global")
            _pack_panel(code, b, where, inner, column, columns, cut, panel, dtype)

            def vector(index: list[Expr], number: int) -> Expr:
                return code.vload(panel, index[0] * i64(width) + i64(number * cut.lanes), cut.lanes)

            def element(row: Expr, index: list[Expr]) -> Expr:
                return a.at(code, [*where, row, *index])

            def finish(row: Expr, column: Expr, value: Expr) -> None:
                store(code, [*where, row, column], value)

            job = Tiles(code, cut.lanes, dtype, [inner], rows, element, finish)
            left = code.bind(columns - column)

            def down(width: Expr | None) -> None:
                job.down(tile_rows, i64(0), rows, column, cut.vectors, width, vector)

            code.branch(left >= i64(width), lambda: down(None), lambda: down(left))

    by_rows(code, rows, cut.rows, tasks)
    return "gemm.batched"


def _pack_panel(
    code: Code,
    b: Value,
    where: list[Expr],
    inner: Expr,
    column: Expr,
    columns: Expr,
    cut: Panels,
    panel: object,
    dtype: str,
) -> None:
    width = cut.width
    with code.loop(inner) as k:

        def whole() -> None:
            for number in range(cut.vectors):
                with code.loop(cut.lanes, VECTORIZED) as lane:
                    at = i64(number * cut.lanes) + lane
                    value = b.at(code, [*where, k, column + at])
                    code.store(panel, k * i64(width) + at, value)

        def part() -> None:
            for number in range(cut.vectors):
                start = k * i64(width) + i64(number * cut.lanes)
                code.vstore(panel, start, broadcast(const(0, dtype), cut.lanes), cut.lanes)
            with code.loop(columns - column) as at:
                code.store(panel, k * i64(width) + at, b.at(code, [*where, k, column + at]))

        code.branch(columns - column >= i64(width), whole, part)


__all__ = ["Panels", "Weight", "batched", "dots", "packed", "panels"]
