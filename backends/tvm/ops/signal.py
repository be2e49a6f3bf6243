"""Windows, discrete Fourier transforms, sampling at computed places, convolution with a state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import reduce as template
from netlathe.backends.tvm.ops.elementwise import like, swish
from netlathe.backends.tvm.ops.movement import element_at
from netlathe.backends.tvm.ops.op import Op, Rule, is_cheap
from netlathe.backends.tvm.tir import (
    NAMED,
    Code,
    Expr,
    Index,
    cast,
    const,
    dtype_of,
    i64,
    select,
)
from netlathe.backends.tvm.values import Lazy, Pending, Store, Value

_TERMS: Mapping[str, tuple[float, ...]] = {
    "HannWindow": (0.5, -0.5),
    "HammingWindow": (25 / 46, -21 / 46),
    "BlackmanWindow": (0.42, -0.5, 0.08),
}


def _window(op: Op) -> Sequence[Value]:
    """sum over k of terms[k] cos(2 pi k i / n), computed in float64."""
    terms = _TERMS[op.node.op_type]
    shape = op.decided(lambda code, axis: element_at(code, op, 0, 0))
    dtype = op.dtype()

    def element(code: Code, at: Index) -> Expr:
        count = code.kernel.size(shape[0])
        period = count if op.integer("periodic", 1) else tirx.max(count - i64(1), i64(1))
        turn = cast(at[0], "float64") * const(2 * math.pi, "float64") / cast(period, "float64")
        value = const(terms[0], "float64")
        for k, term in enumerate(terms[1:], 1):
            angle = tirx.cos(turn * const(float(k), "float64"))
            value = value + const(term, "float64") * angle
        return cast(value, storage.computed(dtype))

    return [Lazy(dtype, shape, element, cost=8)]


def _dft(op: Op) -> Sequence[Value]:
    """Each output as a sum over the axis: ONNX lets the length be anything."""
    x = op.ready(0)
    axes = op.ints(2)
    if op.has(2) and axes is None:
        raise op.gap("an axis that is decided by data")
    axis = (axes[0] if axes else op.integer("axis", -2)) % x.rank
    inverse, onesided = bool(op.integer("inverse")), bool(op.integer("onesided"))
    if inverse and onesided:
        raise op.gap("a one-sided inverse")
    shape, dtype = op.shape(), op.dtype()
    length = op.sizes(1)
    size = x.shape[axis] if length is None else length[0]
    is_complex = x.shape[-1] == 2
    computed = storage.computed(dtype)

    def build(kernel: Kernel, store: Store) -> str:
        held = kernel.size(x.shape[axis])
        count = kernel.size(size)

        def element(code: Code, kept: list[Expr], inner: list[Expr]) -> Expr:
            n, part = inner[0], kept[-1]
            turns = tirx.truncmod(kept[axis] * n, count)  # the angle stays small and exact
            angle = cast(turns, "float64") / cast(count, "float64")
            angle = angle * const(2 * math.pi * (1 if inverse else -1), "float64")
            c = code.bind(cast(tirx.cos(angle), computed), NAMED)
            s = code.bind(cast(tirx.sin(angle), computed), NAMED)
            inside = n < held
            place = [*kept[:-1]]
            place[axis] = tirx.min(n, held - i64(1))
            real = x.at(code, [*place, i64(0)])
            value = select(part == i64(0), real * c, real * s)
            if is_complex:
                imaginary = x.at(code, [*place, i64(1)])
                zero = like(real, 0.0)
                value = value + select(part == i64(0), zero - imaginary * s, imaginary * c)
            if inverse:
                value = value / cast(count, computed)
            return select(inside, value, like(value, 0.0))

        return template.reduce(
            kernel,
            kernel.shape(shape),
            [count],
            False,
            computed,
            template.COMBINE["sum"],
            element,
            store,
        )

    return [Pending(dtype, shape, build)]


def _causal_conv(op: Op) -> Sequence[Value]:
    """Depthwise over [past, input]; the last positions are the new state."""
    x, weight = op.ready(0), op.ready(1)
    past = op.operand(3) if op.has(3) else None
    taps = weight.shape[-1]
    if not isinstance(taps, int):
        raise op.gap("a kernel of unknown size")
    bias = op.operand(2) if op.has(2) else None
    left = taps - 1

    def whole(code: Code, b: Expr, c: Expr, at: Expr) -> Expr:
        """[past, input] at a position that counts from the begin of the past."""
        size = code.kernel.size(x.shape[2])
        inner = tirx.max(tirx.min(at - i64(left), size - i64(1)), i64(0))
        item = x.at(code, [b, c, inner])
        before = like(item, 0.0)
        if past is not None and left:
            before = past.at(code, [b, c, tirx.max(tirx.min(at, i64(left - 1)), i64(0))])
        return select(at >= i64(left), item, before)

    def element(code: Code, at: Index) -> Expr:
        b, c, s = at
        value = None
        for tap in range(taps):
            part = whole(code, b, c, s + i64(tap)) * weight.at(code, [c, i64(0), i64(tap)])
            value = part if value is None else value + part
        assert value is not None
        if bias is not None:
            value = value + bias.at(code, [c])
        return swish(code, value, 1.0) if op.text("activation") in ("silu", "swish") else value

    def state(code: Code, at: Index) -> Expr:
        return whole(code, at[0], at[1], at[2] + code.kernel.size(x.shape[2]))

    b, c, _ = x.shape
    return [
        Lazy(x.dtype, x.shape, element, cost=8 * taps),
        Lazy(x.dtype, (b, c, left), state, cost=6),
    ]


# -- sampling ---------------------------------------------------------------------------------------


def _grid_sample(op: Op) -> Sequence[Value]:
    """The image read at computed places: the nearest pixel, or neighbours weighted by distance."""
    x, grid = op.ready(0), op.operand(1)
    if not is_cheap(grid):
        grid = op.low.force(grid)
    rank = x.rank - 2
    mode = op.text("mode", "linear").replace("bilinear", "linear").replace("bicubic", "cubic")
    if mode == "cubic" and rank != 2:
        raise op.gap("mode cubic of other than images")
    padding = op.text("padding_mode", "zeros")
    aligned = bool(op.integer("align_corners"))
    shape = op.shape()

    def element(code: Code, index: Index) -> Expr:
        sizes = code.kernel.shape(x.shape[2:])
        taps: list[list[tuple[Expr, Expr, Expr]]] = []
        for axis in range(rank):
            # the grid has x first, the image rows first
            raw = grid.at(code, [index[0], *index[2:], i64(rank - 1 - axis)])
            dtype = dtype_of(raw)
            size = cast(sizes[axis], dtype)
            one, half = const(1.0, dtype), const(0.5, dtype)
            if aligned:
                place = (raw + one) * half * (size - one)
            else:
                place = ((raw + one) * size - one) * half
            place = code.bind(place, NAMED)
            if mode != "cubic":  # the places themselves; for cubic each neighbour is moved inside
                place = code.bind(_inside(code, place, size, padding, aligned), NAMED)
            taps.append(_neighbours(code, place, sizes[axis], mode, padding, aligned))
        result = None
        for choice in itertools.product(*taps):
            item = x.at(code, [*index[:2], *(at for at, _, _ in choice)])
            weight, fits = None, None
            for _, factor, inside in choice:
                weight = factor if weight is None else weight * factor
                fits = inside if fits is None else tirx.And(fits, inside)
            part = cast(weight, dtype_of(item)) * select(fits, item, like(item, 0.0))
            result = part if result is None else result + part
        return result

    return [Lazy(x.dtype, shape, element, cost=16)]


def _inside(code: Code, at: Expr, size: Expr, padding: str, aligned: bool) -> Expr:
    """A place moved into the image as the padding mode says."""
    dtype = dtype_of(at)
    zero, one = const(0.0, dtype), const(1.0, dtype)
    last = size - one
    if padding == "reflection":
        low = zero if aligned else const(-0.5, dtype)
        span = last if aligned else size
        safe = select(span > zero, span, one)
        distance = code.bind(tirx.abs(at - low), NAMED)
        turns = code.bind(tirx.floor(distance / safe), NAMED)
        rest = distance - turns * safe
        odd = turns - const(2.0, dtype) * tirx.floor(turns * const(0.5, dtype))
        at = select(odd > const(0.5, dtype), span - rest, rest) + low
        at = code.bind(select(span > zero, at, zero), NAMED)
    if padding in ("border", "reflection"):
        at = select(at < zero, zero, select(at > last, last, at))
    return at


def _neighbours(
    code: Code, place: Expr, size: Expr, mode: str, padding: str, aligned: bool
) -> list[tuple[Expr, Expr, Expr]]:
    """(position within the image, weight, whether it is in the image) of each neighbour."""
    dtype = dtype_of(place)
    one = const(1.0, dtype)

    def held(at: Expr) -> tuple[Expr, Expr]:
        position = code.bind(cast(at, "int64"), NAMED)
        fits = tirx.And(position >= i64(0), position < size)
        return code.bind(tirx.max(tirx.min(position, size - i64(1)), i64(0)), NAMED), fits

    if mode == "nearest":
        position, fits = held(tirx.nearbyint(place))
        return [(position, one, fits)]
    base = code.bind(tirx.floor(place), NAMED)
    taps = []
    for offset in range(-1, 3) if mode == "cubic" else range(2):
        at = base + const(float(offset), dtype)
        d = code.bind(tirx.abs(place - at), NAMED)
        weight = _cubic(d, dtype) if mode == "cubic" else one - d
        if mode == "cubic":
            at = _inside(code, code.bind(at, NAMED), cast(size, dtype), padding, aligned)
            at = tirx.nearbyint(at)
        position, fits = held(at)
        taps.append((position, code.bind(weight, NAMED), fits))
    return taps


def _cubic(d: Expr, dtype: str, a: float = -0.75) -> Expr:
    """Keys' kernel."""

    def f(value: float) -> Expr:
        return const(value, dtype)

    near = (f(a + 2) * d - f(a + 3)) * d * d + f(1)
    far = ((f(a) * d - f(5 * a)) * d + f(8 * a)) * d - f(4 * a)
    return select(d <= f(1), near, select(d < f(2), far, f(0)))


ROWS: dict[str, Rule] = {
    **dict.fromkeys(_TERMS, _window),
    "DFT": _dft,
    "CausalConvWithState": _causal_conv,
    "GridSample": _grid_sample,
}
