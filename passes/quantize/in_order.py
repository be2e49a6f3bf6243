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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import weights
from netlathe.ir.sparsity import sparsity_of
from netlathe.passes.quantize import ledger, low_rank
from netlathe.passes.quantize.candidates import Candidate
from netlathe.passes.quantize.layout import Layout
from netlathe.passes.quantize.rounding import Clip
from netlathe.passes.quantize.scheme import Scheme
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context

if TYPE_CHECKING:  # an extra
    import torch

    from netlathe.passes.quantize import gptq

Array = npt.NDArray[Any]


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
    from netlathe.execute.torch_ops import storage
    from netlathe.execute.walk import Walk  # torch is an extra
    from netlathe.passes.quantize import gptq

    if not ctx.calibration:
        ctx.collect(model, [], needed_by=f"quantize with {settings.words}")
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
            walk.replace(candidate.name, _rounded(candidate.value, entry))
            done[index] = dataclasses.replace(entry, reason=f"{entry.reason}; to nearest")
    ready: dict[Covariance, gptq.Inputs] = {}
    for _, index in ctx.progress.track(sorted(jobs), "solving", len(jobs)):
        entry, candidate = entries[index], known[entries[index].candidate]
        assert candidate.input is not None
        wanted = Covariance(candidate.input.value.name or "", candidate.input.axis)

        def inputs(wanted: Covariance = wanted) -> gptq.Inputs:
            if wanted not in ready:
                ready.clear()  # they are big, and those before are not asked for again
                ready[wanted] = gptq.Inputs(
                    walk.summed_up(wanted), damping=settings.damping, act_order=settings.act_order
                )
            return ready[wanted]

        piece = functools.partial(_gptq, settings, entry, candidate.value, inputs, ctx.device)
        solved = ctx.once(f"{candidate.name}/gptq", piece)
        loss, damping = (float(solved[key]) for key in ("loss", "damping"))
        detail = {**entry.detail, "solver": settings.solver, "damping": damping, "error": loss}
        how = "gptq" if settings.solver == "gptq" else "to nearest"
        reason = f"{entry.reason}; {how}, {loss:.2g} of the output's square lost"
        if damping > settings.damping:
            reason += f", damped by {damping:.2g} as its inputs are singular"
        arrays = {key: a for key, a in solved.items() if key not in ("loss", "damping")}
        done[index] = dataclasses.replace(entry, reason=reason, detail=detail, arrays=arrays)
        made = _effective(done[index], arrays, ctx.device)
        assert candidate.value.dtype is not None
        walk.replace(candidate.name, made.to(storage.TORCH_DTYPE[candidate.value.dtype]))
        for array in arrays.values():
            weights.give_back_array(array)  # mapped where there is a cache
    return done


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


def _gptq(
    settings: Settings,
    entry: Entry,
    value: ir.Value,
    needed: Callable[[], gptq.Inputs],
    on: str,
) -> dict[str, Array]:
    from netlathe.execute.torch_ops import storage
    from netlathe.passes.quantize import device, gptq

    inputs = needed()
    own, scheme = ledger.layout_of(entry), ledger.scheme_of(entry)
    assert value.const_value is not None
    matrix = device.to_matrix(storage.load(value.const_value, on), own)
    weights.give_back_tensor(value.const_value)
    groups = own.groups // len(matrix)
    scale, zero = device.ranges(
        matrix, groups, scheme, settings.clip, settings.percentile, inputs.importance
    )
    if settings.solver == "gptq":
        kept = matrix != 0 if sparsity_of(value) is not None else None
        found = inputs.solve(matrix, scale, zero, scheme, sweeps=settings.sweeps, kept=kept)
    else:
        found = device.nearest(matrix, scale, zero, scheme)
    arrays = {
        "codes": device.from_matrix(found, own).cpu().numpy(),
        "scales": scale.reshape(-1).cpu().numpy(),
        "zeros": zero.reshape(-1).cpu().numpy(),
    }
    rest = matrix.double() - device.to_matrix(_effective(entry, arrays, on), own)
    if (branch := low_rank.branch_of(entry)) is not None:
        moment = inputs.moment if branch.basis == "input" else None
        arrays |= low_rank.of_error(rest.T, branch.rank, moment)
        rest = matrix.double() - device.to_matrix(_effective(entry, arrays, on), own)
    loss = gptq.lost(rest.to(inputs.dtype), matrix.to(inputs.dtype), inputs.moment)
    return {**arrays, "loss": np.asarray(loss), "damping": np.asarray(inputs.damping)}


def _effective(entry: Entry, arrays: Mapping[str, Array], on: str) -> torch.Tensor:
    """What a weight does with what stands beside it, in float32 in its own dims; on the device."""
    from netlathe.passes.quantize import device

    own, scheme = ledger.layout_of(entry), ledger.scheme_of(entry)
    made = device.numbers(arrays["codes"], own, scheme, arrays["scales"], arrays["zeros"], on)
    if "a" in arrays:
        made = made + low_rank.product(entry, arrays, on)
    return made
