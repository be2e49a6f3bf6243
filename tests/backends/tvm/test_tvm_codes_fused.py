"""Which kernel writes the bytes that products read: the one that has the floats, with or without these."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tvm import relax

from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.machine import machine
from netlathe.ir import normal
from tests.backends.tvm.in_process import InProcess

CONSTANTS = {
    "g": np.ones(64, np.float32),
    "b": np.zeros(64, np.float32),
    "xs": np.float32(0.05),
    "xz": np.uint8(128),
    "w": np.arange(64 * 48).reshape(64, 48).astype(np.int8),
    "ws": np.full(48, 0.01, np.float32),
    "same": np.float32(0.05),
    "ws0": np.float32(0.03),
    "iz": np.int8(-3),
    "square": np.arange(64 * 64).reshape(64, 64).astype(np.int8),
    "gs": np.full(64, 0.01, np.float32),
    "shape": np.array([1, -1, 64]),
    "floats": np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32),
    "taps": np.random.default_rng(2).normal(size=(8, 8, 3, 3)).astype(np.float32),
}
STATIC = """
    q = QuantizeLinear (s, xs, xz)
    d = DequantizeLinear (q, xs, xz)
    e = DequantizeLinear <axis = 1> (w, ws)
    y = MatMul (d, e)
    """
DYNAMIC = """
    q, scale, zero = DynamicQuantizeLinear (s)
    i = MatMulInteger (q, w, zero)
    f = Cast <to = 1> (i)
    y = Mul (f, scale)
    """


def model_of(body: str, outputs: str, x: str = "float[n, 64] x") -> ir.Model:
    """A graph of ``x`` and those of CONSTANTS that it reads."""
    words = set(re.findall(r"\w+", body))
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    declared = ", ".join(
        f"{ir.DataType.from_numpy(np.asarray(array).dtype).name.lower()}"
        f"[{', '.join(map(str, np.shape(array)))}] {name}"
        for name, array in used.items()
    )
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one ({x}, {declared}) => ({outputs}) {{ {body} }}"""
    )
    graph = model.graph
    for value in list(graph.inputs):
        if value.name in used:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(np.asarray(used[value.name]), name=value.name)
            graph.register_initializer(value)
    normal.normalize(model)
    return model


def calls(model: ir.Model) -> list[tuple[str, str]]:
    """(kernel, dtypes of its results) of what runs, in order."""
    main = Lowering(model, machine("avx512vnni")).run().module["main"]
    found = []
    for block in main.body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.TupleGetItem):
                continue
            made = binding.var.ty
            parts = [made] if isinstance(made, relax.TensorType) else made.fields
            name = binding.value.args[0].name_hint
            found.append((name, " ".join(str(part.dtype) for part in parts)))
    return found


def kernels(body: str, outputs: str = "") -> list[tuple[str, str]]:
    """:func:`calls` with schedules in the place of kernels."""
    model = model_of(body, f"float[n, 48] y{outputs}")
    return [(name.rsplit("_", 1)[0], dtypes) for name, dtypes in calls(model)]


NORMS = {"layer": "LayerNormalization (x, g, b)", "rms": "RMSNormalization (x, g)"}


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_writes_the_codes_itself(kind: str) -> None:
    """For one product, and for several, as of queries, keys and values."""
    found = kernels(f"s = {NORMS[kind]}\n{STATIC}")
    assert found == [(f"rows_{kind}_norm", "uint8"), ("gemm_dots", "float32")]
    found = kernels(f"s = {NORMS[kind]}\n{STATIC} z = MatMul (d, e)", ", float[n, 48] z")
    assert found == [(f"rows_{kind}_norm", "uint8"), *[("gemm_dots", "float32")] * 2]


def test_where_the_floats_are_read_too_one_kernel_writes_both() -> None:
    """As behind the norms of BERT, which the residual reads."""
    found = kernels(f"s = {NORMS['layer']}\nr = Neg (s)\n{STATIC}", ", float[n, 64] r")
    assert found[:2] == [("rows_layer_norm", "float32 uint8"), ("gemm_dots", "float32")]


def test_equal_scales_make_one_tensor_of_codes_and_others_another() -> None:
    body = f"s = {NORMS['layer']}\nr = Neg (s)\n" + "".join(
        f"q{n} = QuantizeLinear (s, {scale}, {zero})\n"
        for n, (scale, zero) in enumerate([("xs", "xz"), ("same", "xz"), ("xs", "iz")])
    )
    outputs = "float[n, 64] r, uint8[n, 64] q0, uint8[n, 64] q1, int8[n, 64] q2"
    found = calls(model_of(body, outputs))
    assert found[0] == ("rows_layer_norm_0", "float32 uint8 uint8")
    assert sum("layer_norm" in name for name, _ in found) == 1


def test_floats_that_nothing_reads_are_not_written() -> None:
    body = f"s = {NORMS['rms']}\nq = QuantizeLinear (s, xs, xz)\np = QuantizeLinear (s, ws0, xz)"
    found = calls(model_of(body, "uint8[n, 64] q, uint8[n, 64] p"))
    assert found == [("rows_rms_norm_0", "uint8 uint8")]


def test_layers_that_differ_in_scales_alone_share_their_kernels() -> None:
    def layer(n: int, x: str, scale: str) -> str:
        return f"""
            s{n} = LayerNormalization ({x}, g, b)
            q{n} = QuantizeLinear (s{n}, {scale}, xz)
            d{n} = DequantizeLinear (q{n}, {scale}, xz)
            e{n} = DequantizeLinear <axis = 1> (square, gs)
            m{n} = MatMul (d{n}, e{n})
            y{n} = Add (m{n}, s{n})
            """

    body = layer(0, "x", "xs") + layer(1, "y0", "ws0")
    found = [name for name, _ in calls(model_of(body, "float[n, 64] y1"))]
    assert found == ["rows_layer_norm_0", "gemm_dots_0"] * 2


def test_attention_writes_the_codes_of_its_heads_side_by_side() -> None:
    body = """
        a = Attention (x, x, x)
        t = Transpose <perm = [0, 2, 1, 3]> (a)
        s = Reshape (t, shape)
        """
    model = model_of(body + STATIC, "float[1, n, 48] y", "float[1, 4, n, 16] x")
    found = [(name.rsplit("_", 1)[0], dtypes) for name, dtypes in calls(model)]
    assert found == [("attention_fused", "uint8"), ("gemm_dots", "float32")]


MAKERS = {
    "norm": ("s = LayerNormalization (x, g, b)", "[n, 64]", "float[n, 64] x"),
    "product": ("h = MatMul (x, floats)\ns = Add (h, b)", "[n, 64]", "float[n, 64] x"),
    "elementwise": ("s = Sigmoid (x)", "[n, 64]", "float[n, 64] x"),
    "convolution": ("h = Conv (x, taps)\ns = Relu (h)", "[n, 8, 3, 4]", "float[n, 8, 5, 6] x"),
}


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("made", MAKERS)
def test_codes_are_those_of_the_floats_beside_them(made: str, dtype: str) -> None:
    """Bit by bit, as numpy rounds what the same kernel wrote: whatever makes the floats."""
    maker, shape, given = MAKERS[made]
    zero = "xz" if dtype == "uint8" else "iz"
    body = f"{maker}\nr = Neg (s)\nq = QuantizeLinear (s, xs, {zero})\nc = Identity (q)"
    model = model_of(body, f"float{shape} r, {dtype}{shape} c", given)
    assert [dtypes for _, dtypes in calls(model)].count("float32 uint8") == 1
    rng = np.random.default_rng(0)
    sizes = [7 if size == "n" else int(size) for size in re.findall(r"[\dn]+(?=[,\]])", given)]
    x = rng.normal(scale=3.0, size=sizes).astype(np.float32)
    found = InProcess(model).run({"x": x})
    floats, offset = -found["r"], int(CONSTANTS[zero])
    ends = np.iinfo(dtype)
    codes = np.rint(floats / CONSTANTS["xs"]) + offset
    np.testing.assert_array_equal(found["c"], np.clip(codes, ends.min, ends.max).astype(dtype))
    assert len(np.unique(found["c"])) > 10


def test_scales_of_the_whole_tensor_are_found_before_its_codes() -> None:
    found = kernels(f"s = {NORMS['rms']}\n{DYNAMIC}")
    assert found[0] == ("rows_rms_norm", "float32")
    assert [name for name, _ in found].count("reduce_rows") == 2
    assert found[-2:] == [("general_flat", "uint8"), ("gemm_dots", "float32")]
