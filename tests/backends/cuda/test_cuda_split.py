"""Products of more than 16 rows on sm_90a: which tiles a weight gets, and on a GPU."""

from __future__ import annotations

from math import ceil

import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.cuda import hopper, split, warpgroup
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, PROCESSORS
from netlathe.backends.tvm.cuda.operands import operands
from netlathe.backends.tvm.cuda.tilings import Tiling
from tests.backends.cuda import test_cuda_run

KINDS = ("bf16", "f16", "s8", "e4m3")
# [columns, inner] of weights of LLaMA models, a vocabulary, and small and ragged ones.
WEIGHTS = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (5120, 5120), (28672, 8192)]
RAGGED = [(1, 8), (64, 64), (391, 520), (130, 1088), (32000, 4096), (128256, 4096)]


BEYOND = split.ROWS[-1]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rows", split.ROWS)
@pytest.mark.parametrize(("columns", "inner"), [*WEIGHTS, *RAGGED])
def test_a_shape_fits_a_multiprocessor(dtype: str, rows: int, columns: int, inner: int) -> None:
    kind = operands(dtype)
    if rows not in split.rows_of(kind):
        pytest.skip("there is none")
    made = split.chosen(kind, rows, columns, inner)
    assert made.rows == rows == made.warpgroups * warpgroup.PART
    assert made.shared_bytes <= ARCHITECTURES["sm_90a"][1]
    assert made.stages >= 4 and made.columns <= hopper.chosen(kind).columns
    # All sums lie where stages were, a row of them 8 longer than it has columns.
    assert rows * (made.columns + 8) * 4 <= made.stages * made.stage_bytes
    assert made.splits <= ceil(inner * kind.bytes / 128)  # each block has something to do


@pytest.mark.parametrize("rows", split.ROWS)
@pytest.mark.parametrize(("columns", "inner"), WEIGHTS)
def test_most_multiprocessors_have_a_share_of_a_large_weight(
    rows: int, columns: int, inner: int
) -> None:
    made = split.chosen(operands("bf16"), rows, columns, inner)
    blocks = ceil(columns / made.columns) * made.splits
    rounds = ceil(blocks / PROCESSORS)
    assert 0.85 * PROCESSORS * rounds <= blocks and rounds <= 2


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("columns", "inner"), [*WEIGHTS, *RAGGED])
def test_tiles_of_many_rows_fit_a_multiprocessor(dtype: str, columns: int, inner: int) -> None:
    kind = operands(dtype)
    found = hopper.tiled(kind, columns, inner, BEYOND)
    numbers = [tiling.most for tiling in found if tiling.most is not None]
    assert (
        found[-1].most is None
        and numbers == sorted(set(numbers))
        and len(numbers) + 1 == len(found)
    )
    assert found[-1].shape == hopper.chosen(kind)
    for tiling in found:
        shape = tiling.shape
        assert shape.right <= hopper.chosen(kind).columns and shape.left in (64, 128)
        assert shape.stages >= 4 and shape.shared_bytes <= ARCHITECTURES["sm_90a"][1]
        if tiling.most is not None:  # all rows have a place
            assert tiling.down is not None and tiling.down * hopper.rows_of(shape) >= tiling.most
        if shape.turned:  # what products read behind the last row is shared memory, too
            assert shape.staging_bytes >= (shape.widths[-1] - 8) * warpgroup.ROW_BYTES
            continue
        # Both operands begin at whole patterns of 8 swizzled rows, and so does each block's share of a piece.
        assert shape.rows % 8 == 0 and shape.box_rows % 8 == 0 and shape.columns % 16 == 0
        assert shape.box_rows * shape.cluster * shape.pieces == shape.columns


def _tiling(columns: int, inner: int, rows: int) -> Tiling[hopper.Shape]:
    found = hopper.tiled(operands("bf16"), columns, inner, BEYOND)
    return next(tiling for tiling in found if tiling.most is None or rows <= tiling.most)


@pytest.mark.parametrize("rows", [200, 300, 512, 700])
@pytest.mark.parametrize(("columns", "inner"), WEIGHTS)
def test_few_rows_have_tiles_that_end_together(rows: int, columns: int, inner: int) -> None:
    tiling = _tiling(columns, inner, rows)
    shape, down = tiling.shape, tiling.down
    assert down is not None
    turns = down * ceil(columns / shape.columns) / (PROCESSORS // shape.cluster)
    assert 0.55 * ceil(turns) < turns


def test_rows_that_are_not_there_are_hardly_multiplied() -> None:
    for rows in (300, 400, 600, 700):
        tiling = _tiling(4096, 4096, rows)
        assert tiling.shape.turned and tiling.down is not None
        high = ceil(rows / tiling.down / hopper.STEP) * hopper.STEP
        assert high in tiling.shape.widths and high * tiling.down < 1.15 * rows


def test_the_widest_tile_is_for_most_rows() -> None:
    assert _tiling(4096, 4096, 4096).shape == hopper.chosen(operands("bf16"))


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
    assert split.chosen(kind, 128, 4096, 4096).splits == 2
    assert split.chosen(kind, 128, 11008, 4096).splits == 1


# One turned tile for each warpgroup, two, and one that is not turned, each with several numbers of tiles.
TILED = (
    Tiling(260, hopper.shape(256, 64, 1, turned=True), 2),
    Tiling(300, hopper.shape(256, 64, 1, turned=True), 3),
    Tiling(520, hopper.shape(256, 128, 1, turned=True), 3),
    Tiling(700, hopper.shape(128, 176, 1), 6),
    Tiling(None, hopper.shape(256, 128, 1, turned=True), None),
)


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("inner", "columns"), [(520, 391), (4096, 700), (64, 64), (8, 1)])
def test_tiles(monkeypatch: pytest.MonkeyPatch, half: str, inner: int, columns: int) -> None:
    monkeypatch.setattr(hopper, "tiled", lambda *_: TILED)
    numbers = (129, 150, 191, 192, 193, 255, 256, 257, 261, 300, 301, 520, 521, 701, 1000, 1025)
    test_cuda_run.check_rows(half, "half", inner, columns, 0, numbers)


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("rows", [150, 200, 300, 600, 1030])
def test_a_known_number_of_rows(rows: int) -> None:
    test_cuda_run.check_rows("bfloat16", "half", 520, 391, 0, (rows,), known=True)
