"""Losses against their formulas in float64, written out row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.pipeline import loss as losses
from netlathe.pipeline.loss import Scale, Subject
from netlathe.pipeline.pass_ import Feeds, SilentProgress
from tests.ir.onnx_text import matrix, model
from tests.pipeline.toy import captured_of


def measure(before: ir.Model, after: ir.Model, feeds: list[Feeds], **known: Any) -> losses.Loss:
    scale = Scale.of(feeds, [], None, SilentProgress())
    found = scale.loss(Subject(before), Subject(after))
    assert found is not None
    return found


def head(name: str, shift: float = 0.0, body: str = "Add") -> ir.Model:
    """A linear head of three classes, shifted for one of them."""
    bias = np.array([shift, 0, 0], np.float32)
    text = f"h = MatMul(x, w)  {name} = Add(h, bias)"
    if body != "Add":
        text = f"h = MatMul(x, w)  a = Add(h, bias)  {name} = {body}"
    return captured_of(
        model("float[b,4] x", f"float {name}", text, w=matrix(4, 3), bias=bias)
    ).model


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("body", ["Add", "Softmax<axis = -1>(a)", "LogSoftmax<axis = -1>(a)"])
def test_kl_and_top1_of_logits_and_of_probabilities(body: str) -> None:
    feeds: list[Feeds] = [{"x": matrix(5, 4, seed=seed)} for seed in range(2)]
    found = measure(head("out", body=body), head("out", 0.5, body), feeds)
    kl, same, rows = 0.0, 0, 0
    for feed in feeds:
        for x in feed["x"].astype(np.float64):
            before = (x @ matrix(4, 3)).tolist()
            after = [before[0] + 0.5, *before[1:]]
            p, q = softmax(before), softmax(after)
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            same += before.index(max(before)) == after.index(max(after))
            rows += 1
    assert found.kl == pytest.approx(kl / rows, rel=1e-5)
    assert found.top1 == same / rows


@pytest.mark.parametrize(
    ("name", "is_logits"), [("output", True), ("logits", True), ("text_embeds", False)]
)
def test_embeddings_are_no_logits(name: str, is_logits: bool) -> None:
    found = measure(head(name), head(name, 0.1), [{"x": matrix(5, 4)}])
    assert (found.kl is not None) == (found.top1 is not None) == is_logits


def test_equal_models_lose_nothing() -> None:
    found = measure(head("logits"), head("logits"), [{"x": matrix(5, 4)}])
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert found.relative_rms == 0.0 and found.kl == 0.0 and found.top1 == 1.0


@pytest.mark.parametrize("name", ["attention_mask", "something_else"])
def test_padding_is_left_out(name: str) -> None:
    """Only masked positions differ."""

    def states(factor: float) -> ir.Model:
        return captured_of(
            model(
                f"float[b,s,4] x, int64[b,s] {name}",
                "float y",
                f"m = Cast<to = 1>({name})  u = Unsqueeze(m, last)  z = Sub(one, u)"
                "  f = Mul(z, factor)  g = Add(f, one)  y = Mul(x, g)",
                last=[-1],
                one=1.0,
                factor=factor,
            )
        ).model

    feeds: list[Feeds] = [{"x": matrix(2, 3, 4), name: np.array([[1, 1, 1], [1, 0, 0]], np.int64)}]
    found = measure(states(1.0), states(2.0), feeds)
    assert (found.relative_rms == 0.0) == (name == "attention_mask")


def test_every_output_has_its_own_numbers_and_the_first_float_is_the_result() -> None:
    def two(factor: float) -> ir.Model:
        return captured_of(
            model(
                "float[b,4] x",
                "int64 n, float y, float z",
                "y = Mul(x, factor)  n = Cast<to = 7>(x)  z = Relu(x)",
                factor=factor,
            )
        ).model

    found = measure(two(1.0), two(3.0), [{"x": matrix(2, 4)}])
    assert found.output == "y" and list(found.by_output) == ["y", "z"]
    assert found.relative_rms == pytest.approx(2.0) and found.cosine == pytest.approx(1.0)
    assert found.by_output["z"].relative_rms == 0.0


def test_rows_of_zeros_and_infinities() -> None:
    sums = losses._Sums("logits")
    before = np.array([[0.0, 0.0], [1.0, -np.inf], [0.0, 0.0]])
    after = np.array([[0.0, 0.0], [1.0, -np.inf], [1.0, 0.0]])
    sums.add(before, after)
    found = sums.distance()
    assert found.cosine == pytest.approx((1 + 1 + 0) / 3)
    p, q = softmax([0.0, 0.0]), softmax([1.0, 0.0])
    assert found.kl == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
    )


def test_what_does_not_fit_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds: list[Feeds] = [{"x": matrix(5, 4, seed=seed)} for seed in range(4)]
    expected = measure(head("logits"), head("logits", 0.5), feeds)
    monkeypatch.setattr(losses, "_KEPT_BYTES", 60)  # one output of 5 rows
    monkeypatch.setattr(losses, "_ROWS_AT_ONCE", 6)  # two rows
    subject, other = Subject(head("logits")), Subject(head("logits", 0.5))
    scale = Scale.of(feeds, [], None, SilentProgress())
    for _ in range(2):
        found = scale.loss(subject, other)
        assert found is not None and found.kl == pytest.approx(expected.kl)
        assert found.relative_rms == pytest.approx(expected.relative_rms)


def test_no_floating_point_output_no_loss() -> None:
    made = captured_of(model("float[b,4] x", "bool y", "y = Greater(x, w)", w=0.0)).model
    scale = Scale.of([{"x": matrix(2, 4)}], [], None, SilentProgress())
    assert scale.loss(Subject(made), Subject(made)) is None


@pytest.mark.parametrize(
    ("feeds", "rows", "used"),
    [(3, 1, 3), (20, 1, 8), (20, 8, 3), (1, 64, 1), (100, 2, 13), (7, 8, 1)],
)
def test_an_eighth_of_the_data_and_at_least_eight_samples(feeds: int, rows: int, used: int) -> None:
    data: list[Feeds] = [{"x": np.full((rows, 4), i, np.float32)} for i in range(feeds)]
    chosen = Scale.of(data, [], None, SilentProgress()).feeds
    starts = [int(one["x"][0, 0]) for one in chosen]
    assert len(starts) == used and starts == [i * feeds // used for i in range(used)]
