"""Where to cut a stream, and how wide its parts are kept: least loss for a number of parameters.

An adapter between two parts costs k k' parameters, and lets each have a basis and a width of its own. Where
to cut is predicted by spectra. With C_s the second moment of the signal at a norm s, and its Fisher matrix
G_s taken for tr(G_s)/d I,

    J(k) = sum of the d - k smallest eigenvalues of  sum over s of  tr(G_s)/d C_s

is what the best basis of a part loses by keeping k of d directions, to second order. What a part removes is
missing behind it too: where it ends, at a norm e, C_e counts as often as the norms t behind it would notice,
by tr(G_t)/d times the share of the signal at t that was there at e.

How wide the parts are is measured: J ranks places well, but says too little where much is removed (of
docs-llama-25m's embedding it sees a tenth of the KL). So widths that all use up the parameters are tried on
some of the calibration data.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.passes.slice.bases import principal
from netlathe.passes.slice.narrow import sizes
from netlathe.passes.slice.segments import Edge, Layout, lay_out
from netlathe.passes.slice.statistics import Seen

Matrix = npt.NDArray[np.float64]
Measure = Callable[[Sequence[Mapping[str, Matrix]]], list[float]]
Missed = Mapping[str, Sequence[tuple[Matrix, Matrix]]]
_AT_ONCE = 6  # widths that are tried beside each other


@dataclass(frozen=True)
class Plan:
    """Where adapters stand, how many directions each point keeps, and the loss that was measured.

    ``missed`` are, for the points of a part that ends at a cut, C where it ends and G of what is behind.
    """

    cut: tuple[Edge, ...]
    kept: Mapping[str, int]
    loss: float
    missed: Missed


@dataclass(frozen=True)
class _Place:
    """The edges at which the stream can be cut between two units."""

    units: tuple[int, int]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class _Allotment:
    """Cuts, the units of each part, how wide it is kept, and what that is predicted to lose."""

    places: tuple[_Place, ...]
    parts: tuple[frozenset[int], ...]
    widths: tuple[int, ...]
    predicted: float


class Widths:
    """What is known of a model that is to be cut: parameters as a function of widths, and spectra."""

    def __init__(
        self,
        model: ir.Model,
        seen: Seen,
        multiple: int,
        device: str = "cpu",
    ) -> None:
        """``multiple`` is of all widths."""
        self._layout = lay_out(model, cut=True)
        self._seen, self._device = seen, device
        self._multiple = multiple
        self._units = self._layout.segments
        self._sizes = [unit.group.size for unit in self._units]
        needed = set(lay_out(model, cut=False).edges)
        sides = _sides(self._layout)
        optional: dict[tuple[int, int], list[Edge]] = {}
        self._fixed: list[tuple[int | None, int | None]] = []  # adapters that stand in any case
        for edge in self._layout.edges:
            left, right = sides[edge]
            if edge in needed or left is None or right is None:
                self._fixed.append(sides[edge])
            else:
                optional.setdefault((left, right), []).append(edge)
        self._places = [_Place(units, tuple(edges)) for units, edges in optional.items()]
        self._constant, self._slopes = self._linear()
        self._spectra: dict[tuple[frozenset[int], frozenset[_Place]], tuple[Matrix, Matrix]] = {}

    def plan(self, parameters: float, measure: Measure) -> Plan | None:
        """The best of no cut and one, with at most so many parameters; None where neither has so few.

        ``measure`` is the loss with each of several projections: point -> the columns that are kept.
        """
        best: tuple[_Allotment, float] | None = None
        if (uncut := self._allot((), parameters)) is not None:
            best = uncut, self._measured([uncut], measure)[0]
        tried = [self._allot((place,), parameters) for place in self._places]
        found = min((t for t in tried if t), key=lambda t: t.predicted, default=None)
        if found is not None:
            refined = self._refined(found, parameters, measure)
            if best is None or refined[1] < best[1]:
                best = refined
        if best is None:
            return None
        allotment, loss = best
        edges = [edge for place in allotment.places for edge in place.edges]
        missed = {
            point: [
                pair
                for place in self._ends(part, allotment.places)
                for pair in self._missed(place, part)
            ]
            for part in allotment.parts
            for unit in part
            for point in self._units[unit].points
        }
        return Plan(tuple(edges), self._at_points(allotment), loss, missed)

    def _refined(
        self, start: _Allotment, parameters: float, measure: Measure
    ) -> tuple[_Allotment, float]:
        """The widths of all parts but the most costly, which takes what is left, one after the other."""
        slopes = [sum(self._slopes[unit] for unit in part) for part in start.parts]
        taker = int(np.argmax(slopes))
        best = start, self._measured([start], measure)[0]
        for part in range(len(start.parts)):
            if part == taker:
                continue
            choices = list(self._trades(best[0], part, taker, parameters))
            low, at, high = 0, 0, len(choices) - 1
            known: dict[int, float] = {}
            while True:  # six at a time, then six between the neighbours of the best
                tried = sorted({int(at) for at in np.linspace(low, high, _AT_ONCE)} - known.keys())
                if not tried:
                    break
                losses = self._measured([choices[at] for at in tried], measure)
                known.update(zip(tried, losses, strict=True))
                at = min(known, key=lambda number: (known[number], number))
                low = max((n for n in known if n < at), default=at)
                high = min((n for n in known if n > at), default=at)
            if known and known[at] < best[1]:
                best = choices[at], known[at]
        return best

    def _trades(
        self, start: _Allotment, part: int, taker: int, parameters: float
    ) -> Iterator[_Allotment]:
        """All widths of a part, each with the greatest that the taker can then have."""
        size = self._sizes[next(iter(start.parts[part]))]
        whole = self._sizes[next(iter(start.parts[taker]))]
        for width in self._multiples(size):
            widths = list(start.widths)
            widths[part] = width
            for rest in reversed(list(self._multiples(whole))):
                widths[taker] = rest
                if self._count(start.places, start.parts, widths) <= parameters:
                    yield dataclasses.replace(start, widths=tuple(widths))
                    break

    def _multiples(self, size: int) -> Iterator[int]:
        yield from range(self._multiple, size, self._multiple)
        yield size

    def _measured(self, allotments: Sequence[_Allotment], measure: Measure) -> list[float]:
        """The loss with each of some widths."""
        variants = []
        for allotment in allotments:
            columns = {}
            for part, width in zip(allotment.parts, allotment.widths, strict=True):
                if width < self._sizes[next(iter(part))]:
                    kept = self._axes(part, allotment.places)[1][:, :width]
                    columns.update({p: kept for unit in part for p in self._units[unit].points})
            variants.append(columns)
        return measure(variants)

    def _at_points(self, allotment: _Allotment) -> dict[str, int]:
        return {
            point: width
            for part, width in zip(allotment.parts, allotment.widths, strict=True)
            for unit in part
            for point in self._units[unit].points
        }

    # -- parameters -------------------------------------------------------------------------------

    def _linear(self) -> tuple[float, list[float]]:
        """Parameters but for the adapters: a constant, and what each direction of each unit costs."""
        names = {unit.points[0]: unit.stretch for unit in self._units}
        full = {unit.points[0]: unit.group.size for unit in self._units}

        def count(kept: Mapping[str, int]) -> float:
            widths = [kept[unit.points[0]] for unit in self._units]
            adapters = [*self._fixed, *(p.units for p in self._places for _ in p.edges)]
            return float(sizes(self._layout, kept, names) - self._adapters(adapters, widths))

        whole = count(full)
        slopes = [
            whole - count({**full, unit.points[0]: unit.group.size - 1}) for unit in self._units
        ]
        return whole - float(np.dot(slopes, self._sizes)), slopes

    def _adapters(
        self, adapters: Sequence[tuple[int | None, int | None]], widths: Sequence[int]
    ) -> float:
        total = 0
        for left, right in adapters:
            known = [widths[unit] for unit in (left, right) if unit is not None]
            full = [self._sizes[unit] for unit in (left, right) if unit is not None]
            total += known[0] * (known[1] if len(known) > 1 else full[0])
        return total

    def _count(
        self, places: Sequence[_Place], parts: Sequence[frozenset[int]], widths: Sequence[int]
    ) -> float:
        """Parameters with these widths of the parts."""
        of = {unit: width for part, width in zip(parts, widths, strict=True) for unit in part}
        units = [of[unit] for unit in range(len(self._units))]
        adapters = [*self._fixed, *(p.units for p in places for _ in p.edges)]
        linear = self._constant + float(np.dot(self._slopes, units))
        return linear + self._adapters(adapters, units)

    # -- predicting -------------------------------------------------------------------------------

    def _allot(self, places: Sequence[_Place], parameters: float) -> _Allotment | None:
        """Widths for these cuts by the predicted loss: that direction goes next that costs least.

        None where the cuts part nothing, or no widths are few enough.
        """
        parts = self._parts(places)
        part_of = {unit: number for number, part in enumerate(parts) for unit in part}
        if any(part_of[a] == part_of[b] for a, b in (place.units for place in places)):
            return None  # both sides of a cut turn together by another way
        tails = [self._tail(part, places) for part in parts]
        kept = [self._sizes[next(iter(part))] for part in parts]
        now = self._count(places, parts, kept)
        while now > parameters:
            choices = []
            for number, width in enumerate(kept):
                smaller = (width - 1) // self._multiple * self._multiple
                if smaller < 1:
                    continue
                then = self._count(places, parts, [*kept[:number], smaller, *kept[number + 1 :]])
                costs = tails[number][smaller] - tails[number][width]
                choices.append((costs / max(now - then, 1e-9), number, smaller, then))
            if not choices:
                return None
            _, number, kept[number], now = min(choices)
        loss = float(sum(tail[width] for tail, width in zip(tails, kept, strict=True)))
        return _Allotment(tuple(places), tuple(parts), tuple(kept), loss)

    def _parts(self, places: Sequence[_Place]) -> list[frozenset[int]]:
        """Units that turn together where the stream is cut at ``places`` only."""
        part = list(range(len(self._units)))
        for place in self._places:
            if place not in places:
                one, other = (part[unit] for unit in place.units)
                part = [one if held == other else held for held in part]
        order = sorted(range(len(part)), key=lambda unit: (part[unit], unit))
        return [frozenset(held) for _, held in itertools.groupby(order, lambda unit: part[unit])]

    def _tail(self, part: frozenset[int], places: Sequence[_Place]) -> Matrix:
        """J(k) for k = 0 ... d."""
        values = self._axes(part, places)[0]  # descending
        return np.concatenate([[0.0], np.cumsum(values[::-1])])[::-1]

    def _axes(self, part: frozenset[int], places: Sequence[_Place]) -> tuple[Matrix, Matrix]:
        """Eigenvalues of the matrix of a part, largest first, and its eigenvectors."""
        ends = self._ends(part, places)
        if (part, ends) not in self._spectra:
            size = self._sizes[next(iter(part))]
            total = np.zeros((size, size))
            for norm in self._norms(part):
                total += np.trace(self._seen.gradients[norm]) / size * self._seen.moments[norm]
            for place in ends:
                for moment, gradient in self._missed(place, part):
                    total += np.trace(gradient) / size * moment
            axes = principal(total, self._device)
            self._spectra[part, ends] = np.einsum("ij,ij->j", axes, total @ axes), axes
        return self._spectra[part, ends]

    def _ends(self, part: frozenset[int], places: Sequence[_Place]) -> frozenset[_Place]:
        """Where a part goes over into another."""
        return frozenset(place for place in places if place.units[0] in part)

    def _norms(self, units: Iterable[int]) -> list[str]:
        return list(
            dict.fromkeys(norm for unit in sorted(units) for norm in self._units[unit].norms)
        )

    def _missed(self, place: _Place, part: Collection[int]) -> Iterator[tuple[Matrix, Matrix]]:
        """The moment where a part ends, and the Fisher matrix for it of all that is behind."""
        behind, todo = set[int](), [place.units[1]]
        while todo:
            unit = todo.pop()
            if unit not in behind and unit not in part:
                behind.add(unit)
                todo += [p.units[1] for p in self._places if p.units[0] == unit]
        ending = self._norms([place.units[0]])
        for norm in ending[:1]:
            level = self._seen.levels[norm]
            parts = [
                np.exp(level - self._seen.levels[later]) * self._seen.gradients[later]
                for later in self._norms(behind)
            ]
            if parts:
                yield self._seen.moments[norm], np.sum(parts, axis=0)


def _sides(layout: Layout) -> dict[Edge, tuple[int | None, int | None]]:
    """The units before and behind each adapter; None where that side does not turn."""
    at = {
        place: number
        for number, unit in enumerate(layout.segments)
        for place in unit.stretch.exponents
    }
    readers = {node.outputs[0].name: node for node in layout.model.graph}
    found: dict[Edge, tuple[int | None, int | None]] = {}
    for edge in layout.edges:
        turn = readers[edge.reader].inputs[edge.operand]
        maker = turn.producer() if turn is not None else None
        assert maker is not None and maker.inputs[1] is not None
        matrix = maker.inputs[1]
        found[edge] = (at.get((matrix, 0)), at.get((matrix, 1)))
    return found
