"""Which candidates go, given what each of them, or each set of them, is worth.

A goal is a count of candidates or a number of parameters that must go. *One-shot*: scores are those of the
whole model. A count takes the least important ones; for a number of parameters the set with the least sum
of scores goes, found exactly (the additive model and knapsack of LAPTOP-Diff, arXiv 2404.11098, section
3.2). *Greedy*: one goes after the other, each the one without which the model, less those before, is hurt
least.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from netlathe.passes.drop.candidates import Candidate, beside

# Parameters are counted in units of this share of all that must go, rounded down: so many sets at most
# are told apart.
_UNITS = 1 << 16


@dataclass(frozen=True)
class Goal:
    """How many candidates must go, or at least how many parameters."""

    count: int | None
    parameters: int = 0

    def met_by(self, chosen: Sequence[Candidate]) -> bool:
        """Whether that is enough."""
        if self.count is not None:
            return len(chosen) >= self.count
        return sum(c.parameters for c in chosen) >= self.parameters


def cheapest(
    model: ir.Model, able: Sequence[tuple[Candidate, float]], parameters: int
) -> list[Candidate]:
    """The set of the least sum of scores with at least so many parameters, if there is one.

    ``able`` has the least important first. Where two of the set cannot go together, the more important
    one stays, and the set is chosen anew.
    """
    while True:
        chosen = _knapsack(able, parameters)
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

    With a goal in parameters the one goes that costs least score for each of its parameters.
    """
    chosen: list[Candidate] = []
    scores: dict[Candidate, float] = {}
    reached = 0.0
    while not goal.met_by(chosen):
        able = [c for c in free if c not in chosen and beside(model, c, chosen) is None]
        if goal.count is None:
            able = [c for c in able if c.parameters]
        if not able:
            break
        scores.update(zip(able, without([[*chosen, c] for c in able]), strict=True))
        by_count = goal.count is not None
        rates = [(scores[c] - reached) / (1 if by_count else c.parameters) for c in able]
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


def _knapsack(able: Sequence[tuple[Candidate, float]], parameters: int) -> list[Candidate]:
    """The set of the least sum of scores with at least so many parameters; all where none has them.

    Sets are built up one candidate at a time, and of two sets of which one goes for less and saves as
    much, only that one is kept (Nemhauser and Ullmann, Management Science 15, 1969).
    """
    unit = max(1, parameters // _UNITS)
    sets: list[tuple[int, float, tuple[int, ...]]] = [
        (0, 0.0, ())
    ]  # saved, score, which; both rise
    for at, (candidate, score) in enumerate(able):
        with_it = [
            (s + candidate.parameters // unit, total + score, (*which, at))
            for s, total, which in sets
        ]
        sets = _best([*sets, *with_it])
    wanted = -(-parameters // unit)
    position = bisect.bisect_left(sets, wanted, key=lambda found: found[0])
    if position == len(sets):
        return [candidate for candidate, _ in able]
    return [able[at][0] for at in sets[position][2]]


def _best(
    sets: list[tuple[int, float, tuple[int, ...]]],
) -> list[tuple[int, float, tuple[int, ...]]]:
    """Those of which no other saves as much for less, by what they save."""
    kept: list[tuple[int, float, tuple[int, ...]]] = []
    for found in sorted(sets, key=lambda s: (-s[0], s[1], s[2])):
        if not kept or found[1] < kept[-1][1]:
            kept.append(found)
    return kept[::-1]
