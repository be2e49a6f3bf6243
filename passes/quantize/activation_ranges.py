"""Ranges of activations from calibration data: the extremes, a percentile, or the least error.

A histogram has bins of width 2^e, e the smallest for which its 2^14 bins, half of them below zero, hold all
that was seen. A value that does not fit doubles the width, and two bins become one; so the result is
the same whatever the order of the data, and takes 128 KiB however much there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from netlathe.execute.statistics import Accumulator, Statistic
from netlathe.passes.quantize.number import Number

Float64 = npt.NDArray[np.float64]
How = Literal["minmax", "percentile", "mse"]

_HALF = 1 << 13  # bins on either side of zero
_SMALLEST = 2.0**-120
_STEPS = tuple(1 - step / 100 for step in range(91))  # a range may shrink to a tenth


@dataclass(frozen=True)
class Histogram(Statistic):
    """How often a value's elements fall into each bin: [low, high, width, counts ...]."""

    value: str
    axis: int = -1

    @property
    def values(self) -> tuple[str, ...]:
        """The one value."""
        return (self.value,)

    @property
    def channel_axis(self) -> int:
        """As declared."""
        return self.axis

    @property
    def per_channel(self) -> bool:
        """All channels are counted together."""
        return False

    def start(self) -> Accumulator:
        """Nothing seen yet."""
        return _Counts()


class _Counts(Accumulator):
    def __init__(self) -> None:
        self._width = _SMALLEST
        self._counts = torch.zeros(2 * _HALF, dtype=torch.float64)
        self._low, self._high = float("inf"), float("-inf")

    def add(self, *rows: torch.Tensor) -> None:
        (x,) = rows
        low, high = float(x.min()), float(x.max())
        self._low, self._high = min(self._low, low), max(self._high, high)
        most = max(abs(low), abs(high))
        while most >= _HALF * self._width:
            self._width *= 2
            inner = self._counts.reshape(-1, 2).sum(1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[_HALF // 2 : _HALF // 2 + _HALF] = inner
        bins = torch.floor(x.reshape(-1) / self._width).to(torch.int64) + _HALF
        self._counts += torch.bincount(bins, minlength=2 * _HALF).to("cpu", torch.float64)
        self.count += x.shape[0]

    def result(self) -> torch.Tensor:
        head = torch.tensor([self._low, self._high, self._width], dtype=torch.float64)
        return torch.cat((head, self._counts))


def range_of(
    histogram: Float64, how: How, number: Number, percentile: float
) -> tuple[float, float]:
    """The range (low, high) that a result of :class:`Histogram` gives, for numbers of one type."""
    low, high, width = (float(x) for x in histogram[:3])
    counts = histogram[3:]
    if how == "minmax":
        return low, high
    edges = (np.arange(len(counts) + 1) - _HALF) * width
    if how == "percentile":
        share = np.cumsum(counts) / counts.sum()
        # A bin counts whole: its outer edge, or the extreme where that is nearer.
        first = int(np.searchsorted(share, 1 - percentile / 100, side="right"))
        last = int(np.searchsorted(share, percentile / 100, side="left"))
        return max(low, float(edges[first])), min(
            high, float(edges[min(last, len(counts) - 1) + 1])
        )
    seen = counts > 0
    x, weight = ((edges[1:] + edges[:-1]) / 2)[seen], counts[seen]
    errors = []
    for shrink in _STEPS:
        scale, zero = number.grid(low * shrink, high * shrink)
        error = number.rounded(x, scale, zero) - x
        errors.append(float(weight @ np.square(error)))
    best = _STEPS[int(np.argmin(errors))]
    return low * best, high * best
