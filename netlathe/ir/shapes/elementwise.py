"""Elementwise operators: the outputs have the inputs' broadcast shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir
import sympy

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.types import MOST_CONTENTS, Pin, Site, Type

Real: TypeAlias = sympy.Expr | None


def broadcast_shape(s: Site, indices: Iterable[int]) -> Shape | None:
    """The broadcast shape of some inputs; None where one has no rank."""
    present = [index for index in indices if s.has(index)]
    shapes = []
    for index in present:
        shape = s.shape(index)
        if shape is None:
            return None
        shapes.append(shape)
    result = dims.broadcast(shapes)
    if result.clash is not None:
        clash = result.clash
        s.fail(
            "width",
            f"{s.node.op_type} needs one width at axis -{clash.axis_from_right}, "
            f"got {clash.a} and {clash.b}",
            *s.show(*present),
            help="a width was changed on one side only: change every operand together",
        )
    for symbolic, width in result.pinned:
        s.found.pins.append(Pin(s.node, symbolic, width, f"{s.node.op_type} broadcasts", True))
    return result.shape


def same_dtype(s: Site, indices: Iterable[int]) -> ir.DataType | None:
    """The one dtype that these inputs must share."""
    found: ir.DataType | None = None
    first = 0
    for index in indices:
        dtype = s.dtype(index)
        if dtype is None:
            continue
        if found is not None and dtype != found:
            s.fail(
                "dtype",
                f"{s.node.op_type} needs one dtype, got {found.name} and {dtype.name}",
                f"{s.name(first)} is {found.name}, {s.name(index)} is {dtype.name}",
                help="insert a Cast, or convert both operands",
            )
        if found is None:
            found, first = dtype, index
    return found


def keep(s: Site) -> list[Type]:
    """One output, of the first input's type."""
    return [s.type()]


# -- contents ---------------------------------------------------------------------------------------


def _divide(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        # ONNX divides integers like C: towards zero.
        return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return dims.divide(a, b)


def _modulo(a: Dim, b: Dim) -> Dim:
    return None if a is None or b is None or b == 0 else dims.simplify(sympy.Mod(a, b))


def _equal(a: Dim, b: Dim) -> Dim:
    equal = dims.same(a, b)
    return None if equal is None else int(equal)


def _compared(test: Callable[[sympy.Expr], bool | None]) -> Callable[[Dim, Dim], Dim]:
    """A comparison by what sympy can say of the sign of a - b, for all sizes."""

    def compare(a: Dim, b: Dim) -> Dim:
        difference = dims.subtract(a, b)
        answer = None if difference is None else test(sympy.sympify(difference))
        return None if answer is None else int(answer)

    return compare


def _logical(function: Callable[[bool, bool], bool]) -> Callable[[Dim, Dim], Dim]:
    return lambda a, b: (
        int(function(bool(a), bool(b))) if isinstance(a, int) and isinstance(b, int) else None
    )


_FOLD: Mapping[str, Callable[[Dim, Dim], Dim]] = {
    "Add": dims.add,
    "Sub": dims.subtract,
    "Mul": lambda a, b: dims.product((a, b)),
    "Div": _divide,
    "Max": dims.largest,
    "Min": dims.smallest,
    "Mod": _modulo,
    "Equal": _equal,
    "Greater": _compared(lambda d: d.is_positive),
    "GreaterOrEqual": _compared(lambda d: d.is_nonnegative),
    "Less": _compared(lambda d: d.is_negative),
    "LessOrEqual": _compared(lambda d: d.is_nonpositive),
    "And": _logical(lambda a, b: a and b),
    "Or": _logical(lambda a, b: a or b),
}
_FOLD_REAL: Mapping[str, Callable[[sympy.Expr, sympy.Expr], Real]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: None if b.is_zero else a / b,
}


def _fold(s: Site) -> None:
    """Contents of arithmetic on shape-like integers, and on sizes that pass through floats."""
    operator, output = s.node.op_type, s.node.outputs[0]
    integer, real = _FOLD.get(operator), _FOLD_REAL.get(operator)
    if len(s.node.inputs) != 2 or integer is None:
        return
    a, b = s.contents(0), s.contents(1)
    if a is not None and b is not None:
        pairs = _pairs(a, b)
        if pairs is not None:
            s.remember([integer(x, y) for x, y in pairs])
    elif real is not None and (p := s.reals(0)) is not None and (q := s.reals(1)) is not None:
        real_pairs = _real_pairs(p, q)
        if real_pairs is not None:
            s.found.reals[output] = tuple(
                None if x is None or y is None else real(x, y) for x, y in real_pairs
            )


def _pairs(a: Sequence[Dim], b: Sequence[Dim]) -> list[tuple[Dim, Dim]] | None:
    size = max(len(a), len(b)) if a and b else 0
    if size > MOST_CONTENTS or len(a) not in (1, size) or len(b) not in (1, size):
        return None
    return [(a[i % len(a)], b[i % len(b)]) for i in range(size)]


def _real_pairs(a: Sequence[Real], b: Sequence[Real]) -> list[tuple[Real, Real]] | None:
    size = max(len(a), len(b)) if a and b else 0
    if size > MOST_CONTENTS or len(a) not in (1, size) or len(b) not in (1, size):
        return None
    return [(a[i % len(a)], b[i % len(b)]) for i in range(size)]


# -- rules ------------------------------------------------------------------------------------------


def _variadic(s: Site) -> list[Type]:
    _fold(s)
    every = range(len(s.node.inputs))
    return [Type(same_dtype(s, every), broadcast_shape(s, every))]


def _compare(s: Site) -> list[Type]:
    same_dtype(s, range(2))
    _fold(s)
    return [Type(ir.DataType.BOOL, broadcast_shape(s, range(2)))]


def _not(s: Site) -> list[Type]:
    contents = s.contents(0)
    if contents is not None:
        s.remember([None if item is None else int(item == 0) for item in contents])
    return [s.type()]


def _neg(s: Site) -> list[Type]:
    contents = s.contents(0)
    if contents is not None:
        s.remember([dims.product((-1, item)) for item in contents])
    return [s.type()]


def _relu(s: Site) -> list[Type]:
    contents = s.contents(0)
    if contents is not None:
        s.remember([dims.largest(item, 0) for item in contents])
    return [s.type()]


_ROUNDING: Mapping[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "Floor": sympy.floor,
    "Ceil": sympy.ceiling,
}


def _round(s: Site) -> list[Type]:
    reals = s.reals(0)
    if reals is not None:
        function = _ROUNDING[s.node.op_type]
        s.found.reals[s.node.outputs[0]] = tuple(
            None if item is None else function(item) for item in reals
        )
    return [s.type()]


def _cast(s: Site) -> list[Type]:
    return _converted(s, s.data_type("to"))


def _cast_like(s: Site) -> list[Type]:
    return _converted(s, s.dtype(1))


def _converted(s: Site, to: ir.DataType | None) -> list[Type]:
    contents, reals, output = s.contents(0), s.reals(0), s.node.outputs[0]
    if to is not None and contents is not None:
        if to == ir.DataType.BOOL:
            s.remember([int(item != 0) if isinstance(item, int) else None for item in contents])
        elif to.is_integer():
            s.remember(contents)
        elif to in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            s.found.reals[output] = tuple(
                None if item is None else sympy.sympify(item) for item in contents
            )
    elif to is not None and reals is not None:
        if to in (ir.DataType.INT64, ir.DataType.INT32):
            s.remember([None if item is None else _truncated(item) for item in reals])
        elif to in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            s.found.reals[output] = reals
    return [Type(to, s.shape())]


def _truncated(item: sympy.Expr) -> Dim:
    """A size cast to an integer: towards zero, which for a size is down."""
    return dims.simplify(sympy.floor(item)) if item.is_nonnegative else None


def _bitcast(s: Site) -> list[Type]:
    """As many bits in all: the last dim grows or shrinks with the element's size."""
    before, after, shape = s.dtype(), s.data_type("to"), s.shape()
    if before is None or after is None or shape is None:
        return [Type(after, None)]
    if before.itemsize == after.itemsize:
        return [Type(after, shape)]
    s.fail("dtype", f"{before.name} and {after.name} differ in their number of bits")


def _where(s: Site) -> list[Type]:
    condition, a, b = s.contents(0), s.contents(1), s.contents(2)
    if condition is not None and a is not None and b is not None and condition and a and b:
        size = max(len(condition), len(a), len(b))
        if all(len(part) in (1, size) for part in (condition, a, b)):
            chosen: list[Dim] = []
            for i in range(size):
                c, x, y = (part[i % len(part)] for part in (condition, a, b))
                chosen.append(x if dims.same(x, y) else None if c is None else (x if c else y))
            s.remember(chosen)
    return [Type(same_dtype(s, (1, 2)), broadcast_shape(s, range(3)))]


def _identity(s: Site) -> list[Type]:
    s.remember(s.contents(0))
    if s.reals(0) is not None:
        s.found.reals[s.node.outputs[0]] = s.reals(0) or ()
    return [s.type()]


def _clip(s: Site) -> list[Type]:
    for index in (1, 2):
        shape = s.shape(index)
        if shape is not None and dims.same(dims.product(shape), 1) is False:
            s.fail("width", f"the bound {s.name(index)} is no scalar", *s.show(index))
    contents, low, high = s.contents(0), s.contents(1), s.contents(2)
    if contents is not None and (low or not s.has(1)) and (high or not s.has(2)):
        if low:
            contents = tuple(dims.largest(item, low[0]) for item in contents)
        if high:
            contents = tuple(dims.smallest(item, high[0]) for item in contents)
        s.remember(contents)
    return [Type(same_dtype(s, range(3)), s.shape())]


def _prelu(s: Site) -> list[Type]:
    own, slope = s.shape(), s.shape(1)
    if own is not None and slope is not None:
        if len(slope) > len(own):
            s.fail("width", f"the slope {s.name(1)} has more dims than {s.name(0)}", *s.show(0, 1))
        for axis in range(1, len(slope) + 1):
            if slope[-axis] != 1:
                what = f"the slope must be 1 or as wide as {s.name(0)} at axis -{axis}"
                s.equal(own[-axis], slope[-axis], "width", what, *s.show(0, 1))
    return [Type(same_dtype(s, range(2)), own)]


def _pow(s: Site) -> list[Type]:
    return [Type(s.dtype(), broadcast_shape(s, range(2)))]


def _dropout(s: Site) -> list[Type]:
    _identity(s)
    return [s.type(), Type(ir.DataType.BOOL, s.shape())]


def _to_bool(s: Site) -> list[Type]:
    return [Type(ir.DataType.BOOL, s.shape())]


def _along_axis(s: Site) -> list[Type]:
    shape = s.shape()
    if shape:
        s.axis(len(shape), -1)
    return [s.type()]


def _bernoulli(s: Site) -> list[Type]:
    return [Type(s.data_type("dtype") or s.dtype(), s.shape())]


_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Celu Cos Cosh Elu Erf Exp Gelu HardSigmoid "
    "HardSwish LeakyRelu Log Mish Reciprocal Round Selu Shrink Sigmoid Sign Sin Sinh Softplus "
    "Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
).split()

RULES = {
    **dict.fromkeys(_UNARY, keep),
    **dict.fromkeys(("Ceil", "Floor"), _round),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), _along_axis),
    **dict.fromkeys(("IsNaN", "IsInf"), _to_bool),
    **dict.fromkeys(
        (
            *("Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Mean", "Sum", "And", "Or", "Xor"),
            *("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift"),
        ),
        _variadic,
    ),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _compare),
    "Bernoulli": _bernoulli,
    "BitCast": _bitcast,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "Dropout": _dropout,
    "Identity": _identity,
    "Neg": _neg,
    "Not": _not,
    "PRelu": _prelu,
    "Pow": _pow,
    "Relu": _relu,
    "Where": _where,
}
