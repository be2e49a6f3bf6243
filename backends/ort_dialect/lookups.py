"""Lookups in a packed table: GatherBlockQuantized, which dequantizes the rows it takes and no others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import edit

from .stored import CREATED_BY, Packed, Weight


def problem(weight: Weight) -> str:
    """Why a lookup in ``weight`` is not written; empty if all are."""
    if not any(use.node.op_type == "Gather" for use in weight.uses):
        return ""
    if weight.dims[1] % weight.block:
        return f"rows of {weight.dims[1]} are no whole blocks of {weight.block}"
    if weight.bits == 8:
        return "rows of 8 bits are looked up as they are"
    return ""


def write(packed: Packed) -> list[ir.Node]:
    """Put GatherBlockQuantized in the place of every Gather from the weight."""
    lookups = [use.node for use in packed.weight.uses if use.node.op_type == "Gather"]
    if not lookups:
        return []
    width = packed.length * packed.weight.bits // 8
    shape = packed.constant(np.array([packed.rows, width], np.int64), f"{packed.name}_table_shape")
    table = packed.node(
        "Reshape", [packed.codes, shape], f"{packed.name}_table", (packed.rows, width), allowzero=0
    )
    home = packed.weight.node.graph
    assert isinstance(home, ir.Graph)
    home.insert_before(packed.weight.node, table)
    return [_write(packed, lookup, table.outputs[0]) for lookup in lookups]


def _write(packed: Packed, lookup: ir.Node, table: ir.Value) -> ir.Node:
    inputs = [table, lookup.inputs[1], packed.scales]
    if packed.zeros is not None:
        inputs.append(packed.zeros)
    made = ir.node(
        "GatherBlockQuantized",
        inputs,
        {
            "bits": packed.weight.bits,
            "block_size": packed.weight.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        },
        domain="com.microsoft",
    )
    output = lookup.outputs[0]
    made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
    made.outputs[0].name = f"{output.name}_rows"
    edit.replace(lookup, [made], {output: made.outputs[0]}, CREATED_BY)
    return made
