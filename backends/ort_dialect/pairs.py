"""Activations of 8 bits as ONNX Runtime's kernels for x86 take them: int8 becomes uint8, 128 higher.

    q = QuantizeLinear(x, s, z: i8)   ->   q = QuantizeLinear(x, s, z + 128: u8)

With int8 its optimizer leaves many convolutions and sums in float32. What is read back is the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import edit

INT8, UINT8 = ir.DataType.INT8, ir.DataType.UINT8


def unsign(graph: ir.Graph, taken: set[str]) -> int:
    """Rewrite every pair of int8 with a constant zero point; returns how many there were."""
    made: dict[ir.Value, ir.Value] = {}

    def moved(zero: ir.Value) -> ir.Value:
        if zero not in made:
            array = edit.const_array(zero)
            assert array is not None
            higher = np.asarray((array.astype(np.int16) + 128).astype(np.uint8))
            made[zero] = edit.constant(graph, higher, f"{zero.name}_uint8", taken)
        return made[zero]

    count = 0
    for node in graph:
        if node.op_type != "QuantizeLinear" or node.domain or not _is_int8(node):
            continue
        codes, count = node.outputs[0], count + 1
        for quantizer in (node, *(reader for reader, _ in codes.uses())):
            zero = quantizer.inputs[2]
            assert zero is not None
            quantizer.replace_input_with(2, moved(zero))
            edit.drop_if_unread(zero)
        codes.type = ir.TensorType(UINT8)
    return count


def _is_int8(node: ir.Node) -> bool:
    """Whether its codes are int8, zero points are constants and nothing but DequantizeLinear reads them."""
    codes = node.outputs[0]
    to: int = node.attributes.get_int("output_dtype", 0)
    if codes.dtype != INT8 or codes.is_graph_output() or to:
        return False
    nodes = (node, *(reader for reader, _ in codes.uses()))
    return all(
        len(quantizer.inputs) > 2 and edit.const_array(quantizer.inputs[2]) is not None
        for quantizer in nodes
    ) and all(n.op_type == "DequantizeLinear" and not n.domain for n in nodes[1:])
