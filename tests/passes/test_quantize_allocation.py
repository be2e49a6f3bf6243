"""Bits by a budget: the exact choice, what is measured, ranks of layers, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import OptionError, PassError
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.ir import normal, weights
from netlathe.passes.quantize import Quantize, allocation, ledger
from netlathe.pipeline.pass_ import Context
from tests import zoo_ir
from tests.ir.onnx_text import matrix, model

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [sorted(rng.integers(1, 40, 3).tolist()) for _ in range(6)]
    costs = [sorted(rng.random(3).tolist(), reverse=True) for _ in range(6)]
    budget = int(rng.integers(sum(s[0] for s in sizes), sum(s[2] for s in sizes)))
    chosen = allocation.knapsack(sizes, costs, budget)
    every = itertools.product(range(3), repeat=6)
    fit = [p for p in every if sum(s[at] for s, at in zip(sizes, p, strict=True)) <= budget]
    least = min(sum(c[at] for c, at in zip(costs, p, strict=True)) for p in fit)
    assert sum(s[at] for s, at in zip(sizes, chosen, strict=True)) <= budget
    assert abs(sum(c[at] for c, at in zip(costs, chosen, strict=True)) - least) <= 1e-12


def test_many_bytes_are_counted_in_units_and_never_exceeded() -> None:
    sizes = [[10_000_001, 20_000_003, 40_000_007]] * 5
    costs = [[3.0 * k, 2.0 * k, 1.0 * k] for k in range(1, 6)]
    chosen = allocation.knapsack(sizes, costs, 120_000_100)
    assert sum(s[at] for s, at in zip(sizes, chosen, strict=True)) <= 120_000_100
    assert chosen == sorted(chosen), "those that cost more are wider"
    assert allocation.knapsack(sizes, costs, 50_000_005) == [0] * 5


def chain() -> tuple[ir.Model, Context]:
    body = "a = MatMul (x, w) r = Relu (a) b = MatMul (r, v) y = MatMul (b, u)"
    made = model(
        "float[b,s,32] x",
        "float y",
        body,
        w=matrix(32, 48),
        v=matrix(48, 32, seed=1),
        u=matrix(32, 16, seed=2),
    )
    normal.normalize(made)
    return made, Context(calibration=[{"x": matrix(2, 20, 32, seed=9)}])


OPTIONS: dict[str, Any] = {"min_size": 0, "group_size": 16, "scales": "float16"}


def test_costs_are_what_outputs_lose() -> None:
    made, ctx = chain()
    pass_ = Quantize(bits=4.5, formats=("int2", "int4", "int6"), **OPTIONS)
    chosen = pass_.choose(made, ctx)
    fed = dict(ctx.calibration[0])
    expected = ort.run(made, fed)["y"].astype(np.float64)
    for entry in chosen:
        assert entry.detail["sensitivity"]["by"] == "mse"
        for name in ("int2", "int4", "int6"):
            (alone,) = (
                e
                for e in Quantize(weights=name, **OPTIONS).choose(made, ctx)
                if e.candidate == entry.candidate
            )
            copy = made.clone()
            value = copy.graph.initializers[entry.candidate]
            value.const_value = ir.tensor(ledger.quantized(weights.array(value), alone))
            lost = np.square(ort.run(copy, fed)["y"] - expected).sum() / np.square(expected).sum()
            assert abs(entry.detail["sensitivity"][name] - lost) <= 1e-3 * lost
    size = sum(e.detail["bytes"] for e in chosen)
    elements = sum(np.prod(e.detail["dims"]) for e in chosen)
    assert 8 * size / elements <= 4.5
    assert {e.detail["weights"] for e in chosen} <= {"int2", "int4", "int6"}


def test_a_budget_is_better_spent_where_it_counts() -> None:
    before = zoo_ir.captured("llama")
    ctx = Context(calibration=[inputs_of(before, fed) for fed in zoo_ir.feeds("llama")])
    fed = dict(ctx.calibration[0])
    options = OPTIONS | {"group_size": 32}
    expected = ort.run(before, fed)["logits"]
    lost = {}
    for sensitivity in ("kl", "mse", "lim", "zd"):
        pass_ = Quantize(bits=3.5, formats=("int2", "int4"), sensitivity=sensitivity, **options)  # type: ignore[arg-type]
        chosen = [e for e in pass_.choose(before, ctx) if e.status == "applied"]
        size, elements = (
            sum(e.detail["bytes"] for e in chosen),
            sum(int(np.prod(e.detail["dims"])) for e in chosen),
        )
        assert 3.0 < 8 * size / elements <= 3.5
        assert len({e.detail["weights"] for e in chosen}) == 2
        assert all(sensitivity in e.reason for e in chosen)
        after = before.clone()
        pass_.edit(after, chosen, ctx)
        normal.normalize(after)
        output = ort.run(after, inputs_of(after, fed))["logits"]
        assert np.array_equal(
            ort.run(pass_.simulate(before.clone(), chosen).model, fed)["logits"], output
        )
        lost[sensitivity] = float(np.square(output - expected).mean())
    assert lost["mse"] < lost["zd"] and lost["mse"] < lost["lim"]


def test_ranks_of_layers() -> None:
    before = zoo_ir.captured("llama")
    ctx = Context(calibration=[inputs_of(before, fed) for fed in zoo_ir.feeds("llama")])
    pass_ = Quantize(bits=3.9, formats=("int4", "int2"), sensitivity="zd", **OPTIONS)
    by_layer: dict[int, set[str]] = {}
    shares: dict[int, float] = {}
    for layer in (0, 1):
        names = [n for n in before.graph.initializers if f"layers.{layer}." in n and "proj" in n]
        w = np.concatenate([weights.array(before.graph.initializers[n]).ravel() for n in names])
        shares[layer] = float((w > w.mean() + w.std()).mean())
    for entry in pass_.choose(before, ctx):
        for layer in (0, 1):
            if f"layers.{layer}." in entry.candidate and entry.status == "applied":
                by_layer.setdefault(layer, set()).add(entry.detail["weights"])
                assert abs(entry.detail["sensitivity"]["score"] + shares[layer]) <= 1e-6
    first = min(shares, key=shares.__getitem__)
    assert by_layer[first] == {"int4"}, "fewer large weights: more important"
    assert by_layer[1 - first] == {"int2"}


def test_overrides_keep_their_format_and_are_not_counted() -> None:
    made, ctx = chain()
    pass_ = Quantize(
        bits=4.6, formats=("int2", "int4"), overrides={"u": {"weights": "int8"}}, **OPTIONS
    )
    by_name = {entry.candidate: entry for entry in pass_.choose(made, ctx)}
    assert by_name["u"].detail["weights"] == "int8" and "sensitivity" not in by_name["u"].detail


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 3.0}, "give both"),
        ({"formats": ("int4",)}, "give both"),
        ({"bits": 4.0, "formats": ("int4", "int4")}, "names one twice"),
        ({"bits": 4.0, "formats": ("int4", "int3", "int2"), "sensitivity": "zd"}, "two formats"),
        ({"bits": 4.0, "formats": ("int4", "int2"), "low_rank": 4}, "leave one out"),
    ],
)
def test_settings_that_contradict_each_other(options: dict[str, Any], says: str) -> None:
    made, ctx = chain()
    with pytest.raises(OptionError, match=says):
        Quantize(min_size=0, **options).choose(made, ctx)


def test_budgets_that_cannot_be_met_and_data_that_is_missing() -> None:
    made, ctx = chain()
    with pytest.raises(PassError, match=r"bits=2.0 cannot be reached.* 3.000 bits a weight"):
        Quantize(bits=2.0, formats=("int2", "int4"), **OPTIONS).choose(made, ctx)
    with pytest.raises(PassError, match="sensitivity='mse' needs calibration data"):
        Quantize(bits=4.0, formats=("int2", "int4"), **OPTIONS).choose(made, Context())
    with pytest.raises(PassError, match="no residual layers"):
        pass_ = Quantize(bits=4.0, formats=("int2", "int4"), sensitivity="zd", **OPTIONS)
        pass_.choose(made, Context())
    with pytest.raises(PassError, match="no output of the model is logits"):
        pass_ = Quantize(bits=4.0, formats=("int2", "int4"), sensitivity="kl", **OPTIONS)
        pass_.choose(made, ctx)
    with pytest.raises(PassError, match="there are none"):
        everything: dict[str, Any] = {"*": {"weights": "int8"}}
        Quantize(bits=4.0, formats=("int2", "int4"), overrides=everything, **OPTIONS).choose(
            made, ctx
        )
