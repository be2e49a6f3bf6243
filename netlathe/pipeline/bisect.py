"""Which candidates of a pass cause what it loses: applied alone, left out alone, and the few to leave out.

    for found in bisect(Trial(before, step, ctx, scale), budget=64): ...  # after every measurement

The loss of a model is measured against the model before the pass: KL in nats a row where an output stands
for a distribution, else the share of the output's square that differs. Candidates are applied together in
halves, halves of the worst half come next, and so on until those that lose most stand alone; with a
budget for it every candidate is applied alone. Then the worst are left out, so many that the rest
stays within a bound: a binary search over how many, in order of damage.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, PassError
from netlathe.ir import normal, sparsity, weights
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.loss import Scale, Subject
from netlathe.pipeline.pass_ import ChoosingPass, Context
from netlathe.pipeline.step import Step


@dataclass
class Candidate:
    """A candidate that was applied, and what is known of its damage; None: not measured."""

    entry: Entry
    alone: float | None = None  # the loss with it and no other
    without: float | None = None  # the loss with all others
    weight: float | None = (
        None  # what is lost of a weight's square, where it is one that stays floating
    )


@dataclass
class Found:
    """What is known so far; ``complete`` says that nothing more is to be measured."""

    metric: str  # "kl" or "mse"
    bound: float
    candidates: list[Candidate]
    total: float | None = None  # the loss of the pass as it was run
    groups: dict[tuple[int, int], float] = field(
        default_factory=dict
    )  # candidates from, to: their loss
    reverted: list[Entry] | None = None  # without these the loss is within the bound
    left: float | None = None  # the loss without them
    measured: int = 0
    complete: bool = False

    @property
    def ranked(self) -> list[Candidate]:
        """The candidates that were measured, the worst first."""
        known = [c for c in self.candidates if c.alone is not None]
        return sorted(known, key=lambda c: -(c.alone or 0.0))

    def to_json(self) -> dict[str, Any]:
        """As plain data; candidates in order of damage, those that were not measured at the end."""
        rest = [c for c in self.candidates if c.alone is None]
        return {
            "metric": self.metric,
            "loss": self.total,
            "bound": self.bound,
            "candidates": [
                {
                    "candidate": c.entry.candidate,
                    "where": c.entry.where,
                    "reason": c.entry.reason,
                    "layer_error": c.entry.detail.get("error"),
                    "weight_error": c.weight,
                    "alone": c.alone,
                    "without": c.without,
                }
                for c in (*self.ranked, *rest)
            ],
            "reverted": None if self.reverted is None else [e.candidate for e in self.reverted],
            "loss_without_reverted": self.left,
            "measured": self.measured,
            "complete": self.complete,
        }


class Trial:
    """Measures a pass with some of its candidates.

    Raises:
        PassError: the pass does not say what it chose, or changed nothing; the model has no output to
            compare.
    """

    def __init__(self, before: ir.Model, step: Step, ctx: Context, scale: Scale) -> None:
        if not isinstance(step.pass_, ChoosingPass):
            message = f"{step.pass_} chooses no candidates that could be left out"
            raise PassError(Diagnostic("bisect.pass", message))
        self.pass_: ChoosingPass = step.pass_
        self._before, self._ctx, self._scale = before, ctx, scale
        self._dense = Subject(before)
        # What loses nothing by itself is there always: others rely on it, or bring it along.
        self._entries = step.entries
        self.candidates = [
            e
            for e in step.entries
            if e.status == "applied" and not e.detail.get("exact") and "follows" not in e.detail
        ]
        if not self.candidates:
            message = f"{step.pass_} applied nothing: there is nothing to look for"
            raise PassError(Diagnostic("bisect.nothing", message))
        self.metric = "mse"

    def weight_errors(self) -> list[float | None]:
        """For every candidate what it loses of its weight's square, |w' - w|^2 / |w|^2."""
        after = self._edited(self.candidates)
        made = {v.name: v for g in after.graphs() for n in g for v in n.outputs}
        made |= {v.name: v for g in after.graphs() for v in g.initializers.values()}
        held = {v.name: v for g in self._before.graphs() for v in g.initializers.values()}
        return [
            _weight_error(held.get(e.detail.get("value")), made.get(e.detail.get("value")))
            for e in self.candidates
        ]

    def loss(self, chosen: Sequence[Entry]) -> float:
        """What is lost when these candidates are applied and no others."""
        if not chosen:
            return 0.0
        model = self._edited(chosen)
        found = self._scale.loss(self._dense, Subject(model))
        weights.give_back(self._before)
        if found is None:
            message = "no floating-point output is there before and after the pass"
            raise PassError(Diagnostic("bisect.outputs", message))
        self.metric = "mse" if found.kl is None else "kl"
        return found.relative_rms**2 if found.kl is None else found.kl

    def _edited(self, chosen: Sequence[Entry]) -> ir.Model:
        wanted = {id(entry) for entry in chosen}
        off = {id(entry) for entry in self.candidates} - wanted
        entries = [
            dataclasses.replace(e, status="skipped", arrays={}) if id(e) in off else e
            for e in self._entries
        ]
        model = self._before.clone()
        self.pass_.edit(model, entries, self._ctx)
        normal.normalize(model)
        return model


def _weight_error(before: ir.Value | None, after: ir.Value | None) -> float | None:
    if before is None or after is None or before.const_value is None:
        return None
    made, array = sparsity.contents(after), weights.array(before)
    if made is None or made.shape != array.shape:
        return None
    wide = array.astype(np.float64)
    square = float(np.square(wide).sum())
    return float(np.square(made.astype(np.float64) - wide).sum()) / square if square else 0.0


def bisect(trial: Trial, *, budget: int, bound: float | None = None) -> Iterator[Found]:
    """Yields what is known, after every measurement; the last is complete.

    ``budget`` is how many models are measured at most; ``bound`` is the loss to get below, by default half
    of what the pass loses.
    """
    entries = trial.candidates
    pairs = zip(entries, trial.weight_errors(), strict=True)
    found = Found("", math.inf, [Candidate(entry, weight=weight) for entry, weight in pairs])

    def measure(chosen: Sequence[Entry]) -> float:
        loss = trial.loss(chosen)
        found.measured += 1
        return loss

    found.total = measure(entries)
    found.metric, found.bound = trial.metric, found.total / 2 if bound is None else bound
    yield found
    reserve = math.ceil(math.log2(len(entries) + 1)) + 1  # for the search that comes after
    for _ in _tree(found, entries, measure, budget - reserve):
        yield found
    worst = [c.entry for c in found.ranked if (c.alone or 0.0) > 0]
    if found.total <= found.bound:
        found.reverted, found.left, worst = [], found.total, []
    low, high = 1, len(worst)
    while low <= high and found.measured < budget:
        count = (low + high) // 2
        out = worst[:count]
        loss = measure([entry for entry in entries if not any(entry is other for other in out)])
        if count == 1:
            found.ranked[0].without = loss
        if loss <= found.bound:
            found.reverted, found.left, high = out, loss, count - 1
        else:
            low = count + 1
        yield found
    for candidate in found.ranked:
        if candidate.without is None and found.measured < budget:
            rest = [entry for entry in entries if entry is not candidate.entry]
            candidate.without = measure(rest)
            yield found
    found.complete = True
    yield found


def _tree(
    found: Found,
    entries: Sequence[Entry],
    measure: Callable[[Sequence[Entry]], float],
    budget: int,
) -> Iterator[None]:
    """Split the groups that lose most until what loses most stands alone, or the budget is used up."""
    if len(entries) < budget - found.measured:
        for candidate in found.candidates:
            candidate.alone = measure([candidate.entry])
            yield
        return
    assert found.total is not None
    heap = [(-found.total, 0, len(entries))]
    while heap and found.measured + 2 <= budget:
        _, start, stop = heapq.heappop(heap)
        if stop - start == 1:
            continue
        middle = (start + stop) // 2
        for low, high in ((start, middle), (middle, stop)):
            lost = measure(entries[low:high])
            found.groups[low, high] = lost
            if high - low == 1:
                found.candidates[low].alone = lost
            else:
                heapq.heappush(heap, (-lost, low, high))
            yield
