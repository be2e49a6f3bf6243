"""Whether a model is well formed and well typed, by our own rules: what every stage may rely on.

`verify` looks at structure first (scopes, order, names, opset), then at every node by itself (known
operator, legal attributes, number of arguments), then at types: dtypes by the operators' schemas,
shapes by `netlathe.ir.shapes`, and recorded types against derived ones. Recorded types prove nothing;
a stale literal, scale, cache, group or head count is found because it contradicts its neighbours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import onnx
import onnx_ir as ir
import sympy

from netlathe.diagnostics import Diagnostic, VerifyError, did_you_mean
from netlathe.ir import dims, types
from netlathe.ir.printing import show_node, show_type
from netlathe.ir.provenance import location

OPSET = 25

_Formal = onnx.defs.OpSchema.FormalParameter
_Option = onnx.defs.OpSchema.FormalParameterOption

# What to do about a code, where the rule says nothing more precise.
_HELP: Mapping[str, str] = {
    "arity": "give the operator the values that its definition names",
    "attribute": "set the attribute as the operator's definition says",
    "axis": "an axis attribute outlived a change of rank",
    "baked": "a size of the sample input was written into the graph: derive it from the input's shape",
    "block": "quantize again, or slice the scales by whole blocks",
    "dangling": "connect the reader to a value that exists, or remove it",
    "domain": "write the default domain as the empty string",
    "dtype": "insert a Cast, or convert all operands",
    "einsum": "correct the equation",
    "group": "adjust group to the channels",
    "heads": "change the heads of query, key and value together",
    "index": "remap the indices that read the table",
    "initializer": "give the weight a tensor, and the value the tensor's type",
    "names": "give every value a name of its own",
    "op": "replace the operator by one of opset 25, or register it in a domain of its own",
    "opset": "convert the model to opset 25 of the default domain",
    "order": "sort the graph: graph.sort()",
    "pad": "give a begin and an end for every axis",
    "range": "give a step that is not 0",
    "rank": "the operator takes tensors of another rank: look for a reshape that was left out",
    "reshape": "the target does not hold the input's elements: a width before it was changed",
    "resize": "give one entry per axis",
    "slice": "give one entry per axis",
    "split": "the sizes must add up to the width they split",
    "squeeze": "only dims of size 1 can go",
    "stale_type": "types.annotate(model) writes derived types; if it was run, an edit came after it",
    "tile": "give one repeat per axis",
    "transpose": "perm must name every axis once",
    "width": "a width was changed on one side only: change every operand together",
    "window": "the data is smaller than the window that slides over it",
}


def check(model: ir.Model) -> None:
    """Return if the model is sound.

    Raises:
        VerifyError: with everything that :func:`verify` finds.
    """
    found = verify(model)
    if found:
        raise VerifyError(found)


def verify(model: ir.Model) -> list[Diagnostic]:
    """Everything that is wrong with the model; an empty list if nothing is.

    The model may be in any state; it is not changed. Where the structure is broken (a value from
    nowhere, nodes out of order) only that is reported, because nothing else could be trusted.
    """
    structure = [*_opsets(model), *_Scopes(model).problems]
    if structure:
        return structure
    malformed: dict[ir.Node, None] = {}
    found: list[Diagnostic] = []
    for node in model.graph.all_nodes():
        wrong = list(_node_problems(node))
        if wrong:
            malformed[node] = None
            found += wrong
    inference = types.infer(model, malformed)
    for problem in inference.problems:
        found.append(_at(problem.node, problem.code, problem.message, problem.notes, problem.help))
        malformed[problem.node] = None
    for node in model.graph.all_nodes():
        if node not in malformed:
            found += _dtype_problems(node, inference)
    found += _baked(model, inference)
    found += _stale(model, inference, malformed)
    return found


def _at(
    node: ir.Node, code: str, message: str, notes: Sequence[str] = (), help: str = ""
) -> Diagnostic:
    return Diagnostic(
        code=f"verify.{code}",
        message=message,
        at=show_node(node),
        where=location(node),
        notes=tuple(notes),
        help=help or _HELP.get(code, ""),
    )


def _of_model(code: str, message: str, at: str = "") -> Diagnostic:
    return Diagnostic(f"verify.{code}", message, at=at, help=_HELP[code])


# -- structure --------------------------------------------------------------------------------------


def _opsets(model: ir.Model) -> Iterator[Diagnostic]:
    version = model.opset_imports.get("")
    if version != OPSET:
        yield _of_model("opset", f"the default domain is of opset {version}, not {OPSET}")
    used = dict.fromkeys(node.domain for node in model.graph.all_nodes())
    for domain in used:
        if domain and domain not in model.opset_imports:
            yield _of_model("opset", f"the domain {domain!r} is used but not imported")


class _Scopes:
    """Walks the graph and its subgraphs: every value made once, named once, before it is read."""

    def __init__(self, model: ir.Model) -> None:
        self.problems: list[Diagnostic] = []
        self.visible: set[ir.Value] = set()
        self.named: dict[str, ir.Value] = {}
        self.graph(model.graph)

    def graph(self, graph: ir.Graph) -> None:
        """Check one scope, and leave it."""
        entered: list[ir.Value] = []
        for value in graph.inputs:
            self.enter(value, entered, None)
        for key, value in graph.initializers.items():
            if key != value.name:
                self.problem("initializer", f"the weight {value.name} is filed under {key}")
            if value not in self.visible:
                self.enter(value, entered, None)
            self.weight(value)
        for node in graph:
            self.reads(node, graph)
            for attribute in node.attributes.values():
                self.subgraphs(attribute)
            for value in node.outputs:
                self.enter(value, entered, node)
        seen: set[str | None] = set()
        for value in graph.outputs:
            if value not in self.visible:
                self.problem("dangling", f"the graph output {value.name} is made by no node")
            if value.name in seen:
                self.problem("names", f"two graph outputs are named {value.name}")
            seen.add(value.name)
        for value in entered:
            self.visible.discard(value)
            if value.name and self.named.get(value.name) is value:
                del self.named[value.name]

    def subgraphs(self, attribute: ir.Attr) -> None:
        if attribute.is_ref():
            return
        if attribute.type == ir.AttributeType.GRAPH:
            self.graph(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                self.graph(graph)

    def reads(self, node: ir.Node, graph: ir.Graph) -> None:
        for value in node.inputs:
            if value is None or value in self.visible:
                continue
            maker = value.producer()
            if maker is not None and maker.graph is graph:
                message = f"{value.name} is read before {maker.op_type} makes it"
                self.problems.append(_at(node, "order", message))
            else:
                message = f"{value.name} is no input, weight or output of a node in scope"
                self.problems.append(_at(node, "dangling", message))

    def enter(self, value: ir.Value, entered: list[ir.Value], node: ir.Node | None) -> None:
        if not value.name:
            if value.uses() or value.is_graph_output():
                self.problem("names", "a value that is read has no name", node)
        elif value.name in self.named:
            self.problem("names", f"two values are named {value.name}", node)
        else:
            self.named[value.name] = value
        self.visible.add(value)
        entered.append(value)

    def weight(self, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is None:
            if not value.is_graph_input():
                self.problem("initializer", f"the weight {value.name} has no data")
            return
        held = types.Type(tensor.dtype, tuple(tensor.shape.numpy()))
        recorded = types.recorded(value)
        wrong_dtype = recorded.dtype not in (None, held.dtype)
        if wrong_dtype or recorded.shape not in (None, held.shape):
            message = (
                f"the weight {value.name} is recorded as {show_type(value)}, "
                f"its data is {held.dtype} {dims.show(held.shape)}"
            )
            reader = next(iter(value.consumers()), None)
            self.problem("initializer", message, reader)

    def problem(self, code: str, message: str, node: ir.Node | None = None) -> None:
        self.problems.append(_of_model(code, message) if node is None else _at(node, code, message))


# -- single nodes, by the schemas -------------------------------------------------------------------


@dataclass(frozen=True)
class _Argument:
    """A formal input or output."""

    name: str
    variable: str  # the type variable that binds it, or "" where it stands for itself
    allowed: frozenset[ir.DataType] | None  # None where something else than a tensor is allowed
    option: _Option
    homogeneous: bool


@dataclass(frozen=True)
class _Signature:
    """What the operator's schema says."""

    inputs: tuple[_Argument, ...]
    outputs: tuple[_Argument, ...]
    attributes: Mapping[str, tuple[ir.AttributeType, bool]]  # name -> (type, required)
    least_inputs: int
    most_inputs: int
    least_outputs: int
    most_outputs: int


_DTYPES: Mapping[str, ir.DataType] = {
    f"tensor({dtype.name.lower()})": dtype for dtype in ir.DataType
}


@cache
def _operators() -> frozenset[str]:
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "")


@cache
def _signature(op_type: str) -> _Signature | None:
    """The schema of a default-domain operator at our opset; None where there is none."""
    try:
        schema = onnx.defs.get_schema(op_type, OPSET, "")
    except onnx.defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def argument(formal: _Formal) -> _Argument:
        texts = constraints.get(formal.type_str, [formal.type_str])
        known = [_DTYPES.get(text) for text in texts]
        allowed = frozenset(dtype for dtype in known if dtype is not None)
        return _Argument(
            formal.name,
            formal.type_str if formal.type_str in constraints else "",
            allowed if len(allowed) == len(texts) else None,
            formal.option,
            formal.is_homogeneous,
        )

    return _Signature(
        tuple(map(argument, schema.inputs)),
        tuple(map(argument, schema.outputs)),
        {name: (_kind(a.type), a.required) for name, a in schema.attributes.items()},
        schema.min_input,
        schema.max_input,
        schema.min_output,
        schema.max_output,
    )


def _kind(kind: onnx.defs.OpSchema.AttrType) -> ir.AttributeType:
    # The schema's enumeration prints as "AttrType.INT".
    return ir.AttributeType[str(kind).rpartition(".")[2]]


def _node_problems(node: ir.Node) -> Iterator[Diagnostic]:
    """Whether the operator exists and takes these attributes and so many arguments."""
    if node.domain == "ai.onnx":
        yield _at(node, "domain", "the default domain is written out")
    if node.domain != "":
        return
    signature = _signature(node.op_type)
    if signature is None:
        message = f"{node.op_type} is no operator of opset {OPSET}"
        yield _at(node, "op", message, help=did_you_mean(node.op_type, sorted(_operators())))
        return
    yield from _attribute_problems(node, signature)
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if not signature.least_inputs <= given <= signature.most_inputs:
        wanted = _count(signature.least_inputs, signature.most_inputs)
        yield _at(node, "arity", f"{node.op_type} takes {wanted} inputs, got {given}")
        return
    for value, formal in zip(node.inputs, signature.inputs, strict=False):
        if value is None and formal.option != _Option.Optional:
            yield _at(node, "arity", f"{node.op_type} needs its input {formal.name}")
    made = len(node.outputs)
    if not signature.least_outputs <= made <= signature.most_outputs:
        wanted = _count(signature.least_outputs, signature.most_outputs)
        yield _at(node, "arity", f"{node.op_type} has {wanted} outputs, got {made}")


def _count(least: int, most: int) -> str:
    if least == most:
        return str(least)
    return f"{least} or more" if most >= 2**31 - 1 else f"{least} to {most}"


def _attribute_problems(node: ir.Node, signature: _Signature) -> Iterator[Diagnostic]:
    for name, attribute in node.attributes.items():
        if name not in signature.attributes:
            message = f"{node.op_type} has no attribute {name!r}"
            known = sorted(signature.attributes)
            help = did_you_mean(name, known) if known else "it has no attributes: remove it"
            yield _at(node, "attribute", message, help=help)
            continue
        kind, _ = signature.attributes[name]
        if attribute.is_ref():
            yield _at(node, "attribute", f"{name} refers to a function's attribute outside of one")
        elif attribute.type != kind:
            message = f"{name} is {attribute.type.name}, not {kind.name}"
            yield _at(node, "attribute", message)
    for name, (_, required) in signature.attributes.items():
        if required and name not in node.attributes:
            yield _at(node, "attribute", f"{node.op_type} needs the attribute {name!r}")


def _formals(
    values: Sequence[ir.Value | None], formals: Sequence[_Argument]
) -> Iterator[_Argument]:
    """The formal of every actual argument: the last one repeats if it is variadic."""
    for index in range(len(values)):
        yield formals[min(index, len(formals) - 1)]


def _dtype_problems(node: ir.Node, inference: types.Inference) -> Iterator[Diagnostic]:
    """Derived dtypes against the schema: allowed, and one dtype per type variable."""
    signature = _signature(node.op_type) if node.domain == "" else None
    if signature is None:
        return
    bound: dict[str, tuple[str, ir.DataType]] = {}
    pairs = [
        *zip(node.inputs, _formals(node.inputs, signature.inputs), strict=True),
        *zip(node.outputs, _formals(node.outputs, signature.outputs), strict=True),
    ]
    for value, formal in pairs:
        dtype = inference.type(value).dtype
        if value is None or dtype is None:
            continue
        if formal.allowed is not None and dtype not in formal.allowed:
            message = f"{node.op_type} does not take {dtype.name} as {formal.name}"
            allowed = ", ".join(sorted(kind.name for kind in formal.allowed))
            yield _at(
                node, "dtype", message, (f"{value.name} is {dtype.name}", f"legal: {allowed}")
            )
            return
        if not formal.variable or not formal.homogeneous:
            continue
        first, wanted = bound.setdefault(formal.variable, (value.name or "?", dtype))
        if dtype != wanted:
            message = f"{node.op_type} needs one dtype, got {wanted.name} and {dtype.name}"
            notes = (f"{first} is {wanted.name}, {value.name} is {dtype.name}",)
            yield _at(node, "dtype", message, notes)
            return


# -- sizes ------------------------------------------------------------------------------------------


def _baked(model: ir.Model, inference: types.Inference) -> Iterator[Diagnostic]:
    """Nodes that work for one value of a dynamic input dim only: a size was written in somewhere."""
    free = {
        symbol
        for value in model.graph.inputs
        for dim in inference.type(value).shape or ()
        if isinstance(dim, sympy.Expr)
        for symbol in dim.free_symbols
    }
    wanted: dict[object, types.Pin] = {}
    reported: set[ir.Node] = set()
    for pin in inference.pins:
        if pin.node in reported:
            continue
        if pin.or_one:
            # A broadcast takes 1 as well, so that one width alone proves nothing; two do.
            other = wanted.setdefault(pin.a, pin)
            if other.b != pin.b and pin.a.free_symbols <= free:  # type: ignore[union-attr]  # a broadcast's expression
                reported.add(pin.node)
                message = f"{pin.a} must be {pin.b} here and {other.b} elsewhere"
                yield _at(pin.node, "baked", message, (f"elsewhere: {show_node(other.node)}",))
            continue
        difference = dims.subtract(pin.a, pin.b)
        if not isinstance(difference, sympy.Expr):
            continue
        symbols = difference.free_symbols
        if len(symbols) != 1 or not symbols <= free:
            continue
        (symbol,) = symbols
        # floor(h/2)*2 = h holds for every even h; only a polynomial has finitely many solutions.
        if difference.is_polynomial(symbol):
            reported.add(pin.node)
            roots = [str(root) for root in sympy.roots(difference, symbol) if root.is_Integer]
            only = f"holds only where {symbol} is {' or '.join(roots)}" if roots else "never holds"
            yield _at(pin.node, "baked", f"{pin.what}, got {pin.a} and {pin.b}, which {only}")


def _stale(
    model: ir.Model, inference: types.Inference, malformed: Collection[ir.Node]
) -> Iterator[Diagnostic]:
    """Recorded types that differ from the derived ones, where nothing else is wrong before them."""
    unsure: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        if node in malformed or any(value in unsure for value in node.inputs):
            unsure.update(node.outputs)
            continue
        for value in node.outputs:
            derived = inference.type(value)
            recorded = types.recorded(value)
            if _differ(recorded, derived, inference):
                name = "?" if derived.dtype is None else derived.dtype.name
                message = (
                    f"{value.name} is recorded as {show_type(value)}, "
                    f"but it is {name} {dims.show(derived.shape)}"
                )
                yield _at(node, "stale_type", message)


def _differ(recorded: types.Type, derived: types.Type, inference: types.Inference) -> bool:
    if None not in (recorded.dtype, derived.dtype) and recorded.dtype != derived.dtype:
        return True
    if recorded.shape is None or derived.shape is None:
        return False
    if len(recorded.shape) != len(derived.shape):
        return True
    for before, now in zip(recorded.shape, derived.shape, strict=True):
        if before is None or dims.same(before, now) or str(before) == str(now):
            continue
        if isinstance(before, sympy.Symbol) and before.name not in inference.dim_names:
            continue  # a name of its own for an output's dim, as exporters give them
        return True
    return False
