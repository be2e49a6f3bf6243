"""Hadamard matrices: square, of +1 and -1, with rows orthogonal to each other.

There is one of order 1 and 2; Kronecker products of two are one (Sylvester); of a prime power q Paley's
constructions give one of order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4). From these follow all that the
widths of known models ask for: 12, 20, 28, 44, 76, 108, 140, 148 and 344 times powers of two among them.
The smallest multiple of 4 that they do not reach is 92.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import numpy.typing as npt

Signs = npt.NDArray[np.int8]
Basis = npt.NDArray[np.float64]
_TWO: Signs = np.array([[1, 1], [1, -1]], np.int8)


@functools.cache
def hadamard(order: int) -> Signs | None:
    """A Hadamard matrix, read-only; None where no construction here gives one."""
    made = _built(order)
    if made is not None:
        made.flags.writeable = False
    return made


def _built(order: int) -> Signs | None:
    if order in (1, 2):
        return _TWO[:order, :order].copy()
    if order < 1 or order % 4:
        return None
    if order & (order - 1) == 0:  # Sylvester's
        return _kron(_TWO, hadamard(order // 2))
    q = order - 1
    if q % 4 == 3 and _prime_power(q):
        return _paley(q)
    q = order // 2 - 1
    if q % 4 == 1 and _prime_power(q):
        return _paley_doubled(q)
    return _kron(_TWO, hadamard(order // 2))


def _kron(a: Signs, b: Signs | None) -> Signs | None:
    return None if b is None else np.asarray(np.kron(a, b), np.int8)


def factors(size: int) -> tuple[int, int] | None:
    """Two orders whose product is ``size``, near each other, each of which has a Hadamard matrix."""
    splits = [(a, size // a) for a in range(1, math.isqrt(size) + 1) if size % a == 0]
    for a, b in reversed(splits):  # the nearest first: a + b products an element
        for pair in ((a, b), (b, a)):
            if all(hadamard(order) is not None for order in pair):
                return pair
    return None


def random_hadamard(size: int, rng: np.random.Generator) -> Basis:
    """A Hadamard matrix over sqrt(size), its rows with random signs (QuaRot, arXiv 2404.00456, sec. 3).

    Of a size that has none: the Kronecker product of Sylvester's with a random orthogonal matrix of the odd
    factor.
    """
    signs = rng.choice((-1.0, 1.0), size)
    whole = hadamard(size)
    if whole is not None:
        return np.asarray(whole * signs[:, None] / math.sqrt(size))
    power = size & -size
    walsh = hadamard(power)
    assert walsh is not None
    odd = random_orthogonal(size // power, rng)
    return np.asarray(np.kron(walsh / math.sqrt(power), odd) * signs[:, None], np.float64)


def random_orthogonal(size: int, rng: np.random.Generator) -> Basis:
    """A rotation drawn evenly from all: QR of Gaussian numbers, with signs that make it unique."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    made: Basis = (q * np.sign(np.diag(r))).astype(np.float64)
    return made


# -- Paley ----------------------------------------------------------------------------------------------


def _paley(q: int) -> Signs:
    """I + S of the skew S bordered by ones: order q + 1."""
    skew = np.zeros((q + 1, q + 1), np.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(q)
    return skew + np.eye(q + 1, dtype=np.int8)


def _paley_doubled(q: int) -> Signs:
    """The symmetric conference matrix C of order q + 1 in blocks: order 2 (q + 1)."""
    conference = np.zeros((q + 1, q + 1), np.int8)
    conference[0, 1:], conference[1:, 0] = 1, 1
    conference[1:, 1:] = _jacobsthal(q)
    rest = np.array([[1, -1], [-1, -1]], np.int8)
    made = np.kron(conference, _TWO) + np.kron(np.eye(q + 1, dtype=np.int8), rest)
    return np.asarray(made, np.int8)


def _jacobsthal(q: int) -> Signs:
    """Whether the difference of two elements of the field of q is a square (1), is none (-1), is zero (0)."""
    known = _prime_power(q)
    assert known is not None
    p, k = known
    elements = list(itertools.product(range(p), repeat=k))  # polynomials, lowest power first
    modulus = _irreducible(p, k)
    squares = {_multiplied(e, e, modulus, p) for e in elements if any(e)}
    kinds = {e: 0 if not any(e) else 1 if e in squares else -1 for e in elements}
    numbers = np.array(elements)
    differences = (numbers[:, None] - numbers[None, :]) % p
    codes = differences @ (p ** np.arange(k))
    by_code = np.empty(q, np.int8)
    for element, kind in kinds.items():
        by_code[int(np.dot(element, p ** np.arange(k)))] = kind
    return np.asarray(by_code[codes])


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k for a prime p."""
    for p in range(2, math.isqrt(q) + 1):
        if q % p == 0:
            k = round(math.log(q, p))
            return (p, k) if p**k == q else None
    return (q, 1) if q > 1 else None


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """The low coefficients of a monic polynomial of degree k that is no product, over p."""
    if k == 1:
        return (0,)
    products = set()
    for degree in range(1, k // 2 + 1):
        for a in itertools.product(range(p), repeat=degree):
            for b in itertools.product(range(p), repeat=k - degree):
                found = np.convolve((*a, 1), (*b, 1)) % p
                products.add(tuple(int(c) for c in found[:k]))
    return next(c for c in itertools.product(range(p), repeat=k) if c not in products)


def _multiplied(
    a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int
) -> tuple[int, ...]:
    k = len(a)
    product = [int(c) for c in np.convolve(a, b)]
    for top in range(2 * k - 2, k - 1, -1):  # x^k = -modulus
        lead = product[top]
        for at, coefficient in enumerate(modulus):
            product[top - k + at] -= lead * coefficient
    return tuple(c % p for c in product[:k])
