"""Products of 9 to 16 rows with integer weights, x as pairs of bytes: cut, compiled, and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.cuda import pairs, stream
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES
from tests.backends.cuda import test_cuda_compile, test_cuda_run

# Inner, columns and group, with ends inside of stages and tiles; and the columns of a tile.
RAGGED = [
    ("int4", 2112, 391, 0, 64),
    ("uint4", 1152, 4100, 128, 128),
    ("uint4", 1536, 700, 256, 256),
    ("int4", 1536, 700, 256, 256),
    ("uint4", 640, 9000, 0, 64),
    ("int8", 2112, 391, 0, 64),
    ("int8", 1152, 391, 128, 128),
    ("int8", 1088, 700, 0, 128),
    ("int8", 4160, 391, 0, 128),
]


@pytest.mark.parametrize("group", [0, 128, 1024])
def test_shapes(group: int) -> None:
    for columns in (8192, 14336, 28672, 128256):
        for inner in (8192, 11264, 28672):
            shape = stream.chosen_pairs(4, columns, inner, group, True, 8)
            assert shape is not None and shape.pairs and shape.teams == 1 and shape.splits == 1
            assert shape.shared_bytes <= ARCHITECTURES["sm_90a"][1] and shape.stages >= 4
            assert shape.stage_rows == shape.deep // pairs.DEEP * pairs.RECORD
            assert not group or max(shape.deep, group) % min(shape.deep, group) == 0


def test_small_weights_and_those_of_few_columns_go_by_halves() -> None:
    assert stream.chosen_pairs(4, 4096, 28672, 128, False, 8) is None
    assert stream.chosen_pairs(4, 8192, 2048, 128, False, 8) is None
    wide, narrow = (stream.chosen_pairs(4, n, 8192, 128, False, 8) for n in (28672, 8192))
    assert wide is not None and narrow is not None and (wide.columns, narrow.columns) == (256, 64)


def test_bytes_go_by_pairs_where_each_block_has_a_tile() -> None:
    shapes = {
        n: stream.chosen_pairs(8, n, 8192, 0, False, 8) for n in (4096, 8192, 11008, 14336, 28672)
    }
    found = {n: None if shape is None else shape.columns for n, shape in shapes.items()}
    # 11008 columns are 115 tiles of 96 by halves, and were 86 of 128 here.
    assert found == {4096: None, 8192: 64, 11008: None, 14336: 128, 28672: None}
    assert stream.chosen_pairs(8, 8192, 8192, 64, False, 8) is None, "two groups in a record"
    for shape in shapes.values():
        assert shape is None or (shape.deep % pairs.DEEP == 0 and shape.stages >= 4)
        assert shape is None or shape.stages % pairs.turns(shape) == 0, "a stage is one warpgroup's"


@pytest.mark.skipif(not test_cuda_compile._has_nvcc(), reason="nvcc is not installed")
@pytest.mark.parametrize(  # with zero points by tiles of 64 and 256, by 64 and 128; blocks beside others
    ("kind", "columns", "inner"),
    [
        ("uint4", 8192, 8192),
        ("uint4", 28672, 8192),
        ("int8", 8192, 8192),
        ("int8", 14336, 8192),
        ("int8", 4096, 2048),
    ],
)
def test_nothing_spills_and_products_do_not_wait_for_each_other(
    kind: str, columns: int, inner: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = test_cuda_compile.product("bfloat16", kind, inner, columns, 128)
    assert test_cuda_compile.most_registers(model, tmp_path, monkeypatch) <= 224


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "inner", "columns", "group", "across"), RAGGED)
def test_product(
    monkeypatch: pytest.MonkeyPatch,
    half: str,
    kind: str,
    inner: int,
    columns: int,
    group: int,
    across: int,
) -> None:
    def made(bits: int, _: int, inner: int, group: int, zeros: bool, zero: int) -> stream.Shape:
        return stream.Shape(bits, pairs.TILES, across, 1, group, zeros, zero, pairs=True)

    monkeypatch.setattr(stream, "chosen_pairs", made)
    test_cuda_run.check_rows(half, kind, inner, columns, group, (9, 13, 16))
