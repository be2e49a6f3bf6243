"""inspect, verify, diff, bench, passes and targets: what they find, show, and say in JSON."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from rich.console import Console

from netlathe.cli import render
from tests.cli.conftest import Outcome, Run, tree

QUANTIZE = 'quantize(weights="int8", min_size=600)'


@pytest.fixture
def small(run: Run, model: Path, tmp_path: Path) -> Path:
    """The model with its batch norm folded and two weights in int8."""
    done = run("compile", model, "--passes", f"fold_batch_norm, {QUANTIZE}", "-o", tmp_path / "out")
    assert done.code == 0
    return tmp_path / "out"


def row(done: Outcome, *words: str) -> str:
    """The one line of stdout that holds all words."""
    (found,) = [line for line in done.out.splitlines() if all(word in line for word in words)]
    return found


# -- inspect --------------------------------------------------------------------------------------


def test_inspect_shows_what_is_there(run: Run, model: Path) -> None:
    done = run("inspect", model, "--dims", "batch=3")
    assert done.code == 0
    assert row(done, "input", "x").split() == ["input", "x", "float", "[batch,4,8,8]"]
    assert row(done, "MatMul").split() == ["MatMul", "2"]
    # conv 16*4*3*3 weights at 8*8 places, linear layers 16*64 and 64*10; 3 samples
    macs = 3 * (16 * 4 * 9 * 64 + 16 * 64 + 64 * 10)
    assert f"{macs / 1e3:.2f} k MACs at batch=3" in done.out
    assert row(done, "head.up").split()[:3] == ["head.up", "1.09", "k"]  # 16 * 64 + 64


def test_a_name_of_a_hub_is_told_how_to_get(run: Run) -> None:
    done = run("inspect", "no-such-organisation/model")
    assert done.code == 2
    assert "hf download no-such-organisation/model --local-dir model" in done.err


def test_inspect_takes_dims_as_fixed(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("inspect", model, "--fix-dims", "batch=3")
    assert row(done, "input", "x").split() == ["input", "x", "float", "[3,4,8,8]"]
    refused = run("inspect", tmp_path, "--fix-dims", "batch=3")
    assert refused.code == 2 and "--fix-dims is for an ONNX file" in refused.err


@pytest.mark.parametrize("width", [20, 30, 79])
def test_nothing_is_cut_off_where_it_is_narrow(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = run("compile", model, "--passes", QUANTIZE, "-o", tmp_path / "out")
    assert done.code == 0 and "\N{HORIZONTAL ELLIPSIS}" not in done.out


def test_inspect_in_json_says_the_same(run: Run, model: Path) -> None:
    before = tree(model.parent)
    said = run("inspect", model, "--json", "--ir").json
    assert said["inputs"] == [{"name": "x", "dtype": "float", "shape": "[batch,4,8,8]"}]
    assert said["ops"]["Relu"] == 2 and said["dims"] == {"batch": 2}
    assert said["weights"]["float"]["bytes"] == 4 * sum(
        int(np.prod(t.dims)) for t in onnx.load(str(model)).graph.initializer if t.name != "axes"
    )
    assert said["params"] == sum(m["params"] for m in said["modules"].values())
    assert {"capture", "opset"} <= {entry["candidate"] for entry in said["capture"]}
    assert "y = MatMul(" in said["ir"]
    assert tree(model.parent) == before


def test_inspect_prints_the_graph(run: Run, model: Path) -> None:
    done = run("inspect", model, "--ir")
    assert done.out.startswith("input   x: f32[batch,4,8,8]")
    assert "-- stem" in done.out and done.out.rstrip().endswith("output  y: f32[batch,10]")


def test_modules_are_summed_to_fit_a_screen(run: Run, tmp_path: Path) -> None:
    nodes, weights = [], []
    for i in range(60):
        name = f"/layers.{i}/fc/MatMul"
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], name))
        weights.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), f"w{i}"))
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4])
        for name in ("h0", "h60")
    ]
    graph = helper.make_graph(nodes, "deep", ends[:1], ends[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(made, str(tmp_path / "deep.onnx"))
    brief, full = (run("inspect", tmp_path / "deep.onnx", *more) for more in ((), ("-v",)))
    assert row(brief, "layers").split()[:2] == ["layers", "960"]
    assert len([line for line in full.out.splitlines() if line.startswith("layers.")]) == 60


# -- verify ---------------------------------------------------------------------------------------


def test_verify_runs_every_check(run: Run, model: Path) -> None:
    done = run("verify", model)
    assert done.code == 0 and "FAILED" not in done.out
    said = run("verify", model, "--json").json
    assert [check["name"] for check in said["checks"]] == [
        "capture",
        "structure, types and shapes",
        "ONNX checker",
        "ONNX Runtime, optimizations off",
        "ONNX Runtime, optimizations on",
    ]
    assert {check["passed"] for check in said["checks"]} == {True}
    assert (said["errors"], said["exit_code"]) == ([], 0)


def claim_another_width(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11


def test_a_claim_that_does_not_hold_fails_a_gate(run: Run, model: Path) -> None:
    proto = onnx.load(str(model))
    claim_another_width(proto)
    onnx.save_model(proto, str(model))
    done = run("verify", model)
    assert done.code == 1 and "error[" in done.err
    said = run("verify", model, "--json")
    assert said.code == 1 and said.json["exit_code"] == 1 and said.json["errors"]


def test_verify_against_itself_and_a_folded_one(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("compile", model, "--passes", "fold_batch_norm", "-o", tmp_path / "folded").code == 0
    done = run("verify", tmp_path / "folded", "--against", model)
    assert done.code == 0 and "passed" in row(done, "equal to /")


def test_a_lossy_model_is_equal_within_a_tolerance_only(run: Run, model: Path, small: Path) -> None:
    done = run("verify", small, "--against", model)
    assert done.code == 1
    assert "FAILED" in row(done, "equal to /") and "error[verify.differs]" in done.err
    assert "verify.first_difference" in done.err  # by name, in terms of the first model
    assert run("verify", small, "--against", model, "--tolerance", 0.2).code == 0


def change_a_weight(proto: onnx.ModelProto) -> None:
    old = proto.graph.initializer[7]
    array = numpy_helper.to_array(old) * np.float32(1.5)
    proto.graph.initializer[7].CopyFrom(numpy_helper.from_array(array, old.name))


def rename_the_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "z"


def edited(model: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(str(model))
    change(proto)
    path = model.with_name("edited.onnx")
    onnx.save_model(proto, str(path))
    return path


def test_the_first_difference_is_named(run: Run, model: Path) -> None:
    done = run("verify", edited(model, change_a_weight), "--against", model)
    assert done.code == 1 and "differs: 'y'" in done.err and "y = MatMul(" in done.err


def test_another_shape_is_named(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("compile", model, "--passes", "prune(ratio=0.5)", "-o", tmp_path / "out").code == 0
    done = run("verify", tmp_path / "out", "--against", model)
    assert done.code == 1 and "'c', of shape [batch,8,8,8] for [batch,16,8,8]" in done.err


def test_other_outputs_are_not_equal(run: Run, model: Path) -> None:
    done = run("verify", edited(model, rename_the_output), "--against", model)
    assert done.code == 1 and "error[verify.outputs]" in done.err


@pytest.fixture
def held(run: Run, model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model that its graph holds at a batch of 1, though it declares any; and what is made of it."""

    def hold(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        graph.initializer.append(numpy_helper.from_array(np.zeros((1, 10), np.float32), "zeros"))
        graph.node[-1].output[0] = "inner"
        graph.node.append(helper.make_node("Concat", ["inner", "zeros"], ["y"], axis=1))
        graph.output[0].type.tensor_type.shape.dim[1].dim_value = 20

    path = edited(model, hold)
    out = tmp_path / "out"
    assert run("compile", path, "--passes", "", "--fix-dims", "batch=1", "-o", out).code == 0
    return path, out


def test_what_has_fixed_dims_is_compared_with_its_original(
    run: Run, held: tuple[Path, Path]
) -> None:
    original, out = held
    fix = ("--fix-dims", "batch=1")
    for words in (
        ("verify", out, "--against", original, *fix),
        ("diff", original, out, *fix),
        ("bench", original, out, *fix, "--rounds", 3),
        ("bench", out, "--inputs-of", original, *fix, "--rounds", 3),
    ):
        done = run(*words)
        assert done.code == 0, done.err
    done = run("verify", out, "--against", original, "--fix-dims", "bach=1")
    assert done.code == 2 and "dims.unknown" in done.err and "did you mean batch" in done.err
    assert str(original) in done.err and str(out) in done.err
    assert run("verify", out, "--fix-dims", "batch=1").code == 2  # it has no such dim any more


def test_sizes_go_to_the_models_that_have_such_dims(run: Run, model: Path, tmp_path: Path) -> None:
    """Of a program its capture tells which dims it has."""
    program = tmp_path / "program"
    words = ("compile", model, "--passes", "", "--target", "torch", "-o", program)
    assert run(*words).code == 0
    done = run("diff", program, model, "--dims", "batch=3")
    assert done.code == 0 and "(MACs at batch=3)" in done.out
    done = run("diff", program, model, "--dims", "bach=3")
    assert done.code == 2 and "did you mean batch" in done.err


# -- diff -----------------------------------------------------------------------------------------


def test_diff_of_a_model_with_itself_is_empty(run: Run, model: Path) -> None:
    said = run("diff", model, model, "--json").json
    assert (said["nodes"], said["weights"]) == ([], [])
    assert said["outputs"][0]["error"] == 0.0 and said["cost"][0] == said["cost"][1]
    done = run("diff", model, model)
    assert done.code == 0 and "nodes: no change" in done.out and "weights: no change" in done.out


def test_diff_shows_what_compiling_changed(run: Run, model: Path, small: Path) -> None:
    done = run("diff", model, small, "-v")
    assert done.code == 0
    assert row(done, "BatchNormalization", "-1").split() == ["BatchNormalization", "1", "0", "-1"]
    said = run("diff", model, small, "--json").json
    assert said["cost"][1]["bytes"] < said["cost"][0]["bytes"]
    assert 0 < said["outputs"][0]["error"] < 0.2 and said["outputs"][0]["cosine"] > 0.99
    kinds = {change["name"]: change["kind"] for change in said["weights"]}
    assert kinds["w1"] in ("removed", "changed")


def test_diff_sees_a_changed_weight(run: Run, model: Path) -> None:
    said = run("diff", model, edited(model, change_a_weight), "--json").json
    assert [(c["kind"], c["name"]) for c in said["weights"]] == [("changed", "w2")]
    assert said["weights"][0]["b"] == "other values" and said["nodes"] == []
    assert said["outputs"][0]["error"] > 0.1


def test_diff_without_a_shared_output_says_so(run: Run, model: Path) -> None:
    done = run("diff", model, edited(model, rename_the_output))
    assert done.code == 0 and "not compared: they share no output" in done.out


# -- bench ----------------------------------------------------------------------------------------


def test_bench_measures_in_turn(run: Run, model: Path, small: Path) -> None:
    words = ("bench", model, small, "--rounds", 3, "--warmup", 0, "--threads", 1)
    done = run(*words, "--dims", "batch=4")
    assert done.code == 0 and "batch=4" in row(done, str(small))
    assert row(done, str(model)).split()[-7] == "1.00"
    said = run(*words, "--json").json
    assert said["warmup"] == 0 and all(rate > 0 for rate in said["ceilings"]["CPU"].values())
    assert [one["tokens_per_s"] for one in said["models"]] == [None, None]  # it reads no tokens
    for one in said["models"]:
        bound = one["roofline"]
        assert bound["share"] == bound["least_ms"] / one["median_ms"] > 0
        assert bound["bound_by"] in ("arithmetic", "memory")
    first, second = said["models"]
    assert (said["threads"], said["rounds"], first["ratio"]) == (1, 3, 1.0)
    assert second["ratio"] == second["median_ms"] / first["median_ms"]
    assert first["low_ms"] <= first["median_ms"] <= first["high_ms"]


def test_bench_takes_the_same_model_twice(run: Run, model: Path) -> None:
    done = run("bench", model, model, "--rounds", 3)
    assert done.code == 0 and "(2)" in done.out


@pytest.fixture
def artifact(run: Run, model: Path, tmp_path: Path) -> Path:
    """A folder as a target writes it whose artifacts hold no graph."""
    out = tmp_path / "artifact"
    assert run("compile", model, "--passes", "", "-o", out).code == 0
    (out / "model.onnx").unlink()
    (out / "meta.json").write_text("{}")
    return out


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "plan", "bisect", "compile"])
def test_an_artifact_without_a_graph_is_named(
    run: Run, artifact: Path, model: Path, tmp_path: Path, command: str
) -> None:
    more = {
        "diff": (model,),
        "compile": ("--passes", "", "-o", tmp_path / "out"),
        "plan": ("--passes", ""),
        "bisect": ("--passes", "quantize"),
    }
    done = run(command, artifact, *more.get(command, ()))
    assert done.code == 2 and "what was compiled for onnx holds no graph" in done.err


@pytest.mark.parametrize(("file", "advice"), [("main.c", "is a program"), ("core.v", "its cycles")])
def test_bench_refuses_what_does_not_run_here(
    run: Run, artifact: Path, model: Path, file: str, advice: str
) -> None:
    (artifact / file).touch()
    done = run("bench", model, artifact)
    assert done.code == 2 and "does not run here" in done.err and advice in done.err


@pytest.mark.parametrize("give", [("--rounds", 2), ("--threads", 0), ()])
def test_bench_with_impossible_numbers(run: Run, model: Path, give: tuple[object, ...]) -> None:
    assert run("bench", *([model] if give else []), *give).code == 2


# -- passes and targets ---------------------------------------------------------------------------


def test_passes_lists_and_shows_options(run: Run) -> None:
    done = run("passes")
    assert done.code == 0
    listed = {line.partition(" ")[0] for line in done.out.splitlines()}
    names = "cleanup convert drop fold_batch_norm fold_norms prune quantize rotate slice sparsify"
    assert listed >= set(names.split())
    one = run("passes", "quantize")
    assert row(one, "min_size").split()[1] == "1024" and "integer >= 0" in one.out
    said = run("passes", "quantize", "--json").json
    assert said["exactness"] == "lossy"
    assert {"option", "takes", "required", "default", "help"} == said["options"][0].keys()


def test_passes_prints_the_schema_of_recipes(run: Run) -> None:
    schema = run("passes", "--schema").json
    assert "passes" in schema["properties"]


def test_an_unknown_pass_is_refused(run: Run) -> None:
    done = run("passes", "quantise")
    assert done.code == 2 and "did you mean quantize" in done.err


def test_targets_lists_what_can_be_built_for(run: Run) -> None:
    done = run("targets")
    (onnx,) = (line for line in done.out.splitlines() if line.startswith("onnx "))
    assert done.code == 0 and "opset=24" in onnx
    assert {"fpga-ecp5-85f", "onnx", "torch"} <= {
        target["name"] for target in run("targets", "--json").json
    }


# -- progress -------------------------------------------------------------------------------------


def test_bars_may_be_nested_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=80)
    monkeypatch.setattr(render, "err", console)
    bars = render.Bars()
    seen = [(i, j) for i in bars.track(range(2), "outer", 2) for j in bars.track("ab", "inner")]
    assert seen == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert "outer" in drawn.getvalue() and "inner" in drawn.getvalue()
    with pytest.raises(ZeroDivisionError):
        for i in bars.track(range(2), "fails"):
            assert 1 / i
    with console.status("another"):  # no bar is live any more
        pass


def test_bars_are_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(render.Bars().track(range(3), "counting", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


# -- a Hugging Face directory ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with a byte tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_language_model_with_its_cache_is_compiled_on_texts(
    run: Run, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("a first text\nand a second, longer one\n")
    out = tmp_path / "out"
    words = ("--calibration", tmp_path / "texts.txt", "--kv-cache", "-o", out, "--opset", 23)
    depfile = tmp_path / "out.d"
    done = run("compile", llama, "--passes", QUANTIZE, *words, "--json", "--depfile", depfile)
    assert done.code == 0, done.err
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    inputs = [value.name for value in onnx.load(str(out / "model.onnx")).graph.input]
    assert "past_key_values.0.key" in inputs
    assert done.json["compilation"]["calibration"]["feeds"] == 1
    sources = depfile.read_text().replace("\\\n", " ").split()[1:]
    names = {os.path.basename(source) for source in sources}
    assert {"config.json", "model.safetensors", "tokenizer.json", "texts.txt"} <= names
    assert all(Path(source).is_file() for source in sources)
    assert run("verify", out).code == 0
