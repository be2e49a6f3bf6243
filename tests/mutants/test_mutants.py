"""The pipeline's checks find wrong rewrites, blame the right pass, and raise no false alarm."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from netlathe.analysis.blocks import blocks
from netlathe.analysis.branches import residual_branches
from netlathe.passes.cleanup import Cleanup
from netlathe.passes.convert import Convert
from netlathe.passes.drop import Drop
from netlathe.passes.fold_batch_norm import FoldBatchNorm
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.run import run
from tests import zoo, zoo_ir
from tests.mutants import mutations
from tests.mutants.harness import Outcome, Score, Subject, campaign, judge
from tests.mutants.mutations import Mutation, Scene
from tests.mutants.subjects import QUICK, subjects
from tests.pipeline.toy import captured_of

LEAST_KILLED = 0.98


def check(outcomes: list[Outcome], least: int) -> None:
    """At least ``least`` mutants, nearly all killed, none by an error that names another pass."""
    score = Score(outcomes)
    assert score.counted >= least
    assert not score.of("blamed another", "crashed"), score.table()
    assert score.killed >= LEAST_KILLED, score.table()


def test_a_few_mutants_of_every_pass_are_killed() -> None:
    outcomes = list(campaign([s for s in subjects() if str(s) in QUICK], 7))
    assert {o.subject.pass_.name for o in outcomes} == {
        "cleanup",
        "convert",
        "drop",
        "fold_batch_norm",
        "fold_norms",
        "quantize",
    }
    check(outcomes, 55)


@pytest.mark.slow
def test_mutants_of_every_pass_are_killed() -> None:
    check(list(campaign(subjects(), 30)), 500)


@pytest.mark.parametrize("subject", subjects(), ids=str)
def test_honest_passes_change_their_models_and_pass(subject: Subject) -> None:
    (step,) = run(subject.captured, [subject.pass_], subject.context).steps
    assert step.changed and step.check.error is not None


# -- no false alarm -----------------------------------------------------------------------------------

LOSSLESS = [Cleanup(), FoldBatchNorm(), FoldNorms(), FoldNorms(untie=True)]
LOSSY = [
    Drop(kind="ffn", count=1),
    Drop(kind="attention", count=1),
    Drop(kind="block", count=1),
    Quantize(min_size=0),
    Convert(dtype="float16"),
    Convert(dtype="bfloat16"),
]
ALL = [
    n if n in ("llama", "resnet") else pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES
]


@pytest.mark.parametrize("name", ALL)
def test_no_false_alarm(name: str) -> None:
    captured = captured_of(zoo_ir.captured(name), name)
    ctx = Context(calibration=[captured.sample({}, 5)])
    for pass_ in (*LOSSLESS, *LOSSY):
        if not isinstance(pass_, Drop) or _can_drop(captured.model, pass_):
            run(captured, [pass_], ctx)
    run(captured, [*LOSSLESS, Quantize(), Cleanup(), Convert()], ctx)


def _can_drop(model: ir.Model, pass_: Drop) -> bool:
    found = residual_branches(model)
    if pass_.kind == "block":
        return any(not block.reason for block in blocks(found))
    return any(branch.kind == pass_.kind and not branch.reason for branch in found)


# -- the harness itself -------------------------------------------------------------------------------


def toy() -> Subject:
    return next(s for s in subjects() if s.model == "a graph edited by hand")


def test_mutants_are_the_same_every_time() -> None:
    first, second = (list(map(str, toy().mutations(20))) for _ in range(2))
    assert first == second and len(set(first)) == 20


def test_a_mutation_that_changes_nothing_is_equivalent() -> None:
    nothing = Mutation("none", "y", "nothing", lambda model: None)
    assert judge(toy(), nothing).verdict == "equivalent"


def test_a_mutation_that_is_too_small_to_see_survives() -> None:
    """One that moves the output by less than a float32 pass may, and is yet another function."""

    def apply(model: ir.Model) -> None:
        head = model.graph.initializers["head"]
        assert head.const_value is not None
        array = head.const_value.numpy() * np.float32(1 + 2e-6)
        head.const_value = ir.tensor(array.astype(np.float32), name="head")

    outcome = judge(toy(), Mutation("small", "head", "2e-6 too large", apply))
    assert outcome.verdict == "survived", outcome


def test_a_crash_inside_a_mutation_is_blamed_on_the_pass() -> None:
    def apply(model: ir.Model) -> None:
        raise KeyError("gone")

    assert judge(toy(), Mutation("crash", "y", "raises", apply)).verdict == "killed"


def test_every_kind_of_mistake_has_sites() -> None:
    found = set()
    for subject in subjects():
        if str(subject) not in QUICK:
            continue
        before = subject.captured.model
        after = before.clone()
        subject.pass_.run(after, subject.context)
        scene, rng = Scene(before, after), np.random.default_rng(0)
        found |= {kind.__name__ for kind in mutations.KINDS if next(kind(scene, rng), None)}
    assert found == {kind.__name__ for kind in mutations.KINDS}
