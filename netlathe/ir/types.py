"""Types of all values, derived by our own rules: dtype, shape and, for shape-like integers, contents.

Nothing recorded is trusted except the graph's inputs and initializers. A rule that finds its inputs
impossible (a scale of another width, query heads that key heads do not divide) reports it with the
node; the verifier turns that into a diagnostic. An op without a rule leaves its outputs untyped.

Dims are expressions over the names of the inputs' dynamic dims. Two things are assumed of the sizes a
model is run with, because every exporter assumes them: slices and ranges never have negative length,
and a slice that starts or ends at a dynamic position of a fixed-size table ends within the table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import onnx_ir as ir
import sympy

from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape

# Integer values with more elements than this are data, not shapes.
MOST_CONTENTS = 64
SHAPE_LIKE = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
_REAL = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})


@dataclass(frozen=True)
class Type:
    """dtype and shape; ``shape`` is None where not even the rank is known."""

    dtype: ir.DataType | None
    shape: Shape | None

    @property
    def rank(self) -> int | None:
        """Number of dims, where known."""
        return None if self.shape is None else len(self.shape)


UNTYPED = Type(None, None)


@dataclass(frozen=True)
class Problem:
    """A node whose inputs contradict its operator."""

    node: ir.Node
    code: str  # as in "width": the verifier reports "verify.width"
    message: str
    notes: tuple[str, ...] = ()
    help: str = ""


@dataclass(frozen=True)
class Pin:
    """A node that works only where ``a`` equals ``b``, or, if ``or_one``, where ``a`` is 1."""

    node: ir.Node
    a: Dim
    b: Dim
    what: str
    or_one: bool = False


class RuleError(Exception):
    """Raised inside a shape rule through :meth:`Site.fail`."""

    def __init__(self, code: str, message: str, notes: tuple[str, ...], help: str) -> None:
        super().__init__(message)
        self.code, self.message, self.notes, self.help = code, message, notes, help


@dataclass
class Inference:
    """What :func:`infer` found."""

    types: dict[ir.Value, Type] = field(default_factory=dict)
    known: dict[ir.Value, tuple[Dim, ...]] = field(default_factory=dict)
    # Sizes on their way through float arithmetic: exact, each a number or an expression, or None.
    reals: dict[ir.Value, tuple[sympy.Expr | None, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    dim_names: dict[str, object] = field(default_factory=dict)  # of fresh dims, with their owners
    malformed: frozenset[ir.Node] = frozenset()  # nodes that no rule can be asked about

    def type(self, value: ir.Value | None) -> Type:
        """The type of ``value``; untyped for an absent input."""
        return UNTYPED if value is None else self.types.get(value, UNTYPED)

    def contents(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """The elements of a scalar or 1-D integer value, flat, where they are known symbolically."""
        return None if value is None else self.known.get(value)


class Site:
    """One node as its shape rule sees it."""

    __slots__ = ("found", "node")

    def __init__(self, node: ir.Node, found: Inference) -> None:
        self.node = node
        self.found = found

    # -- inputs -----------------------------------------------------------------------------------

    def has(self, index: int) -> bool:
        """Whether the (optional) input is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def value(self, index: int) -> ir.Value | None:
        """The input, or None."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def type(self, index: int = 0) -> Type:
        """Type of an input."""
        return self.found.type(self.value(index))

    def dtype(self, index: int = 0) -> ir.DataType | None:
        """dtype of an input."""
        return self.type(index).dtype

    def shape(self, index: int = 0) -> Shape | None:
        """Shape of an input."""
        return self.type(index).shape

    def contents(self, index: int) -> tuple[Dim, ...] | None:
        """Contents of a shape-like integer input."""
        return self.found.contents(self.value(index))

    def ints(self, index: int) -> tuple[int, ...] | None:
        """Contents of an input, where all of them are plain ints."""
        found = self.contents(index)
        if found is None or not all(isinstance(item, int) for item in found):
            return None
        return tuple(item for item in found if isinstance(item, int))

    def reals(self, index: int) -> tuple[sympy.Expr | None, ...] | None:
        """Elements of a small float input, exact: of a constant, or derived from sizes."""
        value = self.value(index)
        if value is None:
            return None
        if value.const_value is None or value.is_graph_input():
            return self.found.reals.get(value)
        return exact_reals(value.const_value)

    def name(self, index: int) -> str:
        """Name of an input, for messages."""
        value = self.value(index)
        return (value.name or "?") if value is not None else "-"

    def show(self, *indices: int) -> tuple[str, ...]:
        """Notes that say which value has which shape, and which of them are constants."""
        notes = []
        for index in indices:
            if self.has(index):
                constant = self.node.inputs[index].const_value is not None  # type: ignore[union-attr]  # has() was asked
                kind = "a constant " if constant else ""
                notes.append(f"{self.name(index)} is {kind}{dims.show(self.shape(index))}")
        return tuple(notes)

    # -- outputs ----------------------------------------------------------------------------------

    def remember(self, contents: Sequence[Dim] | None, output: int = 0) -> None:
        """Note the elements of a shape-like integer output, flat."""
        if contents is not None and len(contents) <= MOST_CONTENTS:
            self.found.known[self.node.outputs[output]] = tuple(contents)

    def fresh(self, axis: int = 0, output: int = 0) -> Dim:
        """A dim that only the data decides, named after the output and axis that has it.

        Only needed where several dims are the same one; an unknown dim gets such a name anyway.
        """
        return _fresh(self.node.outputs[output], axis, self.found)

    # -- attributes -------------------------------------------------------------------------------

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def integers(self, name: str) -> tuple[int, ...] | None:
        """An integer list attribute."""
        attribute = self.node.attributes.get(name)
        return None if attribute is None else tuple(attribute.as_ints())

    def text(self, name: str, default: str = "") -> str:
        """A string attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()

    def data_type(self, name: str) -> ir.DataType | None:
        """An attribute that names a dtype; None where it is absent or 0, which means "not given"."""
        number = self.integer(name)
        if not number:
            return None
        if number not in ir.DataType.__members__.values():
            self.fail("attribute", f"{name}={number} is no ONNX dtype")
        return ir.DataType(number)

    def axis(self, rank: int, default: int = 0, name: str = "axis", *, end: bool = False) -> int:
        """An axis attribute, counted from the front and checked; ``end`` allows ``rank`` itself."""
        return self.checked_axis(self.integer(name, default), rank, end=end)

    def checked_axis(self, axis: int, rank: int, *, end: bool = False) -> int:
        """``axis`` counted from the front."""
        if not -rank <= axis < rank + end:
            self.fail("axis", f"axis {axis} is outside the {rank} dims of {self.name(0)}")
        return axis + rank if axis < 0 else axis

    # -- checks -----------------------------------------------------------------------------------

    def fail(self, code: str, message: str, *notes: str, help: str = "") -> NoReturn:
        """Report that the node cannot be right."""
        raise RuleError(code, message, notes, help)

    def equal(self, a: Dim, b: Dim, code: str, what: str, *notes: str, help: str = "") -> Dim:
        """The common value of two dims that must be equal; the better known of the two."""
        equal = dims.same(a, b)
        if equal is False:
            self.fail(code, f"{what}, got {a} and {b}", *notes, help=help)
        if equal is None and a is not None and b is not None:
            self.found.pins.append(Pin(self.node, a, b, what))
        if a is None or (isinstance(b, int) and not isinstance(a, int)):
            return b
        return a

    def rank(self, index: int, *allowed: int) -> None:
        """Check the rank of an input, where it is known."""
        shape = self.shape(index)
        if shape is not None and len(shape) not in allowed:
            wanted = " or ".join(map(str, allowed))
            self.fail("rank", f"{self.name(index)} has {len(shape)} dims, not {wanted}")

    def least_rank(self, index: int, least: int) -> None:
        """Check that an input has at least so many dims, where they are known."""
        shape = self.shape(index)
        if shape is not None and len(shape) < least:
            self.fail("rank", f"{self.name(index)} has {len(shape)} dims, fewer than {least}")

    def vector(self, index: int, width: Dim, what: str, help: str = "") -> Dim:
        """Check that an optional input is 1-D and as wide as ``width``; the better known width."""
        shape = self.shape(index)
        if shape is None:
            return width
        self.rank(index, 1)
        return self.equal(width, shape[0], "width", what, *self.show(0, index), help=help)


def exact_reals(tensor: ir.TensorProtocol) -> tuple[sympy.Expr | None, ...] | None:
    """The elements of a small float tensor as rational numbers; None where one is not finite.

    sympy would compute with rounded decimals if it were given the floats themselves.
    """
    if tensor.dtype not in _REAL or tensor.size > MOST_CONTENTS or len(tensor.shape) > 1:
        return None
    items = tensor.numpy().reshape(-1).tolist()
    return tuple(sympy.Rational(x) if x - x == 0 else None for x in items)


def infer(model: ir.Model, malformed: Collection[ir.Node] = ()) -> Inference:
    """Derive the type of every value of the main graph and its subgraphs.

    Contradictions are in ``problems``. The outputs of ``malformed`` nodes, those whose arguments are
    not what their operator takes at all, stay untyped.
    """
    found = Inference(malformed=frozenset(malformed))
    for value in model.graph.inputs:
        for dim in recorded(value).shape or ():
            if isinstance(dim, sympy.Expr):
                found.dim_names.update({str(name): model.graph for name in dim.free_symbols})
    _infer_graph(model.graph, found)
    return found


def infer_graph(graph: ir.Graph, found: Inference, given: Sequence[Type] = ()) -> list[Type]:
    """Derive types inside a subgraph whose inputs have the types ``given``; its outputs' types."""
    _infer_graph(graph, found, given)
    return [found.type(value) for value in graph.outputs]


def annotate(model: ir.Model) -> Inference:
    """Write derived dtypes and shapes into all values; recorded ones are overwritten.

    A value that cannot be typed keeps no shape, so nothing stale survives. Graph outputs that cannot
    be typed keep what is recorded: it is part of the model's interface. Unnamed dims of graph inputs
    get a name.
    """
    found = infer(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            _write(value, found.type(value))
        for value in graph.inputs:
            _write(value, found.type(value))
        for node in graph:
            for value in node.outputs:
                _write(value, found.type(value))
    return found


def _write(value: ir.Value, derived: Type) -> None:
    if derived.dtype is not None:
        if not isinstance(value.type, ir.TensorType) or value.type.dtype != derived.dtype:
            value.type = ir.TensorType(derived.dtype)
    if derived.shape is not None:
        value.shape = ir.Shape([dims.to_ir(dim) for dim in derived.shape])
    elif not value.is_graph_output() and not value.is_graph_input():
        value.shape = None


def recorded(value: ir.Value) -> Type:
    """The type written on a value."""
    shape = None if value.shape is None else tuple(dims.from_ir(dim) for dim in value.shape)
    return Type(value.dtype if isinstance(value.type, ir.TensorType) else None, shape)


def _infer_graph(graph: ir.Graph, found: Inference, given: Sequence[Type] = ()) -> None:
    from netlathe.ir.shapes import RULES  # the rules import Site from here

    for position, value in enumerate(graph.inputs):
        type_ = recorded(value)
        if position < len(given):
            type_ = _refine(type_, given[position])
        found.types[value] = _named(value, type_, found)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            found.types[value] = recorded(value)
            continue
        found.types[value] = Type(tensor.dtype, tuple(tensor.shape.numpy()))
        if not value.is_graph_input():
            _record_constant(value, tensor, found)
    for node in graph:
        for value in node.outputs:  # a loop body is inferred more than once
            found.known.pop(value, None)
            found.reals.pop(value, None)
        rule = RULES.get(node.op_type) if node.domain == "" else None
        if node in found.malformed:
            rule = None
        try:
            outputs = rule(Site(node, found)) if rule is not None else ()
        except RuleError as error:
            found.problems.append(Problem(node, error.code, error.message, error.notes, error.help))
            outputs = ()
            for value in node.outputs:
                found.known.pop(value, None)
                found.reals.pop(value, None)
        for value, type_ in _pair(node.outputs, outputs):
            found.types[value] = _named(value, type_, found)


def _named(value: ir.Value, type_: Type, found: Inference) -> Type:
    """The type with a name for every dim that only the data decides, so that its uses agree."""
    if type_.shape is None or None not in type_.shape:
        return type_
    named = (
        _fresh(value, axis, found) if dim is None else dim for axis, dim in enumerate(type_.shape)
    )
    return Type(type_.dtype, tuple(named))


def _fresh(value: ir.Value, axis: int, found: Inference) -> Dim:
    """A dim named after the value and axis that has it: the same in every run of the inference."""
    stem = re.sub(r"\W", "_", value.name or "value")
    stem = f"_{stem}" if stem[0].isdigit() else stem
    name, number = f"{stem}_dim{axis}", 0
    while found.dim_names.setdefault(name, (value, axis)) != (value, axis):
        number += 1
        name = f"{stem}_dim{axis}_{number}"
    return dims.symbol(name)


def _pair(
    values: Sequence[ir.Value], types: Sequence[Type | None]
) -> Iterator[tuple[ir.Value, Type]]:
    for index, value in enumerate(values):
        type_ = types[index] if index < len(types) else None
        yield value, type_ or UNTYPED


def _refine(declared: Type, given: Type) -> Type:
    return Type(
        given.dtype if given.dtype is not None else declared.dtype,
        given.shape if given.shape is not None else declared.shape,
    )


def _record_constant(value: ir.Value, tensor: ir.TensorProtocol, found: Inference) -> None:
    if tensor.dtype in SHAPE_LIKE and tensor.size <= MOST_CONTENTS and len(tensor.shape) <= 1:
        found.known[value] = tuple(int(item) for item in tensor.numpy().reshape(-1))
