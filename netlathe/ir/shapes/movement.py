"""Operators that give the same elements another shape or order."""

from __future__ import annotations

import sympy

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.shapes.elementwise import keep
from netlathe.ir.types import MOST_CONTENTS, Pin, Site, Type

_STALE = "a literal of the target is stale: a width before it was changed"


def _flat(s: Site) -> None:
    """A movement that keeps the flat order keeps known contents."""
    s.remember(s.contents(0))
    reals = s.reals(0)
    if reals is not None:
        s.found.reals[s.node.outputs[0]] = reals


def _reshape(s: Site) -> list[Type]:
    shape, target = s.shape(), s.contents(1)
    if target is None:
        length = s.shape(1)
        rank = length[0] if length is not None and len(length) == 1 else None
        if not isinstance(rank, int) or rank > MOST_CONTENTS:
            return [Type(s.dtype(), None)]
        return [Type(s.dtype(), (None,) * rank)]
    out, inferred = _targeted(s, shape, target)
    if shape is None:
        return [Type(s.dtype(), out)]
    if inferred is None:
        _check_elements(s, shape, out)
        # One dim that nothing is known of follows from the others.
        if out.count(None) == 1:
            at = out.index(None)
            out = (*out[:at], _rest(s, shape, out, at), *out[at + 1 :])
    else:
        out = (*out[:inferred], _rest(s, shape, out, inferred), *out[inferred + 1 :])
    if len(out) <= 1:
        _flat(s)
    return [Type(s.dtype(), out)]


def _targeted(s: Site, shape: Shape | None, target: Shape) -> tuple[Shape, int | None]:
    """The target with its zeros replaced by the input's dims, and the position of its -1."""
    out: list[Dim] = []
    inferred: int | None = None
    for position, item in enumerate(target):
        if item == -1:
            if inferred is not None:
                s.fail("reshape", f"the target {dims.show(target)} has two -1")
            inferred = position
            out.append(None)
        elif item == 0 and s.integer("allowzero") != 1:
            if shape is not None and position >= len(shape):
                message = f"0 at position {position} copies a dim that {s.name(0)} does not have"
                s.fail("reshape", message, *s.show(0))
            out.append(None if shape is None else shape[position])
        elif isinstance(item, int) and item < 0:
            s.fail("reshape", f"the target {dims.show(target)} has a negative size")
        else:
            out.append(item)
    return tuple(out), inferred


def _check_elements(s: Site, shape: Shape, out: Shape) -> None:
    total, wanted = dims.product(shape), dims.product(out)
    if dims.same(total, wanted) is False:
        s.fail(
            "reshape",
            f"{s.name(0)} has {total} elements, the target {dims.show(out)} has {wanted}",
            *s.show(0),
            help=_STALE,
        )
    if total is None or wanted is None or total == 0 or wanted == 0:
        return
    ratio = dims.quotient(total, wanted)
    if ratio.is_number and ratio != 1:
        s.fail(
            "reshape",
            f"{s.name(0)} has {ratio} times the elements of the target {dims.show(out)}",
            *s.show(0),
            help=_STALE,
        )
    numerator, denominator = sympy.fraction(ratio)
    if not ratio.is_number:
        what = f"the elements of {s.name(0)} and of the target {dims.show(out)} must be as many"
        pin = Pin(s.node, dims.simplify(numerator), dims.simplify(denominator), what)
        s.found.pins.append(pin)


def _rest(s: Site, shape: Shape, out: Shape, position: int) -> Dim:
    """The dim a -1 stands for: what is left once dims that occur on both sides are taken off."""
    left, right = list(shape), [dim for i, dim in enumerate(out) if i != position]
    for dim in list(right):
        if dim is not None and dim in left:
            left.remove(dim)
            right.remove(dim)
    total, rest = dims.product(left), dims.product(right)
    if total is None or rest is None or rest == 0:
        return None
    quotient = dims.quotient(total, rest)
    if quotient.is_number and not quotient.is_integer:
        s.fail(
            "reshape",
            f"{s.name(0)} has {total} elements to share out, which {rest} does not divide",
            *s.show(0),
            f"the target is {dims.show(out)}, with ? for the size to be found",
            help=_STALE,
        )
    return dims.divide(total, rest)


def _flatten(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), (None, None))]
    axis = s.axis(len(shape), 1, end=True)
    return [Type(s.dtype(), (dims.product(shape[:axis]), dims.product(shape[axis:])))]


def _squeeze(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    _flat(s)
    if not s.has(1):
        # Without axes a symbolic dim may or may not go: then the rank is not known.
        fixed = all(isinstance(dim, int) for dim in shape)
        return [Type(s.dtype(), tuple(dim for dim in shape if dim != 1) if fixed else None)]
    axes = s.ints(1)
    if axes is None:
        return [Type(s.dtype(), _of_rank(s, len(shape), -1))]
    gone = {s.checked_axis(axis, len(shape)) for axis in axes}
    for axis in gone:
        what = f"axis {axis} of {s.name(0)} must be 1 to be squeezed"
        s.equal(shape[axis], 1, "squeeze", what, *s.show(0))
    return [Type(s.dtype(), tuple(dim for i, dim in enumerate(shape) if i not in gone))]


def _of_rank(s: Site, rank: int, sign: int) -> Shape | None:
    """The rank with as many dims more or less as input 1 has elements."""
    axes = s.shape(1)
    count = axes[0] if axes else None
    if not isinstance(count, int) or count > MOST_CONTENTS or rank + sign * count < 0:
        return None
    return (None,) * (rank + sign * count)


def _unsqueeze(s: Site) -> list[Type]:
    shape, axes = s.shape(), s.ints(1)
    if shape is None:
        return [Type(s.dtype(), None)]
    if axes is None:
        return [Type(s.dtype(), _of_rank(s, len(shape), 1))]
    rank = len(shape) + len(axes)
    new = {s.checked_axis(axis, rank) for axis in axes}
    if len(new) != len(axes):
        s.fail("axis", f"the axes {list(axes)} name one twice")
    rest = iter(shape)
    out = tuple(1 if i in new else next(rest) for i in range(rank))
    if rank <= 1:
        _flat(s)
    return [Type(s.dtype(), out)]


def _transpose(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(s.dtype(), None)]
    perm = s.integers("perm") or tuple(reversed(range(len(shape))))
    if sorted(perm) != list(range(len(shape))):
        message = f"perm {list(perm)} does not permute the {len(shape)} dims of {s.name(0)}"
        s.fail("transpose", message, *s.show(0))
    if len(shape) <= 1:
        _flat(s)
    return [Type(s.dtype(), tuple(shape[axis] for axis in perm))]


def _depth_to_space(s: Site) -> list[Type]:
    s.rank(0, 4)
    shape, block = s.shape(), s.integer("blocksize")
    if block <= 0:
        s.fail("attribute", f"blocksize={block} is not positive")
    if shape is None:
        return [Type(s.dtype(), None)]
    b, c, h, w = shape
    if isinstance(c, int) and c % (block * block):
        message = f"blocksize² = {block * block} does not divide the {c} channels of {s.name(0)}"
        s.fail("width", message, *s.show(0))
    out = (b, dims.divide(c, block * block), dims.product((h, block)), dims.product((w, block)))
    return [Type(s.dtype(), out)]


def _space_to_depth(s: Site) -> list[Type]:
    s.rank(0, 4)
    shape, block = s.shape(), s.integer("blocksize")
    if block <= 0:
        s.fail("attribute", f"blocksize={block} is not positive")
    if shape is None:
        return [Type(s.dtype(), None)]
    b, c, h, w = shape
    for size in (h, w):
        if isinstance(size, int) and size % block:
            message = f"blocksize={block} does not divide the size {size} of {s.name(0)}"
            s.fail("width", message, *s.show(0))
    out = (b, dims.product((c, block * block)), dims.divide(h, block), dims.divide(w, block))
    return [Type(s.dtype(), out)]


def _trilu(s: Site) -> list[Type]:
    s.least_rank(0, 2)
    return keep(s)


RULES = {
    "DepthToSpace": _depth_to_space,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "SpaceToDepth": _space_to_depth,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
