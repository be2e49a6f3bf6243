"""The networks of ``benchmarks/bench_fpga.py``, from the shell to their outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_fpga import NETWORKS, measured

# What the core must take of the multiplications; attention between tokens is the host's.
SHARES = {"minilm": 0.95, "llama": 0.95}
# From the network with float scales, in steps of an int8 over the range of the output. Transformers have
# more: their queries, keys and values are codes in integers, and floats with float scales.
STEPS = {"mlp": 1, "cnn": 2, "mobilenet_v2": 4, "resnet18": 8, "minilm": 32, "llama": 32}

# All but the first and the last layer in int4: the least share of multiplications that go by pairs (depthwise
# convolutions do not, and where the memory is the limit a layer may not).
BY_PAIRS = {
    "mlp": 0.75, "cnn": 0.95, "mobilenet_v2": 0.85, "resnet18": 0.9, "minilm": 1.0, "llama": 0.8,
}  # fmt: skip
# Outputs from the network before quantization, as a share of their norm: a scale for each channel is coarse.
LOSSES_INT4 = {
    "mlp": 0.02, "cnn": 0.15, "mobilenet_v2": 0.15, "resnet18": 0.5, "minilm": 0.65, "llama": 0.6,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_compiled_from_the_shell_and_equal_to_onnx_runtime(
    name: str, tmp_path: Path
) -> None:
    found = measured(name, tmp_path)
    assert [numbers["network"] for numbers in found.numbers] == (
        ["llama prefill", "llama decode"] if name == "llama" else [name]
    )
    for numbers in found.numbers:
        assert numbers["difference"] == 0
        # A float between layers that differs in its last bit turns a code, and codes turn others; but the
        # network is not further from what it was before quantization.
        assert name in SHARES or numbers["difference_tvm"] == 0
        assert numbers["loss_tvm"] <= 1.25 * numbers["loss"] < 0.5
        assert numbers["steps"] <= STEPS[name]
        assert numbers["macs"] >= SHARES.get(name, 1.0)
        assert 0 < numbers["utilization"] <= 1
    held = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert held["error"] == 0 and held["host"] == "tvm-x86"
    assert held["macs"] == found.numbers[0]["macs"]
    assert held["cycles"] == sum(layer["cycles"] for layer in held["layers"]) > 0
    if found.case.labels is not None:
        ours, float_scales = (found.numbers[0][k] for k in ("accuracy", "accuracy_float_scales"))
        assert abs(ours - float_scales) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_PAIRS)
def test_networks_in_int4_go_by_pairs_and_equal_onnx_runtime(name: str, tmp_path: Path) -> None:
    found = measured(name, tmp_path, "int4")
    for numbers in found.numbers:
        assert numbers["difference"] == 0
        assert name in SHARES or numbers["difference_tvm"] == 0
        assert numbers["loss_tvm"] <= 1.25 * numbers["loss"]
        assert numbers["macs_by_pairs"] >= BY_PAIRS[name]
        assert numbers["loss"] <= LOSSES_INT4[name]
        assert numbers["macs"] >= SHARES.get(name, 1.0)
    held = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert any(layer["pairs"] for layer in held["layers"])
    if found.case.labels is not None:
        ours, float_scales = (found.numbers[0][k] for k in ("accuracy", "accuracy_float_scales"))
        assert abs(ours - float_scales) <= 0.01
