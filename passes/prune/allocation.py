"""How many positions each candidate keeps: a share of the cost to remove, spread over the candidates.

An allocation maps a share in [0, 1) to a width for every candidate. A larger share never removes less. Cost
counted in parameters, those of a position while nothing else is pruned; where widths share weights, what
is really removed differs, and a budget searches for the share that keeps it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.blocks import blocks
from netlathe.analysis.branches import residual_branches
from netlathe.diagnostics import missing_extra
from netlathe.passes.prune.candidates import Candidate, Scores
from netlathe.passes.prune.distortion import curves
from netlathe.pipeline.pass_ import Context

Float64 = npt.NDArray[np.float64]
Scored: TypeAlias = Mapping[Candidate, Scores]
Allocation: TypeAlias = Callable[[float], dict[Candidate, int]]


@dataclass(frozen=True)
class Spread:
    """How a share is spread, and for each candidate what that goes by, which the ledger tells."""

    allocate: Allocation
    evidence: Mapping[Candidate, Mapping[str, Any]] = field(default_factory=dict)


_DP_STEPS = 2000  # units that the cost to remove is cut into: half a thousandth of it is the error


def uniform(scored: Scored) -> Allocation:
    """Every candidate loses the same share, to the nearest width that it may have; 0: nothing is left."""

    def allocate(share: float) -> dict[Candidate, int]:
        return {c: c.fit(c.size * (1 - share)) for c in scored}

    return allocate


def ranked(scored: Scored) -> Allocation:
    """One ranking of all positions by score per parameter; those that cost least of the score go.

    For scores in the units of a loss, and positions whose losses add up, that removes the given cost at the
    least loss (the greedy solution of a knapsack).
    """
    candidates = list(scored)
    densities = [scored[c] / _cost(c) for c in candidates]
    costs = np.concatenate([np.full(c.size, _cost(c)) for c in candidates])
    every = np.concatenate(densities)
    order = np.argsort(every, kind="stable")
    spent = np.cumsum(costs[order])

    def allocate(share: float) -> dict[Candidate, int]:
        gone = int(np.searchsorted(spent, share * spent[-1] * (1 - 1e-12), side="left"))
        gone += 1 if share > 0 else 0
        removed = np.zeros(len(every), bool)
        removed[order[:gone]] = True
        counts, start = {}, 0
        for candidate in candidates:
            left = candidate.size - int(removed[start : start + candidate.size].sum())
            counts[candidate] = candidate.fit(max(left, candidate.widths()[0]))
            start += candidate.size
        return counts

    return allocate


def isomorphic(scored: Scored) -> Allocation:
    """A ranking within each set of candidates of one structure, each of which loses the same share.

    Isomorphic Pruning (arXiv 2407.04616), section 3: scores compare only between sub-structures with
    isomorphic graphs. Two candidates are isomorphic here if the same operators see weights of the same
    shapes along them in the same roles.
    """
    sets: dict[object, dict[Candidate, Scores]] = defaultdict(dict)
    for candidate, scores in scored.items():
        sets[structure(candidate)][candidate] = scores
    inner = [ranked(each) for each in sets.values()]

    def allocate(share: float) -> dict[Candidate, int]:
        found: dict[Candidate, int] = {}
        for one in inner:
            found |= one(share)
        return {candidate: found[candidate] for candidate in scored}

    return allocate


def structure(candidate: Candidate) -> object:
    """What isomorphic candidates have in common."""
    parts = [
        (part.role, part.node.op_type, part.dim, tuple(part.value.const_value.shape.numpy()))
        for part in candidate.parts
        if part.value.const_value is not None
    ]
    return candidate.scope, candidate.size, tuple(sorted(parts))


def standardized(scored: Scored) -> Allocation:
    """One ranking of (score - mean) / standard deviation, both over the positions of a candidate.

    FLAP (arXiv 2312.11983), section 3, "AL-AM": adaptive over layers and over attention and MLP. A standard
    score is of a position whatever its size: as in the released code it is ranked as it is, and costs count
    only towards the share.
    """

    def standard(candidate: Candidate) -> Scores:
        scores = scored[candidate]
        spread = scores.std()
        centred = scores - scores.mean()
        # Times the cost, since a ranking divides by it.
        return np.asarray(centred / (spread if spread > 0 else 1.0) * _cost(candidate))

    return ranked({candidate: standard(candidate) for candidate in scored})


def least_distortion(of: Mapping[Candidate, Float64]) -> Allocation:
    """The widths of the least total distortion that remove the cost, by dynamic programming.

    Xu et al. (arXiv 2308.10438), section 3: a curve of distortion against width for each layer, distortions
    that add up, and an exact search over all combinations of widths. ``of`` has a distortion for each of
    a candidate's widths, ascending.
    """
    candidates = list(of)
    options = []
    for candidate in candidates:
        widths = np.asarray(candidate.widths()[::-1])  # all, then fewer
        gone = candidate.size - widths
        options.append((widths, gone * _cost(candidate), of[candidate][::-1]))
    total = sum(_cost(candidate) * candidate.size for candidate in candidates)

    def allocate(share: float) -> dict[Candidate, int]:
        if not candidates or share <= 0:
            return {candidate: candidate.size for candidate in candidates}
        most = sum(float(costs[-1]) for _, costs, _ in options)
        wanted = min(share * total, most)
        chosen = _least(options, wanted)
        return {c: int(o[0][at]) for c, o, at in zip(candidates, options, chosen, strict=True)}

    return allocate


def _least(
    options: Sequence[tuple[npt.NDArray[np.int64], Float64, Float64]], wanted: float
) -> list[int]:
    """For each candidate the option with which distortions sum to the least and costs to ``wanted``.

    Costs are counted in whole units, rounded down, so that what is chosen does remove ``wanted``, and no more
    than a unit for each candidate beyond it is asked for.
    """
    unit = wanted / _DP_STEPS
    best = np.full(_DP_STEPS + 1, np.inf)  # least distortion with so many units removed, or more
    best[0] = 0.0
    picks = []
    for _, costs, distortions in options:
        steps = np.minimum((costs / unit * (1 + 1e-12)).astype(np.int64), _DP_STEPS)
        new = np.full(_DP_STEPS + 1, np.inf)
        pick = np.zeros(_DP_STEPS + 1, np.int64)
        for at, (step, distortion) in enumerate(zip(steps, distortions, strict=True)):
            # Reaching u units: from u - step, or from 0 where one step is more than enough.
            before = np.concatenate((np.full(step, best[0]), best[: _DP_STEPS + 1 - step]))
            before[:step] = best[0]
            better = before + distortion < new
            new[better], pick[better] = (before + distortion)[better], at
        best = new
        picks.append((pick, steps))
    left, chosen = _DP_STEPS, []
    if not math.isfinite(best[left]):  # rounding down lost the last units: take all that can go
        return [len(costs) - 1 for _, costs, _ in options]
    for pick, steps in reversed(picks):
        at = int(pick[left])
        chosen.append(at)
        left = max(left - int(steps[at]), 0)
    return chosen[::-1]


def _cost(candidate: Candidate) -> float:
    """Parameters of a position; of what has none of its own, one."""
    return float(max(candidate.parameters, 1))


def layer_adaptive(scored: Scored, model: ir.Model, ctx: Context) -> Spread:
    """:func:`least_distortion` of measured curves, :func:`netlathe.passes.prune.distortion.curves`."""
    measured = curves(scored, model, ctx)
    evidence = {
        candidate: {
            "distortion": {
                str(width): value
                for width, value in zip(
                    curve.widths.tolist(), curve.distortions.tolist(), strict=True
                )
            }
        }
        for candidate, curve in measured.items()
    }
    every = {candidate: curve.at(candidate.widths()) for candidate, curve in measured.items()}
    return Spread(least_distortion(every), evidence)


def by_angle(scored: Scored, model: ir.Model, ctx: Context) -> Spread:
    """What each block keeps is proportional to sigmoid(s - mean s), s the angle by which it turns the stream.

    CFSP (arXiv 2409.13199), section 3, coarse-grained: s is the angle between the stream before and after a
    block, as a share of pi, summed over all rows; the share kept is 1 at most. As in the released code, but
    that s is the mean over rows, scaled to a unit standard deviation over blocks: with a sum the
    sigmoid is 0 or 1 as soon as there is much data. What is in no block loses the share itself.
    """
    try:
        from netlathe.execute.statistics import AngularDistance
    except ModuleNotFoundError as error:
        raise missing_extra("torch", "torch", "prune(allocation='cfsp')") from error
    found = blocks(residual_branches(model))
    at = {weight: n for n, b in enumerate(found) for each in b.branches for weight in each.weights}
    wanted = [AngularDistance(b.start.name or "", b.end.name or "") for b in found]
    results = ctx.collect(model, wanted, needed_by="prune(allocation='cfsp')")
    angles = np.array([result.scalar for result in results])
    weight = angular_weights(angles)
    block = {c: next((at[p.value] for p in c.parts if p.value in at), None) for c in scored}

    def allocate(share: float) -> dict[Candidate, int]:
        counts = {}
        for candidate, number in block.items():
            factor = 1.0 if number is None else float(weight[number])
            left = candidate.size * min(1.0, (1 - share) * factor)
            counts[candidate] = candidate.fit(left) or candidate.widths()[0]
        return counts

    evidence = {
        candidate: {"block": number, "angle": float(angles[number])}
        for candidate, number in block.items()
        if number is not None
    }
    return Spread(allocate, evidence)


def angular_weights(angles: Float64) -> Float64:
    """sigmoid of standardized angles, divided by their mean: 1 on average."""
    spread = float(angles.std()) if len(angles) else 0.0
    centred = (angles - angles.mean()) / spread if spread > 0 else np.zeros(len(angles))
    gates = 1 / (1 + np.exp(-centred))
    return np.asarray(gates / gates.mean()) if len(gates) else gates


def together(parts: Sequence[Spread]) -> Spread:
    """Each of several allocations for its own candidates, of the same share."""

    def allocate(share: float) -> dict[Candidate, int]:
        return {candidate: n for part in parts for candidate, n in part.allocate(share).items()}

    return Spread(allocate, {c: told for part in parts for c, told in part.evidence.items()})


ALLOCATIONS: Mapping[str, Callable[[Scored, ir.Model, Context], Spread]] = {
    "uniform": lambda scored, model, ctx: Spread(uniform(scored)),
    "global": lambda scored, model, ctx: Spread(ranked(scored)),
    "isomorphic": lambda scored, model, ctx: Spread(isomorphic(scored)),
    "flap": lambda scored, model, ctx: Spread(standardized(scored)),
    "cfsp": by_angle,
    "layer_adaptive": layer_adaptive,
}
