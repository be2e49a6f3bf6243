"""Products of bytes: exact sums at sizes that fit no tile, both signs, zero points, borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.backends.tvm import machine as machines
from netlathe.execute import ort

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.lowering import Lowering
from tests.backends.tvm.in_process import InProcess
from tests.ir.onnx_text import normal_model

Array = npt.NDArray[Any]


def numbers(dtype: str, shape: tuple[int, ...], seed: int) -> Array:
    """Both ends of the range too, where saturation would show."""
    info = np.iinfo(dtype)
    made = np.random.default_rng(seed).integers(info.min, info.max + 1, shape)
    made.reshape(-1)[:2] = info.min, info.max
    return made.astype(dtype)


def schedules(model: ir.Model) -> str:
    """The kernels that a CPU with dot products of bytes gets."""
    module = Lowering(model, machines.machine("avx512vnni")).run().module
    return " ".join(variable.name_hint for variable in module.functions)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("sizes", [(1, 4, 3), (13, 36, 50), (7, 68, 131)], ids=str)
def test_matrix_product_is_exact(dtype: str, sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    w = numbers("int8", (inner, columns), 0)
    zero = np.array(-3 if dtype == "int8" else 131, dtype)
    model = normal_model(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one ({dtype}[rows, {inner}] x, int8[{inner}, {columns}] w, {dtype} z) => (int32[rows, {columns}] y) {{
            y = MatMulInteger(x, w, z)
        }}""",
        w=w,
        z=zero,
    )
    assert "gemm_dots" in schedules(model)
    x = numbers(dtype, (rows, inner), 1)
    expected = (x.astype(np.int64) - int(zero)) @ w.astype(np.int64)
    np.testing.assert_array_equal(InProcess(model).run({"x": x})["y"], expected)


# rows, columns, channels in and out, kernel, stride, padding, groups, dilation
CONVOLUTIONS = [
    (7, 5, 20, 30, 3, 1, 1, 1, 1),
    (9, 9, 3, 17, 5, 2, 2, 1, 1),
    (6, 7, 12, 19, 1, 1, 0, 1, 1),
    (6, 7, 13, 8, 1, 2, 0, 1, 1),
    (13, 9, 37, 37, 3, 1, 1, 37, 1),
    (8, 8, 8, 12, 3, 1, 2, 2, 2),
]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_convolution_is_exact(dtype: str, sizes: tuple[int, ...]) -> None:
    h, w_, inputs, outputs, k, s, p, g, d = sizes
    w = numbers("int8", (outputs, inputs // g, k, k), 0)
    zero = np.array(5 if dtype == "int8" else 120, dtype)
    attributes = (
        f"kernel_shape=[{k}, {k}], strides=[{s}, {s}], pads=[{p}, {p}, {p}, {p}], group={g}"
    )
    model = normal_model(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one ({dtype}[n, {inputs}, {h}, {w_}] x, int8[{outputs}, {inputs // g}, {k}, {k}] w, {dtype} z)
            => (int32[n, {outputs}, rows, columns] y) {{
            y = ConvInteger<{attributes}, dilations=[{d}, {d}]>(x, w, z)
        }}""",
        w=w,
        z=zero,
    )
    assert any(name in schedules(model) for name in ("gemm_dots", "conv_dots", "conv_depthwise"))
    x = numbers(dtype, (2, inputs, h, w_), 1)
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.conv2d(  # in float64 these sums are exact
        torch.from_numpy(x.astype(np.float64) - int(zero)),
        torch.from_numpy(w.astype(np.float64)),
        stride=s,
        padding=p,
        dilation=d,
        groups=g,
    )
    np.testing.assert_array_equal(InProcess(model).run({"x": x})["y"], expected.numpy())


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_pairs_around_a_convolution_become_bytes(dtype: str) -> None:
    """Dequantize, convolve with bias, activate, quantize: within one step of ONNX Runtime's float sums."""
    rng = np.random.default_rng(0)
    zero = np.array(-7 if dtype == "int8" else 121, dtype)
    model = normal_model(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one (float[n, 16, 9, 11] x, float s, {dtype} z, int8[24, 16, 3, 3] w, float[24] ws,
             int32[24] b, float[24] bs, float t) => ({dtype}[n, 24, 9, 11] y) {{
            q = QuantizeLinear(x, s, z)
            f = DequantizeLinear(q, s, z)
            g = DequantizeLinear<axis=0>(w, ws)
            c = DequantizeLinear<axis=0>(b, bs)
            m = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(f, g, c)
            r = Relu(m)
            y = QuantizeLinear(r, t, z)
        }}""",
        s=np.array(0.03, np.float32),
        z=zero,
        w=numbers("int8", (24, 16, 3, 3), 1),
        ws=rng.uniform(0.001, 0.002, 24).astype(np.float32),
        b=rng.integers(-999, 999, 24).astype(np.int32),
        bs=rng.uniform(0.0001, 0.0002, 24).astype(np.float32),
        t=np.array(0.07, np.float32),
    )
    assert "conv_dots" in schedules(model)
    x = rng.normal(size=(2, 16, 9, 11)).astype(np.float32)
    actual = InProcess(model).run({"x": x})["y"].astype(int)
    expected = ort.run(model, {"x": x})["y"].astype(int)
    # The sums differ in the last bits of float32, which matters where they lie between two steps.
    assert np.abs(actual - expected).max() <= 1
    assert (actual != expected).mean() < 1e-3


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 7e-5, 2.0])
def test_quantizing_by_a_constant_is_division(scale: float) -> None:
    model = normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        one (float[n] x, float s, uint8 z) => (uint8[n] y) { y = QuantizeLinear(x, s, z) }""",
        s=np.array(scale, np.float32),
        z=np.array(99, np.uint8),
    )
    s = np.float32(scale)
    halves = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * s
    near = np.concatenate([halves, np.nextafter(halves, np.float32(9)), [np.inf, -np.inf, 1e38]])
    x = near.astype(np.float32)
    with np.errstate(over="ignore"):
        expected = np.clip(np.rint(x / s) + 99, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(InProcess(model).run({"x": x})["y"], expected)


def _agree(model: ir.Model, x: Array) -> None:
    """Within one step, and nearly everywhere equal to ONNX Runtime, whose float sums have another order."""
    actual = InProcess(model).run({"x": x})["y"].astype(int)
    expected = ort.run(model, {"x": x})["y"].astype(int)
    assert np.abs(actual - expected).max() <= 1
    assert (actual != expected).mean() < 1e-3


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_depthwise_by_floats_reads_bytes(dtype: str) -> None:
    rng = np.random.default_rng(0)
    model = normal_model(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one (float[n, 19, 9, 11] x, float s, {dtype} z, float[19, 1, 3, 3] w, float[19] b, float t)
            => ({dtype}[n, 19, 5, 6] y) {{
            q = QuantizeLinear(x, s, z)
            f = DequantizeLinear(q, s, z)
            m = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], group=19>(f, w, b)
            y = QuantizeLinear(m, t, z)
        }}""",
        s=np.array(0.03, np.float32),
        z=np.array(-7 if dtype == "int8" else 121, dtype),
        w=rng.normal(size=(19, 1, 3, 3)).astype(np.float32),
        b=rng.normal(size=19).astype(np.float32),
        t=np.array(0.07, np.float32),
    )
    # The input as bytes, the same with channels last, and the result in the usual order: no floats.
    assert schedules(model).count("general") == 3
    _agree(model, rng.normal(size=(2, 19, 9, 11)).astype(np.float32))


def test_a_sum_is_done_where_its_bytes_are_made() -> None:
    rng = np.random.default_rng(0)
    model = normal_model(
        """<ir_version: 10, opset_import: ["" : 25]>
        one (float[n, 16, 7, 5] x, float s, uint8 z, int8[16, 16, 1, 1] w, float ws, float t)
            => (uint8[n, 16, 6, 4] y) {
            q = QuantizeLinear(x, s, z)
            f = DequantizeLinear(q, s, z)
            g = DequantizeLinear(w, ws)
            m = Conv<kernel_shape=[1, 1]>(f, g)
            o = QuantizeLinear(m, t, z)
            p = DequantizeLinear(o, t, z)
            r = Add(f, p)
            u = QuantizeLinear(r, t, z)
            y = MaxPool<kernel_shape=[2, 2]>(u)
        }""",
        s=np.array(0.03, np.float32),
        z=np.array(121, np.uint8),
        w=numbers("int8", (16, 16, 1, 1), 1),
        ws=np.array(0.004, np.float32),
        t=np.array(0.07, np.float32),
    )
    module = Lowering(model, machines.machine("avx512vnni")).run().module
    held = [str(getattr(parameter, "dtype", "")) for parameter in module["gemm_dots_0"].params]
    assert held.count("uint8") == 3  # what is multiplied, what is added, and the result
    _agree(model, rng.normal(size=(2, 16, 7, 5)).astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_both_sides_of_a_sum_are_rounded(dtype: str) -> None:
    """One by the kernel that adds, as floats; the other is written as bytes."""
    rng = np.random.default_rng(0)
    zero = np.array(-7 if dtype == "int8" else 121, dtype)
    model = normal_model(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one (float[n, 16, 7, 5] x, float s, {dtype} z, int8[20, 16, 1, 1] w, int8[20, 16, 1, 1] v,
             float ws, float t, float r) => ({dtype}[n, 20, 7, 5] y) {{
            q = QuantizeLinear(x, s, z)
            f = DequantizeLinear(q, s, z)
            g = DequantizeLinear(w, ws)
            h = DequantizeLinear(v, ws)
            m = Conv<kernel_shape=[1, 1]>(f, g)
            o = QuantizeLinear(m, t, z)
            p = DequantizeLinear(o, t, z)
            n2 = Conv<kernel_shape=[1, 1]>(f, h)
            o2 = QuantizeLinear(n2, r, z)
            p2 = DequantizeLinear(o2, r, z)
            a = Add(p, p2)
            y = QuantizeLinear(a, t, z)
        }}""",
        s=np.array(0.03, np.float32),
        z=zero,
        w=numbers("int8", (20, 16, 1, 1), 1),
        v=numbers("int8", (20, 16, 1, 1), 2),
        ws=np.array(0.004, np.float32),
        t=np.array(0.07, np.float32),
        r=np.array(0.05, np.float32),
    )
    module = Lowering(model, machines.machine("avx512vnni")).run().module
    held = [
        str(parameter.dtype)
        for name in ("gemm_dots_0", "gemm_dots_1")
        for parameter in module[name].params
        if len(getattr(parameter, "shape", ())) == 4
    ]
    assert len(held) == 5 and set(held) <= {"uint8", dtype}
    _agree(model, rng.normal(size=(2, 16, 7, 5)).astype(np.float32))
