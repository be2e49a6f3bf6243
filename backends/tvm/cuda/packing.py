"""Constants as GPU kernels read them; see :mod:`netlathe.backends.tvm.packing`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.backends.tvm.packing import Array, array


def transposed(tensor: ir.TensorProtocol) -> Array:
    """[K, N] as [N, K]: what is summed over lies together."""
    return np.ascontiguousarray(array(tensor).T)


def quantized(tensor: ir.TensorProtocol, bits: int) -> Array:
    """Integers [K, N] as [N, bytes], K padded to whole chunks, in the order of skinny products.

    16 bytes are what thread q of a quad reads: K = 32 p + 8 q + e of the chunk. Of 4 bits, those of ``e``
    and ``e + 1`` (``e`` even) lie in nibbles e / 2 and e / 2 + 4 of a 32-bit word, as value + 8 or,
    unsigned, as they are.
    """
    chunk = 4 * 128 // bits
    values = array(tensor).T
    columns, inner = values.shape
    signed = values.dtype == np.int8
    pieces = chunk // 32
    held = np.zeros((columns, -(-inner // chunk) * chunk), np.int16)
    held[:, :inner] = values
    if bits == 4 and signed:
        held += 8
    held = held.reshape(columns, -1, pieces, 4, 8).swapaxes(2, 3)  # [N, chunk, q, p, e]
    if bits == 8:
        return np.ascontiguousarray(held.astype(np.int8).reshape(columns, -1))
    words = held.astype(np.uint32).reshape(columns, -1, 4, 2)
    packed = np.zeros(words.shape[:2], np.uint32)
    for pair in range(4):
        packed |= words[:, :, pair, 0] << np.uint32(4 * pair)
        packed |= words[:, :, pair, 1] << np.uint32(4 * pair + 16)
    return np.ascontiguousarray(packed).view(np.int8)


def group_values(tensor: ir.TensorProtocol, blocks: int, columns: int) -> Array:
    """Scales [blocks, N], [N] or one number as [N, blocks], in their own type."""
    return _by_column(array(tensor), blocks, columns)


def group_zeros(
    tensor: ir.TensorProtocol, blocks: int, columns: int, offset: int, base: int
) -> Array:
    """Zero points likewise, each as the bits of the half that ``base`` stands for plus it and ``offset``.

    ``base`` is the pattern of 128 in bfloat16 or of 1024 in float16: their last bits count ones.
    """
    values = array(tensor).astype(np.int32) + offset + base
    return _by_column(values.astype(np.uint16), blocks, columns)


def _by_column(values: Array, blocks: int, columns: int) -> Array:
    if values.size == 1:
        values = np.broadcast_to(values.reshape(1, 1), (blocks, columns))
    return np.ascontiguousarray(values.reshape(blocks, columns).T)
