"""How values flow through the main graph: what lies between two of them, and what dominates a node.

What a node's subgraphs read counts as read by the node. The graph is in order, as normal form has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import networkx as nx
import onnx_ir as ir


class Flow:
    """The main graph of a model; it must not change while this is used."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes = tuple(graph)
        self.reads = {node: tuple(dict.fromkeys(_reads(node))) for node in self.nodes}
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node, values in self.reads.items():
            for value in values:
                self.readers.setdefault(value, []).append(node)
        self._at = {node: index for index, node in enumerate(self.nodes)}

    def position(self, value: ir.Value) -> int:
        """Where in the order the maker of ``value`` stands; -1 for an input or initializer."""
        maker = value.producer()
        return -1 if maker is None else self._at.get(maker, -1)

    def sort(self, nodes: set[ir.Node]) -> tuple[ir.Node, ...]:
        """``nodes`` in the order of the graph."""
        return tuple(sorted(nodes, key=self._at.__getitem__))

    def between(self, start: ir.Value, end: ir.Value) -> tuple[ir.Node, ...]:
        """The nodes on all paths from ``start`` to ``end``, in order; none where there is no path.

        Together they have a single entry: whatever else they read does not depend on ``start``, for a
        node that does and leads to ``end`` is one of them.
        """
        first = self.position(start)
        maker = end.producer()
        if end is start or maker is None or self._at[maker] <= first:
            return ()
        before_end, stack = {maker}, [maker]
        while stack:
            for value in self.reads[stack.pop()]:
                made_by = value.producer()
                if made_by in before_end or made_by is None or self._at[made_by] <= first:
                    continue
                before_end.add(made_by)
                stack.append(made_by)
        depends: set[ir.Value] = {start}
        region = []
        for node in self.sort(before_end):
            if not depends.isdisjoint(self.reads[node]):
                depends.update(node.outputs)
                region.append(node)
        return tuple(region) if end in depends else ()

    def dominator(self, node: ir.Node) -> ir.Value | None:
        """The last activation through which all that reaches ``node`` has passed, if there is one.

        Only floating-point values count: a mask or a shape that also reaches the node is no second
        entry.
        """
        found = self._dominators.get(node)
        if isinstance(found, ir.Value):
            return found
        if found is None:
            return None
        read = [value for value in found.outputs if value in self.readers]
        return read[0] if len(read) == 1 else None

    @cached_property
    def _dominators(self) -> dict[ir.Node | ir.Value, ir.Node | ir.Value | None]:
        # By number: values that PyTorch's exporter has made do not compare as others do.
        root, numbers = 0, dict[int, int]()
        vertices: list[ir.Node | ir.Value | None] = [None]

        def number(vertex: ir.Node | ir.Value) -> int:
            if id(vertex) not in numbers:
                numbers[id(vertex)] = len(vertices)
                vertices.append(vertex)
            return numbers[id(vertex)]

        graph: nx.DiGraph[int] = nx.DiGraph()
        for node in self.nodes:
            sources = list(_activations(self.reads[node]))
            made_by = [number(value.producer() or value) for value in sources]
            graph.add_edges_from((source, number(node)) for source in made_by)
            outside = [value for value in sources if value.producer() is None]
            graph.add_edges_from((root, number(value)) for value in outside)
            if not sources:
                graph.add_edge(root, number(node))
        graph.add_node(root)
        found = nx.immediate_dominators(graph, root)
        return {
            vertex: None if by is None else vertices[by]
            for at, by in found.items()
            if (vertex := vertices[at]) is not None
        }


def _activations(values: tuple[ir.Value, ...]) -> Iterator[ir.Value]:
    for value in values:
        floating = value.dtype is None or value.dtype.is_floating_point()
        if floating and not (value.is_initializer() and not value.is_graph_input()):
            yield value


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                for value in inner.inputs:
                    if value is not None and value.graph is node.graph:
                        yield value
