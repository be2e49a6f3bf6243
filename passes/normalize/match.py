"""Patterns over the graph: written as the formula reads, matched backwards from a value.

    x = var("x")
    inverse_rms = op("Reciprocal", op("Sqrt", op("Add", mean_of_square(x), scalar("eps"))))
    found = match(op("Mul", x, inverse_rms), value)      # raises NoMatch(reason, node)
    found.values["x"], found.number("eps"), found.nodes

``Add`` and ``Mul`` are tried in both operand orders, a name that occurs twice must bind the same value,
numbers compare by value. The reason of a failure is that of the attempt that got furthest.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from netlathe.ir.edit import const_array

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Max", "Min"})
NUMBER_RTOL = 1e-5  # constants such as sqrt(2/pi) are often written with six digits


class NoMatch(Exception):
    """The construct is not the one looked for: why, and at which node."""

    def __init__(self, reason: str, node: ir.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Found:
    """A match: values by name and every node that the pattern walked through, outermost first."""

    values: Mapping[str, ir.Value] = field(default_factory=dict)
    nodes: tuple[ir.Node, ...] = ()

    def number(self, name: str) -> float:
        """The constant bound to ``name``, which the pattern demanded to be a single number."""
        number = number_of(self.values[name])
        assert number is not None, name
        return number

    def bind(self, name: str, value: ir.Value) -> Found:
        return Found({**self.values, name: value}, self.nodes)

    def visit(self, node: ir.Node) -> Found:
        return Found(self.values, (*self.nodes, node))


@dataclass
class Misses:
    """The failed attempt that had matched the most nodes."""

    depth: int = -1
    reason: str = ""
    node: ir.Node | None = None

    def note(self, found: Found, reason: str, node: ir.Node | None) -> None:
        if len(found.nodes) > self.depth:
            self.depth, self.reason, self.node = len(found.nodes), reason, node


class Pattern(abc.ABC):
    """Something a value can look like."""

    @abc.abstractmethod
    def attempts(self, value: ir.Value | None, found: Found, misses: Misses) -> Iterator[Found]:
        """Every way in which ``value`` looks like this, extending ``found``."""

    @abc.abstractmethod
    def __str__(self) -> str: ...

    def __or__(self, other: Pattern) -> Pattern:
        return _Either(self, other)


def match(pattern: Pattern, value: ir.Value) -> Found:
    """The first way in which ``value`` looks like ``pattern``.

    Raises:
        NoMatch: with the reason and node of the attempt that got furthest.
    """
    misses = Misses()
    for found in pattern.attempts(value, Found(), misses):
        return found
    raise NoMatch(misses.reason, misses.node)


def var(name: str) -> Pattern:
    """Any value; the same value wherever ``name`` occurs."""
    return _Var(name)


def scalar(name: str) -> Pattern:
    """A constant of one element, bound to ``name``."""
    return _Scalar(name, None)


def number(value: float) -> Pattern:
    """A constant of one element that equals ``value`` up to how many digits people write."""
    return _Scalar("", value)


def constant(name: str) -> Pattern:
    """A constant of any shape, bound to ``name``."""
    return _Constant(name)


def op(op_type: str, *inputs: Pattern, called: str = "", **attributes: Any) -> Pattern:
    """The only output of an ``op_type`` node of the default domain.

    ``inputs`` are matched from the first on; ``attributes`` must be equal where given; ``called`` is
    what reasons call it.
    """
    return _Op(op_type, inputs, called, attributes)


def product(a: Pattern, b: Pattern, c: Pattern) -> Pattern:
    """``a * b * c``, multiplied in any order."""
    return (
        op("Mul", a, op("Mul", b, c))
        | op("Mul", b, op("Mul", a, c))
        | op("Mul", c, op("Mul", a, b))
    )


def outermost(pattern: Pattern, anchor: ir.Node, through: Sequence[str], hops: int) -> Found:
    """The match of ``pattern`` that contains ``anchor`` and ends at it or furthest after it.

    Raises:
        NoMatch: nothing within ``hops`` nodes of the types ``through`` after ``anchor`` matches.
    """
    misses = Misses()
    best: Found | None = None
    frontier = [anchor]
    for _ in range(hops + 1):
        for node in frontier:
            for found in pattern.attempts(node.outputs[0], Found(), misses):
                if anchor in found.nodes:
                    best = found
                    break
        readers = dict.fromkeys(user for node in frontier for user, _ in node.outputs[0].uses())
        frontier = [node for node in readers if node.domain == "" and node.op_type in through]
    if best is None:
        reason = misses.reason or f"nothing reads {shown(anchor.outputs[0])} as expected"
        raise NoMatch(reason, misses.node or anchor)
    return best


# -- looking at values ----------------------------------------------------------------------------


def number_of(value: ir.Value | None) -> float | None:
    """The one number that ``value`` holds, or None."""
    if value is None or (value.shape is not None and any(d != 1 for d in value.shape)):
        return None  # without touching the bytes of a large weight
    array = const_array(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def numbers_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers that a constant such as Reshape's target holds, or None."""
    array = const_array(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(n) for n in array.reshape(-1))


def node_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes ``value`` if it is one of ``op_types`` of the default domain."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or ``default`` where it is not written out."""
    held = node.attributes.get(name)
    return default if held is None or held.value is None else held.value


def operands(node: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs of a node that leaves none out."""
    return tuple(value for value in node.inputs if value is not None)


def used_elsewhere(value: ir.Value, *by: ir.Node) -> str:
    """Who reads ``value`` besides ``by``: a node, or "the graph's outputs"; empty when nobody does."""
    if value.is_graph_output():
        return "the graph's outputs"
    others = [node for node, _ in value.uses() if node not in by]
    return f"{others[0].op_type} {others[0].outputs[0].name}" if others else ""


def shown(value: ir.Value | None) -> str:
    """What a value is, for a reason: the op that makes it, a constant, or an input."""
    if value is None:
        return "nothing"
    number = number_of(value)
    if number is not None:
        return f"the constant {number:g}"
    node = value.producer()
    if node is not None:
        return f"{node.op_type} {value.name}"
    return f"the {'constant' if value.is_initializer() else 'input'} {value.name}"


# -- the patterns ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Var(Pattern):
    name: str

    def __str__(self) -> str:
        return self.name

    def attempts(self, value: ir.Value | None, found: Found, misses: Misses) -> Iterator[Found]:
        bound = found.values.get(self.name)
        if value is not None and (bound is None or bound is value):
            yield found.bind(self.name, value)
        else:
            before = "a value" if bound is None else shown(bound)
            misses.note(
                found, f"expected {before} again as {self.name}, found {shown(value)}", None
            )


@dataclass(frozen=True)
class _Scalar(Pattern):
    name: str
    value: float | None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.value:g}"

    def attempts(self, value: ir.Value | None, found: Found, misses: Misses) -> Iterator[Found]:
        held = number_of(value)
        if (
            value is None
            or held is None
            or (self.value is not None and not math.isclose(held, self.value, rel_tol=NUMBER_RTOL))
        ):
            wanted = f"the constant {self}" if self.value is not None else f"a constant {self}"
            misses.note(found, f"expected {wanted}, found {shown(value)}", _producer(value))
            return
        yield found.bind(self.name, value) if self.name else found


@dataclass(frozen=True)
class _Constant(Pattern):
    name: str

    def __str__(self) -> str:
        return f"a constant {self.name}"

    def attempts(self, value: ir.Value | None, found: Found, misses: Misses) -> Iterator[Found]:
        if value is None or value.const_value is None or value.is_graph_input():
            misses.note(found, f"expected {self}, found {shown(value)}", _producer(value))
            return
        yield found.bind(self.name, value)


@dataclass(frozen=True)
class _Either(Pattern):
    first: Pattern
    second: Pattern

    def __str__(self) -> str:
        return f"{self.first} or {self.second}"

    def attempts(self, value: ir.Value | None, found: Found, misses: Misses) -> Iterator[Found]:
        yield from self.first.attempts(value, found, misses)
        yield from self.second.attempts(value, found, misses)


@dataclass(frozen=True)
class _Op(Pattern):
    op_type: str
    inputs: tuple[Pattern, ...]
    called: str
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        return self.called or f"{self.op_type}({', '.join(map(str, self.inputs))})"

    def attempts(self, value: ir.Value | None, found: Found, misses: Misses) -> Iterator[Found]:
        node = node_of(value, self.op_type)
        if node is None or len(node.outputs) != 1:
            misses.note(found, f"expected {self}, found {shown(value)}", _producer(value))
            return
        for key, wanted in self.attributes.items():
            held = attribute(node, key, wanted)
            if held != wanted:
                reason = f"expected {self.op_type} with {key}={wanted}, found {key}={held}"
                misses.note(found, reason, node)
                return
        if len(node.inputs) < len(self.inputs):
            misses.note(found, f"expected {self}, which has more inputs", node)
            return
        inside = found.visit(node)
        orders = [list(node.inputs)]
        if self.op_type in COMMUTATIVE and len(node.inputs) == 2:
            orders.append([node.inputs[1], node.inputs[0]])
        for order in orders:
            yield from _all(self.inputs, order, inside, misses)


def _all(
    patterns: tuple[Pattern, ...], values: list[ir.Value | None], found: Found, misses: Misses
) -> Iterator[Found]:
    """Every way in which the first values look like all the patterns at once."""
    if not patterns:
        yield found
        return
    for extended in patterns[0].attempts(values[0], found, misses):
        yield from _all(patterns[1:], values[1:], extended, misses)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
