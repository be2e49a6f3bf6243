"""Codes that make up for each other's errors: GPTQ, and coordinate descent after it.

A layer computes x W'. With H = E[x^T x] the squared error of its output is tr(E H E^T) for E = W' - W, rows
being outputs. GPTQ (arXiv 2210.17323, sec. 3, algorithm 1) rounds one column after the other and moves the
columns that are left so that they take up the error: with U the upper Cholesky factor of (H + damping)^-1,

    e = (w_j - q(w_j)) / U_jj        w_k -= e U_jk   for k > j

Columns come in the order of their H_jj, the largest first (``act_order``), or as they are. Scales and zero
points are fixed before, so that a group's columns need not follow each other. Coordinate descent (QuantEase,
arXiv 2309.01885, eq. 9) then rounds every column once more against all others as they have become:

    w'_j = q(w'_j + ((W - W') H)_j / H_jj)

All is computed in float64, on the device of the calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from netlathe.passes.quantize.scheme import NF4, Scheme

Array = npt.NDArray[Any]
_BLOCK = 128  # columns whose effect on all later ones is added up before it is applied
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Solution:
    """Codes [rows, columns] and the damping that was needed, as a share of the mean of H's diagonal."""

    codes: Array
    damping: float


def solve(
    matrix: Array,
    second_moment: Array,
    scale: Array,
    zero: Array,
    scheme: Scheme,
    *,
    damping: float,
    act_order: bool,
    sweeps: int,
    kept: Array | None = None,
    device: str = "cpu",
) -> Solution:
    """Codes for ``matrix`` [rows, columns], with ``scale`` and ``zero`` [rows, groups].

    A column that is never fed counts as one that is fed little, and is rounded to nearest. Elements
    where ``kept`` [rows, columns] is False get the code of zero.
    """
    wide = dict(dtype=torch.float64, device=device)
    w, h = torch.tensor(matrix, **wide), torch.tensor(second_moment, **wide)  # type: ignore[arg-type]
    per = matrix.shape[1] // scale.shape[1]
    s = torch.tensor(scale, **wide).repeat_interleave(per, 1)  # type: ignore[arg-type]
    z = torch.tensor(zero, **wide).repeat_interleave(per, 1)  # type: ignore[arg-type]
    rounder = _Rounder(scheme, device)
    mask = torch.ones_like(w, dtype=torch.bool)
    if kept is not None:
        mask = torch.tensor(kept, dtype=torch.bool, device=device)
    order = torch.arange(len(h), device=device)
    if act_order:
        order = torch.argsort(torch.diagonal(h), descending=True, stable=True)
    upper, used = factor(h[order][:, order], damping)
    codes = _walk(w[:, order], upper, s[:, order], z[:, order], mask[:, order], rounder)
    back = torch.argsort(order)
    codes = codes[:, back]
    for _ in range(sweeps):
        codes = _descend(w, h, codes, s, z, mask, rounder)
    return Solution(codes.to(torch.int16).cpu().numpy().astype(scheme.code_type), used)


class _Rounder:
    """Codes of numbers, and numbers of codes."""

    def __init__(self, scheme: Scheme, device: str) -> None:
        self.scheme = scheme
        self.table = torch.tensor(NF4, dtype=torch.float64, device=device)
        self.middles = (self.table[1:] + self.table[:-1]) / 2
        self.zero = float(NF4.tolist().index(0.0))

    def codes(
        self, w: torch.Tensor, s: torch.Tensor, z: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """The nearest codes, as float64; where nothing is kept that of zero."""
        if self.scheme.format.kind == "table":
            found = torch.bucketize((w / s).contiguous(), self.middles).to(w.dtype)
            return torch.where(kept, found, self.zero)
        found = (torch.round(w / s) + z).clamp(self.scheme.lowest, self.scheme.highest)
        return torch.where(kept, found, z)

    def numbers(self, c: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What codes stand for."""
        units = self.table[c.long()] if self.scheme.format.kind == "table" else c - z
        return (units * s).to(torch.float32).to(torch.float64)


def factor(h: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the inverse of the damped H; more damping where it is singular."""
    mean = torch.diagonal(h).mean().clamp(min=torch.finfo(h.dtype).tiny)
    share = damping
    while True:
        damped = h + share * mean * torch.eye(len(h), dtype=h.dtype, device=h.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper, share
        share = max(10 * share, 1e-6)
        if share > 10 * _MOST_DAMPING:
            raise ValueError("the second moment holds NaN or is far from positive")


def _walk(
    w: torch.Tensor,
    upper: torch.Tensor,
    s: torch.Tensor,
    z: torch.Tensor,
    kept: torch.Tensor,
    rounder: _Rounder,
) -> torch.Tensor:
    w, codes = w.clone(), torch.empty_like(w)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            at = slice(j, j + 1)
            codes[:, at] = rounder.codes(w[:, at], s[:, at], z[:, at], kept[:, at])
            made = rounder.numbers(codes[:, at], s[:, at], z[:, at])
            error = (w[:, at] - made) / upper[j, j]
            w[:, j + 1 : stop] -= error * upper[j, j + 1 : stop]
            errors[:, at.start - start] = error[:, 0]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def _descend(
    w: torch.Tensor,
    h: torch.Tensor,
    codes: torch.Tensor,
    s: torch.Tensor,
    z: torch.Tensor,
    kept: torch.Tensor,
    rounder: _Rounder,
) -> torch.Tensor:
    codes, made = codes.clone(), rounder.numbers(codes, s, z)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        pull = (w - made) @ h[:, start:stop]  # [rows, block], kept up to date inside the block
        for j in range(start, stop):
            at = slice(j, j + 1)
            if h[j, j] <= 0:
                continue
            wanted = made[:, at] + pull[:, j - start : j - start + 1] / h[j, j]
            codes[:, at] = rounder.codes(wanted, s[:, at], z[:, at], kept[:, at])
            now = rounder.numbers(codes[:, at], s[:, at], z[:, at])
            pull -= (now - made[:, at]) * h[j, start:stop]
            made[:, at] = now
    return codes


def error(matrix: Array, made: Array, second_moment: Array) -> float:
    """tr(E H E^T) as a share of tr(W H W^T)."""
    difference = made - matrix
    of = [
        float(np.einsum("rc,cd,rd->", m, second_moment, m, optimize=True))
        for m in (difference, matrix)
    ]
    return of[0] / of[1] if of[1] else 0.0
