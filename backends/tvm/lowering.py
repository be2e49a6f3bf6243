"""IR to Relax: every node through the op table, every kernel written by us.

The nodes are visited in order. Most become expressions that cost nothing yet; a kernel is emitted when
a value is needed in memory (see :mod:`netlathe.backends.tvm.values`). Equal kernels are kept once, so
identical layers are compiled once. Weights become parameters of the Relax function, packed as the
kernel that reads them wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import sympy
import tvm_ffi
from tvm import relax, tirx

from netlathe.backends.tvm import codes, packing, sizes, storage
from netlathe.backends.tvm.cuda.early import Written
from netlathe.backends.tvm.cuda.machine import Gpu
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels import general
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.packing import Parameter, Recipe
from netlathe.backends.tvm.tir import Expr, substituted
from netlathe.backends.tvm.values import (
    ChannelsLast,
    Known,
    Lazy,
    Normed,
    Pending,
    Placed,
    Ready,
    Scalar,
    Value,
)
from netlathe.diagnostics import Diagnostic, LowerError
from netlathe.ir import dims, types
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import location

# An expression of more operators than this is written to memory: code size, not speed.
_MOST_OPERATORS = 64


@dataclass(frozen=True)
class Lowered:
    """A Relax module whose ``main`` takes the graph's inputs and then the parameters.

    ``in_place`` are names: an output that is the tensor of an input, and that input.
    """

    module: Any
    parameters: tuple[Parameter, ...]
    kernels: int
    in_place: tuple[tuple[str, str], ...]


class Unsupported(Exception):
    """A node that the op table has no form for; the message says which part of it."""


class Lowering:
    """The state of one lowering. With ``in_place`` it may write over inputs: see :meth:`replaceable`."""

    def __init__(self, model: ir.Model, machine: Machine, *, in_place: bool = True) -> None:
        self.model = model
        self.machine = machine
        self.found = types.infer(model)
        self.builder = relax.BlockBuilder()
        self.values: dict[ir.Value, Value] = {}
        self.parameters: dict[object, tuple[Parameter, Ready]] = {}
        self.made: dict[
            ir.Node, list[Value]
        ] = {}  # results that another node's kernel gave already
        self.shifted: dict[Value, Value] = {}  # 8-bit activations -> as unsigned ones in memory
        self._names: dict[str, Expr] = {}  # size name -> variable of the Relax function
        self._functions: dict[int, list[tuple[Any, Any]]] = {}
        self._given: set[Any] = (
            set()
        )  # relax variables of inputs, before and after they are written over
        self._read: set[Any] = set()  # relax variables that some kernel reads
        self._counts: dict[str, int] = {}
        self._forced: dict[Value, Ready] = {}
        self.written = Written()  # which kernels that start early must know
        self._may_replace = in_place
        self._in_place: list[tuple[str, str]] = []
        self._told = codes.told(model)
        self._uses = _count_uses(model.graph, self._told)

    # -- the whole graph ----------------------------------------------------------------------------

    def run(self) -> Lowered:
        """Lower the model.

        Raises:
            LowerError: with every node that has no form here, found by lowering on with nothing in the
                place of what it makes.
        """
        gaps: list[Diagnostic] = []
        variables = []
        for value in self.model.graph.inputs:
            if value.is_initializer():
                continue
            try:
                variables.append(self._input(value))
            except Unsupported as error:
                gaps.append(Diagnostic("tvm.input", str(error), at=value.name or ""))
        if gaps:
            raise LowerError(gaps)
        with self.builder.function("main"):
            outputs = self._body(gaps)
            used = [(p, ready) for p, ready in self.parameters.values() if ready.var in self._read]
            self.builder.emit_func_output(
                relax.Tuple(outputs), params=[*variables, *(ready.var for _, ready in used)]
            )
        if gaps:
            raise LowerError(gaps)
        kernels = sum(self._counts.values())
        module = self.builder.get()
        return Lowered(module, tuple(p for p, _ in used), kernels, tuple(self._in_place))

    def _body(self, gaps: list[Diagnostic]) -> list[Any]:
        """Lower every node that can be; the outputs, and what cannot be added to ``gaps``."""
        lost: set[ir.Value] = set()
        for node in self.model.graph:
            try:
                if lost.isdisjoint(value for value in node.inputs if value is not None):
                    self._node(node)
                    continue
                self._rule(node)
            except Unsupported as error:
                gaps.append(_gap(node, error))
            lost.update(node.outputs)
        outputs = []
        for value in self.model.graph.outputs:
            if value in lost:
                continue
            try:
                outputs.append(self._output(value))
            except Unsupported as error:
                gaps.append(Diagnostic("tvm.output", str(error), at=value.name or ""))
        return outputs if not gaps else []

    def _rule(self, node: ir.Node) -> Callable[[Any], Sequence[Value]]:
        from netlathe.backends.tvm.ops import RULES

        rule = RULES.get(node.op_type) if node.domain == "" else None
        if rule is None:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise Unsupported(f"there are no kernels for {name}")
        return rule

    def _node(self, node: ir.Node) -> None:
        from netlathe.backends.tvm.ops import Op

        rule = self._rule(node)
        results = self.made.pop(node, None) or self._known_results(node) or rule(Op(self, node))
        for output, result in zip(node.outputs, results, strict=False):
            self._name_sizes(output, result)
            self.values[output] = self._settled(output, result)

    def _name_sizes(self, output: ir.Value, result: Value) -> None:
        """Give names that the type inference invented for ``output`` the sizes it turned out to have."""
        for derived, own in zip(self.found.type(output).shape or (), result.shape, strict=False):
            if isinstance(derived, sympy.Symbol) and not self.is_bound(derived):
                self._names[str(derived)] = self.relax_size(own)

    def _known_results(self, node: ir.Node) -> list[Value] | None:
        """A value whose elements are known as sizes needs no kernel, whatever computes it."""
        if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            return None
        contents = self.found.contents(node.outputs[0])
        type_ = self.found.type(node.outputs[0])
        if contents is None or None in contents or not contents:
            return None
        if type_.dtype is None or type_.shape is None:
            return None
        if type_.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
            return None
        if len(type_.shape) > 1 or not all(self.is_bound(dim) for dim in contents):
            return None
        return [Known(type_.dtype, type_.shape, tuple(contents))]

    def is_bound(self, dim: Dim) -> bool:
        """Whether every name in ``dim`` has a value where the lowering is."""
        return isinstance(dim, int) or all(
            str(name) in self._names for name in sympy.sympify(dim).free_symbols
        )

    def _settled(self, output: ir.Value, value: Value) -> Value:
        """Write what has several readers to memory, unless it is as cheap to compute again."""
        from netlathe.backends.tvm.ops import shared

        uses = self._uses.get(output, 0)
        inner = value.last if isinstance(value, ChannelsLast) else value
        if isinstance(inner, Lazy):
            several = uses > 1 and not inner.cheap and not _is_mask(output)
            is_written = several or inner.cost > _MOST_OPERATORS
        else:
            is_written = isinstance(inner, Pending) and uses != 1 and not isinstance(inner, Normed)
        if not is_written:
            return value
        if by := shared.quantizers(self, output):
            return shared.written(self, output, value, by, floats=uses > len(by))
        if isinstance(value, ChannelsLast):
            value.last = self.force(inner)
            return value
        return self.force(inner)

    def _input(self, value: ir.Value) -> Any:
        type_ = self.found.type(value)
        if type_.dtype is None or type_.shape is None:
            raise Unsupported(f"input {value.name} has no type")
        if type_.dtype not in storage.STORED:
            raise Unsupported(f"input {value.name} has elements of type {type_.dtype.name}")
        for dim in type_.shape:
            for name in sympy.sympify(dim).free_symbols:
                self._names.setdefault(str(name), tirx.Var(_identifier(str(name)), "int64"))
        var = relax.Var(_identifier(value.name or "input"), self.tensor(type_.dtype, type_.shape))
        self.values[value] = Ready(type_.dtype, type_.shape, var, type_.shape)
        self._given.add(var)
        return var

    def _output(self, value: ir.Value) -> Any:
        if value in self._told:
            from netlathe.backends.tvm.ops import dots

            self.values[value] = dots.stored(self, self.value(value))
        ready = self.force(self.value(value))
        type_ = self.found.type(value)
        shape = ready.shape if type_.shape is None else type_.shape
        is_input = ready.var in self._given and value.name not in dict(self._in_place)
        if is_input or self.is_constant(ready):
            ready = self._copied(ready)
        if ready.stored_shape == shape:
            return ready.var
        return self.builder.emit(relax.op.reshape(ready.var, self.relax_shape(shape)))

    # -- values -------------------------------------------------------------------------------------

    def value(self, value: ir.Value) -> Value:
        """What a value of the graph was lowered to; constants become parameters here."""
        if value not in self.values:
            tensor = value.const_value
            if tensor is None:
                raise Unsupported(f"{value.name} comes from outside the graph")
            self.values[value] = self.constant(value, tensor)
        return self.values[value]

    def constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> Value:
        """A constant: a literal where it has one element, else a parameter."""
        shape = tuple(tensor.shape.numpy())
        if tensor.dtype not in storage.STORED:
            raise Unsupported(f"{tensor.dtype.name} tensors")
        if tensor.size == 1 and storage.computed(tensor.dtype) == storage.STORED[tensor.dtype]:
            return Scalar(tensor.dtype, shape, packing.array(tensor).reshape(-1)[0].item())
        assert value.name is not None  # the IR has no constant without one
        recipe = Recipe(packing.as_it_is, (value.name,))
        return self.parameter(value.name, tensor.dtype, shape, recipe, value)

    def parameter(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        recipe: Recipe,
        key: object,
    ) -> Ready:
        """The parameter known as ``key``, made on first request."""
        if key not in self.parameters:
            dims_ = tuple(int(dim) for dim in shape)
            var = relax.Var(f"p{len(self.parameters)}", self.tensor(dtype, dims_))
            made = Parameter(name, storage.STORED[dtype], dims_, recipe)
            self.parameters[key] = (made, Ready(dtype, dims_, var, dims_))
        return self.parameters[key][1]

    def is_constant(self, value: Ready) -> bool:
        """Whether this is a parameter, which no kernel writes."""
        return any(value.var.same_as(made.var) for _, made in self.parameters.values())

    def force(self, value: Value) -> Ready:
        """``value`` in memory."""
        if isinstance(value, Ready):
            return value
        if value not in self._forced:
            self._forced[value] = self._write(value)
        return self._forced[value]

    def _write(self, value: Value) -> Ready:
        kernel = Kernel(self)
        if isinstance(value, ChannelsLast):
            value = value.usual()
        if isinstance(value, Placed):
            made = kernel.finish(general.sections(kernel, [value.section(kernel)]))[0]
            self.written.limit(made.var, value.rows)
            return made
        if isinstance(value, Pending):
            out = kernel.write(value.dtype, value.shape)
            shape = kernel.shape(value.shape)
            schedule = value.build(kernel, general.into(out, value.dtype, shape))
        else:
            schedule = general.write(kernel, value)
        return kernel.finish(schedule)[0]

    def together(self, values: Sequence[Value]) -> list[Ready]:
        """:meth:`force` of all; on a GPU, where a launch costs most, by one kernel if there is none yet."""
        waiting = [v for v in dict.fromkeys(values) if isinstance(v, (Lazy, Placed))]
        waiting = [v for v in waiting if v not in self._forced and v.rank > 0]
        if len(waiting) > 1 and isinstance(self.machine, Gpu):
            # Outputs come in this order, whichever way they are written.
            waiting.sort(key=lambda v: isinstance(v, Placed))
            kernel = Kernel(self)
            sections = [general.section(kernel, value) for value in waiting]
            made = kernel.finish(general.sections(kernel, sections))
            self._forced.update(zip(waiting, made, strict=True))
            for value, ready in zip(waiting, made, strict=True):
                if isinstance(value, Placed):
                    self.written.limit(ready.var, value.rows)
        return [self.force(value) for value in values]

    def replaceable(self, node: ir.Node) -> Ready | None:
        """The tensor of the node's first input, if its first output may be that, written over in part.

        So it is where the input is the caller's and nothing but the node reads it or gives it out, and the
        output is given out.
        """
        given, made = node.inputs[0], node.outputs[0]
        if not self._may_replace or given is None or not made.is_graph_output():
            return None
        if given.is_initializer() or not given.is_graph_input() or given.is_graph_output():
            return None
        if len(given.uses()) != 1 or node.graph is not self.model.graph:
            return None
        self._in_place.append((made.name or "", given.name or ""))
        return self.force(self.value(given))

    def _copied(self, value: Ready) -> Ready:
        """A copy, where an output must not be an input or a parameter itself."""
        kernel = Kernel(self)
        schedule = general.write(kernel, value)
        return kernel.finish(schedule)[0]

    def operand(self, value: Value) -> Value:
        """``value`` for reading inside a kernel: pending kernels are written first."""
        if isinstance(value, ChannelsLast):
            value.last = self.operand(value.last)
            return value
        return self.force(value) if isinstance(value, (Pending, Placed)) else value

    # -- sizes --------------------------------------------------------------------------------------

    def relax_size(self, dim: Dim) -> Expr:
        """A dim as an expression of the Relax function."""
        return sizes.to_expr(dim, lambda name: self._names[name])

    def relax_shape(self, shape: Shape) -> Any:
        """Dims as a Relax shape."""
        return relax.ShapeExpr([self.relax_size(dim) for dim in shape])

    def tensor(self, dtype: ir.DataType, shape: Shape) -> Any:
        """A Relax tensor type."""
        return relax.TensorType([self.relax_size(d) for d in shape], storage.STORED[dtype])

    def size_from_data(self, value: Value, wanted: Sequence[Dim]) -> None:
        """Let the names in ``wanted``, dims that only data decide, stand for the elements of ``value``.

        ``value`` is an int64 vector as long as ``wanted``. It is read when the model runs.
        """
        ready = self.force(value)
        self._read.add(ready.var)
        shape = self.builder.emit(relax.op.tensor_to_shape(ready.var))
        variables = []
        for dim in wanted:
            variable = tirx.Var(f"data{len(self._names)}", "int64")
            if isinstance(dim, sympy.Symbol):
                self._names.setdefault(str(dim), variable)
                variable = self._names[str(dim)]
            variables.append(variable)
        self.builder.match_cast(shape, relax.ShapeType(variables))

    def fresh(self, stem: str) -> sympy.Symbol:
        """A size name that the model does not have."""
        number = len(self._names)
        while f"{stem}{number}" in self._names:
            number += 1
        return dims.symbol(f"{stem}{number}")

    # -- kernels ------------------------------------------------------------------------------------

    def call(
        self,
        function: Any,
        inputs: Sequence[Any],
        outputs: Sequence[tuple[ir.DataType, Shape]],
        workspaces: Sequence[tuple[str, Expr]],
        names: Mapping[str, Expr],
        schedule: str,
        updated: Sequence[Ready] = (),
    ) -> list[Ready]:
        """Emit a call; an equal kernel that exists already is used instead.

        ``names`` maps size names to the kernel's variables, in which ``workspaces`` (TIR dtype,
        elements) are stated. Those of the inputs that are ``updated`` are outputs, too, after the others.
        """
        target = self._function(function, schedule)
        places = [-1 for _ in outputs] + [list(inputs).index(value.var) for value in updated]
        outputs = [*outputs, *((value.dtype, value.stored_shape) for value in updated)]
        out_types = [self.tensor(dtype, shape) for dtype, shape in outputs]
        inside = {variable: self._names[name] for name, variable in names.items()}
        for stored, count in workspaces:
            out_types.append(relax.TensorType([substituted(count, inside)], stored))
        self._read.update(inputs)
        arguments = [*inputs, *inside.values()]
        call: Any = relax  # the annotations of these two know no lists of arguments
        if updated:
            places += [-1 for _ in workspaces]
            made = call.op.call_tir_inplace(target, arguments, places, out_types)
        else:
            made = call.call_tir(target, arguments, out_types)
        result = self.builder.emit(made)
        if len(out_types) == 1:
            parts = [result]
        else:
            parts = [
                self.builder.emit(relax.TupleGetItem(result, index))
                for index in range(len(outputs))
            ]
        self._given.update(parts[len(outputs) - len(updated) :])
        self.written.add(parts)
        return [
            Ready(dtype, shape, var, shape)
            for (dtype, shape), var in zip(outputs, parts, strict=True)
        ]

    def _function(self, function: Any, schedule: str) -> Any:
        key = int(tvm_ffi.structural_hash(function))
        for known, target in self._functions.setdefault(key, []):
            if tvm_ffi.structural_equal(known, function):
                return target
        stem = schedule.replace(".", "_")
        number = self._counts.get(stem, 0)
        self._counts[stem] = number + 1
        name = f"{stem}_{number}"
        target = self.builder.add_func(function.with_attr("global_symbol", name), name)
        self._functions[key].append((function, target))
        return target


def _gap(node: ir.Node, error: Unsupported) -> Diagnostic:
    return Diagnostic(
        "tvm.unsupported",
        f"{node.op_type}: {error}" if node.op_type not in str(error) else str(error),
        at=show_node(node),
        where=location(node),
        help="export this model with target onnx",
    )


def _identifier(name: str) -> str:
    text = "".join(c if c.isalnum() else "_" for c in name)
    return text if text[:1].isalpha() else f"v_{text}"


def _is_mask(value: ir.Value) -> bool:
    """Whether only Attention reads a value, as its mask: that writes it if a kernel asks for it."""
    return all(node.op_type == "Attention" and index == 3 for node, index in value.uses())


def _count_uses(graph: ir.Graph, told: frozenset[ir.Value]) -> Mapping[ir.Value, int]:
    counts: dict[ir.Value, int] = {}
    for inner in (graph, *graph.subgraphs()):
        for node in inner:
            for value in node.inputs:
                if value is not None:
                    counts[value] = counts.get(value, 0) + 1
    for value in graph.outputs:
        if value not in told:  # or the kernels that are looked at would be others
            counts[value] = counts.get(value, 0) + 2  # an output is in memory
    return counts
