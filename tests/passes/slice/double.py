"""A float32 model computed in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import types, weights


def in_double(model: ir.Model) -> ir.Model:
    """``model`` with every float32 weight, cast and value in float64."""
    double = ir.DataType.DOUBLE
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            value.const_value = weights.derived(
                tensor,
                lambda array: array.astype(np.float64),
                double,
                tensor.shape.numpy(),
                value.name or "",
            )
            value.type = ir.TensorType(double)
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(double)
    for node in model.graph:
        if node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(double))
        if "stash_type" in node.attributes:
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", int(double))
    types.annotate(model)
    return model
