"""A Hugging Face directory becomes a graph over its own files, and generates the same text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from netlathe.diagnostics import CaptureError, InputError
from netlathe.execute import ort
from netlathe.frontends import torch_export
from netlathe.frontends.checkpoint import read_checkpoint
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.ir.provenance import module_path
from netlathe.pipeline.interfaces import Captured
from tests import zoo


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Write a zoo model as a checkpoint directory; returns the module that was written."""
    module: Any = zoo.build(name).module
    module.to(dtype).save_pretrained(folder, **settings)
    return module


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save("llama", folder)
    return folder


def relative_difference(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.sqrt(np.mean(expected**2)))


# -- sentence encoder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Captured:
    return HuggingFaceDirectory().capture(zoo.minilm_folder())


def test_minilm_gives_sentence_embeddings_of_unit_length(minilm: Captured) -> None:
    assert [v.name for v in minilm.model.graph.outputs] == ["sentence_embedding"]
    assert minilm.tokenize is not None
    feeds = minilm.tokenize(["A cat sat on the mat.", "Eine Katze.", "compilers lower graphs"])
    assert set(feeds) == {"input_ids", "attention_mask"}
    actual = ort.run(minilm.model, feeds)["sentence_embedding"]

    module = zoo.build("minilm").module
    with torch.no_grad():
        states = module(**{k: torch.from_numpy(v) for k, v in feeds.items()}).last_hidden_state
    states, mask = states.double().numpy(), feeds["attention_mask"][..., None].astype(np.float64)
    mean = (states * mask).sum(1) / mask.sum(1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert relative_difference(actual, expected) <= 1e-5


def test_tokens_are_those_of_transformers(minilm: Captured) -> None:
    texts = ["A cat sat on the mat.", "naïve café", "x " * 600]
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.minilm_folder())
    expected = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="np")
    assert minilm.tokenize is not None
    actual = minilm.tokenize(texts)
    assert np.array_equal(actual["input_ids"], expected["input_ids"])
    assert np.array_equal(actual["attention_mask"], expected["attention_mask"])


def test_weights_stay_in_the_file_and_files_travel(minilm: Captured) -> None:
    table = minilm.model.graph.initializers["embeddings.word_embeddings.weight"].const_value
    assert isinstance(table, ir.ExternalTensor)
    assert Path(table.path) == zoo.minilm_folder() / "model.safetensors"
    assert {"tokenizer.json", "vocab.txt", "config.json", "modules.json"} <= set(minilm.files)


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_bfloat16_checkpoint_is_computed_in_float32(tmp_path: Path) -> None:
    save("llama", tmp_path, torch.bfloat16, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    captured = HuggingFaceDirectory().capture(tmp_path)
    weight = captured.model.graph.initializers["model.layers.0.mlp.gate_proj.weight"]
    assert weight.dtype == ir.DataType.FLOAT
    assert any("cast to float32" in e.reason for e in captured.entries)
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = np.array([[5, 17, 99, 23]])
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).logits
    actual = ort.run(captured.model, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert relative_difference(actual["logits"], expected) <= 1e-5


# -- bad input ------------------------------------------------------------------------------------


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never loaded")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scrambled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a checkpoint at all, sorry")


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors = {k: v.clone() for k, v in tensors.items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def own_code(folder: Path) -> None:
    """A folder that wants its own Python to run."""
    (folder / "modeling_own.py").write_text("open('ran', 'w')\nraise SystemExit\n")
    auto = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_config(architectures=["OwnForCausalLM"], model_type="own", auto_map=auto)(folder)


def own_code_for_a_known_class(folder: Path) -> None:
    own_code(folder)
    edit_config(architectures=["LlamaForCausalLM"])(folder)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def plant_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ][3, 5] = float("nan")


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ][:, :32].contiguous()


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[Q_PROJ]


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (no_config, "hf.config", "no config.json"),
        (no_weights, "hf.weights", "config without weights"),
        (pickled, "hf.pickle", "pytorch_model.bin"),
        (truncated, "hf.safetensors", "ends at byte"),
        (scrambled, "hf.safetensors", "cannot hold a header"),
        (edit_weights(plant_nan), "weights.not_finite", Q_PROJ),
        (edit_weights(narrow), "hf.shape", r"\[64, 32\].*\[64, 64\]"),
        (edit_weights(drop), "hf.missing", Q_PROJ),
        (edit_config(architectures=["LlamaForCausalLN"]), "hf.architecture", "LlamaForCausalLM"),
        (edit_config(model_type="nonesuch"), "hf.config", "nonesuch"),
        (own_code, "hf.architecture", "which is not run"),
        (own_code_for_a_known_class, "hf.config", "'own'"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else None,
)
def test_a_bad_folder_is_explained(
    llama: Path, tmp_path: Path, spoil: Callable[[Path], None], code: str, words: str
) -> None:
    folder = copy_of(llama, tmp_path)
    spoil(folder)
    with pytest.raises(InputError, match=words) as caught:
        HuggingFaceDirectory().capture(folder)
    assert caught.value.diagnostics[0].code == code
    assert caught.value.exit_code == 2
    assert not (folder / "ran").exists() and not Path("ran").exists()


def test_a_folder_of_models_names_them(llama: Path, tmp_path: Path) -> None:
    copy = copy_of(llama, tmp_path)
    (tmp_path / "model.onnx").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"give .*model\.onnx") as caught:
        HuggingFaceDirectory().capture(tmp_path)
    assert str(copy) in str(caught.value)
    with pytest.raises(InputError, match=r"give a folder with config\.json"):
        HuggingFaceDirectory().capture(tmp_path / "empty")


def test_tensors_that_nobody_uses_are_stated(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    edit_weights(lambda tensors: tensors.update(adapter=torch.ones(3)))(folder)
    captured = HuggingFaceDirectory().capture(folder)
    (skipped,) = [e for e in captured.entries if e.status == "skipped"]
    assert skipped.reason == "1 tensors of the checkpoint are no weights of LlamaForCausalLM"
    assert skipped.detail == {"tensors": ["adapter"]}


def test_a_weight_that_only_an_unused_part_lacks_is_no_problem(tmp_path: Path) -> None:
    """BERT without its pooler, as encoders for token states come."""
    model: Any = zoo.build("bert").module
    model.bert.save_pretrained(tmp_path)
    assert not any("pooler" in name for name in read_checkpoint(tmp_path))
    captured = HuggingFaceDirectory().capture(tmp_path)
    assert [v.name for v in captured.model.graph.outputs] == ["last_hidden_state"]


def test_files_that_travel(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    shutil.copy(zoo.minilm_folder() / "tokenizer.json", folder)
    (folder / "README.md").write_text("stays")
    captured = HuggingFaceDirectory().capture(folder)
    assert captured.files == {
        name: folder / name for name in ("config.json", "generation_config.json", "tokenizer.json")
    }
    assert captured.tokenize is not None


def test_an_encoder_has_no_cache() -> None:
    with pytest.raises(InputError, match="no cache to capture"):
        HuggingFaceDirectory(cache=True).capture(zoo.minilm_folder())


def test_stored_tensors_are_those_of_the_library(llama: Path) -> None:
    expected = load_file(llama / "model.safetensors")
    stored = read_checkpoint(llama)
    assert stored.keys() == expected.keys()
    for name, place in stored.items():
        assert np.array_equal(place.array(), expected[name].numpy())
        assert np.array_equal(place.tensor("again").numpy(), expected[name].numpy())


def test_a_wrong_export_is_no_reason_to_try_another_implementation(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch_export.condense, []

    def spoil(model: ir.Model, strip: Callable[[str], str]) -> None:
        calls.append(model)
        next(node for node in model.graph if node.op_type == "Cos").op_type = "Sin"
        real(model, strip)

    monkeypatch.setattr(torch_export, "condense", spoil)
    with pytest.raises(CaptureError) as caught:
        HuggingFaceDirectory().capture(llama)
    assert caught.value.diagnostics[0].code == "capture.differs"
    assert len(calls) == 1


def test_modules_of_nodes_are_those_of_the_model(llama: Path) -> None:
    """torch names a module of its own for sizes that its passes compute."""
    captured = HuggingFaceDirectory().capture(llama)
    paths = {module_path(node) for node in captured.model.graph.all_nodes()} - {""}
    assert all(path.split(".")[0] in ("model", "lm_head") for path in paths), paths
