"""Common subexpressions: nodes that compute the same become one."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from netlathe.ir import edit, weights

_RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike"}
)
_MOST_COMPARED = 64  # elements of a constant that is compared by contents


def merge_equal(graph: ir.Graph) -> bool:
    """Merge equal nodes of ``graph`` and, each within itself, of its subgraphs.

    Nodes must be in order. Nodes of unknown domains are left alone: they may have effects.
    """
    changed = False
    for inner in (graph, *graph.subgraphs()):
        seen: dict[Hashable, ir.Node] = {}
        for node in list(inner):
            key = _key(node)
            first = node if key is None else seen.setdefault(key, node)
            if first is node or any(value.is_graph_output() for value in node.outputs):
                continue
            for before, after in zip(node.outputs, first.outputs, strict=True):
                edit.redirect(before, after)
            edit.remove_dead(inner, [node])
            changed = True
    return changed


def _key(node: ir.Node) -> Hashable | None:
    if node.domain or node.op_type in _RANDOM:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        key = _attribute_key(attribute)
        if key is None:
            return None
        attributes.append((name, key))
    inputs = tuple(_value_key(value) for value in node.inputs)
    return (node.op_type, inputs, tuple(attributes), len(node.outputs))


def _attribute_key(attribute: ir.Attr) -> Hashable | None:
    if attribute.is_ref():
        return None
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return _tensor_key(tensor) if tensor.size <= _MOST_COMPARED else None
    value = attribute.value
    if isinstance(value, (list, tuple)):
        value = tuple(value)
    return value if isinstance(value, (int, float, str, tuple)) else None


def _value_key(value: ir.Value | None) -> Hashable:
    """A value by itself; literals (scalars, short integer lists) by their contents.

    Float vectors count as parameters: two that are equal are still two.
    """
    if value is None or not weights.is_weight(value) or value.const_value is None:
        return value
    tensor = value.const_value
    literal = not tensor.shape or (tensor.dtype.is_integer() and tensor.size <= _MOST_COMPARED)
    return _tensor_key(tensor) if literal else value


def _tensor_key(tensor: ir.TensorProtocol) -> Hashable:
    if tensor.dtype == ir.DataType.STRING:
        return (tensor.dtype, id(tensor))
    return (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
