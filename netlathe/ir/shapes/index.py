"""Gather, scatter and selection; where the data decides how much is selected, the dim is fresh."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.shapes.elementwise import same_dtype
from netlathe.ir.types import Site, Type

# Constant indices with more elements are not looked at: it would cost more than all other rules.
_MOST_CHECKED = 1 << 16


def _check_bounds(s: Site, width: Dim, axis: int) -> None:
    """Constant indices (input 1) must lie within the table; what runs out of it is stale."""
    value = s.value(1)
    if value is None or not isinstance(width, int):
        return
    known = s.ints(1)
    if known is not None:
        low, high = (min(known), max(known)) if known else (0, -1)
    else:
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or not 0 < tensor.size <= _MOST_CHECKED:
            return
        array = tensor.numpy()
        low, high = int(np.min(array)), int(np.max(array))
    if low < -width or high >= width:
        bad = low if low < -width else high
        s.fail(
            "index",
            f"index {bad} of {s.name(1)} is outside the {width} positions "
            f"of axis {axis} of {s.name(0)}",
            *s.show(0, 1),
            help="the table was sliced: remap the indices that read it",
        )


def _gather(s: Site) -> list[Type]:
    data, indices = s.shape(), s.shape(1)
    if data is None or indices is None:
        return [Type(s.dtype(), None)]
    s.least_rank(0, 1)
    axis = s.axis(len(data))
    _check_bounds(s, data[axis], axis)
    out = (*data[:axis], *indices, *data[axis + 1 :])
    items, at = s.contents(0), s.ints(1)
    if items is not None and at is not None and len(data) == 1 and len(out) <= 1:
        s.remember([items[i] for i in at])
    reals, output = s.reals(0), s.node.outputs[0]
    if reals is not None and at is not None and len(data) == 1 and len(out) <= 1:
        s.found.reals[output] = tuple(reals[i] for i in at)
    return [Type(s.dtype(), out)]


def _gather_elements(s: Site) -> list[Type]:
    data, indices = s.shape(), s.shape(1)
    if data is not None:
        s.least_rank(0, 1)
        s.rank(1, len(data))
        axis = s.axis(len(data))
        _check_bounds(s, data[axis], axis)
        _check_not_larger(s, axis)
    return [Type(s.dtype(), indices)]


def _check_not_larger(s: Site, axis: int) -> None:
    """Beside the axis, indices address a part of the data."""
    for position, (own, whole) in enumerate(zip(s.shape(1) or (), s.shape() or (), strict=False)):
        if position != axis and isinstance(own, int) and isinstance(whole, int) and own > whole:
            s.fail(
                "width",
                f"axis {position} of {s.name(1)} has {own} positions, {s.name(0)} only {whole}",
                *s.show(0, 1),
            )


def _scatter_elements(s: Site) -> list[Type]:
    dtype = same_dtype(s, (0, 2))
    data, indices, updates = s.shape(), s.shape(1), s.shape(2)
    if data is not None:
        s.least_rank(0, 1)
        s.rank(1, len(data))
        axis = s.axis(len(data))
        _check_bounds(s, data[axis], axis)
        _check_not_larger(s, axis)
    if indices is not None and updates is not None:
        s.rank(2, len(indices))
        for axis, (a, b) in enumerate(zip(indices, updates, strict=True)):
            what = f"axis {axis} of the updates must be that of the indices"
            s.equal(a, b, "width", what, *s.show(1, 2))
    return [Type(dtype, data)]


def _tail(s: Site, batch_dims: int) -> tuple[Shape, Shape] | None:
    """Of ND indices: their own dims without the last, and the data's dims they do not address."""
    data, indices = s.shape(), s.shape(1)
    if data is None or indices is None:
        return None
    s.least_rank(0, 1)
    s.least_rank(1, 1)
    depth = indices[-1]
    if not isinstance(depth, int):
        return None
    if batch_dims < 0 or batch_dims >= min(len(data), len(indices)):
        s.fail("attribute", f"batch_dims={batch_dims} is not below both ranks", *s.show(0, 1))
    if batch_dims + depth > len(data):
        s.fail("width", f"indices of {depth} axes address too many of {s.name(0)}", *s.show(0, 1))
    for axis in range(batch_dims):
        what = f"the batch axis {axis} of {s.name(0)} and {s.name(1)} must match"
        s.equal(data[axis], indices[axis], "width", what, *s.show(0, 1))
    return indices[:-1], data[batch_dims + depth :]


def _gather_nd(s: Site) -> list[Type]:
    parts = _tail(s, s.integer("batch_dims"))
    return [Type(s.dtype(), None if parts is None else (*parts[0], *parts[1]))]


def _scatter_nd(s: Site) -> list[Type]:
    dtype = same_dtype(s, (0, 2))
    parts, updates = _tail(s, 0), s.shape(2)
    if parts is not None and updates is not None:
        wanted = (*parts[0], *parts[1])
        s.rank(2, len(wanted))
        for axis, (a, b) in enumerate(zip(wanted, updates, strict=True)):
            what = f"axis {axis} of the updates {s.name(2)} does not fit"
            s.equal(a, b, "width", what, *s.show(0, 1, 2))
    return [Type(dtype, s.shape())]


def _top_k(s: Site) -> list[Type]:
    shape, k = s.shape(), s.contents(1)
    s.vector(1, 1, "k is one number")
    if shape is None:
        return [Type(s.dtype(), None), Type(ir.DataType.INT64, None)]
    s.least_rank(0, 1)
    axis = s.axis(len(shape), -1)
    count = k[0] if k else s.fresh(axis)
    width = shape[axis]
    if isinstance(count, int) and isinstance(width, int) and count > width:
        s.fail(
            "width",
            f"TopK asks for {count} of the {width} positions of axis {axis} of {s.name(0)}",
            *s.show(0),
            help="keep at least k positions, or lower k",
        )
    out = (*shape[:axis], count, *shape[axis + 1 :])
    return [Type(s.dtype(), out), Type(ir.DataType.INT64, out)]


def _nonzero(s: Site) -> list[Type]:
    shape = s.shape()
    return [Type(ir.DataType.INT64, (None if shape is None else len(shape), s.fresh(1)))]


def _one_hot(s: Site) -> list[Type]:
    shape, depth = s.shape(), s.contents(1)
    reals = s.reals(1)
    values = s.shape(2)
    if values is not None:
        s.rank(2, 1)
        s.equal(values[0], 2, "width", "OneHot takes an off and an on value", *s.show(2))
    if shape is None:
        return [Type(s.dtype(2), None)]
    axis = s.axis(len(shape) + 1, -1)
    number = depth[0] if depth else None
    if number is None and reals and reals[0] is not None and reals[0].is_number:
        number = int(reals[0])
    if number is None:
        number = s.fresh(axis)
    return [Type(s.dtype(2), (*shape[:axis], number, *shape[axis:]))]


def _compress(s: Site) -> list[Type]:
    shape = s.shape()
    s.rank(1, 1)
    if "axis" not in s.node.attributes:
        return [Type(s.dtype(), (_selected(s, 0),))]
    if shape is None:
        return [Type(s.dtype(), None)]
    axis = s.axis(len(shape))
    out = (*shape[:axis], _selected(s, axis), *shape[axis + 1 :])
    return [Type(s.dtype(), out)]


def _selected(s: Site, axis: int) -> Dim:
    condition = s.ints(1)
    return s.fresh(axis) if condition is None else sum(map(bool, condition))


def _unique(s: Site) -> list[Type]:
    shape = s.shape()
    if "axis" in s.node.attributes:
        if shape is None:
            return [Type(s.dtype(), None)]
        axis = s.axis(len(shape))
        count = s.fresh(axis)
        out: Shape = (*shape[:axis], count, *shape[axis + 1 :])
        inverse = shape[axis]
    else:
        count = s.fresh(0)
        out = (count,)
        inverse = None if shape is None else dims.product(shape)
    index = ir.DataType.INT64
    return [Type(s.dtype(), out), *(Type(index, (dim,)) for dim in (count, inverse, count))]


def _non_max_suppression(s: Site) -> list[Type]:
    boxes, scores = s.shape(), s.shape(1)
    s.rank(0, 3)
    s.rank(1, 3)
    if boxes is not None:
        s.equal(boxes[2], 4, "width", "a box has 4 coordinates", *s.show(0))
    if boxes is not None and scores is not None:
        s.equal(boxes[0], scores[0], "width", "boxes and scores are per sample", *s.show(0, 1))
        s.equal(boxes[1], scores[2], "width", "every box needs its scores", *s.show(0, 1))
    return [Type(ir.DataType.INT64, (s.fresh(0), 3))]


def _reverse_sequence(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is not None:
        s.least_rank(0, 2)
        batch = s.checked_axis(s.integer("batch_axis", 1), len(shape))
        s.vector(1, shape[batch], "sequence_lens has one length per sample")
    return [s.type()]


RULES = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonMaxSuppression": _non_max_suppression,
    "NonZero": _nonzero,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
    "Unique": _unique,
}
