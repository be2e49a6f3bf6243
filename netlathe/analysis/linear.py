"""Linear layers as they stand in a graph, and the exact changes that a neighbour may ask of their weights.

A layer contracts an axis of what it reads and makes an axis of its output; a weight runs along both.
Scaling an axis of the input or the output scales the weight along it, a constant added to the input
becomes one added to the output. New weights are recipes: computed in float64 when they are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import channels
from netlathe.analysis.operators import TELL_SIZES
from netlathe.ir import edit, provenance, weights

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]
Change = Callable[[Array, int], Array]  # (weight in float64, its axis) -> changed weight

_AT_ONCE = 4 << 20  # elements of a weight that are held in float64 at a time


@dataclass(frozen=True)
class Weight:
    """A constant as one node uses it, and the axis of it that is to be changed.

    ``path`` are the nodes that move it between the initializer and the operand, in order. What the layer
    reads is ``gain`` times the value that one asked about.
    """

    node: ir.Node  # Conv, ConvTranspose, MatMul, or whatever reads it
    operand: int
    value: ir.Value  # the initializer
    axis: int
    path: tuple[ir.Node, ...] = ()
    gain: float = 1.0

    @property
    def group(self) -> int:
        """The groups of a convolution; 1 for anything else."""
        return self.node.attributes.get_int("group", 1) or 1

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The contents as they are now."""
        assert self.value.const_value is not None
        return self.value.const_value

    @property
    def is_alone(self) -> bool:
        """Whether nothing else reads the initializer, as it is or moved."""
        read = [self.value, *(node.outputs[0] for node in self.path)]
        return all(len(value.uses()) == 1 and not value.is_graph_output() for value in read)

    @property
    def is_transposed_only(self) -> bool:
        """Whether a copy of the weight may stand in the operand's place."""
        return all(node.op_type == "Transpose" for node in self.path)

    def other_reader(self) -> str:
        """A node that reads the weight as well, for messages."""
        for value, reader in zip(self._read(), (*self.path, self.node), strict=True):
            for node, _ in value.uses():
                if node is not reader:
                    return f"{node.op_type} {node.outputs[0].name}"
        return "the graph's outputs"

    def _read(self) -> list[ir.Value]:
        return [self.value, *(node.outputs[0] for node in self.path)]


# -- finding them -----------------------------------------------------------------------------------


def constant(node: ir.Node, operand: int, axis: int) -> Weight | None:
    """The weight behind an operand, if it is one: moved by nothing but whole-axis moves."""
    value = node.inputs[operand] if operand < len(node.inputs) else None
    path: list[ir.Node] = []
    while value is not None and not weights.is_weight(value):
        maker = value.producer()
        if maker is None:
            return None
        sources = [a for a, b in channels.moved(maker).items() if b == axis]
        if not sources or maker.op_type == "Cast":
            return None
        (axis,) = sources
        path.insert(0, maker)
        value = maker.inputs[0]
    if value is None or channels.width(value, axis) is None:
        return None
    return Weight(node, operand, value, axis, tuple(path))


def contraction(node: ir.Node, index: int, axis: int) -> Weight | None:
    """The weight with which ``node`` contracts ``axis`` of its input ``index``."""
    if node.domain or index > 1:
        return None
    if node.op_type in ("Conv", "ConvTranspose") and index == 0 and axis == 1:
        found = constant(node, 1, 1 if node.op_type == "Conv" else 0)
        return found if found is not None and not found.path else None
    if node.op_type != "MatMul":
        return None
    count, other = channels.rank(node.inputs[index]), channels.rank(node.inputs[1 - index])
    if count is None or not other:
        return None
    if index == 0 and axis == count - 1:
        return constant(node, 1, max(other - 2, 0))
    if index == 1 and axis == max(count - 2, 0):
        return constant(node, 0, other - 1)
    return None


def production(node: ir.Node, axis: int) -> Weight | None:
    """The weight along which ``node`` makes ``axis`` of its output."""
    if node.domain:
        return None
    if node.op_type in ("Conv", "ConvTranspose") and axis == 1:
        found = constant(node, 1, 0 if node.op_type == "Conv" else 1)
        return found if found is not None and not found.path else None
    count = channels.rank(node.outputs[0])
    if node.op_type != "MatMul" or count is None:
        return None
    a, b = channels.rank(node.inputs[0]), channels.rank(node.inputs[1])
    if axis == count - 1 and b is not None and b >= 2:
        return constant(node, 1, b - 1)
    if axis == count - 2 and a is not None and a >= 2 and b is not None and b >= 2:
        return constant(node, 0, a - 2)
    return None


def readers(value: ir.Value, axis: int) -> list[Weight] | str:
    """The layers that contract ``axis`` of ``value``, if nothing else reads it; else what does.

    Between ``value`` and a layer stand only moves, means over other axes, joins of its own parts, and
    products with a constant number.
    """
    found: list[Weight] = []
    joins: list[ir.Node] = []
    reached: dict[ir.Value, tuple[int, float]] = {value: (axis, 1.0)}
    stack = [value]
    while stack:
        current = stack.pop()
        at, gain = reached[current]
        if current.is_graph_output():
            return f"{current.name} is an output of the graph"
        for node, index in current.uses():
            if node.graph is not value.graph:
                return f"{node.op_type} in a subgraph reads it"
            if node.op_type in TELL_SIZES:
                continue
            weight = contraction(node, index, at)
            if weight is not None:
                found.append(dataclasses.replace(weight, gain=gain))
                continue
            after = _carried(node, index, at)
            if after is None:
                return f"{node.op_type} {node.outputs[0].name} reads it, which is not linear in it"
            joins += [node] if node.op_type == "Concat" else []
            factor = _constant_factor(node, index) or 1.0
            for output in node.outputs:
                if output not in reached:
                    reached[output] = (after, gain * factor)
                    stack.append(output)
    for node in joins:
        others = [v for v in node.inputs if v is None or reached.get(v) != reached[node.outputs[0]]]
        if others:
            return f"Concat {node.outputs[0].name} joins it with something else"
    return found


def _carried(node: ir.Node, index: int, axis: int) -> int | None:
    """Where the axis is in what ``node`` makes, if that is linear in every position by itself."""
    if node.domain:
        return None
    if node.op_type == "Concat":
        return axis if node.attributes.get_int("axis", 0) != axis else None
    if index:
        return None
    if _constant_factor(node, index) is not None:
        return axis
    return None if node.op_type == "ReduceSum" else channels.mixed(node).get(axis)


def _constant_factor(node: ir.Node, index: int) -> float | None:
    """The number that a Mul or Div multiplies its first operand by, if it is a scalar constant."""
    if node.domain or node.op_type not in ("Mul", "Div") or index:
        return None
    array = edit.const_array(node.inputs[1])
    if array is None or array.ndim:
        return None
    return 1.0 / float(array) if node.op_type == "Div" else float(array)


# -- changing them ------------------------------------------------------------------------------------


def change(
    graph: ir.Graph,
    weight: Weight,
    function: Change,
    name: str,
    taken: set[str],
    *,
    for_all: bool = False,
) -> ir.Value:
    """Let the operand be ``function(array, axis)``, computed in float64 and rounded back, lazily.

    The initializer keeps its name where nothing else reads it, or where it changes ``for_all`` that do;
    else the operand gets a copy called ``name``, which unties it (``weight.is_transposed_only`` must
    hold).
    """
    if for_all or (weight.is_alone and not (weight.path and weight.is_transposed_only)):
        value = weight.value
        tensor = _recipe(weight.tensor, weight, function, weight.axis, value.name or name)
        value.const_value = tensor
        return value
    tensor, axis = weight.tensor, weight.axis
    for node in weight.path:
        perm = node.attributes.get_ints("perm")
        assert node.op_type == "Transpose" and perm is not None
        tensor, axis = weights.transposed(tensor, perm), list(perm).index(axis)
    made = edit.constant(graph, _recipe(tensor, weight, function, axis, name), name, taken)
    weight.node.replace_input_with(weight.operand, made)
    if weight.path:
        edit.remove_dead(graph, [weight.path[-1]])
    edit.drop_if_unread(weight.value)
    if weight.value.graph is None:
        made.name = weight.value.name
    return made


def _recipe(
    base: ir.TensorProtocol, weight: Weight, function: Change, axis: int, name: str
) -> ir.TensorProtocol:
    # A change is the same for every slice across the axis, except that groups lie across it.
    whole = len(base.shape) < 2 or weight.group > 1

    def evaluate(array: Array) -> Array:
        if whole:
            return function(array.astype(np.float64), axis).astype(array.dtype)
        made = np.empty(array.shape, array.dtype)
        for piece in _pieces(array.shape, axis):
            made[piece] = function(array[piece].astype(np.float64), axis).astype(array.dtype)
        return made

    return weights.derived(base, evaluate, base.dtype, base.shape.numpy(), name)


def _pieces(shape: Sequence[int], axis: int) -> Iterator[tuple[slice, ...]]:
    """Slices across ``axis``, in order, that are small enough to be held in float64."""
    other = max((at for at in range(len(shape)) if at != axis), key=lambda at: shape[at])
    step = max(1, _AT_ONCE * shape[other] // max(1, math.prod(shape)))
    for start in range(0, shape[other], step):
        yield (slice(None),) * other + (slice(start, start + step),)


def scaled(weight: Weight, factor: Vector) -> Change:
    """The change that multiplies by ``factor`` along the weight's axis (all groups in a row)."""
    group = weight.group

    def function(array: Array, axis: int) -> Array:
        return array * _along(factor, array.shape, axis, group)

    return function


def _along(vector: Vector, shape: Sequence[int], axis: int, group: int) -> Vector:
    """``vector`` shaped to multiply an array of ``shape`` along ``axis``.

    Of a grouped kernel axis 1 holds one group only: the rows of axis 0 say which.
    """
    if group > 1 and axis == 1:
        rows = np.repeat(vector.reshape(group, -1), shape[0] // group, axis=0)
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return vector.reshape(sizes)


def shift_refused(weight: Weight) -> str:
    """Why a constant added to the layer's input is not one added to its output; empty if it is."""
    node = weight.node
    if node.op_type == "ConvTranspose":
        return "a transposed convolution adds it up differently at the border"
    if node.op_type == "Conv":
        padded = any(node.attributes.get_ints("pads") or (1,))
        padded |= node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        return "the convolution pads with zeros behind it" if padded else ""
    if weight.operand != 1 or len(weight.tensor.shape) != 2 or not weight.is_transposed_only:
        return "the layer takes its weights from a stack"
    return ""


def shifted(weight: Weight, shift: Vector) -> Callable[[], Vector]:
    """What ``shift``, added to every position of the value asked about, adds to the output's channels.

    It is computed from the weight as it is now: ask before the weight is changed.
    """
    tensor, axis, group = weight.tensor, weight.axis, weight.group
    shift = shift * weight.gain

    def evaluate() -> Vector:
        array = tensor.numpy()
        if weight.node.op_type == "Conv":
            product = array.astype(np.float64) * _along(shift, array.shape, axis, group)
            return np.asarray(product.reshape(array.shape[0], -1).sum(axis=1))
        sums = [
            np.tensordot(shift, array[piece].astype(np.float64), (0, axis))
            for piece in _pieces(array.shape, axis)
        ]
        return np.concatenate(sums)

    return evaluate


def add_to_output(
    graph: ir.Graph,
    node: ir.Node,
    width: int,
    vector: Callable[[], Vector],
    name: str,
    taken: set[str],
    created_by: str,
) -> ir.Value:
    """Add ``vector`` to the output channels of a Conv or of a MatMul's last axis; returns the bias.

    A bias that stands there takes it in, else there is one more, called ``name``. Where a MatMul gets an
    Add, the Add's output takes over the name and the readers of the MatMul's.
    """
    output = node.outputs[0]
    dtype = output.dtype
    assert dtype is not None
    held = bias_of(node, width)
    if held is not None:
        return change(
            graph, held, lambda array, _: array + vector().reshape(array.shape), name, taken
        )
    zero = ir.tensor(np.zeros(width, dtype.numpy()))
    tensor = weights.derived(zero, lambda a: vector().astype(a.dtype), dtype, [width], name)
    made = edit.constant(graph, tensor, name, taken)
    if node.op_type != "MatMul":
        node.resize_inputs(3)
        node.replace_input_with(2, made)
        return made
    add = edit.node("Add", [output, made], dtype=dtype, shape=output.shape, like=node)
    insert_behind(graph, output, add, taken, created_by)
    return made


def num_outputs(weight: Weight) -> int:
    """The output channels of a layer of which ``weight`` is the one that contracts its input."""
    axis = 0 if weight.node.op_type == "Conv" else 1 - weight.axis
    return int(weight.tensor.shape.numpy()[axis])


def bias_name(weight: ir.Value) -> str:
    """What the bias beside a weight is called: ``fc.bias`` beside ``fc.weight``."""
    return f"{(weight.name or '').removesuffix('.weight')}.bias"


def bias_of(node: ir.Node, width: int) -> Weight | None:
    """The constant that a layer adds to its output channels, where it is one of ``width`` numbers."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return constant(node, 2, 0) if len(node.inputs) > 2 else None
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output():
        return None
    add, index = uses[0]
    if add.op_type != "Add" or add.domain or index != 0:
        return None
    other = add.inputs[1]
    axis = (channels.rank(other) or 0) - 1
    found = constant(add, 1, axis) if axis >= 0 else None
    return found if found and not found.path and found.tensor.size == width else None


def insert_behind(
    graph: ir.Graph, value: ir.Value, node: ir.Node, taken: set[str], created_by: str
) -> None:
    """Put ``node``, which reads ``value``, behind it: what read ``value`` reads its output instead.

    The output takes over the name, and its place among the graph's outputs.
    """
    maker, output = value.producer(), node.outputs[0]
    assert maker is not None
    graph.insert_after(maker, provenance.mark(node, created_by=created_by, like=maker))
    readers = [(reader, index) for reader, index in value.uses() if reader is not node]
    name = value.name or "value"
    if value.is_graph_output():
        graph.outputs[list(graph.outputs).index(value)] = output
    for reader, index in readers:
        reader.replace_input_with(index, output)
    value.name = edit.unique_name(graph, f"{name}_{maker.op_type.lower()}", taken)
    output.name = name
