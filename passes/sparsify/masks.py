"""Which elements stay: those of the highest scores that a pattern lets stay.

Scores are squares, so that those of a tile add up: of ``magnitude`` w^2, of ``wanda`` w_j^2 E[x_j^2]
(arXiv 2306.11695, equation 1, squared), what the output's square would lose if inputs were
uncorrelated. Of equal scores the last go first.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from netlathe.ir.sparsity import Pattern, tiles

Array = npt.NDArray[Any]
Within = Literal["row", "layer"]


def select(scores: Array, pattern: Pattern, ratio: float, within: Within) -> Array:
    """Which elements of ``[rows, columns]`` stay.

    ``ratio`` is the share of zeros, to the nearest whole number of elements or tiles: of every row (of
    tiles), or of the whole. N:M has its own.
    """
    match pattern.kind:
        case "n:m":
            groups = scores.reshape(-1, pattern.m)
            return _highest(groups, pattern.n).reshape(scores.shape)
        case "tiles":
            sums = tiles(scores, pattern).sum((-1, -2))
            kept = _share(sums, ratio, within)
            return np.repeat(np.repeat(kept, pattern.m, 0), pattern.n, 1)
        case _:
            return _share(scores, ratio, within)


def _share(scores: Array, ratio: float, within: Within) -> Array:
    flat = scores if within == "row" else scores.reshape(1, -1)
    count = flat.shape[1]
    return _highest(flat, count - round(ratio * count)).reshape(scores.shape)


def _highest(scores: Array, count: int) -> Array:
    """The ``count`` highest of every row."""
    order = np.argsort(-scores, axis=1, kind="stable")
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order[:, :count], True, axis=1)
    return kept
