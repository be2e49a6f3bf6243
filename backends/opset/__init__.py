"""Lowering from the IR's opset (25) to any of 17 to 25: a rule per op that changed, schema-checked.

No converter goes down, so each node is taken by itself: it stays when its schema has not changed;
else a rule rewrites it, in the IR's opset, and what the rule wrote is lowered in turn; else, where
half-precision types are all that is too new, it computes in float32 between two Casts; else the
function body in its schema is written out. What is left is a gap, reported with all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import onnx.helper
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, LowerError
from netlathe.ir import edit, printing, provenance

from . import attention, bits, functions, legal, movement, norms, quantize, reduce, runtime
from .builder import Builder, Gap, Shared
from .legal import IR_OPSET

__all__ = ["IR_OPSET", "OPSETS", "gaps", "lower"]

OPSETS = range(17, IR_OPSET + 1)

# A rule returns the values that replace the node's outputs, or None: it stays, perhaps edited in
# place. Other ops it writes are in the IR's opset; its own op as the target wants it.
Rule = Callable[[Builder], list[ir.Value] | None]
RULES: dict[str, Rule] = {
    "AffineGrid": movement.affine_grid,
    "Attention": attention.attention,
    "AveragePool": movement.pool,
    "CastLike": norms.cast_like,
    "DFT": norms.dft,
    "DequantizeLinear": quantize.dequantize,
    "Gelu": norms.gelu,
    "GridSample": movement.grid_sample,
    "GroupNormalization": norms.group_normalization,
    "LpPool": movement.pool,
    "MaxPool": movement.pool,
    "Mish": norms.mish,
    "Pad": movement.pad,
    "QuantizeLinear": quantize.quantize,
    "RMSNormalization": norms.rms_normalization,
    "Resize": movement.resize,
    "RotaryEmbedding": attention.rotary_embedding,
    "ScatterElements": movement.scatter,
    "ScatterND": movement.scatter,
    "Split": movement.split,
    "Swish": norms.swish,
    "TensorScatter": movement.tensor_scatter,
    **dict.fromkeys(bits.OPS, bits.bitwise),
    **dict.fromkeys(reduce.OPS, reduce.reduce),
}
# Rules that decide by themselves whether the node may stay; the others always rewrite.
_CONDITIONAL = {
    "Attention", "AveragePool", "DFT", "DequantizeLinear", "GridSample", "LpPool", "MaxPool", "Pad",
    "QuantizeLinear", "Resize", "ScatterElements", "ScatterND", "Split", *reduce.OPS,
}  # fmt: skip
# Legal at opset 25, and ONNX Runtime 1.32 has neither a kernel for it there nor inlines its function:
# written out at every opset, so that what we export runs.
_WRITTEN_OUT = frozenset({"Swish"})

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def lower(model: ir.Model, opset: int) -> None:
    """Rewrite ``model`` in place so that every default-domain node is legal at ``opset``.

    Weights are not read. Inputs and outputs keep their names.

    Raises:
        LowerError: with one diagnostic per node that has no form at ``opset``; ``model`` is then
            half rewritten and of no more use.
    """
    gaps: list[Diagnostic] = []
    _lower_graph(model.graph, opset, Shared(edit.names_in(model.graph)), gaps)
    for function in model.functions.values():
        names = edit.names_in(function.graph)
        _lower_graph(function.graph, opset, Shared(names, is_function=True), gaps)
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        if "" in imports:
            imports[""] = opset
    if gaps:
        raise LowerError(gaps)
    runtime.settle(model, opset)
    _check(model, opset)
    # The oldest file format that has this opset: the one that runtimes of its time read.
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def _check(model: ir.Model, opset: int) -> None:
    """Hold every node against its schema once more, knowing nothing of the rules."""
    wrong = [
        Diagnostic("onnx.opset", reason, printing.show_node(node), provenance.location(node))
        for graph in (model.graph, *(function.graph for function in model.functions.values()))
        for node in graph.all_nodes()
        if not node.domain and (reason := legal.problem(node, opset)) is not None
    ]
    if wrong:
        raise LowerError(wrong)


def gaps(model: ir.Model, opset: int) -> list[Diagnostic]:
    """Every node of ``model`` that has no form at ``opset``; ``model`` is left as it was."""
    try:
        lower(model.clone(), opset)
    except LowerError as error:
        return list(error.diagnostics)
    return []


def _lower_graph(graph: ir.Graph, opset: int, shared: Shared, gaps: list[Diagnostic]) -> None:
    for node in tuple(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _lower_graph(attribute.as_graph(), opset, shared, gaps)
        _lower_nodes([node], opset, shared, gaps)


def _lower_nodes(
    nodes: Iterable[ir.Node], opset: int, shared: Shared, gaps: list[Diagnostic]
) -> None:
    """Lower ``nodes`` and, depth first, what their rules wrote in their place."""
    for node in nodes:
        if node.domain or _stays(node.op_type, opset):
            continue
        b = Builder(node, opset, shared)
        try:
            results = _rewrite(b)
        except Gap as gap:
            gaps.append(_diagnostic(node, opset, gap))
            continue
        if results is not None:
            _replace(b, results)
        written = [new for new in b.added if new.op_type != node.op_type and new.graph is not None]
        _lower_nodes(written, opset, shared, gaps)


def _stays(op: str, opset: int) -> bool:
    return legal.unchanged(op, opset) and op not in _WRITTEN_OUT


def _rewrite(b: Builder) -> list[ir.Value] | None:
    """Values for the node's outputs; None when it may stay.

    Raises:
        Gap: there is no way to say it.
    """
    op = b.node.op_type
    rule = RULES.get(op)
    if op in _WRITTEN_OUT:
        return RULES[op](b)
    if rule is not None and op in _CONDITIONAL:
        results = rule(b)
        if results is not None:
            return results
    _drop_defaults(b.node, b.opset)
    reason = legal.problem(b.node, b.opset)
    if reason is None:
        return None
    if rule is not None and op not in _CONDITIONAL:
        return rule(b)
    widened = _in_float32(b)
    if widened is not None:
        return widened
    if legal.schema(op, b.opset) is None:
        expanded = functions.expand(b)
        if expanded is not None:
            return expanded
    raise Gap(reason)


def _drop_defaults(node: ir.Node, opset: int) -> None:
    """Take off attributes that the older schema lacks and that ask for what it always did."""
    new, old = legal.schema(node.op_type, IR_OPSET), legal.schema(node.op_type, opset)
    if new is None or old is None:
        return
    for name, attribute in tuple(node.attributes.items()):
        if name in old.attributes or name not in new.attributes or attribute.is_ref():
            continue
        if name == "dilations" and set(attribute.as_ints()) == {1}:  # its default depends on rank
            del node.attributes[name]
            continue
        default = new.attributes[name].default_value
        if default.type and ir.serde.deserialize_attribute(default).value == attribute.value:
            del node.attributes[name]


def _in_float32(b: Builder) -> list[ir.Value] | None:
    """The node in float32 between Casts, where half-precision types are all that it lacks."""
    node, found = b.node, legal.schema(b.node.op_type, b.opset)
    if found is None:
        return None
    if any(value.dtype not in _HALVES for value, _ in legal.wrong_types(node, found)):
        return None
    pairs = [*legal.typed(found.inputs, node.inputs), *legal.typed(found.outputs, node.outputs)]
    wide = {
        formal.type_str
        for formal, value in pairs
        if value.dtype in _HALVES and legal.type_name(value) not in legal.allowed(found, formal)
    }
    if any("tensor(float)" not in legal.allowed(found, f) for f, _ in pairs if f.type_str in wide):
        return None
    inputs: list[ir.Value | None] = list(node.inputs)
    for i, value in enumerate(inputs):
        formal = found.inputs[min(i, len(found.inputs) - 1)]
        if value is not None and formal.type_str in wide:
            inputs[i] = b.cast(value, ir.DataType.FLOAT)
    attributes: dict[str, Any] = dict(node.attributes)
    outputs = b.many(node.op_type, inputs, len(node.outputs), **attributes)
    results = []
    for i, (old, new) in enumerate(zip(node.outputs, outputs, strict=True)):
        formal = found.outputs[min(i, len(found.outputs) - 1)]
        new.type, new.shape = old.type, old.shape
        if formal.type_str in wide and old.dtype is not None:
            new.type = ir.TensorType(ir.DataType.FLOAT)
            new = b.cast(new, old.dtype)
        results.append(new)
    return results


def _replace(b: Builder, results: list[ir.Value]) -> None:
    """Let ``results`` stand for the node's outputs, names and types included, and drop the node."""
    node = b.node
    made = {value for new in b.added for value in new.outputs}
    for old, new in zip(node.outputs, results, strict=True):
        if new in made:
            new.type, new.shape = old.type, old.shape
            if not old.is_graph_output():
                new.name, old.name = old.name, None
        edit.redirect(old, new)
    edit.remove_dead(b.graph, [node])


def _diagnostic(node: ir.Node, opset: int, gap: Gap) -> Diagnostic:
    newer = [v for v in OPSETS if v > opset and legal.problem(node, v) is None]
    help = gap.help
    if not help and newer:
        help = f"choose opset {newer[0]} or newer"
    return Diagnostic(
        "onnx.opset",
        str(gap),
        at=printing.show_node(node),
        where=provenance.location(node),
        help=help,
    )
