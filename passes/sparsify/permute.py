"""An order of channels in which N:M keeps more: columns that compete for a place are put into other groups.

    kept(order) = sum over weights that read the channels of   sum of what N of every M keep / sum of all

Two columns of different groups are swapped where that raises what is kept (channel permutation, Pool and
Yu, NeurIPS 2021, section 4, without their exhaustive start). All swaps are looked at at once. With t_a
the N-th largest of what is left of a row's group without column a, the group keeps with c in its place

    sum of the N largest without a  -  t_a  +  max(t_a, c)

so one pass over pairs of columns tells the gain of each. The best that share no group are made, until a
round gains next to nothing. The axis analysis says which weights have the axis, and reorders all of
them: the function stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import axes as axis_analysis
from netlathe.analysis.axes import Axes, Group, algebra
from netlathe.ir import edit, sparsity, weights
from netlathe.ir.provenance import module_path
from netlathe.ir.sparsity import Pattern
from netlathe.passes.sparsify.in_order import Job, Settings, fed_by
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
_MOST_ROWS = 1 << 11  # of all weights together, spread evenly: what a search looks at
_MOST_ROUNDS = 20
_AT_ONCE = (1 << 28, 1 << 22)  # numbers looked at at once on a GPU, and on a CPU
_LEAST_GAIN = 1e-4  # of what is kept, in a round that is followed by another


def search(
    model: ir.Model, jobs: Sequence[Job], settings: Settings, ctx: Context, needed_by: str
) -> tuple[list[Entry], list[Job]]:
    """An entry for every axis that N:M runs along, and the jobs with their columns in order."""
    axes = axis_analysis.analyse(model)
    along: dict[Group, list[Job]] = {}
    for job in jobs:
        if job.pattern.kind == "n:m" and (group := _innermost(axes, job)) is not None:
            along.setdefault(group, []).append(job)
    scales = _scales(
        model, [job for own in along.values() for job in own], settings, ctx, needed_by
    )
    entries, ordered = [], {}
    for group, own in ctx.progress.track(along.items(), "ordering channels", len(along)):
        entry = _entry(group, own, scales, ctx, _bound(axes, group, jobs, own))
        entries.append(entry)
        if entry.status == "applied":
            order = entry.arrays["order"]
            for job in own:
                starts = np.arange(0, job.form.shape[1], group.size)
                columns = (starts[:, None] + order).reshape(-1)
                ordered[job] = dataclasses.replace(job, order=columns)
    return entries, [ordered.get(job, job) for job in jobs]


def apply(model: ir.Model, chosen: Sequence[Entry]) -> dict[str, str | None]:
    """Put channels into the orders that were found; values that have them get other names."""
    if not chosen:
        return {}
    axes = axis_analysis.analyse(model)
    values = {value.name: value for value in model.graph.initializers.values()}
    orders = {}
    for entry in chosen:
        name, axis = entry.detail["order_of"]
        group = _last_factor(axes, values[name], axis)
        assert group is not None
        orders[group] = entry.arrays["order"].tolist()
    atoms = {group.atom for group in orders}
    moved = [
        value
        for node in model.graph
        for value in node.outputs
        if not atoms.isdisjoint(
            a for x in axes.related.axes.get(value, ()) for a in algebra.atoms(x)
        )
    ]
    axis_analysis.permute(axes, orders)
    taken, renamed = edit.names_in(model.graph), dict[str, str | None]()
    for value in moved:
        if value.name and not value.is_graph_output() and value.graph is model.graph:
            renamed[value.name] = None  # it means something else now
            value.name = edit.unique_name(model.graph, f"{value.name}_ordered", taken)
    return renamed


def _innermost(axes: Axes, job: Job) -> Group | None:
    return _last_factor(axes, job.candidate.value, job.form.axis)


def _last_factor(axes: Axes, value: ir.Value, axis: int) -> Group | None:
    """The group whose positions follow each other along an axis."""
    if value not in axes.related.axes:
        return None
    last = algebra.find(algebra.factors(axes.related.axes[value][axis])[-1])
    return axes.by_atom.get(last)


def _bound(axes: Axes, group: Group, jobs: Sequence[Job], own: Sequence[Job]) -> str:
    """Which other weight's pattern an order of the group would break; empty where there is none."""
    mine = {job.candidate.value for job in own}
    wanted = [
        (job.candidate.value, job.pattern, job.form.axis, job.form.rows)
        for job in jobs
        if job.candidate.value not in mine
    ]
    known = mine | {value for value, *_ in wanted}
    for value in sparsity.recorded(axes.model):
        if value not in known and (held := sparsity.sparsity_of(value)) is not None:
            wanted.append((value, Pattern.parse(held.pattern), held.axis, held.rows))
    for value, pattern, axis, rows in wanted:
        if value not in axes.related.axes:
            continue
        along = [(axis, pattern.column_multiple), (rows, pattern.row_multiple)]
        for at, multiple in along:
            if multiple > 1 and not _moves_whole(axes.related.axes[value][at], group, multiple):
                return f"axis {at} of {value.name}, which is to be {pattern}, has its positions too"
    return ""


def _moves_whole(axis: algebra.Axis, group: Group, multiple: int) -> bool:
    """Whether an order of the group moves runs of so many positions of the axis as one, or none."""
    inside = 1
    for factor in reversed(algebra.factors(axis)):
        if any(atom is group.atom for atom in algebra.atoms(factor)):
            return algebra.is_atom(factor) and inside % multiple == 0
        inside *= int(factor.size)
    return True


def _scales(
    model: ir.Model, jobs: Sequence[Job], settings: Settings, ctx: Context, needed_by: str
) -> dict[Job, Array]:
    """E[x^2] of what each weight is multiplied with in the model as it is; no entry where nothing says."""
    if settings.score == "magnitude":
        return {}
    from netlathe.execute.statistics import MeanSquare  # torch is an extra

    fed = {job: input_ for job in jobs if (input_ := fed_by(job)) is not None}
    wanted = [MeanSquare(input_.value, input_.axis) for input_ in fed.values()]
    found = ctx.collect(model, wanted, needed_by=needed_by)
    return {
        job: np.tile(result.array, max(1, input_.repeats))
        for (job, input_), result in zip(fed.items(), found, strict=True)
    }


def _entry(
    group: Group, jobs: Sequence[Job], scales: Mapping[Job, Array], ctx: Context, bound: str
) -> Entry:
    first = jobs[0]
    where = module_path(first.candidate.value)
    more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    name = f"order of axis {first.form.axis} of {first.candidate.name}{more}"
    if pins := group.forbidding("permute"):
        return Entry(name, "refused", f"its positions cannot be reordered: {pins[0].reason}", where)
    patterns = {job.pattern for job in jobs}
    if len(patterns) > 1:
        listed = " and ".join(sorted(map(str, patterns)))
        return Entry(name, "refused", f"weights along it are to be {listed}", where)
    if bound:
        return Entry(name, "refused", bound, where)
    (pattern,) = patterns
    if group.size % pattern.m or group.size == pattern.m:
        reason = f"its {group.size} positions are no groups of {pattern.m} to choose among"
        return Entry(name, "skipped", reason, where, left_out=True)

    def find() -> dict[str, Array]:
        columns = np.concatenate([_columns(job, group.size, scales.get(job)) for job in jobs], 1)
        step = -(-columns.shape[1] // _MOST_ROWS)
        order, kept = best_order(np.ascontiguousarray(columns[:, ::step]), pattern, ctx.device)
        return {"order": order, "kept": np.array(kept)}

    found = ctx.once(name, find)
    before, after = (float(share) for share in found["kept"])
    detail = {
        "exact": True,  # an order loses nothing by itself
        "order_of": [first.candidate.name, first.form.axis],
        "weights": [job.candidate.name for job in jobs],
        "kept_before": before,
        "kept_after": after,
    }
    if after <= before:
        reason = f"no order keeps more than {before:.1%} of the score"
        return Entry(name, "skipped", reason, where, detail, left_out=True)
    reason = f"{pattern} keeps {after:.1%} of the score instead of {before:.1%}"
    return Entry(name, "applied", reason, where, detail, arrays={"order": found["order"]})


def _columns(job: Job, size: int, square: Array | None) -> Array:
    """Scores by position of the axis, ``[size, rows]``, as a share of all scores of the weight."""
    scores = job.form.matrix(weights.array(job.candidate.value)).astype(np.float64) ** 2
    if square is not None:
        scores *= square
    total = scores.sum()
    shares = scores / total if total else scores
    return shares.reshape(-1, size).T.astype(np.float32)


def best_order(
    columns: Array, pattern: Pattern, device: str = "cpu"
) -> tuple[Array, tuple[float, float]]:
    """An order of ``columns`` [size, rows] for groups of M, and the share kept before and after."""
    import torch  # an extra

    held = torch.tensor(columns, device=device)
    order = np.arange(len(columns))
    total = float(held.sum(dtype=torch.float64)) or 1.0
    first = now = _kept(held, pattern).sum()
    for _ in range(_MOST_ROUNDS):
        swaps = _swaps(held[torch.from_numpy(order)], pattern)
        for a, b in swaps:
            order[[a, b]] = order[[b, a]]
        before, now = now, _kept(held[torch.from_numpy(order)], pattern).sum()
        if not swaps or now - before < _LEAST_GAIN * now:
            break
    return order, (float(first) / total, float(now) / total)


def _kept(columns: torch.Tensor, pattern: Pattern) -> Array:
    """What each group keeps."""
    import torch

    groups = columns.view(-1, pattern.m, columns.shape[1])
    kept: Array = groups.topk(pattern.n, 1).values.sum((1, 2), dtype=torch.float64).cpu().numpy()
    return kept


def _swaps(columns: torch.Tensor, pattern: Pattern) -> list[tuple[int, int]]:
    """Swaps of columns that share no group, those that gain most first."""
    import torch

    (size, rows), m, n = columns.shape, pattern.m, pattern.n
    kept = np.repeat(_kept(columns, pattern), m)
    gain = np.empty((size, size))
    groups = columns.view(-1, m, rows)
    at_once = max(1, _AT_ONCE[columns.device.type == "cpu"] // (size * rows))
    for out in range(m):  # what a group keeps with any other column in the place of this one
        rest = groups[:, [at for at in range(m) if at != out]]
        largest = rest.topk(n, 1).values
        least = largest[:, -1]
        own = (largest.sum((1, 2), dtype=torch.float64) - least.sum(1, dtype=torch.float64)).cpu()
        for start in range(0, len(groups), at_once):
            part = slice(start, start + at_once)
            sums = torch.maximum(columns, least[part, None]).sum(2, dtype=torch.float64).cpu()
            gain[out::m][part] = (own[part, None] + sums).numpy()
    gain -= kept[:, None]
    gain += gain.T
    first, second = np.triu_indices(size, 1)
    apart = first // m != second // m
    first, second = first[apart], second[apart]
    gains = gain[first, second]
    worth = np.flatnonzero(gains > 1e-9 * kept.sum())
    best = worth[np.argsort(-gains[worth], kind="stable")]
    taken = np.zeros(size // m, bool)
    swaps = []
    for at in best:
        a, b = int(first[at]), int(second[at])
        if not taken[a // m] and not taken[b // m]:
            taken[[a // m, b // m]] = True
            swaps.append((a, b))
    return swaps
