"""Integer-only arithmetic: 8-bit values, 32-bit sums, and scales as a multiplier and a shift.

Weights are codes of 8 bits or less with scales above 0, in int8 tensors:

    acc = sum (x_q - x_zero) w_q + bias_q                     int32; bias_q = round(bias / (s_x s_w))
    y_q = clip(floor((acc m + 2^(n-1)) / 2^n) + y_zero)       m < 2^16, n chosen per channel

so m / 2^n is s_x s_w / s_y to 16 bits, and halves are rounded up (the fixed-point form of arXiv 1712.05877,
sec. 2.2, eq. 5-6, with a multiplier that a small hardware multiplier takes). In the graph:

    MatMulInteger | ConvInteger -> Add bias -> Cast to int64 -> Mul m -> Add 2^(n-1) + y_zero 2^n
        -> x - Mod(x, 2^n) -> Div 2^n -> Clip -> Cast to int8

What other operators do with such values: Add brings both to one scale in the same way, a mean over static
dims is a sum with another multiplier, Relu (and a Clip from 0) is the end of the range, and moves and MaxPool
take them as they are. Where an operator knows floats only, a value is dequantized: from the 32-bit sums, if
no integer operator reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import linear
from netlathe.ir import edit, provenance, weights

Array = npt.NDArray[Any]

MULTIPLIER_BITS = 16
LARGEST_SHIFT = 46  # 2^31 sums times 2^16 fit int64 with room for the zero point
_MOVES = frozenset(
    {"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
CREATED_BY = "quantize"


# -- numbers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """An int8 value q stands for (q - zero) scale."""

    scale: float  # a float32 number
    zero: int


def grid_of(low: float, high: float) -> Grid:
    """The grid over a range, widened to contain zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / 255)) or 1.0
    return Grid(scale, int(np.clip(np.rint(-low / scale) - 128, -128, 127)))


def multiplier_and_shift(ratio: Array) -> tuple[Array, Array]:
    """m and n, int64, with m / 2^n next to ``ratio`` > 0: m has 16 bits where n need not exceed its limit."""
    exponent = np.floor(np.log2(ratio)).astype(np.int64)
    shift = np.clip(MULTIPLIER_BITS - 1 - exponent, 1, LARGEST_SHIFT)
    multiplier = np.rint(ratio * np.exp2(shift)).astype(np.int64)
    full = multiplier == 1 << MULTIPLIER_BITS  # rounded up into the next power of two
    return np.where(full, multiplier >> 1, multiplier), np.where(full, shift - 1, shift)


def requantize(acc: Array, multiplier: Array, shift: Array, zero: int) -> Array:
    """int8 of int32 sums, by the formula above."""
    wide = acc.astype(np.int64) * multiplier + (np.int64(1) << (shift - 1))
    return np.clip((wide >> shift) + zero, -128, 127).astype(np.int8)


# -- what there is ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A product with a weight in integers; ``output`` is what it makes after its bias, Relu or Clip."""

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value
    absorbed: tuple[ir.Node, ...]  # the bias' Add and the Relu or Clip

    @property
    def input(self) -> ir.Value:
        """What the weight is multiplied with."""
        assert self.node.inputs[0] is not None
        return self.node.inputs[0]

    @property
    def is_conv(self) -> bool:
        """Whether channels are at axis 1."""
        return self.node.op_type == "Conv"

    def channels_last(self, vector: Array) -> Array:
        """A vector over output channels, shaped to meet the output."""
        if not self.is_conv or not vector.shape:
            return vector
        rank = len(self.weight.shape or ())
        return vector.reshape(-1, *[1] * (rank - 2))


@dataclass
class Plan:
    """The integer part of a graph, in order: layers, sums, means and moves, by the node."""

    layers: dict[ir.Node, Layer] = field(default_factory=dict)
    sums: dict[ir.Node, tuple[ir.Value, tuple[ir.Node, ...]]] = field(default_factory=dict)
    means: dict[ir.Node, int] = field(default_factory=dict)  # how many elements each is over
    moves: dict[ir.Node, None] = field(default_factory=dict)
    integer: dict[ir.Value, None] = field(default_factory=dict)  # values that stay int8

    def measured(self) -> list[ir.Value]:
        """Values whose ranges are needed: what is quantized, and what is requantized."""
        found = {layer.input: None for layer in self.layers.values()}
        found = {value: None for value in found if value not in self.integer}
        found |= {y.output: None for y in self.layers.values() if y.output in self.integer}
        found |= {output: None for output, _ in self.sums.values()}
        found |= {node.outputs[0]: None for node in self.means}
        return list(found)


def plan(model: ir.Model, names: Iterable[str]) -> Plan:
    """What runs in integers if the weights called ``names`` are symmetric, by channel or tensor."""
    wanted, made = set(names), Plan()
    for node in model.graph:
        layer = _layer(node, wanted)
        if layer is not None:
            made.layers[node] = layer
    possible = {layer.output for layer in made.layers.values()}
    absorbed = {node for layer in made.layers.values() for node in layer.absorbed}
    for node in model.graph:
        output = node.outputs[0]
        if node in absorbed or node in made.layers or node.domain:
            continue
        if node.op_type == "Add" and all(value in possible for value in node.inputs):
            final, relu = _through_relu(output)
            made.sums[node] = final, relu
            absorbed.update(relu)
            possible.add(final)
        elif node.inputs and node.inputs[0] in possible and (count := _averaged(node)):
            made.means[node] = count
            possible.add(output)
        elif node.op_type in _MOVES and node.inputs[0] in possible and len(node.outputs) == 1:
            made.moves[node] = None
            possible.add(output)
    readers = {*made.layers, *made.sums, *made.means, *made.moves}
    for value in possible:
        if any(node in readers for node, index in value.uses() if index == 0 or node in made.sums):
            made.integer[value] = None
    made.integer |= {final: None for final, _ in made.sums.values()}
    made.integer |= {node.outputs[0]: None for node in (*made.means, *made.moves)}
    return made


def _layer(node: ir.Node, names: set[str]) -> Layer | None:
    if node.op_type not in ("Conv", "MatMul") or node.domain:
        return None
    weight = node.inputs[1]
    if weight is None or weight.name not in names or len(weight.uses()) != 1:
        return None
    if weight.shape is None or (node.op_type == "MatMul" and len(weight.shape) != 2):
        return None
    output, absorbed = node.outputs[0], []
    if node.op_type == "Conv":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not weights.is_weight(bias):
            return None
    else:
        held = linear.bias_of(node, int(weight.shape.numpy()[1]))
        bias = None if held is None else held.value
        if held is not None:
            absorbed.append(held.node)
            output = held.node.outputs[0]
    final, relu = _through_relu(output)
    return Layer(node, weight, bias, final, (*absorbed, *relu))


def _through_relu(value: ir.Value) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    """What a Relu makes of ``value`` if nothing else reads it, and the Relu (or a Clip that starts at 0)."""
    uses = list(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        node = uses[0][0]
        if not node.domain and (node.op_type == "Relu" or _clips_from_zero(node)):
            return node.outputs[0], (node,)
    return value, ()


def _clips_from_zero(node: ir.Node) -> bool:
    """Whether the range of what comes out, which starts at 0 and is no wider, does what the node does."""
    if node.op_type != "Clip" or len(node.inputs) < 2:
        return False
    low = edit.const_array(node.inputs[1])
    high = edit.const_array(node.inputs[2]) if len(node.inputs) > 2 else np.float32(np.inf)
    return low is not None and float(low) == 0.0 and high is not None and float(high) > 0.0


def _averaged(node: ir.Node) -> int:
    """How many elements a mean is over, where that is fixed; 0 for any other node."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return 0
    if node.op_type == "GlobalAveragePool":
        dims = list(value.shape)[2:]
    elif node.op_type == "ReduceMean" and len(node.inputs) > 1:
        axes = edit.const_array(node.inputs[1])
        if axes is None:
            return 0
        dims = [value.shape[int(axis)] for axis in axes.reshape(-1)]
    else:
        return 0
    static = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(static) if len(static) == len(dims) else 0


def _moved(value: ir.Value, grids: Mapping[str, Grid]) -> str:
    """The name of what is moved to ``value`` and has a grid: all have it that were one integer value.

    Where some weights of the plan that was measured are left out, ``value`` may start such a part anew.
    """
    maker = value.producer()
    while value.name not in grids and maker is not None and maker.op_type in _MOVES:
        assert maker.inputs[0] is not None
        value = maker.inputs[0]
        maker = value.producer()
    return value.name or ""


# -- the edit -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A weight as codes of int8, all 8 bits of it or fewer, and its scales above 0: [channels] or one."""

    codes: ir.TensorProtocol
    scales: Array


class Rewriter:
    """Puts integer operators in the place of what a plan lists."""

    def __init__(
        self, model: ir.Model, plan_: Plan, grids: Mapping[str, Grid], held: Mapping[str, Held]
    ) -> None:
        self.graph, self.plan, self.held = model.graph, plan_, held
        self.taken = edit.names_in(model.graph)
        self.grids = {value: grids[_moved(value, grids)] for value in plan_.measured()}
        self.codes: dict[ir.Value, ir.Value] = {}  # float value -> its int8 form
        self.nodes: list[ir.Node] = []
        self.like: ir.Node | None = None

    def run(self) -> None:
        """Rewrite; the nodes that stood there are gone afterwards."""
        steps = {*self.plan.layers, *self.plan.sums, *self.plan.means, *self.plan.moves}
        last: list[ir.Node] = []
        for node in [node for node in self.graph if node in steps]:
            self.nodes, self.like = [], node
            if node in self.plan.layers:
                output = self._layer(self.plan.layers[node])
            elif node in self.plan.sums:
                output = self._sum(node)
            elif node in self.plan.means:
                output = self._mean(node)
            else:
                output = self._move(node)
            for made in self.nodes:
                provenance.mark(made, created_by=CREATED_BY, like=node)
            maker = output.producer()
            assert maker is not None
            self.graph.insert_before(node, self.nodes)
            last.append(maker)
            if output not in self.codes:
                continue
            integer_readers = steps | set(last)
            if output.is_graph_output() or any(
                r not in integer_readers for r in output.consumers()
            ):
                self._as_float(output, maker)
        edit.remove_dead(self.graph, list(reversed(last)))

    def _layer(self, layer: Layer) -> ir.Value:
        x, name = self._code(layer.input), layer.node.outputs[0].name or "product"
        grid = self.grids[layer.input]
        held = self.held[layer.weight.name or ""]
        codes = edit.constant(self.graph, held.codes, f"{layer.weight.name}_int8", self.taken)
        zero = self._constant(np.int8(grid.zero), f"{name}_zero_point")
        op_type = "ConvInteger" if layer.is_conv else "MatMulInteger"
        attributes = {n: a.value for n, a in layer.node.attributes.items()} if layer.is_conv else {}
        acc = self._make(op_type, [x, codes, zero], f"{name}_sums", **attributes)
        scales = held.scales.astype(np.float64).reshape(-1) if held.scales.shape else held.scales
        step = np.asarray(grid.scale * scales.astype(np.float64))
        if layer.bias is not None:
            bias = weights.array(layer.bias).astype(np.float64).reshape(-1)
            rounded = np.clip(np.rint(bias / step), -(2**31), 2**31 - 1).astype(np.int32)
            acc = self._make(
                "Add",
                [acc, self._constant(layer.channels_last(rounded), f"{name}_bias")],
                f"{name}_biased",
            )
        output = layer.output
        if output in self.plan.integer:
            to = self.grids[output]
            m, n = multiplier_and_shift(np.asarray(step / to.scale))
            shape = layer.channels_last
            self.codes[output] = self._requantized(acc, shape(m), shape(n), to.zero, 0, name)
            return output
        wide = self._cast(acc, ir.DataType.FLOAT, f"{name}_wide")
        by = self._constant(layer.channels_last(step.astype(np.float32)), f"{name}_step")
        result = self._make("Mul", [wide, by], f"{name}_value")
        if layer.absorbed and layer.absorbed[-1].op_type in ("Relu", "Clip"):
            last = layer.absorbed[-1]
            ends = list(last.inputs[1:])
            result = self._make(last.op_type, [result, *ends], f"{name}_{last.op_type.lower()}")
        self._instead(output, result)
        return output

    def _sum(self, node: ir.Node) -> ir.Value:
        output, _ = self.plan.sums[node]
        to, name = self.grids[output], output.name or "sum"
        grids = [self.grids[value] for value in node.inputs if value is not None]
        ratios = np.array([grid.scale / to.scale for grid in grids])
        _, shift = multiplier_and_shift(ratios.max())
        multipliers = np.rint(ratios * np.exp2(shift)).astype(np.int64)
        terms = []
        for value, m in zip(node.inputs, multipliers, strict=True):
            assert value is not None
            wide = self._cast(self._code(value), ir.DataType.INT64, f"{name}_wide")
            terms.append(self._make("Mul", [wide, self._constant(m, f"{name}_m")], f"{name}_term"))
        total = self._make("Add", terms, f"{name}_sums")
        extra = -int(sum(int(m) * g.zero for m, g in zip(multipliers, grids, strict=True)))
        self.codes[output] = self._shifted(total, shift, to.zero, extra, name)
        return output

    def _mean(self, node: ir.Node) -> ir.Value:
        output, value, count = node.outputs[0], node.inputs[0], self.plan.means[node]
        assert value is not None and value.shape is not None
        grid, to, name = self.grids[value], self.grids[output], output.name or "mean"
        wide = self._cast(self._code(value), ir.DataType.INT32, f"{name}_wide")
        axes = node.inputs[1] if node.op_type == "ReduceMean" else None
        if axes is None:
            axes = self._constant(np.arange(2, len(value.shape)), f"{name}_axes")
        keep = node.attributes.get_int("keepdims", 1)
        acc = self._make(
            "ReduceSum", [wide, axes], f"{name}_sums", keepdims=keep, noop_with_empty_axes=0
        )
        m, n = multiplier_and_shift(np.asarray(grid.scale / (to.scale * count)))
        self.codes[output] = self._requantized(acc, m, n, to.zero, -grid.zero * count, name)
        return output

    def _move(self, node: ir.Node) -> ir.Value:
        value, output = node.inputs[0], node.outputs[0]
        assert value is not None
        attributes = {name: a.value for name, a in node.attributes.items()}
        rest = list(node.inputs[1:])
        moved = self._make(
            node.op_type, [self._code(value), *rest], f"{output.name}_int8", **attributes
        )
        self.codes[output] = moved
        self.grids[output] = self.grids[value]
        return output

    # -- pieces -------------------------------------------------------------------------------------

    def _requantized(
        self, acc: ir.Value, multiplier: Array, shift: Array, zero: int, extra: int, name: str
    ) -> ir.Value:
        """``extra`` is added to the sums."""
        wide = self._cast(acc, ir.DataType.INT64, f"{name}_wide")
        by = self._constant(multiplier, f"{name}_multiplier")
        product = self._make("Mul", [wide, by], f"{name}_product")
        return self._shifted(product, shift, zero, extra * multiplier, name)

    def _shifted(self, x: ir.Value, shift: Array, zero: int, extra: Any, name: str) -> ir.Value:
        """clip(floor((x + extra + 2^(n-1)) / 2^n) + zero) as int8."""
        shift = np.asarray(shift, np.int64)
        half = np.int64(1) << (shift - 1)
        offset = self._constant(half + (np.int64(zero) << shift) + extra, f"{name}_offset")
        power = self._constant(np.int64(1) << shift, f"{name}_power")
        moved = self._make("Add", [x, offset], f"{name}_moved")
        rest = self._make("Mod", [moved, power], f"{name}_rest", fmod=0)
        whole = self._make("Sub", [moved, rest], f"{name}_whole")
        divided = self._make("Div", [whole, power], f"{name}_shifted")
        ends = [self._constant(np.int64(n), f"{name}_end") for n in (-128, 127)]
        clipped = self._make("Clip", [divided, *ends], f"{name}_clipped")
        return self._cast(clipped, ir.DataType.INT8, f"{name}_int8")

    def _code(self, value: ir.Value) -> ir.Value:
        """The int8 form of ``value``; made where it does not exist."""
        if value not in self.codes:
            grid, name = self.grids[value], value.name or "x"
            scale = self._constant(np.float32(grid.scale), f"{name}_scale")
            zero = self._constant(np.int8(grid.zero), f"{name}_zero_point")
            node = edit.node(
                "QuantizeLinear",
                [value, scale, zero],
                {"axis": 1, "block_size": 0, "output_dtype": 0, "precision": 0, "saturate": 1},
                name=edit.unique_name(self.graph, f"{name}_int8", self.taken),
            )
            self.nodes.append(node)
            self.codes[value] = node.outputs[0]
        return self.codes[value]

    def _as_float(self, output: ir.Value, maker: ir.Node) -> None:
        """Let what knows floats only read ``output`` as before."""
        grid, name = self.grids[output], output.name or "y"
        self.nodes = []
        scale = self._constant(np.float32(grid.scale), f"{name}_scale")
        zero = self._constant(np.int8(grid.zero), f"{name}_zero_point")
        result = self._make(
            "DequantizeLinear",
            [self.codes[output], scale, zero],
            f"{name}_float",
            axis=1,
            block_size=0,
            output_dtype=0,
        )
        for made in self.nodes:
            provenance.mark(made, created_by=CREATED_BY, like=maker)
        self.graph.insert_after(maker, self.nodes)
        inside = {*self.plan.layers, *self.plan.sums, *self.plan.means, *self.plan.moves}
        for reader, index in list(output.uses()):
            if reader not in inside and reader not in self.nodes:
                reader.replace_input_with(index, result)
        if output.is_graph_output():
            outputs = self.graph.outputs
            outputs[list(outputs).index(output)] = result
            output.name, result.name = None, name

    def _instead(self, output: ir.Value, result: ir.Value) -> None:
        """``result`` takes the place and the name of ``output``, whose readers are no integer ones."""
        self.graph.insert_before(_anchor(self.like), self.nodes)
        for made in self.nodes:
            provenance.mark(made, created_by=CREATED_BY, like=self.like)
        self.nodes = []
        name = output.name
        for reader, index in list(output.uses()):
            reader.replace_input_with(index, result)
        if output.is_graph_output():
            outputs = self.graph.outputs
            outputs[list(outputs).index(output)] = result
        output.name, result.name = None, name

    def _make(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any
    ) -> ir.Value:
        free = edit.unique_name(self.graph, name, self.taken)
        self.nodes.append(edit.node(op_type, inputs, attributes, name=free))
        return self.nodes[-1].outputs[0]

    def _cast(self, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
        return self._make("Cast", [value], name, to=to.value, saturate=1, round_mode="up")

    def _constant(self, array: Any, name: str) -> ir.Value:
        return edit.constant(self.graph, np.asarray(array), name, self.taken)


def _anchor(node: ir.Node | None) -> ir.Node:
    assert node is not None
    return node
