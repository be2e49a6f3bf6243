"""Every law of passes: an honest pass keeps it, and one that breaks it and nothing else is caught."""

from __future__ import annotations

import numpy as np
import pytest

from netlathe import Pass
from netlathe.testing import ConformanceError, check_pass, from_text, pass_cases
from tests.testing import broken

# The one that acts and the one with subgraphs; a model without nodes comes by itself.
WEIGHTS = {"up": np.eye(16, 32, dtype=np.float32) + 0.1, "bias": np.full(32, 0.1, np.float32)}
TEXT = """(float[batch, 16] x) => (float[batch, 8] y) {
    h = MatMul(x, up) b = Add(h, bias) r = Relu(b) y = MatMul(r, down) }"""
NESTED = """(bool c, float[batch, 16] x) => (float[batch, 16] y) {
    y = If(c) <then_branch = a () => (float[batch, 16] t) { t = Tanh(x) },
               else_branch = b () => (float[batch, 16] e) { e = MatMul(x, w) }> }"""


def models() -> list:
    rng = np.random.default_rng(0)
    down = rng.standard_normal((32, 8)).astype(np.float32)
    square = rng.standard_normal((16, 16)).astype(np.float32)
    return [
        from_text("acts", TEXT, {**WEIGHTS, "down": down}),
        from_text("if", NESTED, {"w": square}),
    ]


BROKEN = [
    ("protocol", broken.Nameless()),
    ("options", broken.Plain()),
    ("text", broken.Forgetful(tries=2)),
    ("runs", broken.Crashes()),
    ("acts", broken.Lazybones()),
    ("choice", broken.EditsWhileChoosing()),
    ("form", broken.Untidy()),
    ("interface", broken.Renames()),
    ("ledger", broken.Wordless()),
    ("idle", broken.Restless()),
    ("given", broken.Scribbles()),
    ("lazy", broken.Loads()),
    ("repeatable", broken.Dices()),
    ("process", broken.Hashes()),
    ("random_state", broken.Seeds()),
    ("names", broken.Swaps()),
    ("reference", broken.SimulatesByEdit()),
    ("promise", broken.Leaky()),
    ("promise", broken.WrongRows()),
    ("data", broken.Hungry()),
    ("onnx_ir", broken.OnlyByItself()),
    ("manifest", broken.Infinite()),
]


@pytest.mark.parametrize("pass_", [broken.Honest(), broken.Mute(count=2)], ids=str)
def test_an_honest_pass_keeps_every_law(pass_: Pass) -> None:
    check_pass(pass_, models())


@pytest.mark.parametrize(("law", "pass_"), BROKEN, ids=[type(p).__name__ for _, p in BROKEN])
def test_each_law_can_be_broken_alone(law: str, pass_: Pass) -> None:
    # Another process is started for the one law that needs it, not for every pass here.
    cases = [c for c in pass_cases(pass_, models()) if str(c) != "process" or law == "process"]
    found = {str(case): case.diagnostics() for case in cases}
    assert [name for name, diagnostics in found.items() if diagnostics] == [law]
    (first, *_) = found[law]
    assert first.code == f"conformance.{law}" and pass_.name in first.message and first.help


def test_every_law_is_broken_by_some_pass() -> None:
    cases = {str(c) for p in (broken.Honest(), broken.Mute()) for c in pass_cases(p, models())}
    assert cases - {law for law, _ in BROKEN} == {"recipe"}  # see the next test


def test_the_law_of_recipes() -> None:
    """A wrong option_values() also gives another pass to manifests and to other processes."""
    (case,) = [c for c in pass_cases(broken.Counts(), models()) if str(c) == "recipe"]
    with pytest.raises(ConformanceError, match="gives honest"):
        case.check()


def test_a_message_names_law_model_and_way_out() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_pass(broken.Crashes(), models())
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert "error[conformance.runs]: the pass honest breaks the law that a pass runs" in text
    assert "on the model 'if': raised KeyError: 'If'" in text
    assert "note: broken.py:" in text and "help: skip what the pass is not for" in text
