"""Removes whole attentions, FFNs or blocks whose removal turns the residual stream the least.

The importance of a branch f on a stream x is ``S = 1 - E[cos(x, x + f(x))]``, the mean over all tokens
of the calibration data (LLM-Drop, arXiv 2406.15786, section 3); of a block it is 1 - E[cos] between
the stream before and after it. All scores come from one sweep over the model as it is before the pass
(one-shot, as in the paper). In a post-norm model the norm stays: ``norm(x + f(x))`` becomes ``norm(x)``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from netlathe.analysis.blocks import blocks
from netlathe.analysis.branches import Branch, removal, residual_branches
from netlathe.analysis.cost import is_parameter
from netlathe.analysis.removal import same_size
from netlathe.diagnostics import Diagnostic, PassError, did_you_mean, missing_extra
from netlathe.ir import edit
from netlathe.ir.provenance import matches
from netlathe.pipeline.ledger import Entry, Status
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Exactness,
    Lossy,
    Reference,
    Result,
    option,
    options,
)

# x + 0 is x in every float format, so both models do the same arithmetic on the same numbers. What a
# runtime may do otherwise is sum in another order: 8 roundings of a float32 at the output's RMS.
_TOLERANCE = 2.0**-20


@options
class Drop(ChoosingPass):
    """Remove the attentions, FFNs or blocks that turn the residual stream the least (LLM-Drop)."""

    name: ClassVar[str] = "drop"
    exactness: ClassVar[Exactness] = Lossy()

    kind: Literal["attention", "ffn", "block"] = option(
        default="attention",
        help="what to remove; a block is an attention with its FFN, or a lone branch",
    )
    count: int = option(default=1, ge=0, help="how many to remove")
    score: Literal["cosine"] = option(
        default="cosine", help="cosine: the less the stream turns (LLM-Drop), the less important"
    )
    ignore: tuple[str, ...] = option(
        default=(),
        help='module paths to keep, whole or in part, with wildcards: "layers.0", "encoder.*"',
    )

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Score every candidate and mark the ``count`` least important ones as applied.

        Raises:
            PassError: fewer candidates can be removed than asked for; a pattern of ``ignore`` matches
                none; there is no calibration data.
        """
        candidates = _candidates(model, self.kind)
        if not candidates:
            return [Entry(self.kind, "skipped", f"the model has no residual {self.kind}")]
        ignored = self._ignored(candidates)
        removable = [c for c in candidates if not c.reason]
        free = [c for c in removable if c.name not in ignored]
        self._check_count(candidates, _choose(model, free, self.count))
        scores = self._scores(model, removable, ctx) if self.count else {}
        free.sort(key=lambda candidate: scores.get(candidate.name, 0.0))  # stable: ties by order
        choice = _choose(model, free, self.count)
        self._check_count(candidates, choice)
        entries = []
        for candidate in candidates:
            detail = candidate.detail(scores.get(candidate.name), choice.leaving)
            status, reason = candidate.decision(choice, scores)
            if candidate.name in ignored:
                status, reason = "skipped", f"ignored: it matches {ignored[candidate.name]!r}"
            left_out = status == "skipped"  # by count or ignore
            entries.append(Entry(candidate.name, status, reason, candidate.where, detail, left_out))
        return entries

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Put the rest of each sum in its place, and remove what is dead and the caches."""
        applied = [entry for entry in chosen if entry.status == "applied"]
        if not applied:
            return Result(False, list(chosen))
        graph = model.graph
        before = edit.names_in(graph)
        replaced = _take_out(graph, applied)
        _remove_caches(graph, applied)
        after = edit.names_in(graph)
        renamed = {name: replaced.get(name) for name in sorted(before - after)}
        parameters = sum(entry.detail["parameters"] for entry in applied)
        statistics = {"removed": float(len(applied)), "parameters": float(parameters)}
        return Result(True, list(chosen), renamed, statistics)

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The model at its original shapes in which the removed branches add zero.

        The zero is selected, not multiplied: a branch may hold NaN or infinity (a row of a mask
        that lets nothing through), which the removed one does not add.
        """
        graph = before.graph
        values = {v.name: v for node in graph for v in node.outputs}
        taken = edit.names_in(graph)
        never = edit.constant(graph, np.array(False), "drop/never", taken)
        for entry in chosen:
            if entry.status != "applied":
                continue
            for name, position in entry.detail["operands"]:
                join = values[name].producer()
                value = join.inputs[position] if join is not None else None
                assert join is not None and value is not None and value.dtype is not None
                array = np.zeros((), value.dtype.numpy())
                zero = edit.constant(graph, ir.tensor(array, value.dtype), "drop/zero", taken)
                nothing = edit.node("Where", [never, value, zero], dtype=value.dtype)
                nothing.outputs[0].name = edit.unique_name(graph, f"{value.name}/zero", taken)
                nothing.outputs[0].shape = value.shape
                graph.insert_before(join, nothing)
                join.replace_input_with(position, nothing.outputs[0])
        gone = _names(chosen, "cache_outputs")
        for value in [v for v in graph.outputs if v.name in gone]:
            graph.outputs.remove(value)
        return Reference(before, _TOLERANCE)

    # -- choosing ---------------------------------------------------------------------------------

    def _ignored(self, candidates: Sequence[_Candidate]) -> dict[str, str]:
        """Candidate -> the pattern that keeps it."""
        ignored: dict[str, str] = {}
        for pattern in self.ignore:
            names = [c.name for c in candidates if matches(c.where, pattern)]
            if not names:
                message = f"ignore={pattern!r} matches no {self.kind} of the model"
                help_ = did_you_mean(pattern, [c.where for c in candidates if c.where])
                raise PassError(Diagnostic("drop.ignore", message, help=help_))
            ignored.update((name, pattern) for name in names if name not in ignored)
        return ignored

    def _check_count(self, candidates: Sequence[_Candidate], choice: _Choice) -> None:
        possible = len(choice.chosen)
        if possible >= self.count:
            return
        raise PassError(
            Diagnostic(
                "drop.count",
                f"cannot remove {self.count} of {len(candidates)} {self.kind} candidates:"
                f" {possible} can go",
                notes=tuple(
                    f"{c.where or c.name}: {reason}"
                    for c in candidates
                    if (reason := c.reason or choice.set_aside.get(c.name, ("", ""))[1])
                ),
                help=f"set count to {possible} or less",
            )
        )

    def _scores(
        self, model: ir.Model, candidates: Sequence[_Candidate], ctx: Context
    ) -> dict[str, float]:
        try:
            from netlathe.execute.statistics import CosineSimilarity
        except ModuleNotFoundError as error:
            raise missing_extra("torch", "torch", f"{self.name} by score") from error
        probed = model.clone()
        wanted = []
        for candidate, (a, b) in zip(candidates, _streams(probed, candidates), strict=True):
            axis = candidate.branches[0].channel_axis
            wanted.append(CosineSimilarity(a, b, axis))
        results = ctx.collect(probed, wanted, needed_by=str(self))
        scores = {}
        for candidate, result in zip(candidates, results, strict=True):
            scores[candidate.name] = 1.0 - result.scalar
            if not math.isfinite(result.scalar):
                message = f"the score of {candidate.where or candidate.name} is {result.scalar}"
                raise PassError(Diagnostic("drop.score", message, where=candidate.where))
        return scores


# -- candidates -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Candidate:
    """What is kept or removed as one: a branch, or the branches of a block."""

    name: str  # unique in the model
    where: str
    branches: tuple[Branch, ...]
    ends: tuple[ir.Value, ir.Value] | None  # of a block: the stream before and after it
    parameters: int
    reason: str  # why it cannot be removed

    def detail(self, score: float | None, leaving: Collection[str]) -> dict[str, Any]:
        """What is decided about, by name; ``leaving`` are the caches that go with all that goes."""
        inputs = [v.name for b in self.branches for v in b.cache_inputs if v.name in leaving]
        outputs = [v.name for b in self.branches for v in b.cache_outputs if v.name in leaving]
        detail: dict[str, Any] = {
            "operands": [[b.join.outputs[0].name, b.term.position] for b in self.branches],
            "cache_inputs": inputs,
            "cache_outputs": outputs,
            "parameters": self.parameters,
        }
        return detail if score is None else {"score": score, **detail}

    def decision(self, choice: _Choice, scores: Mapping[str, float]) -> tuple[Status, str]:
        """Its status and the reason."""
        if self.reason:
            return "refused", self.reason
        if self.name in choice.set_aside:
            return choice.set_aside[self.name]
        score = scores.get(self.name)
        if score is None:
            return "skipped", "count is 0"
        if self in choice.chosen:
            gone = sorted({v.name or "" for b in self.branches for v in b.cache_inputs})
            caches = [name for name in gone if name in choice.leaving]
            text = f"removed, {self.parameters} parameters; score {score:.4g}"
            if caches:
                text += f"; {', '.join(caches)} gone, other layers' caches keep their numbers"
            return "applied", text
        most = max(scores[candidate.name] for candidate in choice.chosen)
        return "skipped", f"score {score:.4g}; those removed have at most {most:.4g}"


def _candidates(model: ir.Model, kind: str) -> list[_Candidate]:
    branches = residual_branches(model)
    if kind == "block":
        return [
            _Candidate(
                f"block {number}",
                block.module_path,
                block.branches,
                (block.start, block.end),
                _parameters(model, block.branches),
                block.reason,
            )
            for number, block in enumerate(blocks(branches))
        ]
    return [
        _Candidate(
            branch.value.name or "",
            branch.module_path,
            (branch,),
            None,
            _parameters(model, (branch,)),
            branch.reason,
        )
        for branch in branches
        if branch.kind == kind
    ]


def _parameters(model: ir.Model, branches: Sequence[Branch]) -> int:
    gone = removal(model, branches).weights
    return sum(v.const_value.size for v in gone if v.const_value is not None and is_parameter(v))


# -- choosing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    chosen: Sequence[_Candidate]
    set_aside: Mapping[str, tuple[Status, str]]  # more important or not, it cannot go with those
    leaving: Collection[str]  # inputs and outputs of the model that go


def _choose(model: ir.Model, ranked: Sequence[_Candidate], count: int) -> _Choice:
    """The first ``count`` of ``ranked`` that can go together."""
    chosen: list[_Candidate] = []
    set_aside: dict[str, tuple[Status, str]] = {}
    for candidate in ranked:
        if len(chosen) == count:
            break
        if other := next((c for c in chosen if _overlap(candidate, c)), None):
            reason = f"it overlaps with {other.where or other.name}, which is removed"
            set_aside[candidate.name] = ("skipped", reason)
        elif reason := _joint_reason(model, [*chosen, candidate]):
            set_aside[candidate.name] = ("refused", reason)
        else:
            chosen.append(candidate)
    gone = removal(model, [b for c in chosen for b in c.branches])
    leaving = {v.name or "" for v in (*gone.cache_inputs, *gone.cache_outputs)}
    return _Choice(chosen, set_aside, leaving)


def _overlap(a: _Candidate, b: _Candidate) -> bool:
    """Whether a branch of one lies inside a branch of the other."""
    pairs = [(x, y) for x in a.branches for y in b.branches]
    return any(x.join in y.region or y.join in x.region for x, y in pairs)


def _joint_reason(model: ir.Model, candidates: Sequence[_Candidate]) -> str:
    """Why they cannot go together; only caches tie branches to each other."""
    branches = [branch for candidate in candidates for branch in candidate.branches]
    return removal(model, branches).reason if any(b.cache_inputs for b in branches) else ""


def _streams(model: ir.Model, candidates: Sequence[_Candidate]) -> Iterator[tuple[str, str]]:
    """The names of the stream without and with each candidate.

    ``model`` is a copy. Where branches are parallel, no value is the stream with only one of them:
    it gets that sum.
    """
    graph = model.graph
    values = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    taken = edit.names_in(graph)
    for candidate in candidates:
        branch = candidate.branches[0]
        if candidate.ends is not None:
            start, end = candidate.ends
            yield start.name or "", end.name or ""
        elif not branch.is_parallel:
            yield branch.skip.name or "", branch.total.name or ""
        else:
            skip, value = values[branch.skip.name], values[branch.value.name]
            probe = edit.node("Add", [skip, value], dtype=skip.dtype, shape=skip.shape)
            name = edit.unique_name(graph, f"{skip.name}+{value.name}", taken)
            probe.outputs[0].name = name
            graph.append(probe)
            yield skip.name or "", name


def _names(entries: Sequence[Entry], key: str) -> set[str]:
    """What the applied entries list under ``key``."""
    return {name for e in entries if e.status == "applied" for name in e.detail[key]}


# -- editing --------------------------------------------------------------------------------------


def _take_out(graph: ir.Graph, applied: Sequence[Entry]) -> dict[str, str]:
    """Replace every Add that loses an operand by the other one; sum -> what stands for it."""
    makers = {value.name: node for node in graph for value in node.outputs}
    lost = {
        (makers[name], position) for entry in applied for name, position in entry.detail["operands"]
    }
    names: dict[str, str] = {}
    joins = []
    for join in list(graph):  # in order: a sum that lost both operands is lost to a later one
        at = [position for position in (0, 1) if (join, position) in lost]
        if not at:
            continue
        joins.append(join)
        total, rest = join.outputs[0], join.inputs[1 - at[0]]
        assert rest is not None
        if len(at) == 2:
            lost.update((use.node, use.idx) for use in total.uses())
            continue
        old, stood_for = total.name or "", rest.name or ""
        edit.redirect(total, rest)
        names[old] = stood_for
        if rest.name != stood_for:  # it took over the name of an output of the model
            names = {name: old if by == stood_for else by for name, by in names.items()}
            names[stood_for] = names[old] = old
    edit.remove_dead(graph, joins)
    return names


def _remove_caches(graph: ir.Graph, applied: Sequence[Entry]) -> None:
    """Remove the past and present keys and values that the ledger names."""
    outputs, leaving = _names(applied, "cache_outputs"), _names(applied, "cache_inputs")
    for value in [v for v in graph.outputs if v.name in outputs]:
        graph.outputs.remove(value)
        if (maker := value.producer()) is not None:
            edit.remove_dead(graph, [maker])
    staying = [value for value in graph.inputs if value.name not in leaving]
    for value in [v for v in graph.inputs if v.name in leaving]:
        for use in list(value.uses()):  # the length of the past, which other caches have as well
            other = same_size(use.node, staying)
            assert other is not None  # choose refuses what has no such input
            use.node.replace_input_with(use.idx, other)
        graph.inputs.remove(value)
