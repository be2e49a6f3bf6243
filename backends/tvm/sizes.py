"""Sizes in kernels: dims, which are expressions over names, as TIR expressions over variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from tvm import tirx

from netlathe.backends.tvm.tir import Expr, i64
from netlathe.ir.dims import Dim

Lookup = Callable[[str], Expr]


def to_expr(dim: Dim, lookup: Lookup) -> Expr:
    """``dim`` in int64; ``lookup`` gives the variable of a name."""
    if isinstance(dim, int):
        return i64(dim)
    assert dim is not None
    return _convert(sympy.sympify(dim), lookup)


def _convert(expr: Any, lookup: Lookup) -> Expr:
    if expr.is_Integer:
        return i64(int(expr))
    if expr.is_Symbol:
        return lookup(expr.name)
    if isinstance(expr, sympy.floor):
        return _quotient(expr.args[0], lookup)
    if isinstance(expr, sympy.ceiling):
        return i64(0) - _quotient(-expr.args[0], lookup)
    if isinstance(expr, sympy.Mod):
        return tirx.floormod(_convert(expr.args[0], lookup), _convert(expr.args[1], lookup))
    parts = [_convert(arg, lookup) for arg in expr.args] if not _is_ratio(expr) else []
    if isinstance(expr, sympy.Add) and parts:
        return _fold(lambda a, b: a + b, parts)
    if isinstance(expr, sympy.Max):
        return _fold(tirx.max, parts)
    if isinstance(expr, sympy.Min):
        return _fold(tirx.min, parts)
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and int(expr.exp) > 0:
        return _fold(lambda a, b: a * b, [_convert(expr.base, lookup)] * int(expr.exp))
    if isinstance(expr, sympy.Mul) and parts:
        return _fold(lambda a, b: a * b, parts)
    return _quotient(expr, lookup)  # exact by construction: sizes are whole numbers


def _is_ratio(expr: Any) -> bool:
    return bool(sympy.fraction(sympy.together(expr))[1] != 1)


def _quotient(expr: Any, lookup: Lookup) -> Expr:
    numerator, denominator = sympy.fraction(sympy.together(expr))
    above = _convert(sympy.expand(numerator), lookup)
    if denominator == 1:
        return above
    return tirx.floordiv(above, _convert(sympy.expand(denominator), lookup))


def _fold(combine: Callable[[Expr, Expr], Expr], parts: list[Expr]) -> Expr:
    result = parts[0]
    for part in parts[1:]:
        result = combine(result, part)
    return result
