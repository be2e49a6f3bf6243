"""Operators along an axis whose steps depend on each other: running sums, selection, placement.

Rows run in parallel; within a row the order is the operator's own. Where the data decides how much is
selected there is one row: select.count and select.scan are sequential.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import general
from netlathe.backends.tvm.ops.elementwise import larger, like, smaller
from netlathe.backends.tvm.ops.movement import element_at, wrapped
from netlathe.backends.tvm.ops.op import D, Op, Rule
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Code,
    Expr,
    Index,
    cast,
    const,
    dtype_of,
    flat_index,
    i64,
    is_nan,
    select,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import Lazy, Pending, Placed, Ready, Rows, Section, Store, Value
from netlathe.ir import dims


def _cumulative(op: Op) -> Sequence[Value]:
    """CumSum and CumProd."""
    x = op.operand(0)
    axes = op.ints(1)
    if axes is None:
        return [_cumulative_by_data(op, op.ready(0))]
    axis = axes[0] % x.rank
    product = op.node.op_type == "CumProd"
    kernel = Kernel(op.low)
    code = kernel.code
    out = kernel.write(x.dtype, x.shape)
    shape = kernel.shape(x.shape)
    others = shape[:axis] + shape[axis + 1 :]
    dtype = storage.computed(x.dtype)
    with code.loop(total(others), PARALLEL) as at:
        index = [code.bind(i) for i in unflatten(at, others)]
        held = code.alloc([1], dtype)
        code.store(held, i64(0), const(1 if product else 0, dtype))
        with code.loop(shape[axis]) as step:
            place = shape[axis] - i64(1) - step if op.integer("reverse") else step
            where = [*index[:axis], place, *index[axis:]]
            before = code.bind(tirx.BufferLoad(held, [i64(0)]))
            item = x.at(code, where)
            after = code.bind(before * item if product else before + item)
            code.store(held, i64(0), after)
            result = before if op.integer("exclusive") else after
            code.store(out, flat_index(where, shape), storage.store(code, x.dtype, result))
    return kernel.finish("scan.rows")


def _cumulative_by_data(op: Op, x: Ready) -> Value:
    """Along an axis known when the model runs: every result is summed up on its own."""
    product = op.node.op_type == "CumProd"
    dtype = storage.computed(x.dtype)

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        shape = kernel.shape(x.shape)
        with code.loop(total(shape), PARALLEL) as at:
            index = [code.bind(i) for i in unflatten(at, shape)]
            axis = code.bind(element_at(code, op, 1, 0))
            axis = code.bind(select(axis < i64(0), axis + i64(x.rank), axis))
            own, size = i64(0), i64(1)
            for number in range(x.rank):
                own = select(axis == i64(number), index[number], own)
                size = select(axis == i64(number), shape[number], size)
            own, size = code.bind(own), code.bind(size)
            exclusive = i64(1 if op.integer("exclusive") else 0)
            steps = size - own - exclusive if op.integer("reverse") else own + i64(1) - exclusive
            held = code.alloc([1], dtype)
            code.store(held, i64(0), const(1 if product else 0, dtype))
            with code.loop(steps) as step:
                place = code.bind(size - i64(1) - step if op.integer("reverse") else step)
                where = [
                    select(axis == i64(number), place, item) for number, item in enumerate(index)
                ]
                before, item = tirx.BufferLoad(held, [i64(0)]), x.at(code, where)
                code.store(held, i64(0), before * item if product else before + item)
            store(code, index, tirx.BufferLoad(held, [i64(0)]))
        return "scan.rows"

    return Pending(x.dtype, x.shape, build)


def _top_k(op: Op) -> Sequence[Value]:
    """Of equal values the one with the lower index comes first; each round takes the next best."""
    x = op.ready(0)
    axis = op.axis(x.rank, -1)
    largest = bool(op.integer("largest", 1))
    shape = op.decided(
        lambda code, at: element_at(code, op, 1, 0) if at == axis else code.kernel.size(x.shape[at])
    )
    kernel = Kernel(op.low)
    code = kernel.code
    values, places = kernel.write(x.dtype, shape), kernel.write(D.INT64, shape)
    sizes, out = kernel.shape(x.shape), kernel.shape(shape)
    others = sizes[:axis] + sizes[axis + 1 :]
    dtype = storage.computed(x.dtype)
    with code.loop(total(others), PARALLEL) as at:
        index = [code.bind(i) for i in unflatten(at, others)]
        taken = code.alloc([sizes[axis]], "int8", scope="global")
        with code.loop(sizes[axis]) as j:
            code.store(taken, j, const(0, "int8"))
        best, where = code.alloc([1], dtype), code.alloc([1], "int64")
        with code.loop(out[axis]) as rank:
            code.store(where, i64(0), i64(-1))
            with (
                code.loop(sizes[axis]) as j,
                code.when(tirx.BufferLoad(taken, [j]) == const(0, "int8")),
            ):
                item = code.bind(x.at(code, [*index[:axis], j, *index[axis:]]))
                held = tirx.BufferLoad(best, [i64(0)])
                better = item > held if largest else item < held
                if dtype.startswith("float"):  # NaN counts as larger than everything
                    if largest:
                        better = tirx.Or(better, tirx.And(is_nan(item), tirx.Not(is_nan(held))))
                    else:
                        better = tirx.Or(better, tirx.And(tirx.Not(is_nan(item)), is_nan(held)))
                first = tirx.BufferLoad(where, [i64(0)]) < i64(0)
                with code.when(tirx.Or(first, better)):
                    code.store(best, i64(0), item)
                    code.store(where, i64(0), j)
            found = code.bind(tirx.BufferLoad(where, [i64(0)]))
            code.store(taken, found, const(1, "int8"))
            target = flat_index([*index[:axis], rank, *index[axis:]], out)
            code.store(
                values, target, storage.store(code, x.dtype, tirx.BufferLoad(best, [i64(0)]))
            )
            code.store(places, target, found)
    return kernel.finish("select.rows")


# -- placement --------------------------------------------------------------------------------------


def _reduction(op: Op, held: Expr, item: Expr, code: Code) -> Expr:
    kind = op.text("reduction", "none")
    if kind == "none":
        return item
    if kind == "add":
        return tirx.Or(held, item) if str(held.ty.dtype) == "bool" else held + item
    if kind == "mul":
        return held * item
    return (larger if kind == "max" else smaller)(code, held, item)


def _started(op: Op, kernel: Kernel) -> Any:
    """The output of a node that changes some elements: its first input's tensor, or a copy of it."""
    # What is added to an element must not be added twice, should a call be repeated.
    plain = op.text("reduction", "none") == "none"
    held = op.low.replaceable(op.node) if plain else None
    return _copy(kernel, op.operand(0)) if held is None else kernel.update(held)


def _copy(kernel: Kernel, data: Value) -> Any:
    """A new output that starts as a copy of ``data``."""
    out = kernel.write(data.dtype, data.shape)
    store = general.into(out, data.dtype, kernel.shape(data.shape))
    general.elementwise(kernel, data, store)
    return out


def _scatter_elements(op: Op) -> Sequence[Value]:
    """Updates run in their own order where they may meet; only what lies apart is in parallel."""
    data, indices, updates = op.operand(0), op.operand(1), op.operand(2)
    axis = op.axis(data.rank)
    kernel = Kernel(op.low)
    code = kernel.code
    out = _started(op, kernel)
    shape, sizes = kernel.shape(data.shape), kernel.shape(indices.shape)
    others = sizes[:axis] + sizes[axis + 1 :]
    with code.loop(total(others), PARALLEL) as at:
        index = [code.bind(i) for i in unflatten(at, others)]
        with code.loop(sizes[axis]) as j:
            where = [*index[:axis], j, *index[axis:]]
            place = code.bind(wrapped(indices.at(code, where), shape[axis]))
            target = code.bind(flat_index([*index[:axis], place, *index[axis:]], shape))
            held = storage.load(code, data.dtype, tirx.BufferLoad(out, [target]))
            value = _reduction(op, held, updates.at(code, where), code)
            code.store(out, target, storage.store(code, data.dtype, value))
    return kernel.finish("scatter.rows")


def _scatter_nd(op: Op) -> Sequence[Value]:
    data, indices, updates = op.operand(0), op.operand(1), op.operand(2)
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise op.gap("indices of unknown depth")
    kernel = Kernel(op.low)
    code = kernel.code
    out = _started(op, kernel)
    shape = kernel.shape(data.shape)
    lead, rest = kernel.shape(indices.shape[:-1]), shape[depth:]
    with code.loop(total(rest), PARALLEL) as at:
        inner = [code.bind(i) for i in unflatten(at, rest)]
        with code.loop(total(lead)) as number:
            outer = [code.bind(i) for i in unflatten(number, lead)]
            place = [
                code.bind(wrapped(indices.at(code, [*outer, i64(i)]), shape[i]))
                for i in range(depth)
            ]
            target = code.bind(flat_index([*place, *inner], shape))
            held = storage.load(code, data.dtype, tirx.BufferLoad(out, [target]))
            value = _reduction(op, held, updates.at(code, [*outer, *inner]), code)
            code.store(out, target, storage.store(code, data.dtype, value))
    return kernel.finish("scatter.rows")


def _tensor_scatter(op: Op) -> Sequence[Value]:
    data, update = op.operand(0), op.operand(1)
    starts = op.operand(2) if op.has(2) else None
    axis = op.axis(data.rank, -2)

    def changed(kernel: Kernel, out: Any) -> Section:
        code = kernel.code
        shape = kernel.shape(data.shape)

        def one(index: Index) -> None:
            place = index[axis]
            if starts is not None:
                place = place + cast(starts.at(code, [index[0]]), "int64")
            if op.text("mode", "linear") == "circular":
                place = tirx.truncmod(place, shape[axis])
            target = flat_index([*index[:axis], place, *index[axis + 1 :]], shape)
            code.store(out, target, storage.store(code, data.dtype, update.at(code, index)))

        return kernel.shape(update.shape), one

    held = op.low.replaceable(op.node)
    if held is not None:
        rows = None
        is_linear = op.text("mode", "linear") == "linear" and (data.rank, axis) == (4, 2)
        if is_linear and isinstance(starts, Ready) and starts.dtype == D.INT64:
            rows = Rows(starts, update.shape[2])
        made = Placed(
            data.dtype, data.shape, held, rows, lambda kernel: changed(kernel, kernel.update(held))
        )
        # Attention writes it beside what else it needs in memory.
        waits = all(reader.op_type == "Attention" for reader, _ in op.node.outputs[0].uses())
        return [made if waits else op.low.force(made)]
    kernel = Kernel(op.low)
    sizes, one = changed(kernel, _copy(kernel, data))
    with kernel.code.loop(total(sizes), PARALLEL) as at:
        one([kernel.code.bind(i) for i in unflatten(at, sizes)])
    return kernel.finish("scatter.rows")


# -- selection of unknown size ----------------------------------------------------------------------


def _counted(op: Op, mask: Value) -> Ready:
    """int64 [1]: how many elements of a vector are true."""
    kernel = Kernel(op.low)
    code = kernel.code
    out = kernel.write(D.INT64, (1,))
    count = total(kernel.shape(mask.shape))
    with code.loop(1):
        code.store(out, i64(0), i64(0))
        with code.loop(count) as i:
            where = unflatten(i, kernel.shape(mask.shape))
            with code.when(_true(mask.at(code, where))):
                code.store(out, i64(0), tirx.BufferLoad(out, [i64(0)]) + i64(1))
    return kernel.finish("select.count")[0]


def _true(x: Expr) -> Expr:
    return x if dtype_of(x) == "bool" else x != like(x, 0)


def _non_zero(op: Op) -> Sequence[Value]:
    x = op.ready(0)
    shape = op.type().shape
    assert shape is not None
    op.low.size_from_data(_counted(op, x), [shape[1]])
    kernel = Kernel(op.low)
    code = kernel.code
    out = kernel.write(D.INT64, op.shape())
    sizes = kernel.shape(x.shape)
    width = kernel.size(shape[1])
    with code.loop(1):
        position = code.alloc([1], "int64")
        code.store(position, i64(0), i64(0))
        with code.loop(total(sizes)) as i:
            index = [code.bind(item) for item in unflatten(i, sizes)] or [i64(0)]
            with code.when(_true(x.at(code, index if x.rank else []))):
                at = code.bind(tirx.BufferLoad(position, [i64(0)]))
                for axis, item in enumerate(index):
                    if axis < x.rank:
                        code.store(out, i64(axis) * width + at, item)
                code.store(position, i64(0), at + i64(1))
    return kernel.finish("select.scan")


def _positions(op: Op, mask: Value, count: dims.Dim) -> Ready:
    """Where a vector of bools is true, in order."""
    kernel = Kernel(op.low)
    code = kernel.code
    out = kernel.write(D.INT64, (count,))
    with code.loop(1):
        position = code.alloc([1], "int64")
        code.store(position, i64(0), i64(0))
        with code.loop(kernel.size(mask.shape[0])) as i, code.when(mask.at(code, [i])):
            at = code.bind(tirx.BufferLoad(position, [i64(0)]))
            code.store(out, at, i)
            code.store(position, i64(0), at + i64(1))
    return kernel.finish("select.scan")[0]


def _compress(op: Op) -> Sequence[Value]:
    x, mask = op.ready(0), op.ready(1)
    if "axis" in op.node.attributes:
        axis = op.axis(x.rank)
    else:
        x, axis = x.viewed((dims.product(x.shape),)), 0
    shape = op.type().shape
    assert shape is not None
    op.low.size_from_data(_counted(op, mask), [shape[axis]])
    where = _positions(op, mask, op.shape()[axis])

    def element(code: Code, index: Sequence[Expr]) -> Expr:
        at = where.at(code, [index[axis]])
        return x.at(code, [*index[:axis], at, *index[axis + 1 :]])

    return [Lazy(x.dtype, op.shape(), element, cost=3)]


ROWS: dict[str, Rule] = {
    "CumSum": _cumulative,
    "CumProd": _cumulative,
    "TopK": _top_k,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
    "NonZero": _non_zero,
    "Compress": _compress,
}
