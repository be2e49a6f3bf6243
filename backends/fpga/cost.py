"""What a layer takes, in closed form, and the tiles for which that is least.

Nothing is simulated: a tile's time follows from what each unit has to do for a vector of output channels.
With halves of scratchpads used by turns, such a vector takes as long as the slowest unit, or half as long as
the longest ring of units that wait for each other: loading a half waits for whoever reads it.

    load     b_p + b_w + two cycles an instruction      b: beats, over the rate of memory
    compute  sum over parts of (pixels x steps + 3)
    requantize   pixels x group + columns + 17
    store    beats over the rate + 3

A tile brings its inputs once, between two vectors; they hide behind the array as far as the weights' two
halves reach. :func:`netlathe.backends.fpga.model.cycles` is exact where this is close: tests hold the two
within 2 % of each other, over shapes that nothing here was fitted on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from netlathe.backends.fpga.kernel import Kernel
from netlathe.backends.fpga.model import COMPUTE_STAGES, REQUANTIZE_STAGES, Memory
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.tensors import Image, Window
from netlathe.diagnostics import Diagnostic, LowerError

QUEUED = 8  # vectors of outputs that LOAD can be ahead of the array


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


def cycles(p: Product, height: int, width: int, memory: Memory) -> float:
    """Of a product cut into tiles of ``height`` x ``width`` outputs, from its first load to its last beat."""
    spec, kernel, n = p.spec, p.kernel, p.kernel.tiles
    slow_read, slow_write = memory.read[1] / memory.read[0], memory.write[1] / memory.write[0]
    parts = [part.rows for part in kernel.parts()]
    gap = _gap(memory.read, 2)
    orders = gap * (2 if kernel.pattern else 1)  # loads of a part: values, and indices
    parameters = spec.columns * slow_read + gap
    load = parameters + sum(kernel.beats(rows) * slow_read + orders for rows in parts)
    first = parameters + kernel.beats(parts[0]) * slow_read + orders + memory.latency
    delay = COMPUTE_STAGES + spec.rows.bit_length() - 1 + 3
    each = len(set(kernel.ranges)) > 1  # every vector of outputs has inputs of its own
    by_load = by_array = by_both = behind = before = 0.0
    rows = _sides(p.window, 0, p.x.height, p.y.height, height)
    columns = _sides(p.window, 1, p.x.width, p.y.width, width)
    for v, rows_alike in rows.items():
        excess, idle = 0.0, False
        for h, columns_alike in columns.items():
            pixels, alike = v.outputs * h.outputs, rows_alike * columns_alike
            inputs = _inputs(p, v, h, memory)
            own, shared = (load + inputs, 0.0) if each else (load, inputs)
            array = sum(pixels * steps + 3 for steps in parts)
            requantize = pixels * p.y.group + spec.columns + REQUANTIZE_STAGES + 4
            store = pixels * p.y.group * spec.vector_beats * slow_write + _gap(memory.write, 3)
            store = store if p.y.address >= 0 else 0.0
            # Rings: how many vectors of outputs have room at once in weights, sums and output.
            weights_held = max(1.0, spec.weight_rows // max(parts) / len(parts))
            period = max(
                array,
                requantize,
                store,
                (own + memory.latency + array + delay) / weights_held,
                (array + delay + requantize) / max(1, spec.sum_rows // pixels),
                (requantize + store) / max(1, spec.output_vectors // (pixels * p.y.group)),
            )
            # Inputs come between the weights of two vectors; what is loaded by then keeps the array busy.
            reach = min(QUEUED, weights_held)
            late = 2 * own + shared + memory.latency - reach * period
            busy = n * period + max(0.0, late)
            by_load += alike * (n * own + shared)
            by_array += alike * busy
            excess += alike * max(0.0, n * own + shared - busy)
            idle = idle or n * own + shared < busy
            before = max(before, inputs)
            behind = requantize + store
        # Where tiles at an edge take longer to load than to compute, part is there before their turn: once
        # in every row that has others, once for rows of nothing else.
        by_both += max(0.0, excess - (rows_alike if idle else 1) * reach * own)
    by_both += by_array
    # Behind the last load: its own part, or what the last inputs let begin.
    last = parts[-1] * pixels + delay
    waiting = max(last, delay + n * array - (n - 1) * own)
    ends: tuple[float, ...] = (
        by_load + memory.latency + waiting,
        before + first + by_array + delay,
        by_both + last,
    )
    return 5 + max(ends) + behind


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
        taken += v.inside * h.inside * (high - low) * beats * slow
        taken += _gap(memory.read, 2) * (1 if p.x.vectors == high - low == pitch else v.inside)
    return taken


# -- the choice ---------------------------------------------------------------------------------------


def outputs(spec: Spec, y: Image) -> int:
    """How many pixels of ``y`` half of the sums takes, and half of the output scratchpad."""
    room = spec.sum_rows
    return min(room, spec.output_vectors // y.group if y.address >= 0 else room) // 2


def _candidates(p: Product) -> Iterator[tuple[int, int]]:
    height, width = p.y.size
    room, limit = p.spec.input_vectors // 2, outputs(p.spec, p.y)
    widths = sorted({math.ceil(width / d) for d in range(1, width + 1)})
    for h in sorted({math.ceil(height / d) for d in range(1, height + 1)}):
        for w in widths:
            area = p.window.taken(0, h) * p.window.taken(1, w) * p.kernel.pitch
            if h * w <= limit and (p.x.hidden >= 0 or area <= room):
                yield h, w


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
