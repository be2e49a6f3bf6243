"""Short convolutions by polynomial evaluation, F(m, 3): m outputs of 3 taps with m + 2 products.

y = A^T [(G g) * (B^T d)] of m + 2 inputs d and 3 taps g, where 3 m products were (Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", arXiv 1509.09308, 2015, equation 5; of two dims, where
each matrix stands on both sides, equation 8). A row of B^T and of G and a column of A^T belong to a
point at which polynomials are evaluated, the last one to infinity.

Points are 0, infinity and pairs p and -p, whose rows share half of their work. ``POINTS`` gives p by m.
For m = 4 they are 1/sqrt(2) and sqrt(2): one is the inverse of the other, as Barabasz et al. advise
("Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2020,
section 5), and both are near 1, so that powers are neither large nor small. The points 1 and 2 of Lavin
and Gray have more than twice the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

TAPS = 3
POINTS: Mapping[int, tuple[float, ...]] = {2: (1.0,), 4: (math.sqrt(0.5), math.sqrt(2.0))}

Times = Callable[[Any, float], Any]  # a value times a number
Keep = Callable[[Any], Any]  # a name for a value that is used twice


def taps_matrix(m: int) -> npt.NDArray[np.float64]:
    """G, [m + 2, 3]: the taps as a polynomial at each point, over the point's distances from the others.

    B^T is free of fractions therefore, and leading coefficients in it are 1.
    """
    finite = [0.0, *(sign * p for p in POINTS[m] for sign in (1.0, -1.0))]
    rows = []
    for point in finite:
        distances = math.prod(point - other for other in finite if other != point)
        rows.append([point**power / distances for power in range(TAPS)])
    return np.array([*rows, [0.0, 0.0, 1.0]])


def inputs_at_points(m: int, d: Sequence[Any], times: Times, keep: Keep) -> list[Any]:
    """B^T d: coefficients of a row are those of the product of x - q over all finite points q but its own.

    Of the pair p and -p that is x (x + p) E(x^2) and x (x - p) E(x^2), E going over the other pairs.
    """

    def along(factors: Sequence[float], values: Sequence[Any]) -> Any:
        """Factors, the last of which is 1, times as many values."""
        found = values[len(factors) - 1]
        for factor, value in zip(factors[:-1], values, strict=False):
            found = found + times(value, factor)
        return found

    whole = _squares(POINTS[m])
    found = [along(whole, d[0::2])]
    for p in POINTS[m]:
        others = _squares([q for q in POINTS[m] if q != p])
        even, odd = keep(along(others, d[2::2])), keep(times(keep(along(others, d[1::2])), p))
        found += [even + odd, even - odd]
    return [*found, along(whole, d[1::2])]


def _squares(points: Sequence[float]) -> list[float]:
    """Coefficients of the product of y - p^2 over some points, the constant first."""
    product = np.ones(1)
    for p in points:
        product = np.convolve(product, [-p * p, 1.0])
    return [float(value) for value in product]


def outputs_of_points(m: int, values: Sequence[Any], times: Times, keep: Keep) -> list[Any]:
    """A^T: output j is the sum of p^j times the value at each point p, the last one that at infinity."""
    pairs = [(values[1 + 2 * i], values[2 + 2 * i]) for i in range(len(POINTS[m]))]
    halves = [(keep(plus + minus), keep(plus - minus)) for plus, minus in pairs]
    found = []
    for power in range(m):
        terms = [
            times(both[power % 2], p**power) for p, both in zip(POINTS[m], halves, strict=True)
        ]
        if power == 0:
            terms.append(values[0])
        if power == m - 1:
            terms.append(values[-1])
        found.append(sum(terms[1:], start=terms[0]))
    return found
