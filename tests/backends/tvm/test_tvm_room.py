"""A LLaMA whose caches have room, as ``benchmarks/bench_tvm.py`` times it, against one whose caches grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from benchmarks.llama_cache import feeds_with_room, with_room
from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.artifact import TvmArtifact
from netlathe.backends.tvm.machine import machine
from netlathe.execute import ort
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.ir import normal
from netlathe.pipeline.interfaces import Captured

ROOM = 40


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Two layers, four heads that share two of keys."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    folder = tmp_path_factory.mktemp("llama")
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return HuggingFaceDirectory(cache=True).capture(folder)


@pytest.fixture(scope="module")
def roomy(grown: Captured, tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    folder = tmp_path_factory.mktemp("artifact")
    TvmArtifact(with_room(grown.model), machine("avx2")).write(folder)
    return runtime.load(folder)


def growing(captured: Captured, queries: int, past: int) -> dict[str, Any]:
    sizes = {"batch": 2, "sequence": queries, "past_sequence": past}
    feeds = dict(captured.sample(sizes, queries))
    feeds["attention_mask"] = np.ones_like(feeds["attention_mask"])
    return feeds


@pytest.mark.parametrize(("queries", "past"), [(1, 20), (1, ROOM - 1), (7, 3), (13, 0)])
def test_both_compute_the_same(
    grown: Captured, roomy: runtime.Model, queries: int, past: int
) -> None:
    """What lies behind the tokens is NaN, before and after: nothing reads or writes it."""
    feeds = growing(grown, queries, past)
    wanted = ort.run(grown.model, feeds)
    found = roomy.run(feeds_with_room(feeds, ROOM))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if name != "logits":
            assert np.isnan(value[:, :, past + queries :]).all()
            value = value[:, :, : past + queries]
        np.testing.assert_allclose(value, wanted[name], atol=2e-6, rtol=0)


def test_tokens_are_decoded_in_place(grown: Captured, roomy: runtime.Model) -> None:
    """Three steps of one token over the same tensors, against all of them at once."""
    feeds = growing(grown, 3, 5)
    wanted = ort.run(grown.model, feeds, ["logits"])["logits"]
    whole = feeds_with_room(feeds, ROOM)
    names = [record["name"] for record in roomy.inputs]
    assert set(roomy.in_place.values()) == {name for name in names if name.startswith("past")}
    held = dict(zip(names, roomy.place(whole), strict=True))
    for step in range(3):
        ids = np.ascontiguousarray(whole["input_ids"][:, step : step + 1])
        token = {**whole, "input_ids": ids, "first": whole["first"] + step}
        placed = dict(zip(names, roomy.place(token), strict=True))
        held |= {"input_ids": placed["input_ids"], "first": placed["first"]}
        results = roomy.invoke([held[name] for name in names])
        found = np.from_dlpack(results[0])
        np.testing.assert_allclose(found[:, 0], wanted[:, step], atol=2e-6, rtol=0)


def test_what_has_no_such_cache_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 25]> g (float[n] x) => (float[n] y) { y = Relu(x) }'
    )
    normal.normalize(model)
    with pytest.raises(ValueError, match="no decoder with rotary embeddings"):
        with_room(model)
