"""Budgets: the smallest share of every width that must go for a model to cost at most so much.

Costs are those of :mod:`netlathe.analysis.cost` at the widths in question, so that what two pruned widths
have in common (a weight of both loses rows and columns) is counted as it will be. A latency is read off
a measured table: it is that of each candidate at its width, added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from netlathe.analysis import latency
from netlathe.analysis.axes import Axes
from netlathe.analysis.cost import Meter
from netlathe.diagnostics import Diagnostic, PassError
from netlathe.passes.prune.allocation import Allocation
from netlathe.passes.prune.candidates import Candidate, Widths

Kind = Literal["params", "macs", "bytes", "latency"]
_STEPS = 40  # halvings of the ratio: finer than one position of any width
_MOST_NAMED = 5


@dataclass(frozen=True)
class Budget:
    """A kind of cost and how much of it may be left; ``measure`` tells it at given widths."""

    kind: Kind
    limit: float
    measure: Callable[[Mapping[Candidate, int]], float]


def by_cost(axes: Axes, sizes: Mapping[str, int] | None, kind: Kind, limit: float) -> Budget:
    """A budget of parameters, MACs or bytes; a limit up to 1 is a share of what the model has."""
    meter = Meter(axes.model, sizes)

    def measure(counts: Mapping[Candidate, int]) -> float:
        widths = Widths(axes, {c.group.atom: n for c, n in counts.items() if n < c.size})
        found = meter.read(widths.shape)
        number = getattr(found, kind)
        if number is None:
            raise PassError(
                Diagnostic(
                    "prune.macs",
                    "the MACs of the model are not known",
                    notes=found.unknown[:_MOST_NAMED],
                    help="give a budget of params or bytes",
                )
            )
        parameters, size_in_bytes = widths.extra()
        more = {"params": parameters, "bytes": size_in_bytes}
        return float(number + more.get(kind, 0))

    return Budget(kind, limit * measure({}) if limit <= 1 else limit, measure)


def by_table(path: Path, candidates: Sequence[Candidate], limit: float) -> Budget:
    """A budget of milliseconds by a table of candidates, widths and times; see :func:`read_table`."""
    curves = read_table(path, candidates)

    def measure(counts: Mapping[Candidate, int]) -> float:
        total = 0.0
        for candidate, (widths, times) in curves.items():
            total += float(np.interp(counts.get(candidate, candidate.size), widths, times))
        return total

    return Budget("latency", limit, measure)


def read_table(
    path: Path, candidates: Sequence[Candidate]
) -> dict[Candidate, tuple[list[float], list[float]]]:
    """Widths and times of every candidate, from a table (:mod:`netlathe.analysis.latency`).

    Between two widths times are interpolated.

    Raises:
        PassError: it is no such table, or tells too little about some candidate.
    """
    table = latency.read(path, "prune.table")
    curves: dict[Candidate, tuple[list[float], list[float]]] = {}
    problems = []
    for candidate in candidates:
        widths, times = table.of(candidate.name, candidate.modules)
        least = candidate.widths()[0]
        if len(widths) < 2 or widths[0] > least or widths[-1] < candidate.size:
            known = f"has widths {widths[0]:g} to {widths[-1]:g} of it" if widths else "lacks it"
            message = f"the table {known}; widths {least} to {candidate.size} occur"
            problems.append(
                Diagnostic("prune.table", message, at=candidate.name, where=candidate.where)
            )
        curves[candidate] = widths, times
    if problems:
        raise PassError(problems)
    return curves


# -- solving ----------------------------------------------------------------------------------------


def solve(
    budget: Budget,
    allocate: Allocation,
    free: Sequence[Candidate],
    fixed: Sequence[tuple[Candidate, str]],
) -> dict[Candidate, int]:
    """The widths of the smallest share with which the budget is kept, as ``allocate`` spreads it.

    ``fixed`` are candidates that stay, each with the reason.

    Raises:
        PassError: the least widths cost more than the budget.
    """
    least = {candidate: candidate.widths()[0] for candidate in free}
    reachable = budget.measure(least)
    if reachable > budget.limit:
        raise _unreachable(budget, reachable, fixed)
    if budget.measure({}) <= budget.limit:
        return {candidate: candidate.size for candidate in free}
    best, low, high = least, 0.0, 1.0
    wide, narrow = _widths(allocate, low), _widths(allocate, high)
    for _ in range(_STEPS):
        if wide == narrow:
            break
        ratio = (low + high) / 2
        counts = _widths(allocate, ratio)
        if budget.measure(counts) <= budget.limit:
            best, narrow, high = counts, counts, ratio
        else:
            wide, low = counts, ratio
    return best


def _widths(allocate: Allocation, share: float) -> dict[Candidate, int]:
    return {candidate: n or candidate.widths()[0] for candidate, n in allocate(share).items()}


def _unreachable(
    budget: Budget, reachable: float, fixed: Sequence[tuple[Candidate, str]]
) -> PassError:
    heavy = sorted(fixed, key=lambda pair: -pair[0].parameters * pair[0].size)
    notes = [f"{candidate.name} stays: {reason}" for candidate, reason in heavy[:_MOST_NAMED]]
    if more := len(heavy) - len(notes):
        notes.append(f"and {more} more")
    unit = " ms" if budget.kind == "latency" else ""
    return PassError(
        Diagnostic(
            "prune.budget",
            f"{budget.kind} cannot go down to {budget.limit:.6g}{unit}:"
            f" {reachable:.6g}{unit} is the least that is reachable",
            notes=tuple(notes),
            help=f"give {budget.kind}={reachable:.6g} or more, or prune in more scopes",
        )
    )
