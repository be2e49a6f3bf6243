"""Reductions, and running sums and products along an axis.

The result has the input's type: torch would widen the sums and products of narrow integers to int64.
Half-precision sums are accumulated in float32 by torch itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import host
from .row import Ints, Row, axes_of, ints, number, row
from .storage import widened

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _reducing(reduction: Reduction, name: str) -> Callable[..., Tensor]:
    """The ONNX reduction made of ``reduction(data, axes, keepdims)``.

    Axes are an attribute in older opsets and an input in newer ones. No axes means all of them, or
    none with ``noop_with_empty_axes`` (whatever else the op does per element is done still).
    """

    def compute(
        data: Tensor,
        axes: Ints | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        listed = ints(axes)
        if not listed and noop_with_empty_axes:
            # A reduction over one element per group, on an axis made for it.
            return reduction(data.unsqueeze(-1), [data.dim()], False).to(data.dtype)
        over = axes_of(listed or None, data.dim())
        if not over:  # a scalar
            return reduction(data.reshape(1), [0], False).to(data.dtype)
        return reduction(data, over, bool(keepdims)).to(data.dtype)

    compute.__name__ = compute.__qualname__ = name
    compute.__doc__ = f"Reduce: {name}."
    return compute


def _sum(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keepdims)


def _mean(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keepdims)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(torch.sum(x, axes, keepdim=keepdims), count, rounding_mode="trunc")


def _prod(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):  # torch multiplies along one axis at a time
        x = torch.prod(x, axis, keepdim=keepdims)
    return x


def _extreme(sign: int, x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    """Maximum (sign 1) or minimum; of no elements the neutral one, which torch refuses."""
    if any(isinstance(x.shape[axis], int) and x.shape[axis] == 0 for axis in axes):
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        if not keepdims:
            shape = [n for i, n in enumerate(x.shape) if i not in axes]
        neutral: float | bool
        if x.dtype == torch.bool:
            neutral = sign < 0
        elif x.is_floating_point():
            neutral = -sign * float("inf")
        else:
            info = torch.iinfo(x.dtype)
            neutral = info.min if sign > 0 else info.max
        return torch.full(shape, neutral, dtype=x.dtype, device=x.device)
    return (torch.amax if sign > 0 else torch.amin)(x, axes, keepdim=keepdims)


def _l2(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    wide = x if x.is_floating_point() else x.to(torch.float64)
    length: Tensor = torch.linalg.vector_norm(wide, 2, axes, keepdim=keepdims)
    return length


def _log_sum_exp(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    wide = x if x.is_floating_point() else x.to(torch.float64)
    return torch.logsumexp(wide, axes, keepdim=keepdims)


def _log_sum(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    return torch.log(torch.sum(x, axes, keepdim=keepdims))


def _arg(
    select: Callable[..., Tensor], data: Tensor, axis: int, keepdims: int, last: int
) -> Tensor:
    axis %= max(data.dim(), 1)
    if not last:
        return select(data, axis, keepdim=bool(keepdims))
    found = select(data.flip(axis), axis, keepdim=bool(keepdims))
    return found.neg() + (data.shape[axis] - 1)


def argmax(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMax: the first maximum, or the last."""
    return _arg(torch.argmax, data, axis, keepdims, select_last_index)


def argmin(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """ArgMin: the first minimum, or the last."""
    return _arg(torch.argmin, data, axis, keepdims, select_last_index)


def _running(
    function: Callable[..., Tensor], x: Tensor, axis: int, exclusive: int, reverse: int, start: int
) -> Tensor:
    axis %= x.dim()
    if reverse:
        x = x.flip(axis)
    if exclusive:
        first = torch.full_like(x.narrow(axis, 0, 1), start)
        x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    result = function(x, axis, dtype=x.dtype)
    return result.flip(axis) if reverse else result


def cum_sum(x: Tensor, axis: Ints, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """CumSum."""
    return _running(torch.cumsum, x, number(axis), exclusive, reverse, 0)


def cum_prod(x: Tensor, axis: Ints, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """CumProd."""
    return _running(torch.cumprod, x, number(axis), exclusive, reverse, 1)


def _reduction(
    reduction: Reduction, name: str, on_host: Callable[..., object] | None = None
) -> Row:
    return row(widened(_reducing(reduction, name)), "axes", on_host=on_host)


ROWS: dict[str, Row] = {
    "ReduceSum": _reduction(_sum, "reduce_sum", host.reduce_sum),
    "ReduceMean": _reduction(_mean, "reduce_mean"),
    "ReduceProd": _reduction(_prod, "reduce_prod", host.reduce_prod),
    "ReduceMax": _reduction(functools.partial(_extreme, 1), "reduce_max", host.reduce_max),
    "ReduceMin": _reduction(functools.partial(_extreme, -1), "reduce_min", host.reduce_min),
    "ReduceL1": _reduction(lambda x, a, k: torch.sum(torch.abs(x), a, keepdim=k), "reduce_l1"),
    "ReduceL2": _reduction(_l2, "reduce_l2"),
    "ReduceSumSquare": _reduction(
        lambda x, a, k: torch.sum(x * x, a, keepdim=k), "reduce_sum_square"
    ),
    "ReduceLogSum": _reduction(_log_sum, "reduce_log_sum"),
    "ReduceLogSumExp": _reduction(_log_sum_exp, "reduce_log_sum_exp"),
    "ArgMax": row(argmax),
    "ArgMin": row(argmin),
    "CumSum": row(cum_sum, "axis"),
    "CumProd": row(cum_prod, "axis"),
}
