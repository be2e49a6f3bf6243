"""Corrected biases: by their formula, in every path that computes with biases, and refused elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.diagnostics import PassError
from netlathe.execute import compare, ort
from netlathe.ir import normal, verify, weights
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from tests import zoo_ir
from tests.ir.onnx_text import matrix, model

Array = npt.NDArray[Any]


def chain() -> ir.Model:
    """y = relu(x @ one + bias) @ two."""
    made = model(
        "float[b,16] x",
        "float y",
        "h = MatMul(x, one) a = Add(h, bias) r = Relu(a) y = MatMul(r, two)",
        one=matrix(16, 24, seed=1),
        bias=matrix(24, seed=2),
        two=matrix(24, 8, seed=3),
    )
    normal.normalize(made)
    return made


def sample() -> dict[str, Array]:
    """Inputs whose mean is not zero."""
    return {"x": matrix(64, 16, seed=4) + np.linspace(-2, 2, 16, dtype=np.float32)}


def quantized(made: ir.Model, pass_: Quantize, ctx: Context) -> tuple[ir.Model, list[Entry]]:
    """An edited copy in normal form, and the ledger."""
    entries = pass_.choose(made, ctx)
    after = made.clone()
    pass_.edit(after, entries, ctx)
    normal.normalize(after)
    assert verify.verify(after) == []
    return after, entries


def fake(made: ir.Model, pass_: Quantize) -> dict[str, Array]:
    """What the weights become, by name, in float64; from the reference without corrected biases."""
    reference = pass_.simulate(made.clone(), pass_.choose(made, Context())).model
    held = reference.graph.initializers.values()
    return {v.name or "": weights.array(v).astype(np.float64) for v in held}


def test_by_the_formula_in_float64() -> None:
    made, x = chain(), sample()["x"].astype(np.float64)
    held = {v.name: weights.array(v).astype(np.float64) for v in made.graph.initializers.values()}
    rounded = fake(made, Quantize(weights="int3", min_size=0))
    pass_ = Quantize(weights="int3", min_size=0, correct_bias=True)
    after, entries = quantized(made, pass_, Context(calibration=[sample()]))
    first, second = (entry.arrays["shift"] for entry in entries if "corrects" in entry.detail)
    expected = (x @ held["one"] - x @ rounded["one"]).mean(0)
    np.testing.assert_allclose(first, expected, atol=1e-5)
    exact = np.maximum(x @ held["one"] + held["bias"], 0) @ held["two"]
    fed = np.maximum(
        x @ rounded["one"] + held["bias"] + expected, 0
    )  # the first is corrected by now
    np.testing.assert_allclose(second, (exact - fed @ rounded["two"]).mean(0), atol=1e-5)
    now = {v.name: weights.array(v) for v in after.graph.initializers.values()}
    np.testing.assert_allclose(now["bias"], held["bias"] + expected, atol=1e-5)
    # The mean of the output is what it was; without, it was not.
    np.testing.assert_allclose(ort.run(after, sample())["y"].mean(0), exact.mean(0), atol=1e-4)
    plain, _ = quantized(made, Quantize(weights="int3", min_size=0), Context())
    assert np.abs(ort.run(plain, sample())["y"].mean(0) - exact.mean(0)).max() > 0.1


SETTINGS = (
    Quantize(weights="int4", min_size=0, correct_bias=True),
    Quantize(activations="int8", min_size=0, correct_bias=True),
    Quantize(activations="int8", activation_scales="token", min_size=0, correct_bias=True),
    Quantize(weights="int4", solver="gptq", min_size=0, correct_bias=True),
)


QUICK = (("llama", SETTINGS[0]), ("resnet", SETTINGS[1]))
CASES = [
    pytest.param(name, pass_, marks=[] if (name, pass_) in QUICK else [pytest.mark.slow])
    for name in ("llama", "resnet", "mobilenet_v2", "gpt2")
    for pass_ in SETTINGS
]


@pytest.mark.parametrize(("name", "pass_"), CASES, ids=str)
def test_the_model_is_its_reference(name: str, pass_: Quantize) -> None:
    made, ctx = zoo_ir.captured(name), Context(calibration=zoo_ir.feeds(name, 5))
    after, entries = quantized(made, pass_, ctx)
    corrected = [entry for entry in entries if "corrects" in entry.detail]
    assert corrected and all(entry.status == "applied" for entry in corrected)
    reference = pass_.simulate(made.clone(), entries)
    for fed in zoo_ir.feeds(name):
        got, wanted = ort.run(after, fed), ort.run(reference.model, fed)
        for key in wanted:
            assert compare.relative_error(got[key], wanted[key]) <= reference.tolerance


def test_where_outputs_are_no_channels_it_is_refused() -> None:
    made = model(
        "float[b,1,4,4] x, float[8,b] z",
        "float y, float u",
        "y = ConvTranspose(x, kernel) u = MatMul(left, z)",
        kernel=matrix(1, 4, 3, 3),
        left=matrix(4, 8),
    )
    normal.normalize(made)
    pass_ = Quantize(min_size=0, correct_bias=True)
    fed = {"x": matrix(2, 1, 4, 4, seed=5), "z": matrix(8, 2, seed=6)}
    entries = quantized(made, pass_, Context(calibration=[fed]))[1]
    reasons = {e.candidate: e.reason for e in entries if e.status == "refused"}
    assert "differs from position to position" in reasons["kernel: y"]
    assert "do not lie along the last axis" in reasons["left: u"]


def test_it_asks_for_data() -> None:
    with pytest.raises(PassError, match="correct_bias=True needs calibration data"):
        Quantize(min_size=0, correct_bias=True).choose(chain(), Context())
