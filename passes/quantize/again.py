"""Quantizes what is quantized: weights that are made of codes become floats first."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import edit, fold, types, weights


def to_floats(model: ir.Model) -> None:
    """Put an initializer of the same numbers in the place of every matrix that is made of constants alone.

    In normal form these are the weights that are stored as codes. Rows that are looked up as codes, and
    products in integers, stay.
    """
    made: set[ir.Value] = set()
    matrices: list[ir.Value] = []
    for node in model.graph:
        read = [value for value in node.inputs if value is not None]
        if not read or not all(value in made or weights.is_weight(value) for value in read):
            matrices += [value for value in read if value in made and _is_matrix(value)]
            continue
        made.update(node.outputs)
    for value in dict.fromkeys(matrices):
        array = fold.evaluate(value)
        if array is None or value.is_graph_output():
            continue
        name, maker = value.name or "", value.producer()
        value.name = None
        held = edit.constant(model.graph, array, name)
        edit.redirect(value, held)
        assert maker is not None
        edit.remove_dead(model.graph, [maker])
    types.annotate(model)


def _is_matrix(value: ir.Value) -> bool:
    floating = value.dtype is not None and value.dtype.is_floating_point()
    return floating and value.shape is not None and len(value.shape) > 1
