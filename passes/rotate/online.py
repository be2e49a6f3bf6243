"""A Hadamard transform in the graph, in front of products whose input nothing else turns.

    y = x W   ->   y = (x H) (H' W)        H = kron(A, B) / sqrt(d), of +1 and -1

    x: [.., d] -> Reshape [.., a, b] -> MatMul B -> MatMul A' from the left -> Reshape [.., d]

which costs d (a + b) multiplications a row instead of d^2. The signs are kept in 8 bits, behind a Cast, so
that nothing takes them for weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import linear
from netlathe.analysis.linear import Array
from netlathe.ir import edit, provenance
from netlathe.passes.rotate.hadamard import factors, hadamard

CREATED_BY = "rotate"


@dataclass(frozen=True)
class Site:
    """A value that products read along its last dim, and their weights."""

    x: ir.Value
    layers: tuple[linear.Weight, ...]
    orders: tuple[int, int]

    @property
    def width(self) -> int:
        """Its channels."""
        return math.prod(self.orders)


def site(x: ir.Value, readers: Sequence[ir.Node]) -> Site | str:
    """What is to be done in front of the products ``readers`` of ``x``, or why it cannot be."""
    last = len(x.shape or ()) - 1
    width = x.shape[last] if x.shape is not None and last >= 0 else None
    if not isinstance(width, int):
        return f"the width of {x.name} is not known"
    orders = factors(width)
    if orders is None:
        return f"no Hadamard matrix is known of which {width} positions could be turned"
    layers = []
    for node in readers:
        weight = linear.contraction(node, 0, last)
        if weight is None or weight.group > 1 or node.op_type != "MatMul":
            return f"{node.op_type} {node.outputs[0].name} is no product with one matrix"
        if not weight.is_alone and not weight.is_transposed_only:
            return f"{weight.other_reader()} reads {weight.value.name} too"
        layers.append(weight)
    if len({layer.value for layer in layers}) < len(layers):
        return "two products read one weight"
    return Site(x, tuple(layers), orders)


def turn(graph: ir.Graph, at: Site, taken: set[str]) -> None:
    """Put the transform in front of the products of a site, and undo it in their weights."""
    x, (a, b) = at.x, at.orders
    dims, dtype = list(x.shape or ()), x.dtype
    assert dtype is not None
    stem, first = x.name or "x", at.layers[0].node

    def add(op: str, inputs: Sequence[ir.Value], shape: Sequence[object], part: str) -> ir.Value:
        made = edit.node(
            op,
            inputs,
            {"allowzero": 0} if op == "Reshape" else {},
            name=edit.unique_name(graph, f"{stem}_{part}", taken),
            dtype=dtype,
            shape=ir.Shape(shape),  # type: ignore[arg-type]  # dims as they come from a shape
            like=first,
            created_by=CREATED_BY,
        )
        nodes.append(made)
        return made.outputs[0]

    def signs(order: int, part: str, *, transposed: bool = False) -> ir.Value:
        held = hadamard(order)
        assert held is not None  # factors() saw to it
        array = np.ascontiguousarray(held.T if transposed else held)
        stored = edit.constant(graph, array, f"{stem}_{part}", taken)
        cast = edit.node(
            "Cast",
            [stored],
            {"to": int(dtype), "saturate": 1, "round_mode": "up"},
            name=edit.unique_name(graph, f"{stem}_{part}_wide", taken),
            dtype=dtype,
            shape=ir.Shape([order, order]),
            like=first,
            created_by=CREATED_BY,
        )
        cast.metadata_props[provenance.STORED] = "int8"
        nodes.append(cast)
        return cast.outputs[0]

    def sizes(last: Sequence[int], part: str) -> ir.Value:
        array = np.array([0] * (len(dims) - 1) + list(last), np.int64)
        return edit.constant(graph, array, f"{stem}_{part}", taken)

    nodes: list[ir.Node] = []
    by = np.array(1 / math.sqrt(at.width), dtype.numpy())
    scale = edit.constant(graph, by, f"{stem}_turned_by", taken)
    value = add("Mul", [x, scale], dims, "unit")
    if a == 1:
        value = add("MatMul", [value, signs(b, "signs")], dims, "turned")
    else:
        split = [*dims[:-1], a, b]
        value = add("Reshape", [value, sizes([a, b], "split")], split, "matrix")
        value = add("MatMul", [value, signs(b, "signs")], split, "rows")
        value = add("MatMul", [signs(a, "signs_left", transposed=True), value], split, "columns")
        value = add("Reshape", [value, sizes([a * b], "whole")], dims, "turned")
    maker = x.producer()
    if maker is not None:
        graph.insert_after(maker, nodes)
    else:
        graph.insert_before(graph[0], nodes)
    matrix = kron(at)
    for layer in at.layers:
        layer.node.replace_input_with(0, value)

        def undo(array: Array, axis: int) -> Array:
            return np.moveaxis(np.tensordot(matrix, array, axes=(0, axis)), 0, axis)

        linear.change(graph, layer, undo, f"{layer.value.name}_turned", taken)


def kron(at: Site) -> npt.NDArray[np.float64]:
    """The orthogonal matrix of a site: a row x becomes x times it."""
    left, right = (hadamard(order) for order in at.orders)
    assert left is not None and right is not None
    return np.asarray(np.kron(left.astype(np.float64), right) / math.sqrt(at.width))
