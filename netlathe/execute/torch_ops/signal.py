"""Fourier transforms, windows, and the mel filter bank."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Ints, Row, number, row
from .storage import TORCH_DTYPE


def dft(
    input: Tensor,
    dft_length: Ints | None = None,
    axis: Ints = -2,
    *,
    inverse: int = 0,
    onesided: int = 0,
    opset: int = 20,
) -> Tensor:
    """DFT of [..., 1] real or [..., 2] complex numbers -> [..., 2].

    The axis was an attribute (default 1) before opset 20. A one-sided inverse takes the half spectrum
    and gives [..., 1].
    """
    over = number(axis) if opset >= 20 or axis != -2 else 1
    over = over if over >= 0 else over + input.dim()
    length = None if dft_length is None else number(dft_length)
    if input.shape[-1] == 2:
        x = torch.view_as_complex(input.contiguous())
    else:
        x = input.squeeze(-1)
    y: Tensor
    if inverse and onesided:
        y = torch.fft.irfft(x, length, over)
        return y.unsqueeze(-1)
    if inverse:
        y = torch.fft.ifft(x, length, over)
    elif onesided:
        y = torch.fft.rfft(x, length, over)
    else:
        y = torch.fft.fft(x, length, over)
    return torch.view_as_real(y)


def stft(
    signal: Tensor,
    frame_step: Ints,
    window: Tensor | None = None,
    frame_length: Ints | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """STFT of [b, n, 1] or [b, n, 2]: [b, frames, bins, 2]."""
    if frame_length is not None:
        length = number(frame_length)
    else:
        assert window is not None
        length = window.shape[0]
    frames = signal.unfold(1, length, number(frame_step)).transpose(2, 3)  # [b, f, length, 1 or 2]
    if window is not None:
        # A window shorter than the frame is centred in it.
        extra = length - window.shape[0]
        window = F.pad(window, [extra // 2, extra - extra // 2])
        frames = frames * window.unsqueeze(-1)
    return dft(frames, axis=2, onesided=onesided)


def _cosine_window(
    size: Ints, terms: tuple[float, ...], output_datatype: int, periodic: int
) -> Tensor:
    """sum over k of terms[k] cos(2 pi k i / n), computed in float64."""
    count = number(size)
    i = torch.arange(count, dtype=torch.float64)
    period = count if periodic else max(count - 1, 1)
    y = torch.zeros_like(i)
    for k, term in enumerate(terms):
        y = y + term * torch.cos(i * (2 * math.pi * k / period))
    return y.to(TORCH_DTYPE[ir.DataType(output_datatype)])


def hann_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """HannWindow."""
    return _cosine_window(size, (0.5, -0.5), output_datatype, periodic)


def hamming_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """HammingWindow; ONNX's coefficients are 25/46 and 21/46, torch's 0.54 and 0.46."""
    return _cosine_window(size, (25 / 46, -21 / 46), output_datatype, periodic)


def blackman_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """BlackmanWindow."""
    return _cosine_window(size, (0.42, -0.5, 0.08), output_datatype, periodic)


def mel_weight_matrix(
    num_mel_bins: Ints,
    dft_length: Ints,
    sample_rate: Ints,
    lower_edge_hertz: Tensor | float,
    upper_edge_hertz: Tensor | float,
    *,
    output_datatype: int = 1,
) -> Tensor:
    """MelWeightMatrix: [dft_length / 2 + 1, bins] triangles on whole spectrum bins."""
    bins, length = int(number(num_mel_bins)), int(number(dft_length))
    rate = float(number(sample_rate))
    spectrum = length // 2 + 1

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    low, high = mel(float(number(lower_edge_hertz))), mel(float(number(upper_edge_hertz)))
    step = (high - low) / (bins + 2)
    edges = [
        math.floor((length + 1) * (700 * (10 ** ((low + i * step) / 2595) - 1)) / rate)
        for i in range(bins + 2)
    ]
    matrix = torch.zeros(spectrum, bins, dtype=torch.float64)
    for b in range(bins):
        left, centre, right = edges[b : b + 3]
        if centre == left:
            matrix[centre, b] = 1
        else:
            for f in range(left, centre + 1):
                matrix[f, b] = (f - left) / (centre - left)
        for f in range(centre, right if right > centre else centre):
            matrix[f, b] = (right - f) / (right - centre)
    return matrix.to(TORCH_DTYPE[ir.DataType(output_datatype)])


ROWS: dict[str, Row] = {
    "DFT": row(dft, "dft_length", "axis", facts=("opset",)),
    "STFT": row(stft, "frame_step", "frame_length"),
    "HannWindow": row(hann_window, "size"),
    "HammingWindow": row(hamming_window, "size"),
    "BlackmanWindow": row(blackman_window, "size"),
    "MelWeightMatrix": row(
        mel_weight_matrix,
        "num_mel_bins",
        "dft_length",
        "sample_rate",
        "lower_edge_hertz",
        "upper_edge_hertz",
    ),
}
