"""Convolutions by Winograd's transforms: exact algebra, ragged sizes, epilogues, error, and the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import toom_cook
from netlathe.backends.tvm.machine import machine
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.ir import normal

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.kernels import winograd
from netlathe.backends.tvm.kernels.conv import Geometry
from netlathe.backends.tvm.kernels.tile import Panels
from netlathe.backends.tvm.kernels.winograd_plan import Plan, plan
from netlathe.backends.tvm.lowering import Lowering
from tests.backends.tvm.in_process import InProcess

Array = npt.NDArray[Any]
BOUND = 1e-5  # the largest error over the RMS, that of the direct kernel's tests


def convolution(
    inputs: int, outputs: int, plane: str, attributes: str, then: str = "y = Relu(c)"
) -> ir.Model:
    """x [n, inputs, *plane] -> Conv with a constant weight and bias, and what follows -> y."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        net (float[n, {inputs}, {plane}] x, float[{outputs}, {inputs}, 3, 3] w, float[{outputs}] b)
            => (float[n, {outputs}, rows, columns] y) {{
            c = Conv<kernel_shape=[3, 3], {attributes}>(x, w, b)
            {then}
        }}"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (outputs, inputs, 3, 3)), ("b", (outputs,))):
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(rng.normal(size=shape).astype(np.float32), name=name)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


def schedules(model: ir.Model) -> str:
    return " ".join(
        name.name_hint for name in Lowering(model, machine("native")).run().module.functions
    )


@pytest.mark.parametrize("m", toom_cook.POINTS)
def test_the_transforms_are_exact(m: int) -> None:
    """A^T [(G g) * (B^T d)] is the correlation of d and g, up to rounding in float64."""
    rng = np.random.default_rng(0)
    d, g = rng.normal(size=(m + 2, 100)), rng.normal(size=(3, 100))
    times, keep = (lambda value, factor: factor * value), (lambda value: value)
    at_points = np.stack(toom_cook.inputs_at_points(m, list(d), times, keep))
    products = toom_cook.taps_matrix(m) @ g * at_points
    made = np.stack(toom_cook.outputs_of_points(m, list(products), times, keep))
    expected = [sum(d[i + k] * g[k] for k in range(3)) for i in range(m)]
    assert np.abs(made - np.stack(expected)).max() < 1e-13


# Rows, columns, channels in and out, pads, and how it is cut: m, tiles of a block, parts, register tile.
SIZES = [
    (
        (13, 17, 20, 50),
        (1, 1, 1, 1),
        (4, 6, 2, 3, 2),
    ),  # 20 tiles in 4 blocks; the last panel is ragged
    ((13, 17, 20, 50), (1, 1, 1, 1), (2, 10, 1, 5, 2)),
    ((7, 7, 33, 19), (1, 1, 1, 1), (4, 12, 2, 4, 1)),  # 8 tiles are fewer than a block
    ((11, 5, 16, 40), (0, 2, 1, 0), (4, 5, 2, 5, 1)),  # three panels over two parts
    ((6, 6, 17, 16), (2, 2, 2, 2), (4, 4, 1, 2, 1)),
    ((3, 3, 16, 16), (0, 0, 0, 0), (4, 2, 1, 2, 1)),  # one output
    ((5, 4, 16, 16), (4, 4, 4, 4), (4, 4, 1, 4, 1)),  # windows that hold nothing of the plane
]


@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sizes", "pads", "cut"), SIZES, ids=str)
def test_agrees_with_onnx_runtime(
    sizes: tuple[int, ...],
    pads: tuple[int, ...],
    cut: tuple[int, ...],
    dynamic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h, w, inputs, outputs = sizes
    m, block, parts, rows, vectors = cut
    lanes = machine("native").lanes("float32")
    chosen = Plan(m, block, parts, Panels(outputs, lanes, vectors, rows))
    monkeypatch.setattr(winograd, "plan", lambda *given: chosen)
    plane = "h, w" if dynamic else f"{h}, {w}"
    model = convolution(inputs, outputs, plane, f"pads={list(pads)}")
    assert "conv_winograd" in schedules(model)
    x = np.random.default_rng(1).normal(size=(2, inputs, h, w)).astype(np.float32)
    expected = ort.run(model, {"x": x})["y"]
    assert relative_error(InProcess(model).run({"x": x})["y"], expected) < BOUND


@pytest.mark.parametrize(
    ("attributes", "then"),
    [
        ("pads=[1, 1, 1, 1]", "h = HardSwish(c) y = Add(h, x)"),  # a residual
        ('auto_pad="SAME_UPPER"', "y = Identity(c)"),
        ('auto_pad="VALID"', "s = Sigmoid(c) y = Mul(c, s)"),
        ("pads=[1, 1, 1, 1]", "r = Relu(c) d = Conv<pads=[1, 1, 1, 1]>(r, w) y = Add(d, r)"),
    ],
)
def test_what_surrounds_it(attributes: str, then: str) -> None:
    model = convolution(48, 48, "22, 18", attributes, then)
    assert "conv_winograd" in schedules(model)
    x = np.random.default_rng(1).normal(size=(3, 48, 22, 18)).astype(np.float32)
    made = InProcess(model).run({"x": x})["y"]
    assert relative_error(made, ort.run(model, {"x": x})["y"]) < BOUND


def test_what_is_chosen() -> None:
    """Tiles by the size of the plane; the direct kernel where little is saved, or there is no such form."""
    here = machine("native")

    def m(inputs: int, outputs: int, rows: int | None, **other: Any) -> int:
        given = {"groups": 1, "kernel": (3, 3), "strides": (1, 1), "dilations": (1, 1), **other}
        made = plan(here, Geometry(inputs=inputs, outputs=outputs, **given), None, (rows, rows))
        return made.outputs if made is not None else 0

    assert [m(64, 64, 56), m(128, 128, 28), m(512, 512, 28)] == [4, 4, 4]
    assert [m(512, 512, 7), m(64, 64, None)] == [2, 2]
    assert [m(3, 64, 224), m(64, 64, 2), m(512, 512, 1)] == [0, 0, 0]
    for other in ({"kernel": (5, 5)}, {"strides": (2, 2)}, {"dilations": (2, 2)}, {"groups": 2}):
        assert m(64, 64, 56, **other) == 0


@pytest.mark.parametrize("m", toom_cook.POINTS)
def test_error_beside_that_of_the_direct_kernel(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both against float64, on activations as after a ReLU: at most twice as much, and half again."""
    c, size = 64, 14
    model = convolution(c, c, f"{size}, {size}", "pads=[0, 0, 0, 0]", "y = Identity(c)")
    x = np.maximum(np.random.default_rng(1).normal(size=(1, c, size, size)), 0).astype(np.float32)
    weights = {
        v.name: np.asarray(v.const_value, np.float64) for v in model.graph.initializers.values()
    }
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), (2, 3))
    exact = np.einsum("nchwij,ocij->nohw", windows, weights["w"]) + weights["b"][:, None, None]

    def error(chosen: Plan | None) -> float:
        monkeypatch.setattr(winograd, "plan", lambda *given: chosen)
        made = InProcess(model).run({"x": x})["y"]
        return float(np.sqrt(np.square(made - exact).mean() / np.square(exact).mean()))

    lanes = machine("native").lanes("float32")
    assert error(Plan(m, 4, 1, Panels(c, lanes, 2, 4))) < {2: 1.5, 4: 3.0}[m] * error(None) < 1e-6


def test_fifty_layers_keep_the_bound_of_artifacts() -> None:
    """Errors of a deep network add up to far less than the 1e-4 that an artifact is allowed."""
    layers = " ".join(
        f"c{i} = Conv<pads=[1, 1, 1, 1]>(x{i}, w) r{i} = Relu(c{i})"
        f" s{i} = Mul(r{i}, k) x{i + 1} = Add(x{i}, s{i})"
        for i in range(50)
    )
    model = convolution(
        32,
        32,
        "16, 16",
        "pads=[1, 1, 1, 1]",
        f"k = Constant<value_float = 0.05>() x0 = Relu(c) {layers} y = Identity(x50)",
    )
    x = np.random.default_rng(1).normal(size=(1, 32, 16, 16)).astype(np.float32)
    made = InProcess(model).run({"x": x})["y"]
    assert relative_error(made, ort.run(model, {"x": x})["y"]) < 1e-5


SAVE = """
import sys
from pathlib import Path
import onnx_ir as ir
from netlathe.backends.tvm.backend import TvmBackend
from netlathe.ir import normal
model = ir.load(sys.argv[1])
normal.normalize(model)
backend = TvmBackend()
(target,) = backend.targets()
folder = Path(sys.argv[2])
folder.mkdir()
backend.compile(model, target).save(folder)
"""
RUN = """
import sys
sys.modules["torch"] = None
import numpy, runtime
model = runtime.load(".", threads=int(sys.argv[1]))
numpy.save(sys.argv[2], model(x=numpy.load(sys.argv[3]))["y"])
"""


def test_the_same_bits_from_any_number_of_threads_and_any_build(tmp_path: Path) -> None:
    model = convolution(64, 96, "h, w", "pads=[1, 1, 1, 1]")
    ir.save(model, tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(1, 64, 21, 23)).astype("f4"))
    for number in range(2):
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        words = ["-c", SAVE, str(tmp_path / "model.onnx"), str(tmp_path / str(number))]
        subprocess.run([sys.executable, *words], env=environment, check=True)
    for name in ("model.so", "params.bin", "meta.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    results = []
    for threads in (1, 2, 3):
        out = tmp_path / f"y{threads}.npy"
        words = [sys.executable, "-c", RUN, str(threads), str(out), str(tmp_path / "x.npy")]
        folder = tmp_path / "0"
        environment = {**os.environ, "PYTHONPATH": str(folder), "OPENBLAS_NUM_THREADS": "1"}
        subprocess.run(words, cwd=folder, env=environment, check=True)
        results.append(np.load(out))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
