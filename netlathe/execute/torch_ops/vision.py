"""Sampling from feature maps, regions of interest, and choosing boxes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Ints, Row, ints, number, row


def grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    """GridSample, 4-D and 5-D (cubic in 4-D only); torch calls the modes by other names."""
    names = {"linear": "bilinear", "cubic": "bicubic"}  # opset 16 has torch's names already
    return F.grid_sample(x, grid, names.get(mode, mode), padding_mode, bool(align_corners))


def affine_grid(theta: Tensor, size: Ints, *, align_corners: int = 0) -> Tensor:
    """AffineGrid."""
    return F.affine_grid(theta, ints(size), bool(align_corners))


def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str | None = None,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
    opset: int = 16,
) -> Tensor:
    """RoiAlign: rois [r, 4] of (x1, y1, x2, y2) -> [r, c, oh, ow].

    Every bin is the mean (or the maximum of the four weighted corners) over sampled points. Without
    ``sampling_ratio`` each region has its own number of points, so regions are taken one by one.
    """
    rule = coordinate_transformation_mode
    if rule is None:
        rule = "half_pixel" if opset >= 16 else "output_half_pixel"
    shift = 0.5 if rule == "half_pixel" else 0.0
    height, width = x.shape[2:]
    results = []
    for box, batch in zip(rois.tolist(), batch_indices.tolist(), strict=True):
        x1, y1, x2, y2 = (edge * spatial_scale - shift for edge in box)
        w, h = x2 - x1, y2 - y1
        if rule != "half_pixel":  # opset 10 forces regions to be at least a pixel
            w, h = max(w, 1.0), max(h, 1.0)
        bin_h, bin_w = h / output_height, w / output_width
        ny = sampling_ratio or max(math.ceil(bin_h), 1)
        nx = sampling_ratio or max(math.ceil(bin_w), 1)
        y = y1 + (torch.arange(output_height * ny, device=x.device) + 0.5) * (bin_h / ny)
        z = x1 + (torch.arange(output_width * nx, device=x.device) + 0.5) * (bin_w / nx)
        corners = _corners(x[batch], y.to(x.dtype), z.to(x.dtype), height, width)
        if mode == "avg":
            points = corners.sum(0)
        else:
            points = corners.amax(0)
        bins = points.reshape(-1, output_height, ny, output_width, nx)
        results.append(bins.mean((2, 4)) if mode == "avg" else bins.amax((2, 4)))
    if not results:
        return x.new_zeros(0, x.shape[1], output_height, output_width)
    return torch.stack(results)


def _corners(image: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """The four weighted neighbours of each point (y, x): [4, c, len(y), len(x)].

    Points more than a pixel outside give zero; others outside are moved to the edge.
    """
    inside = ((y >= -1) & (y <= height)).unsqueeze(1) & ((x >= -1) & (x <= width))
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y0, x0 = y.floor(), x.floor()
    ly, lx = (y - y0).unsqueeze(1), x - x0
    top, left = y0.to(torch.int64), x0.to(torch.int64)
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    parts = [
        image[:, top][:, :, left] * ((1 - ly) * (1 - lx)),
        image[:, top][:, :, right] * ((1 - ly) * lx),
        image[:, bottom][:, :, left] * (ly * (1 - lx)),
        image[:, bottom][:, :, right] * (ly * lx),
    ]
    return torch.stack(parts) * inside


def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Ints | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """NonMaxSuppression: boxes [b, n, 4], scores [b, classes, n] -> [kept, 3] of (b, class, box)."""
    limit = 0 if max_output_boxes_per_class is None else int(number(max_output_boxes_per_class))
    overlap = 0.0 if iou_threshold is None else float(number(iou_threshold))
    if center_point_box:
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        low, high = centre - half, centre + half
    else:  # any two opposite corners
        low = torch.minimum(boxes[..., :2], boxes[..., 2:])
        high = torch.maximum(boxes[..., :2], boxes[..., 2:])
    kept: list[list[int]] = []
    for batch in range(scores.shape[0]):
        shared = _overlaps(low[batch], high[batch]) > overlap
        suppressed_by = shared.tolist()
        for category in range(scores.shape[1]):
            values = scores[batch, category]
            order = torch.argsort(values, descending=True, stable=True).tolist()
            if score_threshold is not None:
                good = (values > number(score_threshold)).tolist()
                order = [i for i in order if good[i]]
            chosen: list[int] = []
            for i in order:
                if len(chosen) >= limit:
                    break
                if not any(suppressed_by[i][j] for j in chosen):
                    chosen.append(i)
            kept += [[batch, category, i] for i in chosen]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _overlaps(low: Tensor, high: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes: [n, n]."""
    area = (high - low).prod(-1)
    sides = torch.minimum(high.unsqueeze(1), high) - torch.maximum(low.unsqueeze(1), low)
    shared = sides.clamp(min=0).prod(-1)
    union = area.unsqueeze(1) + area - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(shared))


ROWS: dict[str, Row] = {
    "GridSample": row(grid_sample),
    "AffineGrid": row(affine_grid, "size"),
    "RoiAlign": row(roi_align, facts=("opset",)),
    "NonMaxSuppression": row(non_max_suppression, "max_output_boxes_per_class"),
}
