"""Products of more than 16 rows with integer weights that stay so: which tile, compiled, and on a GPU."""

from __future__ import annotations

from math import ceil

import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.cuda import mixed, toolkit
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, PROCESSORS
from tests.backends.cuda import test_cuda_compile, test_cuda_run

# [columns, inner] of weights of LLaMA models, and small and ragged ones.
WEIGHTS = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192)]
SMALL = [(1, 64), (64, 64), (391, 576), (130, 1088)]
# Columns of a tile, warpgroups and blocks that share its K, elements of K in a stage.
TILES = [(64, 1, 1, 128), (64, 2, 1, 256), (64, 2, 2, 256), (128, 1, 2, 256), (192, 1, 2, 128)]
# Inner, columns and group, with ends inside of stages and tiles.
RAGGED = [
    ("int4", 2112, 391, 0),
    ("int4", 896, 130, 128),
    ("uint4", 1152, 700, 128),
    ("uint4", 1536, 330, 256),
    ("uint4", 640, 500, 0),
    ("int8", 2112, 391, 0),
    ("int8", 1088, 200, 64),
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [24, *mixed.ROWS])
@pytest.mark.parametrize(("columns", "inner"), [*WEIGHTS, *SMALL])
def test_a_shape_fits_a_multiprocessor(bits: int, rows: int, columns: int, inner: int) -> None:
    made = mixed.chosen(bits, rows, columns, inner, 0, False, 8)
    assert made is not None and made.shared_bytes <= ARCHITECTURES["sm_90a"][1]
    assert made.stages >= 4 and made.sums_bytes <= made.stages * made.stage_bytes
    assert made.splits <= ceil(inner / made.deep)  # each block has something to do
    assert made.rows >= min(rows, mixed.MOST_ROWS) and made.deep % (128 * made.sharing) == 0


@pytest.mark.parametrize("rows", mixed.ROWS[:4])
@pytest.mark.parametrize(("columns", "inner"), WEIGHTS[:4])
def test_most_multiprocessors_have_a_share_of_a_large_weight(
    rows: int, columns: int, inner: int
) -> None:
    made = mixed.chosen(4, rows, columns, inner, 128, False, 8)
    assert made is not None
    tiles = ceil(columns / made.columns) * ceil(rows / made.rows)
    assert 0.85 * PROCESSORS <= tiles * made.splits <= PROCESSORS


def test_stages_and_groups_have_common_ends() -> None:
    for group in (64, 128, 256, 1024):
        made = mixed.chosen(8, 64, 4096, 4096, group, False, 8)
        assert made is not None and max(made.deep, group) % min(made.deep, group) == 0
    assert mixed.chosen(8, 64, 4096, 4032, 192, False, 8) is None, "expanded, as for more rows"


@pytest.mark.skipif(not test_cuda_compile._has_nvcc(), reason="nvcc is not installed")
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("columns", "inner"), [(4096, 4096), (11008, 4096), (8192, 8192)])
def test_nothing_spills_and_products_do_not_wait_for_each_other(
    bits: int, columns: int, inner: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    read = toolkit._resources

    def kept(text: str) -> tuple[toolkit.Resources, ...]:
        said.append(text)
        return read(text)

    monkeypatch.setattr(toolkit, "_resources", kept)
    for rows in mixed.ROWS[:3]:
        shape = mixed.chosen(bits, rows, columns, inner, 128, bits == 4, 8)
        assert shape is not None
        space = mixed.name(shape, dtype, "")
        source = f"""
            #include <cstdint>
            {mixed.source(shape, dtype)}
            extern __shared__ uint8_t shared[];
            extern "C" __global__ void __launch_bounds__({shape.threads}, 1) product(float* to, int n) {{
              {space}start(shared);
              {space}prepare();
              float d[{shape.rows // 2}];
              {space}consume(shared, d, n, n);
              {space}put(shared, d, n);
              to[threadIdx.x] = {space}total(shared, 0, threadIdx.x);
            }}"""
        _, (found,) = toolkit.compile_fatbin(source, ["sm_90a"])
        assert found.spill_bytes == 0 and found.stack_bytes == 0
    assert len(said) == 3 and not any("serialized" in text for text in said)


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("kind", "inner", "columns", "group"), RAGGED)
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
    ) -> mixed.Shape:
        high = min(rows, mixed.MOST_ROWS)
        return mixed.Shape(bits, high, *tile, group, zeros, zero)

    monkeypatch.setattr(mixed, "chosen", made)
    monkeypatch.setattr(mixed, "ROWS", (32, 256))
    test_cuda_run.check_rows(half, kind, inner, columns, group, (17, 32, 33, 100, 128, 129, 250))


@pytest.mark.skipif(not test_cuda_run.HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "inner", "columns", "group"), RAGGED)
def test_most_rows(half: str, kind: str, inner: int, columns: int, group: int) -> None:
    test_cuda_run.check_rows(half, kind, inner, columns, group, (16, 17, 65, 127, 128, 129, 300))
