"""Operators that put tensors together, take them apart, and extend them."""

from __future__ import annotations

import sympy

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.shapes.elementwise import same_dtype
from netlathe.ir.types import MOST_CONTENTS, Site, Type


def _concat(s: Site) -> list[Type]:
    every = range(len(s.node.inputs))
    dtype = same_dtype(s, every)
    parts = [s.contents(index) for index in every]
    known = [part for part in parts if part is not None]
    if len(known) == len(parts) and sum(map(len, known)) <= MOST_CONTENTS:
        s.remember([item for part in known for item in part])
    shapes = [s.shape(index) for index in every]
    first = next((shape for shape in shapes if shape is not None), None)
    if first is None:
        return [Type(dtype, None)]
    axis = s.axis(len(first))
    out: list[Dim] = list(first)
    out[axis] = 0
    for index, shape in enumerate(shapes):
        if shape is None:
            out[axis] = None
            continue
        s.rank(index, len(first))
        for position, dim in enumerate(shape):
            if position == axis:
                out[axis] = dims.add(out[axis], dim)
            else:
                what = f"axis {position} of {s.name(index)} must match the other parts"
                help = "only the axis that is concatenated may differ: change every part together"
                known_dim, notes = out[position], s.show(*every)
                out[position] = s.equal(known_dim, dim, "width", what, *notes, help=help)
    return [Type(dtype, tuple(out))]


def _split(s: Site) -> list[Type]:
    shape, count = s.shape(), len(s.node.outputs)
    if shape is None:
        return [Type(s.dtype(), None)] * count
    axis = s.axis(len(shape))
    sizes = _split_sizes(s, shape[axis], axis, count)
    start = 0
    contents = s.contents(0)
    for output, size in enumerate(sizes):
        if contents is None or len(shape) != 1 or not isinstance(size, int):
            break
        s.remember(contents[start : start + size], output)
        start += size
    return [Type(s.dtype(), (*shape[:axis], size, *shape[axis + 1 :])) for size in sizes]


def _split_sizes(s: Site, width: Dim, axis: int, count: int) -> Shape:
    if s.has(1):
        sizes = s.contents(1)
        if sizes is None:
            return (None,) * count
        if len(sizes) != count:
            s.fail("split", f"{len(sizes)} sizes for {count} outputs", *s.show(0))
        total: Dim = 0
        for size in sizes:
            total = dims.add(total, size)
        s.equal(
            total,
            width,
            "split",
            f"the sizes {dims.show(sizes)} must add up to axis {axis} of {s.name(0)}",
            *s.show(0),
            help="the split sizes are stale: the width before them was changed",
        )
        return sizes
    if "num_outputs" in s.node.attributes and s.integer("num_outputs") != count:
        s.fail("split", f"num_outputs={s.integer('num_outputs')} for {count} outputs")
    chunk = dims.ceil_divide(width, count)
    if isinstance(width, int) and isinstance(chunk, int):
        # The last part is smaller where the parts cannot be equal.
        return tuple(min(chunk, max(0, width - i * chunk)) for i in range(count))
    exact = dims.same(dims.product((chunk, count)), width)
    return (chunk if exact else None,) * count


# -- Slice ------------------------------------------------------------------------------------------


def _slice(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    starts, ends = s.contents(1), s.contents(2)
    length = next((x[0] for i in (1, 2, 3, 4) if (x := s.shape(i)) and isinstance(x[0], int)), None)
    axes = s.ints(3)
    if not s.has(3) and isinstance(length, int):
        axes = tuple(range(length))
    if axes is None:
        return [Type(s.dtype(), (None,) * len(shape))]
    at = [s.checked_axis(axis, len(shape)) for axis in axes]
    steps = s.ints(4) if s.has(4) else (1,) * len(at)
    out = list(shape)
    if starts is None or ends is None or steps is None:
        for axis in at:
            out[axis] = None
        return [Type(s.dtype(), tuple(out))]
    if not len(starts) == len(ends) == len(at) == len(steps):
        s.fail("slice", "starts, ends, axes and steps differ in length")
    for start, end, axis, step in zip(starts, ends, at, steps, strict=True):
        if step == 0:
            s.fail("slice", "a step is 0")
        out[axis] = _sliced(shape[axis], start, end, step)
    contents = s.contents(0)
    if contents is not None and len(shape) == 1 and len(starts) == 1:
        begin, stop = starts[0], ends[0]
        if isinstance(begin, int) and isinstance(stop, int):
            s.remember(_cut(contents, begin, stop, steps[0]))
    return [Type(s.dtype(), tuple(out))]


def _positions(size: int, start: int, end: int, step: int) -> range:
    """The positions that ONNX slices: bounds count from the back if negative, then they are clamped."""
    if step > 0:
        return range(*slice(start, end, step).indices(size))
    begin = min(max(start + size if start < 0 else start, 0), size - 1)
    stop = min(max(end + size if end < 0 else end, -1), size - 1)
    return range(begin, stop, step)


def _cut(items: Shape, start: int, end: int, step: int) -> Shape:
    return tuple(items[i] for i in _positions(len(items), start, end, step))


FAR = 10**9  # exporters write "to the end" as this, or as the largest int32 or int64, or one less


def _sliced(size: Dim, start: Dim, end: Dim, step: int) -> Dim:
    """The length of ``size[start:end:step]``."""
    if size is None or start is None or end is None:
        return None
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(_positions(size, start, end, step)) if size else 0
    if step < 0:
        whole = start in (-1, _clamped(size, start)) and isinstance(end, int) and end <= -FAR
        return dims.ceil_divide(size, -step) if whole and start == -1 else None
    low, high = _clamped(size, start), _clamped(size, end)
    return dims.ceil_divide(dims.subtract(high, low), step)


def _clamped(size: Dim, at: Dim) -> Dim:
    """Where a bound lands in 0..size, as far as that can be said for every size.

    A bound that is one number of a dynamic axis ends it: ``x[:, :77]`` has min(77, size) rows, but
    ``x[:, 1:]`` and ``x[:, :-1]`` are taken to have the one row they leave out.
    """
    if size is None or at is None:
        return None
    if isinstance(at, int):
        if at >= FAR:
            return size
        if at <= -FAR or at == 0:
            return 0
        if isinstance(size, int):
            return min(max(at + size if at < 0 else at, 0), size)
        if at < 0:
            return dims.add(size, at)
        return at if at == 1 else dims.smallest(at, size)
    if at.is_nonpositive:
        return dims.add(size, at)
    if isinstance(size, int):
        return at  # a dynamic position in a table: it lies within (see netlathe.ir.types)
    gap = sympy.expand(size - at)
    if gap.is_nonnegative:
        return at
    return size if gap.is_nonpositive else dims.smallest(at, size)


# -- Pad, Tile --------------------------------------------------------------------------------------


def _pad(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    axes = s.ints(3) if s.has(3) else tuple(range(len(shape)))
    if axes is None:
        return [Type(s.dtype(), (None,) * len(shape))]
    pads = s.contents(1) or (None,) * (2 * len(axes))
    if len(pads) != 2 * len(axes):
        s.fail("pad", f"{len(pads)} pads for {len(axes)} axes", *s.show(0))
    out = list(shape)
    for i, axis in enumerate(axes):
        at = s.checked_axis(axis, len(shape))
        out[at] = dims.add(dims.add(shape[at], pads[i]), pads[i + len(axes)])
    return [Type(same_dtype(s, (0, 2)), tuple(out))]


def _tile(s: Site) -> list[Type]:
    shape, repeats = s.shape(), s.contents(1)
    if shape is None:
        return [Type(s.dtype(), None)]
    if repeats is None:
        return [Type(s.dtype(), (None,) * len(shape))]
    if len(repeats) != len(shape):
        s.fail("tile", f"{len(repeats)} repeats for the {len(shape)} dims of {s.name(0)}")
    return [Type(s.dtype(), tuple(dims.product(pair) for pair in zip(shape, repeats, strict=True)))]


def _center_crop_pad(s: Site) -> list[Type]:
    shape, target = s.shape(), s.contents(1)
    if shape is None:
        return [Type(s.dtype(), None)]
    axes = s.integers("axes") or tuple(range(len(shape)))
    if target is None:
        target = (None,) * len(axes)
    if len(target) != len(axes):
        s.fail("pad", f"{len(target)} sizes for {len(axes)} axes", *s.show(0))
    out = list(shape)
    for axis, size in zip(axes, target, strict=True):
        out[s.checked_axis(axis, len(shape))] = size
    return [Type(s.dtype(), tuple(out))]


RULES = {
    "CenterCropPad": _center_crop_pad,
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
}
