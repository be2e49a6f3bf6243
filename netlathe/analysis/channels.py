"""Where one axis of a value goes in the operators that carry it through whole.

An axis passes through a node if the output has an axis with the same positions in the same order, and
every element of the output depends on elements of its own position only. `moved` knows the operators
that copy elements, `mixed` also those that add up elements of one position (sums over other axes, joins
along other axes). Types must be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from netlathe.ir import dims, edit, types
from netlathe.ir.dims import Dim, Shape

AxisMap = Mapping[int, int]  # axis of input 0 -> axis of every output


def moved(node: ir.Node) -> AxisMap:
    """Axes that pass through a node that copies elements of input 0; empty for any other node."""
    rule = _MOVES.get(node.op_type) if node.domain == "" else None
    return {} if rule is None else rule(node)


def mixed(node: ir.Node) -> AxisMap:
    """Like :func:`moved`, and also for a mean or a sum over other axes."""
    if node.domain == "" and node.op_type in ("ReduceMean", "ReduceSum"):
        return _reduced(node)
    return moved(node)


def rank(value: ir.Value | None) -> int | None:
    """Number of dims of a typed value."""
    return None if value is None or value.shape is None else len(value.shape)


def width(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis (counted from the front), where it is there and static."""
    if value is None or value.shape is None or not 0 <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def aligned(value: ir.Value | None, other: ir.Value, axis: int) -> int | None:
    """The axis of ``value`` that broadcasting pairs with ``axis`` of ``other``; it may be negative."""
    a, b = rank(value), rank(other)
    return None if a is None or b is None else axis + a - b


# -- rules ------------------------------------------------------------------------------------------


def _shape(value: ir.Value | None) -> Shape | None:
    return None if value is None else types.recorded(value).shape


def _ints(node: ir.Node, index: int) -> list[int] | None:
    """The elements of a constant integer operand."""
    array = edit.const_array(node.inputs[index] if index < len(node.inputs) else None)
    return None if array is None else [int(item) for item in array.reshape(-1)]


def _all(node: ir.Node) -> AxisMap:
    return {axis: axis for axis in range(rank(node.inputs[0]) or 0)}


def _cast(node: ir.Node) -> AxisMap:
    """A cast between float formats rounds; it moves nothing."""
    to, data = node.attributes.get_int("to", 0), node.inputs[0]
    floats = data is not None and data.dtype is not None and data.dtype.is_floating_point()
    return _all(node) if floats and ir.DataType(to).is_floating_point() else {}


def _transpose(node: ir.Node) -> AxisMap:
    perm = node.attributes.get_ints("perm") or ()
    return {before: after for after, before in enumerate(perm)}


def _reshape(node: ir.Node) -> AxisMap:
    """An axis passes where it has the same size after, with equally many elements before it."""
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    if before is None or after is None:
        return {}
    starts: list[Dim] = [dims.product(after[:axis]) for axis in range(len(after))]
    found: dict[int, int] = {}
    for axis, size in enumerate(before):
        start = dims.product(before[:axis])
        for position in range(len(after)):
            if position in found.values() or not dims.same(size, after[position]):
                continue
            if dims.same(start, starts[position]):
                found[axis] = position
                break
    return found


def _squeeze(node: ir.Node) -> AxisMap:
    axes, count = _ints(node, 1), rank(node.inputs[0])
    if axes is None or count is None:
        return {}
    kept = [axis for axis in range(count) if axis not in axes]
    return {axis: position for position, axis in enumerate(kept)}


def _unsqueeze(node: ir.Node) -> AxisMap:
    axes, count = _ints(node, 1), rank(node.outputs[0])
    if axes is None or count is None:
        return {}
    old = [axis for axis in range(count) if axis not in axes]
    return dict(enumerate(old))


def _slice(node: ir.Node) -> AxisMap:
    axes = _ints(node, 3)
    return {} if axes is None else {a: b for a, b in _all(node).items() if a not in axes}


def _split(node: ir.Node) -> AxisMap:
    axis = node.attributes.get_int("axis", 0)
    return {a: b for a, b in _all(node).items() if a != axis}


def _gather(node: ir.Node) -> AxisMap:
    axis, extra = node.attributes.get_int("axis", 0), rank(node.inputs[1])
    if extra is None:
        return {}
    return {a: a if a < axis else a + extra - 1 for a in _all(node) if a != axis}


def _gather_nd(node: ir.Node) -> AxisMap:
    """Whole slices, looked up by their leading axes."""
    shape = _shape(node.inputs[1])
    looked_up = shape[-1] if shape else None
    batched = node.attributes.get_int("batch_dims", 0) != 0
    if not shape or not isinstance(looked_up, int) or batched:
        return {}
    return {a: a - looked_up + len(shape) - 1 for a in _all(node) if a >= looked_up}


def _expand(node: ir.Node) -> AxisMap:
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    if before is None or after is None:
        return {}
    extra = len(after) - len(before)
    pairs = {axis: axis + extra for axis in range(len(before))}
    return {a: b for a, b in pairs.items() if dims.same(before[a], after[b])}


def _reduced(node: ir.Node) -> AxisMap:
    axes, count = _ints(node, 1), rank(node.inputs[0])
    if not axes or count is None:
        return {}
    kept = [axis for axis in range(count) if axis not in axes]
    if node.attributes.get_int("keepdims", 1):
        return {axis: axis for axis in kept}
    return {axis: position for position, axis in enumerate(kept)}


_MOVES: Mapping[str, Callable[[ir.Node], AxisMap]] = {
    "Cast": _cast,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Identity": _all,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
