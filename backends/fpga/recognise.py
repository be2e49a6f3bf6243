"""What the core does of a graph: integer products, sums, means and maxima, found by their operators.

:mod:`netlathe.passes.quantize.integer` writes integer arithmetic as

    Cast to int64 -> Mul m -> Add offset -> x - Mod(x, 2^n) -> Div 2^n -> Clip to int8 -> Cast to int8

behind MatMulInteger, ConvInteger, a sum of two terms or a ReduceSum. The offset holds the rounding half,
the zero point and what belongs to the sums; they are told apart by the zero points of the inputs. An
operation that is not exactly of this form is the host's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.fpga.tensors import Scale, Window
from netlathe.diagnostics import Diagnostic
from netlathe.ir import edit

Array = npt.NDArray[Any]
INT8, INT32, INT64 = ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64
_PLAIN = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True, eq=False)
class Operation:
    """What takes the place of ``nodes``; ``output`` is int8, or int32 where sums leave the core."""

    name: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    output: ir.Value


@dataclass(frozen=True, eq=False)
class Product(Operation):
    """``weights``: int8 [out, in / groups, vertical, horizontal]; without ``scale.multiplier`` sums stay."""

    weights: Array
    scale: Scale
    window: Window
    groups: int
    zero: int
    is_conv: bool
    raw: bool


@dataclass(frozen=True, eq=False)
class Sum(Operation):
    """Terms of one shape, each times its factor."""

    factors: tuple[int, ...]
    scale: Scale


@dataclass(frozen=True, eq=False)
class Pool(Operation):
    """A maximum under a window, or (no window) the sum over all pixels."""

    window: Window | None
    scale: Scale
    zero: int


@dataclass(frozen=True, eq=False)
class Rename(Operation):
    """The same bytes in another shape: an image of one pixel, flattened."""


def nothing() -> Diagnostic:
    """What to say where the core has nothing to do."""
    return Diagnostic(
        "fpga.integer",
        "no product of the model is in integers, so the core has nothing to do",
        help="put quantize(activations='int8') into the pass list, behind fold_batch_norm or fold_norms",
    )


def operations(model: ir.Model) -> list[Operation]:
    """What the core takes, in the graph's order."""
    found: list[Operation] = []
    taken: set[ir.Node] = set()
    zeros: dict[ir.Value, int] = {}
    for node in model.graph:
        if node in taken or node.domain:
            continue
        zero = _zero_of_source(node)
        if zero is not None:
            zeros[node.outputs[0]] = zero
            continue
        operation = _find(node, zeros)
        if operation is None:
            continue
        found.append(operation)
        taken.update(operation.nodes)
        if isinstance(operation, Rename) or (isinstance(operation, Pool) and operation.window):
            source = operation.inputs[0]
            if source in zeros:
                zeros[operation.output] = zeros[source]
        elif isinstance(operation, (Product, Sum, Pool)) and operation.output.dtype == INT8:
            zeros[operation.output] = operation.scale.zero
    return found


def _find(node: ir.Node, zeros: dict[ir.Value, int]) -> Operation | None:
    if node.op_type in ("ConvInteger", "MatMulInteger"):
        return _product(node)
    if node.op_type == "MaxPool" and node.inputs[0] is not None and node.inputs[0].dtype == INT8:
        return _maximum(node)
    if node.op_type in _PLAIN and node.inputs[0] is not None and node.inputs[0].dtype == INT8:
        return _rename(node)
    if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == INT8:
        return _sum(node, zeros) if node.outputs[0].dtype == INT64 else _mean(node, zeros)
    return None


def _zero_of_source(node: ir.Node) -> int | None:
    if node.op_type != "QuantizeLinear" or node.outputs[0].dtype != INT8:
        return None
    zero = edit.const_array(node.inputs[2]) if len(node.inputs) > 2 else np.int8(0)
    return None if zero is None or zero.size != 1 else int(zero.reshape(-1)[0])


# -- each kind ----------------------------------------------------------------------------------------


def _product(node: ir.Node) -> Operation | None:
    x, w = node.inputs[0], node.inputs[1]
    weights = edit.const_array(w)
    if x is None or x.dtype != INT8 or weights is None or weights.dtype != np.int8:
        return None
    zero = edit.const_array(node.inputs[2]) if len(node.inputs) > 2 else np.int8(0)
    if zero is None or zero.size != 1 or len(node.inputs) > 3:
        return None
    is_conv = node.op_type == "ConvInteger"
    if is_conv:
        window = _window(node)
        if window is None or weights.ndim != 4:
            return None
    else:
        if weights.ndim != 2:
            return None
        weights, window = weights.T[:, :, None, None], Window()
    groups = node.attributes.get_int("group", 1) if is_conv else 1
    name, out = node.outputs[0].name or node.op_type, weights.shape[0]
    value, nodes = node.outputs[0], [node]
    bias = np.zeros(out, np.int64)
    added = _only_use(value)
    if added is not None and added.op_type == "Add":
        held = _other_constant(added, value)
        if held is not None and held.size in (1, out):
            bias = np.broadcast_to(held.reshape(-1), out).astype(np.int64)
            value = added.outputs[0]
            nodes.append(added)
    tail = _tail(value)
    if tail is None:
        scale = Scale(bias, np.ones(out, np.int64), np.ones(out, np.int64))
        return Product(
            name, tuple(nodes), (x,), value, weights, scale, window, groups,
            int(zero.reshape(-1)[0]), is_conv, True,
        )  # fmt: skip
    multiplier, offset, shift = (np.broadcast_to(a.reshape(-1), out) for a in tail.numbers)
    rest = offset - (np.int64(1) << (shift - 1))
    zeros = rest >> shift
    if (rest != zeros << shift).any() or np.ptp(zeros) or not _fits(multiplier, shift):
        return None
    scale = Scale(bias, multiplier, shift, int(zeros[0]))
    return Product(
        name, (*nodes, *tail.nodes), (x,), tail.output, weights, scale, window, groups,
        int(zero.reshape(-1)[0]), is_conv, False,
    )  # fmt: skip


def _sum(cast: ir.Node, zeros: dict[ir.Value, int]) -> Operation | None:
    first = _only_use(cast.outputs[0])
    if first is None or first.op_type != "Mul":
        return None
    add = _only_use(first.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    terms, nodes = [], [add]
    for value in add.inputs:
        mul = value.producer() if value is not None else None
        if mul is None or mul.op_type != "Mul" or mul.inputs[0] is None:
            return None
        wide, factor = mul.inputs[0].producer(), edit.const_array(mul.inputs[1])
        if wide is None or wide.op_type != "Cast" or factor is None or factor.size != 1:
            return None
        source = wide.inputs[0]
        if source is None or source.dtype != INT8 or source not in zeros:
            return None
        terms.append((source, int(factor.reshape(-1)[0])))
        nodes += [mul, wide]
    tail = _tail(add.outputs[0], scaled=True)
    if tail is None or any(not 0 <= factor < 1 << 16 for _, factor in terms):
        return None
    _, offset, shift = (int(a.reshape(-1)[0]) for a in tail.numbers)
    extra = -sum(factor * zeros[source] for source, factor in terms)
    scale = _single(offset - extra, extra, 1, shift)
    if scale is None:
        return None
    return Sum(
        tail.output.name or "sum", (*nodes, *tail.nodes), tuple(v for v, _ in terms), tail.output,
        tuple(f for _, f in terms), scale,
    )  # fmt: skip


def _mean(cast: ir.Node, zeros: dict[ir.Value, int]) -> Operation | None:
    x, reduce = cast.inputs[0], _only_use(cast.outputs[0])
    if x is None or x not in zeros or reduce is None or reduce.op_type != "ReduceSum":
        return None
    axes, shape = edit.const_array(reduce.inputs[1]), x.shape
    if axes is None or shape is None or len(shape) != 4 or sorted(axes.tolist()) != [2, 3]:
        return None
    count = math.prod(dim for dim in list(shape)[2:] if isinstance(dim, int))
    tail = _tail(reduce.outputs[0])
    if tail is None or any(a.size != 1 for a in tail.numbers):
        return None
    multiplier, offset, shift = (int(a.reshape(-1)[0]) for a in tail.numbers)
    bias = -zeros[x] * count
    scale = _single(offset - bias * multiplier, bias, multiplier, shift)
    if scale is None:
        return None
    return Pool(
        tail.output.name or "mean", (cast, reduce, *tail.nodes), (x,), tail.output, None, scale,
        zeros[x],
    )  # fmt: skip


def _maximum(node: ir.Node) -> Operation | None:
    window, x = _window(node), node.inputs[0]
    if (
        window is None
        or x is None
        or len(node.outputs) != 1
        or node.attributes.get_int("ceil_mode", 0) != 0
    ):
        return None
    one = np.ones(1, np.int64)
    scale = Scale(np.zeros(1, np.int64), 2 * one, one)  # 2 / 2
    return Pool(node.outputs[0].name or "pool", (node,), (x,), node.outputs[0], window, scale, -128)


def _rename(node: ir.Node) -> Operation | None:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None or len(x.shape) != 4:
        return None
    if list(x.shape)[2:] != [1, 1] or len(y.shape) != 2 or y.shape[1] != x.shape[1]:
        return None
    return Rename(y.name or "flat", (node,), (x,), y)


# -- pieces -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Tail:
    """Multiplier, offset and shift, int64, of a requantization, its nodes and its int8 result."""

    numbers: tuple[Array, Array, Array]
    nodes: tuple[ir.Node, ...]
    output: ir.Value


def _tail(value: ir.Value, *, scaled: bool = False) -> _Tail | None:
    """What turns sums into int8; ``scaled``: they are int64 already and take no multiplier."""
    nodes: list[ir.Node] = []
    multiplier = np.ones(1, np.int64)
    if not scaled:
        cast = _only_use(value)
        if cast is None or cast.op_type != "Cast" or cast.outputs[0].dtype != INT64:
            return None
        mul = _only_use(cast.outputs[0])
        held = _other_constant(mul, cast.outputs[0]) if mul and mul.op_type == "Mul" else None
        if mul is None or held is None:
            return None
        multiplier, value = held, mul.outputs[0]
        nodes += [cast, mul]
    moved = _only_use(value)
    offset = _other_constant(moved, value) if moved and moved.op_type == "Add" else None
    if moved is None or offset is None:
        return None
    value = moved.outputs[0]
    by_type = {reader.op_type: reader for reader in value.consumers()}
    if set(by_type) != {"Mod", "Sub"} or value.is_graph_output():
        return None
    mod, sub = by_type["Mod"], by_type["Sub"]
    power = edit.const_array(mod.inputs[1])
    div = _only_use(sub.outputs[0])
    if power is None or div is None or div.op_type != "Div" or sub.inputs[1] is not mod.outputs[0]:
        return None
    if edit.const_array(div.inputs[1]) is None or mod.attributes.get_int("fmod", 0) != 0:
        return None
    clip = _only_use(div.outputs[0])
    if clip is None or clip.op_type != "Clip":
        return None
    ends = [edit.const_array(end) for end in clip.inputs[1:]]
    if [None if end is None else int(end) for end in ends] != [-128, 127]:
        return None
    final = _only_use(clip.outputs[0])
    if final is None or final.op_type != "Cast" or final.outputs[0].dtype != INT8:
        return None
    shift = np.log2(power.astype(np.float64)).astype(np.int64)
    if (np.int64(1) << shift != power).any() or (power != edit.const_array(div.inputs[1])).any():
        return None
    nodes += [moved, mod, sub, div, clip, final]
    return _Tail((multiplier, offset, shift), tuple(nodes), final.outputs[0])


def _single(rest: int, bias: int, multiplier: int, shift: int) -> Scale | None:
    """One setting for all channels, if ``rest`` is a rounding half and a zero point."""
    zero, left = divmod(rest - (1 << (shift - 1)), 1 << shift)
    made = np.array([multiplier]), np.array([shift])
    if left or not -128 <= zero <= 127 or not -(2**31) <= bias < 2**31 or not _fits(*made):
        return None
    return Scale(np.array([bias]), *made, zero)


def _fits(multiplier: Array, shift: Array) -> bool:
    return bool(((multiplier >= 0) & (multiplier < 1 << 16) & (shift >= 1) & (shift <= 46)).all())


def _window(node: ir.Node) -> Window | None:
    """Of two dims, with pads that are stated."""
    kernel = node.attributes.get_ints("kernel_shape", ())
    if len(kernel) != 2 or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    strides = node.attributes.get_ints("strides", (1, 1))
    dilations = node.attributes.get_ints("dilations", (1, 1))
    pads = node.attributes.get_ints("pads", (0, 0, 0, 0))
    return Window(*(tuple(map(int, a)) for a in (kernel, strides, dilations, pads)))  # type: ignore[arg-type]


def _only_use(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _other_constant(node: ir.Node, value: ir.Value) -> Array | None:
    """The constant that ``value`` meets in a node of two inputs."""
    others = [other for other in node.inputs if other is not value]
    return edit.const_array(others[0]) if len(others) == 1 else None
