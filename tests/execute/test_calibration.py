"""The sweep against float64 numpy on what the one-shot executor gives, its masks, and what it holds."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netlathe.diagnostics import InputError, NetLatheError, PassError
from netlathe.execute import calibration
from netlathe.execute.executor import Executor
from netlathe.execute.statistics import (
    AbsMax,
    AngularDistance,
    CosineSimilarity,
    Covariance,
    Divergence,
    Mean,
    MeanAbs,
    MeanSquare,
    MinMax,
    RelativeSquaredError,
    Statistic,
    StatisticResult,
)
from netlathe.ir import normal
from netlathe.pipeline.pass_ import Context, SilentProgress
from tests import zoo_ir
from tests.execute import text

Array = np.ndarray[Any, np.dtype[Any]]
# Sums of n float64 terms in another order: n * 2**-53 of the sum of magnitudes; n is below 2**12 here.
TIGHT = 2**-40


def sweep(
    model: ir.Model,
    feeds: Sequence[Mapping[str, Array]],
    *wanted: Statistic,
    stage_bytes: int = calibration.STAGE_BYTES,
) -> list[StatisticResult]:
    return calibration.sweep(
        model, feeds, wanted, device="cpu", progress=SilentProgress(), stage_bytes=stage_bytes
    )


def formula(statistic: Statistic, *rows: Array) -> Array:
    """The statistic of ``[rows, channels]`` arrays in float64, as one would write it down."""
    x, *other = (r.astype(np.float64) for r in rows)
    if isinstance(statistic, CosineSimilarity):
        (y,) = other
        norms = np.sqrt((x * x).sum(1) * (y * y).sum(1))
        zero = (x == 0).all(1) & (y == 0).all(1)
        cosine = np.divide((x * y).sum(1), norms, where=norms > 0, out=zero.astype(np.float64))
        return np.asarray(cosine.mean())
    return {
        Mean: lambda: x.mean(0),
        MeanSquare: lambda: (x**2).mean(0),
        MeanAbs: lambda: abs(x).mean(0),
        AbsMax: lambda: abs(x).max(0),
        MinMax: lambda: np.stack((x.min(0), x.max(0))),
        Covariance: lambda: np.einsum("ri,rj->ij", x, x) / len(x),
    }[type(statistic)]()


def check(result: StatisticResult, *rows: Array) -> None:
    assert result.count == len(rows[0])
    assert result.array.dtype == np.float64
    scale = max(1.0, *(float(abs(r.astype(np.float64)).max(initial=0)) ** 2 for r in rows))
    expected = formula(result.statistic, *rows)
    assert result.array.shape == expected.shape
    assert np.abs(result.array - expected).max() <= TIGHT * scale


# -- the formulas ---------------------------------------------------------------------------------

PAIR = "g (float[b,3] x, float[b,3] z) => (float[b,3] y) { a = Neg (x) b = Neg (z) y = Add (a, b) }"


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
    zeros=st.booleans(),
)
def test_every_statistic_is_its_formula(
    rows: list[int], seed: int, scale: float, zeros: bool
) -> None:
    rng = np.random.default_rng(seed)
    feeds: list[dict[str, Array]] = []
    for count in rows:
        x, z = (rng.standard_normal((2, count, 3)) * scale).astype(np.float32)
        if zeros:
            x[0], z[0] = 0, z[0] * rng.integers(0, 2)
        feeds.append({"x": x, "z": z})
    of_one = [kind("a") for kind in (Mean, MeanSquare, MeanAbs, AbsMax, MinMax, Covariance)]
    *single, cosine = sweep(text.model(PAIR), feeds, *of_one, CosineSimilarity("a", "b"))
    a = -np.concatenate([feed["x"] for feed in feeds])
    b = -np.concatenate([feed["z"] for feed in feeds])
    for result in single:
        check(result, a)
    check(cosine, a, b)


def test_distances_of_two_values() -> None:
    """Against the formulas in float64; rows are spread over samples of different sizes."""
    feeds = [{"x": text.normal(n, 3, seed=n), "z": text.normal(n, 3, seed=9 * n)} for n in (1, 4)]
    wanted = [
        AngularDistance("a", "b"),
        Divergence("a", "b"),
        RelativeSquaredError("a", "b"),
        RelativeSquaredError("a", "a"),
    ]
    found = [result.scalar for result in sweep(text.model(PAIR), feeds, *wanted)]
    a, b = (-np.concatenate([f[n] for f in feeds]).astype(np.float64) for n in ("x", "z"))
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    expected = [
        np.arccos(cosine).mean() / np.pi,
        (p * np.log(p / q)).sum(1).mean(),
        ((a - b) ** 2).sum() / (a**2).sum(),
        0.0,
    ]
    assert found == pytest.approx(expected, rel=TIGHT * 64, abs=0)


def test_divergence_of_probabilities() -> None:
    p = np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], np.float32)
    q = np.array([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]], np.float32)
    wanted = Divergence("a", "b", logits=False)
    (found,) = sweep(text.model(PAIR), [{"x": -p, "z": -q}], wanted)
    assert found.scalar == pytest.approx(0.5 * math.log(2) / 2, rel=TIGHT)


def test_big_activations_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netlathe.execute.statistics._AT_ONCE", 7)
    feeds = [{"x": text.normal(5, 3), "z": text.normal(5, 3, seed=1)}]
    mean, cosine = sweep(text.model(PAIR), feeds, Mean("x"), CosineSimilarity("x", "b"))
    check(mean, feeds[0]["x"])
    check(cosine, feeds[0]["x"], -feeds[0]["z"])


def test_channels_may_be_at_any_axis() -> None:
    model = text.model("g (float[b,3,h,w] x) => (float[b,3,h,w] y) { y = Neg (x) }")
    feeds = [{"x": text.normal(2, 3, 4, 5)}]
    (result,) = sweep(model, feeds, Covariance("y", axis=1))
    check(result, -np.moveaxis(feeds[0]["x"], 1, -1).reshape(-1, 3))


def test_one_result_for_each_that_is_asked_for() -> None:
    feeds = [{"x": text.normal(5, 3), "z": text.normal(5, 3, seed=1)}]
    found = sweep(text.model(PAIR), feeds, Mean("a"), AbsMax("x"), Mean("a"))
    assert [r.statistic for r in found] == [Mean("a"), AbsMax("x"), Mean("a")]
    assert found[0] is not None and np.array_equal(found[0].array, found[2].array)


# -- whole models, in stages ----------------------------------------------------------------------


def zoo_model(name: str) -> tuple[ir.Model, list[dict[str, Array]]]:
    return zoo_ir.captured(name), [*zoo_ir.feeds(name), *zoo_ir.feeds(name, seed=2)[:1]]


def floats(model: ir.Model) -> list[str]:
    """Every third floating-point activation with a fixed number of channels, by name."""
    return [
        v.name
        for node in model.graph
        for v in node.outputs
        if v.name and v.dtype == ir.DataType.FLOAT and v.shape is not None
        if len(v.shape) >= 2 and isinstance(v.shape[-1], int)
    ][::3]


@pytest.mark.parametrize("stage_bytes", [0, 64 << 10, calibration.STAGE_BYTES])
@pytest.mark.parametrize("name", ["llama", "t5", "mobilenet_v2"])
def test_stages_see_what_the_one_shot_executor_sees(name: str, stage_bytes: int) -> None:
    model, feeds = zoo_model(name)
    watched = floats(model)
    dims = {v.name: [str(d) for d in v.shape or ()] for n in model.graph for v in n.outputs}
    # The first and the last value of one shape: they are made far apart.
    early, late = next(
        (a, b) for a in watched for b in reversed(watched) if a != b and dims[a] == dims[b]
    )
    wanted: list[Statistic] = [*map(MeanSquare, watched), CosineSimilarity(early, late)]
    found = sweep(model, feeds, *wanted, stage_bytes=stage_bytes)
    executor = Executor(model)
    runs = [executor.run(feed, watched) for feed in feeds]
    mask = next((key for key in feeds[0] if key.endswith("attention_mask")), None)

    def rows(value: str) -> Array:
        positions = dims[value][1:-1]
        kept = []
        for run, feed in zip(runs, feeds, strict=True):
            x = run[value].numpy()
            if mask is None or dims[value][0] != "batch" or "sequence" not in positions:
                kept.append(x.reshape(-1, x.shape[-1]))  # no padding in it
                continue
            moved = np.moveaxis(x, 1 + positions.index("sequence"), 1)
            kept.append(moved[feed[mask] != 0].reshape(-1, x.shape[-1]))
        return np.concatenate(kept)

    for result in found:
        check(result, *map(rows, result.statistic.values))


def test_the_same_bits_again_and_no_global_state() -> None:
    model, feeds = zoo_model("llama")
    wanted = [Covariance(value) for value in floats(model)[:5]]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sweep(model, feeds, *wanted, stage_bytes=64 << 10)
    again = sweep(model, feeds, *wanted, stage_bytes=64 << 10)
    assert all(np.array_equal(a.array, b.array) for a, b in zip(first, again, strict=True))
    assert before.equal(torch.get_rng_state()) and torch.is_grad_enabled()
    for result in first:
        assert np.array_equal(result.array, result.array.T)


# -- memory ---------------------------------------------------------------------------------------

WIDTH, INNER, BLOCKS, TOKENS, SAMPLES = 8, 64, 10, 16, 12


def residual_chain() -> ir.Model:
    """h = h + relu(h U) D, ten times; U and D are weights of 4 x 512 bytes."""
    lines, weights = [], {}
    for at in range(BLOCKS):
        h = f"h{at}"
        lines.append(
            f"u{at} = MatMul ({h}, U{at}) r{at} = Relu (u{at}) d{at} = MatMul (r{at}, D{at})"
        )
        lines.append(f"h{at + 1} = Add ({h}, d{at})")
        weights[f"U{at}"] = text.normal(WIDTH, INNER, seed=at) / 4
        weights[f"D{at}"] = text.normal(INNER, WIDTH, seed=99 + at) / 16
    body = " ".join(lines)
    model = text.model(
        f"g (float[b,s,{WIDTH}] x) => (float[b,s,{WIDTH}] y) "
        f"{{ h0 = Neg (x) {body} y = Relu (h{BLOCKS}) }}",
        weights,
    )
    normal.normalize(model)
    return model


class Alive:
    """Elements of the tensors that a method of the executor has handed out and that still live."""

    def __init__(self) -> None:
        self.peak = self.calls = 0
        self._tensors: dict[int, weakref.ref[torch.Tensor]] = {}

    def see(self, tensor: Any) -> Any:
        if isinstance(tensor, torch.Tensor):
            self.calls += 1
            self._tensors[self.calls] = weakref.ref(tensor)
            living = {n: t for n, ref in self._tensors.items() if (t := ref()) is not None}
            self._tensors = {n: self._tensors[n] for n in living}
            self.peak = max(self.peak, sum(t.numel() for t in living.values()))
        return tensor


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> dict[str, Alive]:
    seen = {"_call": Alive(), "_load": Alive()}
    for name, watch in seen.items():
        method = getattr(Executor, name)

        def wrapped(
            self: Executor, *args: Any, _method: Any = method, _watch: Alive = watch
        ) -> Any:
            return _watch.see(_method(self, *args))

        monkeypatch.setattr(Executor, name, wrapped)
    return seen


@pytest.mark.parametrize(("stage_bytes", "weights_at_once"), [(0, 1), (4096, 2), (9000, 4)])
def test_one_boundary_of_activations_and_one_stage_of_weights_are_held(
    alive: dict[str, Alive], stage_bytes: int, weights_at_once: int
) -> None:
    model = residual_chain()
    feeds = [{"x": text.normal(1, TOKENS, WIDTH, seed=seed)} for seed in range(SAMPLES)]
    sweep(model, feeds, Covariance("y"), MeanSquare("r3"), stage_bytes=stage_bytes)
    one = WIDTH * INNER
    assert alive["_load"].calls == 2 * BLOCKS, "every weight is read once"
    assert alive["_load"].peak == weights_at_once * one
    between, inside = TOKENS * WIDTH, TOKENS * INNER
    # A stage of a single weight is cut inside the block: one sample after the other, the residual
    # and the inner width live side by side.
    held = between if stage_bytes else between + inside
    assert alive["_call"].peak <= SAMPLES * held + 2 * inside + 3 * between


def test_a_model_that_fits_holds_one_sample_at_a_time(alive: dict[str, Alive]) -> None:
    feeds = [{"x": text.normal(1, TOKENS, WIDTH, seed=seed)} for seed in range(SAMPLES)]
    sweep(residual_chain(), feeds, Covariance("y"))
    assert alive["_load"].calls == 2 * BLOCKS
    assert alive["_call"].peak <= TOKENS * (2 * INNER + 3 * WIDTH)


def test_a_slice_that_is_held_does_not_hold_the_whole() -> None:
    whole = torch.zeros(100, 100)
    assert calibration.compacted(whole[:3]).untyped_storage().nbytes() == 3 * 100 * 4
    assert calibration.compacted(whole) is whole


def test_progress_counts_samples_and_stages() -> None:
    class Counting:
        done = 0
        total: int | None = None

        def track(
            self, items: Iterable[Any], description: str, total: int | None = None
        ) -> Iterator[Any]:
            assert description == "calibrating"
            self.total = total
            for item in items:
                yield item
                self.done += 1

    progress = Counting()
    feeds = [{"x": text.normal(1, TOKENS, WIDTH)}] * 3
    calibration.sweep(
        residual_chain(), feeds, [Mean("y")], device="cpu", progress=progress, stage_bytes=4096
    )
    assert progress.done == progress.total
    assert progress.total is not None and progress.total % 3 == 0 and progress.total > 3


# -- padding --------------------------------------------------------------------------------------

MASKED = """
g (float[b,s,4] x, int64[b,s] attention_mask, float[b,n,4] other) => (float[b,s,4] y) {
    y = Neg (x)
    flat = Reshape (y, flat_shape)
    heads = Reshape (y, heads_shape)
    by_head = Transpose <perm=[0,2,1,3]> (heads)
    unmasked = Neg (other)
    used = ReduceSum (unmasked)
    used_too = ReduceSum (by_head)
    also = ReduceSum (flat)
}
"""


def masked_model() -> ir.Model:
    shapes = {
        "flat_shape": np.array([-1, 4], np.int64),
        "heads_shape": np.array([0, 0, 2, 2], np.int64),
    }
    return text.model(MASKED, shapes)


def masked_feeds(garbage: float) -> list[dict[str, Array]]:
    feeds = []
    for seed, (batch, length) in enumerate([(2, 5), (3, 4)]):
        mask = np.ones((batch, length), np.int64)
        mask[1:, -2:] = 0
        x = text.normal(batch, length, 4, seed=seed)
        x[mask == 0] = garbage
        # As long as the sequence by chance: not what the mask is about.
        feeds.append({"x": x, "attention_mask": mask, "other": text.normal(batch, length, 4)})
    return feeds


@pytest.mark.parametrize("garbage", [1e30, float("nan")])
def test_padding_does_not_count(garbage: float) -> None:
    feeds = masked_feeds(garbage)
    y, flat, by_head, other = sweep(
        masked_model(),
        feeds,
        Covariance("y"),
        Mean("flat"),
        MeanSquare("by_head"),
        Mean("unmasked"),
    )
    kept = [feed["attention_mask"] != 0 for feed in feeds]
    rows = np.concatenate([-feed["x"][k] for feed, k in zip(feeds, kept, strict=True)])
    check(y, rows)
    check(flat, rows)
    check(by_head, rows.reshape(-1, 2))
    check(other, np.concatenate([-feed["other"].reshape(-1, 4) for feed in feeds]))


def test_the_mask_of_a_cached_model_is_matched_at_its_end() -> None:
    model = text.model(
        "g (float[b,s,4] x, float[b,p,4] past, int64[b,total] attention_mask)"
        " => (float[b,s,4] y, float[b,t,4] present) { y = Neg (x) present = Concat <axis=1> (past, x) }"
    )
    model.graph.inputs[2].shape = ir.Shape([ir.SymbolicDim("b"), ir.SymbolicDim("p + s")])
    x, past = text.normal(2, 3, 4), text.normal(2, 2, 4)
    mask = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]])
    feeds = [{"x": x, "past": past, "attention_mask": mask}]
    now, whole = sweep(model, feeds, Mean("y"), Mean("present"))
    check(now, -x[mask[:, 2:] != 0])
    check(whole, np.concatenate((past, x), 1)[mask != 0])


def test_a_float_mask_is_no_mask() -> None:
    """An additive mask is 0 where a position counts."""
    model = text.model(
        "g (float[b,s,4] x, float[b,s] attention_mask) => (float[b,s,4] y, float[b,s] m)"
        " { y = Neg (x) m = Neg (attention_mask) }"
    )
    feeds = [{"x": text.normal(2, 3, 4), "attention_mask": np.zeros((2, 3), np.float32)}]
    (result,) = sweep(model, feeds, Mean("y"))
    check(result, -feeds[0]["x"].reshape(-1, 4))


# -- what is refused ------------------------------------------------------------------------------


def refusal(
    kind: type[NetLatheError], model: ir.Model, feeds: Sequence[Mapping[str, Array]], *w: Statistic
) -> str:
    with pytest.raises(kind) as caught:
        sweep(model, feeds, *w)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_activations_that_are_not_finite_are_named() -> None:
    model = text.model("g (float[b,3] x) => (float[b,3] y) { z = Log (x) y = Neg (z) }")
    feeds = [{"x": np.ones((2, 3), np.float32)}, {"x": -np.ones((2, 3), np.float32)}]
    message = refusal(PassError, model, feeds, Mean("y"))
    assert "y is not finite in calibration sample 1" in message
    assert "y = Neg(z" in message and "2 of 2 rows hold NaN or infinity" in message


def test_names_are_checked_before_any_work() -> None:
    feeds = [{"x": text.normal(2, 3), "z": text.normal(2, 3)}]
    message = refusal(PassError, text.model(PAIR), feeds, Mean("yy"), CosineSimilarity("a", "nope"))
    assert "no value named 'yy'" in message and "did you mean y?" in message
    assert "no value named 'nope'" in message


def test_values_without_rows_and_channels_are_refused() -> None:
    model = text.model(
        "g (float[b,3] x) => (float[b,3] y, int64[2] s, float t)"
        " { y = Neg (x) s = Shape (x) t = ReduceSum <keepdims=0> (x) w = Transpose <perm=[1,0]> (x)"
        " k = Slice (x, zero, one, one) }",
        {"zero": np.array([0], np.int64), "one": np.array([1], np.int64)},
    )
    feeds = [{"x": text.normal(2, 3)}]
    assert "s is INT64, not floating-point" in refusal(PassError, model, feeds, Mean("s"))
    assert "t has 0 dims and no axis -1" in refusal(PassError, model, feeds, Mean("t"))
    assert "no axis 2" in refusal(PassError, model, feeds, Mean("y", axis=2))
    varying = refusal(PassError, model, feeds, Mean("w"))
    assert "w is [3,b]: its channels, axis -1, have no fixed number" in varying
    pair = CosineSimilarity("y", "t")
    assert "y is [b,3], t []" in refusal(PassError, model, feeds, pair)
    # Only the sample shows that these differ.
    assert "y and w differ in shape" in refusal(PassError, model, feeds, CosineSimilarity("y", "w"))


def test_no_sample_and_only_padding_are_refused() -> None:
    assert "no calibration samples" in refusal(PassError, text.model(PAIR), [], Mean("a"))
    feeds = masked_feeds(0.0)
    for feed in feeds:
        feed["attention_mask"][:] = 0
    assert "no row of y counts" in refusal(PassError, masked_model(), feeds, Mean("y"))
    other = sweep(masked_model(), feeds, Mean("unmasked"))  # its rows do
    assert other[0].count == 2 * 5 + 3 * 4


def test_a_sample_that_does_not_fit_is_found_before_the_others_run() -> None:
    good, bad = {"x": text.normal(2, 3), "z": text.normal(2, 3)}, {"x": text.normal(2, 3)}
    assert "input 'z' is missing" in refusal(InputError, text.model(PAIR), [good, bad], Mean("a"))


def test_the_context_collects_and_says_who_needs_data() -> None:
    feeds = [{"x": text.normal(5, 3), "z": text.normal(5, 3, seed=1)}]
    context = Context(calibration=feeds)
    (result,) = context.collect(text.model(PAIR), [Mean("a")], needed_by="drop")
    check(result, -feeds[0]["x"])
    with pytest.raises(PassError, match="drop needs calibration data"):
        Context().collect(text.model(PAIR), [Mean("a")], needed_by="drop")
