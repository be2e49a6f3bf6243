"""Costs against torch's own counts on the zoo, against formulas by hand, and where sizes are unknown."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from netlathe.analysis.cost import Cost, cost
from netlathe.ir import weights
from tests import zoo, zoo_ir
from tests.ir import onnx_text

# Initializers that torch does not count as parameters, by what they are:
EXTRA_PARAMS = {
    # rotary frequencies, one per pair of the head's rotated dims
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "falcon", "mixtral"), 8),
    "phi": 4,
    # bias tables [49, 2] and [49, 4] twice each, looked up and added to the window masks
    "swin": 7604,
}


def zero_biases(captured: ir.Model, module: torch.nn.Module) -> int:
    """Elements of the biases of zeros that the exporter gives a Conv before a BatchNormalization."""
    own = {name for name, _ in module.named_parameters()}
    biases = {n.inputs[2] for n in captured.graph if n.op_type == "Conv" and len(n.inputs) > 2}
    arrays = [weights.array(v) for v in biases if v is not None and v.name not in own]
    assert all(not array.any() for array in arrays)
    return sum(array.size for array in arrays)


@pytest.mark.parametrize(
    "name", zoo_ir.some("minilm", "llama", "gpt2", "t5", "swin", "resnet", "segformer", "mixtral")
)
def test_the_zoo_costs_what_torch_counts(name: str) -> None:
    model, made = zoo_ir.captured(name), zoo.build(name)
    expected = sum(p.numel() for p in made.module.parameters())
    for sizes in made.sizes:
        found = cost(model, sizes)
        extra = EXTRA_PARAMS.get(name, 0) + zero_biases(model, made.module)
        assert found.params - expected == extra
        # The math kernels: torch counts nothing for the fused attention of its CPU build.
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            made.module(**made.feeds(sizes, 0))
        assert found.macs == counter.get_total_flops() // 2
        assert found.unknown == ()


def test_modules_add_up_and_are_named() -> None:
    model = zoo_ir.captured("minilm")
    found = cost(model)
    modules = found.by_module
    assert sum(m.params for m in modules.values()) == found.params
    assert sum(m.bytes for m in modules.values()) == found.bytes
    assert sum(m.macs or 0 for m in modules.values()) == found.macs
    query = modules["encoder.layer.3.attention.self.query"]
    assert query.params == 384 * 384 + 384
    assert query.bytes == 4 * query.params
    assert query.macs == 2 * 16 * 384 * 384  # the default sizes: batch 2, sequence 16
    assert modules["embeddings.word_embeddings"].params == 30522 * 384


def test_sizes_are_those_asked_for_and_no_weight_is_read() -> None:
    def never() -> Any:
        raise AssertionError("read")

    model = onnx_text.model("float[b,s,8] x", "float y", "y = MatMul (x, w)", w=np.zeros((8, 4)))
    weight = model.graph.initializers["w"]
    shape = ir.Shape([8, 4])
    weight.const_value = ir.LazyTensor(never, dtype=ir.DataType.FLOAT, shape=shape, name="w")
    assert cost(model, {"b": 3, "s": 5}).macs == 3 * 5 * 8 * 4
    assert cost(model, {"s": 5}).macs == cost(model, {"b": 16, "s": 5}).macs


# -- by operator ----------------------------------------------------------------------------------


def macs(inputs: str, body: str, **weights: Any) -> int | None:
    model = onnx_text.model(inputs, "float y", body, **weights)
    return cost(model, {"b": 2, "s": 5}).macs


CASES = {
    "vectors": ("float[7] x, float[7] z", "y = MatMul (x, z)", 7),
    "broadcast": ("float[b,1,3,4] x, float[6,4,5] z", "y = MatMul (x, z)", 2 * 6 * 3 * 4 * 5),
    "gemm": ("float[4,3] x, float[5,4] z", "y = Gemm <transA=1, transB=1> (x, z)", 3 * 4 * 5),
    "conv": (
        "float[b,6,9,9] x, float[8,3,3,3] z",
        "y = Conv <group=2, strides=[2,2], pads=[1,1,1,1]> (x, z)",
        2 * 8 * 5 * 5 * 3 * 3 * 3,
    ),
    "transposed": (
        "float[b,6,4] x, float[6,2,3] z",
        "y = ConvTranspose <group=2, strides=[2]> (x, z)",
        2 * 6 * 4 * 2 * 3,
    ),
    "einsum": (
        "float[b,s,6] x, float[6,7] z",
        'y = Einsum <equation="...k,kn->...n"> (x, z)',
        2 * 5 * 6 * 7,
    ),
    "einsum of one": ("float[b,s,6] x", 'y = Einsum <equation="bsk->bks"> (x)', 0),
    "einsum of three": (
        "float[3,4] x, float[4,5] z, float[5,6] w",
        'y = Einsum <equation="ab,bc,cd->ad"> (x, z, w)',
        2 * 3 * 4 * 5 * 6,
    ),
    "lstm": (
        "float[s,b,6] x, float[2,28,6] w, float[2,28,7] r",
        'h, last, y = LSTM <hidden_size=7, direction="bidirectional"> (x, w, r)',
        5 * 2 * 2 * 28 * (6 + 7),
    ),
    "grouped attention": (
        "float[b,8,s,16] q, float[b,2,3,16] k, float[b,2,3,20] v",
        "y = Attention (q, k, v)",
        2 * 8 * 5 * 3 * (16 + 20),
    ),
    "packed attention with a cache": (
        "float[b,s,32] q, float[b,s,16] k, float[b,s,16] v, float[b,2,4,8] pk, float[b,2,4,8] pv",
        "y, kk, vv = Attention <q_num_heads=4, kv_num_heads=2> (q, k, v, , pk, pv)",
        2 * 4 * 5 * (4 + 5) * (8 + 8),
    ),
    "elementwise": ("float[b,s,6] x", "t = Softmax (x) y = ReduceMean (t)", 0),
    "integers": ("int8[b,4] x, uint8[4,5] z", "y = MatMulInteger (x, z)", 2 * 4 * 5),
}


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str) -> None:
    inputs, body, expected = CASES[case]
    assert macs(inputs, body) == expected


def test_quantized_operators_count_as_their_dense_ones() -> None:
    scalar, zero = np.array(0.1, np.float32), np.array(0, np.int8)
    shared = {"s": scalar, "z": zero}
    body = "y = QLinearMatMul (x, s, z, w, s, z, s, z)"
    assert macs("int8[b,4] x", body, w=np.ones((4, 5), np.int8), **shared) == 2 * 4 * 5
    body = "y = QLinearConv (x, s, z, w, s, z, s, z)"
    conv = np.ones((8, 3, 3, 3), np.int8)
    assert macs("int8[b,3,5,5] x", body, w=conv, **shared) == 2 * 8 * 9 * 27
    assert macs("int8[b,3,5,5] x", "y = ConvInteger (x, w)", w=conv) == 2 * 8 * 9 * 27


def test_branches_loops_and_scans() -> None:
    big, small = "MatMul (x, w)", "Identity (x)"
    branches = (
        "y = If (c) <then_branch = a () => (float[b,4] p) { p = %s },"
        " else_branch = e () => (float[b,4] q) { q = %s }>"
    )
    square = np.ones((4, 4), np.float32)
    for order in ((big, small), (small, big)):
        assert macs("bool c, float[b,4] x", branches % order, w=square) == 2 * 4 * 4
    loop = (
        "y = Loop (%s, , x) <body = g (int64 i, bool c, float[b,4] h) =>"
        " (bool go, float[b,4] h2) { go = Identity (c) h2 = MatMul (h, w) }>"
    )
    assert macs("float[b,4] x", loop % "n", w=square, n=np.array(6)) == 6 * 2 * 4 * 4
    found = cost(onnx_text.model("float[b,4] x, int64 n", "float y", loop % "n", w=square))
    assert found.macs is None and len(found.unknown) == 1 and "Loop" in found.unknown[0]
    scan = (
        "y = Scan <num_scan_inputs=1, body = g (float[b,4] h, float[b,4] t) => (float[b,4] h2)"
        " { m = MatMul (t, w) h2 = Add (h, m) }> (h0, x)"
    )
    assert macs("float[b,4] h0, float[s,b,4] x", scan, w=square) == 5 * 2 * 4 * 4


def test_what_only_the_data_decides_is_unknown_and_named() -> None:
    model = onnx_text.model(
        "float[b,8] x",
        "float y",
        "i = NonZero (x) t = Transpose <perm=[1,0]> (i) f = Cast <to=1> (t)"
        " m = MatMul (f, v) k = MatMul (x, w) y = Concat <axis=0> (m, k)",
        v=np.ones((2, 4), np.float32),
        w=np.ones((8, 4), np.float32),
    )
    found = cost(model)
    assert found.macs is None
    assert [text.split(" = ")[0] for text in found.unknown] == ["m"]


def test_an_operator_of_another_domain_with_a_weight_is_unknown() -> None:
    model = onnx_text.model("float[b,8] x", "float y", "y = Neg (x)", w=np.ones((8, 4)))
    model.graph.opset_imports["vendor"] = 1
    x, w = model.graph.inputs[0], model.graph.initializers["w"]
    model.graph.append(ir.node("Fused", [x, w], domain="vendor"))
    found = cost(model)
    assert found.macs is None and "vendor::Fused" in found.unknown[0]


# -- parameters and bytes -------------------------------------------------------------------------


def weights_of(body: str, inputs: str = "float[b,4] x", **weights: Any) -> Cost:
    return cost(onnx_text.model(inputs, "float y", body, **weights))


def test_a_quantized_weight_counts_as_before() -> None:
    dense = weights_of("y = MatMul (x, w)", w=np.ones((4, 6), np.float32))
    assert (dense.params, dense.bytes) == (24, 96)
    body = "d = DequantizeLinear <axis=1> (q, s, z) y = MatMul (x, d)"
    scale, zero = np.ones(6, np.float32), np.zeros(6, np.int8)
    eight = weights_of(body, q=np.ones((4, 6), np.int8), s=scale, z=zero)
    assert (eight.params, eight.bytes) == (24, 24 + 6 * 4 + 6)
    blocked = "d = DequantizeLinear <axis=0, block_size=2> (q, s) y = MatMul (x, d)"
    four = weights_of(blocked, q=np.ones((4, 6), ml_dtypes.int4), s=np.ones((2, 6), np.float32))
    assert (four.params, four.bytes) == (24, 24 // 2 + 12 * 4)
    odd = weights_of(
        "d = DequantizeLinear (q, s) y = Mul (x, d)", q=np.ones((3, 1), ml_dtypes.int4), s=1.0
    )
    assert (odd.params, odd.bytes) == (3, math.ceil(3 / 2) + 4)


def test_a_quantized_table_counts_through_its_lookup() -> None:
    body = (
        "r = Gather (q, x) t = Gather (s, x)"
        " d = DequantizeLinear <axis=1, block_size=4> (r, t) y = Neg (d)"
    )
    found = weights_of(
        body, "int64[b] x", q=np.ones((9, 4), np.int8), s=np.ones((9, 1), np.float32)
    )
    assert (found.params, found.bytes) == (36, 36 + 36)


def test_a_tied_weight_counts_once() -> None:
    body = "e = Gather (w, i) t = Transpose <perm=[1,0]> (w) y = MatMul (e, t)"
    assert weights_of(body, "int64[b] i", w=np.ones((9, 4), np.float32)).params == 36


def test_what_is_no_parameter() -> None:
    four = np.ones(4, np.float32)
    norm = "y = BatchNormalization (x, g, b, m, v)"
    assert weights_of(norm, g=four, b=four + 1, m=four + 2, v=four + 3).params == 8
    shape = "t = Reshape (x, n) u = Mul (t, c) y = Resize (u, , k)"
    found = weights_of(shape, n=[1, 1, -1, 4], c=0.5, k=np.array([1, 1, 2, 2], np.float32))
    assert (found.params, found.bytes) == (0, 4 * 8 + 4 + 4 * 4)
    codes = weights_of("i = Gather (t, x) y = Cast <to=1> (i)", "int64[b] x", t=list(range(9)))
    assert codes.params == 0
