"""Scores, allocations and compensations against their formulas in float64, and through the pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.analysis import axes as axis_analysis
from netlathe.analysis.cost import cost
from netlathe.diagnostics import PassError
from netlathe.execute.executor import Executor
from netlathe.ir import normal
from netlathe.passes.prune import Prune, allocation, compensation, distortion
from netlathe.passes.prune.candidates import Candidate, find_candidates
from netlathe.passes.prune.scores import SCORES, measure
from netlathe.pipeline.pass_ import Context
from tests import zoo_ir
from tests.execute import text
from tests.passes.prune.helpers import check, error_to_reference, pruned

Array = np.ndarray[Any, np.dtype[Any]]
VOCAB, WIDTH, INNER = 13, 8, 10
# Activations are float32 and sums float64: 2**-24 a product, and cancellation in a difference.
CLOSE = 1e-5

LM = f"""
agraph (int64[b, t] ids) => (float[b, t, {VOCAB}] logits)
{{
    x = Gather <axis = 0> (table, ids)
    h = MatMul (x, up)
    i = Add (h, up_bias)
    a = Relu (i)
    y = MatMul (a, down)
    r = Add (x, y)
    logits = MatMul (r, head)
}}
"""


@lru_cache
def _weights() -> Mapping[str, Array]:
    rng = np.random.default_rng(3)
    sizes = {"table": (VOCAB, WIDTH), "up": (WIDTH, INNER), "up_bias": (INNER,)}
    sizes |= {"down": (INNER, WIDTH), "head": (WIDTH, VOCAB)}
    return {name: rng.normal(0, 0.6, size).astype("f4") for name, size in sizes.items()}


def made(**changed: Array) -> ir.Model:
    model = text.model(LM, {**_weights(), **changed})
    model.graph.opset_imports[""] = 25  # its operators are the same there
    normal.normalize(model)
    return model


def context(samples: int = 6, **options: Any) -> Context:
    rng = np.random.default_rng(4)
    return Context(
        calibration=[{"ids": rng.integers(0, VOCAB, (2, 7))} for _ in range(samples)], **options
    )


def ffn_of(model: ir.Model) -> Candidate:
    found = find_candidates(axis_analysis.analyse(model))
    (candidate,) = [c for c in found if c.scope == "ffn"]
    return candidate


def activation(ctx: Context) -> Array:
    """The rows of ``a`` over the calibration data, in float64."""
    executor = Executor(made())
    rows = [executor.run(feeds, ["a"])["a"].numpy() for feeds in ctx.calibration]
    return np.concatenate([r.reshape(-1, INNER) for r in rows]).astype(np.float64)


def wide(name: str) -> Array:
    return _weights()[name].astype(np.float64)


def fpgm() -> Array:
    up = wide("up").T
    return np.asarray(np.linalg.norm(up[:, None] - up[None, :], axis=2).sum(1))


def group_norm() -> Array:
    squares = np.square(wide("up")).sum(0) + np.square(wide("down")).sum(1)
    return np.asarray(np.sqrt(squares + np.square(wide("up_bias"))))


FORMULAS: dict[str, Callable[[Array], Array]] = {
    "l1": lambda a: np.abs(wide("up")).sum(0),
    "l2": lambda a: np.sqrt(np.square(wide("up")).sum(0)),
    "group_norm": lambda a: group_norm(),
    "fpgm": lambda a: fpgm(),
    "wanda": lambda a: np.abs(wide("down")).sum(1) * np.sqrt(np.square(a).mean(0)),
    "flap": lambda a: a.var(0) * np.square(wide("down")).sum(1),
    "cfsp": lambda a: np.sqrt(np.square(a).mean(0)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_is_its_formula(name: str) -> None:
    model, ctx = made(), context()
    candidate = ffn_of(model)
    found = measure(name, [candidate], model, ctx)[candidate]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, FORMULAS[name](activation(ctx)), rtol=CLOSE)


def test_taylor_is_the_mean_magnitude_of_the_gradient_of_a_gate() -> None:
    """|dL/dm| for a gate m on a row of ``down``, by central differences of the loss in float64.

    Texts of two tokens have one label each.
    """
    rng = np.random.default_rng(4)
    ctx = Context(calibration=[{"ids": rng.integers(0, VOCAB, (1, 2))} for _ in range(9)])
    model = made()
    candidate = ffn_of(model)
    found = measure("taylor", [candidate], model, ctx)[candidate]

    def loss(ids: Array, position: int, gate: float) -> float:
        down = wide("down").copy()
        down[position] *= gate
        x = wide("table")[ids]
        a = np.maximum(x @ wide("up") + wide("up_bias"), 0)
        z = (x + a @ down) @ wide("head")
        logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return -float(np.take_along_axis(logs[:, :-1], ids[:, 1:, None], -1).sum())

    step = 2.0**-13
    for position in range(INNER):
        slopes = [
            (loss(f["ids"], position, 1 + step) - loss(f["ids"], position, 1 - step)) / (2 * step)
            for f in ctx.calibration
        ]
        assert found[position] == pytest.approx(np.abs(slopes).mean(), abs=1e-5)


def test_obd_is_half_the_fisher_information_of_a_gate() -> None:
    """x^2 w (diag(p) - p p^T) w^T / 2 averaged over rows; its draws come within 5 deviations."""
    model, ctx = made(), context(400)
    candidate = ffn_of(model)
    found = measure("obd", [candidate], model, ctx)[candidate]
    x = np.concatenate([wide("table")[f["ids"]].reshape(-1, WIDTH) for f in ctx.calibration])
    a = np.maximum(x @ wide("up") + wide("up_bias"), 0)
    z = (x + a @ wide("down")) @ wide("head")
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    v = wide("down") @ wide("head")  # [positions, vocab]
    spread = (p @ np.square(v).T) - np.square(p @ v.T)  # of v under p, for each row
    exact = (np.square(a) * spread).mean(0) / 2
    # 5600 rows, and a kurtosis of the product of at most 20 or so: sqrt(20 / 5600) * 5 = 0.3. A position
    # that one token of 13 wakes sees fewer.
    np.testing.assert_allclose(found, exact, rtol=0.3, atol=1e-3 * exact.max())


def test_optin_is_the_way_a_masked_position_leads_astray() -> None:
    model, ctx = made(), context(2)
    candidate = ffn_of(model)
    found = measure("optin", [candidate], model, ctx)[candidate]
    x = wide("table")[ctx.calibration[0]["ids"]]
    a = np.maximum(x @ wide("up") + wide("up_bias"), 0)
    stream = x + a @ wide("down")
    for position in range(INNER):
        masked = a.copy()
        masked[..., position] = 0
        other = x + masked @ wide("down")
        change = np.square(other - stream).sum() / np.square(stream).sum()
        logits, after = stream @ wide("head"), other @ wide("head")
        change += np.square(after - logits).sum() / np.square(logits).sum()
        # Differences of float32: 2**-24 of the values, squared, beside what is left of them.
        assert found[position] == pytest.approx(change, rel=1e-4, abs=1e-12)


def test_bn_gamma_is_the_magnitude_of_the_gain() -> None:
    """Of channels that two batch norms see, such as those of a residual stream, the sum of both."""
    rng = np.random.default_rng(5)
    made_ = {
        "w1": rng.normal(size=(6, 3, 3, 3)),
        "w2": rng.normal(size=(6, 6, 3, 3)),
        "w3": rng.normal(size=(4, 6, 1, 1)),
        **{f"{name}{n}": rng.normal(size=6) for n in (1, 2) for name in ("gain", "bias", "mean")},
        **{f"var{n}": rng.uniform(0.5, 2, 6) for n in (1, 2)},
    }
    model = text.model(
        """
        agraph (float[b, 3, 8, 8] x) => (float[b, 4, 8, 8] y)
        {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            s = BatchNormalization (a, gain1, bias1, mean1, var1)
            r = Relu (s)
            c = Conv <pads = [1, 1, 1, 1]> (r, w2)
            n = BatchNormalization (c, gain2, bias2, mean2, var2)
            t = Add (s, n)
            y = Conv (t, w3)
        }
        """,
        {name: array.astype("f4") for name, array in made_.items()},
    )
    model.graph.opset_imports[""] = 25
    normal.normalize(model)
    (candidate,) = [c for c in find_candidates(axis_analysis.analyse(model)) if c.size == 6]
    scores = measure("bn_gamma", [candidate], model, Context())[candidate]
    gains = [made_[f"gain{n}"].astype("f4").astype(np.float64) for n in (1, 2)]
    np.testing.assert_array_equal(scores, np.abs(gains[0]) + np.abs(gains[1]))


def test_random_scores_depend_on_the_seed_alone() -> None:
    model = made()
    candidate = ffn_of(model)

    def scores(seed: int) -> Array:
        return measure("random", [candidate], model, Context(seed=seed))[candidate]

    np.testing.assert_array_equal(scores(3), scores(3))
    assert len({*scores(3).tolist(), *scores(4).tolist()}) == 2 * INNER
    assert ((scores(3) >= 0) & (scores(3) < 1)).all()


@pytest.mark.parametrize("name", ["wanda", "flap", "cfsp", "taylor", "obd", "optin"])
def test_a_score_without_its_data_is_refused(name: Any) -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Prune(ratio=0.5, score=name).choose(made(), Context())


def test_a_score_that_says_nothing_is_refused() -> None:
    with pytest.raises(PassError, match="no batch norm normalizes it"):
        Prune(ratio=0.5, scope=("ffn",), score="bn_gamma").choose(made(), Context())


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"bn_gamma", "frequency"}))
def test_every_score_prunes_to_its_masked_reference(name: Any) -> None:
    model, ctx = made(), context(2)
    pass_ = Prune(ratio=0.5, scope=("ffn",), score=name, compensate="none")
    after, chosen = pruned(model, pass_, ctx)
    (entry,) = [e for e in chosen if e.status == "applied"]
    candidate = ffn_of(model)
    best = candidate.best(measure(name, [candidate], model, ctx)[candidate], INNER // 2)
    np.testing.assert_array_equal(entry.arrays["kept"], best)
    assert error_to_reference(model, after, pass_, chosen, ctx.calibration[:1]) <= 1e-4


def test_gains_of_batch_norms_prune_to_the_masked_reference() -> None:
    pass_ = Prune(ratio=0.5, scope=("channels",), score="bn_gamma")
    chosen = check(zoo_ir.captured("resnet"), pass_, zoo_ir.feeds("resnet")[:1])
    assert all("bn_gamma" in entry.reason for entry in chosen if entry.status == "applied")


# -- allocation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(allocation.ALLOCATIONS))
def test_every_allocation_prunes_to_its_masked_reference(name: Any) -> None:
    feeds = zoo_ir.feeds("llama")
    pass_ = Prune(ratio=0.5, scope=("ffn", "heads"), score="l2", allocation=name, compensate="none")
    model, ctx = _llama(), Context(calibration=feeds)
    after, chosen = pruned(model, pass_, ctx)
    assert any(entry.status == "applied" for entry in chosen)
    assert cost(after).params < cost(model).params
    assert error_to_reference(model, after, pass_, chosen, feeds[:1]) <= 1e-4


@lru_cache
def _llama() -> ir.Model:
    return zoo_ir.captured("llama")


def scored(seed: int = 0, multiple: int = 1) -> dict[Candidate, Array]:
    """Random scores for the FFNs and query heads of a small model."""
    found = find_candidates(axis_analysis.analyse(_llama()), multiple=multiple)
    rng = np.random.default_rng(seed)
    return {c: rng.gamma(1.0, 1.0, c.size) for c in found if c.scope in ("ffn", "heads")}


def removed(counts: Mapping[Candidate, int]) -> int:
    return sum((c.size - n) * c.parameters for c, n in counts.items())


@pytest.mark.parametrize("name", sorted(allocation.ALLOCATIONS))
def test_an_allocation_removes_the_share_and_grows_with_it(name: str) -> None:
    of = scored()
    feeds = zoo_ir.feeds("llama")
    allocate = allocation.ALLOCATIONS[name](of, _llama(), Context(calibration=feeds)).allocate
    total = sum(c.size * c.parameters for c in of)
    largest = max(c.parameters for c in of)
    before = 0
    for share in (0.0, 0.1, 0.3, 0.5, 0.7):
        counts = allocate(share)
        assert all(n in c.widths() for c, n in counts.items())
        assert removed(counts) >= before
        before = removed(counts)
        if name != "cfsp":  # a block keeps all of it at most, which others do not make up for
            # One position of each candidate is rounding: to the nearest width.
            assert abs(removed(counts) - share * total) <= largest * len(of)


def test_a_ranking_keeps_the_densest_positions() -> None:
    of = {c: s for c, s in scored().items() if c.scope == "ffn"}
    counts = allocation.ranked(of)(0.4)
    gone = [s / c.parameters for c in of for s in np.sort(of[c])[: c.size - counts[c]]]
    stay = [s / c.parameters for c in of for s in np.sort(of[c])[c.size - counts[c] :]]
    assert max(gone) <= min(stay)


def test_isomorphic_widths_lose_the_same_share() -> None:
    of = scored()
    counts = allocation.isomorphic(of)(0.5)
    for scope in ("ffn", "heads"):
        same = [c for c in of if c.scope == scope]
        assert len({allocation.structure(c) for c in same}) == 1
        share = sum(counts[c] for c in same) / sum(c.size for c in same)
        assert share == pytest.approx(0.5, abs=len(same) / sum(c.size for c in same))


def test_a_ranking_of_standard_scores_removes_the_lowest_of_them() -> None:
    """(s - mean) / deviation within a width, in float64; positions of the widths cost the same here."""
    of = {c: s for c, s in scored().items() if c.scope == "ffn"}
    assert len(of) > 1 and len({c.parameters for c in of}) == 1
    counts = allocation.standardized(of)(0.4)
    standard = {c: np.sort((s - s.mean()) / s.std()) for c, s in of.items()}
    gone = np.concatenate([s[: c.size - counts[c]] for c, s in standard.items()])
    stay = np.concatenate([s[c.size - counts[c] :] for c, s in standard.items()])
    assert gone.max() <= stay.min()
    assert len(gone) == np.ceil(0.4 * sum(c.size for c in of))


def test_standard_scores_do_not_see_the_scale_of_a_layer() -> None:
    of = scored()
    scaled = {c: s * (10.0**n) + n for n, (c, s) in enumerate(of.items())}
    assert allocation.standardized(of)(0.4) == allocation.standardized(scaled)(0.4)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("multiple", [1, 16, 32])
def test_dynamic_programming_finds_what_trying_all_widths_finds(
    multiple: int, convex: bool
) -> None:
    of = [c for c in scored(1, multiple) if c.scope == "ffn"]
    rng = np.random.default_rng(2)
    curves = {}
    for candidate in of:
        steps = rng.gamma(1.0, 1.0, len(candidate.widths()) - 1)
        steps = np.sort(steps)[::-1] if convex else steps
        curves[candidate] = np.append(np.cumsum(steps[::-1])[::-1], 0.0)  # from the least width
    counts = allocation.least_distortion(curves)(0.35)
    total = sum(c.size * c.parameters for c in of)
    assert all(n in c.widths() for c, n in counts.items())
    assert removed(counts) >= 0.35 * total

    def lost(widths: Mapping[Candidate, int]) -> float:
        return sum(float(curves[c][c.widths().index(n)]) for c, n in widths.items())

    every = (
        dict(zip(of, widths, strict=True))
        for widths in itertools.product(*(c.widths() for c in of))
    )
    # A unit of the search is a 2000th of what is to be removed, one for each candidate.
    wanted = 0.35 * total * (1 + len(of) / 2000)
    assert lost(counts) <= min(lost(one) for one in every if removed(one) >= wanted) * (1 + 1e-12)


# -- measured distortion ------------------------------------------------------------------------------------

TWO = f"""
agraph (float[b, {WIDTH}] x) => (float[b, 3] y)
{{
    h = MatMul (x, up1)  a = Relu (h)  s = MatMul (a, down1)
    i = MatMul (s, up2)  c = Relu (i)  t = MatMul (c, down2)
    y = Tanh (t)
}}
"""


def two_layers() -> tuple[ir.Model, dict[str, Array], Context]:
    rng = np.random.default_rng(7)
    sizes = {"up1": (WIDTH, 6), "down1": (6, WIDTH), "up2": (WIDTH, 7), "down2": (7, 3)}
    weights = {name: rng.normal(0, 0.5, size).astype("f4") for name, size in sizes.items()}
    model = text.model(TWO, weights)
    model.graph.opset_imports[""] = 25
    normal.normalize(model)
    feeds = [{"x": rng.normal(size=(5, WIDTH)).astype("f4")} for _ in range(3)]
    return model, weights, Context(calibration=feeds)


def without(weights: Mapping[str, Array], x: Array, first: Array, second: Array) -> Array:
    """What two layers make of x with only these neurons, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    stream = np.maximum(x @ w["up1"][:, first], 0) @ w["down1"][first]
    return np.asarray(np.tanh(np.maximum(stream @ w["up2"][:, second], 0) @ w["down2"][second]))


def layers_of(model: ir.Model) -> dict[int, Candidate]:
    """The two FFNs by their size."""
    found = find_candidates(axis_analysis.analyse(model))
    return {c.size: c for c in found if c.size in (6, 7)}


def test_a_distortion_is_the_squared_error_of_the_output() -> None:
    model, weights, ctx = two_layers()
    layers = layers_of(model)
    rng = np.random.default_rng(8)
    of = {candidate: rng.random(size) for size, candidate in layers.items()}
    found = distortion.curves(of, model, ctx)
    x = np.concatenate([feeds["x"] for feeds in ctx.calibration]).astype(np.float64)
    all6, all7 = np.arange(6), np.arange(7)
    whole = without(weights, x, all6, all7)
    for size, candidate in layers.items():
        curve = found[candidate]
        assert curve.widths.tolist() == list(range(1, size + 1))  # few: all are tried
        for width, value in zip(curve.widths, curve.distortions, strict=True):
            stay = np.argsort(-of[candidate])[:width]
            pair = (stay, all7) if size == 6 else (all6, stay)
            change = np.square(without(weights, x, *pair) - whole).sum() / np.square(whole).sum()
            # float32 beside float64: 2**-24 of the values, squared, and of what they differ by.
            assert value == pytest.approx(change, rel=1e-5, abs=1e-12)


def test_between_measured_widths_a_curve_is_a_straight_line() -> None:
    curve = distortion.Curve(np.array([2, 6, 8]), np.array([1.0, 0.2, 0.0]))
    np.testing.assert_allclose(curve.at([2, 3, 6, 7, 8]), [1.0, 0.8, 0.2, 0.1, 0.0])


def test_layer_adaptive_is_the_best_of_all_pairs_of_widths() -> None:
    """Through the pass, against all widths in float64, with distortions of one layer alone that add up."""
    model, weights, ctx = two_layers()
    pass_ = Prune(
        params=0.6, scope=("ffn",), score="l2", allocation="layer_adaptive", compensate="none"
    )
    after, chosen = pruned(model, pass_, ctx)
    assert error_to_reference(model, after, pass_, chosen, ctx.calibration[:1]) <= 1e-4
    layers = layers_of(model)
    of = {c: measure("l2", [c], model, ctx)[c] for c in layers.values()}
    x = np.concatenate([feeds["x"] for feeds in ctx.calibration]).astype(np.float64)
    whole = without(weights, x, np.arange(6), np.arange(7))

    def stay(size: int, width: int) -> Array:
        return np.argsort(-of[layers[size]], kind="stable")[:width]

    def apart(first: Array, second: Array) -> float:
        return float(np.square(without(weights, x, first, second) - whole).sum())

    alone = {(6, n): apart(stay(6, n), np.arange(7)) for n in range(1, 7)}
    alone |= {(7, n): apart(np.arange(6), stay(7, n)) for n in range(1, 8)}
    each = {size: candidate.parameters for size, candidate in layers.items()}
    limit = 0.6 * sum(array.size for array in weights.values())
    pairs = [
        (alone[6, n] + alone[7, m], n, m)
        for n in range(1, 7)
        for m in range(1, 8)
        if n * each[6] + m * each[7] <= limit
    ]
    kept = {e.detail["size"]: e.detail.get("kept", e.detail["size"]) for e in chosen}
    assert (kept[6], kept[7]) == min(pairs)[1:]
    for entry in chosen:
        if entry.detail["size"] in (6, 7):
            curve = entry.detail["distortion"]
            size = entry.detail["size"]
            told = [curve[str(n)] * np.square(whole).sum() for n in range(1, size + 1)]
            expected = [alone[size, n] for n in range(1, size + 1)]
            np.testing.assert_allclose(told, expected, rtol=1e-5, atol=1e-12)


def test_distortion_is_measured_on_enough_rows_and_the_same_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Feeds are spread evenly over the data; tokens of a language model are rows of their own."""
    seen: list[int] = []

    class Counting(Context):
        def collect(self, model: ir.Model, wanted: Any, **rest: Any) -> Any:
            seen.append(sum(len(f["ids"]) for f in self.calibration))
            return super().collect(model, wanted, **rest)

    model, ctx = made(), Counting(calibration=context(30).calibration)
    monkeypatch.setattr(distortion, "_ROWS", 4 * 14)  # of feeds [2, 7]
    pass_ = Prune(ratio=0.4, scope=("ffn",), score="l2", allocation="layer_adaptive")
    (first,) = [e for e in pass_.choose(model, ctx) if e.detail["scope"] == "ffn"]
    assert seen[0] == 4 * 2
    (second,) = [e for e in pass_.choose(model, ctx) if e.detail["scope"] == "ffn"]
    assert first == second and first.detail["distortion"]


def test_without_data_there_is_no_distortion() -> None:
    pass_ = Prune(ratio=0.4, scope=("ffn",), score="l2", allocation="layer_adaptive")
    with pytest.raises(PassError, match=r"allocation='layer_adaptive'.* needs calibration data"):
        pass_.choose(made(), Context())


def test_blocks_that_turn_the_stream_more_keep_more() -> None:
    weights = allocation.angular_weights(np.array([0.1, 0.2, 0.6]))
    gates = 1 / (1 + np.exp(-(np.array([0.1, 0.2, 0.6]) - 0.3) / np.std([0.1, 0.2, 0.6])))
    np.testing.assert_allclose(weights, gates / gates.mean(), rtol=1e-12)
    np.testing.assert_array_equal(allocation.angular_weights(np.array([0.3, 0.3])), [1, 1])


def test_a_block_keeps_what_its_angle_gives() -> None:
    """sigmoid((s - mean) / deviation) / mean of these, times the share that stays; s in float64."""
    rng = np.random.default_rng(9)
    sizes = {"up1": (WIDTH, 40), "down1": (40, WIDTH), "up2": (WIDTH, 40), "down2": (40, WIDTH)}
    weights = {name: rng.normal(0, 0.2, size).astype("f4") for name, size in sizes.items()}
    weights["down2"] *= 3  # turns the stream further
    model = text.model(
        f"""
        agraph (float[b, {WIDTH}] x) => (float[b, {WIDTH}] z)
        {{
            a = MatMul (x, up1)  h = Relu (a)  d = MatMul (h, down1)  y = Add (x, d)
            c = MatMul (y, up2)  i = Relu (c)  e = MatMul (i, down2)  z = Add (y, e)
        }}
        """,
        weights,
    )
    model.graph.opset_imports[""] = 25
    normal.normalize(model)
    x = rng.normal(size=(30, WIDTH)).astype("f4")
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    streams = [x.astype(np.float64)]
    for up, down in (("up1", "down1"), ("up2", "down2")):
        streams.append(streams[-1] + np.maximum(streams[-1] @ w[up], 0) @ w[down])
    angles = np.array([
        np.mean(np.arccos((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))
        for a, b in itertools.pairwise(streams)
    ]) / np.pi  # fmt: skip
    gates = 1 / (1 + np.exp(-(angles - angles.mean()) / angles.std()))
    keeps = np.minimum(1, 0.5 * gates / gates.mean())
    found = [c for c in find_candidates(axis_analysis.analyse(model)) if c.size == 40]
    of = {c: np.arange(40.0) for c in found}
    spread = allocation.by_angle(of, model, Context(calibration=[{"x": x}]))
    counts = spread.allocate(0.5)
    assert [counts[c] for c in found] == [round(40 * keep) for keep in keeps]
    told = [spread.evidence[c]["angle"] for c in found]
    np.testing.assert_allclose(told, angles, rtol=CLOSE)


# -- compensation ------------------------------------------------------------------------------------------


def test_a_refit_is_the_ridge_regression() -> None:
    """The normal equations of ||X_K W' - X W||^2 / n + l ||W' - W_K||^2, by stacked least squares."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    w = rng.normal(size=(6, 3))
    kept = np.array([1, 0, 1, 1, 0, 1], bool)
    second = x.T @ x / len(x)
    found = compensation.refit(w, second, kept, ridge=0.1)
    level = np.sqrt(0.1 * np.diag(second).mean())
    stacked = np.concatenate([x[:, kept] / np.sqrt(len(x)), level * np.eye(4)])
    target = np.concatenate([x @ w / np.sqrt(len(x)), level * w[kept]])
    expected = np.linalg.lstsq(stacked, target, rcond=None)[0]
    np.testing.assert_allclose(found[kept], expected, rtol=1e-9)
    np.testing.assert_array_equal(found[~kept], 0)


def test_without_a_ridge_a_copy_is_made_up_for_exactly() -> None:
    """Of two equal channels one can go: the other takes its weight."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 3))
    x = np.concatenate([x, x[:, :1]], 1)
    w = rng.normal(size=(4, 2))
    kept = np.array([True, True, True, False])
    found = compensation.refit(w, x.T @ x / 40, kept, ridge=1e-12)
    np.testing.assert_allclose(x @ found, x @ w, atol=1e-8)


def test_a_channel_that_is_always_zero_is_no_trouble() -> None:
    w, kept = np.ones((3, 2)), np.array([True, False, True])
    assert np.isfinite(compensation.refit(w, np.diag([1.0, 1.0, 0.0]), kept)).all()
    np.testing.assert_array_equal(
        compensation.refit(w, np.zeros((3, 3)), kept), [[1, 1], [0, 0], [1, 1]]
    )


def outputs(model: ir.Model, ctx: Context) -> Array:
    executor = Executor(model)
    rows = [executor.run(feeds)["logits"].numpy() for feeds in ctx.calibration]
    return np.concatenate([r.reshape(-1, VOCAB) for r in rows]).astype(np.float64)


@pytest.mark.parametrize("how", ["bias", "least_squares"])
def test_compensation_comes_closer_and_equals_its_reference(how: Any) -> None:
    model, ctx = made(), context()
    dense = outputs(model, ctx)
    errors = []
    for compensate in ("none", how):
        pass_ = Prune(ratio=0.4, scope=("ffn",), score="flap", compensate=compensate)
        after, chosen = pruned(model, pass_, ctx)
        assert error_to_reference(model, after, pass_, chosen, ctx.calibration[:1]) <= 1e-4
        errors.append(float(np.square(outputs(after, ctx) - dense).sum()))
    assert errors[1] < errors[0]


def test_with_data_the_defaults_are_obd_global_least_squares() -> None:
    model, ctx = made(), context()
    named = Prune(
        ratio=0.4,
        scope=("ffn",),
        score="obd",
        allocation="global",
        compensate="least_squares",
    )
    (entry,) = [e for e in Prune(ratio=0.4, scope=("ffn",)).choose(model, ctx) if e.arrays]
    (other,) = [e for e in named.choose(model, ctx) if e.arrays]
    assert entry == other
    for name, array in other.arrays.items():
        np.testing.assert_array_equal(entry.arrays[name], array)
    assert "weight:down" in entry.arrays
    (plain,) = [e for e in Prune(ratio=0.4, scope=("ffn",)).choose(model, Context()) if e.arrays]
    assert plain.detail["score"] == "l2" and list(plain.arrays) == ["kept"]


def test_second_moments_are_held_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In sweeps of their own, which give the same: two weights that one activation feeds go together."""
    model, feeds = _llama(), zoo_ir.feeds("llama")
    pass_ = Prune(ratio=0.5, scope=("ffn", "hidden"), score="l2", compensate="least_squares")
    sweeps: list[int] = []

    class Counting(Context):
        def collect(self, model: ir.Model, wanted: Any, **rest: Any) -> Any:
            sweeps.append(len({statistic.value for statistic in wanted}))
            return super().collect(model, wanted, **rest)

    ctx = Counting(calibration=feeds)
    whole = pass_.choose(model, ctx)
    assert len(sweeps) == 1
    monkeypatch.setattr(compensation, "_MOST_HELD", 1)
    parts = pass_.choose(model, ctx)
    assert sweeps[1:] == [1] * sweeps[0]
    for entry, other in zip(whole, parts, strict=True):
        assert entry.arrays.keys() == other.arrays.keys()
        for name, array in entry.arrays.items():
            # Stages are cut elsewhere; sums of float64 products are the same.
            np.testing.assert_allclose(array, other.arrays[name], rtol=1e-5, atol=1e-6)


def test_a_bias_is_the_mean_of_what_went() -> None:
    model, ctx = made(), context()
    entries = Prune(ratio=0.4, scope=("ffn",), score="flap", compensate="bias").choose(model, ctx)
    (entry,) = [e for e in entries if e.status == "applied"]
    gone = np.setdiff1d(np.arange(INNER), entry.arrays["kept"])
    expected = activation(ctx).mean(0)[gone] @ wide("down")[gone]
    np.testing.assert_allclose(entry.arrays["bias:y"], expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", zoo_ir.some("mixtral", "mobilenet_v2", "qwen2", "vit"))
def test_the_defaults_with_data_prune_any_model(name: str) -> None:
    """Experts, of which no product shows what they add, are scored by their weights."""
    model, feeds = zoo_ir.captured(name), zoo_ir.feeds(name)
    pass_ = Prune(ratio=0.4)
    after, chosen = pruned(model, pass_, Context(calibration=feeds))
    used = {e.detail["scope"]: e.detail["score"] for e in chosen if e.status == "applied"}
    assert used
    assert all(score == ("l2" if scope == "experts" else "obd") for scope, score in used.items())
    assert error_to_reference(model, after, pass_, chosen, feeds) <= 1e-4


@pytest.mark.parametrize("how", ["bias", "least_squares"])
def test_compensation_of_all_scopes_of_a_model_equals_its_reference(how: Any) -> None:
    """Heads, key/value groups and hidden width go at once: a weight loses rows to two of them."""
    model, feeds = _llama(), zoo_ir.feeds("llama")
    pass_ = Prune(ratio=0.5, score="l2", compensate=how)
    after, chosen = pruned(model, pass_, Context(calibration=feeds))
    assert any(name.startswith(("bias:", "weight:")) for e in chosen for name in e.arrays)
    assert error_to_reference(model, after, pass_, chosen, feeds) <= 1e-4


@pytest.mark.parametrize("score", ["obd", "taylor", "wanda", "optin"])
def test_a_weight_that_multiplies_a_constant_too_is_scored_by_what_data_says(score: Any) -> None:
    """DeBERTa projects its positions, which are a table, by the weights that project tokens."""
    shared = LM.replace(
        "r = Add (x, y)",
        "p = MatMul (place, down)  e = Gather (p, ids)  q = Add (y, e)  r = Add (x, q)",
    )
    inner, rng = 512, np.random.default_rng(5)  # a weight of this size is not folded into p
    sizes = {
        "up": (WIDTH, inner),
        "up_bias": (inner,),
        "down": (inner, WIDTH),
        "place": (VOCAB, inner),
    }
    drawn = {name: rng.normal(0, 0.1, size).astype("f4") for name, size in sizes.items()}
    model = text.model(shared, {**_weights(), **drawn})
    model.graph.opset_imports[""] = 25
    normal.normalize(model)
    assert "place" in model.graph.initializers
    ctx = context()
    after, chosen = pruned(model, Prune(ratio=0.5, scope=("ffn",), score=score), ctx)
    assert [entry.status for entry in chosen] == ["applied"]
    pass_ = Prune(ratio=0.5, scope=("ffn",), score=score)
    assert error_to_reference(model, after, pass_, chosen, ctx.calibration) <= 1e-4
