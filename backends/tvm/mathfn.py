"""Functions of real numbers as arithmetic that vectorizes, in float32; float64 takes libm's.

TVM lowers exp, erf and tanh of a vector to one libm call per lane. The forms here stay within a few
ulp of the real value (`tests/backends/tvm/test_tvm_mathfn.py` measures it) and handle NaN and infinities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from netlathe.backends.tvm.bits import as_float, as_int
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.tir import Code, Expr, cast, const, dtype_of, is_nan, select

_F = "float32"


def f(value: float) -> Expr:
    """A float32 literal."""
    return const(value, _F)


def horner(x: Expr, coefficients: list[float], dtype: str = _F) -> Expr:
    """c[0] * x**n + ... + c[n]."""
    result = const(coefficients[0], dtype)
    for coefficient in coefficients[1:]:
        result = result * x + const(coefficient, dtype)
    return result


def _wide(
    function: Any, name: str
) -> Callable[[Callable[[Code, Expr], Expr]], Callable[[Code, Expr], Expr]]:
    """Use libm's ``function`` where the argument is float64, CUDA's ``name`` on a GPU.

    That one has instructions of the GPU to start from, and is within 2 ulp too (CUDA C++ Programming Guide,
    Mathematical Functions, table of single-precision functions).
    """

    def wrap(narrow: Callable[[Code, Expr], Expr]) -> Callable[[Code, Expr], Expr]:
        def call(code: Code, x: Expr) -> Expr:
            if dtype_of(x) == "float64":
                return function(x)
            return code.function(name, x) if isinstance(code, GpuCode) else narrow(code, x)

        return call

    return wrap


@_wide(tirx.exp, "expf")
def exp(code: Code, x: Expr) -> Expr:
    """e ** x: x = n ln 2 + r, and e ** r by Cephes' polynomial of degree 7; within 2 ulp."""
    x = code.bind(x)
    nothing = x < f(-104.0)  # as masked scores are: 0 in place of x, as subnormal products are slow
    held = code.bind(select(x > f(89.0), f(89.0), select(nothing, f(0.0), x)))
    n = code.bind(tirx.floor(held * f(1.44269504088896341) + f(0.5)))
    r = code.bind(held - n * f(0.693359375) - n * f(-2.12194440e-4))
    p = horner(
        r,
        [
            1.9875691500e-4,
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ],
    )
    value = code.bind(p * r * r + r + f(1.0))
    # 2 ** n in two steps: the result may be subnormal, or overflow to inf.
    whole = code.bind(cast(n, "int32"))
    half = code.bind(whole >> const(1, "int32"))
    scaled = value * _power_of_two(half) * _power_of_two(whole - half)
    return select(is_nan(x), x, select(nothing, f(0.0), scaled))


def _power_of_two(n: Expr) -> Expr:
    return as_float((n + const(127, "int32")) << const(23, "int32"))


@_wide(tirx.log, "logf")
def log(code: Code, x: Expr) -> Expr:
    """ln x: x = m 2 ** e with m in [sqrt 1/2, sqrt 2), and Cephes' polynomial of degree 9."""
    x = code.bind(x)
    tiny = x < f(1.17549435e-38)
    scaled = code.bind(select(tiny, x * f(2.0**25), x))
    whole = code.bind(as_int(scaled))
    m = code.bind(as_float((whole & const(0x007FFFFF, "int32")) | const(0x3F000000, "int32")))
    e = cast((whole >> const(23, "int32")) & const(255, "int32"), _F) - f(126.0)
    e = code.bind(select(tiny, e - f(25.0), e))
    low = m < f(0.707106781186547524)
    e = code.bind(select(low, e - f(1.0), e))
    m = code.bind(select(low, m + m, m) - f(1.0))
    z = code.bind(m * m)
    p = horner(
        m,
        [
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ],
    )
    y = m * z * p + e * f(-2.12194440e-4) - f(0.5) * z
    result = m + y + e * f(0.693359375)
    result = select(x == f(float("inf")), x, result)
    result = select(x == f(0.0), f(float("-inf")), result)
    return select(x >= f(0.0), result, f(float("nan")))


@_wide(tirx.erf, "erff")
def erf(code: Code, x: Expr) -> Expr:
    """The error function, by N. Juffa's two polynomials: within 1 ulp."""
    x = code.bind(x)
    t = code.bind(tirx.abs(x))
    t = code.bind(select(t > f(4.0), f(4.0), t))  # from there on the result rounds to 1
    s = code.bind(t * t)
    r = horner(t, [-1.72853470e-5, 3.83197126e-4])
    u = horner(t, [-3.88396438e-3, 2.42546219e-2])
    r = r * s + u
    r = r * t + f(-1.06777877e-1)
    r = r * t + f(-6.34846687e-1)
    r = r * t + f(-1.28717512e-1)
    r = r * t - t
    large = f(1.0) - exp(code, r)
    large = select(x < f(0.0), f(0.0) - large, large)
    p = horner(
        s,
        [
            -5.96761703e-4,
            4.99119423e-3,
            -2.67681349e-2,
            1.12819925e-1,
            -3.76125336e-1,
            1.28379166e-1,
        ],
    )
    small = p * x + x
    return select(t > f(0.927734375), large, select(is_nan(x), x, small))


@_wide(tirx.tanh, "tanhf")
def tanh(code: Code, x: Expr) -> Expr:
    """tanh as a rational function of degree 13 by 6, as Eigen and MLAS have it; 1 from 9 on."""
    x = code.bind(x)
    held = code.bind(select(x > f(9.0), f(9.0), select(x < f(-9.0), f(-9.0), x)))
    s = code.bind(held * held)
    top = horner(
        s,
        [
            -2.76076847742355e-16,
            2.00018790482477e-13,
            -8.60467152213735e-11,
            5.12229709037114e-08,
            1.48572235717979e-05,
            6.37261928875436e-04,
            4.89352455891786e-03,
        ],
    )
    bottom = horner(
        s, [1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03]
    )
    return select(tirx.abs(x) < f(4e-4), x, held * top / bottom)


def sigmoid(code: Code, x: Expr) -> Expr:
    """1 / (1 + e ** -x)."""
    one = const(1.0, dtype_of(x))
    whole = one + exp(code, const(0.0, dtype_of(x)) - x)
    if isinstance(code, GpuCode) and dtype_of(x) == "float32":
        return code.reciprocal(whole)
    return one / whole


def softplus(code: Code, x: Expr) -> Expr:
    """ln(1 + e ** x) as max(x, 0) + ln(1 + e ** -|x|)."""
    x = code.bind(x)
    zero = const(0.0, dtype_of(x))
    rest = log1p(code, exp(code, zero - tirx.abs(x)))
    return select(x > zero, x, zero) + rest


def log1p(code: Code, x: Expr) -> Expr:
    """ln(1 + x), by ln(u) x / (u - 1) with u = 1 + x, which is exact to a few ulp near 0."""
    x = code.bind(x)
    one = const(1.0, dtype_of(x))
    u = code.bind(x + one)
    rest = code.bind(u - one)
    exact = rest == const(0.0, dtype_of(x))
    return select(exact, x, log(code, u) * x / select(exact, one, rest))


def sqrt(code: Code, x: Expr) -> Expr:
    """The square root, one instruction."""
    return tirx.sqrt(x)
