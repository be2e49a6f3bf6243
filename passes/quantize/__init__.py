"""Stores weights as small numbers behind DequantizeLinear, and activations where asked for.

    y = MatMul(x, w: f32[k,n])   ->   w = DequantizeLinear(w_int8: i8[k,n], w_scale: f32[n], axis=1)
                                      y = MatMul(x, w)

    y = Gather(w: f32[v,d], i)   ->   q = Gather(w_int8: i8[v,d], i)
                                      s = Unsqueeze(Gather(w_scale: f32[v], i))
                                      y = DequantizeLinear(q, s, block_size=d)

Three things are apart: the *scheme* (`scheme`, `layout`: what the numbers are and which share a scale), the
*solver* (`rounding`, ...: how values become codes) and the *allocation* (which weight gets which
scheme). `graph` writes the result, `candidates` finds what there is to quantize.

What quantize() does without options: round to nearest, int8, symmetric. With m the largest magnitude of an
output channel its scale is s = m / 127 in float32 and its integers are round(w / s), within [-127, 127];
so a weight moves by at most s / 2, and zero stays zero. No calibration data is needed (the data-free
baseline of FineQuant, arXiv 2308.09723, and of others).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pydantic
from typing_extensions import TypedDict

from netlathe.analysis.products import Use
from netlathe.diagnostics import Diagnostic, GateError, OptionError
from netlathe.ir import types, weights
from netlathe.ir.provenance import module_path
from netlathe.ir.sparsity import sparsity_of
from netlathe.passes.quantize import (
    activations,
    again,
    allocation,
    bias,
    candidates,
    in_order,
    inputs,
    integer,
    ledger,
    low_rank,
    on_target,
    reference,
    rounding,
    token,
)
from netlathe.passes.quantize.activations import Form, How, NumberName, Scales, Settings
from netlathe.passes.quantize.allocation import Sensitivity
from netlathe.passes.quantize.candidates import Candidate
from netlathe.passes.quantize.fit import for_weight
from netlathe.passes.quantize.graph import Editor, as_codes
from netlathe.passes.quantize.layout import Layout, Ragged, Unfit, layout
from netlathe.passes.quantize.low_rank import Basis, Branch, Stored
from netlathe.passes.quantize.rounding import Clip
from netlathe.passes.quantize.scheme import (
    FORMATS,
    FormatName,
    GroupAxis,
    ScaleType,
    Scheme,
    ZeroType,
)
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

Array = npt.NDArray[Any]

# Codes of the first weights are computed once and held, those of the rest whenever they are read.
HELD_BYTES = 256 << 20


class Override(TypedDict, total=False):
    """What some weights get instead of the pass' options."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic reads it

    weights: FormatName
    symmetric: bool
    group_size: int
    per_tensor: bool
    scales: ScaleType
    zeros: ZeroType
    group_axis: GroupAxis
    codebook: tuple[float, ...]
    low_rank: int


@options
class Quantize(ChoosingPass):
    """Store weights as small numbers: 8 to 2 bits, by channel or by group, rounded as asked for."""

    name = "quantize"
    keeps_operators = True
    exactness = Lossy()

    weights: FormatName = option(default="int8", help="the number format of the weights")
    symmetric: bool = option(default=True, help="no zero points (integers only)")
    group_size: int = option(
        default=0, ge=0, help="elements along the contraction that share a scale; 0: all of them"
    )
    group_axis: GroupAxis = option(
        default="input", help="what groups run along: the contraction, or outputs"
    )
    per_tensor: bool = option(default=False, help="one scale for a whole weight")
    scales: ScaleType = option(default="float32", help="the type in which scales are stored")
    zeros: ZeroType = option(
        default="integer",
        help="symmetric=False: zero points are codes, or numbers between them, stored as scales are",
    )
    codebook: tuple[float, ...] = option(
        default=(),
        help="codebook2, 3, 4: the 2^b numbers that codes stand for, from -1 to 1; none: fitted to a weight",
    )
    clip: Clip = option(
        default="none",
        help="how the range of a group is found: its extremes, a percentile, least squared error, or by"
        " moving zeros='float' to the least p-norm of it (HQQ)",
    )
    percentile: float = option(
        default=99.9, gt=50, le=100, help='the upper percentile of clip="percentile"'
    )
    solver: Literal["rtn", "gptq"] = option(
        default="rtn",
        help="how values become codes: to nearest, or so that errors cancel (needs data)",
    )
    damping: float = option(
        default=0.01, gt=0, le=1, help="gptq: what is added to the diagonal, as a share of its mean"
    )
    act_order: bool = option(
        default=True, help="gptq: round the columns of the largest inputs first"
    )
    sweeps: int = option(
        default=0,
        ge=0,
        help="gptq: coordinate-descent sweeps after it (QuantEase, arXiv 2309.01885)",
    )
    low_rank: int = option(
        default=0,
        ge=0,
        help="the rank of two thin matrices beside a product that give back part of the error",
    )
    low_rank_basis: Basis = option(
        default="error",
        help="low_rank: nearest to the error (LoRC), or to what it does to inputs (EoRA, needs data)",
    )
    low_rank_stored: Stored = option(
        default="float16", help="low_rank: the type of the thin matrices"
    )
    vectors: Literal["float32", "float16", "bfloat16"] = option(
        default="float32", help="the type in which biases and scales of norms are stored"
    )
    overrides: dict[str, Override] = option(
        default={},
        help='other settings by module path or weight: {"lm_head": {"weights": "int8"}}; the last match'
        " counts",
    )
    bits: float = option(
        default=0.0,
        ge=0,
        le=16,
        help="a budget in bits a weight, scales included, for what no override gives a format; 0: none",
    )
    formats: tuple[FormatName, ...] = option(
        default=(), help="bits: the number formats that share the budget"
    )
    sensitivity: Sensitivity = option(
        default="mse",
        help="bits: by what weights are compared: what outputs lose (kl, mse), or layers by rank (lim, zd)",
    )
    activations: NumberName = option(
        default="float32", help="the number type of what products with quantized weights read"
    )
    activation_scales: Scales = option(
        default="static",
        help="one scale for all data, from calibration; one per token, found as it comes (matrix products"
        " only); or one per tensor, found as it comes (uint8)",
    )
    activation_form: Form = option(
        default="integer",
        help='"integer": products with weights of 8 bits or less are computed in integers, with static'
        ' scales from product to product; "qdq": QuantizeLinear and DequantizeLinear in pairs',
    )
    activation_range: How = option(
        default="minmax",
        help="static scales: over all that was seen, a percentile of it, or with the least squared error",
    )
    activation_percentile: float = option(
        default=99.99, gt=50, le=100, help='the upper percentile of activation_range="percentile"'
    )
    correct_bias: bool = option(
        default=False,
        help="take what rounding adds to the mean of outputs from biases (needs data)",
    )
    requantize: bool = option(
        default=False,
        help="quantize weights once more that are codes already: from what these stand for",
    )
    embeddings: bool = option(default=True, help="quantize tables that are looked up as well")
    min_size: int = option(default=1024, ge=0, help="leave weights with fewer elements as they are")
    ignore: tuple[str, ...] = option(
        default=(),
        help="module paths or weights to leave as they are, whole or in part, with wildcards",
    )
    min_coverage: float = option(
        default=0.0,
        ge=0,
        le=1,
        help="fail if a smaller share of the weights' elements is quantized",
    )

    def cannot_follow(self, earlier: Pass) -> str:
        """Sums of integers become float32, in a graph that computes in halves by then."""
        integers = self.activations == "int8" and self.activation_form == "integer"
        return (
            "sums of integers are scaled in float32"
            if integers and earlier.name == "convert"
            else ""
        )

    def needs_data(self) -> str:
        """What looks at products, and not at weights alone."""
        branches = self.low_rank > 0 or any(o.get("low_rank") for o in self.overrides.values())
        asked = {
            "solver='gptq'": self.solver == "gptq",
            "low_rank_basis='input'": branches and self.low_rank_basis == "input",
            f"sensitivity={self.sensitivity!r}": self.bits > 0 and self.sensitivity != "zd",
            "correct_bias=True": self.correct_bias,
            f"activations={self.activations!r} with static scales": self.activations != "float32"
            and self.activation_scales == "static",
        }
        return next((option for option, needs in asked.items() if needs), "")

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Decide about every weight matrix and find its scales; each is read.

        Raises:
            PassError: a pattern matches no candidate.
            OptionError: settings contradict each other, or the target cannot hold a scheme.
            GateError: less is quantized than ``min_coverage`` asks for.
        """
        if self.requantize:
            model = model.clone()
            again.to_floats(model)
        operands = activations.operands(self._of_activations(), model)
        found = candidates.find(model, operands)
        candidates.check_patterns(self.name, found, self.ignore, self.overrides)
        self._check_schemes(found)
        self._check_target(found, ctx)
        shares = self._shares(model, found, ctx) if self.bits else {}
        progress = ctx.progress.track(found, "looking at weights", len(found))
        entries = [self._allocated(candidate, shares, ctx) for candidate in progress]
        self._check_coverage(found, entries)
        if self.vectors != "float32":
            entries += [self._vector(value, self.vectors) for value in candidates.vectors(model)]
        if self._needs_data(entries):
            settings = in_order.Settings(
                self.solver, self.clip, self.percentile, self.damping, self.act_order, self.sweeps
            )
            entries = in_order.solve(settings, model, found, entries, ctx)
        if self.correct_bias:
            entries += bias.correct(model, entries, ctx)
            model = bias.added(model, entries)
        if self.activations != "float32":
            needed_by = f"{self.name} with activations={self.activations!r}"
            entries += activations.choose(self._of_activations(), model, entries, ctx, needed_by)
        return entries

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Put codes, scales and what reads them in the place of every chosen weight."""
        if self.requantize and any(entry.status == "applied" for entry in chosen):
            again.to_floats(model)
        by_name = candidates.by_name(model)
        editor = Editor(model)
        applied = [entry for entry in chosen if entry.status == "applied"]
        before = weights.num_bytes(model)
        bias.add(model, applied)
        low_rank.add(model, editor, applied)
        held = 0
        activations.rewrite_pairs(model, applied, ledger.scales_beside_biases(model, applied))
        grids = activations.integer_grids(applied)
        plan = integer.Plan()
        if grids:
            plan = integer.plan(model, activations.integer_weights(applied))
        inside = {layer.weight.name for layer in plan.layers.values()}
        by_token = token.products(model, ledger.weights_of_tokens(applied))
        inside |= {node.inputs[1].name for node in by_token if node.inputs[1] is not None}
        integers: dict[str, integer.Held] = {}
        scale_types: dict[str, Any] = {}
        stored = [entry for entry in applied if "value" in entry.detail]
        for entry in ctx.progress.track(stored, "quantizing", len(stored)):
            value = by_name[entry.detail["value"]]
            base = value.const_value
            assert base is not None
            own, scheme = ledger.layout_of(entry), ledger.scheme_of(entry)
            numbers = weights.numbers(base)
            scale, zero = ledger.parameters(numbers, own, scheme, entry.arrays)
            make = functools.partial(
                rounding.codes, layout=own, scheme=scheme, scale=scale, zero=zero
            )
            solved = ledger.solved_codes(entry, scheme)
            if solved is None and held + base.size <= HELD_BYTES:
                held += base.size
                solved = make(numbers)
            weights.give_back_tensor(base)
            codes = as_codes(base, make if solved is None else solved, own, scheme)
            if value.name in inside:
                integers[value.name or ""] = integer.Held(codes, own.scales(scale))
                scale_types[value.name or ""] = scheme.scale_type.numpy()
            else:
                editor.replace(value, codes, own.scales(scale), own.scales(zero), own, scheme)
        integer.Rewriter(model, plan, grids, integers).run()
        codes_of = {n: (h.codes, h.scales.astype(scale_types[n])) for n, h in integers.items()}
        token.rewrite(model, by_token, codes_of, ledger.scales_of_tokens(applied))
        for name in integers:
            editor.renamed[name] = (
                f"{name}_int8" if f"{name}_int8" in model.graph.initializers else None
            )
        types.annotate(model)
        saved = before - weights.num_bytes(model)
        statistics: dict[str, float] = {}
        if applied:
            statistics = {"weights": len(stored), "bytes_saved": saved}
        return Result(bool(applied), list(chosen), editor.renamed, statistics)

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The model with float weights that are what their codes stand for."""
        if self.requantize:
            again.to_floats(before)
        return reference.build(before, chosen)

    # -- choosing ---------------------------------------------------------------------------------

    def _check_schemes(self, found: Sequence[Candidate]) -> None:
        passes = [self, *map(self._in, self.formats)]
        schemes = [pass_._scheme(candidate) for candidate in found for pass_ in passes]
        problems = dict.fromkeys(problem for scheme in schemes if (problem := scheme.problem()))
        problems |= dict.fromkeys(self._problems_of_bits())
        if self.clip == "hqq" and (self.symmetric or self.zeros != "float"):
            problems[
                "clip='hqq' moves zero points by less than a code, and those that are codes would come back"
                " to where they were: give symmetric=False and zeros='float'"
            ] = None
        if problem := self._of_activations().problem():
            problems[problem] = None
        reads_biases = self.activations != "float32" and self.activation_scales != "token"
        if self.vectors != "float32" and (self.correct_bias or reads_biases):
            problems[
                f"vectors={self.vectors!r} does not go with correct_bias, nor with activations that take"
                " biases in: leave it out"
            ] = None
        if self.low_rank and (self.correct_bias or reads_biases):
            problems[
                "low_rank does not go with correct_bias, nor with activations that have fixed scales:"
                " leave it out"
            ] = None
        if problems:
            raise OptionError(Diagnostic("quantize.scheme", text) for text in problems)

    def _check_target(self, found: Sequence[Candidate], ctx: Context) -> None:
        if ctx.target is None:
            return
        candidates_ = [c for c in found if not (candidates.refusal(c) or self._left_out(c))]
        passes = [self, *map(self._in, self.formats)]
        schemes = [pass_._scheme(candidate) for candidate in candidates_ for pass_ in passes]
        sample = {"x": np.linspace(-1, 1, 4, dtype=np.float32)[:, None]}

        def quantize(model: ir.Model, scheme: Scheme) -> None:
            width = model.graph.inputs[0].shape
            assert width is not None
            fed = {"x": np.repeat(sample["x"], int(width[-1]), 1)}  # type: ignore[arg-type]
            one = Quantize(
                **{f.name: getattr(scheme, f.name) for f in _OF_SCHEMES},
                activations=self.activations,
                activation_scales=self.activation_scales,
                activation_form=self.activation_form,
                min_size=0,
            )
            one.run(model, Context(calibration=[fed]))

        if problems := on_target.problems(ctx.target, schemes, quantize):
            raise OptionError(problems)

    def _check_coverage(self, found: Sequence[Candidate], entries: Sequence[Entry]) -> None:
        sizes = {c.name: math.prod(c.dims) for c in found if c.value.dtype in candidates.FLOATS}
        done = sum(sizes[e.candidate] for e in entries if e.status == "applied")
        share = done / max(1, sum(sizes.values()))
        if share >= self.min_coverage:
            return
        left = [e for e in entries if e.status != "applied" and e.candidate in sizes]
        left.sort(key=lambda entry: -sizes[entry.candidate])
        raise GateError(
            Diagnostic(
                "quantize.coverage",
                f"{share:.1%} of the weights' elements would be quantized,"
                f" min_coverage={self.min_coverage} asks for {self.min_coverage:.1%}",
                notes=tuple(f"{e.candidate} is {e.status}: {e.reason}" for e in left[:10]),
                help="change the scheme for these weights with overrides, or lower min_coverage",
            )
        )

    def _of_activations(self) -> Settings:
        return Settings(
            self.activations,
            self.activation_scales,
            self.activation_form,
            self.activation_range,
            self.activation_percentile,
        )

    def _settings(self, candidate: Candidate) -> dict[str, Any]:
        """The options of one weight: the pass', or those of the overrides that match."""
        settings: dict[str, Any] = {
            "weights": self.weights,
            "symmetric": self.symmetric,
            "group_size": self.group_size,
            "per_tensor": self.per_tensor,
            "scales": self.scales,
            "zeros": self.zeros,
            "group_axis": self.group_axis,
            "codebook": self.codebook,
            "low_rank": self.low_rank,
        }
        for pattern, override in self.overrides.items():
            if candidate.matches(pattern):
                settings.update(_without(override), **override)
        return settings

    def _scheme(self, candidate: Candidate) -> Scheme:
        settings = self._settings(candidate)
        del settings["low_rank"]
        scheme = Scheme(**settings)
        narrow = scheme.format.kind == "integer" and scheme.format.bits < 8
        plain = scheme.symmetric and not scheme.group
        return dataclasses.replace(scheme, operand=candidate.is_operand and narrow and plain)

    def _entry(self, candidate: Candidate, ctx: Context) -> Entry:
        value = candidate.value
        name, where = candidate.name, module_path(value)
        if reason := candidates.refusal(candidate):
            return Entry(name, "refused", reason, where)
        if reason := self._left_out(candidate):
            return Entry(name, "skipped", reason, where, left_out=True)
        if not candidate.uses:
            readers = ", ".join(sorted({node.op_type for node in value.consumers()}))
            reason = f"read by {readers or 'nothing'}, which is no product and no lookup"
            return Entry(name, "skipped", reason, where)
        scheme = self._scheme(candidate)
        try:
            own = _layout_for(candidate.uses[0], candidate.dims, scheme)
        except Unfit as why:  # another scheme would fit: strictness objects
            return Entry(name, "skipped", str(why), where)
        if reason := candidates.unfit(value, scheme.largest_weight):  # reads the weight: comes last
            return Entry(name, "refused", reason, where)
        if scheme.fractional and sparsity_of(value) is not None:
            reason = "it is sparse, and zeros='float' has no code for zero: integer zero points do"
            return Entry(name, "skipped", reason, where)
        scheme = for_weight(scheme, weights.array(value), own) if scheme.is_fitted else scheme
        found, words = ledger.detail(name, own, scheme), _words(candidate, own, scheme)
        if self.clip == "hqq" and scheme.format.kind != "cast" and not scheme.fractional:
            words += ", over its whole range as hqq moves zeros='float' alone"
        branch, reason = self._branch(candidate, own, scheme)
        if branch is not None:
            found["low_rank"] = low_rank.detail(branch)
            found["bytes"] += branch.num_bytes(*candidate.dims)
        entry = Entry(name, "applied", words + reason, where, detail=found)
        arrays = self._solve(candidate, entry, ctx)
        return dataclasses.replace(entry, arrays=arrays)

    # -- bits by a budget -------------------------------------------------------------------------

    def _problems_of_bits(self) -> Iterator[str]:
        if bool(self.bits) != bool(self.formats):
            yield "bits is a budget for formats, and formats share the budget bits: give both"
        if len(set(self.formats)) < len(self.formats):
            yield f"formats={self.formats!r} names one twice"
        if self.bits and self.sensitivity in ("lim", "zd") and len(self.formats) != 2:
            yield f"sensitivity={self.sensitivity!r} shares out two formats, a wide and a narrow one"
        if self.bits and self.low_rank:
            yield "low_rank does not go with bits, which counts weights only: leave one out"

    def _in(self, name: FormatName) -> Quantize:
        """The pass with another format, and of the other options what that has."""
        kind = FORMATS[name].kind
        changes: dict[str, Any] = {"weights": name, "bits": 0.0, "formats": ()}
        if kind == "cast":
            changes |= {"group_size": 0, "per_tensor": False}
        if kind == "cast" or FORMATS[name].group:
            changes["scales"] = "float32"
        if FORMATS[name].group:
            changes |= {"group_size": 0, "per_tensor": False}
        if kind != "integer":
            changes |= {"symmetric": True, "zeros": "integer"}
        return dataclasses.replace(self, **changes)

    def _shares(
        self, model: ir.Model, found: Sequence[Candidate], ctx: Context
    ) -> dict[str, allocation.Share]:
        """The format of every weight that no override gives one."""
        given = [pattern for pattern, own in self.overrides.items() if "weights" in own]
        passes = {name: self._in(name) for name in self.formats}
        options_: list[allocation.Options] = []
        for candidate in ctx.progress.track(found, "looking at formats", len(found)):
            if any(candidate.matches(pattern) for pattern in given):
                continue
            one = allocation.Options(candidate.name, math.prod(candidate.dims))
            for name, pass_ in passes.items():
                entry = dataclasses.replace(pass_, solver="rtn")._entry(candidate, ctx)
                if entry.status == "applied":
                    one.entries[name] = entry
            if one.entries:
                options_.append(one)
        if not options_ and not any(c.matches(p) for c in found for p in given):
            return {}  # nothing that could be quantized at all
        return allocation.share_out(model, options_, self.bits, self.sensitivity, ctx)

    def _allocated(
        self, candidate: Candidate, shares: Mapping[str, allocation.Share], ctx: Context
    ) -> Entry:
        """The entry of a weight in the format that it got."""
        share = shares.get(candidate.name)
        if share is None:
            return self._entry(candidate, ctx)
        entry = self._in(cast(FormatName, share.format))._entry(candidate, ctx)
        found = {**entry.detail, "sensitivity": {"by": share.by, **share.costs}}
        return dataclasses.replace(entry, reason=f"{entry.reason}; {share.words}", detail=found)

    def _branch(
        self, candidate: Candidate, own: Layout, scheme: Scheme
    ) -> tuple[Branch | None, str]:
        """What is put beside a weight, and the words for it."""
        rank = self._settings(candidate)["low_rank"]
        if not rank or scheme.format.kind == "cast":
            return None, ""
        reason = low_rank.unfit(candidate, rank)
        waits = self.solver == "gptq" or self.low_rank_basis == "input"
        if not reason and waits and not inputs.is_for(candidate, own, scheme):
            reason = "no branch: data cannot solve it"
        if reason:
            return None, f"; {reason}"
        branch = Branch(rank, self.low_rank_basis, self.low_rank_stored)
        return branch, f"; {rank} directions of its error in {branch.stored} beside it"

    def _vector(self, value: ir.Value, dtype: FormatName) -> Entry:
        """The entry of a bias, or of the scales of a normalization."""
        name, where, scheme = value.name or "", module_path(value), Scheme(weights=dtype)
        refused = "a graph input: a caller may override it" if not weights.is_weight(value) else ""
        if reason := refused or candidates.unfit(value, scheme.largest_weight):
            return Entry(name, "refused", reason, where)
        array = weights.array(value)
        moved = int((array.astype(scheme.code_type) != array).sum())
        reason = f"{dtype}, {moved or 'none'} of {array.size} numbers rounded"
        own = Layout(array.shape, None)
        return Entry(name, "applied", reason, where, ledger.detail(name, own, scheme))

    def _left_out(self, candidate: Candidate) -> str:
        if reason := candidates.left_out(candidate, self.ignore, self.min_size):
            return reason
        lookups = [use for use in candidate.uses if use.is_lookup]
        if lookups and not self.embeddings:
            tied = len(lookups) < len(candidate.uses)
            return f"a table{', tied to a product' if tied else ''}, and embeddings=False"
        return ""

    # -- solving ----------------------------------------------------------------------------------

    def _needs_data(self, entries: Sequence[Entry]) -> bool:
        """Whether weights are solved one after the other, on calibration data."""
        branches = any("low_rank" in entry.detail for entry in entries)
        return self.solver == "gptq" or (branches and self.low_rank_basis == "input")

    def _solve(self, candidate: Candidate, entry: Entry, ctx: Context) -> Mapping[str, Array]:
        """What has to be searched for: nothing where the formula says it all, or data will."""
        own, scheme = ledger.layout_of(entry), ledger.scheme_of(entry)
        waits = self.solver == "gptq" and inputs.is_for(candidate, own, scheme)
        branch = "low_rank" in entry.detail
        waits = waits or (branch and self.low_rank_basis == "input")
        searched = self.clip != "none" and scheme.format.kind != "cast"
        if waits or not (searched or branch):
            return {}
        assert candidate.value.const_value is not None
        array = weights.numbers(candidate.value.const_value)

        def search() -> dict[str, Array]:
            found: dict[str, Array] = {}
            if searched:
                found["scales"], found["zeros"] = rounding.ranges(
                    array, own, scheme, self.clip, self.percentile
                )
            if branch:
                made = ledger.quantized(array, dataclasses.replace(entry, arrays=found))
                found |= _branch_of_error(array, made, entry.detail["low_rank"]["rank"], ctx.device)
            return found

        return ctx.once(f"{candidate.name}/{scheme.weights}", search)


_OF_SCHEMES = [f for f in dataclasses.fields(Scheme) if f.name not in ("tensor_scale", "operand")]

# -- entries --------------------------------------------------------------------------------------


def _without(override: Override) -> Override:
    """What says nothing to a weight any more once an override takes away what it was about."""
    gone = Override()
    if "weights" in override:
        gone["codebook"] = ()
    if override.get("symmetric"):
        gone["zeros"] = "integer"
    if override.get("group_size") == 0:
        gone["group_axis"] = "input"
    return gone


def _layout_for(use: Use, dims: Sequence[int], scheme: Scheme) -> Layout:
    if scheme.format.kind == "cast":
        return Layout(tuple(dims), None)
    try:
        return layout(dims, use.sums, scheme.group, scheme.per_tensor, scheme.group_axis)
    except Ragged as why:
        if scheme.format.group:
            raise Unfit(f"{str(why).split(';')[0]}; {scheme.weights} has no others") from why
        raise


def _branch_of_error(array: Array, made: Array, rank: int, device: str) -> dict[str, Array]:
    import torch  # an extra

    whole, left = (torch.tensor(a.astype(np.float64), device=device) for a in (array, made))
    return low_rank.of_error(whole - left, rank)


def _words(candidate: Candidate, own: Layout, scheme: Scheme) -> str:
    """What is done to a weight, in a line of the ledger."""
    first, *others = candidate.uses
    if scheme.format.kind == "cast":
        return str(scheme)
    count = own.groups
    reason = f"{scheme}, {count} {'scale' if count == 1 else 'scales'}: {own.words}"
    differing = [u for u in others if not _agrees(u, own, scheme)]
    if differing:
        reason += f", as {first} wants; {', '.join(map(str, differing))} would want others"
    elif others:
        reason += f"; shared by {', '.join(map(str, candidate.uses))}"
    return reason


def _agrees(use: Use, own: Layout, scheme: Scheme) -> bool:
    try:
        return _layout_for(use, own.dims, scheme) == own
    except Unfit:
        return False
