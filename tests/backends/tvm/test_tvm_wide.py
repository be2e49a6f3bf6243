"""Reductions of wide columns, and transposes, at sizes that fit no tile."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess
from tests.ir.onnx_text import normal_model


@pytest.mark.parametrize("kind", ["Sum", "Max"])
@pytest.mark.parametrize("known", [True, False], ids=["known", "dynamic"])
def test_wide_reductions_of_columns(kind: str, known: bool) -> None:
    for rows, columns in ((1, 2048), (9, 2085), (4, 4133), (7, 17)):
        sizes = f"2, {rows}, {columns}" if known else "a, b, c"
        model = normal_model(
            f"""<ir_version: 10, opset_import: ["" : 25]>
            one (float[{sizes}] x, int64[1] axes) => (float[2, {columns if known else "c"}] y) {{
                y = Reduce{kind}<keepdims = 0>(x, axes)
            }}""",
            axes=np.array([1]),
        )
        made = InProcess(model)
        x = np.random.default_rng(rows).normal(size=(2, rows, columns)).astype(np.float32)
        expected = x.max(1) if kind == "Max" else x.astype(np.float64).sum(1)
        np.testing.assert_allclose(made.run({"x": x})["y"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float", "uint8"])
@pytest.mark.parametrize("known", [True, False], ids=["known", "dynamic"])
@pytest.mark.parametrize(
    ("shape", "perm"),
    [
        ((67, 129), (1, 0)),
        ((3, 65, 70), (0, 2, 1)),
        ((5, 33, 2, 31), (3, 1, 0, 2)),
        ((1, 4099), (1, 0)),
    ],
    ids=str,
)
def test_transposes(dtype: str, known: bool, shape: tuple[int, ...], perm: tuple[int, ...]) -> None:
    names = shape if known else ("a", "b", "c", "d")[: len(shape)]
    given = ", ".join(map(str, names))
    result = ", ".join(str(names[axis]) for axis in perm)
    model = normal_model(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one ({dtype}[{given}] x) => ({dtype}[{result}] y) {{
            y = Transpose<perm = [{", ".join(map(str, perm))}]>(x)
        }}"""
    )
    made = InProcess(model)
    number = np.arange(np.prod(shape)).reshape(shape)
    x = number.astype(np.float32 if dtype == "float" else np.uint8)
    np.testing.assert_array_equal(made.run({"x": x})["y"], x.transpose(perm))
