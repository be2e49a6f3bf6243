"""Rotation is exact, a sliced model is its projected reference, and what cannot be sliced is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from netlathe.analysis.axes.algebra import Axis
from netlathe.analysis.cost import cost
from netlathe.diagnostics import OptionError, PassError
from netlathe.execute import compare, ort
from netlathe.execute.executor import Executor
from netlathe.ir import normal, verify
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.slice import Slice, bases, lay_out
from netlathe.passes.slice.narrow import sizes
from netlathe.passes.slice.statistics import Seen
from netlathe.pipeline import registry, run
from netlathe.pipeline.interfaces import Target
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from tests.analysis.residual import typed
from tests.passes.folding import in_float64
from tests.passes.slice.models import PRE_NORM_BERT, captured, data, feeds, folded, wide
from tests.pipeline.toy import captured_of

PRE_NORM = (
    "llama", "opt", "gpt2", "phi", "gemma", "falcon", "qwen2", "vit", "whisper", "t5", "mixtral",
    PRE_NORM_BERT,
)  # fmt: skip
QUICK = ("llama", "phi", "vit", "whisper", PRE_NORM_BERT)
SOME = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PRE_NORM]
FEW = [n if n in ("llama", "vit") else pytest.param(n, marks=pytest.mark.slow) for n in PRE_NORM]
# The bar for rotation alone, as a share of the output's RMS: float32 rounding of every weight and sum
# stays a tenth below it.
EXACT = 1e-4
EXACT_DOUBLE = 1e-10


def sliced(
    model: ir.Model, pass_: Slice, ctx: Context
) -> tuple[ir.Model, Sequence[Entry], ir.Model]:
    """An edited copy, the ledger, and the simulated reference."""
    entries = pass_.choose(model, ctx)
    after = model.clone()
    pass_.edit(after, entries, ctx)
    normal.normalize(after)
    assert verify.verify(after) == []
    return after, entries, pass_.simulate(model.clone(), entries).model


def furthest(after: ir.Model, against: ir.Model, name: str) -> float:
    """The largest relative error over outputs and feeds."""
    worst = 0.0
    for fed in feeds(name):
        got, wanted = ort.run(after, fed), ort.run(against, fed)
        worst = max(worst, *(compare.relative_error(got[k], wanted[k]) for k in wanted))
    return worst


# -- exact first --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_folding_and_rotating_keep_the_outputs(name: str, adapters: bool) -> None:
    pass_ = Slice(ratio=0, basis="hadamard", adapters=adapters)
    after, entries, _ = sliced(folded(name), pass_, Context())
    assert {entry.status for entry in entries} == {"applied"}
    assert furthest(after, captured(name), name) <= EXACT


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_in_float64_folding_and_rotating_are_exact_to_rounding(name: str, adapters: bool) -> None:
    model = in_float64(captured(name))
    after = model.clone()
    FoldNorms(untie=True).run(after, Context())
    normal.normalize(after)
    pass_, ctx = Slice(ratio=0, basis="hadamard", adapters=adapters), Context()
    # not verified: RotaryEmbedding takes no float64, but the executor computes it
    pass_.edit(after, pass_.choose(after, ctx), ctx)
    for fed in feeds(name):
        got, wanted = Executor(after).run(wide(fed)), Executor(model).run(wide(fed))
        for key, expected in wanted.items():
            assert expected.dtype == torch.float64
            assert compare.relative_error(got[key].numpy(), expected.numpy()) <= EXACT_DOUBLE


# -- sliced is simulated ------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("name", FEW)
def test_a_sliced_model_is_its_reference(name: str, ratio: float) -> None:
    model = folded(name)
    for adapters in (False, True):
        pass_ = Slice(ratio=ratio, adapters=adapters, round_to=2)
        try:
            after, entries, reference = sliced(model, pass_, data(name))
        except PassError as error:  # of models this small adapters may eat up what is saved
            assert adapters and error.diagnostics[0].code == "slice.net"
            continue
        # every weight is rounded anew and sums run in another basis: see passes/slice TOLERANCE
        assert furthest(after, reference, name) <= 1e-5
        assert entries[0].detail["parameters"]["after"] == cost(after).params


@pytest.mark.parametrize("basis", ["pca", "loss"])
@pytest.mark.parametrize("name", FEW)
def test_every_architecture_is_its_reference(name: str, basis: Any) -> None:
    after, _, reference = sliced(folded(name), Slice(ratio=0.25, basis=basis), data(name))
    assert furthest(after, reference, name) <= 1e-5
    assert cost(after).params < cost(reference).params


@pytest.mark.parametrize("name", FEW)
def test_a_refitted_model_is_its_reference(name: str) -> None:
    model, ctx = folded(name), data(name)
    after, entries, reference = sliced(model, Slice(ratio=0.5, refit=True), ctx)
    assert furthest(after, reference, name) <= 1e-5
    fitted = [norm for entry in entries for norm in entry.detail["fitted"]]
    left = [why for entry in entries for why in entry.detail["not_fitted"].values()]
    assert fitted and all("is what the model gives" in why for why in left)
    plain, _, _ = sliced(model, Slice(ratio=0.5), ctx)
    assert cost(plain).params == cost(after).params


def test_the_paths_of_a_gpu_edit_the_same() -> None:
    """The edit's products in torch, which a GPU runs in float64, against those in numpy."""
    from netlathe.passes.slice import narrow

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 20)).astype(np.float32)
    one, other = bases.hadamard(12, rng)[:, :8], bases.hadamard(20, rng)[:, :16]
    rows, columns = Axis(12), Axis(20)
    turns = [(0, rows, rows, one), (1, columns, columns, other)]
    made = narrow._on_device(weight, turns, "cpu")
    np.testing.assert_allclose(made, one.T @ weight @ other, rtol=1e-5, atol=1e-6)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, narrow._recipe(turns, ir.DataType.FLOAT, "cpu")(weight))


def test_the_reference_does_not_follow_a_wrong_edit() -> None:
    model = folded("llama")
    pass_, ctx = Slice(ratio=0.25), data("llama")
    entries = pass_.choose(model, ctx)
    other = [dataclasses.replace(e, arrays={"basis": e.arrays["basis"][:, ::-1]}) for e in entries]
    wrong = [dataclasses.replace(e, arrays={"basis": -np.eye(64)[:, :48]}) for e in entries]
    after = model.clone()
    pass_.edit(after, other, ctx)  # the same directions in another order: the same model
    reference = pass_.simulate(model.clone(), entries).model
    assert furthest(after, reference, "llama") <= 1e-5
    after = model.clone()
    pass_.edit(after, wrong, ctx)
    assert furthest(after, reference, "llama") > 0.1


def test_the_pipeline_checks_it() -> None:
    taken = captured_of(captured("vit"))
    ctx = Context(calibration=data("vit").calibration)
    compiled = run.run(taken, [FoldNorms(untie=True), Slice(ratio=0.25)], ctx)
    assert compiled.steps[1].check.against == "simulated reference"
    assert compiled.steps[1].cost_after.params < compiled.steps[0].cost_after.params
    assert registry.find_pass("slice") is Slice


# -- bases --------------------------------------------------------------------------------------------


def test_principal_axes_are_those_of_the_moment() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 16)) * np.linspace(3, 0.1, 16)
    basis = bases.principal(rows.T @ rows / 500)
    kept = np.square(rows @ basis).mean(0)
    assert np.all(np.diff(kept) <= 1e-9)
    np.testing.assert_allclose(basis.T @ basis, np.eye(16), atol=1e-12)
    assert np.array_equal(basis, bases.principal(rows.T @ rows / 500))


def test_axes_found_by_torch_are_those_of_numpy() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 12)) * np.linspace(3, 1, 12)
    moment = rows.T @ rows / 200
    expected, found = bases.principal(moment), bases._principal_on(moment, "cpu")
    # eigenvectors of eigenvalues that differ by a tenth, in float64
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_the_loss_weighs_directions() -> None:
    """Directions that carry little of the signal are kept where the loss asks for them."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12)) * np.linspace(2, 0.5, 12)
    slopes = rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12))
    moment, fisher = rows.T @ rows / 200, slopes.T @ slopes / 200

    def lost(basis: bases.Basis) -> float:
        removed = basis[:, 8:] @ basis[:, 8:].T
        return float(np.trace(removed @ moment @ removed @ fisher))

    found = bases.loss_weighted([moment], [fisher], 8)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=1e-12)
    assert lost(found) < 0.8 * lost(bases.principal(moment))


def test_gradients_do_not_see_padding() -> None:
    """What stands behind the text of a padded sample changes nothing."""
    from netlathe.passes.slice.statistics import fisher

    model = folded("llama")
    norms = lay_out(model, cut=False).segments[0].norms
    ids = np.random.default_rng(0).integers(3, 100, (2, 8))
    mask = np.ones_like(ids)
    mask[:, 5:] = 0
    other = np.where(mask == 0, 7, ids)
    found = [
        fisher(model, norms, Context(), [{"input_ids": i, "attention_mask": mask}])
        for i in (ids, other)
    ]
    for norm in norms:
        np.testing.assert_allclose(found[0][norm], found[1][norm], atol=1e-6)
        assert found[0][norm].any()


def test_levels_are_those_of_what_norms_read() -> None:
    from netlathe.passes.slice import statistics

    model, fed = folded("llama"), feeds("llama")[0]
    fed = {**fed, "attention_mask": np.ones_like(fed["attention_mask"])}
    norms = lay_out(model, cut=False).segments[0].norms
    seen = statistics.observe(model, norms, Context(calibration=[fed]), "a test")
    makers = {node.outputs[0].name: node for node in model.graph}
    read = [value.name or "" for norm in norms if (value := makers[norm].inputs[0])]
    found = Executor(model).run(fed, read)
    for norm, name in zip(norms, read, strict=True):
        squares = found[name].double().square().mean(-1)
        assert seen.levels[norm] == pytest.approx(float(squares.log().mean()), rel=1e-9)


@pytest.mark.parametrize("size", [1, 8, 12, 48, 7])
def test_hadamard_is_orthogonal_and_spreads(size: int) -> None:
    basis = bases.hadamard(size, np.random.default_rng(0))
    np.testing.assert_allclose(basis @ basis.T, np.eye(size), atol=1e-12)
    if size == 8:
        np.testing.assert_allclose(np.abs(basis), np.sqrt(1 / 8))


def test_later_bases_see_the_sliced_prefix() -> None:
    model, ctx = folded("llama"), data("llama")
    narrow = Slice(ratio=0.5, adapters=True).choose(model, ctx)
    wide = Slice(ratio=0, basis="pca", adapters=True).choose(model, ctx)
    first, last = narrow[0].arrays["basis"], narrow[-1].arrays["basis"]
    np.testing.assert_allclose(first, wide[0].arrays["basis"][:, :32])
    assert np.abs(last - wide[-1].arrays["basis"][:, :32]).max() > 0.01


# -- what is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True])
def test_a_budget_in_net_parameters_is_met(adapters: bool) -> None:
    model = folded("llama")
    after, _, _ = sliced(model, Slice(parameters=0.3, round_to=2, adapters=adapters), data("llama"))
    share = cost(after).params / cost(model).params
    assert 0.6 < share <= 0.7


@pytest.mark.parametrize("refit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cut_stream_is_its_reference(refit: bool) -> None:
    model, ctx = loud(folded("llama")), data("llama")
    pass_ = Slice(parameters=0.25, basis="loss", cut=True, refit=refit, round_to=4)
    after, entries, reference = sliced(model, pass_, ctx)
    assert furthest(after, reference, "llama") <= 1e-5
    assert cost(after).params <= 0.75 * cost(model).params
    quiet, main = entries  # before the loud block, and behind it
    assert quiet.detail["kept"] != main.detail["kept"]
    assert len(quiet.detail["adapters"]) == 1 and not main.detail["adapters"]
    assert entries[0].detail["parameters"]["after"] == cost(after).params


def loud(model: ir.Model) -> ir.Model:
    """The model with a first block that drowns its embedding, as trained models have it."""
    table = model.graph.initializers["model.embed_tokens.weight"]
    tensor = table.const_value
    assert tensor is not None
    table.const_value = ir.tensor(tensor.numpy() * np.float32(0.02), name=table.name)
    return model


@pytest.mark.slow
def test_a_cut_stream_can_be_sliced_again() -> None:
    model, ctx = loud(folded("llama")), data("llama")
    once, _, _ = sliced(model, Slice(parameters=0.25, basis="loss", cut=True, round_to=4), ctx)
    twice, _, reference = sliced(once, Slice(ratio=0.25, round_to=4), ctx)
    assert furthest(twice, reference, "llama") <= 1e-5
    assert cost(twice).params < cost(once).params


@pytest.mark.parametrize("best", [8, 24, 44, 60])
def test_of_all_widths_for_the_parameters_the_least_loss_is_found(best: int) -> None:
    """A planted loss with one minimum over the width of the first part."""
    from netlathe.passes.slice.widths import Widths

    model = folded("llama")
    widths = Widths(model, planted(model), 4)
    goal = 0.75 * cost(model).params
    tried = []

    def measure(variants: Sequence[Mapping[str, bases.Basis]]) -> list[float]:
        tried.append(len(variants))
        points = [segment.points[0] for segment in lay_out(model, cut=True).segments]
        kept = [[v[p].shape[1] if p in v else 64 for p in points] for v in variants]
        return [100.0 if len(set(k)) == 1 else abs(k[0] - best) + 1.0 for k in kept]

    plan = widths.plan(goal, measure)
    assert plan is not None and len(plan.cut) == 1 and plan.loss == 1.0
    first, *_, last = plan.kept.values()
    assert first == best and first % 4 == last % 4 == 0
    layout = lay_out(model, cut=plan.cut)
    named = {segment.points[0]: segment.stretch for segment in layout.segments}
    count = sizes(layout, {name: plan.kept[name] for name in named}, named)
    more = sizes(
        layout, {name: plan.kept[name] + 4 * (plan.kept[name] == last) for name in named}, named
    )
    assert count <= goal and (last == 64 or goal < more), "all that is allowed is used"
    assert sum(tried) < 16, "of 16 widths not all are tried"


def test_a_cut_that_loses_more_is_not_made() -> None:
    from netlathe.passes.slice.widths import Widths

    model = folded("llama")
    plan = Widths(model, planted(model), 4).plan(
        0.75 * cost(model).params,
        lambda variants: [float(len(set(map(shape_of, v.values())))) for v in variants],
    )
    assert plan is not None and not plan.cut and len(set(plan.kept.values())) == 1


def shape_of(array: bases.Basis) -> tuple[int, ...]:
    return array.shape


def planted(model: ir.Model) -> Seen:
    """Statistics of a stream that is quiet at first."""
    rng = np.random.default_rng(0)
    norms = [norm for segment in lay_out(model, cut=False).segments for norm in segment.norms]
    rows = {norm: rng.standard_normal((80, 64)) * np.linspace(2, 0.1, 64) for norm in norms}
    moments = {norm: r.T @ r / 80 for norm, r in rows.items()}
    levels = {norm: 0.0 if at < 2 else 6.0 for at, norm in enumerate(norms)}
    return Seen(moments, {norm: np.eye(64) for norm in norms}, levels, 80)


def test_the_ends_may_keep_all() -> None:
    model = folded("llama")
    entries = Slice(ratio=0.5, adapters=True, full="both").choose(model, data("llama"))
    assert [e.detail["kept"] for e in entries] == [64, 32, 32, 32, 64]


def test_the_target_says_what_widths_are_multiples_of() -> None:
    ctx = dataclasses.replace(data("llama"), target=Target("t", "onnx", "", width_multiple=32))
    (entry,) = Slice(ratio=0.25).choose(folded("llama"), ctx)
    assert entry.detail["kept"] == 32


def test_a_tied_head_stays_tied_under_one_basis() -> None:
    model = captured("llama")
    FoldNorms().run(model, Context())
    normal.normalize(model)
    tie = model.graph.initializers["model.embed_tokens.weight"]
    head = next(n for n in reversed(model.graph) if n.op_type == "MatMul")
    head_weight = head.inputs[1]
    assert head_weight is not None and head_weight.shape is not None
    graph = model.graph
    turn = ir.node("Transpose", [tie], {"perm": [1, 0]})
    turn.outputs[0].name, turn.outputs[0].type = "tied", head_weight.type
    turn.outputs[0].shape = head_weight.shape
    graph.insert_before(head, turn)
    head.replace_input_with(1, turn.outputs[0])
    normal.normalize(model)
    for adapters in (False, True):
        pass_ = Slice(ratio=0.5, adapters=adapters)
        after, entries, reference = sliced(model, pass_, data("llama"))
        assert furthest(after, reference, "llama") <= 1e-5
        assert len(entries) == (4 if adapters else 1)  # both ends turn together


# -- what cannot be done ------------------------------------------------------------------------------


def test_post_norm_is_refused_with_what_to_do_instead() -> None:
    entries = Slice(ratio=0.25).choose(captured("bert"), Context())
    assert {entry.status for entry in entries} == {"refused"}
    assert "post-norm" in entries[0].reason and "prune or drop" in entries[0].reason


def test_norms_that_were_not_folded_are_refused() -> None:
    (entry,) = Slice(ratio=0.25).choose(captured("gpt2"), Context())
    assert entry.status == "refused" and "fold_norms first" in entry.reason


def test_a_stream_whose_channels_are_not_last_is_refused() -> None:
    """CoAtNet adds images, and turns them around for every norm."""
    rng = np.random.default_rng(0)
    shapes = {"k": (16, 3, 1, 1), "wi": (16, 32), "ko": (16, 32, 1, 1), "wh": (16, 10)}
    drawn = {name: rng.normal(0, 0.3, shape).astype("f4") for name, shape in shapes.items()}
    block = """
        t{at} = Transpose<perm = [0, 2, 3, 1]>(s{at})  n{at} = RMSNormalization<axis = -1>(t{at}, ones)
        i{at} = MatMul(n{at}, wi)  u{at} = Transpose<perm = [0, 3, 1, 2]>(i{at})
        a{at} = Gelu(u{at})  o{at} = Conv(a{at}, ko)  s{next} = Add(s{at}, o{at})
    """
    blocks = [block.format(at=at, next=at + 1) for at in range(3)]
    end = "t3 = Transpose<perm = [0, 2, 3, 1]>(s3) n3 = RMSNormalization<axis = -1>(t3, ones)"
    model = typed(
        " ".join(["s0 = Conv(x, k)", *blocks, end, "y = MatMul(n3, wh)"]),
        "float[b,3,2,2] x",
        "float y",
        ones=np.ones(16, np.float32),
        **drawn,
    )
    ctx = Context(calibration=[{"x": rng.normal(size=(8, 3, 2, 2)).astype("f4")}])
    (entry,) = Slice(ratio=0.25).choose(model, ctx)
    assert entry.status == "refused" and "only those of a last dim are turned" in entry.reason


@pytest.mark.parametrize(
    "size",
    [
        "size = Shape<start = 1, end = 2>(s1)",
        "sizes = Shape(s1)  size = Gather(sizes, one)",
        "sizes = Shape(s1)  number = Gather(sizes, first)  size = Unsqueeze(number, zero)",
        "sizes = Shape(s1)  size = Slice(sizes, one, two, zero)",
    ],
)
def test_who_asks_for_a_size_of_the_stream_needs_no_adapter(size: str) -> None:
    """As a Conformer does that makes its positions anew in every block."""
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 16), "wi": (16, 32), "wo": (32, 16), "wh": (16, 10), "table": (64, 16)}
    drawn = {name: rng.normal(0, 0.3, shape).astype("f4") for name, shape in shapes.items()}
    model = typed(
        f"""
        s0 = MatMul(x, w)  n0 = RMSNormalization<axis = -1>(s0, ones)
        i0 = MatMul(n0, wi)  a0 = Gelu(i0)  o0 = MatMul(a0, wo)  s1 = Add(s0, o0)
        {size}  at = Slice(table, zero, size, zero)  s2 = Add(s1, at)
        n2 = RMSNormalization<axis = -1>(s2, ones)  y = MatMul(n2, wh)
        """,
        "float[b,t,8] x",
        "float y",
        ones=np.ones(16, np.float32),
        zero=np.array([0]),
        one=np.array([1]),
        two=np.array([2]),
        first=np.array(1),
        **drawn,
    )
    fed = {"x": rng.normal(size=(2, 40, 8)).astype("f4")}
    after, entries, against = sliced(model, Slice(ratio=0.25), Context(calibration=[fed]))
    assert [entry.status for entry in entries] == ["applied"]
    assert sum(node.op_type == "MatMul" for node in after.graph) == 4  # no more than there were
    got, wanted = ort.run(after, fed)["y"], ort.run(against, fed)["y"]
    assert compare.relative_error(got, wanted) < EXACT


FLAT = "flat = Reshape(n1, rows)  i1 = MatMul(flat, wi)  a1 = Gelu(i1)  h1 = Reshape(a1, sizes)"
SHIFTED = "i1 = MatMul(n1, wi)  a1 = Gelu(i1)  all = Expand(shift, sizes)  h1 = Add(a1, all)"


@pytest.mark.parametrize(("asked", "inner"), [("s1", FLAT), ("n1", FLAT), ("s1", SHIFTED)])
def test_who_lays_out_by_the_width_of_the_stream_keeps_it(asked: str, inner: str) -> None:
    """What is inside of a layer is as wide as the stream, and as it was: an adapter tells its width."""
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 32), "wp": (32, 32), "wi": (32, 32), "wo": (32, 32), "wh": (32, 10)}
    drawn = {name: rng.normal(0, 0.3, shape).astype("f4") for name, shape in shapes.items()}
    model = typed(
        f"""
        s0 = MatMul(x, w)  n0 = RMSNormalization<axis = -1>(s0, ones)
        o0 = MatMul(n0, wp)  s1 = Add(s0, o0)  n1 = RMSNormalization<axis = -1>(s1, ones)
        sizes = Shape({asked})  {inner}  o1 = MatMul(h1, wo)  s2 = Add(s1, o1)
        n2 = RMSNormalization<axis = -1>(s2, ones)  y = MatMul(n2, wh)
        """,
        "float[b,t,8] x",
        "float y",
        ones=np.ones(32, np.float32),
        shift=np.ones(32, np.float32),
        rows=np.array([-1, 32]),
        **drawn,
    )
    fed = {"x": rng.normal(size=(2, 40, 8)).astype("f4")}
    after, entries, against = sliced(model, Slice(ratio=0.25), Context(calibration=[fed]))
    assert [entry.status for entry in entries] == ["applied"]
    got, wanted = ort.run(after, fed)["y"], ort.run(against, fed)["y"]
    assert compare.relative_error(got, wanted) < EXACT


def test_a_model_without_a_residual_stream() -> None:
    model = typed("y = MatMul(x, wq)")
    (entry,) = Slice(ratio=0.25).choose(model, Context())
    assert (entry.status, entry.reason) == (
        "skipped", "the model has no residual stream that norms read"
    )  # fmt: skip
    assert not Slice(ratio=0.25).edit(model, [entry], Context()).changed


def test_too_few_tokens_are_said_and_damped() -> None:
    few = [{k: v[:1, :5] for k, v in feeds("llama")[0].items()}]
    (entry,) = Slice(ratio=0.25).choose(folded("llama"), Context(calibration=few))
    assert "only 5 tokens for 64 directions" in entry.reason and entry.detail["rows"] == 5
    assert np.isfinite(entry.arrays["basis"]).all()


def test_no_calibration_data() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Slice(ratio=0.25).choose(folded("llama"), Context())


def test_adapters_that_eat_the_ratio_are_refused_with_the_figure() -> None:
    with pytest.raises(PassError, match=r"would leave \d+ parameters of \d+") as caught:
        Slice(ratio=0.05, adapters=True, round_to=1).choose(folded("llama"), Context())
    assert caught.value.diagnostics[0].code == "slice.net"


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 0.1, "parameters": 0.1},
        {"full": "head"},
        {"cut": True},
        {"cut": True, "parameters": 0.1},
        {"cut": True, "parameters": 0.1, "basis": "loss", "adapters": True},
        {"basis": "hadamard"},
        {"basis": "hadamard", "ratio": 0.5},
    ],
)
def test_options_that_exclude_each_other(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Slice(**wrong)


def test_a_width_of_nothing_and_a_budget_out_of_reach() -> None:
    with pytest.raises(PassError, match="leaves no multiple of 64"):
        Slice(ratio=0.5, round_to=64).choose(folded("llama"), data("llama"))
    with pytest.raises(PassError, match="no width leaves"):
        Slice(parameters=0.99).choose(folded("llama"), data("llama"))


def test_laying_out_touches_nothing() -> None:
    from netlathe.ir.printing import show_model

    model = folded("llama")
    before = show_model(model)
    assert len(lay_out(model, cut=True).segments) == 5
    assert show_model(model) == before
