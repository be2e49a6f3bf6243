"""Normal form of the operators that move elements: literal operands, composed where they follow
each other, gone where they move nothing.

Literals say what stays as "stays", not as a number: 0 in a Reshape, 1 in an Expand, the largest int64
as a Slice's end. So they hold for every dynamic size, and an edit of a width has fewer to correct.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from netlathe.ir import dims, weights
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.shapes.parts import FAR
from netlathe.ir.types import Type
from netlathe.ir.work import Work

TO_THE_END = 2**63 - 1


# -- Reshape --------------------------------------------------------------------------------------


def reshape(node: ir.Node, work: Work) -> None:
    """``Reshape(x, literal)``: 0 copies the dim at the same position, at most one -1, else sizes.

    Before: ``Reshape(Reshape(x: [b,s,384], ...), Concat(b, s, 6, 64))``; after:
    ``Reshape(x, [0,0,6,64])``.
    """
    data, target = node.inputs
    if data is None or target is None:
        return
    out = work.shape(node.outputs[0])
    if out is None:
        return
    shape = work.shape(data)
    if shape is not None and _same_shape(shape, out):
        work.forward(node, data)
        return
    if _lift_linear(node, out, work):
        return
    maker = data.producer()
    if maker is not None and maker.op_type == "Reshape" and maker.domain == "":
        earlier = maker.inputs[0]
        literal = reshape_literal(work.shape(earlier), out)
        if literal is not None:
            work.set_input(node, 0, earlier)
            data, shape = earlier, work.shape(earlier)
    literal = reshape_literal(shape, out)
    if literal is None:
        held = work.ints(target)
        if held is None or (node.attributes.get_int("allowzero") == 1 and 0 in held):
            return
        literal = list(held)
    work.set_ints(node, 1, literal, "shape")
    work.set_attribute(node, "allowzero", 0)


def _lift_linear(node: ir.Node, out: Shape, work: Work) -> bool:
    """A linear layer on flattened rows works on the unflattened ones: both reshapes go.

    Before: ``Reshape(Add(MatMul(Reshape(x: [b,s,k], [-1,k]), w), c), Concat(b, s, n))``; after:
    ``Add(MatMul(x, w), c)``. Two dynamic dims have no literal to come back by.
    """
    chain: list[ir.Node] = []
    value = node.inputs[0]
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        maker = value.producer()
        if maker is None or maker.domain != "" or maker.op_type not in ("Add", "MatMul"):
            return False
        other = maker.inputs[1]
        if not weights.is_weight(other) or work.rank(other) != (2, 1)[maker.op_type == "Add"]:
            return False
        chain.append(maker)
        value = maker.inputs[0]
        if maker.op_type == "MatMul":
            break
    flatten = value.producer() if value is not None and chain else None
    if flatten is None or flatten.domain != "" or flatten.op_type != "Reshape":
        return False
    rows, product = flatten.inputs[0], chain[-1]
    shape, flat = work.shape(rows), work.shape(value)
    if rows is None or shape is None or flat is None or len(flat) != 2:
        return False
    if product.op_type != "MatMul" or not dims.same(out[-1], _width(product, work)):
        return False
    lifted = (*out[:-1], flat[-1])
    literal = reshape_literal(shape, lifted)
    if literal is None:
        return False
    if not _same_shape(shape, lifted):
        target = work.constant(node, np.array(literal), f"{node.outputs[0].name}_rows")
        rows = work.insert_before(product, ir.node("Reshape", [rows, target], {"allowzero": 0}))
    work.set_input(product, 0, rows)
    for step in reversed(chain):
        work.found.types[step.outputs[0]] = Type(work.type(node.outputs[0]).dtype, out)
    work.forward(node, chain[0].outputs[0])
    return True


def _width(product: ir.Node, work: Work) -> Dim:
    """Columns of the weight of a MatMul."""
    shape = work.shape(product.inputs[1])
    return shape[-1] if shape is not None and len(shape) == 2 else None


def reshape_literal(shape: Shape | None, out: Shape) -> list[int] | None:
    """The canonical literal that reshapes ``shape`` to ``out``; None where none does at all sizes."""
    literal: list[int] = []
    unknown: list[int] = []
    for position, dim in enumerate(out):
        if _copies(shape, out, position):
            literal.append(0)
        elif isinstance(dim, int):
            if dim == 0:
                return None  # an empty dim that is not copied needs allowzero
            literal.append(dim)
        else:
            unknown.append(position)
            literal.append(-1)
    # Only one -1 is possible; a symbolic dim that equals the input's by chance can be copied as well.
    while literal.count(-1) > 1 and unknown:
        position = unknown.pop()
        if shape is not None and position < len(shape):
            if dims.same(shape[position], out[position]):
                literal[position] = 0
    return literal if literal.count(-1) <= 1 else None


def _copies(shape: Shape | None, out: Shape, position: int) -> bool:
    """Whether a dim is the input's at this position: equal, and with equally much before it."""
    if shape is None or position >= len(shape):
        return False
    if not dims.same(shape[position], out[position]):
        return False
    before, after = shape[:position], out[:position]
    if _same_shape(before, after):
        return True
    return bool(dims.same(dims.product(before), dims.product(after)))


def _same_shape(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(dims.same(x, y) for x, y in zip(a, b, strict=True))


# -- Transpose ------------------------------------------------------------------------------------


def transpose(node: ir.Node, work: Work) -> None:
    """Consecutive transposes are one; one that moves nothing is none."""
    perm = node.attributes.get_ints("perm")
    if perm is None or node.inputs[0] is None:
        return
    maker = node.inputs[0].producer()
    if maker is not None and maker.op_type == "Transpose" and maker.domain == "":
        first = maker.attributes.get_ints("perm")
        if first is not None:
            perm = tuple(first[axis] for axis in perm)
            work.set_input(node, 0, maker.inputs[0])
            work.set_attribute(node, "perm", list(perm))
    source = node.inputs[0]
    if source is not None and list(perm) == list(range(len(perm))):
        work.forward(node, source)


# -- Expand ---------------------------------------------------------------------------------------


def expand(node: ir.Node, work: Work) -> None:
    """``Expand(x, literal)`` with 1 for a dim that stays; gone where all dims stay."""
    data = node.inputs[0]
    shape, out = work.shape(data), work.shape(node.outputs[0])
    if data is None or shape is None or out is None:
        return
    if _same_shape(shape, out):
        work.forward(node, data)
        return
    literal: list[int] = []
    padded: Sequence[Dim] = (*(1,) * (len(out) - len(shape)), *shape)
    for before, after in zip(padded, out, strict=True):
        if dims.same(before, after):
            literal.append(1)
        elif isinstance(after, int) and before == 1:
            literal.append(after)
        else:
            return
    work.set_ints(node, 1, literal, "shape")


# -- Slice ----------------------------------------------------------------------------------------


def slice_(node: ir.Node, work: Work) -> None:
    """Literal starts, ends, axes and steps; axes that stay whole are left out."""
    data, shape = node.inputs[0], work.shape(node.inputs[0])
    starts, ends = work.contents(node.inputs[1]), work.contents(node.inputs[2])
    if data is None or shape is None or starts is None or ends is None:
        return
    given = [node.inputs[i] if len(node.inputs) > i else None for i in (3, 4)]
    axes = work.ints(given[0]) if given[0] is not None else tuple(range(len(starts)))
    steps = work.ints(given[1]) if given[1] is not None else (1,) * len(starts)
    if axes is None or steps is None:
        return
    kept: list[tuple[int, int, int, int]] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        if step > 0:
            start, end = _bound(start, shape[axis]), _end(end, shape[axis])
        if not isinstance(start, int) or not isinstance(end, int):
            return
        if (start, end, step) != (0, TO_THE_END, 1):
            kept.append((start, end, axis, step))
    if not kept:
        work.forward(node, data)
        return
    for index, name in enumerate(("starts", "ends", "axes", "steps"), start=1):
        column = [row[index - 1] for row in kept]
        work.set_ints(node, index, column, name)


def _bound(start: Dim, size: Dim) -> Dim:
    """A start counted from the front, within the dim where that is static."""
    if isinstance(start, int) and isinstance(size, int):
        return min(max(start + size if start < 0 else start, 0), size)
    return start


def _end(end: Dim, size: Dim) -> Dim:
    if isinstance(end, int) and end >= FAR:
        return TO_THE_END
    if dims.same(end, size):
        return TO_THE_END
    if isinstance(end, int) and isinstance(size, int):
        end = end + size if end < 0 else end
        return TO_THE_END if end >= size else max(end, 0)
    return end


# -- Cast -----------------------------------------------------------------------------------------

# dtype -> those that hold each of its values exactly
_BITS = {  # (bits of precision, largest exponent, smallest exponent) of the float formats
    ir.DataType.FLOAT8E5M2: (3, 15, -16),
    ir.DataType.FLOAT8E4M3FN: (4, 8, -9),
    ir.DataType.FLOAT16: (11, 15, -24),
    ir.DataType.BFLOAT16: (8, 127, -133),
    ir.DataType.FLOAT: (24, 127, -149),
    ir.DataType.DOUBLE: (53, 1023, -1074),
}


def holds(narrow: ir.DataType, wide: ir.DataType) -> bool:
    """Whether ``wide`` represents every value of ``narrow`` exactly."""
    if narrow == wide:
        return True
    if narrow == ir.DataType.BOOL:
        return wide in _BITS or wide.is_integer()
    if narrow in _BITS:
        if wide not in _BITS:
            return False
        if wide.name.startswith("FLOAT8"):
            return False  # saturation and missing infinities
        a, b = _BITS[narrow], _BITS[wide]
        return a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2]
    if not narrow.is_integer():
        return False
    low, high = _range(narrow)
    if wide.is_integer():
        wide_low, wide_high = _range(wide)
        return wide_low <= low and high <= wide_high
    if wide not in _BITS or wide.name.startswith("FLOAT8"):
        return False
    exact: int = 2 ** _BITS[wide][0]
    return max(-low, high) <= exact


def _range(dtype: ir.DataType) -> tuple[int, int]:
    bits = round(dtype.itemsize * 8)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.is_signed() else (0, 2**bits - 1)


def cast(node: ir.Node, work: Work) -> None:
    """A cast to the dtype a value has is gone; one after a lossless cast starts before it."""
    data = node.inputs[0]
    to = node.attributes.get_int("to")
    if data is None or to is None:
        return
    if work.type(data).dtype == to:
        work.forward(node, data)
        return
    maker = data.producer()
    if maker is None or maker.op_type != "Cast" or maker.domain != "" or maker.inputs[0] is None:
        return
    first, middle = work.type(maker.inputs[0]).dtype, work.type(data).dtype
    if first is None or middle is None or not holds(first, middle):
        return
    # From a float to an integer what happens out of range is the runtime's; keep such a chain.
    target = ir.DataType(to)
    if target in _BITS or target == ir.DataType.BOOL or target == first:
        work.set_input(node, 0, maker.inputs[0])
        if target == first:
            work.forward(node, maker.inputs[0])
