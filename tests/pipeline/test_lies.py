"""Passes that do something else than they say: each is caught, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.diagnostics import NetLatheError, OptionError, PassError, VerifyError
from netlathe.ir import edit, weights
from netlathe.pipeline.fingerprint import Guard
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Equivalent,
    Exact,
    Exactness,
    Feeds,
    Lossy,
    Pass,
    Reference,
    Result,
)
from netlathe.pipeline.run import run
from tests.pipeline.toy import Cut, ReluToMax, did, find, mlp, set_weight

Edit = Callable[[ir.Model], Result | None]


def liar(edit_: Edit, exactness: Exactness | None = None) -> Pass:
    """A pass called ``liar`` that runs ``edit_`` and says it is exact."""

    class Liar(Pass):
        name = "liar"

        def run(self, model: ir.Model, ctx: Context) -> Result:
            return edit_(model) or Result(True, did("mlp"))

        def __str__(self) -> str:
            return self.name

    Liar.exactness = exactness or Exact()
    return Liar()


def caught(
    pass_: Pass, error: type[NetLatheError] = VerifyError, calibration: Sequence[Feeds] = ()
) -> str:
    """Run it between two honest passes; what the error says, with the model unharmed."""
    captured = mlp()
    was = Guard.of(captured.model)
    with pytest.raises(error) as raised:
        run(captured, [ReluToMax(), pass_, ReluToMax()], Context(calibration))
    assert Guard.of(captured.model) == was
    text = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert pass_.name in text
    return text


# -- exact and equivalent passes ------------------------------------------------------------------


def scale_bias(model: ir.Model) -> None:
    set_weight(model, "bias", weights.array(model.graph.initializers["bias"]) * np.float32(1.01))


def test_an_exact_pass_that_changes_outputs() -> None:
    text = caught(liar(scale_bias))
    assert "verify.differs" in text and "output 'y'" in text and "batch=2" in text
    assert "b = Add(h: f32[batch,8], bias: f32[8])" in text  # the node, though `y` came out wrong
    assert "in  mlp" in text and "the first value that differs: b, by" in text


def test_an_equivalent_pass_is_held_to_the_bound_it_states() -> None:
    assert "may be by 0.001" in caught(liar(scale_bias, Equivalent(1e-3)))
    captured = mlp()
    run(captured, [liar(scale_bias, Equivalent(0.1))], Context())


def test_a_difference_behind_a_renamed_value_is_found_under_its_new_name() -> None:
    def rename(model: ir.Model) -> Result:
        scale_bias(model)
        find(model, "b").outputs[0].name = "hidden"
        return Result(True, did("mlp"), {"b": "hidden"})

    assert "first value that differs: hidden, b before the pass" in caught(liar(rename))


def test_values_that_differ_on_purpose_are_not_blamed() -> None:
    """Scaled up and down again, and the real fault is behind that."""

    def scaled(model: ir.Model) -> None:
        for name, factor in (("up", 2), ("bias", 2), ("down", 0.5)):
            array = weights.array(model.graph.initializers[name])
            set_weight(model, name, array * np.float32(factor))
        y = find(model, "y")
        twice = edit.node("Add", [y.inputs[0], y.inputs[0]], name="twice")
        model.graph.insert_before(y, twice)
        y.replace_input_with(0, twice.outputs[0])

    text = caught(liar(scaled))
    assert "y = Add(" in text and "first value that differs: y" in text


def test_a_nan_producer() -> None:
    def root(model: ir.Model) -> None:
        y = find(model, "y")
        sqrt = edit.node("Sqrt", [y.inputs[0]], name="root")
        model.graph.insert_before(y, sqrt)
        y.replace_input_with(0, sqrt.outputs[0])

    assert "off by inf" in caught(liar(root))


# -- structure ------------------------------------------------------------------------------------


def test_a_pass_that_breaks_types() -> None:
    def narrow(model: ir.Model) -> None:
        set_weight(model, "down", weights.array(model.graph.initializers["down"])[:5])

    text = caught(liar(narrow))
    assert "verify.width" in text and "after the pass liar" in text


def test_a_pass_that_leaves_a_dangling_value() -> None:
    def cut(model: ir.Model) -> None:
        node = find(model, "r")
        node.replace_input_with(0, ir.Value(name="nowhere"))

    assert "verify.dangling" in caught(liar(cut))


@pytest.mark.parametrize("order", ["drop", "swap"])
def test_a_pass_that_drops_or_reorders_outputs(order: str) -> None:
    def drop(model: ir.Model) -> Result:
        outputs = model.graph.outputs
        if order == "drop":
            outputs.pop()
        else:
            outputs.reverse()
        return Result(True, did("mlp"), {"r": None})

    captured = mlp()
    captured.model.graph.outputs.append(find(captured.model, "r").outputs[0])
    with pytest.raises(VerifyError, match=r"after the pass liar") as raised:
        run(captured, [liar(drop)], Context())
    says = "output 'r' is gone" if order == "drop" else "another order: r, y"
    assert says in str(raised.value)


def test_a_pass_that_adds_or_retypes_an_input() -> None:
    def add(model: ir.Model) -> None:
        extra = ir.Value(name="more", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
        model.graph.inputs.append(extra)

    def freeze(model: ir.Model) -> None:
        model.graph.inputs[0].shape = ir.Shape([2, 6])

    assert "input 'more' is new" in caught(liar(add))
    assert "input 'x' was float[batch,6] and is float[2,6]" in caught(liar(freeze))


# -- truthfulness ---------------------------------------------------------------------------------


def test_a_change_that_is_denied() -> None:
    def deny(model: ir.Model) -> Result:
        find(model, "r").name = "other"
        return Result(False, [Entry("mlp", "skipped", "nothing to do")])

    assert "changed the model and says that it did not" in caught(liar(deny), PassError)


@pytest.mark.parametrize("changed", [True, False])
def test_a_ledger_that_says_otherwise(changed: bool) -> None:
    def unsaid(model: ir.Model) -> Result:
        if changed:
            scale_bias(model)
        status = "skipped" if changed else "applied"
        return Result(changed, [Entry("mlp", status, "...")])  # type: ignore[arg-type]

    assert "its ledger says otherwise" in caught(liar(unsaid), PassError)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (Entry("mlp", "done", ""), "status 'done'"),  # type: ignore[arg-type]
        (Entry("mlp", "applied", "", detail={"score": np.float32(1)}), "no JSON data"),
        (Entry("mlp", "applied", "", detail={"score": float("nan")}), "no JSON data"),
    ],
)
def test_a_ledger_that_cannot_be_written_down(entry: Entry, says: str) -> None:
    assert says in caught(liar(lambda model: Result(True, [entry])), PassError)


def test_writing_into_a_shared_weight() -> None:
    """The model before the pass would change with it, and nothing could tell them apart."""

    def scribble(model: ir.Model) -> None:
        weights.array(model.graph.initializers["down"])[0] = 0

    captured = mlp()
    with pytest.raises(PassError, match=r"liar wrote into weights .*: down"):
        run(captured, [liar(scribble)], Context())


def test_a_pass_that_returns_nothing() -> None:
    class Silent(Pass):
        name = "silent"
        exactness = Exact()

        def run(self, model: ir.Model, ctx: Context) -> Result:
            return None  # type: ignore[return-value]

        def __str__(self) -> str:
            return self.name

    assert "silent returned None and no Result" in caught(Silent(), PassError)


# -- failures -------------------------------------------------------------------------------------


def test_any_exception_names_the_pass_and_the_place() -> None:
    def fail(model: ir.Model) -> None:
        raise KeyError("q_proj")

    text = caught(liar(fail), PassError)
    assert "the pass liar failed: KeyError: 'q_proj'" in text and "test_lies.py:" in text


def test_our_own_errors_keep_their_type_and_gain_the_name() -> None:
    def fail(model: ir.Model) -> None:
        Cut(count=100)

    text = caught(liar(fail), OptionError)
    assert "count must be less than 8" in text and "in the pass liar" in text


# -- lossy passes ---------------------------------------------------------------------------------


class Wrong(Cut):
    """A Cut that is wrong somewhere; its options do not matter."""

    name = "wrong"


class WrongEdit(Wrong):
    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        result = super().edit(model, chosen, ctx)
        bias = weights.array(model.graph.initializers["bias"])
        set_weight(model, "bias", bias[::-1])  # the right width, the wrong channels
        return result


def test_an_edit_that_differs_from_its_simulation() -> None:
    text = caught(WrongEdit())
    assert "off by" in text and "simulated reference's" in text and "lossy pass" in text


class Overflow(Wrong):
    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        y = find(model, "y")
        big = edit.constant(model.graph, np.array(3e38, np.float32), "big")
        times = edit.node("Mul", [y.inputs[0], big], name="times")
        model.graph.insert_before(y, times)
        y.replace_input_with(0, times.outputs[0])
        return Result(True, list(chosen))

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        self.edit(before, chosen, Context())
        return Reference(before, 1e-6)


def test_an_overflow_that_the_simulation_has_too() -> None:
    text = caught(Overflow())
    assert "verify.finite" in text and "NaN or infinite" in text
    assert "first value that is no longer finite: y" in text


class EditsWhileChoosing(Wrong):
    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        scale_bias(model)
        return super().choose(model, ctx)


class ScribblesWhileChoosing(Wrong):
    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        weights.array(model.graph.initializers["bias"])[:] = 0
        return super().choose(model, ctx)


def test_a_pass_that_mutates_its_input_before_choosing() -> None:
    assert "edited the model while it chose" in caught(EditsWhileChoosing(), PassError)
    with pytest.raises(PassError, match=r"edited the model while it chose: bias"):
        run(mlp(), [ScribblesWhileChoosing()], Context())


class LosesCandidates(Wrong):
    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        super().edit(model, chosen, ctx)
        return Result(True, did("something else"))


def test_a_ledger_that_lost_a_candidate() -> None:
    assert "lost candidates from its ledger: mlp" in caught(LosesCandidates(), PassError)


def test_a_lossy_pass_that_states_no_reference() -> None:
    class Plain(ChoosingPass):
        name = "plain"
        exactness = Lossy()

        def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
            return did("mlp")

        def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
            scale_bias(model)
            return Result(True, list(chosen))

        def __str__(self) -> str:
            return self.name

    assert "states no simulated reference" in caught(Plain(), PassError)
    assert "is lossy and no ChoosingPass" in caught(liar(scale_bias, Lossy()), PassError)


def test_removing_an_output_must_be_said_and_is_for_lossy_passes() -> None:
    class DropsOutput(Wrong):
        said: Any = None

        def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
            model.graph.outputs.pop()
            return Result(True, list(chosen), {"r": None} if self.said else {})

        def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
            return Reference(before, 0.0)

    for said in (True, False):
        captured = mlp()
        captured.model.graph.outputs.append(find(captured.model, "r").outputs[0])
        DropsOutput.said = said
        if said:
            compiled = run(captured, [DropsOutput()], Context())
            assert [v.name for v in compiled.model.graph.outputs] == ["y"]
        else:
            with pytest.raises(VerifyError, match="output 'r' is gone"):
                run(captured, [DropsOutput()], Context())


def test_calibration_data_does_not_replace_the_samples() -> None:
    """Feeds of zeros would hide a scaled weight."""
    text = caught(liar(scale_bias), calibration=[{"x": np.zeros((2, 6), np.float32)}])
    assert "verify.differs" in text
