"""Prune in a pipeline: caches get narrower and are compared as such, other passes go before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.frontends.onnx_file import OnnxFile
from netlathe.ir import interface
from netlathe.passes.drop import Drop
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.prune import Prune
from netlathe.passes.quantize import Quantize
from netlathe.pipeline import run as manager
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Context, Pass
from tests import zoo


@pytest.fixture(scope="module")
def llama_with_cache(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    folder: Path = tmp_path_factory.mktemp("llama")
    module: Any = zoo.build("llama").module
    module.save_pretrained(folder)
    return HuggingFaceDirectory(cache=True).capture(folder)


def data(captured: Captured) -> list[dict[str, Any]]:
    sizes = {"batch": 2, "sequence": 4, "past_sequence": 3}
    return [dict(captured.sample(sizes, seed)) for seed in range(2)]


def test_a_narrowed_cache_is_recorded_and_compared_on_what_is_left(
    llama_with_cache: Captured, tmp_path: Path
) -> None:
    """Calibration data goes on to fit: the second pass reads it with one head of a layer gone."""
    ctx = Context(calibration=data(llama_with_cache))
    first = Prune(ratio=0.5, scope=("kv_groups",), ignore=("layers.1",))
    passes: list[Pass] = [first, Drop(kind="ffn"), Prune(ratio=0.3, scope=("ffn",)), Quantize()]
    compiled = manager.run(llama_with_cache, passes, ctx)
    assert [step.check.against for step in compiled.steps] == ["simulated reference"] * 4
    (entry,) = [e for e in compiled.steps[0].entries if e.status == "applied"]
    names = ["past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value"]
    assert entry.detail["interface"] == names
    assert "past_key_values.0.key" in entry.reason
    left = interface.kept(compiled.model)
    assert left == {name: {1: entry.detail["positions"]} for name in names}
    shapes = {v.name: v.shape for v in compiled.model.graph.inputs if v.shape is not None}
    assert [shapes[f"past_key_values.{i}.key"][1] for i in range(2)] == [1, 2]

    compiled.save(tmp_path / "out", "onnx")
    again = OnnxFile().capture(tmp_path / "out" / "model.onnx").model
    assert interface.kept(again) == left
    wide = data(llama_with_cache)[0]
    narrow = inputs_of(again, wide)
    assert narrow["past_key_values.0.key"].shape[1] == 1
    kept = entry.detail["positions"]
    for name, array in narrow.items():
        expected = np.take(wide[name], kept, axis=1) if name in names else wide[name]
        np.testing.assert_array_equal(array, expected)
    present = ort.run(again, narrow)["present.0.key"]
    assert present.shape[1:3] == (1, 7)


def test_positions_compose(llama_with_cache: Captured) -> None:
    """Pruned twice, the record is in numbers of the first model."""
    model = llama_with_cache.model.clone()
    interface.narrow(model, "past_key_values.0.key", 1, np.array([1, 3, 4]))
    interface.narrow(model, "past_key_values.0.key", 1, np.array([0, 2]))
    assert interface.kept(model) == {"past_key_values.0.key": {1: [1, 4]}}
    of_three = {"past_key_values.0.key": {1: [1, 3, 4]}}
    array = np.arange(3).reshape(1, 3)
    left = interface.kept(model)
    assert interface.fit(array, "past_key_values.0.key", left, of_three).tolist() == [[0, 2]]


def test_prune_goes_with_other_passes(llama_with_cache: Captured) -> None:
    passes: list[Pass] = [
        Drop(kind="attention"),
        FoldNorms(),
        Prune(params=0.6, round_to=8),
        Prune(ratio=0.2, scope=("hidden",)),
        Quantize(),
    ]
    ctx = Context(calibration=data(llama_with_cache))
    compiled = manager.run(llama_with_cache, passes, ctx)
    assert all(step.changed and step.check.error is not None for step in compiled.steps)
    pruned = compiled.steps[2]
    assert pruned.cost_after.params <= 0.6 * pruned.cost_before.params


def test_a_plan_shows_what_would_go(llama_with_cache: Captured) -> None:
    (step,) = manager.plan(llama_with_cache, [Prune(ratio=0.3)], Context())
    assert step.cost_after.params < step.cost_before.params
    assert {e.status for e in step.entries} == {"applied", "skipped"}
