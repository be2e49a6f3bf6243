"""The factors: by SmoothQuant, by AWQ's search, or by the ranges of neighbouring layers.

All of them are what x, the input of products, is multiplied by: 1 / s of the papers, whose s multiplies the
weights of the products. With m and W taken per channel j of x:

* SmoothQuant (arXiv 2211.10438, eq. 4):  s_j = max|X_j|^a / max|W_j|^(1-a)
* AWQ (arXiv 2306.00978, sec. 3.2):       s_j = mean|X_j|^a, with the a of a grid that minimizes
                                          E |x W - (x / s) Q(s W)|^2 over all products that read x
* cross-layer equalization (arXiv 1906.04721, eq. 11): s_j = sqrt(r1_j r2_j) / r2_j, with r1 the range of
  the layers that make channel j and r2 that of those that read it, until nothing changes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.layers import Layer
from netlathe.analysis.products import uses_of
from netlathe.ir import weights
from netlathe.passes.equalize.candidates import Candidate
from netlathe.passes.quantize import rounding
from netlathe.passes.quantize.fit import for_weight
from netlathe.passes.quantize.layout import Layout, Unfit, layout
from netlathe.passes.quantize.scheme import Scheme

Vector = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

# Factors beyond these would only move numbers towards the ends of their format.
LEAST, MOST = 2.0**-10, 2.0**10
AT_MOST = 1 << 22  # elements of a weight whose error is looked at
GRID = tuple(step / 20 for step in range(1, 20))  # AWQ's code; 0 is no scale at all
# Cross-layer equalization ends when a sweep changes no range by more than this share, or after so many.
SETTLED, SWEEPS = 1e-4, 100
SMALL = 1 << 20  # elements of a weight that is read once only


@dataclass
class Scaled:
    """The weights of a model as they are with the factors found so far."""

    factors: dict[str, Vector] = field(default_factory=dict)
    concerned: dict[ir.Value, list[Candidate]] = field(default_factory=dict)
    held: dict[ir.Value, npt.NDArray[Any]] = field(default_factory=dict)  # those that are small

    @classmethod
    def of(cls, candidates: Iterable[Candidate]) -> Scaled:
        """Nothing scaled yet."""
        made = cls()
        for candidate in candidates:
            for value in candidate.joint.weights:
                made.concerned.setdefault(value, []).append(candidate)
        return made

    def array(self, value: ir.Value) -> Vector:
        """A weight in float64."""
        array = self.held[value] if value in self.held else weights.array(value)
        if value not in self.held and array.size <= SMALL:  # sweeps read them again and again
            self.held[value] = array
        array = array.astype(np.float64)
        for candidate in self.concerned.get(value, ()):
            if (by := self.factors.get(candidate.name)) is not None:
                array = array * candidate.joint.multiplier(value, by)
        return np.asarray(array)

    def multiply(self, candidate: Candidate, by: Vector) -> None:
        """Let ``by`` be part of a candidate's factors."""
        self.factors[candidate.name] = self.factors.get(candidate.name, 1.0) * by

    def ranges(self, candidate: Candidate, values: Iterable[ir.Value]) -> Vector:
        """The largest magnitude of every channel over some weights: ``[count]``."""
        found = np.zeros(candidate.joint.count)
        for value in values:
            index = candidate.joint.index(value)
            np.maximum(found, largest(self.array(value), index, len(found)), out=found)
        return found


def largest(array: Vector, index: Index, count: int) -> Vector:
    """The largest magnitude among the elements of each index; NaN where there is one."""
    others = tuple(at for at in range(array.ndim) if index.shape[at] == 1)
    most = np.abs(array).max(axis=others, keepdims=True)
    found = np.zeros(count)
    at = index.reshape(-1)
    np.maximum.at(found, at[at >= 0], most.reshape(-1)[at >= 0])
    return found


def gathered(
    candidate: Candidate, statistic: Mapping[tuple[str, int], Vector], together: np.ufunc
) -> Vector:
    """A statistic of the channels of all inputs, by factor: ``together`` joins those of one factor."""
    found = np.zeros(candidate.joint.count)
    for x, dim in candidate.inputs:
        at = candidate.joint.channels(x, dim)
        together.at(found, at[at >= 0], statistic[x.name or "", dim][at >= 0])
    return found


def limited(factors: Vector) -> Vector:
    """Factors within bounds; 1 where one is no positive number, as of channels that are zero."""
    usable = np.isfinite(factors) & (factors > 0)
    return np.clip(np.where(usable, factors, 1.0), LEAST, MOST)


# -- SmoothQuant --------------------------------------------------------------------------------------


def smooth(activation: Vector, weight: Vector, alpha: float) -> Vector:
    """1 / s of SmoothQuant from the largest magnitudes of the channels of X and W."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return limited(weight ** (1 - alpha) / activation**alpha)


# -- ranges -------------------------------------------------------------------------------------------


def equal_ranges(candidates: Sequence[Candidate], scaled: Scaled) -> int:
    """Equalize the ranges of makers and readers of all candidates, in turn; the sweeps it took."""
    for sweep in range(1, SWEEPS + 1):
        furthest = 0.0
        for candidate in candidates:
            r1 = scaled.ranges(candidate, candidate.makers)
            r2 = scaled.ranges(candidate, candidate.consumers)
            with np.errstate(divide="ignore", invalid="ignore"):
                by = limited(np.sqrt(r2 / r1))
            before = scaled.factors.get(candidate.name, np.ones(len(by)))
            by = limited(before * by) / before  # what all sweeps make together is bounded
            scaled.multiply(candidate, by)
            furthest = max(furthest, float(np.abs(np.log(by)).max(initial=0.0)))
        if furthest <= SETTLED:
            return sweep
    return SWEEPS


# -- AWQ ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Searched:
    """The best of a grid: its exponent, its factors, and the error before and with them."""

    alpha: float
    factors: Vector
    before: float
    after: float


def search(
    candidate: Candidate,
    scaled: Scaled,
    magnitude: Vector,
    moments: Mapping[str, Vector],
    scheme: Scheme,
    device: str,
) -> Searched:
    """AWQ's search over one candidate; ``moments`` are E x x' of the inputs by name, [channels, channels]."""
    errors = [
        _error_of(candidate, product, scaled, moments[product.x.name or ""], scheme, device)
        for product in candidate.products
    ]

    def total(by: Vector) -> float:
        return sum(error(by) for error in errors)

    best = before = total(np.ones(candidate.joint.count))
    alpha, factors = 0.0, np.ones(candidate.joint.count)
    for step in GRID:
        with np.errstate(divide="ignore"):
            by = limited(magnitude**-step)
        by = limited(by / np.sqrt(by.max() * by.min()))
        if (error := total(by)) < best:
            best, alpha, factors = error, step, by
    return Searched(alpha, factors, before, best)


def _error_of(
    candidate: Candidate,
    product: Layer,
    scaled: Scaled,
    moment: Vector,
    scheme: Scheme,
    device: str,
) -> Callable[[Vector], float]:
    """The error of one product, as a function of the factors of its input."""
    import torch

    array = scaled.array(product.weight)
    (axis,) = sums = _sums(product)
    outputs = array.shape[1 - axis]
    some = max(1, min(outputs, AT_MOST // array.shape[axis]))
    # Errors of outputs add up, and each has scales of its own: evenly spaced ones stand for all.
    array = np.take(array, np.arange(some) * outputs // some, axis=1 - axis)
    own = layout(array.shape, sums, scheme.group, scheme.per_tensor)
    exact = torch.float64 if device == "cpu" else torch.float32
    second = torch.from_numpy(moment).to(device, exact)

    def error(by: Vector) -> float:
        multiplier = candidate.joint.multiplier(product.weight, by)
        rounded = rounded_to(array * multiplier, own, scheme) / multiplier
        rest = np.moveaxis(rounded - array, axis, 0).reshape(len(moment), -1)
        moved = torch.from_numpy(np.ascontiguousarray(rest)).to(device, exact)
        return float(((second @ moved) * moved).sum().item() * outputs / some)

    return error


def rounded_to(array: Vector, own: Layout, scheme: Scheme) -> Vector:
    """What a weight becomes when it is quantized to nearest, in float64."""
    scheme = for_weight(scheme, array, own) if scheme.is_fitted else scheme
    scale, zero = rounding.ranges(array, own, scheme)
    codes = rounding.codes(array, own, scheme, scale, zero)
    return np.asarray(rounding.numbers(codes, own, scheme, scale, zero, np.float64))


def _sums(product: Layer) -> frozenset[int]:
    """The axes of its weight that a product sums over; none if something stands between."""
    held = [use.sums for use in uses_of(product.weight) if use.node is product.node]
    return held[0] if held else frozenset()


def unfit_for_search(candidate: Candidate, scheme: Scheme) -> str:
    """Why AWQ's error cannot be had for a candidate; empty if it can."""
    for product in candidate.products:
        shape, sums = product.weight.shape, _sums(product)
        assert shape is not None
        if product.node.op_type != "MatMul" or len(sums) != 1 or len(shape) != 2:
            what = f"{product.node.op_type} {product.node.outputs[0].name}"
            return f"{what} is no product with one matrix, for which the error is searched"
        try:
            layout(shape.numpy(), sums, scheme.group, scheme.per_tensor)
        except Unfit as why:
            return f"{product.weight.name}: {why}"
    return ""
