"""What makes a candidate important: how it turns the stream, or what the output is without it.

Stream scores look at the residual stream before and after a candidate, all of them in one sweep over the
model as it is:

* ``cosine``: 1 - E[cos(x, x + f(x))] (LLM-Drop, arXiv 2406.15786, section 3; of a block it is the block
  influence of ShortGPT, arXiv 2403.03853, equation 1);
* ``angular``: E[arccos(cos(x, x + f(x)))] / pi (arXiv 2403.17887, equation 7, at n = 1, over all tokens).

Output scores run the model without the candidate beside the whole one, and compare outputs:

* ``kl``: E[KL(p || q)] of the distributions that logits stand for, in nats a row;
* ``mse``: E|y - y'|^2 / E|y|^2, the mean over all outputs (LAPTOP-Diff, arXiv 2404.11098, section 3.2, made
  relative);
* ``perplexity``: by how much the mean negative log-likelihood of the next token rises, in nats: the log of
  the ratio of perplexities (SLEB, arXiv 2402.09025, greedy; one-shot in ShortGPT's ablation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from netlathe.analysis.language import next_token
from netlathe.analysis.overlay import overlay
from netlathe.diagnostics import Diagnostic, PassError, missing_extra
from netlathe.ir import edit, types
from netlathe.passes.drop.candidates import Candidate
from netlathe.passes.drop.editing import take_out
from netlathe.pipeline.loss import kind_of
from netlathe.pipeline.pass_ import Context, Pass

if TYPE_CHECKING:
    from netlathe.execute.statistics import Statistic

StreamScore = Literal["cosine", "angular"]
OutputScore = Literal["kl", "mse", "perplexity"]
Change = Callable[[ir.Graph], object]
# Variants of the model that run beside each other: bounds the outputs that are held of one sample.
_AT_ONCE = 6
_END = (1 << 63) - 1


def by_stream(
    model: ir.Model,
    candidates: Sequence[Candidate],
    score: StreamScore,
    ctx: Context,
    needed_by: str,
) -> list[float]:
    """The score of every candidate, in order.

    Raises:
        PassError: there is no calibration data.
    """
    try:
        from netlathe.execute.statistics import AngularDistance, CosineSimilarity
    except ModuleNotFoundError as error:
        raise missing_extra("torch", "torch", f"{needed_by} by score") from error
    probed = model.clone()
    wanted: list[Statistic] = []
    for candidate, (a, b) in zip(candidates, _streams(probed, candidates), strict=True):
        axis = candidate.branches[0].channel_axis
        cosine = score == "cosine"
        wanted.append(CosineSimilarity(a, b, axis) if cosine else AngularDistance(a, b, axis))
    results = ctx.collect(probed, wanted, needed_by=needed_by)
    return [1.0 - result.scalar if score == "cosine" else result.scalar for result in results]


def _streams(model: ir.Model, candidates: Sequence[Candidate]) -> Iterator[tuple[str, str]]:
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


class ByOutput:
    """Compares the outputs of a model with those it has after some change.

    ``samples`` of the calibration data are looked at, spread evenly; 0 means all. ``pass_`` asks for it, and
    is named in errors.

    Raises:
        PassError: there is no calibration data; the model has no output that the score is about.
    """

    def __init__(
        self, model: ir.Model, score: OutputScore, ctx: Context, samples: int, pass_: Pass
    ) -> None:
        self._model = model.clone()
        self._score = score
        self._needed_by = str(pass_)
        count = len(ctx.calibration)
        if samples and samples < count:
            at = np.linspace(0, count - 1, samples).round().astype(int)
            ctx = dataclasses.replace(ctx, calibration=[ctx.calibration[i] for i in at])
        self._ctx = ctx
        if score == "perplexity":
            self._outputs = [_next_token_loss(self._model)]
        else:
            self._outputs = _outputs(self._model, score, pass_.name)

    def without(self, sets: Sequence[Sequence[Candidate]]) -> list[float]:
        """The score of the model without each of the sets, in order."""

        def change(candidates: Sequence[Candidate]) -> Change:
            places = [place for candidate in candidates for place in candidate.places]
            return lambda graph: take_out(graph, places)

        return self.after([change(candidates) for candidates in sets], "without")

    def after(self, changes: Sequence[Change], how: str) -> list[float]:
        """The score of the model after each of the changes, each of which is made on a copy."""
        batches = [changes[at : at + _AT_ONCE] for at in range(0, len(changes), _AT_ONCE)]
        batches = list(self._ctx.progress.track(batches, f"{self._score} {how}", len(batches)))
        return [score for batch in batches for score in self._batch(batch)]

    def _batch(self, changes: Sequence[Change]) -> list[float]:
        variants = []
        for change in changes:
            variant = self._model.clone()
            change(variant.graph)
            variants.append(variant)
        combined, names = overlay(self._model, variants)
        wanted = [s for renamed in names for s in self._statistics(renamed)]
        found = self._ctx.collect(combined, wanted, needed_by=self._needed_by)
        results = [float(result.array.item()) for result in found]
        each = len(results) // len(changes)
        scores = (results[at : at + each] for at in range(0, len(results), each))
        if self._score == "perplexity":
            return [without - whole for whole, without in scores]
        return [float(np.mean(found)) for found in scores]

    def _statistics(self, renamed: dict[str, str]) -> Iterator[Statistic]:
        try:
            from netlathe.execute.statistics import Divergence, Mean, RelativeSquaredError
        except ModuleNotFoundError as error:
            raise missing_extra("torch", "torch", f"{self._needed_by} by score") from error
        for value in self._outputs:
            name = value.name or ""
            other = renamed[name]
            if self._score == "perplexity":
                yield from (Mean(name), Mean(other))
            elif self._score == "kl":
                logits = kind_of(value) == "logits"
                yield Divergence(name, other, logits=logits)
            else:
                yield RelativeSquaredError(name, other)


def _outputs(model: ir.Model, score: OutputScore, name: str) -> list[ir.Value]:
    """The outputs to compare: all real ones, or those that stand for distributions."""
    found = [
        value
        for value in model.graph.outputs
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and value.shape is not None
        and len(value.shape) > 0
        and (score != "kl" or kind_of(value) != "values")
    ]
    if not found:
        what = "logits or probabilities" if score == "kl" else "floating-point"
        raise PassError(
            Diagnostic(
                f"{name}.outputs",
                f"no output of the model is {what}, which score={score!r} compares",
                help="choose another score",
            )
        )
    return found


def _next_token_loss(model: ir.Model) -> ir.Value:
    """A new value ``[n, 1]``: the negative log-likelihood of every token that follows another.

    What the attention mask calls padding is left out.
    """
    found = next_token(model)
    if found is None:
        raise PassError(
            Diagnostic(
                "drop.language",
                "score='perplexity' needs a language model: ids [b, t] as an input, and logits"
                " [b, t, v] over the vocabulary that they are looked up in as an output",
                help="choose score='kl' or score='mse'",
            )
        )
    logits, ids = found
    graph = model.graph
    taken = edit.names_in(graph)

    def const(number: int) -> ir.Value:
        return edit.constant(graph, np.array([number], np.int64), "drop/number", taken)

    def add(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        made = edit.node(op_type, inputs, attributes)
        made.outputs[0].name = edit.unique_name(graph, f"drop/{op_type}", taken)
        graph.append(made)
        return made.outputs[0]

    answers = add("Slice", logits, const(0), const(-1), const(1))
    wanted = add("Unsqueeze", add("Slice", ids, const(1), const(_END), const(1)), const(-1))
    likelihood = add("GatherElements", add("LogSoftmax", answers, axis=-1), wanted, axis=-1)
    loss = add("Reshape", add("Neg", likelihood), const(-1))
    for mask in graph.inputs:
        if (mask.name or "").endswith("attention_mask"):  # which covers what a cache holds as well
            first = add("Neg", add("Shape", wanted, start=1, end=2))
            kept = add("Slice", mask, first, const(_END), const(1))
            flags = add("Cast", add("Reshape", kept, const(-1)), to=int(ir.DataType.BOOL))
            loss = add("Compress", loss, flags, axis=0)
    loss = add("Unsqueeze", loss, const(-1))
    types.annotate(model)
    return loss
