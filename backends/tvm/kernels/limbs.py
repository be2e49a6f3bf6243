"""One row times a constant matrix of 4 or 8 bits, by dot products of bytes, all but as exact as float32.

What one row costs is unpacking: a number in float32 takes three instructions a vector of 16, more than
memory takes to deliver them. So numbers stay bytes, and the row becomes bytes: every ``chunk`` of it is

    x = 2^e (2^16 x_2 + 2^8 x_1 + x_0)          x_2, x_1, x_0 signed bytes, |x| < 2^(e + 22)

rounded to a multiple of 2^e, where e follows from the largest of the chunk: an element is off by at most
2^-22 of that one. Each product with a byte is then exact, and so are the sums: K. Ozaki, T. Ogita, S. Oishi,
S. M. Rump, Numerical Algorithms 59 (2012), 95, split matrices like this for the same reason. The
instruction wants one operand unsigned, so signed weights are stored with 8 or 128 added, which the sums of x
take off again.

A chunk whose largest element is below 2^-95 counts as if it were that; one that holds an infinity or NaN
makes the result NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from netlathe.backends.tvm.kernels import gemv
from netlathe.backends.tvm.kernels.tile import DOTS, Panels
from netlathe.backends.tvm.tir import PARALLEL, Code, Expr, broadcast, cast, const, i64, idiv

LIMBS = 3
_BITS = 21  # of the chunk's largest power of two; its largest element has one more, and a sign
_LEAST = 32  # the least exponent of a chunk, as float32 stores it
_MOST = 128  # elements of a chunk: their sums of products, times 2^8, fit 32 bits
_STEP = 8  # chunks are a multiple of this
_FEW = 16  # panels, of which one more or less is much
_WIDE_ROWS = 6  # of a tile of four vectors, where there are several rows: 24 sums
_ROUNDER = 1.5 * 2**23
_F = "float32"


def chunk(block: int) -> int:
    """How many elements of the row share an exponent: a part of ``block``; 0 if there is none."""
    fitting = [size for size in range(_STEP, _MOST + 1, _STEP) if block % size == 0]
    return max(fitting, default=0)


def shared(usual: Panels) -> Panels:
    """``usual``, or wider panels where those are few and odd in number: two threads then do the same each."""
    wide = Panels(usual.columns, usual.lanes, 4, _WIDE_ROWS)
    if usual.count > _FEW or usual.count % 2 == 0 or wide.count % 2 or wide.last != wide.width:
        return usual
    return wide


class Row:
    """The row in limbs, made when this is: bytes [limb, k], sums [chunk, limb], factors [chunk]."""

    def __init__(
        self, code: Code, inner: int, size: int, offset: int, element: Callable[[Expr], Expr]
    ) -> None:
        self.code, self.inner, self.size = code, inner, size
        self.chunks = inner // size
        self.bytes = code.alloc([LIMBS * inner], "int8", scope="global")
        self.starts = code.alloc([LIMBS * self.chunks], "int32", scope="global")
        self.sums = code.alloc([self.chunks], _F, scope="global")
        self.factors = code.alloc([self.chunks], _F, scope="global")
        lanes = 16 if size % 16 == 0 else _STEP
        with code.loop(i64(self.chunks)) as number:
            self._split(number, lanes, offset, element)

    def _split(
        self, number: Expr, lanes: int, offset: int, element: Callable[[Expr], Expr]
    ) -> None:
        """One chunk; its sums start at -``offset`` times that of x."""
        code = self.code
        word = f"int32x{lanes}"
        first = code.bind(number * i64(self.size))
        parts = range(self.size // lanes)

        def all_(value: float, dtype: str) -> Expr:
            return broadcast(const(value, dtype), lanes)

        values = code.alloc([self.size], _F)
        largest = code.alloc([lanes], "int32")
        code.vstore(largest, 0, all_(0, "int32"), lanes)
        for part in parts:
            with code.loop(lanes, tirx.ForKind.VECTORIZED) as lane:
                at = i64(part * lanes) + lane
                code.store(values, at, element(first + at))
            # As integers the magnitudes have the same order, and NaN is the largest.
            bits = tirx.reinterpret(word, code.vload(values, part * lanes, lanes))
            magnitude = bits & all_(0x7FFFFFFF, "int32")
            code.vstore(largest, 0, tirx.max(code.vload(largest, 0, lanes), magnitude), lanes)
        top = code.bind(_across("smax", code.vload(largest, 0, lanes), lanes))
        exponent = code.bind(tirx.max(top >> const(23, "int32"), const(_LEAST, "int32")))

        def power(biased: Expr) -> Expr:
            return tirx.reinterpret(_F, biased << const(23, "int32"))

        up = code.bind(power(const(254 + _BITS, "int32") - exponent))
        down = power(exponent - const(_BITS, "int32"))
        finite = exponent < const(255, "int32")
        down = tirx.Select(finite, down, const(float("nan"), _F))
        code.store(self.factors, number, down)
        sums = code.registers(LIMBS, lanes, "int32")
        for part in parts:
            scaled = code.vload(values, part * lanes, lanes) * broadcast(up, lanes)
            rounded = (scaled + all_(_ROUNDER, _F)) - all_(_ROUNDER, _F)
            rest = code.bind(tirx.Cast(word, rounded))
            for limb in range(LIMBS):
                low = rest
                if limb + 1 < LIMBS:  # the last byte, with its sign
                    shift = all_(24, "int32")
                    low = code.bind((rest << shift) >> shift)
                code.vstore(sums[limb], 0, code.vload(sums[limb], 0, lanes) + low, lanes)
                at = i64(limb * self.inner + part * lanes) + first
                code.vstore(self.bytes, at, tirx.Cast(f"int8x{lanes}", low), lanes)
                rest = code.bind((rest - low) >> all_(8, "int32"))
        whole = const(0.0, _F)
        for limb in range(LIMBS):
            found = code.bind(_across("add", code.vload(sums[limb], 0, lanes), lanes))
            start = found * const(-offset, "int32")
            code.store(self.starts, number * i64(LIMBS) + i64(limb), start)
            whole = whole + cast(found, _F) * const(float(256**limb), _F)
        code.store(self.sums, number, whole)

    def four(self, limb: int, k: Expr, lanes: int) -> Expr:
        """The bytes k to k + 3, in each lane."""
        return tirx.reinterpret(
            f"int8x{4 * lanes}",
            broadcast(DOTS.element(self.code, self.bytes, i64(limb * self.inner) + k), lanes),
        )


def _across(name: str, vector: Expr, lanes: int) -> Expr:
    """All lanes of a vector of int32 combined."""
    return tirx.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.{name}.v{lanes}i32", vector)


def single(
    code: Code,
    cut: Panels,
    inner: int,
    block: int,
    layout: gemv.Words,
    element: Callable[[Expr], Expr],
    words: Callable[[Expr, Expr, int], Expr],
    scale: Callable[[Expr, Expr, int], Expr] | None,
    zero: Callable[[Expr, Expr, int], Expr] | None,
    finish: Callable[[Expr, Expr], None],
) -> None:
    """finish(column, sum over k of a[k] * (u[k, column] - offset - zero) * scale).

    ``element(k)`` is a's. ``words(panel, k, vector)`` gives the words that begin with row k in the columns
    of a vector; u are their numbers as ``layout`` has them, with its offset. ``scale`` and ``zero`` take
    (panel, block, vector); ``block`` rows, of which :func:`chunk` must know a part, share them. Nothing
    is asked for ahead: measured, that only delays what is computed.
    """
    lanes, count = cut.lanes, cut.vectors
    size = chunk(block)
    row = Row(code, inner, size, layout.offset, element)
    halves = range(layout.rows // 4)

    def dots(held: list[Any], panel: Expr, k: Expr) -> None:
        loaded = [code.bind(words(panel, k, vector)) for vector in range(count)]
        for half in halves:
            for limb in range(LIMBS):
                four = row.four(limb, k + i64(4 * half), lanes)
                for vector in range(count):
                    numbers = loaded[vector]
                    if layout.bits == 4:
                        if half:
                            numbers = numbers >> broadcast(const(4, "int32"), lanes)
                        numbers = numbers & broadcast(const(0x0F0F0F0F, "int32"), lanes)
                    sum_ = held[limb * count + vector]
                    code.vstore(sum_, 0, DOTS.add(code.vload(sum_, 0, lanes), numbers, four), lanes)

    with code.loop(i64(cut.count), PARALLEL) as panel:
        sums = code.registers(count, lanes, _F)
        with code.loop(i64(row.chunks)) as number:
            held = [code.alloc([lanes], "int32") for _ in range(LIMBS * count)]
            for limb in range(LIMBS):
                start = tirx.BufferLoad(row.starts, [number * i64(LIMBS) + i64(limb)])
                for vector in range(count):
                    code.vstore(held[limb * count + vector], 0, broadcast(start, lanes), lanes)
            first = code.bind(number * i64(size))
            with code.loop(i64(size // layout.rows)) as at:
                dots(held, panel, code.bind(first + at * i64(layout.rows)))
            factor = code.bind(tirx.BufferLoad(row.factors, [number]))
            whole = code.bind(tirx.BufferLoad(row.sums, [number]))
            group = code.bind(idiv(first, block)) if block != inner else i64(0)
            for vector in range(count):
                low, middle, high = (
                    code.vload(held[limb * count + vector], 0, lanes) for limb in range(LIMBS)
                )
                low = low + (middle << broadcast(const(8, "int32"), lanes))
                wide = _F if lanes == 1 else f"{_F}x{lanes}"
                part = tirx.Cast(wide, high) * broadcast(const(65536.0, _F), lanes)
                part = part + tirx.Cast(wide, low)
                if zero is not None:
                    part = part - broadcast(whole, lanes) * zero(panel, group, vector)
                factors = broadcast(factor, lanes)
                if scale is not None:
                    factors = factors * scale(panel, group, vector)
                code.vstore(
                    sums[vector], 0, code.vload(sums[vector], 0, lanes) + part * factors, lanes
                )
        gemv.hand_on(code, cut, panel, sums, finish)
