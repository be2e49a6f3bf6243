"""Dropping removes what turns the stream least, exactly that, and with it the caches it needs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from netlathe.analysis.cost import cost
from netlathe.diagnostics import OptionError, PassError, VerifyError
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of, relative_error
from netlathe.execute.statistics import Statistic, StatisticResult
from netlathe.ir import normal, verify
from netlathe.ir.printing import show_model
from netlathe.passes.drop import Drop
from netlathe.pipeline import run as manager
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Feeds, Result
from tests import zoo, zoo_ir
from tests.analysis.residual import WEIGHTS, attention, cached, ffn, typed
from tests.pipeline.toy import captured_of

# The project's bar for parity with eager torch: max|difference| as a share of the RMS, float32.
BOUND = 1e-5


@dataclasses.dataclass(frozen=True)
class Given(Context):
    """A context whose statistics are given: the cosines of the candidates, in order."""

    cosines: Sequence[float] = ()

    def collect(
        self,
        model: ir.Model,
        wanted: Sequence[Statistic],
        *,
        needed_by: str,
        settle: Callable[[StatisticResult], None] | None = None,
    ) -> list[StatisticResult]:
        """The given cosines; the last one stands for all that follow."""
        given = [*self.cosines, *[self.cosines[-1]] * len(wanted)]
        pairs = zip(wanted, given, strict=False)
        return [StatisticResult(statistic, np.asarray(cosine), 1) for statistic, cosine in pairs]


def only(index: int) -> Given:
    """A context that makes the candidate at ``index`` the least important one."""
    return Given(cosines=[0.5] * index + [0.9, 0.5])


def dropped(model: ir.Model, pass_: Drop, ctx: Context) -> tuple[ir.Model, Result]:
    """An edited copy, which verifies, in normal form as the pipeline leaves it."""
    after = model.clone()
    result = pass_.edit(after, pass_.choose(model, ctx), ctx)
    assert verify.verify(after) == []
    normal.normalize(after)
    assert verify.verify(after) == []
    return after, result


def statuses(entries: Sequence[Entry]) -> list[str]:
    return [entry.status for entry in entries]


def stack(count: int = 3) -> ir.Model:
    """Layers of an attention and an FFN."""
    return typed(stack_text(count))


def stack_text(count: int) -> str:
    """Text of that."""
    layers = " ".join(
        f"{attention(f'a{i}', f'h{i}')} m{i} = Add(h{i}, a{i}3) {ffn(f'f{i}', f'm{i}')}"
        f" h{i + 1} = Add(m{i}, f{i}3)"
        for i in range(count)
    )
    return f"h0 = Relu(x) {layers} y = Tanh(h{count})"


# -- choosing -------------------------------------------------------------------------------------


def test_the_least_important_go_and_everyone_is_accounted_for() -> None:
    model = stack(4)
    entries = Drop(kind="ffn", count=2).choose(model, Given(cosines=[0.5, 0.9, 0.75, 0.8]))
    assert [e.candidate for e in entries] == ["f03", "f13", "f23", "f33"]
    assert statuses(entries) == ["skipped", "applied", "skipped", "applied"]
    assert [e.detail["score"] for e in entries] == pytest.approx([0.5, 0.1, 0.25, 0.2])
    assert entries[0].reason == "score 0.5; those removed have at most 0.2"
    assert entries[1].reason == "removed, 0 parameters; score 0.1"  # other layers share them
    assert json.loads(json.dumps([e.to_json() for e in entries]))


def test_a_tie_goes_to_the_first_in_the_graph() -> None:
    entries = Drop(kind="attention", count=2).choose(stack(4), Given(cosines=[0.5]))
    assert statuses(entries) == ["applied", "applied", "skipped", "skipped"]


def test_choosing_touches_nothing() -> None:
    model = stack()
    before = show_model(model)
    data = [{"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}]
    entries = Drop(kind="block").choose(model, Context(calibration=data))
    assert show_model(model) == before
    again = Drop(kind="block").choose(model, Context(calibration=data))
    assert entries == again


def test_ignored_paths_stay() -> None:
    model = zoo_ir.captured("llama")
    entries = Drop(kind="ffn", ignore=("layers.1",)).choose(model, only(1))
    assert statuses(entries) == ["applied", "skipped"]
    assert entries[1].reason == "ignored: it matches 'layers.1'"
    for pattern in ("model.layers.1.mlp", "*.1.*", "layers.?.mlp", "mlp"):
        chosen = Drop(kind="ffn", count=0, ignore=(pattern,)).choose(model, Context())
        ignored = [e.where for e in chosen if "ignored" in e.reason]
        assert ignored[-1:] == ["model.layers.1.mlp"], pattern


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PassError, match=r"ignore='layers\.7' matches no ffn") as caught:
        Drop(kind="ffn", ignore=("layers.7",)).choose(zoo_ir.captured("llama"), Context())
    assert caught.value.diagnostics[0].code == "drop.ignore"


def test_more_than_there_are_is_an_error_before_any_work() -> None:
    for kind in ("attention", "ffn", "block"):
        with pytest.raises(PassError, match="cannot remove 4 of 3") as caught:
            Drop(kind=kind, count=4).choose(stack(), Context())  # no data: it would be missed
        assert caught.value.diagnostics[0].code == "drop.count"
    with pytest.raises(
        PassError, match="cannot remove 3 of 4 block candidates: 2 can go"
    ) as caught:
        Drop(kind="block", count=3).choose(zoo_ir.captured("resnet"), Context())
    assert "its shortcut is not the stream itself" in caught.value.diagnostics[0].notes[0]


def test_what_cannot_go_is_refused() -> None:
    entries = Drop(kind="block", count=2).choose(zoo_ir.captured("resnet"), Given(cosines=[0.9]))
    assert statuses(entries) == ["applied", "refused", "applied", "refused"]
    assert entries[1].where == "resnet.encoder.stages.1.layers.0.layer"


def test_a_model_without_candidates() -> None:
    model = typed("y = MatMul(x, wq)")
    entries = Drop(kind="ffn").choose(model, Context())
    assert entries == [Entry("ffn", "skipped", "the model has no residual ffn")]
    assert not Drop(kind="ffn").edit(model, entries, Context()).changed


def test_nothing_to_do() -> None:
    model = stack()
    after, result = dropped(model, Drop(kind="ffn", count=0), Context())
    assert statuses(result.entries) == ["skipped"] * 3 and not result.changed
    assert show_model(after) == show_model(model)


def test_data_is_needed() -> None:
    with pytest.raises(PassError, match=r"drop\(kind='ffn'\) needs calibration data"):
        Drop(kind="ffn").choose(stack(), Context())


def test_options() -> None:
    wrong: dict[str, Any]
    for wrong in ({"kind": "mlp"}, {"count": -1}, {"score": "angle"}, {"layers": 3}):
        with pytest.raises(OptionError):
            Drop(**wrong)
    assert str(Drop(kind="ffn", count=2)) == "drop(kind='ffn', count=2)"
    with pytest.raises(OptionError, match="not count and params"):
        Drop(count=1, params=0.5)
    with pytest.raises(
        OptionError, match="greedy needs a score of the output: kl, mse, perplexity"
    ):
        Drop(search="greedy")


def test_of_a_branch_and_the_one_around_it_one_goes() -> None:
    layer = "u = MatMul(x, wq) h = Add(x, u) v = MatMul(h, wk)"
    model = typed(f"{layer} y = Add(x, v)")
    entries = Drop(kind="ffn").choose(model, Given(cosines=[0.9, 0.5]))
    assert [(e.candidate, e.status) for e in entries] == [("u", "applied"), ("v", "skipped")]
    with pytest.raises(PassError, match="overlaps with u"):
        Drop(kind="ffn", count=2).choose(model, Context())


def data(*shape: int, count: int = 3) -> list[Feeds]:
    """Samples of the one input ``x``."""
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def test_joint_ranks_attentions_and_ffns_together() -> None:
    entries = Drop(kind="joint", count=2).choose(stack(2), Given(cosines=[0.5, 0.9, 0.8, 0.7]))
    assert [e.candidate for e in entries] == ["a03", "f03", "a13", "f13"]
    assert statuses(entries) == ["skipped", "applied", "applied", "skipped"]


def test_uniform_spreads_what_goes_and_needs_no_data() -> None:
    def gone(count: int, of: int) -> list[int]:
        entries = Drop(kind="ffn", score="uniform", count=count).choose(stack(of), Context())
        assert all("score" not in e.detail for e in entries)
        return [at for at, e in enumerate(entries) if e.status == "applied"]

    assert gone(1, 5) == [2] and gone(2, 4) == [1, 3] and gone(3, 4) == [0, 2, 3]


def distances(model: ir.Model, feeds: Sequence[Feeds], score: str) -> list[float]:
    """What each FFN's removal does to y, by ONNX Runtime and the formula in float64."""
    found = []
    for index in range(len(Drop(kind="ffn", count=0).choose(model, Context()))):
        after, _ = dropped(model, Drop(kind="ffn"), only(index))
        pairs = [(ort.run(model, f)["y"], ort.run(after, f)["y"]) for f in feeds]
        whole, without = (np.concatenate(a).astype(np.float64) for a in zip(*pairs, strict=True))
        if score == "mse":
            found.append(((whole - without) ** 2).sum() / (whole**2).sum())
        else:
            p, q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (whole, without))
            found.append((np.exp(p) * (p - q)).sum(-1).mean())
    return found


@pytest.mark.parametrize("score", ["mse", "kl"])
def test_output_scores_are_what_the_removal_does(score: Any) -> None:
    body = stack_text(8)  # more variants than run at once
    model = typed(body.replace("y = Tanh", "logits = Tanh"), outputs="float logits")
    feeds = data(2, 5, 8)
    entries = Drop(kind="ffn", score=score, count=2).choose(model, Context(calibration=feeds))
    named = typed(body)
    expected = distances(named, feeds, score)
    # float32 models, whose outputs move by some 1e-6, and differences that are squared or of second order.
    assert [e.detail["score"] for e in entries] == pytest.approx(expected, rel=1e-3)
    least = sorted(range(8), key=expected.__getitem__)[:2]
    assert [at for at, e in enumerate(entries) if e.status == "applied"] == sorted(least)


def test_greedy_looks_again_after_each_removal() -> None:
    model, feeds = typed(stack_text(4)), data(2, 5, 8)
    pass_ = Drop(kind="ffn", score="mse", search="greedy", count=2)
    entries = pass_.choose(model, Context(calibration=feeds))
    first = int(np.argmin(distances(model, feeds, "mse")))
    assert entries[first].status == "applied"
    pairs = {}
    for other in set(range(4)) - {first}:
        chosen = [
            dataclasses.replace(e, status="applied" if at in (first, other) else "skipped")
            for at, e in enumerate(entries)
        ]
        after = model.clone()
        pass_.edit(after, chosen, Context())
        runs = [(ort.run(model, f)["y"], ort.run(after, f)["y"]) for f in feeds]
        error = sum(float(((a - b).astype(np.float64) ** 2).sum()) for a, b in runs)
        pairs[other] = error / sum(float((a.astype(np.float64) ** 2).sum()) for a, _ in runs)
    second = min(pairs, key=pairs.__getitem__)
    assert [at for at, e in enumerate(entries) if e.status == "applied"] == sorted([first, second])
    assert entries[second].detail["score"] == pytest.approx(pairs[second], rel=1e-3)


def test_perplexity_is_that_of_the_next_token() -> None:
    model = zoo_ir.captured("gpt2")
    feeds = [{k: v for k, v in f.items() if v is not None} for f in zoo_ir.feeds("gpt2")]
    entries = Drop(kind="ffn", score="perplexity").choose(model, Context(calibration=feeds))

    def loss(at: ir.Model) -> float:
        rows = []
        for feed in feeds:
            logits = ort.run(at, inputs_of(at, feed))["logits"].astype(np.float64)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            loss = -np.take_along_axis(logs[:, :-1], feed["input_ids"][:, 1:, None], 2)[..., 0]
            rows.append(loss[feed["attention_mask"][:, 1:] != 0])
        return float(np.concatenate(rows).mean())

    after, _ = dropped(model, Drop(kind="ffn"), only(0))
    # Of a loss of some 5 nats float32 keeps 6 digits.
    assert entries[0].detail["score"] == pytest.approx(loss(after) - loss(model), abs=1e-5)


def test_perplexity_needs_a_language_model() -> None:
    with pytest.raises(PassError, match="ids \\[b, t\\] as an input"):
        Drop(kind="ffn", score="perplexity").choose(stack(), Context(calibration=data(2, 5, 8)))
    with pytest.raises(PassError, match="no output of the model is logits or probabilities"):
        Drop(kind="ffn", score="kl").choose(stack(), Context(calibration=data(2, 5, 8)))


def test_a_number_of_parameters_is_met_at_the_least_sum_of_scores() -> None:
    """Against all sets, tried one by one."""
    model = zoo_ir.captured("llama")
    total = cost(model).params
    every = Drop(kind="joint", count=0).choose(model, Context())
    sizes = [e.detail["parameters"] for e in every]
    rng = np.random.default_rng(3)
    for params in (0.95, 0.8, 0.7, 0.62):
        scores = rng.random(len(sizes))
        ctx = Given(cosines=list(1.0 - scores))
        entries = Drop(kind="joint", params=params).choose(model, ctx)
        applied = {at for at, e in enumerate(entries) if e.status == "applied"}
        need = total * (1 - params)
        sets = [
            s
            for count in range(len(sizes) + 1)
            for s in itertools.combinations(range(len(sizes)), count)
            if sum(sizes[at] for at in s) >= need
        ]
        assert applied == set(min(sets, key=lambda s: sum(scores[at] for at in s))), params
        after = model.clone()
        Drop(kind="joint").edit(after, entries, Context())
        assert cost(after).params <= params * total


def test_out_of_reach() -> None:
    with pytest.raises(PassError, match="attention candidates that can go have") as caught:
        Drop(params=0.1).choose(zoo_ir.captured("llama"), Context())
    assert caught.value.diagnostics[0].code == "drop.params"


# -- editing equals its reference -------------------------------------------------------------------


def assert_simulated(
    model: ir.Model, pass_: Drop, ctx: Context, feeds: Sequence[Feeds]
) -> tuple[ir.Model, Result]:
    """The edited model equals the reference at every feed, and differs from the model before it."""
    after, result = dropped(model, pass_, ctx)
    reference = pass_.simulate(model.clone(), result.entries)
    moved = 0.0
    for feed in feeds:
        before = ort.run(model, feed)
        actual, expected = ort.run(after, inputs_of(after, feed)), ort.run(reference.model, feed)
        assert actual.keys() == expected.keys()
        for name, array in actual.items():
            assert relative_error(array, expected[name]) <= reference.tolerance
            moved = max(moved, relative_error(array, before[name]))
    # A branch of the zoo is at least a percent of its stream.
    assert moved > 1e-3
    return after, result


def sweep(name: str, kind: str) -> int:
    """Drop every candidate alone, then all of them; how many there are."""
    model, feeds = zoo_ir.captured(name), zoo_ir.feeds(name)
    every = Drop(kind=kind, count=0).choose(model, Context())  # type: ignore[arg-type]
    free = [e for e in every if e.status != "refused" and e.detail]
    for index in range(len(free)):
        assert_simulated(model, Drop(kind=kind), only(index), feeds)  # type: ignore[arg-type]
    if len(free) > 1:
        all_ = Drop(kind=kind, count=len(free))  # type: ignore[arg-type]
        assert_simulated(model, all_, Given(cosines=[0.5]), feeds)
    return len(free)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("llama", "attention", 2), ("phi", "ffn", 2), ("phi", "block", 2), ("resnet", "block", 2)],
)
def test_edit_equals_reference(name: str, kind: str, count: int) -> None:
    assert sweep(name, kind) == count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "ffn", "block"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_edit_equals_reference_on_every_family(name: str, kind: str) -> None:
    assert sweep(name, kind) > 0 or kind != "block" or name == "efficientnet"


def test_weights_and_names() -> None:
    model = stack()
    after, result = dropped(model, Drop(kind="ffn"), only(1))
    gone = {"f1", "f11", "f12", "f13", "h2"}
    assert {n for n, new in result.renamed.items() if new is None} >= gone - {"h2"}
    assert result.renamed["h2"] == "m1"
    made = {value.name for node in after.graph for value in node.outputs}
    assert not made & gone
    assert "up" in after.graph.initializers  # two other layers share it
    after, result = dropped(zoo_ir.captured("llama"), Drop(kind="ffn"), only(0))
    assert result.entries[0].reason == "removed, 30784 parameters; score 0.1"  # 3 * 64 * 160 + 64
    mlp = [name for name in after.graph.initializers if "layers.0.mlp" in name]
    assert not mlp and "model.layers.1.mlp.up_proj.weight" in after.graph.initializers


def test_an_output_keeps_its_name() -> None:
    model = typed(ffn("f", "x") + " y = Add(x, f3)")
    after, result = dropped(model, Drop(kind="ffn"), only(0))
    assert [n.op_type for n in after.graph] == ["Identity"] and len(after.graph.outputs) == 1
    assert after.graph.outputs[0].name == "y" and result.changed
    body = f"{ffn('f', 'x')} h = Add(x, f3) {ffn('e', 'h')} y = Add(h, e3)"
    after, result = dropped(typed(body), Drop(kind="ffn"), only(1))
    assert after.graph.outputs[0].name == "y" and result.renamed["h"] == "y"
    assert after.graph.outputs[0].producer() is not None


def test_a_norm_behind_the_sum_stays() -> None:
    body = """u = MatMul(x, up) r = Relu(u) d = MatMul(r, down) t = Add(d, x)
        y = LayerNormalization(t, g)"""
    after, _ = dropped(typed(body), Drop(kind="ffn"), only(0))
    assert [n.op_type for n in after.graph] == ["LayerNormalization"]
    assert after.graph.outputs[0].producer().inputs[0] is after.graph.inputs[0]  # type: ignore[union-attr]


def test_the_reference_adds_nothing_even_where_the_branch_is_not_finite() -> None:
    body = "u = MatMul(x, up) l = Log(u) d = MatMul(l, down) y = Add(x, d)"
    model = typed(body)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}
    assert np.isnan(ort.run(model, feed)["y"]).any()
    pass_ = Drop(kind="ffn")
    reference = pass_.simulate(model.clone(), pass_.choose(model, only(0)))
    assert np.array_equal(ort.run(reference.model, feed)["y"], feed["x"])


def test_half_precision() -> None:
    halves: dict[str, Any] = {k: v.astype(np.float16) for k, v in WEIGHTS.items()}
    body = f"h = Relu(x) {ffn('f', 'h')} t = Add(h, f3) y = Tanh(t)"
    model = typed(body, inputs="float16[b,s,8] x", outputs="float16 y", **halves)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float16)}
    assert_simulated(model, Drop(kind="ffn"), only(0), [feed])


# -- in the pipeline --------------------------------------------------------------------------------


class WrongOperand(Drop):
    """Keeps the branch and drops the stream."""

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """The wrong edit; the ledger is the right one."""
        wrong = [
            dataclasses.replace(
                entry,
                detail={
                    **entry.detail,
                    "operands": [[name, 1 - at] for name, at in entry.detail["operands"]],
                },
            )
            for entry in chosen
        ]
        result = super().edit(model, wrong, ctx)
        return dataclasses.replace(result, entries=list(chosen))


def calibrated(captured: Captured) -> Context:
    return Context(calibration=[captured.sample({"b": 2, "s": 6}, seed) for seed in range(2)])


def test_the_manager_checks_it() -> None:
    captured = captured_of(stack())
    passes = [Drop(kind="ffn"), Drop(kind="block")]
    compiled = manager.run(captured, passes, calibrated(captured), strict=True)
    for step in compiled.steps:
        assert step.check.against == "simulated reference" and step.check.error == 0.0
        assert step.loss is not None and step.loss.cosine < 1
    first = compiled.steps[0]
    assert first.cost_after.params == first.cost_before.params  # shared by the other layers
    assert first.cost_after.macs is not None and first.cost_before.macs is not None
    assert first.cost_after.macs < first.cost_before.macs


def test_the_manager_catches_a_wrong_edit() -> None:
    captured = captured_of(stack())
    with pytest.raises(VerifyError, match="drop"):
        manager.run(captured, [WrongOperand(kind="ffn")], calibrated(captured))


# -- caches -----------------------------------------------------------------------------------------


def test_a_cache_goes_with_its_attention() -> None:
    model = cached()
    rng = np.random.default_rng(0)
    past = {n: rng.standard_normal((2, 3, 8)).astype(np.float32) for n in ("k0", "v0", "k1", "v1")}
    feed = {"x": rng.standard_normal((2, 5, 8)).astype(np.float32), **past}
    for layer in (0, 1):
        after, result = assert_simulated(model, Drop(kind="attention"), only(layer), [feed])
        gone = {f"k{layer}", f"v{layer}"}
        kept = {"x", "k0", "v0", "k1", "v1"} - gone
        assert {v.name for v in after.graph.inputs} == kept
        stays = 1 - layer
        assert [v.name for v in after.graph.outputs] == ["y", f"nk{stays}", f"nv{stays}"]
        assert {n for n in result.renamed if n in feed} == gone
        (entry,) = [e for e in result.entries if e.status == "applied"]
        assert set(entry.detail["cache_inputs"]) == gone
        assert f"k{layer}, v{layer} gone, other layers' caches keep" in entry.reason


def test_a_cache_inside_attention_itself() -> None:
    body = """h = Relu(x) q = MatMul(h, wq) k = MatMul(h, wk) v = MatMul(h, wv)
        a, nk, nv = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v, mask, pk, pv)
        o = MatMul(a, wo) t = Add(h, o) y = Tanh(t)"""
    inputs = "float[b,s,8] x, float[s,u] mask, float[b,2,p,4] pk, float[b,2,p,4] pv"
    model = typed(body, inputs, "float y, float nk, float nv")
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3, 8), "mask": (3, 7), "pk": (2, 2, 4, 4), "pv": (2, 2, 4, 4)}
    feed = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    after, _ = assert_simulated(model, Drop(), only(0), [feed])
    assert [n.op_type for n in after.graph] == ["Relu", "Tanh"]
    assert [v.name for v in after.graph.inputs] == ["x", "mask"]  # a mask is no cache
    assert [v.name for v in after.graph.outputs] == ["y"]


def test_passes_after_it_do_without_the_cache() -> None:
    captured = captured_of(cached(size_from="x"))
    sizes = {"b": 2, "s": 3, "p": 4}
    ctx = Context(calibration=[captured.sample(sizes, seed) for seed in range(2)])
    compiled = manager.run(captured, [Drop(), Drop()], ctx)
    assert [v.name for v in compiled.model.graph.inputs] == ["x"]
    assert [v.name for v in compiled.model.graph.outputs] == ["y"]
    assert [step.check.error for step in compiled.steps] == [0.0, 0.0]


def test_the_last_cache_is_kept_for_its_size() -> None:
    with pytest.raises(PassError, match="2 attention candidates: 1 can go") as caught:
        Drop(kind="attention", count=2).choose(cached(), Context())
    assert "the model reads a size from" in caught.value.diagnostics[0].notes[0]


@pytest.fixture(scope="module")
def llama_with_cache(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    from netlathe.frontends.huggingface import HuggingFaceDirectory

    folder: Path = tmp_path_factory.mktemp("llama")
    module: Any = zoo.build("llama").module
    module.save_pretrained(folder)
    return HuggingFaceDirectory(cache=True).capture(folder)


def test_text_is_generated_through_the_caches_that_stay(llama_with_cache: Captured) -> None:
    model = llama_with_cache.model
    after, _ = dropped(model, Drop(kind="attention"), only(1))  # masks read the length from it
    caches = [v.name for v in after.graph.inputs if "past" in (v.name or "")]
    assert caches == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [v.name for v in after.graph.outputs] == ["logits", "present.0.key", "present.0.value"]

    module = module_of("llama")
    ids = torch.randint(3, zoo.VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    past = {n: np.zeros((2, 2, 0, 16), np.float32) for n in caches if n}
    new = ids.numpy()
    with silenced(module, "model.layers.1.self_attn"), torch.no_grad():
        for _ in range(4):
            mask = np.ones(ids.shape, np.int64)
            got = ort.run(after, {"input_ids": new, "attention_mask": mask, **past})
            whole = module(input_ids=ids).logits.numpy()
            assert relative_error(got["logits"], whole[:, -new.shape[1] :]) < BOUND
            past = {n: got[n.replace("past_key_values", "present")] for n in past}
            new = got["logits"][:, -1:].argmax(-1)
            ids = torch.cat([ids, torch.from_numpy(new)], 1)


def test_no_attention_is_left_to_have_a_cache(llama_with_cache: Captured) -> None:
    model = llama_with_cache.model
    feed = llama_with_cache.sample({"batch": 2, "sequence": 3, "past_sequence": 4}, 0)
    after, _ = assert_simulated(
        model, Drop(kind="attention", count=2), Given(cosines=[0.5]), [feed]
    )
    assert [v.name for v in after.graph.inputs] == ["input_ids", "attention_mask"]
    assert [v.name for v in after.graph.outputs] == ["logits"]


# -- against eager torch ----------------------------------------------------------------------------


@lru_cache(maxsize=2)
def module_of(name: str) -> nn.Module:
    """The eager model; hooks on it are taken off after use."""
    return zoo.build(name).module


@contextmanager
def silenced(module: nn.Module, *paths: str) -> Iterator[None]:
    """Submodules give zeros."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])

    handles = [module.get_submodule(path).register_forward_hook(hook) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


EAGER = [
    ("minilm", "attention", 3, ("encoder.layer.3.attention.output.dense",)),
    ("minilm", "ffn", 2, ("encoder.layer.2.output.dense",)),
    ("llama", "ffn", 1, ("model.layers.1.mlp",)),
    ("phi", "attention", 0, ("model.layers.0.self_attn",)),
    ("phi", "block", 1, ("model.layers.1.self_attn", "model.layers.1.mlp")),
    ("t5", "attention", 3, ("decoder.block.0.layer.1.EncDecAttention",)),
    ("convnext", "block", 2, ("convnext.encoder.stages.1.layers.0.pwconv2",)),
    ("resnet", "block", 1, ("resnet.encoder.stages.1.layers.1.layer.2",)),
]


@pytest.mark.parametrize(("name", "kind", "index", "paths"), EAGER)
def test_dropping_is_silencing_the_module(
    name: str, kind: Any, index: int, paths: tuple[str, ...]
) -> None:
    recipe = zoo.build(name)
    after, _ = dropped(zoo_ir.captured(name), Drop(kind=kind), only(index))
    for sizes in recipe.sizes:
        given = recipe.feeds(sizes, 5)
        with silenced(recipe.module, *paths), torch.no_grad():
            expected = recipe.module(**given)
        feed = {key: tensor.numpy() for key, tensor in given.items()}
        actual = ort.run(after, inputs_of(after, feed))
        for output in recipe.outputs:
            assert relative_error(actual[output], expected[output].numpy()) < BOUND


@contextmanager
def seen(module: nn.Module, *paths: str) -> Iterator[dict[str, tuple[Any, Any]]]:
    """What submodules were given (first positional) and gave, by path."""
    found: dict[str, tuple[Any, Any]] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = args[0] if args else kwargs["hidden_states"]
            found[path] = (first, output if isinstance(output, torch.Tensor) else output[0])

        return hook

    handles = [
        module.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True)
        for path in paths
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def importance(pairs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
    """1 - E[cos(x, y)] over the tokens that a mask keeps, in float64."""
    cosines = [
        torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)[mask.bool()]
        for x, y, mask in pairs
    ]
    return 1 - float(torch.cat(cosines).mean())


# Activations differ by 1e-5 of their RMS; a cosine by at most twice that.
SCORE_BOUND = 2 * BOUND


def scores_of(name: str, kind: Any) -> list[float]:
    ctx = Context(calibration=zoo_ir.feeds(name, seed=3))
    entries = Drop(kind=kind).choose(zoo_ir.captured(name), ctx)
    assert statuses(entries).count("applied") == 1
    applied = next(e for e in entries if e.status == "applied")
    assert applied.detail["score"] == min(e.detail["score"] for e in entries)
    return [entry.detail["score"] for entry in entries]


def eager_scores(
    name: str, paths: Sequence[str], stream: Callable[[dict[str, tuple[Any, Any]]], Any]
) -> list[float]:
    """One score per pair of streams that ``stream`` makes of what was seen, over all feeds."""
    module = module_of(name)
    gathered: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = []
    for feed in zoo_ir.feeds(name, seed=3):
        given = {key: torch.from_numpy(array) for key, array in feed.items()}
        with seen(module, *paths) as found, torch.no_grad():
            module(**given)
        mask = given["attention_mask"]
        gathered.append([(x, y, mask) for x, y in stream(found)])
    return [importance(pairs) for pairs in zip(*gathered, strict=True)]


def test_scores_of_minilm() -> None:
    layers = range(6)
    norms = [f"encoder.layer.{i}.attention.output.LayerNorm" for i in layers]
    inputs = [f"encoder.layer.{i}.attention.self.query" for i in layers]
    expected = eager_scores(
        "minilm",
        norms + inputs,
        lambda found: [(found[inputs[i]][0], found[norms[i]][0]) for i in layers],
    )
    assert scores_of("minilm", "attention") == pytest.approx(expected, abs=SCORE_BOUND)
    norms = [f"encoder.layer.{i}.output.LayerNorm" for i in layers]
    inputs = [f"encoder.layer.{i}.intermediate.dense" for i in layers]
    expected = eager_scores(
        "minilm",
        norms + inputs,
        lambda found: [(found[inputs[i]][0], found[norms[i]][0]) for i in layers],
    )
    assert scores_of("minilm", "ffn") == pytest.approx(expected, abs=SCORE_BOUND)
    paths = [f"encoder.layer.{i}" for i in layers]
    expected = eager_scores("minilm", paths, lambda found: [found[path] for path in paths])
    assert scores_of("minilm", "block") == pytest.approx(expected, abs=SCORE_BOUND)


def test_scores_of_llama() -> None:
    layers = [f"model.layers.{i}" for i in range(2)]
    norms = [f"{layer}.post_attention_layernorm" for layer in layers]

    def attention_streams(found: dict[str, tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        return [(found[a][0], found[n][0]) for a, n in zip(layers, norms, strict=True)]

    def ffn_streams(found: dict[str, tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        return [(found[n][0], found[a][1]) for a, n in zip(layers, norms, strict=True)]

    paths = [*layers, *norms]
    for kind, stream in (("attention", attention_streams), ("ffn", ffn_streams)):
        expected = eager_scores("llama", paths, stream)
        assert scores_of("llama", kind) == pytest.approx(expected, abs=SCORE_BOUND)
    expected = eager_scores("llama", layers, lambda found: [found[a] for a in layers])
    assert scores_of("llama", "block") == pytest.approx(expected, abs=SCORE_BOUND)


def test_scores_of_parallel_branches() -> None:
    layers = [f"model.layers.{i}" for i in range(2)]
    for kind, part in (("attention", "self_attn"), ("ffn", "mlp")):
        paths = [*layers, *(f"{layer}.{part}" for layer in layers)]
        expected = eager_scores(
            "phi",
            paths,
            lambda found, part=part: [
                (found[a][0], found[a][0] + found[f"{a}.{part}"][1]) for a in layers
            ],
        )
        assert scores_of("phi", kind) == pytest.approx(expected, abs=SCORE_BOUND)


def test_feature_maps_are_compared_by_pixel() -> None:
    feeds = zoo_ir.feeds("convnext", seed=3)
    entries = Drop(kind="block").choose(zoo_ir.captured("convnext"), Context(calibration=feeds))
    module = module_of("convnext")
    path = "convnext.encoder.stages.0.layers.0"
    pairs = []
    for feed in feeds:
        with seen(module, path) as found, torch.no_grad():
            module(torch.from_numpy(feed["pixel_values"]))
        x, y = (tensor.movedim(1, -1) for tensor in found[path])
        pairs.append((x, y, torch.ones(x.shape[:-1])))
    assert entries[0].detail["score"] == pytest.approx(importance(pairs), abs=SCORE_BOUND)
