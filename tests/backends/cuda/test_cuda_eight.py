"""Products of 8-bit numbers in every form that the IR has: on tensor cores, and right where there is a GPU.

References are float64 of the codes themselves. Integers are exact. Of floats, tensor cores of sm_90a keep
some 14 bits of a sum, which float32 adds up every 128 elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.cuda import hopper, split
from netlathe.backends.tvm.cuda.artifact import CudaArtifact
from netlathe.backends.tvm.cuda.machine import Gpu, gpu
from netlathe.backends.tvm.cuda.operands import operands
from netlathe.backends.tvm.kernel import SCHEDULE
from netlathe.backends.tvm.lowering import Lowering
from netlathe.ir import normal
from tests.backends.cuda.test_cuda_compile import _has_nvcc, resources
from tests.backends.cuda.test_cuda_run import HERE, OnGpu, OnMma

Array = npt.NDArray[Any]
E4M3: Any = ml_dtypes.float8_e4m3fn
E5M2: Any = ml_dtypes.float8_e5m2
BFLOAT16: Any = ml_dtypes.bfloat16
ROWS = (0, 1, 3, 16, 65, 128, 130, 300)
SIZES = [(200, 391), (1088, 130), (4096, 260)]
ROUNDED = 2.5e-3  # to bfloat16, once: half a unit in the last place, over the mean significand


@dataclass(frozen=True)
class Case:
    """A model of one product, activations for it, what it should give, and how far off that may be."""

    model: ir.Model
    given: Callable[[np.random.Generator, int], Array]
    wanted: Callable[[Array], Array]
    bound: float  # of the norm of the difference over the norm of the result; 0: equal


def model(inputs: str, outputs: str, body: str, constants: dict[str, Array]) -> ir.Model:
    """A graph in text and its constants."""
    made = ir.from_onnx_text(
        f'<ir_version: 12, opset_import: ["" : 25]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    used = {v.name: v for node in made.graph for v in node.inputs if v is not None}
    for name, array in constants.items():
        value = used[name]
        value.const_value = ir.Tensor(array, dtype=ir.DataType.from_numpy(array.dtype))
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
        made.graph.register_initializer(value)
    normal.normalize(made)
    return made


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def integer(inner: int, columns: int) -> Case:
    """MatMulInteger of signed bytes."""
    rng = np.random.default_rng(inner)
    w = rng.integers(-128, 128, (inner, columns)).astype(np.int8)
    made = model(
        f"int8[n, {inner}] x", f"int32[n, {columns}] y", "y = MatMulInteger (x, w)", {"w": w}
    )
    return Case(
        made,
        lambda rng, rows: rng.integers(-128, 128, (rows, inner)).astype(np.int8),
        lambda x: _wide(x) @ _wide(w),
        0.0,
    )


def with_zero(inner: int, columns: int) -> Case:
    """MatMulInteger of unsigned bytes around a zero point that is an input of the graph."""
    rng = np.random.default_rng(inner)
    w = rng.integers(-128, 128, (inner, columns)).astype(np.int8)
    made = model(
        f"uint8[n, {inner}] x",
        f"int32[n, {columns}] y",
        """
        low = ReduceMin <keepdims = 0> (x)
        y = MatMulInteger (x, w, low)
        """,
        {"w": w},
    )
    return Case(
        made,
        lambda rng, rows: rng.integers(7, 256, (rows, inner)).astype(np.uint8),
        lambda x: (_wide(x) - (x.min() if x.size else 0)) @ _wide(w),
        0.0,
    )


def requantized(inner: int, columns: int) -> Case:
    """QLinearMatMul: a scale for each column, and the result in bytes again."""
    rng = np.random.default_rng(inner)
    w = rng.integers(-128, 128, (inner, columns)).astype(np.int8)
    scale = (rng.random(columns, dtype=np.float32) + 0.5) / np.float32(inner**0.5 * 4096)
    constants = {
        "s": np.float32(0.5),
        "z": np.uint8(120),
        "w": w,
        "t": scale,
        "k": np.zeros(columns, np.int8),
        "u": np.float32(0.25),
        "o": np.uint8(100),
    }
    made = model(
        f"uint8[n, {inner}] x",
        f"uint8[n, {columns}] y",
        "y = QLinearMatMul (x, s, z, w, t, k, u, o)",
        {name: np.asarray(value) for name, value in constants.items()},
    )

    def wanted(x: Array) -> Array:
        sums = (_wide(x) - 120) @ _wide(w)
        return np.clip(np.rint(sums * (0.5 * _wide(scale) / 0.25)) + 100, 0, 255)

    return Case(
        made,
        lambda rng, rows: rng.integers(0, 256, (rows, inner)).astype(np.uint8),
        wanted,
        0.0,
    )


def pairs(inner: int, columns: int) -> Case:
    """Quantized and dequantized activations, a zero point, a bias and a Relu behind, in bfloat16."""
    rng = np.random.default_rng(inner)
    w = rng.integers(-128, 128, (inner, columns)).astype(np.int8)
    scale = ((rng.random(columns) + 0.5) / 128).astype(BFLOAT16)
    bias = rng.standard_normal(columns).astype(BFLOAT16)
    constants = {
        "s": np.asarray(0.03125, BFLOAT16),
        "z": np.asarray(-3, np.int8),
        "w": w,
        "t": scale,
        "b": bias,
    }
    made = model(
        f"bfloat16[n, {inner}] x",
        f"bfloat16[n, {columns}] y",
        """
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        e = DequantizeLinear <axis = 1> (w, t)
        p = MatMul (d, e)
        a = Add (p, b)
        y = Relu (a)
        """,
        constants,
    )

    def wanted(x: Array) -> Array:
        codes = np.clip(np.rint(_wide(x) * 32) - 3, -128, 127)
        product = (codes + 3) @ _wide(w) * _wide(scale) / 32
        return np.maximum(_wide(product.astype(BFLOAT16)) + _wide(bias), 0)

    return Case(
        made,
        lambda rng, rows: rng.standard_normal((rows, inner)).astype(BFLOAT16),
        wanted,
        2 * ROUNDED,  # the product and the sum are rounded
    )


def _float8(left: Any, right: Any) -> Callable[[int, int], Case]:
    def case(inner: int, columns: int) -> Case:
        rng = np.random.default_rng(inner)
        w = rng.standard_normal((inner, columns)).astype(right)
        scale = rng.random(columns, dtype=np.float32) + np.float32(0.5)
        name = {E4M3: "float8e4m3fn", E5M2: "float8e5m2"}[left]
        made = model(
            f"{name}[n, {inner}] x",
            f"float[n, {columns}] y",
            """
            d = DequantizeLinear (x, s)
            e = DequantizeLinear <axis = 1> (w, t)
            y = MatMul (d, e)
            """,
            {"s": np.asarray(0.5, np.float32), "w": w, "t": scale},
        )
        return Case(
            made,
            lambda rng, rows: rng.standard_normal((rows, inner)).astype(left),
            lambda x: _wide(x) @ _wide(w) * _wide(scale) * 0.5,
            2e-4,
        )

    return case


def weight_alone(inner: int, columns: int) -> Case:
    """A weight of 8-bit floats, and activations of bfloat16."""
    rng = np.random.default_rng(inner)
    w = rng.standard_normal((inner, columns)).astype(E4M3)
    scale = (rng.random(columns) + 0.5).astype(BFLOAT16)
    made = model(
        f"bfloat16[n, {inner}] x",
        f"bfloat16[n, {columns}] y",
        """
        e = DequantizeLinear <axis = 1> (w, t)
        y = MatMul (x, e)
        """,
        {"w": w, "t": scale},
    )
    held = _wide((w.astype(np.float32) * scale.astype(np.float32)).astype(BFLOAT16))
    return Case(
        made,
        lambda rng, rows: rng.standard_normal((rows, inner)).astype(BFLOAT16),
        lambda x: _wide(x) @ held,
        ROUNDED,
    )


def by_token(inner: int, columns: int) -> Case:
    """A scale for each row of 8-bit floats: what a block as wide as the row says."""
    rng = np.random.default_rng(inner)
    w = rng.standard_normal((inner, columns)).astype(E4M3)
    made = model(
        f"bfloat16[2, n, {inner}] x",
        f"bfloat16[2, n, {columns}] y",
        f"""
        a = Abs (x)
        m = ReduceMax <keepdims = 1> (a, last)
        s = Mul (m, part)
        q = QuantizeLinear <axis = -1, block_size = {inner}, output_dtype = 17> (x, s)
        d = DequantizeLinear <axis = -1, block_size = {inner}> (q, s)
        e = DequantizeLinear (w, t)
        y = MatMul (d, e)
        """,
        {
            "last": np.array([-1]),
            "part": np.asarray(2.0**-8, BFLOAT16),
            "w": w,
            "t": np.asarray(0.25, BFLOAT16),
        },
    )

    def wanted(x: Array) -> Array:
        scale = _wide(np.abs(x).max(-1, keepdims=True, initial=0) * BFLOAT16(2.0**-8))
        with np.errstate(invalid="ignore"):
            ratio = (_wide(x) / scale).astype(np.float32).astype(BFLOAT16)
        return _wide(ratio.astype(E4M3)) * scale @ _wide(w) * 0.25

    return Case(
        made,
        lambda rng, rows: rng.standard_normal((2, rows, inner)).astype(BFLOAT16),
        wanted,
        ROUNDED,
    )


CASES: dict[str, Callable[[int, int], Case]] = {
    "integer": integer,
    "zero": with_zero,
    "requantized": requantized,
    "pairs": pairs,
    "e4m3": _float8(E4M3, E4M3),
    "e5m2": _float8(E5M2, E5M2),
    "e5m2 by e4m3": _float8(E5M2, E4M3),
    "token": by_token,
    "weight": weight_alone,
}


def schedules(made: ir.Model, machine: Gpu) -> list[str]:
    """The schedules of a model's kernels."""
    functions: list[Any] = [f for _, f in Lowering(made, machine).run().module.functions_items()]
    return [str(f.attrs[SCHEDULE]) for f in functions if f.attrs and SCHEDULE in f.attrs]


@pytest.mark.parametrize("name", CASES)
def test_tensor_cores_take_it(name: str) -> None:
    made = CASES[name](200, 391).model
    assert "gemm.warpgroups" in schedules(made, gpu(["sm_90a"]))
    assert "gemm.warps" in schedules(made, gpu(["sm_89"]))
    # There is no product of 8-bit floats before sm_89; what they are dequantized to may have one.
    assert ("gemm.warps" in schedules(made, gpu(["sm_80"]))) == (not name.startswith("e"))


def both(inner: int, columns: int) -> ir.Model:
    """A product of integers and one of 8-bit floats."""
    rng = np.random.default_rng(0)
    return model(
        f"int8[n, {inner}] x, float8e4m3fn[n, {inner}] z",
        f"int32[n, {columns}] y, float[n, {columns}] v",
        """
        y = MatMulInteger (x, w)
        d = DequantizeLinear (z, s)
        e = DequantizeLinear (u, s)
        v = MatMul (d, e)
        """,
        {
            "w": rng.integers(-128, 128, (inner, columns)).astype(np.int8),
            "u": rng.standard_normal((inner, columns)).astype(E4M3),
            "s": np.asarray(0.5, np.float32),
        },
    )


@pytest.mark.skipif(not _has_nvcc(), reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
def test_it_compiles_and_keeps_its_sums_in_registers(arch: str) -> None:
    made = CudaArtifact(both(256, 384), gpu([arch]))
    found = [r for r in resources(made) if r.kernel.startswith("gemm_warp")]
    kernels = 2
    if arch == "sm_90a":  # those for one tile, and those that more rows are tiles of
        kernels = 0
        for kind in map(operands, ("s8", "e4m3")):
            rows = split.rows_of(kind)
            shapes = {tiling.shape for tiling in hopper.tiled(kind, 384, 256, rows[-1])}
            kernels += len(rows) + len(shapes)
    assert len(found) == kernels and {r.arch for r in found} == {arch}
    for r in found:  # there are 256 threads at least
        assert r.spill_bytes == 0 and r.stack_bytes == 0 and r.registers * 256 <= 65536, r


@pytest.mark.skipif(not _has_nvcc(), reason="nvcc is not installed")
@pytest.mark.parametrize("name", ["zero", "pairs"])
def test_what_follows_the_sums_compiles(name: str) -> None:
    """A zero point is a byte that all results of a thread have in common."""
    assert resources(CudaArtifact(CASES[name](200, 391).model, gpu(["sm_90a"])))


def check(case: Case, run: Callable[[Array], Array]) -> float:
    """Compare for all numbers of rows; the largest error."""
    rng, worst = np.random.default_rng(1), 0.0
    for rows in ROWS:
        x = case.given(rng, rows)
        found, wanted = _wide(run(x)), case.wanted(x)
        assert found.shape == wanted.shape
        if case.bound == 0:
            np.testing.assert_array_equal(found, wanted)
        elif rows:
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            assert error < case.bound, (rows, error)
            worst = max(worst, error)
    return worst


@pytest.mark.skipif(not HERE, reason="no GPU that there are kernels for")
@pytest.mark.parametrize("kernels", [Gpu, OnMma])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("inner", "columns"), SIZES)
def test_product(kernels: type[Gpu], name: str, inner: int, columns: int) -> None:
    case = CASES[name](inner, columns)
    program = OnGpu(case.model, kernels(**vars(gpu([HERE[-1]]))))
    check(case, lambda x: program.run({"x": x})["y"])
