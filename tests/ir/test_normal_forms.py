"""Every spelling in the table of `netlathe.ir.normal`, one small graph each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.ir import normal
from netlathe.ir.movement import TO_THE_END, holds, reshape_literal
from netlathe.ir.printing import show_model
from tests.ir.onnx_text import assert_same, copy, ints, matrix, model, node, ops

X = "float[b,s,12] x"


def normal_form(made: ir.Model, tolerance: float = 0.0) -> ir.Model:
    """The normal form, after checking that it is the same function and stays as it is."""
    before = copy(made)
    normal.normalize(made)
    assert_same(before, made, tolerance)
    text = show_model(made)
    normal.normalize(made)
    assert show_model(made) == text
    return made


# -- gone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity(x)",
        "y = Dropout(x)",
        "r = Constant<value_float = 0.5>() t = Constant<value = bool {0}>() y = Dropout(x, r, t)",
        "y = Cast<to = 1>(x)",
        "y = Concat<axis = 1>(x)",
        "y = Sum(x)",
        "y = Max(x)",
        "y = Transpose<perm = [0, 1, 2]>(x)",
        "z = Constant<value_float = 0.0>() y = Add(z, x)",
        "z = Constant<value_float = 1.0>() y = Div(x, z)",
        "a = Constant<value_ints = [0, 0, 0, 0, 0, 0]>() y = Pad(x, a)",
        "a = Constant<value_ints = [1, 1, 1]>() y = Tile(x, a)",
        "n = Shape(x) y = Expand(x, n)",
        "n = Shape(x) y = Reshape(x, n)",
        "a, c = Split<axis = 2, num_outputs = 2>(x) y = Concat<axis = 2>(a, c)",
    ],
)
def test_what_says_nothing_is_gone(body: str) -> None:
    made = model(X, "float y", f"{body} ".replace("y = ", "v = ") + "y = Relu(v)")
    normal_form(made)
    if "Split" in body:  # two parts put together again are for cleanup to find
        assert ops(made) == {"Split": 1, "Concat": 1, "Relu": 1}
    else:
        assert ops(made) == {"Relu": 1}


def test_a_neutral_constant_that_adds_dims_stays() -> None:
    made = normal_form(
        model(X, "float y", "y = Mul(x, one)", one=np.ones((1, 1, 1, 1), np.float32))
    )
    assert ops(made) == {"Mul": 1}


def test_identity_stays_between_input_and_output_and_between_outputs() -> None:
    made = model(X, "float y, float z, float w", "y = Identity(x) z = Relu(x) w = Identity(z)")
    normal_form(made)
    assert ops(made) == {"Identity": 2, "Relu": 1}


def test_a_constant_output_keeps_its_name() -> None:
    made = normal_form(
        model(X, "float y, float c", "y = Relu(x) c = Constant<value_float = 2.0>()")
    )
    assert [v.name for v in made.graph.outputs] == ["y", "c"]


def test_dead_nodes_and_initializers_go() -> None:
    made = model(X, "float y", "d = Mul(x, w) y = Relu(x)", w=matrix(12))
    normal_form(made)
    assert ops(made) == {"Relu": 1} and not made.graph.initializers


def test_dropout_whose_mask_is_read_stays() -> None:
    made = model(X, "float y, bool m", "y, m = Dropout(x)")
    normal.normalize(made)
    assert ops(made)["Dropout"] == 1


# -- one spelling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.5, 2.0), (2.0, 0.0)])
def test_gemm_is_matmul_and_add(trans_a: int, trans_b: int, alpha: float, beta: float) -> None:
    x = "float[12,b] x" if trans_a else "float[b,12] x"
    w = matrix(*((7, 12) if trans_b else (12, 7)))
    body = f"y = Gemm<transA={trans_a}, transB={trans_b}, alpha={alpha}, beta={beta}>(x, w, c)"
    # alpha on the weight instead of the product, sums in another order: 12 products at 2**-24 each
    made = normal_form(model(x, "float y", body, w=w, c=matrix(7)), 2**-20)
    assert ops(made) - ops(model(x, "float y", "t = Transpose(x) y = Relu(t)")) == {
        "MatMul": 1,
        **({"Add": 1} if beta else {}),
    }
    weight = node(made, "MatMul").inputs[1]
    assert weight is not None and weight.name == "w" and weight.shape == [12, 7]


def test_gemm_of_two_activations() -> None:
    body = "y = Gemm<alpha = 0.5, transB = 1>(x, x)"
    made = normal_form(model("float[b,12] x", "float y", body), 2**-20)
    assert ops(made) == {"Transpose": 1, "MatMul": 1, "Mul": 1}


def test_cast_like_is_cast() -> None:
    made = normal_form(model(f"int64[b] i, {X}", "float y", "y = CastLike(i, x)"))
    assert node(made, "Cast").attributes["to"].as_int() == ir.DataType.FLOAT


@pytest.mark.parametrize(
    "first, second, casts",
    [
        ("FLOAT", "FLOAT", 0),
        ("DOUBLE", "DOUBLE", 0),
        ("DOUBLE", "FLOAT16", 2),  # float32 -> float16 -> float32
        ("FLOAT16", "FLOAT", 2),
        ("FLOAT16", "DOUBLE", 2),
    ],
)
def test_casts_merge_only_where_nothing_is_lost(first: str, second: str, casts: int) -> None:
    a, b = ir.DataType[first].value, ir.DataType[second].value
    made = model(
        X, "float y", f"u = Cast<to={a}>(x) v = Cast<to={b}>(u) w = Cast<to=1>(v) y = Relu(w)"
    )
    normal_form(made)
    assert ops(made)["Cast"] == casts


def test_which_dtype_holds_another() -> None:
    kinds = [ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16]
    kinds += [ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT16, ir.DataType.FLOAT]
    kinds += [ir.DataType.DOUBLE]
    for narrow in kinds:
        for wide in kinds:
            expected = np.can_cast(narrow.numpy(), wide.numpy(), "safe")
            if wide == ir.DataType.DOUBLE and narrow == ir.DataType.INT64:
                expected = False  # numpy calls it safe; 2**53 + 1 is lost
            assert holds(narrow, wide) == expected, (narrow, wide)
    assert not holds(ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
    assert holds(ir.DataType.BFLOAT16, ir.DataType.FLOAT)
    assert not holds(ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@pytest.mark.parametrize(
    "axis, literal", [(1, [0, 48]), (0, [1, -1]), (2, [-1, 12]), (-1, [-1, 12])]
)
def test_flatten_is_reshape(axis: int, literal: list[int]) -> None:
    made = normal_form(model("float[b,4,12] x", "float y", f"y = Flatten<axis={axis}>(x)"))
    assert ints(node(made, "Reshape").inputs[1]) == literal


def test_flatten_without_a_literal_stays() -> None:
    made = normal_form(model("float[b,s,s,b] x", "float y", "y = Flatten<axis = 2>(x)"))
    assert ops(made) == {"Flatten": 1}


def test_sum_is_a_chain_of_adds() -> None:
    made = normal_form(model(f"{X}, float[12] z", "float y", "y = Sum(x, z, x)"))
    assert ops(made) == {"Add": 2}


def test_constants_stand_second() -> None:
    made = normal_form(model(X, "float y", "y = Add(c, x)", c=matrix(12)))
    assert [v.name for v in node(made, "Add").inputs if v is not None] == ["x", "c"]


def test_split_to_sequence_is_split() -> None:
    body = (
        "n = Constant<value_ints = [5, 7]>() q = SplitToSequence<axis = -1>(x, n) "
        "i = Constant<value_int = 0>() j = Constant<value_int = -1>() "
        "u = SequenceAt(q, i) v = SequenceAt(q, j) y = Concat<axis = 2>(v, u)"
    )
    made = normal_form(model(X, "float y", body))
    assert ops(made) == {"Split": 1, "Concat": 1}
    assert ints(node(made, "Split").inputs[1]) == [5, 7]


def test_unbind_is_gather() -> None:
    body = (
        "q = SplitToSequence<axis = 0, keepdims = 0>(x) i = Constant<value_int = 1>() "
        "u = SequenceAt(q, i) y = Relu(u)"
    )
    made = normal_form(model("float[3,b] x", "float y", body))
    assert ops(made) == {"Gather": 1, "Relu": 1}


# -- attributes -----------------------------------------------------------------------------------


def test_defaults_are_written_out() -> None:
    made = normal_form(model(X, "float y", "u = Gelu(x) v = Softmax(u) y = Transpose(v)"))
    assert node(made, "Gelu").attributes["approximate"].as_string() == "none"
    assert node(made, "Softmax").attributes["axis"].as_int() == 2
    assert list(node(made, "Transpose").attributes["perm"].as_ints()) == [2, 1, 0]


def test_attention_scale_is_explicit() -> None:
    made = model("float[b,2,s,16] q", "float y", "y = Attention(q, q, q)")
    normal_form(made)
    assert node(made, "Attention").attributes["scale"].as_float() == 0.25
    made = model(
        "float[b,s,32] q", "float y", "y = Attention<q_num_heads=2, kv_num_heads=2>(q, q, q)"
    )
    normal_form(made)
    assert node(made, "Attention").attributes["scale"].as_float() == 0.25


@pytest.mark.parametrize("auto_pad", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_conv_is_explicit(auto_pad: str, stride: int, dilation: int) -> None:
    if dilation > 1 and auto_pad.startswith("SAME"):
        dilation = 1  # ONNX Runtime runs no such node; the next test has it
    body = (
        f'y = Conv<auto_pad = "{auto_pad}", strides = [{stride}, {stride}], '
        f"dilations = [{dilation}, {dilation}]>(x, w)"
    )
    made = normal_form(model("float[b,3,9,10] x", "float y", body, w=matrix(4, 3, 3, 2)), 2**-18)
    conv = node(made, "Conv")
    assert conv.attributes["auto_pad"].as_string() == "NOTSET"
    assert list(conv.attributes["kernel_shape"].as_ints()) == [3, 2]
    assert len(conv.attributes["pads"].as_ints()) == 4
    assert conv.attributes["group"].as_int() == 1


@pytest.mark.parametrize("auto_pad, pads", [("SAME_UPPER", [1, 2]), ("SAME_LOWER", [2, 1])])
def test_same_padding_counts_dilation(auto_pad: str, pads: list[int]) -> None:
    """ONNX Runtime does not run it; ONNX: (9 / 2 up - 1) * 2 + (2 - 1) * 3 + 1 - 9 = 3."""
    body = f'y = Conv<auto_pad = "{auto_pad}", strides = [2], dilations = [3]>(x, w)'
    made = model("float[b,3,9] x", "float y", body, w=matrix(4, 3, 2))
    normal.normalize(made)
    assert list(node(made, "Conv").attributes["pads"].as_ints()) == pads


def test_same_padding_of_a_dynamic_size_stays() -> None:
    body = 'y = Conv<auto_pad = "SAME_UPPER", strides = [2]>(x, w)'
    made = normal_form(model("float[b,3,s] x", "float y", body, w=matrix(4, 3, 3)), 2**-18)
    assert node(made, "Conv").attributes["auto_pad"].as_string() == "SAME_UPPER"
    body = 'y = Conv<auto_pad = "SAME_UPPER">(x, w)'
    made = normal_form(model("float[b,3,s] x", "float y", body, w=matrix(4, 3, 3)), 2**-18)
    assert list(node(made, "Conv").attributes["pads"].as_ints()) == [1, 1]


@pytest.mark.parametrize("axes, literal", [("", [0, 1, 2]), ("a", [1, 2]), ("e", [0, 1, 2])])
def test_reductions_have_constant_axes(axes: str, literal: list[int]) -> None:
    body = f"y = ReduceSum(x{', ' + axes if axes else ''})"
    made = normal_form(model(X, "float y", body, a=[-1, 1], e=np.array([], np.int64)), 2**-18)
    reduction = node(made, "ReduceSum")
    assert ints(reduction.inputs[1]) == literal
    assert reduction.attributes["keepdims"].as_int() == 1


def test_squeeze_and_unsqueeze_count_from_the_front() -> None:
    body = "u = Unsqueeze(x, a) v = Relu(u) y = Squeeze(v, a)"
    made = normal_form(model(X, "float y", body, a=[-1, -3]))
    assert ints(node(made, "Unsqueeze").inputs[1]) == [2, 4]
    assert ints(node(made, "Squeeze").inputs[1]) == [2, 4]


def test_unread_outputs_are_taken_off() -> None:
    body = "y, mean, deviation = LayerNormalization<axis = -1>(x, g)"
    made = normal_form(model(X, "float y", body, g=matrix(12)))
    assert len(node(made, "LayerNormalization").outputs) == 1


# -- shape operands -------------------------------------------------------------------------------

OLD_RESHAPE = """
    n = Shape(x) zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>()
    d0 = Gather<axis = 0>(n, zero) d1 = Gather<axis = 0>(n, one)
    at = Constant<value_ints = [0]>()
    u0 = Unsqueeze(d0, at) u1 = Unsqueeze(d1, at)
    heads = Constant<value_ints = [3]>() width = Constant<value_ints = [4]>()
    target = Concat<axis = 0>(u0, u1, heads, width)
    y = Reshape(x, target)
"""


def test_an_old_shape_chain_becomes_a_literal() -> None:
    made = normal_form(model(X, "float y", OLD_RESHAPE))
    assert ops(made) == {"Reshape": 1}
    assert ints(node(made, "Reshape").inputs[1]) == [0, 0, 3, 4]


def test_reshapes_merge() -> None:
    body = "u = Reshape(x, a) v = Reshape(u, c) y = Relu(v)"
    made = normal_form(model(X, "float y", body, a=[0, 0, 3, 4], c=[0, -1, 2, 6]))
    assert ops(made) == {"Reshape": 1, "Relu": 1}
    assert ints(node(made, "Reshape").inputs[1]) == [0, 0, 2, 6]


def test_a_linear_layer_on_flattened_rows_is_lifted() -> None:
    body = """r = Reshape(x, rows) g = Gemm(r, w, c) n = Shape(x) lead = Slice(n, i0, i2)
        t = Concat<axis = 0>(lead, i7) y = Reshape(g, t)"""
    made = model(
        X, "float y", body, w=matrix(12, 7), c=matrix(7), rows=[-1, 12], i0=[0], i2=[2], i7=[7]
    )
    normal_form(made, 2**-18)
    assert ops(made) == {"MatMul": 1, "Add": 1}


def test_a_linear_layer_on_merged_heads_is_lifted() -> None:
    body = """r = Reshape(x, rows) g = MatMul(r, w) n = Shape(x) lead = Slice(n, i0, i2)
        t = Concat<axis = 0>(lead, i7) y = Reshape(g, t)"""
    made = model(
        "float[b,s,3,4] x", "float y", body, w=matrix(12, 7), rows=[-1, 12], i0=[0], i2=[2], i7=[7]
    )
    normal_form(made, 2**-18)
    assert ops(made) == {"Reshape": 1, "MatMul": 1}
    assert ints(node(made, "Reshape").inputs[1]) == [0, 0, 12]


def test_a_reshape_that_no_literal_says_stays_dynamic() -> None:
    made = normal_form(model(f"{X}, float[s,b,12] z", "float y", "n = Shape(z) y = Reshape(x, n)"))
    assert ops(made)["Reshape"] == 1 and ops(made)["Shape"] == 1


@pytest.mark.parametrize(
    "shape, out, literal",
    [
        ((2, 6, 2), (4, 6, 1), [4, 6, 1]),  # 6 stands at the same place by chance
        ((2, 6, 4), (3, 4, 4), [3, 4, 0]),
        ((8, 64, 7, 7), (8, 64, 49), [0, 0, 49]),
        ((5,), (5, 1), [0, 1]),
        ((0, 4), (0, 2, 2), [0, 2, 2]),
        ((4, 0), (0, 8), None),
    ],
)
def test_reshape_literals(
    shape: tuple[int, ...], out: tuple[int, ...], literal: list[int] | None
) -> None:
    assert reshape_literal(shape, out) == literal


def test_expand_says_which_dims_stay() -> None:
    body = """n = Shape(x) b = Slice(n, i0, i1) r = Concat<axis = 0>(b, t, w) e = Expand(u, r)
              y = Relu(e)"""
    made = model("float[b,1,12] u, float[b,3] x", "float y", body, i0=[0], i1=[1], t=[4], w=[12])
    normal_form(made)
    assert ops(made) == {"Expand": 1, "Relu": 1}
    assert ints(node(made, "Expand").inputs[1]) == [1, 4, 1]


def test_slices_are_literal() -> None:
    body = """n = Shape(x) s = Slice(n, i1, i2) u = Slice(x, z, s, i1) v = Slice(u, a, c, d)
              y = Relu(v)"""
    made = model(X, "float y", body, i1=[1], i2=[2], z=[0], a=[-5, 0], c=[12, 2**31 - 1], d=[-1, 0])
    normal_form(made)
    assert ops(made) == {"Slice": 1, "Relu": 1}  # the first one keeps all
    starts, ends, axes, steps = node(made, "Slice").inputs[1:]
    assert (ints(starts), ints(ends), ints(axes), ints(steps)) == ([7], [TO_THE_END], [2], [1])


@pytest.mark.parametrize("end", [10**9, 2**31 - 2, 2**63 - 1])
def test_an_end_beyond_any_dim_is_the_end(end: int) -> None:
    """tf2onnx writes a billion, which a size of Min(1000000000, b) would drag through the whole model."""
    made = model("float[b,3] x", "float y", "u = Slice(x, z, e, z) y = Relu(u)", z=[0], e=[end])
    normal_form(made)
    assert ops(made) == {"Relu": 1}
    made = model(
        "float[b,3] x", "float y", "u = Slice(x, o, e, z) y = Relu(u)", z=[0], o=[1], e=[end]
    )
    normal_form(made)
    output = made.graph.outputs[0]
    assert output.shape is not None and str(output.shape[0]) == "b - 1"


def test_transposes_compose() -> None:
    body = "u = Transpose<perm=[2,0,1]>(x) v = Transpose<perm=[2,0,1]>(u) y = Relu(v)"
    made = normal_form(model(X, "float y", body))
    assert list(node(made, "Transpose").attributes["perm"].as_ints()) == [1, 2, 0]


def test_equal_nodes_merge_and_random_ones_do_not() -> None:
    body = "u = Exp(x) v = Exp(x) w = Add(u, v) y = Relu(w)"
    made = normal_form(model(X, "float y", body))
    assert ops(made) == {"Exp": 1, "Add": 1, "Relu": 1}
    made = model(X, "float y", "u = RandomNormalLike(x) v = RandomNormalLike(x) y = Add(u, v)")
    normal.normalize(made)
    assert ops(made)["RandomNormalLike"] == 2
