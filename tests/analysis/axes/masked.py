"""What a model computes with positions deleted, without deleting any: the reference for the edit.

The graph keeps its shapes and weights. Only where an axis ends, in a sum, a norm or a softmax over it,
the positions that are gone are kept out: weights are zeroed along it, statistics are those of the kept
positions, logits are -inf. So a position that is deleted from one tensor and not from its neighbour, or
another one, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, types
from netlathe.ir.dims import Shape

Array = npt.NDArray[Any]
Kept = Mapping[
    tuple[str, int], Array
]  # (value, dim) -> positions that stay, of dims that lose some


def mask(model: ir.Model, kept: Kept) -> ir.Model:
    """Rewrite ``model``, in normal form, into its masked reference, in place."""
    masking = _Masking(model, kept)
    for node in list(model.graph):
        rule = _RULES.get(node.op_type)
        if rule is not None:
            rule(masking, node)
    return model


class _Masking:
    def __init__(self, model: ir.Model, kept: Kept) -> None:
        self.graph = model.graph
        self.kept = kept
        self.count = 0

    def where(self, value: ir.Value, dims: range | tuple[int, ...]) -> Array | None:
        """1 where a value is kept along these dims, else 0; None where everything is."""
        rank = len(_shape(value))
        found: Array | None = None
        for dim in dims:
            at = self.kept.get((value.name or "", dim))
            if at is None:
                continue
            size = _shape(value)[dim]
            assert isinstance(size, int)
            line = np.isin(np.arange(size), at).reshape(
                [-1 if other == dim else 1 for other in range(rank)]
            )
            found = line if found is None else found & line
        return None if found is None else found.astype(np.float32)

    def constant(self, array: Any) -> ir.Value:
        """A new initializer."""
        return edit.constant(self.graph, np.asarray(array), "mask")

    def before(
        self, node: ir.Node, op: str, *inputs: ir.Value | None, **attributes: Any
    ) -> ir.Value:
        """A new node before another one; its output."""
        made = ir.node(op, inputs, attributes)
        self.count += 1
        made.outputs[0].name = f"masked_{self.count}"
        self.graph.insert_before(node, made)
        return made.outputs[0]

    def multiply(self, node: ir.Node, index: int, by: Array | None) -> None:
        """Let a node read an input times a mask."""
        value = node.inputs[index]
        assert value is not None
        if by is None:
            return
        if value.const_value is not None:
            new = self.constant(value.const_value.numpy() * by)
        else:
            new = self.before(node, "Mul", value, self.constant(by))
        node.replace_input_with(index, new)


def _shape(value: ir.Value) -> Shape:
    shape = types.recorded(value).shape
    assert shape is not None
    return shape


def _matmul(m: _Masking, node: ir.Node) -> None:
    w = node.inputs[1]
    assert w is not None
    rank = len(_shape(w))
    m.multiply(node, 1, m.where(w, (max(rank - 2, 0),)))


def _conv(m: _Masking, node: ir.Node) -> None:
    x, w = node.inputs[:2]
    assert x is not None and w is not None and w.const_value is not None
    array = w.const_value.numpy()
    at = m.kept.get((x.name or "", 1))
    if at is None:
        return
    groups = node.attributes.get_int("group", 1)
    channels = np.zeros(groups * array.shape[1], np.float32)
    channels[at] = 1
    rows = np.repeat(channels.reshape(groups, -1), array.shape[0] // groups, axis=0)
    m.multiply(node, 1, rows.reshape(array.shape[:2] + (1,) * (array.ndim - 2)))


def _conv_transpose(m: _Masking, node: ir.Node) -> None:
    x, w = node.inputs[:2]
    assert x is not None and w is not None
    at = m.kept.get((x.name or "", 1))
    if at is not None:
        rank = len(_shape(w))
        kept = np.isin(np.arange(_shape(w)[0]), at)  # type: ignore[arg-type]  # a weight has numbers
        m.multiply(node, 1, kept.astype(np.float32).reshape([-1] + [1] * (rank - 1)))


def _attention(m: _Masking, node: ir.Node) -> None:
    q = node.inputs[0]
    assert q is not None and len(_shape(q)) == 4
    m.multiply(node, 0, m.where(q, (3,)))


def _softmax(m: _Masking, node: ir.Node) -> None:
    """Also TopK: what is gone is never the largest."""
    x = node.inputs[0]
    assert x is not None
    rank = len(_shape(x))
    kept = m.where(x, (node.attributes.get_int("axis", -1) % rank,))
    if kept is not None:
        gone = np.where(kept > 0, 0, -np.inf).astype(np.float32)
        node.replace_input_with(0, m.before(node, "Add", x, m.constant(gone)))


def _reduce(m: _Masking, node: ir.Node) -> None:
    x, axes = node.inputs
    assert x is not None and axes is not None and axes.const_value is not None
    along = tuple(int(axis) for axis in axes.const_value.numpy())
    kept = m.where(x, along)
    if kept is None:
        return
    m.multiply(node, 0, kept)
    if node.op_type == "ReduceMean":
        share = float(np.mean(kept))
        (out,) = node.outputs
        scaled = ir.node("Mul", [out, m.constant(np.float32(1 / share))])
        scaled.outputs[0].name = f"{out.name}_of_kept"
        readers = [(reader, index) for reader, index in out.uses()]
        m.graph.insert_after(node, scaled)
        for reader, index in readers:
            reader.replace_input_with(index, scaled.outputs[0])
        assert not out.is_graph_output()


def _norm(m: _Masking, node: ir.Node) -> None:
    """x / sqrt(S / d + e), for the sum of squares S of what is kept, and of the mean of it."""
    x = node.inputs[0]
    assert x is not None
    rank = len(_shape(x))
    axis = node.attributes.get_int("axis", -1) % rank
    kept = m.where(x, range(axis, rank))
    if kept is None:
        return
    if node.op_type == "LayerNormalization":
        _centre(m, node, x, kept, list(range(axis, rank)))
    else:
        m.multiply(node, 0, kept)


def _centre(m: _Masking, node: ir.Node, x: ir.Value, kept: Array, axes: list[int]) -> None:
    """Put the mean of what is kept where nothing is: it deviates from the mean by nothing."""
    along = m.constant(np.array(axes, np.int64))
    masked = m.before(node, "Mul", x, m.constant(kept))
    total = m.before(node, "ReduceMean", masked, along, keepdims=1)
    mean = m.before(node, "Mul", total, m.constant(np.float32(1 / np.mean(kept))))
    rest = m.before(node, "Mul", mean, m.constant(1 - kept))
    node.replace_input_with(0, m.before(node, "Add", masked, rest))


def _group_norm(m: _Masking, node: ir.Node) -> None:
    """As :func:`_norm`, over each group of channels; whole groups may be gone, and do not matter."""
    x = node.inputs[0]
    assert x is not None
    at = m.kept.get((x.name or "", 1))
    if at is None:
        return
    shape = _shape(x)
    groups, channels = node.attributes.get_int("num_groups", 0), shape[1]
    assert isinstance(channels, int)
    kept = np.isin(np.arange(channels), at).reshape(groups, -1)
    kept[~kept.any(axis=1)] = True
    split = m.before(node, "Reshape", x, m.constant(np.array([0, groups, -1, *shape[2:]])))
    kept = kept.reshape(1, groups, -1, *[1] * (len(shape) - 2)).astype(np.float32)
    along = m.constant(np.arange(2, len(shape) + 1))
    masked = m.before(node, "Mul", split, m.constant(kept))
    total = m.before(node, "ReduceMean", masked, along, keepdims=1)
    share = np.mean(kept, axis=2, keepdims=True)
    mean = m.before(node, "Div", total, m.constant(share))
    filled = m.before(node, "Add", masked, m.before(node, "Mul", mean, m.constant(1 - kept)))
    back = m.constant(np.array([0, channels, *shape[2:]]))
    node.replace_input_with(0, m.before(node, "Reshape", filled, back))


_RULES: Mapping[str, Callable[[_Masking, ir.Node], None]] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _norm,
    "MatMul": _matmul,
    "RMSNormalization": _norm,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Softmax": _softmax,
    "TopK": _softmax,
}
