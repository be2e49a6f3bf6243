"""Runs calibration data through a model, stage by stage, and sums up what passes asked for.

The nodes that the wanted values need are cut into stages of consecutive nodes. All samples run
through a stage before the next one starts, so every weight is read once, and what is held at a time is

* the weights of one stage: a single one, or several that together stay below ``stage_bytes``;
* for every sample, the values that cross the boundary of the stage, in host memory, or on a GPU where
  they take little of it. Cuts are made
  where these have the fewest elements. In a transformer that is between its blocks, and what is held
  is samples x tokens x width elements;
* the activations inside the stage, for one sample.

A model whose weights fit into one stage holds no values at all between samples.

Padding does not count: where a graph input is called ``attention_mask`` (or ends in that name) and is
a ``[batch, position]`` tensor of integers or booleans, a row of a value counts only where the mask is
not 0. A value is taken to have positions if its dims say so, for all sizes: its axis 0 is the mask's
batch and another axis its positions, or its axis 0 is the product of the two. A value with fewer
positions than the mask, by the length of a cache, is matched with the mask's end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch

from netlathe.diagnostics import Diagnostic, PassError, did_you_mean
from netlathe.execute.executor import Executor
from netlathe.execute.plan import Program, Slot, Step
from netlathe.execute.statistics import Accumulator, Statistic, StatisticResult, chunks
from netlathe.ir import dims, types, weights
from netlathe.ir.dims import Dim
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import location
from netlathe.pipeline.pass_ import Feeds, Progress

STAGE_BYTES = 256 << 20
MASK = "attention_mask"
_HOST = torch.device("cpu")
_DEVICE_STAGE_BYTES = 1 << 30  # elsewhere than in host memory

Held = dict[Slot, Any]  # of one sample: tensors on the host, and shape values


def sweep(
    model: ir.Model,
    feeds: Sequence[Feeds],
    wanted: Sequence[Statistic],
    *,
    device: str,
    progress: Progress,
    stage_bytes: int | None = None,
    settle: Callable[[StatisticResult], None] | None = None,
) -> list[StatisticResult]:
    """One result for each of ``wanted``, in order; all are collected in the one sweep.

    ``settle`` is given each result before any sample goes on behind the values it is about, in the
    order of the graph: a weight that is a recipe may then read what was made of it. So a pass that
    changes one layer after the other sees every layer behind those that it has changed. Results that
    were given away are not held: nothing is returned then.

    The same model, data and ``stage_bytes`` give the same bits on the same machine.

    Raises:
        PassError: a statistic names no value of the main graph, or one that has no rows and channels;
            an activation that counts is not finite; there are no samples or all of them are padding.
        InputError: a feed does not fit the model.
        LowerError: with every node that the executor cannot run.
    """
    found = types.infer(model)
    watched = watches(model, wanted, found)
    executor = Executor(model, device, keep_weights=True)
    if not feeds:
        raise PassError(Diagnostic("calibration.empty", "there are no calibration samples"))
    for sample in feeds:  # what does not fit is found before any work
        executor.feed(sample)
    held: list[Held] = [{} for _ in feeds]
    sizes = Sizes(model, found, feeds[0])
    most = stage_bytes_on(executor.device) if stage_bytes is None else stage_bytes
    parts = stages(executor, watched, sizes, most, at_watches=settle is not None)
    home = _home(executor.device, parts, sizes, len(feeds))
    work = ((stage, number) for stage in parts for number in range(len(feeds)))
    for stage, number in progress.track(work, "calibrating", len(parts) * len(feeds)):
        held[number] = _run(executor, stage, held[number], feeds[number], number, home)
        if number == len(feeds) - 1:
            executor.release_weights()
            weights.give_back(model)
            for watch, _ in stage.watches if settle is not None else ():
                assert settle is not None
                settle(result(watch))
                watch.sums.forget()
    return [] if settle is not None else [result(watched[statistic]) for statistic in wanted]


def stage_bytes_on(device: torch.device) -> int:
    """How many bytes of weights are held at a time there."""
    return STAGE_BYTES if device.type == "cpu" else _DEVICE_STAGE_BYTES


# -- what is watched ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mask:
    """Which rows of a value count: ``name`` is the input, ``axes`` where its two dims are in the value."""

    name: str
    axes: tuple[int, int] | None  # None: both are axis 0, multiplied


@dataclass(frozen=True)
class Watch:
    """A statistic, its values and its running sum."""

    statistic: Statistic
    values: tuple[ir.Value, ...]
    mask: _Mask | None
    sums: Accumulator


def watches(
    model: ir.Model, wanted: Sequence[Statistic], found: types.Inference
) -> dict[Statistic, Watch]:
    values = {v.name: v for v in model.graph.inputs if v.name}
    values |= {v.name: v for node in model.graph for v in node.outputs if v.name}
    problems = []
    watches: dict[Statistic, Watch] = {}
    for statistic in dict.fromkeys(wanted):
        unknown = [name for name in statistic.values if name not in values]
        problems += [
            Diagnostic(
                "calibration.value",
                f"the model has no value named {name!r}",
                help=did_you_mean(name, list(values)),
            )
            for name in unknown
        ]
        if unknown:
            continue
        read = tuple(values[name] for name in statistic.values)
        problems += _unfit(statistic, read, found)
        mask = _mask_of(model, found, read[0], statistic.channel_axis)
        watches[statistic] = Watch(statistic, read, mask, statistic.start())
    if problems:
        raise PassError(problems)
    return watches


def _unfit(
    statistic: Statistic, values: Sequence[ir.Value], found: types.Inference
) -> Iterator[Diagnostic]:
    """Why the values have no rows and channels that could be summed."""
    shapes = [found.type(value).shape for value in values]
    for value, shape in zip(values, shapes, strict=True):
        dtype, axis = found.type(value).dtype, statistic.channel_axis
        problem = ""
        if dtype is not None and not dtype.is_floating_point():
            problem = f"is {dtype.name}, not floating-point"
        elif shape is None:
            problem = "has no known rank"
        elif not _has_axis(len(shape), axis):
            problem = f"has {len(shape)} dims and no axis {axis}"
        elif statistic.per_channel and not isinstance(shape[axis], int):
            problem = f"is {dims.show(shape)}: its channels, axis {axis}, have no fixed number"
        if problem:
            yield _about(value, "calibration.value", f"{value.name} {problem}")
    first = shapes[0]
    for value, shape in zip(values[1:], shapes[1:], strict=True):
        if first is None or shape is None:
            continue
        pairs = list(zip(first, shape, strict=False))
        if len(first) != len(shape) or any(dims.same(a, b) is False for a, b in pairs):
            message = f"{values[0].name} is {dims.show(first)}, {value.name} {dims.show(shape)}"
            yield _about(value, "calibration.shapes", message)


def _has_axis(rank: int, axis: int) -> bool:
    return -rank <= axis < rank


def _about(value: ir.Value, code: str, message: str, *notes: str) -> Diagnostic:
    node = value.producer()
    if node is None:
        return Diagnostic(code, message, notes=notes)
    return Diagnostic(code, message, show_node(node), location(node), notes)


def _mask_of(
    model: ir.Model, found: types.Inference, value: ir.Value, channel_axis: int
) -> _Mask | None:
    shape = found.type(value).shape
    if not shape or not _has_axis(len(shape), channel_axis):
        return None
    rows = [axis for axis in range(len(shape)) if axis != channel_axis % len(shape)]
    input_dims = {dim for v in model.graph.inputs for dim in found.type(v).shape or ()}
    for mask in model.graph.inputs:
        type_ = found.type(mask)
        usable = type_.dtype is not None and not type_.dtype.is_floating_point()
        if not usable or type_.shape is None or len(type_.shape) != 2:
            continue
        if mask.name is None or not mask.name.endswith(MASK):
            continue
        batch, length = type_.shape
        if 0 in rows and dims.same(shape[0], batch):
            for axis in rows[1:]:
                if _covers(length, shape[axis], input_dims):
                    return _Mask(mask.name, (0, axis))
        if 0 in rows and dims.same(shape[0], dims.product((batch, length))):
            return _Mask(mask.name, None)
    return None


def _covers(length: Dim, positions: Dim, input_dims: set[Dim]) -> bool:
    """Whether a mask of ``length`` is about ``positions``, and about a cache before them or nothing."""
    return dims.same(length, positions) is True or (
        isinstance(length, sympy.Expr)
        and isinstance(positions, sympy.Expr)
        and dims.subtract(length, positions) in input_dims
    )


# -- stages ---------------------------------------------------------------------------------------


def stages(
    executor: Executor,
    watched: Mapping[Statistic, Watch],
    sizes: Sizes,
    stage_bytes: int,
    *,
    at_watches: bool = False,
) -> list[Stage]:
    """The stages in which the watched values are computed; see :func:`_cut`."""
    plan = _cut(executor, watched, sizes, stage_bytes, at_watches=at_watches)
    return list(_stages(executor.program, plan))


@dataclass(frozen=True)
class Stage:
    """Some steps as a program of their own, and what is summed up and held on after them."""

    part: Program
    inputs: frozenset[Slot]  # of the graph, that it reads
    reads: frozenset[Slot]  # of what is held before
    keeps: frozenset[Slot]  # of that and of what it makes
    watches: tuple[tuple[Watch, tuple[Slot, ...]], ...]


@dataclass(frozen=True)
class _Plan:
    """All steps, where they are cut, and after which step (-1: none) each watch has its values."""

    steps: tuple[Step, ...]
    ends: tuple[int, ...]
    due: Mapping[int, list[tuple[Watch, tuple[Slot, ...]]]]


def _cut(
    executor: Executor,
    watches: Mapping[Statistic, Watch],
    sizes: Sizes,
    stage_bytes: int,
    at_watches: bool,
) -> _Plan:
    """Cut where the fewest elements are held, with stages of at most ``stage_bytes`` of weights.

    With ``at_watches`` a stage also ends where a statistic has its values.
    """
    program = executor.program
    watched = {w: tuple(program.values[v.name or ""] for v in w.values) for w in watches.values()}
    steps = executor.steps(list(dict.fromkeys(s for slots in watched.values() for s in slots)))
    made = {slot: at for at, step in enumerate(steps) for slot in step.outputs if slot is not None}
    due: dict[int, list[tuple[Watch, tuple[Slot, ...]]]] = {}
    for watch, slots in watched.items():
        due.setdefault(max(made.get(slot, -1) for slot in slots), []).append((watch, slots))
    ends, start = [], 0
    held = widths(steps, due, sizes)
    while start < len(steps):
        end = furthest(program, steps, start, stage_bytes)
        last = min((at + 1 for at in due if start <= at < end), default=end) if at_watches else end
        if last < end:
            end = last
        elif end < len(steps):
            end = min(range(end, start, -1), key=lambda at: held[at])  # the last of the best
        ends.append(end)
        start = end
    return _Plan(steps, tuple(ends or [0]), due)


def furthest(program: Program, steps: Sequence[Step], start: int, stage_bytes: int) -> int:
    """The end of the longest stage from ``start`` whose weights are few enough; at least one step."""
    total, seen = 0, set[int]()
    for at in range(start, len(steps)):
        for tensor in _weights(program, steps[at]):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.nbytes
        if total > stage_bytes and at > start:
            return at
    return len(steps)


def _weights(program: Program, step: Step) -> Iterator[ir.TensorProtocol]:
    """The weights that a step reads, in the bodies it runs as well."""
    for slot in step.reads():
        if slot in program.weights:
            yield program.weights[slot]
    for body in step.kwargs.values():
        if isinstance(body, Program):
            for inner in body.steps:
                yield from _weights(body, inner)


def widths(
    steps: Sequence[Step], due: Mapping[int, list[tuple[Watch, tuple[Slot, ...]]]], sizes: Sizes
) -> list[float]:
    """Elements that are held for a sample at the boundary before each step, and after the last."""
    last: dict[Slot, int] = {}
    for at, step in enumerate(steps):
        last.update(dict.fromkeys(step.reads(), at))
    for at, entries in due.items():
        for _, slots in entries:
            last.update((slot, max(at, last.get(slot, -1))) for slot in slots)
    known = [0] * (len(steps) + 2)  # by how much the sum changes at each boundary
    unknown = [0] * (len(steps) + 2)  # the same for the number of those whose size is not known
    for at, step in enumerate(steps):
        for slot in step.outputs:
            if slot is not None and last.get(slot, -1) > at:
                size = sizes.of(slot)
                change, amount = (unknown, 1) if size is None else (known, size)
                change[at + 1] += amount
                change[last[slot] + 1] -= amount
    sums = zip(itertools.accumulate(known), itertools.accumulate(unknown), strict=True)
    return [math.inf if gaps else width for width, gaps in sums]


class Sizes:
    """How many elements the values have for one sample."""

    def __init__(self, model: ir.Model, found: types.Inference, sample: Feeds) -> None:
        self._found = found
        self._values = {v.name: v for node in model.graph for v in node.outputs}
        self._at: dict[sympy.Symbol, int] = {}
        for value in model.graph.inputs:
            array = sample.get(value.name or "")
            for dim, size in zip(
                found.type(value).shape or (), () if array is None else array.shape, strict=False
            ):
                if isinstance(dim, sympy.Symbol):
                    self._at[dim] = size

    def of(self, slot: Slot) -> int | None:
        """Elements of ``slot``; None where only the data decides."""
        if slot.host_rank is not None:
            return 1
        shape = self._found.type(self._values.get(slot.name)).shape
        sizes = [dims.evaluate(dim, self._at) for dim in shape or ()]
        known = [size for size in sizes if size is not None]
        return None if shape is None or len(known) < len(sizes) else math.prod(known)


def _stages(program: Program, plan: _Plan) -> Iterator[Stage]:
    """The stages in order, from last to first inside: what is held is what is read later."""
    needed: set[Slot] = set()
    stages: list[Stage] = []
    starts = (0, *plan.ends[:-1])
    for start, end in reversed(list(zip(starts, plan.ends, strict=True))):
        steps = plan.steps[start:end]
        made = dict.fromkeys(s for step in steps for s in step.outputs if s is not None)
        first = -1 if start == 0 else start
        watches = tuple(entry for at in range(first, end) for entry in plan.due.get(at, ()))
        watched = [slot for _, slots in watches for slot in slots]
        read = {slot for step in steps for slot in step.reads()}.union(watched)
        inputs = read.intersection(program.inputs)
        reads = read - inputs - made.keys() - program.weights.keys()
        outputs = [*watched, *(slot for slot in (*made, *reads) if slot in needed)]
        part = Program(
            steps=list(steps), weights=program.weights, outputs=list(dict.fromkeys(outputs))
        )
        keeps = frozenset(needed)
        stages.append(Stage(part, frozenset(inputs), frozenset(reads), keeps, watches))
        needed = (needed - made.keys()) | reads
    yield from reversed(stages)


# -- running --------------------------------------------------------------------------------------


def _home(device: torch.device, parts: Sequence[Stage], sizes: Sizes, samples: int) -> torch.device:
    """Where values wait between stages: on the device where they take at most a third of it."""
    if device.type != "cuda":
        return _HOST
    most = 0
    for part in parts:
        known = [sizes.of(slot) for slot in part.keeps]
        if None in known:
            return _HOST
        most = max(most, 8 * samples * sum(size or 0 for size in known))
    return device if 3 * most < torch.cuda.mem_get_info(device)[0] else _HOST


def _run(
    executor: Executor,
    stage: Stage,
    held: Held,
    sample: Feeds,
    number: int,
    home: torch.device,
) -> Held:
    """Run a sample through a stage; what is held afterwards."""
    values = {slot: moved_to(held[slot], executor.device) for slot in stage.reads}
    kept = {slot: value for slot, value in held.items() if slot in stage.keeps}
    held.clear()
    if stage.inputs:
        fed = executor.feed(sample)
        values.update((slot, fed[slot]) for slot in stage.inputs if slot in fed)
    executor.run_part(stage.part, values)
    for watch, slots in stage.watches:
        add_rows(watch, [values[slot] for slot in slots], sample, number)
    made = {slot: value for slot, value in values.items() if slot in stage.keeps - kept.keys()}
    return kept | {slot: compacted(moved_to(v, home)) for slot, v in made.items()}


def moved_to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def compacted(value: Any) -> Any:
    """A slice of a bigger tensor would keep all of it."""
    if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def add_rows(watch: Watch, tensors: Sequence[Any], sample: Feeds, number: int) -> None:
    """Let the rows of one sample that count flow into the running sum."""
    axis = watch.statistic.channel_axis
    for value, tensor in zip(watch.values, tensors, strict=True):
        if tensor.movedim(axis, -1).shape != tensors[0].movedim(axis, -1).shape:
            names = " and ".join(v.name or "?" for v in watch.values)
            raise PassError(_about(value, "calibration.shapes", f"{names} differ in shape"))
    pairs = zip(watch.values, tensors, strict=True)
    rows = [rows_of(watch, value, tensor, sample, number) for value, tensor in pairs]
    for piece in zip(*map(chunks, rows), strict=True):
        if piece[0].shape[0]:
            watch.sums.add(*(x.to(torch.float64) for x in piece))


def rows_of(
    watch: Watch, value: ir.Value, tensor: torch.Tensor, sample: Feeds, number: int
) -> torch.Tensor:
    """The rows of a tensor that count, ``[rows, channels]``.

    Raises:
        PassError: one of them is not finite.
    """
    axis = watch.statistic.channel_axis
    last = tensor.movedim(axis, -1)  # [*rows, channels]
    flat = last.reshape(-1, last.shape[-1])
    if (kept := counts(watch, sample, tensor)) is not None:
        flat = flat[kept.to(flat.device)]
    if not bool(torch.isfinite(flat).all()):
        raise PassError(_not_finite(value, flat, number))
    return flat


def counts(watch: Watch, sample: Feeds, tensor: torch.Tensor) -> torch.Tensor | None:
    """Which of the flattened rows of a watched tensor count; None: all do."""
    mask, channel_axis = watch.mask, watch.statistic.channel_axis
    if mask is None or mask.name not in sample:
        return None
    kept = torch.from_numpy(np.asarray(sample[mask.name]) != 0)  # [b, t]
    if mask.axes is None:
        return kept.reshape(-1)
    batch, positions = mask.axes
    kept = kept[:, kept.shape[1] - tensor.shape[positions] :]
    shape = [1] * tensor.dim()
    shape[batch], shape[positions] = kept.shape
    channels = channel_axis % tensor.dim()
    rows = [size for axis, size in enumerate(tensor.shape) if axis != channels]
    return kept.reshape(shape).squeeze(channels).expand(rows).reshape(-1)


def _not_finite(value: ir.Value, rows: torch.Tensor, number: int) -> Diagnostic:
    count = int((~torch.isfinite(rows)).any(1).sum())
    message = f"{value.name} is not finite in calibration sample {number}"
    return _about(
        value,
        "calibration.not_finite",
        message,
        f"{count} of {rows.shape[0]} rows hold NaN or infinity",
    )


def summed_up(watch: Watch) -> torch.Tensor:
    """What the rows of all samples give, in float64 and where it was summed up.

    Raises:
        PassError: no row counts.
    """
    if not watch.sums.count:
        name = watch.values[0].name
        message = f"no row of {name} counts: all of the calibration data is padding or empty"
        raise PassError(_about(watch.values[0], "calibration.empty", message))
    return watch.sums.result()


def result(watch: Watch) -> StatisticResult:
    array = summed_up(watch).cpu().numpy()
    return StatisticResult(watch.statistic, array, watch.sums.count)
