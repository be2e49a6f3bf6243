"""What outputs are held against, at which sizes, and how far they may be off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import VerifyError
from netlathe.execute import ort, samples
from netlathe.ir import edit, weights
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Equivalent,
    Exact,
    Feeds,
    Lossy,
    Pass,
    Reference,
    Result,
)
from netlathe.pipeline.run import run
from netlathe.pipeline.verification import (
    Bench,
    _disturbed,
    bounds,
    computed_alike,
    moved_by_rounding,
    shared_names,
    tolerance,
)
from tests.ir.onnx_text import matrix, model
from tests.pipeline.toy import captured_of, did, find, mlp, set_weight


def reorder(model: ir.Model) -> None:
    """(x + a) + b as x + (a + b): the same sum, rounded at other places."""
    inner, outer = find(model, "s"), find(model, "t")
    x, a = inner.inputs
    b = outer.inputs[1]
    both = edit.node("Add", [a, b], name="both")
    model.graph.insert_before(outer, both)
    outer.replace_input_with(0, x)
    outer.replace_input_with(1, both.outputs[0])


class Reorder(Pass):
    """Adds in another order."""

    name = "reorder"
    exactness = Exact()

    def run(self, model: ir.Model, ctx: Context) -> Result:
        reorder(model)
        edit.remove_dead(model.graph)
        return Result(True, did("t"), {"s": None})

    def __str__(self) -> str:
        return self.name


# -- tolerances -----------------------------------------------------------------------------------


def test_tolerances_by_exactness_and_number_format() -> None:
    single = mlp().model
    assert tolerance(Exact(), single) == pytest.approx(1e-5, rel=0.01)
    assert tolerance(Equivalent(3e-4), single) == 3e-4
    for kind, ulp in ((10, 2.0**-10), (16, 2.0**-7)):  # float16, bfloat16
        half = captured_of(
            model(
                "float[b,4] x",
                "float y",
                f"h = Cast<to = {kind}>(x)  e = Exp(h)  y = Cast<to = 1>(e)",
            )
        ).model
        assert tolerance(Exact(), single, half) == 16 * ulp
        assert tolerance(Equivalent(0.5), half) == 0.5


def test_weights_stored_in_half_precision_do_not_loosen_the_bound() -> None:
    made = model("float[b,4] x", "float y", "y = Mul(x, w)", w=matrix(4))
    cast = model(
        "float[b,4] x",
        "float y",
        "v = Cast<to = 1>(w)  y = Mul(x, v)",
        w=matrix(4).astype(np.float16),
    )
    assert tolerance(Exact(), made, cast) < 1.1e-5


def test_an_ill_conditioned_output_may_move_as_far_as_single_roundings_move_it() -> None:
    """tan near its pole: 1e-7 in its argument is more than the bound in the result."""
    captured = captured_of(
        model(
            "float[b,64] x",
            "float y",
            "h = Mul(x, tiny)  s = Add(h, a)  t = Add(s, c)  y = Tan(t)",
            tiny=1e-4,
            a=matrix(64) * 1e-4,
            c=1.5705,
        )
    )
    compiled = run(captured, [Reorder()], Context())
    check = compiled.steps[0].check
    assert check.error is not None and check.tolerance is not None
    assert 1e-5 < check.error <= check.tolerance
    assert "one rounding error a value moves y by" in check.reason and check.reason in str(check)


def test_a_wrong_rewrite_of_an_ill_conditioned_model_is_still_wrong() -> None:
    class Wrong(Reorder):
        def run(self, model: ir.Model, ctx: Context) -> Result:
            result = super().run(model, ctx)
            value = model.graph.initializers["c"]
            value.const_value = ir.tensor(np.array(1.5706, np.float32))
            return result

    captured = captured_of(
        model(
            "float[b,64] x",
            "float y",
            "h = Mul(x, tiny)  s = Add(h, a)  t = Add(s, c)  y = Tan(t)",
            tiny=1e-4,
            a=matrix(64) * 1e-4,
            c=1.5705,
        )
    )
    with pytest.raises(VerifyError, match=r"verify\.differs"):
        run(captured, [Wrong()], Context())


def indexed() -> Captured:
    """A float becomes an index, from which one ulp less takes another row; beside it a product."""
    return captured_of(
        model(
            "float[b,8] x",
            "float y",
            "n = Mul(x, zero)  o = Add(n, four)  l = Log(o)  q = Div(l, log_two)  f = Floor(q)"
            "  i = Cast<to = 7>(f)  r = Gather(table, i)  s = ReduceSum(r, last)"
            "  h = MatMul(x, w)  y = Add(h, s)",
            zero=0.0,
            four=4.0,
            log_two=np.log(np.float32(2.0)),
            table=100 * matrix(8, 8),
            last=[1],
            w=matrix(8, 8, seed=1),
        )
    )


def test_what_both_models_compute_alike_is_not_disturbed() -> None:
    """Else an index that flips would excuse any error."""

    class Wrong(Pass):
        name = "wrong"
        exactness = Exact()

        def run(self, model: ir.Model, ctx: Context) -> Result:
            set_weight(model, "w", weights.array(model.graph.initializers["w"]) * np.float32(1.01))
            return Result(True, did("h"))

        def __str__(self) -> str:
            return self.name

    captured = indexed()
    made = captured.model
    after = made.clone()
    Wrong().run(after, Context())
    alike = computed_alike(made, after)
    assert alike >= {"o", "l", "q", "f", "i", "r", "s"} and alike.isdisjoint({"h", "y"})
    feeds = captured.sample({}, 0)
    outputs = ort.run(made, feeds)
    assert moved_by_rounding(made, outputs, feeds)["y"] > 0.1
    assert moved_by_rounding(made, outputs, feeds, alike)["y"] < 1e-6
    with pytest.raises(VerifyError, match=r"verify\.differs"):
        run(captured, [Wrong()], Context())


@pytest.mark.parametrize(
    ("last", "allowed"), [("Sigmoid", 2**-22 / 1e-8), ("Relu", 1e-5), ("Tanh", 1e-5)]
)
def test_a_sigmoid_that_ends_a_model_has_the_digits_of_one(last: str, allowed: float) -> None:
    """Detectors that see nothing say 1e-8 everywhere, and two kernels differ by 1e-7 there."""
    made = model("float[b,8] x", "float[b,8] y", f"s = {last}(x) y = Reshape(s, n)", n=[-1, 8])
    feeds = {"x": np.full((2, 8), -20, np.float32)}
    expected = {"y": np.full((2, 8), 1e-8, np.float32)}
    found = bounds(made, {"y": 10.0}, expected, feeds, 1e-5, slack=0.0)
    assert found["y"] == pytest.approx(allowed)


class Nudge(ChoosingPass):
    """Moves what a Sigmoid reads, or hides the Sigmoid."""

    name = "nudge"
    exactness = Lossy()

    def __init__(self, far: float, hide: bool = False) -> None:
        self.far, self.hide = far, hide

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        return did("h")

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        set_weight(model, "far", np.array(self.far, np.float32))
        if self.hide:
            find(model, "s").op_type = "Exp"
        return Result(True, list(chosen))

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        return Reference(before, 1e-4)

    def __str__(self) -> str:
        return self.name


def detector(last: str) -> Captured:
    """A voice detector that hears nothing gives the mean of probabilities near 0."""
    body = f"t = Tanh(x)  h = Add(t, far)  s = Sigmoid(h)  y = {last}(s, axes)"
    return captured_of(model("float[b,8] x", "float y", body, far=-15.0, axes=[1]))


def test_a_pass_may_move_a_mean_of_sigmoids_by_their_last_bits() -> None:
    check = run(detector("ReduceMean"), [Nudge(-15.001)], Context()).steps[0].check
    assert check.error is not None and check.error > 1e-3
    assert "which a Sigmoid rounds to" in check.reason and "told apart" not in check.reason
    with pytest.raises(VerifyError, match=r"verify\.differs"):
        run(detector("ReduceSum"), [Nudge(-15.001)], Context())


def test_what_the_sigmoid_reads_may_not_move() -> None:
    """3.1e-7 becomes 2.8e-7, and less than two last bits of 1 are between them."""
    with pytest.raises(VerifyError, match=r"verify\.differs"):
        run(detector("ReduceMean"), [Nudge(-15.1)], Context())


def test_it_is_said_where_what_the_sigmoid_reads_cannot_be_compared() -> None:
    check = run(detector("ReduceMean"), [Nudge(-15.1, hide=True)], Context()).steps[0].check
    assert "y was not told apart" in check.reason


def test_a_sigmoid_of_nothing_but_zeros_has_no_digits_to_be_off_by() -> None:
    made = model("float[b,8] x", "float[b,8] y", "y = Sigmoid(x)")
    feeds = {"x": np.full((2, 8), -1000, np.float32)}
    expected = {"y": np.zeros((2, 8), np.float32)}
    assert bounds(made, {"y": float("inf")}, expected, feeds, 1e-5, slack=8.0)["y"] == 1e-5


def test_values_are_computed_alike_whatever_their_names() -> None:
    before = mlp().model
    after = before.clone()
    find(after, "h").outputs[0].name = "hidden"
    after.graph.initializers["up"].name = "renamed"
    assert computed_alike(before, after) == {"h", "b", "r", "d", "y"}
    find(after, "r").attributes["extra"] = ir.AttrInt64("extra", 1)
    assert computed_alike(before, after) == {"h", "b"}


@pytest.mark.parametrize("reordered", [False, True])
def test_conditioning_excuses_only_references_that_add_in_another_order(reordered: bool) -> None:
    class Sums(ChoosingPass):
        name = "sums"
        exactness = Lossy()

        def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
            return did("t")

        def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
            return dataclasses.replace(Reorder().run(model, ctx), entries=list(chosen))

        def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
            return Reference(before, 1e-7, reordered)

        def __str__(self) -> str:
            return self.name

    captured = captured_of(
        model(
            "float[b,64] x",
            "float y",
            "h = Mul(x, tiny)  s = Add(h, a)  t = Add(s, c)  y = Tan(t)",
            tiny=1e-4,
            a=matrix(64) * 1e-4,
            c=1.5705,
        )
    )
    if reordered:
        check = run(captured, [Sums()], Context()).steps[0].check
        assert check.error is not None and check.error > 1e-7
    else:
        with pytest.raises(VerifyError, match=r"verify\.differs"):
            run(captured, [Sums()], Context())


# -- sizes ----------------------------------------------------------------------------------------


def bench_with(made: ir.Model, dynamic: Mapping[str, int], seen: list[Any]) -> Bench:
    captured = captured_of(made)

    def sample(sizes: Mapping[str, int], seed: int) -> Feeds:
        seen.append((dict(sizes), seed))
        return samples.synthesize(made, sizes, seed)

    return Bench(dataclasses.replace(captured, dynamic=dynamic, sample=sample))


def test_two_sizes_with_more_than_one_row() -> None:
    seen: list[Any] = []
    bench = bench_with(
        model("float[batch,s,3] x", "float y", "y = Relu(x)"), {"batch": 1, "s": 7}, seen
    )
    assert bench.sizes == ("batch=2, s=7", "batch=4, s=11")
    assert [seed for _, seed in seen] == [0, 1]


def test_other_sizes_where_a_model_does_not_take_these() -> None:
    """A table of 7 positions: only a shorter sequence fits."""
    made = model(
        "float[batch,s] x",
        "float y",
        "shape = Shape<start = 1>(x)  n = Squeeze(shape)  r = Range(zero, n, one)"
        "  p = Gather(table, r)  y = Add(x, p)",
        table=matrix(7),
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
    )
    seen: list[Any] = []
    assert bench_with(made, {"batch": 2, "s": 7}, seen).sizes == ("batch=2, s=7", "batch=3, s=6")
    assert len(seen) == 4  # 11 and 14 were tried


def test_a_model_that_cannot_run_is_an_error() -> None:
    made = model("float[b,3] x", "float y", "y = Relu(x)")
    captured = captured_of(made)
    made.graph.node(0).op_type = "Nonsense"
    with pytest.raises(ort.RuntimeFailure):
        Bench(captured)


# -- names ----------------------------------------------------------------------------------------


def test_shared_names_follow_renames_and_skip_other_shapes() -> None:
    before = mlp().model
    after = before.clone()
    find(after, "h").outputs[0].name = "hidden"
    find(after, "b").outputs[0].shape = ir.Shape(["batch", 5])
    names = shared_names(after, before, {"h": "hidden", "r": None})
    assert names == {"hidden": "h", "d": "d", "y": "y"}


@pytest.mark.parametrize(("kind", "ulp"), [(1, 2.0**-23), (10, 2.0**-10), (16, 2.0**-7)])
def test_disturbed_models_move_by_about_an_ulp_a_value(kind: int, ulp: float) -> None:
    made = captured_of(
        model(
            "float[b,64] x",
            "float y",
            f"h = Cast<to = {kind}>(x)  e = Abs(h)  s = Sqrt(e)  r = Reshape(s, same)"
            "  t = Abs(r)  y = Cast<to = 1>(t)",
            same=[0, 0],
        )
    ).model
    disturbed = _disturbed(made)
    # One behind every value that rounds and is read: not behind moves, nor the last in float32.
    assert sum(node.op_type == "Mul" for node in disturbed.graph) == (2 if kind == 1 else 3)
    feeds = {"x": matrix(3, 64)}
    before, after = ort.run(made, feeds)["y"], ort.run(disturbed, feeds)["y"]
    moved = np.abs(after / before - 1).max()
    assert ulp / 2 < moved < 5 * ulp
