"""Removes whole attentions, FFNs or blocks, the least important ones.

What is removed adds nothing to its residual stream any more, and what nothing needs then goes: weights,
and the caches of attentions. In a post-norm model the norm stays: ``norm(x + f(x))`` becomes ``norm(x)``.
How candidates are scored is told in :mod:`netlathe.passes.drop.scores`, which of them go in
:mod:`netlathe.passes.drop.search`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pydantic

from netlathe.analysis.cost import cost
from netlathe.diagnostics import Diagnostic, PassError, did_you_mean
from netlathe.ir import edit
from netlathe.ir.provenance import matches
from netlathe.passes.drop.candidates import (
    Candidate,
    Choice,
    Kind,
    find_candidates,
    go_together,
    times,
)
from netlathe.passes.drop.editing import remove_caches, take_out
from netlathe.passes.drop.scores import ByOutput, by_stream
from netlathe.passes.drop.search import Goal, cheapest, evenly, greedy
from netlathe.pipeline.ledger import Entry, Status
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Exactness,
    Lossy,
    Pass,
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
    """Remove the least important attentions, FFNs or blocks (LLM-Drop, ShortGPT, LAPTOP-Diff)."""

    name: ClassVar[str] = "drop"
    exactness: ClassVar[Exactness] = Lossy()

    kind: Kind = option(
        default="attention",
        help="what to remove; a block is an attention with its FFN, or a lone branch; joint ranks"
        " attentions and FFNs together",
    )
    count: int | None = option(
        default=None, ge=0, help="how many to remove; 1 where no other goal is given"
    )
    params: float | None = option(
        default=None, gt=0, help="parameters to end with; up to 1 a share of those there are"
    )
    latency: float | None = option(
        default=None, gt=0, help="milliseconds to end with, as the table tells them"
    )
    table: str = option(
        default="",
        help="CSV or JSON file of measured times: candidate, width (1 with it, 0 without), ms (with"
        " latency)",
    )
    score: Literal["cosine", "angular", "kl", "mse", "perplexity", "uniform"] = option(
        default="cosine",
        help="what makes one important: how far it turns the stream (cosine: LLM-Drop; angular), or"
        " how the output differs without it (kl, mse, perplexity); uniform spreads those that go"
        " evenly and needs no data",
    )
    search: Literal["one-shot", "greedy"] = option(
        default="one-shot",
        help="one-shot: score all once; greedy: score those that are left after each removal, by"
        " an output score",
    )
    samples: int = option(
        default=16, ge=0, help="calibration samples that an output score looks at; 0: all"
    )
    ignore: tuple[str, ...] = option(
        default=(),
        help='module paths to keep, whole or in part, with wildcards: "layers.0", "encoder.*"',
    )

    @pydantic.model_validator(mode="after")
    def _fit(self) -> Drop:
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(_GOALS)}, not {' and '.join(given)}")
        if bool(self.table) != (self.latency is not None):
            raise ValueError("latency and table go together")
        if self.search == "greedy" and self.score not in _OUTPUT_SCORES:
            raise ValueError(f"greedy needs a score of the output: {', '.join(_OUTPUT_SCORES)}")
        return self

    def files(self) -> Sequence[Path]:
        """The table of latencies."""
        return (Path(self.table),) if self.table else ()

    def cannot_follow(self, earlier: Pass) -> str:
        """Behind slicing with adapters every skip is a matrix: what is left of a sum is not the stream."""
        if earlier.name == "slice" and earlier.option_values()["adapters"]:
            return "a skip is a matrix by then, so no branch can be left out"
        return ""

    def needs_data(self) -> str:
        """Every score but one is measured, if anything is to go."""
        return "" if self.score == "uniform" or self.count == 0 else f"score={self.score!r}"

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Score every candidate and mark the least important ones as applied, as the goal asks for.

        Raises:
            PassError: the goal is out of reach; a pattern of ``ignore`` matches none; there is no
                calibration data, or the score cannot be had from this model; the table lacks a
                candidate.
        """
        candidates = find_candidates(model, self.kind)
        if not candidates:
            what = "attention or ffn" if self.kind == "joint" else self.kind
            return [Entry(self.kind, "skipped", f"the model has no residual {what}")]
        ignored = self._ignored(candidates)
        removable = [c for c in candidates if not c.reason]
        free = [c for c in removable if c not in ignored]
        goal = self._goal(model, candidates, free)
        free = goal.towards(free)
        nothing = goal.met_by(())
        scores, chosen = ({}, []) if nothing else self._choose(model, removable, free, goal, ctx)
        choice = go_together(model, chosen, len(chosen) if goal.count is None else goal.count)
        if not goal.met_by(choice.chosen):
            raise self._unreachable(candidates, choice, goal)
        entries = []
        for candidate in candidates:
            detail = candidate.detail(scores.get(candidate), choice.leaving)
            status, reason = _decision(candidate, choice, scores)
            if self.latency is not None and not candidate.reason:
                detail["ms"] = goal.saved[candidate]
                reason += f"; it takes {goal.saved[candidate]:.4g} ms"
            if candidate in ignored:
                status, reason = "skipped", f"ignored: it matches {ignored[candidate]!r}"
            left_out = status == "skipped"  # by goal or ignore
            entries.append(Entry(candidate.name, status, reason, candidate.where, detail, left_out))
        return entries

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Put the rest of each sum in its place, and remove what is dead and the caches."""
        applied = [entry for entry in chosen if entry.status == "applied"]
        if not applied:
            return Result(False, list(chosen))
        graph = model.graph
        before = edit.names_in(graph)
        replaced = take_out(
            graph, [(name, at) for e in applied for name, at in e.detail["operands"]]
        )
        remove_caches(graph, _names(applied, "cache_inputs"), _names(applied, "cache_outputs"))
        after = edit.names_in(graph)
        renamed = {name: replaced.get(name) for name in sorted(before - after)}
        parameters = sum(entry.detail["parameters"] for entry in applied)
        statistics = {"removed": float(len(applied)), "parameters": float(parameters)}
        if self.latency is not None:
            statistics["ms"] = sum(entry.detail["ms"] for entry in applied)
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

    def _ignored(self, candidates: Sequence[Candidate]) -> dict[Candidate, str]:
        """Candidate -> the pattern that keeps it."""
        ignored: dict[Candidate, str] = {}
        for pattern in self.ignore:
            found = [c for c in candidates if matches(c.where, pattern)]
            if not found:
                message = f"ignore={pattern!r} matches no {self.kind} of the model"
                help_ = did_you_mean(pattern, [c.where for c in candidates if c.where])
                raise PassError(Diagnostic("drop.ignore", message, help=help_))
            ignored.update((c, pattern) for c in found if c not in ignored)
        return ignored

    def _goal(
        self, model: ir.Model, candidates: Sequence[Candidate], free: Sequence[Candidate]
    ) -> Goal:
        """The goal, which can be met by some of ``free``: that is known before any data is needed."""
        if self.latency is not None:
            whole, saved = times(Path(self.table), candidates)
            goal = Goal(None, max(0.0, whole - self.latency), saved)
        elif self.params is not None:
            total = cost(model).params
            left = self.params * total if self.params <= 1 else self.params
            saved = {candidate: float(candidate.parameters) for candidate in candidates}
            goal = Goal(None, max(0, math.ceil(total - left)), saved)
        else:
            goal = Goal(1 if self.count is None else self.count)
        free = goal.towards(free)
        choice = go_together(model, free, len(free) if goal.count is None else goal.count)
        if not goal.met_by(choice.chosen):
            raise self._unreachable(candidates, choice, goal)
        return goal

    def _unreachable(
        self, candidates: Sequence[Candidate], choice: Choice, goal: Goal
    ) -> PassError:
        possible = len(choice.chosen)
        if goal.count is not None:
            code, help_ = "drop.count", f"set count to {possible} or less"
            message = (
                f"cannot remove {goal.count} of {len(candidates)} {self.kind} candidates:"
                f" {possible} can go"
            )
        elif self.latency is not None:
            least = self.latency + goal.amount - goal.total(choice.chosen)
            code, help_ = "drop.latency", f"give latency={_up(least)} or more, or another kind"
            message = (
                f"latency cannot go down to {self.latency:g} ms: {_up(least)} ms is the least, without"
                f" all {possible} {self.kind} candidates that can go"
            )
        else:
            most = goal.total(choice.chosen)
            code, help_ = "drop.params", "give a larger params, or another kind"
            message = (
                f"cannot remove {goal.amount} parameters: all {possible} {self.kind}"
                f" candidates that can go have {most:.0f}"
            )
        notes = tuple(
            f"{c.shown}: {reason}"
            for c in candidates
            if (reason := c.reason or choice.set_aside.get(c, ("", ""))[1])
        )
        return PassError(Diagnostic(code, message, notes=notes, help=help_))

    def _choose(
        self,
        model: ir.Model,
        removable: Sequence[Candidate],
        free: Sequence[Candidate],
        goal: Goal,
        ctx: Context,
    ) -> tuple[dict[Candidate, float], list[Candidate]]:
        """The scores, and those that go first: the ones that the goal needs, or all in order."""
        if self.score == "uniform":
            return {}, evenly(free, goal)
        if self.score == "cosine" or self.score == "angular":
            found = by_stream(model, removable, self.score, ctx, str(self))
            scores = dict(zip(removable, found, strict=True))
        else:
            outputs = ByOutput(model, self.score, ctx, self.samples, self)
            if self.search == "greedy":
                chosen, scores = greedy(model, free, outputs.without, goal)
                _check_finite(scores)
                return scores, chosen
            scores = dict(zip(removable, outputs.without([[c] for c in removable]), strict=True))
        _check_finite(scores)
        ranked = sorted(free, key=scores.__getitem__)  # stable: ties by order
        if goal.count is not None:
            return scores, ranked
        return scores, cheapest(model, [(c, scores[c]) for c in ranked], goal)


_GOALS = ("count", "params", "latency")
_OUTPUT_SCORES = ("kl", "mse", "perplexity")


def _up(ms: float) -> str:
    """Rounded up, so that it can be reached."""
    return f"{math.ceil(ms * 1e4) / 1e4:.4f}"


def _check_finite(scores: Mapping[Candidate, float]) -> None:
    for candidate, score in scores.items():
        if not math.isfinite(score):
            message = f"the score of {candidate.shown} is {score}"
            raise PassError(Diagnostic("drop.score", message, where=candidate.where))


def _decision(
    candidate: Candidate, choice: Choice, scores: Mapping[Candidate, float]
) -> tuple[Status, str]:
    """Its status and the reason."""
    if candidate.reason:
        return "refused", candidate.reason
    if candidate in choice.set_aside:
        return choice.set_aside[candidate]
    told = f"score {scores[candidate]:.4g}" if candidate in scores else "no score"
    if candidate in choice.chosen:
        gone = sorted({v.name or "" for b in candidate.branches for v in b.cache_inputs})
        caches = [name for name in gone if name in choice.leaving]
        text = f"removed, {candidate.parameters} parameters; {told}"
        if caches:
            text += f"; {', '.join(caches)} gone, other layers' caches keep their numbers"
        return "applied", text
    if not choice.chosen:
        return "skipped", "nothing has to go"
    removed = [scores[c] for c in choice.chosen if c in scores]
    if not removed or candidate not in scores:
        return "skipped", f"{told}; the goal is met without it"
    return "skipped", f"{told}; those removed have at most {max(removed):.4g}"


def _names(entries: Sequence[Entry], key: str) -> Collection[str]:
    """What the applied entries list under ``key``."""
    return {name for e in entries if e.status == "applied" for name in e.detail[key]}
