"""Constants as GPU kernels read them; see :mod:`netlathe.backends.tvm.packing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.backends.tvm.packing import Array, array


@dataclass(frozen=True)
class Joined:
    """``function`` of several constants side by side, each with so many ``columns``, which are last.

    A number that holds for all columns is repeated. ``in_turn``: of as many columns each, the first of
    every constant, then the second of every constant, and so on.
    """

    function: Callable[..., Array]
    columns: tuple[int, ...]
    in_turn: bool

    def __call__(self, *given: Any) -> Array:
        """``given`` are the constants, then the numbers that the function takes."""
        tensors: Sequence[ir.TensorProtocol] = given[: len(self.columns)]
        parts = []
        for tensor, columns in zip(tensors, self.columns, strict=True):
            values = np.atleast_2d(tensor.numpy())
            parts.append(np.repeat(values, columns, -1) if values.size == 1 else values)
        if self.in_turn:
            whole = np.stack(parts, -1).reshape(*parts[0].shape[:-1], -1)
        else:
            whole = np.concatenate(parts, -1)
        joined = ir.Tensor(whole, dtype=tensors[0].dtype)
        return self.function(joined, *given[len(self.columns) :])


def transposed(tensor: ir.TensorProtocol, inner: int | None = None) -> Array:
    """[K, N] as [N, K]: what is summed over lies together; with zeros behind it, up to ``inner``."""
    values = array(tensor).T
    if inner is None:
        return np.ascontiguousarray(values)
    made = np.zeros((values.shape[0], inner), values.dtype)
    made[:, : values.shape[1]] = values
    return made


def dequantized(data: ir.TensorProtocol, scale: ir.TensorProtocol) -> Array:
    """Floats [K, N] times their scale or scales [N], rounded to the type of those: as [N, K]."""
    wide = data.numpy().astype(np.float32).T * scale.numpy().astype(np.float32).reshape(-1, 1)
    return array(
        ir.Tensor(np.ascontiguousarray(wide.astype(scale.numpy().dtype)), dtype=scale.dtype)
    )


def taps_by_channels(tensor: ir.TensorProtocol, channels: int, groups: int, together: int) -> Array:
    """A weight [outputs, inputs of a group, r, s] as [outputs, r * s * channels], with zeros elsewhere.

    ``channels`` are those of ``together`` groups, whose inputs lie one after the other.
    """
    values = array(tensor)
    outputs, inputs, *taps = values.shape
    made = np.zeros((outputs, *taps, channels), values.dtype)
    turned, each = np.moveaxis(values, 1, -1), outputs // groups
    for group in range(groups):
        own, first = slice(group * each, (group + 1) * each), group % together * inputs
        made[own, ..., first : first + inputs] = turned[own]
    return made.reshape(outputs, -1)


def rows_by_channels(tensor: ir.TensorProtocol, channels: int, deep: int) -> Array:
    """A weight [outputs, inputs, r, s] as [outputs, r * deep]: a row's taps by ``channels``, then zeros."""
    taps = taps_by_channels(tensor, channels, 1, 1)
    outputs, _, down, _ = tensor.shape.numpy()
    rows = taps.reshape(outputs, down, -1)
    made = np.zeros((outputs, down, deep), rows.dtype)
    made[..., : rows.shape[2]] = rows
    return made.reshape(outputs, -1)


def quantized(tensor: ir.TensorProtocol, bits: int) -> Array:
    """Integers [K, N] as [N, bytes], both padded, in the order of skinny products.

    64 columns and a chunk of K (512 bits of each column) are 4096 bytes, thread q of a quad has 16 of each
    column: K = 32 p + 8 q + e of the chunk. Of 4 bits, those of ``e`` and ``e + 1`` (``e`` even)
    lie in nibbles e / 2 and e / 2 + 4 of a 32-bit word, as value + 8 or, unsigned, as they are. The 16
    bytes lie where the 64-byte swizzle of sm_90a has piece q (PTX ISA 8.5, section 9.7.14.5): at
    q ^ (column / 2 % 4).
    """
    chunk = 4 * 128 // bits
    values = array(tensor).T
    columns, inner = values.shape
    signed = values.dtype == np.int8
    held = np.zeros((padded(columns), -(-inner // chunk) * chunk), np.int16)
    held[:columns, :inner] = values
    if bits == 4 and signed:
        held += 8
    # [64 columns, column, chunk, p, q, e] -> [64 columns, chunk, column, q, p, e]
    held = held.reshape(-1, 64, held.shape[1] // chunk, chunk // 32, 4, 8)
    held = held.transpose(0, 2, 1, 4, 3, 5)
    column = np.arange(64)[:, None]
    held = held[:, :, column, np.arange(4) ^ column // 2 % 4]
    if bits == 8:
        return np.ascontiguousarray(held.astype(np.int8)).reshape(padded(columns), -1)
    words = held.astype(np.uint32).reshape(padded(columns), -1, 4, 2)
    packed = np.zeros(words.shape[:2], np.uint32)
    for pair in range(4):
        packed |= words[:, :, pair, 0] << np.uint32(4 * pair)
        packed |= words[:, :, pair, 1] << np.uint32(4 * pair + 16)
    return np.ascontiguousarray(packed).view(np.int8)


def padded(columns: int) -> int:
    """Columns as quantized weights, scales and zero points have them in memory."""
    return -(-columns // 64) * 64


def group_values(tensor: ir.TensorProtocol, blocks: int, columns: int) -> Array:
    """Scales [blocks, N], [N] or one number as [blocks, N padded], in their own type."""
    return _by_group(array(tensor), blocks, columns)


def group_zeros(
    tensor: ir.TensorProtocol, blocks: int, columns: int, offset: int, base: int
) -> Array:
    """Zero points likewise, each as the bits of the half that ``base`` stands for plus it and ``offset``.

    ``base`` is the pattern of 128 in bfloat16 or of 1024 in float16: their last bits count ones.
    """
    values = array(tensor).astype(np.int32) + offset + base
    return _by_group(values.astype(np.uint16), blocks, columns)


def _by_group(values: Array, blocks: int, columns: int) -> Array:
    made = np.zeros((blocks, padded(columns)), values.dtype)
    made[:, :columns] = values if values.size == 1 else values.reshape(blocks, columns)
    return made
