"""One row times a constant matrix, as fast as the matrix is read; gemm.packed comes here for one row.

Every block of rows of a quantized matrix that share their scales is summed with plain numbers, and
scaled once. Several sums of each vector are kept apart, to hide the latency of the addition.

Numbers of 4 bits lie eight to a 32-bit word, those of consecutive rows of one column; a column's word
is one lane. Where a table of 16 floats fits a register, one instruction looks them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.kernels.tile import Panels
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Code,
    Expr,
    broadcast,
    cast,
    const,
    i64,
    ramp,
)

WORD = 8  # numbers of 4 bits in a word
AHEAD = 2048  # bytes
_CHAINS = 2
_F = "float32"


def ask(code: Code, buffer: Any, at: Expr) -> None:
    """Ask for a cache line before it is read: what the CPU asks for by itself ends with each page."""
    address = tirx.address_of(tirx.BufferLoad(buffer, [at]))
    numbers = (const(number, "int32") for number in (0, 3, 1))  # to read, to all levels, data
    code.emit(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *numbers)))


def nibbles(machine: Machine, dtype: ir.DataType, words: Expr, place: Expr, lanes: int) -> Expr:
    """The 4-bit numbers at a place (int32, 0 to 7) of words, as float32."""
    shifted = words >> broadcast(place * const(4, "int32"), lanes)
    if machine.vector_bytes == 64 and lanes == 16:
        entry = cast(ramp(0, 16), "int32x16")
        table = cast(_signed(entry, lanes) if dtype == ir.DataType.INT4 else entry, "float32x16")
        return tirx.call_llvm_pure_intrin(
            "float32x16", "llvm.x86.avx512.permvar.sf.512", table, shifted
        )
    low = shifted & broadcast(const(15, "int32"), lanes)
    wide = _F if lanes == 1 else f"{_F}x{lanes}"
    return cast(_signed(low, lanes) if dtype == ir.DataType.INT4 else low, wide)


def _signed(value: Expr, lanes: int) -> Expr:
    eight = broadcast(const(8, "int32"), lanes)
    return (value ^ eight) - eight


def single(
    code: Code,
    cut: Panels,
    inner: int,
    block: int,
    step: int,
    element: Callable[[Expr], Expr],
    numbers: Callable[[Expr, Expr, int], Callable[[int], Expr]],
    scale: Callable[[Expr, Expr, int], Expr] | None,
    zero: Callable[[Expr, Expr, int], Expr] | None,
    ahead: Callable[[Expr, Expr], None],
    finish: Callable[[Expr, Expr], None],
) -> None:
    """finish(column, sum over k of a[k] * (q[k, column] - zero) * scale).

    ``element(k)`` is a's; ``numbers(panel, k, vector)`` gives the numbers of the ``step`` rows from k on in
    a vector of the panel, by row; ``scale`` and ``zero`` take (panel, block, vector). ``block``, a multiple
    of ``step``, is how many rows share their scales. ``ahead(panel, k)`` asks for numbers that come later.
    """
    lanes, count = cut.lanes, cut.vectors
    with code.loop(i64(cut.count), PARALLEL) as panel:
        sums = code.registers(count, lanes, _F)
        with code.loop(i64(inner // block)) as number:
            chains = min(_CHAINS, step) if step > 1 else 1
            parts = code.registers(chains * count, lanes, _F)
            whole = code.registers(1, 1, _F)  # the sum of a, where zero points need it
            with code.loop(i64(block // step)) as at:
                first = code.bind(number * i64(block) + at * i64(step))
                ahead(panel, first)
                rows = [numbers(panel, first, vector) for vector in range(count)]
                for place in range(step):
                    a = code.bind(element(first + i64(place)))
                    if zero is not None:
                        code.vstore(whole[0], 0, code.vload(whole[0], 0, 1) + a, 1)
                    for vector in range(count):
                        held = parts[(place % chains) * count + vector]
                        value = code.vload(held, 0, lanes) + broadcast(a, lanes) * rows[vector](
                            place
                        )
                        code.vstore(held, 0, value, lanes)
            for vector in range(count):
                part = code.vload(parts[vector], 0, lanes)
                for chain in range(1, chains):
                    part = part + code.vload(parts[chain * count + vector], 0, lanes)
                if zero is not None:
                    offset = broadcast(code.vload(whole[0], 0, 1), lanes)
                    part = part - offset * zero(panel, number, vector)
                if scale is not None:
                    part = part * scale(panel, number, vector)
                code.vstore(sums[vector], 0, code.vload(sums[vector], 0, lanes) + part, lanes)
        results = code.alloc([cut.width], _F, scope="global")
        for vector in range(count):
            code.vstore(results, vector * lanes, code.vload(sums[vector], 0, lanes), lanes)
        column = code.bind(panel * i64(cut.width))

        def one(j: Expr) -> None:
            finish(column + j, tirx.BufferLoad(results, [j]))

        def part_of_it() -> None:
            vectors(code, i64(cut.last), lanes, one)

        def all_of_it() -> None:
            vectors(code, i64(cut.width), lanes, one)

        if cut.columns % cut.width == 0:
            all_of_it()
        else:
            code.branch(panel < i64(cut.count - 1), all_of_it, part_of_it)
