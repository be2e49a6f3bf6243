"""Products of tiles on tensor cores: the kernels around :mod:`hopper` and :mod:`ampere`, and what follows.

They are for many rows, or for operands of 8 bits. Few rows of halves are :mod:`few`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from netlathe.backends.tvm.cuda import ampere, hopper, operands, split, tilings, warpgroup
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.cuda.machine import PROCESSORS
from netlathe.backends.tvm.tir import (
    VECTORIZED,
    Expr,
    cast,
    i64,
    idiv,
    imod,
    known,
    select,
    total,
    unflatten,
)

_UNIT = 16  # tiles begin at multiples of so many columns
MOST_PARTS = 3  # of a matrix's number: what the copy engine has dims for
# finish(row, column, sum). Where ``together`` columns of the weight are one of the result: of all of them.
Finish = Callable[..., None]


@dataclass(frozen=True)
class Side:
    """An operand in memory, from ``pointer`` on: [lines, inner], a line ``pitch`` elements behind the last.

    Where it is ``down``, neighbours are of neighbouring lines: [inner, lines]. Of several matrices ``steps``
    are from one to the next, for each part of a matrix's number; None where one is for all.
    """

    pointer: Expr
    pitch: Expr
    down: bool = False
    steps: tuple[Expr | None, ...] = ()

    def map(
        self,
        code: GpuCode,
        lines: Expr,
        inner: Expr,
        count: Sequence[Expr],
        box: Sequence[Any],
        bytes_: int,
    ) -> Expr:
        """A descriptor of ``count`` matrices for copies of a ``box`` of one, neighbours first."""
        numbered = [
            (n, step) for n, step in zip(count, self.steps, strict=True) if step is not None
        ]
        sizes = [lines, inner] if self.down else [inner, lines]
        sizes += [n for n, _ in numbered]
        strides = [self.pitch, *(step for _, step in numbered)]
        return code.tensor_map(self.pointer, sizes, strides, (*box, *(1 for _ in numbered)), bytes_)

    def numbers(self, where: Sequence[Expr]) -> list[Expr]:
        """Those parts of a matrix's number that there are different matrices for."""
        return [at for at, step in zip(where, self.steps, strict=True) if step is not None]

    def offset(self, where: Sequence[Expr]) -> Expr:
        """How far into memory a matrix begins."""
        place = i64(0)
        for at, step in zip(where, self.steps, strict=True):
            place = place if step is None else place + at * step
        return place


@dataclass(frozen=True)
class Batch:
    """Several products, numbered by ``parts``; ``finish(number)`` is what follows one of them."""

    parts: Sequence[Expr]
    finish: Callable[[Expr], Finish]


def warpgroups(
    code: GpuCode,
    dtype: str,
    a: Any,
    b: Any,
    sizes: tuple[Expr, Expr, Expr],
    finish: Finish,
    together: int = 1,
    constant: bool = True,
    scattered: bool = False,
) -> None:
    """finish(row, column, sum over k of a[row, k] * b[column, k]), on sm_90a.

    ``a`` [rows, inner] and ``b`` [columns, inner] are flat buffers, ``dtype`` is the name of their
    :class:`Operands`; a row is a multiple of 16 bytes. Only rows may be known at run time alone. ``b`` may be
    read before the kernels in front have ended if it is ``constant``. Sums are float32, or int32 of integers.
    Neighbouring results are stored together unless they are ``scattered``: they may go to different tensors.
    """
    kind, inner, columns = operands.operands(dtype), known(sizes[1]), known(sizes[2])
    assert inner is not None and columns is not None
    rows, given = sizes[0], (dtype, a, b, sizes, finish, together)
    left, right = (Side(code.address(x), sizes[1]) for x in (a, b))

    def one_tile(most: int) -> None:
        _split(code, split.chosen(kind, most, columns, inner), *given, constant)

    def tiles(shape: hopper.Shape, down: Expr) -> None:
        one = Batch((), lambda _: finish)
        how = (together, not scattered, constant, down)
        _tiles(code, shape, dtype, left, right, sizes, one, *how)

    def up_to(most: Sequence[int]) -> None:
        """One tile of up to the first that holds all rows, or several."""
        number = known(rows)
        if not most:
            found = hopper.tiled(kind, columns, inner, split.rows_of(kind)[-1])
            tilings.looked_up(code, rows, found, hopper.rows_of, tiles)
        elif number is None:
            code.branch(rows <= i64(most[0]), lambda: one_tile(most[0]), lambda: up_to(most[1:]))
        elif number <= most[0]:
            one_tile(most[0])
        else:
            up_to(most[1:])

    with unless_empty(code, rows):
        up_to(split.rows_of(kind))


@contextlib.contextmanager
def unless_empty(code: GpuCode, rows: Expr) -> Iterator[None]:
    """Nothing is launched for no rows: there is no descriptor of nothing."""
    if known(rows):
        yield
    else:
        with code.when(rows > i64(0)):
            yield


def _tiles(
    code: GpuCode,
    shape: hopper.Shape,
    dtype: str,
    a: Side,
    b: Side,
    sizes: tuple[Expr, Expr, Expr],
    batch: Batch,
    together: int = 1,
    vectors: bool = True,
    constant: bool = False,
    down: Expr | None = None,
) -> None:
    """Many rows. The grid is as large as the GPU; a block walks over units, one warpgroup copying ahead."""
    rows, inner, columns = sizes
    text, kind = hopper.source(shape, dtype), operands.operands(dtype)
    deep = warpgroup.ROW_BYTES // kind.bytes

    def named(function: str) -> str:
        return hopper.name(shape, dtype, function)

    cluster = shape.cluster
    if down is None:
        down = idiv(rows + i64(shape.rows * cluster - 1), shape.rows * cluster)
    down = code.given(down)
    # Rows of a block: as many for each. The copy engine takes longer to write zeros than to copy.
    blocks = down * i64(cluster)
    high = code.given(idiv(idiv(rows + blocks - i64(1), blocks) + i64(7), 8) * i64(8))
    across = code.given(idiv(columns + i64(shape.columns - 1), shape.columns))
    # The last tiles are halved where no block gets more than one half.
    tiles, most = down * across * total(list(batch.parts)), i64(PROCESSORS // cluster)
    rest = imod(tiles, most)
    cut = select(rest * i64(shape.pieces) <= most, rest, i64(0))
    full, units = code.given(tiles - cut), code.given(tiles + cut * i64(shape.pieces - 1))
    groups = code.given(tirx.min(units, most))
    steps = cast(idiv(inner + i64(deep - 1), deep), "int32")
    stages = i64(shape.stages)
    if shape.turned:
        held = idiv(i64(shape.room), (high + i64(shape.columns)) * i64(warpgroup.ROW_BYTES))
        stages = code.given(tirx.min(held, i64(shape.most_stages)))
    box_a = (warpgroup.PART, deep) if a.down else (deep, high)
    box_b = (warpgroup.PART, deep // cluster) if b.down else (deep, shape.box_rows)
    sides = (a, b)
    maps = (
        a.map(code, rows, inner, batch.parts, box_a, kind.bytes),
        b.map(code, columns, inner, batch.parts, box_b, kind.bytes),
    )
    ways = [str(side.down).lower() for side in sides]
    ranks = [2 + sum(step is not None for step in side.steps) for side in sides]
    # The left operand of products, and then the right one.
    order = (1, 0) if shape.turned else (0, 1)
    produce = f"produce<{', '.join(f'{ranks[i]}, {ways[i]}' for i in order)}>"
    launch = code.launch(groups * i64(cluster), shape.threads, cluster, least=1, waits=not constant)
    with launch as (block, thread):
        memory = code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn")
        shared = code.address(memory)
        staging = warpgroup.Staging(code, shared, shape.stages * shape.stage_bytes, shape.turned)
        code.run(named("start"), text, shared)
        first = code.bind(idiv(block, cluster))

        def placed(function: str, unit: Expr, *more: Expr) -> Expr:
            places = (unit, full, down, across, *more)
            return code.bind(code.call(named(function), text, "int64", *places))

        def matrix(unit: Expr) -> Expr:
            return placed("matrix", unit) if batch.parts else i64(0)

        def across_of(unit: Expr) -> Expr:
            """Columns of a unit."""
            whole = i64(shape.columns)
            return select(unit < full, whole, idiv(whole, shape.pieces))

        def copy() -> None:
            code.run(named("retire"), text)
            turns = code.loop(idiv(units - first + groups - i64(1), groups))
            with code.when(thread < i64(1)), turns as number:
                unit = code.bind(first + number * groups)
                corner = [placed("top", unit, high), placed("left", unit)]
                corner = [corner[i] for i in order]
                where = [code.bind(at) for at in unflatten(matrix(unit), batch.parts)]
                for i in order:
                    numbers = sides[i].numbers(where)
                    corner += [*numbers, *(i64(0) for _ in range(MOST_PARTS - len(numbers)))]
                maps_ = [tirx.address_of(maps[i]) for i in order]
                lines = [high, across_of(unit)]
                places = [*(lines[i] for i in order), steps, stages, *corner]
                places = [cast(at, "int32") for at in places]
                code.run(named(produce), text, shared, *maps_, number, *places)

        def multiply() -> None:
            code.run(named("prepare"), text)
            code.run(named("begin"), text, steps)
            sums = code.alloc([shape.right // 2], kind.sums)
            with code.loop(idiv(units - first + groups - i64(1), groups)) as number:
                unit = code.bind(first + number * groups)
                all_ = code.bind(unit < full)
                consume = named(f"consume<{', '.join(ways[i] for i in order)}>")
                wide = (high, across_of(unit))[order[1]]
                numbers = (cast(wide, "int32"), steps, cast(stages, "int32"))
                code.run(consume, text, shared, code.address(sums), number, *numbers)
                if constant:
                    code.follow()
                finish = batch.finish(matrix(unit))
                top = placed("top", unit, high)
                end = code.bind(tirx.min(top + high, rows))
                group = idiv(thread, warpgroup.GROUP) - i64(1)
                left = code.bind(idiv(placed("left", unit), _UNIT))

                def part(row: Expr, most: int, column: Expr) -> Callable[[int, int, bool], None]:
                    """What takes those of up to ``most`` rows from ``row`` on."""
                    row = code.bind(row)
                    lines = code.bind(tirx.max(tirx.min(end - row, i64(most)), i64(0)))
                    corner = (row, lines, code.bind(column), columns)
                    how = (finish, together, vectors)
                    return _results(code, kind.sums, staging, thread, corner, *how)

                if shape.turned:
                    own = left + group * i64(warpgroup.PART // _UNIT)

                    def some(line: int, most: int, _: bool) -> None:
                        part(top + i64(line), most, own)(0, warpgroup.PART, False)

                    def there(line: int) -> Expr | None:
                        """That the unit has this row."""
                        return top + i64(line) < end if line else None

                    staging.bring_out(sums, shape.right, None, some, there)
                else:
                    put = part(top + group * i64(warpgroup.PART), warpgroup.PART, left)

                    def beyond(begin: int) -> Expr | None:
                        """That the unit has this part, where half a tile has not."""
                        return None if begin < shape.columns // shape.pieces else all_

                    staging.bring_out(sums, shape.right, None, put, beyond)
            code.run(named("end"), text, steps)

        code.branch(thread < i64(warpgroup.GROUP), copy, multiply)
        code.run(named("finish"), text)


def _results(
    code: GpuCode,
    sums: str,
    staging: warpgroup.Staging,
    thread: Expr,
    corner: tuple[Expr, Expr, Expr, Expr],
    finish: Finish,
    together: int,
    vectors: bool,
) -> Callable[[int, int, bool], None]:
    """What takes a part of results, sums of this type, from ``staging``: see :class:`warpgroup.Staging`.

    ``corner``: the first row, how many there are, the first column in units of 16, how many the weight has.
    """
    top, lines, left, columns = corner
    member = code.bind(imod(thread, warpgroup.GROUP))

    def part(begin: int, across: int, _: bool) -> None:
        def rows(lanes: int) -> int:
            """Of the part that the warpgroup takes in one step, if each thread takes so many results."""
            return warpgroup.GROUP * lanes * together // across

        def step(line: Expr, lanes: int, checked: bool) -> None:
            """Those from ``line`` on; ``checked``, where they are there."""
            threads = across // together // lanes  # to a row
            down = code.bind(line + idiv(member, threads))
            at = code.bind(imod(member, threads)) * i64(lanes)
            row = code.bind(top + down)
            # Columns are sums without a name: vectors must see what they are multiples of.
            column = left * i64(_UNIT // together) + i64(begin // together) + at
            if lanes > 1:
                held = code.alloc([lanes * together], sums)
                vector = staging.at(f"{sums}x{lanes * together}", down, at * i64(together))
                code.vstore(held, 0, vector, lanes * together)
                with code.lanes(lanes) as lane:
                    places = [lane * i64(together) + i64(i) for i in range(together)]
                    finish(row, column + lane, *(tirx.BufferLoad(held, [n]) for n in places))
                return
            column = code.bind(column)
            there = tirx.And(down < lines, column < idiv(columns, together))
            with code.when(there) if checked else contextlib.nullcontext():
                places = [at * i64(together) + i64(i) for i in range(together)]
                values = [staging.at(sums, down, place) for place in places]
                finish(row, column, *map(code.bind, values))

        lanes = 4 // together if vectors else 1

        def whole() -> None:
            with code.loop(warpgroup.PART // rows(lanes), VECTORIZED) as number:
                step(number * i64(rows(lanes)), lanes, False)

        def fewer() -> None:
            """Rows up to one that, in all blocks but the last, is a multiple of 8."""
            with code.loop(idiv(lines, rows(lanes))) as number:
                step(number * i64(rows(lanes)), lanes, False)
            begun = code.bind(idiv(lines, rows(lanes)) * i64(rows(lanes)))
            with code.loop(idiv(lines - begun + i64(rows(1) - 1), rows(1))) as number:
                step(begun + number * i64(rows(1)), 1, True)

        def inside() -> None:
            code.branch(lines < i64(warpgroup.PART), fewer, whole)

        def partly() -> None:
            with code.loop(warpgroup.PART // rows(1)) as number:
                step(number * i64(rows(1)), 1, True)

        code.branch(left * i64(_UNIT) + i64(begin + across) <= columns, inside, partly)

    return part


def _split(
    code: GpuCode,
    shape: split.Shape,
    dtype: str,
    a: Any,
    b: Any,
    sizes: tuple[Expr, Expr, Expr],
    finish: Finish,
    together: int,
    constant: bool,
) -> None:
    """Rows of one tile. A cluster of blocks for each tile, which share K."""
    rows, inner, columns = sizes
    text, kind = split.source(shape, dtype), operands.operands(dtype)
    deep, splits = warpgroup.ROW_BYTES // kind.bytes, shape.splits

    def named(function: str) -> str:
        return hopper.name(shape, dtype, function)

    def int32(value: Expr) -> Expr:
        return cast(value, "int32")

    tiles = idiv(columns + i64(shape.columns - 1), shape.columns)
    steps = idiv(inner + i64(deep - 1), deep)
    high = idiv(rows + i64(7), 8) * i64(8)  # filling rows with zeros takes longer than copying them
    sides = [Side(code.address(x), inner) for x in (a, b)]
    map_a = sides[0].map(code, rows, inner, (), (deep, high), kind.bytes)
    map_b = sides[1].map(code, columns, inner, (), (deep, shape.columns), kind.bytes)
    launch = code.launch(tiles * i64(splits), shape.threads, splits, least=1, waits=not constant)
    with launch as (block, thread):
        shared = code.address(code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn"))
        code.run(named("start_part"), text, shared, int32(high))
        rank = code.bind(imod(block, splits))
        left = code.bind(idiv(block, splits) * i64(shape.columns))
        first = code.bind(idiv(steps * rank, splits))
        count = code.bind(idiv(steps * (rank + i64(1)), splits) - first)

        def copy() -> None:
            maps = (tirx.address_of(map_a), tirx.address_of(map_b))
            places = [int32(n) for n in (high, left, first, count)]
            code.run(named("produce_part"), text, shared, *maps, *places)
            code.run(named("meet"), text)

        def multiply() -> None:
            code.run(named("prepare"), text)
            sums = code.alloc([shape.columns // 2], kind.sums)
            group = idiv(thread, warpgroup.GROUP) - i64(1)
            with code.when(group * i64(warpgroup.PART) < high):
                pointer, wide = code.address(sums), i64(shape.columns)
                consume = named("consume<false, false>")
                stages = i64(shape.stages)
                numbers = [i64(0), *(int32(n) for n in (wide, count, stages))]
                code.run(consume, text, shared, pointer, *numbers)
            code.run(named("put"), text, shared, code.address(sums))
            code.run(named("meet"), text)
            code.run(named("add_up"), text, shared, int32(high))
            if constant:
                code.follow()

            def total(row: Expr, column: Expr) -> Expr:
                return code.call(named("total"), text, kind.sums, shared, row, column)

            tile, place = (shape.rows, shape.columns, shape.warpgroups), (rank, splits, left)
            added_results(code, thread, tile, place, (rows, columns), total, finish, together)

        code.branch(thread < i64(warpgroup.GROUP), copy, multiply)
        code.run(named("meet"), text)


def added_results(
    code: GpuCode,
    thread: Expr,
    tile: tuple[int, int, int],
    place: tuple[Expr, int, Expr],
    sizes: tuple[Expr, Expr],
    total: Callable[[Expr, Expr], Expr],
    finish: Finish,
    together: int,
) -> None:
    """finish(row, column, sum) for a block's share of a tile whose sums :func:`split.adding` has added up.

    ``tile``: most rows, columns, and the warpgroups behind the first, which do this. ``place``: which of how
    many blocks it is, that have every so-manyth row, and the first column.
    """
    (most, across, warpgroups), (rank, splits, left), (rows, columns) = tile, place, sizes
    warp = code.bind(idiv(thread - i64(warpgroup.GROUP), 32))
    lane, wide = code.bind(imod(thread, 32)), across // together
    begin, warps = code.bind(idiv(left, together)), warpgroups * warpgroup.GROUP // 32

    def results(inside: bool) -> None:
        with code.loop(-(-most // warps // splits), VECTORIZED) as turn:
            row = code.bind((turn * i64(warps) + warp) * i64(splits) + rank)
            with code.when(row < rows), code.loop(-(-wide // 32), VECTORIZED) as step:
                at = code.bind(step * i64(32) + lane)
                column = code.bind(begin + at)

                def one() -> None:
                    places = [at * i64(together) + i64(i) for i in range(together)]
                    finish(row, column, *(code.bind(total(row, place)) for place in places))

                if inside and wide % 32 == 0:
                    one()
                else:
                    fits = column < idiv(columns, together)
                    with code.when(tirx.And(at < i64(wide), fits)):
                        one()

    whole = left + i64(across) <= columns
    code.branch(whole, lambda: results(True), lambda: results(False))


def of_matrices(
    code: GpuCode,
    dtype: str,
    a: Side,
    b: Side,
    sizes: tuple[Expr, Expr, Expr],
    batch: Batch,
) -> None:
    """batch.finish(number)(row, column, sum over k of a[number, row, k] * b[number, column, k]).

    Halves, of any sizes; lines and matrices begin at multiples of 16 bytes.
    """
    if not code.has_wgmma:
        _warps(code, dtype, a, b, sizes, batch)
        return
    rows, inner, columns, count = (known(size) for size in (*sizes, total(list(batch.parts))))
    shape = hopper.for_sizes(operands.operands(dtype), rows, inner, columns, count, b.down)
    _tiles(code, shape, dtype, a, b, sizes, batch)


def warps(
    code: GpuCode,
    dtype: str,
    a: Any,
    b: Any,
    sizes: tuple[Expr, Expr, Expr],
    finish: Finish,
    together: int = 1,
) -> None:
    """The same on sm_80 and later."""
    sides = [Side(code.address(x), sizes[1]) for x in (a, b)]
    _warps(code, dtype, sides[0], sides[1], sizes, Batch((), lambda _: finish), together)


def _warps(
    code: GpuCode,
    dtype: str,
    a: Side,
    b: Side,
    sizes: tuple[Expr, Expr, Expr],
    batch: Batch,
    together: int = 1,
) -> None:
    """A tile of 128 x 128 for each block."""
    rows, inner, columns = sizes
    text = ampere.source(dtype)
    down = idiv(rows + i64(ampere.TILE - 1), ampere.TILE)
    across = idiv(columns + i64(ampere.TILE - 1), ampere.TILE)
    matrices = total(list(batch.parts))
    with code.launch(matrices * down * across, ampere.THREADS, least=1) as (block, thread):
        memory = code.alloc([ampere.SHARED_BYTES], "uint8", scope="shared.dyn")
        shared = code.address(memory)
        # Neighbouring blocks share columns of b, which is the larger operand.
        matrix, over, line = (code.bind(i) for i in unflatten(block, [matrices, across, down]))
        top, left = (code.bind(i * i64(ampere.TILE)) for i in (line, over))
        where = [code.bind(at) for at in unflatten(matrix, batch.parts)]
        lying = [x for side in (a, b) for x in (side.pointer, side.offset(where), side.pitch)]
        ways = ", ".join(str(side.down).lower() for side in (a, b))
        code.run(
            ampere.name(dtype, f"product<{ways}>"),
            text,
            shared,
            *lying,
            rows,
            inner,
            columns,
            top,
            left,
        )
        finish = batch.finish(matrix)
        tile_results(code, dtype, shared, thread, (top, left), (rows, columns), finish, together)


def tile_results(
    code: GpuCode,
    dtype: str,
    shared: Expr,
    thread: Expr,
    first: tuple[Expr, Expr],
    sizes: tuple[Expr, Expr],
    finish: Finish,
    together: int = 1,
) -> None:
    """finish(row, column, sum) for what a block of :mod:`ampere` left in shared memory."""
    (top, left), (rows, columns) = first, sizes
    text, kind = ampere.source(dtype), operands.operands(dtype)
    wide = ampere.TILE // together
    with code.loop(ampere.TILE * wide // ampere.THREADS) as step:
        at = code.bind(step * i64(ampere.THREADS) + thread)
        line, within = code.bind(idiv(at, wide)), code.bind(imod(at, wide))
        row, column = code.bind(top + line), code.bind(idiv(left, together) + within)
        with code.when(tirx.And(row < rows, column < idiv(columns, together))):
            places = [within * i64(together) + i64(i) for i in range(together)]
            total = ampere.name(dtype, "sum")
            values = [code.call(total, text, kind.sums, shared, line, place) for place in places]
            finish(row, column, *map(code.bind, values))
