"""What a layer takes, and the tiles for which that is least.

No program is made: a layer is a few kinds of tiles, each so many times in a row, and a tile a few kinds of
turns, each so many times (a *turn* is what the array does at once: a vector of outputs, or two in pairs).
When the units are done with a turn follows from when they were done with those before: a recurrence of sums
and maxima, whose terms :class:`~netlathe.backends.fpga.model.Clock` has. Once all that decides about the
future is as it was some turns, tiles or rows of tiles ago, what came since repeats: time goes on by a
multiple of that period, and what is left over is followed to the last beat. So a layer costs its start, one
period and its end, however many periods there are.

:func:`netlathe.backends.fpga.model.cycles` is exact where this is close: the future is taken to be the same
wherever in a scratchpad the words lie, if it has room for many. Tests hold the two within 2 % of each other,
and this and the core itself.

Tiles are chosen without following most of them: how much there is to do for each unit is a bound, in closed
form.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TypeVar

from netlathe.backends.fpga.kernel import Kernel
from netlathe.backends.fpga.model import REQUANTIZE_STAGES, Clock, Memory
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.tensors import Image, Window
from netlathe.diagnostics import Diagnostic, LowerError

TABLE = 256  # entries of a table of a function of a byte, a beat each
NEAR = 1.01  # tiles that take as much more are as good if they are larger: fewer instructions
T = TypeVar("T")


@dataclass(frozen=True)
class Pooling:
    """What stands for a kernel in a pool: a tile for each of ``outputs`` vectors, without weights."""

    outputs: int
    pitch: int = 1
    together: int = 1
    paired: bool = False

    @property
    def tiles(self) -> int:
        """As many as vectors."""
        return self.outputs

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Each reads its own vector."""
        return [(n, n + 1) for n in range(self.outputs)]

    def vectors_of(self, n: int) -> range:
        """It makes that vector."""
        return range(n, n + 1)


@dataclass(frozen=True)
class Layer:
    """What is to be tiled: [x.height, x.width, channels] to y, by ``kernel`` under ``window``."""

    spec: Spec
    kernel: Kernel | Pooling
    window: Window
    x: Image
    y: Image
    table: bool = False  # one is loaded before

    @cached_property
    def parts(self) -> list[tuple[int, int, int]]:
        """Of a turn: steps for a pixel, beats of their weights, and of the weights' indices."""
        kernel = self.kernel
        if isinstance(kernel, Pooling):
            return [(math.prod(self.window.kernel), 0, 0)]
        beats = self.spec.index_beats if kernel.pattern else 0
        return [(p.rows, kernel.value_beats(p.rows), beats * p.rows) for p in kernel.parts()]

    @cached_property
    def turns(self) -> list[tuple[tuple[int, int], int]]:
        """Of a tile: vectors of inputs that are brought for a turn, and of outputs; how many alike."""
        kernel, turns, there = self.kernel, [], (0, 0)
        for n, (low, high) in enumerate(kernel.ranges):
            bring = self.x.hidden < 0 and (low, high) != there
            turns.append((high - low if bring else 0, len(kernel.vectors_of(n))))
            there = low, high
        return _alike(turns)


@dataclass(frozen=True)
class _Side:
    """Of a tile along one axis: outputs, inputs under them, and pads before and behind those."""

    outputs: int
    before: int
    inside: int
    behind: int

    @property
    def taken(self) -> int:
        return self.before + self.inside + self.behind


def _alike(things: Sequence[T]) -> list[tuple[T, int]]:
    """In order, and how many equal ones follow each other."""
    return [(thing, len(list(equal))) for thing, equal in groupby(things)]


def _sides(p: Layer, axis: int, step: int) -> list[tuple[_Side, int]]:
    """Tiles of ``step`` outputs along an axis."""
    window, inputs, outputs = p.window, p.x.size[axis], p.y.size[axis]
    sides = []
    for start in range(0, outputs, step):
        count = min(step, outputs - start)
        first, taken = start * window.strides[axis] - window.pads[axis], window.taken(axis, count)
        before, behind = max(0, -first), max(0, first + taken - inputs)
        sides.append(_Side(count, before, taken - before - behind, behind))
    return _alike(sides)


@dataclass(frozen=True)
class _Load:
    """An instruction that brings part of a tile's inputs: to words from ``first`` to before ``end``."""

    beats: int
    fill: bool  # of pads
    first: int
    end: int


def _loads(p: Layer, v: _Side, h: _Side, vectors: int) -> list[_Load]:
    """What brings ``vectors`` of each pixel under a tile, as the builder does."""
    beats, pitch, across, loads = p.spec.vector_beats, p.kernel.pitch, h.taken, []
    for top, rows, left, columns in (
        (0, v.before, 0, across), (v.before + v.inside, v.behind, 0, across),
        (v.before, v.inside, 0, h.before), (v.before, v.inside, h.before + h.inside, h.behind),
    ):  # fmt: skip
        if rows and columns:
            first, end = top * across + left, (top + rows - 1) * across + left + columns
            loads.append(_Load(rows * columns * pitch * beats, True, first * pitch, end * pitch))
    size, row = h.inside * vectors * beats, across * pitch
    first = v.before * row + h.before * pitch
    if p.x.vectors == vectors == pitch:  # one instruction for all rows
        last = first + (v.inside - 1) * row
        return [*loads, _Load(v.inside * size, False, first, last + h.inside * pitch)]
    for start in range(first, first + v.inside * row, row):
        loads.append(_Load(size, False, start, start + (h.inside - 1) * pitch + vectors))
    return loads


# -- time ---------------------------------------------------------------------------------------------


class _Ring:
    """A scratchpad that is filled round and round: who takes words waits until those there have been read."""

    def __init__(self, size: int, most: int) -> None:
        """``most``: of what was taken last, how many may still be waited for."""
        self._size, self._end, self._counts = size, 0, (0, 0)
        # First word, one behind the last, and when they have been read: what is held, and what made room.
        self._held: deque[tuple[int, int, int]] = deque(maxlen=most)
        self._gone: list[tuple[int, int, int]] = []

    def take(self, count: int, align: int = 1) -> int:
        """Until when one has to wait for the next ``count`` words, as the emitter places them."""
        held, start = self._held, -(-self._end // align) * align
        if start + count > self._size:
            while held and held[0][0] >= self._end:  # what lies behind, of the round before
                held.popleft()
            start = 0
        self._gone = []
        while held and start <= held[0][0] < start + count:
            self._gone.append(held.popleft())
        held.append((start, start + count, -1))
        self._end, self._counts = start + count, (self._counts[1], count)
        return self._gone[-1][2] if self._gone else -1

    def wait(self, first: int, end: int) -> int:
        """The same for words ``first`` to before ``end`` of those taken last."""
        start = self._held[-1][0]
        return max(
            (t for a, b, t in self._gone if a < start + end and start + first < b), default=-1
        )

    def read(self, time: int) -> None:
        """The words taken last have been read by then."""
        start, end, _ = self._held[-1]
        self._held[-1] = start, end, time

    def state(self, clock: Clock) -> tuple[int, ...]:
        """As :meth:`Clock.state`; where words lie hardly matters if all take as many, and many have room."""
        before, count = self._counts
        end = self._end if before != count or 4 * count > self._size else 0
        return end, *clock.ahead([time for *_, time in self._held])

    def skip(self, cycles: int) -> None:
        """As :meth:`Clock.skip`."""
        later = [(start, end, time + cycles) for start, end, time in self._held]
        self._held = deque(later, self._held.maxlen)


class _Run:
    """A layer on its way through the core."""

    def __init__(self, p: Layer, memory: Memory) -> None:
        spec = p.spec
        self.p, self.clock, self.parts, self.turns = p, Clock(spec, memory), p.parts, p.turns
        # Instructions are handed out in order, and a full queue holds all up: no unit is further ahead.
        most = spec.queue + 8
        self.input, self.weights = _Ring(spec.input_vectors, most), _Ring(spec.weight_rows, most)
        self.parameters = _Ring(spec.parameter_words, most)
        self.sums = _Ring(spec.sum_rows // p.kernel.together, most)
        self.output = _Ring(spec.output_vectors, most)
        self.rings = [self.input, self.weights, self.parameters, self.sums, self.output]

    def repeat(self, count: int, body: Callable[[], None]) -> None:
        """``body``, ``count`` times; of what repeats only one period."""
        seen: dict[object, tuple[int, int]] = {}
        done = 0
        while True:
            body()
            done += 1
            if done >= count:
                return
            state = self.clock.state(), *(ring.state(self.clock) for ring in self.rings)
            before, then = seen.setdefault(state, (done, self.clock.offered))
            if done > before and (periods := (count - done) // (done - before)):
                cycles = periods * (self.clock.offered - then)
                done += periods * (done - before)
                self.clock.skip(cycles)
                for ring in self.rings:
                    ring.skip(cycles)
                if done == count:
                    return

    def row(self, v: _Side, columns: Sequence[tuple[_Side, int]]) -> None:
        """Of tiles."""
        for h, across in columns:
            self.repeat(across, partial(self._tile, v, h))

    def _tile(self, v: _Side, h: _Side) -> None:
        pixels, words = v.outputs * h.outputs, v.taken * h.taken * self.p.kernel.pitch
        for (vectors, outputs), count in self.turns:
            loads = _loads(self.p, v, h, vectors) if vectors else []
            self.repeat(count, partial(self._turn, loads, words, pixels, outputs))

    def _turn(self, loads: list[_Load], words: int, pixels: int, outputs: int) -> None:
        """Bring inputs in ``loads``, if any; then ``outputs`` vectors of ``pixels``."""
        clock, spec, kernel, y = self.clock, self.p.spec, self.p.kernel, self.p.y
        loaded = done = -1
        if loads:
            self.input.take(words, spec.wide_vectors)
            for one in loads:
                loaded = clock.load(one.beats, self.input.wait(one.first, one.end), fill=one.fill)
        free, scales = self.sums.take(pixels), outputs * spec.columns
        scaled = clock.load(scales, self.parameters.take(scales))
        for number, (steps, values, indices) in enumerate(self.parts):
            if values:
                loaded = clock.load(values, self.weights.take(steps))
            if indices:
                loaded = clock.load(indices)
            after, onto = max(loaded, free), number > 0
            done = clock.compute(steps * pixels, after, accumulate=onto, pairs=kernel.paired)
            if values:
                self.weights.read(done)
        if self.p.x.hidden < 0:
            self.input.read(done)
        count, done = pixels * y.group, max(done, scaled)
        for _ in range(outputs):
            if y.address >= 0:
                done = clock.requantize(count, max(done, self.output.take(count)))
                self.output.read(clock.store(count * spec.vector_beats, done))
            else:
                done = clock.requantize(count, done)
        self.sums.read(done)
        self.parameters.read(done)


def cycles(p: Layer, height: int, width: int, memory: Memory) -> int:
    """Of a layer cut into tiles of ``height`` x ``width`` outputs, from its first load to its last beat."""
    run, columns = _Run(p, memory), _sides(p, 1, width)
    if p.table:
        run.clock.load(TABLE)
    for v, down in _sides(p, 0, height):
        run.repeat(down, partial(run.row, v, columns))
    return run.clock.finished


# -- the choice ---------------------------------------------------------------------------------------


def bound(p: Layer, height: int, width: int) -> int:
    """Cycles that such tiles take at least: what one unit has to do, and what comes before and behind that.

    Memory is as fast as it can be. Between two instructions LOAD rests for 2 cycles, COMPUTE and STORE for 3;
    REQUANTIZE takes ``columns`` parameters first, and begins when the last instruction is done.
    """
    spec, kernel, y, parts, turns = p.spec, p.kernel, p.y, p.parts, p.turns
    rows, columns = _sides(p, 0, height), _sides(p, 1, width)
    tiles = sum(down for _, down in rows) * sum(across for _, across in columns)
    each = REQUANTIZE_STAGES + spec.columns + 4
    stored = spec.vector_beats * y.group if y.address >= 0 else 0

    def bring(v: _Side, h: _Side, vectors: int) -> int:
        return sum(one.beats + 2 for one in _loads(p, v, h, vectors)) if vectors else 0

    weights = [sum(beats + 2 for beats in part[1:] if beats) for part in parts]
    load = tiles * (kernel.tiles * (sum(weights) + 2) + kernel.outputs * spec.columns)
    for v, down in rows:
        for h, across in columns:
            load += down * across * sum(n * bring(v, h, vectors) for (vectors, _), n in turns)
    steps = sum(rows for rows, _, _ in parts)
    array = kernel.tiles * (steps * y.pixels + 3 * tiles * (2 * len(parts) - 1))
    requantize = kernel.outputs * (y.pixels * y.group + each * tiles)
    store = kernel.outputs * (y.pixels * stored + 3 * tiles) if stored else 0
    # Before the first step of the array, and behind its last: of the first turn and of the last one.
    (v, _), (h, _), ((vectors, outputs), _) = rows[0], columns[0], turns[0]
    latency, first = Memory().latency, v.outputs * h.outputs
    before = bring(v, h, vectors) + outputs * spec.columns + 2 + weights[0] + latency
    last = rows[-1][0].outputs * columns[-1][0].outputs
    behind = last * (y.group + stored) + each
    return max(
        load + latency + parts[-1][0] * last + behind,
        before + array + behind,
        before + steps * first + requantize + last * stored,
        before + (steps + y.group) * first + each + store,
    )


def outputs(spec: Spec, y: Image, together: int = 1) -> int:
    """How many pixels of ``y`` half of the sums takes, in ``together`` rows each, and half of the output."""
    room = spec.sum_rows // together
    return min(room, spec.output_vectors // y.group if y.address >= 0 else room) // 2


def _candidates(p: Layer) -> Iterator[tuple[int, int]]:
    height, width = p.y.size
    room, limit = p.spec.input_vectors // 2, outputs(p.spec, p.y, p.kernel.together)
    widths = sorted({math.ceil(width / d) for d in range(1, width + 1)})
    for h in sorted({math.ceil(height / d) for d in range(1, height + 1)}):
        for w in widths:
            area = p.window.taken(0, h) * p.window.taken(1, w) * p.kernel.pitch
            if h * w <= limit and (p.x.hidden >= 0 or area <= room):
                yield h, w


def plan(ways: Sequence[Layer], name: str) -> tuple[int, tuple[int, int]]:
    """Which of the ways to compute a layer takes least, the first of those that do, and its tiles.

    Raises:
        LowerError: as :func:`tiling`.
    """
    tiles = [tiling(p, name) for p in ways]
    taken = [cycles(p, *tile, Memory()) for p, tile in zip(ways, tiles, strict=True)]
    best = taken.index(min(taken))
    return best, tiles[best]


def tiling(p: Layer, name: str) -> tuple[int, int]:
    """Height and width of the largest tiles that take hardly more than the least that any can take.

    If there are none because that bound is too low, those that take least.

    Raises:
        LowerError: the inputs of one output do not fit.
    """
    if p.x.hidden < 0:
        check_window(p.spec, name, p.window.span(0) * p.window.span(1) * p.kernel.pitch)
    bounds = {tile: bound(p, *tile) for tile in _candidates(p)}
    enough = NEAR * min(bounds.values())
    taken: dict[tuple[int, int], int] = {}
    for tile in sorted(bounds, key=lambda t: (-t[0] * t[1], bounds[t])):
        if bounds[tile] <= enough:
            taken[tile] = cycles(p, *tile, Memory())
            if taken[tile] <= enough:
                return tile
    for tile in sorted(bounds.keys() - taken.keys(), key=lambda t: (bounds[t], t)):
        if bounds[tile] >= min(taken.values()):
            break
        taken[tile] = cycles(p, *tile, Memory())
    return min(taken, key=lambda t: taken[t])


def check_window(spec: Spec, name: str, vectors: int) -> None:
    """Raise unless ``vectors`` of inputs fit half of their scratchpad."""
    room = spec.input_vectors // 2
    if vectors > room:
        raise LowerError(
            Diagnostic(
                "fpga.window",
                f"{name}: the inputs of one output take {vectors * spec.columns} bytes; half of"
                f" the input scratchpad is {room * spec.columns}",
                help="a core with more input_vectors, or a narrower layer",
            )
        )
