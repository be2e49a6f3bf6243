"""Resize and Upsample: along each axis a few neighbours, weighted by where the output lies between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.ops.elementwise import is_float
from netlathe.backends.tvm.ops.movement import element_at
from netlathe.backends.tvm.ops.op import Op, Rule
from netlathe.backends.tvm.tir import Code, Expr, Index, cast, const, dtype_of, i64, select
from netlathe.backends.tvm.values import Lazy, Value

# Positions are computed in float64: in float32 a place that is exactly between two may fall on one.
_PLACE = "float64"


@dataclass(frozen=True)
class _Tap:
    """A neighbour along one axis and its weight; None: the only one."""

    index: Expr
    weight: Expr | None


def _f(value: float) -> Expr:
    return const(value, _PLACE)


class _Resize:
    def __init__(self, op: Op) -> None:
        self.op = op
        self.x = op.operand(0)
        self.old = op.node.op_type == "Upsample"
        rank = self.x.rank
        given = op.integers("axes")
        self.axes = [axis % rank for axis in given] if given else list(range(rank))
        self.mode = op.text("mode", "nearest").replace("bilinear", "linear")
        self.rule = (
            "asymmetric" if self.old else op.text("coordinate_transformation_mode", "half_pixel")
        )
        self.scales = 1 if self.old else 2
        if op.integer("antialias") and self.mode != "nearest":
            raise op.gap("antialias")
        self.policy = op.text("keep_aspect_ratio_policy", "stretch")
        self.by_scale = op.has(self.scales) and not self._is_empty(self.scales)
        self.shape = op.decided(self._size)

    def _is_empty(self, index: int) -> bool:
        return self.op.low.found.type(self.op.node.inputs[index]).shape == (0,)

    def _scale(self, code: Code, at: int) -> Expr:
        """The factor of the ``at``-th of the axes."""
        if self.by_scale:
            operand = self.op.operand(self.scales)
            return cast(operand.at(code, [i64(at)]), _PLACE)
        if self.policy != "stretch":
            factors = [self._ratio(code, i) for i in range(len(self.axes))]
            choose = tirx.min if self.policy == "not_larger" else tirx.max
            result = factors[0]
            for factor in factors[1:]:
                result = choose(result, factor)
            return result
        return self._ratio(code, at)

    def _ratio(self, code: Code, at: int) -> Expr:
        size = code.kernel.size(self.x.shape[self.axes[at]])
        return cast(element_at(code, self.op, 3, at), _PLACE) / cast(size, _PLACE)

    def _size(self, code: Code, axis: int) -> Expr:
        size = code.kernel.size(self.x.shape[axis])
        if axis not in self.axes:
            return size
        at = self.axes.index(axis)
        if self.by_scale:
            return cast(tirx.floor(cast(size, _PLACE) * self._scale(code, at)), "int64")
        if self.policy != "stretch":
            whole = cast(size, _PLACE) * self._scale(code, at) + _f(0.5)
            return cast(tirx.floor(whole), "int64")
        return element_at(code, self.op, 3, at)

    def _place(self, code: Code, axis: int, item: Expr) -> Expr:
        """Where output ``item`` lies on the input's axis."""
        at = self.axes.index(axis)
        i = cast(item, _PLACE)
        length = cast(code.kernel.size(self.x.shape[axis]), _PLACE)
        size = cast(code.kernel.size(self.shape[axis]), _PLACE)
        factor = code.bind(self._scale(code, at), 16)
        width = length * factor
        if self.rule == "half_pixel":
            return (i + _f(0.5)) / factor - _f(0.5)
        if self.rule == "half_pixel_symmetric":
            centre = length / _f(2) * (_f(1) - size / width)
            return centre + (i + _f(0.5)) / factor - _f(0.5)
        if self.rule == "pytorch_half_pixel":
            return select(size > _f(1), (i + _f(0.5)) / factor - _f(0.5), _f(-0.5))
        if self.rule == "align_corners":
            one = width == _f(1)
            return select(one, _f(0), i * ((length - _f(1)) / select(one, _f(1), width - _f(1))))
        if self.rule == "asymmetric":
            return i / factor
        if self.rule == "tf_crop_and_resize":
            roi = self.op.operand(1)
            begin = cast(roi.at(code, [i64(at)]), _PLACE)
            end = cast(roi.at(code, [i64(len(self.axes) + at)]), _PLACE)
            one = width == _f(1)
            step = (end - begin) * (length - _f(1)) / select(one, _f(1), width - _f(1))
            middle = _f(0.5) * (begin + end) * (length - _f(1))
            return select(one, middle, begin * (length - _f(1)) + i * step)
        raise self.op.gap(f"coordinate_transformation_mode {self.rule!r}")

    def _taps(self, code: Code, axis: int, place: Expr) -> list[_Tap]:
        size = code.kernel.size(self.x.shape[axis])

        def held(position: Expr) -> Expr:
            return tirx.max(tirx.min(position, size - i64(1)), i64(0))

        if self.mode == "nearest":
            rule = "floor" if self.old else self.op.text("nearest_mode", "round_prefer_floor")
            nearest = {
                "round_prefer_floor": lambda: tirx.ceil(place - _f(0.5)),
                "round_prefer_ceil": lambda: tirx.floor(place + _f(0.5)),
                "floor": lambda: tirx.floor(place),
                "ceil": lambda: tirx.ceil(place),
            }[rule]()
            return [_Tap(code.bind(held(cast(nearest, "int64")), 16), None)]
        base = code.bind(tirx.floor(place), 16)
        reach = 2 if self.mode == "cubic" else 1
        taps, weights, places = list(range(1 - reach, reach + 1)), [], []
        for tap in taps:
            at = base + _f(tap)
            weight = self._kernel(code.bind(tirx.abs(at - place), 16))
            position = cast(at, "int64")
            if self.op.integer("exclude_outside"):
                inside = tirx.And(position >= i64(0), position < size)
                weight = select(inside, weight, _f(0))
            weights.append(code.bind(weight, 16))
            places.append(code.bind(held(position), 16))
        if self.op.integer("exclude_outside"):
            whole = weights[0]
            for weight in weights[1:]:
                whole = whole + weight
            whole = code.bind(whole, 16)
            weights = [weight / whole for weight in weights]
        return [_Tap(p, w) for p, w in zip(places, weights, strict=True)]

    def _kernel(self, d: Expr) -> Expr:
        if self.mode == "linear":
            return select(d < _f(1), _f(1) - d, _f(0))
        a = self.op.real("cubic_coeff_a", -0.75)
        near = (_f(a + 2) * d - _f(a + 3)) * d * d + _f(1)
        far = ((_f(a) * d - _f(5 * a)) * d + _f(8 * a)) * d - _f(4 * a)
        return select(d <= _f(1), near, select(d < _f(2), far, _f(0)))

    def value(self) -> Value:
        changed = [
            axis
            for axis in self.axes
            if self.rule == "tf_crop_and_resize" or self.x.shape[axis] != self.shape[axis]
        ]
        x, dtype = self.op.low.force(self.x), self.x.dtype

        def element(code: Code, index: Index) -> Expr:
            beyond = const(False, "bool")
            taps: list[list[_Tap]] = []
            for axis in changed:
                place = code.bind(self._place(code, axis, index[axis]), 16)
                if self.rule == "tf_crop_and_resize":
                    last = cast(code.kernel.size(x.shape[axis]) - i64(1), _PLACE)
                    outside = tirx.Or(place < _f(0), place > last)
                    beyond = tirx.Or(beyond, outside)
                taps.append(self._taps(code, axis, place))
            result = None
            for choice in itertools.product(*taps):
                where = list(index)
                weight = None
                for axis, tap in zip(changed, choice, strict=True):
                    where[axis] = tap.index
                    if tap.weight is not None:
                        weight = tap.weight if weight is None else weight * tap.weight
                item = x.at(code, where)
                if weight is not None:
                    wide = dtype_of(item) if is_float(item) else "float32"
                    item = cast(item, wide) * cast(weight, wide)
                result = item if result is None else result + item
            assert result is not None
            result = self._typed(code, result)
            if self.rule == "tf_crop_and_resize":
                fill = const(self.op.real("extrapolation_value"), "float64")
                result = select(beyond, cast(fill, dtype_of(result)), result)
            return result

        return Lazy(dtype, self.shape, element, cost=16)

    def _typed(self, code: Code, value: Expr) -> Expr:
        computed = storage.computed(self.x.dtype)
        if dtype_of(value) == computed:
            return value
        low, high = tirx.min_value(computed), tirx.max_value(computed)
        rounded = cast(tirx.nearbyint(value), "int64")
        return cast(tirx.max(tirx.min(rounded, cast(high, "int64")), cast(low, "int64")), computed)


def _resize(op: Op) -> Sequence[Value]:
    return [_Resize(op).value()]


ROWS: dict[str, Rule] = {"Resize": _resize, "Upsample": _resize}
