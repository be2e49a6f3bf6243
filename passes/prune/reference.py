"""What a model computes without some positions, with all of them still there: the masked reference.

The graph keeps its shapes. Only where an axis ends, in a sum, a norm, a softmax or a choice over it, the
positions that are gone are kept out: weights that sum over them are zeroed there, statistics are those
of what is kept, logits are -inf. Producers are left alone. So a position that the edit deletes from one
tensor and not from its neighbour, or another one there, makes the two models differ.

RMSNormalization and its kin divide by a root mean square over as many positions as there were: what is
gone counts as zeros there, and as the mean in a LayerNormalization.

Without some tokens of its vocabulary a model computes what it did for ids in which these are replaced by
those that stand in for them: nothing else changes, and what comes out is compared on what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes import Axes
from netlathe.analysis.axes.algebra import Axis, atoms
from netlathe.analysis.axes.bind import Relation
from netlathe.analysis.axes.selection import Positions, Selection
from netlathe.analysis.operators import TELL_SIZES
from netlathe.ir import edit, types, weights
from netlathe.ir.dims import Shape

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Kept = Mapping[tuple[str, int], Positions]  # (value, dim) -> positions that stay


def kept_of(axes: Axes, selection: Selection) -> dict[tuple[str, int], Positions]:
    """For every dim of a value that loses positions those that stay."""
    return {
        (value.name or "", dim): at
        for value, dims in axes.related.axes.items()
        for dim, axis in enumerate(dims)
        if (at := selection.of(axis)) is not None
    }


def mask(model: ir.Model, kept: Kept) -> None:
    """Rewrite ``model``, in normal form with types recorded, into its masked reference, in place."""
    masking = _Masking(model, kept)
    losing = {name for name, _ in kept}
    for node in list(model.graph):
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        if rule is not None and any(v is not None and v.name in losing for v in node.inputs):
            rule(masking, node)


def add_biases(model: ir.Model, arrays: Sequence[Mapping[str, Array]]) -> None:
    """Let outputs have a constant added, as ``arrays`` tell under ``bias:OUTPUT``."""
    named = {
        name.removeprefix("bias:"): a
        for one in arrays
        for name, a in one.items()
        if "bias:" in name
    }
    taken = edit.names_in(model.graph)
    for node in list(model.graph):
        for value in node.outputs:
            if (array := named.get(value.name or "")) is None:
                continue
            uses, is_output = list(value.uses()), value.is_graph_output()
            constant = edit.constant(model.graph, array, "prune/bias", taken)
            add = edit.node(
                "Add", [value, constant], dtype=value.dtype, shape=value.shape, like=node
            )
            model.graph.insert_after(node, add)
            for use in uses:
                use.node.replace_input_with(use.idx, add.outputs[0])
            if is_output:
                model.graph.outputs[list(model.graph.outputs).index(value)] = add.outputs[0]
            add.outputs[0].name = value.name
            value.name = edit.unique_name(model.graph, f"{value.name}/without", taken)


def stand_in(model: ir.Model, axes: Axes, stand_ins: Mapping[Axis, Positions]) -> None:
    """Let whatever is looked up along an atom be looked up by the ids that stand in for those given."""
    taken = edit.names_in(model.graph)
    for atom, array in stand_ins.items():
        replaced = edit.constant(model.graph, array, "prune/stand_ins", taken)
        for relation, letter in axes.letters[atom]:
            for index in (at for at, read in relation.signature.reads.items() if read == letter):
                ids = relation.node.inputs[index]
                name = edit.unique_name(model.graph, "prune/ids", taken)
                made = edit.node("Gather", [replaced, ids], name=name, dtype=ir.DataType.INT64)
                model.graph.insert_before(relation.node, made)
                relation.node.replace_input_with(index, made.outputs[0])


def unmasked(relation: Relation, letter: str) -> str:
    """Why no reference could be made where positions of a letter go; empty where one can.

    The letter ends in the node, and nothing here says how to keep a position out of it.
    """
    node, slots = relation.node, relation.slots.get(letter, ())
    dynamic = not isinstance(relation.axes[letter].size, int)
    if dynamic and mixes(relation, letter) and not relation.signature.moves:
        return f"{node.op_type} looks along it and a dynamic dim as one"
    if node.op_type in _RULES or node.op_type in TELL_SIZES or any(slot.output for slot in slots):
        return ""
    if not slots or letter in relation.signature.reads.values() or relation.signature.moves:
        return ""
    return f"{node.op_type} sums it up in a way that has no masked form"


class _Masking:
    def __init__(self, model: ir.Model, kept: Kept) -> None:
        self.graph = model.graph
        self.kept = kept
        self.taken = edit.names_in(model.graph)

    def along(self, value: ir.Value | None, dims: Sequence[int]) -> Mask | None:
        """Whether a value is kept along these dims, in its rank; None where everything is."""
        found: Mask | None = None
        for dim in dims:
            at = None if value is None else self.kept.get((value.name or "", dim))
            if value is None or at is None:
                continue
            shape = _shape(value)
            size = shape[dim]
            assert isinstance(size, int)  # no position goes of a dynamic dim
            line = np.isin(np.arange(size), at)
            line = line.reshape([-1 if other == dim else 1 for other in range(len(shape))])
            found = line if found is None else found & line
        return found

    def constant(self, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer; of numbers in the dtype given."""
        array = np.asarray(array)
        tensor = array if dtype is None else ir.tensor(array.astype(dtype.numpy()), dtype)
        return edit.constant(self.graph, tensor, "prune/mask", self.taken)

    def before(
        self,
        node: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """A new node before another one; its output."""
        name = edit.unique_name(self.graph, f"{node.outputs[0].name}/masked", self.taken)
        made = edit.node(op, inputs, attributes, name=name, dtype=dtype, like=node)
        made.outputs[0].name = name
        self.graph.insert_before(node, made)
        return made.outputs[0]

    def multiply(self, node: ir.Node, index: int, by: Array | None) -> None:
        """Let a node read an input times factors; a weight is multiplied when it is read."""
        value = node.inputs[index]
        if by is None or value is None:
            return
        base = value.const_value
        if base is None or not weights.is_weight(value):
            factors = self.constant(by, value.dtype)
            new = self.before(node, "Mul", [value, factors], value.dtype)
        else:

            def masked(array: Array) -> Array:
                product: Array = array * np.asarray(by).astype(array.dtype)
                return product

            shape = base.shape.numpy()
            lazy = weights.derived(base, masked, base.dtype, shape, value.name or "")
            new = edit.constant(self.graph, lazy, f"{value.name}/masked", self.taken)
        node.replace_input_with(index, new)

    def fill(self, node: ir.Node, index: int, kept: Mask | None, number: float) -> None:
        """Let a node read a number where an input is gone."""
        value = node.inputs[index]
        if kept is None or value is None:
            return
        condition, other = self.constant(kept), self.constant(number, value.dtype)
        filled = self.before(node, "Where", [condition, value, other], value.dtype)
        node.replace_input_with(index, filled)


def _shape(value: ir.Value) -> Shape:
    shape = types.recorded(value).shape
    assert shape is not None  # an axis with groups has a known shape
    return shape


# -- products -------------------------------------------------------------------------------------


def _matmul(m: _Masking, node: ir.Node) -> None:
    w = node.inputs[1]
    assert w is not None
    rank = len(_shape(w))
    m.multiply(node, 1, m.along(w, [max(rank - 2, 0)]))


def _gemm(m: _Masking, node: ir.Node) -> None:
    m.multiply(node, 1, m.along(node.inputs[1], [node.attributes.get_int("transB", 0) or 0]))


def _conv(m: _Masking, node: ir.Node) -> None:
    x, w = node.inputs[:2]
    assert x is not None and w is not None
    at = m.kept.get((x.name or "", 1))
    if at is None:
        return
    o, i, *kernel = (int(size) for size in _shape(w) if isinstance(size, int))
    groups = node.attributes.get_int("group", 1) or 1
    channels = np.isin(np.arange(groups * i), at).reshape(groups, i)
    rows = np.repeat(channels, o // groups, axis=0)
    m.multiply(node, 1, rows.reshape(o, i, *[1] * len(kernel)))


def _conv_transpose(m: _Masking, node: ir.Node) -> None:
    x, w = node.inputs[:2]
    assert x is not None and w is not None
    at = m.kept.get((x.name or "", 1))
    if at is not None:
        size, *rest = _shape(w)
        assert isinstance(size, int)
        m.multiply(node, 1, np.isin(np.arange(size), at).reshape(-1, *[1] * len(rest)))


def _einsum(m: _Masking, node: ir.Node) -> None:
    """Letters of the equation that are summed over, masked in the last operand that has them."""
    equation = (node.attributes.get_string("equation", "") or "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands, values = left.split(","), list(node.inputs)
    if not arrow:
        right = "".join(letter for letter in left if left.count(letter) == 1)
    for letter in dict.fromkeys(c for c in left if c.isalpha() and c not in right):
        index = max(number for number, operand in enumerate(operands) if letter in operand)
        value, operand = values[index], operands[index]
        assert value is not None
        place = operand.index(letter)
        if "..." in operand[:place]:
            place = len(_shape(value)) - (len(operand) - place)
        by = m.along(value, [place])
        if by is not None:
            m.multiply(node, index, by)


def _attention(m: _Masking, node: ir.Node) -> None:
    """The scores sum over the width of a head; what is gone of it counts as zero."""
    m.multiply(node, 0, m.along(node.inputs[0], [3]))


# -- choices and sums along an axis ---------------------------------------------------------------


def _over(node: ir.Node) -> list[int]:
    """The dims of its first input along which a node looks, other than a product."""
    x, op = node.inputs[0], node.op_type
    assert x is not None
    rank = len(_shape(x))
    if op == "GroupNormalization":
        return [1]
    if op == "CumSum" or op.startswith("Reduce"):
        listed = edit.const_array(node.inputs[1]) if len(node.inputs) > 1 else None
        if listed is not None and listed.size:
            return [int(axis) % rank for axis in listed.reshape(-1)]
        return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    default = 0 if op.startswith("Arg") else -1
    axis = (node.attributes.get_int("axis", default) or 0) % rank
    return list(range(axis, rank)) if op in _NORMS else [axis]


def _softmax(m: _Masking, node: ir.Node) -> None:
    """Softmax and its kin, TopK and ArgMax: what is gone is never the largest."""
    smallest = node.op_type == "ArgMin" or node.attributes.get_int("largest", 1) == 0
    number = np.inf if smallest else -np.inf
    if node.op_type == "LogSoftmax":  # what sums over its output multiplies this by zero
        number = -3e4  # a number in float16 as well; beside any logit its exponential is 0
    m.fill(node, 0, m.along(node.inputs[0], _over(node)), number)


_NEUTRAL = {"ReduceMax": -np.inf, "ReduceMin": np.inf, "ReduceLogSumExp": -np.inf, "ReduceProd": 1}


def _reduce(m: _Masking, node: ir.Node) -> None:
    """What is gone is neutral; a mean is that of what is kept."""
    kept = m.along(node.inputs[0], _over(node))
    if kept is None:
        return
    if node.op_type in _NEUTRAL:
        m.fill(node, 0, kept, _NEUTRAL[node.op_type])
        return
    m.fill(node, 0, kept, 0.0)
    if node.op_type == "ReduceMean":
        m.multiply(node, 0, np.array(1.0 / float(np.mean(kept))))


def _cumulative(m: _Masking, node: ir.Node) -> None:
    m.fill(node, 0, m.along(node.inputs[0], _over(node)), 0.0)


# -- normalizations -------------------------------------------------------------------------------


def _norm(m: _Masking, node: ir.Node) -> None:
    """x / sqrt(S / d + e), for the sum of squares S of what is kept, and of the mean of it."""
    x, over = node.inputs[0], _over(node)
    assert x is not None
    kept = m.along(x, over)
    if kept is None:
        return
    if node.op_type == "LayerNormalization":
        node.replace_input_with(0, _centred(m, node, x, kept, over))
    else:
        m.fill(node, 0, kept, 0.0)


def _lp_norm(m: _Masking, node: ir.Node) -> None:
    m.fill(node, 0, m.along(node.inputs[0], _over(node)), 0.0)


def _centred(m: _Masking, node: ir.Node, x: ir.Value, kept: Mask, over: Sequence[int]) -> ir.Value:
    """``x`` with the mean of what is kept where nothing is: it deviates from that by nothing."""
    axes = m.constant(np.array(over, np.int64))
    share = np.mean(kept, axis=tuple(over), keepdims=True)
    zero = m.constant(0.0, x.dtype)
    where = m.constant(kept)
    only = m.before(node, "Where", [where, x, zero], x.dtype)
    mean = m.before(node, "ReduceMean", [only, axes], x.dtype, keepdims=1)
    scaled = m.before(node, "Mul", [mean, m.constant(1.0 / share, x.dtype)], x.dtype)
    return m.before(node, "Where", [where, x, scaled], x.dtype)


def _group_norm(m: _Masking, node: ir.Node) -> None:
    """As :func:`_norm`, over each group of channels; whole groups may be gone, and do not matter."""
    x = node.inputs[0]
    assert x is not None
    at = m.kept.get((x.name or "", 1))
    if at is None:
        return
    channels, *space = _shape(x)[1:]
    assert isinstance(channels, int)
    groups = node.attributes.get_int("num_groups", 0) or 1
    kept = np.isin(np.arange(channels), at).reshape(groups, -1)
    kept[~kept.any(axis=1)] = True
    kept = kept.reshape(1, groups, -1, *[1] * len(space))
    # Each step of a Reshape keeps the dims after the channels as they are.
    apart = m.constant(np.array([0, groups, -1, *([0] * len(space))], np.int64))
    if space:
        sizes = m.before(node, "Shape", [x], ir.DataType.INT64, start=2)
        head = m.constant(np.array([0, groups, channels // groups], np.int64))
        apart = m.before(node, "Concat", [head, sizes], ir.DataType.INT64, axis=0)
    split = m.before(node, "Reshape", [x, apart], x.dtype)
    filled = _centred(m, node, split, kept, list(range(2, 3 + len(space))))
    back = m.before(node, "Shape", [x], ir.DataType.INT64)
    node.replace_input_with(0, m.before(node, "Reshape", [filled, back], x.dtype))


_NORMS = ("LayerNormalization", "RMSNormalization")

_RULES: Mapping[str, Callable[[_Masking, ir.Node], None]] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cumulative,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "LpNormalization": _lp_norm,
    "MatMul": _matmul,
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(
        (
            f"Reduce{kind}"
            for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()
        ),
        _reduce,
    ),
    **dict.fromkeys(("ArgMax", "ArgMin", "Hardmax", "LogSoftmax", "Softmax", "TopK"), _softmax),
}


_PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})


def mixes(relation: Relation, letter: str) -> bool:
    """Whether positions of a letter meet in a node: in a sum, a norm, a softmax or a choice over them."""
    op, slots = relation.node.op_type, relation.slots.get(letter, ())
    if op in TELL_SIZES or letter in relation.signature.reads.values():
        return False
    if not any(slot.output for slot in slots):
        return True
    over = _over(relation.node) if op in _RULES and op not in _PRODUCTS else []
    return any(not slot.output and slot.operand == 0 and slot.dim in over for slot in slots)


def no_reference(axes: Axes, group_atom: Any) -> str:
    """Why no reference can be made for a group; empty where one can."""
    for relation, letter in axes.letters[group_atom]:
        if group_atom in atoms(relation.axes[letter]) and (reason := unmasked(relation, letter)):
            return reason
    return ""
