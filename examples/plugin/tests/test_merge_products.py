"""The laws that every pass keeps, and what is particular to this one."""

from __future__ import annotations

from collections import Counter
from importlib import metadata

import numpy as np
import pytest
from netlathe_merge import MergeProducts

import netlathe
from netlathe.testing import check_entry_point, from_text, models, pass_cases


@pytest.mark.parametrize("case", pass_cases(MergeProducts()), ids=str)
def test_the_laws_of_passes(case) -> None:
    case.check()


def test_it_is_installed() -> None:
    check_entry_point(MergeProducts)
    assert metadata.version("netlathe-merge") == "0.1.0"


def compiled(name: str, text: str = "merge_products"):
    (captured,) = [captured for captured in models() if captured.source == name]
    return netlathe.compile(captured, text)


def ops(model) -> Counter:
    return Counter(node.op_type for node in model.graph)


def test_query_key_and_value_become_one_product() -> None:
    done = compiled("encoder")
    assert ops(done.dense)["MatMul"] - ops(done.model)["MatMul"] == 2 * 2  # three are one, twice
    applied = [e.candidate for e in done.steps[0].entries if e.status == "applied"]
    assert applied[:3] == [f"layers.0.attention.{part}.weight" for part in "qkv"]


def test_gate_and_up_of_a_gated_ffn_become_one_product() -> None:
    done = compiled("decoder")
    assert ops(done.dense)["MatMul"] - ops(done.model)["MatMul"] == 2 * (2 + 1)
    where = {e.where: e.status for e in done.steps[0].entries}
    assert where["layers.1.ffn.gate"] == where["layers.1.ffn.up"] == "applied"
    assert where["layers.1.ffn.down"] == "skipped"


def test_what_is_ignored_stays() -> None:
    (step,) = compiled("encoder", 'merge_products(ignore=["layers.0"])').steps
    statuses = {e.where: e.status for e in step.entries}
    assert statuses["layers.0.attention.q"] == "skipped"
    assert statuses["layers.1.attention.q"] == "applied"


def test_outputs_of_the_model_keep_their_names() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((4, 3)).astype(np.float32) for name in ("v", "w")}
    text = "(float[n, 4] x) => (float[n, 3] a, float[n, 3] b) { a = MatMul(x, v) b = MatMul(x, w) }"
    done = netlathe.compile(from_text("two", text, weights), [MergeProducts()])
    assert [value.name for value in done.model.graph.outputs] == ["a", "b"]
    assert ops(done.model) == {"MatMul": 1, "Split": 1}
