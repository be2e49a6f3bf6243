"""Whether a node is legal at an opset, asked of the operator schemas themselves.

An op is legal at opset N when the default domain has a schema for it at N and the node fits it:
inputs and outputs present, attributes known, tensor types allowed. Nothing here knows single
operators, so a mistake in a lowering rule cannot hide from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import onnx.defs
import onnx_ir as ir

IR_OPSET = 25  # what the IR is written in


@cache
def schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    """The schema in force for ``op`` at ``opset``; None where the op is absent or deprecated."""
    try:
        found = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    return None if found.deprecated else found


def unchanged(op: str, opset: int) -> bool:
    """Whether ``op`` means at ``opset`` exactly what it means in the IR, types included."""
    new, old = schema(op, IR_OPSET), schema(op, opset)
    return new is not None and old is not None and new.since_version == old.since_version


def type_name(value: ir.Value) -> str | None:
    """``value``'s type as the schemas spell it, such as ``tensor(float16)``; None when unknown."""
    kind: ir.TypeProtocol | None = value.type
    if kind is None or kind.dtype == ir.DataType.UNDEFINED:
        return None
    wrappers = []
    while isinstance(kind, ir.SequenceType | ir.OptionalType):
        wrappers.append("seq" if isinstance(kind, ir.SequenceType) else "optional")
        kind = kind.elem_type
    if not isinstance(kind, ir.TensorType):
        return None  # sparse tensors: no default-domain op of the IR takes one
    name = f"tensor({kind.dtype.name.lower()})"
    for wrapper in reversed(wrappers):
        name = f"{wrapper}({name})"
    return name


def typed(
    formals: Sequence[onnx.defs.OpSchema.FormalParameter], values: Sequence[ir.Value | None]
) -> Iterator[tuple[onnx.defs.OpSchema.FormalParameter, ir.Value]]:
    """Pair actual inputs or outputs with the formal ones; the last formal one may be variadic."""
    for i, value in enumerate(values):
        if value is not None and formals:
            yield formals[min(i, len(formals) - 1)], value


def allowed(found: onnx.defs.OpSchema, formal: onnx.defs.OpSchema.FormalParameter) -> set[str]:
    """The type names that ``formal`` takes."""
    for constraint in found.type_constraints:
        if constraint.type_param_str == formal.type_str:
            return set(constraint.allowed_type_strs)
    return {formal.type_str}


def wrong_types(node: ir.Node, found: onnx.defs.OpSchema) -> list[tuple[ir.Value, str]]:
    """Values of ``node`` whose type ``found`` does not take, with that type's name."""
    pairs = [*typed(found.inputs, node.inputs), *typed(found.outputs, node.outputs)]
    wrong = []
    for formal, value in pairs:
        name = type_name(value)
        if name is not None and name not in allowed(found, formal):
            wrong.append((value, name))
    return wrong


def problem(node: ir.Node, opset: int) -> str | None:
    """Why ``node`` is not legal at ``opset``, in one clause; None when it is legal."""
    found = schema(node.op_type, opset)
    if found is None:
        return f"{node.op_type} does not exist at opset {opset}"
    for name in node.attributes:
        if name not in found.attributes:
            return f"{node.op_type} has no attribute {name!r} at opset {opset}"
    for name, attribute in found.attributes.items():
        if attribute.required and name not in node.attributes:
            return f"{node.op_type} needs the attribute {name!r} at opset {opset}"
    used = len(node.inputs)
    while used and node.inputs[used - 1] is None:
        used -= 1
    if not found.min_input <= used <= found.max_input:
        return f"{node.op_type} does not take {used} inputs at opset {opset}"
    if not found.min_output <= len(node.outputs) <= found.max_output:
        return f"{node.op_type} does not have {len(node.outputs)} outputs at opset {opset}"
    wrong = wrong_types(node, found)
    if wrong:
        shown = ", ".join(sorted({name for _, name in wrong}))
        return f"{node.op_type} does not take {shown} at opset {opset}"
    return None
