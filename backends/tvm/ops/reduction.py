"""Reductions over axes, and the positions of extremes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tvm import tirx

from netlathe.backends.tvm import mathfn, storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import reduce as template
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops.elementwise import absolute, like
from netlathe.backends.tvm.ops.movement import element_at, sum_of
from netlathe.backends.tvm.ops.op import D, Op, Rule, combine
from netlathe.backends.tvm.tir import (
    NAMED,
    PARALLEL,
    Code,
    Expr,
    Index,
    cast,
    const,
    i64,
    select,
    total,
    unflatten,
)
from netlathe.backends.tvm.values import ChannelsLast, Pending, Store, Value, from_last
from netlathe.ir.dims import Shape


def _unchanged(code: Code, x: Expr) -> Expr:
    return x


_BEFORE: Mapping[str, Callable[[Code, Expr], Expr]] = {
    "l1": absolute,
    "l2": lambda code, x: x * x,
    "sum_square": lambda code, x: x * x,
}


def reduced(low: Lowering, x: Value, axes: Sequence[int], kind: str, keepdims: bool) -> Value:
    """``x`` reduced over ``axes``: sum, mean, max, min, prod, l1, l2, sum_square or log_sum."""
    if isinstance(x, ChannelsLast) and keepdims and 1 not in axes and 0 not in axes:
        last = reduced(low, x.last, [axis - 1 for axis in axes], kind, True)
        return ChannelsLast(x.dtype, tuple(from_last(last.shape)), last)
    source = low.operand(x)
    shape = source.shape
    gone = set(axes)
    kept_axes = [axis for axis in range(len(shape)) if axis not in gone]
    out: Shape = tuple(
        1 if axis in gone else dim for axis, dim in enumerate(shape) if keepdims or axis not in gone
    )
    base = kind if kind in template.COMBINE else "sum"
    before = _BEFORE.get(kind, _unchanged)
    dtype = storage.computed(source.dtype)
    ordered = sorted(gone)

    def build(kernel: Kernel, store: Store) -> str:
        dims_ = kernel.shape(shape)

        def element(code: Code, kept: list[Expr], inner: list[Expr]) -> Expr:
            index: list[Expr] = [i64(0)] * len(shape)
            for axis, at in zip(kept_axes, kept, strict=True):
                index[axis] = at
            for axis, at in zip(ordered, inner, strict=True):
                index[axis] = at
            return before(code, source.at(code, index))

        def place(code: Code, kept: Index, value: Expr) -> None:
            index: list[Expr] = list(kept)
            if keepdims:
                index = [i64(0)] * len(shape)
                for axis, at in zip(kept_axes, kept, strict=True):
                    index[axis] = at
            if kind == "mean":
                value = _mean(value, total([dims_[axis] for axis in ordered]), dtype)
            store(code, index, value)

        return template.reduce(
            kernel,
            [dims_[axis] for axis in kept_axes],
            [dims_[axis] for axis in ordered],
            len(shape) - 1 in gone,
            dtype,
            template.COMBINE[base],
            element,
            place,
        )

    result: Value = Pending(source.dtype, out, build)
    if kind == "l2":
        result = combine(low, lambda code, v: _root(v), [result], source.dtype, out)
    if kind == "log_sum":
        result = combine(low, lambda code, v: mathfn.log(code, v), [result], source.dtype, out)
    return result


def _mean(whole: Expr, count: Expr, dtype: str) -> Expr:
    count = cast(count, dtype)
    return whole / count if dtype.startswith("float") else tirx.truncdiv(whole, count)


def _root(v: Expr) -> Expr:
    dtype = str(v.ty.dtype)
    return tirx.sqrt(v) if dtype.startswith("float") else cast(tirx.sqrt(cast(v, "float64")), dtype)


_KINDS = {
    "ReduceSum": "sum",
    "ReduceMean": "mean",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceProd": "prod",
    "ReduceL1": "l1",
    "ReduceL2": "l2",
    "ReduceSumSquare": "sum_square",
    "ReduceLogSum": "log_sum",
}


def _axes(op: Op, rank: int) -> list[int] | None:
    """The axes, from the front; None: nothing is reduced."""
    given = op.ints(1) if op.has(1) else op.integers("axes")
    if op.has(1) and given is None:
        shape = op.low.found.type(op.node.inputs[1]).shape
        if shape != (0,):
            raise op.gap("axes that are decided by data")
        given = ()
    if not given:
        return None if op.integer("noop_with_empty_axes") else list(range(rank))
    return sorted({axis % rank for axis in given})


def _is_data(op: Op) -> bool:
    """Whether the axes are known only when the model runs."""
    if not op.has(1) or op.ints(1) is not None:
        return False
    return op.low.found.type(op.node.inputs[1]).shape != (0,)


def _reduce_by_data(op: Op) -> Value:
    """All axes are looped over; those that are not reduced have one step."""
    x, name = op.ready(0), op.node.op_type
    low, rank = op.low, x.rank
    keep = bool(op.integer("keepdims", 1))
    count = op.low.found.type(op.node.inputs[1]).shape
    if count is None or not isinstance(count[0], int):
        raise op.gap("an unknown number of axes")
    number = count[0]

    def flags(code: Code) -> list[Expr]:
        made = []
        for axis in range(rank):
            flag = const(False, "bool")
            for k in range(number):
                given = element_at(code, op, 1, k)
                given = select(given < i64(0), given + i64(rank), given)
                flag = tirx.Or(flag, given == i64(axis))
            made.append(code.bind(select(flag, i64(1), i64(0)), NAMED))
        return made

    def place(gone: list[Expr], axis: int) -> Expr:
        """Which axis of the result an axis that stays becomes."""
        return i64(axis) if keep else sum_of(i64(1) - flag for flag in gone[:axis])

    def size(code: Code, axis: int) -> Expr:
        gone, result = flags(code), i64(1)
        for at, dim in enumerate(code.kernel.shape(x.shape)):
            here = tirx.And(gone[at] == i64(0), place(gone, at) == i64(axis))
            result = select(here, dim, result)
        return result

    shape = op.decided(size)
    kind = {"ReduceLogSumExp": "log_sum"}.get(name) or _KINDS[name]
    before = mathfn.exp if name == "ReduceLogSumExp" else _BEFORE.get(kind, _unchanged)
    dtype = storage.computed(x.dtype)

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        sizes = kernel.shape(x.shape)
        with code.loop(1):
            gone = flags(code)
            steps = [
                code.bind(select(f == i64(1), d, i64(1)), NAMED)
                for f, d in zip(gone, sizes, strict=True)
            ]
            places = [code.bind(place(gone, axis), NAMED) for axis in range(rank)]
            whole = code.bind(total(steps), NAMED)

            def element(code: Code, kept: list[Expr], inner: list[Expr]) -> Expr:
                index = []
                for axis in range(rank):
                    own = i64(0)
                    for at, item in enumerate(kept):
                        own = select(places[axis] == i64(at), item, own)
                    index.append(select(gone[axis] == i64(1), inner[axis], own))
                return before(code, x.at(code, index))

            def finish(code: Code, index: Index, value: Expr) -> None:
                if kind == "mean":
                    value = (
                        value / cast(whole, dtype)
                        if dtype.startswith("float")
                        else tirx.truncdiv(value, cast(whole, dtype))
                    )
                store(code, index, value)

            base = kind if kind in template.COMBINE else "sum"
            return template.reduce(
                kernel,
                kernel.shape(shape),
                steps,
                False,
                dtype,
                template.COMBINE[base],
                element,
                finish,
            )

    made: Value = Pending(x.dtype, shape, build)
    if kind == "l2":
        return combine(low, lambda code, v: _root(v), [made], x.dtype, shape)
    if kind == "log_sum":
        return combine(low, lambda code, v: mathfn.log(code, v), [made], x.dtype, shape)
    return made


def _reduce(op: Op) -> Sequence[Value]:
    if _is_data(op):
        return [_reduce_by_data(op)]
    x = op.value(0)
    axes = _axes(op, x.rank)
    keep = bool(op.integer("keepdims", 1))
    if axes is None:
        axes, keep = [], True
    if op.node.op_type == "ReduceLogSumExp":
        return [_log_sum_exp(op, axes, keep)]
    return [reduced(op.low, x, axes, _KINDS[op.node.op_type], keep)]


def _log_sum_exp(op: Op, axes: list[int], keep: bool) -> Value:
    low, x = op.low, op.ready(0)
    largest = low.force(reduced(low, x, axes, "max", True))

    def held(m: Expr) -> Expr:
        infinite = tirx.Or(m == like(m, float("inf")), m == like(m, float("-inf")))
        return select(infinite, like(m, 0.0), m)

    power = combine(
        low, lambda code, a, m: mathfn.exp(code, a - held(m)), [x, largest], x.dtype, x.shape
    )
    whole = reduced(low, power, axes, "sum", keep)
    shown = low.force(largest).viewed(whole.shape)
    return combine(
        low,
        lambda code, s, m: mathfn.log(code, s) + held(m),
        [whole, shown],
        op.dtype(),
        whole.shape,
    )


def arg_extreme(low: Lowering, x: Value, axis: int, kind: str, last: bool, keepdims: bool) -> Value:
    """Where along ``axis`` the first (or last) largest or smallest element stands, in int64."""
    source = low.operand(x)
    shape = source.shape
    out: Shape = (*shape[:axis], *((1,) if keepdims else ()), *shape[axis + 1 :])

    def build(kernel: Kernel, store: Store) -> str:
        code = kernel.code
        dims_ = kernel.shape(shape)
        kept = dims_[:axis] + dims_[axis + 1 :]
        dtype = storage.computed(source.dtype)
        with code.loop(total(kept), PARALLEL) as at:
            index = [code.bind(i) for i in unflatten(at, kept)]
            before, after = index[:axis], index[axis:]
            best = code.alloc([1], dtype)
            where = code.alloc([1], "int64")
            code.store(best, i64(0), source.at(code, [*before, i64(0), *after]))
            code.store(where, i64(0), i64(0))
            with code.loop(dims_[axis]) as j:
                item = code.bind(source.at(code, [*before, j, *after]))
                held = tirx.BufferLoad(best, [i64(0)])
                if kind == "max":
                    better = item >= held if last else item > held
                else:
                    better = item <= held if last else item < held
                with code.when(better):
                    code.store(best, i64(0), item)
                    code.store(where, i64(0), j)
            place = [*before, *([i64(0)] if keepdims else []), *after]
            store(code, place, tirx.BufferLoad(where, [i64(0)]))
        return "reduce.arg"

    return Pending(D.INT64, out, build)


def _arg(op: Op) -> Sequence[Value]:
    x = op.value(0)
    return [
        arg_extreme(
            op.low,
            x,
            op.axis(x.rank),
            "max" if op.node.op_type == "ArgMax" else "min",
            bool(op.integer("select_last_index")),
            bool(op.integer("keepdims", 1)),
        )
    ]


ROWS: dict[str, Rule] = {
    **dict.fromkeys([*_KINDS, "ReduceLogSumExp"], _reduce),
    "ArgMax": _arg,
    "ArgMin": _arg,
}
