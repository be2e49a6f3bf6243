"""Weights as GPU kernels read them, taken apart again by the arithmetic that the kernels do."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm.cuda import packing

Array = npt.NDArray[Any]
INT4: Any = ml_dtypes.int4
UINT4: Any = ml_dtypes.uint4
COLUMN = np.arange(64)[:, None]
PIECE = np.arange(4) ^ COLUMN // 2 % 4  # where the swizzle has what is thread q's


def tensor(values: Array, dtype: ir.DataType) -> ir.Tensor:
    return ir.Tensor(values, dtype=dtype)


def halves(bits: Array, magic: int, zero: int, half: Any) -> Array:
    """Low bits placed under an exponent, less the same for ``zero``: exact in both half types."""
    value = (bits.astype(np.uint16) | np.uint16(magic)).view(half).astype(np.float64)
    return value - np.array(magic + zero, np.uint16).view(half).astype(np.float64)


@pytest.mark.parametrize(("magic", "half"), [(0x4300, ml_dtypes.bfloat16), (0x6400, np.float16)])
@pytest.mark.parametrize("inner", [128, 384, 200])
def test_nibbles_come_back(inner: int, magic: int, half: Any) -> None:
    values = np.random.default_rng(inner).integers(-8, 8, (inner, 5)).astype(INT4)
    packed = packing.quantized(tensor(values, ir.DataType.INT4), 4)
    padded = -(-inner // 128) * 128
    assert packed.dtype == np.int8 and packed.shape == (64, padded // 2)
    words = packed.view(np.uint32).reshape(padded // 128, 64, 4, 4)  # [chunk, column, piece, p]
    words = words[:, COLUMN, PIECE][:, :5].swapaxes(0, 1)  # [column, chunk, q, p]
    found = np.empty((5, padded))
    for chunk in range(padded // 128):
        for q in range(4):
            for p in range(4):
                word = words[:, chunk, q, p]
                for pair in range(4):
                    two = (word >> np.uint32(4 * pair)) & np.uint32(0x000F000F)
                    at = chunk * 128 + 32 * p + 8 * q + 2 * pair
                    found[:, at] = halves(two & np.uint32(0xFFFF), magic, 8, half)
                    found[:, at + 1] = halves(two >> np.uint32(16), magic, 8, half)
    np.testing.assert_array_equal(found[:, :inner], values.astype(np.float64).T)
    np.testing.assert_array_equal(found[:, inner:], 0)


@pytest.mark.parametrize("inner", [64, 200])
def test_bytes_come_back(inner: int) -> None:
    columns = 67
    values = np.random.default_rng(inner).integers(-128, 128, (inner, columns)).astype(np.int8)
    packed = packing.quantized(tensor(values, ir.DataType.INT8), 8)
    padded = -(-inner // 64) * 64
    assert packed.shape == (128, padded)
    # [64 columns, chunk, column, piece, p, e]
    pieces = packed.reshape(2, padded // 64, 64, 4, 2, 8)
    pieces = pieces[:, :, COLUMN, PIECE]  # by q
    found = pieces.transpose(0, 2, 1, 4, 3, 5).reshape(128, padded)  # K = 32 p + 8 q + e
    np.testing.assert_array_equal(found[columns:], 0)
    found = found[:columns]
    np.testing.assert_array_equal(found[:, :inner], values.T)
    # As bfloat16: 128 + the low seven bits, less 128, or 256 where the byte is negative.
    every = np.arange(-128, 128, dtype=np.int8).view(np.uint8)
    low, sign = halves(every & 0x7F, 0x4300, 0, ml_dtypes.bfloat16), every & 0x80
    np.testing.assert_array_equal(low - sign, np.arange(-128, 128))


def test_zero_points_stand_as_the_halves_that_are_taken_off() -> None:
    values = np.array([[-8, 7], [0, 3]], np.int8).astype(INT4)
    for base, half in ((0x4300, ml_dtypes.bfloat16), (0x6400, np.float16)):
        made = packing.group_zeros(tensor(values, ir.DataType.INT4), 2, 2, 8, base)
        offset = np.array(base, np.uint16).view(half).astype(np.float64)
        np.testing.assert_array_equal(
            made[:, :2].view(half).astype(np.float64) - offset - 8, values.astype(np.float64)
        )


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 4)])
def test_scales_lie_by_group(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).random(shape).astype(np.float16)
    blocks = shape[0] if len(shape) == 2 else 1
    made = packing.group_values(tensor(values, ir.DataType.FLOAT16), blocks, 4)
    assert made.shape == (blocks, 64) and made.flags.c_contiguous
    np.testing.assert_array_equal(made[:, :4], np.broadcast_to(values, (blocks, 4)))


def test_a_transposed_weight() -> None:
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    made = packing.transposed(tensor(values, ir.DataType.FLOAT16))
    np.testing.assert_array_equal(made, values.T)
    assert made.flags.c_contiguous
    wide = packing.transposed(tensor(values, ir.DataType.FLOAT16), 8)
    np.testing.assert_array_equal(wide[:, :2], values.T)
    np.testing.assert_array_equal(wide[:, 2:], 0)


def test_a_window_lies_by_channels() -> None:
    values = np.random.default_rng(0).standard_normal((5, 3, 2, 4)).astype(np.float16)
    made = packing.taps_by_channels(tensor(values, ir.DataType.FLOAT16), 8, 1, 1)
    made = made.reshape(5, 2, 4, 8)
    np.testing.assert_array_equal(made[..., :3], values.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(made[..., 3:], 0)


def test_groups_side_by_side_have_zeros_between() -> None:
    """Six groups of 4 inputs and 2 outputs, three of them together."""
    values = np.arange(1, 12 * 4 * 3 + 1).reshape(12, 4, 1, 3).astype(np.float16)
    made = packing.taps_by_channels(tensor(values, ir.DataType.FLOAT16), 16, 6, 3)
    made = made.reshape(12, 3, 16)
    for output in range(12):
        first = output // 2 % 3 * 4
        assert np.array_equal(made[output, :, first : first + 4], values[output, :, 0].T)
        assert np.count_nonzero(made[output]) == 12


def test_rows_of_a_window_are_pieces() -> None:
    values = np.random.default_rng(0).standard_normal((5, 3, 2, 7)).astype(np.float16)
    made = packing.rows_by_channels(tensor(values, ir.DataType.FLOAT16), 4, 32).reshape(5, 2, 32)
    row = made[..., :28].reshape(5, 2, 7, 4)
    np.testing.assert_array_equal(row[..., :3], values.transpose(0, 2, 3, 1))
    assert not row[..., 3].any() and not made[..., 28:].any()
