"""The schedules of what is no product: threads over elements, warps or blocks over rows.

grid.flat        4 elements a thread, neighbours in neighbouring threads
grid.rows        the last dim over threads, the outer dims over what is left of the block
grid.sections    the same for several tensors, each with blocks of its own
reduce.rows      a warp (short rows) or a block (long ones) for each result
reduce.columns   a thread for each result
rows.softmax, rows.log_softmax, rows.layer_norm, rows.rms_norm: likewise a warp or a block for each row
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
    from netlathe.backends.tvm.kernels.reduce import Combine
    from netlathe.backends.tvm.values import Section, Store, Value

WARP = 32
# Rows of at most so many elements are a warp's: a block of 256 would leave threads without work.
_SHORT = 1024
_EACH = 4  # elements of a thread in the flat schedule
_HELD = 32  # elements of a row that a thread keeps in registers
_LINE = 128  # bytes of memory that come together
_MANY = 9  # steps that are a loop: fewer are written out, so that their loads overlap


def pieces(count: Expr, size: int) -> Expr:
    """How many pieces of ``size`` cover ``count``."""
    return idiv(count + i64(size - 1), size)


def elementwise(code: GpuCode, shape: list[Expr], flat: bool, one: Callable[[Index], None]) -> str:
    """Call ``one(index)`` for every element; ``flat``: by element number."""
    if flat:
        count = total(shape)
        with code.launch(pieces(count, THREADS * _EACH), THREADS) as (block, thread):
            first = code.bind(block * i64(THREADS * _EACH) + thread)
            with code.loop(_EACH, VECTORIZED) as step:
                at = code.bind(first + step * i64(THREADS))
                with code.when(at < count):
                    one([at])
        return "grid.flat"
    with code.launch(pieces(total(shape[:-1]), _rows_at_once(shape)), THREADS) as (block, thread):
        _rows_of_block(code, shape, block, thread, one)
    return "grid.rows"


def sections(code: GpuCode, parts: Sequence[Section]) -> str:
    """Call ``one(index)`` for every index below the dims of every part, in one launch."""
    counts = [pieces(total(shape[:-1]), _rows_at_once(shape)) for shape, _ in parts]
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
        steps = pieces(last, columns)
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
        with code.loop(pieces(length, self.threads)) as step:
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
        with code.launch(pieces(count, each), THREADS, waits=False) as (block, thread):
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
    masked: bool = False,
) -> str:
    """Softmax or its logarithm along the last axis; the largest element is taken off first.

    Where rows are ``masked``, one whose elements are all -inf has zeros.
    """
    low, zero = const(float("-inf"), dtype), const(0, dtype)

    def one(team: Team, index: Index) -> None:
        def at(j: Expr) -> Expr:
            return x.at(code, [*index, j])

        largest = code.bind(team.combined(length, dtype, combines["max"], at))
        if masked:
            largest = code.bind(select(largest == low, zero, largest))

        def power(j: Expr) -> Expr:
            return mathfn.exp(code, at(j) - largest)

        whole = code.bind(team.combined(length, dtype, combines["sum"], power))
        if log:
            offset = code.bind(mathfn.log(code, whole))
            team.each(length, lambda j: store(code, [*index, j], at(j) - largest - offset))
        else:
            factor = const(1, dtype) / whole
            factor = code.bind(select(whole == zero, zero, factor) if masked else factor)
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
