"""``netlathe bench`` with an artifact for TVM beside a file for ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from netlathe.cli import main

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm import runtime

MODEL = """<ir_version: 10, opset_import: ["" : 25]>
one (float[n, 20] x) => (float[n, 20] y) <float[20, 20] w = {WEIGHTS}> {
    m = MatMul(x, w)
    y = Relu(m)
}""".replace("WEIGHTS", ", ".join(["0.5"] * 400))


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
    for row in rows:  # the artifact knows its own work
        assert row["roofline"]["float_macs"] == 5 * 20 * 20 and row["roofline"]["byte_macs"] == 0
        assert row["roofline"]["bytes"] == 4 * 20 * 20


def test_what_is_shown(made: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", *made, "--rounds", "3", "--warmup", "1", "--threads", "1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("of roofline", "3 rounds after 1 of warm-up, 1 thread"))
    assert all(word in said for word in ("GFLOP/s in float32", "GOP/s of bytes", "GB/s"))


def test_an_artifact_that_does_not_know_its_work(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those that were compiled before it was written down: no share is shown."""
    folder = tmp_path / "old"
    shutil.copytree(made[1], folder)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["work"]
    (folder / "meta.json").write_text(json.dumps(meta))
    words = ["bench", made[0], str(folder), "--rounds", "3", "--threads", "1", "--json"]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert rows[0]["roofline"] is not None and rows[1]["roofline"] is None


def test_a_damaged_artifact(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(made[1], folder)
    (folder / "model.so").write_bytes(b"")
    assert main(["bench", made[0], str(folder), "--rounds", "3"]) == 2
    assert "bench.artifact" in capsys.readouterr().err


def test_alone_nobody_knows_its_inputs(
    made: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", made[1], "--rounds", "3"]) == 2
    assert "name the model it was made from too" in capsys.readouterr().err


def test_of_another_model(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.onnx"
    ir.save(
        ir.from_onnx_text(
            MODEL.replace("20] x", "21] x")
            .replace("[20, 20] w", "[21, 20] w")
            .replace("{0.5", "{" + "0.5, " * 20 + "0.5")
        ),
        other,
    )
    words = ["bench", str(other), made[1], "--rounds", "3", "--threads", "1"]
    assert main(words) == 2
    assert "axis 1 of input 'x' is 21, not 20" in capsys.readouterr().err


def test_an_artifact_alone_takes_the_inputs_of_a_model(
    made: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", made[1], "--inputs-of", made[0], "--rounds", "3", "--threads", "1"]
    assert main([*words, "--dims", "n=5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (row,) = said["models"]
    assert row["runtime"] == "TVM" and row["dims"] == {"n": 5} and row["tokens_per_s"] is None
    assert list(said["ceilings"]) == ["CPU"]


@pytest.mark.skipif(not runtime.gpu_lack(["sm_90a"]), reason="there is a GPU")
def test_an_artifact_for_a_gpu_that_is_not_there(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gpu"
    shutil.copytree(made[1], folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["archs"] = ["sm_90a"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert main(["bench", str(folder), "--inputs-of", made[0], "--rounds", "3"]) == 2
    said = capsys.readouterr().err
    assert "bench.artifact" in said and "driver" in said and str(folder) in said
