"""Products of any kind without tensor cores: any type, any two operands, gathered as they are read.

gemm.blocks   tiles of both operands in shared memory, 4 x 4 results a thread

What tensor cores take is :mod:`tensor`'s and :mod:`few`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tvm import tirx

from netlathe.backends.tvm.cuda.code import THREADS, GpuCode
from netlathe.backends.tvm.cuda.grids import pieces
from netlathe.backends.tvm.tir import (
    VECTORIZED,
    Expr,
    Index,
    cast,
    const,
    i64,
    idiv,
    imod,
    total,
    unflatten,
)

if TYPE_CHECKING:
    from netlathe.backends.tvm.values import Store


def product(
    code: GpuCode,
    batch: Sequence[Expr],
    sizes: tuple[Expr, Expr, Expr],
    dtype: str,
    a: Callable[[Index, Expr, Expr], Expr],
    b: Callable[[Index, Expr, Expr], Expr],
    store: Store,
) -> str:
    """store([*batch, row, column], sum over k of a(batch, row, k) * b(batch, k, column)).

    A block makes 64 x 64 results from tiles of 16 of both operands in shared memory, a thread 4 x 4 of them.
    """
    rows_, inner, columns = sizes
    tile, deep, each = 64, 16, 4
    across = pieces(columns, tile)
    down = pieces(rows_, tile)
    zero = const(0, dtype)
    with code.launch(total(list(batch)) * down * across, THREADS) as (block, thread):
        *where, row_tile, column_tile = (
            code.bind(i) for i in unflatten(block, [*batch, down, across])
        )
        top, left = code.bind(row_tile * i64(tile)), code.bind(column_tile * i64(tile))
        held = {
            name: code.alloc([deep * tile], dtype, scope="shared") for name in ("rows", "columns")
        }
        sums = code.alloc([each * each], dtype)
        with code.loop(each * each, VECTORIZED) as slot:
            code.store(sums, slot, zero)
        y, x = code.bind(idiv(thread, tile // each)), code.bind(imod(thread, tile // each))
        with code.loop(pieces(inner, deep)) as step:
            first = code.bind(step * i64(deep))
            with code.loop(deep * tile // THREADS, VECTORIZED) as part:
                at = code.bind(part * i64(THREADS) + thread)
                line, k = code.bind(idiv(at, deep)), code.bind(imod(at, deep))
                code.store(held["rows"], k * i64(tile) + line, zero)
                with code.when(tirx.And(top + line < rows_, first + k < inner)):
                    value = cast(a(where, top + line, first + k), dtype)
                    code.store(held["rows"], k * i64(tile) + line, value)
                k, line = code.bind(idiv(at, tile)), code.bind(imod(at, tile))
                code.store(held["columns"], at, zero)
                with code.when(tirx.And(left + line < columns, first + k < inner)):
                    value = cast(b(where, first + k, left + line), dtype)
                    code.store(held["columns"], at, value)
            code.barrier()
            with code.loop(deep, VECTORIZED) as k, code.loop(each, VECTORIZED) as i:
                left_value = code.bind(
                    tirx.BufferLoad(held["rows"], [k * i64(tile) + y * i64(each) + i])
                )
                with code.loop(each, VECTORIZED) as j:
                    other = tirx.BufferLoad(held["columns"], [k * i64(tile) + x * i64(each) + j])
                    slot = i * i64(each) + j
                    code.store(sums, slot, tirx.BufferLoad(sums, [slot]) + left_value * other)
            code.barrier()
        with code.loop(each, VECTORIZED) as i, code.loop(each, VECTORIZED) as j:
            row = code.bind(top + y * i64(each) + i)
            column = code.bind(left + x * i64(each) + j)
            with code.when(tirx.And(row < rows_, column < columns)):
                value = tirx.BufferLoad(sums, [i * i64(each) + j])
                store(code, [*where, row, column], value)
    return "gemm.blocks"
