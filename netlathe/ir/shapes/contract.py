"""Matrix products and other contractions."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.shapes.elementwise import same_dtype
from netlathe.ir.types import Pin, Site, Type

_STALE = "a width was changed on one side of the contraction only"


def product_shape(s: Site, a_index: int = 0, b_index: int = 1) -> Shape | None:
    """Shape of numpy's matmul: ... m k, ... k n -> ... m n; 1-D operands lose their dim again."""
    a, b = s.shape(a_index), s.shape(b_index)
    if a is None or b is None:
        return None
    s.least_rank(a_index, 1)
    s.least_rank(b_index, 1)
    inner = b[-2:][0]  # b's rows; a vector counts as a column
    what = f"{s.node.op_type} contracts the last axis of {s.name(a_index)} with {s.name(b_index)}"
    s.equal(a[-1], inner, "width", what, *s.show(a_index, b_index), help=_STALE)
    result = dims.broadcast((a[:-2], b[:-2]))
    if result.clash is not None:
        clash = result.clash
        s.fail(
            "width",
            f"{s.node.op_type} needs one batch size at axis -{clash.axis_from_right + 2}, "
            f"got {clash.a} and {clash.b}",
            *s.show(a_index, b_index),
        )
    for symbolic, width in result.pinned:
        s.found.pins.append(Pin(s.node, symbolic, width, "MatMul broadcasts", True))
    rows = (a[-2],) if len(a) > 1 else ()
    columns = (b[-1],) if len(b) > 1 else ()
    return (*result.shape, *rows, *columns)


def _matmul(s: Site) -> list[Type]:
    return [Type(same_dtype(s, (0, 1)), product_shape(s))]


def _gemm(s: Site) -> list[Type]:
    s.rank(0, 2)
    s.rank(1, 2)
    dtype = same_dtype(s, range(3))
    a, b, c = s.shape(0), s.shape(1), s.shape(2)
    if a is None or b is None:
        return [Type(dtype, (None, None))]
    rows, inner = reversed(a) if s.integer("transA") else a
    inner_b, columns = reversed(b) if s.integer("transB") else b
    what = f"Gemm contracts {s.name(0)} with {s.name(1)}"
    s.equal(inner, inner_b, "width", what, *s.show(0, 1), help=_STALE)
    if c is not None:
        for own, width in zip(reversed(c), (columns, rows), strict=False):
            if own != 1:
                what = f"the bias {s.name(2)} must broadcast to {dims.show((rows, columns))}"
                s.equal(own, width, "width", what, *s.show(0, 1, 2), help="slice the bias as well")
        if len(c) > 2:
            s.fail("rank", f"the bias {s.name(2)} has {len(c)} dims, more than 2")
    return [Type(dtype, (rows, columns))]


def _einsum(s: Site) -> list[Type]:
    dtype = same_dtype(s, range(len(s.node.inputs)))
    equation = s.text("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(s.node.inputs):
        s.fail("einsum", f"{equation!r} has {len(terms)} terms for {len(s.node.inputs)} inputs")
    sizes: dict[str, Dim] = {}
    ellipses: list[Shape] = []
    for index, term in enumerate(terms):
        shape = s.shape(index)
        if shape is None:
            return [Type(dtype, None)]
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        if hidden < 0 or (hidden and not dots):
            s.fail("rank", f"{s.name(index)} has {len(shape)} dims, its term {term!r} does not")
        if dots:
            ellipses.append(shape[len(before) : len(before) + hidden])
        visible = (*shape[: len(before)], *shape[len(shape) - len(after) :])
        for letter, dim in zip(before + after, visible, strict=True):
            if letter in sizes and sizes[letter] != 1 and dim != 1:
                what = f"the letter {letter!r} of {equation!r} stands for one size"
                dim = s.equal(sizes[letter], dim, "width", what, *s.show(*range(len(terms))))
            elif dim == 1:
                dim = sizes.get(letter, dim)
            sizes[letter] = dim
    hidden_shape = dims.broadcast(ellipses)
    if hidden_shape.clash is not None:
        clash = hidden_shape.clash
        s.fail("width", f"the dots of {equation!r} do not broadcast: {clash.a} and {clash.b}")
    if not arrow:
        once = sorted(letter for letter in sizes if left.count(letter) == 1)
        right = ("..." if ellipses else "") + "".join(once)
    if not set(right.replace("...", "")) <= sizes.keys():
        s.fail("einsum", f"{equation!r} has a letter on the right that is not on the left")
    before, dots, after = right.partition("...")
    middle = hidden_shape.shape if dots else ()
    out = (*(sizes[c] for c in before), *middle, *(sizes[c] for c in after))
    return [Type(dtype, out)]


def _det(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    s.least_rank(0, 2)
    s.equal(shape[-2], shape[-1], "width", "Det needs square matrices", *s.show(0))
    return [Type(s.dtype(), shape[:-2])]


def _matmul_integer(s: Site) -> list[Type]:
    for index in (2, 3):
        zero, shape = s.shape(index), s.shape(index - 2)
        if zero is not None and shape is not None and zero and zero != (1,):
            # Per row of A: [M]; per column of B: [N]; or [..., M, 1] and [..., 1, N].
            width, axis = (shape[-2:][0], -1) if index == 2 else (shape[-1], -1)
            if len(zero) > 1 and index == 2:
                axis = -2
            what = f"the zero point {s.name(index)} must be as wide as {s.name(index - 2)}"
            s.equal(zero[axis], width, "width", what, *s.show(index - 2, index))
    return [Type(ir.DataType.INT32, product_shape(s))]


RULES = {
    "Det": _det,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
}
