"""Who does what: the graph in parts that run one after the other, on the core or on the host."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import sympy

from netlathe.backends.fpga.recognise import Operation
from netlathe.ir import dims, types


@dataclass(frozen=True)
class OnCore:
    """Operations in the order in which they are built; ``inputs`` come from elsewhere."""

    operations: tuple[Operation, ...]

    @property
    def inputs(self) -> list[ir.Value]:
        """What the operations read and none of them makes."""
        made = {item.output for item in self.operations}
        needed = (value for item in self.operations for value in item.inputs if value not in made)
        return list(dict.fromkeys(needed))

    @property
    def outputs(self) -> list[ir.Value]:
        """What anyone else reads."""
        inside = {node for item in self.operations for node in item.nodes}
        return [item.output for item in self.operations if _leaves(item.output, inside)]


@dataclass(frozen=True)
class OnHost:
    """A part of the graph as a model of its own, with the names that its values have in the graph."""

    model: ir.Model

    @property
    def inputs(self) -> list[str]:
        """Names of what it reads."""
        return [value.name or "" for value in self.model.graph.inputs]


Part = OnCore | OnHost


def parts(model: ir.Model, found: Sequence[Operation]) -> list[Part]:
    """The whole graph in an order in which it can run, ``found`` on the core and the rest on the host.

    As much as possible stands together: each time all that can run on one side is taken.
    """
    made: list[Part] = []
    for core, items in _groups(model, found):
        if core:
            made.append(OnCore(tuple(i for i in items if isinstance(i, Operation))))
        else:
            made.append(_on_host(model, [item for item in items if isinstance(item, ir.Node)]))
    return made


def _groups(
    model: ir.Model, found: Sequence[Operation]
) -> Iterator[tuple[bool, list[Operation | ir.Node]]]:
    by_node = {node: operation for operation in found for node in operation.nodes}
    ready = {*model.graph.inputs, *model.graph.initializers.values()}
    todo = list(dict.fromkeys(by_node.get(node, node) for node in model.graph))
    core = False
    while todo:
        taken: list[Operation | ir.Node] = []
        left = todo
        progress = True
        while progress:
            todo, left, progress = left, [], False
            for item in todo:
                if isinstance(item, Operation) == core and all(v in ready for v in _needs(item)):
                    taken.append(item)
                    ready.update([item.output] if isinstance(item, Operation) else item.outputs)
                    progress = True
                else:
                    left.append(item)
        todo = left
        if taken:
            yield core, taken
        core = not core


def _on_host(model: ir.Model, nodes: Sequence[ir.Node]) -> OnHost:
    inside = set(_nested(nodes))
    made = [value for node in nodes for value in node.outputs]
    known = {*made, *model.graph.initializers.values()}
    needed = dict.fromkeys(value for node in nodes for value in _reads(node) if value not in known)
    results = [value for value in made if _leaves(value, inside)]
    graph = ir.convenience.extract(model.graph, inputs=list(needed), outputs=results)
    part = ir.Model(graph, ir_version=model.ir_version)
    if _name_sizes(part):
        types.annotate(part)
    return OnHost(part)


def _name_sizes(part: ir.Model) -> bool:
    """Give a name to every size of an input that is an expression of names no input has as a size.

    So ``(n + 1) // 2`` becomes a name of its own where ``n`` itself stays on the core's side.
    """
    shapes = [[dims.from_ir(d) for d in value.shape or ()] for value in part.graph.inputs]
    known = {dim for shape in shapes for dim in shape if isinstance(dim, sympy.Symbol)}
    names: dict[dims.Dim, sympy.Symbol] = {}
    for shape in shapes:
        for dim in shape:
            if isinstance(dim, sympy.Expr) and not dim.free_symbols <= known:
                names.setdefault(dim, dims.symbol(f"size{len(names)}"))
    for value, shape in zip(part.graph.inputs, shapes, strict=True):
        if value.shape is not None:
            value.shape = ir.Shape([dims.to_ir(names.get(dim, dim)) for dim in shape])
    return bool(names)


def _leaves(value: ir.Value, inside: Container[ir.Node]) -> bool:
    """Whether anyone but the nodes ``inside`` reads it."""
    return value.is_graph_output() or any(reader not in inside for reader in value.consumers())


def _nested(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            for graph in _graphs(attribute):
                yield from _nested(graph)


def _needs(item: Operation | ir.Node) -> Sequence[ir.Value]:
    return item.inputs if isinstance(item, Operation) else list(_reads(item))


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads of the main graph, for its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        for graph in _graphs(attribute):
            own = {*graph.inputs, *graph.initializers.values()}
            own.update(value for inner in graph for value in inner.outputs)
            found = (value for inner in graph for value in _reads(inner))
            yield from (value for value in (*found, *graph.outputs) if value not in own)


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == ir.AttributeType.GRAPHS:
        return list(attribute.as_graphs())
    return []
