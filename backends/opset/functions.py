"""Expansion of an op into the function body that its own operator schema carries."""

from __future__ import annotations

from typing import Any

import onnx
import onnx.defs
import onnx_ir as ir

from . import legal
from .builder import Builder, Gap


def expand(b: Builder) -> list[ir.Value] | None:
    """The node's function body, written before it; None where its schema carries none.

    Bodies are written in an opset of their own. A body is taken only when every op in it means the
    same there and in the IR, apart from the types it takes.
    """
    body = _body(b.node)
    if body is None:
        return None
    written_for = {o.domain: o.version for o in body.opset_import}.get("", legal.IR_OPSET)
    for proto in body.node:
        if proto.domain or not _same_signature(proto.op_type, written_for):
            raise Gap(f"the function body of {b.node.op_type} uses {proto.op_type} in an old form")
        if any(attribute.HasField("g") for attribute in proto.attribute):
            raise Gap(f"the function body of {b.node.op_type} has control flow")
    function = ir.serde.deserialize_function(body)
    values: dict[ir.Value, ir.Value | None] = {
        formal: b.input(i) for i, formal in enumerate(function.inputs)
    }
    for node in function:
        attributes = {name: _resolved(b, node.op_type, a) for name, a in node.attributes.items()}
        inputs = [None if v is None else values[v] for v in node.inputs]
        found = {name: a for name, a in attributes.items() if a is not None}
        outputs = b.many(node.op_type, inputs, len(node.outputs), _constant_type(node), **found)
        values.update(zip(node.outputs, outputs, strict=True))
    results = [values[output] for output in function.outputs[: len(b.node.outputs)]]
    return [_owned(b, result) for result in results]


def _owned(b: Builder, value: ir.Value | None) -> ir.Value:
    if value is None:
        raise Gap(f"the function body of {b.node.op_type} passes an absent input through")
    return value


def _body(node: ir.Node) -> onnx.FunctionProto | None:
    """The newest body that the schema in the IR's opset carries."""
    schema: Any = legal.schema(node.op_type, legal.IR_OPSET)  # onnx's stubs lack these members
    if schema is None:
        return None
    proto = onnx.FunctionProto()
    if schema.has_context_dependent_function:
        version = max(v for v in schema.context_dependent_function_opset_versions)
        types = [_type_proto(v) for v in node.inputs]
        serialized = ir.serde.serialize_node(node).SerializeToString()
        data = schema.get_context_dependent_function_with_opset_version(version, serialized, types)
    elif schema.has_function:
        data = schema.get_function_with_opset_version(max(schema.function_opset_versions))
    else:
        return None
    if not data:
        return None
    proto.ParseFromString(data)
    return proto


def _type_proto(value: ir.Value | None) -> bytes:
    proto: Any = onnx.TypeProto()  # protobuf's classes are made at run time
    if value is not None and value.type is not None:
        ir.serde.serialize_type_into(proto, value.type)
    if value is not None and value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    data: bytes = proto.SerializeToString()
    return data


def _same_signature(op: str, opset: int) -> bool:
    """Whether attributes, inputs and outputs of ``op`` are the same at ``opset`` and in the IR."""
    old, new = legal.schema(op, opset), legal.schema(op, legal.IR_OPSET)
    if old is None or new is None:
        return False
    added = set(new.attributes) ^ set(old.attributes)
    return old.max_input == new.max_input and added <= {"saturate", "round_mode"}


def _resolved(b: Builder, op: str, attribute: ir.Attr) -> ir.Attr | None:
    """A body's attribute with references to the expanded node's attributes filled in."""
    name = attribute.ref_attr_name
    if name is None:
        return attribute
    found = b.node.attributes.get(name)
    if found is None:
        schema = legal.schema(b.node.op_type, legal.IR_OPSET)
        assert schema is not None
        formal = schema.attributes.get(name)
        if formal is None or not formal.default_value.type:
            return None
        found = ir.serde.deserialize_attribute(formal.default_value)
    return ir.Attr(attribute.name, found.type, found.value)


def _constant_type(node: ir.Node) -> ir.DataType | None:
    if node.op_type == "Cast" and "to" in node.attributes:
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        return None if tensor is None else tensor.dtype
    return None
