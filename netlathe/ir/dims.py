"""Dimensions: ints, or sympy expressions over the names of the graph inputs' dynamic dims."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, TypeAlias

import onnx_ir as ir
import sympy

# None is a dim that nothing is known of.
Dim: TypeAlias = int | sympy.Expr | None
Shape: TypeAlias = tuple[Dim, ...]


@lru_cache(maxsize=4096)
def symbol(name: str) -> sympy.Symbol:
    """The dim called ``name``: a non-negative integer (a cache may be empty)."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


# -- text -----------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def parse(text: str) -> Dim:
    """A dim from its text, such as ``past_sequence + sequence`` or ``floor(height/2)``.

    Text that is no expression (some exporters write ``unk__12::0``) becomes one symbol of that name.
    The text comes from model files, so it is read by our own grammar and never evaluated.
    """
    try:
        return simplify(_Parser(text).whole())
    except _NoExpression:
        return symbol(text)


class _NoExpression(Exception):
    """The text follows another grammar than ours."""


# A dash between letters belongs to a name ("batch-size"): sympy writes spaces around a minus.
_TOKEN = re.compile(r"\s*([A-Za-z_](?:[\w.:]|-(?=[A-Za-z_]))*|\d+|\*\*|//|[-+*/(),])")
_LONGEST = 2000  # characters; no exporter writes a dim near this, and the parser recurses

_FUNCTIONS: Mapping[str, tuple[int | None, Callable[..., sympy.Expr]]] = {
    "floor": (1, sympy.floor),
    "ceiling": (1, sympy.ceiling),
    "Max": (None, sympy.Max),
    "Min": (None, sympy.Min),
    "max": (None, sympy.Max),
    "min": (None, sympy.Min),
    "Mod": (2, sympy.Mod),
    "PythonMod": (2, sympy.Mod),
    "FloorDiv": (2, lambda a, b: sympy.floor(_quotient(a, b))),
    "CleanDiv": (2, lambda a, b: _quotient(a, b)),
}


class _Parser:
    """Recursive descent over sums of products of powers of names, ints and calls."""

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise _NoExpression
        self.tokens: list[str] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise _NoExpression
            self.tokens.append(match[1])
            at = match.end()
        self.at = 0

    def whole(self) -> sympy.Expr:
        value = self.sum()
        if self.at != len(self.tokens):
            raise _NoExpression
        return value

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise _NoExpression
        self.at += 1
        return token

    def sum(self) -> sympy.Expr:
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = value + sign * self.product()
        return value

    def product(self) -> sympy.Expr:
        value = self.signed()
        while self.peek() in ("*", "/", "//"):
            operator = self.take()
            other = self.signed()
            if operator == "*":
                value = value * other
            else:
                quotient = _quotient(value, other)
                value = quotient if operator == "/" else sympy.floor(quotient)
        return value

    def signed(self) -> sympy.Expr:
        if self.peek() == "-":
            self.take()
            return -self.signed()
        return self.power()

    def power(self) -> sympy.Expr:
        value = self.atom()
        if self.peek() == "**":
            self.take()
            exponent = self.signed()
            if not exponent.is_Integer or abs(int(exponent)) > 64:
                raise _NoExpression
            value = value**exponent
        return value

    def atom(self) -> sympy.Expr:
        token = self.take()
        if token == "(":
            value = self.sum()
            self.take(")")
            return value
        if token.isdigit():
            return sympy.Integer(int(token))
        if not (token[0].isalpha() or token[0] == "_"):
            raise _NoExpression
        if self.peek() != "(":
            return symbol(token)
        if token not in _FUNCTIONS:
            raise _NoExpression
        count, function = _FUNCTIONS[token]
        self.take("(")
        arguments = [self.sum()]
        while self.peek() == ",":
            self.take()
            arguments.append(self.sum())
        self.take(")")
        if count is not None and len(arguments) != count:
            raise _NoExpression
        return function(*arguments)


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if b.is_zero:
        raise _NoExpression
    return a / b


def from_ir(dim: int | ir.SymbolicDim) -> Dim:
    """A recorded dim as a :data:`Dim`."""
    if isinstance(dim, int):
        return dim
    return None if dim.value is None else parse(dim.value)


def to_ir(dim: Dim) -> int | ir.SymbolicDim:
    """A dim as it is recorded; text and expression convert into each other without loss."""
    if isinstance(dim, int):
        return dim
    return ir.SymbolicDim(None if dim is None else str(dim))


def show(shape: Sequence[Dim] | None) -> str:
    """``[batch,sequence,384]``; ``?`` for an unknown dim, ``[...]`` where not even the rank is known."""
    if shape is None:
        return "[...]"
    return "[" + ",".join("?" if dim is None else str(dim) for dim in shape) + "]"


# -- arithmetic; unknown in, unknown out -------------------------------------------------------------


def simplify(value: object) -> Dim:
    """An int where the expression is one, else the expression in sympy's canonical form."""
    if value is None or type(value) is int:
        return value
    expression: Any = sympy.sympify(value, strict=True)
    return int(expression) if expression.is_Integer else expression


def same(a: Dim, b: Dim) -> bool | None:
    """Whether two dims are equal for all sizes; None where that depends on the sizes."""
    if a is None or b is None:
        return None
    if a is b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _same(a, b)


@lru_cache(maxsize=65536)
def _same(a: int | sympy.Expr, b: int | sympy.Expr) -> bool | None:
    if a == b:
        return True
    difference = sympy.expand(sympy.sympify(a) - sympy.sympify(b))
    if difference.is_zero:
        return True
    return False if difference.is_nonzero else None


def product(dims: Iterable[Dim]) -> Dim:
    """The product; None as soon as one factor is unknown, unless another is 0."""
    number, unknown = 1, False
    factors: list[sympy.Expr] = []
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        elif dim is None:
            unknown = True
        else:
            factors.append(dim)
    if number == 0:
        return 0
    if unknown:
        return None
    return number if not factors else _product(number, tuple(factors))


@lru_cache(maxsize=65536)
def _product(number: int, factors: tuple[sympy.Expr, ...]) -> Dim:
    return simplify(sympy.expand(sympy.Mul(number, *factors)))


@lru_cache(maxsize=65536)
def quotient(a: int | sympy.Expr, b: int | sympy.Expr) -> sympy.Expr:
    """a / b with common factors taken off; b is not 0."""
    return sympy.cancel(sympy.sympify(a) / sympy.sympify(b))


def divide(a: Dim, b: Dim) -> Dim:
    """a // b, exact where sympy can show it."""
    if a is None or b is None or b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = quotient(a, b)
    return simplify(exact if exact.is_integer else sympy.floor(exact))


def ceil_divide(a: Dim, b: Dim) -> Dim:
    """The least integer that is at least a / b."""
    if a is None or b is None or b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return -(-a // b)
    exact = quotient(a, b)
    return simplify(exact if exact.is_integer else sympy.ceiling(exact))


def add(a: Dim, b: Dim) -> Dim:
    """a + b."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return None if a is None or b is None else simplify(sympy.expand(a + b))


def subtract(a: Dim, b: Dim) -> Dim:
    """a - b; of b = max(c, d), unless a has that, it is min(a - c, a - d), in which terms may cancel."""
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    if isinstance(b, sympy.Max | sympy.Min) and not (isinstance(a, sympy.Expr) and a.has(b)):
        choose = smallest if isinstance(b, sympy.Max) else largest
        return reduce(choose, [subtract(a, simplify(each)) for each in b.args])
    return None if a is None or b is None else simplify(sympy.expand(a - b))


def largest(a: Dim, b: Dim) -> Dim:
    """The larger of the two."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return None if a is None or b is None else simplify(sympy.Max(a, b))


def smallest(a: Dim, b: Dim) -> Dim:
    """The smaller of the two."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return None if a is None or b is None else simplify(sympy.Min(a, b))


def settle(dim: Dim, at: Mapping[sympy.Symbol, int]) -> Dim:
    """The dim where some names in it have sizes."""
    return dim if dim is None or isinstance(dim, int) else simplify(dim.subs(list(at.items())))


def evaluate(dim: Dim, at: Mapping[sympy.Symbol, int]) -> int | None:
    """The dim as a number, where ``at`` gives every name in it a size."""
    if dim is None or isinstance(dim, int):
        return dim
    value = dim.subs(list(at.items()))
    return int(value) if value.is_Integer else None


# -- broadcasting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clash:
    """Two sizes at one axis (counted from the right) that never broadcast."""

    axis_from_right: int
    a: Dim
    b: Dim


@dataclass(frozen=True)
class Broadcast:
    """The common shape, a clash if there is one, and (symbolic, fixed) pairs that must agree or be 1."""

    shape: Shape
    clash: Clash | None = None
    pinned: tuple[tuple[sympy.Expr, int], ...] = ()


def broadcast(shapes: Sequence[Shape]) -> Broadcast:
    """The multidirectional broadcast of ``shapes``.

    ======================  ==============================================================
    1 with x                x
    equal                   that dim
    n with m, both fixed    a clash, unless one of them is 1
    n with an expression    n: the other one must be n or 1
    two expressions         a clash if they provably differ and neither can be 1; else their
                            maximum, which is right whether they are equal or one is 1
    unknown with n          n, unless n is 1
    ======================  ==============================================================
    """
    if len(shapes) == 2 and shapes[0] == shapes[1] and None not in shapes[0]:
        return Broadcast(shapes[0])
    rank = max((len(shape) for shape in shapes), default=0)
    out: list[Dim] = []
    pinned: list[tuple[sympy.Expr, int]] = []
    for axis in range(rank, 0, -1):
        column = [shape[-axis] for shape in shapes if axis <= len(shape)]
        fixed = {dim for dim in column if isinstance(dim, int) and dim != 1}
        symbolic: list[sympy.Expr] = []
        for dim in dict.fromkeys(column):
            if isinstance(dim, sympy.Expr) and not any(same(dim, held) for held in symbolic):
                symbolic.append(dim)
        if len(fixed) > 1:
            a, b = [dim for dim in dict.fromkeys(column) if dim in fixed][:2]
            return Broadcast((), Clash(axis, a, b))
        if fixed:
            (width,) = fixed
            for dim in symbolic:
                if same(dim, width) is False and same(dim, 1) is False:
                    return Broadcast((), Clash(axis, dim, width))
                pinned.append((dim, width))
            out.append(width)
        elif None in column:
            out.append(None)
        elif symbolic:
            for dim in symbolic[1:]:
                never_one = same(dim, 1) is False and same(symbolic[0], 1) is False
                if never_one and same(dim, symbolic[0]) is False:
                    return Broadcast((), Clash(axis, symbolic[0], dim))
            out.append(reduce(largest, symbolic))
        else:
            out.append(1)
    return Broadcast(tuple(out), None, tuple(pinned))
