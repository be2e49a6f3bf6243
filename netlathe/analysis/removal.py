"""What a graph no longer needs once operands of its sums are taken away."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from netlathe.analysis.cores import Caches
from netlathe.analysis.flow import Flow
from netlathe.analysis.operators import TELL_SIZES
from netlathe.ir import dims, weights


class Operand(NamedTuple):
    """One of the two operands of an Add. Without it the sum is the other one."""

    node: ir.Node
    position: int

    @property
    def value(self) -> ir.Value:
        """The operand's value."""
        value = self.node.inputs[self.position]
        assert value is not None  # an Add has both
        return value

    @property
    def other(self) -> Operand:
        """The other operand."""
        return Operand(self.node, 1 - self.position)


@dataclass(frozen=True)
class Removal:
    """What goes. With a ``reason`` the operands cannot be taken away together.

    A cache goes with the last attention that reads it. Where only its size is still read, another
    input of that size stands in: ``stand_ins`` has the Shape nodes and what they read instead.
    """

    nodes: tuple[ir.Node, ...]  # in order; the Adds themselves are not among them
    weights: tuple[ir.Value, ...]  # initializers, shapes and other constants among them
    cache_inputs: tuple[ir.Value, ...]
    cache_outputs: tuple[ir.Value, ...]
    stand_ins: tuple[tuple[ir.Node, ir.Value], ...]
    reason: str = ""


def remove(flow: Flow, cuts: Iterable[Operand], caches: Caches) -> Removal:
    """What goes if ``cuts`` are made; ``caches`` may go, every other input and output stays."""
    closure = _Closure(flow, cuts)
    closure.settle(caches.outputs)
    gone = closure.dead
    leaving = [v for v in caches.inputs if all(n.op_type in TELL_SIZES for n in closure.readers(v))]
    staying = [v for v in flow.graph.inputs if v not in leaving]
    stand_ins, reason = [], ""
    for value in leaving:
        for node in closure.readers(value):
            other = same_size(node, staying)
            if other is None:
                reason = f"the model reads a size from {value.name} that no other input has"
            else:
                stand_ins.append((node, other))
    read = {value: None for node in flow.sort(gone) for value in flow.reads[node]}
    unread = [v for v in read if weights.is_weight(v) and not closure.is_needed(v)]
    return Removal(
        nodes=flow.sort(gone),
        weights=tuple(unread),
        cache_inputs=tuple(leaving),
        cache_outputs=tuple(v for v in caches.outputs if v in closure.cut_outputs),
        stand_ins=tuple(stand_ins),
        reason=reason,
    )


def same_size(node: ir.Node, values: Iterable[ir.Value]) -> ir.Value | None:
    """The first of ``values`` that a Shape node would read the same sizes from."""
    source = node.inputs[0]
    wanted = _dims_read(node, source) if source is not None else None
    if wanted is None:
        return None
    for value in values:
        sizes = _dims_read(node, value)
        if sizes is not None and len(sizes) == len(wanted):
            if all(dims.same(a, b) for a, b in zip(sizes, wanted, strict=True)):
                return value
    return None


def _dims_read(node: ir.Node, value: ir.Value) -> list[dims.Dim] | None:
    if node.op_type != "Shape" or value.shape is None:
        return None
    start, end = node.attributes.get("start"), node.attributes.get("end")
    part = slice(None if start is None else start.as_int(), None if end is None else end.as_int())
    return [dims.from_ir(dim) for dim in list(value.shape)[part]]


class _Closure:
    """The nodes that nothing needs, given operands and outputs that are not read any more."""

    def __init__(self, flow: Flow, cuts: Iterable[Operand]) -> None:
        self._flow = flow
        self._cuts = _with_empty_sums(set(cuts))
        self.dead: set[ir.Node] = set()
        self.cut_outputs: set[ir.Value] = set()
        self._kill([operand.value for operand in self._cuts])

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """Who still reads ``value``."""
        return [
            node
            for node in self._flow.readers.get(value, ())
            if node not in self.dead and not self._is_cut(node, value)
        ]

    def is_needed(self, value: ir.Value) -> bool:
        """Whether anybody does, the model's caller included."""
        return bool(self.readers(value)) or (
            value.is_graph_output() and value not in self.cut_outputs
        )

    def settle(self, outputs: Collection[ir.Value]) -> None:
        """Take away those of ``outputs`` that no node needs, as long as one is found."""
        while unread := [v for v in outputs if v not in self.cut_outputs and not self.readers(v)]:
            self.cut_outputs.update(unread)
            self._kill(unread)

    def _is_cut(self, node: ir.Node, value: ir.Value) -> bool:
        at = [position for position, read in enumerate(node.inputs) if read is value]
        return bool(at) and all(Operand(node, position) in self._cuts for position in at)

    def _kill(self, values: Sequence[ir.Value | None]) -> None:
        stack = [v.producer() for v in values if v is not None]
        while stack:
            node = stack.pop()
            if node is None or node in self.dead or any(map(self.is_needed, node.outputs)):
                continue
            self.dead.add(node)
            stack += [value.producer() for value in self._flow.reads[node]]


def _with_empty_sums(cuts: set[Operand]) -> set[Operand]:
    """``cuts`` and, where both operands of an Add are cut, what reads the Add."""
    stack = list(cuts)
    while stack:
        operand = stack.pop()
        if operand.other in cuts:
            new = {Operand(use.node, use.idx) for use in operand.node.outputs[0].uses()} - cuts
            cuts |= new
            stack += new
    return cuts
