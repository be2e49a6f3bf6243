"""Normalizations: the output is like the input; scales, biases and statistics have its width."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.shapes.elementwise import keep, same_dtype
from netlathe.ir.types import Site, Type

_STALE = "slice the scale, the bias and the statistics together with the channels"


def _channels(s: Site, parameters: range, what: str) -> None:
    """Every parameter must be [c] for an input [b, c, ...]."""
    shape = s.shape()
    if shape is None:
        return
    s.least_rank(0, 1)
    # A 1-D input of BatchNormalization counts as one channel.
    width = shape[1] if len(shape) > 1 else 1
    for index in parameters:
        s.vector(index, width, f"{what} {s.name(index)} needs one element per channel", _STALE)


def _batch_norm(s: Site) -> list[Type]:
    _channels(s, range(1, 5), "the parameter")
    same_dtype(s, (1, 2))
    statistics = Type(same_dtype(s, (3, 4)), s.shape(3))
    return [s.type(), statistics, statistics]


def _instance_norm(s: Site) -> list[Type]:
    s.least_rank(0, 3)
    _channels(s, range(1, 3), "the parameter")
    return [Type(same_dtype(s, range(3)), s.shape())]


def _group_norm(s: Site) -> list[Type]:
    s.least_rank(0, 2)
    _channels(s, range(1, 3), "the parameter")
    shape, groups = s.shape(), s.integer("num_groups")
    if shape is not None and isinstance(shape[1], int) and (groups <= 0 or shape[1] % groups):
        s.fail(
            "group",
            f"{groups} groups do not divide the {shape[1]} channels of {s.name(0)}",
            *s.show(0),
            help="remove the same number of channels from every group",
        )
    return [Type(same_dtype(s, range(3)), shape)]


def _layer_norm(s: Site) -> list[Type]:
    """The scale (and bias) broadcast to the dims from ``axis`` on."""
    shape = s.shape()
    if shape is None:
        return [s.type()]
    s.least_rank(0, 1)
    axis = s.axis(len(shape), -1)
    for index in (1, 2):
        scale = s.shape(index)
        if scale is None:
            continue
        if len(scale) > len(shape):
            s.fail("rank", f"{s.name(index)} has more dims than {s.name(0)}", *s.show(0, index))
        for position in range(1, len(scale) + 1):
            if scale[-position] == 1:
                continue
            if position > len(shape) - axis:
                s.fail(
                    "width",
                    f"{s.name(index)} reaches beyond the normalized dims",
                    *s.show(0, index),
                )
            name = s.name(index)
            what = f"axis -{position} of {name} must be 1 or the normalized width of {s.name(0)}"
            s.equal(
                shape[-position], scale[-position], "width", what, *s.show(0, index), help=_STALE
            )
    stash = s.data_type("stash_type") or ir.DataType.FLOAT
    statistics = Type(stash, (*shape[:axis], *(1,) * (len(shape) - axis)))
    dtype = s.dtype(1) if s.node.op_type == "RMSNormalization" else s.dtype()
    return [Type(dtype, shape), statistics, statistics]


def _axes_checked(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is not None:
        if s.node.op_type == "LpNormalization":
            s.axis(len(shape), -1)
        else:
            for axis in s.integers("axes") or (0, 2, 3):
                s.checked_axis(axis, len(shape))
    return keep(s)


def _lrn(s: Site) -> list[Type]:
    s.least_rank(0, 2)
    return keep(s)


def _loss(s: Site) -> list[Type]:
    """b c *s scores against b *s labels: one loss per label, or their mean or sum."""
    scores, labels, dtype = s.shape(), s.shape(1), s.dtype()
    if scores is None:
        return [Type(dtype, None), Type(dtype, None)]
    s.least_rank(0, 2)
    if labels is not None:
        s.rank(1, len(scores) - 1)
        for own, wanted in zip(labels, (scores[0], *scores[2:]), strict=True):
            what = f"the labels {s.name(1)} need the scores' shape without the classes"
            s.equal(own, wanted, "width", what, *s.show(0, 1))
    s.vector(2, scores[1], "the class weights are one per class")
    each = (scores[0], *scores[2:])
    return [Type(dtype, each if s.text("reduction", "mean") == "none" else ()), Type(dtype, scores)]


def _swiglu(s: Site) -> list[Type]:
    gate, linear = s.shape(), s.shape(1)
    if gate is not None and linear is not None:
        s.rank(1, len(gate))
        for a, b in zip(gate, linear, strict=True):
            s.equal(a, b, "width", "the gate and the linear part need one shape", *s.show(0, 1))
    known = gate if gate is not None and None not in gate else linear
    return [Type(same_dtype(s, (0, 1)), known if known is not None else gate)]


def _affine_grid(s: Site) -> list[Type]:
    """theta [b, 2, 3] or [b, 3, 4] and the size (b, c, *s) give a grid [b, *s, 2 or 3]."""
    size = s.contents(1)
    if size is None:
        length = s.shape(1)
        count = length[0] if length else None
        return [Type(s.dtype(), (None,) * count if isinstance(count, int) else None)]
    if len(size) not in (4, 5):
        s.fail("rank", f"the size {dims.show(size)} is not that of a 2-D or 3-D image")
    theta = s.shape()
    spatial = len(size) - 2
    if theta is not None:
        s.rank(0, 3)
        s.equal(theta[0], size[0], "width", "theta is one per sample", *s.show(0))
        s.equal(theta[1], spatial, "width", "theta has one row per spatial axis", *s.show(0))
        s.equal(theta[2], spatial + 1, "width", "theta has one more column", *s.show(0))
    return [Type(s.dtype(), (size[0], *size[2:], spatial))]


RULES = {
    "AffineGrid": _affine_grid,
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _axes_checked,
    "MeanVarianceNormalization": _axes_checked,
    "NegativeLogLikelihoodLoss": _loss,
    "RMSNormalization": _layer_norm,
    "SoftmaxCrossEntropyLoss": _loss,
    "SwiGLU": _swiglu,
}
