"""Products of tiles on tensor cores: the kernels around :mod:`hopper` and :mod:`ampere`, and what follows.

They are for many rows, or for operands of 8 bits. Few rows of halves are :mod:`few`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tvm import tirx

from netlathe.backends.tvm.cuda import ampere, hopper, operands
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
)

# finish(row, column, sum). Where ``together`` columns of the weight are one of the result: of all of them.
Finish = Callable[..., None]


def warpgroups(
    code: GpuCode,
    shape: hopper.Shape,
    dtype: str,
    a: Any,
    b: Any,
    sizes: tuple[Expr, Expr, Expr],
    finish: Finish,
    together: int = 1,
) -> None:
    """finish(row, column, sum over k of a[row, k] * b[column, k]), on sm_90a.

    ``a`` [rows, inner] and ``b`` [columns, inner] are flat buffers, ``dtype`` is the name of their
    :class:`Operands`; a row is a multiple of 16 bytes. The grid is as large as the GPU; a block walks over
    units, one warpgroup copying ahead while two multiply. Sums are float32, or int32 of integers.
    """
    with unless_empty(code, sizes[0]):
        _warpgroups(code, shape, dtype, a, b, sizes, finish, together)


@contextlib.contextmanager
def unless_empty(code: GpuCode, rows: Expr) -> Iterator[None]:
    """Nothing is launched for no rows: there is no descriptor of nothing."""
    if known(rows):
        yield
    else:
        with code.when(rows > i64(0)):
            yield


def _warpgroups(
    code: GpuCode,
    shape: hopper.Shape,
    dtype: str,
    a: Any,
    b: Any,
    sizes: tuple[Expr, Expr, Expr],
    finish: Finish,
    together: int,
) -> None:
    rows, inner, columns = sizes
    text, kind = hopper.source(shape, dtype), operands.operands(dtype)
    deep = hopper.ROW_BYTES // kind.bytes

    def named(function: str) -> str:
        return hopper.name(shape, dtype, function)

    cluster = shape.cluster
    down = idiv(rows + i64(hopper.ROWS * cluster - 1), hopper.ROWS * cluster)
    across = idiv(columns + i64(shape.columns - 1), shape.columns)
    # The last tiles are halved where no block gets more than one half.
    tiles, most = down * across, i64(PROCESSORS // cluster)
    rest = imod(tiles, most)
    cut = select(rest * i64(hopper.PIECES) <= most, rest, i64(0))
    full, units = tiles - cut, tiles + cut * i64(hopper.PIECES - 1)
    groups = tirx.min(units, most)
    steps = cast(idiv(inner + i64(deep - 1), deep), "int32")
    map_a = code.tensor_map(a, [inner, rows], [inner], (deep, hopper.ROWS), kind.bytes)
    map_b = code.tensor_map(b, [inner, columns], [inner], (deep, shape.box_rows), kind.bytes)
    with code.launch(groups * i64(cluster), hopper.THREADS, cluster, least=1) as (block, thread):
        memory = code.alloc([shape.shared_bytes], "uint8", scope="shared.dyn")
        shared = code.address(memory)
        code.run(named("start"), text, shared)
        first = code.bind(idiv(block, cluster))

        def copy() -> None:
            maps = (tirx.address_of(map_a), tirx.address_of(map_b))
            places = (first, groups, units, full, down, across, steps)
            code.run(named("produce"), text, shared, *maps, *places)

        def multiply() -> None:
            code.run(named("prepare"), text)
            sums = code.alloc([shape.columns // 2], kind.sums)
            with code.loop(idiv(units - first + groups - i64(1), groups)) as number:
                unit = code.bind(first + number * groups)
                all_ = code.bind(unit < full)
                code.run(named("consume"), text, shared, code.address(sums), number, all_, steps)
                top = code.call(named("top"), text, "int64", unit, full, down, across)
                left = code.call(named("left"), text, "int64", unit, full, down, across)
                group = idiv(thread, hopper.GROUP) - i64(1)
                top, left = code.bind(top + group * i64(64)), code.bind(left)
                member = code.bind(imod(thread, hopper.GROUP))

                def results(part: int, inside: bool) -> None:
                    wide = 64 // together
                    first = idiv(left + i64(part * 64), together)
                    with code.loop(64 * wide // hopper.GROUP, VECTORIZED) as step:
                        line = code.bind(step * i64(hopper.GROUP // wide) + idiv(member, wide))
                        at = code.bind(imod(member, wide))
                        row, column = code.bind(top + line), code.bind(first + at)

                        def one() -> None:
                            places = [at * i64(together) + i64(i) for i in range(together)]
                            values = [
                                code.call(named("staged"), text, kind.sums, shared, line, place)
                                for place in places
                            ]
                            finish(row, column, *map(code.bind, values))

                        if inside:
                            one()
                        else:
                            with code.when(tirx.And(row < rows, column < idiv(columns, together))):
                                one()

                # Without conditions loads and stores of all steps may overlap.
                whole = tirx.And(top + i64(64) <= rows, left + i64(shape.columns) <= columns)
                for part in range(shape.columns // 64):
                    there = part < shape.columns // hopper.PIECES // 64  # in a piece, too
                    with contextlib.nullcontext() if there else code.when(all_):
                        code.run(named("stage"), text, shared, code.address(sums, part * 32))
                        code.branch(
                            whole,
                            lambda part=part: results(part, True),  # type: ignore[misc]  # mypy infers no default
                            lambda part=part: results(part, False),  # type: ignore[misc]
                        )
                        code.run(named("unstage"), text)

        code.branch(thread < i64(hopper.GROUP), copy, multiply)
        code.run(named("finish"), text)


def warps(
    code: GpuCode,
    dtype: str,
    a: Any,
    b: Any,
    sizes: tuple[Expr, Expr, Expr],
    finish: Finish,
    together: int = 1,
) -> None:
    """The same on sm_80 and later, a tile of 128 x 128 for each block."""
    rows, inner, columns = sizes
    text = ampere.source(dtype)
    down = idiv(rows + i64(ampere.TILE - 1), ampere.TILE)
    across = idiv(columns + i64(ampere.TILE - 1), ampere.TILE)
    with code.launch(down * across, ampere.THREADS, least=1) as (block, thread):
        memory = code.alloc([ampere.SHARED_BYTES], "uint8", scope="shared.dyn")
        shared = code.address(memory)
        # Neighbouring blocks share columns of b, which is the larger operand.
        top = code.bind(imod(block, down) * i64(ampere.TILE))
        left = code.bind(idiv(block, down) * i64(ampere.TILE))
        pointers = (code.address(a), code.address(b))
        places = (rows, inner, columns, top, left)
        code.run(ampere.name(dtype, "product"), text, shared, *pointers, *places)
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
