"""The networks of ``benchmarks/bench_fpga.py``: whole, equal to ONNX Runtime to the bit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_fpga import NETWORKS, measured

# What the core must take of the multiplications; attention between tokens is the host's.
SHARES = {"mobilenet_v2": 1.0, "resnet18": 1.0, "minilm": 0.95, "llama_decode": 0.95}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_equal_to_onnx_runtime(name: str) -> None:
    torch.manual_seed(0)
    found = measured(NETWORKS[name]())
    assert found["difference"] == 0
    assert found["macs"] >= SHARES.get(name, 0.9)
    assert 0 < found["utilization"] <= 1
