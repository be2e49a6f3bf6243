"""Legal nodes in forms that the optimizer of ONNX Runtime 1.32 makes no illegal ones of.

AveragePool of codes becomes QLinearAveragePool, which has no dilations: those of 1 go, as the default, and
where there are others, the floats that it reads are made as below.

Gathers that pick all positions of a dim become a Split, each with a new constant of one name, and the
second of them is an error: they are written as Slice and Squeeze.

It pulls a DequantizeLinear over a move, with a QuantizeLinear for every step. From opset 21 on,
it states the type of the codes there twice, then has int8 become uint8 in one of the two places, and rejects
its own graph. So where floats are moved, they are made as

    y = (Cast(codes) - zero_point) * scale

which has the same bits. What reads the DequantizeLinear otherwise goes on doing so, and where codes are made
again behind the move, nothing changes: there its optimizer is right, and leaves no float at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    for graph in model.graphs():
        _split_picks(graph)
    _write_out(model, _dilated)
    if opset >= _FIRST_OPSET:
        _write_out(model, _moved)


def _split_picks(graph: ir.Graph) -> None:
    """Write Slice and Squeeze for Gathers that pick all positions of a dim, as of q, k and v in one."""
    for value in [value for node in graph for value in node.outputs]:
        picks = {at: reader for reader, _ in value.uses() if (at := _picked(reader)) is not None}
        axes, places = {axis for axis, _ in picks}, sorted(place for _, place in picks)
        if len(picks) < 2 or len(picks) != len(value.uses()) or len(axes) != 1:
            continue
        (axis,) = axes
        # In float16 ONNX Runtime does not survive what comes of it: the error it has without is better.
        if value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE) or value.shape is None:
            continue
        if value.shape[axis] != len(picks):
            continue
        taken = edit.names_in(graph)
        along, one = np.array([axis]), np.array([1])
        for place in places:
            old = picks[axis, place].outputs[0]
            numbers = [np.array([place]), np.array([place + 1]), along, one]
            listed = [edit.constant(graph, n, f"{old.name}_slice", taken) for n in numbers]
            part = edit.node(
                "Slice",
                [value, *listed],
                name=edit.unique_name(graph, f"{old.name}_part", taken),
                dtype=value.dtype,
                shape=ir.Shape([1 if d == axis else n for d, n in enumerate(value.shape)]),
            )
            made = edit.node("Squeeze", [part.outputs[0], listed[2]])
            edit.replace(picks[axis, place], [part, made], {old: made.outputs[0]}, "onnx")


def _picked(node: ir.Node) -> tuple[int, int] | None:
    """The axis and the one position that a Gather picks; None of anything else."""
    if node.op_type != "Gather" or node.domain:
        return None
    data, index = node.inputs[0], edit.const_array(node.inputs[1])
    if data is None or data.shape is None or index is None or index.ndim:
        return None
    axis = node.attributes.get_int("axis", 0) % len(data.shape)
    size = data.shape[axis]
    return (axis, int(index) % size) if isinstance(size, int) else None


def _write_out(
    model: ir.Model, readers: Callable[[ir.Node], Iterator[tuple[ir.Node, int]]]
) -> None:
    """Write out, for ``readers``, each DequantizeLinear of computed codes with one constant zero point."""
    for graph in model.graphs():
        taken: set[str] | None = None
        for node in list(graph):
            uses = list(readers(node)) if _is_of_codes(node) else []
            if uses:
                taken = edit.names_in(model.graph) if taken is None else taken
                written = _written(node, taken)
                for reader, index in uses:
                    reader.replace_input_with(index, written)
                edit.remove_dead(graph, [node])


def _is_of_codes(node: ir.Node) -> bool:
    if node.op_type != "DequantizeLinear" or node.domain or len(node.inputs) < 3:
        return False
    codes, _, zero = node.inputs
    constant = edit.const_array(zero)
    return (
        codes is not None
        and codes.const_value is None  # a weight: its optimizer leaves that alone
        and constant is not None
        and constant.size == 1
        and node.outputs[0].dtype == ir.DataType.FLOAT
    )


def _dilated(node: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """Where floats are averaged over pixels that lie apart."""
    for reader, index in node.outputs[0].uses():
        if reader.op_type == "AveragePool" and not reader.domain:
            if set(reader.attributes.get_ints("dilations", ())) - {1}:
                yield reader, index


def _moved(node: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """Where the floats of int8 are moved and nothing behind makes codes of them again."""
    zero = node.inputs[2]
    if zero is None or zero.dtype != ir.DataType.INT8:
        return
    for reader, index in node.outputs[0].uses():
        if not _moves(reader, index):
            continue
        behind = [use.node for use in reader.outputs[0].uses()]
        again = any(n.op_type == "QuantizeLinear" for n in behind)
        if not again and not _becomes_codes(reader.outputs[0]):
            yield reader, index


def _moves(reader: ir.Node, index: int) -> bool:
    return reader.op_type in _MOVES and not reader.domain and not index


def _becomes_codes(value: ir.Value) -> bool:
    """Whether all that becomes of ``value`` is moved on, by one step or several, and made codes again."""
    uses = value.uses()
    return (
        bool(uses)
        and not value.is_graph_output()
        and all(
            reader.op_type == "QuantizeLinear"
            or (_moves(reader, index) and _becomes_codes(reader.outputs[0]))
            for reader, index in uses
        )
    )


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
