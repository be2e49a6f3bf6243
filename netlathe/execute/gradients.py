"""Gradients of a loss with respect to activations over calibration data, and sums of them.

    (found,) = sweep(model, feeds, [GateFisher("act_3", -1, index)], Objective.CURVATURE, device="cpu", ...)

A *gate* multiplies one position of an activation, such as one channel or one head, by m = 1; the position
is removed where m = 0. With g the gradient of the loss with respect to the activation x, the gradient with
respect to the gate is the sum of x g over the elements of its position; by the chain rule it equals the sum
of w dL/dw over the weights w that multiply the position. All sums are kept in float64, over all rows.

What the loss is (:class:`Objective`):

* ``DATA``: cross-entropy of the next token, for a graph that reads integer ids ``[b, t]`` and gives
  logits ``[b, t, v]`` over the very vocabulary that the ids are looked up in. First-order terms need it: of
  any distance to the model's own output the gradient is zero.
* ``CURVATURE``: the distance to the model's own output. Its gradient is zero and its Hessian is the Fisher
  information, E[g g^T] with labels drawn from the model itself (Martens, arXiv 1412.1193, sections 5 and
  9.2): logits ask for a class drawn from their softmax; any other output y, taken as the mean of a normal
  distribution as wide as its RMS, for a normal residual over that RMS. No labels are needed.

Samples go through one at a time, forwards and then backwards. Of the forward way only what crosses the
boundaries of stages is held; each stage is computed again on the way back, so that the activations of
one stage are held at a time. Weights are read once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from netlathe.analysis.language import next_token
from netlathe.diagnostics import Diagnostic, PassError
from netlathe.execute import calibration
from netlathe.execute.executor import Executor
from netlathe.execute.plan import Slot
from netlathe.execute.statistics import Accumulator, Statistic, StatisticResult, chunks
from netlathe.ir import types
from netlathe.pipeline.loss import Kind, kind_of
from netlathe.pipeline.pass_ import Feeds, Progress

# Weights of one stage: about a block of a small transformer, one layer of a large one.
STAGE_BYTES = 8 << 20


class Objective(enum.Enum):
    """The loss that is differentiated."""

    DATA = "data"
    CURVATURE = "curvature"


# -- what can be asked for --------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientStatistic(Statistic):
    """Sums over an activation and the loss' gradient with respect to it.

    ``add`` of its accumulator is given the rows of both.
    """

    value: str
    axis: int = -1

    @property
    def values(self) -> tuple[str, ...]:
        """The value that is differentiated by."""
        return (self.value,)

    @property
    def channel_axis(self) -> int:
        """As declared."""
        return self.axis


@dataclass(frozen=True)
class GateGradient(GradientStatistic):
    """Mean over rows of a gate's gradient, ``[positions]``: ``index`` says which position a channel is in.

    Channels with index -1 are in none.
    """

    index: tuple[int, ...] = ()

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Gates(self.index, squared=False)


@dataclass(frozen=True)
class GateFisher(GateGradient):
    """Mean over rows of the square of a gate's gradient, ``[positions]``.

    Rows count as independent: of the exact Fisher information of a gate that all rows of a sample share it
    leaves out the products of different rows, whose expectation is small and whose noise is not.
    """

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Gates(self.index, squared=True)


class _Gates(Accumulator):
    def __init__(self, index: tuple[int, ...], *, squared: bool) -> None:
        self._index = torch.tensor(index)
        self._squared = squared
        self._size = max(index) + 1
        self._sum: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        x, g = rows
        inside = self._index >= 0
        product = (x * g)[:, inside.to(x.device)]
        gates = self._by_position(product, self._index[inside].to(x.device))
        total = (gates.square() if self._squared else gates).sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self.count += len(x)

    def _by_position(self, product: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if len(set(index.tolist())) == len(index) == self._size:  # a channel is a position
            return product[:, torch.argsort(index)]
        # A product with ones: sums in one order on every device, which index_add does not promise.
        ones = torch.nn.functional.one_hot(index, self._size)
        return product @ ones.to(torch.float64)

    def result(self) -> torch.Tensor:
        assert self._sum is not None
        return self._sum / self.count


# -- the loss -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loss:
    """Which output is differentiated, and how its gradient is made."""

    output: ir.Value
    kind: Kind
    labels: str = ""  # the input whose next elements are the classes; empty: drawn from the output

    def gradient(
        self, output: torch.Tensor, sample: Feeds, rng: np.random.Generator
    ) -> torch.Tensor:
        """The gradient of the loss, summed over rows, with respect to the output."""
        if self.kind == "values":
            rms = output.double().square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
            noise = torch.from_numpy(rng.standard_normal(tuple(output.shape)))
            return (noise.to(output.device) / rms).to(output.dtype)
        scores = output.double()
        probabilities = scores if self.kind == "probabilities" else scores.softmax(-1)
        if self.labels:
            ids = torch.from_numpy(np.asarray(sample[self.labels])).long()
            labels = torch.cat((ids[:, 1:], ids[:, :1]), 1)  # the last one has none: see below
            counts = torch.ones(ids.shape, dtype=torch.bool)
            counts[:, -1] = False
        else:
            labels = _draw(probabilities, rng)
            counts = torch.ones(labels.shape, dtype=torch.bool)
        counts &= _counted(sample, counts, shift=1 if self.labels else 0)
        labels = labels.to(output.device)[..., None]
        if self.kind == "probabilities":  # of -log p
            tiny = torch.finfo(output.dtype).tiny
            grown = -1.0 / probabilities.gather(-1, labels).clamp(min=tiny)
            gradient = torch.zeros_like(probabilities).scatter_(-1, labels, grown)
        else:  # of -log softmax(z)
            gradient = probabilities.scatter_add(
                -1, labels, -torch.ones_like(labels, dtype=torch.float64)
            )
        gradient *= counts.to(output.device)[..., None]
        return gradient.to(output.dtype)


def _draw(probabilities: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A class for each row, on the host: the same on every device up to rounding of probabilities."""
    sums = probabilities.cpu().cumsum(-1)
    at = torch.from_numpy(rng.random(tuple(sums.shape[:-1]))) * sums[..., -1]
    return torch.searchsorted(sums, at[..., None]).clamp(max=sums.shape[-1] - 1)[..., 0]


def _counted(sample: Feeds, like: torch.Tensor, shift: int) -> torch.Tensor:
    """Which rows ``[b, t]`` are no padding, and have no padding ``shift`` positions on."""
    masks = [a for name, a in sample.items() if name.endswith(calibration.MASK) and a.ndim == 2]
    if not masks or like.dim() != 2 or masks[0].shape[1] < like.shape[1]:
        return torch.ones_like(like)
    kept = torch.from_numpy(np.asarray(masks[0]) != 0)[:, -like.shape[1] :]
    return kept & torch.roll(kept, -shift, 1)


def loss_of(model: ir.Model, objective: Objective) -> _Loss:
    """The loss of a model, read off its graph.

    Raises:
        PassError: the graph has no floating-point output; or DATA is asked for and nothing in the graph
            says what the next token is.
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
    if (found := next_token(model)) is not None:
        output, ids = found
        kind: Kind = "probabilities" if kind_of(output) == "probabilities" else "logits"
        return _Loss(output, kind, ids.name or "")
    raise PassError(
        Diagnostic(
            "gradients.labels",
            "nothing says what the model should have answered: it is no language model with ids"
            " [b, t] and logits [b, t, v] over the same vocabulary",
            help="choose a score that needs no labels, such as obd",
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
        return _Gates((0,), squared=False)


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
    loss = loss_of(model, objective)
    probe = _Watched(loss.output.name or "")
    found = types.infer(model)
    watches = calibration.watches(model, [*wanted, probe], found)
    executor = Executor(model, device, keep_weights=True)
    if not feeds:
        raise PassError(Diagnostic("calibration.empty", "there are no calibration samples"))
    for sample in feeds:
        executor.feed(sample)
    sizes = calibration.Sizes(model, found, feeds[0])
    stages = calibration.stages(executor, watches, sizes, stage_bytes)
    numbered = list(enumerate(feeds))
    for number, sample in progress.track(numbered, "differentiating", len(numbered)):
        rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
        _differentiate(executor, stages, sample, number, loss, rng)
    return [calibration.result(watches[statistic]) for statistic in wanted]


def _differentiate(
    executor: Executor,
    stages: Sequence[calibration.Stage],
    sample: Feeds,
    number: int,
    loss: _Loss,
    rng: np.random.Generator,
) -> None:
    """Take one sample forwards and backwards through all stages."""
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
    for stage in reversed(stages):
        leaves = {slot: _leaf(value) for slot, value in before.pop().items()}
        # Inputs take gradients too: then all does that depends on an input or a weight.
        inputs = {slot: _leaf(fed[slot]) for slot in stage.inputs if slot in fed}
        values = {**leaves, **inputs}
        executor.run_part(stage.part, values, gradients=True)
        for watch, slots in stage.watches:
            if isinstance(watch.statistic, _Watched):
                (slot,) = slots
                gradients[slot] = loss.gradient(values[slot].detach(), sample, rng)
        _backwards(stage, leaves, values, gradients, sample, number)


def _backwards(
    stage: calibration.Stage,
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
        _add(
            watch, (read, torch.zeros_like(read) if gradient is None else gradient), sample, number
        )


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if _differentiable(value) else value


def _differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _add(
    watch: calibration.Watch, tensors: Sequence[torch.Tensor], sample: Feeds, number: int
) -> None:
    """Let the rows of one sample that count flow into the running sum."""
    (value,) = watch.values
    rows = [calibration.rows_of(watch, value, tensor, sample, number) for tensor in tensors]
    for piece in zip(*map(chunks, rows), strict=True):
        if piece[0].shape[0]:
            watch.sums.add(*(x.to(torch.float64) for x in piece))
