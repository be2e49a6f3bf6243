"""Manifests: the same bytes from the same inputs, another digest from any other, no place or time."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import netlathe
from netlathe.ir import weights
from netlathe.passes.prune import Prune
from netlathe.pipeline import manifest, run
from netlathe.pipeline.fingerprint import feeds_digest, graph_digest, weights_digest
from netlathe.pipeline.inputs import describe_pass
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Pass
from tests.ir.onnx_text import matrix, model
from tests.pipeline.toy import Balance, Cut, ReluToMax, captured_of, find, mlp, set_weight

PASSES = (ReluToMax(), Cut(count=2), Balance(factor=2.0))


def onnx_file(folder: Path) -> Path:
    """The toy as an ONNX file with its weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = ir.to_proto(mlp().model)
    file = folder / "toy.onnx"
    onnx.save(proto, file, save_as_external_data=True, location="toy.data", size_threshold=0)
    return file


def built(*passes: Pass, seed: int = 0, **context: Any) -> dict[str, Any]:
    compiled = run.run(mlp(), passes or PASSES, Context(seed=seed, **context))
    return manifest.build(compiled)


# -- reproducible ---------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes() -> None:
    first, second = built(), built()
    assert first["digest"] == second["digest"] == manifest.digest(first["compilation"])
    assert json.dumps(first["compilation"]) == json.dumps(second["compilation"])
    assert [t["pass"] for t in first["timings"]] == [str(p) for p in PASSES]


def test_two_runs_from_other_places_write_the_same_files(tmp_path: Path) -> None:
    files: dict[str, list[bytes]] = {}
    for number in (1, 2):
        source = onnx_file(tmp_path / f"place{number}")
        out = tmp_path / f"out{number}"
        compiled = netlathe.compile(source, [ReluToMax(), Balance(factor=2.0)])
        compiled.save(out)
        for file in out.iterdir():
            files.setdefault(file.name, []).append(file.read_bytes())
    first, second = files["model.onnx"]
    assert first == second
    one, two = (json.loads(text) for text in files["manifest.json"])
    assert one["compilation"] == two["compilation"] and one["artifact"] == two["artifact"]


def test_everything_that_matters_is_in_the_digest() -> None:
    base = built()["digest"]
    feeds = {"x": matrix(2, 6)}
    others = [
        built(ReluToMax(), Cut(count=3), Balance(factor=2.0)),
        built(ReluToMax(), Cut(count=2), Balance(factor=4.0)),
        built(*PASSES[:2]),
        built(*PASSES, seed=1),
        built(*PASSES, calibration=[feeds]),
        built(*PASSES, calibration=[{"x": feeds["x"] + 1}]),
    ]
    assert len({base, *(other["digest"] for other in others)}) == 1 + len(others)


def test_no_time_and_no_place_is_digested(tmp_path: Path) -> None:
    source = onnx_file(tmp_path / "somewhere")
    compiled = netlathe.compile(source, [Cut(count=1)])
    text = json.dumps(manifest.build(compiled)["compilation"])
    assert str(tmp_path) not in text and os.sep + "tmp" not in text and "seconds" not in text
    assert "toy.onnx" in text and "toy.data" in text


def test_json_data_survives_a_round_trip() -> None:
    data = built()
    assert json.loads(json.dumps(data, allow_nan=False))["digest"] == data["digest"]
    assert manifest.digest(json.loads(json.dumps(data))["compilation"]) == data["digest"]


# -- complete -------------------------------------------------------------------------------------


def test_what_a_manifest_tells(tmp_path: Path) -> None:
    source = onnx_file(tmp_path)
    compiled = netlathe.compile(source, PASSES, seed=5, target="onnx")
    data = manifest.build(compiled, compiled.context.target)["compilation"]
    versions = data["versions"]
    assert versions["netlathe"] == netlathe.__version__ and versions["onnx"] == onnx.__version__
    assert "torch" not in versions  # nothing of it was used
    assert data["source"]["files"] == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("toy.data", "toy.onnx")
    }
    assert data["source"]["frontend"] == "onnx_file" and data["source"]["dynamic"] == {"batch": 2}
    assert data["source"]["weights"] == weights_digest(compiled.dense)
    assert data["pipeline"] == "relu_to_max, cut, balance(factor=2.0)"
    assert data["passes"][1] == {
        "name": "cut",
        "version": 1,
        "from": "tests.pipeline.toy",
        "exactness": "lossy",
        "options": {"count": 2, "side": "last"},
    }
    assert data["seed"] == 5 and data["calibration"] is None
    assert data["target"]["name"] == "onnx" and data["target"]["settings"]["opset"] == 24
    cut = data["steps"][1]
    assert cut["ledger"][0]["detail"] == {"keep": [0, 1, 2, 3, 4, 5]}
    assert cut["check"]["against"] == "simulated reference"
    assert 0 < cut["loss"]["cosine"] < 1 and cut["loss"]["by_output"]["y"]["kl"] is None
    assert cut["cost"]["before"]["params"] > cut["cost"]["after"]["params"]
    assert data["result"]["graph"] == graph_digest(compiled.model)
    assert any("equal to the original" in entry["reason"] for entry in data["capture"])


def test_an_artifact_is_described_and_carries_the_digest(tmp_path: Path) -> None:
    source = onnx_file(tmp_path / "in")
    netlathe.compile(source, PASSES).save(tmp_path / "out", opset=20)
    data = json.loads((tmp_path / "out" / "manifest.json").read_text())
    file = tmp_path / "out" / "model.onnx"
    assert data["artifact"]["files"]["model.onnx"] == {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert data["artifact"]["report"]["opset"] == 20
    proto = onnx.load(file)
    stamps = {p.key: p.value for p in proto.metadata_props}
    assert stamps["netlathe.manifest"] == data["digest"]


# -- digests --------------------------------------------------------------------------------------


def test_digests_see_what_they_cover() -> None:
    base = mlp().model
    same = mlp().model
    assert graph_digest(base) == graph_digest(same) and weights_digest(base) == weights_digest(same)
    scaled = mlp().model
    set_weight(scaled, "bias", weights.array(scaled.graph.initializers["bias"]) * 2)
    assert graph_digest(scaled) == graph_digest(base)
    assert weights_digest(scaled) != weights_digest(base)
    for change in (
        lambda m: setattr(find(m, "r"), "op_type", "Elu"),
        lambda m: find(m, "r").attributes.add(ir.AttrFloat32("alpha", 0.5)),
        lambda m: find(m, "y").replace_input_with(1, find(m, "r").outputs[0]),
        lambda m: setattr(find(m, "h").outputs[0], "name", "other"),
        lambda m: m.graph.outputs.pop(),
    ):
        changed = mlp().model
        change(changed)
        assert graph_digest(changed) != graph_digest(base)
        assert weights_digest(changed) == weights_digest(base)


def test_digests_look_into_subgraphs_and_tensor_attributes() -> None:
    def branch(value: float) -> ir.Model:
        return model(
            "float[b,3] x, bool c",
            "float y",
            "y = If(c) <then_branch = t () => (float[b,3] u) { u = Relu(x) },"
            f" else_branch = e () => (float[b,3] v) {{ k = Constant<value = float {{{value}}}>()"
            " v = Mul(x, k) }>",
        )

    assert graph_digest(branch(1.0)) == graph_digest(branch(1.0)) != graph_digest(branch(2.0))


def test_feeds_digest() -> None:
    feeds = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "s": np.array(["x", "y"])}
    base = feeds_digest(feeds)
    assert base == feeds_digest(dict(reversed(feeds.items())))
    for name, array in (
        ("a", feeds["a"].reshape(3, 2)),
        ("a", feeds["a"].astype(np.int32)),
        ("s", np.array(["x", "z"])),
    ):
        other = copy.copy(feeds)
        other[name] = array
        assert feeds_digest(other) != base


def test_source_files_of_a_folder(tmp_path: Path) -> None:
    onnx_file(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not read")
    captured = captured_of(mlp().model, str(tmp_path))
    captured.files = {"vocab.txt": tmp_path / "vocab.txt"}
    names = [file.name for file in manifest.source_files(captured)]
    assert names == ["config.json", "vocab.txt"]
    shutil.rmtree(tmp_path)
    assert [f.name for f in manifest.source_files(captured)] == ["vocab.txt"]


@pytest.mark.parametrize("option", ["count", "side"])
def test_option_values_are_json(option: str) -> None:
    assert option in json.loads(json.dumps(Cut().option_values()))


def test_arrays_of_an_entry_are_told_by_digest() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = Entry("w", "applied", "solved", arrays={"q": array}).to_json()["arrays"]["q"]
    assert data == {
        "dtype": "float32",
        "shape": [2, 3],
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }
    assert json.dumps(data)


def test_files_that_a_pass_reads_are_told_by_digest(tmp_path: Path) -> None:
    table = tmp_path / "times.csv"
    table.write_text("candidate,width,ms\n")
    pass_ = Prune(latency=1.0, table=str(table))
    first = describe_pass(pass_)
    assert first["files"] == [hashlib.sha256(table.read_bytes()).hexdigest()]
    table.write_text("candidate,width,ms\nffn,8,1.0\n")
    assert describe_pass(pass_) != first
    table.unlink()
    assert describe_pass(pass_)["files"] == [None]
    assert "files" not in describe_pass(Prune(ratio=0.5))
