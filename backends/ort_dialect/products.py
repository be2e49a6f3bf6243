"""Products with a packed weight: MatMulNBits, with the bias that is added behind it."""

from __future__ import annotations

import onnx_ir as ir

from netlathe.analysis import linear
from netlathe.ir import edit

from .stored import CREATED_BY, Packed, Use, Weight

# Measured (ORT 1.32, AVX-512, one thread): with float32 inputs, codes of 2 and 8 bits run 6 to 30 times
# slower than a float32 product; ONNX Runtime has tuned kernels for 4 bits only.
_FAST_IN_FLOAT32 = frozenset({4})


def problem(weight: Weight, accuracy_level: int) -> str:
    """Why a product that reads ``weight`` is not written; empty if all are."""
    products = [use for use in weight.uses if use.node.op_type == "MatMul"]
    for use in products:
        x = use.node.inputs[0]
        if x is None or x.shape is None or len(x.shape) < 2:
            return "it is multiplied with a vector, or with something of unknown rank"
        if weight.bits == 8 and weight.group == weight.dims[weight.summed] and _is_rounded(x):
            return "what it is multiplied with has 8 bits already: MatMulIntegerToFloat takes both"
    if products and accuracy_level != 4 and weight.bits not in _FAST_IN_FLOAT32:
        return (
            f"{weight.bits} bits run slower than float32 in MatMulNBits at accuracy_level={accuracy_level};"
            " ONNX Runtime's optimizer may fuse them at level 4"
        )
    return ""


def _is_rounded(x: ir.Value) -> bool:
    """Whether ``x`` is dequantized from codes of 8 bits with one scale."""
    maker = x.producer()
    if maker is None or maker.op_type != "DequantizeLinear" or maker.domain:
        return False
    codes = maker.inputs[0]
    is_byte = codes is not None and codes.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
    return is_byte and not maker.attributes.get_int("block_size", 0)


def write(packed: Packed, accuracy_level: int) -> list[ir.Node]:
    """Put MatMulNBits in the place of every MatMul that reads the weight."""
    products = [use for use in packed.weight.uses if use.node.op_type == "MatMul"]
    return [_write(packed, use, accuracy_level) for use in products]


def _write(packed: Packed, use: Use, accuracy_level: int) -> ir.Node:
    product = use.node
    bias = linear.bias_of(product, packed.rows)
    inputs = [product.inputs[0], packed.codes, packed.scales, packed.zeros]
    last = product
    if bias is not None and bias.value.dtype == ir.DataType.FLOAT:
        inputs += [None, _vector(packed, bias.value, bias.node)]
        last = bias.node
    while inputs[-1] is None:
        inputs.pop()
    made = ir.node(
        "MatMulNBits",
        inputs,
        {
            "K": packed.length,
            "N": packed.rows,
            "bits": packed.weight.bits,
            "block_size": packed.weight.block,
            "accuracy_level": accuracy_level,
        },
        domain="com.microsoft",
    )
    output = last.outputs[0]
    made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
    made.outputs[0].name = f"{output.name}_nbits"
    edit.replace(last, [made], {output: made.outputs[0]}, CREATED_BY)
    return made


def _vector(packed: Packed, bias: ir.Value, node: ir.Node) -> ir.Value:
    """The bias with one dim, as the operator wants it."""
    assert bias.shape is not None
    if len(bias.shape) == 1:
        return bias
    flat = edit.const_array(bias)
    assert flat is not None
    return packed.constant(flat.reshape(-1), f"{bias.name}_flat")
