"""Quantized weights against the formula in float64, and edited models against their references."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from netlathe.analysis.cost import cost
from netlathe.backends import opset as opsets
from netlathe.diagnostics import OptionError, PassError
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of, relative_error
from netlathe.execute.executor import Executor
from netlathe.ir import normal, provenance, verify, weights
from netlathe.ir.printing import show_model
from netlathe.passes import quantize
from netlathe.passes.quantize import Quantize, candidates, rounding
from netlathe.pipeline import text
from netlathe.pipeline.ledger import Entry, count_by_status
from netlathe.pipeline.pass_ import Context, Reference
from netlathe.pipeline.run import run
from tests import zoo_ir
from tests.ir.onnx_text import feeds, matrix, model, ops
from tests.pipeline.toy import captured_of

Array = np.ndarray[Any, np.dtype[Any]]
ALL = Quantize(min_size=0)
CTX = Context()


def settled(inputs: str, body: str, **constants: Any) -> ir.Model:
    made = model(inputs, "float y", body, **constants)
    normal.normalize(made)
    return made


def quantized(before: ir.Model, pass_: Quantize = ALL) -> tuple[ir.Model, list[Entry], Reference]:
    """The edited copy, which is in normal form and verifies, with its ledger and reference."""
    chosen = pass_.choose(before, CTX)
    after = before.clone()
    result = pass_.edit(after, chosen, CTX)
    assert result.entries == chosen
    shown = show_model(after)
    normal.normalize(after)
    assert show_model(after) == shown
    assert verify.verify(after) == []
    return after, chosen, pass_.simulate(before.clone(), chosen)


def errors(after: ir.Model, against: ir.Model, fed: dict[str, Array]) -> dict[str, float]:
    actual, expected = (ort.run(m, inputs_of(m, fed)) for m in (after, against))
    return {name: relative_error(actual[name], expected[name]) for name in expected}


SIZES = ({"b": 2, "s": 5}, {"b": 3, "s": 8})


def check(before: ir.Model) -> tuple[ir.Model, list[Entry]]:
    """Quantize, and hold the result against the reference, bit for bit."""
    after, chosen, reference = quantized(before)
    for seed, sizes in enumerate(SIZES):
        worst = max(errors(after, reference.model, feeds(before, sizes, seed)).values())
        assert worst == 0.0
    assert cost(after).params == cost(before).params
    assert cost(after).macs == cost(before).macs
    return after, chosen


def applied(chosen: list[Entry]) -> dict[str, Entry]:
    return {e.candidate: e for e in chosen if e.status == "applied"}


# -- numbers --------------------------------------------------------------------------------------

MATMUL = ("float[b,s,{k}] x", "y = MatMul (x, w)")


def of_matmul(w: Array) -> tuple[Array, Array]:
    """Integers and scales that the pass makes of ``w`` in x @ w."""
    inputs, body = MATMUL
    after, chosen, _ = quantized(settled(inputs.format(k=w.shape[0]), body, w=w))
    assert [e.status for e in chosen] == ["applied"], chosen
    q, s = (weights.array(after.graph.initializers[name]) for name in ("w_int8", "w_scale"))
    assert q.dtype == np.int8 and s.dtype == np.float32
    return q, s


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
        elements=st.floats(-(2.0**126), 2.0**126, width=32),
    )
)
def test_integers_and_scales_are_the_formula(w: Array) -> None:
    q, s = of_matmul(w)
    wide, scale = w.astype(np.float64), s.astype(np.float64)
    most = np.abs(wide).max(0)
    assert np.abs(q.astype(int)).max() <= 127
    assert (scale > 0).all() and np.isfinite(1 / s).all()
    zero = most == 0
    assert (scale[zero] == 1).all() and (q[:, zero] == 0).all()
    # m / 127 rounded to float32, but for what float32 holds only as subnormal numbers.
    normal_ = most / 127 >= 2.0**-126
    assert (np.abs(scale - most / 127)[normal_] <= 2.0**-24 * most[normal_] / 127).all()
    # Nearest: half a step away at most, and a little more at the end of the range, where the scale
    # was rounded down: 127 of its steps of at most 2**-24.
    assert (np.abs(q * scale - wide) <= scale * (0.5 + 127 * 2.0**-24)).all()
    # The largest of every channel uses the whole range.
    assert (np.abs(q.astype(int)).max(0) == 127)[normal_].all()


def test_halves_go_to_the_even_integer() -> None:
    q, s = of_matmul(np.array([[127.0, -127], [0.5, 2.5], [1.5, -0.5], [-2.5, -1.5]], np.float32))
    assert s.tolist() == [1, 1]
    assert q.tolist() == [[127, -127], [0, 2], [2, 0], [-2, -2]]


def test_a_channel_and_its_negative_are_quantized_alike() -> None:
    w = matrix(9, 4)
    (q, s), (negative, t) = of_matmul(w), of_matmul(-w)
    assert np.array_equal(q, -negative) and np.array_equal(s, t)


def test_big_weights_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix(33, 7)
    whole = of_matmul(w)
    monkeypatch.setattr(rounding, "AT_ONCE", 20)
    monkeypatch.setattr(candidates, "AT_ONCE", 20)
    pieces = of_matmul(w)
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "double"])
def test_other_float_types_keep_their_type(dtype: str) -> None:
    made = model(f"{dtype}[b,s,8] x", f"{dtype} y", "y = MatMul (x, w)")
    kind = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}.get(
        dtype, ir.DataType.DOUBLE
    )
    w = ir.Value(name="w", const_value=ir.tensor(matrix(8, 6).astype(kind.numpy()), name="w"))
    w.type, w.shape = ir.TensorType(kind), ir.Shape([8, 6])
    next(iter(made.graph)).replace_input_with(1, w)
    made.graph.register_initializer(w)
    normal.normalize(made)
    after, _ = check(made)
    assert ops(after) == {"DequantizeLinear": 1, "Cast": 1, "MatMul": 1}
    assert after.graph.initializers["w_scale"].dtype == ir.DataType.FLOAT


# -- readers --------------------------------------------------------------------------------------


def detail(entry: Entry) -> tuple[int, int, int]:
    return entry.detail["axis"], entry.detail["block_size"], entry.detail["scales"]


def test_a_product_has_one_scale_per_output_channel() -> None:
    after, chosen = check(settled("float[b,s,8] x", "y = MatMul (x, w)", w=matrix(8, 6)))
    (entry,) = chosen
    assert (entry.candidate, entry.status) == ("w", "applied")
    assert entry.reason == "int8, 6 scales: one per position of axis 1"
    assert detail(entry) == (1, 0, 6) and entry.detail["bits"] == 8
    assert [n.op_type for n in after.graph] == ["DequantizeLinear", "MatMul"]
    assert after.graph[0].outputs[0].name == "w", "what readers read keeps its name"


def test_a_weight_on_the_left_has_its_channels_in_front() -> None:
    _, chosen = check(settled("float[b,8,s] x", "y = MatMul (w, x)", w=matrix(6, 8)))
    assert detail(chosen[0]) == (0, 0, 6)


def test_stacked_matrices_have_scales_of_their_own() -> None:
    after, chosen = check(settled("float[b,3,s,8] x", "y = MatMul (x, w)", w=matrix(3, 8, 6)))
    assert detail(chosen[0]) == (1, 8, 18)
    assert chosen[0].reason == "int8, 18 scales: one per position of axes 0, 2"
    assert weights.array(after.graph.initializers["w_scale"]).shape == (3, 1, 6)


def test_convolutions() -> None:
    _, chosen = check(
        settled("float[b,4,9,s] x", "y = Conv <group=2> (x, w)", w=matrix(6, 2, 3, 3))
    )
    assert detail(chosen[0]) == (0, 0, 6)
    _, chosen = check(settled("float[b,4,9] x", "y = ConvTranspose (x, w)", w=matrix(4, 6, 3)))
    assert detail(chosen[0]) == (1, 0, 6)
    _, chosen = check(
        settled("float[b,6,s,5] x", "y = Conv <group=6> (x, w)", w=matrix(6, 1, 3, 3))
    )
    assert detail(chosen[0]) == (0, 0, 6), "depthwise"


def test_a_single_output_channel() -> None:
    after, chosen = check(settled("float[b,s,8] x", "y = MatMul (x, w)", w=matrix(8, 1)))
    assert detail(chosen[0]) == (1, 0, 1)
    assert weights.array(after.graph.initializers["w_scale"]).shape == (1,)


def test_einsum_and_recurrent_layers() -> None:
    body = 'y = Einsum <equation="bsk,nk->bsn"> (x, w)'
    _, chosen = check(settled("float[b,s,8] x", body, w=matrix(6, 8)))
    assert detail(chosen[0]) == (0, 0, 6)
    body = "y, h = GRU <hidden_size=5, linear_before_reset=1> (x, w, r)"
    made = settled("float[s,b,4] x", body, w=matrix(1, 15, 4), r=matrix(1, 15, 5))
    _, chosen = check(made)
    assert [detail(e) for e in chosen] == [(1, 0, 15)] * 2
    body = 'y, h, c = LSTM <hidden_size=5, direction="bidirectional"> (x, w, r)'
    made = settled("float[s,b,4] x", body, w=matrix(2, 20, 4), r=matrix(2, 20, 5))
    _, chosen = check(made)
    assert [detail(e) for e in chosen] == [(2, 4, 40), (2, 5, 40)]


@pytest.mark.parametrize("ids", ["int64[b,s]", "int64[b]", "int32[1]", "int64"])
def test_a_table_is_looked_up_as_integers(ids: str) -> None:
    after, chosen = check(settled(f"{ids} i", "y = Gather (w, i)", w=matrix(9, 8)))
    assert detail(chosen[0]) == (0, 0, 9)
    gathers = [n for n in after.graph if n.op_type == "Gather"]
    assert {n.inputs[0].name for n in gathers if n.inputs[0]} == {"w_int8", "w_scale"}
    assert after.graph[-1].op_type == "DequantizeLinear", "only what was looked up"


def test_a_tied_embedding_is_quantized_once() -> None:
    body = "e = Gather (w, i) n = Neg (e) t = Transpose <perm=[1,0]> (w) y = MatMul (n, t)"
    after, chosen = check(settled("int64[b,s] i", body, w=matrix(9, 8)))
    assert detail(chosen[0]) == (0, 0, 9)
    assert "shared by y, Gather" in chosen[0].reason or "shared by y, e" in chosen[0].reason
    assert sorted(after.graph.initializers) == ["e_axes", "w_int8", "w_scale"]


def test_readers_that_want_different_scales_share_those_of_the_first() -> None:
    body = "p = MatMul (x, w) t = Transpose <perm=[1,0]> (w) y = MatMul (p, t)"
    _, chosen = check(settled("float[b,s,8] x", body, w=matrix(8, 6)))
    assert detail(chosen[0]) == (1, 0, 6)
    assert chosen[0].reason.endswith("one per position of axis 1, as p wants; y would want others")
    # The row that is looked up is what the product sums over.
    body = "e = Gather (w, i) y = MatMul (x, w) z = MatMul (e, v)"
    made = model(
        "float[b,s,9] x, int64[s] i", "float y, float z", body, w=matrix(9, 8), v=matrix(8, 4)
    )
    normal.normalize(made)
    after, chosen = check(made)
    assert detail(applied(chosen)["w"]) == (1, 0, 8)
    assert "e would want others" in applied(chosen)["w"].reason
    assert [n.op_type for n in after.graph].count("Gather") == 1, "the scales are of the columns"


def test_experts_are_looked_up_as_integers() -> None:
    body = "m = {} (w, i) y = MatMul (x, m)"
    made = settled("float[b,s,8] x, int64[b] i", body.format("Gather"), w=matrix(4, 8, 6))
    after, chosen = check(made)
    assert detail(chosen[0]) == (1, 8, 24)
    assert ops(after) == {"Gather": 2, "DequantizeLinear": 1, "MatMul": 1}
    made = settled("float[b,s,8] x, int64[b,1] i", body.format("GatherND"), w=matrix(4, 8, 6))
    after, chosen = check(made)
    assert detail(chosen[0]) == (1, 8, 24)
    assert ops(after) == {"GatherND": 2, "DequantizeLinear": 1, "MatMul": 1}


def test_a_table_in_front_of_a_transposed_product() -> None:
    body = "m = Gather (w, i) t = Transpose <perm=[0,2,1]> (m) y = MatMul (x, t)"
    _, chosen = check(settled("float[b,s,8] x, int64[b] i", body, w=matrix(4, 6, 8)))
    assert detail(chosen[0]) == (2, 8, 24)


def test_tables_that_only_a_whole_copy_serves() -> None:
    """Two axes are summed over for every position of axis 0: no block along one axis says that."""
    body = "m = Gather (w, i) y = Conv (x, m)"
    made = settled("float[b,2,s] x, int64[3] i", body, w=matrix(4, 2, 3))
    after, chosen = check(made)
    assert applied(chosen)
    assert ops(after)["DequantizeLinear"] == 1


def test_weights_inside_branches() -> None:
    body = (
        "y = If (c) <then_branch = a () => (float[b,6] p) { p = MatMul (x, w) },"
        " else_branch = e () => (float[b,6] q) { n = Neg (x) q = MatMul (n, w) }>"
    )
    after, _ = check(settled("bool c, float[b,8] x", body, w=matrix(8, 6)))
    assert [n.op_type for n in after.graph] == ["DequantizeLinear", "If"]
    body = (
        "y = If (c) <then_branch = a () => (float[b,8] p) { p = Gather (w, i) },"
        " else_branch = e () => (float[b,8] q) { t = Gather (w, i) q = Neg (t) }>"
    )
    after, _ = check(settled("bool c, int64[b] i", body, w=matrix(8, 8)))
    assert [n.op_type for n in after.graph] == ["If"]


def test_a_float_copy_lives_right_before_its_first_reader() -> None:
    body = "a = MatMul (x, w) b = Relu (a) c = MatMul (b, v) y = MatMul (c, w)"
    after, _ = check(settled("float[b,s,8] x", body, w=matrix(8, 8), v=matrix(8, 8, seed=1)))
    order = [n.op_type for n in after.graph]
    assert order == ["DequantizeLinear", "MatMul", "Relu", "DequantizeLinear", "MatMul", "MatMul"]


# -- the ledger -----------------------------------------------------------------------------------


def reasons(made: ir.Model, pass_: Quantize = ALL) -> dict[str, tuple[str, str]]:
    return {e.candidate: (e.status, e.reason) for e in pass_.choose(made, CTX)}


def test_what_is_skipped_says_why() -> None:
    body = "a = MatMul (x, w) b = Add (a, p) c = MatMul (b, v) y = Gather (t, i)"
    made = model(
        "float[b,s,8] x, int64[b] i",
        "float y, float c",
        body,
        w=matrix(8, 8),
        p=matrix(1, 8, seed=1) + np.zeros((5, 8), np.float32),
        v=matrix(8, 4, seed=2),
        t=matrix(9, 8, seed=3),
    )
    normal.normalize(made)
    found = reasons(made, Quantize(min_size=40, embeddings=False, ignore=("w",)))
    assert found == {
        "w": ("skipped", "ignored: it matches 'w'"),
        "p": ("skipped", "read by Add, which is no product and no lookup"),
        "v": ("skipped", "32 elements, fewer than min_size=40"),
        "t": ("skipped", "a table, and embeddings=False"),
    }
    body = "e = Gather (w, i) t = Transpose <perm=[1,0]> (w) y = MatMul (e, t)"
    tied = settled("int64[b,s] i", body, w=matrix(9, 8))
    found = reasons(tied, Quantize(min_size=0, embeddings=False))
    assert found["w"] == ("skipped", "a table, tied to a product, and embeddings=False")


def test_nothing_applied_changes_nothing() -> None:
    made = settled("float[b,s,8] x", "y = MatMul (x, w)", w=matrix(8, 6))
    pass_ = Quantize()  # 48 elements are too few
    after = made.clone()
    result = pass_.run(after, CTX)
    assert not result.changed and count_by_status(result.entries)["skipped"] == 1
    assert show_model(after) == show_model(made)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = matrix(8, 6)
    w[7, 5] = bad
    found = reasons(settled("float[b,s,8] x", "y = MatMul (x, w)", w=w))
    assert found == {"w": ("refused", "it holds NaN or infinity")}


def test_weights_beyond_any_scale_are_refused() -> None:
    w = np.full((8, 6), 2e38, np.float32)
    found = reasons(settled("float[b,s,8] x", "y = MatMul (x, w)", w=w))
    assert found == {"w": ("refused", "it holds 2e+38, too much for its scale")}


def test_what_cannot_be_quantized_is_refused() -> None:
    codes = np.arange(18, dtype=np.int64).reshape(9, 2)
    made = settled("int64[b] i", "g = Gather (w, i) y = Cast <to=1> (g)", w=codes)
    assert reasons(made) == {"w": ("refused", "INT64: no floating-point numbers")}
    made = settled(
        "int8[b,4] x", "m = MatMulInteger (x, w) y = Cast <to=1> (m)", w=codes[:4].astype(np.int8)
    )
    assert reasons(made) == {"w": ("refused", "INT8: quantized already")}
    made = settled("float[b,s,8] x", "y = MatMul (x, w)", w=matrix(8, 6))
    made.graph.inputs.append(made.graph.initializers["w"])
    assert reasons(made) == {"w": ("refused", "a graph input: a caller may override it")}
    made = settled("float[b,s,8] x", "y = MatMul (x, w)", w=matrix(8, 6))
    made.graph.outputs.append(made.graph.initializers["w"])
    assert reasons(made) == {"w": ("refused", "it is itself an output of the graph")}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_second_run_refuses_what_the_first_did(name: str) -> None:
    once, chosen, _ = quantized(zoo_ir.captured(name))
    again = ALL.choose(once, CTX)
    assert len(again) == len(applied(chosen))
    assert {(e.status, e.reason) for e in again} == {("refused", "INT8: quantized already")}
    assert not ALL.run(once, CTX).changed


def test_patterns_name_modules_and_weights() -> None:
    before = zoo_ir.captured("llama")
    pass_ = Quantize(min_size=0, ignore=("layers.1", "model.embed_tokens", "lm_head.*"))
    _, chosen, _ = quantized(before, pass_)
    kept = {e.candidate for e in chosen if e.status == "skipped"}
    done = set(applied(chosen))
    assert kept == {n for n in kept | done if not n.startswith("model.layers.0")}
    assert len(kept) == 7 + 2 and len(done) == 7
    with pytest.raises(PassError) as caught:
        Quantize(ignore=("layers.7", "lm_heat")).choose(before, CTX)
    assert "ignore='layers.7' matches no weight" in str(caught.value)
    assert "did you mean lm_head" in str(caught.value)


def test_options_in_text_and_out_of_range() -> None:
    (parsed,) = text.parse('quantize(weights="int8", min_size=0, ignore=["lm_head"])')
    assert parsed == Quantize(min_size=0, ignore=("lm_head",))
    assert str(parsed) == "quantize(min_size=0, ignore=('lm_head',))"
    with pytest.raises(OptionError, match="int8"):
        text.parse('quantize(weights="int1")')
    with pytest.raises(OptionError):
        text.parse("quantize(min_size=-1)")


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo_ir.some("llama", "gpt2", "t5", "resnet", "mixtral"))
def test_zoo_models_equal_their_references(name: str) -> None:
    before = zoo_ir.captured(name)
    after, chosen, reference = quantized(before)
    assert not [e for e in chosen if e.status == "refused"]
    for fed in zoo_ir.feeds(name):
        assert set(errors(after, reference.model, fed).values()) == {0.0}
    old, new = cost(before), cost(after)
    assert (new.params, new.macs) == (old.params, old.macs)
    integers = sum(weights.array(before.graph.initializers[n]).size for n in applied(chosen))
    scales = sum(e.detail["scales"] for e in applied(chosen).values())
    other = new.bytes - (old.bytes - 4 * integers + integers + 4 * scales)
    assert 0 <= other <= 8 * ops(after)["Gather"], "besides, an axis for every lookup"
    # Where things come from is still known.
    assert all(provenance.module_path(n) for n in after.graph if n.op_type == "DequantizeLinear")


def test_the_executor_agrees() -> None:
    after, _, _ = quantized(zoo_ir.captured("mixtral"))
    fed = zoo_ir.feeds("mixtral")[1]
    expected = ort.run(after, inputs_of(after, fed))
    for name, tensor in Executor(after).run(inputs_of(after, fed)).items():
        assert relative_error(tensor.numpy(), expected[name]) <= 1e-5  # capture's parity bound


@pytest.mark.parametrize("opset", [17, 19, 21, 24, 25])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_opset_runs_with_optimizations_off_and_on(name: str, opset: int) -> None:
    after, _, _ = quantized(zoo_ir.captured(name))
    lowered = after.clone()
    opsets.lower(lowered, opset)
    fed = zoo_ir.feeds(name)[0]
    expected = ort.run(after, inputs_of(after, fed))["logits"]
    plain = ort.run(lowered, inputs_of(lowered, fed))["logits"]
    assert relative_error(plain, expected) <= 1e-5  # other forms of the same: rounding alone
    fast = ort.run(lowered, inputs_of(lowered, fed), optimize=True)["logits"].astype(np.float64)
    # ONNX Runtime may take int8 activations: a twelfth of a step of 1/127 of the largest of a block
    # squared per operand, some 1 % of the RMS per product over the 16 products of a path. A router
    # that ties may choose another expert, so tokens are compared by their share, not their largest.
    off = np.sqrt(np.mean((fast - expected) ** 2, -1) / np.mean(expected.astype(np.float64) ** 2))
    assert np.median(off) <= 16 * 0.01


def test_the_manager_checks_it() -> None:
    made = settled("float[batch,s,64] x", "a = MatMul (x, w) y = Relu (a)", w=matrix(64, 32))
    compiled = run(captured_of(made), [Quantize()], CTX)
    (step,) = compiled.steps
    assert step.changed and step.check.against == "simulated reference"
    assert step.check.error == 0.0
    assert step.statistics == {"weights": 1, "bytes_saved": 64 * 32 * 3 - 32 * 4}
    assert step.loss is not None


def test_the_same_bytes_again() -> None:
    first, again = (quantized(zoo_ir.captured("llama"))[0] for _ in range(2))
    assert show_model(first) == show_model(again)
    digests = [
        {
            name: weights.digest(v.const_value)
            for name, v in m.graph.initializers.items()
            if v.const_value
        }
        for m in (first, again)
    ]
    assert digests[0] == digests[1]


# -- what a wrong edit does -----------------------------------------------------------------------


def _swap_scales(after: ir.Model) -> None:
    value = _weight(after, "_scale")
    array = weights.array(value).copy()
    first, last = int(np.argmax(array)), int(np.argmin(array))
    array.flat[[first, last]] = array.flat[[last, first]]
    value.const_value = ir.tensor(array, name=value.name)


def _one_step_off(after: ir.Model) -> None:
    value = _weight(after, "_int8")
    array = weights.array(value).copy()
    array.flat[array.size // 2] += 1 if array.flat[array.size // 2] < 127 else -1
    value.const_value = ir.tensor(array, name=value.name)


def _other_axis(after: ir.Model) -> None:
    node = next(
        n
        for n in after.graph
        if n.op_type == "DequantizeLinear"
        and not n.attributes.get_int("block_size")
        and len(set(n.inputs[0].shape or ())) == 1  # type: ignore[union-attr]
    )
    node.attributes["axis"] = ir.AttrInt64("axis", 1 - node.attributes["axis"].as_int())


def _untie(after: ir.Model) -> None:
    """The lookup reads other integers than the product."""
    lookup = next(n for n in after.graph if n.op_type == "Gather" and "_int8" in str(n.inputs[0]))
    table = lookup.inputs[0]
    assert table is not None
    made = ir.Value(name="untied", type=table.type, shape=table.shape)
    made.const_value = ir.tensor(np.roll(weights.array(table), 1, 0), name="untied")
    after.graph.register_initializer(made)
    lookup.replace_input_with(0, made)


def _truncate(after: ir.Model) -> None:
    """Round towards zero."""
    value = _weight(after, "_int8")
    array = weights.array(value).astype(int)
    value.const_value = ir.tensor((array - np.sign(array)).astype(np.int8), name=value.name)


def _weight(after: ir.Model, suffix: str) -> ir.Value:
    """A projection in the second block."""
    name = next(n for n in after.graph.initializers if "layers.1" in n and n.endswith(suffix))
    return after.graph.initializers[name]


@pytest.mark.parametrize("break_it", [_swap_scales, _one_step_off, _other_axis, _untie, _truncate])
def test_a_wrong_edit_is_far_from_the_reference(break_it: Any) -> None:
    after, _, reference = quantized(zoo_ir.captured("qwen2"))
    break_it(after)
    worst = [max(errors(after, reference.model, fed).values()) for fed in zoo_ir.feeds("qwen2")]
    assert max(worst) > 2 * reference.tolerance


# -- memory ---------------------------------------------------------------------------------------


def stack_of_weights(folder: Path, count: int, width: int) -> ir.Model:
    """x w0 w1 ..., with the weights in a file that is mapped when they are read."""
    body = " ".join(f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(count))
    arrays = {f"w{i}": matrix(width, width, seed=i) for i in range(count)}
    made = model(
        f"float[b,{width}] x", "float y", f"h0 = Neg (x) {body} y = Relu (h{count})", **arrays
    )
    normal.normalize(made)
    ir.save(made, folder / "model.onnx", external_data="model.data")
    return ir.load(folder / "model.onnx")


def test_weights_are_recipes_and_one_is_computed_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "HELD_BYTES", 0)
    monkeypatch.setattr(candidates, "AT_ONCE", 1 << 14)
    monkeypatch.setattr(rounding, "AT_ONCE", 1 << 14)
    count, width = 6, 1024
    made = stack_of_weights(tmp_path, count, width)
    tracemalloc.start()
    chosen = ALL.choose(made, CTX)
    ALL.edit(made, chosen, CTX)
    in_edit = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    read = 0
    for value in made.graph.initializers.values():
        assert value.const_value is not None
        assert weights.is_recipe(value.const_value) == (value.dtype == ir.DataType.INT8)
        read += value.const_value.numpy().nbytes
    in_read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = width * width  # bytes of its integers; the float weights are mapped, not copied
    assert read >= count * one
    assert in_edit < one, "no weight was computed, nor copied"
    assert in_read < in_edit + 2 * one, "one at a time"


def test_the_first_weights_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "HELD_BYTES", 2 * 64 * 64)
    made = stack_of_weights(tmp_path, 4, 64)
    ALL.run(made, CTX)
    tensors = [v.const_value for n, v in made.graph.initializers.items() if n.endswith("_int8")]
    assert [weights.is_recipe(t) for t in tensors if t] == [False, False, True, True]
