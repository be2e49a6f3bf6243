"""What is one vocabulary, which may lose tokens, and which token is read in place of one that went.

A vocabulary is the table that ids from the caller are looked up in and the logits that come out, tied or
untied: axis groups of one size, of which the same tokens stay. Nothing in the graph may look at several
tokens at once, and nothing else may know their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes.algebra import atoms, find
from netlathe.analysis.axes.relate import Lookup
from netlathe.ir import weights
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import location
from netlathe.passes.prune.candidates import Candidate, Positions, is_weight_like
from netlathe.passes.prune.choosing import pinned
from netlathe.passes.prune.reference import mixes

Array = npt.NDArray[Any]

_ROWS = 2048  # rows of a table that are held in float32 at a time, twice


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Candidates of which the same tokens stay."""

    candidates: tuple[Candidate, ...]

    @property
    def lookups(self) -> list[Lookup]:
        """Where ids from the caller are looked up in it."""
        return [lookup for candidate in self.candidates for lookup in lookups(candidate)]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The graph inputs that hold its ids."""
        return tuple(dict.fromkeys(lookup.ids.name or "" for lookup in self.lookups))

    def tables(self) -> list[Array]:
        """What is looked up, as ``[v, n]``."""
        found = []
        for candidate in self.candidates:
            for part in candidate.with_role("holds"):
                rows = np.moveaxis(weights.array(part.value), part.dim, 0)
                found.append(rows.reshape(candidate.size, -1))
        return found


def lookups(candidate: Candidate) -> list[Lookup]:
    """Where ids from the caller are looked up in a candidate."""
    every, atom = candidate.axes.related.lookups, candidate.group.atom
    return [lookup for lookup in every if atom in atoms(lookup.axis)]


def outputs(candidate: Candidate) -> list[ir.Value]:
    """The graph outputs that a candidate comes out in."""
    axes = candidate.axes
    return [
        value
        for value in dict.fromkeys(axes.model.graph.outputs)
        for dim in range(len(axes.related.axes.get(value, ())))
        if candidate.group in axes.of(value, dim)
    ]


def vocabularies(
    candidates: Sequence[Candidate],
) -> tuple[list[Vocabulary], dict[Candidate, str]]:
    """The vocabularies among candidates of that scope, and why the others are none.

    Logits and a table of the same size are one vocabulary. A table that has no logits is one where the
    caller gives ids to no other: what tells token ids from positions is that tokens come out again.
    """
    found, refused = [], {}
    sizes: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        sizes[candidate.size].append(candidate)
    for same in sizes.values():
        reasons = {candidate: _reason(candidate) for candidate in same}
        stuck = next((candidate for candidate in same if reasons[candidate]), None)
        if stuck is None:
            reasons = dict.fromkeys(same, _no_vocabulary(same))
        for candidate in same:
            reason = reasons[candidate]
            if stuck is not None and not reason:
                reason = f"it is one vocabulary with {stuck.name}, which stays: {reasons[stuck]}"
            if reason:
                refused[candidate] = reason
        if not any(reasons.values()):
            found.append(Vocabulary(tuple(same)))
    return found, refused


def _reason(candidate: Candidate) -> str:
    """Why a candidate by itself can lose no token; empty where it can."""
    axes, atom = candidate.axes, candidate.group.atom
    for relation, letter in axes.letters[atom]:
        if mixes(relation, letter):
            node = relation.node
            where = f" in {location(node)}" if location(node) else ""
            return f"{node.op_type} looks at several of its tokens ({show_node(node)}){where}"
    for pin in candidate.pins:
        if not pin.caller:
            return pinned(pin)
    for listing in candidate.group.listings:
        node = listing.node
        return f"{node.op_type} reads constant positions of it ({show_node(node)})"
    for lookup in lookups(candidate):
        if find(lookup.axis) is not atom:
            return f"it is a part of what ids are looked up in ({show_node(lookup.node)})"
        if lookup.node.outputs[0].dtype in (ir.DataType.INT32, ir.DataType.INT64):
            return f"its ids are mapped to other ones: it was pruned ({show_node(lookup.node)})"
        if not is_weight_like(lookup.node.inputs[0]):
            return f"ids are looked up in what is no table ({show_node(lookup.node)})"
    for value in outputs(candidate):
        whole = [find(axis) is atom for axis in axes.related.axes[value]]
        if sum(whole) != 1:
            return f"graph output {value.name} has it in parts"
    return ""


def _no_vocabulary(same: Sequence[Candidate]) -> str:
    """Why free candidates of one size are no vocabulary; empty where they are."""
    axes, size = same[0].axes, same[0].size
    tables = [candidate for candidate in same if lookups(candidate)]
    if not tables:
        names = ", ".join(value.name or "" for value in outputs(same[0]))
        others = [pin for group in axes.groups if group.size == size for pin in group.pins]
        computed = [pinned(pin) for pin in others if "looks up" in pin.reason]
        note = "".join(f"; {text}" for text in computed[:1])
        return (
            f"graph output {names} has it, and ids that the caller gives are looked up in no table"
            f" of {size} rows{note}"
        )
    if any(outputs(candidate) for candidate in same):
        inputs = {lookup.ids.name for candidate in tables for lookup in lookups(candidate)}
        if len(tables) > 1 and len(inputs) > 1:
            return (
                f"tables of {size} rows are looked up by {' and '.join(sorted(map(str, inputs)))}"
            )
        return ""
    for value in axes.model.graph.outputs:
        if any(axis.size == size for axis in axes.related.axes.get(value, ())):
            return f"graph output {value.name} has {size} positions that are no one axis with it"
    every = {find(lookup.axis): lookup for lookup in axes.related.lookups}
    if len(every) > 1:
        names = " and ".join(sorted({lookup.ids.name or "" for lookup in every.values()}))
        return (
            f"no logits of its size come out, and {names} look up several tables: which has tokens?"
        )
    return ""


def stand_ins(tables: Sequence[Array], kept: Positions) -> Positions:
    """For every token the one that is read in its place: itself if it stays, else the nearest that does.

    Near is by the cosine of the rows of the tables side by side, in float32; of equally near ones the
    first. A row of zeros is as near to all.
    """
    found = np.arange(len(tables[0]), dtype=np.int64)
    gone = np.setdiff1d(found, kept)
    for start in range(0, len(gone), _ROWS):
        some = gone[start : start + _ROWS]
        rows, best = _unit(tables, some), np.full(len(some), -np.inf, np.float32)
        for at in range(0, len(kept), _ROWS):
            near = kept[at : at + _ROWS]
            cosines = rows @ _unit(tables, near).T
            first = cosines.argmax(1)
            highest = cosines[np.arange(len(some)), first]
            found[some] = np.where(highest > best, near[first], found[some])
            best = np.maximum(best, highest)
    return found


def _unit(tables: Sequence[Array], at: Positions) -> npt.NDArray[np.float32]:
    rows = np.concatenate([table[at].astype(np.float32) for table in tables], axis=1)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1), np.float32)


def counts(vocabulary: Vocabulary, feeds: Sequence[Mapping[str, Array]]) -> npt.NDArray[np.int64]:
    """How often every token is among the ids of ``feeds``, padding included."""
    size = vocabulary.candidates[0].size
    total = np.zeros(size, np.int64)
    for feed in feeds:
        for name in vocabulary.inputs:
            ids = np.asarray(feed[name]).reshape(-1).astype(np.int64)
            total += np.bincount(ids % size, minlength=size)  # -1 is the last one, as for Gather
    return total
