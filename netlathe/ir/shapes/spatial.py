"""Operators on images and other spatial data: convolutions, pools, resizing, sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import onnx_ir as ir
import sympy

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.shapes.elementwise import same_dtype
from netlathe.ir.types import Site, Type

_GROUPS = "remove whole groups, or the same number of channels of every group, and adjust group"


# -- windows ----------------------------------------------------------------------------------------


def _setting(s: Site, name: str, count: int, default: int) -> tuple[int, ...]:
    """A list attribute with ``count`` entries."""
    found = s.integers(name) or (default,) * count
    if len(found) != count:
        s.fail("attribute", f"{name} has {len(found)} entries, {count} are needed")
    return found


def _windows(s: Site, spatial: Shape, kernel: Sequence[Dim]) -> Shape:
    """How many windows fit along every spatial axis.

    floor or ceil of (size + pads - extent) / stride, plus 1, extent = (kernel - 1) * dilation + 1. With
    ceil_mode a last window that would begin in the padding behind the data does not count.
    """
    rank = len(spatial)
    if len(kernel) != rank:
        s.fail("attribute", f"a kernel of {len(kernel)} axes for {rank} spatial dims", *s.show(0))
    strides = _setting(s, "strides", rank, 1)
    dilations = _setting(s, "dilations", rank, 1)
    pads = _setting(s, "pads", 2 * rank, 0)
    if min(strides, default=1) <= 0 or min(dilations, default=1) <= 0:
        s.fail("attribute", "strides and dilations must be positive")
    auto = s.text("auto_pad", "NOTSET")
    ceil = s.integer("ceil_mode") == 1
    out: list[Dim] = []
    for axis, (size, width) in enumerate(zip(spatial, kernel, strict=True)):
        stride, begin, end = strides[axis], pads[axis], pads[axis + rank]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            out.append(dims.ceil_divide(size, stride))
            continue
        if auto == "VALID":
            begin = end = 0
        # (kernel - 1) * dilation + 1
        extent = dims.add(dims.product((dims.subtract(width, 1), dilations[axis])), 1)
        room = dims.subtract(dims.add(size, begin + end), extent)
        if ceil:
            count = dims.add(dims.ceil_divide(room, stride), 1)
            count = dims.smallest(count, dims.ceil_divide(dims.add(size, begin), stride))
        else:
            count = dims.add(dims.divide(room, stride), 1)
        if isinstance(count, int) and count < 1:
            s.fail("window", f"a window of {extent} does not fit axis {axis + 2}", *s.show(0, 1))
        out.append(count)
    return tuple(out)


def _kernel(s: Site, weight: Shape) -> Shape:
    """The kernel's spatial dims, which ``kernel_shape`` repeats."""
    declared = s.integers("kernel_shape")
    if declared is None:
        return weight[2:]
    if len(declared) != len(weight) - 2:
        s.fail("attribute", f"kernel_shape has {len(declared)} entries", *s.show(1))
    for own, stated in zip(weight[2:], declared, strict=True):
        what = f"kernel_shape={list(declared)} must be the kernel of the weight"
        s.equal(own, stated, "width", what, *s.show(1), help="update kernel_shape")
    return declared


def _check_groups(s: Site, channels: Dim, weight: Shape, w: int) -> Dim:
    """b (g i), (g o) i: the group count fits the input's and the weight's channels; returns g o."""
    group = s.integer("group", 1)
    if group < 1:
        s.fail("group", f"group={group} is not positive")
    if isinstance(weight[0], int) and weight[0] % group:
        message = f"{group} groups do not divide the {weight[0]} output channels of {s.name(w)}"
        s.fail("group", message, *s.show(w), help=_GROUPS)
    what = (
        f"group={group} times axis 1 of the weight {s.name(w)} must be the channels of {s.name(0)}"
    )
    wanted = dims.product((group, weight[1]))
    s.equal(channels, wanted, "group" if group > 1 else "width", what, *s.show(0, w), help=_GROUPS)
    return weight[0]


def _convolution(s: Site, dtype: ir.DataType | None, weight_at: int, bias_at: int) -> list[Type]:
    """b (g i) *s, (g o) i *k -> b (g o) *t"""
    shape, weight = s.shape(), s.shape(weight_at)
    if shape is None or weight is None:
        rank = next((len(known) for known in (shape, weight) if known is not None), None)
        return [Type(dtype, None if rank is None else (None,) * rank)]
    s.least_rank(0, 3)
    s.rank(weight_at, len(shape))
    channels = _check_groups(s, shape[1], weight, weight_at)
    what = f"the bias {s.name(bias_at)} needs one element per output channel of {s.name(weight_at)}"
    s.vector(bias_at, channels, what, "slice the bias together with the weight")
    return [Type(dtype, (shape[0], channels, *_windows(s, shape[2:], _kernel(s, weight))))]


def _conv(s: Site) -> list[Type]:
    return _convolution(s, same_dtype(s, range(3)), 1, 2)


_NO_INPUT = 99  # an operator without a bias


def _conv_integer(s: Site) -> list[Type]:
    _check_channel_scales(s, 1, (3,))
    return _convolution(s, ir.DataType.INT32, 1, _NO_INPUT)


def _qlinear_conv(s: Site) -> list[Type]:
    _check_channel_scales(s, 3, (4, 5))
    return _convolution(s, s.dtype(7), 3, 8)


def _check_channel_scales(s: Site, weight_at: int, indices: Sequence[int]) -> None:
    """Scales and zero points of a weight are one, or one per output channel."""
    weight = s.shape(weight_at)
    for index in indices:
        shape = s.shape(index)
        if weight is not None and shape and len(shape) == 1 and shape[0] != 1:
            what = f"{s.name(index)} needs one element per output channel of {s.name(weight_at)}"
            s.equal(weight[0], shape[0], "width", what, *s.show(weight_at, index))


def _deform_conv(s: Site) -> list[Type]:
    """Like Conv, with an offset [b, 2 og k, *t] and an optional mask [b, og k, *t] per window."""
    dtype = same_dtype(s, (0, 1, 2, 3, 4))
    (out,) = _convolution(s, dtype, 1, 3)
    weight, offset, mask = s.shape(1), s.shape(2), s.shape(4)
    if out.shape is None or weight is None:
        return [out]
    taps = dims.product((*weight[2:], s.integer("offset_group", 1)))
    spatial = len(weight) - 2
    for index, shape, factor in ((2, offset, spatial), (4, mask, 1)):
        if shape is None:
            continue
        s.rank(index, len(out.shape))
        wanted = (out.shape[0], dims.product((taps, factor)), *out.shape[2:])
        for axis, (own, need) in enumerate(zip(shape, wanted, strict=True)):
            what = f"axis {axis} of {s.name(index)} does not fit the kernel and the output"
            s.equal(need, own, "width", what, *s.show(0, 1, index))
    return [out]


def _conv_transpose(s: Site) -> list[Type]:
    """b (g i) *s, (g i) o *k -> b (g o) *t"""
    dtype = same_dtype(s, range(3))
    shape, weight = s.shape(), s.shape(1)
    if shape is None or weight is None:
        return [Type(dtype, None)]
    s.least_rank(0, 3)
    s.rank(1, len(shape))
    group = s.integer("group", 1)
    if group < 1 or (isinstance(shape[1], int) and shape[1] % group):
        message = f"{group} groups do not divide the {shape[1]} channels of {s.name(0)}"
        s.fail("group", message, *s.show(0, 1), help=_GROUPS)
    what = f"axis 0 of the weight {s.name(1)} must be the channels of {s.name(0)}"
    s.equal(shape[1], weight[0], "width", what, *s.show(0, 1), help=_GROUPS)
    channels = dims.product((group, weight[1]))
    what = f"the bias {s.name(2)} needs one element per output channel of {s.name(1)}"
    s.vector(2, channels, what, "slice the bias together with the weight")
    rank = len(shape) - 2
    kernel = _kernel(s, weight)
    given = s.integers("output_shape")
    if given:
        return [Type(dtype, (shape[0], channels, *given[-rank:]))]
    strides, dilations = _setting(s, "strides", rank, 1), _setting(s, "dilations", rank, 1)
    pads, extra = _setting(s, "pads", 2 * rank, 0), _setting(s, "output_padding", rank, 0)
    auto = s.text("auto_pad", "NOTSET")
    out: list[Dim] = []
    for axis, size in enumerate(shape[2:]):
        stride = strides[axis]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            out.append(dims.product((size, stride)))
            continue
        padding = 0 if auto == "VALID" else pads[axis] + pads[axis + rank]
        steps = dims.product((dims.subtract(size, 1), stride))
        extent = dims.add(dims.product((dims.subtract(kernel[axis], 1), dilations[axis])), 1)
        out.append(dims.add(dims.add(steps, extent), extra[axis] - padding))
    return [Type(dtype, (shape[0], channels, *out))]


def _pool(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None), Type(ir.DataType.INT64, None)]
    s.least_rank(0, 3)
    kernel = s.integers("kernel_shape") or ()
    out = (*shape[:2], *_windows(s, shape[2:], kernel))
    return [Type(s.dtype(), out), Type(ir.DataType.INT64, out)]


def _global_pool(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    s.least_rank(0, 2)
    return [Type(s.dtype(), (*shape[:2], *(1,) * (len(shape) - 2)))]


def _max_unpool(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    s.least_rank(0, 3)
    indices = s.shape(1)
    if indices is not None:
        s.rank(1, len(shape))
        for axis, (a, b) in enumerate(zip(shape, indices, strict=True)):
            s.equal(a, b, "width", f"axis {axis} of the indices must be the data's", *s.show(0, 1))
    if s.has(2):
        s.vector(2, len(shape), "output_shape has one entry per dim")
        return [Type(s.dtype(), s.contents(2) or (None,) * len(shape))]
    rank = len(shape) - 2
    kernel = _setting(s, "kernel_shape", rank, 1)
    strides, pads = _setting(s, "strides", rank, 1), _setting(s, "pads", 2 * rank, 0)
    out: list[Dim] = []
    for axis, size in enumerate(shape[2:]):
        steps = dims.product((dims.subtract(size, 1), strides[axis]))
        out.append(dims.add(steps, kernel[axis] - pads[axis] - pads[axis + rank]))
    return [Type(s.dtype(), (*shape[:2], *out))]


# -- resizing and sampling --------------------------------------------------------------------------


def _resize(s: Site) -> list[Type]:
    shape, dtype = s.shape(), s.dtype()
    if shape is None:
        return [Type(dtype, None)]
    axes = s.integers("axes")
    at = [s.checked_axis(axis, len(shape)) for axis in axes or range(len(shape))]
    out: list[Dim] = list(shape)
    if s.has(3) and s.shape(3) != (0,):
        sizes = s.contents(3)
        if sizes is not None and len(sizes) != len(at):
            s.fail("resize", f"{len(sizes)} sizes for {len(at)} axes", *s.show(0))
        for axis, size in zip(at, _kept_aspect(s, shape, at, sizes), strict=True):
            out[axis] = size
        return [Type(dtype, tuple(out))]
    scales = s.reals(2)
    if scales is not None and len(scales) != len(at):
        s.fail("resize", f"{len(scales)} scales for {len(at)} axes", *s.show(0))
    crops = _crops(s, len(at))
    for position, axis in enumerate(at):
        scale = None if scales is None else scales[position]
        crop = 1.0 if crops is None else crops[position]
        size = None if crop is None else _scaled(shape[axis], scale, crop)
        out[axis] = s.fresh(axis) if size is None else size
    return [Type(dtype, tuple(out))]


def _crops(s: Site, count: int) -> Sequence[float | None] | None:
    """The share of every axis inside the region of interest; None where there is none."""
    if s.text("coordinate_transformation_mode") != "tf_crop_and_resize":
        return None
    region = s.reals(1)
    if region is None or len(region) != 2 * count:
        return [None] * count
    return [
        None if a is None or b is None else float(b - a)
        for a, b in zip(region[:count], region[count:], strict=True)
    ]


def _scaled(dim: Dim, scale: sympy.Expr | None, crop: float) -> Dim:
    """floor(dim * scale), as runtimes compute it in float32."""
    if dim is None or scale is None:
        return None
    if not scale.is_number:
        # The scale was itself computed from sizes.
        return dims.simplify(sympy.floor(sympy.cancel(scale * dim))) if crop == 1.0 else None
    if isinstance(dim, int):
        return math.floor(np.float32(dim) * np.float32(crop) * np.float32(float(scale)))
    fraction = Fraction(float(scale)).limit_denominator(64)
    if crop != 1.0 or np.float32(float(fraction)) != np.float32(float(scale)):
        return None
    return dims.divide(dims.product((dim, fraction.numerator)), fraction.denominator)


def _kept_aspect(s: Site, shape: Shape, at: list[int], sizes: Shape | None) -> Sequence[Dim]:
    """The sizes asked for, or those of one scale for all axes where the policy says so."""
    policy = s.text("keep_aspect_ratio_policy", "stretch")
    if sizes is None:
        return [s.fresh(axis) for axis in at]
    if policy == "stretch":
        return sizes
    befores = [shape[axis] for axis in at]
    fixed = [
        (before, after)
        for before, after in zip(befores, sizes, strict=True)
        if isinstance(before, int) and isinstance(after, int)
    ]
    if len(fixed) != len(at):
        return [s.fresh(axis) for axis in at]
    ratios = [after / before for before, after in fixed]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [math.floor(before * scale + 0.5) for before, _ in fixed]


def _grid_sample(s: Site) -> list[Type]:
    """b c *s, b *t n -> b c *t, n the number of spatial axes."""
    shape, grid = s.shape(), s.shape(1)
    if shape is None or grid is None:
        return [Type(s.dtype(), None)]
    s.least_rank(0, 3)
    s.rank(1, len(shape))
    s.equal(shape[0], grid[0], "width", "the grid is per sample", *s.show(0, 1))
    what = "the grid has one coordinate per spatial axis"
    s.equal(len(shape) - 2, grid[-1], "width", what, *s.show(0, 1))
    return [Type(s.dtype(), (*shape[:2], *grid[1:-1]))]


def _roi_align(s: Site) -> list[Type]:
    shape, rois = s.shape(), s.shape(1)
    s.rank(0, 4)
    s.rank(1, 2)
    if rois is not None:
        s.equal(rois[1], 4, "width", "a region has 4 coordinates", *s.show(1))
        s.vector(2, rois[0], "every region needs the index of its image")
    count = rois[0] if rois is not None else None
    channels = shape[1] if shape is not None else None
    out = (count, channels, s.integer("output_height", 1), s.integer("output_width", 1))
    return [Type(same_dtype(s, (0, 1)), out)]


def _max_roi_pool(s: Site) -> list[Type]:
    shape, rois = s.shape(), s.shape(1)
    s.rank(0, 4)
    s.rank(1, 2)
    if rois is not None:
        s.equal(rois[1], 5, "width", "a region has an image and 4 coordinates", *s.show(1))
    count = rois[0] if rois is not None else None
    channels = shape[1] if shape is not None else None
    return [Type(s.dtype(), (count, channels, *_setting(s, "pooled_shape", 2, 1)))]


def _col2im(s: Site) -> list[Type]:
    """b (c *k) l with the image's shape *s and the block's shape *k -> b c *s"""
    shape, image, block = s.shape(), s.contents(1), s.contents(2)
    s.rank(0, 3)
    if image is None:
        length = s.shape(1)
        count = length[0] if length else None
        if not isinstance(count, int):
            return [Type(s.dtype(), None)]
        image = (None,) * count
    taps = None if block is None else dims.product(block)
    columns = None if shape is None else shape[1]
    if isinstance(columns, int) and isinstance(taps, int) and (taps <= 0 or columns % taps):
        s.fail("width", f"blocks of {taps} do not divide the {columns} columns", *s.show(0))
    if block is not None and len(block) != len(image):
        s.fail("attribute", f"a block of {len(block)} axes for an image of {len(image)}")
    if block is not None and shape is not None:
        # One column per place of the block in the image: as many as a convolution has windows.
        places = dims.product(_windows(s, image, block))
        what = f"{s.name(0)} needs one column per place of the block in the image"
        s.equal(shape[2], places, "width", what, *s.show(0))
    batch = None if shape is None else shape[0]
    return [Type(s.dtype(), (batch, dims.divide(columns, taps), *image))]


def _image_decoder(s: Site) -> list[Type]:
    channels = 1 if s.text("pixel_format", "RGB") == "Grayscale" else 3
    return [Type(ir.DataType.UINT8, (s.fresh(0), s.fresh(1), channels))]


RULES = {
    "AveragePool": _pool,
    "Col2Im": _col2im,
    "Conv": _conv,
    "ConvInteger": _conv_integer,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _deform_conv,
    "GlobalAveragePool": _global_pool,
    "GlobalLpPool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "GridSample": _grid_sample,
    "ImageDecoder": _image_decoder,
    "LpPool": _pool,
    "MaxPool": _pool,
    "MaxRoiPool": _max_roi_pool,
    "MaxUnpool": _max_unpool,
    "QLinearConv": _qlinear_conv,
    "Resize": _resize,
    "RoiAlign": _roi_align,
}
