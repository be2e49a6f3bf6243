"""Matrix products, convolutions, and contractions by equation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, along, row
from .storage import widened
from .window import explicit_pads, pad_spatial

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 1,
) -> Tensor:
    """Gemm: alpha A' B' + beta C."""
    product = (a.T if transA else a) @ (b.T if transB else b)
    if alpha != 1.0:
        product = product * alpha
    if c is None:
        return product
    return product + (c if beta == 1.0 else c * beta)


def einsum(*inputs: Tensor, equation: str) -> Tensor:
    """Einsum."""
    return torch.einsum(equation, *inputs)


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Conv: x [n, c, *s], w [m, c / group, *k], b [m]."""
    rank = x.dim() - 2
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    begin, end = explicit_pads(x, w.shape[2:], stride, dilation, pads, auto_pad)
    padding = [0] * rank
    if begin == end:
        padding = begin
    else:
        x = pad_spatial(x, begin, end, 0)
    return _CONV[rank](x, w, b, stride, padding, dilation, group)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """ConvTranspose: w [c, m / group, *k].

    The full result is cropped by the pads and extended by the output padding. Pads follow from
    ``output_shape`` where that is given; what is odd goes to the begin, or with SAME_UPPER to the end.
    """
    rank = x.dim() - 2
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    full = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(x.shape[2:], stride, dilation, w.shape[2:], strict=True)
    ]
    begin, end = [0] * rank, [0] * rank
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
    if output_shape is not None:
        for i, size in enumerate(list(output_shape)[-rank:]):
            total = full[i] + extra[i] - size
            if total < 0:  # the result is longer than what there is: zeros at the end
                total, extra[i] = 0, size - full[i]
            small, large = total // 2, total - total // 2
            begin[i], end[i] = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    elif pads is not None and auto_pad != "VALID":
        begin, end = list(pads[:rank]), list(pads[rank:])
    y = _CONV_TRANSPOSE[rank](x, w, None, stride, 0, 0, group, dilation)
    y = pad_spatial(y, [-n for n in begin], [e - n for e, n in zip(extra, end, strict=True)], 0)
    return y if b is None else y + along(b, 1, y.dim())


def deform_conv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """DeformConv, 2-D: each kernel tap reads bilinearly at its own offset, zero outside.

    offset [n, g * kh * kw * 2, oh, ow] holds (y, x) pairs; mask [n, g * kh * kw, oh, ow] weighs taps.
    """
    n, c, height, width = x.shape
    m, _, kh, kw = w.shape
    stride, dilation = list(strides or [1, 1]), list(dilations or [1, 1])
    top, left = list(pads or [0] * 4)[:2]
    oh, ow = offset.shape[2:]
    g = offset_group
    offset = offset.reshape(n, g, kh * kw, 2, oh, ow)
    weights = None if mask is None else mask.reshape(n, g, kh * kw, oh, ow)
    row0 = torch.arange(oh, device=x.device, dtype=x.dtype).reshape(oh, 1) * stride[0] - top
    col0 = torch.arange(ow, device=x.device, dtype=x.dtype) * stride[1] - left
    image = x.reshape(n, g, c // g, height * width)
    taps = []
    for tap, (i, j) in enumerate(itertools.product(range(kh), range(kw))):
        at_y = row0 + i * dilation[0] + offset[:, :, tap, 0]  # [n, g, oh, ow]
        at_x = col0 + j * dilation[1] + offset[:, :, tap, 1]
        value = bilinear(image, at_y, at_x, height, width)
        taps.append(value if weights is None else value * weights[:, :, tap].unsqueeze(2))
    # [n, c, taps, oh * ow] per convolution group, against [m, c / group * taps]
    columns = torch.stack(taps, 3).reshape(n, group, (c // group) * kh * kw, oh * ow)
    kernel = w.reshape(group, m // group, -1)
    y = torch.einsum("gmk,ngkp->ngmp", kernel, columns).reshape(n, m, oh, ow)
    return y if b is None else y + along(b, 1, 4)


def bilinear(image: Tensor, at_y: Tensor, at_x: Tensor, height: int, width: int) -> Tensor:
    """image [n, g, c, h * w] read at (y, x) [n, g, oh, ow] -> [n, g, c, oh, ow]; zero outside."""
    y0, x0 = torch.floor(at_y), torch.floor(at_x)
    result = torch.zeros((), dtype=image.dtype, device=image.device)
    for dy, dx in itertools.product((0, 1), (0, 1)):
        y, x = y0 + dy, x0 + dx
        weight = (1 - (at_y - y).abs()) * (1 - (at_x - x).abs())
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        flat = y.clamp(0, height - 1).to(torch.int64) * width + x.clamp(0, width - 1).to(
            torch.int64
        )
        index = flat.flatten(2).unsqueeze(2).expand(-1, -1, image.shape[2], -1)
        value = torch.gather(image, 3, index).reshape(*image.shape[:3], *at_y.shape[2:])
        result = result + value * (weight * inside).unsqueeze(2)
    return result


def causal_conv_with_state(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past_state: Tensor | None = None,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """CausalConvWithState: depthwise over [past, input]; the last k - 1 positions are the new state."""
    left = weight.shape[-1] - 1
    if past_state is None:
        whole = F.pad(input, [left, 0])
    else:
        whole = torch.cat([past_state, input], 2)
    y = F.conv1d(whole, weight, bias, groups=input.shape[1])
    state = whole.narrow(2, whole.shape[2] - left, left)
    return (F.silu(y) if activation in ("silu", "swish") else y), state


def det(x: Tensor) -> Tensor:
    """Det of the last two dims."""
    value: Tensor = torch.linalg.det(x)
    return value


def col2im(
    input: Tensor,
    image_shape: Sequence[int] | Tensor,
    block_shape: Sequence[int] | Tensor,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Col2Im: [n, c * prod(block), l] columns summed into [n, c, *image]; any number of dims."""
    image = [int(n) for n in image_shape]
    block = [int(n) for n in block_shape]
    rank = len(image)
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    pad = list(pads or [0] * (2 * rank))
    padded = [n + pad[i] + pad[rank + i] for i, n in enumerate(image)]
    counts = [
        (p - d * (k - 1) - 1) // s + 1
        for p, d, k, s in zip(padded, dilation, block, stride, strict=True)
    ]
    # The flat position in the padded image that every (tap, column) pair adds to.
    flat = torch.zeros([1] * (2 * rank), dtype=torch.int64, device=input.device)
    for i in range(rank):
        taps = along(torch.arange(block[i], device=input.device) * dilation[i], i, 2 * rank)
        steps = along(torch.arange(counts[i], device=input.device) * stride[i], rank + i, 2 * rank)
        flat = flat * padded[i] + taps + steps
    n = input.shape[0]
    channels = input.shape[1] // math.prod(block)
    values = input.reshape(n, channels, -1)
    index = flat.reshape(-1).expand(n, channels, -1)
    result = values.new_zeros(n, channels, math.prod(padded)).scatter_add(2, index, values)
    result = result.reshape(n, channels, *padded)
    return pad_spatial(result, [-p for p in pad[:rank]], [-p for p in pad[rank:]], 0)


ROWS: dict[str, Row] = {
    "MatMul": row(widened(torch.matmul)),
    "Gemm": row(widened(gemm)),
    "Einsum": row(einsum),
    "Det": row(det),
    "Conv": row(conv),
    "ConvTranspose": row(conv_transpose),
    "DeformConv": row(deform_conv),
    "CausalConvWithState": row(causal_conv_with_state),
    "Col2Im": row(col2im, "image_shape", "block_shape"),
}
