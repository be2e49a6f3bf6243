"""How far the output moves if one candidate alone is pruned: measured at a few widths, on calibration data.

A variant of the model, in which the positions of the lowest scores are masked, runs beside the whole one. Of
layers that are pruned together the distortions are taken to add up (Xu et al., arXiv 2308.10438, section 3:
the additivity of output distortion; measured by their released code as here, each layer alone at several
ratios, as the squared error of the output).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import sympy

from netlathe.analysis.axes.selection import Selection
from netlathe.analysis.overlay import overlay
from netlathe.diagnostics import Diagnostic, PassError, missing_extra
from netlathe.ir import dims, types
from netlathe.passes.prune import reference
from netlathe.passes.prune.candidates import Candidate, Positions, Scores
from netlathe.pipeline.pass_ import Context, Feeds

Float64 = npt.NDArray[np.float64]

_NEEDED_BY = "prune(allocation='layer_adaptive')"
# What is tried of what can go at most; closer where little goes, as most candidates end there.
_TRIED = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
_ROWS = 4096  # rows of the output (images, tokens) that a distortion is measured on


@dataclass(frozen=True)
class Curve:
    """|y - y'|^2 / |y|^2 over all rows of the first output y, at widths in ascending order."""

    widths: Positions
    distortions: Float64

    def at(self, widths: Sequence[int]) -> Float64:
        """Between two widths that were tried it is a straight line."""
        return np.interp(widths, self.widths, self.distortions)


def curves(
    scored: Mapping[Candidate, Scores], model: ir.Model, ctx: Context
) -> dict[Candidate, Curve]:
    """The curve of each candidate; at full width the distortion is 0.

    Raises:
        PassError: there is no calibration data, a candidate is a vocabulary, or the model has no
            floating-point output.
    """
    for candidate in scored:
        if candidate.scope == "vocab":
            message = f"allocation='layer_adaptive' says nothing about {candidate.name}: logits of"
            message += " tokens that are gone cannot be compared"
            raise PassError(Diagnostic("prune.allocation", message, where=candidate.where))
    output = next((v for v in model.graph.outputs if v.dtype and v.dtype.is_floating_point()), None)
    if output is None:
        raise PassError(Diagnostic("prune.allocation", "the model has no floating-point output"))
    if not ctx.calibration:
        ctx.collect(model, [], needed_by=_NEEDED_BY)  # raises, in one place for all
    some = dataclasses.replace(ctx, calibration=_spread(model, output, ctx.calibration))
    found = {}
    work = list(scored.items())
    for candidate, scores in ctx.progress.track(work, "trying widths", len(work)):
        tried = _tried(candidate)
        measure = partial(_measured, candidate, scores, tried[:-1], output.name or "", model, some)
        name = f"distortion of {candidate.name} at {len(tried)} widths"
        distortions = np.append(ctx.once(name, measure)["array"], 0.0)
        found[candidate] = Curve(np.asarray(tried, np.int64), distortions)
    return found


def _tried(candidate: Candidate) -> list[int]:
    """Some of the widths, ascending; the least and the full one among them, and all where they are few."""
    every = candidate.widths()
    if len(every) <= len(_TRIED) + 1:
        return every
    most = candidate.size - every[0]
    near = (candidate.size - share * most for share in _TRIED)
    return sorted({candidate.size, *(min(every, key=lambda w: abs(w - n)) for n in near)})


def _measured(
    candidate: Candidate,
    scores: Scores,
    widths: Sequence[int],
    output: str,
    model: ir.Model,
    ctx: Context,
) -> dict[str, Float64]:
    """The distortion at each width, all in one sweep."""
    try:
        from netlathe.execute.statistics import RelativeSquaredError
    except ModuleNotFoundError as error:
        raise missing_extra("torch", "torch", _NEEDED_BY) from error
    variants = []
    for width in widths:
        variant = model.clone()
        selection = Selection({candidate.group.atom: candidate.best(scores, width)})
        reference.mask(variant, reference.kept_of(candidate.axes, selection))
        variants.append(variant)
    combined, names = overlay(model, variants)
    wanted = [RelativeSquaredError(output, renamed[output]) for renamed in names]
    results = ctx.collect(combined, wanted, needed_by=_NEEDED_BY)
    return {"array": np.array([result.scalar for result in results])}


def _spread(model: ir.Model, output: ir.Value, feeds: Sequence[Feeds]) -> list[Feeds]:
    """As many of the feeds, spread evenly, as have the rows that are wanted."""
    found = types.infer(model)
    sizes: dict[sympy.Symbol, int] = {}
    for value in model.graph.inputs:
        shape = np.shape(feeds[0].get(value.name or "", ()))
        pairs = zip(found.type(value).shape or (), shape, strict=False)
        sizes.update((dim, size) for dim, size in pairs if isinstance(dim, sympy.Symbol))
    rows = [dims.evaluate(dim, sizes) for dim in (found.type(output).shape or ())[:-1]]
    each = math.prod(size or 1 for size in rows)
    count = min(len(feeds), max(1, -(-_ROWS // each)))
    return [feeds[at] for at in np.linspace(0, len(feeds) - 1, count).round().astype(int)]
