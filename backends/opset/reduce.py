"""Reductions: since opset 18 their axes are an input, before they are an attribute."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from .builder import Builder, Gap

OPS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip


def reduce(b: Builder) -> list[ir.Value] | None:
    """Any of OPS; bool maxima and minima (opset 20) are taken over uint8."""
    x = b.need(0)
    is_bool = x.dtype == ir.DataType.BOOL and b.opset < 20
    if b.opset >= 18 and not is_bool:
        return None
    number = b.cast(x, ir.DataType.UINT8) if is_bool else x
    if b.opset >= 18:
        attributes: dict[str, Any] = dict(b.node.attributes)
        reduced = b(b.node.op_type, number, b.input(1), **attributes)
    else:
        reduced = _with_attribute(b, number)
    return [b.cast(reduced, ir.DataType.BOOL) if is_bool else reduced]


def _with_attribute(b: Builder, x: ir.Value) -> ir.Value:
    keepdims = int(b.attribute("keepdims", 1))
    axes = b.constant(b.input(1))
    if b.input(1) is not None and axes is None:
        raise Gap(f"the axes of {b.node.op_type} are not constant")
    if axes is None or axes.size == 0:
        if b.attribute("noop_with_empty_axes", 0):
            return b("Identity", x)
        return b(b.node.op_type, x, keepdims=keepdims)
    return b(b.node.op_type, x, keepdims=keepdims, axes=[int(a) for a in axes])
