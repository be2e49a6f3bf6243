"""What a rewrite sees of the model, and the edits it may make, each of which is noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, provenance
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.types import Inference, Type

CREATED_BY = "normalize"


@dataclass
class Work:
    """One round of rewriting: derived types, names in use, and whether anything changed."""

    found: Inference
    taken: set[str]
    changed: bool = False
    folded: int = 0  # nodes that became constants
    unfolded: dict[str, tuple[ir.Node, str]] = field(default_factory=dict)  # why one did not

    # -- what is known ----------------------------------------------------------------------------

    def type(self, value: ir.Value | None) -> Type:
        """Derived type; that of its tensor for an initializer made in this round."""
        if value is None:
            return Type(None, None)
        known = self.found.types.get(value)
        if known is None and value.const_value is not None:
            tensor = value.const_value
            return Type(tensor.dtype, tuple(tensor.shape.numpy()))
        return known or Type(None, None)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Derived shape, None where not even the rank is known."""
        return self.type(value).shape

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of dims, where known."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def contents(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """Elements of a shape-like integer value, flat, where they are known."""
        if value is None:
            return None
        if value.const_value is None or value.is_graph_input():
            return self.found.contents(value)
        tensor = value.const_value
        if not tensor.dtype.is_integer() or tensor.size > 64 or len(tensor.shape) > 1:
            return None
        return tuple(int(item) for item in tensor.numpy().reshape(-1))

    def ints(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Elements of a shape-like integer value where all are plain ints."""
        found = self.contents(value)
        if found is None or not all(isinstance(item, int) for item in found):
            return None
        return tuple(item for item in found if isinstance(item, int))

    def scalar(self, value: ir.Value | None) -> float | None:
        """The element of a constant that has just one, as a Python number."""
        if value is None or value.const_value is None or value.is_graph_input():
            return None
        tensor = value.const_value
        if tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
            return None
        return float(tensor.numpy().reshape(-1)[0])

    # -- edits ------------------------------------------------------------------------------------

    def constant(
        self, node: ir.Node, array: npt.NDArray[Any] | ir.TensorProtocol, name: str
    ) -> ir.Value:
        """A new initializer in the graph of ``node``."""
        assert isinstance(node.graph, ir.Graph)
        return edit.constant(node.graph, array, name, self.taken)

    def swap(
        self, node: ir.Node, new: Sequence[ir.Node], outputs: Mapping[ir.Value, ir.Value]
    ) -> None:
        """Put ``new`` in the place of ``node``; ``outputs`` maps old values to new ones."""
        for before, after in outputs.items():
            if before in self.found.types:
                self.found.types.setdefault(after, self.found.types[before])
            if before in self.found.known:
                self.found.known.setdefault(after, self.found.known[before])
        for made in new:
            for value in made.outputs:
                if value.name is None:
                    value.name = edit.unique_name(
                        _graph(node), f"{node.outputs[0].name}_{made.op_type.lower()}", self.taken
                    )
        edit.replace(node, new, outputs, CREATED_BY)
        self.changed = True

    def insert_before(self, node: ir.Node, made: ir.Node) -> ir.Value:
        """Put a new node of one output before ``node``; its output."""
        graph = _graph(node)
        value = made.outputs[0]
        value.name = edit.unique_name(
            graph, f"{node.outputs[0].name}_{made.op_type.lower()}", self.taken
        )
        graph.insert_before(node, provenance.mark(made, created_by=CREATED_BY, like=node))
        self.changed = True
        return value

    def forward(self, node: ir.Node, value: ir.Value) -> None:
        """Let the readers of ``node``'s first output read ``value``; the node goes away."""
        self.swap(node, [], {node.outputs[0]: value})

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Read another value; the node that made the one before goes if nobody reads it now."""
        before = node.inputs[index] if index < len(node.inputs) else None
        if before is value:
            return
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)
        self.changed = True
        if before is not None:
            edit.drop_if_unread(before)

    def set_ints(
        self, node: ir.Node, index: int, items: Sequence[int], suffix: str, *, scalar: bool = False
    ) -> None:
        """Make an input the int64 constant ``items``; nothing happens where it is already."""
        array = np.array(items[0] if scalar else items, dtype=np.int64)
        array = array.reshape(() if scalar else (len(items),))
        before = node.inputs[index] if index < len(node.inputs) else None
        held = edit.const_array(before)
        if held is not None and held.dtype == array.dtype and held.shape == array.shape:
            if np.array_equal(held, array):
                return
        self.set_input(node, index, self.constant(node, array, f"{node.outputs[0].name}_{suffix}"))

    def set_attribute(self, node: ir.Node, name: str, value: Any) -> None:
        """Write an attribute; nothing happens where it has the value already."""
        made = (
            value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(name, value)
        )
        before = node.attributes.get(name)
        if before is None or before.is_ref() or before.value != made.value:
            node.attributes[name] = made
            self.changed = True


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph
