"""Convolutions and pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import packing, storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import conv as kernels
from netlathe.backends.tvm.kernels import reduce as template
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops.elementwise import absolute, like
from netlathe.backends.tvm.ops.norm import channel
from netlathe.backends.tvm.ops.op import D, Op, Rule, combine, cost_of
from netlathe.backends.tvm.ops.reduction import reduced
from netlathe.backends.tvm.packing import Recipe
from netlathe.backends.tvm.tir import (
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
from netlathe.backends.tvm.values import Lazy, Pending, Ready, Store, Value
from netlathe.ir import dims, weights
from netlathe.ir.dims import Dim, Shape


@dataclass(frozen=True)
class Windows:
    """Windows over the spatial dims: the same for convolutions and pools."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether every window is one element, and all are taken."""
        return {*self.kernel, *self.strides} <= {1} and not any(self.begins) and not any(self.ends)


def windows(op: Op, kernel: Sequence[int], shape: Shape) -> Windows:
    """The node's windows over an input of ``shape``."""
    rank = len(kernel)
    strides = tuple(op.integers("strides") or (1,) * rank)
    dilations = tuple(op.integers("dilations") or (1,) * rank)
    auto = op.text("auto_pad", "NOTSET")
    pads = tuple(op.integers("pads") or (0,) * (2 * rank))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for size, k, s, d in zip(shape[2:], kernel, strides, dilations, strict=True):
            if not isinstance(size, int):
                raise op.gap(f"auto_pad={auto} of a dynamic size")
            whole = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            small, large = whole // 2, whole - whole // 2
            begins.append(small if auto == "SAME_UPPER" else large)
            ends.append(large if auto == "SAME_UPPER" else small)
        return Windows(tuple(kernel), strides, dilations, tuple(begins), tuple(ends))
    if auto == "VALID":
        pads = (0,) * (2 * rank)
    return Windows(tuple(kernel), strides, dilations, pads[:rank], pads[rank:])


# -- convolution ------------------------------------------------------------------------------------


def _conv(op: Op) -> Sequence[Value]:
    bias = op.operand(2) if op.has(2) else None
    value = op.node.inputs[1]
    constant = value if value is not None and weights.is_weight(value) else None
    return [convolved(op, op.operand(0), op.operand(1), bias, op.dtype(), op.shape(), constant)]


def convolved(
    op: Op,
    x: Value,
    weight: Value,
    bias: Value | None,
    dtype: D,
    shape: Shape,
    constant: ir.Value | None = None,
) -> Value:
    """The convolution of ``x`` with ``weight``, both computed in the type of ``dtype``.

    ``constant`` is the weight as a value of the graph, where it may be packed.
    """
    low = op.low
    if not all(isinstance(size, int) for size in weight.shape):
        raise op.gap("a kernel of unknown size")
    outputs, inputs, *kernel = (int(size) for size in weight.shape if isinstance(size, int))
    spans = windows(op, kernel, x.shape)
    groups = op.integer("group", 1)
    channels = (groups, outputs // groups, inputs)
    if len(kernel) == 1:
        line = _conv_2d(
            low, _line(x), _line(weight), _plane(spans), channels, dtype, _line_shape(shape)
        )
        made: Value = line.then(
            lambda code, index, e: e, dtype, shape, lambda at: [at[0], at[1], at[3]]
        )
    elif len(kernel) == 2:
        made = _conv_2d(low, x, weight, spans, channels, dtype, shape, constant)
    else:
        made = _conv_by_reduction(x, weight, spans, channels, dtype, shape)
    return _biased(low, made, bias)


def _biased(low: Lowering, made: Value, bias: Value | None) -> Value:
    if bias is None:
        return made
    held = channel(bias, made.rank)
    return combine(low, lambda code, x, b: x + b, [made, held], made.dtype, made.shape)


def _line_shape(shape: Shape) -> Shape:
    return (*shape[:2], 1, shape[2])


def _line(value: Value) -> Value:
    """[.., .., n] as [.., .., 1, n]."""
    shape = _line_shape(value.shape)
    if isinstance(value, Ready):
        return value.viewed(shape)
    return Lazy(
        value.dtype,
        shape,
        lambda code, at: value.at(code, [at[0], at[1], at[3]]),
        cost=cost_of(value),
    )


def _plane(spans: Windows) -> Windows:
    return Windows(
        (1, *spans.kernel),
        (1, *spans.strides),
        (1, *spans.dilations),
        (0, *spans.begins),
        (0, *spans.ends),
    )


def _conv_2d(
    low: Lowering,
    x: Value,
    weight: Value,
    spans: Windows,
    channels: tuple[int, int, int],
    dtype: D,
    shape: Shape,
    constant: ir.Value | None = None,
) -> Pending:
    groups, outputs, inputs = channels
    prepared, positions = _prepared(low, x, spans, shape, storage.computed(dtype))
    tile = None
    if constant is not None and weight.dtype in (D.FLOAT, D.DOUBLE) and positions is not None:
        assert constant.name is not None
        tile = kernels.tile(low.machine, outputs, positions, storage.computed(dtype))
        tiles = -(-outputs // tile.channels)
        held = low.parameter(
            constant.name,
            weight.dtype,
            (groups, tiles, inputs * spans.kernel[0] * spans.kernel[1], tile.channels),
            Recipe(packing.channel_tiles, (constant.name,), (groups, tile.channels)),
            (constant, "tiles", groups, tile.channels),
        )
    else:
        held = low.force(_widened(weight))
    geometry = kernels.Geometry(
        groups,
        inputs,
        outputs,
        (spans.kernel[0], spans.kernel[1]),
        (spans.strides[0], spans.strides[1]),
        (spans.dilations[0], spans.dilations[1]),
    )

    def build(kernel: Kernel, store: Store) -> str:
        computed = storage.computed(dtype)
        return kernels.direct(
            kernel, prepared, held, tile, geometry, kernel.shape(shape), positions, computed, store
        )

    return Pending(dtype, shape, build)


def _widened(value: Value) -> Value:
    """The kernel loads what it computes with."""
    if value.dtype in (D.FLOAT16, D.BFLOAT16):
        return Lazy(D.FLOAT, value.shape, value.at, cost=1 + cost_of(value))
    return value


def _prepared(
    low: Lowering, x: Value, spans: Windows, shape: Shape, dtype: str
) -> tuple[Ready, int | None]:
    """``x`` with its padding and split by the strides, and how many positions the kernel goes over.

    Where ``x`` is copied for that, rows after the last make the positions a multiple of a vector.
    """
    x = _widened(x)
    b, c, h, w = x.shape
    down, across = spans.strides
    if spans.is_plain or (down == across == 1 and not any((*spans.begins, *spans.ends))):
        ready = low.force(x)
        if spans.kernel == (1, 1):  # no tap looks beyond its own position
            return ready.viewed((b, c, 1, h, w)), _fixed(dims.product((h, w)))
        return ready.viewed((b, c, 1, h, w)), _positions(shape, w)
    rows = dims.ceil_divide(dims.add(h, spans.begins[0] + spans.ends[0]), down)
    columns = dims.ceil_divide(dims.add(w, spans.begins[1] + spans.ends[1]), across)

    positions = _positions(shape, columns)
    if positions is not None and columns != shape[3]:
        lanes = low.machine.lanes(dtype)
        more = -positions % lanes
        positions += more
        rows = dims.add(rows, dims.ceil_divide(more, columns))
    whole = (b, c, down * across, rows, columns)

    def build(kernel: Kernel, store: Store) -> str:
        begins = (spans.begins[0], spans.begins[1])
        return kernels.split(kernel, x, kernel.shape(whole), (down, across), begins, store)

    return low.force(Pending(x.dtype, whole, build)), positions


def _positions(shape: Shape, width: Dim) -> int | None:
    rows, columns = shape[2:]
    if isinstance(rows, int) and isinstance(columns, int) and isinstance(width, int):
        return (rows - 1) * width + columns
    return None


def _fixed(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) else None


def _conv_by_reduction(
    x: Value,
    weight: Value,
    spans: Windows,
    channels: tuple[int, int, int],
    dtype: D,
    shape: Shape,
) -> Value:
    """Any number of spatial dims: a sum over channels and taps, vectors along the last dim."""
    computed = storage.computed(dtype)
    _, outputs, inputs = channels

    def build(kernel: Kernel, store: Store) -> str:
        sizes = kernel.shape(x.shape)

        def element(code: Code, kept: list[Expr], inner: list[Expr]) -> Expr:
            group = tirx.truncdiv(kept[1], i64(outputs))
            inside = None
            where = []
            for axis, tap in enumerate(inner[1:]):
                at = kept[2 + axis] * i64(spans.strides[axis]) + tap * i64(spans.dilations[axis])
                at = at - i64(spans.begins[axis])
                fits = tirx.And(at >= i64(0), at < sizes[2 + axis])
                inside = fits if inside is None else tirx.And(inside, fits)
                where.append(tirx.max(tirx.min(at, sizes[2 + axis] - i64(1)), i64(0)))
            item = x.at(code, [kept[0], group * i64(inputs) + inner[0], *where])
            item = cast(item, computed)
            item = select(inside, item, like(item, 0)) if inside is not None else item
            return item * cast(weight.at(code, [kept[1], *inner]), computed)

        taps = [i64(inputs), *(i64(size) for size in spans.kernel)]
        return template.reduce(
            kernel,
            kernel.shape(shape),
            taps,
            False,
            computed,
            template.COMBINE["sum"],
            element,
            store,
        )

    return Pending(dtype, shape, build)


def _conv_transpose(op: Op) -> Sequence[Value]:
    x, weight = op.ready(0), op.ready(1)
    dtype, shape = op.dtype(), op.shape()
    groups = op.integer("group", 1)
    rank = x.rank - 2
    kernel = [int(size) for size in weight.shape[2:] if isinstance(size, int)]
    strides = tuple(op.integers("strides") or (1,) * rank)
    dilations = tuple(op.integers("dilations") or (1,) * rank)
    begins = _transposed_begins(op, x.shape, shape, kernel, strides, dilations)
    inputs, outputs = x.shape[1], weight.shape[1]
    if len(kernel) != rank or not isinstance(inputs, int) or not isinstance(outputs, int):
        raise op.gap("a kernel of unknown size")
    inner_channels = inputs // groups
    computed = storage.computed(dtype)

    def build(kernel_: Kernel, store: Store) -> str:
        sizes = kernel_.shape(x.shape)

        def element(code: Code, kept: list[Expr], inner: list[Expr]) -> Expr:
            group = tirx.truncdiv(kept[1], i64(outputs))
            own = tirx.truncmod(kept[1], i64(outputs))
            channel_ = group * i64(inner_channels) + inner[0]
            inside = const(True, "bool")
            where = []
            for axis, tap in enumerate(inner[1:]):
                at = kept[2 + axis] + code.kernel.size(begins[axis]) - tap * i64(dilations[axis])
                step = i64(strides[axis])
                place = tirx.truncdiv(at, step)
                fits = tirx.And(at >= i64(0), tirx.truncmod(at, step) == i64(0))
                inside = tirx.And(inside, tirx.And(fits, place < sizes[2 + axis]))
                where.append(tirx.max(tirx.min(place, sizes[2 + axis] - i64(1)), i64(0)))
            item = x.at(code, [kept[0], channel_, *where])
            item = select(inside, item, like(item, 0))
            return item * weight.at(code, [channel_, own, *inner[1:]])

        taps = [i64(inner_channels), *(i64(size) for size in kernel)]
        return template.reduce(
            kernel_,
            kernel_.shape(shape),
            taps,
            False,
            computed,
            template.COMBINE["sum"],
            element,
            store,
        )

    result: Value = Pending(dtype, shape, build)
    if op.has(2):
        bias = channel(op.operand(2), len(shape))
        result = combine(op.low, lambda code, a, b: a + b, [result, bias], dtype, shape)
    return [result]


def _transposed_begins(
    op: Op,
    source: Shape,
    shape: Shape,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[Dim]:
    """What is cut off at the begin of each spatial dim."""
    rank = len(kernel)
    auto = op.text("auto_pad", "NOTSET")
    pads = op.integers("pads") or (0,) * (2 * rank)
    extra = op.integers("output_padding") or (0,) * rank
    if auto not in ("SAME_UPPER", "SAME_LOWER") and not op.integers("output_shape"):
        return list(pads[:rank]) if auto != "VALID" else [0] * rank
    begins: list[Dim] = []
    for axis in range(rank):
        reach = (kernel[axis] - 1) * dilations[axis] + 1 + extra[axis]
        full = dims.add(dims.product([strides[axis], dims.subtract(source[2 + axis], 1)]), reach)
        cut = dims.subtract(full, shape[2 + axis])
        if not isinstance(cut, int):
            raise op.gap("an output shape of a dynamic size")
        cut = max(cut, 0)
        begins.append(cut // 2 if auto == "SAME_UPPER" else cut - cut // 2)
        if auto == "NOTSET":
            begins[-1] = cut - cut // 2
    return begins


# -- pools ------------------------------------------------------------------------------------------


def _pooled(
    op: Op,
    kind: str,
    neutral: float,
    before: Callable[[Code, Expr], Expr],
) -> tuple[Pending, Windows]:
    x = op.operand(0)
    spans = windows(op, op.integers("kernel_shape") or (), x.shape)
    shape = op.shape()
    computed = storage.computed(x.dtype)
    combine_ = template.COMBINE[kind]

    def build(kernel: Kernel, store: Store) -> str:
        sizes = kernel.shape(x.shape)

        def element(code: Code, kept: list[Expr], inner: list[Expr]) -> Expr:
            inside = None
            where = []
            for axis, tap in enumerate(inner):
                at = kept[2 + axis] * i64(spans.strides[axis]) + tap * i64(spans.dilations[axis])
                at = at - i64(spans.begins[axis])
                fits = tirx.And(at >= i64(0), at < sizes[2 + axis])
                inside = fits if inside is None else tirx.And(inside, fits)
                where.append(tirx.max(tirx.min(at, sizes[2 + axis] - i64(1)), i64(0)))
            item = before(code, x.at(code, [*kept[:2], *where]))
            empty = combine_.start(computed) if kind == "max" else like(item, neutral)
            return select(inside, item, empty) if inside is not None else item

        return template.reduce(
            kernel,
            kernel.shape(shape),
            [i64(size) for size in spans.kernel],
            False,
            computed,
            combine_,
            element,
            store,
        )

    return Pending(op.dtype(), shape, build), spans


def _max_pool(op: Op) -> Sequence[Value]:
    if op.wants(1):
        return _max_pool_with_indices(op)
    return [_pooled(op, "max", 0.0, lambda code, e: e)[0]]


def _max_pool_with_indices(op: Op) -> Sequence[Value]:
    x = op.ready(0)
    spans = windows(op, op.integers("kernel_shape") or (), x.shape)
    shape = op.shape()
    computed = storage.computed(x.dtype)
    order = range(len(spans.kernel))
    kernel = Kernel(op.low)
    code = kernel.code
    values, places = kernel.write(x.dtype, shape), kernel.write(D.INT64, shape)
    sizes, out = kernel.shape(x.shape), kernel.shape(shape)
    with code.loop(total(out), PARALLEL) as at:
        index = [code.bind(i) for i in unflatten(at, out)]
        best, where = code.alloc([1], computed), code.alloc([1], "int64")
        code.store(best, i64(0), template.COMBINE["max"].start(computed))
        code.store(where, i64(0), i64(-1))
        taps = [i64(size) for size in spans.kernel]
        with code.loop(total(taps)) as tap:
            place = []
            inside = const(True, "bool")
            for axis, step in enumerate(unflatten(tap, taps)):
                here = index[2 + axis] * i64(spans.strides[axis]) - i64(spans.begins[axis])
                here = here + step * i64(spans.dilations[axis])
                inside = tirx.And(inside, tirx.And(here >= i64(0), here < sizes[2 + axis]))
                place.append(here)
            with code.when(inside):
                item = code.bind(x.at(code, [*index[:2], *place]))
                first = tirx.BufferLoad(where, [i64(0)]) < i64(0)
                with code.when(tirx.Or(first, item > tirx.BufferLoad(best, [i64(0)]))):
                    flat = i64(0)
                    for axis in order if not op.integer("storage_order") else reversed(order):
                        flat = flat * sizes[2 + axis] + place[axis]
                    plane = index[0] * sizes[1] + index[1]
                    code.store(best, i64(0), item)
                    code.store(where, i64(0), plane * total(sizes[2:]) + flat)
        code.store(values, at, storage.store(code, x.dtype, tirx.BufferLoad(best, [i64(0)])))
        code.store(places, at, tirx.BufferLoad(where, [i64(0)]))
    return kernel.finish("pool.arg")


def _average_pool(op: Op) -> Sequence[Value]:
    total_, spans = _pooled(op, "sum", 0.0, lambda code, e: e)
    x_shape = op.operand(0).shape
    include = bool(op.integer("count_include_pad"))

    def divide(code: Code, index: Index, value: Expr) -> Expr:
        count = i64(1)
        for axis, size in enumerate(spans.kernel):
            extent = code.kernel.size(x_shape[2 + axis])
            low = i64(-spans.begins[axis] if include else 0)
            high = extent + i64(spans.ends[axis]) if include else extent
            first = index[2 + axis] * i64(spans.strides[axis]) - i64(spans.begins[axis])
            held = i64(0)
            for tap in range(size):
                at = first + i64(tap * spans.dilations[axis])
                inside = tirx.And(at >= low, at < high)
                held = held + select(inside, i64(1), i64(0))
            count = count * held
        return value / cast(count, str(value.ty.dtype))

    return [total_.then(divide, op.dtype())]


def _lp_pool(op: Op) -> Sequence[Value]:
    p = op.integer("p", 2)

    def power(code: Code, e: Expr) -> Expr:
        return e * e if p == 2 else tirx.pow(absolute(code, e), like(e, p))

    pooled, _ = _pooled(op, "sum", 0.0, power)
    return [pooled.then(lambda code, index, e: _root(e, p), op.dtype())]


def _root(value: Expr, p: int) -> Expr:
    if p == 1:
        return value
    return tirx.sqrt(value) if p == 2 else tirx.pow(value, like(value, 1 / p))


def _global(op: Op) -> Sequence[Value]:
    x = op.operand(0)
    axes = list(range(2, x.rank))
    kind = {"GlobalAveragePool": "mean", "GlobalMaxPool": "max"}.get(op.node.op_type)
    if kind is not None:
        return [reduced(op.low, x, axes, kind, True)]
    p = op.integer("p", 2)
    power = combine(
        op.low,
        lambda code, e: tirx.pow(absolute(code, e), like(e, p)),
        [x],
        x.dtype,
        x.shape,
    )
    whole = reduced(op.low, power, axes, "sum", True)
    return [combine(op.low, lambda code, e: _root(e, p), [whole], x.dtype, whole.shape)]


ROWS: dict[str, Rule] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "LpPool": _lp_pool,
    "GlobalAveragePool": _global,
    "GlobalMaxPool": _global,
    "GlobalLpPool": _global,
}
