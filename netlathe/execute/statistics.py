"""Statistics over calibration data: what a pass declares, and what the sweep hands back.

    mean_square, cosine = ctx.collect(model, [MeanSquare("add_7"), CosineSimilarity("x", "y")], ...)

A statistic names values of the main graph. Its rows ("tokens") are all positions of the leading axes,
its channels those of one axis (the last; an image's feature map has its channels at axis 1). Sums are
kept in float64, added in the order of the samples, so that a result is the same for the same data.

Positions that are padding do not count; :mod:`netlathe.execute.calibration` says which these are.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Float64 = npt.NDArray[np.float64]
# Rows handled at once: bounds the float64 copy of an activation to this many elements.
_AT_ONCE = 1 << 22
_DEVICE_AT_ONCE = 1 << 27  # elsewhere than on the host


@dataclass(frozen=True)
class Statistic(abc.ABC):
    """What is wanted; two equal ones are one. Subclasses say which values they read."""

    @property
    @abc.abstractmethod
    def values(self) -> tuple[str, ...]:
        """Names of the values that are read together."""

    @property
    def channel_axis(self) -> int:
        """The axis of the channels; the other ones are rows."""
        return -1

    @property
    def per_channel(self) -> bool:
        """Whether the result has a place for every channel, whose number must then be fixed."""
        return True

    @abc.abstractmethod
    def start(self) -> Accumulator:
        """An empty sum."""


@dataclass(frozen=True)
class StatisticResult:
    """``array`` in float64 (a scalar has no dims) over ``count`` rows."""

    statistic: Statistic
    array: Float64
    count: int

    @property
    def scalar(self) -> float:
        """The result of a statistic that is one number."""
        return float(self.array)


class Accumulator(abc.ABC):
    """A running sum over rows. ``add`` is given ``[rows, channels]`` in float64, one per value."""

    count = 0

    @abc.abstractmethod
    def add(self, *rows: torch.Tensor) -> None:
        """Take in some rows."""

    @abc.abstractmethod
    def result(self) -> torch.Tensor:
        """What the rows so far give; there was at least one."""

    def forget(self) -> None:
        """Give the sum back: nothing is asked of it any more."""
        vars(self).clear()


def chunks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``rows`` in pieces small enough for a float64 copy each."""
    most = _AT_ONCE if rows.device.type == "cpu" else _DEVICE_AT_ONCE
    return torch.split(rows, max(1, most // max(1, rows.shape[1])))


# -- one value ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OfOne(Statistic):
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


@dataclass(frozen=True)
class Mean(_OfOne):
    """Mean per channel: ``[channels]``."""

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Sum(lambda x: x)


@dataclass(frozen=True)
class MeanSquare(_OfOne):
    """Mean of the squares per channel: ``[channels]``."""

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Sum(torch.square)


@dataclass(frozen=True)
class MeanAbs(_OfOne):
    """Mean magnitude per channel: ``[channels]``."""

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Sum(torch.abs)


@dataclass(frozen=True)
class AbsMax(_OfOne):
    """Largest magnitude per channel: ``[channels]``."""

    def start(self) -> Accumulator:
        """No rows yet."""
        return _Extreme()


@dataclass(frozen=True)
class MinMax(_OfOne):
    """Smallest and largest element per channel: ``[2, channels]``."""

    def start(self) -> Accumulator:
        """No rows yet."""
        return _Range()


@dataclass(frozen=True)
class Covariance(_OfOne):
    """Second moment about zero, sum of x x^T over rows divided by their count: ``[channels, channels]``.

    Not centred: the covariance proper is this less ``mean mean^T``.
    """

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Outer()


@dataclass(frozen=True)
class LogMeanSquare(_OfOne):
    """Mean over rows of the logarithm of a row's mean square: a scalar. A row of zeros counts as 2^-1022."""

    @property
    def per_channel(self) -> bool:
        """One number for all channels."""
        return False

    def start(self) -> Accumulator:
        """An empty sum."""
        return _RowMean(_log_mean_square)


@dataclass(frozen=True)
class BlockCovariance(_OfOne):
    """:class:`Covariance` of each of ``blocks`` runs of channels by itself: ``[blocks, n, n]``."""

    blocks: int = 1

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Blocks(self.blocks)


@dataclass(frozen=True)
class LabelledCovariance(_OfOne):
    """:class:`Covariance` over the rows with each label: ``[labels, channels - 1, channels - 1]``.

    The last channel is the label, from 0 on; one that no row has gets zeros.
    """

    labels: int = 1

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Labelled(self.labels)


# -- two values -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OfTwo(Statistic):
    """One number for two values of one shape."""

    a: str
    b: str
    axis: int = -1

    @property
    def values(self) -> tuple[str, ...]:
        """Both values."""
        return (self.a, self.b)

    @property
    def channel_axis(self) -> int:
        """As declared."""
        return self.axis

    @property
    def per_channel(self) -> bool:
        """One number for all channels."""
        return False


@dataclass(frozen=True)
class CosineSimilarity(_OfTwo):
    """Mean over rows of the cosine between two values of one shape: a scalar.

    Of two rows of zeros it is 1, of one 0: nothing was changed, or nothing is left.
    """

    def start(self) -> Accumulator:
        """An empty sum."""
        return _RowMean(_cosine)


@dataclass(frozen=True)
class AngularDistance(_OfTwo):
    """Mean over rows of the angle between two values of one shape, as a share of pi: a scalar."""

    def start(self) -> Accumulator:
        """An empty sum."""
        return _RowMean(lambda a, b: torch.arccos(_cosine(a, b).clamp(-1.0, 1.0)) / math.pi)


@dataclass(frozen=True)
class Divergence(_OfTwo):
    """Mean over rows of KL(p || q) in nats, the channels being classes: a scalar.

    ``a`` stands for p, ``b`` for q: as logits, or as probabilities.
    """

    logits: bool = True

    def start(self) -> Accumulator:
        """An empty sum."""
        return _RowMean(_divergence if self.logits else _divergence_of_probabilities)


@dataclass(frozen=True)
class RelativeSquaredError(_OfTwo):
    """Sum over all rows of |a - b|^2, divided by that of |a|^2: a scalar, 0 of two values of zeros."""

    def start(self) -> Accumulator:
        """An empty sum."""
        return _SquaredError()


# -- accumulators ---------------------------------------------------------------------------------


class _Sum(Accumulator):
    def __init__(self, of: Any) -> None:
        self._of = of
        self._sum: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        (x,) = rows
        total = self._of(x).sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self.count += x.shape[0]

    def result(self) -> torch.Tensor:
        assert self._sum is not None
        return self._sum / self.count


class _Outer(Accumulator):
    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        (x,) = rows
        if self._sum is None:
            self._sum = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        self._sum.addmm_(x.T, x)
        self.count += x.shape[0]

    def result(self) -> torch.Tensor:
        assert self._sum is not None
        return (self._sum + self._sum.T) / (2 * self.count)  # symmetric to the last bit


class _Blocks(Accumulator):
    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._sum: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        (x,) = rows
        cut = x.reshape(len(x), self._blocks, -1).transpose(0, 1)  # [blocks, rows, n]
        found = torch.bmm(cut.transpose(1, 2), cut)
        self._sum = found if self._sum is None else self._sum.add_(found)
        self.count += x.shape[0]

    def result(self) -> torch.Tensor:
        assert self._sum is not None
        return (self._sum + self._sum.transpose(1, 2)) / (2 * self.count)


class _Labelled(Accumulator):
    def __init__(self, labels: int) -> None:
        self._sums = [_Outer() for _ in range(labels)]
        self._width = 0

    def add(self, *rows: torch.Tensor) -> None:
        (x,) = rows
        self._width = x.shape[1] - 1
        for label, sums in enumerate(self._sums):
            chosen = x[x[:, -1] == label, :-1]
            if len(chosen):
                sums.add(chosen)
        self.count += x.shape[0]

    def result(self) -> torch.Tensor:
        found = [sums.result() if sums.count else None for sums in self._sums]
        device = next((f.device for f in found if f is not None), None)
        none = torch.zeros(self._width, self._width, dtype=torch.float64, device=device)
        return torch.stack([none if f is None else f for f in found])


class _Extreme(Accumulator):
    def __init__(self) -> None:
        self._most: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        (x,) = rows
        most = x.abs().amax(0)
        self._most = most if self._most is None else torch.maximum(self._most, most)
        self.count += x.shape[0]

    def result(self) -> torch.Tensor:
        assert self._most is not None
        return self._most


class _Range(Accumulator):
    def __init__(self) -> None:
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        (x,) = rows
        low, high = x.amin(0), x.amax(0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self.count += x.shape[0]

    def result(self) -> torch.Tensor:
        assert self._low is not None and self._high is not None
        return torch.stack((self._low, self._high))


class _RowMean(Accumulator):
    """The mean of what ``of`` gives for each row of its values."""

    def __init__(self, of: Callable[..., torch.Tensor]) -> None:
        self._of = of
        self._sum: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        total = self._of(*rows).sum()
        self._sum = total if self._sum is None else self._sum + total
        self.count += rows[0].shape[0]

    def result(self) -> torch.Tensor:
        assert self._sum is not None
        return self._sum / self.count


def _log_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(1).clamp(min=torch.finfo(x.dtype).tiny).log()


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dot, norms = (a * b).sum(1), a.norm(dim=1) * b.norm(dim=1)
    both_zero = (a.norm(dim=1) == 0) & (b.norm(dim=1) == 0)
    cosine = torch.where(norms > 0, dot / norms.clamp(min=torch.finfo(a.dtype).tiny), 0.0)
    return torch.where(both_zero, 1.0, cosine)


def _divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p, q = torch.log_softmax(a, 1), torch.log_softmax(b, 1)
    return (p.exp() * (p - q)).sum(1)


def _divergence_of_probabilities(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # A class that q rules out and p does not would be infinitely surprising: held at 2^-1022.
    tiny = torch.finfo(a.dtype).tiny
    terms = a * (a.clamp(min=tiny).log() - b.clamp(min=tiny).log())
    return torch.where(a > 0, terms, 0.0).sum(1)


class _SquaredError(Accumulator):
    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        a, b = rows
        sums = torch.stack(((a - b).square().sum(), a.square().sum()))
        self._sums = sums if self._sums is None else self._sums + sums
        self.count += a.shape[0]

    def result(self) -> torch.Tensor:
        assert self._sums is not None
        error, square = self._sums
        return torch.where(error == 0, 0.0, error / square)
