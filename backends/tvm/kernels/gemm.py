"""Matrix products: a register tile of accumulators, B in panels as wide as the tile.

gemm.packed    B is a constant, packed at compile time as [panels, K, width]
gemm.batched   B is computed: each task packs its panel, then runs down the rows

Tasks (row block, panel) run in parallel; a task goes down its rows a tile at a time. The last tile of
the rows starts early enough to be whole: a few rows are computed twice, to the same values, and no
tile needs a condition. Fewer rows than a tile has take tiles of 4 rows or 1. See
:meth:`netlathe.backends.tvm.machine.Machine.tile` for the tile's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.tir import (
    PARALLEL,
    VECTORIZED,
    Code,
    Expr,
    broadcast,
    const,
    i64,
    idiv,
    imod,
    known,
    unflatten,
)
from netlathe.backends.tvm.values import Ready, Store, Value

# Rows of A that one task works on: with K = 1536 in float32 they fill most of a level-2 cache.
_ROW_BLOCK = 128
# Products of a tile of one row that are summed apart, to hide the latency of the addition.
_CHAINS = 4


@dataclass(frozen=True)
class Panels:
    """How the columns of B are cut: ``count`` panels of ``vectors`` * ``lanes`` columns."""

    columns: int
    lanes: int
    vectors: int
    rows: int  # of the register tile

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.lanes

    @property
    def count(self) -> int:
        """Panels, the last one perhaps partly zero."""
        return -(-self.columns // self.width)


def panels(machine: Machine, columns: int, dtype: str) -> Panels:
    """The cut for so many columns of a computed dtype."""
    lanes = machine.lanes(dtype)
    while lanes > 4 and lanes >= 2 * columns:
        lanes //= 2
    rows, count = machine.tile(max(1, -(-columns // lanes)))
    return Panels(columns, lanes, count, rows)


@dataclass(frozen=True)
class Weight:
    """A packed constant: [panels, K, width], and for a quantized one its scales and zero points.

    These are [panels, blocks, width] in float32, one block for every ``block`` rows of K. With one block
    in all, the scale is applied to the sums, else to every element.
    """

    values: Ready
    scales: Ready | None = None
    zeros: Ready | None = None
    block: int = 0
    blocks: int = 1


def packed(
    kernel: Kernel,
    a: Ready,
    weight: Weight,
    cut: Panels,
    lead: list[Expr],
    inner: int,
    store: Store,
) -> str:
    """store([*lead, column], sum over k of a[row, k] * weight); ``a`` is [rows, inner]."""
    code = kernel.code
    rows = kernel.size(a.shape[0])
    dtype = storage.computed(a.dtype)
    read_b = kernel.read(weight.values)
    panel_size = inner * cut.width

    def of_block(buffer: Ready, k: Expr, panel: Expr, number: int) -> Expr:
        """The scales or zero points of a vector of the panel, in row k."""
        block = idiv(k, weight.block) if weight.blocks > 1 else i64(0)
        row = panel * i64(weight.blocks) + block
        at = row * i64(cut.width) + i64(number * cut.lanes)
        return code.vload(kernel.read(buffer), at, cut.lanes)

    def load(panel: Expr) -> Callable[[Expr, int], Expr]:
        base = code.bind(panel * i64(panel_size))

        def vector(k: Expr, number: int) -> Expr:
            start = base + k * i64(cut.width) + i64(number * cut.lanes)
            stored = code.vload(read_b, start, cut.lanes)
            value = storage.load_vector(weight.values.dtype, stored, dtype, cut.lanes)
            if weight.zeros is not None:
                value = value - of_block(weight.zeros, k, panel, number)
            if weight.scales is not None and weight.blocks > 1:
                value = value * of_block(weight.scales, k, panel, number)
            return value

        return vector

    def element(row: Expr, k: Expr) -> Expr:
        return a.at(code, [row, k])

    def finish(row: Expr, column: Expr, value: Expr) -> None:
        if weight.scales is not None and weight.blocks == 1:
            value = value * tirx.BufferLoad(kernel.read(weight.scales), [column])
        store(code, [*unflatten(row, lead), column], value)

    job = _Job(code, cut, dtype, i64(inner), rows, element, finish)

    def panel_tasks(tile_rows: int) -> None:
        blocks = idiv(rows + i64(_ROW_BLOCK - 1), i64(_ROW_BLOCK))
        with code.loop(blocks * i64(cut.count), PARALLEL) as task:
            block = code.bind(idiv(task, i64(cut.count)))
            panel = code.bind(imod(task, i64(cut.count)))
            first = code.bind(block * i64(_ROW_BLOCK))
            end = code.bind(tirx.min(first + i64(_ROW_BLOCK), rows))
            column = code.bind(panel * i64(cut.width))

            def whole() -> None:
                job.rows_of_tiles(tile_rows, first, end, column, cut.vectors, None, load(panel))

            def last() -> None:
                width = cut.columns - (cut.count - 1) * cut.width
                count = -(-width // cut.lanes)
                job.rows_of_tiles(tile_rows, first, end, column, count, i64(width), load(panel))

            if cut.columns % cut.width == 0:
                whole()
            elif cut.count == 1:
                last()
            else:
                code.branch(panel < i64(cut.count - 1), whole, last)

    _by_rows(code, rows, cut.rows, panel_tasks)
    return "gemm.packed"


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

            def vector(k: Expr, number: int) -> Expr:
                return code.vload(panel, k * i64(width) + i64(number * cut.lanes), cut.lanes)

            def element(row: Expr, k: Expr) -> Expr:
                return a.at(code, [*where, row, k])

            def finish(row: Expr, column: Expr, value: Expr) -> None:
                store(code, [*where, row, column], value)

            job = _Job(code, cut, dtype, inner, rows, element, finish)
            left = code.bind(columns - column)
            code.branch(
                left >= i64(width),
                lambda: job.rows_of_tiles(
                    tile_rows, i64(0), rows, column, cut.vectors, None, vector
                ),
                lambda: job.rows_of_tiles(
                    tile_rows, i64(0), rows, column, cut.vectors, left, vector
                ),
            )

    _by_rows(code, rows, cut.rows, tasks)
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


def _by_rows(code: Code, rows: Expr, tile_rows: int, tasks: Callable[[int], None]) -> None:
    """Tiles of ``tile_rows``, or of 4 or 1 where there are fewer rows than that."""
    number = known(rows)
    if number is not None:
        fitting = [size for size in (tile_rows, 4, 1) if size <= max(number, 1)]
        tasks(fitting[0])
        return
    few = lambda: code.branch(rows >= i64(4), lambda: tasks(4), lambda: tasks(1))  # noqa: E731
    code.branch(rows >= i64(tile_rows), lambda: tasks(tile_rows), few)


@dataclass
class _Job:
    """One product: how its operands are read and where results go."""

    code: Code
    cut: Panels
    dtype: str
    inner: Expr
    rows: Expr
    element: Callable[[Expr, Expr], Expr]  # (row, k) of A
    finish: Callable[[Expr, Expr, Expr], None]  # row, column, result
    results: Any = None  # the tile on its way out

    def rows_of_tiles(
        self,
        tile_rows: int,
        first: Expr,
        end: Expr,
        column: Expr,
        count: int,
        width: Expr | None,
        vector: Callable[[Expr, int], Expr],
    ) -> None:
        """Tiles of ``count`` vectors down the rows [first, end); ``width`` columns of the last are real."""
        code = self.code
        self.results = code.alloc([tile_rows * count * self.cut.lanes], self.dtype, scope="global")
        steps = idiv(end - first + i64(tile_rows - 1), i64(tile_rows))
        with code.loop(steps) as step:
            row = first + step * i64(tile_rows)
            if tile_rows > 1:
                row = tirx.min(row, self.rows - i64(tile_rows))
            self._tile(tile_rows, code.bind(row), column, count, width, vector)

    def _tile(
        self,
        tile_rows: int,
        row: Expr,
        column: Expr,
        count: int,
        width: Expr | None,
        vector: Callable[[Expr, int], Expr],
    ) -> None:
        code, lanes = self.code, self.cut.lanes
        chains = _CHAINS if tile_rows == 1 else 1
        sums = code.registers(chains * tile_rows * count, lanes, self.dtype)

        def accumulate(k: Expr, chain: int) -> None:
            b = [code.bind(vector(k, number)) for number in range(count)]
            for i in range(tile_rows):
                a = broadcast(self.element(row + i64(i), k), lanes)
                for number in range(count):
                    held = sums[(chain * tile_rows + i) * count + number]
                    code.vstore(held, 0, code.vload(held, 0, lanes) + a * b[number], lanes)

        if chains == 1:
            with code.loop(self.inner) as k:
                accumulate(k, 0)
        else:
            whole = code.bind(idiv(self.inner, i64(chains)))
            with code.loop(whole) as block:
                for chain in range(chains):
                    with code.scope():
                        accumulate(block * i64(chains) + i64(chain), chain)
            with code.loop(self.inner - whole * i64(chains)) as k:
                accumulate(whole * i64(chains) + k, 0)
        self._finish_tile(tile_rows, row, column, count, width, sums, chains)

    def _finish_tile(
        self,
        tile_rows: int,
        row: Expr,
        column: Expr,
        count: int,
        width: Expr | None,
        sums: list[Any],
        chains: int,
    ) -> None:
        """Hand the results on from a copy in memory.

        Indexing the sums by a variable would keep them in memory themselves.
        """
        code, lanes, results = self.code, self.cut.lanes, self.results
        span = count * lanes
        for slot in range(tile_rows * count):
            value = code.vload(sums[slot], 0, lanes)
            for chain in range(1, chains):
                value = value + code.vload(sums[chain * tile_rows * count + slot], 0, lanes)
            code.vstore(results, slot * lanes, value, lanes)
        with code.loop(tile_rows) as i:
            at = code.bind(row + i)

            def one(j: Expr) -> None:
                value = tirx.BufferLoad(results, [i * i64(span) + j])
                self.finish(at, column + j, value)

            vectors(code, i64(span) if width is None else width, lanes, one)


__all__ = ["Panels", "batched", "packed", "panels"]
