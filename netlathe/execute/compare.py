"""How far two results are apart, and where two models first differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def relative_error(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """max|actual - expected| as a share of expected's RMS; infinite where they cannot be compared.

    Non-finite numbers agree only with the same non-finite number at the same place; the RMS is taken
    over the finite ones. Integers and booleans are compared as numbers.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.size == 0:
        return 0.0
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(e)
    if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(
        a[~finite], e[~finite], equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = float(np.max(np.abs(a[finite] - e[finite])))
    if difference == 0.0:
        return 0.0
    rms = float(np.sqrt(np.mean(np.square(e[finite]))))
    return difference / rms if rms > 0 else float("inf")
