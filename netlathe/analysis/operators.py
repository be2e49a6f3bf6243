"""What operators do to a stream of activations, as far as finding residual branches needs it."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.ir import weights
from netlathe.ir.edit import const_array
from netlathe.ir.shapes import elementwise

TELL_SIZES = frozenset({"Shape", "Size"})  # they read no element
# One operand in, the same elements out.
RESHAPES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# Elements are moved, repeated or left out, not computed.
MOVEMENT = RESHAPES | {
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "GatherND",
    "ScatterElements",
    "ScatterND",
    "Slice",
    "Split",
    "TensorScatter",
    "Tile",
}
# Softmax and its like mix channels; they count as elementwise where only a stream's axes matter.
ELEMENTWISE = frozenset(elementwise.RULES)
NORMS = frozenset({"GroupNormalization", "LayerNormalization", "RMSNormalization"})
ATTENTION = frozenset(
    {"Attention", "GroupQueryAttention", "LinearAttention", "MultiHeadAttention", "PagedAttention"}
)
PRODUCTS = frozenset(
    {"Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits", "QLinearMatMul"}
)
CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "ConvTranspose", "DeformConv", "QLinearConv"})
# Their channels are at axis 1.
CHANNELS_FIRST = CONVOLUTIONS | {
    "AveragePool",
    "BatchNormalization",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GroupNormalization",
    "InstanceNormalization",
    "MaxPool",
}
POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"})
# They mix positions by other means than products and pools.
SEQUENTIAL = frozenset(
    {"CausalConvWithState", "DFT", "GRU", "If", "LSTM", "Loop", "RNN", "STFT", "Scan"}
)
WORKING = ATTENTION | PRODUCTS | CONVOLUTIONS | POOLS | SEQUENTIAL
# What may stand between a stored weight and the product that contracts with it.
_FROM_STORE = MOVEMENT | {"DequantizeLinear", "Mul"}


def has_weight(node: ir.Node) -> bool:
    """Whether a product or convolution contracts with a stored matrix, looked up or dequantized."""
    return any(_stored(value) for value in node.inputs)


def _stored(value: ir.Value | None) -> bool:
    while value is not None:
        if weights.is_weight(value):
            tensor = value.const_value
            return tensor is not None and len(tensor.shape) >= 2
        maker = value.producer()
        if maker is None or maker.op_type not in _FROM_STORE:
            return False
        value = maker.inputs[0]
    return False


def is_scaling(node: ir.Node) -> bool:
    """Whether a node multiplies or divides its first input by one number."""
    if node.op_type not in ("Div", "Mul") or len(node.inputs) != 2:
        return False
    factor = node.inputs[1]
    array = const_array(factor) if factor is not None and _size(factor) == 1 else None
    return array is not None


def _size(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else 0
