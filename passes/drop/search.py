"""Which candidates go, given what each of them, or each set of them, is worth.

A goal is a count of candidates, or an amount of what each of them saves: parameters, or milliseconds off a
measured table. *One-shot*: scores are those of the whole model. A count takes the least important ones; for
an amount the set with the least sum of scores goes, found exactly (the additive model and knapsack of
LAPTOP-Diff, arXiv 2404.11098, section 3.2). *Greedy*: one goes after the other, each the one without which
the model, less those before, is hurt least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir

from netlathe.passes.drop.candidates import Candidate, beside

# What is saved is counted in units of this share of all that must go, rounded down: so many sets at most
# are told apart.
_UNITS = 1 << 16


@dataclass(frozen=True)
class Goal:
    """How many candidates must go, or at least how much of what they save."""

    count: int | None
    amount: float = 0.0
    saved: Mapping[Candidate, float] = field(default_factory=dict[Candidate, float])

    def met_by(self, chosen: Sequence[Candidate]) -> bool:
        """Whether that is enough."""
        if self.count is not None:
            return len(chosen) >= self.count
        return self.total(chosen) >= self.amount

    def towards(self, free: Sequence[Candidate]) -> list[Candidate]:
        """Those that bring it nearer."""
        return [c for c in free if self.count is not None or self.saved[c] > 0]

    def total(self, chosen: Sequence[Candidate]) -> float:
        """What these save together."""
        return math.fsum(self.saved[candidate] for candidate in chosen)


def cheapest(
    model: ir.Model, able: Sequence[tuple[Candidate, float]], goal: Goal
) -> list[Candidate]:
    """The set of the least sum of scores that saves the amount of the goal, if there is one.

    ``able`` has the least important first. Where two of the set cannot go together, the more important
    one stays, and the set is chosen anew.
    """
    while True:
        chosen = _knapsack(able, goal)
        stays = next((c for at, c in enumerate(chosen) if beside(model, c, chosen[:at])), None)
        if stays is None:
            return chosen
        able = [(candidate, score) for candidate, score in able if candidate is not stays]


def greedy(
    model: ir.Model,
    free: Sequence[Candidate],
    without: Callable[[Sequence[Sequence[Candidate]]], list[float]],
    goal: Goal,
) -> tuple[list[Candidate], dict[Candidate, float]]:
    """Candidates in the order in which they went, and the last score of each candidate.

    With an amount as the goal the one goes that costs least score for what it saves.
    """
    chosen: list[Candidate] = []
    scores: dict[Candidate, float] = {}
    reached = 0.0
    while not goal.met_by(chosen):
        able = [c for c in free if c not in chosen and beside(model, c, chosen) is None]
        if not able:
            break
        scores.update(zip(able, without([[*chosen, c] for c in able]), strict=True))
        by_count = goal.count is not None
        rates = [(scores[c] - reached) / (1 if by_count else goal.saved[c]) for c in able]
        best = able[rates.index(min(rates))]
        reached = scores[best]
        chosen.append(best)
    return chosen, scores


def evenly(free: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Candidates spread evenly over the depth of the model, as few as meet the goal; no data is needed."""
    for count in range(len(free) + 1):
        chosen = [free[(2 * at + 1) * len(free) // (2 * count)] for at in range(count)]
        if goal.met_by(chosen):
            return chosen
    return list(free)


def _knapsack(able: Sequence[tuple[Candidate, float]], goal: Goal) -> list[Candidate]:
    """The set of the least sum of scores that saves the amount; all where none does.

    Sets are built up one candidate at a time, and of two sets of which one goes for less and saves as
    much, only that one is kept (Nemhauser and Ullmann, Management Science 15, 1969).
    """
    unit = goal.amount / _UNITS
    sets = [_Set(0, 0.0, ())]  # units and scores both rise
    for at, (candidate, score) in enumerate(able):
        units = math.floor(goal.saved[candidate] / unit)
        with_it = [_Set(s.units + units, s.score + score, (*s.which, at)) for s in sets]
        sets = _best([*sets, *with_it])
    for found in sets:  # the units of one that saves enough may be rounded down to a little less
        chosen = [able[at][0] for at in found.which]
        if found.units >= _UNITS - len(chosen) and goal.met_by(chosen):
            return chosen
    return [candidate for candidate, _ in able]


class _Set(NamedTuple):
    """Candidates by their places, what they save in units, and the sum of their scores."""

    units: int
    score: float
    which: tuple[int, ...]


def _best(sets: Sequence[_Set]) -> list[_Set]:
    """Those of which no other saves as much for less, by what they save."""
    kept: list[_Set] = []
    for found in sorted(sets, key=lambda s: (-s.units, s.score, s.which)):
        if not kept or found.score < kept[-1].score:
            kept.append(found)
    return kept[::-1]
