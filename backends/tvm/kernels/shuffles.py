"""Vectors whose lanes change places: n vectors of n lanes, n a power of two."""

from __future__ import annotations

from tvm import tirx

from netlathe.backends.tvm.tir import Code, Expr, const


def transposed(code: Code, rows: list[Expr]) -> list[Expr]:
    """As many vectors as they have lanes, transposed: each round turns the bits of (vector, lane) by one."""
    half, count = len(rows) // 2, len(rows)
    for _ in range(count.bit_length() - 1):
        pairs = [(rows[i], rows[i + half]) for i in range(half)]
        rows = [
            code.bind(_picked(a, b, [n for lane in part for n in (lane, lane + count)]))
            for a, b in pairs
            for part in (range(half), range(half, count))
        ]
    return rows


def sums(code: Code, rows: list[Expr]) -> Expr:
    """The sum of the lanes of each of as many vectors as they have lanes."""
    lanes = len(rows)
    while len(rows) > 1:
        rows = [
            code.bind(
                _picked(a, b, list(range(0, 2 * lanes, 2)))
                + _picked(a, b, list(range(1, 2 * lanes, 2)))
            )
            for a, b in zip(rows[::2], rows[1::2], strict=True)
        ]
    return rows[0]


def _picked(a: Expr, b: Expr, lanes: list[int]) -> Expr:
    """Some lanes of two vectors, those of ``b`` after those of ``a``."""
    return tirx.Shuffle([a, b], [const(lane, "int32") for lane in lanes])
