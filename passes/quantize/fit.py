"""What a scheme has to know of a whole weight: the scale of nvfp4's scales, and free codebooks.

A codebook is fitted so that least of w = T[c] s is lost. Divided by the scales of their groups all elements
lie from -1 to 1. T is what k-means makes of them, each counting as the square of its scale, so that the
weight's own squared error is least (Lloyd 1982; as in SqueezeLLM, arXiv 2306.07629, sec. 4.1, with one table
for a weight). One number is 0: zeros stay zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from netlathe.passes.quantize.layout import Layout
from netlathe.passes.quantize.rounding import AT_ONCE
from netlathe.passes.quantize.scheme import Float64, Scheme, scales_for

Array = npt.NDArray[Any]

_BINS = 1 << 14  # of the range from -1 to 1: as wide as a step of 14 bits
_TURNS = 200


def for_weight(scheme: Scheme, array: Array, layout: Layout) -> Scheme:
    """``scheme`` with what it has to know of ``array``.

    With the scale of nvfp4's scales the largest magnitude is the largest code times the largest scale
    (NVIDIA's recipe). The 2^bits numbers of a codebook are float32, ascending.
    """
    if scheme.weights == "nvfp4":
        most = float(np.max(np.abs(array.astype(np.float32)), initial=0.0))
        scale = float(np.float32(most / (_E2M1_MAX * _E4M3_MAX)))
        return dataclasses.replace(scheme, tensor_scale=max(scale, 2.0**-100) if most else 1.0)
    if scheme.has_codebook and not scheme.codebook:
        count, total = histogram(array, layout, scheme)
        table = k_means(count, total, 1 << scheme.format.bits).astype(np.float32)
        return dataclasses.replace(scheme, codebook=tuple(float(value) for value in table))
    return scheme


_E2M1_MAX, _E4M3_MAX = 6.0, 448.0


def histogram(array: Array, layout: Layout, scheme: Scheme) -> tuple[Float64, Float64]:
    """The weight of every bin, and the weighted sum of what fell into it."""
    view = layout.view(array)
    count, total = np.zeros(_BINS), np.zeros(_BINS)
    rows = max(1, AT_ONCE * max(1, view.shape[0]) // max(1, view.size))
    for start in range(0, view.shape[0], rows):
        groups = view[start : start + rows].reshape(-1, layout.size).astype(np.float64)
        scale = scales_for(groups, scheme)[0][:, None]
        units = np.clip(groups / scale, -1, 1)
        weigh = np.broadcast_to(scale**2 * groups.any(1, keepdims=True), units.shape)
        at = np.minimum(((units + 1) * (_BINS / 2)).astype(np.int64), _BINS - 1).reshape(-1)
        count += np.bincount(at, weigh.reshape(-1), _BINS)
        total += np.bincount(at, (weigh * units).reshape(-1), _BINS)
    return count, total


def k_means(count: Float64, total: Float64, size: int) -> Float64:
    """``size`` ascending numbers from -1 to 1, one of them 0, for values in bins.

    They start at quantiles; numbers that nothing is near to stay where they are.
    """
    edges = np.concatenate([[0.0], np.cumsum(count)])
    sums = np.concatenate([[0.0], np.cumsum(total)])
    middles = (np.arange(_BINS) + 0.5) * (2 / _BINS) - 1
    table = np.linspace(-1, 1, size)
    if edges[-1] > 0:
        shares = (np.arange(size) + 0.5) / size * edges[-1]
        table = middles[np.minimum(np.searchsorted(edges[1:], shares), _BINS - 1)]
        spread = np.linspace(table[0], max(table[-1], table[0] + 1e-3), size)
        table = table + 1e-3 * spread  # apart where many quantiles are the same
    zero = int(np.argmin(np.abs(table)))
    table[zero] = 0
    for _ in range(_TURNS):
        table = np.sort(table)
        zero = int(np.argmin(np.abs(table)))
        table[zero] = 0
        cuts = np.searchsorted(middles, (table[1:] + table[:-1]) / 2)
        bounds = np.concatenate([[0], cuts, [_BINS]])
        held, moved = np.diff(edges[bounds]), np.diff(sums[bounds])
        means = np.divide(moved, held, out=table.copy(), where=held > 0)
        means[zero] = 0
        if np.array_equal(means, table):
            break
        table = means
    return _apart(np.sort(np.clip(table, -1, 1)))


def _apart(table: Float64) -> Float64:
    """The same with numbers that are alike moved apart, as codes are told from each other by them."""
    held = table.astype(np.float32)
    zero = int(np.argmin(np.abs(held)))
    held[zero] = 0
    step = np.float32(2.0**-12)
    for at in range(zero + 1, len(held)):
        held[at] = max(held[at], held[at - 1] + step)
    for at in range(zero - 1, -1, -1):
        held[at] = min(held[at], held[at + 1] - step)
    return held.astype(np.float64)
