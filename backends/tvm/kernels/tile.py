"""The register tile that products are made of: some rows of A by some vectors of B, summed in registers.

B comes in panels as wide as the tile. A tile goes down the rows; the last one starts early enough to be
whole: a few rows are computed twice, to the same values, and no tile needs a condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tvm import tirx

from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.tir import Code, Expr, broadcast, cast, i64, idiv, known

# Sums of a tile of one row that are kept apart, to hide the latency of the addition.
_CHAINS = 4
_LATENCY = 4  # cycles of a multiply-add; two start in each cycle
_CACHE_BYTES = 16  # that a level-2 cache gives in a cycle: panels of B do not stay in level 1
_SETS_BYTES, _WAYS = 4096, 8  # of a level-1 cache: lines so far apart share a set, of so many lines
_MOST_ROWS = 14
_USUAL_ROWS = 64  # where nothing is known: sequences are often a multiple of some power of two


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

    @property
    def last(self) -> int:
        """Columns of the last panel."""
        return self.columns - (self.count - 1) * self.width


def panels(
    machine: Machine, columns: int, dtype: str, rows: int | None = None, apart: int = 0
) -> Panels:
    """The cut that takes the fewest cycles; ``rows`` is None where only the run knows how many there are.

    ``apart`` is how many bytes lie between rows of A, or 0 if that does not matter: where it is a multiple of
    4 KiB, all rows of a tile share one set of the level-1 cache, and are fewer than its ways then.
    """
    lanes = machine.lanes(dtype)
    while lanes > 4 and lanes >= 2 * columns:
        lanes //= 2
    whole = max(1, -(-columns // lanes))
    most = _MOST_ROWS if rows is None else min(_MOST_ROWS, max(rows, 1))
    if apart:  # one way is left to B
        most = min(most, (_WAYS - 1) * _SETS_BYTES // math.gcd(apart, _SETS_BYTES))

    def cycles(shape: tuple[int, int]) -> float:
        """Of one step along K, for all rows and columns."""
        height, count = shape
        down = math.ceil((_USUAL_ROWS if rows is None else max(rows, 1)) / height)
        step = partial(_step, machine.vector_bytes, height)
        return down * (whole // count * step(count) + step(whole % count))

    shapes = [
        (height, count)
        for count in range(1, 5)
        for height in range(1, most + 1)
        # Sums, a vector of B for each, and an element of A.
        if height * count + count + 1 <= machine.registers and count <= whole
    ]
    height, count = min(shapes, key=cycles)
    return Panels(columns, lanes, count, height)


def _step(vector_bytes: int, height: int, count: int) -> float:
    """Cycles of one step along K: two multiply-adds or loads start in each, and each takes a while."""
    if not count:
        return 0.0
    loads = count + height
    read = count * vector_bytes / _CACHE_BYTES
    return max(height * count / 2, loads / 2, _LATENCY, read) + 0.02 * loads


def by_rows(
    code: Code, rows: Expr, tile_rows: int, tasks: Callable[[int], None], at_least: int = 0
) -> None:
    """Tiles of ``tile_rows``, or of 4 or 1 where there are fewer rows than that.

    There are none, or ``at_least`` as many as that.
    """
    number = known(rows)
    if number is not None:
        tasks(next(size for size in (tile_rows, 4, 1) if size <= max(number, 1)))
        return
    if at_least >= tile_rows:
        tasks(tile_rows)
        return
    few = lambda: code.branch(rows >= i64(4), lambda: tasks(4), lambda: tasks(1))  # noqa: E731
    code.branch(rows >= i64(tile_rows), lambda: tasks(tile_rows), few)


@dataclass(frozen=True)
class Arithmetic:
    """How a tile multiplies ``dtype``: ``step`` neighbours along K at once, from flat buffers."""

    dtype: str
    step: int
    element: Callable[[Code, Any, Expr], Expr]  # of A, from a position on
    vector: Callable[[Code, Any, Expr, int], Expr]  # of B, from a position on, so many columns
    add: Callable[[Expr, Expr, Expr], Expr]  # sums, A's element in each lane, B


def plain(dtype: str) -> Arithmetic:
    """One product at a time, in ``dtype``."""
    return Arithmetic(
        dtype,
        1,
        lambda code, buffer, at: cast(tirx.BufferLoad(buffer, [at]), dtype),
        lambda code, buffer, at, lanes: code.vload(buffer, at, lanes),
        _multiply_add,
    )


def _multiply_add(held: Expr, a: Expr, b: Expr) -> Expr:
    return held + a * b


def _four_bytes(code: Code, buffer: Any, at: Expr) -> Expr:
    return tirx.reinterpret("int32", code.vload(buffer, at, 4))


def _add_dots(held: Expr, a: Expr, b: Expr) -> Expr:
    """vpdpbusd: to each 32-bit lane, four products of an unsigned byte of ``a`` and a signed one of ``b``."""
    lanes = int(str(held.ty.dtype).partition("x")[2])
    bits = 32 * lanes
    return tirx.call_llvm_pure_intrin(
        f"int32x{lanes}",
        f"llvm.x86.avx512.vpdpbusd.{bits}",
        held,
        tirx.reinterpret(f"int8x{4 * lanes}", a),
        b,
    )


DOTS = Arithmetic(
    "int32",
    4,
    _four_bytes,
    lambda code, buffer, at, lanes: code.vload(buffer, at, 4 * lanes),
    _add_dots,
)


@dataclass
class Tiles:
    """One product, summed over all indices below ``extents``: how operands are read, where results go."""

    code: Code
    lanes: int
    dtype: str
    extents: Sequence[Expr]
    rows: Expr
    element: Callable[[Expr, list[Expr]], Expr]  # of A, in a row and at an index of the sum
    finish: Callable[[Expr, Expr, Expr], None]  # row, column, result
    add: Callable[[Expr, Expr, Expr], Expr] = _multiply_add  # sums, A's element in each lane, B
    _results: Any = field(default=None, init=False)  # the tile on its way out

    def down(
        self,
        tile_rows: int,
        first: Expr,
        end: Expr,
        column: Expr,
        count: int,
        width: Expr | None,
        vector: Callable[[list[Expr], int], Expr],
    ) -> None:
        """Tiles of ``count`` vectors down the rows [first, end); ``width`` columns of the last are real.

        ``vector`` gives a vector of B.
        """
        code = self.code
        self._results = code.alloc([tile_rows * count * self.lanes], self.dtype, scope="global")
        steps = idiv(end - first + i64(tile_rows - 1), i64(tile_rows))
        with code.loop(steps) as step:
            row = first + step * i64(tile_rows)
            if tile_rows > 1:
                row = tirx.min(row, self.rows - i64(tile_rows))
            self._tile(tile_rows, code.bind(row), column, count, width, vector)

    def panel(
        self,
        tile_rows: int,
        first: Expr,
        end: Expr,
        cut: Panels,
        number: Expr,
        vector: Callable[[list[Expr], int], Expr],
    ) -> None:
        """:meth:`down` for panel ``number`` of a cut whose last panel may be narrower."""
        column = self.code.bind(number * i64(cut.width))

        def whole() -> None:
            self.down(tile_rows, first, end, column, cut.vectors, None, vector)

        def last() -> None:
            count = -(-cut.last // self.lanes)
            self.down(tile_rows, first, end, column, count, i64(cut.last), vector)

        if cut.columns % cut.width == 0:
            whole()
        elif cut.count == 1:
            last()
        else:
            self.code.branch(number < i64(cut.count - 1), whole, last)

    def _tile(
        self,
        tile_rows: int,
        row: Expr,
        column: Expr,
        count: int,
        width: Expr | None,
        vector: Callable[[list[Expr], int], Expr],
    ) -> None:
        code, lanes = self.code, self.lanes
        chains = _CHAINS if tile_rows == 1 else 1
        sums = code.registers(chains * tile_rows * count, lanes, self.dtype)

        def accumulate(index: list[Expr], chain: int) -> None:
            b = [code.bind(vector(index, number)) for number in range(count)]
            for i in range(tile_rows):
                a = broadcast(self.element(row + i64(i), index), lanes)
                for number in range(count):
                    held = sums[(chain * tile_rows + i) * count + number]
                    code.vstore(held, 0, self.add(code.vload(held, 0, lanes), a, b[number]), lanes)

        def inner(outer: list[Expr]) -> None:
            extent = self.extents[-1]
            if chains == 1:
                with code.loop(extent) as k:
                    accumulate([*outer, k], 0)
                return
            whole = code.bind(idiv(extent, i64(chains)))
            with code.loop(whole) as block:
                for chain in range(chains):
                    with code.scope():
                        accumulate([*outer, block * i64(chains) + i64(chain)], chain)
            with code.loop(extent - whole * i64(chains)) as k:
                accumulate([*outer, whole * i64(chains) + k], 0)

        def outer_loops(index: list[Expr]) -> None:
            if len(index) == len(self.extents) - 1:
                inner(index)
                return
            with code.loop(self.extents[len(index)]) as at:
                outer_loops([*index, at])

        outer_loops([])
        self._finish(tile_rows, row, column, count, width, sums, chains)

    def _finish(
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
        code, lanes, results = self.code, self.lanes, self._results
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
