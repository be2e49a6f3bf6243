"""Corrected biases in the simulated reference, written once more and without the code that edits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from netlathe.ir import weights
from netlathe.pipeline.ledger import Entry


def emulate(model: ir.Model, applied: Sequence[Entry]) -> None:
    """Add every correction to what the layer adds; a product that adds nothing gets an Add."""
    made = {v.name: node for node in model.graph for v in node.outputs}
    for entry in applied:
        if "corrects" not in entry.detail:
            continue
        node, by = made[entry.detail["corrects"]], entry.arrays["shift"]
        output = node.outputs[0]
        assert output.dtype is not None
        dtype = output.dtype.numpy()
        if node.op_type == "Conv":
            held = node.inputs[2] if len(node.inputs) > 2 else None
            node.resize_inputs(3)
            node.replace_input_with(2, _sum(model, held, by, dtype))
            continue
        uses = list(output.uses())
        sums = uses[0][0] if len(uses) == 1 and not output.is_graph_output() else None
        if sums is not None and sums.op_type == "Add" and uses[0][1] == 0:
            held = sums.inputs[1]
            if held is not None and weights.is_weight(held) and _size(held) == len(by):
                sums.replace_input_with(1, _sum(model, held, by, dtype))
                continue
        added = ir.node("Add", [output, _sum(model, None, by, dtype)])
        model.graph.insert_after(node, added)
        result = added.outputs[0]
        result.type, result.shape = output.type, output.shape
        for reader, index in uses:
            reader.replace_input_with(index, result)
        if output.is_graph_output():
            model.graph.outputs[list(model.graph.outputs).index(output)] = result
        result.name, output.name = output.name, f"{output.name}/uncorrected"


def _sum(
    model: ir.Model, held: ir.Value | None, by: np.ndarray, dtype: np.dtype[np.generic]
) -> ir.Value:
    array = by.astype(np.float64)
    if held is not None:
        array = weights.array(held).astype(np.float64)
        array = array + by.reshape(array.shape)
    array = array.astype(dtype)
    name = f"{(held.name if held is not None else '') or 'bias'}/corrected"
    while name in model.graph.initializers:
        name += "'"
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array),
    )
    model.graph.register_initializer(value)
    return value


def _size(value: ir.Value) -> int:
    return int(weights.array(value).size)
