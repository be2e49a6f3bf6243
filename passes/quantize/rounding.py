"""Scales and codes of a weight, group by group: round to nearest, over a range that may be clipped.

* ``none``: the range is that of the data.
* ``percentile``: the range is that of the inner share of a group's elements.
* ``mse``: of ranges that shrink in steps of 1 %, the one with the least squared error, then by turns the
  best scale for the codes (a least-squares fit) and the best codes for the scale. A symmetric
  scale is tried with both signs where it may have them; fractional zero points are fitted with the scale.
* ``hqq``: fractional zero points move so that the p-norm of the error shrinks, p = 0.7 (HQQ; see
  :func:`half_quadratic`); the range of what has none is that of the data.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from netlathe.passes.quantize.layout import Layout
from netlathe.passes.quantize.scheme import (
    Float64,
    Scheme,
    decode,
    encode,
    round_scales,
    round_zeros,
    scales_for,
)

Array = npt.NDArray[Any]
Clip = Literal["none", "percentile", "mse", "hqq"]

# Elements of groups handled at a time: long enough for threads not to wait for the interpreter, and short
# enough where they are searched, for float64 copies to stay in the cache.
AT_ONCE = 1 << 19
SEARCHED_AT_ONCE = 1 << 16
_MOST_THREADS = 8
STEPS = tuple(1 - step / 100 for step in range(61))  # shrunk to 40 % of the range at most
TURNS = 4


def ranges(
    array: Array,
    layout: Layout,
    scheme: Scheme,
    clip: Clip = "none",
    percentile: float = 99.9,
    importance: Float64 | None = None,
) -> tuple[Float64, Float64]:
    """Scale and zero point of every group of a weight.

    ``importance`` weighs the squared error of every column (``mse``): the second moment of what it is
    multiplied with, so that the error of the product counts.
    """
    view = layout.view(array)
    scale, zero = np.empty(layout.groups), np.empty(layout.groups)

    def search(part: slice, own: slice) -> None:
        groups = view[part].reshape(-1, layout.size).astype(np.float64)
        weight = None if importance is None else _of_groups(importance, own, layout)
        match clip:
            case "none":
                found = scales_for(groups, scheme)
            case "hqq":
                find = half_quadratic if scheme.fractional else scales_for
                found = find(groups, scheme)
            case "percentile":
                found = scales_for(_clipped(groups, percentile), scheme)
            case "mse":
                found = least_error(groups, scheme, weight)
        scale[own], zero[own] = found

    _in_parts(view, layout, search, SEARCHED_AT_ONCE if clip in ("mse", "hqq") else AT_ONCE)
    return scale, zero


def codes(array: Array, layout: Layout, scheme: Scheme, scale: Float64, zero: Float64) -> Array:
    """The nearest codes, in the layout's stored dims; ``scale`` and ``zero`` are those of its groups."""
    view = layout.view(array)
    made = np.empty(layout.stored, scheme.code_type)
    into = layout.view(made)

    def round_(part: slice, own: slice) -> None:
        groups = view[part].reshape(-1, layout.size).astype(np.float64)
        found = encode(groups, scale[own, None], zero[own, None], scheme)
        into[part] = found.reshape(view[part].shape)

    _in_parts(view, layout, round_, AT_ONCE)
    return made


def numbers(
    made: Array, layout: Layout, scheme: Scheme, scale: Float64, zero: Float64, dtype: Any
) -> Array:
    """What codes in stored dims stand for: the weight as it is read, in its own dims."""
    view = layout.view(made)
    result = np.empty(layout.stored, dtype)
    into = layout.view(result)

    def read(part: slice, own: slice) -> None:
        groups = view[part].reshape(-1, layout.size)
        found = decode(groups, scale[own, None], zero[own, None], scheme)
        into[part] = found.reshape(view[part].shape)

    _in_parts(view, layout, read, AT_ONCE)
    return result.reshape(layout.dims)


def _in_parts(
    view: Array, layout: Layout, work: Callable[[slice, slice], None], at_once: int
) -> None:
    """Do ``work`` on slices of a layout's view that fit the cache, each with the groups that are in it.

    Several at a time: parts do not overlap, and numpy leaves the interpreter while it computes.
    """
    first = max(1, view.shape[0])
    step, per = max(1, at_once * first // max(1, view.size)), layout.groups // first
    starts = range(0, first, step)
    threads = min(len(starts), num_threads(), _MOST_THREADS)

    def one(start: int) -> None:
        stop = min(start + step, first)
        work(slice(start, stop), slice(start * per, stop * per))

    if threads < 2:
        for start in starts:
            one(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, starts):
            pass


def num_threads() -> int:
    """What OMP_NUM_THREADS says, as for other libraries; else the number of cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else os.cpu_count() or 1


def _of_groups(importance: Float64, part: slice, layout: Layout) -> Float64:
    """The importance of the elements of some groups: [groups, size]."""
    by_group = importance.reshape(-1, layout.size)  # groups of one row of the matrix
    return np.asarray(by_group[np.arange(part.start, part.stop) % len(by_group)])


def _clipped(groups: Float64, percentile: float) -> Float64:
    low, high = np.percentile(groups, [100 - percentile, percentile], axis=1, keepdims=True)
    return np.asarray(np.clip(groups, low, high))


def least_error(
    groups: Float64, scheme: Scheme, weight: Float64 | None = None
) -> tuple[Float64, Float64]:
    """The scales and zero points with the least (weighted) squared error that the search finds."""
    best_scale, best_zero = scales_for(groups, scheme)
    best = _error(groups, best_scale, best_zero, scheme, weight)

    def keep(scale: Float64, zero: Float64) -> None:
        error = _error(groups, scale, zero, scheme, weight)
        better = error < best
        best[better] = error[better]
        best_scale[better], best_zero[better] = scale[better], zero[better]

    for shrink in STEPS[1:]:
        scale, zero = scales_for(groups, scheme, shrink)
        keep(scale, zero)
        if signed(scheme):
            keep(-scale, zero)
    for _ in range(3 * TURNS if scheme.fractional else TURNS):  # two numbers take longer to settle
        keep(*_fitted(groups, best_scale, best_zero, scheme, weight))
    return best_scale, best_zero


def signed(scheme: Scheme) -> bool:
    """Whether it makes a difference which sign a scale has."""
    one_more = scheme.format.kind == "integer" and scheme.lowest != -scheme.highest
    return one_more and scheme.symmetric and not scheme.operand


def _fitted(
    groups: Float64, scale: Float64, zero: Float64, scheme: Scheme, weight: Float64 | None
) -> tuple[Float64, Float64]:
    """What fits the codes best: the least-squares solution of c s = w, or of (c - z) s = w."""
    codes_ = encode(groups, scale[:, None], zero[:, None], scheme)
    w = np.ones_like(groups) if weight is None else weight
    if scheme.fractional:  # a line through (c, w), whose slope is s and which is 0 at z
        c, whole = codes_.astype(np.float64), w.sum(1)
        total = np.maximum(whole, np.finfo(np.float64).tiny)
        mean, value = (w * c).sum(1) / total, (w * groups).sum(1) / total
        apart = c - mean[:, None]
        spread = (w * apart * apart).sum(1)
        slope = np.divide((w * apart * groups).sum(1), spread, out=scale.copy(), where=spread > 0)
        scale = round_scales(slope, scheme)
        return scale, round_zeros(np.clip(mean - value / scale, *_ZEROS), scheme)
    units = decode(codes_, _ONE, zero[:, None], scheme)
    norm = (w * units * units).sum(1)
    fitted = np.divide((w * units * groups).sum(1), norm, out=scale.copy(), where=norm > 0)
    return round_scales(fitted, scheme), zero


_ZEROS = (-512.0, 512.0)  # where float16 still tells halves of a step apart
_ONE = np.ones((1, 1))


def _error(
    groups: Float64, scale: Float64, zero: Float64, scheme: Scheme, weight: Float64 | None
) -> Float64:
    """The (weighted) squared error of every group; of integers before float32 rounds them."""
    scale, zero = scale[:, None], zero[:, None]
    if scheme.format.kind == "integer":
        rest = groups / scale
        if scheme.fractional:
            rest += zero
        np.rint(rest, out=rest)
        if scheme.fractional:
            rest -= zero
        np.clip(rest, scheme.lowest - zero, scheme.highest - zero, out=rest)
        rest *= scale
        rest -= groups
    else:
        rest = decode(encode(groups, scale, zero, scheme), scale, zero, scheme) - groups
    np.square(rest, out=rest)
    return np.asarray((rest if weight is None else rest * weight).sum(1))


def half_quadratic(groups: Float64, scheme: Scheme) -> tuple[Float64, Float64]:
    """Fractional zero points that lessen sum |w - w'|^p of every group, scales being those of its range.

    Half-quadratic splitting of Badri and Shaji (Half-Quadratic Quantization of Large Machine Learning Models,
    2023, eq. 3 to 5), p = 0.7: with e taking the part of an error that is far off,

        e <- sign(r) max(|r| - |r|^(p-1) / beta, 0)      r = w / s - (c - z)
        z <- mean(c - (w / s - e))                       beta grows by 1 % a turn, from 10

    in units of the scale, so that beta means the same for every weight. Of all turns a group keeps the best.
    """
    scale, zero = scales_for(groups, scheme)
    units = groups / scale[:, None]

    def left(z: Float64) -> tuple[Float64, Float64]:
        codes_ = np.clip(np.rint(units + z[:, None]), scheme.lowest, scheme.highest)
        return codes_, units - (codes_ - z[:, None])

    made, rest = left(zero)
    best, least, beta = zero.copy(), (np.abs(rest) ** _NORM).sum(1), _BETA
    for _ in range(_HALF_QUADRATIC_TURNS):
        size = np.abs(rest)
        far = size - np.maximum(size, np.finfo(np.float64).tiny) ** (_NORM - 1) / beta
        errors = np.sign(rest) * np.maximum(far, 0)
        zero = round_zeros((made - (units - errors)).mean(1), scheme)
        made, rest = left(zero)
        norm = (np.abs(rest) ** _NORM).sum(1)
        better = norm < least
        least[better], best[better] = norm[better], zero[better]
        beta *= 1.01
    return scale, best


_NORM, _BETA, _HALF_QUADRATIC_TURNS = 0.7, 10.0, 20
