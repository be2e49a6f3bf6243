"""Runs mutated passes through the pipeline's own checks, and says what became of each.

A mutant is killed when the pipeline stops at it with an error that names it. One that survives is held
against an independent criterion: where it gives the same bits as the unmutated pass on many inputs
that verification has not seen, it is equivalent and no mutant; else verification has missed it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from netlathe.diagnostics import NetLatheError
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.execute.executor import Executor
from netlathe.ir import normal
from netlathe.passes.cleanup import Cleanup
from netlathe.passes.fold_batch_norm import FoldBatchNorm
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Feeds,
    Lossy,
    Pass,
    Reference,
    Result,
)
from netlathe.pipeline.run import run
from tests.mutants.mutations import Mutation, Scene, choose
from tests.passes.folding import in_float64

SEED = 0
Verdict = Literal["killed", "survived", "equivalent", "blamed another", "crashed"]


@dataclass(frozen=True)
class Subject:
    """A pass on a model that it changes."""

    pass_: Pass
    model: str
    make: Callable[[], Captured] = field(repr=False, compare=False)
    # Sizes that show every row of every table and every position of every mask.
    sizes: Sequence[dict[str, int]] = ({},)
    calibrated: bool = False

    def __str__(self) -> str:
        return f"{self.pass_} on {self.model}"

    @cached_property
    def captured(self) -> Captured:
        """The model that the pass gets."""
        return self.make()

    @cached_property
    def context(self) -> Context:
        """With two samples to choose by, where the pass chooses by data."""
        if not self.calibrated:
            return Context()
        return Context(calibration=[self.captured.sample({}, seed) for seed in (11, 12)])

    def edited(self, mutation: Mutation | None = None) -> ir.Model:
        """What the (mutated) pass makes of the model, in normal form."""
        model = self.captured.model.clone()
        _mutated(self.pass_, mutation).run(model, self.context)
        normal.normalize(model)
        return model

    def mutations(self, count: int) -> list[Mutation]:
        """A choice of mistakes that depends on the seed alone."""
        before = self.captured.model
        after = before.clone()
        self.pass_.run(after, self.context)
        rng = np.random.default_rng([SEED, zlib.crc32(str(self).encode())])
        return choose(Scene(before, after), count, rng)

    def unseen(self) -> Iterator[Feeds]:
        """Inputs that verification does not use: other seeds, other sizes, floats of four scales."""
        for number, sizes in enumerate(self.sizes):
            for seed in range(4):
                feeds = self.captured.sample(sizes, 100 + 10 * number + seed)
                scale = 4.0 ** (seed - 1)
                yield {
                    name: (array * scale).astype(array.dtype) if array.dtype.kind == "f" else array
                    for name, array in feeds.items()
                }


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    subject: Subject
    mutation: Mutation
    verdict: Verdict
    says: str = ""  # the first line of what the pipeline said, or why it is equivalent


def judge(subject: Subject, mutation: Mutation) -> Outcome:
    """Run the mutated pass, and an honest one behind it, through the pipeline."""
    wrong = _mutated(subject.pass_, mutation)
    follower = FoldBatchNorm() if subject.pass_.name == "cleanup" else Cleanup()
    try:
        run(subject.captured, [wrong, follower], subject.context)
    except NetLatheError as error:
        text = "\n".join([str(error), *getattr(error, "__notes__", [])])
        named = str(wrong) in text and follower.name not in text
        verdict: Verdict = "killed" if named else "blamed another"
        return Outcome(subject, mutation, verdict, _first_line(error))
    except Exception as error:
        return Outcome(subject, mutation, "crashed", f"{type(error).__name__}: {error}")
    return _survivor(subject, mutation)


# In float64, where a function that is the same in exact arithmetic (a bias of the keys of an attention,
# which its softmax cancels) differs by some hundred roundings of 2**-52.
_SAME_IN_FLOAT64 = 1e-12


def _survivor(subject: Subject, mutation: Mutation) -> Outcome:
    """Hold a mutant that verification let pass against the honest pass, on inputs it has not seen.

    It is none if it gives the same bits, or is the same function: in float64 as near as roundings are
    to the honest pass or, where the pass must not lose anything, to the model before as near as that.
    """
    honest, wrong = subject.edited(), subject.edited(mutation)
    sessions = ort.Session(honest), ort.Session(wrong)
    inputs = {v.name for v in honest.graph.inputs}
    same_bits = True
    for feeds in subject.unseen():
        given = {name: array for name, array in feeds.items() if name in inputs}
        try:
            expected, actual = (session.run(given) for session in sessions)
        except NetLatheError as error:
            says = f"it cannot be run on other inputs: {_first_line(error)}"
            return Outcome(subject, mutation, "survived", says)
        same_bits &= all(a.tobytes() == actual[name].tobytes() for name, a in expected.items())
    if same_bits:
        return Outcome(subject, mutation, "equivalent", "the same bits on all unseen inputs")
    same, says = _same_function(subject, honest, wrong)
    return Outcome(subject, mutation, "equivalent" if same else "survived", says)


def _same_function(subject: Subject, honest: ir.Model, wrong: ir.Model) -> tuple[bool, str]:
    """Whether two models that differ in bits do so by rounding only, and what says so."""
    exact = [Executor(in_float64(m)) for m in (honest, wrong, subject.captured.model)]
    inputs = {v.name for v in honest.graph.inputs}
    apart = honest_off = wrong_off = 0.0
    for feeds in subject.unseen():
        wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in feeds.items()}
        given = {name: array for name, array in wide.items() if name in inputs}
        try:
            results = [executor.run(given) for executor in exact[:2]]
        except NetLatheError as error:
            return False, f"other bits, and float64 cannot tell: {_first_line(error)}"
        original = exact[2].run(wide)
        apart = max(apart, _distance(results[1], results[0]))
        honest_off = max(honest_off, _distance(results[0], original))
        wrong_off = max(wrong_off, _distance(results[1], original))
    says = f"{apart:.0e} of the RMS from the honest pass in float64"
    if isinstance(subject.pass_.exactness, Lossy):
        return apart <= _SAME_IN_FLOAT64, says
    says += f", {wrong_off:.0e} from the model before, the honest pass {honest_off:.0e}"
    return apart <= _SAME_IN_FLOAT64 or wrong_off <= 2 * honest_off, says


def _distance(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    pairs = [(actual[name].numpy(), expected[name].numpy()) for name in actual]
    return max(relative_error(*pair) for pair in pairs)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _mutated(inner: Pass, mutation: Mutation | None) -> Pass:
    """The pass whose edit is followed by ``mutation``; in all else, and by name, it is ``inner``."""
    if mutation is None:
        return inner
    if isinstance(inner, ChoosingPass):
        return _mutated_choice(inner, mutation)

    class Mutated(Pass):
        name = inner.name
        exactness = inner.exactness

        def run(self, model: ir.Model, ctx: Context) -> Result:
            result = inner.run(model, ctx)
            mutation.apply(model)
            return result

        def __str__(self) -> str:
            return str(inner)

    return Mutated()


def _mutated_choice(inner: ChoosingPass, mutation: Mutation) -> Pass:
    class Mutated(ChoosingPass):
        name = inner.name
        exactness = inner.exactness

        def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
            return inner.choose(model, ctx)

        def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
            result = inner.edit(model, chosen, ctx)
            mutation.apply(model)
            return result

        def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
            return inner.simulate(before, chosen)

        def __str__(self) -> str:
            return str(inner)

    return Mutated()


# -- all of them --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What became of a set of mutants; equivalent ones do not count."""

    outcomes: Sequence[Outcome]

    def of(self, *verdicts: Verdict) -> list[Outcome]:
        """Those with one of the verdicts."""
        return [outcome for outcome in self.outcomes if outcome.verdict in verdicts]

    @property
    def counted(self) -> int:
        """How many mutants there are."""
        return len(self.outcomes) - len(self.of("equivalent"))

    @property
    def killed(self) -> float:
        """The share that the pipeline stopped at, naming the pass."""
        return len(self.of("killed")) / self.counted

    def table(self) -> str:
        """By pass and kind, then the survivors and the equivalent ones by name."""
        rows = [f"{'':44} {'mutants':>8} {'killed':>8} {'equivalent':>11}"]
        keys: dict[str, Callable[[Outcome], str]] = {
            "by pass": lambda outcome: outcome.subject.pass_.name,
            "by model": lambda outcome: str(outcome.subject),
            "by kind of mistake": lambda outcome: outcome.mutation.kind,
        }
        for title, key in keys.items():
            rows.append(title)
            for name in sorted({key(outcome) for outcome in self.outcomes}):
                part = Score([outcome for outcome in self.outcomes if key(outcome) == name])
                killed, same = len(part.of("killed")), len(part.of("equivalent"))
                rows.append(f"  {name:42} {part.counted:8} {killed:8} {same:11}")
        killed, same = len(self.of("killed")), len(self.of("equivalent"))
        rows.append(f"{'all':44} {self.counted:8} {killed:8} {same:11}")
        rows.append(f"killed: {100 * self.killed:.1f} %")
        verdicts: tuple[Verdict, ...] = ("survived", "blamed another", "crashed", "equivalent")
        for verdict in verdicts:
            found = self.of(verdict)
            rows += [f"{verdict}:"] if found else []
            rows += [f"  {o.subject}, {o.mutation}: {o.says}" for o in found]
        return "\n".join(rows)


def campaign(subjects: Iterable[Subject], count: int) -> Iterator[Outcome]:
    """Judge up to ``count`` mutants of every subject, all of them different."""
    for subject in subjects:
        for mutation in subject.mutations(count):
            yield judge(subject, mutation)
