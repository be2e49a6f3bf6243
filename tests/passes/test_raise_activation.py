"""Formulas written out element by element become the ops they are, and only those."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from netlathe.passes.normalize import raise_operators
from tests.passes.raising import graph, node, ops, raised, refusals

X = "float[b,s,8] x"
ROOT2 = math.sqrt(2)

GELU_ERF = {
    "torch": "h = Mul(x, half) d = Div(x, root2) e = Erf(d) p = Add(e, one) y = Mul(h, p)",
    "half last": "d = Div(x, root2) e = Erf(d) p = Add(one, e) q = Mul(p, x) y = Mul(q, half)",
    "half with erf": "d = Mul(x, inv2) e = Erf(d) p = Add(e, one) q = Mul(half, p) y = Mul(x, q)",
}
GELU_TANH = {
    "transformers": """h = Mul(x, half) c = Pow(x, three) m = Mul(c, k) a = Add(x, m)
        u = Mul(a, r) t = Tanh(u) p = Add(t, one) y = Mul(h, p)""",
    "products": """xx = Mul(x, x) c = Mul(xx, x) m = Mul(k, c) a = Add(m, x)
        u = Mul(r, a) t = Tanh(u) p = Add(one, t) q = Mul(x, p) y = Mul(q, half)""",
    "factored": """xx = Mul(x, x) m = Mul(xx, k) i = Add(m, one) xr = Mul(x, r) u = Mul(xr, i)
        t = Tanh(u) p = Add(t, one) q = Mul(half, p) y = Mul(x, q)""",
}
NUMBERS: dict[str, Any] = dict(
    half=0.5,
    one=1.0,
    two=2.0,
    three=3.0,
    six=6.0,
    zero=0.0,
    root2=ROOT2,
    inv2=1 / ROOT2,
    k=0.044715,
    r=math.sqrt(2 / math.pi),
    sixth=1 / 6,
)


@pytest.mark.parametrize("body", GELU_ERF.values(), ids=GELU_ERF.keys())
def test_gelu(body: str) -> None:
    after, entries = raised(graph(X, body, **NUMBERS))
    assert ops(after) == {"Gelu": 1}
    assert node(after, "Gelu").attributes["approximate"].as_string() == "none"
    assert [e.status for e in entries] == ["applied"]
    assert entries[0].candidate == "y" and entries[0].detail["error"] < 1e-5


@pytest.mark.parametrize("body", GELU_TANH.values(), ids=GELU_TANH.keys())
def test_tanh_gelu(body: str) -> None:
    after, _ = raised(graph(X, body, **NUMBERS))
    assert ops(after) == {"Gelu": 1}
    assert node(after, "Gelu").attributes["approximate"].as_string() == "tanh"


@pytest.mark.parametrize(
    ("body", "op_type", "attributes"),
    [
        ("g = Sigmoid(x) y = Mul(x, g)", "Swish", {"alpha": 1.0}),
        ("a = Mul(x, alpha) g = Sigmoid(a) y = Mul(g, x)", "Swish", {"alpha": 1.702}),
        ("n = Neg(x) e = Exp(n) p = Add(one, e) y = Div(x, p)", "Swish", {"alpha": 1.0}),
        ("e = Exp(x) p = Add(e, one) y = Log(p)", "Softplus", {}),
        ("e = Exp(x) p = Add(e, one) l = Log(p) t = Tanh(l) y = Mul(x, t)", "Mish", {}),
        ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)", "HardSwish", {}),
        (
            "a = Add(x, three) c = Clip(a, zero, six) m = Mul(c, sixth) y = Mul(x, m)",
            "HardSwish",
            {},
        ),
        (
            "h = HardSigmoid<alpha: float = 0.16666667, beta: float = 0.5>(x) y = Mul(h, x)",
            "HardSwish",
            {},
        ),
        (
            "a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)",
            "HardSigmoid",
            {"alpha": 1 / 6, "beta": 0.5},
        ),
        (
            "m = Mul(x, k) a = Add(m, half) y = Clip(a, zero, one)",
            "HardSigmoid",
            {"alpha": 0.044715, "beta": 0.5},
        ),
    ],
)
def test_activation(body: str, op_type: str, attributes: dict[str, float]) -> None:
    after, _ = raised(graph(X, body, alpha=1.702, **NUMBERS))
    assert ops(after) == {op_type: 1}
    for name, value in attributes.items():
        assert node(after, op_type).attributes[name].as_float() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("d = Div(x, two) e = Erf(d) p = Add(e, one) h = Mul(x, half) y = Mul(h, p)", "1.41421"),
        ("d = Div(x, root2) e = Erf(d) p = Add(e, half) h = Mul(x, half) y = Mul(h, p)", "constant 1"),
        ("d = Div(x, root2) e = Erf(d) p = Add(e, one) h = Mul(x, two) y = Mul(h, p)", "constant 0.5"),
        ("c = Pow(x, two) m = Mul(c, k) a = Add(x, m) u = Mul(a, r) t = Tanh(u)"
         " p = Add(t, one) h = Mul(x, half) y = Mul(h, p)", "expected"),
        ("c = Pow(x, three) m = Mul(c, k) a = Add(x, m) u = Mul(a, half) t = Tanh(u)"
         " p = Add(t, one) h = Mul(x, half) y = Mul(h, p)", "0.797885"),
        ("a = Add(x, one) g = Sigmoid(a) y = Mul(x, g)", "the input x again"),
        ("a = Add(x, two) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)", "constant 3"),
        ("e = Exp(x) p = Add(e, two) y = Log(p)", "constant 1"),
    ],
)  # fmt: skip
def test_near_misses(body: str, reason: str) -> None:
    model = graph(X, body, **NUMBERS)
    after, entries = raised(model)
    assert reason in refusals(entries)
    assert ops(after) == ops(model)


def test_gates_are_no_candidates() -> None:
    model = graph(
        "float[b,8,s] x",
        "m = ReduceMean(x, axes) g = Sigmoid(m) z = Mul(x, g) a, c = Split<axis=1, num_outputs=2>(z)"
        " i = Sigmoid(c) y = Mul(a, i)",
        axes=[2],
    )
    after, entries = raised(model)
    assert entries == [] and ops(after) == ops(model)


def test_a_dim_that_strides_make_is_tried_where_something_is_left_of_it() -> None:
    """As in a text recognizer, whose height a stem, stages and a pool divide by 48."""
    weight = np.ones((4, 3, 48), np.float32) / 12
    body = "c = Conv<strides=[48], kernel_shape=[48]>(x, w) g = Sigmoid(c) y = Mul(c, g)"
    (entry,) = raise_operators(graph("float[b,3,s] x", body, w=weight))
    assert entry.status == "applied", entry.reason


@pytest.mark.parametrize("dims", ["b,32,320,320", "1,32,512,640"])
def test_a_large_value_is_tried_as_large_as_it_is(dims: str) -> None:
    (entry,) = raise_operators(graph(f"float[{dims}] x", "g = Sigmoid(x) y = Mul(x, g)"))
    assert entry.status == "applied", entry.reason


def test_what_would_have_to_be_too_large_is_not_tried() -> None:
    weight = np.ones((4, 3, 48), np.float32) / 12
    body = "c = Conv<strides=[48], kernel_shape=[48]>(x, w) g = Sigmoid(c) y = Mul(c, g)"
    (entry,) = raise_operators(graph("float[4000000,3,s] x", body, w=weight))
    assert entry.status == "refused" and "nothing is left at the sizes" in entry.reason


def test_an_inner_value_that_others_read_stays() -> None:
    model = graph(X, "g = Sigmoid(x) w = Mul(x, g) y = Add(w, g)")
    after, _ = raised(model)
    assert ops(after) == {"Swish": 1, "Sigmoid": 1, "Add": 1}


def test_half_precision_is_judged_in_float32() -> None:
    model = graph("float16[b,s,8] x", "g = Sigmoid(x) y = Mul(x, g)", dtype="float16")
    after, entries = raised(model, tolerance=2**-8)  # the outputs themselves are rounded to 11 bits
    assert ops(after) == {"Swish": 1}
    assert entries[0].detail["error"] < 1e-6
