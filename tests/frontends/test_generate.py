"""Greedy text from captured causal models, with and without their cache, is that of transformers' generate.

Everything runs in ONNX Runtime: one run for the prompts, then one a token, `present` becoming `past`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Feeds
from tests import zoo

Ids = npt.NDArray[np.int64]

# Mistral's window is 8 tokens here: the text goes well beyond it.
NEW_TOKENS = 12
PROMPTS = np.array([[0, 0, 5, 17, 99, 23], [7, 3, 64, 64, 120, 31]])
FAMILIES = ("llama", "gpt2", "opt", "mistral", "qwen2", "phi", "gemma", "falcon", "mixtral")
QUICK = ("llama",)


def families() -> list[Any]:
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]


class Families:
    """Checkpoint directories of zoo models, and what was captured from them; all made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._captured: dict[tuple[str, bool], Captured] = {}

    def folder(self, name: str) -> Path:
        folder = self._root / name
        if not folder.exists():
            module: Any = zoo.build(name).module
            module.config.use_cache = True
            module.save_pretrained(folder)
        return folder

    def captured(self, name: str, *, cache: bool) -> Captured:
        if (name, cache) not in self._captured:
            frontend = HuggingFaceDirectory(cache=cache)
            self._captured[name, cache] = frontend.capture(self.folder(name))
        return self._captured[name, cache]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


def expected(folder: Path, prompts: Ids, mask: Ids) -> list[list[int]]:
    """What the library writes, rows padded on the left where ``mask`` is 0."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ids = model.generate(
            torch.from_numpy(prompts),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=-1,
        )
    rows: list[list[int]] = ids.tolist()
    assert all(len(row) == prompts.shape[1] + NEW_TOKENS for row in rows)
    return rows


def empty_past(captured: Captured, batch: int) -> dict[str, npt.NDArray[Any]]:
    past = {}
    for value in captured.model.graph.inputs:
        if str(value.name).startswith("past_key_values."):
            assert value.shape is not None
            _, kv_heads, _, width = value.shape
            assert isinstance(kv_heads, int) and isinstance(width, int)
            past[str(value.name)] = np.zeros((batch, kv_heads, 0, width), np.float32)
    return past


def generated(
    captured: Captured, ids: Ids, mask: Ids, run: Callable[[Feeds], Feeds] | None = None
) -> list[list[int]]:
    """Greedy decoding; a model without a cache sees the whole text again in every step.

    ONNX Runtime runs it unless another ``run`` is given.
    """
    run = run or ort.Session(captured.model).run
    past = empty_past(captured, len(ids))
    new = ids
    for _ in range(NEW_TOKENS):
        feeds = {"input_ids": new if past else ids, "attention_mask": mask, **past}
        got = run(feeds)
        new = got["logits"][:, -1].argmax(-1, keepdims=True).astype(np.int64)
        ids = np.concatenate([ids, new], axis=1)
        mask = np.concatenate([mask, np.ones_like(new)], axis=1)
        past = {name: got[name.replace("past_key_values", "present")] for name in past}
    return [[int(i) for i in row] for row in ids]


@pytest.mark.parametrize("name", families())
def test_with_a_cache(name: str, made: Families) -> None:
    """Two prompts at once, the shorter one padded on the left."""
    captured = made.captured(name, cache=True)
    outputs = [str(v.name) for v in captured.model.graph.outputs]
    layers = [f"present.{i}.{side}" for i in range(2) for side in ("key", "value")]
    assert sorted(outputs) == sorted(["logits", *layers])
    mask = (PROMPTS > 0).astype(np.int64)
    assert generated(captured, PROMPTS, mask) == expected(made.folder(name), PROMPTS, mask)


@pytest.mark.parametrize("name", families())
def test_without_a_cache(name: str, made: Families) -> None:
    captured = made.captured(name, cache=False)
    assert [v.name for v in captured.model.graph.outputs] == ["logits"]
    prompts = PROMPTS[:, 2:]
    mask = np.ones_like(prompts)
    assert generated(captured, prompts, mask) == expected(made.folder(name), prompts, mask)


@pytest.mark.parametrize("name", families())
def test_steps_of_any_length_continue_a_text(name: str, made: Families) -> None:
    """Two tokens at a time, onto a past, give the logits of the whole."""
    captured = made.captured(name, cache=True)
    ids = np.random.default_rng(0).integers(3, zoo.VOCAB, (2, 12))
    whole = ort.run(
        captured.model,
        {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(captured, 2)},
    )["logits"]
    past, parts = empty_past(captured, 2), []
    for start in range(0, 12, 2):
        mask = np.ones((2, start + 2), np.int64)
        feeds = {"input_ids": ids[:, start : start + 2], "attention_mask": mask, **past}
        got = ort.run(captured.model, feeds)
        parts.append(got["logits"])
        past = {name: got[name.replace("past_key_values", "present")] for name in past}
    # The project's bar for float32: sums over keys are taken in another order.
    assert relative_error(np.concatenate(parts, axis=1), whole) <= 1e-5


def test_a_cache_is_bound_to_mask_and_past(made: Families) -> None:
    captured = made.captured("llama", cache=True)
    shapes = {str(v.name): str(v.shape) for v in captured.model.graph.inputs}
    assert shapes["past_key_values.0.key"] == "[batch,2,past_sequence,16]"
    assert shapes["attention_mask"] == "[batch,past_sequence + sequence]"
    shapes = {str(v.name): str(v.shape) for v in captured.model.graph.outputs}
    assert shapes["present.1.value"] == "[batch,2,past_sequence + sequence,16]"
    assert set(captured.dynamic) == {"batch", "sequence", "past_sequence"}
