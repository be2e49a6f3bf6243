"""An overlay computes what the model and its variants compute, and what they share once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.analysis.overlay import overlay
from netlathe.execute import ort
from netlathe.ir import types, verify
from tests.ir.onnx_text import matrix, model

BODY = "a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) y = Add(x, c)"
CHOICE = """a = MatMul(x, w) q = ReduceSum<keepdims=0>(a) k = Greater(q, z)
    y = If(k) <then_branch = t () => (float[n,4] o) { o = Neg(a) },
                else_branch = e () => (float[n,4] p) { p = Abs(a) }>"""


def made(body: str = BODY, **weights: np.ndarray) -> ir.Model:
    held = {"w": matrix(4, 4), "v": matrix(4, 4, seed=1), **weights}
    found = model("float[n,4] x", "float[n,4] y", body, **held)
    types.annotate(found)
    return found


def rewired(base: ir.Model, op_type: str, index: int, name: str) -> ir.Model:
    """A copy in which the first node of a type reads another value."""
    copy = base.clone()
    values = {v.name: v for v in copy.graph.inputs}
    values |= {v.name: v for node in copy.graph for v in node.outputs}
    node = next(node for node in copy.graph if node.op_type == op_type)
    node.replace_input_with(index, values[name])
    return copy


def run_all(combined: ir.Model, names: list[str]) -> list[np.ndarray]:
    values = {v.name: v for node in combined.graph for v in node.outputs}
    combined.graph.outputs.clear()
    combined.graph.outputs.extend(values[name] for name in names)
    types.annotate(combined)
    verify.check(combined)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    found = ort.run(combined, {"x": x})
    return [found[name] for name in names]


def alone(variant: ir.Model) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    return ort.run(variant, {"x": x})["y"]


def test_every_variant_gives_what_it_gives_alone_and_shares_what_is_before_it() -> None:
    base = made()
    variants = [rewired(base, "Relu", 0, "x"), rewired(base, "Add", 1, "b")]
    expected = [alone(v) for v in (base, *variants)]
    combined, names = overlay(base, variants)
    # Relu, MatMul and Add of the first; Add of the second.
    assert sum(1 for _ in combined.graph) == 4 + 3 + 1
    assert list(combined.graph.initializers) == ["w", "v"]
    assert [v.name for v in combined.graph.outputs] == ["y"]
    for wanted, found in zip(
        expected, run_all(combined, ["y", *(n["y"] for n in names)]), strict=True
    ):
        assert np.array_equal(wanted, found)
    assert sum(1 for _ in base.graph) == 4


def test_a_variant_that_is_the_model_adds_nothing() -> None:
    base = made()
    combined, (names,) = overlay(base, [base.clone()])
    assert sum(1 for _ in combined.graph) == 4 and names["y"] == "y" and names["x"] == "x"


def test_a_weight_that_differs_is_another_weight() -> None:
    base, other = made(), made(w=matrix(4, 4, seed=9))
    expected = [alone(base), alone(other)]
    combined, (names,) = overlay(base, [other])
    for wanted, found in zip(expected, run_all(combined, ["y", names["y"]]), strict=True):
        assert np.array_equal(wanted, found)


def test_bodies_of_control_flow_read_the_variant_around_them() -> None:
    base = made(CHOICE, z=np.array(0, np.float32))
    variant = base.clone()
    product = next(node for node in variant.graph if node.op_type == "MatMul")
    product.replace_input_with(1, variant.graph.initializers["v"])
    expected = [alone(base), alone(variant)]
    combined, (names,) = overlay(base, [variant])
    for wanted, found in zip(expected, run_all(combined, ["y", names["y"]]), strict=True):
        assert np.array_equal(wanted, found)
