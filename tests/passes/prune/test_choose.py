"""What is chosen: ratios, budgets, multiples, what is left alone and why; and bad input."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.analysis import axes as axis_analysis
from netlathe.analysis.cost import Meter, cost
from netlathe.diagnostics import OptionError, PassError
from netlathe.ir import normal, weights
from netlathe.passes.prune import Prune
from netlathe.passes.prune.candidates import Candidate, Widths, find_candidates
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.interfaces import Target
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from tests import zoo_ir
from tests.analysis.residual import typed
from tests.passes.prune.helpers import check, error_to_reference, pruned


def choose(name: str, **options: Any) -> dict[str, Entry]:
    chosen = Prune(**options).choose(zoo_ir.captured(name), Context())
    return {entry.candidate: entry for entry in chosen}


@lru_cache(maxsize=1)
def candidates(name: str) -> dict[str, Candidate]:
    return {c.name: c for c in find_candidates(axis_analysis.analyse(zoo_ir.captured(name)))}


def refused(name: str, **options: Any) -> PassError:
    with pytest.raises(PassError) as caught:
        choose(name, **options)
    return caught.value


# -- candidates -----------------------------------------------------------------------------------


def test_rows_of_a_position_of_query_heads_lie_in_every_group() -> None:
    found = candidates("llama")["model.layers.0.self_attn:heads"]
    (writer,), (reader,) = found.writers, found.readers
    assert writer.value.name == "model.layers.0.self_attn.q_proj.weight"
    assert writer.rows(1).tolist() == [*range(16, 32), *range(48, 64)]  # of 2 groups of 2 heads
    assert reader.rows(0).tolist() == [*range(16), *range(32, 48)]
    assert reader.activation is not None
    assert found.index(reader.activation, reader.axis).tolist() == reader.index.tolist()


def test_a_gated_ffn_is_written_twice_and_read_once() -> None:
    found = candidates("llama")["model.layers.1.mlp:ffn"]
    assert [p.value.name for p in found.writers] == [
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert [p.value.name for p in found.readers] == ["model.layers.1.mlp.down_proj.weight"]
    assert (found.size, found.parameters) == (160, 3 * 64)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_one_position_costs_what_a_model_without_it_saves(name: str) -> None:
    for candidate in candidates(name).values():
        if candidate.pins or candidate.scope in ("hidden",):  # weights with both dims: not linear
            continue
        model = zoo_ir.captured(name)
        axes = axis_analysis.analyse(model)
        group = next(g for g in axes.groups if g.name == candidate.group.name)
        before = cost(model)
        axis_analysis.delete(axes, {group: [0]})
        after = cost(model)
        assert before.params - after.params == candidate.parameters
        assert (before.macs or 0) - (after.macs or 0) == candidate.macs
        if candidate.scope not in ("heads", "kv_groups", "experts"):
            break  # of many alike, one


@pytest.mark.parametrize("name", ["mixtral", "mobilenet_v2", "swin"])
def test_predicted_costs_are_those_of_the_edited_model(name: str) -> None:
    model = zoo_ir.captured(name)
    axes = axis_analysis.analyse(model)
    after, chosen = pruned(model, Prune(ratio=0.4))
    groups = {group.name: group for group in axes.groups}
    counts = {
        groups[e.detail["group"]].atom: e.detail["kept"] for e in chosen if e.status == "applied"
    }
    widths = Widths(axes, counts)
    predicted, real = Meter(model).read(widths.shape), cost(after)
    assert predicted.params + widths.extra()[0] == real.params
    assert predicted.macs == real.macs


def test_the_smallest_rows_go() -> None:
    body = "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)"
    w1, w2 = np.diag([4.0, 1.0, 3.0, 2.0]), np.ones((4, 2))
    model = typed(
        body, "float[b,4] x", "float[b,2] y", w1=w1.astype(np.float32), w2=w2.astype(np.float32)
    )
    (entry,) = [e for e in Prune(ratio=0.5).choose(model, Context()) if e.status == "applied"]
    assert entry.arrays["kept"].tolist() == [0, 2]
    after, _ = pruned(model, Prune(ratio=0.5))
    left = [weights.array(v) for v in after.graph.initializers.values()]
    assert [4.0, 3.0] == [float(a.max(0)[i]) for a in left if a.shape == (4, 2) for i in (0, 1)]


GROUPED = """
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    q4 = Reshape(q, queries)  qt = Transpose<perm=[0, 2, 1, 3]>(q4)
    k4 = Reshape(k, keys)  kt = Transpose<perm=[0, 2, 1, 3]>(k4)
    v4 = Reshape(v, keys)  vt = Transpose<perm=[0, 2, 1, 3]>(v4)
    a = Attention<is_causal=1>(qt, kt, vt)
    at = Transpose<perm=[0, 2, 1, 3]>(a)  a3 = Reshape(at, joined)
    y = MatMul(a3, wo)
"""


def grouped() -> ir.Model:
    """Attention of 12 query heads, three for each of four key/value heads."""
    rng = np.random.default_rng(0)
    sizes = {"wq": (6, 24), "wk": (6, 8), "wv": (6, 8), "wo": (24, 6)}
    weights_ = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    shapes = {"queries": (0, 0, 12, 2), "keys": (0, 0, 4, 2), "joined": (0, 0, 24)}
    weights_ |= {name: np.array(shape) for name, shape in shapes.items()}
    return typed(GROUPED, "float[b,s,6] x", "float[b,s,6] y", **weights_)


def test_heads_and_their_groups_go_together_where_both_are_named() -> None:
    """Half of the groups, and of three query heads of each one or two: 12 heads become 4 or 2."""
    model = grouped()
    feeds = [{"x": np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)}]
    both = Prune(ratio=0.5, scope=("heads", "kv_groups"))
    after, chosen = pruned(model, both)
    assert {e.detail["scope"]: e.detail["kept"] for e in chosen} == {"heads": 2, "kv_groups": 2}
    arrays = [weights.array(v) for v in after.graph.initializers.values()]
    shapes = sorted(array.shape for array in arrays if array.ndim == 2)
    assert shapes == [(6, 4), (6, 4), (6, 8), (8, 6)]
    assert error_to_reference(model, after, both, chosen, feeds) <= 1e-4
    # Where nothing is named, the width loses the ratio once: by its groups, which are more.
    (once,) = [e for e in Prune(ratio=0.5).choose(grouped(), Context()) if e.status == "applied"]
    assert (once.detail["scope"], once.detail["kept"]) == ("kv_groups", 2)
    # What is solved for from data sees the rows that both take from one weight.
    data = Context(calibration=feeds)
    for compensate in ("bias", "least_squares"):
        pass_ = Prune(params=0.5, scope=("heads", "kv_groups"), compensate=compensate)
        after, chosen = pruned(model, pass_, data)
        added = 6 if compensate == "bias" else 0  # a bias where there was none
        assert cost(after).params <= 0.5 * cost(model).params + added
        assert error_to_reference(model, after, pass_, chosen, feeds) <= 1e-4


@pytest.mark.parametrize("keep", [5, 7, 11])
def test_a_count_of_heads_that_breaks_groups_is_refused(keep: int) -> None:
    with pytest.raises(PassError, match=f"{keep} query heads do not divide over 4 key/value heads"):
        Prune(keep=keep, scope=("heads",)).choose(grouped(), Context())


# -- goals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "goal", [{"params": 0.6}, {"macs": 0.6}, {"bytes": 0.5}, {"params": 60_000}]
)
def test_a_budget_is_kept_and_hardly_more(goal: dict[str, Any]) -> None:
    model = zoo_ir.captured("gpt2")
    (kind, limit) = next(iter(goal.items()))
    full = getattr(cost(model), kind)
    after, _ = pruned(model, Prune(**goal))
    real = getattr(cost(after), kind)
    allowed = limit * full if limit <= 1 else limit
    assert 0.93 * allowed <= real <= allowed  # 4 heads of a layer are coarse steps


def test_a_budget_that_is_kept_already_changes_nothing() -> None:
    assert {entry.status for entry in choose("gpt2", params=1.0).values()} == {"skipped"}


def test_a_latency_is_read_off_a_table(tmp_path: Path) -> None:
    rows = ["candidate,width,ms", "*,1,1", "*,64,64", "*,256,256"]
    table = tmp_path / "times.csv"
    table.write_text("\n".join(rows))
    chosen = choose("gpt2", latency=300.0, table=str(table), scope=("ffn",))
    widths = [entry.detail["kept"] for entry in chosen.values()]
    assert widths == [150, 150]
    listed = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    (tmp_path / "times.json").write_text(json.dumps(listed))
    same = choose("gpt2", latency=300.0, table=str(tmp_path / "times.json"), scope=("ffn",))
    assert [entry.detail["kept"] for entry in same.values()] == [150, 150]


def test_keep_counts_query_heads() -> None:
    chosen = choose("llama", keep=2, scope=("heads",))
    assert [entry.detail["kept"] for entry in chosen.values()] == [1, 1]  # one per group


@pytest.mark.parametrize(("round_to", "widths"), [(16, [112]), (64, [128]), (48, [96])])
def test_widths_are_multiples(round_to: int, widths: list[int]) -> None:
    chosen = choose("llama", ratio=0.3, scope=("ffn",), round_to=round_to)
    assert sorted({entry.detail["kept"] for entry in chosen.values()}) == widths


def test_the_target_says_the_multiple() -> None:
    target = Target("wide", "onnx", "", width_multiple=32)
    chosen = Prune(ratio=0.3, scope=("ffn",)).choose(
        zoo_ir.captured("llama"), Context(target=target)
    )
    assert {entry.detail["kept"] for entry in chosen} == {
        128
    }  # 112 is no multiple; of two the wider


def test_heads_of_sixteen_need_no_multiple_of_sixteen_heads() -> None:
    (found,) = {
        e.detail["multiple"]
        for e in choose("gpt2", ratio=0.5, scope=("heads",), round_to=32).values()
    }
    assert found == 2


def test_it_is_deterministic() -> None:
    model = zoo_ir.captured("mixtral")
    for score in ("l2", "random"):
        first, second = (Prune(ratio=0.4, score=score).choose(model, Context()) for _ in range(2))
        assert first == second
        for a, b in zip(first, second, strict=True):
            assert {k: v.tolist() for k, v in a.arrays.items()} == {
                k: v.tolist() for k, v in b.arrays.items()
            }


# -- the ledger -----------------------------------------------------------------------------------


def test_pinned_widths_are_refused_with_the_operator() -> None:
    entry = choose("t5", ratio=0.3)["hidden"]
    assert entry.status == "refused"
    assert "graph output encoder_last_hidden_state has it" in entry.reason


def test_the_vocabulary_is_the_callers() -> None:
    assert "vocab" not in {e.detail["scope"] for e in choose("llama", ratio=0.3).values()}


def test_quantized_weights_are_refused() -> None:
    model = zoo_ir.captured("llama")
    quantize = Quantize(embeddings=False)
    quantize.edit(model, quantize.choose(model, Context()), Context())
    normal.normalize(model)
    chosen = Prune(ratio=0.3).choose(model, Context())
    assert {entry.status for entry in chosen} == {"refused"}
    assert len(chosen) == len(choose("llama", ratio=0.3))
    assert "mlp.gate_proj.weight_int8 is quantized: prune before" in chosen[-1].reason


def test_ignored_modules_stay() -> None:
    chosen = choose("llama", ratio=0.3, ignore=("layers.0",), scope=("ffn", "kv_groups"))
    status = {name: entry.status for name, entry in chosen.items()}
    assert status == {
        "model.layers.0.self_attn:kv_groups": "skipped",
        "model.layers.0.mlp:ffn": "skipped",
        "model.layers.1.self_attn:kv_groups": "applied",
        "model.layers.1.mlp:ffn": "applied",
    }
    assert all(entry.left_out for entry in chosen.values() if entry.status == "skipped")


def test_a_model_without_such_widths() -> None:
    (entry,) = choose("resnet", ratio=0.3, scope=("experts",)).values()
    assert (entry.status, entry.candidate) == ("skipped", "experts")


def test_weights_stay_recipes() -> None:
    after, _ = pruned(zoo_ir.captured("llama"), Prune(ratio=0.3))
    value = after.graph.initializers["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(value.const_value, ir.LazyTensor)


# -- bad input ------------------------------------------------------------------------------------


def test_a_ratio_that_leaves_no_channel() -> None:
    error = refused("resnet", ratio=0.95)
    assert {d.code for d in error.diagnostics} == {"prune.empty"}
    assert "0.20 of 4 positions of resnet.encoder.stages.0.layers.0.layer:channels" in str(error)


def test_a_ratio_that_leaves_fewer_experts_than_are_picked() -> None:
    error = refused("mixtral", ratio=0.7, scope=("experts",))
    assert "2 must stay" in str(error)


def test_a_budget_below_what_is_reachable() -> None:
    error = refused("t5", params=0.01)
    (diagnostic,) = error.diagnostics
    assert diagnostic.code == "prune.budget"
    assert "is the least that is reachable" in diagnostic.message
    assert "graph output encoder_last_hidden_state has it" in diagnostic.notes[0]
    least = float(diagnostic.help.split("params=")[1].split()[0])
    after, _ = pruned(zoo_ir.captured("t5"), Prune(params=least))
    assert cost(after).params == least


def test_a_latency_below_what_is_reachable(tmp_path: Path) -> None:
    table = tmp_path / "times.csv"
    rows = [f"transformer.h.{layer}.mlp,{width},{1 + width / 256}"
            for layer in (0, 1) for width in (1, 256)]  # fmt: skip
    table.write_text("\n".join(["candidate,width,ms", *rows]))
    error = refused("gpt2", latency=1.0, table=str(table), scope=("ffn",))
    (diagnostic,) = error.diagnostics
    assert diagnostic.code == "prune.budget"
    assert "cannot go down to 1 ms: 2.00781 ms is the least" in diagnostic.message


def test_multiples_that_cannot_be_met() -> None:
    error = refused("llama", ratio=0.3, scope=("ffn",), round_to=256)
    assert error.diagnostics[0].code == "prune.round_to"
    assert "mlp:ffn has 160" in error.diagnostics[0].notes[0]


def test_a_head_count_that_breaks_groups() -> None:
    error = refused("llama", keep=3, scope=("heads",))
    assert error.diagnostics[0].code == "prune.heads"
    assert "3 query heads do not divide over 2 key/value heads" in str(error)
    assert "keep 2 or 4 of 4" in str(error)


def test_a_pattern_that_matches_nothing() -> None:
    error = refused("llama", ratio=0.3, ignore=("model.layers.9",))
    assert error.diagnostics[0].code == "prune.ignore"


def test_a_table_that_lacks_a_candidate(tmp_path: Path) -> None:
    table = tmp_path / "times.csv"
    table.write_text("candidate,width,ms\ntransformer.h.0.mlp,1,1\ntransformer.h.0.mlp,256,2\n")
    error = refused("gpt2", latency=1.0, table=str(table), scope=("ffn",))
    assert [d.at for d in error.diagnostics] == ["transformer.h.1.mlp:ffn"]
    table.write_text("width\n1\n")
    assert "no table of latencies" in str(refused("gpt2", latency=1.0, table=str(table)))
    missing = refused("gpt2", latency=1.0, table=str(tmp_path / "none.csv"))
    assert missing.diagnostics[0].code == "prune.table"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give one of ratio"),
        ({"ratio": 0.3, "params": 0.5}, "not ratio and params"),
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": 0.3, "scope": ("neurons",)}, "neurons"),
        ({"keep": 4}, "name it"),
        ({"latency": 3.0}, "go together"),
        ({"ratio": 0.3, "round_to": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Prune(**options)


def test_pruned_once_more() -> None:
    model = zoo_ir.captured("gpt2")
    after, _ = pruned(model, Prune(ratio=0.3))
    check(after, Prune(ratio=0.3), zoo_ir.feeds("gpt2"))


def test_fit_takes_the_nearest_width() -> None:
    found = candidates("llama")["model.layers.1.mlp:ffn"]
    for multiple, least in ((1, 1), (16, 1), (48, 1), (7, 30)):
        one = dataclasses.replace(found, multiple=multiple, least=least)
        for count in np.linspace(0.5, one.size, 97):
            nearest = min(one.widths(), key=lambda width: (abs(width - count), -width))
            assert one.fit(count) == nearest


def test_what_holds_the_rest_of_a_budget_is_told_if_it_is_in_no_scope_named() -> None:
    error = refused("llama", params=0.01, scope=("ffn",))
    (diagnostic,) = error.diagnostics
    assert any("hidden is not in the scope" in note for note in diagnostic.notes)
    assert any("vocab stays: vocab is not in the scope" in note for note in diagnostic.notes)
