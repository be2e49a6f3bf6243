"""The notation of axis signatures: what einops is for one tensor, for the operands of an operator.

    b (g i) *s, (g o) i *k, (g o)? -> b (g o) *t

Operands stand in order, separated by commas; ``?`` marks one that may be absent, ``_`` one whose
axes mean nothing to the operator's result (a list of sizes, a scalar). A dim of an operand is

    d        a letter (a word): the same axis wherever it stands
    (g i)    a product, row-major
    (p|t)    segments, one after the other
    *s       any number of dims, the same ones wherever it stands
    ...      any number of dims that broadcast, aligned to the right
    1        a dim of one position
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn, TypeAlias


@dataclass(frozen=True)
class Letter:
    """One axis, by name."""

    name: str


@dataclass(frozen=True)
class One:
    """A dim of one position."""


@dataclass(frozen=True)
class Run:
    """Any number of dims, by name; ``...`` is the run that broadcasts."""

    name: str


@dataclass(frozen=True)
class Times:
    """A product."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Then:
    """Segments."""

    terms: tuple[Term, ...]


Term: TypeAlias = Letter | One | Times | Then
Dim: TypeAlias = Term | Run
BROADCAST = Run("...")


@dataclass(frozen=True)
class Operand:
    """The dims of one operand; None where the operand's axes mean nothing (``_``)."""

    dims: tuple[Dim, ...] | None
    optional: bool = False


@dataclass(frozen=True)
class Pattern:
    """A parsed rule."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


@lru_cache(maxsize=4096)
def parse(rule: str) -> Pattern:
    """Read a rule such as ``... m k, ... k n -> ... m n``."""
    left, arrow, right = rule.partition("->")
    if not arrow:
        raise ValueError(f"no arrow in {rule!r}")
    return Pattern(_operands(left), _operands(right))


@lru_cache(maxsize=4096)
def parse_term(text: str) -> Term:
    """Read one dim, such as ``(n r)``."""
    reader = _Reader(text)
    term = reader.dim()
    if isinstance(term, Run) or reader.peek():
        reader.fail()
    return term


def letters(dim: Dim) -> Iterator[str]:
    """The letters of a dim, in order; of a run its name."""
    if isinstance(dim, Letter | Run):
        yield dim.name
    elif isinstance(dim, Times | Then):
        for term in dim.terms:
            yield from letters(term)


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(_Reader(part).operand() for part in text.split(","))


_TOKEN = re.compile(r"\s*(\.\.\.|\*?[a-z]\w*|[1()|?_])")


class _Reader:
    """Recursive descent over one operand."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[str] = []
        at, text = 0, text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                self.fail()
            self.tokens.append(match[1])
            at = match.end()
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def fail(self) -> NoReturn:
        raise ValueError(f"not an operand of an axis signature: {self.text!r}")

    def operand(self) -> Operand:
        if self.tokens == ["_"] or self.tokens == ["_", "?"]:
            return Operand(None, optional=True)
        found: list[Dim] = []
        while self.peek() not in ("", "?"):
            found.append(self.dim())
        optional = self.take() == "?"
        if self.peek():
            self.fail()
        return Operand(tuple(found), optional)

    def dim(self) -> Dim:
        token = self.take()
        if token == "...":
            return BROADCAST
        if token.startswith("*"):
            return Run(token[1:])
        if token == "1":
            return One()
        if token == "(":
            return self.group()
        if not token or not token[0].isalpha():
            self.fail()
        return Letter(token)

    def group(self) -> Term:
        """``a b c)``, ``a|b|c)``, or segments of products: ``(x y|z)``."""
        segments: list[Term] = []
        terms: list[Term] = []
        while True:
            token = self.peek()
            if token in ("|", ")"):
                self.take()
                if not terms:
                    self.fail()
                segments.append(terms[0] if len(terms) == 1 else Times(tuple(terms)))
                terms = []
                if token == ")":
                    return segments[0] if len(segments) == 1 else Then(tuple(segments))
                continue
            term = self.dim()
            if isinstance(term, Run):
                self.fail()
            terms.append(term)
