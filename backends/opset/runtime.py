"""Legal nodes in forms that the optimizer of ONNX Runtime 1.32 makes no illegal ones of.

AveragePool of int8 becomes QLinearAveragePool, which has no dilations: those of 1 go, as the default.

It pulls a DequantizeLinear over a move, with a QuantizeLinear for every step. From opset 21 on,
it states the type of the codes there twice, then has int8 become uint8 in one of the two places, and rejects
its own graph. So where floats are moved, they are made as

    y = (Cast(codes) - zero_point) * scale

which has the same bits. What reads the DequantizeLinear otherwise goes on doing so, and where codes are made
again behind the move, nothing changes: there its optimizer is right, and leaves no float at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from netlathe.ir import edit

_FIRST_OPSET = 21
_MOVES = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def settle(model: ir.Model, opset: int) -> None:
    """Rewrite ``model``, which is legal at ``opset``, in place."""
    for node in model.graph.all_nodes():
        if node.op_type == "AveragePool" and not node.domain:
            if set(node.attributes.get_ints("dilations", ())) == {1}:
                del node.attributes["dilations"]
    if opset >= _FIRST_OPSET:
        _write_out(model)


def _write_out(model: ir.Model) -> None:
    """Write out what is moved behind a DequantizeLinear of int8 with one constant zero point."""
    for graph in model.graphs():
        taken: set[str] | None = None
        for node in list(graph):
            uses = list(_moved(node)) if _is_of_int8(node) else []
            if uses:
                taken = edit.names_in(model.graph) if taken is None else taken
                written = _written(node, taken)
                for reader, index in uses:
                    reader.replace_input_with(index, written)
                edit.remove_dead(graph, [node])


def _is_of_int8(node: ir.Node) -> bool:
    if node.op_type != "DequantizeLinear" or node.domain or len(node.inputs) < 3:
        return False
    codes, _, zero = node.inputs
    constant = edit.const_array(zero)
    return (
        codes is not None
        and codes.const_value is None  # a weight: its optimizer leaves that alone
        and constant is not None
        and constant.size == 1
        and zero is not None
        and zero.dtype == ir.DataType.INT8
        and node.outputs[0].dtype == ir.DataType.FLOAT
    )


def _moved(node: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """Where the floats are moved and nothing behind makes codes of them again."""
    for reader, index in node.outputs[0].uses():
        if reader.op_type not in _MOVES or reader.domain or index:
            continue
        if all(behind.op_type != "QuantizeLinear" for behind, _ in reader.outputs[0].uses()):
            yield reader, index


def _written(node: ir.Node, taken: set[str]) -> ir.Value:
    graph, floats = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    codes, scale, zero = node.inputs
    numbers = edit.const_array(zero)
    assert codes is not None and zero is not None and numbers is not None
    shift = edit.constant(graph, numbers.astype(np.float32), f"{zero.name}_float", taken)
    value = codes
    for op, by in (("Cast", None), ("Sub", shift), ("Mul", scale)):
        made = edit.node(
            op,
            [value] if by is None else [value, by],
            {"to": ir.DataType.FLOAT.value} if by is None else {},
            name=edit.unique_name(graph, f"{floats.name}_{op.lower()}", taken),
            dtype=ir.DataType.FLOAT,
            shape=codes.shape,
            like=node,
        )
        graph.insert_before(node, made)
        value = made.outputs[0]
    return value
