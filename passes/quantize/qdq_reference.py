"""What pairs of QuantizeLinear and DequantizeLinear must give, from the ledger: rounding in plain arithmetic.

x' = clip(round(x / s), lowest - z, highest - z) s          integers
x' = Cast(Cast(x / s, float8)) s                            float8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit
from netlathe.pipeline.ledger import Entry

Array = npt.NDArray[Any]
_ENDS = {"int8": (-128, 127), "uint8": (0, 255)}
_LARGEST = {"int8": 127.0, "float8e4m3fn": 448.0}


def emulate(model: ir.Model, applied: Sequence[Entry], scales_of: Mapping[str, Array]) -> None:
    """Round what the ledger lists, in place; ``scales_of`` gives the scales of weights by name."""
    for entry in applied:
        if "pair" in entry.detail:
            _Emulator(model.graph).pair(entry.detail)
        elif "bias" in entry.detail:
            _bias(model.graph, entry.detail, scales_of)


def _bias(graph: ir.Graph, detail: Mapping[str, Any], scales_of: Mapping[str, Array]) -> None:
    value = graph.initializers[detail["bias"]]
    assert value.const_value is not None
    bias = value.const_value.numpy()
    step = (detail["scale"] * scales_of[detail["weight"]].astype(np.float64)).astype(np.float32)
    step = np.broadcast_to(step.reshape(-1), bias.shape)
    units = np.around(bias.astype(np.float64) / step.astype(np.float64))
    held = np.minimum(np.maximum(units, -(2.0**31)), 2.0**31 - 1).astype(np.float32)
    value.const_value = ir.tensor(held * step, name=value.name)


class _Emulator:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.taken = edit.names_in(graph)
        self.nodes: list[ir.Node] = []

    def pair(self, detail: Mapping[str, Any]) -> None:
        """Let the readers that ``detail`` lists (or all) read a rounded value."""
        value = next(v for v in _values(self.graph) if v.name == detail["pair"])
        wanted = detail["readers"]
        uses = [
            (node, index)
            for node, index in value.uses()
            if wanted is None or (node.outputs[0].name in wanted and index == 0)
        ]
        result = self._rounded(value, detail)
        maker = value.producer()
        if maker is not None:
            self.graph.insert_after(maker, self.nodes)
        else:
            self.graph.insert_before(self.graph[0], self.nodes)
        for node, index in uses:
            node.replace_input_with(index, result)
        if wanted is None and value.is_graph_output():
            self.graph.outputs[list(self.graph.outputs).index(value)] = result
            name = value.name
            value.name = edit.unique_name(self.graph, f"{name}_float", self.taken)
            result.name = name

    def _rounded(self, value: ir.Value, detail: Mapping[str, Any]) -> ir.Value:
        number = detail["number"]
        if detail["scales"] == "tensor":
            return self._by_range(value)
        if detail["scales"] == "static":
            scale: Any = np.float32(detail["scale"])
        else:
            high = self("ReduceMax", value, np.array([-1]), keepdims=1, noop_with_empty_axes=0)
            low = self("ReduceMin", value, np.array([-1]), keepdims=1, noop_with_empty_axes=0)
            most = self("Max", high, self("Neg", low))
            share = self("Div", most, np.float32(_LARGEST[number]))
            scale = self("Max", share, np.float32(2.0**-120))
        units = self("Div", value, scale)
        if number not in _ENDS:
            return self("Mul", self._float8(units, number), scale)
        ends = [np.float32(end - detail.get("zero", 0)) for end in _ENDS[number]]
        return self("Mul", self("Clip", self("Round", units), *ends), scale)

    def _float8(self, units: ir.Value, number: str) -> ir.Value:
        small = self(
            "Cast", units, to=ir.DataType[number.upper()].value, saturate=1, round_mode="up"
        )
        return self("Cast", small, to=ir.DataType.FLOAT.value, saturate=1, round_mode="up")

    def _by_range(self, value: ir.Value) -> ir.Value:
        """uint8 over the range that there is, with zero in it; of zeros the scale is 1."""
        none = np.float32(0)
        everything = {"keepdims": 0, "noop_with_empty_axes": 0}
        high = self("Max", self("ReduceMax", value, **everything), none)
        low = self("Min", self("ReduceMin", value, **everything), none)
        share = self("Div", self("Sub", high, low), np.float32(255))
        scale = self("Where", self("Equal", share, none), np.float32(1), share)
        zero = self(
            "Round", self("Clip", self("Div", self("Neg", low), scale), none, np.float32(255))
        )
        moved = self("Add", self("Round", self("Div", value, scale)), zero)
        codes = self("Clip", moved, none, np.float32(255))
        return self("Mul", self("Sub", codes, zero), scale)

    def __call__(self, op_type: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """Add a node; arrays among the inputs become constants."""
        held = [
            x
            if isinstance(x, ir.Value)
            else edit.constant(self.graph, np.asarray(x), "rounded", self.taken)
            for x in inputs
        ]
        name = edit.unique_name(self.graph, "rounded", self.taken)
        self.nodes.append(edit.node(op_type, held, attributes, name=name))
        return self.nodes[-1].outputs[0]


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(v for node in graph for v in node.outputs)]
