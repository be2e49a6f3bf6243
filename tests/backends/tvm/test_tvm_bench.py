"""``netlathe bench`` with an artifact for TVM beside a file for ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from netlathe.cli import main

pytest.importorskip("tvm", reason="the tvm extra is not installed")

MODEL = """<ir_version: 10, opset_import: ["" : 25]>
one (float[n, 20] x) => (float[n, 20] y) { y = Relu(x) }"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model and its artifact for TVM."""
    folder: Path = tmp_path_factory.mktemp("bench")
    model, out = str(folder / "model.onnx"), str(folder / "out")
    ir.save(ir.from_onnx_text(MODEL), model)
    assert main(["compile", model, "--passes", "", "--target", "tvm-x86", "-o", out]) == 0
    return model, out


def test_both_runtimes_in_turn(made: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", *made, "--rounds", "3", "--threads", "1", "--dims", "n=5", "--json"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [row["runtime"] for row in rows] == ["ONNX Runtime", "TVM"]
    assert [row["dims"] for row in rows] == [{"n": 5}] * 2
    assert rows[0]["ratio"] == 1.0 and rows[1]["median_ms"] > 0


def test_alone_nobody_knows_its_inputs(
    made: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", made[1], "--rounds", "3"]) == 2
    assert "name the model it was made from too" in capsys.readouterr().err


def test_of_another_model(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.onnx"
    ir.save(ir.from_onnx_text(MODEL.replace("20", "21")), other)
    words = ["bench", str(other), made[1], "--rounds", "3", "--threads", "1"]
    assert main(words) == 2
    assert "axis 1 of input 'x' is 21, not 20" in capsys.readouterr().err
