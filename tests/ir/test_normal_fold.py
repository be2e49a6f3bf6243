"""Folding: constants are evaluated, weights stay lazy, ties stay ties, nothing big is made."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from netlathe.ir import normal, weights
from tests.ir.onnx_text import copy, matrix, model, node, ops
from tests.ir.test_normal_forms import normal_form

X = "float[b,s,12] x"


def test_a_constant_subgraph_is_evaluated() -> None:
    body = """a = Constant<value_floats = [1.0, 2.0, 3.0]>() e = Exp(a) m = ReduceMax(e)
        r = Div(e, m) p = Pad(r, n) y = Mul(x, p)"""
    made = normal_form(model(X, "float y", body, n=[0, 9]))
    assert ops(made) == {"Mul": 1}
    expected = np.zeros(12, np.float32)
    expected[:3] = np.exp([1.0, 2.0, 3.0]) / np.exp(3.0)
    factor = node(made, "Mul").inputs[1]
    assert factor is not None
    np.testing.assert_allclose(weights.array(factor), expected, rtol=1e-6)


def test_evaluation_without_a_kernel_falls_back() -> None:
    """ONNX Runtime hands out no bfloat16; the reference evaluator does."""
    body = "a = Constant<value_floats = [1.5, 2.5]>() c = Cast<to = 16>(a) d = Add(c, c) y = Cast<to=1>(d)"
    made = model("float[b] x", "float y", body)
    normal.normalize(made)
    assert set(ops(made)) <= {"Identity"}
    (value,) = made.graph.initializers.values()
    assert weights.array(value).tolist() == [3.0, 5.0]


def test_big_weights_become_recipes_that_are_not_kept() -> None:
    body = "t = Transpose(w) h = Cast<to = 1>(t) s = Mul(h, k) m = MatMul(x, s) y = Relu(m)"
    made = model("float[b,256] x", "float y", body, w=matrix(300, 256).astype(np.float16), k=0.5)
    normal_form(made, 2**-16)
    assert ops(made) == {"MatMul": 1, "Relu": 1}
    weight = made.graph.initializers["w"]
    assert isinstance(weight.const_value, ir.LazyTensor) and not weight.const_value.cache
    expected = matrix(300, 256).astype(np.float16).T.astype(np.float32) * 0.5
    np.testing.assert_array_equal(weights.array(weight), expected)


def test_weights_are_not_read() -> None:
    def refuse() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    body = "t = Transpose(w) h = Cast<to = 1>(t) y = MatMul(x, h)"
    made = model("float[b,256] x", "float y", body, w=matrix(300, 256).astype(np.float16))
    made.graph.initializers["w"].const_value = ir.LazyTensor(
        refuse, ir.DataType.FLOAT16, ir.Shape([300, 256]), name="w"
    )
    normal.normalize(made)
    assert ops(made) == {"MatMul": 1} and made.graph.initializers["w"].shape == [256, 300]


def test_a_tied_embedding_stays_one_initializer() -> None:
    body = "h = Gather(w, i) t = Transpose(w) y = MatMul(h, t)"
    made = normal_form(model("int64[b,s] i", "float y", body, w=matrix(32, 12)), 2**-18)
    assert ops(made) == {"Gather": 1, "Transpose": 1, "MatMul": 1}
    assert list(made.graph.initializers) == ["w"]


def test_one_transpose_for_a_weight_used_twice() -> None:
    body = "t = Transpose(w) u = Transpose(w) g = MatMul(x, t) h = MatMul(g, u) y = Relu(h)"
    made = normal_form(model(X, "float y", body, w=matrix(12, 12)), 2**-18)
    assert ops(made) == {"MatMul": 2, "Relu": 1} and list(made.graph.initializers) == ["w"]


def test_ties_are_merged_by_bytes_and_told() -> None:
    body = "h = Gather(embed, i) t = Transpose(head) y = MatMul(h, t)"
    made = model("int64[b,s] i", "float y", body, embed=matrix(400, 12), head=matrix(400, 12))
    before = copy(made)
    entries = normal.normalize(made)
    assert [
        (e.candidate, e.status, e.detail["kept"]) for e in entries if e.candidate == "head"
    ] == [("head", "applied", "embed")]
    assert list(made.graph.initializers) == ["embed"]
    assert weights.num_bytes(made) * 2 == weights.num_bytes(before)


def test_small_and_one_dimensional_tensors_are_never_merged() -> None:
    body = "u = Mul(x, g) v = Relu(u) w = Mul(v, h) m = MatMul(w, a) y = MatMul(m, c)"
    ones = np.ones(12, np.float32)
    made = model(X, "float y", body, g=ones, h=ones.copy(), a=matrix(12, 12), c=matrix(12, 12))
    normal_form(made, 2**-18)
    assert set(made.graph.initializers) == {"g", "h", "a", "c"}


def test_ties_by_storage_need_no_reading() -> None:
    class Unreadable(ir.ExternalTensor):
        def numpy(self) -> np.ndarray:
            raise AssertionError("a tie by storage was read")

    made = model(
        "int64[b,s] i",
        "float y",
        "h = Gather(w, i) t = Transpose(v) y = MatMul(h, t)",
        w=matrix(8, 4),
        v=matrix(8, 4),
    )
    for name in ("w", "v"):
        made.graph.initializers[name].const_value = Unreadable(
            "weights.bin", 0, 128, ir.DataType.FLOAT, shape=ir.Shape([8, 4]), name=name
        )
    normal.normalize(made)
    assert list(made.graph.initializers) == ["w"]


def test_quantized_weights_stay_quantized() -> None:
    body = "d = DequantizeLinear<axis = 1>(q, k) y = MatMul(x, d)"
    made = model(X, "float y", body, q=np.ones((12, 4), np.int8), k=np.full(4, 0.5, np.float32))
    normal_form(made, 2**-18)
    assert ops(made) == {"DequantizeLinear": 1, "MatMul": 1}


def test_nothing_big_is_made_of_little() -> None:
    body = "z = ConstantOfShape(n) m = MatMul(x, z) y = Relu(m)"
    made = model(X, "float y", body, n=[12, 100_000])
    entries = normal.normalize(made)
    assert ops(made)["ConstantOfShape"] == 1 and not entries
    assert weights.num_bytes(made) < 1000


def test_what_stays_unfolded_is_told() -> None:
    body = "p = MatMul(a, c) y = Add(x, p)"
    made = model("float[2000,2000] x", "float y", body, a=matrix(2000, 1), c=matrix(1, 2000))
    (entry,) = normal.normalize(made)
    assert entry.status == "skipped" and entry.candidate == "p" and "15 MiB" in entry.reason


def test_random_ops_are_not_constant() -> None:
    made = model("float[3] x", "float y", "r = RandomNormal<shape = [3]>() y = Add(x, r)")
    normal.normalize(made)
    assert ops(made) == {"RandomNormal": 1, "Add": 1}


def test_an_initializer_that_the_caller_can_override_is_no_constant() -> None:
    made = model("float[b,3] x, float[3] c", "float y", "n = Neg(c) y = Add(x, n)", c=matrix(3))
    normal.normalize(made)
    assert ops(made) == {"Neg": 1, "Add": 1}
    assert [v.name for v in made.graph.inputs] == ["x", "c"]
