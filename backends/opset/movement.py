"""Pad, Split, Resize, GridSample, Scatter and pooling: attributes and inputs that came later."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .builder import Builder, Gap


def _selected(b: Builder, given: ir.Value, default: ir.Value, index: list[int]) -> ir.Value:
    """``concat(given, default)[index]``: entries that the axes leave out come from ``default``."""
    constants = b.constant(given), b.constant(default)
    if constants[0] is not None and constants[1] is not None:
        return b.const(np.concatenate(constants)[index], b.dtype(given))  # type: ignore[arg-type]  # both are arrays here
    return b("Gather", b("Concat", given, default, axis=0), b.const(index), axis=0)


def _axes(b: Builder, axes: list[int], rank: int) -> list[int]:
    return [axis % rank for axis in axes]


def pad(b: Builder) -> list[ir.Value] | None:
    """Pad: its axes (18) become pads for every dim; wrap mode (19) becomes a Gather per axis."""
    x, pads, fill = b.need(0), b.need(1), b.input(2)
    mode = b.attribute("mode", "constant")
    if b.opset >= (19 if mode == "wrap" else 18):
        return None
    rank = b.rank(x)
    axes = list(range(rank))
    if b.input(3) is not None:
        found = b.constant(b.input(3))
        if found is None:
            raise Gap("the axes of Pad are not constant")
        axes = _axes(b, [int(a) for a in found], rank)
    if mode == "wrap":
        return [_wrapped(b, x, pads, axes)]
    if b.input(3) is not None:
        count = len(axes)
        index = [axes.index(a) if a in axes else 2 * count for a in range(rank)]
        index += [count + axes.index(a) if a in axes else 2 * count for a in range(rank)]
        pads = _selected(b, pads, b.const([0]), index)
    return [b("Pad", x, pads, fill, mode=mode)]


def _wrapped(b: Builder, x: ir.Value, pads: ir.Value, axes: list[int]) -> ir.Value:
    amounts = b.constant(pads)
    if amounts is None:
        raise Gap("the pads of a wrapping Pad are not constant")
    dims = b.dims(x)
    for i, axis in enumerate(axes):
        before, after = int(amounts[i]), int(amounts[len(axes) + i])
        size = dims[axis]
        if before == after == 0:
            continue
        if not isinstance(size, int):
            raise Gap("a dim that Pad wraps is dynamic")
        x = b("Gather", x, b.const(np.arange(-before, size + after) % size), axis=axis)
    return x


def split(b: Builder) -> list[ir.Value] | None:
    """Split: num_outputs (18) becomes the list of sizes, the last of them the smaller one."""
    count = b.attribute("num_outputs")
    if b.opset >= 18 or count is None:
        return None
    x, axis = b.need(0), int(b.attribute("axis", 0))
    size = b.dims(x)[axis]
    if isinstance(size, int):
        chunk = -(-size // count)
        sizes = b.const([chunk] * (count - 1) + [size - chunk * (count - 1)])
    else:
        length = b.length(x, axis % b.rank(x))
        rounded = b("Add", length, b.const([count - 1]))
        chunk_value = b("Div", rounded, b.const([count]))
        last = b("Sub", length, b("Mul", chunk_value, b.const([count - 1])))
        sizes = b("Concat", *[chunk_value] * (count - 1), last, axis=0)
    return b.many("Split", [x, sizes], count, axis=axis)


def resize(b: Builder) -> list[ir.Value] | None:
    """Resize: its axes (18) become scales or sizes for every dim; newer modes have no old form."""
    mode = b.attribute("coordinate_transformation_mode", "half_pixel")
    if mode == "half_pixel_symmetric" and b.opset < 19:
        raise Gap("Resize in half_pixel_symmetric mode exists since opset 19")
    if b.opset >= 18:
        return None
    if b.attribute("antialias", 0):
        raise Gap("Resize with antialias exists since opset 18")
    policy = b.attribute("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch" and b.input(3) is not None:
        raise Gap(f"Resize that keeps the aspect ratio ({policy}) exists since opset 18")
    x, roi, scales, sizes = b.need(0), b.input(1), b.input(2), b.input(3)
    kept: dict[str, Any] = {
        name: a
        for name, a in b.node.attributes.items()
        if name not in ("antialias", "axes", "keep_aspect_ratio_policy")
    }
    axes = b.attribute("axes")
    if axes is not None:
        rank = b.rank(x)
        axes = _axes(b, axes, rank)
        count = len(axes)
        place = [axes.index(a) if a in axes else None for a in range(rank)]
        if roi is not None and b.dims(roi) != [0]:
            starts = [2 * count if p is None else p for p in place]
            ends = [2 * count + 1 if p is None else count + p for p in place]
            roi = _selected(b, roi, b.const([0, 1], b.dtype(roi)), starts + ends)
        if scales is not None and b.dims(scales) != [0]:
            index = [count if p is None else p for p in place]
            scales = _selected(b, scales, b.const([1.0], ir.DataType.FLOAT), index)
        if sizes is not None:
            index = [count + a if p is None else p for a, p in enumerate(place)]
            sizes = b("Gather", b("Concat", sizes, b("Shape", x), axis=0), b.const(index), axis=0)
    return [b("Resize", x, roi, scales, sizes, **kept)]


_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}  # names since 20 -> names before


def grid_sample(b: Builder) -> list[ir.Value] | None:
    """GridSample: the modes had other names before opset 20, which knew images only."""
    if b.opset >= 20:
        return None
    if b.rank(b.need(0)) != 4:
        raise Gap("GridSample of other than images [n, c, h, w] exists since opset 20")
    mode = str(b.attribute("mode", "linear"))
    b.node.attributes["mode"] = ir.AttrString("mode", _GRID_MODES.get(mode, mode))
    return None


def scatter(b: Builder) -> list[ir.Value] | None:
    """ScatterND, ScatterElements: reductions by max and min exist since opset 18."""
    reduction = b.attribute("reduction", "none")
    if b.opset < 18 and reduction in ("max", "min"):
        raise Gap(f"{b.node.op_type} with reduction={reduction!r} exists since opset 18")
    return None


def affine_grid(b: Builder) -> list[ir.Value]:
    """AffineGrid (20): the sampling positions [n, *spatial, r] of theta [n, r, r + 1]."""
    theta, size = b.need(0), b.constant(b.need(1))
    if size is None:
        raise Gap("the size of AffineGrid is not a constant")
    spatial = [int(n) for n in size[2:]]  # depth, height, width, or height, width
    aligned = bool(b.attribute("align_corners", 0))
    steps = [_centres(n, aligned) for n in spatial]
    places = np.stack(np.meshgrid(*steps, indexing="ij")[::-1], axis=-1)  # x, y, z
    ones = np.ones((*spatial, 1))
    points = np.concatenate([places, ones], axis=-1).reshape(-1, len(spatial) + 1)
    product = b("MatMul", b.const(points, b.dtype(theta)), b("Transpose", theta, perm=[0, 2, 1]))
    return [b.reshape(product, [-1, *spatial, len(spatial)])]


def _centres(n: int, aligned: bool) -> npt.NDArray[np.float64]:
    """n positions over [-1, 1]: from edge to edge where aligned, else the centres of n cells."""
    if aligned:
        return np.linspace(-1.0, 1.0, n) if n > 1 else np.full(1, -1.0)
    return (2 * np.arange(n) + 1) / n - 1


def pool(b: Builder) -> list[ir.Value] | None:
    """AveragePool (19) and LpPool (18) gained dilations and, LpPool, rounding up.

    Up to opset 21 a pool that rounds its size up also counts a window that starts in the padding.
    """
    if b.opset < 22 and b.attribute("ceil_mode", 0) and _counts_padding(b):
        raise Gap(f"{b.node.op_type} with ceil_mode has a window in the padding below opset 22")
    since = {"AveragePool": 19, "LpPool": 18, "MaxPool": 0}[b.node.op_type]
    if b.opset >= since:
        return None
    if any(d != 1 for d in b.attribute("dilations", ())):
        raise Gap(f"{b.node.op_type} with dilations exists since opset {since}")
    if b.node.op_type == "LpPool" and b.attribute("ceil_mode", 0):
        raise Gap("LpPool that rounds its size up exists since opset 18")
    return None


def _counts_padding(b: Builder) -> bool:
    """Whether the last window along some dim might start behind the data."""
    kernel = b.attribute("kernel_shape")
    n = len(kernel)
    pads = b.attribute("pads") or [0] * (2 * n)
    strides = b.attribute("strides") or [1] * n
    dilations = b.attribute("dilations") or [1] * n
    for i, size in enumerate(b.dims(b.need(0))[2:]):
        if not isinstance(size, int):
            return True
        reach = size + pads[i] + pads[n + i] - dilations[i] * (kernel[i] - 1) - 1
        if -(-reach // strides[i]) * strides[i] >= size + pads[i]:
            return True
    return False


def tensor_scatter(b: Builder) -> list[ir.Value]:
    """TensorScatter (24): writes ``update`` into a cache from each sample's position on."""
    cache, update, start = b.need(0), b.need(1), b.input(2)  # [b, ..., max, ...], [b, ..., s, ...]
    rank = b.rank(cache)
    axis = int(b.attribute("axis", -2)) % rank
    steps = b("Squeeze", b.length(update, axis), b.const([0]))
    places = b("Range", b.const(0), steps, b.const(1))  # [s]
    after = list(range(1, rank - axis))
    places = b.unsqueeze(places, after) if after else places  # [s, 1, ...]
    if start is not None:
        places = b("Add", places, b.unsqueeze(start, list(range(1, rank))))
    if b.attribute("mode", "linear") == "circular":
        size = b("Squeeze", b.length(cache, axis), b.const([0]))
        places = b("Mod", places, size)
    index = b("Expand", places, b("Shape", update))
    return [b("ScatterElements", cache, index, update, axis=axis, reduction="none")]
