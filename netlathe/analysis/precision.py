"""Which nodes may compute in half precision, and why the others stay in float32.

A node is converted as a whole, its weights included, unless it needs float32's digits or range:

* sums over many elements, exponentials, coordinates, angles, states that are fed back;
* what makes indices, angles or scales, back to the integers or constants that it is made from;
* squares, and arithmetic on nothing but what stays in float32: statistics, sums of integer products;
* a weight out of range: above 65504 in float16, or so small that float16 has few digits for it;
* a division by what such a small number keeps from 0: ``x / max(norm, 1e-12)``.

Normalizations keep their statistics in float32 by themselves (``stash_type``), Attention its softmax
(``softmax_precision``). What only moves data follows what it moves. A constant that stands for infinity
(the smallest float32 in a mask) becomes the largest number of the format, as its authors do it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir

from netlathe.ir import weights
from netlathe.ir.verify import OPSET

FLOAT = ir.DataType.FLOAT
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: (2 - 2.0**-7) * 2.0**127}
# The smallest number with all its digits.
SMALLEST = {ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}
# From here on a number stands for infinity: no weight or activation comes near.
ENDLESS = 2.0**100

_SUMS = "sums over many elements"
_EXPONENTIALS = "exponentials and powers leave the range and use up the digits"
_STATISTICS = "its statistics are computed in the type of its input"
_COORDINATES = "coordinates need the digits of float32"
_STATES = "a state that is rounded at every step drifts"
_SCALES = "scales of quantized data keep their digits"
_MAKES = "makes float32 out of integers"

_STAYS: Mapping[str, str] = {
    **dict.fromkeys(("CumProd", "CumSum", "ReduceL1", "ReduceL2", "ReduceLogSum"), _SUMS),
    **dict.fromkeys(("ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"), _SUMS),
    **dict.fromkeys(("DFT", "MelWeightMatrix", "STFT", "GlobalLpPool", "LpPool"), _SUMS),
    **dict.fromkeys(("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"), _SUMS),
    **dict.fromkeys(("Exp", "Log", "LogSoftmax", "Pow", "Reciprocal", "Softmax"), _EXPONENTIALS),
    **dict.fromkeys(("ReduceLogSumExp", "Det"), _EXPONENTIALS),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "LRN"), _STATISTICS),
    **dict.fromkeys(("LpNormalization", "MeanVarianceNormalization"), _STATISTICS),
    **dict.fromkeys(("AffineGrid", "DeformConv", "GridSample", "MaxRoiPool"), _COORDINATES),
    **dict.fromkeys(("NonMaxSuppression", "RoiAlign"), _COORDINATES),
    **dict.fromkeys(("Cos", "Range", "Sin", "Tan"), "angles and positions need float32's digits"),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _STATES),
    **dict.fromkeys(("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"), _SCALES),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), _SCALES),
    **dict.fromkeys(("Bernoulli", "EyeLike", "RandomNormal", "RandomNormalLike"), _MAKES),
    **dict.fromkeys(("Multinomial", "OneHot", "RandomUniform", "RandomUniformLike"), _MAKES),
    "Cast": "converts between types",
}

# What hands elements on as they are; it follows its data.
_MOVES = frozenset(
    {"CenterCropPad", "Compress", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather"}
    | {"GatherElements", "GatherND", "Identity", "Pad", "Reshape", "ReverseSequence"}
    | {"ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze"}
    | {"TensorScatter", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"}
)
# What a sum of integer products is made by, before it is Cast.
_INTEGER_SUMS = frozenset({"ConvInteger", "MatMulInteger"})
# Looked through, backwards, from an index or an angle to what it is made from.
_ARITHMETIC = frozenset(
    {"Abs", "Add", "Ceil", "Clip", "Cos", "Div", "Exp", "Floor", "Log", "Max", "Mean", "Min", "Mod"}
    | {"Mul", "Neg", "Pow", "Range", "Reciprocal", "Round", "Sign", "Sin", "Sqrt", "Sub", "Sum"}
)
_INDICES = frozenset({ir.DataType.INT32, ir.DataType.INT64})
# These read any type, or only the shape.
READS_ANY = frozenset({"Cast", "Shape", "Size"})
# Type variables, other than the output's, that are converted with it.
_ALSO: Mapping[str, frozenset[str]] = {
    "Attention": frozenset({"T1", "T2", "U"}),
    "RMSNormalization": frozenset({"T", "V"}),
}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a node. ``reason`` says why it stays in float32; none where it is converted.

    ``inputs`` and ``outputs`` are the positions that change their type, ``saturated`` the names of the
    weights that hold what stands for infinity. ``by_request`` where the user asked for it to stay.
    """

    node: ir.Node
    reason: str = ""
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    saturated: tuple[str, ...] = ()
    by_request: bool = False


@dataclass(frozen=True)
class Extent:
    """The largest magnitude among the numbers of a constant that do not stand for infinity."""

    largest: float
    endless: bool  # whether there are others, and finite


def survey(
    graph: ir.Graph, dtype: ir.DataType, kept: Callable[[ir.Node], str]
) -> Iterator[Verdict]:
    """A verdict on every node of ``graph`` that reads or makes float32, in order.

    ``kept`` gives the reason why the user wants a node to stay, if there is one. Every weight that a
    node could read in half precision is read once.
    """
    surveyor = _Surveyor(dtype, _exact(graph))
    for node in graph:
        if not _touches(node) or node.op_type in ("Shape", "Size"):
            continue
        if reason := kept(node):
            yield Verdict(node, reason, by_request=True)
        else:
            yield surveyor.judge(node)


# How far from 0 a result is, by how far its operands are from it; 0 where nothing is known. What is
# added to a number that keeps it from 0 is taken for positive: that is what such a number is there for.
_CARRIES: Mapping[str, Callable[[Sequence[float]], float]] = {
    **dict.fromkeys(("Abs", "Identity", "ReduceMax", "ReduceMean", "ReduceSum"), lambda f: f[0]),
    "Add": lambda f: max(f),
    "Div": lambda f: f[0] / f[1] if f[1] else 0.0,
    "Mul": lambda f: f[0] * f[1],
    "Pow": lambda f: f[0] ** f[1] if f[1] else 0.0,
    "Sqrt": lambda f: f[0] ** 0.5,
    "Sum": lambda f: max(f),
}


class _Surveyor:
    def __init__(self, dtype: ir.DataType, exact: Mapping[ir.Node, str]) -> None:
        self._dtype = dtype
        self._exact = exact
        self._half: set[ir.Value] = set()  # made in half precision
        self._guarded: dict[ir.Value, float] = {}  # kept from 0 by a small number, and by which
        self._inverse: set[ir.Value] = set()  # of such a value; beyond the format
        self._single: set[ir.Value] = set()  # made in float32, as their makers stay
        self._extents: dict[ir.Value, Extent] = {}

    def judge(self, node: ir.Node) -> Verdict:
        verdict = self._judge(node)
        if verdict.reason and _is_single(node, self._single):
            self._single.update(node.outputs)
        return verdict

    def _judge(self, node: ir.Node) -> Verdict:
        divides = self._divides(node)  # of every node, as it notes what becomes of a divisor
        reason = _stays(node) or self._exact.get(node, "") or divides
        if reason:
            return Verdict(node, reason)
        inputs, outputs, missing = _positions(node, self._dtype)
        if missing:
            return Verdict(node, missing)
        read = [value for at in inputs if (value := node.inputs[at]) is not None]
        data = [value for value in read if not weights.is_weight(value)]
        if node.op_type in _MOVES and data and not self._half.intersection(data):
            least = [self._guarded[value] for value in data if value in self._guarded]
            self._guarded.update(dict.fromkeys(node.outputs, min(least)) if least else {})
            self._inverse.update(node.outputs if self._inverse.intersection(data) else ())
            return Verdict(node, "moves values that are float32")
        extents = {v.name or "": self._extent(v) for v in read if weights.is_weight(v)}
        if node.op_type == "ConstantOfShape":
            extents[node.outputs[0].name or ""] = extent(fill(node))
        for name, found in extents.items():
            if reason := self._unfit(name, found):
                if found.largest < SMALLEST[self._dtype]:
                    self._guarded.update(dict.fromkeys(node.outputs, found.largest))
                return Verdict(node, reason)
        endless = any(found.endless for found in extents.values())
        if node.op_type in _ARITHMETIC and data and self._single.issuperset(data) and not endless:
            return Verdict(node, "reads nothing but what stays in float32")
        self._half.update(node.outputs[at] for at in outputs)
        saturated = tuple(name for name, found in extents.items() if found.endless)
        return Verdict(node, "", inputs, outputs, saturated)

    def _divides(self, node: ir.Node) -> str:
        """Why a node between a guarded value and what is divided by it stays."""
        op, read = node.op_type, [value for value in node.inputs if value is not None]
        least = min((self._guarded[value] for value in read if value in self._guarded), default=1.0)
        vanishes = not np.float64(least).astype(self._dtype.numpy())
        explodes = least * LARGEST[self._dtype] < 1
        if op == "Pow" and least < 1 and _falls(read[1]):
            op, explodes = "Reciprocal", self._left(node) * LARGEST[self._dtype] < 1
        if op == "Reciprocal" or (op == "Div" and weights.is_weight(read[0])):
            self._inverse.update(node.outputs if explodes else ())
            needed = explodes
        elif op == "Div" and read[1] in self._guarded:
            needed = vanishes
        elif least < 1 and op in _CARRIES and (left := self._left(node)):
            self._guarded[node.outputs[0]] = left
            needed = not np.float64(left).astype(self._dtype.numpy())
        else:
            needed = op == "Mul" and not self._inverse.isdisjoint(read)
        half = self._dtype.name.lower()
        return f"only a number too small for {half} keeps the divisor from 0" if needed else ""

    def _left(self, node: ir.Node) -> float:
        """The least that the result of ``node`` is, as an operand is kept from 0; 0 where that ends here."""
        read = [value for value in node.inputs if value is not None]
        factors = [self._guarded.get(value, 0.0) for value in read]
        for at, value in enumerate(read):
            if weights.is_weight(value):
                magnitudes = np.abs(weights.array(value).astype(np.float64))
                factors[at] = float(magnitudes.min(initial=np.inf))
        return float(_CARRIES[node.op_type](factors))

    def _extent(self, weight: ir.Value) -> Extent:
        if weight not in self._extents:
            self._extents[weight] = extent(weights.array(weight))
        return self._extents[weight]

    def _unfit(self, name: str, found: Extent) -> str:
        """Why a constant cannot be in half precision."""
        half = self._dtype.name.lower()
        if found.largest > LARGEST[self._dtype]:
            return f"{name} holds {found.largest:.3g}, beyond {half}"
        if 0 < found.largest < SMALLEST[self._dtype]:
            return f"{name} is at most {found.largest:.3g}, for which {half} has few digits"
        return ""


def fill(node: ir.Node) -> weights.Array:
    """The number that a ConstantOfShape fills with, in an array of one element."""
    attribute = node.attributes.get("value")
    return np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()


def extent(array: weights.Array) -> Extent:
    """How far the finite numbers of ``array`` reach."""
    flat = array.reshape(-1)
    largest, endless = 0.0, False
    for start in range(0, flat.size, _AT_ONCE):
        part = np.abs(flat[start : start + _AT_ONCE])
        if not part.max() < ENDLESS:  # NaN neither
            far = part >= ENDLESS
            endless |= bool((far & np.isfinite(part)).any())
            part = part[part < ENDLESS]
        largest = max(largest, float(part.max(initial=0)))
    return Extent(largest, endless)


_AT_ONCE = 4 << 20  # elements


# -- single nodes ---------------------------------------------------------------------------------


def _touches(node: ir.Node) -> bool:
    """Whether a node reads or makes float32, its subgraphs included."""
    values = [*node.inputs, *node.outputs]
    for inner in inside(node):
        values += [*inner.inputs, *inner.outputs]
    return any(value is not None and value.dtype == FLOAT for value in values)


def inside(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of a node's subgraphs."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


def _stays(node: ir.Node) -> str:
    """Why a node of its kind stays in float32."""
    if node.domain:
        return f"nothing is known of {node.domain}::{node.op_type}"
    if any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values()):
        return f"the bodies of {node.op_type} stay in float32"
    if node.op_type in _STAYS:
        return _STAYS[node.op_type]
    if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
        return _EXPONENTIALS
    stash = node.attributes.get("stash_type")
    if stash is not None and stash.as_int() != FLOAT.value:
        return "its statistics are not in float32"
    return ""


def _falls(exponent: ir.Value) -> bool:
    return weights.is_weight(exponent) and bool((weights.array(exponent) < 0).any())


def _is_single(node: ir.Node, single: Collection[ir.Value]) -> bool:
    """Whether what ``node`` makes in float32 is needed there, and not only as it came so.

    Masks are Cast from integers, and filled with infinity behind it: that belongs in half precision.
    """
    read = [value for value in node.inputs if value is not None]
    if node.op_type in _MOVES:
        return any(value in single for value in read)
    return node.op_type != "Cast" or _sums_integers(read[0])


def _sums_integers(value: ir.Value) -> bool:
    """Whether products of integers are summed up in ``value``, additions of such sums among them."""
    waiting, seen = [value], {value}
    while waiting:
        maker = waiting.pop().producer()
        if maker is None:
            continue
        if maker.op_type in _INTEGER_SUMS:
            return True
        if maker.op_type == "Add":
            new = {v for v in maker.inputs if v is not None} - seen
            waiting += new
            seen |= new
    return False


def _positions(node: ir.Node, dtype: ir.DataType) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Inputs and outputs that change their type, or why none can."""
    formal_inputs, formal_outputs, allowed = _formals(node.op_type)
    made = [
        formal_outputs[min(at, len(formal_outputs) - 1)]
        for at, value in enumerate(node.outputs)
        if value.dtype == FLOAT
    ]
    if not made:
        unknown = any(value.dtype is None for value in node.outputs)
        what = "has no known type" if unknown else "is no floating-point number"
        return (), (), f"its result {what}"
    changing = {made[0]} | _ALSO.get(node.op_type, frozenset())
    name = f"tensor({dtype.name.lower()})"
    if not all(name in allowed.get(variable, ()) for variable in changing):
        return (), (), f"{node.op_type} takes no {dtype.name.lower()}"
    inputs = [
        at
        for at, value in enumerate(node.inputs)
        if value is not None
        and value.dtype == FLOAT
        and formal_inputs[min(at, len(formal_inputs) - 1)] in changing
    ]
    outputs = [
        at
        for at, value in enumerate(node.outputs)
        if value.dtype == FLOAT and formal_outputs[min(at, len(formal_outputs) - 1)] in changing
    ]
    return tuple(inputs), tuple(outputs), ""


@cache
def _formals(op_type: str) -> tuple[list[str], list[str], dict[str, frozenset[str]]]:
    """Type variables of inputs and outputs (the last may repeat), and the types each may be."""
    schema = onnx.defs.get_schema(op_type, OPSET, "")
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    return [i.type_str for i in schema.inputs], [o.type_str for o in schema.outputs], allowed


# -- indices and angles ---------------------------------------------------------------------------


def _exact(graph: ir.Graph) -> dict[ir.Node, str]:
    """The nodes that make an index, a size, an angle or a scale, with what they make."""
    found: dict[ir.Node, str] = {}
    for node in graph:
        for value, what in _exact_inputs(node):
            stack = [value]
            while stack:
                current = stack.pop()
                maker = current.producer()
                if maker is None or maker in found or current.dtype != FLOAT:
                    continue
                if not _is_looked_through(maker):
                    continue
                found[maker] = f"makes {what} that need the digits of float32"
                stack += [v for v in maker.inputs if v is not None]
    return found


def _exact_inputs(node: ir.Node) -> Iterator[tuple[ir.Value, str]]:
    """What a node reads as an index, a size, an angle or a scale."""
    if node.domain:
        return
    what, read = "", node.inputs[:0]
    if node.op_type in ("Cos", "Sin", "Tan"):
        what, read = "angles", node.inputs
    elif node.op_type == "Range":
        what, read = "positions", node.inputs
    elif node.op_type == "Cast" and node.outputs[0].dtype in _INDICES:
        what, read = "indices", node.inputs
    elif node.op_type == "Resize":
        what, read = "sizes", node.inputs[1:3]
    elif node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        what, read = "scales", node.inputs[1:2]
    yield from ((value, what) for value in read if value is not None)


def _is_looked_through(node: ir.Node) -> bool:
    if node.domain:
        return False
    if node.op_type == "MatMul":  # an outer product: one factor each
        shape = None if node.inputs[0] is None else node.inputs[0].shape
        return shape is not None and len(shape) > 1 and shape[-1] == 1
    return node.op_type in _ARITHMETIC or node.op_type in _MOVES
