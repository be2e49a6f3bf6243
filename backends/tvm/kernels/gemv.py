"""One row times a constant matrix, as fast as the matrix is read; gemm.packed comes here for one row.

Every block of rows of a quantized matrix that share their scales is summed with plain numbers, and
scaled once. Several sums of each vector are kept apart, to hide the latency of the addition.

Numbers of 4 bits lie eight to a 32-bit word, those of consecutive rows of one column; a column's word
is one lane. Where a table of 16 floats fits a register, one instruction looks them up. Where bytes have dot
products, :mod:`netlathe.backends.tvm.kernels.limbs` does it, and numbers of 8 bits lie four to a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

STEP = 8  # rows taken at once
AHEAD = 2048  # bytes
_CHAINS = 2
_F = "float32"


def ask(code: Code, buffer: Any, at: Expr) -> None:
    """Ask for a cache line before it is read: what the CPU asks for by itself ends with each page."""
    address = tirx.address_of(tirx.BufferLoad(buffer, [at]))
    numbers = (const(number, "int32") for number in (0, 3, 1))  # to read, to all levels, data
    code.emit(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *numbers)))


@dataclass(frozen=True)
class Words:
    """Numbers of 4 or 8 bits in 32-bit words, unsigned: signed ones have half their range added.

    Of 8 bits rows k to k + 3 are the bytes; of 4 bits they are the low halves of the bytes, and the
    next four the high ones.
    """

    dtype: ir.DataType

    @property
    def bits(self) -> int:
        """Of one number."""
        return 8 if self.dtype in (ir.DataType.INT8, ir.DataType.UINT8) else 4

    @property
    def rows(self) -> int:
        """Numbers in a word."""
        return 32 // self.bits

    @property
    def offset(self) -> int:
        """What was added."""
        signed = self.dtype in (ir.DataType.INT4, ir.DataType.INT8)
        return 1 << (self.bits - 1) if signed else 0

    def numbers(self, machine: Machine, words: Expr, place: Expr, lanes: int) -> Expr:
        """The numbers of row ``place`` (int32, below :attr:`rows`) of words, as float32."""
        four = const(4, "int32")
        shift = tirx.truncmod(place, four) * const(8, "int32")
        if self.bits == 4:
            shift = shift + tirx.truncdiv(place, four) * four
        shifted = words >> broadcast(shift, lanes)
        offset = broadcast(const(self.offset, "int32"), lanes)
        if self.bits == 4 and machine.vector_bytes == 64 and lanes == 16:
            table = cast(cast(ramp(0, 16), "int32x16") - offset, "float32x16")
            return tirx.call_llvm_pure_intrin(
                "float32x16", "llvm.x86.avx512.permvar.sf.512", table, shifted
            )
        low = shifted & broadcast(const((1 << self.bits) - 1, "int32"), lanes)
        return cast(low - offset, _F if lanes == 1 else f"{_F}x{lanes}")


def single(
    code: Code,
    cut: Panels,
    inner: int,
    block: int,
    element: Callable[[Expr], Expr],
    numbers: Callable[[Expr, Expr, int], Callable[[int], Expr]],
    scale: Callable[[Expr, Expr, int], Expr] | None,
    zero: Callable[[Expr, Expr, int], Expr] | None,
    ahead: Callable[[Expr, Expr], None],
    finish: Callable[[Expr, Expr], None],
) -> None:
    """finish(column, sum over k of a[k] * (q[k, column] - zero) * scale).

    ``element(k)`` is a's; ``numbers(panel, k, vector)`` gives the numbers of the STEP rows from k on in
    a vector of the panel, by row; ``scale`` and ``zero`` take (panel, block, vector). ``block``, a multiple
    of STEP, is how many rows share their scales. ``ahead(panel, k)`` asks for numbers that come later.
    """
    lanes, count = cut.lanes, cut.vectors
    with code.loop(i64(cut.count), PARALLEL) as panel:
        sums = code.registers(count, lanes, _F)
        with code.loop(i64(inner // block)) as number:
            parts = code.registers(_CHAINS * count, lanes, _F)
            whole = code.registers(1, 1, _F)  # the sum of a, where zero points need it
            with code.loop(i64(block // STEP)) as at:
                first = code.bind(number * i64(block) + at * i64(STEP))
                ahead(panel, first)
                rows = [numbers(panel, first, vector) for vector in range(count)]
                for place in range(STEP):
                    a = code.bind(element(first + i64(place)))
                    if zero is not None:
                        code.vstore(whole[0], 0, code.vload(whole[0], 0, 1) + a, 1)
                    for vector in range(count):
                        held = parts[(place % _CHAINS) * count + vector]
                        value = code.vload(held, 0, lanes) + broadcast(a, lanes) * rows[vector](
                            place
                        )
                        code.vstore(held, 0, value, lanes)
            for vector in range(count):
                part = code.vload(parts[vector], 0, lanes)
                for chain in range(1, _CHAINS):
                    part = part + code.vload(parts[chain * count + vector], 0, lanes)
                if zero is not None:
                    offset = broadcast(code.vload(whole[0], 0, 1), lanes)
                    part = part - offset * zero(panel, number, vector)
                if scale is not None:
                    part = part * scale(panel, number, vector)
                code.vstore(sums[vector], 0, code.vload(sums[vector], 0, lanes) + part, lanes)
        hand_on(code, cut, panel, sums, finish)


def hand_on(
    code: Code, cut: Panels, panel: Expr, sums: Sequence[Any], finish: Callable[[Expr, Expr], None]
) -> None:
    """finish(column, sum) for the columns of a panel, from a copy in memory."""
    lanes = cut.lanes
    results = code.alloc([cut.width], _F, scope="global")
    for vector, held in enumerate(sums):
        code.vstore(results, vector * lanes, code.vload(held, 0, lanes), lanes)
    column = code.bind(panel * i64(cut.width))

    def one(j: Expr) -> None:
        finish(column + j, tirx.BufferLoad(results, [j]))

    def part() -> None:
        vectors(code, i64(cut.last), lanes, one)

    def whole() -> None:
        vectors(code, i64(cut.width), lanes, one)

    if cut.columns % cut.width == 0:
        whole()
    else:
        code.branch(panel < i64(cut.count - 1), whole, part)
