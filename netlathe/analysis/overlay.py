"""One model that computes what several variants of it compute, and what they share once.

    combined, names = overlay(model, [without_a, without_b])
    ctx.collect(combined, [Divergence("logits", names[0]["logits"]), ...])

So one sweep over calibration data compares them all, holds no outputs, and reads every weight once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from netlathe.ir import edit


def overlay(base: ir.Model, variants: Sequence[ir.Model]) -> tuple[ir.Model, list[dict[str, str]]]:
    """A copy of ``base`` with what is different in ``variants`` put beside it.

    Of each variant, the names of its values and outputs in the combined model, whose inputs and outputs
    are those of ``base``. A node of a variant is the one that is there already if it does the same to the
    same values; a weight is the same if it is the same tensor. ``variants`` are consumed; they take no
    inputs that ``base`` has not.
    """
    combined = base.clone()
    target = _Target(combined.graph)
    return combined, [target.take(variant.graph) for variant in variants]


class _Target:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._taken = edit.names_in(graph)
        self._known: dict[tuple[Any, ...], ir.Node] = {}
        for node in graph:
            if (key := _key(node)) is not None:
                self._known.setdefault(key, node)
        self._weights = {_tensor(v): v for v in graph.initializers.values()}

    def take(self, graph: ir.Graph) -> dict[str, str]:
        """Move the nodes of ``graph`` that are new; the name that each of its values has now."""
        inputs = {value.name: value for value in self._graph.inputs}
        here: dict[ir.Value, ir.Value] = {v: inputs[v.name] for v in graph.inputs}
        for value in graph.initializers.values():
            if not value.is_graph_input():
                here[value] = self._weight(value)
        names = {value.name or "": found.name or "" for value, found in here.items()}
        outputs = [(value.name or "", value) for value in graph.outputs]
        graph.outputs.clear()
        for node in list(graph):
            before = [(value.name or "", value) for value in node.outputs]
            found = self._node(node, here)
            for (name, value), now in zip(before, found.outputs, strict=True):
                here[value] = now
                names[name] = now.name or ""
        names.update((name, here[value].name or "") for name, value in outputs)
        return names

    def _weight(self, value: ir.Value) -> ir.Value:
        key = _tensor(value)
        if key not in self._weights:
            assert value.const_value is not None
            made = edit.constant(self._graph, value.const_value, value.name or "w", self._taken)
            self._weights[key] = made
        return self._weights[key]

    def _node(self, node: ir.Node, here: dict[ir.Value, ir.Value]) -> ir.Node:
        """The node that does the same, or ``node`` itself, moved."""
        for reader in (node, *_inner(node)):
            for index, value in enumerate(reader.inputs):
                if value is not None and value in here:
                    reader.replace_input_with(index, here[value])
        key = _key(node)
        if key is not None and key in self._known:
            return self._known[key]
        home = node.graph
        assert isinstance(home, ir.Graph)
        home.remove(node)
        node.name = None
        for value in node.outputs:
            if value.name:
                value.name = edit.unique_name(self._graph, value.name, self._taken)
        self._graph.append(node)
        if key is not None:
            self._known[key] = node
        return node


def _key(node: ir.Node) -> tuple[Any, ...] | None:
    """What decides about the outputs; None of nodes with bodies, which are never shared."""
    attributes = node.attributes.values()
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in attributes):
        return None
    if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
        return None
    shown = sorted((a.name, repr(a.value)) for a in attributes)
    return node.domain, node.op_type, tuple(map(id, node.inputs)), len(node.outputs), str(shown)


def _tensor(value: ir.Value) -> tuple[Any, ...]:
    return (id(value.const_value),)


def _inner(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of a node's bodies, however deep."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
