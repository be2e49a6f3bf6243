"""The schedules that cover every operator: threads over elements, warps or blocks over rows.

grid.flat        4 elements a thread, neighbours in neighbouring threads
grid.rows        the last dim over threads, the outer dims over what is left of the block
grid.sections    the same for several tensors, each with blocks of its own
reduce.rows      a warp (short rows) or a block (long ones) for each result
reduce.columns   a thread for each result
rows.softmax, rows.log_softmax, rows.layer_norm, rows.rms_norm: likewise a warp or a block for each row
attention.warp   a warp for each query: 32 keys at a time, softmax as it goes (arXiv 1805.02867)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm import tirx

from netlathe.backends.tvm import mathfn
from netlathe.backends.tvm.cuda.code import THREADS, GpuCode
from netlathe.backends.tvm.tir import (
    PARALLEL,
    SERIAL,
    VECTORIZED,
    Code,
    Expr,
    Index,
    cast,
    const,
    i64,
    idiv,
    imod,
    known,
    select,
    total,
    unflatten,
)

if TYPE_CHECKING:
    from netlathe.backends.tvm.kernel import Kernel
    from netlathe.backends.tvm.kernels.attention import Spec
    from netlathe.backends.tvm.kernels.reduce import Combine
    from netlathe.backends.tvm.values import Section, Store, Value

WARP = 32
# Rows of at most so many elements are a warp's: a block of 256 would leave threads without work.
_SHORT = 1024
_EACH = 4  # elements of a thread in the flat schedule
_HELD = 32  # elements of a row that a thread keeps in registers
_LINE = 128  # bytes of memory that come together
_MANY = 9  # steps that are a loop: fewer are written out, so that their loads overlap


def _blocks(count: Expr, size: int) -> Expr:
    return idiv(count + i64(size - 1), size)


def elementwise(code: GpuCode, shape: list[Expr], flat: bool, one: Callable[[Index], None]) -> str:
    """Call ``one(index)`` for every element; ``flat``: by element number."""
    if flat:
        count = total(shape)
        with code.launch(_blocks(count, THREADS * _EACH), THREADS) as (block, thread):
            first = code.bind(block * i64(THREADS * _EACH) + thread)
            with code.loop(_EACH, VECTORIZED) as step:
                at = code.bind(first + step * i64(THREADS))
                with code.when(at < count):
                    one([at])
        return "grid.flat"
    with code.launch(_blocks(total(shape[:-1]), _rows_at_once(shape)), THREADS) as (block, thread):
        _rows_of_block(code, shape, block, thread, one)
    return "grid.rows"


def sections(code: GpuCode, parts: Sequence[Section]) -> str:
    """Call ``one(index)`` for every index below the dims of every part, in one launch."""
    counts = [_blocks(total(shape[:-1]), _rows_at_once(shape)) for shape, _ in parts]
    with code.launch(sum(counts[1:], counts[0]), THREADS) as (block, thread):

        def part(number: int, own: Expr) -> None:
            shape, one = parts[number]

            def here() -> None:
                _rows_of_block(code, shape, own, thread, one)

            if number + 1 == len(parts):
                here()
            else:
                rest = code.bind(own - counts[number])
                code.branch(rest < i64(0), here, lambda: part(number + 1, rest))

        part(0, block)
    return "grid.sections"


def _columns_at_once(shape: list[Expr]) -> int:
    """Threads along the last dim: few for short ones, as elements of a thread share what an index takes."""
    width = known(shape[-1])
    columns = 128
    while width is not None and columns > WARP and width <= 2 * columns:
        columns //= 2
    while width is not None and columns > 1 and columns >= 2 * width:
        columns //= 2
    return columns


def _rows_at_once(shape: list[Expr]) -> int:
    return THREADS // _columns_at_once(shape)


def _rows_of_block(
    code: GpuCode, shape: list[Expr], block: Expr, thread: Expr, one: Callable[[Index], None]
) -> None:
    last, lead, columns = shape[-1], total(shape[:-1]), _columns_at_once(shape)
    row = code.bind(block * i64(_rows_at_once(shape)) + idiv(thread, columns))
    with code.when(row < lead):
        outer = [code.bind(item) for item in unflatten(row, shape[:-1])]
        steps = _blocks(last, columns)
        few = (known(steps) or _MANY) < _MANY
        with code.loop(steps, VECTORIZED if few else SERIAL) as step:
            j = code.bind(step * i64(columns) + imod(thread, columns))
            with code.when(j < last):
                one([*outer, j])


class Team:
    """The threads that share a row: a warp, or a block."""

    def __init__(self, code: GpuCode, threads: int, lane: Expr) -> None:
        self.code, self.threads, self.lane = code, threads, lane
        self._shared: dict[str, Any] = {}
        self._step: Any = None  # of the loop in :meth:`each`, inside it

    def each(self, length: Expr, body: Callable[[Expr], None]) -> None:
        """Call ``body(j)`` for all j below ``length``, each in one thread."""
        code, steps = self.code, self._few(length)
        if steps:
            with code.loop(steps, VECTORIZED) as step:
                self._step = step
                body(code.bind(step * i64(self.threads) + self.lane))
            return
        with code.loop(_blocks(length, self.threads)) as step:
            j = code.bind(step * i64(self.threads) + self.lane)
            with code.when(j < length):
                body(j)

    def _few(self, length: Expr) -> int:
        """How many elements each thread has, where all have as many, and few; else 0."""
        size = known(length)
        even = size is not None and size % self.threads == 0 and size <= _HELD * self.threads
        return size // self.threads if even and size is not None else 0

    def held(
        self, length: Expr, dtype: str, element: Callable[[Expr], Expr]
    ) -> Callable[[Expr], Expr]:
        """``element`` for use in :meth:`each`, read once, where registers have room for a thread's share."""
        steps = self._few(length)
        if not steps:
            return element
        kept = self.code.alloc([steps], dtype)
        self.each(length, lambda j: self.code.store(kept, self._step, element(j)))
        return lambda j: tirx.BufferLoad(kept, [self._step])

    def combined(
        self, length: Expr, dtype: str, combine: Combine, element: Callable[[Expr], Expr]
    ) -> Expr:
        """``element(j)`` combined over all j below ``length``, in every thread."""
        code = self.code
        partial = code.alloc([1], dtype)
        code.store(partial, i64(0), combine.start(dtype))

        def step(j: Expr) -> None:
            held = tirx.BufferLoad(partial, [i64(0)])
            code.store(partial, i64(0), combine.function(held, element(j)))

        self.each(length, step)
        return self.together(tirx.BufferLoad(partial, [i64(0)]), dtype, combine)

    def together(self, value: Expr, dtype: str, combine: Combine) -> Expr:
        """The threads' values combined, in every thread."""
        code = self.code
        value = code.bind(value)
        for mask in (16, 8, 4, 2, 1):
            value = code.bind(combine.function(value, code.shuffled(value, mask)))
        if self.threads == WARP:
            return value
        warps = self.threads // WARP
        stored = "int8" if dtype == "bool" else dtype
        if stored not in self._shared:
            self._shared[stored] = code.alloc([warps], stored, scope="shared")
        shared = self._shared[stored]
        code.barrier()  # whoever still reads the last result
        with code.when(imod(self.lane, WARP) == i64(0)):
            code.store(shared, idiv(self.lane, WARP), cast(value, stored))
        code.barrier()
        parts = [code.bind(tirx.BufferLoad(shared, [i64(warp)])) for warp in range(warps)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [
                code.bind(
                    cast(
                        combine.function(cast(parts[k], dtype), cast(parts[k + half], dtype)),
                        stored,
                    )
                )
                for k in range(half)
            ]
        return cast(parts[0], dtype)


def rows(
    code: GpuCode,
    lead: list[Expr],
    length: Expr,
    body: Callable[[Team, Index], None],
    constants: Sequence[tuple[Any, int]] = (),
) -> None:
    """``body(team, index)`` for every index below ``lead``; a row has ``length`` elements.

    ``constants``, with the bytes of an element each, are as long; they are asked for before the grid in
    front has ended.
    """
    size = known(length)
    count = total(lead)
    if size is not None and size <= _SHORT:
        each = THREADS // WARP
        with code.launch(_blocks(count, each), THREADS, waits=False) as (block, thread):
            _ask(code, length, thread, constants)
            row = code.bind(block * i64(each) + idiv(thread, WARP))
            with code.when(row < count):
                index = [code.bind(i) for i in unflatten(row, lead)]
                body(Team(code, WARP, code.bind(imod(thread, WARP))), index)
        return
    with code.launch(count, THREADS, waits=False) as (block, thread):
        _ask(code, length, thread, constants)
        index = [code.bind(i) for i in unflatten(block, lead)]
        body(Team(code, THREADS, thread), index)


def _ask(code: GpuCode, length: Expr, thread: Expr, constants: Sequence[tuple[Any, int]]) -> None:
    """Ask for the lines of constants, a thread for each, then wait for the grid in front."""
    for buffer, size in constants:
        at = code.bind(thread * i64(_LINE // size))
        with code.when(at < length):
            code.ahead(buffer, at)
    code.follow()


def reduce(
    code: GpuCode,
    kept: list[Expr],
    reduced: list[Expr],
    by_rows: bool,
    dtype: str,
    combine: Combine,
    element: Callable[[Code, list[Expr], list[Expr]], Expr],
    store: Store,
) -> str:
    """store(index of kept, combined element(code, index of kept, index of reduced))."""
    if by_rows or not kept:

        def one(team: Team, index: Index) -> None:
            def at(j: Expr) -> Expr:
                inner = [code.bind(i) for i in unflatten(j, reduced)]
                return element(code, list(index), inner)

            value = code.bind(team.combined(total(reduced), dtype, combine, at))
            with code.when(team.lane == i64(0)):
                store(code, index, value)

        rows(code, kept, total(reduced), one)
        return "reduce.rows"
    with code.loop(total(kept), PARALLEL) as at:
        index = [code.bind(i) for i in unflatten(at, kept)]
        partial = code.alloc([1], dtype)
        code.store(partial, i64(0), combine.start(dtype))
        with code.loop(total(reduced)) as j:
            inner = [code.bind(i) for i in unflatten(j, reduced)]
            held = tirx.BufferLoad(partial, [i64(0)])
            code.store(partial, i64(0), combine.function(held, element(code, index, inner)))
        store(code, index, tirx.BufferLoad(partial, [i64(0)]))
    return "reduce.columns"


def softmax(
    code: GpuCode,
    x: Value,
    lead: list[Expr],
    length: Expr,
    dtype: str,
    log: bool,
    combines: Mapping[str, Combine],
    store: Store,
) -> str:
    """Softmax or its logarithm along the last axis; the largest element is taken off first."""

    def one(team: Team, index: Index) -> None:
        def at(j: Expr) -> Expr:
            return x.at(code, [*index, j])

        largest = code.bind(team.combined(length, dtype, combines["max"], at))

        def power(j: Expr) -> Expr:
            return mathfn.exp(code, at(j) - largest)

        whole = code.bind(team.combined(length, dtype, combines["sum"], power))
        if log:
            offset = code.bind(mathfn.log(code, whole))
            team.each(length, lambda j: store(code, [*index, j], at(j) - largest - offset))
        else:
            factor = code.bind(const(1, dtype) / whole)
            team.each(length, lambda j: store(code, [*index, j], power(j) * factor))

    rows(code, lead, length, one)
    return "rows.log_softmax" if log else "rows.softmax"


def normalize(
    code: GpuCode,
    x: Callable[[Code, Index, Expr], Expr],
    lead: list[Expr],
    length: Expr,
    dtype: str,
    epsilon: float,
    centred: bool,
    combines: Mapping[str, Combine],
    finish: Callable[[Code, Index, Expr, Expr], None],
    constants: Sequence[tuple[Any, int]],
) -> str:
    """(x - mean) / sqrt(variance + epsilon), or without the mean x / sqrt(mean square + epsilon)."""

    def one(team: Team, index: Index) -> None:
        count = cast(length, dtype)
        mean: Expr | None = None
        element = team.held(length, dtype, lambda j: x(code, index, j))
        if centred:
            whole = team.combined(length, dtype, combines["sum"], element)
            mean = code.bind(whole / count)

        def at(j: Expr) -> Expr:
            return element(j) if mean is None else element(j) - mean

        def squared(j: Expr) -> Expr:
            value = code.bind(at(j))
            return value * value

        square = team.combined(length, dtype, combines["sum"], squared)
        deviation = tirx.sqrt(square / count + const(epsilon, dtype))
        factor = code.bind(const(1, dtype) / deviation)
        team.each(length, lambda j: finish(code, index, j, at(j) * factor))

    rows(code, lead, length, one, constants)
    return "rows.layer_norm" if centred else "rows.rms_norm"


def attention(
    kernel: Kernel, code: GpuCode, spec: Spec, combines: Mapping[str, Combine], store: Store
) -> str:
    """store([b, h, query, v], element): any mask, bias and size of a head."""
    shape = kernel.shape(spec.q.shape)
    batch, heads, queries, depth = shape
    keys, width = kernel.size(spec.k.shape[2]), kernel.size(spec.v.shape[3])
    count = batch * heads * queries
    each = THREADS // WARP
    low = const(float("-inf"), "float32")
    zero = const(0.0, "float32")
    parts = known(_blocks(width, WARP))
    assert parts is not None, "a head of unknown size"

    with code.launch(_blocks(count, each), THREADS) as (block, thread):
        task = code.bind(block * i64(each) + idiv(thread, WARP))
        lane = code.bind(imod(thread, WARP))
        team = Team(code, WARP, lane)
        with code.when(task < count):
            b, h, i = (code.bind(x) for x in unflatten(task, [batch, heads, queries]))
            kv = h if spec.groups == 1 else code.bind(idiv(h, i64(spec.groups)))
            length = keys
            if spec.limit is not None:
                length = code.bind(tirx.max(tirx.min(spec.limit(code, b, i), keys), i64(0)))
            sums = code.alloc([parts], "float32")
            state = code.alloc([2], "float32")  # the largest score so far, the sum of weights
            with code.loop(parts, VECTORIZED) as part:
                code.store(sums, part, zero)
            code.store(state, 0, low)
            code.store(state, 1, zero)

            def score(t: Expr) -> Expr:
                dot = code.alloc([1], "float32")
                code.store(dot, 0, zero)
                with code.loop(depth) as d:
                    q = cast(spec.q.at(code, [b, h, i, d]), "float32")
                    k = cast(spec.k.at(code, [b, kv, t, d]), "float32")
                    code.store(dot, 0, tirx.BufferLoad(dot, [i64(0)]) + q * k)
                value = tirx.BufferLoad(dot, [i64(0)]) * const(spec.scale, "float32")
                if spec.softcap:
                    cap = const(spec.softcap, "float32")
                    value = mathfn.tanh(code, value / cap) * cap
                if spec.bias is not None:
                    value = value + spec.bias(code, b, h, i, t)
                if spec.allowed is not None:
                    value = select(spec.allowed(code, b, h, i, t), value, low)
                return value

            with code.loop(_blocks(length, WARP)) as number:
                first = code.bind(number * i64(WARP))
                t = code.bind(first + lane)
                own = code.alloc([1], "float32")
                code.store(own, 0, low)
                with code.when(t < length):
                    code.store(own, 0, score(t))
                held = code.bind(tirx.BufferLoad(own, [i64(0)]))
                before = code.bind(tirx.BufferLoad(state, [i64(0)]))
                top = team.together(held, "float32", combines["max"])
                top = code.bind(combines["max"].function(before, top))
                # Where nothing may be attended all scores are -inf, and the result is zero.
                base = code.bind(select(top == low, zero, top))
                weight = code.bind(mathfn.exp(code, held - base))
                scale = code.bind(mathfn.exp(code, before - base))
                whole = team.together(weight, "float32", combines["sum"])
                code.store(state, 0, top)
                code.store(state, 1, tirx.BufferLoad(state, [i64(1)]) * scale + whole)
                with code.loop(parts, VECTORIZED) as part:
                    code.store(sums, part, tirx.BufferLoad(sums, [part]) * scale)
                with code.loop(tirx.min(i64(WARP), length - first)) as other:
                    factor = code.bind(code.broadcasted(weight, other))
                    with code.loop(parts, VECTORIZED) as part:
                        column = code.bind(part * i64(WARP) + lane)
                        with code.when(column < width):
                            v = cast(spec.v.at(code, [b, kv, first + other, column]), "float32")
                            code.store(sums, part, tirx.BufferLoad(sums, [part]) + factor * v)
            whole = code.bind(tirx.BufferLoad(state, [i64(1)]))
            factor = code.bind(select(whole == zero, zero, const(1.0, "float32") / whole))
            with code.loop(parts, VECTORIZED) as part:
                column = code.bind(part * i64(WARP) + lane)
                with code.when(column < width):
                    store(code, [b, h, i, column], tirx.BufferLoad(sums, [part]) * factor)
    return "attention.warp"


def product(
    kernel: Kernel,
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
    across = _blocks(columns, tile)
    down = _blocks(rows_, tile)
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
        with code.loop(_blocks(inner, deep)) as step:
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
