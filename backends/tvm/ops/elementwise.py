"""Operators that compute each element from the elements at the same place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from tvm import tirx

from netlathe.backends.tvm import mathfn, storage
from netlathe.backends.tvm.ops.op import D, Op, Rule, elementwise
from netlathe.backends.tvm.tir import Code, Expr, cast, const, dtype_of, is_nan, select
from netlathe.backends.tvm.values import Scalar, Value


def like(x: Expr, value: float) -> Expr:
    """A literal of the type of ``x``."""
    dtype = dtype_of(x)
    return const(value if dtype.startswith("float") else int(value), dtype)


def is_float(x: Expr) -> bool:
    """Whether ``x`` is a floating-point expression."""
    return dtype_of(x).startswith("float")


def larger(code: Code, a: Expr, b: Expr) -> Expr:
    """The maximum; NaN wins."""
    if not is_float(a):
        return tirx.max(a, b)
    a, b = code.bind(a), code.bind(b)
    return select(is_nan(a), a, select(is_nan(b), b, select(a > b, a, b)))


def smaller(code: Code, a: Expr, b: Expr) -> Expr:
    """The minimum; NaN wins."""
    if not is_float(a):
        return tirx.min(a, b)
    a, b = code.bind(a), code.bind(b)
    return select(is_nan(a), a, select(is_nan(b), b, select(a < b, a, b)))


def _libm(name: str) -> Callable[[Code, Expr], Expr]:
    function = getattr(tirx, name)
    return lambda code, x: function(x)


def absolute(code: Code, x: Expr) -> Expr:
    """|x|."""
    if dtype_of(x).startswith("uint"):
        return x
    if is_float(x):
        return tirx.abs(x)
    return select(x < like(x, 0), like(x, 0) - x, x)


def negative(code: Code, x: Expr) -> Expr:
    """-x, with the sign of zero changed."""
    return x * like(x, -1.0) if is_float(x) else like(x, 0) - x


def sign(code: Code, x: Expr) -> Expr:
    """-1, 0 or 1; NaN stays NaN."""
    if dtype_of(x).startswith("uint"):
        return select(x > like(x, 0), like(x, 1), like(x, 0))
    x = code.bind(x)
    signed = select(x > like(x, 0), like(x, 1), select(x < like(x, 0), like(x, -1), like(x, 0)))
    return select(is_nan(x), x, signed) if is_float(x) else signed


def relu(code: Code, x: Expr) -> Expr:
    """max(x, 0); NaN stays NaN."""
    return select(x < like(x, 0), like(x, 0), x)


def gelu(op: Op) -> Callable[[Code, Expr], Expr]:
    """Gelu, exact or by tanh."""

    def exact(code: Code, x: Expr) -> Expr:
        x = code.bind(x)
        scaled = mathfn.erf(code, x * like(x, 0.7071067811865476))
        return x * like(x, 0.5) * (like(x, 1.0) + scaled)

    def by_tanh(code: Code, x: Expr) -> Expr:
        x = code.bind(x)
        inner = like(x, 0.7978845608028654) * (x + like(x, 0.044715) * x * x * x)
        return x * like(x, 0.5) * (like(x, 1.0) + mathfn.tanh(code, inner))

    return by_tanh if op.text("approximate", "none") == "tanh" else exact


def _expm1(code: Code, x: Expr) -> Expr:
    """e ** x - 1: by tanh(x / 2), which loses no digits near 0."""
    t = code.bind(mathfn.tanh(code, x * like(x, 0.5)))
    near = like(x, 2.0) * t / (like(x, 1.0) - t)
    return select(tirx.abs(x) < like(x, 0.5), near, mathfn.exp(code, x) - like(x, 1.0))


def _sinh(code: Code, x: Expr) -> Expr:
    """(e ** x - e ** -x) / 2, from e ** |x| - 1 so that small values keep their digits."""
    x = code.bind(x)
    e = code.bind(_expm1(code, code.bind(tirx.abs(x))))
    rest = select(e > like(x, 1e9), like(x, 1.0), e / (e + like(x, 1.0)))
    size = like(x, 0.5) * (e + rest)
    return select(x < like(x, 0.0), like(x, 0.0) - size, size)


def _cosh(code: Code, x: Expr) -> Expr:
    e = code.bind(mathfn.exp(code, tirx.abs(x)))
    return like(x, 0.5) * (e + like(x, 1.0) / e)


def elu(code: Code, x: Expr, alpha: float) -> Expr:
    """x, or alpha (e ** x - 1) below 0."""
    x = code.bind(x)
    low = code.bind(select(x < like(x, 0.0), x, like(x, 0.0)))
    return select(x > like(x, 0.0), x, like(x, alpha) * _expm1(code, low))


def _celu(code: Code, x: Expr, alpha: float) -> Expr:
    x = code.bind(x)
    low = code.bind(select(x < like(x, 0.0), x, like(x, 0.0)) / like(x, alpha))
    return select(x > like(x, 0.0), x, like(x, alpha) * _expm1(code, low))


def _shrink(code: Code, x: Expr, lambd: float, bias: float) -> Expr:
    lambd_, bias_ = like(x, lambd), like(x, bias)
    middle = select(x > lambd_, x - bias_, like(x, 0))
    return select(x < like(x, 0) - lambd_, x + bias_, middle)


def _clamp(x: Expr, low: float, high: float) -> Expr:
    return select(x < like(x, low), like(x, low), select(x > like(x, high), like(x, high), x))


def swish(code: Code, x: Expr, alpha: float) -> Expr:
    """x * sigmoid(alpha * x)."""
    x = code.bind(x)
    return x * mathfn.sigmoid(code, x * like(x, alpha) if alpha != 1.0 else x)


# operator -> what makes its function from the node
_UNARY: Mapping[str, Callable[[Op], Callable[[Code, Expr], Expr]]] = {
    "Abs": lambda op: absolute,
    "Neg": lambda op: negative,
    "Sign": lambda op: sign,
    "Exp": lambda op: mathfn.exp,
    "Log": lambda op: mathfn.log,
    "Erf": lambda op: mathfn.erf,
    "Tanh": lambda op: mathfn.tanh,
    "Sqrt": lambda op: mathfn.sqrt,
    "Sigmoid": lambda op: mathfn.sigmoid,
    "Softplus": lambda op: mathfn.softplus,
    "Reciprocal": lambda op: lambda code, x: like(x, 1.0) / x,
    "Ceil": lambda op: _libm("ceil"),
    "Floor": lambda op: _libm("floor"),
    "Round": lambda op: _libm("nearbyint"),
    "Sin": lambda op: _libm("sin"),
    "Cos": lambda op: _libm("cos"),
    "Tan": lambda op: _libm("tan"),
    "Asin": lambda op: _libm("asin"),
    "Acos": lambda op: _libm("acos"),
    "Atan": lambda op: _libm("atan"),
    "Sinh": lambda op: _sinh,
    "Cosh": lambda op: _cosh,
    "Asinh": lambda op: _libm("asinh"),
    "Acosh": lambda op: _libm("acosh"),
    "Atanh": lambda op: _libm("atanh"),
    "Relu": lambda op: relu,
    "Gelu": gelu,
    "Elu": lambda op: functools.partial(elu, alpha=op.real("alpha", 1.0)),
    "Celu": lambda op: functools.partial(_celu, alpha=op.real("alpha", 1.0)),
    "Selu": lambda op: (
        lambda code, x: (
            like(x, op.real("gamma", 1.05070102214813232421875))
            * elu(code, x, op.real("alpha", 1.67326319217681884765625))
        )
    ),
    "LeakyRelu": lambda op: (
        lambda code, x: select(x < like(x, 0.0), x * like(x, op.real("alpha", 0.01)), x)
    ),
    "ThresholdedRelu": lambda op: (
        lambda code, x: select(x > like(x, op.real("alpha", 1.0)), x, like(x, 0.0))
    ),
    "HardSigmoid": lambda op: (
        lambda code, x: _clamp(
            code.bind(like(x, op.real("alpha", 0.2)) * x + like(x, op.real("beta", 0.5))),
            0.0,
            1.0,
        )
    ),
    "HardSwish": lambda op: (
        lambda code, x: x * _clamp(code.bind(x * like(x, 1 / 6) + like(x, 0.5)), 0.0, 1.0)
    ),
    "Swish": lambda op: functools.partial(swish, alpha=op.real("alpha", 1.0)),
    "Mish": lambda op: lambda code, x: x * mathfn.tanh(code, mathfn.softplus(code, x)),
    "Softsign": lambda op: lambda code, x: x / (like(x, 1.0) + tirx.abs(x)),
    "Shrink": lambda op: functools.partial(
        _shrink, lambd=op.real("lambd", 0.5), bias=op.real("bias", 0.0)
    ),
    "Not": lambda op: lambda code, x: tirx.Not(x),
    "BitwiseNot": lambda op: lambda code, x: tirx.bitwise_not(x),
    "IsNaN": lambda op: lambda code, x: is_nan(x),
    "Identity": lambda op: lambda code, x: x,
}


def _unary(op: Op) -> Sequence[Value]:
    return elementwise(op, _UNARY[op.node.op_type](op), [op.value(0)])


def _divide(code: Code, a: Expr, b: Expr) -> Expr:
    return a / b if is_float(a) else tirx.truncdiv(a, b)


def _or(code: Code, a: Expr, b: Expr) -> Expr:
    return tirx.Or(a, b)


_BINARY: Mapping[str, Callable[[Code, Expr, Expr], Expr]] = {
    "Add": lambda code, a, b: a + b,
    "Sub": lambda code, a, b: a - b,
    "Mul": lambda code, a, b: a * b,
    "Div": _divide,
    "And": lambda code, a, b: tirx.And(a, b),
    "Or": _or,
    "Xor": lambda code, a, b: cast(a, "int8") != cast(b, "int8"),
    "Equal": lambda code, a, b: _comparable(a) == _comparable(b),
    "Less": lambda code, a, b: a < b,
    "LessOrEqual": lambda code, a, b: a <= b,
    "Greater": lambda code, a, b: a > b,
    "GreaterOrEqual": lambda code, a, b: a >= b,
    "BitwiseAnd": lambda code, a, b: a & b,
    "BitwiseOr": lambda code, a, b: a | b,
    "BitwiseXor": lambda code, a, b: a ^ b,
    "PRelu": lambda code, x, slope: select(x < like(x, 0), slope * x, x),
}


def _comparable(x: Expr) -> Expr:
    return cast(x, "int8") if dtype_of(x) == "bool" else x


def _binary(op: Op) -> Sequence[Value]:
    return elementwise(op, _BINARY[op.node.op_type], [op.value(0), op.value(1)])


def _several(function: Callable[[Code, Expr, Expr], Expr]) -> Rule:
    def rule(op: Op) -> Sequence[Value]:
        def reduce(code: Code, *items: Expr) -> Expr:
            return functools.reduce(lambda a, b: function(code, a, b), items)

        return elementwise(op, reduce, [op.value(i) for i in range(len(op.node.inputs))])

    return rule


def _mean(op: Op) -> Sequence[Value]:
    count = len(op.node.inputs)

    def average(code: Code, *items: Expr) -> Expr:
        return functools.reduce(lambda a, b: a + b, items) / like(items[0], count)

    return elementwise(op, average, [op.value(i) for i in range(count)])


def _mod(op: Op) -> Sequence[Value]:
    def remainder(code: Code, a: Expr, b: Expr) -> Expr:
        if is_float(a):
            whole = select(tirx.isinf(b), like(a, 0), tirx.trunc(a / b) * b)
            rest = code.bind(a - whole)
            if op.integer("fmod"):
                return rest
            wrong = tirx.And(
                rest != like(a, 0), cast(rest < like(a, 0), "int8") != cast(b < like(a, 0), "int8")
            )
            return select(wrong, rest + b, rest)
        return tirx.truncmod(a, b) if op.integer("fmod") else tirx.floormod(a, b)

    return elementwise(op, remainder, [op.value(0), op.value(1)])


def _pow(op: Op) -> Sequence[Value]:
    exponent = op.value(1)
    number = exponent.value if isinstance(exponent, Scalar) else None

    def power(code: Code, x: Expr, y: Expr) -> Expr:
        if number is not None and is_float(x):
            x = code.bind(x)
            simple: dict[float, Callable[[], Expr]] = {
                1: lambda: x,
                2: lambda: x * x,
                3: lambda: x * x * x,
                4: lambda: (x * x) * (x * x),
                0.5: lambda: tirx.sqrt(x),
                -0.5: lambda: like(x, 1.0) / tirx.sqrt(x),
                -1: lambda: like(x, 1.0) / x,
            }
            if number in simple:
                return simple[number]()
        if is_float(x):
            return tirx.pow(x, cast(y, dtype_of(x)))
        # whole numbers below 2 ** 53 are exact in float64, and so are their powers
        return cast(tirx.pow(cast(x, "float64"), cast(y, "float64")), dtype_of(x))

    return elementwise(op, power, [op.value(0), op.value(1)])


def _where(op: Op) -> Sequence[Value]:
    return elementwise(
        op, lambda code, c, a, b: select(c, a, b), [op.value(0), op.value(1), op.value(2)]
    )


def _clip(op: Op) -> Sequence[Value]:
    has_low, has_high = op.has(1), op.has(2)
    operands = [op.value(0)]
    operands += [op.value(1)] if has_low else []
    operands += [op.value(2)] if has_high else []

    literal = all(isinstance(bound, Scalar) for bound in operands[1:])

    def clip(code: Code, x: Expr, *bounds: Expr) -> Expr:
        if literal and has_low and has_high and is_float(x):
            x = code.bind(x)
            x = select(x < bounds[0], bounds[0], x)
            return select(x > bounds[1], bounds[1], x)
        if has_low:
            x = larger(code, x, bounds[0])
        if has_high:
            x = smaller(code, x, bounds[-1])
        return x

    return elementwise(op, clip, operands)


def _is_inf(op: Op) -> Sequence[Value]:
    def is_inf(code: Code, x: Expr) -> Expr:
        result = const(False, "bool")
        if op.integer("detect_positive", 1):
            result = tirx.Or(result, x == like(x, float("inf")))
        if op.integer("detect_negative", 1):
            result = tirx.Or(result, x == like(x, float("-inf")))
        return result

    return elementwise(op, is_inf, [op.value(0)])


def _bit_shift(op: Op) -> Sequence[Value]:
    left = op.text("direction") == "LEFT"

    def shift(code: Code, x: Expr, y: Expr) -> Expr:
        dtype = dtype_of(x)
        bits = int("".join(c for c in dtype if c.isdigit()))
        x, y = code.bind(x), code.bind(y)
        valid = y < like(y, bits)
        emptied = like(x, 0)
        if not dtype.startswith("u"):
            valid = tirx.And(valid, y >= like(y, 0))
            if not left:
                emptied = select(x < like(x, 0), like(x, -1), emptied)
        by = select(valid, y, like(y, 0))
        return select(valid, x << by if left else x >> by, emptied)

    return elementwise(op, shift, [op.value(0), op.value(1)])


def _swiglu(op: Op) -> Sequence[Value]:
    alpha = op.real("alpha", 1.0)
    return elementwise(op, lambda code, a, b: swish(code, a, alpha) * b, [op.value(0), op.value(1)])


# -- types ------------------------------------------------------------------------------------------

_NARROW_INTS = {D.INT4: (4, True), D.UINT4: (4, False), D.INT2: (2, True), D.UINT2: (2, False)}


def convert(code: Code, x: Expr, source: D, target: D, saturate: bool = True) -> Expr:
    """``x`` as a value of ``target``, as Cast has it."""
    from netlathe.backends.tvm import bits

    to = storage.computed(target)
    if target == D.BOOL:
        return x if dtype_of(x) == "bool" else x != like(x, 0)
    if dtype_of(x) == "bool":
        x = cast(x, "int8") if to != "bool" else x
    if target in bits.FORMATS:
        form = bits.FORMATS[target]
        return bits.from_small(
            code, bits.to_small(code, cast(x, "float32"), form, saturate=saturate), form
        )
    if target in _NARROW_INTS:
        width, signed = _NARROW_INTS[target]
        wide = cast(x, "int32")
        low = wide & const((1 << width) - 1, "int32")
        if signed:
            half = const(1 << (width - 1), "int32")
            low = (low ^ half) - half
        return cast(low, to)
    if is_float(x) and to.startswith(("int", "uint")) and "64" not in to:
        # Through int64: what does not fit keeps its low bits instead of being undefined.
        return cast(cast(x, "int64"), to)
    return cast(x, to)


def _cast(op: Op) -> Sequence[Value]:
    source = op.value(0)
    target = op.dtype()
    saturate = bool(op.integer("saturate", 1))
    return elementwise(
        op, lambda code, x: convert(code, x, source.dtype, target, saturate), [source], target
    )


_BITS_OF = {"float32": "int32", "float64": "int64", "float16": "int16"}


def _bit_cast(op: Op) -> Sequence[Value]:
    source = op.value(0)
    target = op.dtype()
    if {source.dtype, target} & {*_NARROW_INTS}:
        raise op.gap("elements of less than a byte")

    def reinterpret(code: Code, x: Expr) -> Expr:
        stored = storage.store(code, source.dtype, x)
        if dtype_of(stored) == "bool":
            stored = cast(stored, "uint8")
        wanted = storage.STORED[target]
        if wanted == "bool":
            return cast(stored, "uint8") != const(0, "uint8")
        return storage.load(code, target, tirx.reinterpret(wanted, stored))

    return elementwise(op, reinterpret, [source], target)


ROWS: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    "Max": _several(larger),
    "Min": _several(smaller),
    "Sum": _several(lambda code, a, b: a + b),
    "Mean": _mean,
    "Mod": _mod,
    "Pow": _pow,
    "Where": _where,
    "Clip": _clip,
    "IsInf": _is_inf,
    "BitShift": _bit_shift,
    "SwiGLU": _swiglu,
    "Cast": _cast,
    "CastLike": _cast,
    "BitCast": _bit_cast,
}
