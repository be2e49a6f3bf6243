"""Gradients of a loss with respect to activations over calibration data, and sums of them.

    (found,) = sweep(model, feeds, [GateFisher("act_3", -1, index)], Objective.CURVATURE, device="cpu", ...)

A *gate* multiplies one position of an activation, such as one channel or one head, by m = 1; the position
is removed where m = 0. With g the gradient of the loss with respect to the activation x, the gradient with
respect to the gate is the sum of x g over the elements of its position; by the chain rule it equals the sum
of w dL/dw over the weights w that multiply the position. All sums are kept in float64, over all labels, and
divided by their number: of every value, whatever rows it has, they are in units of the loss of one label.

What the loss is (:class:`Objective`):

* ``DATA``: cross-entropy. The labels are the array ``labels`` of the feeds, of the shape of the output's
  rows, where there is one (``[b]`` for a classifier's logits ``[b, classes]``); else the next token, for a
  graph that reads integer ids ``[b, t]`` and gives logits ``[b, t, v]`` over the very vocabulary that the ids
  are looked up in. First-order terms need it: of any distance to the model's own output the gradient is zero.
* ``CURVATURE``: the distance to the model's own output. Its gradient is zero and its Hessian is the Fisher
  information, E[g g^T] with labels drawn from the model itself (Martens, arXiv 1412.1193, sections 5 and
  9.2). g is drawn with that covariance: of logits, J^T (diag(p) - p p^T) J; of any other output y, taken as
  the mean of a normal distribution as wide as its RMS, J^T J / RMS^2. No labels are needed.

Samples go through one at a time, forwards and then backwards. Of the forward way only what crosses the
boundaries of stages is held; each stage is computed again on the way back, so that the activations of
one stage are held at a time. Weights are read once.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from netlathe.analysis import axes as axis_analysis
from netlathe.analysis.axes import Axes, algebra
from netlathe.analysis.axes.algebra import Axis
from netlathe.analysis.language import next_token
from netlathe.diagnostics import Diagnostic, PassError
from netlathe.execute import calibration
from netlathe.execute.executor import Executor
from netlathe.execute.plan import Slot
from netlathe.execute.statistics import Accumulator, Statistic, StatisticResult
from netlathe.ir import types
from netlathe.pipeline.loss import Kind, kind_of
from netlathe.pipeline.pass_ import LABELS, Array, Feeds, Progress

# Weights of one stage: about a block of a small transformer, one layer of a large one.
STAGE_BYTES = 8 << 20
_TINY = float(np.finfo(np.float32).tiny)
_AT_ONCE = 1 << 22  # elements of an activation that are held in float64
# Drawn from the output itself; the elements of the ids one further; or an array beside the inputs.
Labels = Literal["drawn", "next", "given"]


class Objective(enum.Enum):
    """The loss that is differentiated."""

    DATA = "data"
    CURVATURE = "curvature"


# -- what can be asked for --------------------------------------------------------------------------


@dataclass(frozen=True)
class GateStatistic(Statistic):
    """A number for each position of an activation, made of its gates' gradients for each label.

    A gate's gradient for one label is the sum over all rows that belong to it: the pixels of an image that
    has one label, the windows and patches it is cut into. Where rows have labels of their own (tokens of a
    language model), rows stand for their labels: what one row does to the label of another counts as its own
    label's, and products of rows do not count.

    ``index`` says which position a channel is in; channels with index -1 are in none.
    """

    value: str
    axis: int = -1
    index: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[str, ...]:
        """The value that is differentiated by."""
        return (self.value,)

    @property
    def channel_axis(self) -> int:
        """As declared."""
        return self.axis


@dataclass(frozen=True)
class GateMagnitude(GateStatistic):
    """Mean over labels of the magnitude of a gate's gradient: ``[positions]``."""

    def start(self) -> Gates:
        """An empty sum."""
        return Gates(self.index, torch.abs)


@dataclass(frozen=True)
class GateFisher(GateStatistic):
    """Mean over labels of the square of a gate's gradient: ``[positions]``.

    Under ``CURVATURE`` that is the Fisher information of the gate: the gradients of different labels are
    independent, with mean 0.
    """

    def start(self) -> Gates:
        """An empty sum."""
        return Gates(self.index, torch.square)


class Gates(Accumulator):
    """Sums over labels of what ``of`` makes of each label's gate gradients."""

    def __init__(self, index: tuple[int, ...], of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._index = torch.tensor(index)
        self._of = of
        self._size = max(index) + 1
        self._sum: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        """Take in ``[labels, channels]``: the sums of x g over the rows of each label, in float64."""
        (products,) = rows
        inside = self._index >= 0
        gates = self._by_position(products[:, inside], self._index[inside].to(products.device))
        total = self._of(gates).sum(0)
        self._sum = total if self._sum is None else self._sum + total

    def _by_position(self, product: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if len(set(index.tolist())) == len(index) == self._size:  # a channel is a position
            return product[:, torch.argsort(index)]
        # A product with ones: sums in one order on every device, which index_add does not promise.
        ones = torch.nn.functional.one_hot(index, self._size)
        return product @ ones.to(torch.float64)

    def result(self) -> torch.Tensor:
        """Divided by the number of labels, which is ``count``."""
        assert self._sum is not None
        return self._sum / self.count


# -- which rows belong to a label -----------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How rows of a value belong to labels: for each dim, the runs of factors it is a product of.

    A run is ``(label, size)``: whether the factors are dims of the labels too, and their size, None where
    only data decides. At most one run of a dim has None.
    """

    dims: tuple[tuple[tuple[bool, int | None], ...], ...]

    def by_label(self, tensor: torch.Tensor, channel_axis: int) -> torch.Tensor:
        """``tensor`` as ``[labels, rows of a label, channels]``."""
        channel_axis %= tensor.dim()
        shape, labels, rest, channels = list[int](), list[int](), list[int](), 0
        for dim, runs in enumerate(self.dims):
            if dim == channel_axis:
                channels = len(shape)
                shape.append(tensor.shape[dim])
                continue
            known = math.prod(size for _, size in runs if size is not None)
            for label, size in runs:
                (labels if label else rest).append(len(shape))
                shape.append(tensor.shape[dim] // known if size is None else size)
        split = tensor.reshape(shape).permute(*labels, *rest, channels)
        return split.reshape(
            math.prod(split.shape[: len(labels)]),
            math.prod(split.shape[len(labels) : -1]),
            split.shape[-1],
        )


def layout(axes: Axes, value: ir.Value, output: ir.Value) -> Layout:
    """Which rows of ``value`` belong to one row of ``output``, as far as the graph's axes tell.

    Rows that nothing tells apart count as one label's: the Fisher information is the same, only its noise
    is larger.
    """
    known = axes.related.axes
    labels = {f for axis in known.get(output, ())[:-1] for f in algebra.factors(axis)}
    assert value.shape is not None
    if value not in known:
        return Layout(tuple(((False, None),) for _ in value.shape))
    return Layout(tuple(_runs(axis, labels) for axis in known[value]))


def _runs(axis: Axis, labels: set[Axis]) -> tuple[tuple[bool, int | None], ...]:
    """The runs of a dim; what it has of ``labels`` is taken out of them."""
    runs: list[tuple[bool, int | None]] = []
    for factor in algebra.factors(axis):
        label, size = factor in labels, factor.size if isinstance(factor.size, int) else None
        labels.discard(factor)
        if runs and runs[-1][0] == label:
            before = runs.pop()[1]
            size = None if size is None or before is None else size * before
        runs.append((label, size))
    if sum(size is None for _, size in runs) > 1:
        return ((False, None),)
    return tuple(runs)


# -- the loss -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loss:
    """Which output is differentiated, and what it should have been."""

    output: ir.Value
    kind: Kind
    labels: Labels = "drawn"
    ids: str = ""  # of "next": the input whose next elements are the classes

    def gradient(
        self, output: torch.Tensor, sample: Feeds, rng: np.random.Generator
    ) -> tuple[torch.Tensor, int]:
        """The gradient of the loss, summed over labels, with respect to the output; how many count.

        Raises:
            PassError: the labels given are not those of this output.
        """
        rows = tuple(output.shape[:-1])
        if self.kind == "values":
            counts = _counted(sample, torch.ones(rows, dtype=torch.bool), shift=0)
            counted = output.double()[counts.to(output.device)]
            rms = counted.square().mean().sqrt().clamp(min=_TINY)
            noise = torch.from_numpy(rng.standard_normal(tuple(output.shape)))
            noise *= counts[..., None]
            gradient = noise.to(output.device) / rms
            return gradient.to(output.dtype), int(counts.sum())
        scores = output.double()
        probabilities = scores if self.kind == "probabilities" else scores.softmax(-1)
        counts = torch.ones(rows, dtype=torch.bool)
        if self.labels == "next":
            ids = torch.from_numpy(np.asarray(sample[self.ids])).long()
            labels = torch.cat((ids[:, 1:], ids[:, :1]), 1)  # the last one has none:
            counts[:, -1] = False
            gradient = self._of_labels(probabilities, labels)
        elif self.labels == "given":
            labels = self._given(np.asarray(sample[LABELS]), rows, output.shape[-1])
            gradient = self._of_labels(probabilities, labels)
        else:
            gradient = self._like_drawn(probabilities, rng)
        counts &= _counted(sample, counts, shift=1 if self.labels == "next" else 0)
        gradient *= counts.to(output.device)[..., None]
        return gradient.to(output.dtype), int(counts.sum())

    def _of_labels(self, p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of -log p[label], with respect to p or to the logits."""
        at = labels.to(p.device)[..., None]
        if self.kind == "probabilities":
            grown = -1.0 / p.gather(-1, at).clamp(min=_TINY)
            return torch.zeros_like(p).scatter_(-1, at, grown)
        return p.scatter_add(-1, at, -torch.ones_like(at, dtype=torch.float64))

    def _like_drawn(self, p: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Random, with the mean 0 and the covariance of the gradient for a class drawn from p.

        With respect to logits that is diag(p) - p p^T = B B^T for B = diag(sqrt p) - p sqrt(p)^T. B times
        random signs has it too, and varies far less: of a model that is certain, another class is hardly ever
        drawn, and then decides alone.
        """
        signs = 2 * rng.integers(0, 2, tuple(p.shape), np.int8) - 1
        each = torch.from_numpy(signs).to(p.device) * p.sqrt()
        if self.kind == "probabilities":
            return each / p.clamp(min=_TINY)  # B, through a softmax
        return each - p * each.sum(-1, keepdim=True)

    def _given(self, labels: Array, rows: tuple[int, ...], classes: int) -> torch.Tensor:
        """Labels of the shape of the output's rows, each a class."""
        problem = ""
        if labels.shape != rows:
            problem = f"of shape {list(labels.shape)}, rows of the output are {list(rows)}"
        elif labels.size and not 0 <= labels.min() <= labels.max() < classes:
            problem = f"from {labels.min()} to {labels.max()}, classes from 0 to {classes - 1}"
        if problem:
            name = self.output.name
            raise PassError(
                Diagnostic(
                    "gradients.labels",
                    f"array {LABELS!r} does not fit the output {name!r}: it is {problem}",
                    help="give the class of each row of the output, as an integer from 0",
                )
            )
        return torch.from_numpy(labels.astype(np.int64))


def _counted(sample: Feeds, like: torch.Tensor, shift: int) -> torch.Tensor:
    """Which rows ``[b, t]`` are no padding, and have no padding ``shift`` positions on."""
    masks = [a for name, a in sample.items() if name.endswith(calibration.MASK) and a.ndim == 2]
    if not masks or like.dim() != 2 or masks[0].shape[1] < like.shape[1]:
        return torch.ones_like(like)
    kept = torch.from_numpy(np.asarray(masks[0]) != 0)[:, -like.shape[1] :]
    return kept & torch.roll(kept, -shift, 1)


def loss_of(model: ir.Model, objective: Objective, sample: Feeds) -> _Loss:
    """The loss of a model, read off its graph and off what ``sample`` holds.

    Raises:
        PassError: the graph has no floating-point output; or DATA is asked for and nothing says what it
            should have been.
    """
    outputs = [
        v for v in model.graph.outputs if v.dtype is not None and v.dtype.is_floating_point()
    ]
    if not outputs:
        raise PassError(
            Diagnostic(
                "gradients.output", "the model has no floating-point output to differentiate"
            )
        )
    if objective is Objective.CURVATURE:
        return _Loss(outputs[0], kind_of(outputs[0]))
    given = LABELS in sample and all(value.name != LABELS for value in model.graph.inputs)
    kinds: list[tuple[ir.Value, Kind]] = [(value, kind_of(value)) for value in outputs]
    classes = [pair for pair in kinds if pair[1] != "values"]
    if given and classes:
        return _Loss(*classes[0], "given")
    if not given and (found := next_token(model)) is not None:
        output, ids = found
        kind: Kind = "probabilities" if kind_of(output) == "probabilities" else "logits"
        return _Loss(output, kind, "next", ids.name or "")
    message = "nothing says what the model should have answered: it is no language model with ids"
    message += f" [b, t] and logits [b, t, v] over the same vocabulary, and there are no {LABELS!r}"
    if given:
        message = f"array {LABELS!r} is given, and no output of the model is logits of classes"
    raise PassError(
        Diagnostic(
            "gradients.labels",
            message,
            help=f"give a classifier's classes as the array {LABELS!r} of the calibration data (.npz,"
            " or from Python), or choose a score that needs none, such as obd",
        )
    )


# -- the sweep ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched(Statistic):
    """The output whose loss is differentiated, held as the sweep holds what statistics read."""

    output: str

    @property
    def values(self) -> tuple[str, ...]:
        """The output."""
        return (self.output,)

    @property
    def per_channel(self) -> bool:
        """Nothing is summed up."""
        return False

    def start(self) -> Accumulator:
        """Never asked for a result."""
        return Gates((0,), torch.abs)


def sweep(
    model: ir.Model,
    feeds: Sequence[Feeds],
    wanted: Sequence[Statistic],
    objective: Objective,
    *,
    device: str,
    progress: Progress,
    seed: int = 0,
    stage_bytes: int = STAGE_BYTES,
) -> list[StatisticResult]:
    """One result for each of ``wanted``, in order: statistics of this module, of values that nodes make.

    The same model, data, seed and ``stage_bytes`` give the same bits on the same machine.

    Raises:
        PassError: as :func:`netlathe.execute.calibration.sweep` and :func:`loss_of`.
        InputError: a feed does not fit the model.
        LowerError: with every node that the executor cannot run.
    """
    if not feeds:
        raise PassError(Diagnostic("calibration.empty", "there are no calibration samples"))
    loss = loss_of(model, objective, feeds[0])
    probe = _Watched(loss.output.name or "")
    found = types.infer(model)
    watches = calibration.watches(model, [*wanted, probe], found)
    executor = Executor(model, device, keep_weights=True)
    for sample in feeds:
        executor.feed(sample)
    sizes = calibration.Sizes(model, found, feeds[0])
    stages = calibration.stages(executor, watches, sizes, stage_bytes)
    known = axis_analysis.analyse(model)
    layouts = {w.values[0]: layout(known, w.values[0], loss.output) for w in watches.values()}
    numbered, labels = list(enumerate(feeds)), 0
    for number, sample in progress.track(numbered, "differentiating", len(numbered)):
        rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
        labels += _differentiate(executor, stages, layouts, sample, number, loss, rng)
    for watch in watches.values():
        watch.sums.count = labels
    return [calibration.result(watches[statistic]) for statistic in wanted]


def _differentiate(
    executor: Executor,
    stages: Sequence[calibration.Stage],
    layouts: Mapping[ir.Value, Layout],
    sample: Feeds,
    number: int,
    loss: _Loss,
    rng: np.random.Generator,
) -> int:
    """Take one sample forwards and backwards through all stages; how many labels it has."""
    fed = executor.feed(sample)
    before: list[dict[Slot, Any]] = []  # what each stage reads
    held: dict[Slot, Any] = {}
    for stage in stages:
        reads = {slot: held[slot] for slot in stage.reads}
        before.append(reads)
        values = {**reads, **{slot: fed[slot] for slot in stage.inputs if slot in fed}}
        executor.run_part(stage.part, values)
        held = {slot: v for slot, v in {**held, **values}.items() if slot in stage.keeps}
    gradients: dict[Slot, torch.Tensor] = {}
    labels = 0
    for stage in reversed(stages):
        leaves = {slot: _leaf(value) for slot, value in before.pop().items()}
        # Inputs take gradients too: then all does that depends on an input or a weight.
        inputs = {slot: _leaf(fed[slot]) for slot in stage.inputs if slot in fed}
        values = {**leaves, **inputs}
        executor.run_part(stage.part, values, gradients=True)
        for watch, slots in stage.watches:
            if isinstance(watch.statistic, _Watched):
                (slot,) = slots
                gradients[slot], labels = loss.gradient(values[slot].detach(), sample, rng)
        _backwards(stage, layouts, leaves, values, gradients, sample, number)
    return labels


def _backwards(
    stage: calibration.Stage,
    layouts: Mapping[ir.Value, Layout],
    leaves: Mapping[Slot, Any],
    values: Mapping[Slot, Any],
    gradients: dict[Slot, torch.Tensor],
    sample: Feeds,
    number: int,
) -> None:
    """From the gradients of what a stage makes to those of what it reads; add up what is watched."""
    made = [slot for slot in values if slot in gradients and slot not in leaves]
    ends = [(values[slot], gradients.pop(slot)) for slot in made if values[slot].requires_grad]
    asked = [
        (watch, slots)
        for watch, slots in stage.watches
        if not isinstance(watch.statistic, _Watched)
    ]
    sources = [values[slots[-1]] for _, slots in asked]
    entries = {slot: v for slot, v in leaves.items() if _differentiable(v)}
    wanted = [v for v in (*sources, *entries.values()) if v.requires_grad]
    found: dict[int, torch.Tensor] = {}
    if ends and wanted:
        tensors, given = zip(*ends, strict=True)
        results = torch.autograd.grad(tensors, wanted, given, allow_unused=True)
        found = {id(v): g for v, g in zip(wanted, results, strict=True) if g is not None}
    for slot, value in entries.items():
        if (gradient := found.get(id(value))) is not None:
            gradients[slot] = gradients[slot] + gradient if slot in gradients else gradient
    for (watch, _), source in zip(asked, sources, strict=True):
        gradient = found.get(id(source))
        read = source.detach()
        pair = read, torch.zeros_like(read) if gradient is None else gradient
        _add(watch, layouts[watch.values[0]], pair, sample, number)


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if _differentiable(value) else value


def _differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _add(
    watch: calibration.Watch,
    rows: Layout,
    tensors: Sequence[torch.Tensor],
    sample: Feeds,
    number: int,
) -> None:
    """Let what one sample gives for each label flow into the running sum."""
    (value,), axis = watch.values, watch.statistic.channel_axis
    for tensor in tensors:
        calibration.rows_of(watch, value, tensor, sample, number)  # finite where it counts
    counts = calibration.counts(watch, sample, tensors[0])
    if counts is not None:
        shape = list(tensors[0].shape)
        shape[axis] = 1
        padding = ~counts.to(tensors[0].device).reshape(shape)
        tensors = [tensor.masked_fill(padding, 0.0) for tensor in tensors]
    x, g = (rows.by_label(tensor, axis) for tensor in tensors)
    most = max(1, _AT_ONCE // max(1, x.shape[2]))  # rows
    step = max(1, most // max(1, x.shape[1]))  # labels
    for some in zip(torch.split(x, step), torch.split(g, step), strict=True):
        pieces = zip(*(torch.split(tensor, most, 1) for tensor in some), strict=True)
        sums = [(a.to(torch.float64) * b.to(torch.float64)).sum(1) for a, b in pieces]
        watch.sums.add(torch.stack(sums).sum(0))
