"""Constants as the kernels for ARM read them: recipes of :mod:`netlathe.backends.tvm.packing`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.backends.tvm.packing import Array, array


def matrix_shape(tensor: ir.TensorProtocol) -> tuple[int, int]:
    """K and N of [K, N], or of a convolution's kernel of one element, [N, K, 1, 1]."""
    first, second, *taps = tensor.shape.numpy()
    return (second, first) if taps else (first, second)


def _matrix(tensor: ir.TensorProtocol) -> Array:
    values = array(tensor)
    return values if values.ndim == 2 else values.reshape(values.shape[:2]).T


def neighbours(
    tensor: ir.TensorProtocol, count: int, width: int, inner: int, group: int, last: int = 0
) -> Array:
    """:func:`matrix_shape` [K, N] as [count, inner / group, width, group], zero beyond K and N.

    So ``group`` values of k of one column are neighbours, then the columns of a panel. With ``last`` A is
    read in pieces of so many values, the last of them up to its end: the values of k that this one has and
    no piece before are behind zeros.
    """
    values = _matrix(tensor)
    if last:
        whole = len(values) // last * last
        moved = np.zeros((inner, values.shape[1]), values.dtype)
        moved[:whole] = values[:whole]
        moved[whole + last - (len(values) - whole) : whole + last] = values[whole:]
        values = moved
    return _grouped(neighbours_of(values, count, width, inner), group)


def windows(
    tensor: ir.TensorProtocol,
    groups: int,
    runs: int,
    channels: int,
    length: int,
    count: int,
    width: int,
    group: int,
) -> Array:
    """A kernel [groups * outputs, inputs, *taps] as [groups, count, runs * length / group, width, group].

    Each of the ``runs`` that a window reads has its taps times ``channels``, zeros up to ``length``.
    """
    values = array(tensor)
    outputs, inputs = values.shape[0] // groups, values.shape[1]
    parts = values.reshape(groups, outputs, inputs, -1).transpose(0, 3, 2, 1)
    whole = np.zeros((groups, parts.shape[1], channels, outputs), values.dtype)
    whole[:, :, :inputs] = parts
    whole = whole.reshape(groups, runs, -1, outputs)
    padded = np.zeros((groups, runs, length, outputs), values.dtype)
    padded[:, :, : whole.shape[2]] = whole
    inner = runs * length
    matrices = padded.reshape(groups, inner, outputs)
    return np.concatenate(
        [_grouped(neighbours_of(matrix, count, width, inner), group) for matrix in matrices]
    )


def _grouped(panels: Array, group: int) -> Array:
    """[count, inner, width] as [count, inner / group, width, group], flat."""
    count, inner, width = panels.shape
    parts = panels.reshape(count, inner // group, group, width)
    return np.ascontiguousarray(parts.transpose(0, 1, 3, 2)).reshape(-1)


def column_sums(tensor: ir.TensorProtocol) -> Array:
    """The sum of every column of :func:`matrix_shape` [K, N] in int32."""
    sums: Array = _matrix(tensor).sum(0, dtype=np.int32)
    return sums


def codes(tensor: ir.TensorProtocol, count: int, width: int, inner: int, bits: int) -> Array:
    """Codes [K, N] as bytes [count, inner, width]; signed ones plus the middle of the unsigned range.

    Of 4 bits, those of four rows are 2 * ``width`` bytes: rows 0 and 1 in the low halves, 2 and 3 above.
    """
    centred = neighbours_of(_centred(tensor), count, width, inner)
    values = (centred + np.int16(1 << bits - 1)).astype(np.uint8)
    if bits == 8:
        return values.reshape(-1)
    fours = values.reshape(count, inner // 4, 2, 2 * width)
    return np.ascontiguousarray(fours[:, :, 0] | fours[:, :, 1] << 4).reshape(-1)


def code_scales(tensor: ir.TensorProtocol, blocks: int, count: int, width: int) -> Array:
    """Scales, one, [N] or [blocks, N], as float32 [count, blocks, width]."""
    return _spread(tensor.numpy().astype(np.float32), blocks, count, width)


def code_zeros(
    tensor: ir.TensorProtocol, blocks: int, count: int, width: int, none: int = 0
) -> Array:
    """Zero points likewise, as int8, less the middle of an unsigned range; ``none``: all are zero."""
    centred = _centred(tensor)
    if none:  # of codes that have no zero point, only the middle is left
        half = 8 if tensor.dtype == ir.DataType.UINT4 else 128
        centred = np.full(1, -half, np.int8)
    return _spread(centred, blocks, count, width)


def neighbours_of(values: Array, count: int, width: int, inner: int) -> Array:
    """[K, N] as [count, inner, width], zero beyond K and N."""
    padded = np.zeros((inner, count * width), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return np.ascontiguousarray(padded.reshape(inner, count, width).transpose(1, 0, 2))


def _centred(tensor: ir.TensorProtocol) -> Array:
    values = tensor.numpy().astype(np.int16)
    if tensor.dtype == ir.DataType.UINT4:
        values = values - 8
    elif tensor.dtype == ir.DataType.UINT8:
        values = values - 128
    return values.astype(np.int8)


def _spread(values: Array, blocks: int, count: int, width: int) -> Array:
    if values.ndim < 2:
        values = values.reshape(1, -1)
    columns = count * width if values.shape[1] == 1 else values.shape[1]
    whole = np.zeros((blocks, count * width), values.dtype)
    whole[:, :columns] = np.broadcast_to(values, (blocks, columns))
    return np.ascontiguousarray(whole.reshape(blocks, count, width).transpose(1, 0, 2)).reshape(-1)
