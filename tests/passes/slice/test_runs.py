"""Sliced models run where the model ran: with a key-value cache they write text, and TVM compiles them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from netlathe.analysis.cost import cost
from netlathe.diagnostics import OptionError
from netlathe.execute.compare import relative_error
from netlathe.execute.executor import Executor
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.ir import normal
from netlathe.passes.drop import Drop
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.slice import Slice
from netlathe.pipeline import run
from netlathe.pipeline.pass_ import Context
from tests import zoo_ir
from tests.frontends.test_generate import PROMPTS, Families, empty_past, generated
from tests.passes.slice.models import data, folded
from tests.passes.slice.test_slice import sliced
from tests.pipeline.toy import captured_of

FAMILIES = [
    pytest.param(
        name, adapters, marks=[] if name == "llama" and not adapters else [pytest.mark.slow]
    )
    for name in ("llama", "gpt2", "phi", "falcon")
    for adapters in (False, True)
]


@pytest.mark.parametrize(("name", "adapters"), FAMILIES)
def test_with_a_cache_it_writes_what_its_reference_writes(
    tmp_path: Path, name: str, adapters: bool
) -> None:
    folder = Families(tmp_path).folder(name)
    captured = HuggingFaceDirectory(cache=True).capture(folder)
    model = captured.model.clone()
    FoldNorms(untie=True).run(model, Context())
    normal.normalize(model)
    ids = np.random.default_rng(0).integers(3, 128, (16, 24))
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(captured, 16)}
    pass_ = Slice(ratio=0.25, adapters=adapters)
    after, _, reference = sliced(model, pass_, Context(calibration=[fed]))
    mask = (PROMPTS > 0).astype(np.int64)
    texts = [
        generated(dataclasses.replace(captured, model=made), PROMPTS, mask)
        for made in (after, reference)
    ]
    assert texts[0] == texts[1]
    caches = {v.name: str(v.shape) for v in captured.model.graph.inputs}
    assert {v.name: str(v.shape) for v in after.graph.inputs} == caches
    assert cost(after).params < cost(model).params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "vit", "gpt2", "phi"])
def test_in_tvm(name: str) -> None:
    pytest.importorskip("tvm", reason="the tvm extra is not installed")
    from tests.backends.tvm.in_process import InProcess

    after, _, _ = sliced(folded(name), Slice(ratio=0.25, refit=True), data(name))
    artifact, executor = InProcess(after), Executor(after)
    for fed in zoo_ir.feeds(name):
        actual, expected = artifact.run(fed), executor.run(fed)
        for output, tensor in expected.items():
            # the project's bar for TVM
            assert relative_error(actual[output], tensor.numpy()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sliced_and_dropped_it_writes_the_same_text_in_tvm(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tvm", reason="the tvm extra is not installed")
    from tests.backends.tvm.in_process import InProcess

    captured = HuggingFaceDirectory(cache=True).capture(Families(tmp_path).folder(name))
    ids = np.random.default_rng(0).integers(3, 128, (16, 24))
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(captured, 16)}
    passes = [Drop(kind="attention", score="kl"), FoldNorms(untie=True), Slice(ratio=0.25)]
    compiled = run.run(captured, passes, Context(calibration=[fed]))
    small = dataclasses.replace(captured, model=compiled.model)
    assert len(empty_past(small, 1)) == len(empty_past(captured, 1)) - 2
    mask = (PROMPTS > 0).astype(np.int64)
    by_tvm = generated(small, PROMPTS, mask, InProcess(compiled.model).run)
    assert by_tvm == generated(small, PROMPTS, mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "attention"), ("vit", "block"), ("convnext", "block")]
)
def test_dropped_models_in_tvm(name: str, kind: Literal["attention", "block"]) -> None:
    pytest.importorskip("tvm", reason="the tvm extra is not installed")
    from tests.backends.tvm.in_process import InProcess

    captured = captured_of(zoo_ir.captured(name))
    compiled = run.run(captured, [Drop(kind=kind, score="uniform")], Context())
    artifact, executor = InProcess(compiled.model), Executor(compiled.model)
    for fed in zoo_ir.feeds(name):
        actual, expected = artifact.run(fed), executor.run(fed)
        for output, tensor in expected.items():
            # the project's bar for TVM
            assert relative_error(actual[output], tensor.numpy()) < 1e-4


@pytest.mark.parametrize("order", ["drop first", "slice first"])
def test_it_composes_with_dropping(order: str) -> None:
    """Each step of the pipeline is held against its reference."""
    captured = captured_of(zoo_ir.captured("llama"))
    passes = [Drop(kind="ffn"), Slice(ratio=0.5)]
    if order == "slice first":
        passes.reverse()
    compiled = run.run(captured, [FoldNorms(), *passes], data("llama"))
    checks = [step.check.against for step in compiled.steps[1:]]
    assert checks == ["simulated reference"] * 2
    assert compiled.steps[-1].cost_after.params < 0.7 * compiled.steps[0].cost_after.params


def test_behind_adapters_nothing_can_be_dropped() -> None:
    captured = captured_of(zoo_ir.captured("llama"))
    passes = [FoldNorms(), Slice(ratio=0.5, adapters=True), Drop(kind="ffn")]
    with pytest.raises(OptionError, match=r"cannot come behind slice.*a skip is a matrix by then"):
        run.plan(captured, passes, data("llama"))
