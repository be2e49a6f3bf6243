"""Converted models against their references, bit for bit; what stays in float32, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from netlathe.analysis.cost import cost
from netlathe.backends import opset as opsets
from netlathe.diagnostics import PassError
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of, relative_error
from netlathe.execute.executor import Executor
from netlathe.ir import normal, provenance, verify, weights
from netlathe.ir.printing import show_model, show_node
from netlathe.passes import convert
from netlathe.passes.convert import Convert
from netlathe.passes.quantize import Quantize
from netlathe.pipeline import text
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import ChoosingPass, Context, Reference
from netlathe.pipeline.run import run
from tests import zoo_ir
from tests.ir.onnx_text import feeds, matrix, model, node, ops
from tests.pipeline.toy import captured_of

Array = np.ndarray[Any, np.dtype[Any]]
CTX = Context()
HALF = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
BOTH = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
SIZES = ({"b": 2, "s": 5}, {"b": 3, "s": 8})


def settled(inputs: str, body: str, outputs: str = "float y", **constants: Any) -> ir.Model:
    made = model(inputs, outputs, body, **constants)
    normal.normalize(made)
    return made


def changed(before: ir.Model, pass_: ChoosingPass) -> tuple[ir.Model, list[Entry], Reference]:
    """The edited copy, which is in normal form and verifies, with its ledger and reference."""
    chosen = pass_.choose(before, CTX)
    after = before.clone()
    result = pass_.edit(after, chosen, CTX)
    assert result.entries == chosen
    assert result.changed == any(e.status == "applied" for e in chosen)
    shown = show_model(after)
    normal.normalize(after)
    assert show_model(after) == shown
    assert verify.verify(after) == []
    for old, new in zip(before.graph.outputs, after.graph.outputs, strict=True):
        assert (old.name, old.dtype) == (new.name, new.dtype)
    assert [(v.name, v.dtype) for v in before.graph.inputs] == [
        (v.name, v.dtype) for v in after.graph.inputs
    ]
    reference = pass_.simulate(before.clone(), chosen)
    assert verify.verify(reference.model) == []
    return after, chosen, reference


def errors(after: ir.Model, against: ir.Model, fed: dict[str, Array]) -> dict[str, float]:
    actual, expected = (ort.run(m, inputs_of(m, fed)) for m in (after, against))
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def check(before: ir.Model, dtype: str = "float16", **options: Any) -> tuple[ir.Model, list[Entry]]:
    """Convert, and hold the result against the reference, bit for bit."""
    after, chosen, reference = changed(before, Convert(dtype=dtype, **options))  # type: ignore[arg-type]
    for seed, sizes in enumerate(SIZES):
        fed = feeds(before, sizes, seed)
        assert set(errors(after, reference.model, fed).values()) == {0.0}
    return after, chosen


def dtypes(after: ir.Model) -> dict[str, str]:
    """op -> the dtype of its first output, of all but Casts."""
    return {n.op_type: str(n.outputs[0].dtype) for n in after.graph if n.op_type != "Cast"}


# -- rounding -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 20),
        elements=st.one_of(
            st.floats(width=32),
            # at and beside the ties of both formats, and around the ends of float16's range
            st.builds(
                lambda n, e, up: np.float32(np.nextafter(np.ldexp(n, e), up)),
                st.integers(-(2**12), 2**12),
                st.integers(-40, 8),
                st.sampled_from([-np.inf, 0.0, np.inf]),
            ),
            st.builds(
                lambda n, e: float(np.ldexp(n, e)),
                st.integers(-(2**12), 2**12),
                st.integers(-40, 8),
            ),
            st.sampled_from([65504.0, 65519.0, 65520.0, 3.3895314e38, 3.3961e38, 3.4028235e38]),
        ),
    )
)
def test_the_reference_rounds_as_the_formats_do(array: Array) -> None:
    for name, to in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            expected = array.astype(to).astype(np.float32)
        rounded = convert._ROUNDINGS[name](array, saturate=False)
        assert np.array_equal(rounded, expected, equal_nan=True)
        largest = np.float32(ml_dtypes.finfo(to).max)
        saturated = convert._ROUNDINGS[name](array, saturate=True)
        kept = np.isfinite(array)
        assert np.array_equal(saturated[kept], np.clip(expected, -largest, largest)[kept])


# -- what is converted ----------------------------------------------------------------------------


@BOTH
def test_products_and_their_weights_are_converted(dtype: str) -> None:
    before = settled(
        "float[b,s,8] x",
        "m = MatMul (x, w) a = Add (m, c) y = Relu (a)",
        w=matrix(8, 6),
        c=matrix(6),
    )
    after, chosen = check(before, dtype)
    assert [n.op_type for n in after.graph] == ["Cast", "MatMul", "Add", "Relu", "Cast"]
    for name in ("w", "c"):
        value = after.graph.initializers[name]
        assert value.dtype == HALF[dtype]
        base = weights.array(before.graph.initializers[name])
        assert np.array_equal(weights.array(value), base.astype(HALF[dtype].numpy()))
    (entry,) = chosen
    assert (entry.candidate, entry.status) == ("m", "applied")
    assert entry.reason == f"3 nodes in {dtype} (MatMul, Add, Relu), with 2 weights"
    assert entry.detail["nodes"][0] == {"node": "m", "inputs": [0, 1], "outputs": [0]}
    assert cost(after).params == cost(before).params
    assert cost(after).bytes * 2 == cost(before).bytes


def test_attention_keeps_its_softmax_and_norms_their_statistics() -> None:
    body = (
        "n = LayerNormalization (x, g, c) r = RMSNormalization (n, g)"
        " y = Attention <q_num_heads=2, kv_num_heads=2> (r, n, n)"
    )
    after, _ = check(settled("float[b,s,8] x", body, g=matrix(8), c=matrix(8, seed=1)))
    assert set(dtypes(after).values()) == {"FLOAT16"}
    assert node(after, "Attention").attributes.get_int("softmax_precision") == 1
    for op in ("LayerNormalization", "RMSNormalization"):
        assert node(after, op).attributes.get_int("stash_type") == 1


def test_a_norm_that_tells_its_statistics() -> None:
    body = "n, m, d = LayerNormalization (x, g) y = Relu (n)"
    after, _ = check(settled("float[b,s,8] x", body, "float y, float m, float d", g=matrix(8)))
    assert [str(v.dtype) for v in node(after, "LayerNormalization").outputs] == [
        "FLOAT16",
        "FLOAT",
        "FLOAT",
    ]


def test_tables_and_movements_follow_their_data() -> None:
    body = "e = Gather (w, i) t = Transpose <perm=[0,2,1]> (e) y = Relu (t)"
    after, _ = check(settled("int64[b,s] i", body, w=matrix(9, 8)))
    assert dtypes(after) == dict.fromkeys(("Gather", "Transpose", "Relu"), "FLOAT16")
    body = "t = Transpose <perm=[0,2,1]> (x) p = Exp (t) y = Reshape (p, n)"
    after, chosen = check(settled("float[b,s,8] x", body, n=[0, -1]))
    assert ops(after) == {"Transpose": 1, "Exp": 1, "Reshape": 1}, "nothing is in half precision"
    assert not [e for e in chosen if e.status == "applied"]


def test_outputs_that_are_read_inside() -> None:
    body = "a = MatMul (x, w) y = Relu (a) e = Exp (a)"
    before = settled("float[b,s,8] x", body, "float a, float y, float e", w=matrix(8, 8))
    after, _ = check(before)
    casts = [n for n in after.graph if n.op_type == "Cast"]
    assert len(casts) == 3, "x there; a and y back, a for all that want float32"


def test_values_that_bodies_read() -> None:
    body = (
        "a = MatMul (x, w) n = Neg (a)"
        " y = If (c) <then_branch = t () => (float[b,s,8] p) { p = Mul (n, a) },"
        " else_branch = e () => (float[b,s,8] q) { q = MatMul (x, w) }>"
    )
    after, chosen = check(settled("bool c, float[b,s,8] x", body, w=matrix(8, 8)))
    assert [e.reason for e in chosen if e.status == "refused"] == [
        "1 node in float32 (If): the bodies of If stay in float32"
    ]
    # The weight is read in both precisions: it is one, and cast.
    assert after.graph.initializers["w"].dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    assert dtypes(after)["MatMul"] == "FLOAT16"


def test_a_big_weight_in_both_precisions_is_stored_once() -> None:
    body = (
        "t = Squeeze (v, zero) a = MatMul (x, t)"
        " h, y = RNN <hidden_size=70> (a, v, r)"  # a recurrent layer stays in float32
    )
    v = matrix(1, 70, 70) / 9
    before = settled("float[s,b,70] x", body, zero=[0], v=v, r=v / 2)
    after, _ = check(before)
    assert dtypes(after)["MatMul"] == "FLOAT16"
    big = [v.name for v in after.graph.initializers.values() if weights.array(v).size == 4900]
    assert big == ["v", "r"]


# -- what stays -----------------------------------------------------------------------------------


def staying(before: ir.Model, dtype: str = "float16", **options: Any) -> dict[str, str]:
    """op -> why it stays in float32."""
    _, chosen = check(before, dtype, **options)
    found = {}
    for entry in chosen:
        if entry.status == "refused":
            names, reason = entry.reason.split("(", 1)[1].split("): ", 1)
            found.update(dict.fromkeys(names.split(", "), reason))
    return found


STAY = {
    "Softmax": ("float[b,s,8] x", "y = Softmax (x)", "exponentials"),
    "Pow": ("float[b,s,8] x", "a = Abs (x) y = Pow (a, k)", "exponentials"),
    "ReduceMean": ("float[b,s,8] x", "y = ReduceMean (x)", "sums over many"),
    "CumSum": ("float[b,s,8] x", "y = CumSum (x, n)", "sums over many"),
    "InstanceNormalization": (
        "float[b,4,s] x",
        "y = InstanceNormalization (x, v, v)",
        "its statistics are computed in the type of its input",
    ),
    "GRU": ("float[s,b,4] x", "h, y = GRU <hidden_size=3> (x, w, r)", "a state that is rounded"),
    "GridSample": ("float[b,1,4,4] x, float[b,s,4,2] g", "y = GridSample (x, g)", "coordinates"),
    "DequantizeLinear": ("int8[b,s] x", "d = DequantizeLinear (x, k) y = Relu (d)", "scales"),
}
CONSTANTS: dict[str, Any] = {
    "k": 0.5,
    "n": np.array(1),
    "v": np.ones(4, np.float32),
    "w": matrix(1, 9, 4),
    "r": matrix(1, 9, 3),
}


@pytest.mark.parametrize("op", STAY)
def test_what_needs_float32_stays(op: str) -> None:
    inputs, body, reason = STAY[op]
    used = {
        k: v for k, v in CONSTANTS.items() if f" {k}" in body.replace(",", " ").replace(")", " ")
    }
    found = staying(
        settled(inputs, f"{body} z = Relu (x)" if "int8" not in inputs else body, **used)
    )
    assert found[op].startswith(reason)


def test_an_operator_without_the_type_stays() -> None:
    before = settled("float[b,s,8] x", 'y = Einsum <equation="bsk,kn->bsn"> (x, w)', w=matrix(8, 6))
    assert staying(before, "bfloat16") == {"Einsum": "Einsum takes no bfloat16"}
    assert staying(before, "float16") == {}


def test_comparisons_stay() -> None:
    found = staying(settled("float[b,s] x", "g = Greater (x, k) y = Where (g, x, k)", k=0.5))
    assert found["Greater"] == "its result is no floating-point number"


def test_operators_of_other_domains_stay() -> None:
    before = settled("float[b,s,8] x", "a = Relu (x) y = Neg (a)")
    neg = node(before, "Neg")
    neg.domain, before.graph.opset_imports["vendor"] = "vendor", 1
    chosen = Convert().choose(before, CTX)
    assert chosen[-1].reason == "1 node in float32 (Neg): nothing is known of vendor::Neg"


def test_angles_and_positions_stay_back_to_the_integers() -> None:
    body = (
        "f = Cast <to=1> (p) u = Unsqueeze (f, two) m = MatMul (u, k) a = Mul (m, t) c = Cos (a)"
        " y = Mul (x, c)"
    )
    before = settled(
        "int64[b,s] p, float[b,s,4] x",
        body,
        two=[2],
        k=matrix(1, 4),
        t=np.array([1, 2, 3, 4.0], np.float32),
    )
    found = staying(before)
    assert found["MatMul"] == found["Mul"] == "makes angles that need the digits of float32"
    assert found["Cos"] == "angles and positions need float32's digits"
    after, _ = check(before)
    muls = [str(n.outputs[0].dtype) for n in after.graph if n.op_type == "Mul"]
    assert muls == ["FLOAT", "FLOAT16"], "the rotation itself is converted"


def test_what_becomes_an_index_stays() -> None:
    body = "m = MatMul (x, w) a = Mul (m, k) i = Cast <to=7> (a) y = Gather (t, i)"
    found = staying(
        settled("float[b,s,4] x", body, w=np.zeros((4, 4), np.float32), k=0.5, t=matrix(3, 8))
    )
    assert found["Mul"] == "makes indices that need the digits of float32"
    assert "MatMul" not in found, "a product is not looked through"


def test_a_resize_is_converted_and_its_scales_are_not() -> None:
    body = 'y = Resize <mode="linear"> (x, , k)'
    after, _ = check(settled("float[b,2,s,4] x", body, k=np.array([1, 1, 2, 2], np.float32)))
    assert dtypes(after) == {"Resize": "FLOAT16"}
    assert node(after, "Resize").inputs[2] is not None
    assert after.graph.initializers["k"].dtype == ir.DataType.FLOAT


def test_weights_out_of_range_stay_with_their_reader() -> None:
    w = matrix(8, 6)
    w[3, 3] = 7e4
    before = settled("float[b,s,8] x", "m = MatMul (x, w) y = Relu (m)", w=w)
    assert staying(before) == {"MatMul": "w holds 7e+04, beyond float16"}
    assert staying(before, "bfloat16") == {}


def test_an_epsilon_below_the_range_stays_with_its_reader() -> None:
    before = settled("float[b,s,8] x", "a = Abs (x) p = Add (a, k) y = Div (x, p)", k=1e-6)
    assert staying(before) == {"Add": "k is at most 1e-06, for which float16 has few digits"}
    assert staying(before, "bfloat16") == {}
    zero = settled("float[b,s,8] x", "p = Max (x, k) y = Neg (p)", k=0.0)
    assert staying(zero) == {}, "zero is exact"


@pytest.mark.parametrize(
    "body",
    [
        "n = Clip (a, k) y = Div (x, n)",
        "p = Add (a, k) e = Expand (p, shape) y = Div (x, e)",
        "p = Add (a, k) n = Reciprocal (p) y = Mul (x, n)",
        "p = Add (a, k) n = Sqrt (p) i = Div (one, n) y = Mul (i, x)",
        "p = Max (a, k) h = Mul (p, tenth) y = Div (x, h)",
        "p = Max (a, k) h = Mul (p, p) y = Div (x, h)",
        "p = Max (a, k) h = Pow (p, tenth) r = Pow (h, ten) y = Div (x, r)",
        "p = Max (a, k) h = Pow (p, neg) y = Mul (x, h)",
        "p = Max (a, k) h = Add (p, a) y = Div (x, h)",
        "p = Max (a, k) h = Div (p, ten) n = Abs (h) y = Div (x, n)",
        "p = Max (a, k) h = ReduceMean (p, last) y = Div (x, h)",
    ],
)
def test_a_division_that_a_number_below_the_range_guards_stays(body: str) -> None:
    """Swin V2 divides keys by max(norm, 1e-12): those of padding are 0, and so is float16(1e-12)."""
    numbers: dict[str, Any] = dict(
        k=1e-12, one=1.0, ten=10.0, tenth=0.1, neg=-0.5, shape=np.array([1, 1, 8]), last=[-1]
    )
    before = settled("float[b,s,8] x", f"a = Abs (x) {body}", **numbers)
    after, _ = check(before)
    zeros = {"x": np.zeros((2, 3, 8), np.float32)}
    assert not ort.run(after, zeros)["y"].any()  # and no NaN


def test_sums_of_integers_stay_until_they_are_scaled() -> None:
    """They reach 2^31, and the scales of activations by which they are made small are small."""
    body = (
        "q, s, z = DynamicQuantizeLinear (x) m = MatMulInteger (q, w, z) c = Cast <to=1> (m)"
        " f = Mul (s, k) r = Mul (c, f) a = Add (r, bias) y = MatMul (a, v)"
    )
    w = np.full((8, 8), 127, np.int8)
    before = settled("float[b,s,8] x", body, w=w, k=1e-4, bias=matrix(8), v=matrix(8, 4))
    kept = staying(before)
    assert {"Mul", "Add"} <= set(kept)
    assert kept["Mul"] == kept["Add"] == "reads nothing but what stays in float32"
    assert "MatMul" not in kept
    after, _ = check(before)
    fed = {"x": np.linspace(0, 1, 2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)}
    assert np.isfinite(ort.run(after, fed)["y"]).all()


def test_a_variance_by_the_mean_of_squares_is_one() -> None:
    """E[x^2] - E[x]^2, as flax has it, loses all its digits in half precision, and squares its range."""
    body = (
        "q = Mul (x, x) e = ReduceMean (q, last) m = ReduceMean (x, last) p = Mul (m, m)"
        " d = Sub (e, p) v = Max (d, zero) g = Add (v, k) r = Sqrt (g) c = Sub (x, m) y = Div (c, r)"
    )
    last = np.array([-1])
    before = settled("float[b,s,8] x", body, k=1e-6, zero=0.0, last=last)
    kept = staying(before)
    assert set(kept) >= {"Mul", "ReduceMean", "Max", "Add", "Sqrt"}
    after, _ = check(before)
    fed = {"x": 300 * matrix(2, 3, 8)}
    expected = ort.run(before, fed)["y"]
    np.testing.assert_allclose(ort.run(after, fed)["y"], expected, atol=0.01)


def test_a_mask_from_integers_is_converted() -> None:
    """What stands for infinity in it has to become the largest number of the format."""
    least = float(np.finfo(np.float32).min)
    body = "c = Cast <to=1> (i) d = Sub (one, c) m = Mul (d, l) a = Add (x, m) y = Softmax (a)"
    before = settled("int64[b,1,8] i, float[b,s,8] x", body, one=1.0, l=least)
    assert not {"Sub", "Mul", "Add"} & set(staying(before))


@BOTH
def test_what_stands_for_infinity_becomes_the_largest_number(dtype: str) -> None:
    least = float(np.finfo(np.float32).min)
    body = "m = Where (c, k, l) a = Add (x, m) y = Softmax (a)"
    before = settled("bool[b,1,8] c, float[b,s,8] x", body, k=0.0, l=least)
    after, chosen = check(before, dtype)
    (fill,) = (v for v in after.graph.initializers.values() if weights.array(v).min() < 0)
    assert float(weights.array(fill)) == -float(ml_dtypes.finfo(HALF[dtype].numpy()).max)
    assert "what stands for infinity in l becomes the largest number" in chosen[0].reason
    # A row that is masked whole stays finite, as in float32.
    fed = feeds(before, SIZES[0])
    fed["c"][:] = False
    for m in (before, after):
        assert np.isfinite(ort.run(m, fed)["y"]).all()


@BOTH
def test_a_mask_that_is_filled(dtype: str) -> None:
    body = (
        "d = Shape (x) f = ConstantOfShape <value = float[1] {-3.4028235e38}> (d)"
        " u = Trilu <upper=1> (f, one) a = Add (x, u) y = Softmax (a)"
    )
    after, _ = check(settled("float[b,s,s] x", body, one=np.array(1)), dtype)
    assert dtypes(after)["ConstantOfShape"] == str(HALF[dtype])
    wide = settled("float[b,s,s] x", body.replace("-3.4028235e38", "1e5"), one=np.array(1))
    if dtype == "float16":
        assert "holds 1e+05, beyond float16" in staying(wide)["ConstantOfShape"]


def test_infinity_itself_stays_infinity() -> None:
    body = "m = Where (c, k, l) a = Add (x, m) y = Max (a, k)"
    _, chosen = check(settled("bool[b,1,8] c, float[b,s,8] x", body, k=0.0, l=-np.inf))
    assert chosen[0].detail["saturated"] == []


# -- keep -----------------------------------------------------------------------------------------


def test_keep_names_modules_operators_and_values() -> None:
    before = zoo_ir.captured("llama")
    after, chosen, reference = changed(before, Convert(keep=("layers.1.mlp", "Add", "lm_head")))
    for fed in zoo_ir.feeds("llama"):
        assert set(errors(after, reference.model, fed).values()) == {0.0}
    kept = [e for e in chosen if e.status == "skipped"]
    assert {e.where for e in kept if "'layers.1.mlp'" in e.reason} == {
        "model.layers.1.mlp",
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
        "model.layers.1.mlp.act_fn",
    }
    for n in after.graph:
        wanted = n.op_type == "Add" or provenance.matches(provenance.module_path(n), "layers.1.mlp")
        wanted |= provenance.module_path(n) == "lm_head"
        if wanted and n.op_type != "Cast":
            assert n.outputs[0].dtype == ir.DataType.FLOAT, show_node(n)
    assert (
        after.graph.initializers["model.layers.0.mlp.up_proj.weight"].dtype == ir.DataType.FLOAT16
    )
    assert after.graph.initializers["model.layers.1.mlp.up_proj.weight"].dtype == ir.DataType.FLOAT
    value = before.graph.outputs[0].name
    chosen = Convert(keep=(str(value),)).choose(before, CTX)
    assert [e.candidate for e in chosen if e.status == "skipped"] == [value]


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PassError) as caught:
        Convert(keep=("layers.9", "MatMull")).choose(zoo_ir.captured("llama"), CTX)
    assert "keep='layers.9' matches no module, operator or value" in str(caught.value)
    assert "did you mean MatMul or Mul?" in str(caught.value)


def test_text_form() -> None:
    (parsed,) = text.parse('convert(dtype="bfloat16", keep=["lm_head"])')
    assert parsed == Convert(dtype="bfloat16", keep=("lm_head",))
    assert str(Convert()) == "convert"


def test_a_model_without_float32_is_left_alone() -> None:
    once = settled("int64[b,s] x", "y = Add (x, x)", "int64 y")
    assert Convert().choose(once, CTX) == []
    assert not Convert().run(once, CTX).changed


# -- whole models ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", zoo_ir.some("llama", "t5", "swin", "mixtral"))
def test_zoo_models_equal_their_references(name: str, dtype: str) -> None:
    before = zoo_ir.captured(name)
    after, chosen, reference = changed(before, Convert(dtype=dtype))  # type: ignore[arg-type]
    for fed in zoo_ir.feeds(name):
        assert set(errors(after, reference.model, fed).values()) == {0.0}
        # And it is half precision: each value is off by 0.29 ulp, on a path of 200 nodes by 4 ulp,
        # the largest by 16; a sum cancels here and there.
        lost = max(errors(after, before, fed).values())
        assert reference.tolerance / 16 < lost < 32 * reference.tolerance
    assert (cost(after).params, cost(after).macs) == (cost(before).params, cost(before).macs)
    listed = {n for e in chosen for n in _names(e)}
    assert listed == {
        n.outputs[0].name
        for n in before.graph
        if any(v is not None and v.dtype == ir.DataType.FLOAT for v in (*n.inputs, *n.outputs))
        and n.op_type not in ("Shape", "Size")
    }


def _names(entry: Entry) -> list[str]:
    nodes = entry.detail["nodes"]
    return [n["node"] for n in nodes] if entry.status == "applied" else list(nodes)


@pytest.mark.parametrize("opset", [17, 20, 23, 25])
def test_every_opset_runs_with_optimizations_off_and_on(opset: int) -> None:
    after, _, _ = changed(zoo_ir.captured("llama"), Convert())
    lowered = after.clone()
    opsets.lower(lowered, opset)
    fed = zoo_ir.feeds("llama")[0]
    expected = ort.run(after, inputs_of(after, fed))["logits"]
    for optimize in (False, True):
        actual = ort.run(lowered, inputs_of(lowered, fed), optimize=optimize)["logits"]
        assert relative_error(actual, expected) <= 16 * 2**-10  # roundings in other places


@BOTH
def test_the_executor_agrees(dtype: str) -> None:
    after, _, reference = changed(zoo_ir.captured("qwen2"), Convert(dtype=dtype))  # type: ignore[arg-type]
    fed = zoo_ir.feeds("qwen2")[0]
    expected = ort.run(after, inputs_of(after, fed))["logits"]
    actual = Executor(after).run(inputs_of(after, fed))["logits"].numpy()
    assert relative_error(actual, expected) <= 16 * reference.tolerance  # roundings in other places


def test_the_manager_checks_it() -> None:
    made = settled(
        "float[batch,s,64] x",
        "a = MatMul (x, w) b = Relu (a) y = Softmax (b)",
        w=matrix(64, 32) / 8,
    )
    compiled = run(captured_of(made), [Convert()], CTX)
    (step,) = compiled.steps
    assert step.changed and step.check.against == "simulated reference" and step.check.error == 0.0
    assert step.statistics == {"nodes": 2, "nodes_in_float32": 1, "bytes_saved": 64 * 32 * 2}


@pytest.mark.parametrize("order", ["quantize, convert", "convert, quantize"])
def test_with_int8_weights(order: str) -> None:
    current = zoo_ir.captured("llama")
    for name in order.split(", "):
        pass_ = Quantize(min_size=0) if name == "quantize" else Convert()
        after, _, reference = changed(current, pass_)
        for fed in zoo_ir.feeds("llama"):
            assert set(errors(after, reference.model, fed).values()) == {0.0}
        current = after
    assert ops(current)["DequantizeLinear"] == 16
    assert {str(n.outputs[0].dtype) for n in current.graph if n.op_type == "MatMul"} == {"FLOAT16"}
    scales = [v for n, v in current.graph.initializers.items() if n.endswith("_scale")]
    assert scales and all(v.dtype == ir.DataType.FLOAT for v in scales)


def test_weights_are_recipes_over_their_sources() -> None:
    before = settled("float[b,128] x", "y = MatMul (x, w)", w=matrix(128, 128))
    after, _, _ = changed(before, Convert())
    value = after.graph.initializers["w"]
    assert value.const_value is not None and weights.is_recipe(value.const_value)
    assert value.dtype == ir.DataType.FLOAT16


# -- what a wrong edit does -----------------------------------------------------------------------


def _lose_a_bias(after: ir.Model) -> None:
    bias = after.graph.initializers["model.layers.1.self_attn.v_proj.bias"]
    assert bias.const_value is not None
    bias.const_value = ir.tensor(np.zeros_like(weights.array(bias)), name=bias.name)


def _swap_weights(after: ir.Model) -> None:
    a, b = (after.graph.initializers[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("up", "gate"))
    a.const_value, b.const_value = b.const_value, a.const_value


def _round_coarser(after: ir.Model) -> None:
    weight = after.graph.initializers["model.layers.0.mlp.down_proj.weight"]
    array = weights.array(weight).astype(ml_dtypes.float8_e5m2).astype(np.float16)
    weight.const_value = ir.tensor(array, name=weight.name)


def _turn_one_weight(after: ir.Model) -> None:
    weight = after.graph.initializers["model.layers.0.self_attn.q_proj.weight"]
    array = weights.array(weight).copy()
    array[5, 7] *= -1
    weight.const_value = ir.tensor(array, name=weight.name)


def _stale_scale(after: ir.Model) -> None:
    attention = next(n for n in after.graph if n.op_type == "Attention")
    scale = attention.attributes["scale"].as_float()
    attention.attributes["scale"] = ir.AttrFloat32("scale", scale * 1.02)


@pytest.mark.parametrize(
    "break_it", [_lose_a_bias, _swap_weights, _round_coarser, _turn_one_weight, _stale_scale]
)
def test_a_wrong_edit_is_far_from_the_reference(break_it: Callable[[ir.Model], None]) -> None:
    after, _, reference = changed(zoo_ir.captured("qwen2"), Convert())
    break_it(after)
    worst = [max(errors(after, reference.model, fed).values()) for fed in zoo_ir.feeds("qwen2")]
    assert max(worst) > 2 * reference.tolerance


def test_angles_in_half_precision_are_caught() -> None:
    """Positions of a long context, computed where the ledger says they are not."""
    body = "f = Cast <to=1> (p) a = Mul (f, k) c = Cos (a) y = Mul (x, c)"
    before = settled("int64[b,s] p, float[b,s] x", body, k=0.3)
    after, _, reference = changed(before, Convert())
    wrong = before.clone()
    Convert().edit(wrong, _everything(wrong), CTX)
    fed = feeds(before, SIZES[1])
    fed["p"] += 3001
    assert errors(after, reference.model, fed)["y"] == 0.0
    assert errors(wrong, reference.model, fed)["y"] > 100 * reference.tolerance


def _everything(made: ir.Model) -> list[Entry]:
    """A choice of all arithmetic, whatever it needs."""
    nodes = [
        {"node": n.outputs[0].name, "inputs": list(range(len(n.inputs))), "outputs": [0]}
        for n in made.graph
        if n.op_type != "Cast"
    ]
    return [Entry("all", "applied", "all", detail={"nodes": nodes, "saturated": []})]
