"""Resize and Upsample: separable interpolation, one axis after the other.

Along an axis every output reads a few neighbours of its place in the input, with weights from a
kernel. torch's interpolate has four of ONNX's coordinate rules for some ranks; this has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .row import Ints, Row, along, axes_of, ints, row

Kernel = Callable[[Tensor], Tensor]


def resize(
    x: Tensor,
    roi: Tensor | Sequence[float] | None = None,
    scales: Tensor | Sequence[float] | None = None,
    sizes: Ints | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
    opset: int = 19,
) -> Tensor:
    """Resize: each axis by a scale, or to a size."""
    if opset < 11:  # (x, scales): roi stands where scales came first
        return upsample(x, roi, mode=mode)
    over = axes_of(axes, x.dim())
    inputs = [x.shape[axis] for axis in over]
    factors: list[float] = ints(scales)  # type: ignore[arg-type,assignment]  # floats are read alike
    if factors:
        outputs = [math.floor(n * f) for n, f in zip(inputs, factors, strict=True)]
    else:
        outputs = ints(sizes)
        factors = [out / n for out, n in zip(outputs, inputs, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            choose = min if keep_aspect_ratio_policy == "not_larger" else max
            factors = [choose(factors)] * len(factors)
            outputs = [math.floor(n * f + 0.5) for n, f in zip(inputs, factors, strict=True)]
    crop = [float(r) for r in ints(roi)] if roi is not None else []  # type: ignore[arg-type]  # floats are read alike
    outside: Tensor | None = None
    y = x if x.is_floating_point() or mode == "nearest" else x.to(torch.float32)
    for i, (axis, factor, size) in enumerate(zip(over, factors, outputs, strict=True)):
        begin, end = (crop[i], crop[len(over) + i]) if crop else (0.0, 1.0)
        rule = coordinate_transformation_mode
        if rule != "tf_crop_and_resize" and isinstance(factor, (int, float)) and factor == 1.0:
            if isinstance(size, int) and size == x.shape[axis]:
                continue
        at = _place(rule, size, x.shape[axis], factor, begin, end, x.device)
        if rule == "tf_crop_and_resize":
            beyond = along((at < 0) | (at > x.shape[axis] - 1), axis, x.dim())
            outside = beyond if outside is None else outside | beyond
        if mode == "nearest":
            index = _nearest(at, nearest_mode).clamp(0, x.shape[axis] - 1)
            y = y.index_select(axis, index.to(torch.int64))
        else:
            kernel: Kernel = _triangle
            reach = 1.0
            if mode == "cubic":
                kernel, reach = (lambda d: _cubic(d, cubic_coeff_a)), 2.0
            stretch = min(factor, 1.0) if antialias else 1.0
            y = _interpolate(y, axis, at, kernel, reach / stretch, stretch, bool(exclude_outside))
    if outside is not None:
        y = torch.where(
            outside, torch.tensor(extrapolation_value, dtype=y.dtype, device=y.device), y
        )
    if x.is_floating_point() or mode == "nearest":
        return y
    info = torch.iinfo(x.dtype)
    return torch.round(y).clamp(info.min, info.max).to(x.dtype)


def upsample(
    x: Tensor, scales: Tensor | Sequence[float] | None = None, *, mode: str = "nearest"
) -> Tensor:
    """Upsample (to opset 9), and Resize of opset 10: asymmetric coordinates, rounded down."""
    return resize(
        x,
        None,
        scales,
        mode=mode,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _place(
    rule: str,
    size: int,
    length: int,
    factor: float,
    begin: float,
    end: float,
    device: torch.device,
) -> Tensor:
    """Where each of ``size`` outputs lies on an axis of ``length``: float64 [size].

    The output width in the formulas is the unrounded one, length * factor.
    """
    i = torch.arange(size, dtype=torch.float64, device=device)
    width = length * factor
    match rule:
        case "half_pixel":
            return (i + 0.5) / factor - 0.5
        case "half_pixel_symmetric":
            return length / 2 * (1 - size / width) + (i + 0.5) / factor - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / factor - 0.5 if size > 1 else torch.full_like(i, -0.5)
        case "align_corners":
            return i * ((length - 1) / (width - 1)) if width != 1 else torch.zeros_like(i)
        case "asymmetric":
            return i / factor
        case "tf_crop_and_resize":
            if width == 1:
                return torch.full_like(i, 0.5 * (begin + end) * (length - 1))
            return begin * (length - 1) + i * ((end - begin) * (length - 1) / (width - 1))
    raise ValueError(f"Resize has no coordinate_transformation_mode {rule!r}")


def _nearest(at: Tensor, rule: str) -> Tensor:
    match rule:
        case "round_prefer_floor":
            return torch.ceil(at - 0.5)
        case "round_prefer_ceil":
            return torch.floor(at + 0.5)
        case "floor":
            return torch.floor(at)
        case "ceil":
            return torch.ceil(at)
    raise ValueError(f"Resize has no nearest_mode {rule!r}")


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _interpolate(
    x: Tensor,
    axis: int,
    at: Tensor,
    kernel: Kernel,
    reach: float,
    stretch: float,
    exclude_outside: bool,
) -> Tensor:
    """Neighbours within ``reach``, weighted by the kernel of the stretched distance.

    Neighbours beyond the edge repeat the edge, or count nothing with ``exclude_outside``. Weights are
    normalized where they may not sum to one.
    """
    size = x.shape[axis]
    reach_up = math.ceil(reach)
    base = torch.floor(at)
    taps = range(1 - reach_up, reach_up + 1)
    weights = torch.stack([kernel((base + t - at) * stretch) for t in taps])  # [taps, out]
    index = torch.stack([base + t for t in taps])
    if exclude_outside:
        weights = torch.where((index >= 0) & (index < size), weights, torch.zeros_like(weights))
    if exclude_outside or stretch != 1.0:
        weights = weights / weights.sum(0)
    where = index.clamp(0, size - 1).to(torch.int64)
    weights = weights.to(x.dtype)
    result = x.index_select(axis, where[0]) * along(weights[0], axis, x.dim())
    for tap in range(1, len(taps)):
        part = x.index_select(axis, where[tap])
        result = result + part * along(weights[tap], axis, x.dim())
    return result


ROWS: dict[str, Row] = {
    "Resize": row(resize, "roi", "scales", "sizes", facts=("opset",)),
    "Upsample": row(upsample, "scales"),
}
