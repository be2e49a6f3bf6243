"""Sparse weights in a model: what is chosen, what is left, and what later passes make of the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import netlathe
from netlathe import Captured, Context
from netlathe.diagnostics import GateError, OptionError, PassError
from netlathe.execute import ort
from netlathe.ir import normal, sparsity, weights
from netlathe.ir.sparsity import Pattern, keeps, sparsity_of
from netlathe.passes.sparsify import Sparsify
from netlathe.pipeline import manifest
from netlathe.testing import models
from netlathe.testing.models import from_text
from tests.ir.onnx_text import matrix

Array = np.ndarray[Any, np.dtype[Any]]


def named(name: str) -> Captured:
    (found,) = [captured for captured in models() if captured.source == name]
    return found


def calibrated(captured: Captured, count: int = 3) -> list[Mapping[str, Array]]:
    return [captured.sample(captured.dynamic, 100 + seed) for seed in range(count)]


def made(name: str, passes: str) -> netlathe.Compiled:
    captured = named(name)
    return netlathe.compile(captured, passes, calibration=calibrated(captured))


def values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for g in model.graphs() for v in g.initializers.values()}


def block() -> Captured:
    """Two products around a Relu; the middle may be reordered."""
    return from_text(
        "block",
        '(float[b, 16] x) => (float[b, 8] y) { ["/up/MatMul"] h = MatMul(x, w) r = Relu(h)'
        ' ["/down/MatMul"] y = MatMul(r, v) }',
        {"w": matrix(16, 32), "v": matrix(32, 8, seed=1)},
    )


def seen(fed: list[Mapping[str, Array]], w: Array) -> tuple[Array, Array]:
    """What the two products of :func:`block` are fed: inputs, and what is behind ``w``."""
    x = np.concatenate([sample["x"] for sample in fed]).astype(np.float64)
    return x, np.maximum(x @ w.astype(np.float64), 0)


# -- what is chosen ---------------------------------------------------------------------------------


SLOW = pytest.mark.slow
PATTERNS = ["2:4", "4x2", *(pytest.param(p, marks=SLOW) for p in ("1:4", "4:8", "unstructured"))]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_every_model_equals_its_reference_and_keeps_the_pattern(pattern: str, score: str) -> None:
    for name in ("mlp", "convolution", "decoder"):
        compiled = made(name, f"sparsify(pattern={pattern!r}, score={score!r}, min_size=0)")
        (step,) = compiled.steps
        assert step.check.against == "simulated reference" and step.check.error == 0.0
        applied = [entry for entry in step.entries if entry.status == "applied"]
        assert len(applied) >= 2
        found = values(compiled.model)
        for entry in applied:
            held = sparsity_of(found[entry.candidate])
            assert held is not None and held.pattern == pattern
            array = weights.array(found[entry.candidate])
            assert keeps(array, Pattern.parse(pattern), held.axis, held.rows)
            assert held.density == np.count_nonzero(array) / array.size == entry.detail["density"]
            wanted = {"1:4": 0.75}.get(pattern, 0.5)
            assert abs(1 - held.density - wanted) < 0.1  # of small layers, to whole numbers


def test_magnitude_and_wanda_are_their_formulas() -> None:
    captured = block()
    fed = calibrated(captured)
    for score in ("magnitude", "wanda"):
        after = netlathe.compile(
            captured, f"sparsify(score={score!r}, min_size=0)", calibration=fed
        ).model
        dense, sparse = (
            {name: weights.array(value) for name, value in values(m).items()}
            for m in (captured.model, after)
        )
        inputs = dict(zip("wv", seen(fed, sparse["w"]), strict=True))  # v sees w as it has become
        for name in "wv":
            scores = np.abs(dense[name].astype(np.float64))  # [k, n], summed over k
            if score == "wanda":
                scores *= np.linalg.norm(inputs[name], axis=0)[:, None]
            kept = sparse[name] != 0
            assert np.array_equal(sparse[name], dense[name] * kept)
            for start in range(0, len(kept), 4):
                group = slice(start, start + 4)
                wanted = np.argsort(-scores[group], axis=0)[:2]
                assert np.array_equal(
                    np.sort(wanted, 0), np.nonzero(kept[group].T)[1].reshape(-1, 2).T
                )


def test_the_ledger_says_what_the_output_loses() -> None:
    captured = block()
    fed = calibrated(captured)
    compiled = netlathe.compile(
        captured, "sparsify(score='sparsegpt', sweeps=2, min_size=0)", calibration=fed
    )
    after = {name: weights.array(value) for name, value in values(compiled.model).items()}
    dense = {name: weights.array(value) for name, value in values(captured.model).items()}
    inputs = dict(zip("wv", seen(fed, after["w"]), strict=True))
    for entry in compiled.steps[0].entries:
        x, name = inputs[entry.candidate], entry.candidate
        square = np.square(x @ (after[name] - dense[name])).sum() / np.square(x @ dense[name]).sum()
        # The second moment of what float32 products gave: some ulp of their largest.
        assert np.isclose(entry.detail["error"], square, rtol=1e-4)
        assert f"{entry.detail['error']:.2g} of the output's square lost" in entry.reason


def test_a_convolution_is_solved_with_the_patches_under_its_kernel() -> None:
    captured = from_text(
        "conv",
        "(float[b, 8, 9, 7] x) => (float[b, 6, h, w] y)"
        " { y = Conv<strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 2]>(x, k) }",
        {"k": matrix(6, 8, 3, 3)},
    )
    fed = [{"x": matrix(4, 8, 9, 7, seed=n) + 1} for n in range(2)]
    lost = []
    for score in ("wanda", "sparsegpt"):
        compiled = netlathe.compile(
            captured, f"sparsify(score={score!r}, min_size=0)", calibration=fed
        )
        (entry,) = compiled.steps[0].entries
        outputs = [
            np.concatenate([ort.run(m, f)["y"] for f in fed]).astype(np.float64)
            for m in (captured.model, compiled.model)
        ]
        square = np.square(outputs[1] - outputs[0]).sum() / np.square(outputs[0]).sum()
        # Products of 72 float32 numbers in ONNX Runtime, against moments of the same in float64.
        assert np.isclose(entry.detail["error"], square, rtol=1e-4)
        lost.append(square)
    assert lost[1] < 0.6 * lost[0]


def test_experts_are_matrices_of_their_own() -> None:
    captured = from_text(
        "experts",
        "(float[b, 16] x, int64[b] ids) => (float[b, 1, 12] y)"
        " { u = Unsqueeze(x, axes) e = Gather(w, ids) y = MatMul(u, e) }",
        {"w": matrix(4, 16, 12), "axes": np.array([1])},
    )
    fed = [
        {"x": matrix(50, 16, seed=n) @ matrix(16, 16), "ids": np.arange(50) % 4} for n in range(2)
    ]
    pass_ = Sparsify(score="sparsegpt", min_size=0)
    model = captured.model.clone()
    (entry,) = pass_.choose(model, Context(fed))
    pass_.edit(model, [entry], Context(fed))
    held = sparsity_of(values(model)["w"])
    assert entry.detail["score"] == "sparsegpt" and held is not None and held.axis == 1
    errors = [
        np.square(ort.run(model, f)["y"] - ort.run(captured.model, f)["y"]).sum() for f in fed
    ]
    (entry,) = Sparsify(min_size=0).choose(captured.model, Context())
    other = captured.model.clone()
    pass_.edit(other, [entry], Context())
    plain = [np.square(ort.run(other, f)["y"] - ort.run(captured.model, f)["y"]).sum() for f in fed]
    assert sum(errors) < 0.8 * sum(plain)


def test_each_step_loses_less() -> None:
    lost = {}
    for options in ("'wanda'", "'wanda', sweeps=3", "'sparsegpt'", "'sparsegpt', sweeps=3"):
        entries = made("encoder", f"sparsify(score={options}, min_size=0)").steps[0].entries
        first = next(e for e in entries if e.candidate == "layers.0.ffn.up.weight")
        lost[options] = first.detail["error"]
    assert lost["'sparsegpt', sweeps=3"] < lost["'sparsegpt'"] < lost["'wanda'"]
    assert lost["'wanda', sweeps=3"] < lost["'wanda'"]


def test_overrides_and_ignored_weights() -> None:
    compiled = made(
        "encoder",
        "sparsify(min_size=0, ignore=('layers.0.attention',),"
        " overrides={'ffn': {'pattern': 'unstructured', 'ratio': 0.75},"
        " 'layers.1.ffn.up': {'pattern': '1:4'}})",
    )
    entries = {e.candidate: e for e in compiled.steps[0].entries}
    assert entries["layers.0.attention.q.weight"].reason.startswith("ignored")
    assert entries["layers.0.attention.q.weight"].left_out
    assert entries["layers.1.attention.q.weight"].detail["pattern"] == "2:4"
    assert entries["layers.0.ffn.up.weight"].detail["density"] == 0.25
    assert entries["layers.1.ffn.up.weight"].detail["pattern"] == "1:4"
    assert "looked up" in entries["embed.weight"].reason


def test_what_does_not_divide_is_refused_with_what_would() -> None:
    entries = {e.candidate: e for e in made("convolution", "sparsify(min_size=0)").steps[0].entries}
    stem = entries["stem.conv.weight"]
    assert stem.status == "refused" and "3 elements of axis 1" in stem.reason
    (entry,) = made("shared", "sparsify(pattern='4:32', min_size=0)").steps[0].entries
    assert entry.status == "refused" and "1:8, 2:16 would fit" in entry.reason


def test_zeros_that_are_there_are_left_and_refined() -> None:
    captured = named("mlp")
    once = netlathe.compile(captured, "sparsify(min_size=0)")
    assert (
        not netlathe.compile(once.captured, "sparsify(min_size=0), sparsify(min_size=0)")
        .steps[1]
        .changed
    )
    both = netlathe.compile(captured, "sparsify(min_size=0), sparsify(pattern='1:4', min_size=0)")
    for name, held in ((r["weight"], r) for r in sparsity.table(both.model)):
        first, second = (weights.array(values(c.model)[name]) for c in (once, both))
        assert held["pattern"] == "1:4" and held["density"] == 0.25
        assert not (second != 0)[first == 0].any()


def test_strict_objects_to_nothing_that_options_leave_out() -> None:
    with pytest.raises(GateError, match=r"no product"):
        netlathe.compile(named("decoder"), "sparsify(min_size=0)", strict=True)
    netlathe.compile(named("encoder"), "sparsify(min_size=0)", strict=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sparsify(pattern='2-4')", "no pattern"),
        ("sparsify(pattern='4:4')", "N must be from 1"),
        ("sparsify(ratio=0.5)", "cannot be asked for as well"),
        ("sparsify(pattern='unstructured', ratio=0)", "ratio"),
        ("sparsify(pattern='unstructured', ratio=1)", "ratio"),
        ("sparsify(overrides={'a': {'patern': '2:4'}})", "patern"),
        ("sparsify(overrides={'a': {'ratio': 0.5}})", "cannot be asked for as well"),
        ("sparsify(pattern='unstructured', permute=True)", "N:M"),
        ("sparsify(pattern='4x4', refine=True)", "tiles"),
        ("sparsify(score='sparsegpt', refine=True)", "sparsegpt moves them"),
    ],
)
def test_options_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        netlathe.compile(named("mlp"), text)


def test_patterns_that_match_nothing_and_data_that_is_missing() -> None:
    with pytest.raises(PassError, match="matches no weight"):
        netlathe.compile(named("mlp"), "sparsify(ignore=('mpl',))")
    for options in ("score='wanda'", "refine=True", "sweeps=1"):
        with pytest.raises(OptionError, match=f"needs calibration data for {options}"):
            netlathe.compile(named("mlp"), f"sparsify({options}, min_size=0)")


def test_weights_that_cannot_be_judged_are_refused() -> None:
    captured = block()
    array = weights.array(values(captured.model)["w"]).copy()
    array[0, 0] = np.nan
    values(captured.model)["w"].const_value = ir.tensor(array, name="w")
    entries = Sparsify(min_size=0).choose(captured.model, Context())
    assert [(e.candidate, e.status) for e in entries] == [("w", "refused"), ("v", "applied")]
    assert "NaN" in entries[0].reason


# -- orders -----------------------------------------------------------------------------------------


def test_an_order_of_channels_keeps_more_and_the_function() -> None:
    captured = block()
    fed = calibrated(captured)
    plain, ordered = (
        netlathe.compile(captured, f"sparsify(score='wanda', min_size=0{rest})", calibration=fed)
        for rest in ("", ", permute=True")
    )
    (step,) = ordered.steps
    assert step.check.error is not None and step.check.tolerance is not None
    assert 0 < step.check.error <= step.check.tolerance
    order, *_ = [e for e in step.entries if "order_of" in e.detail and e.status == "applied"]
    assert order.detail["kept_after"] > order.detail["kept_before"]
    (refused,) = [e for e in step.entries if e.status == "refused"]
    assert "graph input x" in refused.reason
    lost = [
        next(e for e in c.steps[0].entries if e.candidate == "v").detail["error"]
        for c in (plain, ordered)
    ]
    assert lost[1] < lost[0]
    # The order is that of both weights: columns of w as rows of v.
    array, moved = (weights.array(values(m)["w"]) for m in (plain.model, ordered.model))
    assert np.array_equal(moved, array[:, order.arrays["order"]])
    assert sparsity_of(values(ordered.model)["v"]) is not None


@pytest.mark.parametrize(
    "name", ["convolution", "decoder", *(pytest.param(n, marks=SLOW) for n in ("encoder", "half"))]
)
def test_orders_break_nothing(name: str) -> None:
    compiled = made(name, "sparsify(score='sparsegpt', permute=True, min_size=0)")
    (step,) = compiled.steps
    applied = [e for e in step.entries if e.status == "applied" and "value" in e.detail]
    held = {row["weight"] for row in sparsity.table(compiled.model)}
    assert held == {entry.candidate for entry in applied}


def test_an_order_does_not_break_what_is_sparse_already() -> None:
    compiled = made(
        "mlp",
        "sparsify(min_size=0, ignore=('mlp.up',)), sparsify(pattern='1:4', min_size=0, permute=True,"
        " ignore=('mlp.down',))",
    )
    held = {row["weight"]: row["pattern"] for row in sparsity.table(compiled.model)}
    assert held == {"mlp.up.weight": "1:4", "mlp.down.weight": "2:4"}


# -- later passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantize",
    [
        "quantize(min_size=0)",
        "quantize(min_size=0, weights='int4', group_size=16, clip='mse')",
        "quantize(min_size=0, weights='int4', symmetric=False)",
        "quantize(min_size=0, weights='int3', solver='gptq', sweeps=2, symmetric=False)",
        "quantize(min_size=0, weights='nf4', solver='gptq')",
        "quantize(min_size=0, activations='int8', activation_scales='token')",
        "quantize(min_size=0, activations='int8')",
        "convert",
    ],
)
def test_zeros_stay_when_weights_are_quantized(quantize: str) -> None:
    compiled = made("mlp", f"sparsify(min_size=0), {quantize}")
    rows = sparsity.table(compiled.model)
    assert [(row["pattern"], row["axis"]) for row in rows] == [("2:4", 0)] * 2
    dense = netlathe.compile(named("mlp"), "sparsify(min_size=0)").model
    for value in sparsity.recorded(compiled.model):
        array = sparsity.contents(value)
        assert array is not None
        before = weights.array(values(dense)[str(value.name).removesuffix("_int8")])
        assert not np.asarray(array, np.float64)[before == 0].any()


def test_a_convolution_stays_sparse_when_quantized() -> None:
    for quantize in (
        "quantize(min_size=0, weights='int4')",
        "quantize(min_size=0, activations='int8')",
    ):
        compiled = made("convolution", f"sparsify(min_size=0), {quantize}")
        assert {row["pattern"] for row in sparsity.table(compiled.model)} == {"2:4"}
        assert len(sparsity.table(compiled.model)) == 3


def test_a_record_goes_with_its_zeros() -> None:
    compiled = made("mlp", "sparsify(min_size=0), prune(ratio=0.25, round_to=2)")
    left = {row["weight"] for row in sparsity.table(compiled.model)}
    assert left == {"mlp.up.weight"}  # columns went from it; rows of the other, out of its groups
    free = "sparsify(pattern='unstructured', min_size=0)"
    kept = made("mlp", f"{free}, prune(ratio=0.25, round_to=2, compensate='none')")
    for row in sparsity.table(kept.model):
        assert row["density"] == sparsity.density(weights.array(values(kept.model)[row["weight"]]))
    assert len(sparsity.table(kept.model)) == 2
    filled = made("mlp", f"{free}, prune(ratio=0.25, round_to=2, compensate='least_squares')")
    assert {row["weight"] for row in sparsity.table(filled.model)} == {"mlp.up.weight"}


def test_a_record_that_is_not_true_any_more_is_not_told() -> None:
    model = netlathe.compile(named("mlp"), "sparsify(min_size=0)").model.clone()
    value = values(model)["mlp.up.weight"]
    held = sparsity_of(value)
    assert held is not None and sparsity_of(None) is None
    value.const_value = ir.tensor(matrix(*weights.array(value).shape), name=value.name)
    assert sparsity_of(value) is None
    with pytest.raises(ValueError, match="not 2:4"):
        sparsity.record(value, "2:4", held.axis, held.rows)


def test_the_record_travels_with_the_file_and_the_manifest(tmp_path: Path) -> None:
    compiled = made("encoder", "sparsify(min_size=0), quantize(min_size=0, embeddings=False)")
    compiled.save(tmp_path / "out")
    rows = manifest.build(compiled)["compilation"]["result"]["sparsity"]
    assert rows == sparsity.table(compiled.model) and len(rows) == 12
    again = netlathe.capture(tmp_path / "out" / "model.onnx").model
    assert [row["pattern"] for row in sparsity.table(again)] == ["2:4"] * 12


# -- the same again ---------------------------------------------------------------------------------


class Kept:
    """Pieces that a run before has left."""

    def __init__(self) -> None:
        self.held: dict[str, Mapping[str, Array]] = {}
        self.asked: list[str] = []

    def once(self, name: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        self.asked.append(name)
        if name not in self.held:
            self.held[name] = compute()
        return self.held[name]


def test_work_goes_on_at_the_layer_and_gives_the_same_bytes() -> None:
    captured = named("encoder")
    pass_ = Sparsify(score="sparsegpt", permute=True, sweeps=1, min_size=0)

    def run(pieces: Kept) -> dict[str, str]:
        model = captured.model.clone()
        ctx = Context(calibrated(captured), pieces=pieces)
        pass_.run(model, ctx)
        normal.normalize(model)
        return {
            name: weights.digest(v.const_value)
            for name, v in values(model).items()
            if v.const_value
        }

    first = Kept()
    whole = run(first)
    half = Kept()
    half.held = dict(list(first.held.items())[: len(first.held) // 2])
    assert run(half) == whole
    assert half.asked == first.asked and len(first.asked) > 12


def test_the_result_runs_in_onnx_runtime_as_its_reference_says() -> None:
    captured = named("decoder")
    pass_ = Sparsify(score="wanda", refine=True, min_size=0)
    ctx = Context(calibrated(captured))
    chosen = pass_.choose(captured.model, ctx)
    model = captured.model.clone()
    pass_.edit(model, chosen, ctx)
    fed = captured.sample(captured.dynamic, 7)
    after = ort.run(model, fed)
    reference = ort.run(pass_.simulate(captured.model.clone(), chosen).model, fed)
    dense = ort.run(captured.model, fed)
    for name, array in after.items():
        assert np.array_equal(array, reference[name])
        assert not np.array_equal(array, dense[name])
