"""Text of nodes and models, and module paths."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import printing, provenance
from netlathe.ir.printing import show_model, show_node
from tests.ir.onnx_text import matrix, model, node


def test_a_node_reads_like_an_assignment() -> None:
    made = model("float[b,3] x", "float y", "u = Transpose<perm = [1, 0]>(x) y = Add(u, u)")
    text = show_node(node(made, "Transpose"))
    assert text == "u = Transpose(x: f32[b,3], perm=[1,0])"


def test_absent_inputs_untyped_values_and_small_constants_show() -> None:
    made = model("float[b,3] x", "float y", "y = Clip(x, , top)", top=3.0)
    assert show_node(node(made, "Clip")) == "y = Clip(x: f32[b,3], -, top: f32[])"
    made = model("float[b,3] x", "float y", "y = Reshape(x, n)", n=[0, 3])
    assert show_node(node(made, "Reshape")).endswith("n: i64[2]=[0, 3])")
    value = ir.Value(name="v")
    assert printing.show_value(value) == "v: ?[...]"
    value.type, value.shape = ir.TensorType(ir.DataType.BFLOAT16), ir.Shape([None, "b", 2])
    assert printing.show_value(value) == "v: bf16[?,b,2]"


def test_subgraphs_and_tensors_show_their_size() -> None:
    body = """y = If (k) < then_branch = t () => (float u) { u = Neg(x) },
                     else_branch = e () => (float v) { v = Exp(x) } >"""
    made = model("float[b] x, bool k", "float y", body)
    assert "then_branch=<graph of 1 nodes>" in show_node(node(made, "If"))
    made = model("float[b] x", "float y", "c = Constant<value = float {1.0}>() y = Add(x, c)")
    assert show_node(node(made, "Constant")) == "c = Constant(value=<float[]>)"


def test_a_model_is_grouped_by_module() -> None:
    made = model("float[b,3] x", "float y", "h = Mul(x, w) y = Relu(h)", w=matrix(3))
    provenance.mark(node(made, "Mul"), module="layers.0.norm")
    lines = show_model(made).splitlines()
    assert lines[0] == "input   x: f32[b,3]" and lines[1] == "weight  w: f32[3]"
    assert any("layers.0.norm" in line for line in lines) and lines[-1].startswith("output")


def test_module_paths_come_from_metadata_or_scoped_names() -> None:
    made = model("float[b,3] x", "float y", "h = Neg(x) y = Relu(h)")
    first, second = node(made, "Neg"), node(made, "Relu")
    second.name = "/encoder/layer.0/output/Relu"
    assert provenance.module_path(first) == ""
    assert provenance.module_path(second) == "encoder.layer.0.output"
    provenance.mark(first, like=second, created_by="test")
    assert provenance.module_path(first.outputs[0]) == "encoder.layer.0.output"
    assert provenance.location(first) == "encoder.layer.0.output   created by test"
