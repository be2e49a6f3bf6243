"""Solves the weights of a model one after the other, each on what the ones before have become.

Weights that no data speaks of are masked by magnitude and put in first. Then, in the order in which a
model reads them, each of the others is solved with the moments of what it is really fed: the
calibration data, run through all the weights before it as they are now.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import weights
from netlathe.ir.sparsity import Pattern
from netlathe.passes.quantize.candidates import Candidate
from netlathe.passes.sparsify import dsnot, masks
from netlathe.passes.sparsify.form import Form
from netlathe.passes.sparsify.patches import fits as patches_fit
from netlathe.passes.sparsify.patches import with_patches
from netlathe.pipeline.pass_ import Context

Array = npt.NDArray[Any]
Score = Literal["magnitude", "wanda", "sparsegpt"]


@dataclass(frozen=True, eq=False)
class Job:
    """A weight to make sparse: how it is seen, what is asked for, and in which order columns stand."""

    candidate: Candidate
    form: Form
    pattern: Pattern
    ratio: float
    order: Array | None = None  # of columns; None: as they are


@dataclass(frozen=True)
class Settings:
    """How masks and weights are found; see the options of the pass."""

    score: Score
    damping: float
    refine: bool
    sweeps: int

    @property
    def within(self) -> masks.Within:
        """What shares a threshold: the outputs of a layer differ in scale, which data makes up for."""
        return "row" if self.score == "wanda" else "layer"

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is looked at."""
        return self.score != "magnitude" or self.refine or self.sweeps > 0


@dataclass(frozen=True)
class Moments:
    """Of what a weight is multiplied with: mean and second moment of its columns."""

    mean: Array  # [columns]
    second: Array  # [columns, columns], or [columns] where columns are taken to be uncorrelated

    @property
    def square(self) -> Array:
        """E[x^2] of each column."""
        return np.asarray(np.diagonal(self.second)) if self.second.ndim == 2 else self.second


Solved = Mapping[str, Array]  # kept (bits), or weight; share: what is lost; damping


def solve(
    settings: Settings, model: ir.Model, jobs: Sequence[Job], ctx: Context, needed_by: str
) -> list[Solved]:
    """What is found for every job, in order."""
    if not settings.needs_data:
        track = ctx.progress.track(jobs, "choosing zeros", len(jobs))
        return [_once(job, settings, None, ctx) for job in track]
    from netlathe.execute.statistics import Covariance, Mean, MeanSquare
    from netlathe.execute.walk import Walk  # torch is an extra

    if not ctx.calibration:
        ctx.collect(model, [], needed_by=needed_by)
    wanted = [job.candidate.name for job in jobs if _sees_patches(job)]
    probed, patches = with_patches(model, wanted)
    walk = Walk(probed, ctx.calibration, device=ctx.device, progress=ctx.progress)
    found: dict[int, Solved] = {}
    fed: list[tuple[int, int, Input]] = []
    for index, job in enumerate(jobs):
        if (input_ := fed_by(job)) is not None:
            if (name := patches.get(job.candidate.name)) is not None:
                input_ = Input(name, 1, patches=True)
            fed.append((walk.position(input_.value), index, input_))
            continue
        found[index] = _once(job, settings, None, ctx)
        if job.candidate.value.graph is model.graph:
            walk.replace(job.candidate.name, _stored(job, found[index]))
    held: dict[Input, Moments] = {}
    order = sorted(fed, key=lambda each: each[:2])
    for _, index, input_ in ctx.progress.track(order, "solving", len(order)):
        job = jobs[index]

        def moments(input_: Input = input_, job: Job = job) -> Moments:
            if input_ not in held:
                held.clear()  # they are big, and those before are not asked for again
                wide = MeanSquare if input_.repeats else Covariance
                own = [Mean(input_.value, input_.axis), wide(input_.value, input_.axis)]
                mean, second = (result.array for result in walk.collect(own))
                held[input_] = _moments(mean, second, input_, job)
            return held[input_]

        found[index] = _once(job, settings, moments, ctx)
        walk.replace(job.candidate.name, _stored(job, found[index]))
    return [found[index] for index in range(len(jobs))]


def _moments(mean: Array, second: Array, input_: Input, job: Job) -> Moments:
    """The moments by column of the job's matrix."""
    if input_.patches:  # channels are slowest there, and fastest in the matrix
        channels = job.form.dims[job.form.axis]
        at = np.arange(len(mean)).reshape(channels, -1).T.reshape(-1)
        return Moments(mean[at], second[np.ix_(at, at)])
    if input_.repeats:
        return Moments(np.tile(mean, input_.repeats), np.tile(second, input_.repeats))
    return Moments(mean, second)


def _sees_patches(job: Job) -> bool:
    """Whether a convolution is solved with the second moment of the patches under its kernel."""
    input_ = fed_by(job)
    if input_ is None or not input_.repeats:
        return False
    node = job.candidate.uses[0].node
    return len(job.candidate.uses) == 1 and patches_fit(node, job.form.shape[1])


@dataclass(frozen=True)
class Input:
    """A value that a weight is multiplied with, the axis of its channels, and columns for each of them.

    ``repeats`` is 0 where columns are channels, and else how many positions of a kernel see each;
    ``patches`` says that the value holds what is under a kernel.
    """

    value: str
    axis: int
    repeats: int = 0
    patches: bool = False


def fed_by(job: Job) -> Input | None:
    """What calibration data says about a weight: what the one kind of product that reads it is fed."""
    candidate, form = job.candidate, job.form
    if (plain := candidate.input) is not None:
        return Input(plain.value.name or "", plain.axis)
    if all(use.is_lookup for use in candidate.uses):
        return _fed_to_experts([use.node for use in candidate.uses], job)
    convolutions = [use.node for use in candidate.uses]
    values = {node.inputs[0] for node in convolutions if node.op_type == "Conv"}
    direct = all(
        node.op_type == "Conv" and node.inputs[1] is candidate.value for node in convolutions
    )
    if not direct or len(values) != 1 or candidate.value.graph is not convolutions[0].graph:
        return None
    (value,) = values
    channels = form.dims[form.axis]
    if value is None or value.shape is None or value.shape[1] != channels:
        return None  # groups: each has channels of its own
    return Input(value.name or "", 1, form.shape[1] // channels)


def _fed_to_experts(lookups: Sequence[ir.Node], job: Job) -> Input | None:
    """What matrices that are looked up are multiplied with, all experts' inputs taken together."""
    found = set()
    for lookup in lookups:
        value: ir.Value | None = lookup.outputs[0]
        while value is not None and len(value.uses()) == 1:
            ((node, position),) = value.uses()
            if node.op_type == "MatMul" and not node.domain:
                other = node.inputs[1 - position]
                found.add((other, -1 if position else -2))
                break
            moves = node.op_type in ("Cast", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
            value = node.outputs[0] if moves else None
        else:
            return None
    if len(found) != 1:
        return None
    ((fed, axis),) = found
    if fed is None or fed.graph is not job.candidate.value.graph or not fed.shape:
        return None
    return Input(fed.name or "", axis) if fed.shape[axis] == job.form.shape[1] else None


def method(job: Job, settings: Settings) -> tuple[str, bool]:
    """By which score zeros are found, and whether data tells what the output loses."""
    input_ = fed_by(job) if settings.needs_data else None
    if input_ is None:
        return "magnitude", False
    if input_.repeats and settings.score == "sparsegpt" and not _sees_patches(job):
        return "wanda", True
    return settings.score, True


def _once(
    job: Job, settings: Settings, moments: Callable[[], Moments] | None, ctx: Context
) -> Solved:
    piece = functools.partial(_solve, job, settings, moments, ctx.device)
    return ctx.once(job.candidate.name, piece)


def _solve(
    job: Job, settings: Settings, moments: Callable[[], Moments] | None, device: str
) -> dict[str, Array]:
    array = weights.array(job.candidate.value)
    matrix = job.form.matrix(array).astype(np.float64)
    known = None if moments is None else moments()
    order = np.arange(matrix.shape[1]) if job.order is None else job.order
    back = np.argsort(order)
    w = matrix[:, order]
    if known is not None:
        at = order if known.second.ndim == 1 else np.ix_(order, order)
        known = Moments(known.mean[order], known.second[at])
    result: dict[str, Array] = {}
    moved = known is not None and known.second.ndim == 2 and settings.score == "sparsegpt"
    if known is not None and moved:
        from netlathe.passes.sparsify import sparsegpt

        made, kept, damping = sparsegpt.solve(
            w, known.second, job.pattern, job.ratio, damping=settings.damping, device=device
        )
        result["damping"] = np.asarray(damping)
    else:
        kept = masks.select(_scores(w, settings, known), job.pattern, job.ratio, settings.within)
        if settings.refine and known is not None:
            kept = dsnot.refine(w, kept, known.mean, known.square, job.pattern)
        made = np.where(kept, w, 0.0)
    if settings.sweeps and known is not None and known.second.ndim == 2:
        from netlathe.passes.sparsify import sparsegpt

        made, moved = (
            sparsegpt.descend(
                w,
                known.second,
                made,
                kept,
                settings.sweeps,
                damping=settings.damping,
                device=device,
            ),
            True,
        )
    result["share"] = np.asarray(_lost(w, made, known))
    if moved:
        result["weight"] = _plain(job.form.back(made[:, back]).astype(array.dtype))
    else:
        result["kept"] = np.packbits(job.form.back(kept[:, back]))
    return result


def _scores(w: Array, settings: Settings, known: Moments | None) -> Array:
    square = w**2
    return square if known is None or settings.score == "magnitude" else square * known.square


def _lost(w: Array, made: Array, known: Moments | None) -> float:
    """What is lost of the output's square; of the weight's own where no data speaks of it."""
    if known is None:
        second = np.ones(w.shape[1])
    elif known.second.ndim == 2:
        return error(w, made, known.second)
    else:
        second = known.second
    of = [float(np.einsum("rc,rc,c->", m, m, second)) for m in (made - w, w)]
    return of[0] / of[1] if of[1] else 0.0


def error(matrix: Array, made: Array, second_moment: Array) -> float:
    """tr(E H E^T) as a share of tr(W H W^T)."""
    of = [float(np.vdot(m @ second_moment, m)) for m in (made - matrix, matrix)]
    return of[0] / of[1] if of[1] else 0.0


def _plain(array: Array) -> Array:
    """The same numbers in a type that numpy itself has."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _stored(job: Job, solved: Solved) -> ir.TensorProtocol:
    base = job.candidate.value.const_value
    assert base is not None
    return tensor(base, solved)


def as_weight(job: Job, solved: Solved) -> Array:
    """The weight that was found."""
    return sparse(weights.array(job.candidate.value), solved)


def tensor(base: ir.TensorProtocol, arrays: Solved) -> ir.TensorProtocol:
    """The weight that was found, as it will be stored."""
    dims = base.shape.numpy()
    return weights.derived(base, lambda a: sparse(a, arrays), base.dtype, dims, base.name or "")


def sparse(array: Array, arrays: Mapping[str, Array]) -> Array:
    """A weight with the zeros, and the values, that were found for it."""
    if "weight" in arrays:
        return np.asarray(arrays["weight"]).astype(array.dtype)
    kept = np.unpackbits(arrays["kept"], count=array.size).astype(bool).reshape(array.shape)
    return np.where(kept, array, np.zeros((), array.dtype))
