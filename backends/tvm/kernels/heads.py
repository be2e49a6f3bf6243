"""Attention on a CPU: scores, masks, softmax and the weighted sum; no matrix of scores is ever in memory.

many queries   a task is a block of queries and the heads that share their keys. It transposes the keys
               once, so that scores are vectors along the keys; then, for each tile of queries, scores
               go into scratch rows, become weights there, and are multiplied with the values
fewer queries  than a tile has, as in a decode over a cache: the keys are read as they lie, once for the
               heads that share them; the products of a vector of keys are added up across lanes

A kernel whose number of queries is not known has both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tvm import tirx

from netlathe.backends.tvm import mathfn
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import shuffles
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.kernels.reduce import COMBINE, Combine, row
from netlathe.backends.tvm.tir import (
    PARALLEL,
    VECTORIZED,
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
from netlathe.backends.tvm.values import Store, Value

if TYPE_CHECKING:
    from netlathe.backends.tvm.kernels.attention import Spec

# Queries of a task, of all the heads that share their keys: these are transposed once for so many.
_QUERY_BLOCK = 256
# Query heads whose scores are computed from one load of the keys, where these are read as they lie.
_MOST_ROWS = 8
# Sums that hide the latency of adding to one of them.
_CHAINS = 8
# As `max` of numbers: a NaN among the scores makes the sum of their powers NaN anyway.
_LARGEST = Combine(tirx.max, COMBINE["max"].start)

# i -> (head, query) of the i-th row of a tile
Place = Callable[[int | Expr], tuple[Expr, Expr]]


def fused(kernel: Kernel, spec: Spec, store: Store) -> None:
    """store([b, h, query, v], element)."""
    code = kernel.code
    machine = kernel.lowering.machine
    batch, heads, queries = (kernel.size(dim) for dim in spec.q.shape[:3])
    tile = 8 if machine.registers == 32 else 4
    size = max(_QUERY_BLOCK // spec.groups, 32)
    job = _Job(kernel, spec, store, machine.lanes("float32"))

    def many(rows: int) -> None:
        blocks = code.bind(idiv(queries + i64(size - 1), i64(size)))
        shared = kernel.size(spec.k.shape[1])
        with code.loop(batch * shared * blocks, PARALLEL) as task:
            b, kv, block = (code.bind(i) for i in unflatten(task, [batch, shared, blocks]))
            first = code.bind(block * i64(size))
            end = code.bind(tirx.min(first + i64(size), queries))
            job.block(b, kv, first, end, rows)

    def few() -> None:
        if not job.vector:
            many(1)
            return
        rows = max(n for n in range(1, _MOST_ROWS + 1) if spec.groups % n == 0)
        parts = code.bind(idiv(heads, i64(rows)))
        with code.loop(batch * parts, PARALLEL) as task:
            b, part = (code.bind(i) for i in unflatten(task, [batch, parts]))
            job.heads(b, code.bind(part * i64(rows)), rows)

    number = known(queries)
    if number is not None:
        many(tile) if number >= tile else few()
    else:
        code.branch(queries >= i64(tile), lambda: many(tile), few)


class _Job:
    """What tasks have in common. ``vector``: lanes that a head is a multiple of; 0 if it fits no vector."""

    def __init__(self, kernel: Kernel, spec: Spec, store: Store, lanes: int) -> None:
        self.code = kernel.code
        self.spec, self.store, self.lanes = spec, store, lanes
        self.queries = kernel.size(spec.q.shape[2])
        self.keys = kernel.size(spec.k.shape[2])
        self.depth = kernel.size(spec.q.shape[3])
        self.width = kernel.size(spec.v.shape[3])
        self.vector = 0
        if (depth := known(self.depth)) is not None:
            fitting = [n for n in (16, 8, 4) if n <= lanes and depth % n == 0]
            self.vector = max(fitting, default=0)

    def _open(self, b: Expr, kv: Expr, rows: int) -> None:
        """Scratch memory of one task."""
        code = self.code
        self.b, self.kv = b, kv
        self.padded = code.bind(
            idiv(self.keys + i64(self.lanes - 1), i64(self.lanes)) * i64(self.lanes)
        )
        self.scores = code.alloc([i64(rows) * self.padded], "float32", scope="global")
        self.factors = code.alloc([rows], "float32")
        # Here, not where it is used: sums beside an allocation would not be kept in registers.
        self.results = code.alloc([rows * self._most(rows) * self.lanes], "float32", scope="global")

    def _most(self, rows: int) -> int:
        """How many vectors of a head are summed at a time."""
        return max(2, _CHAINS // rows)

    def _length(self, query: Expr) -> Expr:
        """How many keys the queries up to ``query`` may attend at most."""
        if self.spec.limit is None:
            return self.keys
        length = self.spec.limit(self.code, self.b, query)
        return self.code.bind(tirx.max(tirx.min(length, self.keys), i64(0)))

    def block(self, b: Expr, kv: Expr, first: Expr, end: Expr, rows: int) -> None:
        """The queries [first, end) of all heads that share the keys ``kv``, ``rows`` at a time."""
        code, groups = self.code, self.spec.groups
        self._open(b, kv, rows)
        self.transposed = code.alloc([self.depth * self.padded], "float32", scope="global")
        self._transpose_keys(self._length(end - i64(1)))
        steps = idiv(end - first + i64(rows - 1), i64(rows))
        with code.loop(i64(groups)) as group, code.loop(steps) as step:
            head = code.bind(kv * i64(groups) + group)
            query = first + step * i64(rows)
            if rows > 1:
                query = tirx.min(query, self.queries - i64(rows))
            query = code.bind(query)
            length = self._length(query + i64(rows - 1))

            def place(i: int | Expr, head: Expr = head, query: Expr = query) -> tuple[Expr, Expr]:
                return head, query + i64(i)

            self._scores(place, rows, length)
            self._finish(place, rows, length)

    def heads(self, b: Expr, head: Expr, rows: int) -> None:
        """All queries, of which there are few, of ``rows`` heads that share their keys."""
        code = self.code
        self._open(b, code.bind(idiv(head, i64(self.spec.groups))), rows)
        self.partial = code.alloc([rows * self.vector**2], "float32")
        with code.loop(self.queries) as query:
            length = self._length(query)

            def place(i: int | Expr) -> tuple[Expr, Expr]:
                return head + i64(i), query

            self._scores_across(place, rows, length)
            self._finish(place, rows, length)

    def _finish(self, place: Place, rows: int, length: Expr) -> None:
        with self.code.loop(rows) as i:
            self._weights(place, i, length)
        self._values(place, rows, length)

    def _row(self, value: Value, index: Sequence[Expr], start: int, lanes: int) -> Expr:
        """A vector along the last axis."""
        code = self.code
        line = code.alloc([lanes], "float32")
        with code.loop(lanes, VECTORIZED) as lane:
            element = value.at(code, [*index, i64(start) + lane])
            code.store(line, lane, cast(element, "float32"))
        return code.bind(code.vload(line, 0, lanes))

    def _transpose_keys(self, length: Expr) -> None:
        """The first keys of [t, d] to [d, t]; what is beyond them is not defined."""
        code, size = self.code, self.vector
        if not size:
            with code.loop(self.depth) as d:

                def one(t: Expr) -> None:
                    value = cast(self.spec.k.at(code, [self.b, self.kv, t, d]), "float32")
                    code.store(self.transposed, d * self.padded + t, value)

                vectors(code, length, self.lanes, one)
            return
        depth = known(self.depth)
        assert depth is not None
        with code.loop(idiv(length + i64(size - 1), i64(size))) as step:
            first = code.bind(step * i64(size))
            at = [
                [self.b, self.kv, code.bind(tirx.min(first + i64(i), length - i64(1)))]
                for i in range(size)
            ]
            for start in range(0, depth, size):
                rows = [self._row(self.spec.k, index, start, size) for index in at]
                for i, column in enumerate(shuffles.transposed(code, rows)):
                    where = i64(start + i) * self.padded + first
                    code.vstore(self.transposed, where, column, size)

    def _scores(self, place: Place, rows: int, length: Expr) -> None:
        """scores[i, t] = scale * q_i . k_t, two vectors of keys at a time."""
        code, lanes = self.code, self.lanes
        count = code.bind(idiv(length + i64(lanes - 1), i64(lanes)))
        pairs = code.bind(idiv(count, i64(2)))

        def some(start: Expr, parts: int) -> None:
            sums = code.registers(rows * parts, lanes, "float32")
            with code.loop(self.depth) as d:
                base = code.bind(d * self.padded + start)
                k = [
                    code.bind(code.vload(self.transposed, base + i64(part * lanes), lanes))
                    for part in range(parts)
                ]
                for i in range(rows):
                    head, query = place(i)
                    q = cast(self.spec.q.at(code, [self.b, head, query, d]), "float32")
                    for part in range(parts):
                        held = sums[parts * i + part]
                        value = code.vload(held, 0, lanes) + broadcast(q, lanes) * k[part]
                        code.vstore(held, 0, value, lanes)
            scale = broadcast(const(self.spec.scale, "float32"), lanes)
            for i in range(rows):
                for part in range(parts):
                    value = code.vload(sums[parts * i + part], 0, lanes) * scale
                    at = i64(i) * self.padded + start + i64(part * lanes)
                    code.vstore(self.scores, at, value, lanes)

        with code.loop(pairs) as pair:
            some(code.bind(pair * i64(2 * lanes)), 2)
        with code.when(pairs * i64(2) < count):
            some(code.bind(pairs * i64(2 * lanes)), 1)

    def _scores_across(self, place: Place, rows: int, length: Expr) -> None:
        """The same from keys as they lie: products along a head, added up across lanes."""
        code, lanes = self.code, self.vector
        depth = known(self.depth)
        assert depth is not None
        scale = broadcast(const(self.spec.scale, "float32"), lanes)
        q = [
            [
                code.bind(self._row(self.spec.q, [self.b, *place(i)], start, lanes) * scale)
                for start in range(0, depth, lanes)
            ]
            for i in range(rows)
        ]
        with code.loop(idiv(length + i64(lanes - 1), i64(lanes))) as step:
            first = code.bind(step * i64(lanes))
            with code.loop(lanes) as j:
                t = code.bind(tirx.min(first + j, length - i64(1)))
                index = [self.b, self.kv, t]
                k = [self._row(self.spec.k, index, s, lanes) for s in range(0, depth, lanes)]
                for i in range(rows):
                    product = q[i][0] * k[0]
                    for part in range(1, len(k)):
                        product = product + q[i][part] * k[part]
                    code.vstore(self.partial, (i64(i * lanes) + j) * i64(lanes), product, lanes)
            for i in range(rows):
                held = [
                    code.vload(self.partial, (i * lanes + j) * lanes, lanes) for j in range(lanes)
                ]
                at = i64(i) * self.padded + first
                code.vstore(self.scores, at, shuffles.sums(code, held), lanes)

    def _weights(self, place: Place, i: Expr, length: Expr) -> None:
        """Turn a row of scores into e ** (score - largest); ``factors`` has 1 / their sum."""
        code, spec = self.code, self.spec
        base = code.bind(i * self.padded)
        head, at = (code.bind(item) for item in place(i))
        low = const(float("-inf"), "float32")

        def score(index: list[Expr]) -> Expr:
            t = index[0]
            value = tirx.BufferLoad(self.scores, [base + t])
            if spec.softcap:
                cap = const(spec.softcap, "float32")
                value = mathfn.tanh(code, value / cap) * cap
            if spec.bias is not None:
                value = value + spec.bias(code, self.b, head, at, t)
            if spec.allowed is not None:
                value = select(spec.allowed(code, self.b, head, at, t), value, low)
            if spec.softcap or spec.bias is not None or spec.allowed is not None:
                value = code.bind(value)
                code.store(self.scores, base + t, value)
            return value

        largest = row(code, [length], self.lanes, "float32", _LARGEST, score)
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

    def _values(self, place: Place, rows: int, length: Expr) -> None:
        """sum over t of weights[i, t] * v_t, as wide a part of a head at a time as registers allow."""
        width = known(self.width)
        if width is None:
            self._columns(place, rows, length, i64(0), self.width, 0, 1)
            return
        start = 0
        for lanes, count in _cuts(width, self.lanes, self._most(rows)):
            self._columns(place, rows, length, i64(start), i64(lanes * count), lanes, count)
            start += lanes * count

    def _columns(
        self,
        place: Place,
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
                self._columns(place, rows, length, start + column, i64(1), 1, 1)
            return
        chains = -(-_CHAINS // (rows * count))
        sums = code.registers(chains * rows * count, lanes, "float32")
        line = code.alloc([count * lanes], "float32")

        def add(t: Expr, chain: int) -> None:
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
                    held = sums[(chain * rows + i) * count + number]
                    value = code.vload(held, 0, lanes) + broadcast(weight, lanes) * v[number]
                    code.vstore(held, 0, value, lanes)

        whole = code.bind(idiv(length, i64(chains)))
        with code.loop(whole) as block:
            for chain in range(chains):
                with code.scope():
                    add(code.bind(block * i64(chains) + i64(chain)), chain)
        if chains > 1:
            with code.loop(length - whole * i64(chains)) as t:
                add(code.bind(whole * i64(chains) + t), 0)
        results = self.results
        for i in range(rows):
            factor = broadcast(tirx.BufferLoad(self.factors, [i64(i)]), lanes)
            for number in range(count):
                slot = i * count + number
                value = code.vload(sums[slot], 0, lanes)
                for chain in range(1, chains):
                    value = value + code.vload(sums[chain * rows * count + slot], 0, lanes)
                code.vstore(results, slot * lanes, value * factor, lanes)
        with code.loop(rows) as i:
            head, query = (code.bind(item) for item in place(i))

            def finish(j: Expr) -> None:
                value = tirx.BufferLoad(results, [i * i64(count * lanes) + j])
                self.store(code, [self.b, head, query, start + j], value)

            vectors(code, i64(count * lanes), lanes, finish)


def _cuts(width: int, lanes: int, most: int) -> Sequence[tuple[int, int]]:
    """(lanes, vectors) that cover a head of ``width``, ``most`` vectors a piece, then narrower ones."""
    cuts = []
    while width >= lanes:
        count = min(most, width // lanes)
        cuts.append((lanes, count))
        width -= count * lanes
    while width:
        lanes //= 2
        if width >= lanes:
            cuts.append((lanes, 1))
            width -= lanes
    return cuts
