"""Nodes and models as text that a reader can check against their own code."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from netlathe.ir.provenance import module_path

_SHORT = {
    ir.DataType.FLOAT: "f32",
    ir.DataType.FLOAT16: "f16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.DOUBLE: "f64",
    ir.DataType.INT64: "i64",
    ir.DataType.INT32: "i32",
    ir.DataType.INT16: "i16",
    ir.DataType.INT8: "i8",
    ir.DataType.UINT8: "u8",
    ir.DataType.BOOL: "bool",
}
_MOST_CONTENTS = 8  # a constant with more elements is shown by type only


def show_type(value: ir.Value) -> str:
    """``f32[batch,sequence,384]``; ``?`` for what is not known."""
    dtype = "?" if value.dtype is None else _SHORT.get(value.dtype, value.dtype.name.lower())
    if value.shape is None:
        return f"{dtype}[...]"
    dims = (
        "?" if isinstance(d, ir.SymbolicDim) and d.value is None else str(d) for d in value.shape
    )
    return f"{dtype}[{','.join(dims)}]"


def show_value(value: ir.Value | None) -> str:
    """``name: type``, with the contents of a small integer constant; ``-`` for an absent input."""
    if value is None:
        return "-"
    text = f"{value.name}: {show_type(value)}"
    tensor = value.const_value
    if tensor is not None and tensor.dtype.is_integer() and tensor.size <= _MOST_CONTENTS:
        text += f"={tensor.numpy().tolist()}"
    return text


def show_node(node: ir.Node) -> str:
    """``add_7 = Add(o_3: f32[b,t,576], res_2: f32[b,t,768])``, attributes behind the inputs."""
    outputs = ", ".join(value.name or "?" for value in node.outputs)
    arguments = [show_value(value) for value in node.inputs]
    arguments += [f"{name}={_show_attribute(attr)}" for name, attr in node.attributes.items()]
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{outputs} = {op}({', '.join(arguments)})"


def _show_attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.GRAPH:
        return f"<graph of {len(attribute.as_graph())} nodes>"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"<{tensor.dtype.name.lower()}{list(tensor.shape)}>"
    if isinstance(attribute.value, list | tuple):
        return "[" + ",".join(str(item) for item in attribute.value) + "]"
    return str(attribute.value)


def show_model(model: ir.Model) -> str:
    """The whole main graph: inputs, weights, nodes grouped by module path, outputs."""
    return "\n".join(_lines(model.graph))


def _lines(graph: ir.Graph) -> Iterator[str]:
    yield from (f"input   {show_value(value)}" for value in graph.inputs)
    yield from (f"weight  {show_value(value)}" for value in graph.initializers.values())
    path = None
    for node in graph:
        if (here := module_path(node)) != path:
            path = here
            yield f"-- {path or '(no module path)'}"
        outputs = ", ".join(show_type(value) for value in node.outputs)
        yield f"  {show_node(node)} -> {outputs}"
    yield from (f"output  {show_value(value)}" for value in graph.outputs)
