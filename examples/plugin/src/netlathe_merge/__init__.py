"""Computes products that read the same value as one product, which is split afterwards.

    q = MatMul(x, wq: f32[d,a])              all = MatMul(x, [wq | wk | wv]: f32[d,a+b+c])
    k = MatMul(x, wk: f32[d,b])      ->      q, k, v = Split(all, [a, b, c])
    v = MatMul(x, wv: f32[d,c])

One wide product reads its input once and keeps more of the machine busy than several narrow ones do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from netlathe import Context, Entry, Exact, Pass, Result, option, options
from netlathe.ir import edit, normal, weights
from netlathe.ir.provenance import matches, module_path
from netlathe.pipeline.ledger import Status

__all__ = ["MergeProducts"]


@options
class MergeProducts(Pass):
    """Compute products that read the same value as one product, which is split afterwards."""

    name = "merge_products"
    exactness = Exact()  # every element is the same sum as before

    ignore: tuple[str, ...] = option(
        default=(), help="module paths whose products stay as they are, with wildcards"
    )

    def run(self, model: ir.Model, ctx: Context) -> Result:
        """Merge what can be merged; every product with a constant weight is a candidate."""
        result = Result(changed=False)
        alike: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph.all_nodes():
            if node.op_type != "MatMul" or node.domain or not weights.is_weight(node.inputs[1]):
                continue
            if why := _unfit(node, model.graph):
                result.entries.append(_entry(node, "refused", why))
            elif pattern := next((p for p in self.ignore if matches(module_path(node), p)), None):
                entry = _entry(node, "skipped", f"ignored: it matches {pattern!r}", left_out=True)
                result.entries.append(entry)
            else:
                alike.setdefault(_input(node, 0), []).append(node)
        taken = edit.names_in(model.graph)
        for nodes in alike.values():
            if len(nodes) == 1:
                why = "no other product reads its input"
                result.entries.append(_entry(nodes[0], "skipped", why, left_out=True))
                continue
            names = ", ".join(str(_input(node, 1).name) for node in nodes)
            result.entries += [_entry(n, "applied", f"one product with {names}") for n in nodes]
            _merge(model.graph, nodes, taken)
            result.changed = True
        normal.normalize(model)
        return result


def _unfit(node: ir.Node, graph: ir.Graph) -> str:
    """Why a product cannot be merged with others."""
    weight = _input(node, 1)
    if node.graph is not graph:
        return "it stands in a subgraph"
    if weight.shape is None or len(weight.shape) != 2:
        return "its weight is no matrix"
    if len(weight.uses()) > 1 or weight.is_graph_output():
        return "something else reads its weight, which would be there twice"
    if _input(node, 0).shape is None:
        return "the rank of its input is unknown"
    return ""


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node], taken: set[str]) -> None:
    """Put one product and a Split where the first of ``nodes`` stands; outputs keep their names."""
    first = nodes[0]
    data, parts = _input(first, 0), [_input(node, 1) for node in nodes]
    widths = [_dims(part)[1] for part in parts]
    weight = edit.constant(graph, _side_by_side(parts), f"{parts[0].name}_merged", taken)
    sizes = edit.constant(graph, np.array(widths, np.int64), f"{parts[0].name}_widths", taken)
    product = edit.node("MatMul", [data, weight], like=first, created_by=MergeProducts.name)
    product.outputs[0].name = edit.unique_name(graph, f"{first.outputs[0].name}_merged", taken)
    assert data.shape is not None  # or it was refused
    split = ir.node(
        "Split",
        [product.outputs[0], sizes],
        {"axis": len(data.shape) - 1},
        num_outputs=len(nodes),
    )
    graph.insert_before(first, [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.type, part.shape = old.type, old.shape
        if not old.is_graph_output():
            part.name, old.name = old.name, None
        edit.redirect(old, part)
    edit.remove_dead(graph, nodes)


def _side_by_side(parts: Sequence[ir.Value]) -> ir.TensorProtocol:
    """The matrices [d, a], [d, b], ... as one [d, a + b + ...]; nothing is read before it is needed."""
    tensors = [part.const_value for part in parts]
    turned = [weights.transposed(tensor, (1, 0)) for tensor in tensors if tensor is not None]
    depth, width = _dims(parts[0])[0], sum(_dims(part)[1] for part in parts)
    rows = weights.joined(turned, [width, depth], f"{parts[0].name}_rows")
    return weights.transposed(rows, (1, 0), f"{parts[0].name}_merged")


def _entry(node: ir.Node, status: Status, reason: str, left_out: bool = False) -> Entry:
    name = _input(node, 1).name or ""
    return Entry(name, status, reason, module_path(node), left_out=left_out)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # both inputs of a MatMul are there
    return value


def _dims(value: ir.Value) -> list[int]:
    assert value.const_value is not None  # it is a weight
    return list(value.const_value.shape.numpy())
