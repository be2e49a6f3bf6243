"""How many bits each weight gets: a budget, and what each weight costs in each of a few formats.

    quantize(bits=3.5, formats=("int3", "int4"), sensitivity="kl")

Every candidate that no override gives a format gets one of ``formats``, so that all of them together take at
most ``bits`` bits a weight, scales and zero points counted, and the sum of their costs is the least there is.
The cost of a weight in a format is

* ``kl``, ``mse``: measured: what the outputs lose on calibration data when that weight alone is rounded to
  nearest in that format: KL in nats a row, or the share of the square. That losses of single weights
  add up is an approximation (HAWQ-V2, arXiv 1911.03852, sec. 3.2, assumes the same).

With two formats layers can be ranked instead, and all weights of a layer get the same one (arXiv 2406.17415,
sec. 3). The most important get the wider one, as many as the budget allows:

* ``lim``: -cos of a layer's input and output, on calibration data: the more it changes, the more it counts;
* ``zd``: the share of a layer's weights that lie more than one standard deviation above their mean: the
  fewer, the more it counts. No data is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import blocks
from netlathe.analysis.branches import residual_branches
from netlathe.analysis.overlay import overlay
from netlathe.diagnostics import Diagnostic, PassError
from netlathe.ir import weights
from netlathe.passes.quantize import ledger
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.loss import kind_of
from netlathe.pipeline.pass_ import Context

Array = npt.NDArray[Any]
Sensitivity = Literal["kl", "mse", "lim", "zd"]
AT_ONCE = 16  # rounded weights that are compared in one sweep
_UNITS = 1 << 16  # bytes are told apart down to this share of the budget


@dataclass(frozen=True)
class Share:
    """What a weight got: its format, and what each of the formats would have cost."""

    format: str
    costs: Mapping[str, float]
    by: str

    @property
    def words(self) -> str:
        """For the ledger."""
        shown = ", ".join(f"{name} {cost:.2g}" for name, cost in self.costs.items())
        return f"{self.format} by {self.by} ({shown})"


@dataclass
class Options:
    """The entries that a weight could have, one for each format, in the order of the formats."""

    name: str
    elements: int
    entries: dict[str, Entry] = field(default_factory=dict)

    def bytes(self, name: str) -> int:
        """What the weight takes on disk in a format."""
        return int(self.entries[name].detail["bytes"])


def share_out(
    model: ir.Model, found: Sequence[Options], bits: float, sensitivity: Sensitivity, ctx: Context
) -> dict[str, Share]:
    """The format of every weight.

    Raises:
        PassError: the budget is below what the narrowest formats take; there is nothing to compare by.
    """
    budget = math.floor(bits / 8 * sum(one.elements for one in found))
    _check(found, budget, bits)
    if sensitivity in ("lim", "zd"):
        return _by_layer(model, found, budget, sensitivity, ctx)
    costs = _measured(model, found, sensitivity, ctx)
    names = [list(one.entries) for one in found]
    sizes = [[one.bytes(name) for name in own] for one, own in zip(found, names, strict=True)]
    chosen = knapsack(
        sizes, [[c[n] for n in own] for c, own in zip(costs, names, strict=True)], budget
    )
    return {
        one.name: Share(own[at], cost, sensitivity)
        for one, own, cost, at in zip(found, names, costs, chosen, strict=True)
    }


def _check(found: Sequence[Options], budget: int, bits: float) -> None:
    if not found:
        message = "bits is a budget for weights that no override gives a format: there are none"
        raise PassError(Diagnostic("quantize.bits", message))
    least = sum(min(one.bytes(name) for name in one.entries) for one in found)
    if least > budget:
        elements = sum(one.elements for one in found)
        raise PassError(
            Diagnostic(
                "quantize.bits",
                f"bits={bits} cannot be reached: with scales, the narrowest of the formats take"
                f" {8 * least / elements:.3f} bits a weight",
                help="add a narrower format, or make groups larger or scales narrower",
            )
        )


def knapsack(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """One option of each item, so that sizes stay within the budget and costs add up to the least.

    Exact in units of the greatest common divisor of the sizes; of more than 2^16 units in the budget, sizes
    are rounded up to such a unit, unless only the smallest options fit.
    """
    unit = math.gcd(*(size for own in sizes for size in own)) or 1
    unit = max(unit, -(-budget // _UNITS))
    units = [[-(-size // unit) for size in own] for own in sizes]
    smallest = [min(range(len(own)), key=own.__getitem__) for own in sizes]
    room = budget // unit
    if sum(own[at] for own, at in zip(units, smallest, strict=True)) > room:
        return smallest
    best = np.zeros(room + 1)  # the least cost within so many units
    picks = np.zeros((len(sizes), room + 1), np.uint8)
    for item, (own, cost) in enumerate(zip(units, costs, strict=True)):
        total = np.full(room + 1, math.inf)
        for at, (size, value) in enumerate(zip(own, cost, strict=True)):
            with_it = np.full(room + 1, math.inf)
            with_it[size:] = best[: max(0, room + 1 - size)] + value
            better = with_it < total
            total[better], picks[item, better] = with_it[better], at
        best = total
    chosen, left = [0] * len(sizes), room
    for item in reversed(range(len(sizes))):
        chosen[item] = int(picks[item, left])
        left -= units[item][chosen[item]]
    return chosen


# -- costs of single weights ------------------------------------------------------------------------


def _measured(
    model: ir.Model, found: Sequence[Options], sensitivity: Sensitivity, ctx: Context
) -> list[dict[str, float]]:
    """For every weight and format, what the outputs lose when only that is rounded."""
    cases = [(one, name) for one in found for name in one.entries]
    batches = [cases[at : at + AT_ONCE] for at in range(0, len(cases), AT_ONCE)]
    losses: list[float] = []
    tracked = ctx.progress.track(batches, "measuring sensitivity", len(batches))
    for number, batch in enumerate(tracked):

        def measure(batch: Sequence[tuple[Options, str]] = batch) -> dict[str, Array]:
            return {"losses": np.array(_losses(model, batch, sensitivity, ctx))}

        losses += ctx.once(f"sensitivity/{number}", measure)["losses"].tolist()
    costs = iter(losses)
    return [{name: max(0.0, next(costs)) for name in one.entries} for one in found]


def _losses(
    model: ir.Model, batch: Sequence[tuple[Options, str]], sensitivity: Sensitivity, ctx: Context
) -> list[float]:
    from netlathe.execute.statistics import Divergence, RelativeSquaredError  # torch is an extra

    outputs = _outputs(model, sensitivity)
    variants = []
    for one, name in batch:
        variant = model.clone()
        value = next(
            g.initializers[one.name] for g in variant.graphs() if one.name in g.initializers
        )
        value.const_value = _rounded(value, one.entries[name])
        variants.append(variant)
    combined, names = overlay(model, variants)
    wanted = [
        Divergence(value.name or "", renamed[value.name or ""], logits=kind_of(value) == "logits")
        if sensitivity == "kl"
        else RelativeSquaredError(value.name or "", renamed[value.name or ""])
        for renamed in names
        for value in outputs
    ]
    needed_by = f"quantize with sensitivity={sensitivity!r}"
    results = [float(r.array) for r in ctx.collect(combined, wanted, needed_by=needed_by)]
    return [
        float(np.mean(results[at : at + len(outputs)]))
        for at in range(0, len(results), len(outputs))
    ]


def _outputs(model: ir.Model, sensitivity: Sensitivity) -> list[ir.Value]:
    """The outputs that are compared."""
    real = [
        value
        for value in model.graph.outputs
        if value.dtype is not None and value.dtype.is_floating_point() and value.shape
    ]
    found = [v for v in real if sensitivity == "mse" or kind_of(v) != "values"]
    if not found:
        what = "logits or probabilities" if sensitivity == "kl" else "floating-point"
        message = f"no output of the model is {what}, which sensitivity={sensitivity!r} compares"
        raise PassError(Diagnostic("quantize.outputs", message, help='try sensitivity="mse"'))
    return found


def _rounded(value: ir.Value, entry: Entry) -> ir.TensorProtocol:
    base = value.const_value
    assert base is not None
    return weights.derived(
        base,
        lambda array: ledger.quantized(array, entry),
        base.dtype,
        base.shape.numpy(),
        value.name or "",
    )


# -- layers by their rank ---------------------------------------------------------------------------


def _by_layer(
    model: ir.Model, found: Sequence[Options], budget: int, by: Sensitivity, ctx: Context
) -> dict[str, Share]:
    """The wider format for the most important layers, as many as there is room for."""
    narrow, wide = sorted(found[0].entries, key=lambda name: sum(one.bytes(name) for one in found))
    known = {one.name: one for one in found}
    layers = _layers(model, known)
    score = (_lim if by == "lim" else _zd)(model, layers, ctx)
    order = sorted(range(len(layers)), key=lambda at: (-score[at], at))
    left = budget - sum(one.bytes(narrow) for one in found)
    shares = {one.name: Share(narrow, {}, f"{by}, in no layer") for one in found}
    full = False
    for rank, at in enumerate(order, 1):
        more = sum(known[n].bytes(wide) - known[n].bytes(narrow) for n in layers[at].names)
        full = full or more > left  # layers go by their rank alone
        left -= 0 if full else more
        name = f"{by}, {rank} of {len(layers)} layers"
        own = {"score": float(score[at])}
        shares |= {n: Share(narrow if full else wide, own, name) for n in layers[at].names}
    return shares


@dataclass(frozen=True)
class _Layer:
    start: str
    end: str
    names: tuple[str, ...]


def _layers(model: ir.Model, known: Mapping[str, Options]) -> list[_Layer]:
    made = [
        _Layer(block.start.name or "", block.end.name or "", names)
        for block in blocks.blocks(residual_branches(model))
        if (
            names := tuple(
                w.name or "" for b in block.branches for w in b.weights if w.name in known
            )
        )
    ]
    if not made:
        message = "the model has no residual layers whose weights could be ranked"
        raise PassError(Diagnostic("quantize.layers", message, help='try sensitivity="mse"'))
    return made


def _lim(model: ir.Model, layers: Sequence[_Layer], ctx: Context) -> list[float]:
    from netlathe.execute.statistics import CosineSimilarity  # torch is an extra

    wanted = [CosineSimilarity(layer.start, layer.end) for layer in layers]
    results = ctx.collect(model, wanted, needed_by="quantize with sensitivity='lim'")
    return [-float(result.array) for result in results]


def _zd(model: ir.Model, layers: Sequence[_Layer], ctx: Context) -> list[float]:
    """The negative share, so that more is more important here too."""
    found = []
    for layer in ctx.progress.track(layers, "looking at layers", len(layers)):
        held = [weights.array(model.graph.initializers[name]) for name in layer.names]
        count = sum(array.size for array in held)
        mean = math.fsum(float(a.sum(dtype=np.float64)) for a in held) / count
        square = math.fsum(float(np.square(a - mean, dtype=np.float64).sum()) for a in held) / count
        limit = mean + math.sqrt(square)
        found.append(-sum(int((array > limit).sum()) for array in held) / count)
    return found
