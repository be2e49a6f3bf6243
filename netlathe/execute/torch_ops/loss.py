"""Losses, dropout and random tensors.

Random ops draw from a generator of their own, seeded by their ``seed`` attribute (0 without one): the
same call gives the same numbers, and torch's global generator is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, number, row
from .storage import TORCH_DTYPE


def negative_log_likelihood(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """NegativeLogLikelihoodLoss: input [n, c, ...], target [n, ...]."""
    target = target.to(torch.int64)
    ignored = None if ignore_index is None else target == ignore_index
    safe = target if ignored is None else target.masked_fill(ignored, 0)
    loss = -torch.gather(input, 1, safe.unsqueeze(1)).squeeze(1)
    weights = torch.ones_like(loss) if weight is None else weight[safe]
    if ignored is not None:
        weights = weights.masked_fill(ignored, 0)
    loss = loss * weights
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / weights.sum()


def softmax_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """SoftmaxCrossEntropyLoss: the loss and the log-probabilities."""
    logs = F.log_softmax(scores, 1)
    loss = negative_log_likelihood(
        logs, labels, weights, ignore_index=ignore_index, reduction=reduction
    )
    return loss, logs


def _generator(seed: float | None, device: torch.device) -> torch.Generator:
    # The attribute is a float: its bits are the seed, so 1.5 and 1.25 differ.
    generator = torch.Generator(device)
    generator.manual_seed(0 if seed is None else hash(float(seed)) & 0x7FFFFFFF)
    return generator


def dropout(
    data: Tensor,
    ratio: Tensor | float | None = None,
    training_mode: Tensor | None = None,
    *,
    seed: int | None = None,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Dropout: nothing is dropped outside of training mode; also the mask of what is kept."""
    share = 0.5 if ratio is None else float(number(ratio))
    if training_mode is None or not bool(number(training_mode)) or share == 0:
        mask = torch.ones_like(data, dtype=torch.bool)
        return (data, mask) if output_count > 1 else (data,)
    generator = _generator(seed, data.device)
    mask = torch.rand(data.shape, generator=generator, device=data.device) >= share
    return (data * mask / (1 - share)).to(data.dtype), mask


def bernoulli(input: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """Bernoulli."""
    target = input.dtype if dtype is None else TORCH_DTYPE[ir.DataType(dtype)]
    return torch.bernoulli(input, generator=_generator(seed, input.device)).to(target)


def random_normal(
    *,
    dtype: int = 1,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
    shape: Sequence[int],
) -> Tensor:
    """RandomNormal, on the CPU."""
    drawn = torch.randn(list(shape), generator=_generator(seed, torch.device("cpu")))
    return (drawn * scale + mean).to(TORCH_DTYPE[ir.DataType(dtype)])


def random_normal_like(
    input: Tensor,
    *,
    dtype: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> Tensor:
    """RandomNormalLike."""
    target = input.dtype if dtype is None else TORCH_DTYPE[ir.DataType(dtype)]
    generator = _generator(seed, input.device)
    drawn = torch.randn(input.shape, generator=generator, device=input.device)
    return (drawn * scale + mean).to(target)


def random_uniform(
    *,
    dtype: int = 1,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
    shape: Sequence[int],
) -> Tensor:
    """RandomUniform, on the CPU."""
    drawn = torch.rand(list(shape), generator=_generator(seed, torch.device("cpu")))
    return (drawn * (high - low) + low).to(TORCH_DTYPE[ir.DataType(dtype)])


def random_uniform_like(
    input: Tensor,
    *,
    dtype: int | None = None,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
) -> Tensor:
    """RandomUniformLike."""
    target = input.dtype if dtype is None else TORCH_DTYPE[ir.DataType(dtype)]
    generator = _generator(seed, input.device)
    drawn = torch.rand(input.shape, generator=generator, device=input.device)
    return (drawn * (high - low) + low).to(target)


def multinomial(
    input: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None
) -> Tensor:
    """Multinomial: class indices drawn with unnormalized log-probabilities [b, c]."""
    probabilities = torch.softmax(input, 1)
    drawn = torch.multinomial(
        probabilities, sample_size, replacement=True, generator=_generator(seed, input.device)
    )
    return drawn.to(TORCH_DTYPE[ir.DataType(dtype)])


ROWS: dict[str, Row] = {
    "NegativeLogLikelihoodLoss": row(negative_log_likelihood),
    "SoftmaxCrossEntropyLoss": row(softmax_cross_entropy),
    "Dropout": row(dropout, "training_mode", facts=("output_count",)),
    "Bernoulli": row(bernoulli),
    "RandomNormal": row(random_normal),
    "RandomNormalLike": row(random_normal_like),
    "RandomUniform": row(random_uniform),
    "RandomUniformLike": row(random_uniform_like),
    "Multinomial": row(multinomial),
}
