"""Products of 17 to 256 rows on sm_90a: which tile a weight gets."""

from __future__ import annotations

from math import ceil

import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.cuda import hopper, split
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, PROCESSORS
from netlathe.backends.tvm.cuda.operands import operands

KINDS = ("bf16", "f16", "s8", "e4m3")
# [columns, inner] of weights of LLaMA models, a vocabulary, and small and ragged ones.
WEIGHTS = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (5120, 5120), (28672, 8192)]
RAGGED = [(1, 8), (64, 64), (391, 520), (130, 1088), (32000, 4096), (128256, 4096)]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("columns", "inner"), [*WEIGHTS, *RAGGED])
def test_a_shape_fits_a_multiprocessor(dtype: str, columns: int, inner: int) -> None:
    kind = operands(dtype)
    made = split.chosen(kind, columns, inner)
    assert made.shared_bytes <= ARCHITECTURES["sm_90a"][1]
    assert made.stages >= 4 and made.columns <= (128 if kind.is_float8 else 256)
    # All sums lie where stages were, a row of them 8 longer than it has columns.
    assert split.MOST_ROWS * (made.columns + 8) * 4 <= made.stages * made.stage_bytes
    assert made.splits <= ceil(inner * kind.bytes / 128)  # each block has something to do


@pytest.mark.parametrize(("columns", "inner"), WEIGHTS)
def test_most_multiprocessors_have_a_share_of_a_large_weight(columns: int, inner: int) -> None:
    made = split.chosen(operands("bf16"), columns, inner)
    blocks = ceil(columns / made.columns) * made.splits
    assert 0.85 * PROCESSORS <= blocks <= PROCESSORS


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("columns", "inner"), [*WEIGHTS, *RAGGED])
def test_narrower_tiles_fit_a_multiprocessor(dtype: str, columns: int, inner: int) -> None:
    kind = operands(dtype)
    made = hopper.narrower(kind, columns, inner)
    if made is not None:
        assert made.columns < hopper.chosen(kind).columns
        assert made.shared_bytes <= ARCHITECTURES["sm_90a"][1]
        assert made.columns % (64 * made.pieces) == 0  # results leave in parts of 64 columns


def test_tiles_are_narrower_where_there_are_few() -> None:
    widths = {
        columns: made and made.columns
        for columns in (4096, 11008, 14336)
        for made in [hopper.narrower(operands("bf16"), columns, 4096)]
    }
    assert widths == {4096: 64, 11008: 192, 14336: None}


def test_blocks_share_k_where_they_read_less_so() -> None:
    kind = operands("bf16")
    assert split.chosen(kind, 4096, 4096).splits == 2
    assert split.chosen(kind, 11008, 4096).splits == 1
