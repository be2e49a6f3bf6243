"""Sliding windows: padding as ONNX states it, and the pooling ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Ints, Row, along, ints, row

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def explicit_pads(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> tuple[list[int], list[int]]:
    """The (begin, end) padding of every spatial dim of ``x`` [n, c, *s].

    SAME means ceil(size / stride) windows; what is odd goes to the end, or with SAME_LOWER to the begin.
    """
    rank = x.dim() - 2
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        begin, end = [], []
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
            total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            small, large = total // 2, total - total // 2
            begin.append(small if auto_pad == "SAME_UPPER" else large)
            end.append(large if auto_pad == "SAME_UPPER" else small)
        return begin, end
    if pads is None or auto_pad == "VALID":
        return [0] * rank, [0] * rank
    return list(pads[:rank]), list(pads[rank:])


def pad_spatial(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float) -> Tensor:
    """``x`` [n, c, *s] with its spatial dims padded (cropped where negative)."""
    widths = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
    return F.pad(x, widths, value=value) if any(widths) else x


class _Windows:
    """Where the windows of a pooling op lie on ``x`` [n, c, *s]."""

    def __init__(
        self,
        x: Tensor,
        kernel_shape: Sequence[int],
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        auto_pad: str,
        ceil_mode: int,
    ) -> None:
        rank = x.dim() - 2
        self.kernel = list(kernel_shape)
        self.stride = list(strides or [1] * rank)
        self.dilation = list(dilations or [1] * rank)
        self.begin, self.end = explicit_pads(
            x, self.kernel, self.stride, self.dilation, pads, auto_pad
        )
        self.overhang = [0] * rank  # what the last window reads beyond the padding, in ceil mode
        if ceil_mode:
            for i, size in enumerate(x.shape[2:]):
                reach = self.dilation[i] * (self.kernel[i] - 1) + 1
                padded = size + self.begin[i] + self.end[i]
                count = -(-(padded - reach) // self.stride[i]) + 1
                if (count - 1) * self.stride[i] >= size + self.begin[i]:
                    count -= 1  # a window must start inside the input or the padding before it
                self.overhang[i] = max((count - 1) * self.stride[i] + reach - padded, 0)

    def native(self) -> bool:
        """Whether torch's own pooling takes this padding: the same on both sides, half a window."""
        return self.begin == self.end and all(
            2 * b <= k for b, k in zip(self.begin, self.kernel, strict=True)
        )

    def padded(self, x: Tensor, value: float) -> Tensor:
        """``x`` padded so that all windows lie inside."""
        ends = [e + o for e, o in zip(self.end, self.overhang, strict=True)]
        return pad_spatial(x, self.begin, ends, value)

    def counts(self, x: Tensor, include_pad: bool) -> Tensor:
        """How many elements of ``x`` (with its padding on demand) every window holds: [*count]."""
        rank = x.dim() - 2
        total = torch.ones([1] * rank, dtype=x.dtype, device=x.device)
        for i, size in enumerate(x.shape[2:]):
            reach = self.dilation[i] * (self.kernel[i] - 1) + 1
            span = self.begin[i] + size + self.end[i] + self.overhang[i] - reach
            first = torch.arange(span // self.stride[i] + 1, device=x.device) * self.stride[i]
            tap = torch.arange(self.kernel[i], device=x.device) * self.dilation[i]
            place = first.unsqueeze(1) + tap - self.begin[i]  # [count, kernel]
            low, high = (-self.begin[i], size + self.end[i]) if include_pad else (0, size)
            inside = ((place >= low) & (place < high)).sum(1).to(x.dtype)
            total = total * along(inside, i, rank)
        return total

    def view(self, padded: Tensor) -> Tensor:
        """Every window: [n, c, *s] -> [n, c, *count, *kernel], without a copy."""
        for i, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            padded = padded.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
        return padded


def max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """MaxPool, and where each maximum stands in the flattened input (the first of equal ones)."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    rank = x.dim() - 2
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    if output_count == 1 and x.is_floating_point() and windows.native():
        pool = _MAXIMUM[rank]
        pooled = pool(
            x, windows.kernel, windows.stride, windows.begin, windows.dilation, bool(ceil_mode)
        )
        return (pooled,)
    padded = windows.padded(x, lowest)
    if output_count == 1 and x.is_floating_point():
        return (_MAXIMUM[rank](padded, windows.kernel, windows.stride, 0, windows.dilation),)
    view = windows.view(padded).flatten(2 + rank)
    pooled, tap = view.max(-1)
    if output_count == 1:
        return (pooled,)
    # From the tap within the window to the coordinate in the input, dim by dim.
    coordinates: list[Tensor] = []
    for i in reversed(range(rank)):
        step = along(torch.arange(tap.shape[2 + i], device=x.device), 2 + i, tap.dim())
        inside = tap % windows.kernel[i]
        tap = tap // windows.kernel[i]
        coordinates.insert(
            0, step * windows.stride[i] + inside * windows.dilation[i] - windows.begin[i]
        )
    order = range(rank) if storage_order == 0 else reversed(range(rank))
    flat = torch.zeros_like(pooled, dtype=torch.int64)
    for i in order:
        flat = flat * x.shape[2 + i] + coordinates[i]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[:2])
    offset = planes.reshape(*x.shape[:2], *[1] * rank) * math.prod(x.shape[2:])
    return pooled, flat + offset


def average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """AveragePool: padding counts on demand, what hangs over in ceil mode never does."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    rank = x.dim() - 2
    plain = all(d == 1 for d in windows.dilation)
    include = bool(count_include_pad)
    if plain and windows.native():
        pool = _AVERAGE[rank]
        return pool(x, windows.kernel, windows.stride, windows.begin, bool(ceil_mode), include)
    padded = windows.padded(x, 0)
    if plain:
        mean = _AVERAGE[rank](padded, windows.kernel, windows.stride)
    else:
        mean = windows.view(padded).flatten(2 + rank).mean(-1)
    return mean * (math.prod(windows.kernel) / windows.counts(x, include))


def lp_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """LpPool."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    view = windows.view(windows.padded(x, 0)).flatten(x.dim())
    return view.abs().pow(p).sum(-1).pow(1 / p)


def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Ints | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """MaxUnpool: indices are flat over the tensor that was pooled, whose size is inferred.

    With a larger ``output_shape`` the result stands at its begin.
    """
    rank = x.dim() - 2
    stride, pad = list(strides or [1] * rank), list(pads or [0] * (2 * rank))
    inferred = [
        (n - 1) * s + k - pad[i] - pad[rank + i]
        for i, (n, s, k) in enumerate(zip(x.shape[2:], stride, kernel_shape, strict=True))
    ]
    shape = [*x.shape[:2], *inferred]
    flat = x.new_zeros(math.prod(shape)).scatter(0, indices.reshape(-1), x.reshape(-1))
    y = flat.reshape(shape)
    if output_shape is None:
        return y
    target = ints(output_shape)[2:]
    return pad_spatial(y, [0] * rank, [t - n for t, n in zip(target, inferred, strict=True)], 0)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def global_average_pool(x: Tensor) -> Tensor:
    """GlobalAveragePool."""
    return x.mean(_spatial(x), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    """GlobalMaxPool."""
    return x.amax(_spatial(x), keepdim=True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """GlobalLpPool."""
    length: Tensor = torch.linalg.vector_norm(x, p, _spatial(x), keepdim=True)
    return length


def lrn(
    x: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int
) -> Tensor:
    """LRN: over ``size`` channels, of which an even size has one more after than before."""
    before = (size - 1) // 2
    squares = F.pad(x * x, [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    return x / (bias + alpha / size * squares.unfold(1, size, 1).sum(-1)) ** beta


def max_roi_pool(
    x: Tensor, rois: Tensor, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """MaxRoiPool: rois [r, 5] of (batch, x1, y1, x2, y2), in whole pixels; an empty bin is zero."""
    height, width = x.shape[2:]
    ph, pw = pooled_shape
    results = []
    for batch, *corners in rois.tolist():
        x1, y1, x2, y2 = (math.floor(c * spatial_scale + 0.5) for c in corners)
        bin_h, bin_w = max(y2 - y1 + 1, 1) / ph, max(x2 - x1 + 1, 1) / pw
        bins = []
        for i, j in itertools.product(range(ph), range(pw)):
            top, bottom = math.floor(i * bin_h) + y1, math.ceil((i + 1) * bin_h) + y1
            left, right = math.floor(j * bin_w) + x1, math.ceil((j + 1) * bin_w) + x1
            part = x[
                int(batch), :, max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)
            ]
            bins.append(part.amax((1, 2)) if part.numel() else x.new_zeros(x.shape[1]))
        results.append(torch.stack(bins, 1).reshape(x.shape[1], ph, pw))
    return torch.stack(results) if results else x.new_zeros(0, x.shape[1], ph, pw)


ROWS: dict[str, Row] = {
    "MaxPool": row(max_pool, facts=("output_count",)),
    "AveragePool": row(average_pool),
    "LpPool": row(lp_pool),
    "MaxUnpool": row(max_unpool, "output_shape"),
    "GlobalAveragePool": row(global_average_pool),
    "GlobalMaxPool": row(global_max_pool),
    "GlobalLpPool": row(global_lp_pool),
    "LRN": row(lrn),
    "MaxRoiPool": row(max_roi_pool),
}
