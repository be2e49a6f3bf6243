"""Takes branches out of a graph, and the caches that nothing needs then."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from netlathe.analysis.removal import same_size
from netlathe.ir import edit

Place = tuple[str, int]  # an Add by the name of its sum, and which of its operands


def take_out(graph: ir.Graph, places: Iterable[Place]) -> dict[str, str]:
    """Replace every Add that loses an operand by the other one; sum -> what stands for it."""
    makers = {value.name: node for node in graph for value in node.outputs}
    lost = {(makers[name], position) for name, position in places}
    names: dict[str, str] = {}
    joins = []
    for join in list(graph):  # in order: a sum that lost both operands is lost to a later one
        at = [position for position in (0, 1) if (join, position) in lost]
        if not at:
            continue
        joins.append(join)
        total, rest = join.outputs[0], join.inputs[1 - at[0]]
        assert rest is not None
        if len(at) == 2:
            lost.update((use.node, use.idx) for use in total.uses())
            continue
        old, stood_for = total.name or "", rest.name or ""
        edit.redirect(total, rest)
        names[old] = stood_for
        if rest.name != stood_for:  # it took over the name of an output of the model
            names = {name: old if by == stood_for else by for name, by in names.items()}
            names[stood_for] = names[old] = old
    edit.remove_dead(graph, joins)
    return names


def remove_caches(graph: ir.Graph, inputs: Collection[str], outputs: Collection[str]) -> None:
    """Remove past and present keys and values by name."""
    for value in [v for v in graph.outputs if v.name in outputs]:
        graph.outputs.remove(value)
        if (maker := value.producer()) is not None:
            edit.remove_dead(graph, [maker])
    staying = [value for value in graph.inputs if value.name not in inputs]
    for value in [v for v in graph.inputs if v.name in inputs]:
        for use in list(value.uses()):  # the length of the past, which other caches have as well
            other = same_size(use.node, staying)
            assert other is not None  # choose refuses what has no such input
            use.node.replace_input_with(use.idx, other)
        graph.inputs.remove(value)
