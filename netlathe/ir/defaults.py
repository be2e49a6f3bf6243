"""Writes out every optional attribute with its default, axes counted from the front.

Defaults come from the operators' schemas; those that depend on the inputs (a convolution's kernel
shape, attention's scale) are computed here, as the ONNX operator specification states them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir

from netlathe.ir.work import Work

OPSET = 25

# Attributes whose schema default is not the default of a particular node.
_NOT_FROM_SCHEMA = frozenset({("RNN", "activations")})
# New in Attention 25, where -1 means no window. Left out, a node without a window is also one of
# opset 24, for which ONNX Runtime has a kernel; 25 it expands by the definition in the standard.
_LEFT_OUT = frozenset({("Attention", "left_window_size"), ("Attention", "right_window_size")})

# operator -> its axis attributes; the axis counts over the dims of input 0, or one more for OneHot
_AXES: Mapping[str, tuple[str, ...]] = {
    **{name: ("axis",) for name in ("ArgMax", "ArgMin", "Compress", "Concat", "Flatten", "Gather")},
    **{name: ("axis",) for name in ("GatherElements", "Hardmax", "LayerNormalization")},
    **{name: ("axis",) for name in ("LogSoftmax", "LpNormalization", "OneHot", "RMSNormalization")},
    **{name: ("axis",) for name in ("ScatterElements", "Softmax", "Split", "TopK", "Unique")},
    **{name: ("axis",) for name in ("DequantizeLinear", "QuantizeLinear", "TensorScatter")},
    "Shape": ("start", "end"),
}


@cache
def from_schema(op_type: str) -> tuple[ir.Attr, ...]:
    """The attributes of an operator that its schema gives a default."""
    if not onnx.defs.has(op_type):
        return ()
    schema = onnx.defs.get_schema(op_type, OPSET, "")
    return tuple(
        ir.serde.deserialize_attribute(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type != onnx.AttributeProto.UNDEFINED
        and (op_type, name) not in _NOT_FROM_SCHEMA | _LEFT_OUT
    )


@cache
def num_required_outputs(op_type: str) -> int:
    """How many leading outputs an operator always has."""
    outputs = onnx.defs.get_schema(op_type, OPSET, "").outputs
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    count = len(outputs)
    while count > 1 and outputs[count - 1].option == optional:
        count -= 1
    return count


def complete(node: ir.Node, work: Work) -> None:
    """Write out what ``node`` leaves to its defaults."""
    for attribute in from_schema(node.op_type):
        if attribute.name not in node.attributes:
            work.set_attribute(node, attribute.name, attribute)
    if node.op_type in _COMPUTED:
        _COMPUTED[node.op_type](node, work)
    rank = work.rank(node.inputs[0]) if node.inputs else None
    if rank is not None:
        for name in _AXES.get(node.op_type, ()):
            axis = node.attributes.get_int(name)
            if axis is not None and axis < 0:
                axis += rank + (node.op_type == "OneHot")
                work.set_attribute(node, name, max(axis, 0))


# -- defaults that depend on the inputs -----------------------------------------------------------


def _transpose(node: ir.Node, work: Work) -> None:
    rank = work.rank(node.inputs[0])
    if "perm" not in node.attributes and rank is not None:
        work.set_attribute(node, "perm", list(range(rank))[::-1])


def _shape(node: ir.Node, work: Work) -> None:
    rank = work.rank(node.inputs[0])
    if rank is not None and node.attributes.get_int("end", rank + 1) > rank:
        work.set_attribute(node, "end", rank)


def _constant_of_shape(node: ir.Node, work: Work) -> None:
    if "value" not in node.attributes:
        zero = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.float32)))
        work.set_attribute(node, "value", zero)


def _attention(node: ir.Node, work: Work) -> None:
    """Scale is 1 / sqrt(head size); 3-D inputs hold the heads side by side."""
    shape = work.shape(node.inputs[0])
    if shape is None or "scale" in node.attributes:
        return
    heads = node.attributes.get_int("q_num_heads") if len(shape) == 3 else 1
    if isinstance(shape[-1], int) and heads:
        work.set_attribute(node, "scale", 1.0 / math.sqrt(shape[-1] // heads))


def _recurrent(node: ir.Node, work: Work) -> None:
    activations = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
    directions = 2 if node.attributes.get_string("direction") == "bidirectional" else 1
    if "activations" not in node.attributes:
        work.set_attribute(node, "activations", activations[node.op_type] * directions)
    recurrence = work.shape(node.inputs[2])  # [directions, gates * hidden, hidden]
    if "hidden_size" not in node.attributes and recurrence and isinstance(recurrence[-1], int):
        work.set_attribute(node, "hidden_size", recurrence[-1])


def _window(node: ir.Node, work: Work) -> None:
    """Convolutions and pools: kernel shape, strides, dilations, explicit pads.

    `auto_pad` SAME_UPPER / SAME_LOWER becomes pads where they do not depend on a dynamic size.
    """
    kernel = node.attributes.get_ints("kernel_shape")
    if kernel is None:
        weight = work.shape(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None:
            return
        kernel = tuple(dim for dim in weight[2:] if isinstance(dim, int))
        if len(kernel) != len(weight) - 2:
            return
        work.set_attribute(node, "kernel_shape", list(kernel))
    rank = len(kernel)
    for name in ("strides", "dilations"):
        if name not in node.attributes:
            work.set_attribute(node, name, [1] * rank)
    transposed = node.op_type == "ConvTranspose"
    if transposed and "output_padding" not in node.attributes:
        work.set_attribute(node, "output_padding", [0] * rank)
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    pads: list[int] | None = None
    if auto_pad == "VALID" or (auto_pad == "NOTSET" and "pads" not in node.attributes):
        pads = [0] * (2 * rank)
    elif auto_pad.startswith("SAME") and not transposed:
        pads = _same_pads(node, work, kernel, upper=auto_pad == "SAME_UPPER")
    if pads is not None and not (transposed and "output_shape" in node.attributes):
        work.set_attribute(node, "pads", pads)
        work.set_attribute(node, "auto_pad", "NOTSET")


def _same_pads(
    node: ir.Node, work: Work, kernel: Sequence[int], *, upper: bool
) -> list[int] | None:
    """Pads for an output of ceil(size / stride); None where a dynamic size decides them."""
    shape = work.shape(node.inputs[0])
    strides, dilations = node.attributes.get_ints("strides"), node.attributes.get_ints("dilations")
    if node.attributes.get_int("ceil_mode", 0) or strides is None or dilations is None:
        return None
    begins, ends = [], []
    for axis, (width, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        size = shape[axis + 2] if shape is not None else None
        extent = (width - 1) * dilation + 1
        if stride == 1:
            total = extent - 1
        elif isinstance(size, int):
            total = max(0, (-(-size // stride) - 1) * stride + extent - size)
        else:
            return None
        small, large = total // 2, total - total // 2
        begins.append(small if upper else large)
        ends.append(large if upper else small)
    return begins + ends


_COMPUTED: Mapping[str, Callable[[ir.Node, Work], None]] = {
    "Attention": _attention,
    "ConstantOfShape": _constant_of_shape,
    "Shape": _shape,
    "Transpose": _transpose,
    **{name: _recurrent for name in ("GRU", "LSTM", "RNN")},
    **{name: _window for name in ("AveragePool", "Conv", "ConvTranspose", "LpPool", "MaxPool")},
}
