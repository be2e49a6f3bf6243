"""What weights are multiplied with, as values whose second moment can be summed up.

A weight's matrix [rows, columns] (see `layout`) has one second moment [columns, columns] for all rows, or is
made of equal parts, each with its own:

    x W, W x             x itself
    convolution          patches: a convolution of x with ones and zeros lays them out [b, i k, ...], in the
                         order of the weight's columns; each of its groups is a part
    stacked W [e, k, n]  x of each of the e; where W is looked up by an index, the rows that go to each

Where the value is not in the graph it is put into a copy, as an output: nothing runs until it is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from netlathe.analysis.products import Use
from netlathe.ir import edit
from netlathe.passes.quantize.candidates import Candidate
from netlathe.passes.quantize.layout import Layout
from netlathe.passes.quantize.scheme import Scheme

if TYPE_CHECKING:  # an extra
    from netlathe.execute.statistics import Statistic


@dataclass(frozen=True)
class Fed:
    """A statistic whose result is [columns, columns], or [parts, columns, columns]."""

    statistic: Statistic
    parts: int = 1


def is_for(candidate: Candidate, own: Layout, scheme: Scheme) -> bool:
    """Whether data can say how to round: a weight of codes that one kind of product reads."""
    return (
        scheme.format.kind != "cast"
        and own.groups * own.size == math.prod(candidate.dims)
        and (candidate.input is not None or _product(candidate) is not None)
    )


def is_by_row(use: Use, own: Layout) -> bool:
    """Whether scales belong to outputs, or to groups of what one output sums over."""
    if own.axis is None:
        return False
    return (own.axis in use.sums) if own.block else (own.axis not in use.sums)


def fed(model: ir.Model, candidate: Candidate) -> Fed:
    """What :func:`is_for` has found; values that are not there are added to ``model``, a copy."""
    from netlathe.execute.statistics import BlockCovariance, Covariance, LabelledCovariance

    if (value := candidate.input) is not None:
        return Fed(Covariance(value.value.name or "", value.axis))
    product = _product(candidate)
    assert product is not None
    nodes = {node.outputs[0].name: node for node in model.graph}
    graph, taken = model.graph, edit.names_in(model.graph)
    node = nodes[product.node.outputs[0].name]
    add = _Adder(graph, node, taken)
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1) or 1
        patches = add.patches(candidate.dims, groups)
        return Fed(BlockCovariance(patches, 1, groups), groups)
    x = node.inputs[1 - product.position]
    assert x is not None and x.shape is not None
    count, width = candidate.dims[0], candidate.dims[product.summed]
    if product.index is not None:
        index = nodes[product.index.outputs[0].name].inputs[1]
        assert index is not None
        rows = add("Reshape", x, np.array([-1, width]))
        labels = add("Reshape", add.cast(index), np.array([-1, 1]))
        both = add("Concat", rows, labels, axis=-1)
        add.output(both)
        return Fed(LabelledCovariance(both.name or "", -1, count), count)
    if len(x.shape) < 3 or x.shape[0] == 1:  # all of them read the same
        return Fed(Covariance(x.name or "", -1 if product.position == 1 else -2))
    last = x if product.position == 1 else add("Transpose", x, perm=[0, 2, 1])
    inner = add("Transpose", last, perm=[1, 0, 2])
    made = add("Reshape", inner, np.array([-1, count * width]))
    add.output(made)
    return Fed(BlockCovariance(made.name or "", -1, count), count)


@dataclass(frozen=True)
class _Product:
    """A convolution, or a product with stacked matrices, perhaps looked up by the node ``index``."""

    node: ir.Node
    position: int = 1  # of the weight among its operands
    summed: int = -1  # the axis of the weight that is summed over
    index: ir.Node | None = None


def _product(candidate: Candidate) -> _Product | None:
    if len(candidate.uses) != 1 or len(candidate.value.uses()) != 1:
        return None
    ((user, position),), (use,) = candidate.value.uses(), candidate.uses
    if user.domain or user.graph is not candidate.value.graph:
        return None
    if user.op_type == "Conv" and position == 1:
        return _Product(user)
    if len(candidate.dims) != 3:
        return None
    index = None
    if use.is_lookup:
        index, readers = user, list(user.outputs[0].uses())
        shape = user.outputs[0].shape
        if len(readers) != 1 or shape is None or len(shape) != 3:
            return None
        user, position = readers[0]
    if user.op_type != "MatMul" or user.domain or user.graph is not candidate.value.graph:
        return None
    x, axis = user.inputs[1 - position], -2 if position == 1 else -1
    if x is None or x.shape is None or (index is not None and not _is_a_row(x, position)):
        return None
    return _Product(user, position, axis, index)


def _is_a_row(x: ir.Value, position: int) -> bool:
    """Whether there is one row for each matrix that was looked up."""
    assert x.shape is not None
    return len(x.shape) == 3 and x.shape[-2 if position == 1 else -1] == 1


class _Adder:
    """Adds nodes behind those that a product reads."""

    def __init__(self, graph: ir.Graph, before: ir.Node, taken: set[str]) -> None:
        self._graph, self._before, self._taken = graph, before, taken

    def __call__(
        self, op_type: str, *inputs: ir.Value | np.ndarray, **attributes: object
    ) -> ir.Value:
        values = [
            x if isinstance(x, ir.Value) else edit.constant(self._graph, x, "shape", self._taken)
            for x in inputs
        ]
        if op_type == "Reshape":
            attributes["allowzero"] = 0
        name = edit.unique_name(self._graph, f"{values[0].name}_fed", self._taken)
        node = edit.node(op_type, values, attributes, name=name)
        self._graph.insert_before(self._before, [node])
        return node.outputs[0]

    def cast(self, value: ir.Value) -> ir.Value:
        """Labels as numbers that float32 holds."""
        return self("Cast", value, to=ir.DataType.FLOAT.value, saturate=1, round_mode="up")

    def output(self, value: ir.Value) -> None:
        """Let a value be reachable."""
        self._graph.outputs.append(value)

    def patches(self, dims: tuple[int, ...], groups: int) -> str:
        """The value that has the patches of a convolution with a weight of ``dims``."""
        x = self._before.inputs[0]
        assert x is not None and x.dtype is not None
        channels, kernel = dims[1] * groups, dims[2:]
        size = math.prod(kernel)
        each = np.eye(size, dtype=x.dtype.numpy()).reshape(size, 1, *kernel)
        ones = edit.constant(
            self._graph, np.tile(each, (channels, *[1] * (len(dims) - 1))), "ones", self._taken
        )
        attributes = {a.name: a.value for a in self._before.attributes.values()}
        made = self("Conv", x, ones, **{**attributes, "group": channels})
        self.output(made)
        return made.name or ""
