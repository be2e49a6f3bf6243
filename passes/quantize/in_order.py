"""Solves the weights of a model one after the other, each on what the ones before have become.

Weights that are rounded without data are put in first. Then, in the order in which a model reads them, each
of the others is solved with the second moment of what it is really fed: the calibration data, run through
all the weights before it as they are now. The data goes through the model once. The zeros of a sparse
weight stay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import types, weights
from netlathe.ir.sparsity import sparsity_of
from netlathe.passes.quantize import inputs, ledger, low_rank, rounding
from netlathe.passes.quantize.candidates import Candidate
from netlathe.passes.quantize.layout import layout
from netlathe.passes.quantize.rounding import Clip
from netlathe.passes.quantize.scheme import Scheme
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context

if TYPE_CHECKING:  # an extra
    import torch

    from netlathe.execute.statistics import Statistic
    from netlathe.passes.quantize import gptq

Array = npt.NDArray[Any]
_Ranges: TypeAlias = "tuple[torch.Tensor, torch.Tensor] | None"
_MOST_NAMED = 8  # parts that a ledger's line names; its detail has them all


@dataclass(frozen=True)
class Settings:
    """How ranges and codes are found; see the options of the pass."""

    solver: Literal["rtn", "gptq"]
    clip: Clip
    percentile: float
    damping: float
    act_order: bool
    sweeps: int

    @property
    def words(self) -> str:
        """What needs data."""
        return "solver='gptq'" if self.solver == "gptq" else "low_rank_basis='input'"


def solve(
    settings: Settings,
    model: ir.Model,
    found: Sequence[Candidate],
    entries: Sequence[Entry],
    ctx: Context,
) -> list[Entry]:
    """The entries with codes for what data can solve.

    What calibration data never reaches is rounded to nearest, and an entry of its own says so behind them,
    skipped.
    """
    from netlathe.execute.torch_ops import storage
    from netlathe.execute.walk import Walk  # torch is an extra

    if not ctx.calibration:
        ctx.collect(model, [], needed_by=f"quantize with {settings.words}")
    known = {candidate.name: candidate for candidate in found}
    done, unreached = list(entries), []
    solvable: dict[int, inputs.Fed] = {}
    rest: dict[int, Candidate] = {}
    copy = model.clone()
    for index, entry in enumerate(entries):
        candidate = known.get(entry.candidate)
        if entry.status != "applied" or candidate is None:
            continue
        own, scheme = ledger.layout_of(entry), ledger.scheme_of(entry)
        inside = candidate.value.graph is not model.graph
        if not inside and inputs.is_for(candidate, own, scheme):
            solvable[index] = inputs.fed(copy, candidate)
        else:
            done[index] = dataclasses.replace(entry, reason=f"{entry.reason}; to nearest")
            if not inside:
                rest[index] = candidate
    types.annotate(copy)
    walk = Walk(copy, ctx.calibration, device=ctx.device, progress=ctx.progress)
    for index, candidate in rest.items():
        walk.replace(candidate.name, _rounded(candidate.value, entries[index]))
    jobs = [(max(map(walk.position, s.statistic.values)), i) for i, s in solvable.items()]
    ready: dict[Statistic, list[gptq.Inputs | None]] = {}
    for _, index in ctx.progress.track(sorted(jobs), "solving", len(jobs)):
        entry, candidate = entries[index], known[entries[index].candidate]
        what = solvable[index]

        def needed(what: inputs.Fed = what) -> list[gptq.Inputs | None]:
            if what.statistic not in ready:
                ready.clear()  # they are big, and those before are not asked for again
                ready[what.statistic] = _made_ready(walk.summed_up(what.statistic), settings)
            return ready[what.statistic]

        piece = functools.partial(_gptq, settings, entry, candidate, needed, ctx.device)
        solved = ctx.once(f"{candidate.name}/gptq", piece)
        loss, damping = (float(solved[key]) for key in ("loss", "damping"))
        detail = {**entry.detail, "solver": settings.solver, "damping": damping, "error": loss}
        how = "gptq" if settings.solver == "gptq" else "to nearest"
        reason = f"{entry.reason}; {how}, {loss:.2g} of the output's square lost"
        if damping > settings.damping:
            reason += f", damped by {damping:.2g} as its inputs are singular"
        if unfed := solved["unfed"].tolist():
            why = f"{_unfed(unfed, what.parts)}: to nearest"
            reason += f"; {why}"
            detail["unfed"] = unfed
            unreached.append(
                Entry(f"{settings.words} of {entry.candidate}", "skipped", why, entry.where)
            )
        arrays = {
            key: solved[key] for key in ("codes", "scales", "zeros", "a", "b") if key in solved
        }
        done[index] = dataclasses.replace(entry, reason=reason, detail=detail, arrays=arrays)
        made = _effective(done[index], arrays, ctx.device)
        assert candidate.value.dtype is not None
        walk.replace(candidate.name, made.to(storage.TORCH_DTYPE[candidate.value.dtype]))
        for array in arrays.values():
            weights.give_back_array(array)  # mapped where there is a cache
    return done + unreached


def _unfed(which: Sequence[int], parts: int) -> str:
    if parts == 1:
        return "in calibration data its input is always 0"
    named = f"part{'s' if len(which) > 1 else ''} {', '.join(map(str, which[:_MOST_NAMED]))}"
    if more := len(which) - len(which[:_MOST_NAMED]):
        named += f" and {more} more"
    named += f" of {parts}"
    return f"calibration data never reaches {named}"


def _rounded(value: ir.Value, entry: Entry) -> ir.TensorProtocol:
    """A weight that is rounded without data, made when it is read."""
    base = value.const_value
    assert base is not None
    return weights.derived(
        base,
        lambda array: ledger.quantized(array, entry),
        base.dtype,
        base.shape.numpy(),
        value.name or "",
    )


def _made_ready(moments: torch.Tensor, settings: Settings) -> list[gptq.Inputs | None]:
    """The inputs of each part; None of one that nothing reaches."""
    from netlathe.passes.quantize import gptq

    return [
        gptq.Inputs(moment, damping=settings.damping, act_order=settings.act_order)
        if bool(moment.diagonal().any())
        else None
        for moment in (moments if moments.dim() == 3 else moments[None])
    ]


def _gptq(
    settings: Settings,
    entry: Entry,
    candidate: Candidate,
    needed: Callable[[], list[gptq.Inputs | None]],
    on: str,
) -> dict[str, Array]:
    """Codes, and what is lost, of a weight whose parts have inputs of their own."""
    import torch

    from netlathe.execute.torch_ops import storage
    from netlathe.passes.quantize import device

    value, use = candidate.value, candidate.uses[0]
    own, scheme = ledger.layout_of(entry), ledger.scheme_of(entry)
    assert value.const_value is not None
    parts = needed()
    by_row = inputs.is_by_row(use, own)
    rows = own if by_row else layout(own.dims, use.sums)
    matrix = device.to_matrix(storage.load(value.const_value, on), rows)
    searched: tuple[Array, Array] | None = None
    each: list[_Ranges] = [None] * len(parts)
    if (
        not by_row
    ):  # groups run over rows: scales are found before, and each element is told its own
        array = weights.numbers(value.const_value)
        searched = rounding.ranges(array, own, scheme, settings.clip, settings.percentile)
        s, z = (device.to_matrix(torch.tensor(own.spread(a), device=on), rows) for a in searched)
        each = list(zip(s.chunk(len(parts)), z.chunk(len(parts)), strict=True))
    weights.give_back_tensor(value.const_value)
    groups = own.groups // len(matrix) if by_row else matrix.shape[1]
    sparse = sparsity_of(value) is not None
    found = [
        _part(settings, part, groups, scheme, inputs_, sparse, ranges)
        for part, inputs_, ranges in zip(matrix.chunk(len(parts)), parts, each, strict=True)
    ]
    codes, scale, zero = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    scales, zeros = searched or (a.reshape(-1).cpu().numpy() for a in (scale, zero))
    stored = device.from_matrix(codes, rows).reshape(own.stored)
    arrays = {"codes": stored.cpu().numpy(), "scales": scales, "zeros": zeros}
    rest = matrix.double() - device.to_matrix(_effective(entry, arrays, on), rows)
    if (branch := low_rank.branch_of(entry)) is not None:
        (only,) = parts
        moment = only.moment if only is not None and branch.basis == "input" else None
        arrays |= low_rank.of_error(rest.T, branch.rank, moment)
        rest = matrix.double() - device.to_matrix(_effective(entry, arrays, on), rows)
    return arrays | {
        "loss": np.asarray(_lost(rest, matrix, parts)),
        "damping": np.asarray(max((i.damping for i in parts if i is not None), default=0.0)),
        "unfed": np.array([at for at, i in enumerate(parts) if i is None], np.int64),
    }


def _part(
    settings: Settings,
    matrix: torch.Tensor,
    groups: int,
    scheme: Scheme,
    fed: gptq.Inputs | None,
    sparse: bool,
    ranges: _Ranges,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points of some rows; ``ranges`` are the last two where these are known."""
    from netlathe.passes.quantize import device

    weigh = None if fed is None else fed.importance
    scale, zero = ranges or device.ranges(
        matrix, groups, scheme, settings.clip, settings.percentile, weigh
    )
    if settings.solver == "rtn" or fed is None:
        return device.nearest(matrix, scale, zero, scheme), scale, zero
    kept = matrix != 0 if sparse else None
    codes = fed.solve(matrix, scale, zero, scheme, sweeps=settings.sweeps, kept=kept)
    return codes, scale, zero


def _lost(rest: torch.Tensor, matrix: torch.Tensor, parts: Sequence[gptq.Inputs | None]) -> float:
    """What is lost of the square of all outputs together."""
    from netlathe.passes.quantize import gptq

    lost = whole = 0.0
    pairs = zip(rest.chunk(len(parts)), matrix.chunk(len(parts)), parts, strict=True)
    for left, part, fed in pairs:
        if fed is not None:
            lost += gptq.square(left.to(fed.dtype), fed.moment)
            whole += gptq.square(part.to(fed.dtype), fed.moment)
    return lost / whole if whole else 0.0


def _effective(entry: Entry, arrays: Mapping[str, Array], on: str) -> torch.Tensor:
    """What a weight does with what stands beside it, in float32 in its own dims; on the device."""
    from netlathe.passes.quantize import device

    own, scheme = ledger.layout_of(entry), ledger.scheme_of(entry)
    made = device.numbers(arrays["codes"], own, scheme, arrays["scales"], arrays["zeros"], on)
    if "a" in arrays:
        made = made + low_rank.product(entry, arrays, on)
    return made
