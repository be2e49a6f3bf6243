"""What an axis signature says about one node, and what it may look at to say so."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

import onnx_ir as ir

from netlathe.analysis.axes.algebra import Size
from netlathe.ir import edit, types
from netlathe.ir.dims import Dim, Shape

# Where a size stands in a node: an attribute, or (input, element) of an operand that lists sizes.
Spot: TypeAlias = str | tuple[int, int]


@dataclass(frozen=True)
class Signature:
    """How the axes of a node's operands relate, and what may be done to them.

    ``rule``        the relation, in the notation of :mod:`netlathe.analysis.axes.pattern`
    ``uses``        attributes and literals that are the size of an axis: ``{"group": "g"}``
    ``sizes``       letters whose size the operator knows: ``{"r": 2}``
    ``lists``       operands that list positions of an axis, in the order of another one:
                    ``{1: ("n", "m")}``; of a scalar the order is ``1``
    ``fixed``       letters that no edit may touch, with the reason: ``{"s t": "slides a window"}``
    ``ordered``     letters whose order matters: positions may go, but not move
    ``least``       letters that need some number of positions: ``{"n": 2}``
    ``apart``       letters of which no deletion may take positions together with some of others:
                    ``{"g": "i o"}``
    ``normalizes``  letters along which input 0 is divided by its norm or deviation: the scale
                    (input 1) and the epsilon belong to their number of positions
    ``linear``      the outputs as sums of products of inputs, ``0*1 + 2`` for a convolution; inputs
                    not named act on each position by itself; empty: nothing is linear
    ``inner``       a product that is summed up inside the operator, ``0*1`` for attention's scores
    ``positive``    ``linear`` holds for positive factors per position only, as for Relu
    ``turns``       letters along which the operator commutes with rotations if input 1 is uniform
    ``moves``       elements of the linear inputs come out unchanged: positions stay positions
    ``makes``       outputs that hold positions of an axis: ``{1: "n"}`` for TopK
    ``reads``       inputs that hold positions of an axis: ``{1: "n"}`` for Gather
    """

    rule: str
    sizes: Mapping[str, Size] = field(default_factory=dict)
    uses: Mapping[Spot, str] = field(default_factory=dict)
    lists: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    ordered: Mapping[str, str] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    normalizes: str = ""
    linear: str = ""
    inner: str = ""
    positive: bool = False
    turns: str = ""
    moves: bool = False
    makes: Mapping[int, str] = field(default_factory=dict)
    reads: Mapping[int, str] = field(default_factory=dict)


class NoSignature(Exception):
    """The node is beyond what its operator's signature covers; the message completes "X ..."."""


Contents: TypeAlias = Callable[[ir.Value], Sequence[Dim] | None]


class Site:
    """One node as its signature sees it: recorded shapes, attributes, constant operands.

    ``contents`` tells the elements of a computed list of sizes, as far as they are known.
    """

    __slots__ = ("contents", "node")

    def __init__(self, node: ir.Node, contents: Contents = lambda value: None) -> None:
        self.node = node
        self.contents = contents

    def has(self, index: int) -> bool:
        """Whether the (optional) input is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def shape(self, index: int = 0) -> Shape:
        """Shape of an input that must be there and typed."""
        return self._shape(self.node.inputs[index] if self.has(index) else None)

    def rank(self, index: int = 0) -> int:
        """Number of dims of an input."""
        return len(self.shape(index))

    def out(self, index: int = 0) -> Shape:
        """Shape of an output."""
        return self._shape(self.node.outputs[index])

    def dtype(self, index: int = 0) -> ir.DataType | None:
        """dtype of an input."""
        value = self.node.inputs[index] if self.has(index) else None
        return None if value is None else value.dtype

    def read(self, output: int) -> bool:
        """Whether anybody reads the output."""
        if output >= len(self.node.outputs):
            return False
        value = self.node.outputs[output]
        return bool(value.uses()) or value.is_graph_output()

    def ints(self, index: int) -> tuple[int, ...] | None:
        """The elements of a constant integer input, flat."""
        array = edit.const_array(self.node.inputs[index] if self.has(index) else None)
        return None if array is None else tuple(int(item) for item in array.reshape(-1))

    def element(self, index: int, element: int) -> int | None:
        """An element of a list of sizes where that is one number, stated or computed."""
        value = self.node.inputs[index]
        if value is None:
            return None
        source = origin(value, element)
        if isinstance(source, Stated):
            return source.number
        known = self.contents(value)
        item = known[element] if known is not None and element < len(known) else None
        return item if isinstance(item, int) else None

    def number(self, index: int) -> float | None:
        """The element of a constant input that has just one."""
        array = edit.const_array(self.node.inputs[index] if self.has(index) else None)
        return None if array is None or array.size != 1 else float(array.reshape(-1)[0])

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        return self.node.attributes.get_int(name, default)

    def integers(self, name: str) -> Sequence[int] | None:
        """An integer list attribute."""
        return self.node.attributes.get_ints(name)

    def text(self, name: str, default: str = "") -> str:
        """A string attribute."""
        return self.node.attributes.get_string(name, default)

    def axis(self, default: int = 0, name: str = "axis") -> int:
        """An axis attribute of input 0, counted from the front."""
        axis = self.integer(name, default)
        return axis + self.rank() if axis < 0 else axis

    def refuse(self, reason: str) -> NoReturn:
        """Say that the signature does not cover this node: what it touches is pinned."""
        raise NoSignature(reason)

    def _shape(self, value: ir.Value | None) -> Shape:
        shape = None if value is None else types.recorded(value).shape
        if shape is None or None in shape:
            name = "" if value is None else value.name
            self.refuse(f"has an operand {name} of unknown shape")
        return shape


Maker: TypeAlias = Callable[[Site], Signature]
Table: TypeAlias = Mapping[str, Signature | Maker]


def named(stem: str, count: int, start: int = 0) -> list[str]:
    """Letters ``d0 d1 d2``: one per dim of an operand whose rank is known."""
    return [f"{stem}{index}" for index in range(start, start + count)]


# -- where the numbers in a list of sizes come from ----------------------------------------------------


@dataclass(frozen=True)
class Stated:
    """An element of a constant, reached through the operands that lead to it."""

    value: ir.Value
    element: int

    @property
    def number(self) -> int:
        """The number that stands there."""
        array = edit.const_array(self.value)
        assert array is not None
        return int(array.reshape(-1)[self.element])


@dataclass(frozen=True)
class SizeOf:
    """A dim of a value, read by Shape."""

    value: ir.Value
    dim: int


def origin(value: ir.Value, element: int) -> Stated | SizeOf | None:
    """Where an element of a list of sizes comes from, through Concat and what keeps elements."""
    while True:
        if value.const_value is not None and not value.is_graph_input():
            return Stated(value, element)
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs:
            return None
        source = node.inputs[0]
        if node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
            assert source is not None
            value = source
        elif node.op_type == "Concat":
            for part in node.inputs:
                assert part is not None
                count = part.shape[0] if part.shape is not None and len(part.shape) == 1 else None
                if not isinstance(count, int):
                    return None
                if element < count:
                    value = part
                    break
                element -= count
            else:
                return None
        elif node.op_type in ("Gather", "Slice"):
            assert source is not None
            at = taken(node, element)
            if at is None:
                return None
            value, element = source, at
        elif node.op_type == "Shape":
            assert source is not None
            return SizeOf(source, node.attributes.get_int("start", 0) + element)
        else:
            return None


def taken(node: ir.Node, element: int) -> int | None:
    """Which element of its input a Gather or a Slice of a vector gives out, if constants say so."""
    data, *operands = node.inputs
    size = data.shape[0] if data is not None and data.shape is not None else None
    numbers = [edit.const_array(operand) for operand in operands]
    if not isinstance(size, int) or any(array is None or array.size != 1 for array in numbers):
        return None
    first = int(numbers[0].reshape(-1)[0])  # type: ignore[union-attr]  # none of them is None
    if node.op_type == "Gather":
        return first % size
    step = int(numbers[3].reshape(-1)[0]) if len(numbers) > 3 else 1  # type: ignore[union-attr]
    return first % size + element * step


def tells_other_sizes(node: ir.Node, dim: int) -> bool:
    """Whether a node reads nothing of its operand but sizes, and nobody learns that of ``dim``."""
    value = node.inputs[0] if node.inputs else None
    if node.domain or node.op_type != "Shape" or value is None or value.shape is None:
        return False
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", sys.maxsize)
    told, sizes = range(len(value.shape))[start:end], node.outputs[0]
    if dim not in told:
        return True
    element = told.index(dim)
    return not sizes.is_graph_output() and all(
        index == 0 and _leaves_out(reader, element) for reader, index in sizes.uses()
    )


def _leaves_out(node: ir.Node, element: int) -> bool:
    """Whether a node is a Gather or a Slice that is known not to take an element of a vector."""
    shape = node.outputs[0].shape
    if node.domain or node.op_type not in ("Gather", "Slice"):
        return False
    if shape is None or not shape.is_static():
        return False
    return all(taken(node, at) not in (None, element) for at in range(math.prod(shape.numpy())))
