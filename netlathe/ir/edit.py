"""The few edits from which rewrites are made.

They keep names unique, keep the names of graph inputs and outputs, carry provenance over, and leave
nothing dead behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import provenance


def names_in(graph: ir.Graph) -> set[str]:
    """The names of all values of ``graph`` and its subgraphs."""
    names = {value.name for value in graph.inputs if value.name}
    names.update(graph.initializers)
    for node in graph.all_nodes():
        names.update(value.name for value in node.outputs if value.name)
    for inner in graph.subgraphs():
        names.update(value.name for value in inner.inputs if value.name)
        names.update(inner.initializers)
    return names


def unique_name(graph: ir.Graph, stem: str, taken: set[str] | None = None) -> str:
    """``stem``, ``stem_1``, ``stem_2``, ...: the first that is free.

    Many edits in a row share one ``taken`` (from :func:`names_in`), to which the name is added.
    """
    taken = names_in(graph) if taken is None else taken
    name, number = stem, 0
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name


def constant(
    graph: ir.Graph,
    array: npt.NDArray[Any] | ir.TensorProtocol,
    name: str,
    taken: set[str] | None = None,
) -> ir.Value:
    """A new initializer with a unique name; ``array`` may be a numpy array or any tensor."""
    name = unique_name(graph, name, taken)
    if isinstance(array, np.ndarray):
        tensor: ir.TensorProtocol = ir.tensor(np.ascontiguousarray(array).reshape(array.shape))
    else:
        tensor = array
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def const_array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The contents of an initializer that no caller can override; None for anything else."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
    like: ir.Node | None = None,
    created_by: str = "",
    domain: str = "",
) -> ir.Node:
    """A new node with one output called ``name``, typed if ``dtype`` and ``shape`` are given."""
    made = ir.node(op_type, inputs, attributes or {}, domain=domain)
    output = made.outputs[0]
    output.name = name
    if dtype is not None:
        output.type = ir.TensorType(dtype)
    output.shape = shape
    return provenance.mark(made, created_by=created_by, like=like)


def redirect(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads ``old`` read ``new``, graph outputs included.

    A graph output keeps its name: ``new`` takes it over, and a type or shape that it lacks. Where ``new``
    cannot (it is a graph input, an initializer, itself a graph output, or made outside this subgraph),
    an Identity stands between.
    """
    if old is new:
        return
    graph = old.graph
    if not old.is_graph_output() or graph is None:
        old.replace_all_uses_with(new)
        return
    maker = old.producer()
    if new.producer() is None or new.graph is not graph or new.is_graph_output():
        between = ir.node("Identity", [new])
        between.outputs[0].type, between.outputs[0].shape = new.type, new.shape
        if maker is not None:
            provenance.mark(between, like=maker)
        graph.append(between)
        new = between.outputs[0]
    name = old.name
    if new.type is None:
        new.type = old.type
    if new.shape is None:
        new.shape = old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = None
    new.name = name


def replace(
    old: ir.Node,
    new_nodes: Sequence[ir.Node],
    outputs: Mapping[ir.Value, ir.Value],
    created_by: str,
) -> None:
    """Put ``new_nodes`` where ``old`` stands and let each of ``old``'s used outputs be the mapped one.

    A new value takes over the name of the old one it stands for. Provenance is copied from ``old``.
    """
    graph = old.graph
    if not isinstance(graph, ir.Graph):
        raise ValueError(f"{old.name} is not in a graph")
    made = {value for made_node in new_nodes for value in made_node.outputs}
    for new in new_nodes:
        provenance.mark(new, created_by=created_by, like=old)
    graph.insert_before(old, list(new_nodes))
    for before, after in outputs.items():
        if after in made and not before.is_graph_output():
            name, before.name = before.name, None
            after.name = name
        redirect(before, after)
    remove_dead(graph, [old])


def remove_dead(graph: ir.Graph, roots: Iterable[ir.Node] | None = None) -> int:
    """Remove nodes whose outputs nobody reads, and initializers left without a reader.

    With ``roots`` only those nodes and what they alone kept alive; otherwise the whole graph,
    subgraphs included. Graph inputs stay. Returns the number of nodes removed.
    """
    whole = roots is None
    stack = list(reversed(list(graph.all_nodes()))) if roots is None else list(roots)
    removed = 0
    while stack:
        candidate = stack.pop()
        home = candidate.graph
        if not isinstance(home, ir.Graph) or _is_read(candidate):
            continue
        read = [value for value in candidate.inputs if value is not None]
        read += _captured(candidate)
        _empty_subgraphs(candidate)
        stack += [maker for value in read if (maker := value.producer()) is not None]
        home.remove(candidate, safe=True)
        removed += 1
        for value in read:
            drop_if_unread(value)
    if whole:
        for home in (graph, *graph.subgraphs()):
            for value in list(home.initializers.values()):
                drop_if_unread(value)
    return removed


def _is_read(candidate: ir.Node) -> bool:
    return any(value.uses() or value.is_graph_output() for value in candidate.outputs)


def _subgraphs(candidate: ir.Node) -> list[ir.Graph]:
    return [
        attribute.as_graph()
        for attribute in candidate.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
    ]


def _captured(candidate: ir.Node) -> list[ir.Value]:
    """Values that the subgraphs of a node read, outer ones among them."""
    return [
        value
        for graph in _subgraphs(candidate)
        for node_ in graph.all_nodes()
        for value in node_.inputs
        if value is not None
    ]


def _empty_subgraphs(candidate: ir.Node) -> None:
    """Take the nodes out of a dead node's subgraphs, so that they no longer read outer values."""
    for graph in _subgraphs(candidate):
        graph.outputs.clear()
        for inner in reversed(list(graph)):
            _empty_subgraphs(inner)
            graph.remove(inner, safe=True)


def drop_if_unread(value: ir.Value) -> None:
    """Remove an initializer that nobody reads; anything else stays."""
    home = value.graph
    if (
        isinstance(home, ir.Graph)
        and value.is_initializer()
        and not value.uses()
        and not value.is_graph_output()
        and not value.is_graph_input()
    ):
        home.initializers.pop(value.name or "", None)
