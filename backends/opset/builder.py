"""What a lowering rule is given: the node it replaces and the means to write others before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import legal


class Gap(Exception):
    """The node has no form at the wanted opset; the text says why, ``help`` what would help."""

    def __init__(self, reason: str, help: str = "") -> None:
        super().__init__(reason)
        self.help = help


@dataclass
class Shared:
    """What all rules of one lowering share: names taken, small constants and common sub-results."""

    names: set[str]
    is_function: bool = False  # the graph is the body of a model-local function
    constants: dict[tuple[int, str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)
    results: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)

    def fresh(self, stem: str) -> str:
        """A value name that is not taken, the same on every run over the same model."""
        name, i = stem, 1
        while name in self.names:
            name, i = f"{stem}_{i}", i + 1
        self.names.add(name)
        return name


class Builder:
    """Writes nodes before ``node``, in the IR's opset; each carries the node's provenance.

    Calling the builder adds one node and returns its first output, typed by the op's schema where
    that says that the output has an input's type, else by ``dtype``.
    """

    def __init__(self, node: ir.Node, opset: int, shared: Shared) -> None:
        graph = node.graph
        if not isinstance(graph, ir.Graph):
            raise ValueError(f"node {node.name!r} is in no graph")
        self.node = node
        self.opset = opset
        self.shared = shared
        self.graph = graph
        self.is_function = shared.is_function
        self.added: list[ir.Node] = []

    # -- reading the node ---------------------------------------------------------------------

    def input(self, i: int) -> ir.Value | None:
        """Input ``i``; None when absent."""
        return self.node.inputs[i] if i < len(self.node.inputs) else None

    def need(self, i: int) -> ir.Value:
        """Input ``i``, which the schema requires."""
        value = self.input(i)
        if value is None:
            raise Gap(f"{self.node.op_type} lacks its input {i}")
        return value

    def output_used(self, i: int) -> bool:
        """Whether output ``i`` exists and anything reads it."""
        if i >= len(self.node.outputs):
            return False
        value = self.node.outputs[i]
        return bool(value.name) and (bool(value.uses()) or value.is_graph_output())

    def attribute(self, name: str, default: Any = None) -> Any:
        """Attribute ``name`` as a plain Python value."""
        found = self.node.attributes.get(name)
        if found is None:
            return default
        if found.is_ref():
            raise Gap(f"attribute {name!r} of {self.node.op_type} refers to a function's attribute")
        return list(found.value) if isinstance(found.value, tuple) else found.value

    def dtype(self, value: ir.Value) -> ir.DataType:
        """``value``'s element type, which the rule cannot do without."""
        if value.dtype is None:
            raise Gap(
                f"the type of {value.name} is unknown",
                "give the model's inputs types, or keep the opset",
            )
        return value.dtype

    def dims(self, value: ir.Value) -> list[int | str | None]:
        """``value``'s dims: ints, names of dynamic dims, None where unknown."""
        if value.shape is None:
            raise Gap(f"the rank of {value.name} is unknown")
        return [dim if isinstance(dim, int) else dim.value for dim in value.shape]

    def rank(self, value: ir.Value) -> int:
        """``value``'s rank."""
        return len(self.dims(value))

    def constant(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """``value``'s array where it is a constant."""
        if value is None or value.is_graph_input():
            return None
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()

    # -- writing nodes ------------------------------------------------------------------------

    def __call__(
        self, op: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Add a one-output node."""
        return self.many(op, inputs, 1, dtype, **attributes)[0]

    def many(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        num_outputs: int,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with ``num_outputs`` outputs."""
        stem = self.node.outputs[0].name or self.node.op_type
        outputs = [
            ir.Value(name=self.shared.fresh(f"{stem}/{op}"), type=self._type(op, inputs, i, dtype))
            for i in range(num_outputs)
        ]
        node = ir.node(
            op,
            inputs,
            attributes,
            outputs=outputs,
            metadata_props={**self.node.metadata_props, "netlathe.created_by": "opset"},
        )
        node.name = outputs[0].name
        self.graph.insert_before(self.node, node)
        self.added.append(node)
        return outputs

    def _type(
        self, op: str, inputs: Sequence[ir.Value | None], index: int, dtype: ir.DataType | None
    ) -> ir.TensorType | None:
        if dtype is not None:
            return ir.TensorType(dtype)
        schema = legal.schema(op, legal.IR_OPSET)
        if schema is None:
            return None
        formal = schema.outputs[min(index, len(schema.outputs) - 1)]
        for given, value in legal.typed(schema.inputs, inputs):
            if given.type_str == formal.type_str and value.dtype is not None:
                return ir.TensorType(value.dtype)
        fixed = {"tensor(int64)": ir.DataType.INT64, "tensor(bool)": ir.DataType.BOOL}
        names = legal.allowed(schema, formal)
        if len(names) == 1 and (name := next(iter(names))) in fixed:
            return ir.TensorType(fixed[name])
        return None

    def const(self, array: npt.ArrayLike, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A small constant, shared between equal uses in the same graph."""
        data = np.asarray(array)
        # Rounded once, to the type it is used in: float64 0.1 -> float32 0.1.
        data = np.asarray(data.astype(dtype.numpy()), order="C")
        key = (id(self.graph), dtype.name, data.shape, data.tobytes())
        found = self.shared.constants.get(key)
        if found is None or found.graph is None:  # its readers went, and it with them
            stem = "const" if data.ndim == 0 else "consts"
            tensor = ir.Tensor(data, dtype=dtype, name=self.shared.fresh(f"opset/{stem}"))
            value = ir.Value(
                name=tensor.name,
                type=ir.TensorType(dtype),
                shape=ir.Shape(data.shape),
                const_value=tensor,
            )
            if self.is_function:  # functions hold no initializers
                node = ir.node("Constant", [], {"value": tensor}, outputs=[value])
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.register_initializer(value)
            self.shared.constants[key] = value
        return self.shared.constants[key]

    def like(self, number: float, value: ir.Value) -> ir.Value:
        """A scalar constant of ``value``'s type."""
        return self.const(number, self.dtype(value))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` as ``dtype``; itself where it is one already."""
        if value.dtype == dtype:
            return value
        return self("Cast", value, dtype=dtype, to=int(dtype))

    def unsqueeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """``value`` with dims of 1 at ``axes`` of the result."""
        return self("Unsqueeze", value, self.const(list(axes)))

    def reshape(self, value: ir.Value, dims: Sequence[int]) -> ir.Value:
        """``value`` reshaped to literal ``dims``: 0 copies a dim, one -1 is inferred."""
        return self("Reshape", value, self.const(list(dims)))

    def slice(self, value: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        """``value[start:end]`` on ``axis``."""
        parts = [self.const([start]), self.const([end]), self.const([axis])]
        return self("Slice", value, *parts)

    def length(self, value: ir.Value, axis: int) -> ir.Value:
        """The length of ``axis`` as an int64 tensor of shape [1]."""
        dim = self.dims(value)[axis]
        if isinstance(dim, int):
            return self.const([dim])
        shape = self("Shape", value)
        return self.slice(shape, 0, axis, axis + 1)
