"""Which output of a model answers what the next token is, and which input has the tokens."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from netlathe.analysis.products import is_lookup
from netlathe.ir import dims, types, weights


def next_token(model: ir.Model) -> tuple[ir.Value, ir.Value] | None:
    """The logits and the ids of a language model; None where the graph is none.

    Ids are an integer input ``[b, t]`` that is looked up in a table of v rows; logits are a floating-point
    output ``[b, t, v]`` of the same b and t.
    """
    found = types.infer(model)
    for output in model.graph.outputs:
        type_ = found.type(output)
        if type_.dtype is None or not type_.dtype.is_floating_point() or type_.shape is None:
            continue
        for ids, rows in _looked_up(model):
            read = found.type(ids).shape
            if read is None or len(read) != 2 or len(type_.shape) != 3 or type_.shape[2] != rows:
                continue
            if all(dims.same(a, b) for a, b in zip(type_.shape[:2], read, strict=True)):
                return output, ids
    return None


def _looked_up(model: ir.Model) -> Iterator[tuple[ir.Value, int]]:
    """Integer inputs that are looked up in a table, and how many rows it has."""
    for node in model.graph:
        table = node.inputs[0] if node.inputs else None
        if table is None or not is_lookup(node, 0) or not weights.is_weight(table):
            continue
        ids = node.inputs[1]
        while ids is not None and (maker := ids.producer()) is not None and maker.inputs:
            ids = maker.inputs[0]  # a cast, or a dim put in for GatherND
        rows = None if table.shape is None else table.shape[0]
        if ids is not None and ids.is_graph_input() and isinstance(rows, int):
            yield ids, rows
