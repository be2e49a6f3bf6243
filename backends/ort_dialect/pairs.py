"""Activations of 8 bits as ONNX Runtime's kernels for x86 take them: int8 becomes uint8, 128 higher.

    q = QuantizeLinear(x, s, z: i8)             ->   q = QuantizeLinear(x, s, z + 128: u8)
    q = Cast(r, int8)  a = MatMulInteger(q, w)  ->   q = Cast(r + 128, uint8)  a = MatMulInteger(q, w, 128)

With int8 its optimizer leaves many convolutions and sums in float32, and a product of int8 and int8 takes 20
to 100 times as long (ORT 1.32, AVX-512 VNNI). What comes out is the same, bit for bit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import edit, provenance

INT8, UINT8 = ir.DataType.INT8, ir.DataType.UINT8
CREATED_BY = "onnx-ort"
# What reads codes, and which of its inputs is their zero point.
_READERS = {"ConvInteger": 2, "DequantizeLinear": 2, "MatMulInteger": 2}


def unsign(graph: ir.Graph, taken: set[str]) -> int:
    """Rewrite every int8 activation whose readers allow it; returns how many there were."""
    moved = _Zeros(graph, taken)
    count = 0
    for node in list(graph):
        codes = node.outputs[0]
        if node.domain or codes.dtype != INT8 or codes.is_graph_output():
            continue
        if not all(_takes(reader, index) for reader, index in codes.uses()):
            continue
        if node.op_type == "QuantizeLinear" and _has_constant_zero(node):
            moved.raise_zero(node)
        elif _is_own(node) and any(r.op_type != "DequantizeLinear" for r, _ in codes.uses()):
            _raise(node, taken)
        else:
            continue
        codes.type = ir.TensorType(UINT8)
        for reader, _ in codes.uses():
            moved.raise_zero(reader)
        count += 1
    return count


class _Zeros:
    """Zero points that are 128 higher, made once each."""

    def __init__(self, graph: ir.Graph, taken: set[str]) -> None:
        self.graph, self.taken = graph, taken
        self.made: dict[ir.Value | None, ir.Value] = {}

    def raise_zero(self, node: ir.Node) -> None:
        """Let ``node`` read a zero point that is 128 higher; without one it is 0."""
        old = node.inputs[2] if len(node.inputs) > 2 else None
        if old not in self.made:
            array = edit.const_array(old) if old is not None else np.array(0)
            assert array is not None
            higher = np.asarray((array.astype(np.int16) + 128).astype(np.uint8))
            name = f"{old.name}_uint8" if old is not None else "zero_point_uint8"
            self.made[old] = edit.constant(self.graph, higher, name, self.taken)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, self.made[old])
        if old is not None:
            edit.drop_if_unread(old)


def _is_own(node: ir.Node) -> bool:
    """Whether a Cast was written by `quantize`, whose codes are known to be in the range of int8."""
    return node.op_type == "Cast" and node.metadata_props.get(provenance.CREATED_BY) == "quantize"


def _takes(reader: ir.Node, index: int) -> bool:
    if reader.domain or reader.op_type not in _READERS or index != 0:
        return False
    return _has_constant_zero(reader) or len(reader.inputs) < 3 or reader.inputs[2] is None


def _has_constant_zero(node: ir.Node) -> bool:
    to: int = node.attributes.get_int("output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
    return len(node.inputs) > 2 and edit.const_array(node.inputs[2]) is not None and not to


def _raise(node: ir.Node, taken: set[str]) -> None:
    """Cast(x, int8) as Cast(x + 128, uint8)."""
    x = node.inputs[0]
    home = node.graph
    assert x is not None and x.dtype is not None and isinstance(home, ir.Graph)
    by = edit.constant(home, np.array(128, x.dtype.numpy()), f"{x.name}_by", taken)
    name = edit.unique_name(home, f"{x.name}_raised", taken)
    add = edit.node(
        "Add", [x, by], name=name, dtype=x.dtype, shape=x.shape, like=node, created_by=CREATED_BY
    )
    home.insert_before(node, add)
    node.replace_input_with(0, add.outputs[0])
    node.attributes["to"] = ir.AttrInt64("to", UINT8.value)
