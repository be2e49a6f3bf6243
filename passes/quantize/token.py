"""Activations that get their scale when they are there, for matrix products: int8, one scale per token,

    s = max |x| / 127 along the last axis        q = round(x / s)
    y = (q w_q) s s_w                            q w_q in int32: MatMulInteger

or uint8, one scale and zero point per tensor: DynamicQuantizeLinear, and y = ((q - z) w_q) (s s_w).

A product of n terms is exact in int32 up to n = 2^31 / 127^2 = 133152 (2^31 / (255 * 127) = 66311 of uint8).
No calibration data is needed. A token of zeros has the smallest scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, provenance

Array = npt.NDArray[Any]
CREATED_BY = "quantize"
SMALLEST = np.float32(2.0**-120)  # 127 of it is a normal number
MOST_TERMS = 66311
_WHOLE: dict[str, Any] = {"keepdims": 0, "noop_with_empty_axes": 0}


def products(model: ir.Model, names: Iterable[str]) -> list[ir.Node]:
    """The products x W of the main graph with one of these weights, read by nothing else."""
    wanted = set(names)
    found = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        x, weight = node.inputs
        if weight is None or weight.name not in wanted or len(weight.uses()) != 1 or x is None:
            continue
        if x.dtype != ir.DataType.FLOAT or weight.shape is None or len(weight.shape) != 2:
            continue
        if int(weight.shape.numpy()[0]) <= MOST_TERMS:
            found.append(node)
    return found


class _Nodes:
    """Nodes that take the place of one product."""

    def __init__(self, graph: ir.Graph, taken: set[str]) -> None:
        self.graph, self.taken = graph, taken
        self.made: list[ir.Node] = []

    def __call__(self, op_type: str, *inputs: Any, name: str, **attributes: Any) -> ir.Value:
        """Add one; arrays and tensors among the inputs become constants."""
        values = [
            x if isinstance(x, ir.Value) else edit.constant(self.graph, x, f"{name}_by", self.taken)
            for x in inputs
        ]
        free = edit.unique_name(self.graph, name, self.taken)
        self.made.append(edit.node(op_type, values, attributes, name=free))
        return self.made[-1].outputs[0]

    def cast(self, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
        """Add a Cast."""
        return self("Cast", value, name=name, to=to.value, saturate=1, round_mode="up")

    def scales(self, scales: Array, name: str) -> ir.Value:
        """A weight's scales in float32, stored in the type that they have."""
        held = edit.constant(self.graph, scales, f"{name}_scales", self.taken)
        if held.dtype == ir.DataType.FLOAT:
            return held
        wide = self.cast(held, ir.DataType.FLOAT, f"{name}_scales_wide")
        self.made[-1].metadata_props[provenance.STORED] = "int8"
        return wide

    def extreme(self, op_type: str, value: ir.Value, name: str, axis: int = -1) -> ir.Value:
        """Add a reduction of the last axis, which stays."""
        axes = np.array([axis])
        return self(op_type, value, axes, name=name, keepdims=1, noop_with_empty_axes=0)


def rewrite(
    model: ir.Model,
    nodes: Iterable[ir.Node],
    held: Mapping[str, tuple[ir.TensorProtocol, Array]],
    per: str = "token",
) -> None:
    """Let products take 8-bit operands; ``held`` gives codes and scales by the weights' names.

    ``per`` is "token", or "tensor" for one scale and zero point for all.
    """
    graph, taken = model.graph, edit.names_in(model.graph)
    operands: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    if per == "tensor":
        _by_tensor(graph, nodes, held, taken)
        return
    for node in nodes:
        add = _Nodes(graph, taken)
        x, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None and weight is not None
        stem, name = x.name or "x", output.name or "y"
        if x not in operands:
            last = len(x.shape) - 1 if x.shape is not None else -1
            size = add("Abs", x, name=f"{stem}_size")
            most = add.extreme("ReduceMax", size, f"{stem}_most", last)
            step = add("Div", most, np.array(127, np.float32), name=f"{stem}_step")
            scale = add("Max", step, np.array(SMALLEST), name=f"{stem}_scale")
            units = add("Round", add("Div", x, scale, name=f"{stem}_units"), name=f"{stem}_rounded")
            operands[x] = add.cast(units, ir.DataType.INT8, f"{stem}_int8"), scale
        codes, scale = operands[x]
        tensor, scales = held[weight.name or ""]
        w = edit.constant(graph, tensor, f"{weight.name}_int8", taken)
        acc = add("MatMulInteger", codes, w, name=f"{name}_sums")
        wide = add.cast(acc, ir.DataType.FLOAT, f"{name}_wide")
        by_token = add("Mul", wide, scale, name=f"{name}_by_token")
        result = add("Mul", by_token, add.scales(scales, name), name=f"{name}_value")
        edit.replace(node, add.made, {output: result}, CREATED_BY)


def _by_tensor(
    graph: ir.Graph,
    nodes: Iterable[ir.Node],
    held: Mapping[str, tuple[ir.TensorProtocol, Array]],
    taken: set[str],
) -> None:
    """In the order of operators that ONNX Runtime fuses into DynamicQuantizeMatMul."""
    operands: dict[ir.Value, Sequence[ir.Value]] = {}
    for node in nodes:
        add = _Nodes(graph, taken)
        x, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None and weight is not None
        stem, name = x.name or "x", output.name or "y"
        if x not in operands:
            made = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            for value, what in zip(made.outputs, ("uint8", "scale", "zero_point"), strict=True):
                value.name = edit.unique_name(graph, f"{stem}_{what}", taken)
            add.made.append(made)
            operands[x] = made.outputs
        codes, scale, zero = operands[x]
        tensor, scales = held[weight.name or ""]
        w = edit.constant(graph, tensor, f"{weight.name}_int8", taken)
        acc = add("MatMulInteger", codes, w, zero, name=f"{name}_sums")
        wide = add.cast(acc, ir.DataType.FLOAT, f"{name}_wide")
        step = add("Mul", scale, scales.astype(np.float32), name=f"{name}_step")
        edit.replace(
            node, add.made, {output: add("Mul", wide, step, name=f"{name}_value")}, CREATED_BY
        )


def emulate(
    model: ir.Model,
    nodes: Iterable[ir.Node],
    held: Mapping[str, tuple[Array, Array]],
    per: str = "token",
) -> None:
    """What :func:`rewrite` must give, with sums in float64: the reference."""
    graph, taken = model.graph, edit.names_in(model.graph)
    if per == "tensor":
        _emulate_by_tensor(graph, nodes, held, taken)
        return
    for node in nodes:
        add = _Nodes(graph, taken)
        x, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None and weight is not None
        codes, scales = held[weight.name or ""]
        high, low = add.extreme("ReduceMax", x, "high"), add.extreme("ReduceMin", x, "low")
        most = add("Max", high, add("Neg", low, name="opposite"), name="most")
        share = add("Div", most, np.array(127, np.float32), name="share")
        s = add("Max", share, np.array(2.0**-120, np.float32), name="s")
        rounded = add("Round", add("Div", x, s, name="ratio"), name="rounded")
        ends = np.array(-127, np.float32), np.array(127, np.float32)
        q = add.cast(add("Clip", rounded, *ends, name="q"), ir.DataType.DOUBLE, "wide")
        sums = add("MatMul", q, codes.astype(np.float64), name="sums")
        y = add("Mul", add.cast(sums, ir.DataType.FLOAT, "single"), s, name="by_token")
        y = add("Mul", y, scales.astype(np.float32), name="value")
        edit.replace(node, add.made, {output: y}, CREATED_BY)


def _emulate_by_tensor(
    graph: ir.Graph,
    nodes: Iterable[ir.Node],
    held: Mapping[str, tuple[Array, Array]],
    taken: set[str],
) -> None:
    for node in nodes:
        add = _Nodes(graph, taken)
        x, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
        assert x is not None and weight is not None
        codes, scales = held[weight.name or ""]
        none, most = np.array(0, np.float32), np.array(255, np.float32)
        high = add("Max", add("ReduceMax", x, name="high", **_WHOLE), none, name="top")
        low = add("Min", add("ReduceMin", x, name="low", **_WHOLE), none, name="bottom")
        span = add("Sub", high, low, name="span")
        share = add("Div", span, most, name="share")
        one = np.array(1, np.float32)
        s = add("Where", add("Equal", share, none, name="flat"), one, share, name="s")
        opposite = add("Div", add("Neg", low, name="opposite"), s, name="offset")
        z = add("Round", add("Clip", opposite, none, most, name="near"), name="zero")
        nearest = add("Round", add("Div", x, s, name="ratio"), name="nearest")
        q = add("Clip", add("Add", nearest, z, name="moved"), none, most, name="q")
        units = add.cast(add("Sub", q, z, name="units"), ir.DataType.DOUBLE, "wide")
        sums = add("MatMul", units, codes.astype(np.float64), name="sums")
        step = add("Mul", s, scales.astype(np.float32), name="step")
        y = add("Mul", add.cast(sums, ir.DataType.FLOAT, "single"), step, name="value")
        edit.replace(node, add.made, {output: y}, CREATED_BY)
