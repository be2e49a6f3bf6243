"""A mask made better by swaps, weights staying as they are: Dynamic Sparse no Training.

arXiv 2310.08915, section 3: taking out weights moves the mean of a row's output by

    eps = sum over j that went of w_j E[x_j]

A swap lets back the weight whose w_j E[x_j] / Var[x_j] undoes most of eps, and takes out another one, of
those whose loss undoes more of it the one with the least w_j^2 E[x_j^2] (equations 4 and 5). A row is
done when a swap would not make |eps| smaller, or after 50 of them. Of N:M both are of one group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from netlathe.ir.sparsity import Pattern

Array = npt.NDArray[Any]
MOST_SWAPS = 50


def refine(matrix: Array, kept: Array, mean: Array, square: Array, pattern: Pattern) -> Array:
    """The mask ``[rows, columns]`` after swaps; ``mean`` and ``square`` are E[x] and E[x^2] of columns."""
    kept = kept.copy()
    variance = np.maximum(square - mean**2, np.finfo(np.float64).tiny)
    share = matrix * mean  # what each weight adds to the mean of its output
    gain = share / variance
    cost = matrix**2 * square
    group = pattern.m if pattern.kind == "n:m" else matrix.shape[1]
    eps = np.where(kept, 0.0, share).sum(1)
    rows = np.flatnonzero(eps != 0)
    for _ in range(MOST_SWAPS):
        if not len(rows):
            break
        sign = np.sign(eps[rows])[:, None]
        back = np.where(kept[rows], -np.inf, sign * gain[rows])
        grown = back.argmax(1)
        at = np.arange(len(rows))
        inside = np.arange(matrix.shape[1]) // group == (grown // group)[:, None]
        undoes = kept[rows] & inside & (sign * share[rows] < 0)
        out = np.where(undoes, cost[rows], np.inf)
        pruned = out.argmin(1)
        after = eps[rows] - share[rows, grown] + share[rows, pruned]
        better = (
            (back[at, grown] > 0)
            & np.isfinite(out[at, pruned])
            & (np.abs(after) < np.abs(eps[rows]))
        )
        done, grown, pruned = rows[better], grown[better], pruned[better]
        kept[done, grown], kept[done, pruned] = True, False
        eps[done] = after[better]
        rows = done
    return kept
