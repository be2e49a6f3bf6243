"""Which candidates are pruned together, and what their positions count."""

from __future__ import annotations

from collections.abc import Sequence

from netlathe.analysis.axes import Pin
from netlathe.ir.printing import show_node
from netlathe.passes.prune.candidates import Candidate


def beside(
    candidates: Sequence[Candidate], named: Sequence[str] = ()
) -> dict[Candidate, Candidate]:
    """Candidates that are factors of a width of which another one is pruned, and that other one.

    Of ``(groups channels)`` only the one of more positions is pruned, or a width would lose the ratio
    twice. Factors of scopes that are ``named`` one beside the other are all pruned: key/value heads, and
    the query heads of each.
    """
    chosen: list[Candidate] = []
    left: dict[Candidate, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: -c.size):  # stable: the first of equal ones
        others = [c for c in chosen if c.group.atom in candidate.factors]
        if candidate.scope in named:
            others = [c for c in others if c.scope == candidate.scope or c.scope not in named]
        other = next(iter(others), None)
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


def pinned(pin: Pin) -> str:
    """Why something is pinned, with the operator and module that pin it."""
    at = f" ({show_node(pin.node)})" if pin.node is not None else ""
    where = f" in {pin.where}" if pin.where else ""
    return f"{pin.reason}{at}{where}"
