"""What the executor, the fx emitter and the symbolic check run: a graph as a list of calls.

A :class:`Step` is one call of a torch function on slots and literals. Planning decides once, for all
three, what runs where:

* Shape values (``Shape``, and integer arithmetic on it) are computed on the host by their own rows,
  and become tensors only where a tensor is asked for.
* Small constants that an op reads as a shape, axes or sizes are handed over as literals.
* A tensor made from shape values alone (a position range) is brought to the device of what it meets.
* Model functions, and ops that ONNX defines by a function body and that have no row, are expanded.

Nothing is computed and no large weight is read here; ``model`` is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, LowerError
from netlathe.execute.torch_ops import host
from netlathe.execute.torch_ops.row import Row, returns_tuple
from netlathe.execute.torch_ops.table import TABLE
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import module_path

# Constants up to this many elements may become literals: more than any shape, pads or scales have.
_LITERAL_ELEMENTS = 64
_DEFAULT_DOMAINS = ("", "ai.onnx")
# Ops whose result is a shape value whatever they read.
_MAKES_SHAPE = ("Shape", "Size")


class Slot:
    """One value at run time: a tensor, or a shape value if ``host_rank`` is its rank (0 or 1).

    ``literal`` is the contents of a small constant; ``trained`` marks an initializer, which unlike the
    constants in nodes may be a weight that training changes. ``anchored`` tensors depend on an input or a
    weight and are on the device for that reason. Slots are compared by identity.
    """

    def __init__(
        self,
        name: str,
        dtype: ir.DataType | None = None,
        *,
        host_rank: int | None = None,
        anchored: bool = True,
        literal: Any = None,
        trained: bool = False,
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.host_rank = host_rank
        self.anchored = anchored
        self.literal = literal
        self.trained = trained

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(eq=False)
class Step:
    """``outputs = function(*args, **kwargs)``; args and kwargs hold slots, literals and programs."""

    node: ir.Node
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Slot | None, ...]

    @property
    def returns_tuple(self) -> bool:
        """Whether the function's result is to be taken apart."""
        return returns_tuple(self.function)

    def reads(self) -> Iterator[Slot]:
        """Every slot among the arguments."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Slot):
                yield value


@dataclass(eq=False)
class Program:
    """A planned graph. ``captures`` are slots of the program around it, appended to its inputs."""

    inputs: list[Slot] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    weights: dict[Slot, ir.TensorProtocol] = field(default_factory=dict)
    values: dict[str, Slot] = field(default_factory=dict)  # by name, of the graph's own values
    captures: list[Slot] = field(default_factory=list)  # in the program around
    captured: list[Slot] = field(default_factory=list)  # the same, in this one
    output_names: list[str] = field(default_factory=list)


def plan(model: ir.Model) -> Program:
    """Plan the main graph.

    Raises:
        LowerError: with every node that cannot be run.
    """
    planner = _Planner(model)
    program = planner.graph(model.graph, None, {})
    if planner.gaps:
        raise LowerError(planner.gaps)
    return program


def gaps(model: ir.Model) -> list[Diagnostic]:
    """Every node of ``model`` that cannot be run, as diagnostics."""
    planner = _Planner(model)
    planner.graph(model.graph, None, {})
    return planner.gaps


class _Scope:
    """Slots of the values of one graph (or one call of a function); misses go to the scope around."""

    def __init__(
        self,
        program: Program,
        around: _Scope | None,
        attributes: Mapping[str, ir.Attr],
        opsets: Mapping[str, int],
    ) -> None:
        self.program = program
        self.around = around
        self.attributes = attributes  # what reference attributes of a function body mean
        self.opsets = opsets
        self.slots: dict[ir.Value, Slot] = {}
        self.tensors: dict[Slot, Slot] = {}  # shape value -> the tensor made of it
        self.placed: dict[Slot, Slot] = {}  # tensor -> the same on the device

    def find(self, value: ir.Value) -> Slot | None:
        """The slot of ``value``, captured from the scope around if need be."""
        if value in self.slots:
            return self.slots[value]
        if self.around is None:
            return None
        outer = self.around.find(value)
        if outer is None:
            return None
        if self.around.program is self.program:  # a function body reads nothing outside
            return outer
        inner = Slot(outer.name, outer.dtype, literal=outer.literal, trained=outer.trained)
        tensor = self.around.program.weights.get(outer)
        if tensor is not None and outer not in self.around.program.inputs:
            self.program.weights[inner] = tensor
        else:
            outer = self.around.tensor(outer)
            self.program.captures.append(outer)
            self.program.captured.append(inner)
        self.slots[value] = inner
        return inner

    def tensor(self, slot: Slot, node: ir.Node | None = None) -> Slot:
        """``slot`` as a tensor; a shape value is converted, once."""
        if slot.host_rank is None:
            return slot
        if slot not in self.tensors:
            made = Slot(slot.name, slot.dtype, anchored=False)
            anchor = node or _NO_NODE
            self.program.steps.append(Step(anchor, host.to_tensor, (slot,), {}, (made,)))
            self.tensors[slot] = made
        return self.tensors[slot]

    def place(self, slot: Slot, like: Slot, node: ir.Node) -> Slot:
        """``slot`` on the device of ``like``."""
        if slot not in self.placed:
            made = Slot(slot.name, slot.dtype)
            self.program.steps.append(Step(node, host.place, (slot, like), {}, (made,)))
            self.placed[slot] = made
        return self.placed[slot]


_NO_NODE = ir.Node("", "Identity", [])


class _Planner:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.gaps: list[Diagnostic] = []

    # -- graphs -----------------------------------------------------------------------------------

    def graph(
        self, graph: ir.Graph, around: _Scope | None, attributes: Mapping[str, ir.Attr]
    ) -> Program:
        """Plan one graph; ``around`` is the scope that its captures come from."""
        program = Program()
        opsets = self.model.graph.opset_imports if around is None else around.opsets
        scope = _Scope(program, around, attributes, opsets)
        for value in graph.inputs:
            slot = Slot(value.name or "", value.dtype, trained=value.is_initializer())
            program.inputs.append(slot)
            scope.slots[value] = slot
            if value.const_value is not None and value.is_initializer():
                program.weights[slot] = value.const_value  # a default that the caller may override
        for value in graph.initializers.values():
            if value not in scope.slots and value.const_value is not None:
                slot = _constant(scope, value.name or "", value.const_value)
                slot.trained = True
                scope.slots[value] = slot
        for node in graph:
            self.node(node, scope)
        for value in graph.outputs:
            made = scope.find(value)
            if made is None:
                self._gap(f"the output {value.name} is made by no node", None)
                continue
            program.outputs.append(scope.tensor(made, value.producer()))
            program.output_names.append(value.name or "")
        program.values = {
            value.name: scope.tensors.get(slot, slot)
            for value, slot in scope.slots.items()
            if value.name
        }
        return program

    def _gap(self, message: str, node: ir.Node | None, help: str = "") -> None:
        self.gaps.append(
            Diagnostic(
                "execute.unsupported",
                message,
                at=show_node(node) if node is not None else "",
                where=module_path(node) if node is not None else "",
                help=help,
            )
        )

    # -- nodes ------------------------------------------------------------------------------------

    def node(self, node: ir.Node, scope: _Scope) -> None:
        """Plan one node: a constant, a row of the table, or a function to expand."""
        attributes = {
            name: scope.attributes.get(attr.ref_attr_name or "") if attr.is_ref() else attr
            for name, attr in node.attributes.items()
        }
        known = {name: attr for name, attr in attributes.items() if attr is not None}
        function = self.model.functions.get(node.op_identifier())
        if function is not None:
            self._expand(node, function, known, scope)
            return
        default = node.domain in _DEFAULT_DOMAINS
        if default and node.op_type == "Constant":
            self._constant_node(node, known, scope)
        elif default and node.op_type in TABLE:
            self._call(node, TABLE[node.op_type], known, scope)
        else:
            body = self._function_body(node, scope)
            if body is None:
                name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                self._gap(f"{name} has no row in the torch table", node)
                for value in node.outputs:
                    scope.slots[value] = Slot(value.name or "", value.dtype)
            else:
                self._expand(node, body, known, scope)

    def _constant_node(
        self, node: ir.Node, attributes: Mapping[str, ir.Attr], scope: _Scope
    ) -> None:
        (name, attribute), *_ = attributes.items()
        if name == "value":
            tensor = attribute.as_tensor()
        elif name in ("value_int", "value_ints"):
            tensor = ir.tensor(attribute.value, dtype=ir.DataType.INT64)
        elif name in ("value_float", "value_floats"):
            tensor = ir.tensor(attribute.value, dtype=ir.DataType.FLOAT)
        else:
            self._gap(f"a Constant of {name} is not supported", node)
            tensor = ir.tensor([0.0])
        value = node.outputs[0]
        scope.slots[value] = _constant(scope, value.name or "", tensor)

    def _call(
        self, node: ir.Node, row: Row, attributes: Mapping[str, ir.Attr], scope: _Scope
    ) -> None:
        inputs: list[Slot | None] = []
        for value in node.inputs:
            slot = None if value is None else scope.find(value)
            if slot is None and value is not None:
                self._gap(f"{value.name} is read before it is made", node)
                slot = Slot(value.name or "", value.dtype)
            inputs.append(slot)
        while inputs and inputs[-1] is None:
            inputs.pop()
        if self._call_on_host(node, row, attributes, inputs, scope):
            return
        limit = row.max_inputs()
        if limit is not None and len(inputs) > limit:
            self._gap(f"{node.op_type} takes at most {limit} inputs here", node)
            inputs = inputs[:limit]
        args: list[Any] = []
        for position, slot in enumerate(inputs):
            if slot is not None and row.input_name(position) in row.host:
                args.append(slot if slot.literal is None else slot.literal)
            else:
                args.append(None if slot is None else scope.tensor(slot, node))
        kwargs, bodies = self._attributes(node, row, attributes, scope)
        if node.op_type == "Loop":
            args += [None] * (2 - len(args))
        captures = list(dict.fromkeys(slot for body in bodies for slot in body.captures))
        for body in bodies:  # every body is given all captures, in one order
            inner = dict(zip(body.captures, body.captured, strict=True))
            body.captured = [inner.get(slot) or Slot(slot.name, slot.dtype) for slot in captures]
            body.captures = captures
        args += captures
        met = [a for i, a in enumerate(args) if _is_tensor(a) and not self._reads_on_host(row, i)]
        anchor = next((a for a in met if a.anchored), None)
        if anchor is not None:
            placed = {a: scope.place(a, anchor, node) for a in met if not a.anchored}
            args = [
                placed.get(a, a) if _is_tensor(a) and not self._reads_on_host(row, i) else a
                for i, a in enumerate(args)
            ]
        # A body gives its results on the device whatever it is given.
        anchored = anchor is not None or bool(bodies)
        made = [Slot(v.name or "", v.dtype, anchored=anchored) for v in node.outputs]
        scope.slots.update(zip(node.outputs, made, strict=True))
        outputs = tuple(
            slot if value.name else None for slot, value in zip(made, node.outputs, strict=True)
        )
        scope.program.steps.append(Step(node, row.function, tuple(args), kwargs, outputs))

    def _reads_on_host(self, row: Row, position: int) -> bool:
        limit = row.max_inputs()
        return (limit is None or position < limit) and row.input_name(position) in row.host

    def _call_on_host(
        self,
        node: ir.Node,
        row: Row,
        attributes: Mapping[str, ir.Attr],
        inputs: Sequence[Slot | None],
        scope: _Scope,
    ) -> bool:
        """Plan the node on shape values, if all it reads are such and its result is one."""
        if row.on_host is None:
            return False
        makes_shape = node.op_type in _MAKES_SHAPE
        given = [slot for slot in inputs if slot is not None]
        plain = {name: attr.value for name, attr in attributes.items()}
        if node.op_type in ("Cast", "CastLike") and given:
            # A small constant of any type may become a shape value by its cast.
            if given[0].host_rank is None and given[0].literal is None:
                return False
            if node.op_type == "CastLike":
                like = given.pop()
                plain["to"] = like.dtype or ir.DataType.UNDEFINED
            inputs = given
        elif not makes_shape and not all(_is_shape_value(slot) for slot in given):
            return False
        if not makes_shape:
            ranks = [_host_rank(slot) for slot in given]
            known = [slot.literal for slot in given]
            rank = host.RANK[row.on_host](ranks, known, plain)
        else:
            rank = 1 if node.op_type == "Shape" else 0
        if rank is None:
            return False
        args = tuple(
            slot if slot is None or slot.literal is None or makes_shape else slot.literal
            for slot in inputs
        )
        if "output_count" in row.facts:
            plain["output_count"] = len(node.outputs)
        dtype = ir.DataType.BOOL if row.on_host in host.GIVE_BOOL else ir.DataType.INT64
        if row.on_host is host.cast:
            dtype = ir.DataType(plain["to"])
        made = [Slot(v.name or "", dtype, host_rank=rank, anchored=False) for v in node.outputs]
        scope.slots.update(zip(node.outputs, made, strict=True))
        scope.program.steps.append(Step(node, row.on_host, args, plain, tuple(made)))
        return True

    def _attributes(
        self, node: ir.Node, row: Row, attributes: Mapping[str, ir.Attr], scope: _Scope
    ) -> tuple[dict[str, Any], list[Program]]:
        """Keyword arguments of a call, and the programs among them."""
        kwargs: dict[str, Any] = {}
        bodies: list[Program] = []
        for name, attribute in attributes.items():
            if not row.takes(name) and not _takes_any(row):
                self._gap(f"{node.op_type} has no attribute {name!r} here", node)
            elif attribute.type == ir.AttributeType.GRAPH:
                kwargs[name] = self.graph(attribute.as_graph(), scope, scope.attributes)
                bodies.append(kwargs[name])
            elif attribute.type == ir.AttributeType.TENSOR:
                # One element (ConstantOfShape): a number and its type, bound to no device.
                tensor = attribute.as_tensor()
                kwargs[name] = tensor.numpy().reshape(-1).tolist()[0]
                kwargs["dtype"] = tensor.dtype.value
            else:
                value = attribute.value
                kwargs[name] = list(value) if isinstance(value, tuple) else value
        if "output_count" in row.facts:
            # Trailing outputs that are left out are not asked for.
            asked = [i for i, value in enumerate(node.outputs) if value.name]
            kwargs["output_count"] = max(asked, default=0) + 1
        if "opset" in row.facts:
            kwargs["opset"] = scope.opsets.get("", scope.opsets.get("ai.onnx", 1))
        if "input_dtypes" in row.facts:
            slots = [None if value is None else scope.find(value) for value in node.inputs]
            kwargs["input_dtypes"] = tuple(None if s is None else s.dtype for s in slots)
        if node.op_type == "Loop":
            kwargs["carried"] = max(len(node.inputs) - 2, 0)
            kwargs["scanned"] = len(node.outputs) - kwargs["carried"]
        if node.op_type == "Scan":
            kwargs["inputs"] = len(node.inputs)
        return kwargs, bodies

    # -- functions --------------------------------------------------------------------------------

    def _expand(
        self,
        node: ir.Node,
        function: ir.Function,
        attributes: Mapping[str, ir.Attr],
        scope: _Scope,
    ) -> None:
        """Plan a function's nodes in place of its call."""
        bound = {name: attr for name, attr in function.attributes.items() if attr.value is not None}
        inner = _Scope(scope.program, scope, {**bound, **attributes}, function.opset_imports)
        for formal, actual in zip(function.inputs, node.inputs, strict=False):
            slot = None if actual is None else scope.find(actual)
            if slot is not None:
                inner.slots[formal] = slot
        absent = {f for f in function.inputs if f not in inner.slots}
        for body_node in function:
            if absent.intersection(v for v in body_node.inputs if v is not None):
                body_node = _without(body_node, absent)
            self.node(body_node, inner)
        for value, result in zip(node.outputs, function.outputs, strict=False):
            slot = inner.find(result)
            if slot is not None:
                scope.slots[value] = slot

    def _function_body(self, node: ir.Node, scope: _Scope) -> ir.Function | None:
        """The body by which ONNX defines the node's op, if it does."""
        version = scope.opsets.get(node.domain, 1)
        schema: Any  # what the compiled module offers is not in its type stubs
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            return None
        if schema.has_function:
            return ir.serde.deserialize_function(schema.function_body)
        if not schema.has_context_dependent_function:
            return None
        types = []
        for value in node.inputs:
            if value is None or value.type is None:
                types.append(onnx.TypeProto().SerializeToString())
            else:
                proto = ir.serde.serialize_value(value).type
                types.append(proto.SerializeToString())
        call = ir.serde.serialize_node(node).SerializeToString()
        body = schema.get_context_dependent_function(call, types)
        return ir.serde.deserialize_function(onnx.FunctionProto.FromString(body))


def _without(node: ir.Node, absent: set[ir.Value]) -> ir.Node:
    """A stand-in for ``node`` whose absent inputs are left out."""
    inputs = [None if value in absent else value for value in node.inputs]
    return ir.Node(
        node.domain, node.op_type, inputs, node.attributes.values(), outputs=list(node.outputs)
    )


def _takes_any(row: Row) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in row.parameters)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Slot) and value.host_rank is None


def _is_shape_value(slot: Slot) -> bool:
    if slot.host_rank is not None:
        return True
    return slot.literal is not None and slot.dtype in (ir.DataType.INT64, ir.DataType.BOOL)


def _host_rank(slot: Slot) -> int:
    if slot.host_rank is not None:
        return slot.host_rank
    return 1 if isinstance(slot.literal, list) else 0


def _constant(scope: _Scope, name: str, tensor: ir.TensorProtocol) -> Slot:
    """A slot for a constant; a small one of rank 0 or 1 is read now."""
    literal = None
    shape = tensor.shape.numpy()
    if len(shape) <= 1 and sum(shape) <= _LITERAL_ELEMENTS and tensor.dtype != ir.DataType.STRING:
        literal = tensor.numpy().tolist()
    slot = Slot(name, tensor.dtype, literal=literal)
    scope.program.weights[slot] = tensor
    return slot
