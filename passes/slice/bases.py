"""Orthogonal bases of a residual stream: principal axes, axes weighed by the loss, random Hadamard.

A basis is a ``[d, k]`` array in float64 with orthonormal columns, the most important first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Basis = npt.NDArray[np.float64]
# SliceGPT adds this share of the mean variance to every direction (its authors' code): directions
# that the data does not show are then ordered by rounding no more than those that it does.
DAMPING = 0.01
_STEPS = 100  # the objective of `loss_weighted` falls by less than 1e-3 of itself after these
_RATE = 5e-3


def principal(covariance: npt.NDArray[np.float64], device: str = "cpu") -> Basis:
    """Eigenvectors of a damped second moment ``[d, d]``, largest eigenvalue first (arXiv 2401.15024, 3.3).

    The sign of each is fixed, so that equal data gives equal bits: its largest element is positive.
    """
    if device != "cpu":
        return _principal_on(covariance, device)
    size = len(covariance)
    damped = covariance + DAMPING * np.trace(covariance) / size * np.eye(size)
    vectors = np.linalg.eigh(damped)[1][:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return np.ascontiguousarray(vectors * np.where(largest < 0, -1.0, 1.0))


def _principal_on(covariance: npt.NDArray[np.float64], device: str) -> Basis:
    """The same in torch: at 4096 directions a second less than with numpy around the eigh."""
    import torch

    from netlathe.execute.torch_ops.storage import from_numpy

    damped = from_numpy(covariance, device)
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    vectors = torch.linalg.eigh(damped)[1].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    found: Basis = torch.where(largest < 0, -vectors, vectors).cpu().numpy()
    return found


def loss_weighted(
    covariances: Sequence[npt.NDArray[np.float64]],
    gradients: Sequence[npt.NDArray[np.float64]],
    kept: int,
    device: str = "cpu",
) -> Basis:
    """The ``kept`` directions whose complement costs the least loss, to second order.

    With C_s the second moment of the signal at a place s and G_s that of the gradient of the
    log-likelihood there (its Fisher matrix), what is lost by removing R = I - QQ' from every place is

        J(Q) = sum over s of tr(R C_s R G_s)

    for signals and gradients that vary independently. Q starts from the principal axes of the summed
    C_s and follows the gradient of J, orthonormal by QR. The complement is completed to a square basis.
    """
    import torch

    start = principal(np.sum(covariances, axis=0), device)
    size = len(start)
    if kept == size:
        return start
    with torch.enable_grad():
        moments = torch.from_numpy(np.stack(covariances)).to(device)  # [places, d, d]
        fisher = torch.from_numpy(np.stack(gradients)).to(device)
        fisher = fisher / (moments @ fisher).diagonal(dim1=1, dim2=2).sum().clamp(min=1e-300)
        free = torch.from_numpy(start[:, :kept].copy()).to(device).requires_grad_(True)
        identity = torch.eye(size, dtype=torch.float64, device=device)
        optimizer = torch.optim.Adam([free], lr=_RATE)
        for _ in range(_STEPS):
            basis = torch.linalg.qr(free)[0]
            rest = identity - basis @ basis.T
            lost = ((rest @ moments @ rest) * fisher).sum()
            optimizer.zero_grad()
            lost.backward()
            optimizer.step()
        found = torch.linalg.qr(free.detach())[0].cpu().numpy()
    return complete(found)


def complete(basis: Basis) -> Basis:
    """An orthonormal basis of all ``d`` directions that starts with the ``k`` given ones."""
    size, kept = basis.shape
    left = np.linalg.svd(basis)[0][:, kept:]
    return np.concatenate([basis, left], axis=1) if kept < size else basis


def hadamard(size: int, rng: np.random.Generator) -> Basis:
    """A randomized Hadamard rotation (QuIP, arXiv 2307.13304; QuaRot, arXiv 2404.00456, sec. 3).

    ``H diag(s) / sqrt(d)`` with random signs s and H by Sylvester where d is a power of two. Of another
    d = m 2^n with odd m, H is the Kronecker product of Sylvester's with a random orthogonal m x m.
    """
    power = size & -size
    walsh = np.ones((1, 1))
    for _ in range(power.bit_length() - 1):
        walsh = np.block([[walsh, walsh], [walsh, -walsh]]) * math.sqrt(0.5)
    odd = size // power
    if odd > 1:
        q, r = np.linalg.qr(rng.standard_normal((odd, odd)))
        walsh = np.kron(walsh, q * np.sign(np.diag(r)))
    return np.asarray(walsh * rng.choice((-1.0, 1.0), size)[:, None], np.float64)
