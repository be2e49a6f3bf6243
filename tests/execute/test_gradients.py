"""Gradients against torch's own, taken through the whole model at once; losses against their formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from netlathe.analysis import axes as axis_analysis
from netlathe.diagnostics import PassError
from netlathe.execute import gradients
from netlathe.execute.executor import Executor
from netlathe.execute.gradients import (
    GateFisher,
    GateMagnitude,
    Objective,
)
from netlathe.execute.statistics import Statistic, StatisticResult
from netlathe.ir import normal
from netlathe.passes.prune.candidates import find_candidates
from netlathe.pipeline.pass_ import SilentProgress
from tests import zoo_ir
from tests.execute import text

Array = np.ndarray[Any, np.dtype[Any]]
VOCAB, WIDTH, INNER = 11, 6, 10
# float32 arithmetic in another order, some 50 terms a sum: 2**-24 * 50, with room for cancellation.
CLOSE = 1e-4

LM = f"""
agraph (int64[b, t] ids) => (float[b, t, {VOCAB}] logits)
{{
    x = Gather <axis = 0> (table, ids)
    h = MatMul (x, up)
    a = Tanh (h)
    y = MatMul (a, down)
    r = Add (x, y)
    logits = MatMul (r, head)
}}
"""


def made(body: str, weights: dict[str, Array]) -> ir.Model:
    """A model in normal form."""
    model = text.model(body, weights)
    normal.normalize(model)
    return model


def language_model() -> ir.Model:
    rng = np.random.default_rng(0)
    sizes = {"table": (VOCAB, WIDTH), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
    sizes["head"] = (WIDTH, VOCAB)
    return made(LM, {n: rng.normal(0, 0.5, s).astype("f4") for n, s in sizes.items()})


def tokens(count: int = 3) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"ids": rng.integers(0, VOCAB, (2, 5))} for _ in range(count)]


def sweep(
    model: ir.Model,
    feeds: Sequence[Mapping[str, Array]],
    *wanted: Statistic,
    objective: Objective = Objective.DATA,
    stage_bytes: int = 1,
) -> list[StatisticResult]:
    return gradients.sweep(
        model,
        feeds,
        wanted,
        objective,
        device="cpu",
        progress=SilentProgress(),
        stage_bytes=stage_bytes,
    )


def eager(model: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> tuple[Array, Array]:
    """``a`` and its gradient under next-token cross-entropy, from plain torch."""
    weight = {
        name: torch.from_numpy(value.const_value.numpy().copy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    rows: list[list[Array]] = [[], []]
    for sample in feeds:
        ids = torch.from_numpy(sample["ids"])
        x = weight["table"][ids]
        a = torch.tanh(x @ weight["up"]).requires_grad_()
        logits = (x + a @ weight["down"]) @ weight["head"]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="sum"
        )
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        assert a.grad is not None
        for into, tensor in zip(rows, (a.detach(), a.grad), strict=True):
            into.append(tensor.reshape(-1, tensor.shape[-1]).double().numpy())
    joined = [np.concatenate(part) for part in rows]
    return joined[0], joined[1]


@pytest.mark.parametrize("stage_bytes", [1, 1 << 20])
def test_next_token_gradients_are_those_of_torch(stage_bytes: int) -> None:
    model, feeds = language_model(), tokens()
    index = (0, 0, 1, 1, -1, 2, 2, 2, 3, 3)
    each = tuple(range(INNER))
    gate, fisher, channel = sweep(
        model,
        feeds,
        GateMagnitude("a", -1, index),
        GateFisher("a", -1, index),
        GateFisher("a", -1, each),
        stage_bytes=stage_bytes,
    )
    a, g = eager(model, feeds)
    per_channel = a * g
    at = np.asarray(index)
    gates = np.stack([per_channel[:, at == p].sum(1) for p in range(4)], 1)
    labels = sum(f["ids"][:, 1:].size for f in feeds)
    for found, expected in (
        (gate, np.abs(gates).sum(0) / labels),
        (fisher, np.square(gates).sum(0) / labels),
        (channel, np.square(per_channel).sum(0) / labels),
    ):
        assert found.count == labels
        np.testing.assert_allclose(
            found.array, expected, rtol=0, atol=CLOSE * np.abs(expected).max()
        )
        assert found.array.dtype == np.float64


def test_a_gate_of_a_product_is_what_its_weights_sum_to() -> None:
    """|sum of w dL/dw| over the row of ``down`` that multiplies a channel, by finite differences."""
    model = language_model()
    feeds = [{"ids": np.array([[3, 7]])}]  # one label: the second token
    (found,) = sweep(model, feeds, GateMagnitude("a", -1, tuple(range(INNER))))
    assert found.count == 1

    def loss(gate: float, channel: int) -> float:
        changed = model.clone()
        value = changed.graph.initializers["down"]
        assert value.const_value is not None
        array = value.const_value.numpy().astype(np.float64)
        array[channel] *= gate
        value.const_value = ir.tensor(array.astype(np.float32))
        logits = Executor(changed).run(feeds[0])["logits"].double()
        ids = torch.from_numpy(feeds[0]["ids"])
        logs = torch.log_softmax(logits[:, :-1], -1)
        return -float(logs.gather(-1, ids[:, 1:, None]).sum())

    step = 2.0**-7  # error of the second order: step**2; of float32: 2**-24 / step
    for channel in (0, 4, 9):
        slope = (loss(1 + step, channel) - loss(1 - step, channel)) / (2 * step)
        assert found.array[channel] == pytest.approx(abs(slope), abs=1e-3)


def test_random_gradients_give_the_fisher_information() -> None:
    """E over labels of (x g)^2 for one gate is x^2 w^T (diag(p) - p p^T) w: many draws come close."""
    model = made(
        "agraph (float[b, 2] x) => (float[b, 3] logits)  { h = Relu (x)  logits = MatMul (h, w) }",
        {"w": np.array([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]], "f4")},
    )
    row = np.array([0.7, 1.2])
    count = 20_000
    feeds = [{"x": np.tile(row, (count, 1)).astype("f4")}]
    (found,) = sweep(model, feeds, GateFisher("h", -1, (0, 1)), objective=Objective.CURVATURE)
    weight = np.array([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]])
    z = row @ weight
    p = np.exp(z) / np.exp(z).sum()
    exact = row**2 * np.einsum("iv,vw,iw->i", weight, np.diag(p) - np.outer(p, p), weight)
    # The mean of `count` draws of a bounded variable: relative deviation below 5 / sqrt(count).
    np.testing.assert_allclose(found.array, exact, rtol=5 / np.sqrt(count))


def test_values_have_the_curvature_of_a_squared_error() -> None:
    """Without logits the Hessian of |y - y0|^2 / (2 RMS^2) with respect to a gate: x^2 |w|^2 / RMS^2."""
    model = made(
        "agraph (float[b, 2] x) => (float[b, 4, 1] y) <int64[3] s = {-1, 4, 1}>"
        " { h = Relu (x)  z = MatMul (h, w)  y = Reshape (z, s) }",
        {"w": np.array([[1.0, 2.0, -1.0, 0.5], [0.1, 0.0, 0.4, 0.3]], "f4")},
    )
    row, count = np.array([0.5, 1.5]), 20_000
    feeds = [{"x": np.tile(row, (count, 1)).astype("f4")}]
    (found,) = sweep(model, feeds, GateFisher("h", -1, (0, 1)), objective=Objective.CURVATURE)
    weight = np.array([[1.0, 2.0, -1.0, 0.5], [0.1, 0.0, 0.4, 0.3]])
    rms2 = np.square(row @ weight).mean()
    exact = row**2 * np.square(weight).sum(1) / rms2 / 4  # of one of four rows
    np.testing.assert_allclose(found.array, exact, rtol=10 / np.sqrt(count))


def test_padding_does_not_count() -> None:
    """A padded sample gives what the sample alone gives."""
    body = LM.replace("(int64[b, t] ids)", "(int64[b, t] ids, int64[b, t] attention_mask)")
    rng = np.random.default_rng(0)
    plain = language_model()
    weights = plain.graph.initializers.items()
    model = made(body, {n: v.const_value.numpy() for n, v in weights if v.const_value is not None})
    ids = rng.integers(0, VOCAB, (1, 4))
    padded = {
        "ids": np.concatenate([ids, np.zeros((1, 3), np.int64)], 1),
        "attention_mask": np.array([[1, 1, 1, 1, 0, 0, 0]]),
    }
    wanted = GateFisher("a", -1, tuple(range(INNER)))
    (alone,) = sweep(plain, [{"ids": ids}], wanted)
    (with_padding,) = sweep(model, [padded], wanted)
    assert with_padding.count == alone.count == 3  # the last token has no next one
    np.testing.assert_allclose(with_padding.array, alone.array, rtol=1e-5)


def test_the_same_seed_draws_the_same_gradients() -> None:
    model, feeds = language_model(), tokens()
    wanted = GateFisher("a", -1, tuple(range(INNER)))
    first, second = (
        sweep(model, feeds, wanted, objective=Objective.CURVATURE)[0].array for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_batch_statistics_take_no_gradient() -> None:
    """Torch cannot differentiate by them; the gain before them is differentiated through."""
    model = made(
        "agraph (float[b, 2, 3] x) => (float[b, 2, 3] y)"
        " { h = Relu (x)  y = BatchNormalization (h, gain, bias, mean, var) }",
        {
            "gain": np.array([2.0, 0.5], "f4"),
            "bias": np.zeros(2, "f4"),
            "mean": np.array([0.1, 0.2], "f4"),
            "var": np.array([1.0, 4.0], "f4"),
        },
    )
    x = np.abs(np.random.default_rng(5).normal(size=(400, 2, 3))).astype("f4")
    (found,) = sweep(model, [{"x": x}], GateFisher("h", 1, (0, 1)), objective=Objective.CURVATURE)
    slope = np.array([2.0, 0.5]) / np.sqrt(np.array([1.0, 4.0]) + 1e-5)
    after = (x - np.array([[[0.1], [0.2]]])) * slope[:, None]
    # The three positions are of one row [b, 2] of the output, and there are two rows a sample.
    exact = np.square(x * slope[:, None]).sum(2).mean(0) / np.square(after).mean() / 2
    # 1200 rows of a squared normal times a squared half normal: 5 sqrt(9 * 3 / 1200).
    np.testing.assert_allclose(found.array, exact, rtol=0.75)


# -- rows that share a label -------------------------------------------------------------------------------

IMAGES = """
agraph (float[b, 3, 6, 6] x) => (float[b, 5] logits)
{
    h = Conv <kernel_shape = [3, 3]> (x, w1)
    a = Relu (h)
    i = Conv <kernel_shape = [2, 2]> (a, w2)
    c = Tanh (i)
    p = ReduceMean <keepdims = 0> (c, over)
    logits = MatMul (p, head)
}
"""
SIZES = {"w1": (4, 3, 3, 3), "w2": (7, 4, 2, 2), "head": (7, 5)}


def classifier() -> tuple[ir.Model, dict[str, Array]]:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.7, size).astype("f4") for name, size in SIZES.items()}
    return made(IMAGES, {**weights, "over": np.array([2, 3])}), weights


def images(count: int, seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3, 6, 6)).astype("f4")
    return {"x": x, "labels": rng.integers(0, 5, count)}


def per_sample(weights: Mapping[str, Array], feeds: Mapping[str, Array]) -> tuple[Array, Array]:
    """For each image the gradient of its loss with respect to gates on ``a`` and ``p``: torch, float64."""
    w1, w2, head = (torch.from_numpy(weights[name]).double() for name in SIZES)
    found: tuple[list[Array], list[Array]] = ([], [])
    for x, label in zip(torch.from_numpy(feeds["x"]).double(), feeds["labels"], strict=True):
        gates = torch.ones(4, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
        m, n = (gate.requires_grad_() for gate in gates)
        a = torch.relu(torch.nn.functional.conv2d(x[None], w1)) * m[:, None, None]
        c = torch.tanh(torch.nn.functional.conv2d(a, w2))
        logits = (c.mean((2, 3)) * n) @ head
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
        for into, gradient in zip(found, torch.autograd.grad(loss, (m, n)), strict=True):
            into.append(gradient.numpy())
    return np.stack(found[0]), np.stack(found[1])


@pytest.mark.parametrize("stage_bytes", [1, 1 << 20])
def test_pixels_of_an_image_are_summed_before_they_are_squared(stage_bytes: int) -> None:
    """The Fisher information of a classifier's gates: squares of torch's per-sample gradients."""
    model, weights = classifier()
    feeds = [images(5), images(3, seed=2)]
    channels, features = tuple(range(4)), tuple(range(7))
    wanted = [kind("a", 1, channels) for kind in (GateMagnitude, GateFisher)]
    wanted += [kind("p", -1, features) for kind in (GateMagnitude, GateFisher)]
    found = sweep(model, feeds, *wanted, stage_bytes=stage_bytes)
    each = [per_sample(weights, sample) for sample in feeds]
    for gates, (magnitude, fisher) in zip(
        (np.concatenate(part) for part in zip(*each, strict=True)),
        (found[:2], found[2:]),
        strict=True,
    ):
        assert magnitude.count == fisher.count == 8
        squares, small = np.square(gates).mean(0), CLOSE * float(np.square(gates).mean())
        np.testing.assert_allclose(magnitude.array, np.abs(gates).mean(0), rtol=CLOSE, atol=small)
        np.testing.assert_allclose(fisher.array, squares, rtol=CLOSE, atol=small)


IN_QUICK = ("swin", "vit")
SLOW = ("mobilenet_v2", "resnet", "efficientnet", "convnext")


@pytest.mark.parametrize(
    "name", [*IN_QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_batch_gives_what_its_samples_give_alone(name: str) -> None:
    """Windows, patches and pixels are found to be of their image in all that is summed over.

    Of a model with a label for each image, a gate's Fisher information is the mean of its squared gradients.
    """
    model = zoo_ir.captured(name)
    (feeds,) = [f for f in zoo_ir.feeds(name) if len(next(iter(f.values()))) > 1][:1]
    logits = Executor(model).run(feeds)[model.graph.outputs[0].name or ""]
    count = len(logits)
    labels = np.arange(count) % logits.shape[1]
    axes = axis_analysis.analyse(model)
    wanted = dict.fromkeys(
        (part.activation.name or "", part.axis, tuple(c.index(part.activation, part.axis).tolist()))
        for c in find_candidates(axes)
        for part in c.readers
        if part.activation is not None
    )
    alone = [
        sweep(
            model,
            [{k: v[i : i + 1] for k, v in feeds.items()} | {"labels": labels[i : i + 1]}],
            *(GateMagnitude(*place) for place in wanted),
            stage_bytes=1 << 30,
        )
        for i in range(count)
    ]
    batch = sweep(
        model,
        [{**feeds, "labels": labels}],
        *(GateFisher(*place) for place in wanted),
        stage_bytes=1 << 30,
    )
    for fisher, *each in zip(batch, *alone, strict=True):
        expected = np.mean([np.square(one.array) for one in each], 0)
        np.testing.assert_allclose(fisher.array, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 1), np.int64), r"of shape \[2, 1\], rows of the output are \[2\]"),
        (np.array([0, 5]), "from 0 to 5, classes from 0 to 4"),
        (np.array([-1, 2]), "from -1 to 2, classes from 0 to 4"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Array, message: str) -> None:
    model, _ = classifier()
    with pytest.raises(PassError, match=message):
        sweep(model, [{**images(2), "labels": labels}], GateMagnitude("p", -1, tuple(range(7))))


def test_labels_of_no_classes_are_refused() -> None:
    model = made(
        "agraph (float[b, 2] x) => (float[b, 3] hidden)  { h = Relu (x)  hidden = MatMul (h, w) }",
        {"w": np.ones((2, 3), "f4")},
    )
    feeds = {"x": np.ones((1, 2), "f4"), "labels": np.zeros(1, np.int64)}
    with pytest.raises(PassError, match="no output of the model is logits of classes"):
        sweep(model, [feeds], GateMagnitude("h", -1, (0, 1)))


def test_no_labels_is_said() -> None:
    model = made(
        "agraph (float[b, 2] x) => (float[b, 3] y)  { h = Relu (x)  y = MatMul (h, w) }",
        {"w": np.ones((2, 3), "f4")},
    )
    with pytest.raises(PassError, match="nothing says what the model should have answered"):
        sweep(model, [{"x": np.ones((1, 2), "f4")}], GateMagnitude("h", -1, (0, 1)))
