"""How products with few rows are cut for an H200: all fits a multiprocessor, stages and groups agree."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.cuda import ampere, held, hopper, limbs, stream
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES
from tests.backends.cuda import test_cuda_run

SIZES = (1024, 4096, 8192, 11008, 28672)
# Inner, columns and group, with ends inside of stages and tiles; columns of a tile, blocks that share its K,
# and whether a block leaves room for others.
RAGGED = [
    ("half", 1152, 391, 0, 96, 2, False),
    ("half", 2112, 391, 0, 128, 1, False),
    ("int8", 4160, 391, 0, 96, 1, False),
    ("int8", 1152, 4228, 128, 96, 2, False),
    ("int8", 1152, 4228, 128, 32, 1, True),
    ("int8", 2112, 391, 0, 128, 1, False),
    ("int4", 2112, 391, 0, 96, 1, False),
    ("uint4", 1536, 700, 256, 96, 2, False),
    ("uint4", 2112, 391, 0, 128, 1, False),
    ("uint4", 3200, 4228, 128, 32, 1, True),
    ("half", 1152, 6532, 0, 96, 2, False),  # more tiles than blocks, or clusters
    ("int4", 2112, 12772, 0, 96, 1, False),
]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("group", [0, 128, 256, 1024])
def test_shapes(bits: int, tiles: int, group: int) -> None:
    for columns in SIZES:
        for inner in SIZES:
            shape = stream.chosen(bits, tiles, columns, inner, group, bits == 4, 8)
            assert shape is not None
            assert shape.shared_bytes <= 227 << 10
            assert shape.stages >= (2 if shape.beside else 4) and shape.stages % shape.teams == 0
            assert shape.deep * shape.columns * bits == shape.stage_weights * 8
            assert not group or max(shape.deep, group) % min(shape.deep, group) == 0
            assert shape.deep % 64 == 0  # whole swizzled rows
            assert -(-inner // shape.deep) >= shape.splits  # every block has a stage


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", held.ROWS)
def test_shapes_with_x_as_integers(bits: int, rows: int) -> None:
    """x is beside the stages, which have more room for weights then, where its rows are not too long."""
    group = 128 if bits == 4 else 0
    for inner in SIZES:
        shape = stream.chosen(bits, 1, 4096, inner, group, False, 8, rows)
        if shape is None:
            assert inner * rows > 4 * held.MOST
            continue
        assert shape.rows == rows and shape.shared_bytes <= 227 << 10 and shape.stages >= 4
        assert shape.share * shape.splits >= inner
        assert 0 < shape.pace < shape.stages  # more at a time are in the way of x
        # Two bytes for an element of each row, room between lines, and a scale of four for a chunk, or 128.
        per_line, line = limbs.per_line(rows), limbs.line(rows)
        assert 2 * rows * per_line <= line <= 2.25 * rows * per_line
        assert shape.share % per_line == 0
        kept = shape.share // per_line * line
        kept += shape.share // (512 // bits if rows == 1 else 128) * rows * 4
        assert 0 <= shape.held_bytes - kept < 128
        halves = stream.chosen(bits, 1, 4096, inner, group, False, 8)
        assert halves is not None and halves.stage_bytes > shape.stage_bytes
    assert stream.chosen(bits, 1, 4096, 1 << 20, group, False, 8, rows) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_with_few_stages_leave_room_for_those_of_the_kernel_behind(bits: int) -> None:
    """Two fit a multiprocessor, which keeps 1 KB for each; larger weights, or norms, need all of it."""
    group = 128 if bits == 4 else 0
    small = stream.chosen(bits, 1, 4096, 4096, group, False, 8, 1)
    assert small is not None and small.beside and small.splits == 1
    assert 2 * (small.shared_bytes + 1024) <= 228 << 10
    for columns, inner, normed in ((11008, 4096, False), (4096, 11008, False), (4096, 4096, True)):
        shape = stream.chosen(bits, 1, columns, inner, group, False, 8, 1, normed)
        assert shape is not None and not shape.beside
    several = stream.chosen(bits, 1, 4096, 4096, group, False, 8, 4)
    # Those of int8 have more stages than find room beside x.
    assert several is not None and several.beside == (bits == 4)
    assert not several.beside or several.stages >= 4096 // several.deep
    # Several rows: where the ring that there is room for is filled more than once, and up to three times.
    for inner, rows in ((4096, (8,)), (2048, (16,) if bits == 8 else ()), (11008, ())):
        for tiles in (1, 2):
            many = stream.chosen(bits, tiles, 4096, inner, group, False, 8)
            assert many is not None and many.beside == (8 * tiles in rows)


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("columns", [32, 64, 96, 128])
def test_x_stands_behind_fewer_stages_the_longer_they_take(tiles: int, columns: int) -> None:
    ahead = {}
    for bits in (16, 8, 4):
        shape = stream.Shape(bits, tiles, columns, 1)
        assert 1 <= shape.ahead <= shape.stages and shape.shared_bytes <= 227 << 10
        ahead[bits] = shape.ahead / shape.stages
    assert ahead[16] == 1 > ahead[8] > ahead[4]
    kept = stream.Shape(8, 1, columns, 1, held=4, inner=4096)
    assert kept.ahead == kept.stages, "these have a pace"


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("columns", [32, 64, 96, 128, 256])
def test_warps_of_a_team_have_equal_parts_of_a_stage(bits: int, columns: int) -> None:
    shape = stream.Shape(bits, 2, columns, 1)
    assert shape.warps * 32 == columns * shape.down
    assert shape.deep == shape.down * 512 // bits
    assert columns % (32 * shape.boxes) == 0


def test_one_row_of_a_small_weight_goes_by_wide_tiles_though_they_are_uneven() -> None:
    chosen = {n: stream.chosen(4, 1, n, 4096, 128, False, 8, 1) for n in (4096, 11008)}
    assert {n: s.columns for n, s in chosen.items() if s is not None} == {4096: 32, 11008: 64}


def test_several_rows_of_nibbles_go_by_tiles_of_96_columns_where_they_are_short() -> None:
    """One tile for a block in place of three, and x is prepared by fewer warps."""

    def across(bits: int, inner: int, rows: int, normed: bool = False) -> int:
        group = 128 if bits == 4 else 0
        shape = stream.chosen(bits, 1, 11008, inner, group, False, 8, rows, normed)
        assert shape is not None and shape.splits == 1 and not shape.beside
        return shape.columns

    assert across(4, 4096, 4) == across(4, 2048, 4) == 96
    assert across(4, 8192, 4) == across(8, 4096, 4) == 32
    assert across(4, 4096, 1) == 64 and across(4, 4096, 4, normed=True) == 32


def test_several_rows_of_bytes_stand_behind_more_stages_than_nibbles() -> None:
    paces = {}
    for bits in (8, 4):
        for columns in (4096, 8192):
            shape = stream.chosen(bits, 1, columns, columns, 128 if bits == 4 else 0, False, 8, 4)
            assert shape is not None
            paces[bits, columns] = shape.pace
    assert paces == {(8, 4096): 4, (8, 8192): 3, (4, 4096): 2, (4, 8192): 2}
    normed = stream.chosen(8, 1, 4096, 4096, 0, False, 8, 4, True)
    assert normed is not None and normed.pace == 2


def test_groups_that_no_stage_ends_with_are_left_to_other_kernels() -> None:
    assert stream.chosen(8, 1, 4096, 4032, 192, False, 0) is None


def test_tiles_are_as_wide_as_occupies_all_multiprocessors() -> None:
    """344 tiles of 32 columns would be three for some and two for others, and read x so often."""
    for bits, tiles in ((16, 1), (16, 2), (8, 1), (8, 2), (4, 1), (4, 2)):
        group = 128 if bits == 4 else 0
        widths = {
            n: shape.columns
            for n in (4096, 8192, 11008, 14336)
            if (shape := stream.chosen(bits, tiles, n, 4096, group, False, 8)) is not None
        }
        assert widths == {4096: 32, 8192: 64, 11008: 96, 14336: 128}


def test_few_columns_share_k() -> None:
    few = stream.chosen(16, 1, 1024, 8192, 0, False, 0)
    many = stream.chosen(16, 1, 28672, 8192, 0, False, 0)
    assert few is not None and many is not None
    assert few.splits > 1 and many.splits == 1


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_tiles_of_many_rows_fit_too(columns: int) -> None:
    assert hopper.Shape(columns).shared_bytes <= ARCHITECTURES["sm_90a"][1]
    assert ampere.SHARED_BYTES <= min(room for _, room in ARCHITECTURES.values())


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("kind", "inner", "columns", "group", "across", "splits", "beside"), RAGGED
)
def test_product(
    monkeypatch: pytest.MonkeyPatch,
    half: str,
    kind: str,
    inner: int,
    columns: int,
    group: int,
    across: int,
    splits: int,
    beside: bool,
) -> None:
    def made(
        bits: int, tiles: int, _: int, inner: int, group: int, zeros: bool, zero: int, *held: object
    ) -> stream.Shape | None:
        if held:
            return None
        return stream.Shape(bits, tiles, across, splits, group, zeros, zero, beside=beside)

    monkeypatch.setattr(stream, "chosen", made)
    monkeypatch.setattr(stream, "chosen_pairs", lambda *_: None)
    test_cuda_run.check_rows(half, kind, inner, columns, group, (1, 5, 8, 9, 16))
