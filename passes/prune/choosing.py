"""Which positions stay: a score for each, and how many each candidate keeps.

Scores are data-free here: the norm of what a position is made of (Li et al., arXiv 1608.08710,
section 3.1, for filters of convolutions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from netlathe.ir import weights
from netlathe.passes.prune.candidates import Candidate, Part, Scores
from netlathe.pipeline.pass_ import Context

_AT_ONCE = 1 << 22  # elements of a weight that are held in float64 at a time


def norms(candidate: Candidate, power: int) -> Scores:
    """The l1 (``power`` 1) or l2 norm of what makes each position.

    These are the weights that write it; of an expert, and where nothing writes, all that it holds.
    """
    of = candidate.writers if candidate.scope != "experts" else candidate.with_role("holds")
    total = np.zeros(candidate.size)
    for part in of or candidate.parts:
        total += _sums(part, power, candidate.size)
    return total if power == 1 else np.sqrt(total)


def _sums(part: Part, power: int, size: int) -> Scores:
    """The sum of |w|^power of a weight over the rows of each position."""
    moved = np.moveaxis(weights.array(part.value), part.dim, 0)
    rows = np.empty(len(moved))
    step = max(1, _AT_ONCE // max(1, moved[:1].size))
    for start in range(0, len(moved), step):
        wide = np.abs(moved[start : start + step].astype(np.float64)) ** power
        rows[start : start + step] = wide.reshape(len(wide), -1).sum(1)
    owned = part.index >= 0
    return np.bincount(part.index[owned], rows[owned], minlength=size).astype(np.float64)


def _random(candidate: Candidate, ctx: Context) -> Scores:
    scores: npt.NDArray[np.float64] = ctx.rng("prune", candidate.name).random(candidate.size)
    return scores


SCORES: Mapping[str, Callable[[Candidate, Context], Scores]] = {
    "l1": lambda candidate, _: norms(candidate, 1),
    "l2": lambda candidate, _: norms(candidate, 2),
    "random": _random,
}


def uniform(candidates: Sequence[Candidate], ratio: float) -> list[int]:
    """Every candidate keeps the same share, to the nearest width that it may have; 0: nothing."""
    return [candidate.fit(candidate.size * (1 - ratio)) for candidate in candidates]


def beside(candidates: Sequence[Candidate]) -> dict[Candidate, Candidate]:
    """Candidates that are factors of a width of which another one is pruned, and that other one.

    Of ``(groups channels)`` only the one of more positions is pruned, or a width would lose the ratio
    twice.
    """
    chosen: list[Candidate] = []
    left: dict[Candidate, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: -c.size):  # stable: the first of equal ones
        other = next((c for c in chosen if c.group.atom in candidate.factors), None)
        if other is None:
            chosen.append(candidate)
        else:
            left[candidate] = other
    return left


def query_groups(candidate: Candidate) -> int:
    """How many key/value heads share a candidate's position: each has one of its query heads."""
    for relation, letter in candidate.axes.letters[candidate.group.atom]:
        if relation.node.op_type == "Attention" and letter == "r":
            size = relation.axes["n"].size
            return size if isinstance(size, int) else 1
    return 1
