"""compile and plan: what they write, show, and say in JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from netlathe.cli import depfile
from netlathe.diagnostics import InputError
from tests.cli.conftest import Run, network, tree

PASSES = 'fold_batch_norm, quantize(weights="int8", min_size=600)'  # leaves the convolution


def results(path: Path, rows: int = 3) -> np.ndarray:
    """What plain ONNX Runtime makes of a file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((rows, 4, 8, 8)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


def test_compile_writes_a_model_that_runs_elsewhere(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compile", model, "--passes", PASSES, "-o", out, "--opset", 19)
    assert (done.code, done.err.count("error")) == (0, 0)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.onnx"]
    proto = onnx.load(str(out / "model.onnx"))
    assert proto.opset_import[0].version == 19
    assert not [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    assert [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    expected = results(model)
    assert np.abs(results(out / "model.onnx") - expected).max() < 0.05 * np.abs(expected).max()
    # the table: every pass, what it did, cost, loss, and what it was checked against
    for text in ("captured", "fold_batch_norm", "quantize", "compiled / captured"):
        assert text in done.out
    assert "cosine 0.9" in done.out and "to the simulated reference" in done.out
    assert f"{out / 'model.onnx'}" in done.out and "run with optimizations off" in done.out
    assert "running fold_batch_norm" in done.err  # progress is not in the way of a pipe


def test_json_says_everything_that_the_manifest_holds(
    run: Run, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("compile", model, "--passes", PASSES, "-o", out, "--json", "--seed", 3)
    assert done.code == 0
    said = done.json
    assert said.pop("output") == str(out)
    assert said == json.loads((out / "manifest.json").read_text())
    assert said["compilation"]["seed"] == 3
    assert said["compilation"]["steps"][0]["pass"] == "fold_batch_norm"
    file = said["artifact"]["files"]["model.onnx"]
    assert file["sha256"] == hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest()


def test_the_same_command_gives_the_same_bytes(run: Run, model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("compile", model, "--passes", PASSES, "-o", tmp_path / name).code == 0
    a, b = ((tmp_path / name / "model.onnx").read_bytes() for name in ("a", "b"))
    assert a == b


def test_verbose_shows_time_memory_and_every_candidate(
    run: Run, model: Path, tmp_path: Path
) -> None:
    brief = run("compile", model, "--passes", PASSES, "-o", tmp_path / "a")
    full = run("compile", model, "--passes", PASSES, "-o", tmp_path / "b", "-v")
    assert "peak memory" not in brief.out and "peak memory" in full.out
    assert "skipped" in full.out and full.out.count("\n") > brief.out.count("\n")


def test_passes_see_calibration_data(run: Run, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((20, 4, 8, 8), "f4"))
    out = tmp_path / "out"
    words = ("--passes", PASSES, "--calibration", tmp_path / "data.npz", "-o", out)
    done = run("compile", model, *words, "--json")
    assert done.json["compilation"]["calibration"]["feeds"] == 3
    assert done.json["compilation"]["steps"][1]["loss"]["data"] == "calibration"


def test_no_verify_says_so(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("compile", model, "--passes", PASSES, "-o", tmp_path / "out", "--no-verify")
    assert done.code == 0 and "to the simulated reference" not in done.out
    steps = json.loads((tmp_path / "out" / "manifest.json").read_text())["compilation"]["steps"]
    assert {step["check"]["against"] for step in steps} == {"nothing"}


def test_default_settings_are_told_of_where_they_round(
    run: Run, model: Path, tmp_path: Path
) -> None:
    """ONNX Runtime rounds what is multiplied by a quantized matrix, and not what meets a convolution."""
    options = f'weights="int8", min_size=500, ignore={["head.up", "head.down"]}'
    done = run("compile", model, "--passes", f"quantize({options})", "-o", tmp_path / "a")
    assert "1 applied" in done.out and "default settings" not in done.out
    done = run("compile", model, "--passes", "quantize(min_size=500)", "-o", tmp_path / "b")
    assert "run with default settings" in done.out


def test_no_passes_at_all_is_a_conversion(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("compile", model, "--passes", "", "-o", tmp_path / "out", "--opset", 17).code == 0
    expected = results(model)
    error = np.abs(results(tmp_path / "out" / "model.onnx") - expected).max()
    assert error <= 1e-5 * np.sqrt(np.mean(expected**2)) * 10  # optimizations on


def test_a_compiled_folder_is_a_model(run: Run, model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("compile", model, "--passes", "fold_batch_norm", "-o", first).code == 0
    done = run("compile", first, "--passes", 'quantize(weights="int8")', "-o", second)
    assert done.code == 0 and (second / "model.onnx").is_file()


def test_dims_decide_what_macs_are_shown(run: Run, model: Path) -> None:
    macs = [
        run("plan", model, "--passes", "", "--dims", f"batch={n}", "--json").json["captured"][
            "macs"
        ]
        for n in (1, 5)
    ]
    assert macs[1] == 5 * macs[0]


# -- recipes --------------------------------------------------------------------------------------


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_says_the_same(run: Run, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 4, 8, 8), np.float32))
    file = recipe(
        tmp_path,
        """
        passes: [fold_batch_norm, {quantize: {weights: int8}}]
        calibration: data.npz
        settings: {opset: 20}
        seed: 5
        """,
    )
    done = run("compile", model, "--recipe", file, "-o", tmp_path / "out", "--json")
    compilation = done.json["compilation"]
    assert [p["name"] for p in compilation["passes"]] == ["fold_batch_norm", "quantize"]
    assert (compilation["seed"], compilation["calibration"]["feeds"]) == (5, 1)
    assert onnx.load(str(tmp_path / "out" / "model.onnx")).opset_import[0].version == 20


def test_the_command_line_wins_over_the_recipe(run: Run, model: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, "passes: [fold_batch_norm]\nsettings: {opset: 20}\nseed: 5\n")
    words = ("--recipe", file, "-o", tmp_path / "out", "--json", "--seed", 7, "--opset", 21)
    done = run("compile", model, *words)
    assert done.json["compilation"]["seed"] == 7
    assert done.json["compilation"]["target"]["settings"]["opset"] == 21


# -- plan -----------------------------------------------------------------------------------------


def test_plan_touches_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    done = run("plan", model, "--passes", PASSES)
    assert done.code == 0 and tree(tmp_path) == before
    assert "fold_batch_norm: 1 applied" in done.out and "/stem" not in done.err
    said = run("plan", model, "--passes", PASSES, "--json").json
    assert said["steps"][0]["pass"] == "fold_batch_norm"
    assert said["steps"][1]["after"]["bytes"] < 0.5 * said["captured"]["bytes"]
    statuses = {entry["status"] for step in said["steps"] for entry in step["ledger"]}
    assert "applied" in statuses


# -- depfiles -------------------------------------------------------------------------------------


def test_a_depfile_names_everything_that_was_read(run: Run, external: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 4, 8, 8), np.float32))
    file = recipe(tmp_path, "passes: [fold_batch_norm]\ncalibration: data.npz\n")
    out = tmp_path / "out"
    words = ("--recipe", file, "-o", out, "--depfile", tmp_path / "out.d")
    assert run("compile", external, *words).code == 0
    target, *sources = (tmp_path / "out.d").read_text().replace("\\\n", " ").split()
    assert target == f"{out / 'model.onnx'}:"
    data = external.parent / "network.data"
    assert sources == sorted(map(str, [external, data, file, tmp_path / "data.npz"]))


NAMES = ["plain", "two words", "#hash", "dollar$", "back\\slash", "end\\ space", "tab\tname", "ä"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_reads_names_as_they_are(tmp_path: Path) -> None:
    """GNU make takes the target for old exactly when a source is newer."""
    for name in NAMES:
        folder = tmp_path / str(NAMES.index(name))
        folder.mkdir()
        (folder / name).write_text("")
        (folder / "out").write_text("")
        depfile.write(folder / "d", Path("out"), [Path(name)])
        (folder / "Makefile").write_text("all: out\nout:\n\t@echo made\ninclude d\n")
        said = []
        for later in (-10, 10):
            stat = (folder / "out").stat()
            times = (stat.st_mtime + later, stat.st_mtime + later)
            os.utime(folder / name, times)
            done = subprocess.run(
                ["make", "-C", str(folder), "--no-print-directory"], capture_output=True, text=True
            )
            said.append((done.returncode, "made" in done.stdout))
        assert said == [(0, False), (0, True)], name


@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
def test_ninja_reads_names_as_they_are(tmp_path: Path) -> None:
    names = [name for name in NAMES if name not in ("tab\tname", "end\\ space")]  # not ninja's
    for name in names:
        (tmp_path / name).write_text("")
    depfile.write(tmp_path / "d", Path("out"), [Path(name) for name in names])
    (tmp_path / "build.ninja").write_text(
        "rule r\n  command = cp d copy.d && touch out\n  depfile = copy.d\n  deps = gcc\n"
        "build out: r\n"
    )
    ninja = ["ninja", "-C", str(tmp_path)]
    subprocess.run(ninja, check=True, capture_output=True)
    done = subprocess.run([*ninja, "-t", "deps", "out"], check=True, capture_output=True, text=True)
    assert {line.strip() for line in done.stdout.splitlines()[1:] if line.strip()} == set(names)


def test_a_name_that_no_depfile_can_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot hold"):
        depfile.write(tmp_path / "d", Path("out"), [Path("a\nb")])
    assert not (tmp_path / "d").exists()


def test_an_impossible_depfile_is_refused_before_the_work(
    run: Run, model: Path, tmp_path: Path
) -> None:
    words = ("compile", model, "--passes", "", "-o", tmp_path / "out")
    for place in (tmp_path, tmp_path / "absent" / "d"):
        done = run(*words, "--depfile", place)
        assert done.code == 2 and "depfile.path" in done.err
        assert not (tmp_path / "out").exists()


def test_weights_of_the_test_network_are_not_degenerate() -> None:
    assert len({tensor.SerializeToString() for tensor in network().graph.initializer}) == 9


def test_a_program_of_torch_is_a_model_too(run: Run, tmp_path: Path) -> None:
    """Every command takes a .pt2 file; what is said of files on disk is of ONNX files alone."""
    program, out, deps = tmp_path / "net.pt2", tmp_path / "out", tmp_path / "out.d"
    module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    dims = ({0: torch.export.Dim("batch")},)
    saved = torch.export.export(module.eval(), (torch.ones(4, 32),), dynamic_shapes=dims)
    torch.export.save(saved, program)
    passes = 'quantize(weights="int8")'
    done = run("compile", program, "--passes", passes, "-o", out, "--depfile", deps)
    assert (done.code, "1 applied" in done.out) == (0, True), done.err
    assert str(program) in deps.read_text().split()
    source = json.loads((out / "manifest.json").read_text())["compilation"]["source"]
    assert (source["frontend"], list(source["files"])) == ("torch_program", ["net.pt2"])
    done = run("verify", program, "--against", program)
    assert done.code == 0 and "ONNX checker" not in done.out
    done = run("bench", program, out, "--rounds", 3)
    assert done.code == 0 and str(program) in done.out
    program.write_bytes(program.read_bytes()[:-400])
    done = run("compile", program, "--passes", passes, "-o", out, "--overwrite")
    assert done.code == 2 and "torch.program" in done.err and str(program) in done.err
    assert (out / "model.onnx").is_file()


def test_a_program_that_was_written_is_a_model_too(run: Run, model: Path, tmp_path: Path) -> None:
    """It brings no example inputs along, which would be a pickle: they are made up."""
    out = tmp_path / "out"
    assert run("compile", model, "--passes", "", "--target", "torch", "-o", out).code == 0
    done = run("verify", out, "--against", model)
    assert done.code == 0, done.err
