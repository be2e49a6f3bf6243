"""Normalization layers. Statistics are computed in float32 at least, as ``stash_type`` asks."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, along, row
from .storage import TORCH_DTYPE


def _stashed(x: Tensor, stash_type: int) -> Tensor:
    """``x`` in the type its statistics are computed in; float64 is never narrowed to it."""
    if x.dtype == torch.float64:
        return x
    return x.to(TORCH_DTYPE[ir.DataType(stash_type)])


def layer_normalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """LayerNormalization over the dims from ``axis`` on; also the mean and 1 / deviation."""
    dims = list(range(axis % x.dim(), x.dim()))
    width = x.shape[dims[0] :]
    if output_count == 1 and scale.shape == width and (b is None or b.shape == width):
        return (F.layer_norm(x, width, scale, b, epsilon),)  # float32 inside for the half types
    wide = _stashed(x, stash_type)
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt(centred.square().mean(dims, keepdim=True) + epsilon)
    y = (centred * inverse).to(x.dtype) * scale
    return (y if b is None else y + b), mean, inverse


def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """RMSNormalization over the dims from ``axis`` on."""
    dims = list(range(axis % x.dim(), x.dim()))
    wide = _stashed(x, stash_type)
    inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return ((wide * inverse).to(x.dtype) * scale).to(scale.dtype)


def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    epsilon: float = 1e-5,
    num_groups: int,
    stash_type: int = 1,
) -> Tensor:
    """GroupNormalization: scale and bias per channel, per group before opset 21."""
    if scale.shape[0] == num_groups and x.shape[1] != num_groups:
        scale = scale.repeat_interleave(x.shape[1] // num_groups)
        bias = bias.repeat_interleave(x.shape[1] // num_groups)
    wide = F.group_norm(_stashed(x, stash_type), num_groups, eps=epsilon).to(x.dtype)
    return wide * along(scale, 1, x.dim()) + along(bias, 1, x.dim())


def instance_normalization(
    input: Tensor, scale: Tensor, b: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    """InstanceNormalization."""
    variance, mean = torch.var_mean(input, list(range(2, input.dim())), correction=0, keepdim=True)
    normal = (input - mean) * torch.rsqrt(variance + epsilon)
    return normal * along(scale, 1, input.dim()) + along(b, 1, input.dim())


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor,
    input_mean: Tensor,
    input_var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
) -> tuple[Tensor, ...]:
    """BatchNormalization; in training mode also the moved averages (of the biased variance)."""
    if not training_mode:
        return (F.batch_norm(x, input_mean, input_var, scale, b, eps=epsilon),)
    others = [i for i in range(x.dim()) if i != 1]
    variance, mean = torch.var_mean(x, others, correction=0)
    y = F.batch_norm(x, mean, variance, scale, b, eps=epsilon)
    running_mean = input_mean * momentum + mean * (1 - momentum)
    return y, running_mean, input_var * momentum + variance * (1 - momentum)


def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """MeanVarianceNormalization; 1e-9 is added to the deviation, as the op's function body does."""
    variance, mean = torch.var_mean(x, list(axes), correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)


def lp_normalization(input: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """LpNormalization; what has no length stays zero."""
    length = torch.linalg.vector_norm(input, p, axis, keepdim=True)
    return torch.where(length == 0, torch.zeros_like(input), input / length)


ROWS: dict[str, Row] = {
    "LayerNormalization": row(layer_normalization, facts=("output_count",)),
    "RMSNormalization": row(rms_normalization),
    "GroupNormalization": row(group_normalization),
    "InstanceNormalization": row(instance_normalization),
    "BatchNormalization": row(batch_normalization),
    "MeanVarianceNormalization": row(mean_variance_normalization),
    "LpNormalization": row(lp_normalization),
}
