"""What integer-only arithmetic must give, in floating point: every number here is an integer or exact.

A value of 8 bits is held as (q - zero), a float. Sums are taken in float64, which holds products of 2^31 and
2^16 with all their digits, so a shift is a division by a power of two and floor does the rounding.
Convolutions, which ONNX Runtime has in float32 only, take their weights as 16 h + l with h and l below 16 in
magnitude: sums then stay below 2^24, up to 4000 products of 255 and 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit
from netlathe.passes.quantize.integer import Layer, Plan

Array = npt.NDArray[Any]
DOUBLE, FLOAT = ir.DataType.DOUBLE, ir.DataType.FLOAT


class Emulator:
    """Rewrites what a plan lists; ``grids`` gives (scale, zero), ``held`` codes and scales of weights."""

    def __init__(
        self,
        model: ir.Model,
        plan: Plan,
        grids: Mapping[str, tuple[float, int]],
        held: Mapping[str, tuple[Array, Array]],
    ) -> None:
        self.graph, self.plan, self.held = model.graph, plan, held
        self.grids = {value: grids[value.name or ""] for value in plan.measured()}
        self.taken = edit.names_in(model.graph)
        self.units: dict[ir.Value, ir.Value] = {}
        self.nodes: list[ir.Node] = []

    def run(self) -> None:
        """Rewrite, in order."""
        steps = {*self.plan.layers, *self.plan.sums, *self.plan.means, *self.plan.moves}
        for node in [node for node in self.graph if node in steps]:
            self.nodes = []
            if node in self.plan.layers:
                output = self._layer(self.plan.layers[node])
            elif node in self.plan.sums:
                output = self._sum(node)
            elif node in self.plan.means:
                output = self._mean(node)
            else:
                output = self._move(node)
            floats = output
            if output in self.units:
                scale, _ = self.grids[output]
                floats = self("Mul", self.units[output], np.float32(scale))
            else:
                floats = self.nodes[-1].outputs[0]
            self.graph.insert_before(node, self.nodes)
            for reader, index in list(output.uses()):
                if reader not in steps and reader not in self.nodes:
                    reader.replace_input_with(index, floats)
            if output.is_graph_output():
                self.graph.outputs[list(self.graph.outputs).index(output)] = floats
                name, output.name = output.name, None
                floats.name = name
        edit.remove_dead(self.graph)

    def _layer(self, layer: Layer) -> ir.Value:
        u, (codes, scales) = self._units(layer.input), self.held[layer.weight.name or ""]
        scale, _ = self.grids[layer.input]
        step = scale * scales.astype(np.float64).reshape(-1)
        if layer.is_conv:
            attributes = {n: a.value for n, a in layer.node.attributes.items()}
            high = np.rint(codes / 16).astype(np.float32)
            low = (codes - 16 * high).astype(np.float32)
            parts = [self("Conv", u, part, **attributes) for part in (high, low)]
            wide = [self._cast(part, DOUBLE) for part in parts]
            acc = self("Add", self("Mul", wide[0], np.float64(16)), wide[1])
        else:
            acc = self("MatMul", self._cast(u, DOUBLE), codes.astype(np.float64))
        shape = (-1, *[1] * (codes.ndim - 2)) if layer.is_conv else (-1,)
        if layer.bias is not None and layer.bias.const_value is not None:
            bias = np.around(layer.bias.const_value.numpy().astype(np.float64).reshape(-1) / step)
            acc = self("Add", acc, bias.reshape(shape))
        output = layer.output
        if output in self.plan.integer:
            to, zero = self.grids[output]
            self.units[output] = self._rounded(acc, (step / to).reshape(shape), zero)
            return output
        value = self("Mul", self._cast(acc, FLOAT), step.astype(np.float32).reshape(shape))
        for node in layer.absorbed:
            if node.op_type in ("Relu", "Clip"):
                self(node.op_type, value, *node.inputs[1:])
        return output

    def _sum(self, node: ir.Node) -> ir.Value:
        output, _ = self.plan.sums[node]
        to, zero = self.grids[output]
        ratios = np.array([self.grids[v][0] / to for v in node.inputs if v is not None])
        power = _power(ratios.max())
        terms = []
        for value, m in zip(node.inputs, np.around(ratios * power), strict=True):
            assert value is not None
            terms.append(self("Mul", self._cast(self._units(value), DOUBLE), np.float64(m)))
        self.units[output] = self._floored(self("Add", *terms), power, zero)
        return output

    def _mean(self, node: ir.Node) -> ir.Value:
        output, value = node.outputs[0], node.inputs[0]
        assert value is not None and value.shape is not None
        (scale, _), (to, zero) = self.grids[value], self.grids[output]
        axes: Any = (
            node.inputs[1] if node.op_type == "ReduceMean" else np.arange(2, len(value.shape))
        )
        keep = node.attributes.get_int("keepdims", 1)
        acc = self(
            "ReduceSum", self._cast(self._units(value), DOUBLE), axes, keepdims=keep,
            noop_with_empty_axes=0,
        )  # fmt: skip
        ratio = np.array(scale / (to * self.plan.means[node]))
        self.units[output] = self._rounded(acc, ratio, zero)
        return output

    def _move(self, node: ir.Node) -> ir.Value:
        value, output = node.inputs[0], node.outputs[0]
        assert value is not None
        attributes = {name: a.value for name, a in node.attributes.items()}
        self.units[output] = self(node.op_type, self._units(value), *node.inputs[1:], **attributes)
        self.grids[output] = self.grids[value]
        return output

    # -- pieces -------------------------------------------------------------------------------------

    def _rounded(self, acc: ir.Value, ratio: Array, zero: int) -> ir.Value:
        """(q - zero) of float64 sums times ``ratio``, which has 16 bits."""
        power = _power(ratio)
        multiplier = np.around(ratio * power)
        return self._floored(self("Mul", acc, multiplier), power, zero)

    def _floored(self, x: ir.Value, power: Array, zero: int) -> ir.Value:
        halves = self("Add", self("Mul", x, 1 / power), np.float64(0.5))
        ends = np.float64(-128 - zero), np.float64(127 - zero)
        clipped = self("Clip", self("Floor", halves), *ends)
        return self._cast(clipped, FLOAT)

    def _units(self, value: ir.Value) -> ir.Value:
        if value not in self.units:
            scale, zero = self.grids[value]
            nearest = self("Round", self("Div", value, np.float32(scale)))
            ends = np.float32(-128 - zero), np.float32(127 - zero)
            self.units[value] = self("Clip", nearest, *ends)
        return self.units[value]

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        return self("Cast", value, to=to.value, saturate=1, round_mode="up")

    def __call__(self, op_type: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """Add a node; arrays among the inputs become constants."""
        held = [
            x
            if x is None or isinstance(x, ir.Value)
            else edit.constant(self.graph, np.asarray(x), "emulated", self.taken)
            for x in inputs
        ]
        name = edit.unique_name(self.graph, "emulated", self.taken)
        self.nodes.append(edit.node(op_type, held, attributes, name=name))
        return self.nodes[-1].outputs[0]


def _power(ratio: Array) -> Array:
    """2^n for which ``ratio`` 2^n has 16 digits before the point: n from 1 to 46."""
    mantissa, exponent = np.frexp(ratio)  # ratio = mantissa 2^exponent, mantissa in [0.5, 1)
    n = np.where(np.around(mantissa * 2.0**16) == 2.0**16, 15, 16) - exponent
    return np.asarray(np.exp2(np.clip(n, 1, 46).astype(np.float64)))
