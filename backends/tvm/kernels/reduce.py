"""Reductions: sums, extremes and products over some axes.

reduce.rows      the last axis is reduced: vectors of partial results along it
reduce.columns   the last axis is kept: vectors of results along it, the reduced axes within
reduce.small     either of them without threads: a launch would cost more than the work
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from netlathe.backends.tvm.cuda import grids
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import SMALL
from netlathe.backends.tvm.tir import (
    PARALLEL,
    SERIAL,
    VECTORIZED,
    Code,
    Expr,
    Index,
    broadcast,
    const,
    i64,
    idiv,
    is_nan,
    known,
    select,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Store

Element = Callable[[Code, Index], Expr]

# Of the partial results of a row: the widest vectors that any of our machines has.
_PARTIAL_BYTES = 64
_ROWS = 4
_VECTORS = 128  # of results at a time: half a KiB of each row of elements


@dataclass(frozen=True)
class Combine:
    """An associative operation and what it starts from."""

    function: Callable[[Expr, Expr], Expr]
    start: Callable[[str], Expr]


def _lowest(dtype: str) -> Expr:
    if dtype.startswith("float"):
        return const(float("-inf"), dtype)
    return tirx.min_value(dtype) if dtype != "bool" else const(False, "bool")


def _highest(dtype: str) -> Expr:
    if dtype.startswith("float"):
        return const(float("inf"), dtype)
    return tirx.max_value(dtype) if dtype != "bool" else const(True, "bool")


def _max(a: Expr, b: Expr) -> Expr:
    if _is_bool(a):
        return tirx.Or(a, b)
    # NaN compares false: `b` is taken unless `a` is surely larger, and a NaN already held stays.
    return select(tirx.Or(is_nan(a), a >= b), a, b) if _is_float(a) else tirx.max(a, b)


def _min(a: Expr, b: Expr) -> Expr:
    if _is_bool(a):
        return tirx.And(a, b)
    return select(tirx.Or(is_nan(a), a <= b), a, b) if _is_float(a) else tirx.min(a, b)


def _is_float(x: Expr) -> bool:
    return str(x.ty.dtype).startswith("float")


def _is_bool(x: Expr) -> bool:
    return str(x.ty.dtype).startswith("bool")


COMBINE: Mapping[str, Combine] = {
    "sum": Combine(lambda a, b: a + b, lambda dtype: const(0, dtype)),
    "prod": Combine(lambda a, b: a * b, lambda dtype: const(1, dtype)),
    "max": Combine(_max, _lowest),
    "min": Combine(_min, _highest),
}


def row(
    code: Code,
    extents: Sequence[Expr],
    lanes: int,
    dtype: str,
    combine: Combine,
    element: Callable[[list[Expr]], Expr],
) -> Expr:
    """Combine ``element(index)`` over all indices below ``extents``, vectors along the last one.

    As many partial results are kept on every machine, so that all give the same bits.
    """
    width, most = (
        known(extents[-1]),
        4 * lanes,
    )  # four vectors at a time hold what an element is made of
    if lanes > 1 and dtype != "bool":
        lanes = max(lanes, _PARTIAL_BYTES // max(np.dtype(dtype).itemsize, 4))
    if width is not None and width % (4 * lanes) == 0:
        lanes *= 4  # four vectors at a time hide the latency of one
    while width is not None and lanes > 1 and lanes > width:
        lanes //= 2
    partial = code.alloc([lanes], dtype)
    result = code.alloc([1], dtype)
    start = combine.start(dtype)
    if lanes > 1:
        code.vstore(partial, 0, broadcast(start, lanes), lanes)
    code.store(result, i64(0), start)
    with code.loop(total(extents[:-1])) as outer:
        index = [code.bind(i) for i in unflatten(outer, extents[:-1])]
        last = extents[-1]
        whole = i64(width // lanes) if width is not None else code.bind(idiv(last, lanes))
        if lanes > 1:
            with code.loop(whole) as block:
                for start_ in range(0, lanes, most):
                    with code.loop(min(most, lanes), VECTORIZED) as lane:
                        at = i64(start_) + lane if start_ else lane
                        value = element([*index, block * i64(lanes) + at])
                        held = tirx.BufferLoad(partial, [at])
                        code.store(partial, at, combine.function(held, value))
        done = whole * i64(lanes) if lanes > 1 else i64(0)
        if known(last - done) != 0:
            with code.loop(last - done) as j:
                held = tirx.BufferLoad(result, [i64(0)])
                code.store(result, i64(0), combine.function(held, element([*index, done + j])))
    value = tirx.BufferLoad(result, [i64(0)])
    if lanes > 1:
        parts = [code.bind(tirx.BufferLoad(partial, [i64(k)])) for k in range(lanes)]
        while len(parts) > 1:  # in pairs: as exact as it gets, and short chains
            half = len(parts) // 2
            parts = [code.bind(combine.function(parts[k], parts[k + half])) for k in range(half)]
        value = combine.function(code.bind(value), parts[0])
    return code.bind(value)


def reduce(
    kernel: Kernel,
    kept: list[Expr],
    reduced: list[Expr],
    by_rows: bool,
    dtype: str,
    combine: Combine,
    element: Callable[[Code, list[Expr], list[Expr]], Expr],
    store: Store,
) -> str:
    """store(index of kept, combined element(code, index of kept, index of reduced))."""
    code = kernel.code
    if isinstance(code, GpuCode) and code.on_host:
        return grids.reduce(code, kept, reduced, by_rows, dtype, combine, element, store)
    lanes = kernel.lowering.machine.lanes(dtype)
    small = known(total(kept + reduced))
    kind = SERIAL if small is not None and small <= SMALL else PARALLEL
    if by_rows or not kept:
        with code.loop(total(kept), kind) as at:
            index = [code.bind(i) for i in unflatten(at, kept)]
            extents = reduced or [i64(1)]
            value = row(
                code,
                extents,
                lanes,
                dtype,
                combine,
                lambda inner: element(code, index, inner[: len(reduced)]),
            )
            store(code, index, value)
        return "reduce.rows" if kind == PARALLEL else "reduce.small"
    width = known(kept[-1])
    while width is not None and lanes > 1 and lanes > width:
        lanes //= 2
    last, wide = kept[-1], _VECTORS * lanes
    few = kind == SERIAL or (width is not None and width < wide)
    blocks = i64(1) if few else code.bind(idiv(last + i64(wide - 1), wide))
    with code.loop(total([*kept[:-1], blocks]), kind) as at:
        *outer, block = (code.bind(i) for i in unflatten(at, [*kept[:-1], blocks]))
        job = _Columns(code, outer, reduced, lanes, dtype, combine, element, store)
        if few:
            job.until(i64(0), last)
        else:
            first = code.bind(block * i64(wide))
            code.branch(
                first + i64(wide) <= last,
                lambda: job.together(first, _VECTORS, lanes),
                lambda: job.until(first, last),
            )
    return "reduce.columns" if kind == PARALLEL else "reduce.small"


@dataclass(frozen=True)
class _Columns:
    """Neighbouring results of a reduction, whose elements are neighbours too."""

    code: Code
    outer: list[Expr]
    reduced: list[Expr]
    lanes: int
    dtype: str
    combine: Combine
    element: Callable[[Code, list[Expr], list[Expr]], Expr]
    store: Store

    def together(self, first: Expr, count: int, lanes: int) -> None:
        """The results from ``first`` on, in ``count`` vectors: the elements are read row by row."""
        code = self.code
        partial = code.alloc([count * lanes], self.dtype, scope="local" if count == 1 else "global")

        def each(body: Callable[[Expr], None]) -> None:
            if count == 1:
                _lanes(code, lanes, body)
                return
            with code.loop(count) as number:
                _lanes(code, lanes, lambda lane: body(number * i64(lanes) + lane))

        def step(rows: list[list[Expr]], place: Expr) -> None:
            value = tirx.BufferLoad(partial, [place])
            for at in rows:
                element = self.element(code, [*self.outer, first + place], at)
                value = code.bind(self.combine.function(value, element))
            code.store(partial, place, value)

        start = self.combine.start(self.dtype)
        each(lambda place: code.store(partial, place, start))

        def rows(count: Expr, begin: Expr, group: int) -> None:
            with code.loop(count) as number:
                found = []
                for place in range(group):
                    position = code.bind(begin + number * i64(group) + i64(place))
                    found.append([code.bind(i) for i in unflatten(position, self.reduced)])
                each(lambda place: step(found, place))

        length = total(self.reduced)
        group = 1 if count == 1 else _ROWS
        whole = code.bind(idiv(length, group))
        rows(whole, i64(0), group)
        if group > 1:
            rows(length - whole * i64(group), whole * i64(group), 1)
        each(
            lambda place: self.store(
                code, [*self.outer, first + place], tirx.BufferLoad(partial, [place])
            )
        )

    def until(self, first: Expr, end: Expr) -> None:
        """The results from ``first`` to ``end``, a vector and then one at a time."""
        code, lanes = self.code, self.lanes
        length = known(end - first)
        whole = code.bind(idiv(end - first, lanes)) if length is None else i64(length // lanes)
        if lanes > 1 and known(whole) != 0:
            with code.loop(whole) as block:
                self.together(code.bind(first + block * i64(lanes)), 1, lanes)
        done = first + whole * i64(lanes) if lanes > 1 else first
        if known(end - done) != 0:
            with code.loop(end - done) as j:
                self.together(code.bind(done + j), 1, 1)


def _lanes(code: Code, width: int, body: Callable[[Expr], None]) -> None:
    if width == 1:
        body(i64(0))
        return
    with code.loop(width, VECTORIZED) as lane:
        body(lane)
