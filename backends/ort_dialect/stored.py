"""Quantized weights as a graph in standard ONNX has them, and packed as ONNX Runtime's operators want them.

A weight is a matrix of N outputs and K elements summed over, whichever way round it lies. Packed it is
``uint8[N, ceil(K / block), block * bits / 8]``, the first code in the lowest bits; a signed code c is kept as
c + 2^(bits - 1). Blocks are 16, 32, 64, 128 or 256 elements long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, weights

Array = npt.NDArray[Any]

CREATED_BY = "onnx-ort"
_BITS = {
    ir.DataType.INT2: 2,
    ir.DataType.UINT2: 2,
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
}
_SIGNED = frozenset({ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8})
_SMALLEST, _LARGEST = 16, 256
_WHOLE = 128  # the block where one scale is for a whole row: any would do


@dataclass(frozen=True)
class Use:
    """A node that reads the weight as a float matrix; ``transposed`` if a Transpose stands between."""

    node: ir.Node
    position: int
    transposed: bool


@dataclass(frozen=True)
class Weight:
    """A constant behind a DequantizeLinear, and what reads it."""

    node: ir.Node  # DequantizeLinear
    uses: tuple[Use, ...]
    problem: str  # why it has no packed form whatever reads it; empty if it has one

    @property
    def name(self) -> str:
        """The name of the float weight."""
        return self.node.outputs[0].name or ""

    @property
    def codes(self) -> ir.Value:
        """What is dequantized."""
        assert self.node.inputs[0] is not None
        return self.node.inputs[0]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        assert self.codes.dtype is not None
        return _BITS[self.codes.dtype]

    @property
    def offset(self) -> int:
        """What makes a code unsigned."""
        return 1 << (self.bits - 1) if self.codes.dtype in _SIGNED else 0

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims of the codes."""
        assert self.codes.const_value is not None
        return tuple(self.codes.const_value.shape.numpy())

    @property
    def summed(self) -> int:
        """The axis of the codes that all products sum over; of a table that is only looked up the last."""
        (axis,) = {axis_of(use) for use in self.uses}
        return axis

    @property
    def group(self) -> int:
        """How many elements along the summed axis share a scale."""
        block = self.node.attributes.get_int("block_size", 0)
        return block or self.dims[self.summed]

    @property
    def block(self) -> int:
        """The block that is written: a power of two from 16 to 256."""
        if self.group == self.dims[self.summed]:
            whole = 1 << (max(self.group, _SMALLEST) - 1).bit_length()
            return min(whole, _WHOLE)
        return min(self.group & -self.group, _LARGEST)


def axis_of(use: Use) -> int:
    """The axis of the codes that a product sums over, or that lies along a row of a table."""
    if use.node.op_type == "Gather":
        return 1
    return 1 if use.transposed else 0


def find(graph: ir.Graph) -> Iterator[Weight]:
    """Every dequantized constant of the main graph, in order."""
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and not node.domain:
            if weights.is_weight(node.inputs[0]):
                uses = tuple(_uses(node.outputs[0]))
                yield Weight(node, uses, _problem(node, uses))
            elif _is_unpacked(node.inputs[0]):
                why = "its codes are bit planes, which ONNX Runtime takes apart and fuses by itself"
                yield Weight(node, (), why)


def _uses(value: ir.Value, transposed: bool = False) -> Iterator[Use]:
    for node, position in value.uses():
        turned = node.op_type == "Transpose" and not node.domain and not transposed
        if turned and list(node.attributes.get_ints("perm") or ()) == [1, 0]:
            yield from _uses(node.outputs[0], True)
        else:
            yield Use(node, position, transposed)
    if value.is_graph_output():
        raise ValueError(f"{value.name} is an output")  # not of a constant in normal form


def _is_unpacked(value: ir.Value | None) -> bool:
    """Whether codes are made of constants alone, by bit operations."""
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type == "BitwiseOr":
            return True
        value = maker.inputs[0]
    return False


def _problem(node: ir.Node, uses: tuple[Use, ...]) -> str:
    codes, scale, zero = (*node.inputs, None)[:3]
    assert codes is not None and codes.const_value is not None and codes.dtype is not None
    if codes.dtype not in _BITS:
        return f"{codes.dtype.name.lower()} codes: only integers of 2, 4 and 8 bits are packed"
    if node.outputs[0].dtype != ir.DataType.FLOAT:
        return "it is not read as float32"
    if len(codes.const_value.shape) != 2:
        return f"{len(codes.const_value.shape)} dims: only matrices are packed"
    if constant(scale) is None or (zero is not None and constant(zero) is None):
        return "its scales are no constants"
    for use in uses:
        if use.node.op_type == "Cast":
            return "its codes are places in a table: only multiples of a scale are packed"
        if _kind(use) is None:
            return f"read by {use.node.op_type} {use.node.outputs[0].name} as well"
    axes = {axis_of(use) for use in uses}
    if len(axes) > 1:
        return "its readers sum over different axes"
    if not axes:
        return "nothing reads it"
    (summed,) = axes
    block = node.attributes.get_int("block_size", 0)
    axis = node.attributes.get_int("axis", 1) % 2
    assert scale is not None and scale.shape is not None
    is_single = math.prod(scale.shape.numpy()) == 1
    if block and axis != summed:
        return "its groups do not run along what is summed over"
    if not block and not is_single and axis == summed:
        return "its scales belong to what is summed over"
    if block and min(block & -block, _LARGEST) < _SMALLEST:
        return f"groups of {block} are no multiple of {_SMALLEST}"
    return ""


def _kind(use: Use) -> str | None:
    node = use.node
    if node.domain:
        return None
    if node.op_type == "MatMul" and use.position == 1:
        return "product"
    if node.op_type == "Gather" and use.position == 0 and not use.transposed:
        return "lookup" if node.attributes.get_int("axis", 0) == 0 else None
    return None


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """A constant, or the one that a Cast widens."""
    if value is None:
        return None
    maker = value.producer()
    if maker is not None and maker.op_type == "Cast" and not maker.domain:
        value = maker.inputs[0]
    return value.const_value if value is not None and weights.is_weight(value) else None


# -- packed -----------------------------------------------------------------------------------------


class Packed:
    """The constants of one weight for ONNX Runtime's operators, made once and shared."""

    def __init__(self, graph: ir.Graph, weight: Weight, taken: set[str]) -> None:
        self.graph, self.weight, self._taken = graph, weight, taken
        self.rows, self.length = weight.dims[1 - weight.summed], weight.dims[weight.summed]
        self.blocks = -(-self.length // weight.block)
        tensor = weight.codes.const_value
        assert tensor is not None
        bits, block, summed, offset = weight.bits, weight.block, weight.summed, weight.offset
        shape = (self.rows, self.blocks, block * bits // 8)
        name = weight.codes.name or "codes"
        made = weights.derived(
            tensor,
            lambda array: pack(array, summed, bits, block, offset),
            ir.DataType.UINT8,
            shape,
            name,
        )
        self.codes = self._constant(made, f"{name}_packed")
        self.nodes: list[ir.Node] = []  # in front of whatever reads the weight
        self.scales = self._scales()
        self.zeros = self._zeros()
        weight.node.graph.insert_before(weight.node, self.nodes)  # type: ignore[union-attr]

    @property
    def name(self) -> str:
        """The name of the float weight."""
        return self.weight.name

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        name: str,
        dims: tuple[int, ...],
        **attributes: Any,
    ) -> ir.Node:
        """A node of the main graph; its output gets a free name, ``dims``, and its type of its first input.

        That of a Cast is float32.
        """
        free = edit.unique_name(self.graph, name, self._taken)
        first = inputs[0]
        assert first is not None
        return edit.node(
            op_type,
            inputs,
            attributes,
            name=free,
            dtype=ir.DataType.FLOAT if op_type == "Cast" else first.dtype,
            shape=ir.Shape(dims),
            like=self.weight.node,
            created_by=CREATED_BY,
        )

    def constant(self, array: Array, name: str) -> ir.Value:
        """A new initializer."""
        return self._constant(array, name)

    def _constant(self, array: Array | ir.TensorProtocol, name: str) -> ir.Value:
        return edit.constant(self.graph, array, name, self._taken)

    def _add(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        name: str,
        dims: tuple[int, ...],
        **attrs: Any,
    ) -> ir.Value:
        self.nodes.append(self.node(op_type, inputs, name, dims, **attrs))
        return self.nodes[-1].outputs[0]

    def _scales(self) -> ir.Value:
        """float32[N, blocks], widened and repeated by nodes that ONNX Runtime folds away when it loads."""
        tensor = constant(self.weight.node.inputs[1])
        assert tensor is not None
        summed, name = self.weight.summed, f"{self.name}_scales"
        per_row = self.weight.group != self.length
        columns = self.blocks if per_row else 1
        rows = self.rows if tensor.size > 1 else 1
        repeats = self.weight.group // self.weight.block if per_row else 1
        made = weights.derived(
            tensor,
            lambda array: by_row(array, summed, rows, repeats),
            tensor.dtype,
            (rows, columns),
            name,
        )
        scales = self._constant(made, name)
        if tensor.dtype != ir.DataType.FLOAT:
            to = ir.DataType.FLOAT.value
            wide: dict[str, Any] = {"to": to, "saturate": 1, "round_mode": "up"}
            scales = self._add("Cast", [scales], f"{name}_wide", (rows, columns), **wide)
        if (rows, columns) != (self.rows, self.blocks):
            shape = self.constant(np.array([self.rows, self.blocks], np.int64), f"{name}_shape")
            every = (self.rows, self.blocks)
            scales = self._add("Expand", [scales, shape], f"{name}_all", every)
        return scales

    def _zeros(self) -> ir.Value | None:
        """uint8[N, ceil(blocks * bits / 8)], packed like codes; None where they are the default."""
        bits, offset = self.weight.bits, self.weight.offset
        node = self.weight.node
        tensor = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if tensor is None and offset:
            return None
        shape = (self.rows, -(-self.blocks * bits // 8))
        if tensor is None:
            return self.constant(np.zeros(shape, np.uint8), f"{self.name}_zero_points")
        rows = self.rows if tensor.size > 1 else 1
        summed = self.weight.summed
        per_row = self.weight.group != self.length
        repeats = self.weight.group // self.weight.block if per_row else self.blocks

        def make(array: Array) -> Array:
            found = by_row(array.astype(np.int16) + offset, summed, rows, repeats)
            found = np.broadcast_to(found, (self.rows, self.blocks)).astype(np.uint8)
            padded = np.pad(found, ((0, 0), (0, -self.blocks % (8 // bits))))
            return _in_bytes(padded, bits)

        name = f"{self.name}_zero_points"
        return self._constant(weights.derived(tensor, make, ir.DataType.UINT8, shape, name), name)


def by_row(array: Array, summed: int, rows: int, repeats: int) -> Array:
    """Scales or zero points as ``[rows, blocks]``, each ``repeats`` times."""
    matrix = array.T if array.ndim == 2 and summed == 0 else array
    return np.ascontiguousarray(np.repeat(matrix.reshape(rows, -1), repeats, axis=1))


def pack(array: Array, summed: int, bits: int, block: int, offset: int) -> Array:
    """Codes of a matrix, plus ``offset``: uint8 ``[N, blocks, block * bits / 8]``, the end filled up."""
    matrix = array.T if summed == 0 else array
    codes = (matrix.astype(np.int16) + offset).astype(np.uint8)
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % block)), constant_values=offset)
    return _in_bytes(padded.reshape(len(padded), -1, block), bits)


def _in_bytes(codes: Array, bits: int) -> Array:
    """The last axis in bytes, the first code in the lowest bits."""
    count = 8 // bits
    made = np.zeros((*codes.shape[:-1], codes.shape[-1] // count), np.uint8)
    for i in range(count):
        made |= codes[..., i::count] << np.uint8(i * bits)
    return made
