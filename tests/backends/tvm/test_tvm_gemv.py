"""Constant matrices of 4 and 8 bits, by block and by column, at sizes that fit no tile, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import machine as machines
from netlathe.backends.tvm import runtime
from netlathe.execute.compare import relative_error
from netlathe.ir import normal

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.lowering import Lowering
from tests.backends.tvm.in_process import InProcess

Array = npt.NDArray[Any]
BOUND = 1e-5  # share of the RMS: float32 sums of at most 80 products in another order

NUMBERS: dict[str, tuple[Any, int, int]] = {
    "int4": (ml_dtypes.int4, -8, 8),
    "uint4": (ml_dtypes.uint4, 0, 16),
    "int8": (np.int8, -128, 128),
    "uint8": (np.uint8, 0, 256),
}
# number type, rows of K, columns, block (0: a scale per column), zero points
CASES = [
    ("int4", 64, 50, 32, False),
    ("int4", 64, 130, 0, False),
    ("int4", 80, 7, 4, False),  # blocks of less than a word
    ("uint4", 64, 50, 16, True),
    ("uint4", 36, 50, 0, True),  # not whole words
    ("int8", 72, 50, 0, False),
    ("uint8", 64, 130, 32, True),
    ("int8", 48, 33, 24, True),  # blocks that are no whole vectors
    ("int8", 72, 128, 24, True),  # two panels of 64 columns, for two threads
    ("uint4", 64, 512, 32, True),
    ("uint8", 272, 20, 0, False),  # 136 elements of a row share no exponent
]


def quantized(
    dtype: str, inner: int, columns: int, block: int, zeros: bool
) -> tuple[ir.Model, Array]:
    """x times a quantized constant, and what the constant stands for."""
    rng = np.random.default_rng(0)
    kind, low, high = NUMBERS[dtype]
    shape = (inner // block, columns) if block else (columns,)
    sizes = ", ".join(map(str, shape))
    constants = {
        "w": rng.integers(low, high, (inner, columns)).astype(kind),
        "s": rng.uniform(0.001, 0.002, shape).astype(np.float32),
    }
    if zeros:
        constants["z"] = rng.integers(low, high, shape).astype(kind)
    attributes = f"axis=0, block_size={block}" if block else "axis=1"
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one (float[rows, {inner}] x, {dtype}[{inner}, {columns}] w, float[{sizes}] s
             {f", {dtype}[{sizes}] z" if zeros else ""}) => (float[rows, {columns}] y) {{
            d = DequantizeLinear<{attributes}>(w, s{", z" if zeros else ""})
            y = MatMul(x, d)
        }}"""
    )
    for name, array in constants.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    normal.normalize(model)

    def spread(name: str) -> Array:
        values: Array = constants[name].astype(np.float64)
        return np.repeat(values, block, 0) if block else values

    weight: Array = constants["w"].astype(np.float64)
    if zeros:
        weight = weight - spread("z")
    return model, weight * spread("s")


@pytest.mark.parametrize("level", ["avx2", "avx512", "avx512vnni"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_row_and_many(case: tuple[str, int, int, int, bool], level: str) -> None:
    if not runtime.cpu_features().issuperset(machines.LEVELS[level][1]):
        pytest.skip(f"this CPU lacks {level}")
    model, weight = quantized(*case)
    made = InProcess(model, level)
    for rows in (1, 5, 17):
        x = np.random.default_rng(rows).normal(size=(rows, case[1])).astype(np.float32)
        assert relative_error(made.run({"x": x})["y"], (x @ weight).astype(np.float32)) < BOUND


VNNI = pytest.mark.skipif(
    not runtime.cpu_features().issuperset(machines.LEVELS["avx512vnni"][1]),
    reason="this CPU lacks avx512vnni",
)


@VNNI
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_rows_of_any_magnitude(dtype: str) -> None:
    """Each product is off by 2^-22 of what the largest of the chunk would give, and sums by float32's eps."""
    model, weight = quantized(dtype, 128, 50, 32, False)
    made = InProcess(model, "avx512vnni")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 128))
    outlier = np.where(np.arange(128) == 77, 1e4, x)
    wide = x * 10.0 ** rng.uniform(-12, 12, x.shape)
    halves = np.where(np.arange(128) < 64, 1e-30 * x, 1e30 * x)
    for row in (x, outlier, wide, halves, 1e-25 * x, 1e33 * x, np.zeros_like(x), np.abs(x)):
        row = row.astype(np.float32)
        actual, exact = made.run({"x": row})["y"], row.astype(np.float64) @ weight
        size = np.abs(row.astype(np.float64))
        largest = np.repeat(
            size.reshape(-1, 32).max(1), 32
        )  # 32 rows share a scale and an exponent
        bound = (largest * 2.0**-22 + size * 2.0**-21) @ np.abs(weight)
        assert np.all(np.abs(actual - exact) <= bound)


@VNNI
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_no_number_makes_none(number: float) -> None:
    model, _ = quantized("int4", 64, 50, 32, False)
    x = np.ones((1, 64), np.float32)
    x[0, 40] = number
    assert np.isnan(InProcess(model, "avx512vnni").run({"x": x})["y"]).all()


def test_four_bits_take_four_bits() -> None:
    model, _ = quantized("int4", 64, 48, 32, False)
    lowered = Lowering(model, machines.machine("avx2")).run()
    held = next(p for p in lowered.parameters if p.dtype == "int32")
    assert int(np.prod(held.shape)) * 4 == 64 * 48 // 2
