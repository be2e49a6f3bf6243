"""Whatever is wrong with what the user gives: the message, the exit code, and nothing left behind.

Each case names the code of the diagnostic and words of the message, on stderr and as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.cli.conftest import Outcome, Run, network, tree
from tests.pipeline.small_disk import file_size_limit, small_disk

PASS = "fold_batch_norm"


def refused(done: Outcome, code: str, *words: str, exit_code: int = 2) -> None:
    assert done.code == exit_code, done.err
    assert f"error[{code}]" in done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


class Compile:
    """``compile`` into a folder that must not come to be, from a place that must stay as it is."""

    def __init__(self, run: Run, place: Path) -> None:
        self._run, self._place = run, place

    def refuse(
        self, code: str, *words: str, exit_code: int = 2, give: tuple[object, ...]
    ) -> Outcome:
        """Run once for a person and once for a script; both must be told the same."""
        before = tree(self._place)
        if "-o" not in give:
            give = (*give, "-o", self._place / "out")
        done = self._run("compile", *give)
        refused(done, code, *words, exit_code=exit_code)
        assert done.out == ""
        said = self._run("compile", *give, "--json")
        assert (said.code, said.json["exit_code"]) == (exit_code, exit_code)
        assert code in [row["code"] for row in said.json["errors"]]
        assert tree(self._place) == before
        return done


@pytest.fixture
def compile_(run: Run, tmp_path: Path) -> Compile:
    return Compile(run, tmp_path)


# -- ONNX files -----------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def no_graph(path: Path) -> None:
    path.write_bytes(b"\x08\x08")


def zipped(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 surely a zip file" * 10)


def scrambled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40:400:3] = bytes(len(content[40:400:3]))
    path.write_bytes(content)


def no_file(path: Path) -> None:
    path.unlink()


def edited(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        proto = onnx.load(str(path))
        change(proto)
        path.write_bytes(proto.SerializeToString())

    return spoil


def nan_weight(proto: onnx.ModelProto) -> None:
    array = numpy_helper.to_array(proto.graph.initializer[5]).copy()
    array[3, 2] = np.nan
    proto.graph.initializer[5].CopyFrom(numpy_helper.from_array(array, "w1"))


def wrong_shape(proto: onnx.ModelProto) -> None:
    array = numpy_helper.to_array(proto.graph.initializer[5])[:-1]
    proto.graph.initializer[5].CopyFrom(numpy_helper.from_array(array, "w1"))


def old_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 5


def unknown_op(proto: onnx.ModelProto) -> None:
    proto.graph.node[2].op_type = "Rellu"


def lost_node(proto: onnx.ModelProto) -> None:
    del proto.graph.node[2]


@pytest.mark.parametrize(
    ("spoil", "code", "words", "exit_code"),
    [
        (cut, "onnx.truncated", ("breaks off or is damaged", "copy or export"), 2),
        (no_graph, "onnx.truncated", ("not whole",), 2),
        (zipped, "onnx.not_onnx", ("give an .onnx file",), 2),
        (Path.touch, "onnx.not_onnx", ("empty",), 2),
        (no_file, "onnx.missing", ("no such file",), 2),
        (edited(nan_weight), "weights.not_finite", ("'w1'", "nan at [3, 2]"), 2),
        (edited(old_opset), "onnx.opset", ("5",), 2),
        (edited(lost_node), "onnx.dangling", ("'r'", "nothing makes"), 2),
        (edited(unknown_op), "verify.op", ("Rellu", "did you mean Relu"), 1),
        (edited(wrong_shape), "verify.width", ("h0 = MatMul",), 1),
    ],
)
def test_a_damaged_onnx_file(
    compile_: Compile,
    model: Path,
    spoil: Callable[[Path], None],
    code: str,
    words: tuple[str, ...],
    exit_code: int,
) -> None:
    if spoil is Path.touch:
        model.unlink()
    spoil(model)
    compile_.refuse(code, *words, exit_code=exit_code, give=(model, "--passes", PASS))


def test_a_scrambled_onnx_file_is_no_defect_of_ours(run: Run, model: Path, tmp_path: Path) -> None:
    """Bytes flipped inside the graph: whatever it is taken for, it is told and nothing is written."""
    scrambled(model)
    done = run("compile", model, "--passes", PASS, "-o", tmp_path / "out")
    assert done.code in (1, 2) and done.err.count("error[") >= 1
    assert set(tree(tmp_path)) == {"models", "models/network.onnx"}


def relocate(path: Path, location: str) -> None:
    proto = onnx.load(str(path), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())


def data_gone(path: Path) -> None:
    (path.parent / "network.data").unlink()


def data_short(path: Path) -> None:
    os.truncate(path.parent / "network.data", 300)


def data_above(path: Path) -> None:
    (path.parent / "network.data").rename(path.parent.parent / "network.data")
    relocate(path, "../network.data")


def data_absolute(path: Path) -> None:
    relocate(path, str(path.parent / "network.data"))


def data_linked(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    (path.parent / "network.data").rename(elsewhere)
    (path.parent / "network.data").symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (data_gone, "onnx.external_missing", ("network.data",)),
        (data_short, "onnx.external_short", ("too short",)),
        (data_above, "onnx.external_path", ("outside", "../network.data")),
        (data_absolute, "onnx.external_path", ("outside",)),
        (data_linked, "onnx.external_path", ("outside",)),
    ],
)
def test_external_data_that_cannot_be_used(
    compile_: Compile,
    external: Path,
    spoil: Callable[[Path], None],
    code: str,
    words: tuple[str, ...],
) -> None:
    spoil(external)
    compile_.refuse(code, *words, give=(external, "--passes", PASS))


# -- Hugging Face directories ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that was never trained: what is wrong here is found before it would run."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def directory(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_width(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 48}))


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def nan_in_checkpoint(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    arrays: dict[str, Any] = load_file(file)
    arrays["encoder.layer.0.output.dense.weight"][1, 2] = np.nan
    save_file(arrays, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (pickled, "hf.pickle", ("pytorch_model.bin", "can run any code", "save_pretrained")),
        (no_weights, "hf.weights", ("a config without weights",)),
        (no_config, "hf.config", ("there is no config.json",)),
        (other_width, "hf.shape", ("[32, 16]", "[48, 16]")),
        (cut_weights, "hf.safetensors", ("not a whole safetensors file",)),
        (nan_in_checkpoint, "weights.not_finite", ("output.dense.weight", "nan at [1, 2]")),
    ],
)
def test_a_damaged_checkpoint(
    compile_: Compile,
    directory: Path,
    spoil: Callable[[Path], None],
    code: str,
    words: tuple[str, ...],
) -> None:
    spoil(directory)
    compile_.refuse(code, *words, give=(directory, "--passes", PASS))


def test_a_cache_of_what_has_none(compile_: Compile, model: Path) -> None:
    words = ("Hugging Face directory",)
    compile_.refuse("cli.kv_cache", *words, give=(model, "--passes", PASS, "--kv-cache"))


# -- passes, options, targets, recipes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("fold_batchnorm", "pass.unknown", ("did you mean fold_batch_norm",)),
        ("quantize(weight='int8')", "option.unknown", ("did you mean weights",)),
        ("quantize(min_size=-1)", "option.value", ("min_size", "greater than or equal to 0")),
        ("quantize(weights='int7')", "option.value", ("'int7'", "int8")),
        ("quantize(min_size='many')", "option.value", ("valid integer",)),
        ("quantize('int8')", "pipeline.syntax", ("given by name", "^")),
        ("fold_batch_norm, quantize(", "pipeline.syntax", ("^",)),
        ("__import__('os').mkdir('x')", "pipeline.syntax", ("name of a pass",)),
    ],
)
def test_passes_that_make_no_sense(
    compile_: Compile, model: Path, text: str, code: str, words: tuple[str, ...]
) -> None:
    compile_.refuse(code, *words, give=(model, "--passes", text))


@pytest.mark.parametrize(
    ("give", "code", "words"),
    [
        (("--target", "onxx"), "target.unknown", ("did you mean onnx",)),
        (("--opset", 16), "target.opset", ("from 17 to 25",)),
        (("--opset", 30), "target.opset", ("from 17 to 25",)),
        (("--target", "torch", "--opset", 20), "target.setting", ("opset",)),
        (("--dims", "bach=2"), "dims.unknown", ("did you mean batch",)),
        (("--dims", "batch=0"), "cli.dims", ("positive",)),
        (("--dims", "batch"), "cli.dims", ("NAME=SIZE",)),
        (("--fix-dims", "bach=2"), "dims.unknown", ("did you mean batch",)),
        (("--fix-dims", "batch"), "cli.dims", ("--fix-dims takes NAME=SIZE",)),
        (("--dims", "batch=1", "--fix-dims", "batch=1"), "dims.fixed", ("'batch' is to be fixed",)),
        (("--seed", -1), "cli.usage", ()),
        (("--sead", 1), "cli.usage", ()),
    ],
)
def test_options_that_make_no_sense(
    run: Run, model: Path, tmp_path: Path, give: Any, code: str, words: tuple[str, ...]
) -> None:
    before = tree(tmp_path)
    all_words = ("compile", model, "--passes", PASS, "-o", tmp_path / "out", *give)
    done = run(*all_words)
    said = run(*all_words, "--json")
    assert (done.code, said.code, said.json["exit_code"]) == (2, 2, 2)
    assert [row["code"] for row in said.json["errors"]] == [code]
    for word in words:
        assert word in done.err
    assert "Traceback" not in done.err and tree(tmp_path) == before


def test_an_opset_that_is_out_of_range_is_found_before_the_model_is_read(
    run: Run, tmp_path: Path
) -> None:
    done = run("compile", tmp_path / "absent.onnx", "--passes", "", "-o", "x", "--opset", 30)
    refused(done, "target.opset")


@pytest.mark.parametrize("give", [(), ("--passes", PASS, "--recipe", "r.yaml")])
def test_passes_or_a_recipe_but_not_both(compile_: Compile, model: Path, give: Any) -> None:
    compile_.refuse("cli.passes", "--passes TEXT or --recipe FILE", give=(model, *give))


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("pases: [fold_batch_norm]", "recipe.unknown_key", ("did you mean passes", ":1")),
        ("passes:\n- fold_batchnorm", "pass.unknown", ("did you mean fold_batch_norm", ":2")),
        ("passes:\n- quantize: {weigths: int8}", "option.unknown", ("did you mean weights", ":2")),
        ("passes: []\ntarget: onxx", "target.unknown", ("did you mean onnx", ":2")),
        ("passes: []\nsettings: {opset: 99}", "target.opset", ("from 17 to 25",)),
        ("passes: []\nseed: many", "recipe.value", ("seed",)),
        ("passes: [", "recipe.yaml", ()),
        ("", "recipe.form", ()),
        ("passes: []\ncalibration: absent.npz", "calibration.file", ("no such file",)),
    ],
)
def test_a_recipe_that_makes_no_sense(
    compile_: Compile, model: Path, tmp_path: Path, text: str, code: str, words: tuple[str, ...]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    compile_.refuse(code, *words, give=(model, "--recipe", file))


def test_a_recipe_that_is_not_there(compile_: Compile, model: Path, tmp_path: Path) -> None:
    compile_.refuse("recipe.io", give=(model, "--recipe", tmp_path / "absent.yaml"))


# -- a model that a pass has nothing to do on -----------------------------------------------------


def test_no_match_is_a_row_and_under_strict_an_error(
    compile_: Compile, run: Run, model: Path, tmp_path: Path
) -> None:
    words = (model, "--passes", "fold_norms")
    done = run("plan", *words, "-v")
    assert done.code == 0 and "skipped" in done.out
    assert run("compile", *words, "-o", tmp_path / "lax").code == 0
    ledger = json.loads((tmp_path / "lax" / "manifest.json").read_text())["compilation"]["steps"][0]
    assert [entry["status"] for entry in ledger["ledger"]] == ["skipped"]
    compile_.refuse("strict.skipped", "fold_norms", exit_code=1, give=(*words, "--strict"))
    refused(run("plan", *words, "--strict"), "strict.skipped", exit_code=1)


# -- calibration data -----------------------------------------------------------------------------


def save_npz(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


def good(rows: int = 4) -> Any:
    return np.ones((rows, 4, 8, 8), np.float32)


def with_nan() -> Any:
    array = good()
    array[2, 0, 0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("arrays", "code", "words"),
    [
        ({"x": good(0)}, "calibration.empty", ("no sample",)),
        ({}, "calibration.empty", ("no array",)),
        ({"x": good()[..., :7]}, "calibration.shape", ("[4, 4, 8, 7]", "[batch, 4, 8, 8]")),
        ({"x": good()[0]}, "calibration.shape", ("[4, 8, 8]",)),
        ({"x": good().astype(np.float64)}, "calibration.dtype", ("float64", "float32")),
        ({"X": good()}, "calibration.input", ("no input 'X'",)),
        ({"x": with_nan()}, "calibration.finite", ("nan at [2, 0, 0, 0]",)),
        ({"x": np.array([{"a": 1}], object)}, "calibration.pickle", ("run any code",)),
    ],
)
def test_calibration_arrays_that_cannot_be_used(
    compile_: Compile, model: Path, tmp_path: Path, arrays: Any, code: str, words: tuple[str, ...]
) -> None:
    file = tmp_path / "data.npz"
    save_npz(file, **arrays)
    compile_.refuse(code, *words, give=(model, "--passes", PASS, "--calibration", file))


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("data.npz", b"no zip", "calibration.format"),
        ("data.csv", b"1,2", "calibration.format"),
        ("text.txt", b"a text", "calibration.tokenizer"),
        ("text.txt", b"", "calibration.empty"),
        ("absent.npz", None, "calibration.file"),
    ],
)
def test_calibration_files_that_cannot_be_used(
    compile_: Compile, model: Path, tmp_path: Path, name: str, content: bytes | None, code: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    compile_.refuse(code, give=(model, "--passes", PASS, "--calibration", tmp_path / name))


def test_a_calibration_file_that_is_absent_is_found_before_the_model_is_read(
    run: Run, tmp_path: Path
) -> None:
    words = ("--passes", PASS, "--calibration", tmp_path / "absent.npz", "-o", tmp_path / "out")
    refused(run("compile", tmp_path / "absent.onnx", *words), "calibration.file")


# -- output ---------------------------------------------------------------------------------------


def test_an_output_that_exists(compile_: Compile, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    words = (model, "--passes", PASS)
    compile_.refuse("output.exists", "--overwrite", give=words)
    compile_.refuse("output.exists", "did not write it", give=(*words, "--overwrite"))


def test_overwriting_what_we_wrote(run: Run, model: Path, tmp_path: Path) -> None:
    words = ("compile", model, "--passes", PASS, "-o", tmp_path / "out")
    assert run(*words).code == 0
    first = tree(tmp_path / "out")
    refused(run(*words), "output.exists")
    assert run(*words, "--overwrite", "--opset", 19).code == 0
    second = tree(tmp_path / "out")
    assert first.keys() == second.keys()
    assert first["model.onnx"] != second["model.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}


def test_an_output_that_cannot_be_made(compile_: Compile, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    give = (model, "--passes", PASS, "-o", tmp_path / "file" / "out")
    compile_.refuse("output.parent", "is not a folder", give=give)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission(compile_: Compile, model: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    give = (model, "--passes", PASS, "-o", tmp_path / "closed" / "out")
    compile_.refuse("output.denied", give=give)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody may write to")
def test_an_output_where_nobody_may_write(run: Run, model: Path) -> None:
    done = run("compile", model, "--passes", PASS, "-o", "/proc/netlathe")
    assert done.code == 2 and "the output cannot be written" in done.err


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_output_over_its_own_source(
    compile_: Compile, model: Path, external: Path, directory: Path, tmp_path: Path, overwrite: Any
) -> None:
    compiled = tmp_path / "compiled"
    compile_._run("compile", model, "--passes", PASS, "-o", compiled)
    cases = [
        (model, model),
        (model, model.parent),
        (external, external.parent),
        (directory, directory),
        (directory, directory / "small"),
        (compiled, compiled),
    ]
    for source, out in cases:
        give = (source, "--passes", PASS, "-o", out, *overwrite)
        compile_.refuse("output.source", "choose a folder beside it", give=give)


def test_an_output_over_its_calibration_data_or_recipe(
    compile_: Compile, run: Run, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("compile", model, "--passes", PASS, "-o", out).code == 0
    save_npz(out / "data.npz", x=good())
    give = (model, "--passes", PASS, "--overwrite", "-o", out)
    compile_.refuse("output.source", give=(*give, "--calibration", out / "data.npz"))


def test_a_full_disk(run: Run, model: Path, tmp_path: Path) -> None:
    onnx.save_model(network(width=256), str(model))  # 100 kB of weights
    with small_disk(tmp_path / "disk", 64) as disk:
        words = ("compile", model, "--passes", "", "-o", disk / "new" / "out")
        refused(run(*words), "output.full", "disk is full")
        assert tree(disk) == {}


def test_a_disk_that_fills_while_it_is_written(run: Run, model: Path, tmp_path: Path) -> None:
    onnx.save_model(network(width=256), str(model))
    out = tmp_path / "out"
    with file_size_limit(60_000):
        words = ("compile", model, "--passes", "", "--no-cache", "-o", out)
        refused(run(*words), "output.full", "disk is full")
    assert set(tree(tmp_path)) == {"models", "models/network.onnx"}


def test_a_full_disk_under_the_torch_target(run: Run, model: Path, tmp_path: Path) -> None:
    """torch's own writer would end the process."""
    onnx.save_model(network(width=256), str(model))
    words = ("compile", model, "--passes", "", "--no-cache", "-o", tmp_path / "out")
    words = (*words, "--target", "torch")
    with file_size_limit(60_000):
        refused(run(*words), "output.full", "disk is full")
    assert set(tree(tmp_path)) == {"models", "models/network.onnx"}


# -- gates ----------------------------------------------------------------------------------------


def test_what_fails_a_check_is_not_written(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the folding forgets the bias."""
    from netlathe.passes import fold_batch_norm

    edit = fold_batch_norm.FoldBatchNorm.run

    def wrong(self: Any, graph: Any, ctx: Any) -> Any:
        import onnx_ir as ir

        result = edit(self, graph, ctx)
        value = next(v for n, v in graph.graph.initializers.items() if n not in ("w1", "b1", "w2"))
        array = value.const_value.numpy()
        value.const_value = ir.tensor(array * np.float32(1.01), name=value.name)
        return result

    monkeypatch.setattr(fold_batch_norm.FoldBatchNorm, "run", wrong)
    done = run("compile", model, "--passes", PASS, "-o", tmp_path / "out")
    assert done.code == 1 and "fold_batch_norm" in done.err and "error[verify" in done.err
    assert not (tmp_path / "out").exists()


def test_a_defect_is_told_as_one(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from netlathe.pipeline import run as manager

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("planted")

    monkeypatch.setattr(manager, "run", broken)
    words = ("compile", model, "--passes", PASS, "-o", tmp_path / "out")
    done = run(*words)
    assert done.code == 70 and "Traceback" in done.err and "defect of NetLathe" in done.err
    said = run(*words, "--json").json
    assert (said["errors"][0]["code"], said["exit_code"]) == ("defect", 70)


# -- a missing extra ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["compile", "{directory}", "--passes", "", "-o", "{out}"], "netlathe[hf]"),
        (
            ["compile", "{model}", "--passes", "", "--target", "torch", "-o", "{out}"],
            "netlathe[torch]",
        ),
    ],
)
def test_a_missing_extra_is_one_line(
    directory: Path, model: Path, tmp_path: Path, words: list[str], extra: str
) -> None:
    places = {"directory": directory, "model": model, "out": tmp_path / "out"}
    given = [word.format(**places) for word in words]
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from netlathe.cli import main\n"
        f"sys.exit(main({given!r}))\n"
    )
    before = tree(tmp_path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "error[extra.missing]" in done.stderr
    assert f"pip install '{extra}'" in done.stderr and "Traceback" not in done.stderr
    assert tree(tmp_path) == before
