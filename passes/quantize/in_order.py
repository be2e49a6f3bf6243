"""Solves the weights of a model one after the other, each on what the ones before have become.

Weights that are rounded without data are put in first. Then, in the order in which a model reads them, each
of the others is solved with the second moment of what it is really fed: the calibration data, run through
all the weights before it as they are now. The data goes through the model once. The zeros of a sparse
weight stay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import weights
from netlathe.ir.sparsity import sparsity_of
from netlathe.passes.quantize import ledger, rounding
from netlathe.passes.quantize.candidates import Candidate
from netlathe.passes.quantize.layout import Layout
from netlathe.passes.quantize.rounding import Clip
from netlathe.passes.quantize.scheme import Scheme
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """How GPTQ finds ranges and codes; see the options of the pass."""

    clip: Clip
    percentile: float
    damping: float
    act_order: bool
    sweeps: int


def is_for(candidate: Candidate, own: Layout, scheme: Scheme) -> bool:
    """Whether data can say how to round: a matrix in one kind of product, with scales along it."""
    return (
        candidate.input is not None
        and own.axis is not None
        and scheme.format.kind in ("integer", "table")
        and own.groups * own.size == candidate.dims[0] * candidate.dims[1]
        and _is_contracted(candidate, own)
    )


def _is_contracted(candidate: Candidate, own: Layout) -> bool:
    """Whether rows of the layout's matrix are outputs: the scales of a tied table may lie otherwise."""
    sums = candidate.uses[0].sums
    return (own.axis in sums) if own.block else (own.axis not in sums)


def solve(
    settings: Settings,
    model: ir.Model,
    found: Sequence[Candidate],
    entries: Sequence[Entry],
    ctx: Context,
) -> list[Entry]:
    """The entries with codes for what data can solve."""
    from netlathe.execute.statistics import Covariance
    from netlathe.execute.walk import Walk  # torch is an extra

    if not ctx.calibration:
        ctx.collect(model, [], needed_by="quantize with solver='gptq'")
    walk = Walk(model, ctx.calibration, device=ctx.device, progress=ctx.progress)
    known = {candidate.name: candidate for candidate in found}
    done = list(entries)
    jobs: list[tuple[int, int]] = []
    for index, entry in enumerate(entries):
        candidate = known.get(entry.candidate)
        if (
            entry.status != "applied"
            or candidate is None
            or candidate.value.graph is not model.graph
        ):
            continue
        fed = candidate.input
        if fed is not None and is_for(candidate, ledger.layout_of(entry), ledger.scheme_of(entry)):
            jobs.append((walk.position(fed.value.name or ""), index))
        else:
            array = weights.array(candidate.value)
            walk.replace(candidate.name, ledger.quantized(array, entry))
            done[index] = dataclasses.replace(entry, reason=f"{entry.reason}; to nearest")
    moments: dict[Covariance, Array] = {}
    for _, index in ctx.progress.track(sorted(jobs), "solving", len(jobs)):
        entry, candidate = entries[index], known[entries[index].candidate]
        assert candidate.input is not None
        wanted = Covariance(candidate.input.value.name or "", candidate.input.axis)

        def moment(wanted: Covariance = wanted) -> Array:
            if wanted not in moments:
                moments.clear()  # they are big, and those before are not asked for again
                moments[wanted] = walk.collect([wanted])[0].array
            return moments[wanted]

        array = weights.array(candidate.value)
        sparse = sparsity_of(candidate.value) is not None
        piece = functools.partial(_gptq, settings, entry, array, moment, sparse, ctx.device)
        solved = ctx.once(f"{candidate.name}/gptq", piece)
        loss, damping = (float(solved[key]) for key in ("loss", "damping"))
        detail = {**entry.detail, "solver": "gptq", "damping": damping, "error": loss}
        reason = f"{entry.reason}; gptq, {loss:.2g} of the output's square lost"
        if damping > settings.damping:
            reason += f", damped by {damping:.2g} as its inputs are singular"
        arrays = {key: solved[key] for key in ("codes", "scales", "zeros")}
        done[index] = dataclasses.replace(entry, reason=reason, detail=detail, arrays=arrays)
        walk.replace(candidate.name, ledger.quantized(array, done[index]))
    return done


def _gptq(
    settings: Settings,
    entry: Entry,
    array: Array,
    second: Callable[[], Array],
    sparse: bool,
    device: str,
) -> dict[str, Array]:
    from netlathe.passes.quantize import gptq

    moment = second()
    own, scheme = ledger.layout_of(entry), ledger.scheme_of(entry)
    columns = len(moment)
    scale, zero = rounding.ranges(
        array, own, scheme, settings.clip, settings.percentile, np.diagonal(moment)
    )
    matrix = own.view(array).reshape(-1, columns).astype(np.float64)
    found = gptq.solve(
        matrix,
        moment,
        scale.reshape(len(matrix), -1),
        zero.reshape(len(matrix), -1),
        scheme,
        damping=settings.damping,
        act_order=settings.act_order,
        sweeps=settings.sweeps,
        kept=matrix != 0 if sparse else None,
        device=device,
    )
    codes = np.empty(own.stored, scheme.code_type)
    into = own.view(codes)
    into[...] = found.codes.reshape(into.shape)
    made = rounding.numbers(codes, own, scheme, scale, zero, np.float64)
    loss = gptq.error(matrix, own.view(made).reshape(matrix.shape), moment)
    return {
        "codes": codes,
        "scales": scale,
        "zeros": zero,
        "loss": np.asarray(loss),
        "damping": np.asarray(found.damping),
    }
