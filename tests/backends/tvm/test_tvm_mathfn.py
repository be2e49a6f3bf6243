"""Our vector forms of exp, log, erf, tanh and the narrow floats, against float64 and ml_dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.ir import normal

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess

Array = npt.NDArray[Any]


def run(op: str, x: Array) -> Array:
    """One elementwise operator through TVM."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one (float[n] x) => (float[n] y) {{ y = {op}(x) }}"""
    )
    normal.normalize(model)
    return InProcess(model).run({"x": x})["y"]


# operator -> (the real function, where it is sampled, most ulp of float32 that it may be off)
FUNCTIONS: dict[str, tuple[Callable[[float], float], tuple[float, float], float]] = {
    "Exp": (math.exp, (-86.0, 88.0), 2.0),
    "Log": (math.log, (1e-30, 1e30), 2.0),
    "Erf": (math.erf, (-5.0, 5.0), 2.0),
    "Tanh": (math.tanh, (-10.0, 10.0), 4.0),
    "Sigmoid": (lambda v: 1 / (1 + math.exp(-v)), (-80.0, 20.0), 4.0),
    "Softplus": (lambda v: math.log1p(math.exp(v)) if v < 30 else v, (-80.0, 80.0), 4.0),
    "Sinh": (math.sinh, (-80.0, 80.0), 8.0),
    "Cosh": (math.cosh, (-80.0, 80.0), 4.0),
}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_within_a_few_ulp(op: str) -> None:
    function, (low, high), most = FUNCTIONS[op]
    rng = np.random.default_rng(0)
    if op == "Log":
        x = 10 ** rng.uniform(math.log10(low), math.log10(high), 20001)
    else:
        x = np.concatenate([np.linspace(low, high, 10001), rng.uniform(-1, 1, 10000)])
    x = x.astype(np.float32)
    expected = np.array([function(float(v)) for v in x])
    ulp = np.spacing(np.maximum(np.abs(expected), 2.0**-126).astype(np.float32))
    assert (np.abs(run(op, x) - expected) / ulp).max() <= most


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("Exp", [np.nan, np.inf, 0.0, np.inf, 0.0, 1.0]),
        ("Log", [np.nan, np.inf, np.nan, math.log(200.0), np.nan, -np.inf]),
        ("Erf", [np.nan, 1.0, -1.0, 1.0, -1.0, 0.0]),
        ("Tanh", [np.nan, 1.0, -1.0, 1.0, -1.0, 0.0]),
        ("Sigmoid", [np.nan, 1.0, 0.0, 1.0, 0.0, 0.5]),
        ("Relu", [np.nan, np.inf, 0.0, 200.0, 0.0, 0.0]),
    ],
)
def test_at_the_edges(op: str, expected: list[float]) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 200.0, -200.0, 0.0], np.float32)
    np.testing.assert_allclose(run(op, x), np.array(expected, np.float32), rtol=1e-6)


NARROW = {
    "BFLOAT16": ml_dtypes.bfloat16,
    "FLOAT16": np.float16,
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT8E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "FLOAT4E2M1": ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("name", NARROW)
def test_every_value_of_a_narrow_float_survives(name: str) -> None:
    """All codes are read as ml_dtypes reads them, and midpoints round to the same neighbour."""
    dtype = np.dtype(NARROW[name])
    bits = np.arange(2 ** min(8 * dtype.itemsize, 16 if name != "FLOAT4E2M1" else 4))
    codes = bits.astype(np.uint16 if dtype.itemsize == 2 else np.uint8).view(dtype)
    values = codes.astype(np.float32)
    finite = np.unique(values[np.isfinite(values)])
    middle = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    x = np.concatenate([finite, middle]).astype(np.float32)
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        there (float[n] x) => (float[n] y) {{
            c = Cast<to={int(ir.DataType[name])}, saturate=1>(x)
            y = Cast<to=1>(c)
        }}"""
    )
    normal.normalize(model)
    actual = InProcess(model).run({"x": x})["y"]
    assert np.array_equal(actual, x.astype(dtype).astype(np.float32))
