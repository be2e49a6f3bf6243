"""What an Attention node lets its queries see, and the cache of codes it reads, recognized in the graph.

A causal language model brings its mask along as a tensor: ``arange(keys) <= arange(queries) + past`` and a
flag for each key. Kernels that know what it means need not read it, and leave out what it hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from netlathe.backends.tvm.kernels.attention import Plain
from netlathe.backends.tvm.ops.op import D, Op
from netlathe.backends.tvm.values import Ready
from netlathe.ir import dims
from netlathe.ir.dims import Dim, Shape

_SEE_THROUGH = ("Unsqueeze", "Reshape", "Identity")


def plain(op: Op, scores: Shape, past: Dim) -> Plain | None:
    """What the node lets its queries see: of ``scores`` [b, h, s, t]; None where windows do, or a short mask.

    Of a mask that is a conjunction, causal and a flag for each key are known as such, and at most one part
    that is neither is read; of several such parts the whole is.
    """
    batch, _, queries, keys = scores
    right = op.integer("right_window_size", -1)
    causal = bool(op.integer("is_causal")) or right == 0
    if op.integer("left_window_size", -1) >= 0 or (right > 0 and not causal):
        return None
    lengths = op.low.force(op.operand(6)) if op.has(6) else None
    whole = Plain(causal, past, lengths)
    if not op.has(3):
        return whole
    mask = op.node.inputs[3]
    assert mask is not None
    flags: ir.Value | None = None
    other: ir.Value | None = None
    for part in _conjunction(mask):
        offset = _causal(op, part, queries, keys)
        agrees = lengths is None and (not causal or dims.same(offset, past) is True)
        if offset is not None and agrees:
            causal, past = True, offset
        elif flags is None and _is_flags(op, part, batch, keys):
            flags = part
        elif other is None:
            other = part
        else:
            read = _read(op, mask, scores)
            return None if read is None else replace(whole, mask=read)
    read = None if other is None else _read(op, other, scores)
    if other is not None and read is None:
        return None
    allowed = None if flags is None else op.low.force(op.low.value(flags)).viewed((batch, keys))
    return Plain(causal, past, lengths, allowed, read)


def _read(op: Op, mask: ir.Value | None, scores: Shape) -> Ready | None:
    """A mask in memory, with as many axes as scores; None if it does not surely have all keys."""
    assert mask is not None
    shape = op.low.found.type(mask).shape
    if shape is None or len(shape) > 4:
        return None
    shape = (*(1,) * (4 - len(shape)), *shape)
    alike = [dims.same(own, size) is True for own, size in zip(shape, scores, strict=True)]
    if not alike[3] or not all(a or own == 1 for a, own in zip(alike, shape, strict=True)):
        return None
    node = _producer(mask)
    if node is not None and node.op_type == "Expand":  # kernels do that as they read it
        read = _read(op, node.inputs[0], scores)
        if read is not None:
            return read
    return op.low.force(op.low.value(mask)).viewed(shape)


def coded(op: Op) -> tuple[Ready, ...] | None:
    """Codes of keys and of values, then their scales, then zero points: of a cache in int8 or int4.

    There is a scale for each vector, and a zero point with int4. That is how
    :class:`netlathe.passes.quantize_cache.QuantizeCache` leaves it, in float32 or converted.
    """
    keys, values = (_stored(op, value) for value in op.node.inputs[1:3])
    if keys is None or values is None or [v.dtype for v in keys] != [v.dtype for v in values]:
        return None
    pairs = zip(keys, values, strict=True)
    return tuple(op.low.together([op.low.value(value) for pair in pairs for value in pair]))


def _stored(op: Op, value: ir.Value | None) -> list[ir.Value] | None:
    """What the cache holds instead of a value: its codes, scales and, of int4, zero points."""
    assert value is not None
    node = _producer(value)
    if node is not None and node.op_type == "Cast":
        node = _producer(node.inputs[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes, scale, *zero = (v for v in node.inputs if v is not None)
    shape = op.low.found.type(codes).shape
    axis, size = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if shape is None or len(shape) != 4 or axis not in (3, -1) or size != shape[3]:
        return None
    cast = _producer(scale)
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
        scale = cast.inputs[0]
    if scale.dtype not in (D.FLOAT, D.FLOAT16):
        return None
    if codes.dtype == D.INT8 and not zero:
        return [codes, scale]
    packed = halves(codes)
    return None if packed is None or not zero else [packed, scale, *zero]


def halves(codes: ir.Value) -> ir.Value | None:
    """The bytes whose lower halves, and then, along the last axis of four, their upper ones are ``codes``."""
    join = _producer(codes)
    if join is None or join.op_type != "Concat" or len(join.inputs) != 2:
        return None
    if join.attributes.get_int("axis", 0) not in (3, -1) or codes.dtype != D.UINT8:
        return None
    low, high = (_producer(value) for value in join.inputs)
    if low is None or high is None or (low.op_type, high.op_type) != ("BitwiseAnd", "BitShift"):
        return None
    way = high.attributes.get_string("direction")
    numbers = [_constant(node.inputs[1]) for node in (low, high)]
    same = low.inputs[0] is high.inputs[0]
    return low.inputs[0] if same and way == "RIGHT" and numbers == [15, 4] else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _constant(value: ir.Value | None) -> int | None:
    """A whole number of the graph's constants."""
    held = None if value is None else value.const_value
    return int(held.numpy().item()) if held is not None and held.size == 1 else None


def _conjunction(mask: ir.Value) -> Iterator[ir.Value]:
    node = mask.producer()
    if node is None or node.op_type != "And":
        yield mask
        return
    for value in node.inputs:
        assert value is not None
        yield from _conjunction(value)


def _is_flags(op: Op, value: ir.Value, batch: Dim, keys: Dim) -> bool:
    """Whether a mask has one flag for each key of a sequence."""
    found = op.low.found.type(value)
    shape = found.shape
    if found.dtype != D.BOOL or shape is None or len(shape) != 4 or shape[1:3] != (1, 1):
        return False
    return dims.same(shape[0], batch) is True and dims.same(shape[3], keys) is True


def _causal(op: Op, value: ir.Value, queries: Dim, keys: Dim) -> Dim | None:
    """The offset, if this is key j <= query i + offset."""
    node = value.producer()
    if node is None or node.op_type not in ("LessOrEqual", "GreaterOrEqual"):
        return None
    left, right = node.inputs if node.op_type == "LessOrEqual" else reversed(node.inputs)
    assert left is not None and right is not None
    if not _is_along(op, left, keys, 1) or not _is_along(op, right, queries, 2):
        return None
    first, second = _start(op, left), _start(op, right)
    return None if first is None or second is None else dims.subtract(second, first)


def _is_along(op: Op, value: ir.Value, size: Dim, axis: int) -> bool:
    """Whether a value has ``size`` elements, along the axis that is ``axis``-last."""
    shape: Shape | None = op.low.found.type(value).shape
    if shape is None or len(shape) < axis or dims.same(shape[-axis], size) is not True:
        return False
    return all(dim == 1 for at, dim in enumerate(shape) if at != len(shape) - axis)


def _start(op: Op, value: ir.Value) -> Dim | None:
    """The first of numbers that go up by one."""
    node = value.producer()
    while node is not None and node.op_type in _SEE_THROUGH:
        value = node.inputs[0]  # type: ignore[assignment]  # these have one
        node = value.producer()
    if node is None:
        return None
    if node.op_type == "Add":
        for one, other in (node.inputs, reversed(node.inputs)):
            assert one is not None and other is not None
            start, added = _start(op, one), _number(op, other)
            if start is not None and added is not None:
                return dims.add(start, added)
        return None
    if node.op_type != "Range" or _number(op, node.inputs[2]) != 1:
        return None
    return _number(op, node.inputs[0])


def _number(op: Op, value: ir.Value | None) -> Dim | None:
    """The single element of a value, if it is known."""
    found = op.low.found.contents(value)
    if found is None or len(found) != 1 or found[0] is None or not op.low.is_bound(found[0]):
        return None
    return found[0]
