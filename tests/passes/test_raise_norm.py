"""Norms written out become RMSNormalization, LayerNormalization, Instance- and GroupNormalization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.passes.raising import graph, node, ops, raised, refusals

X = "float[b,s,8] x"
W = np.linspace(0.5, 1.5, 8, dtype=np.float32)
B = np.linspace(-0.2, 0.3, 8, dtype=np.float32)
SHARED: dict[str, Any] = dict(eps=1e-5, two=2.0, half=0.5, minus_half=-0.5, one=1.0, axes=[-1])

RMS = {
    "pow, reciprocal": "q = Pow(x, two) m = ReduceMean(q, axes) a = Add(m, eps) r = Sqrt(a)"
    " i = Reciprocal(r) n = Mul(x, i)",
    "mul, divided": "q = Mul(x, x) m = ReduceMean(q, axes) a = Add(eps, m) r = Sqrt(a) n = Div(x, r)",
    "one over root": "q = Mul(x, x) m = ReduceMean(q, axes) a = Add(m, eps) r = Sqrt(a)"
    " i = Div(one, r) n = Mul(i, x)",
    "powers": "q = Pow(x, two) m = ReduceMean(q, axes) a = Add(m, eps) i = Pow(a, minus_half)"
    " n = Mul(x, i)",
    "root as a power": "q = Pow(x, two) m = ReduceMean(q, axes) a = Add(m, eps) r = Pow(a, half)"
    " n = Div(x, r)",
}


@pytest.mark.parametrize("body", RMS.values(), ids=RMS.keys())
def test_rms_norm(body: str) -> None:
    after, entries = raised(graph(X, f"{body} y = Mul(w, n)", w=W, **SHARED))
    norm = node(after, "RMSNormalization")
    assert ops(after) == {"RMSNormalization": 1}
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    assert norm.attributes["axis"].as_int() % 3 == 2
    assert norm.inputs[1] is not None and norm.inputs[1].name == "w"
    assert [e.status for e in entries] == ["applied"]


def test_rms_norm_without_scale_gets_ones() -> None:
    after, _ = raised(graph(X, RMS["pow, reciprocal"] + " y = Neg(n)", **SHARED))
    assert ops(after) == {"RMSNormalization": 1, "Neg": 1}
    scale = node(after, "RMSNormalization").inputs[1]
    assert scale is not None and scale.const_value is not None
    np.testing.assert_array_equal(scale.const_value.numpy(), np.ones(8, np.float32))


def test_rms_norm_with_a_computed_scale() -> None:
    """Gemma's (1 + w), with w not constant: the sum stays, and is the scale."""
    body = RMS["pow, reciprocal"] + " g = Add(w, one) y = Mul(n, g)"
    after, _ = raised(graph(f"{X}, float[8] w", body, **SHARED))
    assert ops(after) == {"RMSNormalization": 1, "Add": 1}


def test_rms_norm_with_the_scale_inside() -> None:
    body = (
        "q = Pow(x, two) m = ReduceMean(q, axes) a = Add(m, eps) r = Sqrt(a) i = Reciprocal(r)"
        " g = Mul(i, w) y = Mul(x, g)"
    )
    after, _ = raised(graph(X, body, w=W, **SHARED))
    assert ops(after) == {"RMSNormalization": 1}


def test_rms_norm_over_two_axes_with_a_two_dim_scale() -> None:
    body = (
        "q = Mul(x, x) m = ReduceMean(q, axes) a = Add(m, eps) r = Sqrt(a) n = Div(x, r)"
        " y = Mul(n, w)"
    )
    w = np.linspace(0.5, 2, 32, dtype=np.float32).reshape(4, 8)
    constants: dict[str, Any] = SHARED | {"axes": [-2, -1]}
    after, _ = raised(graph("float[b,4,8] x", body, w=w, **constants))
    assert node(after, "RMSNormalization").attributes["axis"].as_int() == 1


def test_rms_norm_in_float32_inside_a_half_model() -> None:
    """LLaMA: cast up, normalize, cast down, scale. The casts become stash_type."""
    body = f"h = Cast<to=1>(z) {RMS['pow, reciprocal']} d = Cast<to=10>(n) y = Mul(w, d)"
    body = body.replace("(x", "(h").replace("x,", "h,")
    model = graph("float16[b,s,8] z", body, dtype="float16", w=W.astype(np.float16), **SHARED)
    after, entries = raised(model, tolerance=2**-8)
    assert ops(after) == {"RMSNormalization": 1}
    assert node(after, "RMSNormalization").attributes["stash_type"].as_int() == 1
    assert entries[0].detail["error"] < 1e-6  # judged in float32


def test_rms_norm_scaled_before_the_cast_down_keeps_the_casts() -> None:
    """Gemma: the scale is applied in float32, so the norm is one of float32 values."""
    body = f"h = Cast<to=1>(z) {RMS['pow, reciprocal']} g = Mul(n, w) y = Cast<to=10>(g)"
    body = body.replace("(x", "(h").replace("x,", "h,")
    after, _ = raised(graph("float16[b,s,8] z", body, dtype="float16", w=W, **SHARED), 2**-8)
    assert ops(after) == {"RMSNormalization": 1, "Cast": 2}


LAYER = (
    "u = ReduceMean(x, axes) c = Sub(x, u) q = Pow(c, two) m = ReduceMean(q, axes)"
    " a = Add(m, eps) r = Sqrt(a) n = Div(c, r)"
)


@pytest.mark.parametrize(
    ("tail", "inputs"),
    [("g = Mul(n, w) y = Add(g, c0)", 3), ("y = Mul(w, n)", 2), ("y = Neg(n)", 2)],
)
def test_layer_norm(tail: str, inputs: int) -> None:
    after, _ = raised(graph(X, f"{LAYER} {tail}", w=W, c0=B, **SHARED))
    norm = node(after, "LayerNormalization")
    assert set(ops(after)) <= {"LayerNormalization", "Neg"}
    assert len([v for v in norm.inputs if v is not None]) == inputs
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-5)


def test_layer_norm_with_two_subtractions() -> None:
    """TorchScript's spelling before common subexpressions are merged."""
    body = (
        "u = ReduceMean(x, axes) c = Sub(x, u) k = Sub(x, u) q = Mul(k, k) m = ReduceMean(q, axes)"
        " a = Add(m, eps) r = Sqrt(a) n = Div(c, r) g = Mul(n, w) y = Add(g, c0)"
    )
    after, _ = raised(graph(X, body, w=W, c0=B, **SHARED))
    assert ops(after) == {"LayerNormalization": 1}


def test_instance_norm() -> None:
    body = f"{LAYER} g = Mul(n, w) y = Add(g, c0)"
    w, c0 = (v.reshape(8, 1, 1) for v in (W, B))
    constants: dict[str, Any] = SHARED | {"axes": [2, 3]}
    after, _ = raised(graph("float[b,8,5,6] x", body, w=w, c0=c0, **constants))
    assert "InstanceNormalization" in ops(after)
    assert "LayerNormalization" not in ops(after)


def test_group_norm() -> None:
    body = (
        "v = Reshape(x, grouped) i = InstanceNormalization<epsilon: float = 0.00001>(v, ones, zeros)"
        " o = Reshape(i, back) g = Mul(o, w) y = Add(g, c0)"
    )
    w, c0 = (v.reshape(8, 1, 1) for v in (W, B))
    model = graph(
        "float[b,8,5,6] x",
        body,
        grouped=[0, 4, -1],
        back=[-1, 8, 5, 6],
        ones=np.ones(4, np.float32),
        zeros=np.zeros(4, np.float32),
        w=w,
        c0=c0,
    )
    after, _ = raised(model)
    assert node(after, "GroupNormalization").attributes["num_groups"].as_int() == 4
    assert "InstanceNormalization" not in ops(after)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "q = Pow(x, two) m = ReduceMean(q, axes) r = Sqrt(m) a = Add(r, eps) n = Div(x, a)",
            "epsilon is added to the root, not under it",
        ),
        (
            "q = Pow(x, two) m = ReduceMean(q, first) a = Add(m, eps) r = Sqrt(a) n = Div(x, r)",
            "mean over axes [1] of 3; RMSNormalization takes the last axes",
        ),
        (
            "z = Neg(x) q = Pow(z, two) m = ReduceMean(q, axes) a = Add(m, eps) r = Sqrt(a)"
            " n = Div(x, r)",
            "again as c",
        ),
        (
            "q = Pow(x, two) m = ReduceMean<keepdims=0>(q, first) a = Add(m, eps) r = Sqrt(a)"
            " u = Unsqueeze(r, first) n = Div(x, u)",
            "expected",
        ),
        (
            "u = ReduceMean(x, first) c = Sub(x, u) q = Pow(c, two) m = ReduceMean(q, axes)"
            " a = Add(m, eps) r = Sqrt(a) n = Div(c, r)",
            "the mean is over other axes than the variance's [2]",
        ),
        ("q = Pow(x, two) m = ReduceMean(q, axes) a = Add(m, eps) n = Div(x, a)", "expected"),
    ],
)
def test_near_misses(body: str, reason: str) -> None:
    model = graph(X, f"{body} y = Mul(n, w)", w=W, first=[1], **SHARED)
    after, entries = raised(model)
    assert reason in refusals(entries)
    assert ops(after) == ops(model)


def test_a_scale_of_another_axis_is_left_outside() -> None:
    """A factor per position is no scale of the norm."""
    model = graph(f"{X}, float[b,s,1] f", RMS["pow, reciprocal"] + " y = Mul(n, f)", **SHARED)
    after, _ = raised(model)
    assert ops(after) == {"RMSNormalization": 1, "Mul": 1}


def test_statistics_that_others_read_stay() -> None:
    body = RMS["pow, reciprocal"] + " g = Mul(n, w) y = Add(g, m)"
    after, _ = raised(graph(X, body, w=W, **SHARED))
    assert ops(after)["RMSNormalization"] == 1 and ops(after)["ReduceMean"] == 1
    assert "Sqrt" not in ops(after)
