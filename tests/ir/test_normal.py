"""Normal form of whole graphs: control flow, functions, names, old exports, today's exports."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from netlathe.execute import compare, ort
from netlathe.ir import normal
from netlathe.ir.printing import show_model
from tests import zoo
from tests.ir.onnx_text import copy, ints, matrix, model, node, ops
from tests.ir.test_normal_forms import normal_form

X = "float[b,s,12] x"

# -- control flow ---------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [0, 1])
def test_an_if_with_a_constant_condition_is_its_branch(condition: int) -> None:
    body = f"""k = Constant<value = bool {{{condition}}}>()
        y = If (k) <
            then_branch = t () => (float u) {{ two = Constant<value_float = 2.0>() v = Mul(x, two)
                u = Relu(v) }},
            else_branch = e () => (float u) {{ v = Sub(x, w) u = Neg(v) }}
        >"""
    made = normal_form(model(X, "float y", body, w=matrix(12)))
    assert ops(made) == ({"Mul": 1, "Relu": 1} if condition else {"Sub": 1, "Neg": 1})
    assert made.graph.outputs[0].name == "y"
    assert list(made.graph.initializers) == ["two" if condition else "w"]


def test_an_if_over_a_known_dim_is_its_branch() -> None:
    """TorchScript wrote such an If for `squeeze(1)`."""
    body = """n = Shape(x) two = Constant<value = int64 {2}>() d = Gather<axis = 0>(n, two)
        one = Constant<value = int64 {1}>() k = Equal(d, one) at = Constant<value_ints = [2]>()
        y = If (k) <
            then_branch = t () => (float u) { u = Squeeze(x, at) },
            else_branch = e () => (float v) { v = Identity(x) }
        >"""
    made = normal_form(model("float[b,s,1] x", "float y", body))
    assert ops(made) == {"Squeeze": 1}


def test_both_branches_are_normalised_and_keep_their_captures() -> None:
    body = """h = Relu(x)
        y = If (k) <
            then_branch = t () => (float u) { a = Identity(h) g = Gemm<transB = 1>(a, w, c)
                u = Dropout(g) },
            else_branch = e () => (float v) { two = Constant<value_float = 2.0>() m = Mul(two, w2)
                v = MatMul(h, m) }
        >"""
    made = model(
        "float[b,12] x, bool k", "float y", body, w=matrix(7, 12), c=matrix(7), w2=matrix(12, 7)
    )
    normal_form(made, 2**-18)
    then = node(made, "If").attributes["then_branch"].as_graph()
    other = node(made, "If").attributes["else_branch"].as_graph()
    assert ops(then) == {"MatMul": 1, "Add": 1}
    assert ops(other) == {"MatMul": 1}


def test_a_branch_that_hands_out_an_outer_value_keeps_its_identity() -> None:
    body = """h = Relu(x)
        y = If (k) <
            then_branch = t () => (float u) { u = Identity(h) },
            else_branch = e () => (float v) { v = Neg(h) }
        >"""
    made = normal_form(model(f"{X}, bool k", "float y", body))
    assert ops(node(made, "If").attributes["then_branch"].as_graph()) == {"Identity": 1}


LOOP = """n = Constant<value = int64 {4}>() k = Constant<value = bool {1}>()
    last, all = Loop (n, k, x) <
        body = l (int64 i, bool go, float[b,12] h) => (bool on, float[b,12] next, float[b,12] seen) {
            on = Identity(go) two = Constant<value_float = 0.5>() d = Mul(two, h)
            e = Dropout(d) next = Add(e, w) seen = Identity(next) }
    >
    y = Add(last, x)"""


def test_a_loop_keeps_its_interface() -> None:
    made = model("float[b,12] x", "float y, float all", LOOP, w=matrix(12))
    normal_form(made)
    inner = node(made, "Loop").attributes["body"].as_graph()
    assert ops(inner) == {"Identity": 2, "Mul": 1, "Add": 1}
    assert len(inner.inputs) == 3 and len(inner.outputs) == 3


def test_a_growing_loop_state_is_not_taken_for_constant() -> None:
    """Its first dim is 1 only in the first turn."""
    body = """n = Constant<value = int64 {3}>() k = Constant<value = bool {1}>()
        y = Loop (n, k, x) <
            body = l (int64 i, bool go, float h) => (bool on, float next) {
                on = Identity(go) m = Shape(h) f = Cast<to = 1>(m) g = ReduceSum(f, axis)
                r = Reshape(g, row) next = Concat<axis = 0>(h, r) }
        >"""
    made = model("float[1,1] x", "float y", body, axis=np.array([0], np.int64), row=[1, 1])
    inner = next(n for n in made.graph if n.op_type == "Loop").attributes["body"].as_graph()
    for value in (*inner.inputs[2:], *inner.outputs):
        value.shape = None  # the text form cannot say "of any rank"
    normal_form(made)


# -- functions, domains, names --------------------------------------------------------------------


def test_functions_are_inlined_and_other_domains_pass() -> None:
    source = """<ir_version: 10, opset_import: ["": 25, "my": 1]>
        g (float[b,12] x) => (float[b,12] y) { h = my.Twice(x) y = Identity(h) }
        <domain: "my", opset_import: ["": 25]>
        Twice (a) => (c) { two = Constant<value_float = 2.0>() c = Mul(a, two) }"""
    made = normal_form(ir.from_proto(onnx.parser.parse_model(source)))
    assert ops(made) == {"Mul": 1} and not made.functions
    other = """<ir_version: 10, opset_import: ["": 25, "my": 1]>
        g (float[b,12] x) => (float[b,12] y) { h = my.Unknown(x) i = my.Unknown(x) y = Add(h, i) }"""
    made = ir.from_proto(onnx.parser.parse_model(other))
    normal.normalize(made)
    assert ops(made) == {"Unknown": 2, "Add": 1}


def test_names_become_unique_and_the_interface_keeps_its_own() -> None:
    body = """y = If (k) <
            then_branch = t () => (float u) { v = Neg(x) u = Relu(v) },
            else_branch = e () => (float u) { v = Exp(x) u = Relu(v) }
        >"""
    made = normal_form(model(f"{X}, bool k", "float y", body))
    names = [v.name for n in made.graph.all_nodes() for v in n.outputs]
    assert len(set(names)) == len(names)
    assert [v.name for v in made.graph.inputs] == ["x", "k"]


def test_initializers_keep_their_names() -> None:
    body = "t = Transpose(w) m = MatMul(x, t) h = Cast<to = 1>(c) y = Add(m, h)"
    w, c = matrix(64, 12), matrix(64).astype(np.float16)
    made = normal_form(model(X, "float y", body, **{"w": w, "c": c}), 2**-18)
    assert set(made.graph.initializers) == {"w", "c"}
    assert made.graph.initializers["w"].shape == [12, 64]


# -- whole models ---------------------------------------------------------------------------------

# Self-attention as TorchScript's exporter wrote it: [b, s, 12] with 3 heads of 4.
_HEADS = """
    {n}_s = Shape({x}) {n}_b = Gather<axis = 0>({n}_s, zero) {n}_t = Gather<axis = 0>({n}_s, one)
    {n}_bu = Unsqueeze({n}_b, at) {n}_tu = Unsqueeze({n}_t, at)
    {n}_r = Concat<axis = 0>({n}_bu, {n}_tu, heads, width)
    {n}_v = Reshape({x}, {n}_r) {n} = Transpose<perm = [0, 2, {order}]>({n}_v)
"""
OLD_ATTENTION = (
    "zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>() "
    "at = Constant<value_ints = [0]>() heads = Constant<value_ints = [3]>() "
    "width = Constant<value_ints = [4]>() flat = Constant<value_ints = [12]>() "
    "ql = MatMul(x, wq) qa = Add(bq, ql) kl = MatMul(x, wk) vl = MatMul(x, wv)"
    + _HEADS.format(n="q", x="qa", order="1, 3")
    + _HEADS.format(n="k", x="kl", order="3, 1")
    + _HEADS.format(n="v", x="vl", order="1, 3")
    + """
    scores = MatMul(q, k) root = Constant<value_float = 2.0>() scaled = Div(scores, root)
    weights = Softmax<axis = -1>(scaled) dropped = Dropout(weights) mixed = MatMul(dropped, v)
    back = Transpose<perm = [0, 2, 1, 3]>(mixed) bs = Shape(back) bb = Gather<axis = 0>(bs, zero)
    bt = Gather<axis = 0>(bs, one) bbu = Unsqueeze(bb, at) btu = Unsqueeze(bt, at)
    joined = Concat<axis = 0>(bbu, btu, flat) merged = Reshape(back, joined)
    y = MatMul(merged, wo)
"""
)


def test_an_old_attention() -> None:
    made = model(
        X,
        "float y",
        OLD_ATTENTION,
        **{name: matrix(12, 12, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))},
        bq=matrix(12),
    )
    normal_form(made, 2**-16)
    assert ops(made) == {
        "MatMul": 6,
        "Add": 1,
        "Reshape": 4,
        "Transpose": 4,
        "Div": 1,
        "Softmax": 1,
    }
    literals = [ints(n.inputs[1]) for n in made.graph if n.op_type == "Reshape"]
    assert sorted(literals) == [[0, 0, 3, 4]] * 3 + [[0, 0, 12]]


def test_an_old_convolution_block() -> None:
    body = """
        h = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)
        n = BatchNormalization(h, g, c, m, v) r = Relu(n) p = GlobalAveragePool(r)
        f = Flatten(p) y = Gemm<transB = 1>(f, fc, bias)"""
    made = model(
        "float[b,3,8,8] x",
        "float y",
        body,
        w=matrix(6, 3, 3, 3),
        g=matrix(6),
        c=matrix(6),
        m=matrix(6),
        v=np.abs(matrix(6)) + 1,
        fc=matrix(5, 6),
        bias=matrix(5),
    )
    normal_form(made, 2**-16)
    assert ops(made)["Gemm"] == 0 and ops(made)["Flatten"] == 0
    assert node(made, "BatchNormalization").attributes["training_mode"].as_int() == 0


_QUICK = ("llama", "gpt2", "resnet", "swin", "t5")


@pytest.mark.parametrize(
    "name", [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES]
)
def test_exports_of_the_zoo(name: str) -> None:
    made, raw, recipe = copy(zoo.exported(name)), zoo.exported(name), zoo.build(name)
    normal.normalize(made)
    assert not {"Constant", "Dropout", "CastLike", "Gemm"} & set(ops(made))
    assert len(made.graph) < len(raw.graph)
    text = show_model(made)
    assert not normal.normalize(made)
    assert show_model(made) == text
    for sizes in recipe.sizes:
        fed = _feeds(recipe, sizes, [v.name or "" for v in made.graph.inputs])
        expected, actual = ort.run(raw, fed), ort.run(made, fed)
        for output in expected:
            # Gemm as MatMul + Add rounds once more; the deepest zoo model has 20 such layers.
            assert compare.relative_error(actual[output], expected[output]) <= 1e-6


def _feeds(
    recipe: zoo.ZooModel, sizes: Mapping[str, int], names: list[str]
) -> dict[str, np.ndarray]:
    given = recipe.feeds(sizes, 0)
    return {name: given[name].numpy() for name in names}


def test_a_dynamic_export_keeps_no_shape_arithmetic_for_its_reshapes() -> None:
    made = copy(zoo.exported("llama"))
    normal.normalize(made)
    for reshape in (n for n in made.graph if n.op_type == "Reshape"):
        data, target = reshape.inputs
        assert data is not None and target is not None
        if data.dtype == ir.DataType.FLOAT:
            assert target.is_initializer(), reshape
