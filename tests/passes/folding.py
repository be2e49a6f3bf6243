"""What the tests of passes that move weights share."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import normal, types, verify
from netlathe.ir.printing import show_model


def copy_of(model: ir.Model) -> ir.Model:
    """A copy that shares nothing with ``model``."""
    return ir.from_proto(ir.to_proto(model))


def assert_sound(model: ir.Model) -> None:
    """The model verifies, and bringing it into normal form changes nothing."""
    verify.check(model)
    again = copy_of(model)
    before = show_model(again)
    normal.normalize(again)
    assert show_model(again) == before


def in_float64(model: ir.Model) -> ir.Model:
    """A copy that computes in float64 where ``model`` does in float32, on the same weights.

    For the executor: not every operator of ONNX (RotaryEmbedding) takes float64.
    """
    wide = copy_of(model)
    for value in (*wide.graph.initializers.values(), *wide.graph.inputs):
        if value.dtype != ir.DataType.FLOAT:
            continue
        value.type = ir.TensorType(ir.DataType.DOUBLE)
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float64))
    for node in wide.graph:
        to = node.attributes.get("to")
        if to is not None and to.as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.DOUBLE))
    types.annotate(wide)
    return wide
