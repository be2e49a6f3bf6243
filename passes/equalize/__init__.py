"""Moves scale between activations and weights, channel by channel, so that both quantize better.

    x = norm(h) * g;  y = x W      ->   x' = norm(h) * (g / s);  y = x' (s W)

The function stays what it was: factors pass what is linear, positive ones pass Relu, and each is taken in by
weights on both sides (`candidates`). What the factors are is the method's affair (`factors`). Nothing is
added to the graph; run the pass before ``quantize``, and before ``fold_norms``, which takes the scales of
norms away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes.joint import scale_jointly
from netlathe.diagnostics import Diagnostic, OptionError, PassError, did_you_mean, missing_extra
from netlathe.ir.provenance import module_path
from netlathe.passes.equalize import candidates, factors
from netlathe.passes.equalize.candidates import Candidate
from netlathe.passes.equalize.factors import Scaled
from netlathe.passes.quantize.scheme import FormatName, Scheme
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Equivalent,
    Exactness,
    Pass,
    Result,
    option,
    options,
)

Vector = npt.NDArray[np.float64]
# Every weight is rounded once more, which is like one of the roundings of a sum: of n = 8192 terms
# 84 ulp of its RMS at the largest of 10^5 (as in fold_norms).
TOLERANCE = 84 * 2.0**-23


@options
class Equalize(ChoosingPass):
    """Scale channels so that activations and weights quantize better (SmoothQuant, AWQ, cross-layer)."""

    name: ClassVar[str] = "equalize"
    keeps_operators: ClassVar[bool] = True
    exactness: ClassVar[Exactness] = Equivalent(TOLERANCE)

    method: Literal["smoothquant", "awq", "range"] = option(
        default="smoothquant",
        help="smoothquant: ranges of activations against those of weights; awq: searched for the least"
        " error of quantized products; range: ranges of a layer's weights against the next one's",
    )
    alpha: float = option(
        default=0.5, ge=0, le=1, help="smoothquant: how much goes from activations to weights"
    )
    weights: FormatName = option(
        default="int4", help="awq: the number format for which is searched"
    )
    group_size: int = option(
        default=0, ge=0, help="awq: elements along the contraction that share a scale; 0: all"
    )
    symmetric: bool = option(default=True, help="awq: no zero points")
    ignore: tuple[str, ...] = option(
        default=(),
        help="values, weights or module paths to leave as they are, whole or in part, with wildcards",
    )

    def __post_init__(self) -> None:
        """Check options that exclude each other.

        Raises:
            OptionError: one is given that the method does not look at.
        """
        given = {"alpha": self.alpha != 0.5}
        given |= {
            "weights": self.weights != "int4",
            "group_size": bool(self.group_size),
            "symmetric": not self.symmetric,
        }
        read = {"smoothquant": {"alpha"}, "awq": {"weights", "group_size", "symmetric"}}
        unread = [name for name in given if given[name] and name not in read.get(self.method, ())]
        problem = self._scheme.problem() if self.method == "awq" else ""
        if unread:
            problem = f'{" and ".join(unread)} says nothing to method="{self.method}"'
        if problem:
            raise OptionError(Diagnostic("equalize.options", problem))

    @property
    def _scheme(self) -> Scheme:
        return Scheme(self.weights, self.symmetric, self.group_size)

    def cannot_follow(self, earlier: Pass) -> str:
        """Of codes none is scaled, and what becomes codes rounds otherwise."""
        reasons = {
            "quantize": "weights are codes by then",
            "quantize_cache": "what the cache holds would round to other codes",
        }
        return reasons.get(earlier.name, "")

    def needs_data(self) -> str:
        """Ranges of weights are known without."""
        return "" if self.method == "range" else f"method={self.method!r}"

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Find the factors of every candidate, one after the other in the order of the graph.

        Raises:
            PassError: a pattern of ``ignore`` matches nothing; there is no calibration data.
        """
        found, refused = candidates.find(model)
        self._check_patterns(found)
        if not found:
            return refused or [Entry("(the model)", "skipped", "no product reads a computed value")]
        entries: dict[str, Entry] = {}
        for candidate in found:
            if out := self._left_out(candidate):
                entries[candidate.name] = out
        free = [candidate for candidate in found if candidate.name not in entries]
        scaled = Scaled.of(free)
        match self.method:
            case "smoothquant":
                entries |= self._smooth(model, free, scaled, ctx)
            case "awq":
                entries |= self._search(model, free, scaled, ctx)
            case "range":
                entries |= self._ranges(free, scaled)
        return [*(entries[candidate.name] for candidate in found), *refused]

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Let weights take in the factors."""
        applied = {entry.candidate: entry for entry in chosen if entry.status == "applied"}
        if not applied:
            return Result(False, list(chosen))
        renamed: dict[str, str | None] = {}
        for candidate in candidates.find(model)[0]:
            if candidate.name not in applied:
                continue
            scale_jointly(candidate.joint, applied[candidate.name].arrays["factors"])
            changed = candidate.joint.values.keys() - candidate.joint.weights.keys()
            renamed |= {str(value.name): None for value in changed}
        return Result(True, list(chosen), dict(sorted(renamed.items())))

    # -- choosing ---------------------------------------------------------------------------------

    def _check_patterns(self, found: Sequence[Candidate]) -> None:
        problems = [
            Diagnostic(
                "equalize.ignore",
                f"ignore={pattern!r} matches nothing that can be scaled",
                help=did_you_mean(pattern, sorted({n for c in found for n in c.names()})),
            )
            for pattern in self.ignore
            if not any(candidate.matches(pattern) for candidate in found)
        ]
        if problems:
            raise PassError(problems)

    def _left_out(self, candidate: Candidate) -> Entry | None:
        where = module_path(candidate.products[0].node)
        for pattern in self.ignore:
            if candidate.matches(pattern):
                reason = f"ignored: it matches {pattern!r}"
                return Entry(candidate.name, "skipped", reason, where, left_out=True)
        if self.method == "range" and not candidate.makers:
            reason = (
                f"no layer makes it: {', '.join(candidate.taken_in_by)} would take the scale in"
            )
            return Entry(candidate.name, "skipped", reason, where, left_out=True)
        if self.method == "awq" and (reason := factors.unfit_for_search(candidate, self._scheme)):
            return Entry(candidate.name, "refused", reason, where)
        return None

    def _smooth(
        self, model: ir.Model, found: Sequence[Candidate], scaled: Scaled, ctx: Context
    ) -> dict[str, Entry]:
        statistics = _statistics()
        inputs = _inputs(found)
        wanted = [statistics.AbsMax(name, dim) for name, dim in inputs]
        results = ctx.collect(model, wanted, needed_by=str(self))
        most = {at: r.array for at, r in zip(inputs, results, strict=True)}
        entries = {}
        for candidate in found:
            activation = factors.gathered(candidate, most, np.maximum)
            weight = scaled.ranges(candidate, candidate.consumers)
            by = factors.smooth(activation, weight, self.alpha)
            scaled.multiply(candidate, by)
            entries[candidate.name] = _entry(candidate, by, {"alpha": self.alpha})
        return entries

    def _search(
        self, model: ir.Model, found: Sequence[Candidate], scaled: Scaled, ctx: Context
    ) -> dict[str, Entry]:
        statistics = _statistics()
        inputs = _inputs(found)
        wanted = [statistics.MeanAbs(name, dim) for name, dim in inputs]
        results = ctx.collect(model, wanted, needed_by=str(self)) if inputs else []
        mean = {at: r.array for at, r in zip(inputs, results, strict=True)}
        entries: dict[str, Entry] = {}
        waiting: dict[str, dict[str, Vector]] = {c.name: {} for c in found}
        by_input: dict[str, list[Candidate]] = {}
        for candidate in found:
            for x, _ in candidate.inputs:
                by_input.setdefault(x.name or "", []).append(candidate)

        def settle(result: Any) -> None:  # moments are big: each is used as soon as it is there
            (name,) = result.statistic.values
            for candidate in by_input[name]:
                held = waiting[candidate.name]
                held[name] = result.array
                if len(held) == len(candidate.inputs):
                    entries[candidate.name] = self._searched(candidate, scaled, mean, held, ctx)
                    held.clear()

        moments = [statistics.Covariance(name, dim) for name, dim in inputs]
        if moments:
            ctx.collect(model, moments, needed_by=str(self), settle=settle)
        return entries

    def _searched(
        self,
        candidate: Candidate,
        scaled: Scaled,
        mean: dict[tuple[str, int], Vector],
        moments: dict[str, Vector],
        ctx: Context,
    ) -> Entry:
        magnitude = factors.gathered(candidate, mean, np.add)

        def compute() -> dict[str, Vector]:
            best = factors.search(candidate, scaled, magnitude, moments, self._scheme, ctx.device)
            numbers = np.array([best.alpha, best.before, best.after])
            return {"factors": best.factors, "numbers": numbers}

        solved = ctx.once(candidate.name, compute)
        alpha, before, after = (float(number) for number in solved["numbers"])
        if not after < before:
            reason = "no scale of the grid lowers the error of its products"
            where = module_path(candidate.products[0].node)
            return Entry(candidate.name, "skipped", reason, where, left_out=True)
        scaled.multiply(candidate, solved["factors"])
        detail = {"alpha": alpha, "error_before": before, "error_after": after}
        return _entry(candidate, solved["factors"], detail, f"error x {after / before:.3g}")

    def _ranges(self, found: Sequence[Candidate], scaled: Scaled) -> dict[str, Entry]:
        sweeps = factors.equal_ranges(found, scaled)
        return {
            candidate.name: _entry(candidate, scaled.factors[candidate.name], {"sweeps": sweeps})
            for candidate in found
        }


def _statistics() -> Any:
    try:
        from netlathe.execute import statistics  # torch is an extra
    except ModuleNotFoundError as error:
        raise missing_extra("torch", "torch", "equalize by calibration data") from error
    return statistics


def _inputs(found: Sequence[Candidate]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((x.name or "", dim) for c in found for x, dim in c.inputs))


def _entry(candidate: Candidate, by: Vector, detail: dict[str, Any], more: str = "") -> Entry:
    where = module_path(candidate.products[0].node)
    if (by == 1).all():
        return Entry(candidate.name, "skipped", "all factors are 1", where, detail, left_out=True)
    readers = [str(value.name) for value in candidate.consumers]
    reason = (
        f"{len(by)} factors from {by.min():.3g} to {by.max():.3g}, taken in by"
        f" {', '.join(candidate.taken_in_by) or 'nothing'}; undone in {', '.join(readers)}"
    )
    reason += f"; {more}" if more else ""
    detail = {**detail, "makers": candidate.taken_in_by, "readers": readers}
    return Entry(candidate.name, "applied", reason, where, detail, arrays={"factors": by})
