"""Building a replacement beside the graph, and putting it in place of what was matched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit
from netlathe.passes.normalize.match import NoMatch, attribute, node_of, operands

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
        tensor = ir.tensor(np.asarray(array, order="C"))
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self.constants.append(value)
        return value

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """``value`` with its axes in the order ``perm``; itself where that changes nothing.

        Transposing what a Transpose makes starts from what that reads.
        """
        before = node_of(value, "Transpose")
        if before is not None:
            first = [int(axis) for axis in attribute(before, "perm", ())]
            value, perm = operands(before)[0], [first[axis] for axis in perm]
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

    def expand(
        self, value: ir.Value, axis: int, dim: Dim, like: ir.Value, like_axis: int
    ) -> ir.Value:
        """``value`` with its dim of one at ``axis`` written out as ``dim``.

        A dynamic ``dim`` is read from a graph input where one has it, else from ``like_axis`` of ``like``.
        """
        dims = dims_of(value)
        ones = [1] * len(dims)
        if isinstance(dim, int):
            target = self.constant(
                np.array([*ones[:axis], dim, *ones[axis + 1 :]], np.int64), "shape"
            )
        else:
            source, at = _where_is(dim, like, like_axis)
            size = self.op(
                "Shape", source, shape=(1,), dtype=ir.DataType.INT64, start=at, end=at + 1
            )
            around = [np.array(part, np.int64) for part in (ones[:axis], ones[axis + 1 :])]
            parts = [self.constant(part, "ones") if part.size else None for part in around]
            held = [v for v in (parts[0], size, parts[1]) if v is not None]
            target = self.op("Concat", *held, shape=(len(dims),), axis=0)
        return self.op("Expand", value, target, shape=[*dims[:axis], dim, *dims[axis + 1 :]])

    def needed_by(self, values: Iterable[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """The new nodes and constants behind ``values``; others were tried and not used."""
        needed = set(values)
        nodes = []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                needed.update(value for value in node.inputs if value is not None)
                nodes.append(node)
        return nodes[::-1], [value for value in self.constants if value in needed]


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


def put_in_place(graph: ir.Graph, proposal: Proposal, taken: set[str]) -> None:
    """Replace the matched values, whose names the new ones take over; drop what nothing reads then.

    Every new node reads values that come before the matched ones, so the graph stays sorted. ``taken``
    holds the names in use, to which the new constants' names are added.
    """
    (matched,) = {old.producer() for old in proposal.outputs}
    assert matched is not None
    nodes, constants = proposal.build.needed_by(proposal.outputs.values())
    for value in constants:
        value.name = edit.unique_name(graph, value.name or "constant", taken)
        graph.register_initializer(value)
    edit.replace(matched, nodes, proposal.outputs, created_by="raise_operators")


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


def _where_is(dim: ir.SymbolicDim, like: ir.Value, like_axis: int) -> tuple[ir.Value, int]:
    """A value and axis to read ``dim`` from: a graph input where one has it."""
    graph = like.graph
    for value in () if graph is None else graph.inputs:
        for axis, held in enumerate(value.shape or ()):
            if held == dim:
                return value, axis
    return like, like_axis


def text_of(dims: Sequence[Dim]) -> str:
    """Dims as reasons show them: ``[b,4,s,16]``."""
    return "[" + ",".join(str(dim) for dim in dims) + "]"


def broadcasts_to(dims: Sequence[Dim], target: Sequence[Dim]) -> bool:
    """Whether ``dims`` broadcasts to exactly ``target``."""
    if len(dims) > len(target):
        return False
    aligned = target[len(target) - len(dims) :]
    return all(dim == 1 or dim == wanted for dim, wanted in zip(dims, aligned, strict=True))
