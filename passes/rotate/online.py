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
from typing import Any

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


class Transforms:
    """Puts transforms into a graph; those of one order share their signs."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._taken = graph, edit.names_in(graph)
        self._signs: dict[tuple[int, bool, ir.DataType], ir.Value] = {}

    def add(self, at: Site) -> None:
        """Put one in front of the products of a site, and undo it in their weights."""
        value = self._turned(at)
        matrix = kron(at)
        for layer in at.layers:
            layer.node.replace_input_with(0, value)

            def undo(array: Array, axis: int) -> Array:
                return np.moveaxis(np.tensordot(matrix, array, axes=(0, axis)), 0, axis)

            linear.change(self._graph, layer, undo, f"{layer.value.name}_turned", self._taken)

    def _turned(self, at: Site) -> ir.Value:
        x, (a, b) = at.x, at.orders
        dims, dtype = list(x.shape or ()), x.dtype
        assert dtype is not None
        nodes: list[ir.Node] = []

        def node(op: str, inputs: Sequence[ir.Value], shape: Sequence[Any], part: str) -> ir.Value:
            made = edit.node(
                op,
                inputs,
                {"allowzero": 0} if op == "Reshape" else {},
                name=edit.unique_name(self._graph, f"{x.name}_{part}", self._taken),
                dtype=dtype,
                shape=ir.Shape(shape),
                like=at.layers[0].node,
                created_by=CREATED_BY,
            )
            nodes.append(made)
            return made.outputs[0]

        def constant(array: npt.NDArray[Any], part: str) -> ir.Value:
            return edit.constant(self._graph, array, f"{x.name}_{part}", self._taken)

        same = [0] * (len(dims) - 1)  # a Reshape copies these dims
        by = constant(np.array(1 / math.sqrt(at.width), dtype.numpy()), "turned_by")
        value = node("Mul", [x, by], dims, "unit")
        if a == 1:
            value = node("MatMul", [value, self._held(b, dtype)], dims, "turned")
        else:
            split = [*dims[:-1], a, b]
            sizes = constant(np.array([*same, a, b], np.int64), "split")
            value = node("Reshape", [value, sizes], split, "matrix")
            value = node("MatMul", [value, self._held(b, dtype)], split, "rows")
            left = self._held(a, dtype, transposed=True)
            value = node("MatMul", [left, value], split, "columns")
            sizes = constant(np.array([*same, a * b], np.int64), "whole")
            value = node("Reshape", [value, sizes], dims, "turned")
        maker = x.producer()
        if maker is not None:
            self._graph.insert_after(maker, nodes)
        else:
            self._graph.insert_before(at.layers[0].node, nodes)
        return value

    def _held(self, order: int, dtype: ir.DataType, *, transposed: bool = False) -> ir.Value:
        """The signs of an order as numbers of a type; the Cast stands at the head of the graph."""
        signs = hadamard(order)
        assert signs is not None  # factors() saw to it
        key = order, transposed and not np.array_equal(signs, signs.T), dtype
        if key not in self._signs:
            array = np.ascontiguousarray(signs.T) if key[1] else signs
            name = f"hadamard_{order}{'_transposed' if key[1] else ''}"
            stored = edit.constant(self._graph, array, f"{name}_signs", self._taken)
            cast = edit.node(
                "Cast",
                [stored],
                {"to": int(dtype), "saturate": 1, "round_mode": "up"},
                name=edit.unique_name(self._graph, name, self._taken),
                dtype=dtype,
                shape=ir.Shape([order, order]),
                created_by=CREATED_BY,
            )
            cast.metadata_props[provenance.STORED] = "int8"
            self._graph.insert_before(self._graph[0], cast)
            self._signs[key] = cast.outputs[0]
        return self._signs[key]


def kron(at: Site) -> npt.NDArray[np.float64]:
    """The orthogonal matrix of a site: a row x becomes x times it."""
    left, right = (hadamard(order) for order in at.orders)
    assert left is not None and right is not None
    return np.asarray(np.kron(left.astype(np.float64), right) / math.sqrt(at.width), np.float64)
