"""Which values of a graph are codes: floats rounded to a step, where one ulp decides a whole step.

An artifact of a graph that has some is compiled a second time to be checked: with its codes as outputs behind
the others, and the same kernels in the same order (see :mod:`netlathe.backends.tvm.judge`).
"""

from __future__ import annotations

import onnx_ir as ir

_ROUNDINGS = ("DynamicQuantizeLinear", "QuantizeLinear")
INTEGER_OPERATORS = ("QLinearConv", "QLinearMatMul")  # which scale and round a sum of integers
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_TOLD = "netlathe.told"  # of a model: how many of its last outputs are codes that are told


def rounds(node: ir.Node) -> bool:
    """Whether ``node`` makes codes of floats or sums, and all that it makes is read."""
    x = node.inputs[0] if node.inputs else None
    if node.domain or x is None:
        return False
    if node.op_type in INTEGER_OPERATORS:
        # Scales by row or column of more than two dims have no DequantizeLinear.
        if any(len(scale.shape or ()) > 1 for scale in (node.inputs[1], node.inputs[4]) if scale):
            return False
    elif node.op_type not in _ROUNDINGS or x.dtype not in _FLOATS:
        return False
    return all(value.uses() or value.is_graph_output() for value in node.outputs)


def of(model: ir.Model) -> list[ir.Value]:
    """Codes, and the dynamic scales and zero points of some, that are no outputs of ``model``."""
    made = (value for node in model.graph if rounds(node) for value in node.outputs)
    return [value for value in made if not value.is_graph_output()]


def telling(model: ir.Model) -> ir.Model:
    """A copy with its codes as its last outputs."""
    copy = model.clone()
    found = of(copy)
    copy.graph.outputs.extend(found)
    copy.metadata_props[_TOLD] = str(len(found))
    return copy


def told(model: ir.Model) -> frozenset[ir.Value]:
    """The outputs that :func:`telling` has added: to be told as they are computed for those who read them."""
    count = int(model.metadata_props.get(_TOLD, "0"))
    return frozenset(model.graph.outputs[-count:] if count else ())
