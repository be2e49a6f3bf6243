"""A layer that is damaged on purpose is named, with few measurements, from Python and from the shell."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from netlathe import Captured, Context
from netlathe.diagnostics import PassError
from netlathe.pipeline import bisect as bisecting
from netlathe.pipeline import run as runs
from netlathe.pipeline import text
from netlathe.pipeline.bisect import Found, Trial, bisect
from netlathe.pipeline.loss import Scale, Subject
from netlathe.pipeline.pass_ import SilentProgress
from netlathe.testing.models import from_text
from tests.cli.conftest import Run, run  # noqa: F401  # a fixture
from tests.ir.onnx_text import matrix

LAYERS = 12
BAD = "layers.7"
HURT = f"quantize(min_size=0, overrides={{{BAD!r}: {{'weights': 'int2'}}}})"


def stream(output: str = "y") -> Captured:
    """Layers beside each other on a stream of 16: x + Relu(x w)."""
    lines, now = [], "x"
    for n in range(LAYERS):
        lines.append(f'["/layers.{n}/MatMul"] a{n} = MatMul({now}, w{n}) r{n} = Relu(a{n})')
        lines.append(f"x{n} = Add({now}, r{n})")
        now = f"x{n}"
    lines.append(f"{output} = MatMul({now}, head)")
    body = " ".join(lines)
    drawn = {f"w{n}": matrix(16, 16, seed=n) / 8 for n in range(LAYERS)}
    drawn["head"] = matrix(16, 24, seed=99) / 4
    return from_text("stream", f"(float[b, 16] x) => (float[b, 24] {output}) {{ {body} }}", drawn)


def trial(captured: Captured, passes: str, bars: SilentProgress | None = None) -> Trial:
    feeds = [{"x": matrix(32, 16, seed=7)}]
    scale = Scale(feeds, "samples", None, bars or SilentProgress())
    (made,) = runs.walk(captured, text.parse(passes), Context(feeds))
    before, step, _, ctx = made
    return Trial(before, step, ctx, scale)


def last(of: Trial, budget: int, bound: float | None = None) -> Found:
    *_, found = bisect(of, budget=budget, bound=bound)
    return found


def test_the_damaged_layer_is_named() -> None:
    found = last(trial(stream(), HURT), 64)
    assert found.complete and found.total is not None and found.left is not None
    assert len(found.ranked) == LAYERS + 1
    worst, second = found.ranked[:2]
    assert worst.entry.where == BAD and worst.alone and second.alone
    assert worst.alone > 20 * second.alone
    assert worst.without is not None and worst.without < 0.05 * found.total
    assert [entry.where for entry in found.reverted or ()] == [BAD]
    assert found.left == worst.without <= found.bound == found.total / 2


def test_few_measurements_find_it_among_many() -> None:
    budget = 14
    found = last(trial(stream(), HURT), budget)
    assert found.measured <= budget
    assert found.ranked[0].entry.where == BAD
    assert [entry.where for entry in found.reverted or ()] == [BAD]
    assert len(found.ranked) < LAYERS / 2  # the others were never looked at alone


def test_losses_are_those_of_the_models() -> None:
    """Against the pass run on the layers that an option names."""
    captured = stream("hidden")
    feeds = {"x": matrix(32, 16, seed=7)}
    found = last(trial(captured, HURT), 64)

    def alone(layer: int) -> float:
        others = tuple(f"layers.{n}" for n in range(LAYERS) if n != layer)
        options = f"ignore={(*others, 'head')!r}, min_size=0"
        if f"layers.{layer}" == BAD:
            options += ", weights='int2'"
        model = captured.model.clone()
        (pass_,) = text.parse(f"quantize({options})")
        pass_.run(model, Context())
        outputs = [
            Subject(m).run(feeds)["hidden"].astype(np.float64) for m in (captured.model, model)
        ]
        return float(np.square(outputs[0] - outputs[1]).sum() / np.square(outputs[0]).sum())

    assert found.metric == "mse"
    by_layer = {c.entry.where: c.alone or 0.0 for c in found.ranked}
    for layer in (0, 7, 11):
        assert np.isclose(by_layer[f"layers.{layer}"], alone(layer), rtol=1e-9)


def test_weights_and_layers_have_their_own_errors() -> None:
    captured = stream()
    of = trial(captured, "sparsify(score='sparsegpt', min_size=0)")
    found = last(of, 4)
    after = {str(v.name): v for v in of._edited(of.candidates).graph.initializers.values()}
    for candidate in found.candidates:
        name = candidate.entry.candidate
        before, now = (
            np.asarray(v.const_value, np.float64)
            for v in (captured.model.graph.initializers[name], after[name])
        )
        assert candidate.weight == np.square(now - before).sum() / np.square(before).sum()
        assert candidate.entry.detail["error"] > 0
    row = found.to_json()["candidates"][0]
    assert row["layer_error"] == next(
        c.entry.detail["error"] for c in found.candidates if c.entry.candidate == row["candidate"]
    )


def test_the_fewest_that_meet_a_bound_are_left_out() -> None:
    of = trial(stream(), "sparsify(pattern='1:4', min_size=0)")
    found = last(of, 64)
    assert found.total is not None
    for share in (0.9, 0.3):
        some = last(trial(stream(), "sparsify(pattern='1:4', min_size=0)"), 64, share * found.total)
        assert some.reverted is not None and some.left is not None
        worst = [c.entry for c in some.ranked]
        count = len(some.reverted)
        assert [e.candidate for e in some.reverted] == [e.candidate for e in worst[:count]]
        assert some.left <= share * found.total
        fewer = [
            e for e in of.candidates if e.candidate not in {w.candidate for w in worst[: count - 1]}
        ]
        assert of.loss(fewer) > share * found.total
    none = last(trial(stream(), "sparsify(pattern='1:4', min_size=0)"), 64, 2 * found.total)
    assert none.reverted == [] and none.left == none.total


def test_orders_stay_when_weights_are_left_out() -> None:
    of = trial(stream(), "sparsify(min_size=0, permute=True)")
    found = last(of, 64)
    assert found.complete and all("value" in c.entry.detail for c in found.candidates)


def image() -> Captured:
    """Convolutions, one of them in a sum, and matrix products behind a move."""
    text = """(float[b,4,6,6] x) => (float[b,3] y) {
        c = Conv<pads = [1, 1, 1, 1]>(x, w0, b0) r = Relu(c)
        d = Conv<pads = [1, 1, 1, 1]>(r, w1, b1) s = Add(d, r)
        e = Conv(s, w2, b2) f = Flatten(e) g = MatMul(f, w3) h = Relu(g) y = MatMul(h, w4) }"""
    rng = np.random.default_rng(0)
    shapes = {
        "w0": (8, 4, 3, 3),
        "w1": (8, 8, 3, 3),
        "w2": (4, 8, 3, 3),
        "w3": (64, 16),
        "w4": (16, 3),
    }
    shapes |= {"b0": (8,), "b1": (8,), "b2": (4,)}
    held = {name: rng.normal(0, 0.3, dims).astype(np.float32) for name, dims in shapes.items()}
    return from_text("image", text, held)


@pytest.mark.parametrize(
    "form",
    [
        'activations="int8"',
        'activations="int8", activation_form="qdq"',
        'activations="uint8", activation_scales="tensor"',
        'activations="uint8", activation_scales="tensor", activation_form="qdq"',
        'activations="int8", activation_scales="token"',
        'activations="int8", activation_scales="token", activation_form="qdq"',
    ],
)
def test_activations_go_with_their_weights(form: str) -> None:
    """With some weights only, the model is the one that leaving the others out makes."""
    captured = image()
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((5, 4, 6, 6), np.float32)}]
    scale = Scale(feeds, "samples", None, SilentProgress())
    (made,) = runs.walk(captured, text.parse(f"quantize(min_size=0, {form})"), Context(feeds))
    before, step, _, ctx = made
    of = Trial(before, step, ctx, scale)
    assert [entry.candidate for entry in of.candidates] == ["w0", "w1", "w2", "w3", "w4"]
    for count in (1, 2):
        for some in itertools.combinations(of.candidates, count):
            rest = tuple(e.candidate for e in of.candidates if e not in some)
            passes = text.parse(f"quantize(min_size=0, ignore={rest}, {form})")
            ((_, _, alone, _),) = runs.walk(captured, passes, Context(feeds))
            lost = scale.loss(Subject(before), Subject(alone))
            assert lost is not None
            expected = lost.relative_rms**2 if lost.kl is None else lost.kl
            assert of.loss(some) == pytest.approx(expected, rel=1e-6)


def test_logits_are_judged_by_divergence() -> None:
    found = last(trial(stream("logits"), HURT), 64)
    assert found.metric == "kl" and found.ranked[0].entry.where == BAD


def test_what_cannot_be_bisected_is_said() -> None:
    with pytest.raises(PassError, match="chooses no candidates"):
        trial(stream(), "cleanup")
    with pytest.raises(PassError, match="applied nothing"):
        trial(stream(), "quantize(min_size=10000)")


# -- from the shell ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    ir.save(stream().model, tmp_path / "stream.onnx")
    return tmp_path / "stream.onnx"


def test_the_command_names_it(run: Run, file: Path, tmp_path: Path) -> None:  # noqa: F811
    done = run("bisect", file, "--passes", f"cleanup, {HURT}", "--budget", 20, "--no-cache")
    assert done.code == 0
    first = next(line for line in done.out.splitlines() if line.startswith("w"))
    assert first.split()[:2] == ["w7", BAD]  # the worst is on top
    assert "without the worst 1 of 13" in done.out and "ignore=('w7',)" in done.out
    said = run("bisect", file, "--passes", HURT, "--no-cache", "--json", "--budget", 14).json
    assert said["reverted"] == ["w7"] and said["complete"] and said["measured"] <= 14
    assert said["loss_without_reverted"] <= said["bound"] < said["loss"]


def test_compile_shows_the_layers_that_lose_most(run: Run, file: Path, tmp_path: Path) -> None:  # noqa: F811
    np.savez(tmp_path / "data.npz", x=matrix(64, 16, seed=3))
    words = ("compile", file, "--passes", "sparsify(score='wanda', min_size=0)", "--no-cache")
    done = run(*words, "--calibration", tmp_path / "data.npz", "-o", tmp_path / "out")
    assert done.code == 0
    at = next(n for n, line in enumerate(done.out.splitlines()) if line.startswith("status"))
    rows = [line.split() for line in done.out.splitlines()[at : at + 13]]
    assert rows[0] == ["status", "candidate", "where", "lost", "reason"]
    lost = [float(row[3]) for row in rows[1:] if row[1] != "head"]  # which has no module path
    assert len(lost) >= 11 and lost == sorted(lost, reverse=True)


def test_the_command_takes_the_passes_of_a_folder(run: Run, file: Path, tmp_path: Path) -> None:  # noqa: F811
    assert run("compile", file, "--passes", HURT, "-o", tmp_path / "out", "--no-cache").code == 0
    done = run("bisect", file, "--of", tmp_path / "out", "--no-cache", "--json")
    assert done.code == 0 and done.json["reverted"] == ["w7"]
    wrong = run("bisect", file, "--of", tmp_path, "--no-cache")
    assert wrong.code == 2 and "manifest" in wrong.err
    both = run("bisect", file, "--of", tmp_path / "out", "--passes", HURT, "--no-cache")
    assert both.code == 2 and "--of says what is run" in both.err


def test_the_command_looks_into_the_step_that_loses_most_or_is_named(
    run: Run,  # noqa: F811
    file: Path,
) -> None:
    passes = f"sparsify(pattern='1:4', min_size=0), {HURT}"
    words = ("bisect", file, "--passes", passes, "--no-cache", "--json", "--budget", 14)
    said = run(*words).json
    losses = [step["loss"] for step in said["steps"]]
    assert losses[0] > losses[1] and said["pass"].startswith("sparsify")
    named = run(*words, "--step", "quantize").json
    assert named["pass"].startswith("quantize") and named["reverted"] == ["w7"]
    assert run(*words, "--step", "2").json == named
    wrong = run(*words, "--step", "quantise")
    assert wrong.code == 2 and "quantize" in wrong.err
    assert run("bisect", file, "--passes", "cleanup", "--no-cache").code == 2


def test_a_bound_that_cannot_be_met_is_a_failed_gate(run: Run, file: Path) -> None:  # noqa: F811
    done = run("bisect", file, "--passes", HURT, "--bound", "0", "--budget", "8", "--no-cache")
    assert done.code == 1 and "no few were found" in done.out


def test_ctrl_c_shows_what_was_found(
    run: Run,  # noqa: F811
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = Trial.loss

    def once_too_often(self: Trial, chosen: list[object]) -> float:
        self.pass_count = getattr(self, "pass_count", 0) + 1  # type: ignore[attr-defined]
        if self.pass_count > 10:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return measured(self, chosen)  # type: ignore[arg-type]

    monkeypatch.setattr(bisecting.Trial, "loss", once_too_often)
    done = run("bisect", file, "--passes", HURT, "--no-cache")
    assert done.code == 130
    assert "10 models measured, not finished" in done.out
    assert BAD in done.out.splitlines()[-3] or any(
        BAD in line for line in done.out.splitlines()[4:]
    )
