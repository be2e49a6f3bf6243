"""What a layer takes, in closed form, and the tiles for which that is least.

Nothing is simulated: a tile's time follows from what each unit has to do for a vector of output channels.
With halves of scratchpads used by turns, such a vector takes as long as the slowest unit, or half as long as
the longest ring of units that wait for each other: loading a half waits for whoever reads it.

    load     b_p + b_w + two cycles an instruction      b: beats, over the rate of memory
    compute  sum over parts of (pixels x steps + 3)
    requantize   pixels x group + columns + 17
    store    beats over the rate + 3

Pairs of int4 make two vectors at once: load and compute are as for one, requantize and store twice that.

A tile brings its inputs once, between two vectors; they hide behind the array as far as LOAD is ahead of it,
which is counted in vectors of the tile before: a narrow tile at an edge leaves little time for the next. At
the end the requantizer and STORE may still be at work on a larger tile than the last.
:func:`netlathe.backends.fpga.model.cycles` is exact where this is close: tests hold the two within 2 % of
each other, over shapes that nothing here was fitted on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from netlathe.backends.fpga.kernel import Kernel
from netlathe.backends.fpga.model import (
    COMPUTE_WAIT,
    JOBS,
    REQUANTIZE_STAGES,
    Memory,
    compute_stages,
)
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.tensors import Image, Window
from netlathe.diagnostics import Diagnostic, LowerError

QUEUED = 9  # vectors of outputs that LOAD can be ahead of the array


@dataclass(frozen=True)
class Product:
    """What is to be tiled: [x.height, x.width, channels] to y, by ``kernel`` under ``window``."""

    spec: Spec
    kernel: Kernel
    window: Window
    x: Image
    y: Image


@dataclass(frozen=True)
class _Side:
    """Tiles of one axis that are alike: outputs, inputs under them, and pads before and behind those."""

    outputs: int
    inside: int
    before: int
    behind: int


def _sides(window: Window, axis: int, inputs: int, outputs: int, step: int) -> Counter[_Side]:
    found: Counter[_Side] = Counter()
    for start in range(0, outputs, step):
        count = min(step, outputs - start)
        first = start * window.strides[axis] - window.pads[axis]
        taken = window.taken(axis, count)
        before, behind = max(0, -first), max(0, first + taken - inputs)
        found[_Side(count, taken - before - behind, before, behind)] += 1
    return found


@dataclass(frozen=True)
class _Cost:
    """Of one tile: its pixels, and the cycles of each unit.

    A *turn* is what the array does at once: a vector of outputs, or two in pairs.
    """

    pixels: int
    inputs: float  # LOAD, for all turns
    own: float  # LOAD, for one
    shared: float
    array: float  # for a turn
    requantize: float  # for a vector
    store: float
    busy: float  # the array for all turns, and what it waits for
    short: float  # of that the last turn, which may have one vector instead of two
    ahead: float  # turns that LOAD is ahead of the array


def _tile(p: Product, v: _Side, h: _Side, memory: Memory) -> _Cost:
    spec, kernel = p.spec, p.kernel
    slow_read, slow_write = memory.read[1] / memory.read[0], memory.write[1] / memory.write[0]
    parts = [part.rows for part in kernel.parts()]
    gap = _gap(memory.read, 2)
    orders = gap * (2 if kernel.pattern else 1)  # loads of a part: values, and indices
    n, vectors, last = kernel.tiles, kernel.outputs, len(kernel.vectors_of(kernel.tiles - 1))
    load = vectors * spec.columns / n * slow_read + gap
    load += sum(kernel.beats(rows) * slow_read + orders for rows in parts)
    pixels, inputs = v.outputs * h.outputs, _inputs(p, v, h, memory)
    groups = len(set(kernel.ranges))  # of them each has inputs of its own
    own, shared = (load + inputs * groups / n, 0.0) if groups > 1 else (load, inputs)
    array = sum(pixels * steps + 3 for steps in parts) + COMPUTE_WAIT * (len(parts) - 1)
    requantize = pixels * p.y.group + spec.columns + REQUANTIZE_STAGES + 4
    store = pixels * p.y.group * spec.vector_beats * slow_write + _gap(memory.write, 3)
    store = store if p.y.address >= 0 else 0.0
    # Rings: how many turns have room at once in weights and sums, how many vectors in output.
    held = max(1.0, spec.weight_rows // max(parts) / len(parts))
    delay = compute_stages(spec) + 3
    sums = max(1, spec.sum_rows // kernel.together // pixels)
    behind = max(store, (requantize + store) / max(1, spec.output_vectors // (pixels * p.y.group)))

    def turn(count: int) -> float:
        longest: float = max(
            array,
            count * requantize if sums < 3 else 0.0,  # with more room turns make up for each other
            (own + memory.latency + array + delay) / held,
            (array + delay + count * requantize) / sums,
        )
        return longest

    turns = (n - 1) * turn(kernel.together) + turn(last)
    busy = max(turns, vectors * requantize, vectors * behind)
    short = max(turn(last), last * requantize, last * behind)
    return _Cost(
        pixels, inputs, own, shared, array, requantize, store, busy, short, min(QUEUED, held)
    )


def cycles(p: Product, height: int, width: int, memory: Memory) -> float:
    """Of a product cut into tiles of ``height`` x ``width`` outputs, from its first load to its last beat."""
    n, delay = p.kernel.tiles, compute_stages(p.spec) + 3
    parts = [part.rows for part in p.kernel.parts()]
    rows = _sides(p.window, 0, p.x.height, p.y.height, height)
    columns = _sides(p.window, 1, p.x.width, p.y.width, width)
    vectors = p.kernel.outputs
    by_load = by_array = by_both = by_requantize = by_store = 0.0
    # The first tile; the last one and the one before it, of another kind or the same.
    first: _Cost | None = None
    last: _Cost | None = None
    before: _Cost | None = None
    for v, down in rows.items():
        excess, idle = 0.0, False
        kinds = [(_tile(p, v, h, memory), across) for h, across in columns.items()]
        for number, (tile, across) in enumerate(kinds):
            # Behind which: the neighbour to the left, or at the end of the row above; none at the start.
            behind: list[tuple[_Cost | None, int]] = [(tile, down * (across - 1))]
            if first is None:
                first = tile
                behind += [(kinds[-1][0], down - 1), (None, 1)]
            else:
                behind += [(kinds[number - 1][0], down)]
            for left, times in behind:
                late = 0.0
                if left is not None:
                    # Inputs come between the weights of two vectors; what is loaded by then keeps the array
                    # busy.
                    near = min(tile.ahead, n)
                    lead = (near * left.busy + (tile.ahead - near) * tile.busy) / n
                    late = 2 * tile.own + tile.shared + memory.latency - lead
                busy, loading = tile.busy + max(0.0, late), n * tile.own + tile.shared
                by_load += times * loading
                by_array += times * busy
                by_requantize += times * vectors * tile.requantize
                by_store += times * vectors * tile.store
                excess += times * max(0.0, loading - busy)
                idle = idle or (times > 0 and loading < busy)
            before, last = (last if across == 1 else tile), tile
        # Where tiles at an edge take longer to load than to compute, part is there before their turn: once
        # in every row that has others, once for rows of nothing else.
        tile = kinds[-1][0]
        by_both += max(0.0, excess - (down if idle else 1) * tile.ahead * tile.own)
    assert first is not None and last is not None
    by_both += by_array
    before = before or last
    # Behind the last load: its own part, or what the last inputs let begin.
    part = parts[-1] * last.pixels + delay
    waiting = max(part, delay + n * last.array - (n - 1) * last.own)
    begin = _first(p, first, memory)
    ends = (
        by_load + memory.latency + waiting,
        begin + by_array - (last.short - last.array) + delay,
        by_both + part,
    )
    drained = max(ends) + _drain(before, last, p.kernel)
    requantized = begin + first.array + delay + by_requantize + last.store
    stored = begin + first.array + delay + first.requantize + by_store
    taken: float = 5 + max(drained, requantized, stored)
    return taken


def _first(p: Product, tile: _Cost, memory: Memory) -> float:
    """Until the first step of the array: parameters, inputs and the first part of the weights."""
    slow = memory.read[1] / memory.read[0]
    gap = _gap(memory.read, 2)
    kernel = p.kernel
    rows = next(kernel.parts()).rows
    orders = gap * (3 if kernel.pattern else 2)
    return tile.inputs + (kernel.lanes + kernel.beats(rows)) * slow + orders + memory.latency


def _drain(before: _Cost, last: _Cost, kernel: Kernel) -> float:
    """From the array's end to the last beat: of its last vectors, or of a tile before that was larger."""
    count, vectors = len(kernel.vectors_of(kernel.tiles - 1)), kernel.outputs
    earlier = count * before.requantize - last.busy
    requantized = max(count * last.requantize, earlier + vectors * last.requantize)
    # A vector is stored while the next one is requantized.
    own = requantized + max(last.store, count * last.store - (count - 1) * last.requantize)
    return max(own, earlier + before.store + vectors * last.store)


def _gap(rate: tuple[int, int], idle: int) -> float:
    """What ``idle`` cycles between two transfers cost: a memory that rests in between hides some."""
    n, d = rate
    return (math.ceil((idle + 1) * n / d) - 1) * d / n


def _inputs(p: Product, v: _Side, h: _Side, memory: Memory) -> float:
    """Cycles in which LOAD brings the inputs of one tile."""
    if p.x.hidden >= 0:
        return 0.0
    spec, pitch = p.spec, p.kernel.pitch
    beats, slow = spec.vector_beats, memory.read[1] / memory.read[0]
    low, high = p.kernel.ranges[0]
    across = h.before + h.inside + h.behind
    taken = 0.0
    fills = [
        v.before * across, v.behind * across, v.inside * h.before, v.inside * h.behind,
    ]  # fmt: skip
    for pixels in fills:
        if pixels:
            taken += pixels * pitch * beats + 3
    if taken:
        taken += memory.latency
    if v.inside > 0 and h.inside > 0:
        row = h.inside * (high - low) * beats * slow
        if p.x.vectors == high - low == pitch:
            return taken + v.inside * row + _gap(memory.read, 2)
        # An instruction a row: as fast as memory, or as those that may be under way at once come back.
        row = max(row + _gap(memory.read, 2), (row + memory.latency + 4) / (JOBS + 1))
        taken += v.inside * row
    return taken


# -- the choice ---------------------------------------------------------------------------------------


def outputs(spec: Spec, y: Image, together: int = 1) -> int:
    """How many pixels of ``y`` half of the sums takes, in ``together`` rows each, and half of the output."""
    room = spec.sum_rows // together
    return min(room, spec.output_vectors // y.group if y.address >= 0 else room) // 2


def _candidates(p: Product) -> Iterator[tuple[int, int]]:
    height, width = p.y.size
    room, limit = p.spec.input_vectors // 2, outputs(p.spec, p.y, p.kernel.together)
    widths = sorted({math.ceil(width / d) for d in range(1, width + 1)})
    for h in sorted({math.ceil(height / d) for d in range(1, height + 1)}):
        for w in widths:
            area = p.window.taken(0, h) * p.window.taken(1, w) * p.kernel.pitch
            if h * w <= limit and (p.x.hidden >= 0 or area <= room):
                yield h, w


def plan(ways: Sequence[Product], name: str) -> tuple[int, tuple[int, int]]:
    """Which of the ways to compute a layer takes least, the first of those that do, and its tiles.

    Raises:
        LowerError: as :func:`tiling`.
    """
    tiles = [tiling(p, name) for p in ways]
    taken = [cycles(p, *tile, Memory()) for p, tile in zip(ways, tiles, strict=True)]
    best = taken.index(min(taken))
    return best, tiles[best]


def tiling(p: Product, name: str) -> tuple[int, int]:
    """Height and width of the tiles that take least; of those within 1 %, the largest: fewer instructions.

    Raises:
        LowerError: the inputs of one output do not fit.
    """
    if p.x.hidden < 0:
        check_window(p.spec, name, p.window.span(0) * p.window.span(1) * p.kernel.pitch)
    memory = Memory()
    taken = {tile: cycles(p, *tile, memory) for tile in _candidates(p)}
    least = min(taken.values())
    return max((t for t, c in taken.items() if c <= 1.01 * least), key=lambda t: t[0] * t[1])


def pool_tiling(spec: Spec, name: str, x: Image, y: Image, window: Window) -> tuple[int, int]:
    """Height and width of the largest tile of one vector.

    Raises:
        LowerError: the inputs of one output do not fit.
    """
    limit, room, (height, width) = outputs(spec, y), spec.input_vectors // 2, y.size
    best = max(
        (h * w, w, h)
        for h in range(1, height + 1)
        for w in {width, *(math.ceil(width / d) for d in range(1, width + 1))}
        if h * w <= limit
        and (x.hidden >= 0 or window.taken(0, h) * window.taken(1, w) <= room or h * w == 1)
    )
    if x.hidden < 0:
        check_window(spec, name, window.taken(0, best[2]) * window.taken(1, best[1]))
    return best[2], best[1]


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
