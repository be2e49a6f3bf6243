"""Zeros that the weights that stay make up for: SparseGPT, and coordinate descent under a mask.

A layer computes x W'. With H = E[x^T x] and rows of W being outputs, taking out w_j and moving the rest
of its row as well as can be costs w_j^2 / [H^-1]_jj (optimal brain surgeon). SparseGPT (arXiv 2301.00774,
section 3, algorithm 1) goes through the columns from the left and moves those to the right only, so that all
rows share one factorization: with U the upper Cholesky factor of (H + damping)^-1,

    cost of w_j      w_j^2 / U_jj^2
    where it goes    e = w_j / U_jj        w_k -= e U_jk   for k > j

The mask is chosen as the columns come, from weights as they have become: for 128 columns at a time (all
rows share the threshold), N:M group by group. Coordinate descent then solves for what stays, as its mask
is known: each of its steps is exact, w'_j = w'_j + ((W - W') H)_j / H_jj, so no sweep loses more.

All is computed in float64, on the device of the calibration; matrices are held by columns there.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from netlathe.ir.sparsity import Pattern
from netlathe.passes.quantize.gptq import factor
from netlathe.passes.sparsify import masks

Array = npt.NDArray[Any]
_BLOCK = 128  # columns that share a threshold


def solve(
    matrix: Array,
    second_moment: Array,
    pattern: Pattern,
    ratio: float,
    *,
    damping: float,
    device: str = "cpu",
) -> tuple[Array, Array, float]:
    """The weights ``[rows, columns]``, which of them stay, and the damping: a share of H's mean diagonal."""
    wide: Any = dict(dtype=torch.float64, device=device)
    w = torch.tensor(matrix, **wide).T.contiguous()
    upper, used = factor(torch.tensor(second_moment, **wide), damping)
    diagonal = torch.diagonal(upper)
    kept = torch.ones_like(w, dtype=torch.bool)
    step = pattern.m if pattern.kind == "n:m" else _step(pattern)
    block = max(step, _BLOCK // step * step)
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            if (j - start) % step == 0:
                end = min(j + step, stop)
                cost = (w[j:end] / diagonal[j:end, None]).square().T.cpu().numpy()
                chosen = masks.select(cost, pattern, ratio, "layer")
                kept[j:end] = torch.from_numpy(chosen.T).to(w.device)
            made = w[j] * kept[j]
            errors[j - start] = (w[j] - made) / diagonal[j]
            w[j] = made
            w[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        w[stop:] -= upper[start:stop, stop:].T @ errors
    return w.T.cpu().numpy(), kept.T.cpu().numpy(), used


def _step(pattern: Pattern) -> int:
    """Columns whose mask is chosen at once, where no group says how many."""
    return max(pattern.n, _BLOCK // pattern.n * pattern.n) if pattern.kind == "tiles" else _BLOCK


def descend(
    matrix: Array,
    second_moment: Array,
    made: Array,
    kept: Array,
    sweeps: int,
    *,
    damping: float,
    device: str = "cpu",
) -> Array:
    """``made``, after so many sweeps over its columns, with zeros where ``kept`` is False."""
    wide: Any = dict(dtype=torch.float64, device=device)
    w, h = torch.tensor(matrix, **wide).T.contiguous(), torch.tensor(second_moment, **wide)
    now, mask = torch.tensor(made, **wide).T.contiguous(), torch.tensor(kept, device=device).T
    mask = mask.contiguous()
    h = h + damping * torch.diagonal(h).mean() * torch.eye(len(h), **wide)
    diagonal = torch.diagonal(h).tolist()
    for _ in range(sweeps):
        for start in range(0, len(w), _BLOCK):
            stop = min(start + _BLOCK, len(w))
            pull = h[start:stop] @ (w - now)  # kept up to date inside the block
            for j in range(start, stop):
                if diagonal[j] <= 0:
                    continue
                moved = torch.where(mask[j], pull[j - start] / diagonal[j], 0.0)
                now[j] += moved
                pull.addr_(h[start:stop, j], moved, alpha=-1)
    result: Array = now.T.cpu().numpy()
    return result
