"""The manager: runs passes one after the other, checks each, and accounts for what each did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy.typing as npt
import onnx_ir as ir

from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Feeds, Pass

if TYPE_CHECKING:
    from netlathe.analysis.cost import Cost

Runner = Callable[[Feeds], dict[str, npt.NDArray[Any]]]
Metric = Callable[[Runner], float]  # what a user measures on a model, given a way to run it


@dataclass(frozen=True)
class Check:
    """What the model after a pass was held against, and how far it was from it.

    ``error`` is the largest max|after - against| over the outputs, as a share of the output's RMS;
    ``output`` is where it was found. ``kind`` "none" means nothing was compared, for ``reason``.
    """

    kind: Literal["input", "reference", "none"]  # the model before; the simulated reference
    error: float | None = None
    tolerance: float | None = None
    output: str = ""
    sizes: tuple[str, ...] = ()  # "batch=2, sequence=16": the sizes it was compared at
    reason: str = ""


@dataclass(frozen=True)
class Loss:
    """How far a model's outputs are from another's, as means over all rows of all feeds.

    The numbers are those of the first floating-point output, which by convention is the model's
    result; ``by_output`` has every one. Positions that an ``attention_mask`` pads are left out.
    """

    output: str
    cosine: float
    relative_rms: float  # RMS(after - before) / RMS(before)
    kl: float | None  # KL(before || after) in nats, where the output looks like logits
    top1: float | None  # share of rows with the same largest logit
    feeds: int  # how many feeds it was measured on
    data: Literal["calibration", "samples"]
    by_output: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    metric_before: float | None = None  # the user's own metric
    metric_after: float | None = None


@dataclass
class Step:
    """One pass of a compilation: what it decided, changed, cost and lost."""

    pass_: Pass
    entries: list[Entry]
    changed: bool
    statistics: dict[str, float]
    cost_before: Cost
    cost_after: Cost
    check: Check
    loss: Loss | None  # against the model before the pass; only of a lossy pass that changed it
    total_loss: Loss | None  # against the captured model
    seconds: float  # the pass itself and the normal form after it
    check_seconds: float  # structure, types, comparison, loss
    peak_bytes: int  # most memory the process has held at any time until the step's end; 0: unknown


@dataclass
class Compiled:
    """A model and how it came about; ``dense`` is the model as captured, ``model`` the result."""

    captured: Captured
    model: ir.Model
    steps: list[Step]
    context: Context

    @property
    def dense(self) -> ir.Model:
        """The model as captured."""
        return self.captured.model


class Observer(Protocol):
    """Is told what the manager does; the CLI shows it."""

    def started(self, pass_: Pass) -> None:
        """``pass_`` is about to run."""
        ...

    def finished(self, step: Step) -> None:
        """A pass has run and was checked."""
        ...
