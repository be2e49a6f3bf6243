"""What can be kept or removed as one: a branch, or the branches of a block."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from netlathe.analysis import latency
from netlathe.analysis.blocks import blocks
from netlathe.analysis.branches import Branch, removal, residual_branches
from netlathe.analysis.cost import is_parameter
from netlathe.diagnostics import Diagnostic, PassError
from netlathe.ir.provenance import matches
from netlathe.passes.drop.editing import Place
from netlathe.pipeline.ledger import Status

Kind = Literal["attention", "ffn", "block", "joint"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Branches that are kept or removed as one."""

    name: str  # unique in the model
    where: str
    branches: tuple[Branch, ...]
    ends: tuple[ir.Value, ir.Value] | None  # of a block: the stream before and after it
    parameters: int  # that go with it
    reason: str  # why it cannot be removed

    @property
    def shown(self) -> str:
        """What a reader knows it by."""
        return self.where or self.name

    @property
    def places(self) -> list[Place]:
        """The operands that are taken out."""
        return [(b.join.outputs[0].name or "", b.term.position) for b in self.branches]

    def detail(self, score: float | None, leaving: Collection[str]) -> dict[str, Any]:
        """What is decided about, by name; ``leaving`` are the caches that go with all that goes."""
        inputs = [v.name for b in self.branches for v in b.cache_inputs if v.name in leaving]
        outputs = [v.name for b in self.branches for v in b.cache_outputs if v.name in leaving]
        detail: dict[str, Any] = {
            "operands": [list(place) for place in self.places],
            "cache_inputs": inputs,
            "cache_outputs": outputs,
            "parameters": self.parameters,
        }
        return detail if score is None else {"score": score, **detail}


def find_candidates(model: ir.Model, kind: Kind) -> list[Candidate]:
    """Every branch or block of that kind, those that cannot be removed as well, in order."""
    branches = residual_branches(model)
    if kind == "block":
        return [
            Candidate(
                f"block {number}",
                block.module_path,
                block.branches,
                (block.start, block.end),
                _parameters(model, block.branches),
                block.reason,
            )
            for number, block in enumerate(blocks(branches))
        ]
    kinds = ("attention", "ffn") if kind == "joint" else (kind,)
    return [
        Candidate(
            branch.value.name or "",
            branch.module_path,
            (branch,),
            None,
            _parameters(model, (branch,)),
            branch.reason,
        )
        for branch in branches
        if branch.kind in kinds
    ]


def _parameters(model: ir.Model, branches: Sequence[Branch]) -> int:
    gone = removal(model, branches).weights
    return sum(v.const_value.size for v in gone if v.const_value is not None and is_parameter(v))


def times(path: Path, candidates: Sequence[Candidate]) -> tuple[float, dict[Candidate, float]]:
    """Milliseconds of the model by a table, and what goes with each candidate (0 where it cannot go).

    The table has the model with each candidate (width 1) and without it (width 0); see
    :mod:`netlathe.analysis.latency`.

    Raises:
        PassError: it is no such table, lacks a candidate, or has others.
    """
    table = latency.read(path, "drop.table")
    whole, saved, problems = 0.0, dict[Candidate, float](), list[Diagnostic]()
    strange = {row for row, _, _ in table.rows}
    for candidate in candidates:
        widths, ms = table.of(candidate.name, [candidate.where])
        strange -= {n for n in strange if n == candidate.name or matches(candidate.where, n)}
        wanted = [1.0] if candidate.reason else [0.0, 1.0]
        if [width for width in widths if width in wanted] != wanted:
            known = (
                f"has the widths {', '.join(f'{w:g}' for w in widths)} of it"
                if widths
                else "lacks it"
            )
            message = f"the table {known}, not 1 (with it) and 0 (without)"
            where = candidate.where
            problems.append(Diagnostic("drop.table", message, at=candidate.name, where=where))
            continue
        whole += ms[widths.index(1.0)]
        saved[candidate] = 0.0 if candidate.reason else ms[widths.index(1.0)] - ms[0]
    for row in sorted(strange):
        message = "the table has what is no candidate here, so its rows do not add up to the model"
        help_ = "measure one for this kind: benchmarks/latency_table.py --drop KIND"
        problems.append(Diagnostic("drop.table", message, at=row, help=help_))
    if problems:
        raise PassError(problems)
    return whole, saved


# -- together -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Candidates that go together, and what goes with them."""

    chosen: Sequence[Candidate]
    set_aside: dict[Candidate, tuple[Status, str]]  # unimportant or not, they cannot go with those
    leaving: Collection[str]  # inputs and outputs of the model that go


def go_together(model: ir.Model, ranked: Sequence[Candidate], count: int) -> Choice:
    """The first ``count`` of ``ranked`` that can go together."""
    chosen: list[Candidate] = []
    set_aside: dict[Candidate, tuple[Status, str]] = {}
    for candidate in ranked:
        if len(chosen) == count:
            break
        if reason := beside(model, candidate, chosen):
            set_aside[candidate] = reason
        else:
            chosen.append(candidate)
    gone = removal(model, [b for c in chosen for b in c.branches])
    leaving = {v.name or "" for v in (*gone.cache_inputs, *gone.cache_outputs)}
    return Choice(chosen, set_aside, leaving)


def beside(
    model: ir.Model, candidate: Candidate, chosen: Sequence[Candidate]
) -> tuple[Status, str] | None:
    """Why a candidate cannot go with those that were chosen; None where it can."""
    if other := next((c for c in chosen if _overlap(candidate, c)), None):
        return "skipped", f"it overlaps with {other.shown}, which is removed"
    branches = [branch for c in (*chosen, candidate) for branch in c.branches]
    if not any(b.cache_inputs for b in branches):  # only caches tie branches to each other
        return None
    reason = removal(model, branches).reason
    return ("refused", reason) if reason else None


def _overlap(a: Candidate, b: Candidate) -> bool:
    """Whether a branch of one lies inside a branch of the other."""
    pairs = [(x, y) for x in a.branches for y in b.branches]
    return any(x.join in y.region or y.join in x.region for x, y in pairs)
