"""One node as the rows of the op table see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir

from netlathe.backends.tvm import storage
from netlathe.backends.tvm.lowering import Lowering, Unsupported
from netlathe.backends.tvm.tir import Code, Expr, Index, i64, select
from netlathe.backends.tvm.values import (
    ChannelsLast,
    Joinable,
    Known,
    Lazy,
    Pending,
    Ready,
    Scalar,
    Value,
    from_last,
    to_last,
)
from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.types import Type

D = ir.DataType


class Op:
    """A node with its operands lowered; results are :class:`Value` objects, one per output."""

    def __init__(self, low: Lowering, node: ir.Node) -> None:
        self.low = low
        self.node = node

    # -- operands -----------------------------------------------------------------------------------

    def has(self, index: int) -> bool:
        """Whether the (optional) input is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def value(self, index: int) -> Value:
        """An input, perhaps pending."""
        value = self.node.inputs[index]
        assert value is not None
        return self.low.value(value)

    def operand(self, index: int) -> Value:
        """An input that a kernel may read element by element."""
        return self.low.operand(self.value(index))

    def ready(self, index: int) -> Ready:
        """An input in memory."""
        return self.low.force(self.value(index))

    def ints(self, index: int) -> tuple[int, ...] | None:
        """The elements of a small constant integer input; None if it is no constant (or absent)."""
        if not self.has(index):
            return None
        found = self.low.found.contents(self.node.inputs[index])
        if found is None or not all(isinstance(item, int) for item in found):
            return None
        return tuple(int(item) for item in found if isinstance(item, int))

    def sizes(self, index: int) -> tuple[Dim, ...] | None:
        """The elements of a small integer input as sizes, where all of them are known."""
        if not self.has(index):
            return None
        found = self.low.found.contents(self.node.inputs[index])
        return None if found is None or None in found else found

    def array(self, index: int) -> Any:
        """The contents of a constant input as a numpy array; None if it is no constant."""
        value = self.node.inputs[index] if self.has(index) else None
        if value is None or value.const_value is None or value.is_graph_input():
            return None
        return value.const_value.numpy()

    # -- attributes ---------------------------------------------------------------------------------

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        return self.node.attributes.get_int(name, default) or 0

    def real(self, name: str, default: float = 0.0) -> float:
        """A float attribute."""
        found = self.node.attributes.get_float(name, default)
        return default if found is None else found

    def text(self, name: str, default: str = "") -> str:
        """A string attribute."""
        return self.node.attributes.get_string(name, default) or ""

    def integers(self, name: str) -> Sequence[int] | None:
        """An integer list attribute."""
        return self.node.attributes.get_ints(name)

    def axis(self, rank: int, default: int = 0, name: str = "axis") -> int:
        """An axis attribute, from the front."""
        axis = self.integer(name, default)
        return axis + rank if axis < 0 else axis

    # -- results ------------------------------------------------------------------------------------

    def type(self, output: int = 0) -> Type:
        """The derived type of an output."""
        return self.low.found.type(self.node.outputs[output])

    def dtype(self, output: int = 0) -> D:
        """The dtype of an output."""
        dtype = self.type(output).dtype
        if dtype is None:
            raise self.gap("its output has no known dtype")
        if dtype not in storage.STORED:
            raise self.gap(f"{dtype.name} tensors")
        return dtype

    def shape(self, output: int = 0) -> Shape:
        """The shape of an output; every dim in it has a value when the model runs."""
        shape = self.type(output).shape
        if shape is None:
            raise self.gap("its output has no known rank")
        for dim in shape:
            if not self.low.is_bound(dim):
                raise self.gap(f"the size {dim} of its output is decided by data")
        return shape

    def decided(self, element: Callable[[Code, int], Expr], output: int = 0) -> Shape:
        """:meth:`shape`, where ``element(code, axis)`` computes the dims that only the data decides."""
        shape = self.type(output).shape
        if shape is None:
            raise self.gap("its output has no known rank")
        if not all(self.low.is_bound(dim) for dim in shape):
            self.low.size_from_data(vector(len(shape), element), shape)
        return self.shape(output)

    def wants(self, output: int) -> bool:
        """Whether an optional output is read."""
        if output >= len(self.node.outputs):
            return False
        value = self.node.outputs[output]
        return bool(value.uses()) or value.is_graph_output()

    def gap(self, what: str) -> Unsupported:
        """The error for a part of the operator that has no form here."""
        return Unsupported(what)


def vector(count: int, element: Callable[[Code, int], Expr]) -> Lazy:
    """A small int64 vector whose elements are computed one by one."""

    def choose(code: Code, index: Index) -> Expr:
        result = element(code, count - 1)
        for number in range(count - 2, -1, -1):
            result = select(index[0] == i64(number), element(code, number), result)
        return result

    return Lazy(D.INT64, (count,), choose, cost=count)


Rule: TypeAlias = Callable[[Op], Sequence[Value]]
Function = Callable[..., Expr]  # (code, *elements) -> element


def broadcast_index(code: Code, operand: Value, index: Index, shape: Shape) -> Index:
    """Where ``operand`` has the element that belongs to ``index`` of the result."""
    if operand.shape == shape:
        return index
    if operand.is_one:
        return [i64(0)] * operand.rank
    extra = len(shape) - operand.rank
    result: list[Expr] = []
    for axis, dim in enumerate(operand.shape):
        at = index[axis + extra]
        if dim == 1:
            at = i64(0)
        elif dims.same(dim, shape[axis + extra]) is not True and not isinstance(dim, int):
            at = select(code.kernel.size(dim) == i64(1), i64(0), at)
        result.append(at)
    return result


def read(code: Code, operand: Value, index: Index, shape: Shape) -> Expr:
    """The element of ``operand`` that numpy's broadcasting puts at ``index`` of ``shape``."""
    return operand.at(code, broadcast_index(code, operand, index, shape))


def elementwise(
    op: Op, function: Function, operands: Sequence[Value], dtype: D | None = None, output: int = 0
) -> list[Value]:
    """``function`` of operands that broadcast against each other.

    Appended to the kernel of a pending operand of the result's shape, if there is one; else lazy.
    """
    shape = op.shape(output)
    made = dtype if dtype is not None else op.dtype(output)
    return [combine(op.low, function, operands, made, shape)]


def combine(
    low: Lowering, function: Function, operands: Sequence[Value], dtype: D, shape: Shape
) -> Value:
    """:func:`elementwise` for a result of given dtype and shape."""
    if any(isinstance(operand, ChannelsLast) and operand.shape == shape for operand in operands):
        turned = [channels_last(low, operand, len(shape)) for operand in operands]
        made = combine(low, function, turned, dtype, tuple(to_last(shape)))
        return ChannelsLast(dtype, shape, made)
    chosen: Pending | None = None
    for operand in operands:
        if isinstance(operand, Pending) and operand.shape == shape and operands.count(operand) == 1:
            chosen = operand
            break
    if isinstance(chosen, Joinable):
        second = next((o for o in operands if isinstance(o, Joinable) and o is not chosen), None)
        if second is not None and second.shape == shape and operands.count(second) == 1:
            both = _both(low, function, operands, (chosen, second), dtype, shape)
            if both is not None:
                return both
    others = [operand if operand is chosen else low.operand(operand) for operand in operands]
    if chosen is not None:

        def append(code: Code, index: Index, element: Expr) -> Expr:
            items = [
                element if operand is chosen else read(code, operand, index, shape)
                for operand in others
            ]
            return function(code, *items)

        return chosen.then(append, dtype)

    def element(code: Code, index: Index) -> Expr:
        return function(code, *(read(code, operand, index, shape) for operand in others))

    flat = all(
        operand.is_one or (operand.shape == shape and is_flat(operand)) for operand in others
    )
    return Lazy(dtype, shape, element, flat=flat, cost=1 + sum(cost_of(o) for o in others))


def _both(
    low: Lowering,
    function: Function,
    operands: Sequence[Value],
    pair: tuple[Joinable, Joinable],
    dtype: D,
    shape: Shape,
) -> Pending | None:
    """:func:`combine` of two products that are one kernel, or None."""
    others = [operand if operand in pair else low.operand(operand) for operand in operands]

    def append(code: Code, index: Index, first: Expr, second: Expr) -> Expr:
        elements = dict(zip(pair, (first, second), strict=True))
        items = [
            elements[operand]
            if isinstance(operand, Joinable)
            else read(code, operand, index, shape)
            for operand in others
        ]
        return function(code, *items)

    return pair[0].joined(pair[1], append, dtype)


def channels_last(low: Lowering, value: Value, rank: int) -> Value:
    """``value``, which broadcasts to ``rank`` dims, with its second dim of these moved to the end."""
    if isinstance(value, ChannelsLast) and value.rank == rank:
        return value.last
    if isinstance(value, Scalar):
        return Scalar(value.dtype, (1,) * rank, value.value)
    source = low.operand(value)
    shape = tuple(to_last((1,) * (rank - source.rank) + source.shape))
    return Lazy(
        source.dtype,
        shape,
        lambda code, at: source.at(code, from_last(at)[rank - source.rank :]),
        cheap=is_cheap(source),
        cost=cost_of(source),
    )


def is_flat(value: Value) -> bool:
    """Whether ``value`` may be read by element number."""
    return isinstance(value, Ready) or (isinstance(value, Lazy) and value.flat)


def cost_of(value: Value) -> int:
    """Operators inside an expression."""
    if isinstance(value, ChannelsLast):
        return cost_of(value.last)
    return value.cost if isinstance(value, Lazy) else 0


def is_cheap(value: Value) -> bool:
    """Whether reading an element costs no more than a load."""
    if isinstance(value, ChannelsLast):
        return is_cheap(value.last)
    return isinstance(value, (Ready, Scalar, Known)) or (isinstance(value, Lazy) and value.cheap)


def moved(
    source: Value,
    shape: Shape,
    index: Callable[[Code, Index], Index],
    *,
    unit: bool = False,
) -> Lazy:
    """The elements of ``source``, which is not pending, under another index."""

    def element(code: Code, at: Index) -> Expr:
        return source.at(code, index(code, at))

    keeps = isinstance(source, Ready) or (isinstance(source, Lazy) and source.unit)
    return Lazy(
        source.dtype,
        shape,
        element,
        cheap=is_cheap(source),
        unit=unit and keeps,
        cost=1 + cost_of(source),
    )
