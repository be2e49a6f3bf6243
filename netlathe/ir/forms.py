"""One form per construct: a table from operator to the rules that bring a node into it.

A rule edits through :class:`~netlathe.ir.work.Work` and may remove its node. Each is exact: the same
real numbers, computed in the same order (the sign of a zero excepted). The choices are listed in
:mod:`netlathe.ir.normal`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from netlathe.ir import defaults, dims, edit, movement, provenance, weights
from netlathe.ir.dims import Dim
from netlathe.ir.work import Work

Rule = Callable[[ir.Node, Work], None]


def rewrite(node: ir.Node, work: Work) -> None:
    """Bring one node of the default domain into normal form; it may be gone afterwards."""
    _trim(node, work)
    defaults.complete(node, work)
    for rule in (*RULES.get(node.op_type, ()), _known_contents):
        if node.graph is None:
            return
        rule(node, work)


def _trim(node: ir.Node, work: Work) -> None:
    """Take absent inputs and unread optional outputs off the end."""
    count = len(node.inputs)
    while count and node.inputs[count - 1] is None:
        count -= 1
    if count < len(node.inputs):
        node.resize_inputs(count)
        work.changed = True
    # Attention, whose caches come in pairs, and recurrent layers keep theirs.
    if node.op_type in ("Attention", "GRU", "If", "LSTM", "Loop", "RNN", "Scan"):
        return
    if len(node.outputs) == 1 or not onnx.defs.has(node.op_type):
        return
    kept, least = len(node.outputs), defaults.num_required_outputs(node.op_type)
    while kept > least and not _read(node.outputs[kept - 1]):
        kept -= 1
    if kept < len(node.outputs):
        node.resize_outputs(kept)
        work.changed = True


def _read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _known_contents(node: ir.Node, work: Work) -> None:
    """A shape-like integer value whose elements are all known is a constant."""
    if node.op_type == "Identity" or len(node.outputs) != 1:
        return
    output = node.outputs[0]
    items, type_ = work.found.contents(output), work.type(output)
    if items is None or type_.dtype is None or type_.shape is None or len(type_.shape) > 1:
        return
    if not all(isinstance(item, int) for item in items):
        return
    array = np.array(items, dtype=type_.dtype.numpy())
    array = array.reshape(() if not type_.shape else (len(items),))
    value = work.constant(node, array, f"{output.name}_value")
    _take_name(node, value, work)
    work.folded += 1


def _take_name(node: ir.Node, value: ir.Value, work: Work) -> None:
    """Let ``value``, a new initializer, stand for the only output of ``node``, under its name."""
    output = node.outputs[0]
    name = output.name
    named_by_output = output.is_graph_output()
    work.forward(node, value)
    if not named_by_output and name:
        value.name = name


# -- nodes that say nothing -----------------------------------------------------------------------


def _constant(node: ir.Node, work: Work) -> None:
    if "sparse_value" in node.attributes:
        return  # it has no dense initializer of the same size
    tensor = ir.convenience.get_const_tensor(node.outputs[0], propagate_shape_type=False)
    assert tensor is not None
    _take_name(node, work.constant(node, tensor, f"{node.outputs[0].name}_value"), work)


def _identity(node: ir.Node, work: Work) -> None:
    source, output = node.inputs[0], node.outputs[0]
    if source is None:
        return
    if output.is_graph_output() and (
        source.producer() is None or source.graph is not node.graph or source.is_graph_output()
    ):
        return
    work.forward(node, source)


def _dropout(node: ir.Node, work: Work) -> None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and work.scalar(training) != 0:
        return
    if node.inputs[0] is not None and not any(_read(value) for value in node.outputs[1:]):
        work.forward(node, node.inputs[0])


def _single_operand(node: ir.Node, work: Work) -> None:
    if len(node.inputs) == 1 and node.inputs[0] is not None:
        work.forward(node, node.inputs[0])


_NEUTRAL = {"Add": 0, "And": 1, "Div": 1, "Mul": 1, "Or": 0, "Pow": 1, "Sub": 0}


def _neutral_operand(node: ir.Node, work: Work) -> None:
    """x * 1, x + 0, x and true, ... are x where the constant does not add dims."""
    data, other = node.inputs
    if data is None or other is None or work.scalar(other) != _NEUTRAL[node.op_type]:
        return
    rank, extra = work.rank(data), work.rank(other)
    if rank is not None and extra is not None and extra <= rank:
        work.forward(node, data)


def _no_padding(node: ir.Node, work: Work) -> None:
    pads = work.ints(node.inputs[1])
    if pads is not None and not any(pads) and node.inputs[0] is not None:
        work.forward(node, node.inputs[0])


def _no_repeat(node: ir.Node, work: Work) -> None:
    repeats = work.ints(node.inputs[1])
    if repeats is not None and set(repeats) <= {1} and node.inputs[0] is not None:
        work.forward(node, node.inputs[0])


# -- one of several spellings ---------------------------------------------------------------------


def _constant_second(node: ir.Node, work: Work) -> None:
    """Commutative operators read their constant, of two the smaller, as input 1."""
    first, second = node.inputs
    if first is None or not weights.is_weight(first) or first.const_value is None:
        return
    held = second.const_value if second is not None and weights.is_weight(second) else None
    if held is None or first.const_value.size < held.size:
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
        work.changed = True


def _sum(node: ir.Node, work: Work) -> None:
    total, *rest = node.inputs
    added = []
    for term in rest:
        added.append(ir.node("Add", [total, term]))
        total = added[-1].outputs[0]
    if added:
        work.swap(node, added, {node.outputs[0]: added[-1].outputs[0]})


def _cast_like(node: ir.Node, work: Work) -> None:
    dtype = work.type(node.inputs[1]).dtype
    if dtype is None:
        return
    attributes: dict[str, Any] = {"to": dtype}
    attributes["saturate"] = node.attributes.get_int("saturate", 1)
    cast = ir.node("Cast", [node.inputs[0]], attributes)
    work.swap(node, [cast], {node.outputs[0]: cast.outputs[0]})


def _gemm(node: ir.Node, work: Work) -> None:
    """alpha * A' B' + beta * C as MatMul and Add; factors go to the constants."""
    a, b, *rest = node.inputs
    c = rest[0] if rest else None
    alpha = node.attributes.get_float("alpha", 1.0)
    beta = node.attributes.get_float("beta", 1.0)
    dtype = work.type(a).dtype or work.type(b).dtype
    if dtype is None or not dtype.is_floating_point():
        return  # ONNX leaves open how a float factor multiplies integers
    made: list[ir.Node] = []

    def add(op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        made.append(ir.node(op_type, inputs, attributes))
        return made[-1].outputs[0]

    def scaled(value: ir.Value | None, factor: float) -> ir.Value | None:
        if factor == 1.0:
            return value
        array = np.array(factor, dtype=dtype.numpy())
        return add("Mul", [value, work.constant(node, array, f"{node.outputs[0].name}_factor")])

    if node.attributes.get_int("transA", 0):
        a = add("Transpose", [a], perm=[1, 0])
    if node.attributes.get_int("transB", 0):
        b = add("Transpose", [b], perm=[1, 0])
    constant_b = weights.is_weight(node.inputs[1])
    product = add("MatMul", [a, scaled(b, alpha) if constant_b else b])
    result = product if constant_b else scaled(product, alpha)
    if c is not None and beta != 0.0:
        result = add("Add", [result, scaled(c, beta)])
    assert result is not None
    work.swap(node, made, {node.outputs[0]: result})


def _reduce(node: ir.Node, work: Work) -> None:
    """Axes as a constant input, counted from the front, in order."""
    rank = work.rank(node.inputs[0])
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = work.ints(given)
    if rank is None or (given is not None and axes is None):
        return
    if not axes:
        if node.attributes.get_int("noop_with_empty_axes", 0):
            return
        axes = tuple(range(rank))
    work.set_ints(node, 1, sorted(axis % rank for axis in axes) if rank else [], "axes")
    if rank:
        work.set_attribute(node, "noop_with_empty_axes", 0)


def _squeeze(node: ir.Node, work: Work) -> None:
    shape = work.shape(node.inputs[0])
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = work.ints(given)
    if shape is None or (given is not None and axes is None):
        return
    if axes is None:
        if not all(isinstance(dim, int) for dim in shape):
            return
        axes = tuple(axis for axis, dim in enumerate(shape) if dim == 1)
    if not axes and node.inputs[0] is not None:
        work.forward(node, node.inputs[0])
    else:
        work.set_ints(node, 1, sorted(axis % len(shape) for axis in axes), "axes")


def _unsqueeze(node: ir.Node, work: Work) -> None:
    rank, axes = work.rank(node.inputs[0]), work.ints(node.inputs[1])
    if axes is not None and not axes and node.inputs[0] is not None:
        work.forward(node, node.inputs[0])
    elif rank is not None and axes is not None:
        work.set_ints(node, 1, sorted(a % (rank + len(axes)) for a in axes), "axes")


def _split(node: ir.Node, work: Work) -> None:
    """Sizes as a constant input where they are known, else a number of equal parts."""
    if len(node.outputs) == 1 and node.inputs[0] is not None:
        work.forward(node, node.inputs[0])
        return
    axis = node.attributes.get_int("axis", 0)
    sizes: list[Dim] = []
    for output in node.outputs:
        shape = work.shape(output)
        sizes.append(shape[axis] if shape is not None and 0 <= axis < len(shape) else None)
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) == len(sizes):
        if node.attributes.pop("num_outputs", None) is not None:
            work.changed = True
        work.set_ints(node, 1, known, "sizes")


def _scalar_axis(node: ir.Node, work: Work) -> None:
    """CumSum and DFT read their axis as a scalar input."""
    index = 1 if node.op_type == "CumSum" else 2
    rank = work.rank(node.inputs[0])
    axis = work.ints(node.inputs[index] if len(node.inputs) > index else None)
    if rank and axis is not None and len(axis) == 1:
        work.set_ints(node, index, [axis[0] % rank], "axis", scalar=True)


def _flatten(node: ir.Node, work: Work) -> None:
    shape, axis = work.shape(node.inputs[0]), node.attributes.get_int("axis", 1)
    if shape is None:
        return
    left, right = dims.product(shape[:axis]), dims.product(shape[axis:])
    target: list[int] | None = None
    if axis == 1:
        target = [0, right if isinstance(right, int) else -1]
    elif isinstance(left, int):
        target = [left, right if isinstance(right, int) else -1]
    elif isinstance(right, int):
        target = [-1, right]
    if target is None or 0 in target[1:] or (axis != 1 and target[0] == 0):
        return
    literal = work.constant(node, np.array(target, np.int64), f"{node.outputs[0].name}_shape")
    reshape = ir.node("Reshape", [node.inputs[0], literal], {"allowzero": 0})
    work.swap(node, [reshape], {node.outputs[0]: reshape.outputs[0]})


# -- sequences ------------------------------------------------------------------------------------


def _sequence_at(node: ir.Node, work: Work) -> None:
    """An element of a sequence that is put together in the graph is that value."""
    sequence, position = node.inputs[0], work.ints(node.inputs[1])
    maker = sequence.producer() if sequence is not None else None
    if position is None or maker is None or maker.op_type != "SequenceConstruct":
        return
    if -len(maker.inputs) <= position[0] < len(maker.inputs):
        element = maker.inputs[position[0]]
        if element is not None:
            work.forward(node, element)


def _split_to_sequence(node: ir.Node, work: Work) -> None:
    """A split whose parts are all taken by constant position is a Split (or Gathers, undimmed)."""
    data, sequence = node.inputs[0], node.outputs[0]
    shape, takers = work.shape(data), sequence.consumers()
    axis = node.attributes.get_int("axis", 0)
    if data is None or shape is None or sequence.is_graph_output() or not takers:
        return
    positions = [work.ints(taker.inputs[1]) for taker in takers if taker.op_type == "SequenceAt"]
    sizes = _part_sizes(node, shape[axis], work)
    if sizes is None or len(positions) != len(takers) or None in positions:
        return
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    wanted = [position[0] % len(sizes) for position in positions if position is not None]
    if len(node.inputs) == 1 and not node.attributes.get_int("keepdims", 1):
        for taker, position in zip(takers, wanted, strict=True):
            index = work.constant(node, np.array(position), f"{taker.outputs[0].name}_index")
            gather = ir.node("Gather", [data, index], {"axis": axis})
            work.swap(taker, [gather], {taker.outputs[0]: gather.outputs[0]})
        return
    literal = work.constant(node, np.array(sizes), f"{sequence.name}_sizes")
    split = ir.node("Split", [data, literal], {"axis": axis}, num_outputs=len(sizes))
    for number, value in enumerate(split.outputs):
        value.name = edit.unique_name(graph, f"{sequence.name}_{number}", work.taken)
    graph.insert_before(node, provenance.mark(split, like=node))
    for taker, position in zip(takers, wanted, strict=True):
        before, after = taker.outputs[0], split.outputs[position]
        if not before.is_graph_output() and not after.uses():
            name, before.name = before.name, None
            after.name = name
        work.forward(taker, after)


def _part_sizes(node: ir.Node, width: Dim, work: Work) -> list[int] | None:
    """Sizes of the parts of a SplitToSequence, where all are static."""
    if len(node.inputs) == 1:
        return [1] * width if isinstance(width, int) else None
    sizes = work.ints(node.inputs[1])
    if sizes is None or work.rank(node.inputs[1]) != 0:
        return None if sizes is None else list(sizes)
    if not isinstance(width, int) or sizes[0] < 1:
        return None
    return [min(sizes[0], width - start) for start in range(0, width, sizes[0])]


# -- control flow ---------------------------------------------------------------------------------


def _if(node: ir.Node, work: Work) -> None:
    """An If whose condition is constant becomes the branch it takes."""
    condition = work.scalar(node.inputs[0])
    graph = node.graph
    if condition is None or not isinstance(graph, ir.Graph):
        return
    branch = node.attributes["then_branch" if condition else "else_branch"].as_graph()
    results = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        moved = work.constant(node, tensor, value.name or "constant")
        results = [moved if result is value else result for result in results]
        value.replace_all_uses_with(moved)
    nodes = list(branch)
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for before, after in zip(node.outputs, results, strict=True):
        edit.redirect(before, after)
    edit.remove_dead(graph, [node])
    work.changed = True


# -- the table ------------------------------------------------------------------------------------

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

RULES: Mapping[str, tuple[Rule, ...]] = {
    **{name: (_constant_second, _neutral_operand) for name in ("Add", "And", "Mul", "Or")},
    "Cast": (movement.cast,),
    "CastLike": (_cast_like,),
    "Concat": (_single_operand,),
    "Constant": (_constant,),
    "CumSum": (_scalar_axis,),
    "DFT": (_scalar_axis,),
    "Div": (_neutral_operand,),
    "Dropout": (_dropout,),
    "Expand": (movement.expand,),
    "Flatten": (_flatten,),
    "Gemm": (_gemm,),
    "Identity": (_identity,),
    "If": (_if,),
    "Max": (_single_operand,),
    "Mean": (_single_operand,),
    "Min": (_single_operand,),
    "Pad": (_no_padding,),
    "Pow": (_neutral_operand,),
    "Reshape": (movement.reshape,),
    "SequenceAt": (_sequence_at,),
    "Slice": (movement.slice_,),
    "Split": (_split,),
    "SplitToSequence": (_split_to_sequence,),
    "Squeeze": (_squeeze,),
    "Sub": (_neutral_operand,),
    "Sum": (_single_operand, _sum),
    "Tile": (_no_repeat,),
    "Transpose": (movement.transpose,),
    "Unsqueeze": (_unsqueeze,),
    **{f"Reduce{name}": (_reduce,) for name in _REDUCTIONS},
}
