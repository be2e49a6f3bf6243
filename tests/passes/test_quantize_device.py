"""Solvers in torch against numpy: the same scales and codes, and float32 next to float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from netlathe.passes.quantize import device, gptq, rounding
from netlathe.passes.quantize.layout import Layout, layout
from netlathe.passes.quantize.scheme import Scheme, decode
from tests.ir.onnx_text import matrix
from tests.passes.test_quantize_gptq import problem

Array = np.ndarray[Any, np.dtype[Any]]
SCHEMES = [
    Scheme(weights=name, symmetric=symmetric, scales=scales)
    for name in ("int8", "int4", "int3", "int2")
    for symmetric in (True, False)
    for scales in ("float32", "float16", "bfloat16")
] + [
    Scheme("int4", operand=True),
    Scheme("int2", operand=True, scales="float16"),
    Scheme("nf4"),
    Scheme("codebook3", codebook=(-1.0, -0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 1.0), scales="float16"),
    Scheme("int3", symmetric=False, zeros="float", scales="float16"),
    Scheme("int8", symmetric=False, zeros="float"),
    Scheme("float8e4m3fn"),
    Scheme("float8e5m2", scales="bfloat16"),
    Scheme("float4e2m1"),
    Scheme("mxfp4"),
    Scheme("nvfp4", tensor_scale=0.02),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s}, {s.scales}")
@pytest.mark.parametrize("clip", ["none", "percentile", "mse"])
def test_ranges_and_codes_are_those_of_numpy(scheme: Scheme, clip: Any) -> None:
    w = matrix(64, 48)
    w[:, 5] = 0
    w[0, 7] = 40
    own = layout(w.shape, frozenset({0}), 16)
    importance = np.square(matrix(64, seed=3)).astype(np.float64)
    expected = rounding.ranges(w, own, scheme, clip, 97.0, importance)
    tensor = device.to_matrix(torch.tensor(w), own)
    found = device.ranges(tensor, 4, scheme, clip, 97.0, torch.tensor(importance))
    # Of two scales with the same error up to the order of a sum, either may be taken; none is here.
    for wanted, got in zip(expected, found, strict=True):
        assert np.array_equal(wanted, got.numpy().reshape(-1))
    codes = device.from_matrix(device.nearest(tensor, *found, scheme), own).numpy()
    assert np.array_equal(codes, rounding.codes(w, own, scheme, *expected).view(codes.dtype))
    wide = device.numbers(codes, own, scheme, *expected, "cpu")
    held = codes.view(scheme.code_type)
    assert np.array_equal(wide.numpy(), rounding.numbers(held, own, scheme, *expected, np.float32))


@pytest.mark.parametrize(
    "own",
    [
        Layout((6, 8), 0, 3),
        Layout((6, 8), 1, 4),
        Layout((6, 8), 1),
        Layout((6, 4, 2, 2), 1, 8, flat=True),
        Layout((6, 4, 2, 2), 0),
        Layout((3, 8, 5), 1, 4),
        Layout((3, 5, 8), 2, 8),
    ],
)
def test_matrices_lie_as_numpy_has_them(own: Layout) -> None:
    w = matrix(*own.dims)
    made = device.to_matrix(torch.tensor(w), own)
    assert np.array_equal(made.numpy().reshape(-1), own.view(w).reshape(-1))
    assert np.array_equal(device.from_matrix(made, own).numpy(), w.reshape(own.stored))


@pytest.mark.parametrize("scheme", [Scheme(weights="int4"), Scheme(weights="nf4")], ids=str)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_float32_loses_as_little_as_float64(scheme: Scheme, sweeps: int) -> None:
    w, h, s, z = problem(32, 320, 32, seed=4)
    if scheme.weights == "nf4":
        s, z = np.abs(s) * 8, z * 0
    lost = {}
    for dtype in (torch.float32, torch.float64):
        found = gptq.solve(
            w, h, s, z, scheme, damping=0.01, act_order=True, sweeps=sweeps, dtype=dtype
        )
        wide = np.repeat(s, 32, 1), np.repeat(z, 32, 1)
        lost[dtype] = gptq.error(w, decode(found.codes, *wide, scheme), h)
    # Roundings move numbers across the middle of two codes here and there; what is lost stays.
    assert abs(lost[torch.float32] / lost[torch.float64] - 1) <= 0.02


def test_the_factor_in_float32_is_that_in_float64() -> None:
    _, h, _, _ = problem(1, 320, 32, seed=4)
    wide, share = gptq.factor(torch.tensor(h), 0.01)
    single, same = gptq.factor(torch.tensor(h, dtype=torch.float32), 0.01)
    assert share == same == 0.01
    damped = h + 0.01 * np.mean(np.diagonal(h)) * np.eye(len(h))
    inverse = np.linalg.inv(damped)
    assert np.abs(wide.numpy().T @ wide.numpy() - inverse).max() <= 1e-10 * np.abs(inverse).max()
    # The condition of the damped H bounds the relative error: about 2e3 roundings of float32 here.
    condition = np.linalg.cond(damped)
    assert float((single - wide).norm() / wide.norm()) <= condition * 2.0**-24
    assert bool((torch.tril(wide, -1) == 0).all())
