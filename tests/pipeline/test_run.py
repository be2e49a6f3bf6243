"""The manager: copies, checks, accounts, and leaves the caller's model alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import (
    Diagnostic,
    GateError,
    LowerError,
    OptionError,
    PassError,
    VerifyError,
)
from netlathe.execute import ort
from netlathe.ir import weights
from netlathe.pipeline import run as manager
from netlathe.pipeline.fingerprint import Guard, graph_digest, weights_digest
from netlathe.pipeline.interfaces import Artifact, Backend, Target
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    Context,
    Equivalent,
    Exact,
    Pass,
    Reference,
    Result,
    option,
    options,
)
from netlathe.pipeline.run import plan, run
from netlathe.pipeline.step import Step
from tests.ir.onnx_text import assert_same, matrix, model, ops
from tests.pipeline.toy import (
    HIDDEN,
    Balance,
    Cut,
    ReluToMax,
    captured_of,
    find,
    mlp,
    set_weight,
)


def test_passes_run_in_order_on_copies_and_are_accounted_for() -> None:
    captured = mlp()
    was = Guard.of(captured.model)
    compiled = run(captured, [ReluToMax(), Cut(count=2), Balance()], Context())
    assert Guard.of(captured.model) == was and compiled.dense is captured.model
    assert ops(compiled.model)["Max"] == 1
    assert weights.array(compiled.model.graph.initializers["up"]).shape == (6, HIDDEN - 2)
    exact, lossy, equivalent = compiled.steps
    assert [str(step.pass_) for step in compiled.steps] == ["relu_to_max", "cut", "balance"]
    assert exact.check.against == equivalent.check.against == "input model"
    assert lossy.check.against == "simulated reference"
    for step in compiled.steps:
        assert step.changed and step.check.error is not None and step.check.tolerance is not None
        assert step.check.error <= step.check.tolerance
        assert step.check.sizes == ("batch=2", "batch=4")
        assert step.seconds > 0 and step.check_seconds > 0 and step.peak_bytes > 1 << 20
    assert exact.check.error == 0.0
    assert exact.loss is None and equivalent.loss is None and lossy.loss is not None


def test_costs_follow_the_model() -> None:
    compiled = run(mlp(), [ReluToMax(), Cut(count=4)], Context())
    first, second = compiled.steps
    assert first.cost_before.params == first.cost_after.params == 6 * 8 + 8 + 8 * 6
    assert second.cost_before == first.cost_after
    assert second.cost_after.params == 6 * 4 + 4 + 4 * 6
    assert second.cost_after.macs == 2 * (6 * 4 + 4 * 6)  # at batch 2


def test_the_result_is_what_an_independent_edit_gives() -> None:
    captured = mlp()
    compiled = run(captured, [Cut(count=3)], Context())
    arrays = {n: weights.array(v) for n, v in captured.model.graph.initializers.items()}
    expected = model(
        "float[batch,6] x",
        "float y",
        "h = MatMul(x, up)  b = Add(h, bias)  r = Relu(b)  d = MatMul(r, down)  y = Add(d, x)",
        up=np.ascontiguousarray(arrays["up"][:, :5]),
        bias=np.ascontiguousarray(arrays["bias"][:5]),
        down=np.ascontiguousarray(arrays["down"][:5]),
    )
    assert_same(expected, compiled.model, sizes=({"batch": 3},))


def test_weights_stay_recipes() -> None:
    compiled = run(mlp(), [Balance(), Balance(factor=2.0)], Context())
    tensor = compiled.model.graph.initializers["up"].const_value
    assert tensor is not None and weights.is_recipe(tensor)
    captured = mlp()
    untouched = run(captured, [ReluToMax()], Context()).model.graph.initializers["up"]
    assert untouched.const_value is captured.model.graph.initializers["up"].const_value


def test_no_pass_gives_the_model_back() -> None:
    captured = mlp()
    compiled = run(captured, [], Context())
    assert compiled.steps == [] and compiled.model is captured.model


# -- the ledger -----------------------------------------------------------------------------------


def test_a_pass_without_a_match_says_so() -> None:
    captured = mlp()
    compiled = run(captured, [Cut(count=0)], Context())
    (step,) = compiled.steps
    assert not step.changed and compiled.model is captured.model
    assert [entry.status for entry in step.entries] == ["skipped"]
    assert "no candidate" in step.entries[0].reason
    assert str(step.check) == "not compared: nothing changed"


def test_strict_turns_a_skip_into_an_error() -> None:
    with pytest.raises(GateError, match=r"cut\(count=0\) skipped .*no candidate") as caught:
        run(mlp(), [Cut(count=0)], Context(), strict=True)
    assert caught.value.exit_code == 1
    assert run(mlp(), [Cut(count=1)], Context(), strict=True).steps[0].changed


def test_strict_plans_list_the_skips_of_all_passes() -> None:
    passes = [Cut(count=0), ReluToMax(), ReluToMax()]
    with pytest.raises(GateError) as caught:
        plan(mlp(), passes, Context(), strict=True)
    assert len(caught.value.diagnostics) == 2  # there is no Relu left for the third
    assert "relu_to_max" in caught.value.diagnostics[1].message


def picky(*entries: Entry) -> Pass:
    """A pass with this ledger, which scales a weight if it applied anything."""

    class Picky(Pass):
        name = "picky"
        exactness = Equivalent(10.0)

        def run(self, model: ir.Model, ctx: Context) -> Result:
            applied = any(entry.status == "applied" for entry in entries)
            if applied:
                set_weight(model, "bias", matrix(8, seed=9))
            return Result(applied, list(entries))

        def __str__(self) -> str:
            return self.name

    return Picky()


DONE = Entry("done", "applied", "")
LEFT = Entry("left", "skipped", "enough", left_out=True)
SKIPPED = Entry("skipped", "skipped", "not today")
REFUSED = Entry("refused", "refused", "impossible")


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ([DONE, LEFT, REFUSED], []),
        ([DONE, SKIPPED, LEFT], ["skipped"]),
        ([LEFT, REFUSED], ["left", "refused"]),  # it did nothing at all
        ([REFUSED], ["refused"]),
        ([DONE, *[SKIPPED] * 50], ["skipped"] * 20),
    ],
)
def test_what_strictness_objects_to(entries: list[Entry], named: list[str]) -> None:
    if not named:
        run(mlp(), [picky(*entries)], Context(), strict=True)
        return
    with pytest.raises(GateError) as caught:
        run(mlp(), [picky(*entries)], Context(), strict=True)
    diagnostics = caught.value.diagnostics
    assert [d.message.split()[2].rstrip(":") for d in diagnostics[:20]] == named
    if len(entries) > 20:
        assert len(diagnostics) == 21 and "30 more" in diagnostics[-1].message


def test_plan_gives_the_ledger_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan runs no model")

    monkeypatch.setattr(ort, "Session", refuse)
    captured = mlp()
    was = Guard.of(captured.model)
    steps = plan(captured, [Cut(count=2), Balance()], Context())
    assert Guard.of(captured.model) == was
    assert steps[0].entries[0].detail["keep"] == [0, 1, 2, 3, 4, 5]
    assert steps[1].cost_before.params == steps[0].cost_after.params < steps[0].cost_before.params


# -- verification is paid for once ----------------------------------------------------------------


def test_every_model_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ir.Model] = []
    session = ort.Session

    def count(model: ir.Model, *args: Any, **kwargs: Any) -> ort.Session:
        made.append(model)
        return session(model, *args, **kwargs)

    monkeypatch.setattr(ort, "Session", count)
    run(mlp(), [ReluToMax(), Balance(), Cut(), Balance()], Context())
    assert len(made) == 6  # the captured model, one a pass, and the simulated reference
    made.clear()
    feeds = [{"x": matrix(8, 6, seed=seed)} for seed in range(4)]
    run(mlp(), [ReluToMax(), Balance(), Cut(), Balance()], Context(calibration=feeds))
    assert len(made) == 6  # losses are measured in the same sessions
    made.clear()
    run(mlp(), [ReluToMax(), Balance(), Cut(), Balance()], Context(), verify=False)
    assert not made


def test_without_verification_structure_is_still_checked() -> None:
    @options
    class Break(Pass):
        """Makes a weight too narrow."""

        name = "break_"
        exactness = Exact()

        def run(self, model: ir.Model, ctx: Context) -> Result:
            Cut(count=1).edit(model, Cut(count=1).choose(model, ctx), ctx)
            value = model.graph.initializers["bias"]
            value.const_value = ir.tensor(matrix(5))
            return Result(True, [Entry("bias", "applied", "cut")])

    with pytest.raises(GateError, match=r"width|broadcast"):
        run(mlp(), [Break()], Context(), verify=False)
    compiled = run(mlp(), [Cut()], Context(), verify=False)
    assert compiled.steps[0].check.reason == "verification is off"
    assert compiled.steps[0].loss is None


# -- loss -----------------------------------------------------------------------------------------


def test_losses_add_up_against_the_captured_model() -> None:
    compiled = run(mlp(), [Cut(count=1), ReluToMax(), Cut(count=3)], Context())
    first, _, second = compiled.steps
    assert first.loss is not None and first.loss == first.total_loss
    assert second.loss is not None and second.total_loss is not None
    assert second.total_loss.relative_rms > second.loss.relative_rms > 0
    assert second.loss.data == "samples" and second.loss.samples == 2 + 4


def test_loss_is_measured_on_calibration_data_where_given() -> None:
    feeds = [{"x": matrix(3, 6, seed=seed)} for seed in range(20)]
    compiled = run(mlp(), [Cut(count=2)], Context(calibration=feeds))
    loss = compiled.steps[0].loss
    assert loss is not None and loss.data == "calibration" and loss.samples == 9
    spread = [feeds[i * 20 // 3] for i in range(3)]
    before = np.concatenate([ort.run(compiled.dense, f)["y"] for f in spread]).astype(np.float64)
    after = np.concatenate([ort.run(compiled.model, f)["y"] for f in spread]).astype(np.float64)
    cosines = (
        (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    )
    assert loss.cosine == pytest.approx(cosines.mean())
    assert loss.relative_rms == pytest.approx(
        np.linalg.norm(after - before) / np.linalg.norm(before)
    )
    assert loss.kl is None and loss.top1 is None  # y is an Add of the input: no logits


def test_a_metric_of_the_users_own() -> None:
    calls = 0

    def metric(runner: Any) -> float:
        nonlocal calls
        calls += 1
        return float(np.abs(runner({"x": np.ones((2, 6), np.float32)})["y"]).sum())

    compiled = run(mlp(), [Cut(count=1), Cut(count=2)], Context(), metric=metric)
    first, second = (step.loss for step in compiled.steps)
    total = compiled.steps[1].total_loss
    assert first is not None and second is not None and total is not None
    assert first.metric_after == second.metric_before != second.metric_after
    assert total.metric_before == first.metric_before and calls == 3


# -- who watches ----------------------------------------------------------------------------------


class Diary:
    """An observer and a progress that write everything down."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def started(self, pass_: Pass) -> None:
        self.lines.append(f"started {pass_}")

    def finished(self, step: Step) -> None:
        self.lines.append(f"finished {step.pass_} {step.changed}")

    def track(
        self, items: Iterable[Any], description: str, total: int | None = None
    ) -> Iterator[Any]:
        self.lines.append(description)
        yield from items


def test_observer_and_progress_are_told() -> None:
    diary = Diary()
    run(mlp(), [ReluToMax(), Cut()], Context(progress=diary), observer=diary)
    assert diary.lines == [
        "started relu_to_max",
        "finished relu_to_max True",
        "started cut",
        "measuring the loss",
        "finished cut True",
    ]


def test_ctrl_c_passes_through_and_nothing_is_half_done() -> None:
    class Interrupt(Diary):
        def started(self, pass_: Pass) -> None:
            if pass_.name == "cut":
                raise KeyboardInterrupt

    captured = mlp()
    was = Guard.of(captured.model)
    with pytest.raises(KeyboardInterrupt):
        run(captured, [ReluToMax(), Cut()], Context(), observer=Interrupt())
    assert Guard.of(captured.model) == was


def test_same_inputs_same_result_and_no_global_randomness() -> None:
    np.random.seed(7)
    random.seed(7)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    digests = set()
    for _ in range(2):
        compiled = run(mlp(), [ReluToMax(), Cut(), Balance()], Context(seed=3))
        digests.add((graph_digest(compiled.model), weights_digest(compiled.model)))
    assert len(digests) == 1
    assert random.getstate() == python_state
    for a, b in zip(np.random.get_state(), numpy_state, strict=True):
        assert np.array_equal(a, b)


# -- inside other pipelines -----------------------------------------------------------------------


def test_passes_are_onnx_ir_passes() -> None:
    captured = mlp()
    bound = Cut(count=2).bind(Context())
    result = ir.passes.Sequential(ReluToMax(), bound)(captured.model)
    assert result.modified and result.model is captured.model
    assert ops(captured.model)["Max"] == 1
    assert bound.result is not None and bound.result.entries[0].status == "applied"
    compiled = run(mlp(), [ReluToMax(), Cut(count=2)], Context())
    assert_same(compiled.model, captured.model, sizes=({"batch": 3},))


def test_options_of_a_python_pass_are_checked_too() -> None:
    with pytest.raises(OptionError, match="cut has no option 'cuont'"):
        Cut(cuont=1)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="given by name"):
        Cut(1)  # type: ignore[misc]


def test_peak_memory_is_unknown_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager.sys, "platform", "win32")
    assert manager._peak_bytes() == 0


def test_a_pass_that_needs_data_says_so() -> None:
    @options
    class Hungry(Pass):
        """Needs calibration data."""

        name = "hungry"
        exactness = Exact()

        quietly: bool = option(default=False, help="say nothing beforehand")

        def needs_data(self) -> str:
            return "" if self.quietly else "lunch=True"

        def run(self, model: ir.Model, ctx: Context) -> Result:
            ctx.collect(model, [], needed_by=self.name)
            return Result(False)

    class Watch:
        def started(self, pass_: Pass) -> None:
            raise AssertionError(f"{pass_} ran")

        def finished(self, step: Step) -> None:
            raise AssertionError(f"{step.pass_} ran")

    passes = [ReluToMax(), Hungry(), Hungry()]
    with pytest.raises(OptionError, match="hungry needs calibration data for lunch=True") as early:
        run(mlp(), passes, Context(), observer=Watch())
    assert len(early.value.diagnostics) == 2
    with pytest.raises(PassError, match=r"hungry.* needs calibration data") as late:
        run(mlp(), [Hungry(quietly=True)], Context())
    assert "in the pass hungry" in late.value.__notes__[0]


def test_models_without_dynamic_dims_run_twice() -> None:
    captured = captured_of(model("float[2,3] x", "float y", "y = Relu(x)"))
    compiled = run(captured, [ReluToMax()], Context())
    assert compiled.steps[0].check.sizes == ("fixed shapes", "fixed shapes")


def test_a_model_that_the_judge_cannot_run() -> None:
    """An operator that ONNX Runtime does not know: passes run, unverified, if that is asked for."""
    captured = mlp()
    find(captured.model, "d").domain = "vendor"
    captured.model.opset_imports["vendor"] = 1
    with pytest.raises(VerifyError, match="no pass can be verified") as caught:
        run(captured, [ReluToMax()], Context())
    assert "vendor" in str(caught.value) and "--no-verify" in str(caught.value)
    compiled = run(captured, [ReluToMax()], Context(), verify=False)
    assert compiled.steps[0].changed


def test_calibration_data_follows_an_input_that_goes() -> None:
    class DropInput(Cut):
        """Reads x where it read z."""

        name = "drop_input"

        def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
            x, z = model.graph.inputs
            find(model, "y").replace_input_with(1, x)
            model.graph.inputs.remove(z)
            return Result(True, list(chosen), {"z": None})

        def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
            return [Entry("z", "applied", "gone")]

        def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
            find(before, "y").replace_input_with(1, before.graph.inputs[0])
            return Reference(before, 0.0)

    class Inputs(ReluToMax):
        """Notes what data it is given."""

        def run(self, model: ir.Model, ctx: Context) -> Result:
            seen.append(sorted(ctx.calibration[0]))
            return super().run(model, ctx)

    seen: list[list[str]] = []
    captured = captured_of(
        model("float[b,3] x, float[b,3] z", "float y", "r = Relu(x)  y = Add(r, z)")
    )
    feeds = [{"x": matrix(2, 3), "z": matrix(2, 3, seed=1)}]
    compiled = run(captured, [DropInput(), Inputs()], Context(calibration=feeds))
    assert seen == [["x"]] and compiled.steps[0].loss is not None
    assert [v.name for v in compiled.model.graph.inputs] == ["x"]


# -- what a target lacks ---------------------------------------------------------------------------


class NoRelu(Backend):
    """Has no Relu."""

    name = "no_relu"
    gaps_last = True

    @classmethod
    def targets(cls) -> Sequence[Target]:
        return [Target("no_relu", "no_relu", "")]

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        return [Diagnostic("no.relu", str(n.name)) for n in model.graph if n.op_type == "Relu"]

    def compile(self, model: ir.Model, target: Target) -> Artifact:
        raise LowerError(self.unsupported(model, target))


class FillsLater(NoRelu):
    """Its gaps may be filled by passes that keep operators, as by quantization."""

    gaps_last = False


@options
class KeepingCut(Cut):
    """Takes no operator away."""

    name = "keeping_cut"
    keeps_operators = True


@pytest.mark.parametrize(
    "passes, backend, ran",
    [
        ([KeepingCut(), KeepingCut()], NoRelu(), 0),
        ([Balance(), KeepingCut()], NoRelu(), 1),  # Balance might have
        ([ReluToMax(), KeepingCut()], NoRelu(), None),  # and this one does
        ([KeepingCut(), ReluToMax()], NoRelu(), None),
        ([KeepingCut()], FillsLater(), None),
    ],
    ids=["at once", "before the first that keeps", "filled before", "filled last", "filled later"],
)
def test_gaps_end_a_run_as_soon_as_no_pass_can_fill_them(
    passes: list[Pass], backend: Backend, ran: int | None
) -> None:
    started: list[Pass] = []

    class Watch:
        def started(self, pass_: Pass) -> None:
            started.append(pass_)

        def finished(self, step: Step) -> None: ...

    def go() -> None:
        ctx = Context(target=backend.targets()[0])
        run(mlp(), passes, ctx, observer=Watch(), backend=backend)

    if ran is None:
        go()
        assert started == passes
    else:
        with pytest.raises(LowerError) as caught:
            go()
        assert [d.code for d in caught.value.diagnostics] == ["no.relu"]
        assert started == passes[:ran]
