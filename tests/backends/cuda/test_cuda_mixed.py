"""Products of more than 16 rows with integer weights that stay so: which tile, compiled, and on a GPU."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tvm import tirx

from netlathe.backends.tvm.cuda import few, mixed
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, PROCESSORS
from netlathe.backends.tvm.cuda.tilings import Tiling
from netlathe.backends.tvm.tir import i64
from tests.backends.cuda import test_cuda_compile, test_cuda_run

# [columns, inner] of weights of LLaMA models, and small and ragged ones.
WEIGHTS = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192)]
SMALL = [(1, 64), (64, 64), (391, 576), (130, 1088)]
# Columns of a tile, warpgroups and blocks that share its K, elements of K in a stage.
TILES = [
    *((64, 1, 1, 128), (64, 2, 1, 256), (64, 2, 2, 256), (128, 1, 2, 256), (192, 1, 2, 128)),
    *((128, 1, 1, 128), (192, 1, 1, 128)),  # of large weights
]
# Most rows, columns and blocks that share K of a tile of more than 128 rows.
MANY = [(256, 64, 1), (256, 128, 1), (256, 128, 2), (128, 192, 1)]
ROWS = tirx.Var("n", "int64")  # any number
# Inner, columns and group, with ends inside of stages and tiles.
RAGGED = [
    ("int4", 2112, 391, 0),
    ("int4", 896, 130, 128),
    ("uint4", 1152, 700, 128),
    ("uint4", 1536, 330, 256),
    ("uint4", 640, 500, 0),
    ("int8", 2112, 391, 0),
    ("int8", 1088, 200, 64),
    ("int8", 1152, 200, 192),
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [24, *mixed.ROWS])
@pytest.mark.parametrize(("columns", "inner"), [*WEIGHTS, *SMALL])
def test_a_shape_fits_a_multiprocessor(bits: int, rows: int, columns: int, inner: int) -> None:
    made = mixed.chosen(bits, rows, columns, inner, 0, False, 8)
    assert made is not None and made.shared_bytes <= ARCHITECTURES["sm_90a"][1]
    assert made.stages >= 4 and made.sums_bytes <= made.stages * made.stage_bytes
    assert made.splits <= ceil(inner / made.deep)  # each block has something to do
    assert made.rows >= rows and made.deep % (128 * made.sharing) == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("columns", "inner"), [*WEIGHTS, *SMALL])
def test_tiles_of_many_rows_fit_a_multiprocessor(bits: int, columns: int, inner: int) -> None:
    found = mixed.tiled(bits, columns, inner, 0, False, 8)
    numbers = [tiling.most for tiling in found if tiling.most is not None]
    assert (
        found[-1].most is None
        and numbers == sorted(set(numbers))
        and len(numbers) == len(found) - 1 < 20
    )
    for tiling in found:
        shape = tiling.shape
        assert shape.shared_bytes <= ARCHITECTURES["sm_90a"][1] and shape.stages >= 3
        assert shape.sums_bytes <= shape.room and shape.splits <= ceil(inner / shape.deep)
        if tiling.most is not None:  # all rows have a place
            assert tiling.down is not None and tiling.down * shape.rows >= tiling.most


@pytest.mark.parametrize("rows", mixed.ROWS)
@pytest.mark.parametrize(("columns", "inner"), WEIGHTS[:4])
def test_most_multiprocessors_have_a_share_of_a_large_weight(
    rows: int, columns: int, inner: int
) -> None:
    made = mixed.chosen(4, rows, columns, inner, 128, False, 8)
    assert made is not None
    assert 0.85 * PROCESSORS <= ceil(columns / made.columns) * made.splits <= PROCESSORS


def test_stages_and_groups_have_common_ends() -> None:
    for group in (64, 128, 256, 1024):
        made = mixed.chosen(8, 64, 4096, 4096, group, False, 8)
        assert made is not None and max(made.deep, group) % min(made.deep, group) == 0
    assert mixed.chosen(8, 64, 4096, 4032, 192, False, 8) is None, "expanded"


@pytest.mark.parametrize("group", [64, 128, 192, 256, 320, 384])
def test_groups_of_64_or_multiples_of_128_fit(group: int) -> None:
    weight, fits = few.Weight(None, 8, group=group), group == 64 or group % 128 == 0
    assert bool(few.shapes_of_more(True, weight, ROWS, 15 * 256, 4096)) == fits
    assert few.tiles_of_many(True, weight, 15 * 256, 4096)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("columns", "inner"), [*WEIGHTS, *SMALL])
def test_a_known_number_of_rows_has_one_kernel(bits: int, columns: int, inner: int) -> None:
    weight = few.Weight(None, bits)
    found = few.shapes_of_more(True, weight, ROWS, inner, columns)
    assert [most for most, _ in found] == [32, 64, 128]
    for number in (17, 128):
        (one,) = few.shapes_of_more(True, weight, i64(number), inner, columns)
        assert one[0] == number
    assert not few.shapes_of_more(True, weight, i64(129), inner, columns)


@pytest.mark.skipif(not test_cuda_compile._has_nvcc(), reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("half", "kind", "columns", "inner", "group"),
    [
        ("bfloat16", "uint4", 4096, 4096, 128),
        ("float16", "int4", 11008, 4096, 128),
        ("float16", "uint4", 8192, 8192, 0),
        ("bfloat16", "int8", 11008, 4096, 64),
        ("float16", "int8", 4096, 4096, 0),
    ],
)
def test_nothing_spills_and_products_do_not_wait_for_each_other(
    half: str,
    kind: str,
    columns: int,
    inner: int,
    group: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In kernels for any number of rows."""
    model = test_cuda_compile.product(half, kind, inner, columns, group)
    assert test_cuda_compile.most_registers(model, tmp_path, monkeypatch) <= 232


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("kind", "inner", "columns", "group"),
    [case for case in RAGGED if case[-1] != 192],  # those go by tiles of many rows alone
)
def test_product(
    monkeypatch: pytest.MonkeyPatch,
    half: str,
    tile: tuple[int, int, int, int],
    kind: str,
    inner: int,
    columns: int,
    group: int,
) -> None:
    def made(
        bits: int, rows: int, _: int, inner: int, group: int, zeros: bool, zero: int
    ) -> mixed.Shape | None:
        wide, sharing, splits, deep = tile
        able = [
            mixed.Shape(bits, rows, wide, sharing, splits, most, group, zeros, zero)
            for most in (deep, 128)
            if most >= 128 * sharing
        ]
        found = next((shape for shape in able if shape.fits), None)
        assert found is not None or rows > 64, "only stages for more rows may have no room"
        return found

    monkeypatch.setattr(mixed, "chosen", made)
    test_cuda_run.check_rows(half, kind, inner, columns, group, (17, 32, 33, 64, 100, 128))


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("tile", MANY)
@pytest.mark.parametrize(("kind", "inner", "columns", "group"), RAGGED)
def test_tiles_of_many_rows(
    monkeypatch: pytest.MonkeyPatch,
    half: str,
    tile: tuple[int, int, int],
    kind: str,
    inner: int,
    columns: int,
    group: int,
) -> None:
    def made(
        bits: int, _: int, inner: int, group: int, zeros: bool, zero: int
    ) -> tuple[Tiling[mixed.Shape], ...]:
        rows, wide, splits = tile
        deep = 128 if bits == 4 else 64
        shape = mixed.Shape(bits, rows, wide, 1, splits, deep, group, zeros, zero)
        assert shape.fits
        return Tiling(200, shape, 2), Tiling(300, shape, 4), Tiling(None, shape, None)

    monkeypatch.setattr(mixed, "tiled", made)
    test_cuda_run.check_rows(half, kind, inner, columns, group, (129, 200, 201, 300, 301, 513))


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "inner", "columns", "group"), RAGGED)
def test_most_rows(half: str, kind: str, inner: int, columns: int, group: int) -> None:
    numbers = (16, 17, 65, 127, 128, 129, 300, 513, 1030)
    test_cuda_run.check_rows(half, kind, inner, columns, group, numbers)


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("rows", [17, 130])
@pytest.mark.parametrize("kind", ["int8", "uint4"])
def test_a_known_number_of_rows(kind: str, rows: int) -> None:
    test_cuda_run.check_rows("bfloat16", kind, 1152, 391, 128, (rows,), known=True)


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("uint4", 0)])
def test_stages_are_used_again(kind: str, group: int) -> None:
    for most in (32, 64):
        shape = mixed.chosen(4, most, 391, 8192, group, kind == "uint4", 8)
        assert shape is not None and shape.stages * shape.deep * shape.splits < 8192
    test_cuda_run.check_rows("bfloat16", kind, 8192, 391, group, (17, 64))
