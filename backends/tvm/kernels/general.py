"""The schedule that covers everything else: outer dims in parallel, the last dim in vectors.

general.flat    one loop over all elements: blocks in parallel, vectors within
general.rows    the outer dims fused and in parallel, vectors along the last dim
general.flat    of stretches: each of some that lie apart in such blocks
general.tiles   of what is transposed: as many rows at a time as a line of the cache holds of what is read
general.sections   several such loops one after the other, or loops that write over parts of a tensor
general.small   the same without threads: a launch would cost more than the work
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.cuda import grids
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.tir import (
    PARALLEL,
    SERIAL,
    VECTORIZED,
    Code,
    Expr,
    Index,
    flat_index,
    i64,
    idiv,
    known,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Lazy, Placed, Ready, Scalar, Section, Store, Value

# Elements below which one thread is faster: a parallel launch costs a few microseconds.
SMALL = 4096
# Elements of a block of the flat schedule: some 4 to 8 microseconds of work, in a level-1 cache.
_BLOCK = 4096
_LINE_BYTES = 64


def into(out: object, dtype: object, shape: list[Expr]) -> Store:
    """Stores elements into a flat buffer of ``shape``."""

    def store(code: Code, index: Index, element: Expr) -> None:
        if len(index) == 1 and len(shape) != 1:
            position = index[0]
        else:
            position = flat_index(index, shape)
        code.store(out, position, storage.store(code, dtype, element))  # type: ignore[arg-type]

    return store


def write(kernel: Kernel, value: Value) -> str:
    """Write ``value``, element by element, to a new output; the schedule's name."""
    out = kernel.write(value.dtype, value.shape)
    shape = kernel.shape(value.shape)
    return elementwise(kernel, value, into(out, value.dtype, shape))


def elementwise(kernel: Kernel, value: Value, store: Store) -> str:
    """Hand every element of ``value`` to ``store``; the schedule's name."""
    code = kernel.code
    shape = kernel.shape(value.shape)
    count = total(shape)
    if isinstance(code, GpuCode) and code.on_host:
        return grids.elementwise(
            code, shape, is_flat(value), lambda at: store(code, at, value.at(code, at))
        )
    number = known(count)
    small = number is not None and number <= SMALL
    if is_flat(value):
        _flat(kernel, count, small, lambda at: store(code, at, value.at(code, at)))
        return "general.small" if small else "general.flat"
    if isinstance(value, Lazy) and value.along is not None and not small:
        _tiles(kernel, value, value.along, shape, store)
        return "general.tiles"
    with code.loop(total(shape[:-1]), SERIAL if small else PARALLEL) as row:
        outer = [code.bind(item) for item in unflatten(row, shape[:-1])]
        lanes = lanes_of(kernel, value, shape[-1])
        vectors(code, shape[-1], lanes, lambda j: _one(code, value, [*outer, j], store))
    return "general.small" if small else "general.rows"


def _tiles(kernel: Kernel, value: Value, axis: int, shape: list[Expr], store: Store) -> None:
    """Vectors along the last dim, for all that lie in a line along ``axis`` before the next vectors."""
    code, last = kernel.code, shape[-1]
    lanes = lanes_of(kernel, value, last)
    rows = _LINE_BYTES // np.dtype(storage.STORED[value.dtype]).itemsize
    tasks = [*shape[:-1]]
    tasks[axis] = idiv(shape[axis] + i64(rows - 1), rows)
    with code.loop(total(tasks), PARALLEL) as task:
        index = [code.bind(item) for item in unflatten(task, tasks)]
        begin = code.bind(index[axis] * i64(rows))
        height = code.bind(_smaller(i64(rows), shape[axis] - begin))

        def give(row: Expr, column: Expr) -> None:
            place = [*index[:axis], code.bind(begin + row), *index[axis + 1 :], column]
            _one(code, value, place, store)

        done = i64(0)
        if lanes > 1:
            whole = code.bind(idiv(last, lanes))
            with code.loop(whole) as block, code.loop(height) as row:
                with code.loop(lanes, VECTORIZED) as lane:
                    give(row, block * i64(lanes) + lane)
            done = whole * i64(lanes)
        with code.loop(height) as row, code.loop(last - done) as j:
            give(row, done + j)


def _one(code: Code, value: Value, index: Index, store: Store) -> None:
    store(code, index, value.at(code, index))


def section(kernel: Kernel, value: Lazy | Placed) -> Section:
    """Writing ``value``, to a new output or over a tensor, as a part of a kernel."""
    if isinstance(value, Placed):
        return value.section(kernel)
    code, source = kernel.code, value
    shape = kernel.shape(value.shape)
    store = into(kernel.write(value.dtype, value.shape), value.dtype, shape)
    return shape, lambda index: store(code, index, source.at(code, index))


def sections(kernel: Kernel, parts: Sequence[Section]) -> str:
    """Do several parts, which do not read what another writes; the schedule's name."""
    code = kernel.code
    if isinstance(code, GpuCode):
        return grids.sections(code, parts)
    for shape, one in parts:
        number = known(total(shape))
        small = number is not None and number <= SMALL
        with code.loop(total(shape[:-1]), SERIAL if small else PARALLEL) as row:
            outer = [code.bind(item) for item in unflatten(row, shape[:-1])]
            with code.loop(shape[-1]) as j:
                one([*outer, j])
    return "general.sections"


def is_flat(value: Value) -> bool:
    """Whether ``value`` may be read by element number."""
    return (
        isinstance(value, (Ready, Scalar))
        or value.rank <= 1
        or (isinstance(value, Lazy) and value.flat)
    )


def lanes_of(kernel: Kernel, value: Value, last: Expr) -> int:
    """Vector length for ``value``: a whole register, or a power of two that the last dim holds."""
    lanes = kernel.lowering.machine.lanes(storage.computed(value.dtype))
    width = known(last)
    while width is not None and lanes > 1 and lanes > width:
        lanes //= 2
    return lanes


def _flat(kernel: Kernel, count: Expr, small: bool, one: object) -> None:
    code = kernel.code
    # Lanes of 4-byte elements, whatever the type: LLVM splits what is wider.
    lanes = kernel.lowering.machine.lanes("float32")
    number = known(count)
    while number is not None and lanes > 1 and lanes > number:
        lanes //= 2
    if small:
        vectors(code, count, lanes, lambda i: one([i]))  # type: ignore[operator]
        return
    blocks = idiv(count + i64(_BLOCK - 1), _BLOCK)
    with code.loop(blocks, PARALLEL) as block:
        start = code.bind(block * i64(_BLOCK))
        length = code.bind(_smaller(i64(_BLOCK), count - start))
        vectors(code, length, lanes, lambda i: one([start + i]))  # type: ignore[operator]


def stretches(
    kernel: Kernel, count: Expr, length: Expr, one: Callable[[Code, Expr, Expr], None]
) -> str:
    """one(code, stretch, position) for ``count`` stretches of ``length`` neighbours; the schedule's name."""
    code = kernel.code
    lanes = kernel.lowering.machine.lanes("float32")
    blocks = code.bind(idiv(length + i64(_BLOCK - 1), _BLOCK))
    number = known(count * length)
    small = number is not None and number <= SMALL
    with code.loop(count * blocks, SERIAL if small else PARALLEL) as task:
        stretch, block = (code.bind(i) for i in unflatten(task, [count, blocks]))
        start = code.bind(block * i64(_BLOCK))
        size = code.bind(_smaller(i64(_BLOCK), length - start))
        vectors(code, size, lanes, lambda i: one(code, stretch, start + i))
    return "general.small" if small else "general.flat"


def _smaller(a: Expr, b: Expr) -> Expr:
    from tvm import tirx

    return tirx.min(a, b)


def vectors(code: Code, extent: Expr, lanes: int, body: object) -> None:
    """Call ``body(j)`` for j in [0, extent): in vectors of ``lanes``, then one at a time."""
    extent = i64(extent)
    number = known(extent)
    whole = i64(number // lanes) if number is not None else code.bind(idiv(extent, lanes))
    if lanes > 1 and known(whole) != 0:
        with code.loop(whole) as block, code.loop(lanes, VECTORIZED) as lane:
            body(block * i64(lanes) + lane)  # type: ignore[operator]
    done = whole * i64(lanes) if lanes > 1 else i64(0)
    rest = extent - done
    if known(rest) != 0:
        with code.loop(rest) as j:
            body(done + j)  # type: ignore[operator]
