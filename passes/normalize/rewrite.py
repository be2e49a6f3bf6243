"""Building a replacement beside the graph, and putting it in place of what was matched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.passes.normalize.match import NoMatch

CREATED_BY = "netlathe.created_by"
Dim = int | ir.SymbolicDim
Dims = tuple[Dim, ...]
Trial = Literal["normal", "wide", "small_rows"]


@dataclass
class Builder:
    """Collects new nodes and constants; the graph does not change until :func:`put_in_place`."""

    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        shape: Sequence[Dim],
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node; its dtype is the first input's unless given."""
        if dtype is None:
            first = inputs[0]
            assert first is not None and first.dtype is not None
            dtype = first.dtype
        output = ir.Value(type=ir.TensorType(dtype), shape=ir.Shape(shape))
        attrs = ir.convenience.convert_attributes(attributes)
        self.nodes.append(ir.Node("", op_type, inputs, attrs, outputs=[output]))
        return output

    def constant(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        """A new initializer; ``name`` is made unique when it enters the graph."""
        tensor = ir.tensor(np.ascontiguousarray(array))
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self.constants.append(value)
        return value

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """``value`` with its axes in the order ``perm``; itself where that changes nothing."""
        if list(perm) == list(range(len(perm))):
            return value
        dims = dims_of(value)
        return self.op("Transpose", value, perm=list(perm), shape=[dims[p] for p in perm])

    def reshape(self, value: ir.Value, target: Sequence[int], shape: Sequence[Dim]) -> ir.Value:
        """``value`` in the shape ``target``, a Reshape literal (0 copies, one -1 is inferred)."""
        literal = self.constant(np.array(target, np.int64), "shape")
        return self.op("Reshape", value, literal, allowzero=0, shape=shape)

    def unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        """``value`` with a dim of one inserted at ``axis``."""
        dims = dims_of(value)
        axes = self.constant(np.array([axis], np.int64), "axes")
        return self.op("Unsqueeze", value, axes, shape=[*dims[:axis], 1, *dims[axis:]])


@dataclass(frozen=True)
class Proposal:
    """What a family would put in place of what it matched.

    ``outputs`` maps matched values to new ones; ``trial`` is the data that the judge tries it on.
    """

    op_type: str
    outputs: Mapping[ir.Value, ir.Value]
    build: Builder
    says: str  # what was done, for the ledger
    trial: Trial = "normal"
    detail: Mapping[str, Any] = field(default_factory=dict)


def put_in_place(graph: ir.Graph, proposal: Proposal) -> None:
    """Replace the matched values, whose names the new ones take over; drop what nothing reads then.

    New nodes carry the module path and source line of the node whose output they replace.
    """
    build = proposal.build
    for value in build.constants:
        value.name = _unique(graph, value.name or "constant")
        graph.register_initializer(value)
    matched = [node for old in proposal.outputs if (node := old.producer()) is not None]
    made = {value for node in build.nodes for value in node.outputs}
    for node in build.nodes:
        node.metadata_props.update(matched[0].metadata_props)
        node.metadata_props[CREATED_BY] = "raise_operators"
    for old, new in proposal.outputs.items():
        if new in made:
            old.name, new.name = None, old.name
    # The other operands may come later than the first matched node: the caller sorts at the end.
    graph.insert_before(matched[0], build.nodes)
    for old, new in proposal.outputs.items():
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    remove_dead(graph, matched)


def remove_dead(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Remove those of ``nodes`` that nothing reads, and what then becomes dead before them."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.graph is not graph:
            continue
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        stack += [p for value in node.inputs if value is not None and (p := value.producer())]
        read = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        for value in read:
            unread = not value.uses() and not value.is_graph_output()
            if unread and value.is_initializer() and not value.is_graph_input():
                graph.initializers.pop(value.name or "", None)


# -- shapes ---------------------------------------------------------------------------------------


def dims_of(value: ir.Value, rank: int | None = None) -> Dims:
    """The dims of a typed value.

    Raises:
        NoMatch: the value has no type, an unknown dim or another rank.
    """
    if value.shape is None or value.dtype is None:
        raise NoMatch(f"{value.name} is not typed", value.producer())
    dims = tuple(value.shape)
    if any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in dims):
        raise NoMatch(f"{value.name} has an unknown dimension", value.producer())
    if rank is not None and len(dims) != rank:
        raise NoMatch(f"{value.name} has {len(dims)} dims, not {rank}", value.producer())
    return dims


def text_of(dims: Sequence[Dim]) -> str:
    """Dims as reasons show them: ``[b,4,s,16]``."""
    return "[" + ",".join(str(dim) for dim in dims) + "]"


def broadcasts_to(dims: Sequence[Dim], target: Sequence[Dim]) -> bool:
    """Whether ``dims`` broadcasts to exactly ``target``."""
    if len(dims) > len(target):
        return False
    aligned = target[len(target) - len(dims) :]
    return all(dim == 1 or dim == wanted for dim, wanted in zip(dims, aligned, strict=True))


def _unique(graph: ir.Graph, name: str) -> str:
    taken = {value.name for value in graph.inputs} | graph.initializers.keys()
    taken |= {value.name for node in graph for value in node.outputs}
    candidate, n = name, 0
    while candidate in taken:
        n += 1
        candidate = f"{name}_{n}"
    return candidate
