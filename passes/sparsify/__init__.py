"""Puts zeros into weights, in patterns that kernels make use of; the weights that stay may make up for it.

    y = MatMul(x, w: f32[k,n])   ->   y = MatMul(x, w: f32[k,n])    half of w zero, as sparsity_of(w) tells

A *pattern* says where zeros may be (anywhere, N of M, tiles), a *score* which elements go, and all shapes
stay. Scores: `masks` (magnitude, Wanda), `sparsegpt`; `dsnot` swaps what a mask keeps. Channels may be put
into another order first, one in which N:M keeps more (`permute`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import onnx_ir as ir
import pydantic
from typing_extensions import TypedDict

from netlathe.analysis.products import Use
from netlathe.ir import sparsity
from netlathe.ir.provenance import module_path
from netlathe.ir.sparsity import Pattern, sparsity_of
from netlathe.passes.quantize import candidates
from netlathe.passes.quantize.candidates import Candidate
from netlathe.passes.sparsify import in_order, permute, reference
from netlathe.passes.sparsify.form import form_of
from netlathe.passes.sparsify.in_order import Job, Score, Settings
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Lossy,
    Pass,
    Reference,
    Result,
    option,
    options,
)


def _pattern(text: str) -> str:
    return str(Pattern.parse(text))


# Rows and tiles hold whole numbers of zeros: a weight is as sparse as it is to be within this.
_ROUNDING = 0.005

PatternName = Annotated[str, pydantic.AfterValidator(_pattern)]


class Override(TypedDict, total=False):
    """What some weights get instead of the pass' options."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic reads it

    pattern: PatternName
    ratio: Annotated[float, pydantic.Field(gt=0, lt=1)]


@options
class Sparsify(ChoosingPass):
    """Put zeros into weights: anywhere, N of M, or in tiles (magnitude, Wanda, SparseGPT)."""

    name = "sparsify"
    keeps_operators = True
    exactness = Lossy()

    pattern: PatternName = option(
        default="2:4",
        help='where zeros may be: "unstructured"; "2:4" (N:M): at most 2 of every 4 elements in a row'
        ' along the contraction are not zero; "4x4" (RxC): tiles of 4 outputs and 4 inputs',
    )
    ratio: float | None = option(
        default=None,
        gt=0,
        lt=1,
        help="the share of zeros; 0.5 where none is given; N:M has its own",
    )
    score: Score = option(
        default="magnitude",
        help="what stays: the largest weights (magnitude), with what they are multiplied with (wanda), or"
        " what the rest can least make up for, which it then does (sparsegpt); the last two need data",
    )
    damping: float = option(
        default=0.01, gt=0, le=1, help="what is added to H's diagonal, as a share of its mean"
    )
    refine: bool = option(
        default=False, help="swap what a mask keeps so that outputs keep their means (DSnoT)"
    )
    sweeps: int = option(
        default=0,
        ge=0,
        help="coordinate-descent sweeps in which the weights that stay make up for those that went",
    )
    permute: bool = option(
        default=False, help="N:M: put channels into an order in which more of the score stays"
    )
    overrides: dict[str, Override] = option(
        default={},
        help='other patterns by module path or weight: {"mlp": {"pattern": "1:4"}}; the last match counts',
    )
    min_size: int = option(default=1024, ge=0, help="leave weights with fewer elements as they are")
    ignore: tuple[str, ...] = option(
        default=(),
        help="module paths or weights to leave as they are, whole or in part, with wildcards",
    )

    @pydantic.model_validator(mode="after")
    def _fit(self) -> Sparsify:
        given = [("", self.pattern, self.ratio)]
        for key, each in self.overrides.items():
            given.append(
                (f"overrides[{key!r}]: ", each.get("pattern", self.pattern), each.get("ratio"))
            )
        for where, text, ratio in given:
            pattern = Pattern.parse(text)
            if pattern.kind == "n:m" and ratio is not None:
                raise ValueError(
                    f"{where}{pattern} makes {1 - pattern.n / pattern.m:.0%} of the elements zero, so"
                    f" ratio={ratio} cannot be asked for as well"
                )
        if self.permute and not self._patterns_of("n:m"):
            raise ValueError("permute is for N:M patterns, and none is asked for")
        if self.refine and self.score == "sparsegpt":
            raise ValueError("refine swaps weights that stay as they are, and sparsegpt moves them")
        if self.refine and self._patterns_of("tiles"):
            raise ValueError("refine swaps single elements: it cannot keep tiles")
        return self

    def cannot_follow(self, earlier: Pass) -> str:
        """Of codes none is made zero."""
        return "weights are codes by then" if earlier.name == "quantize" else ""

    def needs_data(self) -> str:
        """What looks at products, and not at weights alone."""
        asked = {
            f"score={self.score!r}": self.score != "magnitude",
            "refine=True": self.refine,
            f"sweeps={self.sweeps}": self.sweeps > 0,
        }
        return next((option for option, needs in asked.items() if needs), "")

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Decide about every weight matrix and find its zeros; each is read.

        Raises:
            PassError: a pattern of ``ignore`` or ``overrides`` matches no candidate; the score needs
                calibration data and there is none, or it never reaches a weight.
        """
        found = candidates.find(model)
        candidates.check_patterns(self.name, found, self.ignore, self.overrides)
        settings = Settings(self.score, self.damping, self.refine, self.sweeps)
        entries: dict[str, Entry] = {}
        jobs: list[Job] = []
        for candidate in found:
            decided = self._decide(candidate)
            if isinstance(decided, Job):
                jobs.append(decided)
            else:
                entries[candidate.name] = decided
        orders: list[Entry] = []
        if self.permute:
            orders, jobs = permute.search(model, jobs, settings, ctx, str(self))
        solved = in_order.solve(settings, model, jobs, ctx, str(self))
        for job, result in zip(jobs, solved, strict=True):
            entries[job.candidate.name] = _entry(job, settings, result)
        return [*orders, *(entries[candidate.name] for candidate in found)]

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Put the zeros into the weights, and channels into their order."""
        by_name = candidates.by_name(model)
        applied = [entry for entry in chosen if entry.status == "applied"]
        stored = [entry for entry in applied if "value" in entry.detail]
        for entry in stored:
            value = by_name[entry.detail["value"]]
            base = value.const_value
            assert base is not None
            value.const_value = in_order.tensor(base, entry.arrays)
        orders = [entry for entry in applied if "order_of" in entry.detail]
        renamed = permute.apply(model, orders)
        zeros = 0.0
        for entry in ctx.progress.track(stored, "checking zeros", len(stored)):
            value, detail = by_name[entry.detail["value"]], entry.detail
            held = sparsity.record(value, detail["pattern"], detail["axis"], detail["rows"])
            zeros += (1 - held.density) * math.prod(candidates.dims_of(value))
        statistics = {"weights": float(len(stored)), "zeros": zeros} if applied else {}
        return Result(bool(applied), list(chosen), renamed, statistics)

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The model with zeros in its weights, channels in the order that they were in."""
        return reference.build(before, chosen)

    # -- choosing ---------------------------------------------------------------------------------

    def _patterns_of(self, kind: str) -> list[str]:
        texts = [self.pattern, *(o["pattern"] for o in self.overrides.values() if "pattern" in o)]
        return [text for text in texts if Pattern.parse(text).kind == kind]

    def _asked(self, candidate: Candidate) -> tuple[Pattern, float]:
        """The pattern of one weight, and its share of zeros."""
        text, ratio = self.pattern, self.ratio
        for key, override in self.overrides.items():
            if candidate.matches(key):
                if "pattern" in override:
                    text, ratio = override["pattern"], self.ratio
                ratio = override.get("ratio", ratio)
        pattern = Pattern.parse(text)
        if pattern.kind == "n:m":
            return pattern, 1 - pattern.n / pattern.m
        return pattern, 0.5 if ratio is None else ratio

    def _decide(self, candidate: Candidate) -> Job | Entry:
        value = candidate.value
        name, where = candidate.name, module_path(value)
        if reason := candidates.refusal(candidate):
            return Entry(name, "refused", reason, where)
        if reason := self._left_out(candidate):
            return Entry(name, "skipped", reason, where, left_out=True)
        products = [use for use in candidate.uses if not _is_row(use, candidate)]
        if not products:
            readers = ", ".join(sorted({node.op_type for node in value.consumers()}))
            reason = f"read by {readers or 'nothing'}, which is no product"
            return Entry(name, "skipped", reason, where)
        form = form_of(candidate.dims, products[0].sums)
        if form is None:
            return Entry(name, "refused", f"{products[0]} sums over all of its axes", where)
        pattern, ratio = self._asked(candidate)
        if reason := form.problem(pattern):
            return Entry(name, "refused", reason, where)
        if others := [use for use in products if form_of(candidate.dims, use.sums) != form]:
            reason = f"{products[0]} and {others[0]} sum over different axes of it"
            return Entry(name, "refused", reason, where)
        if reason := candidates.unfit(value):  # reads the weight: comes last
            return Entry(name, "refused", reason, where)
        if reason := _done(value, pattern, ratio, form.axis):
            return Entry(name, "skipped", reason, where, left_out=True)
        return Job(candidate, form, pattern, ratio)

    def _left_out(self, candidate: Candidate) -> str:
        if reason := candidates.left_out(candidate, self.ignore, self.min_size):
            return reason
        rows = [use for use in candidate.uses if _is_row(use, candidate)]
        if rows:
            tied = len(rows) < len(candidate.uses)
            return f"a table that is looked up{', tied to a product' if tied else ''}"
        return ""


def _is_row(use: Use, candidate: Candidate) -> bool:
    """Whether rows are looked up, and not whole matrices as those of experts are."""
    return use.is_lookup and len(candidate.dims) < 3


def _done(value: ir.Value, pattern: Pattern, ratio: float, axis: int) -> str:
    """Whether a weight is as sparse as it is to be, in words."""
    held = sparsity_of(value)
    if held is None or held.pattern != str(pattern) or held.axis != axis:
        return ""
    if pattern.kind != "n:m" and 1 - held.density < ratio - _ROUNDING:
        return ""
    return f"{pattern} already: {1 - held.density:.1%} of it are zeros"


def _entry(job: Job, settings: Settings, solved: in_order.Solved) -> Entry:
    candidate, form = job.candidate, job.form
    how, measured = in_order.method(job, settings)
    array = in_order.as_weight(job, solved)
    density, lost = sparsity.density(array), float(solved["share"])
    detail: dict[str, Any] = {
        "value": candidate.name,
        "pattern": str(job.pattern),
        "axis": form.axis,
        "rows": form.rows,
        "density": density,
        "score": how,
    }
    what = "output" if measured else "weight"
    reason = (
        f"{job.pattern}, {1 - density:.1%} zeros by {how}, {lost:.2g} of the {what}'s square lost"
    )
    detail["error" if measured else "weight_error"] = lost
    if how != settings.score:
        reason += "; no data says more of what it is multiplied with"
    arrays = {key: solved[key] for key in ("weight", "kept") if key in solved}
    if (damping := solved.get("damping")) is not None:
        detail["damping"] = float(damping)
        if float(damping) > settings.damping:
            reason += f", damped by {float(damping):.2g} as its inputs are singular"
    return Entry(
        candidate.name, "applied", reason, module_path(candidate.value), detail, arrays=arrays
    )
