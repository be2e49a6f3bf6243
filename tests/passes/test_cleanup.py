"""Cleanup: every rule on the smallest graph, bit-equal outputs, and models that others edited."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import PassError
from netlathe.execute import ort, samples
from netlathe.ir import normal, weights
from netlathe.passes.cleanup import Cleanup
from netlathe.passes.normalize import raise_operators
from netlathe.pipeline.pass_ import Context, Result
from tests import zoo
from tests.passes import raising
from tests.passes.folding import assert_sound, copy_of


def clean(model: ir.Model) -> Result:
    """Clean up: afterwards the model is sound, gives the same bits, and there is nothing left to do."""
    before = copy_of(model)
    result = Cleanup().run(model, Context())
    assert_sound(model)
    for seed in (0, 1):
        feeds = samples.synthesize(before, {}, seed)
        expected, actual = ort.run(before, feeds), ort.run(model, feeds)
        assert list(actual) == list(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(actual[name], array)
    assert not Cleanup().run(model, Context()).changed
    return result


Z, ONES = np.zeros(4, np.float32), np.ones(4, np.float32)
W = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype(np.float32)
X = "float[b,4,s,s] x"
# name -> (inputs, body, constants, operators afterwards)
RULES: dict[str, tuple[str, str, dict[str, Any], dict[str, int]]] = {
    "pads of a convolution": (
        X,
        "p = Pad(x, pads) y = Conv<pads = [1, 0, 0, 1]>(p, w)",
        {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "w": W},
        {"Conv": 1},
    ),
    "pads along given axes": (
        X,
        "p = Pad(x, pads, zero, axes) y = Conv(p, w)",
        {"pads": [1, 2, 0, 1], "zero": 0.0, "axes": [3, 2], "w": W},
        {"Conv": 1},
    ),
    "pads that others read": (
        X,
        "p = Pad(x, pads) c = Conv(p, w) d = Conv(p, v) y = Add(c, d)",
        {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "w": W, "v": W + 1},
        {"Conv": 2, "Add": 1},
    ),
    "pads of ones": (
        X,
        "p = Pad(x, pads, one) y = Conv(p, w)",
        {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "one": 1.0, "w": W},
        {"Pad": 1, "Conv": 1},
    ),
    "pads that reflect": (
        X,
        'p = Pad<mode = "reflect">(x, pads) y = Conv(p, w)',
        {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "w": W},
        {"Pad": 1, "Conv": 1},
    ),
    "pads that crop": (
        X,
        "p = Pad(x, pads) y = Conv(p, w)",
        {"pads": [0, 0, -1, 1, 0, 0, 1, 1], "w": W},
        {"Pad": 1, "Conv": 1},
    ),
    "pads of channels": (
        "float[b,3,s,s] x",
        "p = Pad(x, pads) y = Conv(p, w)",
        {"pads": [0, 1, 1, 1, 0, 0, 1, 1], "w": W},
        {"Pad": 1, "Conv": 1},
    ),
    "zero bias": (X, "y = Conv(x, w, z)", {"w": W, "z": np.zeros(5, np.float32)}, {"Conv": 1}),
    "zero bias of a norm": (
        "float[b,s,4] x",
        "y = LayerNormalization(x, g, z)",
        {"g": ONES + 1, "z": Z},
        {"LayerNormalization": 1},
    ),
    "zeros added": ("float[b,s,4] x", "a = Relu(x) y = Add(a, z)", {"z": Z}, {"Relu": 1}),
    "zeros subtracted": ("float[b,s,4] x", "a = Relu(x) y = Sub(a, z)", {"z": Z}, {"Relu": 1}),
    "subtracted from zeros": ("float[b,s,4] x", "y = Sub(z, x)", {"z": Z}, {"Sub": 1}),
    "multiplied by ones": ("float[b,s,4] x", "a = Relu(x) y = Mul(o, a)", {"o": ONES}, {"Relu": 1}),
    "zeros that add a dim": (
        "float[s,4] x",
        "y = Add(x, z)",
        {"z": np.zeros((2, 1, 4), np.float32)},
        {"Add": 1},
    ),
    "relu of relu": (X, "a = Relu(x) y = Relu(a)", {}, {"Relu": 1}),
    "relu of sigmoid": (X, "a = Sigmoid(x) y = Relu(a)", {}, {"Sigmoid": 1}),
    "relu of tanh": (X, "a = Tanh(x) y = Relu(a)", {}, {"Tanh": 1, "Relu": 1}),
    "rounding twice": (X, "a = Floor(x) c = Ceil(a) y = Round(c)", {}, {"Floor": 1}),
    "negated twice": (X, "a = Neg(x) c = Neg(a) y = Exp(c)", {}, {"Exp": 1}),
    "squeezed back": (
        "float[b,4,s,5] x",
        "a = Unsqueeze(x, axis) c = Exp(x) d = Reshape(a, like) y = Add(c, d)",
        {"axis": [1], "like": [0, 4, -1, 5]},
        {"Exp": 1, "Add": 1},
    ),
    "unsqueezed twice": (
        "float[b,s] x",
        "a = Unsqueeze(x, one) y = Unsqueeze(a, three)",
        {"one": [1], "three": [3]},
        {"Unsqueeze": 1},
    ),
    "squeezed twice": (
        "float[1,b,1,s] x",
        "a = Squeeze(x, zero) y = Squeeze(a, one)",
        {"zero": [0], "one": [1]},
        {"Squeeze": 1},
    ),
    "unsqueezed and split": (
        "float[b,s,8] x",
        "a = Unsqueeze(x, one) y = Reshape(a, shape)",
        {"one": [1], "shape": [0, 0, 0, 2, 4]},
        {"Reshape": 1},
    ),
    "a view that others read": (
        "float[b,s,8] x",
        "a = Unsqueeze(x, one) c = Reshape(a, shape) d = Reshape(c, back) y = Add(a, d)",
        {"one": [1], "shape": [0, 0, 0, 2, 4], "back": [0, 1, 0, 8]},
        {"Unsqueeze": 1, "Add": 1},
    ),
    "expanded for a sum": (
        "float[b,s,4] x, float[s,4] z",
        "n = Shape(x) e = Expand(z, n) y = Add(e, x)",
        {},
        {"Add": 1},
    ),
    "expanded beyond the sum": (
        "float[s,4] x, float[4] z",
        "e = Expand(z, shape) y = Add(e, x)",
        {"shape": [3, 1, 4]},
        {"Expand": 1, "Add": 1},
    ),
    "split and joined": (
        "float[b,s,8] x",
        "p, q = Split<axis = 2>(x, sizes) c = Concat<axis = 2>(p, q) y = Exp(c)",
        {"sizes": [3, 5]},
        {"Exp": 1},
    ),
    "split and joined in another order": (
        "float[b,s,8] x",
        "p, q = Split<axis = 2>(x, sizes) c = Concat<axis = 2>(q, p) y = Exp(c)",
        {"sizes": [3, 5]},
        {"Split": 1, "Concat": 1, "Exp": 1},
    ),
    "all gathered": (
        "float[b,3,s] x",
        "g = Gather<axis = 1>(x, index) y = Exp(g)",
        {"index": [0, 1, 2]},
        {"Exp": 1},
    ),
    "all gathered in another order": (
        "float[b,3,s] x",
        "g = Gather<axis = 1>(x, index) y = Exp(g)",
        {"index": [0, 2, 1]},
        {"Gather": 1, "Exp": 1},
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    inputs, body, constants, expected = RULES[name]
    model = raising.graph(inputs, body, **constants)
    before = raising.ops(model)
    result = clean(model)
    assert raising.ops(model) == expected
    assert all(None not in node.inputs for node in model.graph)
    if before != expected:
        assert result.changed and [e for e in result.entries if e.status == "applied"]


# -- constants ----------------------------------------------------------------------------------------


def test_equal_constants_are_one_and_parameters_are_not() -> None:
    scale = np.linspace(1, 2, 4, dtype=np.float32)
    model = raising.graph(
        "float[b,s,4] x",
        "n = RMSNormalization(x, g) m = RMSNormalization(n, h) t = Mul(m, half) u = Add(t, also)"
        " p = Gather<axis = 2>(u, first) q = Gather<axis = 2>(x, second) y = Add(p, q)",
        g=scale,
        h=scale.copy(),
        half=0.5,
        also=0.5,
        first=[1, 0],
        second=[1, 0],
    )
    result = clean(model)
    assert set(model.graph.initializers) == {"g", "h", "half", "first"}
    (entry,) = (e for e in result.entries if e.candidate == "equal constants")
    assert entry.detail["merged"] == {"also": "half", "second": "first"}


def test_zero_points_and_scales_of_quantized_weights_are_numbers_too() -> None:
    """The int8 data of two weights stay two, even if equal: they are parameters."""
    data = np.ones((9, 9), np.int8)
    model = raising.graph(
        "float[b,9] x",
        "w = DequantizeLinear(a, s) v = DequantizeLinear(c, t) m = MatMul(x, w) r = Relu(m)"
        " y = MatMul(r, v)",
        a=data,
        c=data.copy(),
        s=np.float32(0.5) * np.ones((), np.float32),
        t=np.float32(0.5) * np.ones((), np.float32),
    )
    clean(model)
    assert set(model.graph.initializers) == {"a", "c", "s"}


# -- the whole --------------------------------------------------------------------------------------


def test_a_clean_model_is_left_alone_and_says_so() -> None:
    model = raising.graph("float[b,4] x", "y = Relu(x)")
    text = ir.to_proto(model).SerializeToString()
    result = clean(model)
    (entry,) = result.entries
    assert not result.changed and entry.status == "skipped"
    assert entry.reason == "all 1 nodes and 0 constants are needed"
    assert ir.to_proto(model).SerializeToString() == text


def test_an_input_that_nothing_reads_stays() -> None:
    model = raising.graph("float[b,4] x, float[b,4] z", "y = Relu(x)")
    result = clean(model)
    assert [v.name for v in model.graph.inputs] == ["x", "z"]
    assert ("z", "refused") in {(e.candidate, e.status) for e in result.entries}


def test_what_somebody_else_left_behind_is_gone() -> None:
    """Dead nodes and weights, an Identity, repeated nodes, a norm written out, stale types."""
    model = raising.graph(
        "float[b,s,4] x",
        "n = RMSNormalization(x, g) y = MatMul(n, w)",
        g=np.linspace(1, 2, 4, dtype=np.float32),
        w=np.eye(4, 3, dtype=np.float32),
    )
    graph = model.graph
    (norm, product) = graph
    n = norm.outputs[0]
    dead = ir.node("Exp", [n])
    unread = ir.Value(name="unread", const_value=ir.tensor(np.zeros(1000, np.float32)))
    graph.register_initializer(unread)
    same = ir.node("Identity", [n])
    twice = [ir.node("Neg", [same.outputs[0]]), ir.node("Neg", [n])]
    total = ir.node("Add", [v.outputs[0] for v in twice])
    undone = ir.node("Sub", [n, total.outputs[0]])
    graph.insert_after(norm, [dead, same, *twice, total, undone])
    product.replace_input_with(0, undone.outputs[0])
    n.shape = ir.Shape([1, 2, 3])
    before = copy_of(model)
    normal.unique_names(before.graph)
    result = Cleanup().run(model, Context())
    assert_sound(model)
    assert raising.ops(model) == {"RMSNormalization": 1, "Neg": 1, "Add": 1, "Sub": 1, "MatMul": 1}
    assert set(graph.initializers) == {"g", "w"}
    assert n.shape == ["b", "s", 4]
    reasons = {e.candidate: e.reason for e in result.entries}
    assert reasons["dead code"] == "1 nodes and 1 constants that no output needs are gone"
    assert "8 nodes became 5" in reasons["(the model)"]
    assert result.statistics == {"nodes_removed": 3.0, "bytes_removed": 4000.0}
    feeds = raising.feeds(model, raising.SIZES[0], 0)
    np.testing.assert_array_equal(ort.run(model, feeds)["y"], ort.run(before, feeds)["y"])


def test_operators_are_raised_again() -> None:
    body = "q = Mul(x, x) m = ReduceMean(q, axes) a = Add(m, eps) r = Sqrt(a) n = Div(x, r) y = Mul(n, g)"
    model = raising.graph(
        "float[b,s,8] x", body, axes=[-1], eps=1e-5, g=np.linspace(1, 2, 8, dtype=np.float32)
    )
    result = Cleanup().run(model, Context())
    assert raising.ops(model) == {"RMSNormalization": 1}
    assert any("RMSNormalization" in e.reason for e in result.entries if e.status == "applied")


def test_a_model_at_another_opset_is_refused() -> None:
    model = raising.graph("float[b,4] x", "y = Relu(x)")
    model.graph.opset_imports[""] = 17
    with pytest.raises(PassError, match="opset 17, not 25"):
        Cleanup().run(model, Context())


@pytest.mark.parametrize("name", ["mobilenet_v2", "mixtral", "t5", "swin"])
def test_models_of_the_zoo(name: str) -> None:
    model = zoo.exported(name)
    normal.normalize(model)
    raise_operators(model)
    normal.normalize(model)
    before = raising.ops(model)
    size = weights.num_bytes(model)
    result = clean(model)
    assert result.changed and weights.num_bytes(model) < size
    assert raising.ops(model).total() < before.total()
    if name == "mobilenet_v2":
        assert before["Pad"] == 18 and raising.ops(model)["Pad"] == 0
