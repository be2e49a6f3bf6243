"""Codes that make up for each other's errors: GPTQ, and coordinate descent after it.

A layer computes x W'. With H = E[x^T x] the squared error of its output is tr(E H E^T) for E = W' - W, rows
being outputs. GPTQ (arXiv 2210.17323, sec. 3, algorithm 1) rounds one column after the other and moves the
columns that are left so that they take up the error: with U the upper Cholesky factor of (H + damping)^-1,

    e = (w_j - q(w_j)) / U_jj        w_k -= e U_jk   for k > j

Columns come in the order of their H_jj, the largest first (``act_order``), or as they are. Scales and zero
points are fixed before, so that a group's columns need not follow each other. Coordinate descent (QuantEase,
arXiv 2309.01885, eq. 9) then rounds every column once more against all others as they have become:

    w'_j = q(w'_j + ((W - W') H)_j / H_jj)

On a CPU all is computed in float64. On a GPU the second moment is summed up in float64, but the factor and
what follows are float32: damping bounds the condition of H, and a column's error is measured on the
float32 numbers that codes stand for.

Matrices are held by columns here, [columns, rows]: a step reads and writes some of them, all rows at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from netlathe.passes.quantize.device import Rounder, byte_type
from netlathe.passes.quantize.scheme import Scheme

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
    dtype: torch.dtype | None = None,
) -> Solution:
    """Codes for ``matrix`` [rows, columns], with ``scale`` and ``zero`` [rows, groups].

    A column that is never fed counts as one that is fed little, and is rounded to nearest. Elements
    where ``kept`` [rows, columns] is False get the code of zero.
    """
    moment = torch.tensor(second_moment, dtype=torch.float64, device=device)
    inputs = Inputs(moment, damping=damping, act_order=act_order, dtype=dtype)
    w, s, z = (torch.tensor(array, device=device) for array in (matrix, scale, zero))
    mask = None if kept is None else torch.tensor(kept, device=device)
    codes = inputs.solve(w, s, z, scheme, sweeps=sweeps, kept=mask)
    return Solution(codes.cpu().numpy(), inputs.damping)


class Inputs:
    """What weights are multiplied with, made ready once for all weights that read the same values.

    ``dtype`` is that of the arithmetic: float64 on a CPU, float32 elsewhere, where it is not given.

    Raises:
        ValueError: the second moment holds NaN, or is far from positive.
    """

    def __init__(
        self,
        second_moment: torch.Tensor,
        *,
        damping: float,
        act_order: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        on_cpu = second_moment.device.type == "cpu"
        self.dtype = dtype or (torch.float64 if on_cpu else torch.float32)
        self.importance = torch.diagonal(second_moment).clone()
        self.moment = second_moment.to(self.dtype)
        self._diagonal: list[float] = torch.diagonal(self.moment).tolist()
        h = self.moment
        self._order: torch.Tensor | None = None
        if act_order:
            # Taps of a padded window may be fed the same: their order must not be that of rounded sums.
            fed = torch.diagonal(second_moment).float()
            self._order = torch.argsort(fed, descending=True, stable=True)
            h = h[self._order][:, self._order]
        self._upper, self.damping = factor(h, damping)

    def solve(
        self,
        matrix: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        scheme: Scheme,
        *,
        sweeps: int,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Codes for ``matrix``, as bytes; see :func:`solve`."""
        task = _Task(matrix.to(self.dtype).T.contiguous(), scale, zero, kept, scheme)
        units = self._walk(task)
        for _ in range(sweeps):
            self._descend(task, units)
        codes = torch.empty_like(units, dtype=byte_type(scheme))
        for part in _blocks(len(units)):
            codes[part] = task.rounder.codes(units[part], task.zeros(part))
        return codes.T.contiguous()

    def _walk(self, task: _Task) -> torch.Tensor:
        """GPTQ: units [columns, rows], in the matrix' own order."""
        columns = len(task.w)
        order = torch.arange(columns, device=task.w.device) if self._order is None else self._order
        w, units, upper = task.w[order], torch.empty_like(task.w), self._upper
        diagonal: list[float] = torch.diagonal(upper).tolist()
        for part in _blocks(columns):
            own, block = order[part], w[part]
            s, z, kept = task.scales(own), task.zeros(own), task.kept(own)
            found, errors = torch.empty_like(block), torch.empty_like(block)
            rows = [_each(tensor) for tensor in (block, found, errors, s, z, kept)]
            for j, (w_j, unit, error, s_j, z_j, kept_j) in zip(
                range(part.start, part.stop), zip(*rows, strict=False), strict=True
            ):
                task.rounder.units(w_j, s_j, z_j, kept_j, out=unit)
                torch.sub(w_j, _numbers(unit, s_j), out=error).div_(diagonal[j])
                later = block[j + 1 - part.start :]
                later.addr_(upper[j, j + 1 : part.stop], error, alpha=-1)
            units[own] = found
            w[part.stop :].addmm_(upper[part, part.stop :].T, errors, alpha=-1)
        return units

    def _descend(self, task: _Task, units: torch.Tensor) -> None:
        """A sweep of coordinate descent over ``units``, in place."""
        rest = torch.empty_like(task.w)  # what is left of the weight
        for part in _blocks(len(units)):
            rest[part] = task.w[part] - _numbers(units[part], task.scales(part))
        for part in _blocks(len(units)):
            s, z, kept = task.scales(part), task.zeros(part), task.kept(part)
            pull = self.moment[part] @ rest  # [block, rows], kept up to date inside the block
            columns = range(part.start, part.stop)
            rows = [_each(t) for t in (task.w[part], rest[part], units[part], pull, s, z, kept)]
            for j, (w_j, left, unit, pull_j, s_j, z_j, kept_j) in zip(
                columns, zip(*rows, strict=False), strict=True
            ):
                if self._diagonal[j] <= 0:
                    continue
                made = w_j - left
                wanted = torch.add(made, pull_j, alpha=1 / self._diagonal[j])
                task.rounder.units(wanted, s_j, z_j, kept_j, out=unit)
                now = _numbers(unit, s_j)
                pull.addr_(self.moment[j, part], now - made, alpha=-1)
                torch.sub(w_j, now, out=left)


class _Task:
    """A weight by columns, and what belongs to some of its columns: each [columns, rows]."""

    def __init__(
        self,
        w: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        kept: torch.Tensor | None,
        scheme: Scheme,
    ) -> None:
        self.w = w
        self.rounder = Rounder(scheme, w.dtype, w.device)
        self._scale, self._zero = (a.to(w.dtype).T.contiguous() for a in (scale, zero))
        self._kept = None if kept is None else kept.T.contiguous()
        self._group = torch.arange(len(w), device=w.device) // (len(w) // len(self._scale))
        self._has_zeros = scheme.asymmetric

    def scales(self, part: torch.Tensor | slice) -> torch.Tensor:
        return self._scale[self._group[part]]

    def zeros(self, part: torch.Tensor | slice) -> torch.Tensor | None:
        return self._zero[self._group[part]] if self._has_zeros else None

    def kept(self, part: torch.Tensor | slice) -> torch.Tensor | None:
        return None if self._kept is None else self._kept[part]


def _blocks(columns: int) -> Iterator[slice]:
    for start in range(0, columns, _BLOCK):
        yield slice(start, min(start + _BLOCK, columns))


def _each(tensor: torch.Tensor | None) -> Iterable[Any]:
    """The columns of a block one by one, as views; as many None as are asked for if there is no block."""
    return itertools.repeat(None) if tensor is None else tensor.unbind(0)


def _numbers(units: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """What codes stand for: float32, whatever is computed in."""
    made = units * s
    return made.float().to(made.dtype)


def factor(h: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor U of the inverse of the damped H; more damping where it is singular.

    With J the reversal of rows and J H J = L L^T, U = J L^-1 J: upper, and U^T U = H^-1.
    """
    mean = torch.diagonal(h).mean().clamp(min=torch.finfo(h.dtype).tiny)
    share = damping
    while True:
        damped = h.flip(0, 1)
        torch.diagonal(damped).add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            del damped
            one = torch.eye(len(h), dtype=h.dtype, device=h.device)
            upper = torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                return upper, share
        share = max(10 * share, 1e-6)
        if share > 10 * _MOST_DAMPING:
            raise ValueError("the second moment holds NaN or is far from positive")


def square(matrix: torch.Tensor, moment: torch.Tensor) -> float:
    """tr(W H W^T): the mean square of all outputs together."""
    return float(((matrix @ moment) * matrix).sum(dtype=torch.float64))


def error(matrix: Array, made: Array, second_moment: Array) -> float:
    """What is lost of the outputs' square by ``made`` in the place of ``matrix``, as a share."""
    rest, whole, moment = (
        torch.tensor(np.asarray(a, np.float64)) for a in (made - matrix, matrix, second_moment)
    )
    total = square(whole, moment)
    return square(rest, moment) / total if total else 0.0
