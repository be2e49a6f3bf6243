"""Operators that make values from shapes and scalars."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from netlathe.ir import dims
from netlathe.ir.dims import Dim
from netlathe.ir.shapes.elementwise import same_dtype
from netlathe.ir.types import MOST_CONTENTS, SHAPE_LIKE, Pin, Site, Type, exact_reals


def _shape(s: Site) -> list[Type]:
    shape = s.shape()
    if shape is None:
        return [Type(ir.DataType.INT64, (None,))]
    start, end = s.integer("start"), s.integer("end", len(shape))
    part = shape[start:end]
    s.remember(part)
    return [Type(ir.DataType.INT64, (len(part),))]


def _size(s: Site) -> list[Type]:
    shape = s.shape()
    s.remember((None if shape is None else dims.product(shape),))
    return [Type(ir.DataType.INT64, ())]


def _constant(s: Site) -> list[Type]:
    for name, attribute in s.node.attributes.items():
        if name == "value":
            tensor = attribute.as_tensor()
            return [_constant_type(s, tensor)]
        if name in ("value_int", "value_ints"):
            items = (attribute.as_int(),) if name == "value_int" else tuple(attribute.as_ints())
            s.remember(items)
            return [Type(ir.DataType.INT64, () if name == "value_int" else (len(items),))]
        if name in ("value_float", "value_floats"):
            floats = [attribute.as_float()] if name == "value_float" else attribute.as_floats()
            made = ir.tensor(np.array(floats, np.float32))
            type_ = _constant_type(s, made)
            return [type_ if name == "value_floats" else Type(type_.dtype, ())]
        if name in ("value_string", "value_strings"):
            count = () if name == "value_string" else (len(attribute.as_strings()),)
            return [Type(ir.DataType.STRING, count)]
    return []


def _constant_type(s: Site, tensor: ir.TensorProtocol) -> Type:
    """Type of a constant; its elements are remembered if they may be sizes."""
    if tensor.dtype in SHAPE_LIKE and len(tensor.shape) <= 1 and tensor.size <= MOST_CONTENTS:
        s.remember([int(item) for item in tensor.numpy().reshape(-1)])
    elif (reals := exact_reals(tensor)) is not None:
        s.found.reals[s.node.outputs[0]] = reals
    return Type(tensor.dtype, tuple(tensor.shape.numpy()))


def _target(s: Site, index: int) -> tuple[Dim, ...] | None:
    """A shape given as an input: its contents, or unknown dims of the right number."""
    contents = s.contents(index)
    if contents is not None:
        return contents
    shape = s.shape(index)
    if shape is not None and len(shape) == 1 and isinstance(shape[0], int):
        return (None,) * shape[0]
    return None


def _constant_of_shape(s: Site) -> list[Type]:
    value = s.node.attributes.get("value")
    dtype = ir.DataType.FLOAT if value is None else value.as_tensor().dtype
    shape = _target(s, 0)
    if shape is not None and len(shape) <= 1 and dtype in SHAPE_LIKE and value is not None:
        size = dims.product(shape)
        if isinstance(size, int) and size <= MOST_CONTENTS:
            s.remember((int(value.as_tensor().numpy().reshape(-1)[0]),) * size)
    return [Type(dtype, shape)]


def _range(s: Site) -> list[Type]:
    for index in range(3):
        shape = s.shape(index)
        if shape is not None and dims.same(dims.product(shape), 1) is False:
            s.fail("rank", f"{s.name(index)} is no scalar", *s.show(index))
    return [Type(same_dtype(s, range(3)), (_count(s),))]


def _count(s: Site) -> Dim:
    """ceil((limit - start) / delta), not below 0; the elements too, where they are few and known."""
    parts = [s.contents(index) for index in range(3)]
    if not all(parts):
        return _real_count(s)
    start, limit, delta = (part[0] for part in parts if part)
    if delta == 0:
        s.fail("range", "the step is 0")
    if isinstance(start, int) and isinstance(limit, int) and isinstance(delta, int):
        items = range(start, limit, delta)
        if len(items) <= MOST_CONTENTS:
            s.remember(items)
        return len(items)
    # A range of negative length is not asked for (see netlathe.ir.types).
    count = dims.ceil_divide(dims.subtract(limit, start), delta)
    return s.fresh() if count is None else count


def _real_count(s: Site) -> Dim:
    parts = [s.reals(index) for index in range(3)]
    numbers = [part[0] for part in parts if part and part[0] is not None and part[0].is_number]
    if len(numbers) != 3 or numbers[2] == 0:
        return s.fresh()
    # In double precision, as runtimes do: an exact quotient may lie on the other side of an integer.
    start, limit, delta = map(float, numbers)
    return max(0, math.ceil((limit - start) / delta))


def _expand(s: Site) -> list[Type]:
    shape, target = s.shape(), _target(s, 1)
    if shape is None or target is None:
        return [Type(s.dtype(), None)]
    result = dims.broadcast((shape, target))
    if result.clash is not None:
        clash = result.clash
        s.fail(
            "width",
            f"{s.name(0)} does not expand to {dims.show(target)} at axis -{clash.axis_from_right}: "
            f"{clash.a} and {clash.b}",
            *s.show(0),
            help="the target is stale: a width before it was changed",
        )
    for symbolic, width in result.pinned:
        s.found.pins.append(Pin(s.node, symbolic, width, "Expand broadcasts", True))
    contents, size = s.contents(0), dims.product(result.shape)
    if contents is not None and len(contents) == 1 and len(result.shape) <= 1:
        if isinstance(size, int) and size <= MOST_CONTENTS:
            s.remember(contents * size)
    return [Type(s.dtype(), result.shape)]


def _eye(s: Site) -> list[Type]:
    s.rank(0, 2)
    dtype = s.data_type("dtype") or s.dtype()
    return [Type(dtype, s.shape())]


def _random(s: Site) -> list[Type]:
    dtype = s.data_type("dtype") or ir.DataType.FLOAT
    return [Type(dtype, s.integers("shape"))]


def _random_like(s: Site) -> list[Type]:
    dtype = s.data_type("dtype") or s.dtype()
    return [Type(dtype, s.shape())]


def _multinomial(s: Site) -> list[Type]:
    shape = s.shape()
    s.rank(0, 2)
    batch = None if shape is None else shape[0]
    dtype = s.data_type("dtype") or ir.DataType.INT32
    return [Type(dtype, (batch, s.integer("sample_size", 1)))]


def _window(s: Site) -> list[Type]:
    size = s.contents(0)
    dtype = s.data_type("output_datatype") or ir.DataType.FLOAT
    return [Type(dtype, (size[0] if size else s.fresh(),))]


RULES = {
    "Shape": _shape,
    "Size": _size,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Expand": _expand,
    "EyeLike": _eye,
    "RandomNormal": _random,
    "RandomUniform": _random,
    "RandomNormalLike": _random_like,
    "RandomUniformLike": _random_like,
    "Multinomial": _multinomial,
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow"), _window),
}
