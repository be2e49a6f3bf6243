"""What a lossy pass costs: how far the outputs are from those before it, on real data where given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.ir import coded, interface, weights
from netlathe.pipeline.pass_ import Feeds, Progress

Arrays = dict[str, npt.NDArray[Any]]
Runner = Callable[[Feeds], Arrays]
Metric = Callable[[Runner], float]  # what a user measures on a model, given a way to run it

# Of the calibration data an eighth, spread over it, and no fewer samples than eight: that costs less than
# the sweeps over all of it, in which passes measure what they need.
_SHARE = 8
_LEAST_SAMPLES = 8
_KEPT_BYTES = 64 << 20  # outputs of a model kept between measurements; the rest is computed again
_ROWS_AT_ONCE = 1 << 22  # elements turned into float64 together
_TINY = np.finfo(np.float64).tiny

Kind = Literal["logits", "probabilities", "values"]


@dataclass(frozen=True)
class Distance:
    """How far one output is from what it was, over all rows: vectors along its last axis."""

    cosine: float  # mean over the rows
    relative_rms: float  # RMS(after - before) / RMS(before)
    kl: float | None = None  # mean KL(before || after) in nats, where rows look like logits
    top1: float | None = None  # share of the rows whose largest logit stayed the same


@dataclass(frozen=True)
class Loss(Distance):
    """How far a model's outputs are from another's.

    The numbers are those of the first floating-point output, by convention the model's result;
    ``by_output`` has every one. Positions that an ``attention_mask`` pads are left out.
    """

    output: str = ""
    samples: int = 0  # how many it was measured on
    data: Literal["calibration", "samples"] = "samples"
    by_output: Mapping[str, Distance] = field(default_factory=dict)
    metric_before: float | None = None  # the user's own metric on the two models
    metric_after: float | None = None


class Subject:
    """A model whose loss is measured; what it makes of the feeds is kept while that is little."""

    def __init__(
        self, model: ir.Model, known: Sequence[Arrays] = (), session: ort.Session | None = None
    ) -> None:
        """``known`` are its outputs on the first of the feeds, ``session`` one to run it in."""
        self.model = model
        self._known = dict(enumerate(known))
        self._kept = 0
        self._session = session
        self._metric: float | None = None

    def outputs(self, number: int, feeds: Feeds) -> Arrays:
        """What the model makes of ``feeds``, which are number ``number``."""
        if number in self._known:
            return self._known[number]
        found = self.run(feeds)
        self._kept += sum(array.nbytes for array in found.values())
        if self._kept <= _KEPT_BYTES:
            self._known[number] = found
        return found

    def run(self, feeds: Feeds) -> Arrays:
        """Run the model; the session is kept until :meth:`rest`."""
        self._session = self._session or ort.Session(self.model)
        return coded.decoded(self.model, self._session.run(inputs_of(self.model, feeds)))

    def measure(self, metric: Metric) -> float:
        """The user's metric, computed once."""
        if self._metric is None:
            self._metric = float(metric(self.run))
        return self._metric

    def rest(self) -> None:
        """Give the session, and the weights it holds, back."""
        self._session = None


@dataclass(frozen=True)
class Scale:
    """What losses are measured on."""

    feeds: Sequence[Feeds]
    data: Literal["calibration", "samples"]
    metric: Metric | None
    progress: Progress

    @classmethod
    def of(
        cls,
        calibration: Sequence[Feeds],
        samples: Sequence[Feeds],
        metric: Metric | None,
        progress: Progress,
    ) -> Scale:
        """Some of the calibration data if there is any, else samples."""
        if not calibration:
            return cls(samples, "samples", metric, progress)
        total = len(calibration)
        least = -(-_LEAST_SAMPLES // max(map(_count, calibration)))
        count = min(total, max(-(-total // _SHARE), least))
        spread = [calibration[i * total // count] for i in range(count)]
        return cls(spread, "calibration", metric, progress)

    def loss(self, before: Subject, after: Subject) -> Loss | None:
        """How far ``after`` is from ``before``; None where they share no floating-point output.

        Of an output that was narrowed what is left is compared: of logits that lost tokens, the
        probabilities among the tokens that stay.
        """
        left, had = interface.kept(after.model), interface.kept(before.model)
        sums: dict[str, _Sums] = {}
        for value in after.model.graph.outputs:
            if value.name and value.dtype is not None and value.dtype.is_floating_point():
                sums[value.name] = _Sums(kind_of(value))
        numbered = list(enumerate(self.feeds))
        for number, feeds in self.progress.track(numbered, "measuring the loss", len(numbered)):
            given, new = before.outputs(number, feeds), after.outputs(number, feeds)
            old = {name: interface.fit(array, name, left, had) for name, array in given.items()}
            for name in list(sums):
                if name not in old or old[name].shape != new[name].shape:
                    del sums[name]
                    continue
                keep = _kept(feeds, old[name])
                for a, b in _rows(old[name], new[name], keep):
                    sums[name].add(a, b)
        metrics = {}
        if self.metric is not None:
            metrics["metric_before"] = before.measure(self.metric)
            metrics["metric_after"] = after.measure(self.metric)
        before.rest()
        after.rest()
        found = {name: total.distance() for name, total in sums.items() if total.rows}
        if not found:
            return None
        output, first = next(iter(found.items()))
        return Loss(
            first.cosine,
            first.relative_rms,
            first.kl,
            first.top1,
            output,
            sum(map(_count, self.feeds)),
            self.data,
            found,
            **metrics,
        )


def _count(feeds: Feeds) -> int:
    """How many samples feeds hold: the length of the first axis of the first array that has one."""
    return next((array.shape[0] for array in feeds.values() if array.ndim), 1) or 1


@dataclass
class _Sums:
    kind: Kind
    rows: int = 0
    cosine: float = 0.0
    difference: float = 0.0
    square: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> None:
        """Add rows [n, d]."""
        self.rows += len(before)
        if self.kind != "values" and before.shape[1] > 1:
            p, q = (_log_probabilities(rows, self.kind) for rows in (before, after))
            gain = np.where(np.isneginf(p), 0.0, p) - np.maximum(q, np.log(_TINY))
            self.kl += float((np.exp(p) * gain).sum())  # exp(-inf) = 0: what never was adds nothing
            self.same += int((before.argmax(1) == after.argmax(1)).sum())
        whole = np.isfinite(before) & np.isfinite(after)
        a, b = np.where(whole, before, 0.0), np.where(whole, after, 0.0)
        self.difference += float(np.square(b - a).sum())
        self.square += float(np.square(a).sum())
        lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        scale = lengths[0] * lengths[1]
        both_zero = (lengths[0] == 0) & (lengths[1] == 0)
        cosines = (a * b).sum(1) / np.where(scale > 0, scale, 1.0)
        self.cosine += float(np.where(both_zero, 1.0, cosines).sum())

    def distance(self) -> Distance:
        """The means."""
        rms = (self.difference / self.square) ** 0.5 if self.square else float(self.difference > 0)
        logits = self.kind != "values"
        return Distance(
            cosine=self.cosine / self.rows,
            relative_rms=rms,
            kl=max(self.kl / self.rows, 0.0) if logits else None,  # rounding may take it below 0
            top1=self.same / self.rows if logits else None,
        )


def kind_of(output: ir.Value) -> Kind:
    """Whether rows of an output are logits: by name, by a softmax, or a classifier's [b, classes].

    Embeddings and hidden states are not, whatever makes them.
    """
    name = (output.name or "").lower()
    node = output.producer()
    width = output.shape[-1] if output.shape else None
    if width == 1:
        return "values"
    if node is not None and node.op_type == "Softmax":
        return "probabilities"
    if "logit" in name or (node is not None and node.op_type == "LogSoftmax"):
        return "logits"
    if node is None or any(word in name for word in ("embed", "hidden", "state", "pool")):
        return "values"
    product, *bias = node.inputs
    if node.op_type == "Add" and product is not None and weights.is_weight(bias[0]):
        node = product.producer()
    linear = node is not None and node.op_type == "MatMul"
    return "logits" if linear and output.shape is not None and len(output.shape) == 2 else "values"


def _log_probabilities(rows: npt.NDArray[np.float64], kind: Kind) -> npt.NDArray[np.float64]:
    if kind == "probabilities":
        with np.errstate(divide="ignore"):
            logs: npt.NDArray[np.float64] = np.log(np.maximum(rows, 0.0))
        return logs
    shifted = rows - rows.max(1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _kept(feeds: Feeds, output: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    """Which rows of an output [b, s, d] are no padding; None for all."""
    mask = feeds.get("attention_mask")
    if mask is None or mask.ndim != 2 or output.ndim != 3 or output.shape[0] != mask.shape[0]:
        return None
    if not 0 < output.shape[1] <= mask.shape[1]:
        return None
    # The mask of a step with a cache covers what is in the cache too, in front.
    keep: npt.NDArray[np.bool_] = np.not_equal(mask[:, -output.shape[1] :], 0).reshape(-1)
    return keep


def _rows(
    before: npt.NDArray[Any], after: npt.NDArray[Any], keep: npt.NDArray[np.bool_] | None
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Rows along the last axis, in float64, some at a time; of a vector or scalar the whole."""
    if before.size == 0:
        return
    width = before.shape[-1] if before.ndim > 1 else before.size
    a, b = before.reshape(-1, width), after.reshape(-1, width)
    if keep is not None:
        a, b = a[keep], b[keep]
    step = max(1, _ROWS_AT_ONCE // width)
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        yield a[rows].astype(np.float64), b[rows].astype(np.float64)
