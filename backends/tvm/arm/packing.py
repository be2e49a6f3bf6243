"""Constants as the kernels for ARM read them: recipes of :mod:`netlathe.backends.tvm.packing`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.backends.tvm.packing import Array, array


def neighbours(tensor: ir.TensorProtocol, count: int, width: int, inner: int, group: int) -> Array:
    """[K, N] as [count, inner / group, width, group], zero beyond K and N; unsigned bytes less 128, as int8.

    So ``group`` values of k of one column are neighbours, then the columns of a panel.
    """
    values = _signed(array(tensor))
    padded = np.zeros((inner, count * width), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    parts = padded.reshape(inner // group, group, count, width)
    return np.ascontiguousarray(parts.transpose(2, 0, 3, 1)).reshape(-1)


def column_sums(tensor: ir.TensorProtocol) -> Array:
    """The sum of every column of [K, N], unsigned bytes less 128, in int32."""
    return _signed(array(tensor)).sum(0, dtype=np.int32)


def _signed(values: Array) -> Array:
    return (values ^ 128).view(np.int8) if values.dtype == np.uint8 else values
