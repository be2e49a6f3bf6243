"""The edits keep names, interface and provenance, and leave nothing dead."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import edit, provenance
from tests.ir.onnx_text import matrix, model, node, ops

X = "float[b,3] x"


def test_constants_get_free_names() -> None:
    made = model(X, "float y", "y = Add(x, w)", w=matrix(3))
    names = [edit.constant(made.graph, np.ones(2, np.float32), "w").name for _ in range(2)]
    assert names == ["w_1", "w_2"]
    scalar = edit.constant(made.graph, np.array(1.0, np.float32), "y")
    assert scalar.name == "y_1" and scalar.shape == []


def test_const_array_is_none_for_what_a_caller_can_override() -> None:
    made = model(f"{X}, float[3] w", "float y", "u = Add(x, w) y = Mul(u, c)", w=matrix(3), c=2.0)
    assert edit.const_array(made.graph.initializers["w"]) is None
    assert edit.const_array(made.graph.initializers["c"]) == 2.0
    assert edit.const_array(made.graph.inputs[0]) is None and edit.const_array(None) is None


def test_replace_keeps_name_provenance_and_readers() -> None:
    made = model(X, "float y", "h = Relu(x) y = Exp(h)")
    old = node(made, "Relu")
    provenance.mark(old, module="layers.0", created_by="frontend")
    new = ir.node("Abs", [made.graph.inputs[0]])
    edit.replace(old, [new], {old.outputs[0]: new.outputs[0]}, "test")
    assert ops(made) == {"Abs": 1, "Exp": 1}
    assert new.outputs[0].name == "h" and node(made, "Exp").inputs[0] is new.outputs[0]
    assert provenance.module_path(new) == "layers.0"
    assert new.metadata_props[provenance.CREATED_BY] == "test"


def test_replacing_an_output_keeps_its_name() -> None:
    made = model(X, "float y", "y = Relu(x)")
    old = node(made, "Relu")
    new = ir.node("Abs", [made.graph.inputs[0]])
    edit.replace(old, [new], {old.outputs[0]: new.outputs[0]}, "test")
    assert made.graph.outputs[0] is new.outputs[0] and new.outputs[0].name == "y"


def test_an_output_keeps_the_shape_that_its_new_maker_does_not_know() -> None:
    made = model(X, "float y", "y = Relu(x)")
    made.graph.outputs[0].shape = ir.Shape(["n", 3])
    new = ir.node("Abs", [made.graph.inputs[0]])
    edit.replace(node(made, "Relu"), [new], {made.graph.outputs[0]: new.outputs[0]}, "test")
    (output,) = made.graph.outputs
    assert output is new.outputs[0] and output.shape == ir.Shape(["n", 3])
    assert output.dtype == ir.DataType.FLOAT


def test_an_output_that_becomes_an_input_gets_an_identity() -> None:
    made = model(X, "float y", "y = Relu(x)")
    edit.replace(node(made, "Relu"), [], {made.graph.outputs[0]: made.graph.inputs[0]}, "test")
    assert ops(made) == {"Identity": 1} and made.graph.outputs[0].name == "y"
    assert made.graph.inputs[0].name == "x"


def test_a_subgraph_output_that_becomes_an_outer_value_gets_an_identity() -> None:
    body = """h = Relu(x)
        y = If (k) < then_branch = t () => (float u) { u = Neg(h) },
                     else_branch = e () => (float v) { v = Exp(h) } >"""
    made = model(f"{X}, bool k", "float y", body)
    inner = node(made, "If").attributes["then_branch"].as_graph()
    outer = node(made, "Relu").outputs[0]
    edit.replace(inner[0], [], {inner.outputs[0]: outer}, "test")
    assert ops(inner) == {"Identity": 1} and made.graph.outputs[0].name == "y"


def test_dead_code_goes_with_what_only_it_read() -> None:
    body = "a = Mul(x, w) b = Exp(a) c = Neg(x) y = Relu(x)"
    made = model(X, "float y", body, w=matrix(3))
    assert edit.remove_dead(made.graph) == 3
    assert ops(made) == {"Relu": 1} and not made.graph.initializers
    assert [v.name for v in made.graph.inputs] == ["x"]


def test_what_a_subgraph_captures_is_alive() -> None:
    body = """h = Relu(x)
        y = If (k) < then_branch = t () => (float u) { u = Add(h, w) },
                     else_branch = e () => (float v) { v = Exp(h) } >"""
    made = model(f"{X}, bool k", "float y", body, w=matrix(3))
    assert edit.remove_dead(made.graph) == 0
    assert ops(made) == {"Relu": 1, "If": 1} and "w" in made.graph.initializers


def test_a_dead_node_takes_what_only_its_subgraphs_read() -> None:
    body = """h = Relu(x) g = Exp(x)
        d = If (k) < then_branch = t () => (float u) { v = Add(h, w) u = Neg(v) },
                     else_branch = e () => (float v) { v = Exp(h) } >
        y = Neg(g)"""
    made = model(f"{X}, bool k", "float y", body, w=matrix(3))
    edit.remove_dead(made.graph)
    assert ops(made) == {"Exp": 1, "Neg": 1} and not made.graph.initializers
