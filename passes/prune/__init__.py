"""Removes positions of axes: channels, FFN neurons, heads, key/value groups, experts, hidden width, tokens.

    y = MatMul(Gelu(MatMul(x, w1: f32[k,n])), w2: f32[n,m])
    ->  y = MatMul(Gelu(MatMul(x, w1: f32[k,n'])), w2: f32[n',m])

What is one axis, and all that must change with it, is found by the axis analysis; this pass chooses
which positions go: by a score for each (`scores`), and by how many each width loses (`allocation`). Of the
rest every weight keeps its numbers, unless those that sum over a width are to make up for what went
(`compensation`). A key-value cache that the model takes and gives back is narrowed as its heads are; the
model records which are left (`netlathe.ir.interface`). So are the logits where tokens of the vocabulary go;
the ids that the model takes stay what they were (`vocabulary`). docs/pruning-quality.md tells what measures
best.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pydantic

from netlathe.analysis import axes as axis_analysis
from netlathe.analysis.axes import Axes, Group
from netlathe.analysis.axes.selection import Positions, Selection
from netlathe.analysis.cost import cost
from netlathe.diagnostics import Diagnostic, PassError, did_you_mean
from netlathe.ir import edit, interface, provenance
from netlathe.passes.prune import budget as budgets
from netlathe.passes.prune import compensation, reference
from netlathe.passes.prune.allocation import ALLOCATIONS, Allocation, Spread, together
from netlathe.passes.prune.candidates import SCOPES, Candidate, Scope, Scores, find_candidates
from netlathe.passes.prune.choosing import beside, pinned, query_groups
from netlathe.passes.prune.scores import SCORES, measure, speaks_about
from netlathe.passes.prune.vocabulary import Vocabulary, outputs, stand_ins, vocabularies
from netlathe.pipeline.ledger import Entry, Status
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Equivalent,
    Exactness,
    Lossy,
    Pass,
    Reference,
    Result,
    option,
    options,
)
from netlathe.pipeline.verification import tolerance

# The edited model and its masked reference sum the same numbers, zeros apart, in another order. A sum of
# 8192 terms then differs by 84 ulp = 1e-5 of its RMS (see verification); through 100 layers, by
# sqrt(100) times that.
TOLERANCE = 1e-4
Score = Literal[
    "l1",
    "l2",
    "group_norm",
    "fpgm",
    "bn_gamma",
    "wanda",
    "flap",
    "cfsp",
    "taylor",
    "obd",
    "optin",
    "frequency",
    "random",
]
Allocated = Literal["uniform", "global", "isomorphic", "flap", "cfsp", "layer_adaptive"]
_IN_LOSS = ("taylor", "obd")  # scores that compare between widths
STAND_INS = "stand_ins"  # an array of an entry: for each token the one that is read for it
_GOALS = ("ratio", "keep", "params", "macs", "bytes", "latency")


@options
class Prune(ChoosingPass):
    """Remove the least important channels, FFN neurons, heads, experts or hidden width."""

    name: ClassVar[str] = "prune"
    keeps_operators: ClassVar[bool] = True
    exactness: ClassVar[Exactness] = Lossy()

    ratio: float | None = option(
        default=None, gt=0, lt=1, help="share of every width to remove, to the nearest legal width"
    )
    keep: int | None = option(
        default=None, ge=1, help="how many positions every width of one scope keeps"
    )
    params: float | None = option(
        default=None, gt=0, help="parameters to end with; up to 1 a share of those there are"
    )
    macs: float | None = option(
        default=None, gt=0, help="multiply-accumulates to end with; up to 1 a share"
    )
    bytes: float | None = option(
        default=None, gt=0, help="bytes of weights to end with; up to 1 a share"
    )
    latency: float | None = option(
        default=None, gt=0, help="milliseconds to end with, as the table tells them"
    )
    table: str = option(
        default="", help="CSV or JSON file of measured times: candidate, width, ms (with latency)"
    )
    scope: tuple[Scope, ...] = option(
        default=(),
        help="what to prune; where none is named, all but vocab, of factors of a width one",
    )
    score: Score | None = option(
        default=None,
        help="what makes a position important: norms (l1, l2, group_norm), fpgm, bn_gamma; from data wanda,"
        " flap, cfsp, obd, optin, taylor (of a language model, or with labels), and of tokens frequency;"
        " random. Where none is named, with calibration data obd (of experts l2, of tokens frequency), else"
        " l2",
    )
    allocation: Allocated | None = option(
        default=None,
        help="how the share is spread: uniform, global, isomorphic, flap, cfsp, layer_adaptive (by measured"
        " distortion). Where none is named, global for scores in units of the loss (taylor, obd), else"
        " uniform",
    )
    compensate: compensation.Compensation | None = option(
        default=None,
        help="let weights that sum over a width make up for what went: none, bias (FLAP), least_squares."
        " Where none is named, least_squares with calibration data",
    )
    round_to: int | None = option(
        default=None, ge=1, help="keep widths a multiple of this; the target's where none is given"
    )
    keep_ids: tuple[int, ...] = option(
        default=(),
        help="tokens that stay whatever their score is, such as special ones (with vocab)",
    )
    ignore: tuple[str, ...] = option(
        default=(), help="module paths to leave as they are, whole or in part, with wildcards"
    )

    @pydantic.model_validator(mode="after")
    def _one_goal(self) -> Prune:
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            said = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"give one of {', '.join(_GOALS)}{said}")
        if bool(self.table) != (self.latency is not None):
            raise ValueError("latency and table go together")
        if self.keep is not None and len(self.scope) != 1:
            raise ValueError("keep counts positions of one scope: name it")
        if self.keep_ids and "vocab" not in self.scope:
            raise ValueError("keep_ids are of a vocabulary: name vocab in the scope")
        return self

    def files(self) -> Sequence[Path]:
        """The table of latencies."""
        return (Path(self.table),) if self.table else ()

    def cannot_follow(self, earlier: Pass) -> str:
        """Of codes no position can go, and nothing can be made up for; scales are those of all positions."""
        if earlier.name == "quantize":
            return "weights are codes by then"
        if earlier.name == "quantize_cache" and not {"heads", "kv_groups"}.isdisjoint(
            self.scope or SCOPES
        ):
            return "what the cache holds shares scales by then with what would go"
        return ""

    def needs_data(self) -> str:
        """What is named and measured; where nothing is named, data decides what is taken."""
        asked = {
            f"score={self.score!r}": self.score is not None and SCORES[self.score].needs_data,
            f"allocation={self.allocation!r}": self.allocation in ("cfsp", "layer_adaptive"),
            f"compensate={self.compensate!r}": self.compensate not in (None, "none"),
        }
        return next((option for option, needs in asked.items() if needs), "")

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Score the positions of every candidate and say which stay.

        Raises:
            PassError: the goal leaves a width empty, cannot be reached, or fits no width multiple; a
                pattern of ``ignore`` matches nothing.
        """
        axes = axis_analysis.analyse(model)
        target = 1 if ctx.target is None else ctx.target.width_multiple
        found = find_candidates(axes, multiple=self.round_to or target)
        scope = self.scope or tuple(name for name in SCOPES if name != "vocab")
        outside = [candidate for candidate in found if candidate.scope not in scope]
        found = [candidate for candidate in found if candidate.scope in scope]
        if not found:
            what = ", ".join(scope)
            return [Entry(what, "skipped", f"the model has no width of this kind: {what}")]
        self._check_ignore(found)
        found = self._with_ids(found)
        settled = self._settled(axes, found)
        free = [candidate for candidate in found if candidate not in settled]
        words, _ = vocabularies([candidate for candidate in free if candidate.scope == "vocab"])
        named = self._scores(free, ctx)
        scored: dict[Candidate, Scores] = {}
        spreads: dict[str, list[Spread]] = defaultdict(list)
        for score in dict.fromkeys(named.values()):
            some = measure(score, [c for c in free if named[c] == score], model, ctx)
            name = self.allocation or ("global" if score in _IN_LOSS else "uniform")
            spreads[name].append(ALLOCATIONS[name](some, model, ctx))
            scored |= some
        for word in words:
            total = np.sum([scored[candidate] for candidate in word.candidates], axis=0)
            scored |= {candidate: total for candidate in word.candidates}
        spread = together([each for every in spreads.values() for each in every])
        allocate = _as_one(spread.allocate, words)
        fixed = [(candidate, reason) for candidate, (_, reason, _) in settled.items()]
        fixed += [(candidate, reason) for candidate, reason in _why_outside(outside).items()]
        counts = self._counts(axes, allocate, free, fixed, "uniform" in spreads)
        for word in words:
            scored[word.candidates[0]][list(self.keep_ids)] = np.inf  # all have this array
        kept = {c: c.best(scored[c], counts[c]) for c in free if counts[c] < c.size}
        read = {c: at for w in words for c, at in _stand_ins(w, kept, ctx).items()}
        how = self.compensate or ("least_squares" if ctx.calibration else "none")
        made_up = compensation.solve(how, kept, model, ctx)
        entries = []
        for candidate in found:
            if candidate in settled:
                status, reason, left_out = settled[candidate]
                entry = _entry(candidate, status, reason, left_out)
            elif counts[candidate] == candidate.size:
                reason = f"{candidate.size} stay: the nearest width to what is asked for"
                entry = _entry(candidate, "skipped", reason, True)
            else:
                arrays = {"kept": kept[candidate], **read.get(candidate, {})}
                entry = _applied(candidate, named[candidate], arrays, made_up[candidate])
            detail = {**entry.detail, **spread.evidence.get(candidate, {})}
            entries.append(dataclasses.replace(entry, detail=detail))
        return entries

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Delete the positions that do not stay, in one edit of all axes."""
        kept = _kept(chosen)
        if not kept:
            return Result(False, list(chosen))
        before, names = cost(model), edit.names_in(model.graph)
        compensation.edit_weights(model, [entry.arrays for entry in chosen])
        compensation.edit_biases(model, [entry.arrays for entry in chosen], self.name)
        axes = axis_analysis.analyse(model)
        groups = _groups(axes, kept)
        seen = [value for pair in axes.related.caches for value in pair]
        seen += [value for value in model.graph.outputs if value not in seen]
        selection = _selection(groups)
        narrowed = {
            (value.name or "", dim): at
            for value in seen
            for dim, axis in enumerate(axes.related.axes.get(value, ()))
            if (at := selection.of(axis)) is not None
        }
        gone = {g: np.setdiff1d(np.arange(g.size), at).tolist() for g, at in groups.items()}
        axis_analysis.delete(axes, gone, _numbered(axes, chosen))
        for (name, dim), positions in narrowed.items():
            interface.narrow(model, name, dim, positions)
        after = cost(model)
        statistics = {
            "widths": float(len(kept)),
            "parameters": float(before.params - after.params),
            "bytes": float(before.bytes - after.bytes),
        }
        lost = sorted(names - edit.names_in(model.graph))
        return Result(True, list(chosen), dict.fromkeys(lost), statistics)

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The model at its shapes in which whatever sums over a removed position leaves it out.

        Of tokens that are removed, those that stand in for them are read.
        """
        bound = tolerance(Equivalent(TOLERANCE), before)
        compensation.edit_weights(before, [entry.arrays for entry in chosen])
        reference.add_biases(before, [entry.arrays for entry in chosen])
        axes = axis_analysis.analyse(before)
        read = _numbered(axes, chosen)
        groups = {g: at for g, at in _groups(axes, _kept(chosen)).items() if g not in read}
        reference.mask(before, reference.kept_of(axes, _selection(groups)))
        reference.stand_in(before, axes, {group.atom: at for group, at in read.items()})
        return Reference(before, bound, reordered=True)

    # -- choosing ---------------------------------------------------------------------------------

    def _check_ignore(self, found: Sequence[Candidate]) -> None:
        problems = []
        for pattern in self.ignore:
            if not any(provenance.matches(path, pattern) for c in found for path in c.modules):
                help_ = did_you_mean(pattern, sorted({path for c in found for path in c.modules}))
                message = f"ignore={pattern!r} matches no width that could be pruned"
                problems.append(Diagnostic("prune.ignore", message, help=help_))
        if problems:
            raise PassError(problems)

    def _scores(self, free: Sequence[Candidate], ctx: Context) -> dict[Candidate, str]:
        """Which score is used for each candidate; l2 where none is named and data says nothing."""
        if self.score is not None:
            return dict.fromkeys(free, self.score)
        if not ctx.calibration:
            return dict.fromkeys(free, "l2")
        best = {c: "frequency" if c.scope == "vocab" else "obd" for c in free}
        return {c: score if speaks_about(score, c) else "l2" for c, score in best.items()}

    def _with_ids(self, found: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, vocabularies with the room that the tokens of ``keep_ids`` need."""
        wanted = sorted(set(self.keep_ids))
        result = []
        for candidate in found:
            if candidate.scope == "vocab" and wanted:
                if wanted[0] < 0 or wanted[-1] >= candidate.size:
                    message = f"keep_ids has {wanted[0]} to {wanted[-1]}, and {candidate.name}"
                    message += f" the tokens 0 to {candidate.size - 1}"
                    raise PassError(Diagnostic("prune.keep_ids", message, where=candidate.where))
                least = max(candidate.least, len(wanted))
                candidate = dataclasses.replace(candidate, least=least)
            result.append(candidate)
        return result

    def _settled(
        self, axes: Axes, found: Sequence[Candidate]
    ) -> dict[Candidate, tuple[Status, str, bool]]:
        """Candidates that stay whatever the goal is, with status, reason, and if options ask for it."""
        settled: dict[Candidate, tuple[Status, str, bool]] = {}
        words = [candidate for candidate in found if candidate.scope == "vocab"]
        vocabulary, refused = vocabularies(words)
        for candidate in found:
            if candidate in refused:
                settled[candidate] = "refused", refused[candidate], False
            elif candidate.pins and candidate not in words:
                settled[candidate] = "refused", pinned(candidate.pins[0]), False
            elif reason := reference.no_reference(axes, candidate.group.atom):
                settled[candidate] = "refused", reason, False
            elif name := candidate.quantized:
                settled[candidate] = "refused", f"{name} is quantized: prune before", False
            elif pattern := self._ignoring(candidate):
                settled[candidate] = "skipped", f"ignored: it matches {pattern!r}", True
            elif candidate.size <= candidate.least:
                reason = f"all {candidate.size} positions must stay"
                settled[candidate] = "refused", reason, False
        for word in vocabulary:
            for one in [candidate for candidate in word.candidates if candidate in settled]:
                status, reason, left_out = settled[one]
                reason = f"it is one vocabulary with {one.name}, which stays: {reason}"
                rest = [candidate for candidate in word.candidates if candidate not in settled]
                settled |= dict.fromkeys(rest, (status, reason, left_out))
        free = [candidate for candidate in found if candidate not in settled]
        stuck = [candidate for candidate in free if len(candidate.widths()) == 1]
        if free and len(stuck) == len(free):
            raise _no_multiple(stuck)
        for candidate in stuck:
            reason = f"{candidate.size} has no smaller width of a multiple of {candidate.multiple}"
            settled[candidate] = "skipped", reason, True
        rest = [candidate for candidate in free if candidate not in settled]
        for candidate, other in beside(rest, self.scope).items():
            reason = f"it is a factor of a width of which {other.name} is pruned"
            settled[candidate] = "skipped", reason, True
        return settled

    def _cost_goal(self) -> tuple[budgets.Kind, float]:
        if self.params is not None:
            return "params", self.params
        if self.macs is not None:
            return "macs", self.macs
        assert self.bytes is not None  # one goal is given
        return "bytes", self.bytes

    def _ignoring(self, candidate: Candidate) -> str:
        for pattern in self.ignore:
            if any(provenance.matches(path, pattern) for path in candidate.modules):
                return pattern
        return ""

    def _counts(
        self,
        axes: Axes,
        allocate: Allocation,
        free: Sequence[Candidate],
        fixed: Sequence[tuple[Candidate, str]],
        even: bool,
    ) -> dict[Candidate, int]:
        """How many positions of each candidate stay; ``even``: the ratio is meant for every width."""
        if self.keep is not None:
            return _exact(free, self.keep)
        if self.ratio is not None:
            counts = allocate(self.ratio)
            if even:
                _check_left(counts, {c: c.size * (1 - self.ratio) for c in free})
            return counts
        if self.latency is not None:
            budget = budgets.by_table(Path(self.table), free, self.latency)
        else:
            budget = budgets.by_cost(axes, None, *self._cost_goal())
        return budgets.solve(budget, allocate, free, fixed)


def _why_outside(candidates: Sequence[Candidate]) -> dict[Candidate, str]:
    """Why candidates stay that no scope names: what would keep them anyway, or just that."""
    _, refused = vocabularies([c for c in candidates if c.scope == "vocab"])
    reasons = {c: f"{c.scope} is not in the scope" for c in candidates}
    reasons |= {c: pinned(c.pins[0]) for c in candidates if c.pins and c.scope != "vocab"}
    return reasons | refused


def _check_left(counts: Mapping[Candidate, int], wanted: Mapping[Candidate, float]) -> None:
    """Refuse a ratio that leaves less of a width than it needs."""
    problems = []
    for candidate, count in counts.items():
        if count and wanted[candidate] > candidate.least - 0.5:
            continue
        needs = f"{candidate.least} must stay" if candidate.least > 1 else "one must stay"
        problems.append(
            Diagnostic(
                "prune.empty",
                f"{wanted[candidate]:.2f} of {candidate.size} positions of {candidate.name} would be"
                f" left, {needs}",
                where=candidate.where,
                help="lower the ratio, narrow the scope, or ignore the module",
            )
        )
    if problems:
        raise PassError(problems)


def _exact(free: Sequence[Candidate], keep: int) -> dict[Candidate, int]:
    """``keep`` positions of each, or of query heads as many for each key/value head."""
    counts, problems = {}, []
    for candidate in free:
        groups = query_groups(candidate)
        total = candidate.size * groups
        possible = [width * groups for width in candidate.widths()]
        if keep in possible or keep >= total:
            counts[candidate] = min(keep, total) // groups
            continue
        below = max((width for width in possible if width < keep), default=possible[0])
        above = min((width for width in possible if width > keep), default=possible[-1])
        why = f"{keep} query heads do not divide over {groups} key/value heads"
        if keep % groups == 0:
            why = f"{keep} is no width of {candidate.name}"
        near = f"{below} or {above}" if below != above else str(below)
        problems.append(
            Diagnostic(
                "prune.heads" if keep % groups else "prune.keep",
                why,
                where=candidate.where,
                help=f"keep {near} of {total}",
            )
        )
    if problems:
        raise PassError(problems)
    return counts


def _no_multiple(stuck: Sequence[Candidate]) -> PassError:
    notes = [
        f"{c.name} has {c.size}, and {c.least} must stay: no smaller multiple of {c.multiple}"
        for c in stuck[:5]
    ]
    return PassError(
        Diagnostic(
            "prune.round_to",
            f"no width can become a smaller multiple: none of {len(stuck)} candidates",
            notes=tuple(notes),
            help="set round_to to less; 1 takes any width",
        )
    )


def _entry(candidate: Candidate, status: Status, reason: str, left_out: bool = False) -> Entry:
    return Entry(candidate.name, status, reason, candidate.where, _detail(candidate), left_out)


def _applied(
    candidate: Candidate,
    score: str,
    arrays: compensation.Arrays,
    made_up: compensation.Arrays,
) -> Entry:
    kept: Positions = arrays["kept"]
    count = len(kept)
    gone = candidate.size - count
    reason = f"{count} of {candidate.size} stay by {score}; {gone * candidate.parameters} parameters gone"
    detail = _detail(candidate) | {"score": score, "kept": count, "removed": gone}
    if made_up:
        reason += f"; {', '.join(made_up)} made up for them"
    names = list(candidate.group.interface)
    names += [value.name or "" for value in outputs(candidate)] if not names else []
    if names:
        reason += f"; {', '.join(names[:2])} narrower"
        detail |= {"interface": names, "positions": kept.tolist()}
    arrays = {**arrays, **made_up}
    return Entry(candidate.name, "applied", reason, candidate.where, detail, arrays=arrays)


def _as_one(allocate: Allocation, words: Sequence[Vocabulary]) -> Allocation:
    """Let all candidates of a vocabulary keep as many tokens as the first one."""

    def one(share: float) -> dict[Candidate, int]:
        counts = allocate(share)
        for word in words:
            counts |= dict.fromkeys(word.candidates, counts[word.candidates[0]])
        return counts

    return one


def _stand_ins(
    word: Vocabulary, kept: Mapping[Candidate, Positions], ctx: Context
) -> dict[Candidate, dict[str, Positions]]:
    """What is read in place of each token, for the entries of a vocabulary."""
    first = word.candidates[0]
    if first not in kept:
        return {}

    def compute() -> dict[str, Positions]:
        return {"array": stand_ins(word.tables(), kept[first])}

    array = ctx.once(f"{STAND_INS} of {first.name}", compute)["array"]
    return {candidate: {STAND_INS: array} for candidate in word.candidates}


def _detail(candidate: Candidate) -> dict[str, Any]:
    return {
        "scope": candidate.scope,
        "group": candidate.group.name,
        "size": candidate.size,
        "multiple": candidate.multiple,
        "parameters_each": candidate.parameters,
    }


# -- what was chosen ------------------------------------------------------------------------------


def _kept(chosen: Sequence[Entry]) -> dict[str, tuple[int, Positions]]:
    """Group name -> its size, and the positions that stay."""
    return {
        entry.detail["group"]: (entry.detail["size"], entry.arrays["kept"])
        for entry in chosen
        if entry.status == "applied"
    }


def _groups(axes: Axes, kept: Mapping[str, tuple[int, Positions]]) -> dict[Group, Positions]:
    """The groups by their names, which are the same for the same model."""
    named = {group.name: group for group in axes.groups}
    for name, (size, _) in kept.items():
        if name not in named or named[name].size != size:
            raise ValueError(f"{name} of {size} positions was chosen in another model")
    return {named[name]: positions for name, (_, positions) in kept.items()}


def _numbered(axes: Axes, chosen: Sequence[Entry]) -> dict[Group, Positions]:
    """The groups whose positions the caller numbers, and what is read in place of each."""
    named = {group.name: group for group in axes.groups}
    return {
        named[entry.detail["group"]]: entry.arrays[STAND_INS]
        for entry in chosen
        if STAND_INS in entry.arrays
    }


def _selection(groups: Mapping[Group, Positions]) -> Selection:
    return Selection({group.atom: positions for group, positions in groups.items()})
