"""Attention in one kernel: scores, masks, softmax and the weighted sum, a few queries at a time.

A task is a block of queries of one head. It transposes the keys once (so that scores are vectors along
the keys), then for each tile of queries computes the scores into scratch rows, turns them into weights
there, and multiplies them with the values. Nothing of size queries x keys is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx

from netlathe.backends.tvm import mathfn
from netlathe.backends.tvm.cuda import flash, grids
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.kernels.reduce import COMBINE, row
from netlathe.backends.tvm.tir import (
    PARALLEL,
    VECTORIZED,
    Code,
    Expr,
    broadcast,
    cast,
    const,
    i64,
    idiv,
    known,
    select,
    unflatten,
)
from netlathe.backends.tvm.values import Ready, Store, Value
from netlathe.ir.dims import Dim

# Queries of a task: the keys are transposed once for so many of them.
_QUERY_BLOCK = 128


@dataclass(frozen=True)
class Plain:
    """Which keys are seen. ``causal``: query i sees those up to i + ``offset``, else all of them.

    ``lengths`` [b]: the keys of a sequence end there, and its queries stand at that end. ``allowed`` [b, t]:
    keys that any query may see at all.
    """

    causal: bool
    offset: Dim
    lengths: Ready | None = None
    allowed: Ready | None = None


@dataclass(frozen=True)
class Spec:
    """b batch, h heads, s queries, t keys, d and v sizes of a head; h a multiple of the key heads."""

    q: Value  # [b, h, s, d]
    k: Value  # [b, h / groups, t, d]
    v: Value  # [b, h / groups, t, v]
    groups: int
    scale: float
    softcap: float
    # (code, b, h, i, j) -> what is added to the score, or None
    bias: Callable[[Code, Expr, Expr, Expr, Expr], Expr] | None
    # (code, b, h, i, j) -> whether query i may attend key j, or None
    allowed: Callable[[Code, Expr, Expr, Expr, Expr], Expr] | None
    # (code, b, i) -> how many leading keys the queries up to i may attend at most, or None for all
    limit: Callable[[Code, Expr, Expr], Expr] | None
    # what allowed and limit say, for kernels that know no more than that; None if they say more
    plain: Plain | None = None
    # codes of k, codes of v, scales of k, scales of v: int8 caches that k and v are read from
    coded: tuple[Ready, Ready, Ready, Ready] | None = None


def attention(kernel: Kernel, spec: Spec, store: Store) -> str:
    """store([b, h, query, v], element)."""
    code = kernel.code
    if isinstance(code, GpuCode) and code.on_host:
        if spec.plain is not None:
            return flash.attention(kernel, code, spec, store)
        return grids.attention(kernel, code, spec, COMBINE, store)
    machine = kernel.lowering.machine
    batch, heads, queries = (kernel.size(dim) for dim in spec.q.shape[:3])
    blocks = code.bind(idiv(queries + i64(_QUERY_BLOCK - 1), i64(_QUERY_BLOCK)))
    lanes = machine.lanes("float32")
    tile = 8 if machine.registers == 32 else 4

    def tasks(tile_rows: int) -> None:
        with code.loop(batch * heads * blocks, PARALLEL) as task:
            b, h, block = (code.bind(i) for i in unflatten(task, [batch, heads, blocks]))
            _Task(kernel, spec, store, lanes, b, h).run(block, queries, tile_rows)

    number = known(queries)
    if number is not None:
        tasks(tile if number >= tile else 1)
    else:
        code.branch(queries >= i64(tile), lambda: tasks(tile), lambda: tasks(1))
    return "attention.fused"


class _Task:
    def __init__(
        self, kernel: Kernel, spec: Spec, store: Store, lanes: int, b: Expr, h: Expr
    ) -> None:
        self.code = kernel.code
        self.spec, self.store, self.lanes = spec, store, lanes
        self.b, self.h = b, h
        self.kv = h if spec.groups == 1 else self.code.bind(idiv(h, i64(spec.groups)))
        self.keys = kernel.size(spec.k.shape[2])
        self.depth = kernel.size(spec.q.shape[3])
        self.width = kernel.size(spec.v.shape[3])
        # scores are computed two vectors of keys at a time
        self.step = 2 * lanes
        self.padded = self.code.bind(
            idiv(self.keys + i64(self.step - 1), i64(self.step)) * i64(self.step)
        )

    def run(self, block: Expr, queries: Expr, rows: int) -> None:
        code = self.code
        self.transposed = code.alloc([self.depth * self.padded], "float32", scope="global")
        self.scores = code.alloc([i64(rows) * self.padded], "float32", scope="global")
        self.factors = code.alloc([rows], "float32")
        self.results = code.alloc([rows * 2 * self.lanes], "float32", scope="global")
        self._transpose_keys()
        first = code.bind(block * i64(_QUERY_BLOCK))
        end = code.bind(tirx.min(first + i64(_QUERY_BLOCK), queries))
        steps = idiv(end - first + i64(rows - 1), i64(rows))
        with code.loop(steps) as step:
            query = first + step * i64(rows)
            if rows > 1:
                query = tirx.min(query, queries - i64(rows))
            query = code.bind(query)
            length = self.keys
            if self.spec.limit is not None:
                length = self.spec.limit(code, self.b, query + i64(rows - 1))
                length = code.bind(tirx.max(tirx.min(length, self.keys), i64(0)))
            self._scores(query, rows, length)
            with code.loop(rows) as i:
                self._weights(query, i, length)
            self._values(query, rows, length)

    def _transpose_keys(self) -> None:
        """[t, d] to [d, t], zero beyond the keys."""
        code = self.code
        with code.loop(self.depth) as d:
            zero = broadcast(const(0.0, "float32"), self.step)
            last = d * self.padded + self.padded - i64(self.step)
            with code.when(self.keys > i64(0)):
                code.vstore(self.transposed, last, zero, self.step)

            def one(t: Expr) -> None:
                value = cast(self.spec.k.at(code, [self.b, self.kv, t, d]), "float32")
                code.store(self.transposed, d * self.padded + t, value)

            vectors(code, self.keys, self.lanes, one)

    def _scores(self, query: Expr, rows: int, length: Expr) -> None:
        """scores[i, t] = scale * q_i . k_t for ``rows`` queries, whole steps of keys."""
        code, lanes = self.code, self.lanes
        spec = self.spec
        blocks = idiv(length + i64(self.step - 1), i64(self.step))
        with code.loop(blocks) as block:
            start = code.bind(block * i64(self.step))
            sums = code.registers(rows * 2, lanes, "float32")
            with code.loop(self.depth) as d:
                base = code.bind(d * self.padded + start)
                k = [
                    code.bind(code.vload(self.transposed, base + i64(part * lanes), lanes))
                    for part in range(2)
                ]
                for i in range(rows):
                    q = cast(spec.q.at(code, [self.b, self.h, query + i64(i), d]), "float32")
                    for part in range(2):
                        held = sums[2 * i + part]
                        value = code.vload(held, 0, lanes) + broadcast(q, lanes) * k[part]
                        code.vstore(held, 0, value, lanes)
            scale = broadcast(const(spec.scale, "float32"), lanes)
            for i in range(rows):
                for part in range(2):
                    value = code.vload(sums[2 * i + part], 0, lanes) * scale
                    at = i64(i) * self.padded + start + i64(part * lanes)
                    code.vstore(self.scores, at, value, lanes)

    def _weights(self, query: Expr, i: Expr, length: Expr) -> None:
        """Turn a row of scores into e ** (score - largest); ``factors`` has 1 / their sum."""
        code, spec = self.code, self.spec
        base = code.bind(i * self.padded)
        at = code.bind(query + i)
        low = const(float("-inf"), "float32")

        def score(index: list[Expr]) -> Expr:
            t = index[0]
            value = tirx.BufferLoad(self.scores, [base + t])
            if spec.softcap:
                cap = const(spec.softcap, "float32")
                value = mathfn.tanh(code, value / cap) * cap
            if spec.bias is not None:
                value = value + spec.bias(code, self.b, self.h, at, t)
            if spec.allowed is not None:
                value = select(spec.allowed(code, self.b, self.h, at, t), value, low)
            if spec.softcap or spec.bias is not None or spec.allowed is not None:
                value = code.bind(value)
                code.store(self.scores, base + t, value)
            return value

        largest = row(code, [length], self.lanes, "float32", COMBINE["max"], score)
        # Where nothing may be attended all scores are -inf, and the result is zero.
        largest = code.bind(select(largest == low, const(0.0, "float32"), largest))

        def power(index: list[Expr]) -> Expr:
            t = index[0]
            value = mathfn.exp(code, tirx.BufferLoad(self.scores, [base + t]) - largest)
            value = code.bind(value)
            code.store(self.scores, base + t, value)
            return value

        whole = row(code, [length], self.lanes, "float32", COMBINE["sum"], power)
        zero = const(0.0, "float32")
        code.store(self.factors, i, select(whole == zero, zero, const(1.0, "float32") / whole))

    def _values(self, query: Expr, rows: int, length: Expr) -> None:
        """sum over t of weights[i, t] * v_t, as wide a part of a head at a time as registers allow."""
        width = known(self.width)
        if width is None:
            self._columns(query, rows, length, i64(0), self.width, 0, 1)
            return
        start = 0
        for lanes, most in _cuts(width - start, self.lanes):
            self._columns(query, rows, length, i64(start), i64(lanes * most), lanes, most)
            start += lanes * most

    def _columns(
        self,
        query: Expr,
        rows: int,
        length: Expr,
        start: Expr,
        extent: Expr,
        lanes: int,
        count: int,
    ) -> None:
        """``count`` vectors of ``lanes`` columns; no lanes: one column at a time."""
        code = self.code
        if lanes == 0:
            with code.loop(extent) as column:
                self._columns(query, rows, length, start + column, i64(1), 1, 1)
            return
        sums = code.registers(rows * count, lanes, "float32")
        line = code.alloc([count * lanes], "float32")
        with code.loop(length) as t:

            def load(lane: Expr, offset: int) -> None:
                at = [self.b, self.kv, t, start + i64(offset) + lane]
                value = cast(self.spec.v.at(code, at), "float32")
                code.store(line, i64(offset) + lane, value)

            for number in range(count):
                if lanes == 1:
                    load(i64(0), number)
                else:
                    with code.loop(lanes, VECTORIZED) as lane:
                        load(lane, number * lanes)
            v = [code.bind(code.vload(line, number * lanes, lanes)) for number in range(count)]
            for i in range(rows):
                weight = tirx.BufferLoad(self.scores, [i64(i) * self.padded + t])
                for number in range(count):
                    held = sums[i * count + number]
                    value = code.vload(held, 0, lanes) + broadcast(weight, lanes) * v[number]
                    code.vstore(held, 0, value, lanes)
        results = self.results
        for i in range(rows):
            factor = broadcast(tirx.BufferLoad(self.factors, [i64(i)]), lanes)
            for number in range(count):
                slot = i * count + number
                value = code.vload(sums[slot], 0, lanes) * factor
                code.vstore(results, slot * lanes, value, lanes)
        with code.loop(rows) as i:
            at = code.bind(query + i)

            def finish(j: Expr) -> None:
                value = tirx.BufferLoad(results, [i * i64(count * lanes) + j])
                self.store(code, [self.b, self.h, at, start + j], value)

            vectors(code, i64(count * lanes), lanes, finish)


def _cuts(width: int, lanes: int) -> Sequence[tuple[int, int]]:
    """(lanes, vectors) that cover a head of ``width``: at most two vectors a piece, then narrower ones."""
    cuts = []
    while width >= lanes:
        count = min(2, width // lanes)
        cuts.append((lanes, count))
        width -= count * lanes
    while width:
        lanes //= 2
        if width >= lanes:
            cuts.append((lanes, 1))
            width -= lanes
    return cuts
