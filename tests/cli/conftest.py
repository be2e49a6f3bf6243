"""Running commands in this process, and small models to run them on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from netlathe.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind on its two streams, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command with words; paths may be among them."""
    monkeypatch.setenv("COLUMNS", "400")  # no line of a table is folded

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its contents, and every folder; hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"(folder)"
        for path in folder.rglob("*")
    }


def network(width: int = 16) -> onnx.ModelProto:
    """x [batch, 4, 8, 8] -> Conv, BatchNormalization, Relu, mean, two linear layers -> y [batch, 10]."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))

    weights = {
        "conv": normal(width, 4, 3, 3) / 3,
        "scale": 1 + normal(width) / 2,
        "shift": normal(width),
        "mean": normal(width),
        "var": np.abs(normal(width)) + np.float32(0.5),
        "w1": normal(width, 64),
        "b1": normal(64),
        "w2": normal(64, 10),
        "axes": np.asarray([2, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["c"], "/stem/conv", pads=[1, 1, 1, 1]),
        helper.make_node(
            "BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"], "/stem/norm"
        ),
        helper.make_node("Relu", ["n"], ["r"], "/stem/act"),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"], "/pool", keepdims=0),
        helper.make_node("MatMul", ["m", "w1"], ["h0"], "/head/up/MatMul"),
        helper.make_node("Add", ["h0", "b1"], ["h1"], "/head/up/Add"),
        helper.make_node("Relu", ["h1"], ["h2"], "/head/act"),
        helper.make_node("MatMul", ["h2", "w2"], ["y"], "/head/down/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """:func:`network` in a folder of its own."""
    path = tmp_path / "models" / "network.onnx"
    path.parent.mkdir()
    onnx.save_model(network(), str(path))
    return path


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """The same with its weights in network.data beside it."""
    path = tmp_path / "external" / "network.onnx"
    path.parent.mkdir()
    onnx.save_model(
        network(),
        str(path),
        save_as_external_data=True,
        location="network.data",
        size_threshold=0,
    )
    return path
