"""Digests of a model: of its graph, of its weights, and of what a pass must not touch."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from netlathe.ir import weights
from netlathe.ir.printing import show_type
from netlathe.pipeline.pass_ import Feeds


def graph_digest(model: ir.Model) -> str:
    """SHA-256 over the graph: interface, nodes, attributes, names, types of weights, not their bytes."""
    state = hashlib.sha256(str(sorted(model.opset_imports.items())).encode())
    for line in _lines(model.graph):
        state.update(f"{line}\n".encode())
    return state.hexdigest()


def weights_digest(model: ir.Model) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all initializers, one at a time."""
    state = hashlib.sha256()
    for graph in model.graphs():
        for name, value in sorted(graph.initializers.items()):
            if value.const_value is not None:
                state.update(f"{name} {weights.digest(value.const_value)}\n".encode())
    return state.hexdigest()


def feeds_digest(feeds: Feeds) -> str:
    """SHA-256 over named arrays."""
    state = hashlib.sha256()
    for name, array in sorted(feeds.items()):
        state.update(f"{name} {array.dtype} {array.shape}\n".encode())
        if array.dtype.kind in "OUS":
            state.update(repr(array.tolist()).encode())
        else:
            state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


@dataclass(frozen=True)
class Guard:
    """What a model was: its graph, which tensors it has, and the bytes of those that can be edited.

    Weights that are mapped from files cannot, and recipes hand out new arrays.
    """

    graph: str
    tensors: Mapping[str, int]
    sums: Mapping[str, int]

    @classmethod
    def of(cls, model: ir.Model) -> Guard:
        """Look at ``model`` as it is now; it must live as long as the guard."""
        tensors: dict[str, int] = {}
        sums: dict[str, int] = {}
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                tensor = value.const_value
                tensors[name] = id(tensor)
                if tensor is None or isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
                    continue
                if tensor.dtype != ir.DataType.STRING:
                    array = np.ascontiguousarray(tensor.numpy())
                    sums[name] = zlib.crc32(array.reshape(-1).view(np.uint8).data)
        return cls(graph_digest(model), tensors, sums)

    def edited_in_place(self, now: Guard) -> list[str]:
        """Names of weights whose tensor is the same object with other bytes."""
        return [
            name
            for name, total in self.sums.items()
            if now.tensors.get(name) == self.tensors[name] and now.sums.get(name) != total
        ]


def _lines(graph: ir.Graph, indent: str = "") -> Iterator[str]:
    """The graph as text without the bytes of its weights."""
    yield from (f"{indent}input {value.name} {show_type(value)}" for value in graph.inputs)
    for name, value in graph.initializers.items():
        yield f"{indent}weight {name} {show_type(value)}"
    for node in graph:
        read = [value.name if value is not None else None for value in node.inputs]
        made = [f"{value.name} {show_type(value)}" for value in node.outputs]
        yield f"{indent}{node.domain}::{node.op_type} {node.name} {read} {made}"
        for name, attribute in sorted(node.attributes.items()):
            yield from _attribute(name, attribute, indent + " ")
    yield from (f"{indent}output {value.name} {show_type(value)}" for value in graph.outputs)


def _attribute(name: str, attribute: ir.Attr, indent: str) -> Iterator[str]:
    kind = attribute.type
    if attribute.is_ref():
        yield f"{indent}{name} @{attribute.ref_attr_name}"
    elif kind == ir.AttributeType.GRAPH:
        yield f"{indent}{name}"
        yield from _lines(attribute.as_graph(), indent + " ")
    elif kind == ir.AttributeType.GRAPHS:
        for graph in attribute.as_graphs():
            yield f"{indent}{name}"
            yield from _lines(graph, indent + " ")
    elif kind == ir.AttributeType.TENSOR:
        yield f"{indent}{name} {weights.digest(attribute.as_tensor())}"
    elif kind == ir.AttributeType.TENSORS:
        yield f"{indent}{name} {[weights.digest(t) for t in attribute.as_tensors()]}"
    else:
        yield f"{indent}{name} {kind.name} {attribute.value!r}"
