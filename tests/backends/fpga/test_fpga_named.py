"""The networks of ``benchmarks/bench_fpga.py``, from the shell to their outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_fpga import NETWORKS, measured

# What the core must take of the multiplications; attention between tokens is the host's.
SHARES = {"minilm": 0.95, "llama": 0.95}
# From the network with float scales, in steps of an int8 over the output's range, and from the graph in ONNX
# Runtime where TVM's code is the host, as a share of the RMS: floats between layers turn codes by a step.
STEPS = {"mlp": 1.0, "cnn": 2.0, "mobilenet_v2": 8.0, "resnet18": 8.0, "minilm": 8.0, "llama": 16.0}
HOST = {"minilm": 0.05, "llama": 0.05}


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
        assert numbers["host_error"] <= HOST.get(name, 0)
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
