"""Activation functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, row


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """LeakyRelu."""
    return F.leaky_relu(x, alpha)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """PRelu: the slope broadcasts to x as numpy does, where torch's is per channel."""
    return torch.where(x < 0, slope * x, x)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Elu."""
    return F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Celu."""
    return F.celu(x, alpha)


def selu(
    x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Tensor:
    """Selu: torch's has no parameters."""
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.minimum(x, torch.zeros_like(x))))


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """HardSigmoid: torch's has the slope 1/6."""
    return (alpha * x + beta).clamp(0, 1)


def hard_swish(x: Tensor) -> Tensor:
    """HardSwish."""
    return F.hardswish(x)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Swish: x * sigmoid(alpha * x)."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """SwiGLU: Swish(a) * b."""
    return swish(a, alpha=alpha) * b


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gelu."""
    return F.gelu(x, approximate=approximate)


def softplus(x: Tensor) -> Tensor:
    """Softplus, without torch's switch to the identity above a threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def softsign(x: Tensor) -> Tensor:
    """Softsign."""
    return F.softsign(x)


def mish(x: Tensor) -> Tensor:
    """Mish."""
    return F.mish(x)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """ThresholdedRelu."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(input: Tensor, *, lambd: float = 0.5, bias: float = 0.0) -> Tensor:
    """Shrink: towards zero by ``bias`` outside [-lambd, lambd], zero inside."""
    zero = torch.zeros_like(input)
    moved = torch.where(input > lambd, input - bias, zero)
    return torch.where(input < -lambd, input + bias, moved).to(input.dtype)


def softmax(input: Tensor, *, axis: int | None = None, opset: int = 13) -> Tensor:
    """Softmax along an axis; before opset 13 over everything from the axis on."""
    return _over_axis(torch.softmax, input, axis, opset)


def log_softmax(input: Tensor, *, axis: int | None = None, opset: int = 13) -> Tensor:
    """LogSoftmax."""
    return _over_axis(torch.log_softmax, input, axis, opset)


def hardmax(input: Tensor, *, axis: int | None = None, opset: int = 13) -> Tensor:
    """Hardmax: one at the first maximum along the axis, zero elsewhere."""
    return _over_axis(_first_maximum, input, axis, opset)


def _first_maximum(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def _over_axis(
    function: Callable[[Tensor, int], Tensor], x: Tensor, axis: int | None, opset: int
) -> Tensor:
    if opset >= 13:
        return function(x, -1 if axis is None else axis)
    first = (1 if axis is None else axis) % max(x.dim(), 1)
    flat = x.reshape(math.prod(x.shape[:first]), -1)
    return function(flat, 1).reshape(x.shape)


ROWS: dict[str, Row] = {
    "Relu": row(torch.relu),
    "Sigmoid": row(torch.sigmoid),
    "LeakyRelu": row(leaky_relu),
    "PRelu": row(prelu),
    "Elu": row(elu),
    "Celu": row(celu),
    "Selu": row(selu),
    "HardSigmoid": row(hard_sigmoid),
    "HardSwish": row(hard_swish),
    "Swish": row(swish),
    "SwiGLU": row(swiglu),
    "Gelu": row(gelu),
    "Softplus": row(softplus),
    "Softsign": row(softsign),
    "Mish": row(mish),
    "ThresholdedRelu": row(thresholded_relu),
    "Shrink": row(shrink),
    "Softmax": row(softmax, facts=("opset",)),
    "LogSoftmax": row(log_softmax, facts=("opset",)),
    "Hardmax": row(hardmax, facts=("opset",)),
}
