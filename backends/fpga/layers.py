"""Layers as instructions: products, sums and pools, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from netlathe.backends.fpga import cost, isa
from netlathe.backends.fpga.emit import Emitter, Report, refuse_overflow
from netlathe.backends.fpga.kernel import Kernel, Part, kernels
from netlathe.backends.fpga.program import Span
from netlathe.backends.fpga.spec import Pattern
from netlathe.backends.fpga.tensors import MEMORY, Array, Image, Place, Scale, Tile, Window, tiles


@dataclass(frozen=True)
class _Held:
    """Inputs of a tile on the chip: pixels ``pitch`` vectors apart, ``across`` of them in a row."""

    source: int
    base: int
    across: int
    pitch: int
    spans: list[Span]


class Builder(Emitter):
    """Instructions of one layer after the other; each result lies where ``place`` says."""

    def product(
        self,
        name: str,
        x: Image,
        weights: Array,
        scale: Scale,
        window: Window | None = None,
        *,
        groups: int = 1,
        zero: int = 0,
        pattern: Pattern | None = None,
        nibbles: bool = False,
        raw: bool = False,
        place: Place = MEMORY,
    ) -> Image:
        """A convolution, or with a window of one pixel a matrix product.

        Args:
            weights: int8 [out, in / groups, vertical, horizontal].
            zero: what stands for 0 in ``x``; pads are filled with it.
            pattern: weights follow it along their inputs, and are stored without what it leaves out.
            nibbles: weights lie within -8 and 7, and are stored in 4 bits.
            raw: keep the 32-bit sums, bias added; :meth:`get_sums` reads them.

        Raises:
            LowerError: a sum can leave 32 bits, or a window does not fit the scratchpads.
        """
        window = window or Window()
        refuse_overflow(name, weights, scale, zero)
        height, width = window.output(x.height, x.width)
        y = self.image(height, width, weights.shape[0], group=4 if raw else 1, place=place)
        parameters = self._parameters(weights, scale, zero)
        tables = self._table(scale.table)
        ways = kernels(self.spec, weights, groups, pattern, nibbles)
        layers = [cost.Layer(self.spec, kernel, window, x, y, tables >= 0) for kernel in ways]
        way, plan = self.choices.choose(lambda: cost.plan(layers, name))
        kernel = ways[way]
        addresses = [self._kernel_data(kernel, n) for n in range(kernel.tiles)]
        self.choices.last_tile((width - 1) % plan[1] + 1)
        report = self._begin(name, weights.size * height * width, paired=kernel.paired)
        for tile in tiles(height, width, *plan):
            slots: dict[tuple[int, int], _Held] = {}
            for n in range(kernel.tiles):
                low, high = kernel.ranges[n]
                if (low, high) not in slots:  # grouped: other channels for other outputs
                    slots[low, high] = self._held(x, tile, window, zero, low, high, kernel.pitch)
                self._tile_of_product(
                    report, tile, window, kernel, n, slots[low, high], parameters, scale, tables, y,
                    addresses[n],
                )  # fmt: skip
        return self._end(report, y)

    def _tile_of_product(
        self, report: Report, tile: Tile, window: Window, kernel: Kernel, n: int, held: _Held,
        parameters: int, scale: Scale, tables: int, y: Image, parts: list[tuple[int, int, Part]],
    ) -> None:  # fmt: skip
        spec, vectors = self.spec, kernel.vectors_of(n)
        # The second sums of pairs lie half the scratchpad behind the first.
        half = spec.sum_rows // 2
        sums = self._next("sums", half if kernel.paired else spec.sum_rows, tile.pixels)
        count = len(vectors) * spec.columns
        words = self._next("parameters", spec.parameter_words, count)
        first = parameters + n * kernel.lanes
        self._copy("parameters", isa.PARAMETERS, first, words, count)
        pitch, row = held.pitch, held.across * held.pitch
        # k: slices of a pixel, then taps; weights that do not fit at once come in parts.
        for number, (address, index, part) in enumerate(parts):
            rows = self._next("weights", spec.weight_rows, part.rows)
            self._load_weights(kernel, rows, part.rows, address, index)
            v, h = divmod(part.tap, window.kernel[1])
            inside = min(part.taps, window.kernel[1])
            counts = (part.slices, inside, part.taps // inside, tile.width, tile.height)
            strides = (
                kernel.vectors,
                window.dilations[1] * pitch,
                window.dilations[0] * row,
                window.strides[1] * pitch,
                window.strides[0] * row,
            )
            start = held.base + v * window.dilations[0] * row + h * window.dilations[1] * pitch
            self._compute(
                isa.PAIRS if kernel.paired else isa.DOT, start + part.slice * kernel.vectors, rows,
                sums, counts, strides,
                accumulate=number > 0, pattern=kernel.number, source=held.source,
                reads=[*held.spans, ("weights", rows, rows + part.rows)],
            )  # fmt: skip
            report.computed += math.prod(counts)
        for number, vector in enumerate(vectors):
            own = words + number * spec.columns
            self._finish(tile, vector, sums + number * half, own, scale, tables, y)

    def add(
        self,
        name: str,
        terms: Sequence[tuple[Image, int]],
        scale: Scale,
        place: Place = MEMORY,
    ) -> Image:
        """The sum of images of one size, each times its factor (0 to 65535)."""
        spec, x = self.spec, terms[0][0]
        y = self.image(x.height, x.width, x.channels, place=place)
        parameters, tables = self._vector_parameters(scale), self._table(scale.table)
        report = self._begin(name, len(terms) * x.pixels * x.channels)
        most = min(spec.sum_rows, spec.output_vectors, spec.input_vectors) // 2
        # Pixel by pixel, and of a pixel vector by vector: what is kept has gaps between pixels.
        across, down = min(x.vectors, most), max(1, most // x.vectors)
        self.choices.last_tile((x.pixels - 1) % down + 1)
        for tile in tiles(x.pixels, x.vectors, down, across):
            start, count = tile.top * x.vectors + tile.left, tile.pixels
            sums = self._next("sums", spec.sum_rows, count)
            words = self._next("parameters", spec.parameter_words, spec.columns)
            self._copy("parameters", isa.PARAMETERS, parameters, words, spec.columns)
            for number, (image, factor) in enumerate(terms):
                kept = image.hidden >= 0
                if kept:
                    base, pitch = image.hidden + tile.top * image.pitch + tile.left, image.pitch
                else:
                    base = self._next("input", spec.input_vectors, count, spec.wide_vectors)
                    pitch = tile.width
                    self._copy_vectors(image.address + start * spec.vector_beats, base, count)
                last = base + (tile.height - 1) * pitch + tile.width
                self._compute(
                    isa.ADD, base, 0, sums, (1, 1, 1, tile.width, tile.height), (0, 0, 0, 1, pitch),
                    source=int(kept), accumulate=number > 0, factor=factor,
                    reads=[("hidden" if kept else "input", base, last)],
                )  # fmt: skip
                report.computed += count
            self._requantize(
                sums, words, scale, tables, tile.width, tile.height,
                y.address + start * spec.vector_beats, 1, tile.width, y,
                y.hidden + tile.top * y.pitch + tile.left, (1, y.pitch),
            )  # fmt: skip
        return self._end(report, y)

    def pool(
        self, name: str, x: Image, window: Window, scale: Scale, *, maximum: bool, zero: int,
        place: Place = MEMORY,
    ) -> Image:  # fmt: skip
        """The maximum, or the sum, under a window; pads are filled with ``zero``."""
        height, width = window.output(x.height, x.width)
        y = self.image(height, width, x.channels, place=place)
        parameters, tables = self._vector_parameters(scale), self._table(scale.table)
        report = self._begin(name, math.prod(window.kernel) * y.pixels * x.channels)
        layer = cost.Layer(self.spec, cost.Pooling(x.vectors), window, x, y, tables >= 0)
        for tile in tiles(height, width, *cost.tiling(layer, name)):
            for n in range(x.vectors):
                held = self._held(x, tile, window, zero, n, n + 1, 1)
                sums = self._next("sums", self.spec.sum_rows, tile.pixels)
                words = self._next("parameters", self.spec.parameter_words, self.spec.columns)
                self._copy("parameters", isa.PARAMETERS, parameters, words, self.spec.columns)
                counts = (window.kernel[1], window.kernel[0], 1, tile.width, tile.height)
                pitch, row = held.pitch, held.across * held.pitch
                strides = (
                    window.dilations[1] * pitch, window.dilations[0] * row, 0,
                    window.strides[1] * pitch, window.strides[0] * row,
                )  # fmt: skip
                self._compute(
                    isa.MAXIMUM if maximum else isa.ADD, held.base, 0, sums, counts, strides,
                    factor=1, source=held.source, reads=held.spans,
                )  # fmt: skip
                report.computed += math.prod(counts)
                self._finish(tile, n, sums, words, scale, tables, y)
        return self._end(report, y)

    # -- inputs of a tile ---------------------------------------------------------------------------

    def _held(
        self, x: Image, tile: Tile, window: Window, zero: int, low: int, high: int, pitch: int
    ) -> _Held:
        """Where vectors ``low`` to ``high`` of the pixels under ``tile`` are: brought there if need be."""
        if x.hidden < 0:
            base, spans = self._load_tile(x, tile, window, zero, low, high, pitch)
            return _Held(isa.FROM_INPUT, base, window.taken(1, tile.width), pitch, spans)
        assert not any(window.pads)
        first = tile.top * window.strides[0] * x.width + tile.left * window.strides[1]
        last = first + (window.taken(0, tile.height) - 1) * x.width + window.taken(1, tile.width)
        base = x.hidden + first * x.pitch
        spans = [("hidden", base, x.hidden + last * x.pitch)]
        return _Held(isa.FROM_HIDDEN, base + low, x.width, x.pitch, spans)

    def _load_tile(
        self, x: Image, tile: Tile, window: Window, zero: int, low: int, high: int, pitch: int
    ) -> tuple[int, list[Span]]:
        """Bring vectors ``low`` to ``high`` of the pixels under ``tile`` on the chip; pads are filled."""
        spec, beats = self.spec, self.spec.vector_beats
        rows, across = window.taken(0, tile.height), window.taken(1, tile.width)
        base = self._next("input", spec.input_vectors, rows * across * pitch, spec.wide_vectors)
        top = tile.top * window.strides[0] - window.pads[0]
        left = tile.left * window.strides[1] - window.pads[1]
        r0, r1 = max(0, -top), min(rows, x.height - top)
        c0, c1 = max(0, -left), min(across, x.width - left)
        fills = [
            (0, r0, 0, across), (r1, rows, 0, across), (r0, r1, 0, c0), (r0, r1, c1, across)
        ]  # fmt: skip
        for a, b, c, d in fills:
            if a < b and c < d:
                at = base + (a * across + c) * pitch
                self._emit(
                    "load",
                    {
                        "target": isa.INPUT, "how": isa.FILL, "base": at * beats,
                        "inner": (d - c) * pitch * beats, "outer": b - a,
                        "delta_base": (across - d + c) * pitch * beats + 1, "value": zero & 255,
                    },
                    writes=[("input", at, base + ((b - 1) * across + d) * pitch)],
                )  # fmt: skip
        count, whole = high - low, x.vectors == high - low == pitch
        source = x.address + ((top + r0) * x.width + left + c0) * x.vectors * beats + low * beats
        at = base + (r0 * across + c0) * pitch
        if r0 < r1 and c0 < c1:
            if whole:  # a row of pixels is one stretch of memory
                self._load_input(
                    source, at, (c1 - c0) * count, r1 - r0, x.width * x.vectors, across * pitch
                )
            else:
                for row in range(r1 - r0):
                    self._load_input(
                        source + row * x.width * x.vectors * beats, at + row * across * pitch,
                        count, c1 - c0, x.vectors, pitch,
                    )  # fmt: skip
        return base, [("input", base, base + rows * across * pitch)]

    def _load_input(
        self, source: int, at: int, inner: int, outer: int, stride: int, step: int
    ) -> None:
        """All but the address in vectors."""
        beats = self.spec.vector_beats
        self._emit(
            "load",
            {
                "target": isa.INPUT, "how": isa.COPY, "address": source, "base": at * beats,
                "inner": inner * beats, "outer": outer,
                "delta_memory": (stride - inner) * beats + 1, "delta_base": (step - inner) * beats + 1,
            },
            reads=[("memory", source, source + ((outer - 1) * stride + inner) * beats)],
            writes=[("input", at, at + (outer - 1) * step + inner)],
        )  # fmt: skip
        self._count_in(inner * outer * beats)
