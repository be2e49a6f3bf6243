"""Products of 17 to 512 rows on sm_90a: which tile a weight gets."""

from __future__ import annotations

from math import ceil

import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.cuda import hopper, split, warpgroup
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
def test_tiles_by_rows_fit_a_multiprocessor(dtype: str, columns: int, inner: int) -> None:
    kind = operands(dtype)
    made = hopper.by_rows(kind, columns, inner)
    assert [most for most, _ in made] == sorted({most for most, _ in made} & set(hopper.COUNTED))
    for _, shape in made:
        assert shape.columns <= hopper.chosen(kind).columns
        assert shape.stages >= 4 and shape.shared_bytes <= ARCHITECTURES["sm_90a"][1]
        # Both operands begin at whole patterns of 8 swizzled rows, and so does each block's share of a piece.
        assert shape.rows % 8 == 0 and shape.box_rows % 8 == 0 and shape.columns % 16 == 0
        assert shape.box_rows * shape.cluster * shape.pieces == shape.columns


def test_few_rows_have_tiles_that_end_together() -> None:
    def blocks(columns: int, rows: int) -> float:
        """That work at one time, of those there are."""
        found = hopper.by_rows(operands("bf16"), columns, 4096)
        shape = next(shape for most, shape in found if rows <= most)
        tiles = ceil(rows / shape.rows / shape.cluster) * ceil(columns / shape.columns)
        return tiles * shape.cluster / PROCESSORS

    assert 0.96 < blocks(4096, 256) <= 1 and 0.96 < blocks(4096, 300) <= 1
    assert 0.95 < blocks(11008, 256) <= 1 and 1.95 < blocks(11008, 300) <= 2


def test_one_warpgroup_multiplies_where_two_would_multiply_rows_that_are_not_there() -> None:
    found = hopper.by_rows(operands("bf16"), 11008, 4096)
    assert [(most, shape.rows) for most, shape in found[:2]] == [(192, 64), (256, 128)]


@pytest.mark.parametrize("columns", range(64, 257, 16))
def test_parts_of_results_are_all_columns(columns: int) -> None:
    parts = warpgroup.parts(columns)
    assert [first for first, _ in parts] == [
        sum(w for _, w in parts[:i]) for i in range(len(parts))
    ]
    assert sum(wide for _, wide in parts) == columns
    assert all(wide in (64, 32, 16) and first % wide == 0 for first, wide in parts)


def test_blocks_share_k_where_they_read_less_so() -> None:
    kind = operands("bf16")
    assert split.chosen(kind, 4096, 4096).splits == 2
    assert split.chosen(kind, 11008, 4096).splits == 1
