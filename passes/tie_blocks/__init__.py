"""Lets blocks use the weights of another one: they are stored once and read several times.

    layers.4: y = f(x; w4), layers.5: y = f(x; w5)   ->   layers.5: y = f(x; w4)

Blocks stay where they are, with their own norms, key-value caches and places in the model, so the model
computes as much as before and its depth is left to tune: FoldGPT (arXiv 2407.00928, section 3.2) tunes what
was tied. Which blocks are alike is found by the graph (:mod:`netlathe.passes.tie_blocks.alike`); of those
near each other, the ones that lose least go together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir
import pydantic

from netlathe.analysis.cost import cost
from netlathe.diagnostics import Diagnostic, PassError, did_you_mean
from netlathe.ir import edit, weights
from netlathe.ir.provenance import matches
from netlathe.passes.drop.candidates import Candidate, find_candidates
from netlathe.passes.drop.scores import ByOutput
from netlathe.passes.tie_blocks import alike
from netlathe.pipeline.ledger import Entry
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

# Both models do the same arithmetic on the same numbers. What a runtime may do otherwise is sum in another
# order: 8 roundings of a float32 at the output's RMS.
_TOLERANCE = 2.0**-20


@dataclass(frozen=True, eq=False)
class Tie:
    """A block that would use the weights of another one."""

    block: Candidate
    source: Candidate
    pairs: alike.Pairs

    @property
    def parameters(self) -> int:
        """How many go."""
        return sum(v.const_value.size for v in self.pairs if v.const_value is not None)

    @property
    def names(self) -> list[tuple[str, str]]:
        """The weights that would go, each with what stands in for it, by name."""
        return [(gone.name or "", kept.name or "") for gone, kept in self.pairs.items()]

    def beside(self, others: Sequence[Tie]) -> bool:
        """Whether it can be made with those: nobody takes from a block that has nothing of its own."""
        return not any(
            self.block in (tie.block, tie.source) or self.source is tie.block for tie in others
        )


@options
class TieBlocks(ChoosingPass):
    """Let blocks use the weights of a block nearby, which are stored once (FoldGPT)."""

    name: ClassVar[str] = "tie_blocks"
    keeps_operators: ClassVar[bool] = True
    exactness: ClassVar[Exactness] = Lossy()

    kind: Literal["attention", "ffn", "block"] = option(
        default="block", help="what to tie; a block is an attention with its FFN, or a lone branch"
    )
    count: int | None = option(
        default=None,
        ge=0,
        help="how many give their weights up; 1 where no other goal is given",
    )
    params: float | None = option(
        default=None, gt=0, help="parameters to end with; up to 1 a share of those there are"
    )
    score: Literal["mse", "kl"] = option(
        default="mse", help="how far the output is from what it was: what makes two blocks alike"
    )
    search: Literal["one-shot", "greedy"] = option(
        default="one-shot",
        help="one-shot: score all once; greedy: score those that are left after each",
    )
    distance: int = option(default=1, ge=1, help="how many blocks apart those that are tied may be")
    samples: int = option(default=16, ge=0, help="calibration samples that scores look at; 0: all")
    ignore: tuple[str, ...] = option(
        default=(), help="module paths that keep weights of their own, with wildcards"
    )

    @pydantic.model_validator(mode="after")
    def _fit(self) -> TieBlocks:
        if self.count is not None and self.params is not None:
            raise ValueError("give one of count and params, not both")
        return self

    def cannot_follow(self, earlier: Pass) -> str:
        """Codes of two blocks have scales of their own, and integers multipliers."""
        return "weights are codes by then" if earlier.name == "quantize" else ""

    def needs_data(self) -> str:
        """Scores are measured, if anything is to go."""
        return "" if self.count == 0 else f"score={self.score!r}"

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Score every pair of alike blocks that are near each other, and tie those that lose least.

        Raises:
            PassError: the goal is out of reach; a pattern of ``ignore`` matches none; there is no
                calibration data, or the score cannot be had from this model.
        """
        candidates = find_candidates(model, self.kind)
        if not candidates:
            return [Entry(self.kind, "skipped", f"the model has no residual {self.kind}")]
        ignored = self._ignored(candidates)
        reasons, able = self._able(candidates, ignored)
        goal = self._goal(model)
        if not goal.met_by(possible := most(able)):
            raise self._unreachable(possible, reasons, goal)
        chosen, scores = self._choose(model, able, goal, ctx)
        taken = {tie.block: tie for tie in chosen}
        lent = {tie.source: tie for tie in chosen}
        entries = []
        for candidate in candidates:
            name, where = candidate.name, candidate.where
            own = [tie for tie in able if tie.block is candidate and tie in scores]
            best = taken.get(candidate) or min(own, key=scores.__getitem__, default=None)
            detail, told = _told(best, scores)
            if candidate in ignored:
                reason = f"ignored: it matches {ignored[candidate]!r}"
                entries.append(Entry(name, "skipped", reason, where, detail, True))
            elif candidate in reasons:
                entries.append(Entry(name, "refused", reasons[candidate], where, detail))
            elif best is not None and candidate in taken:
                detail |= {"weights": [list(pair) for pair in best.names]}
                reason = (
                    f"uses the weights of {best.source.shown}, {detail['parameters']} parameters"
                )
                entries.append(Entry(name, "applied", f"{reason} gone; {told}", where, detail))
            else:
                reason = "nothing has to go" if goal.met_by(()) else f"{told}; the goal is met"
                if candidate in lent:
                    reason = f"{lent[candidate].block.shown} uses its weights"
                entries.append(Entry(name, "skipped", reason, where, detail, True))
        return entries

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Let what reads a weight that goes read the other one."""
        pairs = _pairs(chosen)
        if not pairs:
            return Result(False, list(chosen))
        _tie(model.graph, pairs)
        applied = [entry for entry in chosen if entry.status == "applied"]
        parameters = sum(entry.detail["parameters"] for entry in applied)
        statistics = {"tied": float(len(applied)), "parameters": float(parameters)}
        return Result(True, list(chosen), dict.fromkeys(gone for gone, _ in pairs), statistics)

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The model with all its weights, in which those that go hold copies of the others' numbers."""
        held = before.graph.initializers
        copies = {gone: weights.array(held[kept]).copy() for gone, kept in _pairs(chosen)}
        for name, array in copies.items():
            held[name].const_value = ir.tensor(array, held[name].dtype, name=name)
        return Reference(before, _TOLERANCE)

    # -- choosing ---------------------------------------------------------------------------------

    def _ignored(self, candidates: Sequence[Candidate]) -> dict[Candidate, str]:
        """Candidate -> the pattern that lets it keep its weights."""
        ignored: dict[Candidate, str] = {}
        for pattern in self.ignore:
            found = [c for c in candidates if matches(c.where, pattern)]
            if not found:
                message = f"ignore={pattern!r} matches no {self.kind} of the model"
                help_ = did_you_mean(pattern, [c.where for c in candidates if c.where])
                raise PassError(Diagnostic("tie_blocks.ignore", message, help=help_))
            ignored.update((c, pattern) for c in found if c not in ignored)
        return ignored

    def _able(
        self, candidates: Sequence[Candidate], ignored: Mapping[Candidate, str]
    ) -> tuple[dict[Candidate, str], list[Tie]]:
        """Why blocks cannot be tied, and the ties that can be made, in order."""
        reasons: dict[Candidate, str] = {}
        able: list[Tie] = []
        for one, other in alike.neighbours(len(candidates), self.distance):
            block, source = candidates[one], candidates[other]
            try:
                pairs = alike.matched(block, source)
                reason = alike.hindrance(block, pairs)
            except alike.Unlike as error:
                pairs, reason = {}, str(error)
            if reason:
                reasons.setdefault(block, reason)
            elif block not in ignored:
                able.append(Tie(block, source, pairs))
        some = {tie.block for tie in able} | ignored.keys()
        if len(candidates) == 1:
            reasons[candidates[0]] = "the model has no other"
        return {block: why for block, why in reasons.items() if block not in some}, able

    def _goal(self, model: ir.Model) -> Goal:
        if self.params is None:
            return Goal(1 if self.count is None else self.count)
        total = cost(model).params
        left = self.params * total if self.params <= 1 else self.params
        return Goal(None, max(0, math.ceil(total - left)))

    def _unreachable(
        self, possible: Sequence[Tie], reasons: Mapping[Candidate, str], goal: Goal
    ) -> PassError:
        if goal.count is not None:
            message = f"cannot tie {goal.count} {self.kind} candidates: {len(possible)} can be"
            help_ = f"set count to {len(possible)} or less, or let distance be larger"
        else:
            most = sum(tie.parameters for tie in possible)
            message = (
                f"cannot remove {goal.parameters} parameters: the {len(possible)} {self.kind}"
                f" candidates that can be tied have {most}"
            )
            help_ = "give a larger params, or let distance be larger"
        notes = tuple(f"{c.shown}: {reason}" for c, reason in reasons.items())
        return PassError(Diagnostic(f"{self.name}.goal", message, notes=notes, help=help_))

    def _choose(
        self, model: ir.Model, able: Sequence[Tie], goal: Goal, ctx: Context
    ) -> tuple[list[Tie], dict[Tie, float]]:
        """The ties that are made, and the last score of each."""
        scores: dict[Tie, float] = {}
        chosen: list[Tie] = []
        if goal.met_by(()):
            return chosen, scores
        outputs = ByOutput(model, self.score, ctx, self.samples, self)
        while not goal.met_by(chosen):
            free = [tie for tie in able if tie.beside(chosen)]
            if self.search == "greedy" or not chosen:
                found = outputs.after([_change([*chosen, tie]) for tie in free], "after ties")
                scores.update(zip(free, found, strict=True))
                self._check_finite(scores)
            # The goal stays in reach: of those that can be made with the chosen ones, the first can go.
            ranked = sorted(free, key=scores.__getitem__)
            chosen.append(next(t for t in ranked if goal.met_by(most(able, [*chosen, t]))))
        return chosen, scores

    def _check_finite(self, scores: Mapping[Tie, float]) -> None:
        for tie, score in scores.items():
            if not math.isfinite(score):
                message = f"the score of {tie.block.shown} with {tie.source.shown} is {score}"
                raise PassError(Diagnostic(f"{self.name}.score", message, where=tie.block.where))


@dataclass(frozen=True)
class Goal:
    """How many blocks give their weights up, or how many parameters must go."""

    count: int | None
    parameters: int = 0

    def met_by(self, chosen: Sequence[Tie]) -> bool:
        """Whether that is enough."""
        if self.count is not None:
            return len(chosen) >= self.count
        return sum(tie.parameters for tie in chosen) >= self.parameters


def most(able: Sequence[Tie], chosen: Sequence[Tie] = ()) -> list[Tie]:
    """The chosen ones, and as many more as can be made by going through ``able`` in order."""
    made = list(chosen)
    for tie in able:
        if tie.beside(made):
            made.append(tie)
    return made


def _told(tie: Tie | None, scores: Mapping[Tie, float]) -> tuple[dict[str, Any], str]:
    """What an entry says of the best tie of a block."""
    if tie is None:
        return {}, "no score"
    detail = {"with": tie.source.shown, "parameters": tie.parameters, "score": scores[tie]}
    return detail, f"score {scores[tie]:.4g} with {tie.source.shown}"


def _change(ties: Sequence[Tie]) -> Callable[[ir.Graph], None]:
    pairs = [pair for tie in ties for pair in tie.names]
    return lambda graph: _tie(graph, pairs)


def _tie(graph: ir.Graph, pairs: Sequence[tuple[str, str]]) -> None:
    held = dict(graph.initializers)
    for gone, kept in pairs:
        edit.redirect(held[gone], held[kept])
        edit.drop_if_unread(held[gone])


def _pairs(chosen: Sequence[Entry]) -> list[tuple[str, str]]:
    """The weights that go and what stands in for each, by name."""
    applied = [entry for entry in chosen if entry.status == "applied"]
    return [(gone, kept) for entry in applied for gone, kept in entry.detail["weights"]]
