"""Brings a model to its smallest equal: nothing dead, nothing twice, nothing that does nothing.

The IR's normal form does most of it (`netlathe.ir.normal`): dead code, constants, tied weights, repeated
nodes, moves that cancel. Here come the steps that are no matter of form, each of them exact:

==============================================  =====================================================
in the graph                                    becomes
==============================================  =====================================================
Conv(Pad(x) with zeros)                         Conv with the pads
a bias of zeros; x + zeros, x - zeros           no bias; x
x * ones, x / ones                              x
Relu(Relu(x)), Relu(Sigmoid(x)), Ceil(Floor(x))  the inner one
Neg(Neg(x)), Not(Not(x))                        x
Reshape, Squeeze, Unsqueeze in a row            one of them, or none
Expand(x) + y, where + broadcasts as well       x + y
Concat(Split(x)), Gather(x, 0, 1, 2, ...)       x
equal integer, boolean and scalar constants     one
==============================================  =====================================================

Float vectors and matrices of the same contents stay apart, unless they are tied (`netlathe.ir.ties`): two
norms that still have scales of one are two. Inputs that nothing reads stay: callers give them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, PassError
from netlathe.ir import dims, edit, movement, normal, types, weights
from netlathe.ir.defaults import OPSET
from netlathe.ir.dims import Dim, Shape
from netlathe.ir.provenance import module_path
from netlathe.ir.work import Work
from netlathe.passes.normalize import raise_operators
from netlathe.pipeline.fingerprint import graph_digest
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Exact, Pass, Result, options

_MOST_ROUNDS = 32  # a graph settles in a few; more means that two rules undo each other


@options
class Cleanup(Pass):
    """Bring a model to its smallest equal: no dead, repeated or empty work; operators raised."""

    name = "cleanup"
    exactness = Exact()

    def run(self, model: ir.Model, ctx: Context) -> Result:
        """Apply all rules until none applies any more.

        Raises:
            PassError: the model is not at the IR's opset.
        """
        version = model.opset_imports.get("")
        if version != OPSET:
            raise PassError(
                Diagnostic(
                    "cleanup.opset",
                    f"the model is at opset {version}, not {OPSET}",
                    help="capture it: the onnx_file frontend lifts files from opset 13 on",
                )
            )
        before, digest = _Census.of(model), graph_digest(model)
        found = _remove_dead(model.graph)
        for _ in range(_MOST_ROUNDS):
            found += normal.normalize(model)
            fired = _simplify(model)
            if not fired:
                raised = raise_operators(model)
                fired = [entry for entry in raised if entry.status == "applied"]
                found += [entry for entry in raised if entry.status != "applied"]
            if not fired:
                break
            found += fired
        else:
            raise RuntimeError("cleanup does not settle: two of its rules undo each other")
        unique = {(entry.candidate, entry.reason): entry for entry in found}
        return _result(model, before, digest, list(unique.values()))


# -- what there was, and what is left -----------------------------------------------------------------


@dataclass(frozen=True)
class _Census:
    """How many nodes of every operator, constants and bytes a model has."""

    ops: Counter[str]
    constants: int
    bytes: int

    @classmethod
    def of(cls, model: ir.Model) -> _Census:
        """Count."""
        ops = Counter(node.op_type for node in model.graph.all_nodes())
        constants = sum(len(graph.initializers) for graph in model.graphs())
        return cls(ops, constants, weights.num_bytes(model))

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.ops.total()


def _result(model: ir.Model, before: _Census, digest: str, entries: list[Entry]) -> Result:
    after = _Census.of(model)
    changed = graph_digest(model) != digest
    if changed:
        ops = {
            name: after.ops[name] - before.ops[name]
            for name in sorted(before.ops.keys() | after.ops.keys())
            if after.ops[name] != before.ops[name]
        }
        listed = ", ".join(f"{name} {count:+}" for name, count in ops.items())
        reason = (
            f"{before.nodes} nodes became {after.nodes}{f' ({listed})' if listed else ''},"
            f" {before.constants} constants {after.constants}, {before.bytes} bytes {after.bytes}"
        )
        entries.append(Entry("(the model)", "applied", reason, detail={"nodes": ops}))
    else:
        entries = [entry for entry in entries if entry.status != "applied"]
        reason = f"all {after.nodes} nodes and {after.constants} constants are needed"
        entries.append(Entry("(the model)", "skipped", reason))
    for value in model.graph.inputs:
        if not value.uses() and not value.is_graph_output():
            reason = "nothing reads this input; it stays, callers give it"
            entries.append(Entry(value.name or "", "refused", reason))
    removed = float(before.nodes - after.nodes)
    statistics = {"nodes_removed": removed, "bytes_removed": float(before.bytes - after.bytes)}
    return Result(changed, entries, statistics=statistics)


def _remove_dead(graph: ir.Graph) -> list[Entry]:
    """Take out what no output needs, before the normal form would do so without a word."""
    nodes = {node: node.outputs[0].name for node in graph.all_nodes() if node.outputs}
    constants = set(graph.initializers)
    edit.remove_dead(graph)
    gone = [name for node, name in nodes.items() if node.graph is None and name]
    unread = sorted(constants - set(graph.initializers))
    if not gone and not unread:
        return []
    reason = f"{len(gone)} nodes and {len(unread)} constants that no output needs are gone"
    return [Entry("dead code", "applied", reason, detail={"nodes": gone, "constants": unread})]


# -- rules --------------------------------------------------------------------------------------------

Rule = Callable[[ir.Node, Work], str]  # what it did to the node, which may be gone; "" for nothing


def _simplify(model: ir.Model) -> list[Entry]:
    """Apply every rule once, in the order of the nodes, then merge equal constants."""
    work = Work(types.infer(model), edit.names_in(model.graph))
    found = []
    for node in list(model.graph.all_nodes()):
        for rule in _RULES.get(node.op_type, ()) if node.domain == "" else ():
            if node.graph is None:
                break
            name, where = node.outputs[0].name or "", module_path(node)
            if said := rule(node, work):
                found.append(Entry(name, "applied", said, where))
    edit.remove_dead(model.graph)
    return found + _merge_constants(model.graph)


def _merge_constants(graph: ir.Graph) -> list[Entry]:
    """Constants that are no parameters (integers that count, booleans, single numbers), once each."""
    alike: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not weights.is_weight(value) or value.is_graph_output():
            continue
        number = tensor.size == 1 and tensor.dtype != ir.DataType.STRING
        if number or tensor.dtype in (ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64):
            alike[tensor.dtype, tuple(tensor.shape), tensor.tobytes()].append(value)
    merged = {}
    for first, *others in alike.values():
        for value in others:
            merged[value.name or ""] = first.name
            edit.redirect(value, first)
            edit.drop_if_unread(value)
    if not merged:
        return []
    reason = f"{len(merged)} constants were copies of others"
    return [Entry("equal constants", "applied", reason, detail={"merged": merged})]


def _pad_into_conv(node: ir.Node, work: Work) -> str:
    """A convolution pads with zeros itself."""
    data = node.inputs[0]
    pad = data.producer() if data is not None else None
    if pad is None or pad.op_type != "Pad" or pad.domain or pad.inputs[0] is None:
        return ""
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    axes = work.ints(pad.inputs[3]) if len(pad.inputs) > 3 else None
    given, rank = work.ints(pad.inputs[1]), work.rank(data)
    pads = node.attributes.get_ints("pads")
    if given is None or rank is None or pads is None or (axes is None and len(pad.inputs) > 3):
        return ""
    zero = value is None or work.scalar(value) == 0
    explicit = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    if not zero or not explicit or pad.attributes.get_string("mode", "constant") != "constant":
        return ""
    before, after = [0] * rank, [0] * rank
    for position, axis in enumerate(axes if axes is not None else range(rank)):
        before[axis % rank] = given[position]
        after[axis % rank] = given[position + len(given) // 2]
    if any(before[:2] + after[:2]) or min(before + after) < 0:
        return ""
    total = [a + b for a, b in zip(pads, before[2:] + after[2:], strict=True)]
    work.set_attribute(node, "pads", total)
    work.set_input(node, 0, pad.inputs[0])
    return f"{node.op_type} took in the zeros that a Pad put around its input"


def _zero_bias(node: ir.Node, work: Work) -> str:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or not _is_full_of(bias, 0):
        return ""
    work.set_input(node, 2, None)
    node.resize_inputs(2)
    return f"{node.op_type} lost a bias of zeros"


_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}


def _neutral_vector(node: ir.Node, work: Work) -> str:
    """x + zeros, x * ones: x where the constant does not add dims."""
    data, other = node.inputs
    number = _NEUTRAL[node.op_type]
    out, shape = work.shape(node.outputs[0]), work.shape(data)
    if data is None or not _is_full_of(other, number) or not _same(shape, out):
        return ""
    work.forward(node, data)
    return f"{node.op_type} of a constant {number} did nothing"


def _is_full_of(value: ir.Value | None, number: int) -> bool:
    if value is None or not weights.is_weight(value) or value.const_value is None:
        return False
    tensor = value.const_value
    if tensor.dtype == ir.DataType.STRING or weights.is_recipe(tensor):
        return False
    array = weights.array(value)
    return array.size > 0 and bool(
        (array.reshape(-1)[:1] == number).all() and (array == number).all()
    )


# f(g(x)) is g(x), for these g
_ALREADY: Mapping[str, frozenset[str]] = {
    "Abs": frozenset({"Abs", "Exp", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"}),
    "Ceil": frozenset({"Ceil", "Floor", "Round"}),
    "Floor": frozenset({"Ceil", "Floor", "Round"}),
    "Relu": frozenset({"Abs", "Exp", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"}),
    "Round": frozenset({"Ceil", "Floor", "Round"}),
    "Sign": frozenset({"Sign"}),
}
_INVERSE = frozenset({"BitwiseNot", "Neg", "Not"})


def _idempotent(node: ir.Node, work: Work) -> str:
    maker = _maker(node.inputs[0])
    if maker is None or maker.op_type not in _ALREADY[node.op_type]:
        return ""
    work.forward(node, maker.outputs[0])
    return f"{node.op_type} of {maker.op_type} changed nothing"


def _undone(node: ir.Node, work: Work) -> str:
    maker = _maker(node.inputs[0])
    if maker is None or maker.op_type != node.op_type or maker.inputs[0] is None:
        return ""
    work.forward(node, maker.inputs[0])
    return f"{node.op_type} undid {maker.op_type}"


_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def _view_of_view(node: ir.Node, work: Work) -> str:
    """Two changes of shape in a row are one, or none."""
    maker = _maker(node.inputs[0])
    if maker is None or maker.op_type not in _VIEWS or maker.inputs[0] is None:
        return ""
    source, middle = maker.inputs[0], maker.outputs[0]
    before, after = work.shape(source), work.shape(node.outputs[0])
    if before is None or after is None:
        return ""
    what = f"{maker.op_type} and {node.op_type} in a row"
    if _same(before, after):
        work.forward(node, source)
        return f"{what} changed nothing"
    if (
        len(middle.uses()) > 1
        or middle.is_graph_output()
        or node.op_type == maker.op_type == "Reshape"
    ):
        return ""  # the normal form has joined two Reshapes where that is possible
    if node.op_type == maker.op_type:
        axes = _joined_axes(maker, node, work)
        if axes is None:
            return ""
        work.set_input(node, 0, source)
        work.set_ints(node, 1, axes, "axes")
        return f"{what} became one"
    literal = movement.reshape_literal(before, after)
    if literal is None:
        return ""
    target = work.constant(node, np.array(literal, np.int64), f"{node.outputs[0].name}_shape")
    made = ir.node("Reshape", [source, target], {"allowzero": 0})
    work.swap(node, [made], {node.outputs[0]: made.outputs[0]})
    return f"{what} became one Reshape"


def _joined_axes(first: ir.Node, second: ir.Node, work: Work) -> list[int] | None:
    """The axes of one Squeeze or Unsqueeze that does what two of them do."""
    a, b = (work.ints(n.inputs[1] if len(n.inputs) > 1 else None) for n in (first, second))
    larger = first.inputs[0] if first.op_type == "Squeeze" else second.outputs[0]
    rank = work.rank(larger)
    if a is None or b is None or rank is None:
        return None
    outer, inner = (a, b) if first.op_type == "Squeeze" else (b, a)
    kept = [axis for axis in range(rank) if axis not in outer]
    return sorted([*outer, *(kept[axis] for axis in inner)])


def _broadcast_operand(node: ir.Node, work: Work) -> str:
    """An element-wise operator broadcasts by itself what an Expand has spread out."""
    out = work.shape(node.outputs[0])
    for index, value in enumerate(node.inputs):
        maker = _maker(value)
        if maker is None or maker.op_type != "Expand" or maker.inputs[0] is None:
            continue
        shapes = [work.shape(v) for i, v in enumerate(node.inputs) if i != index]
        if _same(_broadcast([work.shape(maker.inputs[0]), *shapes]), out):
            work.set_input(node, index, maker.inputs[0])
            return f"{node.op_type} broadcasts input {index} itself, its Expand is gone"
    return ""


def _broadcast(shapes: list[Shape | None]) -> Shape | None:
    """What shapes broadcast to; None where that is not known."""
    result: list[Dim] = []
    for shape in shapes:
        if shape is None:
            return None
        rank = max(len(shape), len(result))
        padded: list[Dim] = [*[1] * (rank - len(shape)), *shape]
        held: list[Dim] = [*[1] * (rank - len(result)), *result]
        result = []
        for a, b in zip(held, padded, strict=True):
            if a != 1 and b != 1 and not dims.same(a, b):
                return None
            result.append(b if a == 1 else a)
    return tuple(result)


def _joins_a_split(node: ir.Node, work: Work) -> str:
    split = _maker(node.inputs[0])
    if split is None or split.op_type != "Split" or split.inputs[0] is None:
        return ""
    same_axis = split.attributes.get_int("axis", 0) == node.attributes.get_int("axis", 0)
    if not same_axis or tuple(node.inputs) != tuple(split.outputs):
        return ""
    work.forward(node, split.inputs[0])
    return "Concat put together what a Split took apart"


def _gathers_all(node: ir.Node, work: Work) -> str:
    data, index = node.inputs
    shape, order = work.shape(data), edit.const_array(index)
    axis = node.attributes.get_int("axis", 0)
    if data is None or shape is None or order is None or order.ndim != 1:
        return ""
    if shape[axis] != order.size or not np.array_equal(order, np.arange(order.size)):
        return ""
    work.forward(node, data)
    return "Gather took every element in its place"


def _maker(value: ir.Value | None) -> ir.Node | None:
    """The node of the default domain that makes a value."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" else None


def _same(a: Shape | None, b: Shape | None) -> bool:
    if a is None or b is None or len(a) != len(b):
        return False
    return all(dims.same(x, y) for x, y in zip(a, b, strict=True))


_BROADCASTING = (
    "Add And BitwiseAnd BitwiseOr Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Or Pow"
    " Sub Where Xor"
).split()

_RULES: Mapping[str, tuple[Rule, ...]] = {
    **{name: (_broadcast_operand,) for name in _BROADCASTING},
    **{name: (_broadcast_operand, _neutral_vector) for name in _NEUTRAL},
    **{name: (_idempotent,) for name in _ALREADY},
    **{name: (_undone,) for name in _INVERSE},
    **{name: (_view_of_view,) for name in _VIEWS},
    "Concat": (_joins_a_split,),
    "Conv": (_pad_into_conv, _zero_bias),
    "ConvTranspose": (_zero_bias,),
    "Gather": (_gathers_all,),
    "LayerNormalization": (_zero_bias,),
}
