"""Constants as an artifact holds them: which type, packed how.

Lowering says for every parameter how it is made (:class:`Recipe`) and reads no weight itself. So the
process that compiles needs no weights, and the one that writes them needs no TVM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.tvm import toom_cook

Array = npt.NDArray[Any]
D = ir.DataType

PLAIN: Mapping[D, str] = {
    D.FLOAT: "float32",
    D.DOUBLE: "float64",
    D.FLOAT16: "float16",
    D.INT8: "int8",
    D.INT16: "int16",
    D.INT32: "int32",
    D.INT64: "int64",
    D.UINT8: "uint8",
    D.UINT16: "uint16",
    D.UINT32: "uint32",
    D.UINT64: "uint64",
    D.BOOL: "bool",
}
BITS: Mapping[D, str] = {
    D.BFLOAT16: "uint16",
    D.FLOAT8E4M3FN: "uint8",
    D.FLOAT8E4M3FNUZ: "uint8",
    D.FLOAT8E5M2: "uint8",
    D.FLOAT8E5M2FNUZ: "uint8",
    D.FLOAT4E2M1: "uint8",
}
PACKED: Mapping[D, str] = {D.INT4: "int8", D.UINT4: "uint8", D.INT2: "int8", D.UINT2: "uint8"}

STORED: Mapping[D, str] = {**PLAIN, **BITS, **PACKED}


def array(tensor: ir.TensorProtocol) -> Array:
    """A constant as it lies in memory."""
    values = np.require(tensor.numpy(), requirements="C")  # 0-D stays 0-D
    if tensor.dtype in BITS:
        return values.view(BITS[tensor.dtype])
    if tensor.dtype in PACKED:
        return values.astype(PACKED[tensor.dtype])
    return values.astype(STORED[tensor.dtype], copy=False)


@dataclass(frozen=True)
class Recipe:
    """How a parameter is made: a function of this module, the constants it reads, and numbers."""

    function: Callable[..., Array]
    sources: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()

    def make(self, constants: Mapping[str, ir.TensorProtocol]) -> Array:
        """The array, read or packed now."""
        return self.function(*(constants[name] for name in self.sources), *self.numbers)


@dataclass(frozen=True)
class Parameter:
    """A constant that the kernels read; ``recipe`` makes it when the artifact is written."""

    name: str
    dtype: str  # as stored
    shape: tuple[int, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Built:
    """What a library needs beside it, how many kernels it has, and what it writes in place.

    ``in_place`` are names: an output that is the tensor of an input, and that input.
    """

    parameters: tuple[Parameter, ...]
    kernels: int
    in_place: tuple[tuple[str, str], ...]


def constants(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The constants of the main graph by name."""
    found = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.name is not None:
            found[value.name] = value.const_value
    for node in model.graph:
        for output in node.outputs:
            if output.const_value is not None and output.name is not None:
                found[output.name] = output.const_value
    return found


def records(values: Iterable[ir.Value]) -> list[dict[str, Any]]:
    """Inputs or outputs as ``meta.json`` describes them."""
    found = []
    for value in values:
        assert value.dtype is not None
        shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
        found.append(
            {
                "name": value.name,
                "dtype": value.dtype.numpy().name,
                "stored": STORED[value.dtype],
                "shape": shape,
            }
        )
    return found


# -- recipes ---------------------------------------------------------------------------------------


def as_it_is(tensor: ir.TensorProtocol) -> Array:
    """The constant itself."""
    return array(tensor)


def empty() -> Array:
    """No elements."""
    return np.zeros(0, np.int64)


def panels(tensor: ir.TensorProtocol, count: int, width: int) -> Array:
    """[K, N] as [count, K, width], zero beyond N."""
    return _panels(array(tensor), count, width)


def word_panels(tensor: ir.TensorProtocol, count: int, width: int, bits: int, offset: int) -> Array:
    """[K, N] of numbers of 4 or 8 bits, with ``offset`` added, as [count, K * bits / 32, width] words.

    Of 8 bits, row 4 i + j is byte j of word i. Of 4 bits, row 8 i + j is the low half of byte j, row
    8 i + 4 + j the high one.
    """
    mask = (1 << bits) - 1
    values = _panels((array(tensor).view(np.uint8) + np.uint8(offset)) & mask, count, width)
    parts = values.reshape(count, -1, 32 // bits, width)
    words = np.zeros(parts[:, :, 0].shape, np.uint32)
    for place in range(32 // bits):
        words |= parts[:, :, place].astype(np.uint32) << np.uint32(8 * (place % 4) + place // 4 * 4)
    return words.view(np.int32)


def scales(tensor: ir.TensorProtocol, axis: int, block: int, count: int, width: int) -> Array:
    """Scales or zero points of a quantized [K, N] as float32 [count, blocks, width].

    They are one number, one for each row (``axis`` 0) or column, or one for every ``block`` rows or columns.
    """
    values = tensor.numpy().astype(np.float32)
    if values.size == 1:
        values = np.full((1, count * width), values.reshape(-1)[0], np.float32)
    elif values.ndim == 1:
        values = values.reshape(-1, 1) if axis == 0 else values.reshape(1, -1)
    elif axis == 1:
        values = np.repeat(values, block, 1)[:, : count * width]
    if values.shape[1] == 1:
        values = np.broadcast_to(values, (values.shape[0], count * width))
    return _panels(values, count, width)


def window_panels(tensor: ir.TensorProtocol, groups: int, count: int, width: int) -> Array:
    """A kernel [groups * outputs, inputs, *taps] as [groups, count, taps * inputs, width]."""
    return np.stack([_panels(matrix, count, width) for matrix in _by_group(tensor, groups)])


def winograd_panels(tensor: ir.TensorProtocol, m: int, count: int, width: int) -> Array:
    """A kernel [outputs, inputs, 3, 3], transformed for tiles of m x m, as [count, positions, inputs, width].

    Of each pair of channels it is G g G^T (:mod:`netlathe.backends.tvm.toom_cook`), in float64, then rounded.
    """
    matrix = toom_cook.taps_matrix(m)
    values = array(tensor).astype(np.float64)
    moved = np.einsum("ia,ocab,jb->ijco", matrix, values, matrix, optimize=True).astype(np.float32)
    parts = [_panels(each, count, width) for each in moved.reshape(-1, *moved.shape[2:])]
    return np.stack(parts, 1)


def _by_group(tensor: ir.TensorProtocol, groups: int) -> Array:
    """A kernel [groups * outputs, inputs, *taps] as [groups, taps * inputs, outputs]."""
    values = array(tensor)
    parts = values.reshape(groups, values.shape[0] // groups, values.shape[1], -1)
    rows = parts.transpose(0, 3, 2, 1)
    return rows.reshape(groups, -1, rows.shape[3])


def dot_panels(
    tensor: ir.TensorProtocol, groups: int, rows: int, inputs: int, count: int, width: int
) -> Array:
    """Bytes for dot products of four: a kernel as [groups, count, K / 4, width, 4].

    K goes over ``rows`` taps and ``inputs`` channels, zeros beyond those that there are. Of no groups it
    is a matrix [K, columns].
    """
    values = _by_group(tensor, groups) if groups else array(tensor)[None]
    groups, _, outputs = values.shape
    padded = np.zeros((groups, rows, inputs, count * width), values.dtype)
    parts = values.reshape(groups, rows, -1, outputs)
    padded[:, :, : parts.shape[2], :outputs] = parts
    fours = padded.reshape(groups, rows * inputs // 4, 4, count, width)
    return np.ascontiguousarray(fours.transpose(0, 3, 1, 4, 2))


def dot_sums(tensor: ir.TensorProtocol, groups: int, factor: int) -> Array:
    """The sum of every column of such a kernel, times ``factor``: [groups * outputs] in int32."""
    values = _by_group(tensor, groups) if groups else array(tensor)[None]
    sums: Array = values.sum(1, dtype=np.int32).reshape(-1) * np.int32(factor)
    return sums


def products(one: ir.TensorProtocol, other: ir.TensorProtocol, count: int) -> Array:
    """A scale times one or ``count`` scales, [count] in float32."""
    return np.ascontiguousarray(
        np.broadcast_to(array(one).reshape(-1) * array(other).reshape(-1), count)
    )


def dequantized(data: ir.TensorProtocol, scale: ir.TensorProtocol) -> Array:
    """Integers times their scale or scales, in float32."""
    found: Array = array(data).astype(np.float32) * array(scale)
    return found


def grid(scale: ir.TensorProtocol, *settings: Any) -> Array:
    """The zero point's tensor, if there is one, least and greatest integer; for a whole tensor, in float32:

    scale, 1 / scale, x of the least and of the greatest integer; then the bits of the zero point in int32.
    """
    *zero, least, greatest = settings
    one = array(scale).reshape(-1)[0]
    offset = int(array(zero[0]).reshape(-1)[0]) if zero else 0
    ends = (np.float32(end - offset) * one for end in (least, greatest))
    numbers = np.array([one, np.float32(1 / np.float64(one)), *ends], np.float32)
    return np.append(numbers, np.array([offset], np.int32).view(np.float32))


def taps_first(tensor: ir.TensorProtocol) -> Array:
    """A depthwise kernel [channels, 1, *taps] as [taps, channels]."""
    values = array(tensor)
    return np.ascontiguousarray(values.reshape(values.shape[0], -1).T)


def taps_first_float(tensor: ir.TensorProtocol) -> Array:
    """:func:`taps_first` of integers, in float32."""
    return taps_first(tensor).astype(np.float32)


def _panels(matrix: Array, count: int, width: int) -> Array:
    inner, columns = matrix.shape
    padded = np.zeros((inner, count * width), matrix.dtype)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(inner, count, width).transpose(1, 0, 2))
