"""Which kernel writes the bytes that products read: the norm in front, where nothing else reads it."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from netlathe.backends.tvm.lowering import Lowering
from netlathe.backends.tvm.machine import machine
from netlathe.ir import normal

CONSTANTS = {
    "g": np.ones(64, np.float32),
    "b": np.zeros(64, np.float32),
    "xs": np.float32(0.05),
    "xz": np.uint8(128),
    "w": np.arange(64 * 48).reshape(64, 48).astype(np.int8),
    "ws": np.full(48, 0.01, np.float32),
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


def kernels(body: str, outputs: str = "") -> list[tuple[str, str]]:
    """(schedule, dtype of the result) of what runs, in order."""
    words = set(re.findall(r"\w+", body))
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    declared = ", ".join(
        f"{ir.DataType.from_numpy(np.asarray(array).dtype).name.lower()}"
        f"[{', '.join(map(str, np.shape(array)))}] {name}"
        for name, array in used.items()
    )
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 25]>
        one (float[n, 64] x, {declared}) => (float[n, 48] y{outputs}) {{ {body} }}"""
    )
    graph = model.graph
    for value in list(graph.inputs)[1:]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(np.asarray(used[value.name or ""]), name=value.name)
        graph.register_initializer(value)
    normal.normalize(model)
    main = Lowering(model, machine("avx512vnni")).run().module["main"]
    return [
        (binding.value.args[0].name_hint.rsplit("_", 1)[0], str(binding.var.ty.dtype))
        for block in main.body.blocks
        for binding in block.bindings
    ]


NORMS = {"layer": "LayerNormalization (x, g, b)", "rms": "RMSNormalization (x, g)"}


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_writes_the_codes_itself(kind: str) -> None:
    """For one product, and for several, as of queries, keys and values."""
    found = kernels(f"s = {NORMS[kind]}\n{STATIC}")
    assert found == [(f"rows_{kind}_norm", "uint8"), ("gemm_dots", "float32")]
    found = kernels(f"s = {NORMS[kind]}\n{STATIC} z = MatMul (d, e)", ", float[n, 48] z")
    assert found == [(f"rows_{kind}_norm", "uint8"), *[("gemm_dots", "float32")] * 2]


def test_where_the_floats_are_read_too_codes_are_another_kernel() -> None:
    """As behind the norms of BERT, which the residual reads; a second kernel reads them from the cache."""
    found = kernels(f"s = {NORMS['layer']}\nr = Neg (s)\n{STATIC}", ", float[n, 64] r")
    assert [("rows_layer_norm", "float32"), ("general_flat", "uint8")] == found[:2]


def test_scales_of_the_whole_tensor_are_found_before_its_codes() -> None:
    found = kernels(f"s = {NORMS['rms']}\n{DYNAMIC}")
    assert found[0] == ("rows_rms_norm", "float32")
    assert [name for name, _ in found].count("reduce_rows") == 2
    assert found[-2:] == [("general_flat", "uint8"), ("gemm_dots", "float32")]
