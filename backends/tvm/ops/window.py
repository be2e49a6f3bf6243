"""Convolutions and pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from tvm import tirx

from netlathe.backends.tvm import packing, storage
from netlathe.backends.tvm.arm import conv as arm
from netlathe.backends.tvm.cuda import conv as cuda_conv
from netlathe.backends.tvm.cuda import products
from netlathe.backends.tvm.cuda.groups import Groups
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.cuda.operands import HALVES
from netlathe.backends.tvm.cuda.windows import Windows as CudaWindows
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import conv as kernels
from netlathe.backends.tvm.kernels import gemm, pool, tile, winograd
from netlathe.backends.tvm.kernels import reduce as template
from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.ops import dots
from netlathe.backends.tvm.ops.elementwise import absolute, like
from netlathe.backends.tvm.ops.norm import channel
from netlathe.backends.tvm.ops.op import D, Op, Rule, channels_last, combine, cost_of, is_cheap
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
from netlathe.backends.tvm.values import (
    ChannelsLast,
    Lazy,
    Pending,
    Ready,
    Store,
    Value,
    from_last,
    to_last,
)
from netlathe.ir import dims, weights
from netlathe.ir.dims import Dim, Shape

_T = TypeVar("_T")


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


def plain_begins(op: Op) -> tuple[int, int] | None:
    """How far the windows of a node over planes reach before them, if ``pads`` says so."""
    if op.text("auto_pad", "NOTSET") != "NOTSET":
        return None
    pads = op.integers("pads") or (0, 0, 0, 0)
    return (pads[0], pads[1]) if len(pads) == 4 else None


# -- convolution ------------------------------------------------------------------------------------


def _conv(op: Op) -> Sequence[Value]:
    bias = op.operand(2) if op.has(2) else None
    value = op.node.inputs[1]
    constant = value if value is not None and weights.is_weight(value) else None
    if (made := dots.pair_convolution(op, plain_begins(op))) is not None:
        return [biased(op.low, made, bias)]
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
    each = Groups(groups, inputs, outputs // groups)
    made: Value
    if (
        isinstance(low.machine, Gpu)
        and constant is not None
        and len(kernel) == 2
        and not each.is_depthwise
        and each.together
        and x.dtype == constant.dtype == dtype
        and dtype in HALVES
    ):
        cut = CudaWindows(*_two(spans))
        turned, plain = tuple(to_last(shape)), spans.is_plain
        last = cuda_conv.of_halves(
            low, channels_last(low, x, 4), constant, cut, plain, each, turned
        )
        made = ChannelsLast(dtype, shape, last)
    elif isinstance(low.machine, Gpu) and not each.is_depthwise:
        x, weight = (v if is_cheap(v) else low.force(v) for v in (x, weight))
        made = products.convolution(
            x, weight, spans.strides, spans.dilations, spans.begins, groups, dtype, shape
        )
    elif isinstance(low.machine, Gpu) and len(kernel) == 2 and dtype in cuda_conv.DEPTHWISE:
        held = constant if isinstance(weight, Ready) and weight.dtype == dtype else None
        taps = _taps_first(low, weight, held, kernels.Geometry(groups, 1, 1, *_two(spans)[:3]))
        cut = CudaWindows(*_two(spans))
        last = cuda_conv.depthwise(low, channels_last(low, x, 4), taps, cut, tuple(to_last(shape)))
        made = ChannelsLast(dtype, shape, last)
    elif len(kernel) > 2 or isinstance(low.machine, Gpu):  # there, a thread for each result
        made = _conv_by_reduction(x, weight, spans, channels, dtype, shape)
    else:
        as_it_is = arm.multiplies(low.machine, x.dtype, constant) is not None
        source = channels_last(low, x if as_it_is else _widened(x), x.rank)
        plane = turned = tuple(to_last(shape))
        back: Callable[[Index], Index] | None = None
        if len(kernel) == 1:  # a plane of one row
            source, spans = _line(low, source), _plane(spans)
            plane, back = (turned[0], 1, *turned[1:]), lambda at: [at[0], *at[2:]]
        elif _one_column(x.shape, spans):  # tiles lie along rows
            source, weight = _swapped(low, source, 1), _swapped(low, weight, 2)
            spans = _across(spans)
            plane, back = _swap(turned, 1), lambda at: _swap(at, 1)
        last = _conv_2d(low, source, weight, spans, channels, dtype, plane, constant)
        if back is not None:
            last = last.then(lambda code, at, e: e, dtype, turned, back)
        made = ChannelsLast(dtype, shape, last)
    return biased(low, made, bias)


def _two(spans: Windows) -> list[tuple[int, int]]:
    """The size, strides, dilations and begins of windows over two dims."""
    return [(v[0], v[1]) for v in (spans.kernel, spans.strides, spans.dilations, spans.begins)]


def biased(low: Lowering, made: Value, bias: Value | None) -> Value:
    """``made`` plus a bias per channel."""
    if bias is None:
        return made
    held = channel(bias, made.rank)
    return combine(low, lambda code, x, b: x + b, [made, held], made.dtype, made.shape)


def _line(low: Lowering, value: Value) -> Value:
    """[b, n, c] as [b, 1, n, c]."""
    value = low.operand(value)
    shape = (value.shape[0], 1, *value.shape[1:])
    if isinstance(value, Ready):
        return value.viewed(shape)
    return Lazy(
        value.dtype,
        shape,
        lambda code, at: value.at(code, [at[0], *at[2:]]),
        cost=cost_of(value),
    )


def _one_column(shape: Shape, spans: Windows) -> bool:
    """Whether windows lie below each other only: a line of a signal, as TensorFlow writes it."""
    return (
        shape[3] == 1 == spans.kernel[1] != spans.kernel[0]
        and not spans.begins[1]
        and not spans.ends[1]
    )


def _swap(of: Sequence[_T], at: int) -> tuple[_T, ...]:
    return (*of[:at], of[at + 1], of[at], *of[at + 2 :])


def _swapped(low: Lowering, value: Value, axis: int) -> Value:
    """The value with two neighbouring dims in turn, of which one has one position."""
    value = low.operand(value)
    shape = _swap(value.shape, axis)
    if isinstance(value, Ready):
        return value.viewed(shape)
    return Lazy(
        value.dtype, shape, lambda code, at: value.at(code, _swap(at, axis)), cost=cost_of(value)
    )


def _across(spans: Windows) -> Windows:
    """Windows of one column as windows of one row."""
    return Windows(
        _swap(spans.kernel, 0),
        _swap(spans.strides, 0),
        _swap(spans.dilations, 0),
        _swap(spans.begins, 0),
        _swap(spans.ends, 0),
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
    """``x`` and the result are [b, rows, columns, channels]; ``shape`` is that of the result."""
    groups, outputs, inputs = channels
    geometry = kernels.Geometry(
        groups,
        inputs,
        outputs,
        (spans.kernel[0], spans.kernel[1]),
        (spans.strides[0], spans.strides[1]),
        (spans.dilations[0], spans.dilations[1]),
    )
    computed = storage.computed(dtype)
    if constant is not None and (weight.dtype != dtype or not isinstance(weight, Ready)):
        constant = None
    if geometry.is_depthwise:
        halves = dtype == D.FLOAT16 and arm.multiplies(low.machine, x.dtype, constant) is not None
        source = low.force(x if halves else _widened(x))
        taps = _taps_first(low, weight, constant, geometry)
        begins = (spans.begins[0], spans.begins[1])

        def depthwise(kernel: Kernel, store: Store) -> str:
            def widened(code: Code, index: Index, value: Expr) -> None:
                store(code, index, cast(value, computed))

            out, by = kernel.shape(shape), "float16" if halves else computed
            return kernels.depthwise(kernel, source, taps, geometry, begins, out, by, widened)

        return Pending(dtype, shape, depthwise)
    pads = (*spans.begins, *spans.ends)
    if (made := arm.by_constant(low, x, constant, geometry, pads, shape)) is not None:
        return made
    x = _widened(x)
    if spans.is_plain and groups == 1:
        return _pointwise(low, low.force(x), weight, constant, geometry, dtype, shape)
    if (made := winograd.by_constant(low, x, constant, geometry, pads, shape)) is not None:
        return made
    bordered = _bordered(low, x, spans, geometry)
    columns = shape[2] if isinstance(shape[2], int) else None
    apart = geometry.strides[1] * groups * inputs * np.dtype(computed).itemsize
    cut = tile.panels(low.machine, outputs, computed, columns, apart)
    held = _panelled(low, weight, constant, geometry, cut)

    def build(kernel: Kernel, store: Store) -> str:
        out = kernel.shape(shape)
        return kernels.direct(
            kernel, bordered, held, cut, geometry, out, tile.plain(computed), store
        )

    return Pending(dtype, shape, build)


def _pointwise(
    low: Lowering,
    x: Ready,
    weight: Value,
    constant: ir.Value | None,
    geometry: kernels.Geometry,
    dtype: D,
    shape: Shape,
) -> Pending:
    """A window of one element, all of which are taken: a matrix product of all positions."""
    plane = dims.product(shape[1:3])
    rows = plane if isinstance(plane, int) else None
    apart = geometry.inputs * np.dtype(storage.STORED[x.dtype]).itemsize
    cut = tile.panels(low.machine, geometry.outputs, storage.computed(dtype), rows, apart)
    held = gemm.Weight(_panelled(low, weight, constant, geometry, cut))
    flat = x.viewed((dims.product(x.shape[:-1]), geometry.inputs))

    def build(kernel: Kernel, store: Store) -> str:
        out = kernel.shape(shape)

        def give(code: Code, at: Index, element: Expr) -> None:
            store(code, [*unflatten(at[0], out[:3]), at[1]], element)

        lead = [total(out[:3])]
        return gemm.packed(kernel, flat, held, cut, lead, geometry.inputs, give, rows or 0)

    return Pending(dtype, shape, build)


def _panelled(
    low: Lowering,
    weight: Value,
    constant: ir.Value | None,
    geometry: kernels.Geometry,
    cut: tile.Panels,
) -> Ready:
    """The weight as [groups, panels, taps * inputs, width], packed at compile time where it is a constant."""
    g = geometry
    shape = (g.groups, cut.count, g.taps * g.inputs, cut.width)
    if constant is not None:
        assert constant.name is not None  # the IR has no constant without one
        recipe = Recipe(packing.window_panels, (constant.name,), (g.groups, cut.count, cut.width))
        return low.parameter(
            constant.name, weight.dtype, shape, recipe, (constant, "window", g.groups, cut)
        )
    source = low.operand(_widened(weight))

    def element(code: Code, at: Index) -> Expr:
        group, panel, k, lane = at
        own = panel * i64(cut.width) + lane
        output = group * i64(g.outputs) + tirx.min(own, i64(g.outputs - 1))
        down, across, channel_ = unflatten(k, [i64(n) for n in (*g.kernel, g.inputs)])
        window = [down, across] if source.rank == 4 else [across]
        item = source.at(code, [output, channel_, *window])
        return select(own < i64(g.outputs), item, like(item, 0))

    return low.force(Lazy(source.dtype, shape, element, cost=8 + cost_of(source)))


def _taps_first(
    low: Lowering, weight: Value, constant: ir.Value | None, geometry: kernels.Geometry
) -> Ready:
    """A depthwise weight as [taps, channels]."""
    shape = (geometry.taps, geometry.groups)
    if constant is not None:
        assert constant.name is not None
        recipe = Recipe(packing.taps_first, (constant.name,))
        return low.parameter(constant.name, weight.dtype, shape, recipe, (constant, "taps"))
    source = low.force(_widened(weight))
    flat = source.viewed((geometry.groups, geometry.taps))
    return low.force(Lazy(flat.dtype, shape, lambda code, at: flat.at(code, [at[1], at[0]])))


def _widened(value: Value) -> Value:
    """The kernel loads what it computes with."""
    if value.dtype in (D.FLOAT16, D.BFLOAT16):
        return Lazy(D.FLOAT, value.shape, value.at, cost=1 + cost_of(value))
    return value


def _bordered(low: Lowering, x: Value, spans: Windows, geometry: kernels.Geometry) -> Ready:
    """``x`` with zeros where windows reach beyond it."""
    if not any((*spans.begins, *spans.ends)):
        return low.force(x)
    source = low.operand(x)
    b, h, w, c = x.shape
    whole = (
        b,
        dims.add(h, spans.begins[0] + spans.ends[0]),
        dims.add(w, spans.begins[1] + spans.ends[1]),
        c,
    )

    def build(kernel: Kernel, store: Store) -> str:
        begins = (spans.begins[0], spans.begins[1])
        dtype = storage.computed(source.dtype)
        return kernels.padded(
            kernel, source, begins, kernel.shape(whole), lambda code: const(0, dtype), store
        )

    return low.force(Pending(x.dtype, whole, build))


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
) -> tuple[Pending | ChannelsLast, Windows]:
    x = op.operand(0)
    spans = windows(op, op.integers("kernel_shape") or (), x.shape)
    shape = op.shape()
    computed = storage.computed(x.dtype)
    combine_ = template.COMBINE[kind]
    if isinstance(x, ChannelsLast) and x.rank == 4:
        return ChannelsLast(
            op.dtype(), shape, _pooled_last(x, spans, combine_, before, shape)
        ), spans

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


def _pooled_last(
    x: ChannelsLast,
    spans: Windows,
    combine_: template.Combine,
    before: Callable[[Code, Expr], Expr],
    shape: Shape,
) -> Pending:
    last, turned = x.last, tuple(to_last(shape))
    source = Lazy(last.dtype, last.shape, lambda code, at: before(code, last.at(code, at)))
    rows, columns = (
        pool.Span(*each)
        for each in zip(spans.kernel, spans.strides, spans.dilations, spans.begins, strict=True)
    )

    def build(kernel: Kernel, store: Store) -> str:
        dtype = storage.computed(x.dtype)
        out = kernel.shape(turned)
        return pool.channels_last(kernel, source, (rows, columns), out, dtype, combine_, store)

    return Pending(x.dtype, turned, build)


def _then(
    made: Pending | ChannelsLast, function: Callable[[Code, Index, Expr], Expr], dtype: D
) -> Value:
    """``function`` of each result and its index in the usual order."""
    if isinstance(made, Pending):
        return made.then(function, dtype)
    assert isinstance(made.last, Pending)
    last = made.last.then(lambda code, at, e: function(code, from_last(at), e), dtype)
    return ChannelsLast(dtype, made.shape, last)


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

    return [_then(total_, divide, op.dtype())]


def _lp_pool(op: Op) -> Sequence[Value]:
    p = op.integer("p", 2)

    def power(code: Code, e: Expr) -> Expr:
        return e * e if p == 2 else tirx.pow(absolute(code, e), like(e, p))

    pooled, _ = _pooled(op, "sum", 0.0, power)
    return [_then(pooled, lambda code, index, e: _root(e, p), op.dtype())]


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
