"""QuantizeLinear and DequantizeLinear in the forms that older opsets lack, as arithmetic.

    y = (x - zero_point) * scale          x = saturate(round(y / scale) + zero_point)

Blocked scales (opset 21) repeat over groups along one axis; 16-bit integers come with 21, 8-bit
floats and 16-bit scales with 19. 4-bit and 2-bit tensors cannot be stored below 21 and 25:
constants of those types are stored as 8-bit integers of the same values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import edit, weights

from . import legal
from .builder import Builder, Gap

_NARROW = {
    ir.DataType.INT4: ir.DataType.INT8,
    ir.DataType.INT2: ir.DataType.INT8,
    ir.DataType.UINT4: ir.DataType.UINT8,
    ir.DataType.UINT2: ir.DataType.UINT8,
}
FLOAT = ir.DataType.FLOAT


def dequantize(b: Builder) -> list[ir.Value] | None:
    """DequantizeLinear."""
    x, scale, zero = b.need(0), b.need(1), b.input(2)
    if _fits(b):
        return None
    out = b.dtype(b.node.outputs[0])
    x = _storable(b, x)
    precise = FLOAT if b.dtype(scale) != ir.DataType.DOUBLE else ir.DataType.DOUBLE
    blocks = _Blocks(b, x, scale)
    difference = b.cast(blocks.split(x), precise)
    if zero is not None:
        shift = b.cast(blocks.spread(_storable(b, zero)), precise)
        difference = b("Sub", difference, shift)
    y = b("Mul", difference, b.cast(blocks.spread(scale), precise))
    return [b.cast(blocks.join(y), out)]


def quantize(b: Builder) -> list[ir.Value] | None:
    """QuantizeLinear to an integer type of 8 or 16 bits."""
    _say_type(b)
    x, scale, zero = b.need(0), b.need(1), b.input(2)
    if _fits(b):
        return None
    out = b.dtype(b.node.outputs[0])
    if out not in _RANGES:
        raise Gap(f"a tensor of {out.name.lower()} cannot exist at opset {b.opset}")
    low, high = _RANGES[out]
    blocks = _Blocks(b, x, scale)
    y = b("Div", b.cast(blocks.split(x), FLOAT), b.cast(blocks.spread(scale), FLOAT))
    y = b("Round", y)
    if zero is not None:
        y = b("Add", y, b.cast(blocks.spread(zero), FLOAT))
    y = b("Clip", y, b.const(low, FLOAT), b.const(high, FLOAT))
    return [b.cast(blocks.join(y), out)]


def _say_type(b: Builder) -> None:
    """Without output_dtype (opset 21) a zero point says what the codes are: 0 where there is none."""
    schema = legal.schema(b.node.op_type, b.opset)
    out, dims = b.dtype(b.node.outputs[0]), b.dims(b.need(1))
    told = schema is None or "output_dtype" in schema.attributes or b.input(2) is not None
    if told or out == ir.DataType.UINT8 or out not in _TYPED or b.attribute("block_size", 0):
        return
    static = [dim for dim in dims if isinstance(dim, int)]
    if len(static) == len(dims):
        b.node.resize_inputs(3)
        b.node.replace_input_with(2, b.const(np.zeros(static), out))


_TYPED = frozenset({ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})
_RANGES = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
}


def _fits(b: Builder) -> bool:
    """Whether the node, without attributes that say nothing, is legal as it stands."""
    plain = {"block_size": 0, "output_dtype": 0, "precision": 0, "saturate": 1}
    schema = legal.schema(b.node.op_type, b.opset)
    assert schema is not None  # both ops exist since opset 10
    first = b.dtype(b.need(1) if b.node.op_type == "DequantizeLinear" else b.node.outputs[0])
    for name, default in plain.items():
        if name not in b.node.attributes or name in schema.attributes:
            continue
        value = b.attribute(name)
        is_implied = name == "output_dtype" and value == int(first)
        if value != default and not is_implied and not _is_float32(b, name, value):
            return False
    if legal.wrong_types(b.node, schema):
        return False
    for name in plain:
        if name in b.node.attributes and name not in schema.attributes:
            del b.node.attributes[name]
    return True


def _is_float32(b: Builder, name: str, value: int) -> bool:
    """Division in float32 is what the older opsets do."""
    return name == "precision" and value == int(FLOAT) and b.dtype(b.need(0)) == FLOAT


def _storable(b: Builder, value: ir.Value) -> ir.Value:
    """``value`` in a type that the opset has: 4-bit and 2-bit constants become 8-bit ones."""
    wanted = _NARROW.get(b.dtype(value))
    cast = legal.schema("Cast", b.opset)
    assert cast is not None
    if legal.type_name(value) in legal.allowed(cast, cast.inputs[0]):
        return value
    tensor = value.const_value
    if wanted is None or tensor is None or value.is_graph_input():
        raise Gap(
            f"a tensor of {b.dtype(value).name.lower()} cannot exist at opset {b.opset}",
            "choose 8-bit weights, or a newer opset",
        )
    if b.is_function:
        raise Gap("a function cannot hold a widened constant")
    key = (id(b.graph), "widened", id(value))
    found = b.shared.results.get(key)
    if found is None or found.graph is None:  # its readers went, and it with them
        name = f"{value.name}/{wanted.name.lower()}"
        widened = weights.derived(
            tensor,
            lambda array: array.astype(wanted.numpy()),
            wanted,
            list(tensor.shape.numpy()),
            name,
        )
        b.shared.results[key] = edit.constant(b.graph, widened, name, b.shared.names)
    return b.shared.results[key]


class _Blocks:
    """How scales and zero points meet the data: one for all, one per index, or one per block."""

    def __init__(self, b: Builder, x: ir.Value, scale: ir.Value) -> None:
        self.b = b
        self.rank = b.rank(x)
        self.size = int(b.attribute("block_size", 0))
        self.axis = int(b.attribute("axis", 1)) % max(self.rank, 1)
        self.scale_rank = b.rank(scale)
        if not self.size:
            return
        length, rows = b.dims(x)[self.axis], b.dims(scale)[self.axis]
        if not isinstance(length, int) or not isinstance(rows, int) or length % self.size:
            raise Gap(f"a block size of {self.size} does not divide the axis of {length}")
        self.rows = rows

    def split(self, x: ir.Value) -> ir.Value:
        """[.., k, ..] -> [.., k/block, block, ..]."""
        if not self.size:
            return x
        keep = [0] * self.axis
        after = self._after(x)
        return self.b.reshape(x, [*keep, self.rows, self.size, *after])

    def _after(self, x: ir.Value) -> list[int]:
        """Literal dims behind the axis: at most one of them may be dynamic."""
        dims = self.b.dims(x)[self.axis + 1 :]
        self.tail = [dim if isinstance(dim, int) else -1 for dim in dims]
        if self.tail.count(-1) > 1:
            raise Gap("more than one dim behind the blocked axis is dynamic")
        return self.tail

    def spread(self, scale: ir.Value) -> ir.Value:
        """A scale or zero point in a shape that broadcasts over :meth:`split`'s result."""
        if self.size:
            return self.b.unsqueeze(scale, [self.axis + 1])
        if self.scale_rank == 0 or self.rank == 1 or self.b.dims(scale) == [1]:
            return scale
        axes = list(range(1, self.rank - self.axis))
        return self.b.unsqueeze(scale, axes) if axes else scale

    def join(self, y: ir.Value) -> ir.Value:
        """The inverse of :meth:`split`."""
        if not self.size:
            return y
        keep = [0] * self.axis
        return self.b.reshape(y, [*keep, self.rows * self.size, *self.tail])
