"""Linear layers: operators that sum products over an axis."""

from __future__ import annotations

from netlathe.analysis.axes.signature import Signature, Site, Table

_WINDOW = "slides a window along it"
# Groups are one axis and the channels of each another. Where neither can go by itself, a group might still
# go with some channels of the groups that stay; that would be an edit of two axes, and is not offered.
_APART = {"g": "i o"}


def _matmul(s: Site) -> Signature:
    vector_a, vector_b = s.rank(0) == 1, s.rank(1) == 1
    a = "k" if vector_a else "... m k"
    b = "k" if vector_b else "... k n"
    out = " ".join(
        part for part, there in (("...", True), ("m", not vector_a), ("n", not vector_b)) if there
    )
    return Signature(f"{a}, {b} -> {'' if vector_a and vector_b else out}", linear="0*1")


def _gemm(s: Site) -> Signature:
    a = "k m" if s.integer("transA") else "m k"
    b = "n k" if s.integer("transB") else "k n"
    bias = ("", "n", "m n")[s.rank(2)] if s.has(2) else ""
    return Signature(f"{a}, {b}, {bias}? -> m n", linear="0*1 + 2" if s.has(2) else "0*1")


def _einsum(s: Site) -> Signature:
    """The equation is the signature, but for letters that stand twice in one operand."""
    equation = s.text("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow:
        found = left.replace(",", "").replace(".", "")
        right = "".join(letter for letter in sorted(set(found)) if found.count(letter) == 1)
        right = ("..." if "..." in left else "") + right
    operands = [operand.replace("...", ".") for operand in left.split(",")]
    if any(len(set(operand)) != len(operand) for operand in operands):
        s.refuse(f"takes a diagonal, {equation}")
    sides = [" ".join(map(_letter, operand)) for operand in operands]
    result = " ".join(map(_letter, right.replace("...", ".")))
    formula = "*".join(map(str, range(len(operands))))
    return Signature(f"{', '.join(sides)} -> {result}", linear=formula)


def _letter(of: str) -> str:
    """A letter of an equation, upper or lower case, as one of ours."""
    return "..." if of == "." else of if of.islower() else f"{of.lower()}_upper"


def _conv(s: Site) -> Signature:
    return Signature(
        "b (g i) *s, (g o) i *k, (g o)? -> b (g o) *t",
        uses={"group": "g"},
        fixed={"s k t": _WINDOW},
        apart=_APART,
        linear="0*1 + 2" if s.has(2) else "0*1",
    )


def _conv_transpose(s: Site) -> Signature:
    return Signature(
        "b (g i) *s, (g i) o *k, (g o)? -> b (g o) *t",
        uses={"group": "g"},
        fixed={"s k t": _WINDOW},
        apart=_APART,
        linear="0*1 + 2" if s.has(2) else "0*1",
    )


TABLE: Table = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
