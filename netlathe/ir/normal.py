"""The normal form that every stage after capture relies on, and `normalize`, which makes it.

In normal form, at opset 25 of the default domain:

* Constants are initializers; what reads only constants is folded (see `netlathe.ir.fold` for what
  stays). Weights keep their source names, tied weights are one initializer (`netlathe.ir.ties`).
* Every optional attribute is written out, axes count from the front (`netlathe.ir.defaults`).
* Shape operands are literals that hold for every dynamic size wherever such a literal exists
  (`netlathe.ir.movement`), so shape arithmetic is left only where sizes truly mix.
* No node is dead, repeated, or moves nothing; nodes are in order; value names are unique.
* Every value carries the dtype and shape that `netlathe.ir.types` derives, or no shape.
* Functions of the model are inlined. Nodes of other domains pass through as they are.

Where ONNX has several spellings, this is the one:

====================================  =========================================================
spelling                              normal form
====================================  =========================================================
Constant                              initializer under the same name
Identity, Dropout, Sum/Min/Max/Mean/  gone. An Identity stays only where a graph output is a
Concat/Split of one                   graph input, an initializer, another output or (in a
                                      subgraph) a value from outside
CastLike                              Cast, where the dtype is known
Cast to the same dtype; Cast(Cast)    gone; one Cast where the first loses nothing
Gemm                                  MatMul + Add; transA, transB are Transposes (folded into a
                                      weight), alpha and beta factors of the constants
Sum of several                        a chain of Adds
Flatten                               Reshape, where its literal exists
Reshape                               literal: 0 copies the dim at the same position, at most one
                                      -1, else sizes; allowzero=0; Reshape(Reshape) is one
Reshape, MatMul, Add, Reshape back    MatMul, Add on the unflattened rows
Expand                                literal with 1 for a dim that stays
Slice                                 literals in int64; whole axes left out; axes and steps
                                      given; end 2**63-1 for "to the end"
Transpose(Transpose)                  one, with perm written out
Squeeze, Unsqueeze, Reduce*           axes as a constant int64 input, from the front, ascending
Squeeze, Unsqueeze of activations     stay (they are not turned into Reshapes)
Split                                 constant sizes where known, else num_outputs
SequenceAt of SplitToSequence         Split (a Gather where the dim goes), if positions are known
Shape, Gather of it, ... if known     constant
Add, Mul, And, Or with a constant     the constant is input 1
x + 0, x * 1, x ** 1, x and true ...  x
Sub, Neg, Pow, Reciprocal, ...        stay as they are
Conv, pools                           kernel_shape, strides, dilations, group, pads written out;
                                      auto_pad resolved unless a dynamic size decides the pads
BatchNormalization, LayerNorm, ...    outputs that nobody reads are taken off
Clip                                  min and max as inputs
Attention                             scale written out; the window sizes only where given
If with a constant condition          the branch it takes
====================================  =========================================================
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from netlathe.ir import common, edit, fold, forms, ties, types
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import module_path
from netlathe.ir.work import Work
from netlathe.pipeline.ledger import Entry

# A graph settles in three or four rounds; more means that two rules undo each other.
_MOST_ROUNDS = 32


def normalize(model: ir.Model) -> list[Entry]:
    """Bring ``model`` into normal form, in place, and write derived types to all values.

    It computes the same function afterwards, has the same inputs and outputs by name, and a second
    call changes nothing. The ledger has ties, the number of folded nodes, and what stayed unfolded.
    """
    graph = model.graph
    if model.functions:
        common_passes.InlinePass()(model)
    unique_names(graph)
    graph.sort()
    entries = ties.merge(graph)
    folded = 0
    work = Work(types.Inference(), edit.names_in(graph))  # the first round goes without types
    for _ in range(_MOST_ROUNDS):
        _round(graph, work)
        folded += work.folded
        untyped = not work.found.types
        if not work.changed and not untyped:
            break
        work = Work(types.infer(model), work.taken)
    else:
        raise RuntimeError("normal form does not settle: two of its rules undo each other")
    _unique_node_names(graph)
    types.annotate(model)
    if folded:
        reason = f"{folded} nodes that read only constants are constants now"
        entries.append(Entry("constants", "applied", reason, detail={"nodes": folded}))
    return entries + [
        Entry(
            name,
            "skipped",
            f"constant, but not folded: {why}",
            module_path(node),
            detail={"node": show_node(node)},
        )
        for name, (node, why) in work.unfolded.items()
        if node.graph is not None
    ]


def _round(graph: ir.Graph, work: Work) -> None:
    """Apply every rule once, in the order of the nodes."""
    for node in list(graph.all_nodes()):
        if node.domain == "ai.onnx":
            node.domain = ""
        if node.graph is not None and node.domain == "":
            forms.rewrite(node, work)
    edit.remove_dead(graph)
    graph.sort()
    work.changed |= common.merge_equal(graph)
    fold.fold(graph, work)
    edit.remove_dead(graph)
    graph.sort()


def _unique_node_names(graph: ir.Graph) -> None:
    """Inlined functions and branches may bring names that are taken."""
    taken: set[str] = set()
    for node in graph.all_nodes():
        if node.name and node.name in taken:
            node.name = edit.unique_name(graph, node.name, taken)
        elif node.name:
            taken.add(node.name)


def unique_names(graph: ir.Graph) -> None:
    """Give every value of the graph and its subgraphs a name of its own.

    Inputs, outputs and initializers of the main graph keep theirs.
    """
    taken: set[str] = set()
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    taken.update(value.name for value in kept if value.name)
    values = [value for node in graph.all_nodes() for value in node.outputs]
    for inner in graph.subgraphs():
        values += [*inner.inputs, *inner.initializers.values()]
    seen = set(kept)
    for value in values:
        if value in seen:
            continue
        seen.add(value)
        if not value.name and not value.uses():
            continue  # an optional output that the node does not have
        if not value.name or value.name in taken:
            value.name = edit.unique_name(graph, value.name or "value", taken)
        else:
            taken.add(value.name)
