"""A captured model from the cache is the one that was captured, over the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

import netlathe
from netlathe.execute.compare import inputs_of
from netlathe.ir import weights
from netlathe.pipeline.fingerprint import feeds_digest, graph_digest
from netlathe.pipeline.interfaces import Captured
from tests import zoo
from tests.cli.conftest import network


def digests(model: ir.Model) -> dict[str, str]:
    """Of the bytes, whatever a tensor remembers of itself."""
    found = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        value.const_value.meta.pop("netlathe.digest", None)
        found[name] = weights.digest(value.const_value)
    return found


def same(a: Captured, b: Captured) -> None:
    assert graph_digest(a.model) == graph_digest(b.model)
    assert digests(a.model) == digests(b.model)
    assert weights.files(a.model) == weights.files(b.model)
    recipes = [
        [weights.is_recipe(v.const_value) for v in m.graph.initializers.values() if v.const_value]
        for m in (a.model, b.model)
    ]
    assert recipes[0] == recipes[1]
    assert [e.to_json() for e in a.entries] == [e.to_json() for e in b.entries]
    for name in ("source", "frontend", "dynamic", "files"):
        assert getattr(a, name) == getattr(b, name)
    feeds = [inputs_of(c.model, c.sample(c.dynamic, 3)) for c in (a, b)]
    assert feeds_digest(feeds[0]) == feeds_digest(feeds[1])


def test_a_directory_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are casts and transposes of the files' own, and nothing of them is written."""
    folder, cache = tmp_path / "llama", tmp_path / "cache"
    module: Any = zoo.build("llama").module
    module.to(torch.bfloat16).save_pretrained(folder)
    first = netlathe.capture(folder, cache_dir=cache, cache=True)
    with monkeypatch.context() as patch:
        patch.setattr("netlathe.frontends.huggingface._read_config", None)  # not even read
        same(first, netlathe.capture(folder, cache_dir=cache, cache=True))
    (entry,) = cache.glob("v1/*/*.capture")
    assert entry.stat().st_size < (folder / "model.safetensors").stat().st_size + 200_000
    other = netlathe.capture(folder, cache_dir=cache)  # without a KV cache: another setting
    assert len(other.model.graph.inputs) < len(first.model.graph.inputs)


def test_a_file_with_external_data(tmp_path: Path) -> None:
    path, cache = tmp_path / "model" / "network.onnx", tmp_path / "cache"
    path.parent.mkdir()
    onnx.save_model(
        network(),
        str(path),
        save_as_external_data=True,
        location="network.data",
        size_threshold=0,
    )
    first = netlathe.capture(path, cache_dir=cache)
    same(first, netlathe.capture(path, cache_dir=cache))
    before = digests(first.model)  # which maps the file
    assert len(list(cache.glob("v1/*/*.capture"))) == 1
    data = bytearray((path.parent / "network.data").read_bytes())
    data[0] ^= 1  # the last bit of a mantissa
    (path.parent / "network.data").write_bytes(data)
    changed = netlathe.capture(path, cache_dir=cache)
    assert digests(changed.model) != before
    assert len(list(cache.glob("v1/*/*.capture"))) == 2


def test_tokens_are_the_same(tmp_path: Path) -> None:
    captures = [
        netlathe.capture(zoo.minilm_folder(), cache_dir=tmp_path / "cache") for _ in range(2)
    ]
    same(*captures)
    texts = ["A cat sat on the mat.", "compilers lower graphs"]
    tokens = [c.tokenize(texts) for c in captures if c.tokenize is not None]
    assert len(tokens) == 2 and feeds_digest(tokens[0]) == feeds_digest(tokens[1])
