"""Layers as instructions: tiles, double buffers, and the data that memory has to hold.

Every scratchpad is used in two halves by turns, so that what comes next is loaded while the array works.
Tensors lie in memory as pixels of whole vectors, [height, width, channels / columns, columns]; a linear
layer has one pixel a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from netlathe.backends.fpga import isa
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.program import Span, Step
from netlathe.backends.fpga.spec import Pattern, Spec
from netlathe.diagnostics import Diagnostic, LowerError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Image:
    """An int8 tensor in memory: pixels of ``vectors`` vectors; channels beyond the last are arbitrary."""

    address: int  # in beats
    height: int
    width: int
    channels: int
    vectors: int
    group: int = 1  # 4: 32-bit sums, whose bytes lie in vectors of their own

    @property
    def pixels(self) -> int:
        """How many."""
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image: (vertical, horizontal) each; pads are top, left, bottom, right."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Size of what comes out."""
        top, left, bottom, right = self.pads
        return (
            (height + top + bottom - self.span(0)) // self.strides[0] + 1,
            (width + left + right - self.span(1)) // self.strides[1] + 1,
        )

    def span(self, axis: int) -> int:
        """Pixels from the first to the last tap."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def taken(self, axis: int, count: int) -> int:
        """Pixels under ``count`` outputs."""
        return (count - 1) * self.strides[axis] + self.span(axis)


@dataclass(frozen=True)
class Scale:
    """Requantization: per output channel ``multiplier`` / 2^``shift``, then ``zero`` and perhaps a table.

    ``bias`` is added to the sums; all three are int64 [channels]. ``table``: int8 [256], for -128 to 127.
    """

    bias: Array
    multiplier: Array
    shift: Array
    zero: int = 0
    table: Array | None = None


@dataclass(frozen=True)
class Tile:
    """Outputs that are computed together: pixels from ``top``, ``left`` on."""

    top: int
    left: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """How many."""
        return self.height * self.width


@dataclass
class Report:
    """What a layer asks for, counted while it is built."""

    name: str
    macs: int  # of the layer
    computed: int  # cycles of the array
    beats_in: int = 0
    beats_out: int = 0
    first: int = 0  # its first instruction
    last: int = 0


@dataclass
class Builder:
    """Instructions of one layer after the other, and what memory holds at the start."""

    spec: Spec
    steps: list[Step] = field(default_factory=list)
    beats: int = 0  # of memory, in use
    data: list[tuple[int, Array]] = field(default_factory=list)  # (beat, bytes)
    reports: list[Report] = field(default_factory=list)
    _turn: dict[str, int] = field(default_factory=dict)

    # -- memory -------------------------------------------------------------------------------------

    def image(self, height: int, width: int, channels: int, *, group: int = 1) -> Image:
        """Room for a tensor; ``group`` bytes an element."""
        vectors = math.ceil(channels / self.spec.columns) * group
        address = self._room(height * width * vectors * self.spec.vector_beats)
        return Image(address, height, width, channels, vectors, group)

    def _room(self, beats: int) -> int:
        self.beats += beats
        return self.beats - beats

    def _constant(self, array: Array) -> int:
        """Bytes in memory, padded to whole beats; the address."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        beats = -(-raw.size // self.spec.beat_bytes)
        address = self._room(beats)
        self.data.append((address, np.pad(raw, (0, beats * self.spec.beat_bytes - raw.size))))
        return address

    def memory(self) -> Array:
        """Memory at the start: uint8, constants in their places."""
        made = np.zeros(self.beats * self.spec.beat_bytes, np.uint8)
        for beat, raw in self.data:
            start = beat * self.spec.beat_bytes
            made[start : start + raw.size] = raw
        return made

    def put(self, memory: Array, image: Image, values: Array) -> None:
        """Write int8 values [height, width, channels] where ``image`` lies."""
        wide = np.zeros((image.height, image.width, image.vectors * self.spec.columns), np.int8)
        wide[..., : image.channels] = values
        start = image.address * self.spec.beat_bytes
        memory[start : start + wide.size] = wide.reshape(-1).view(np.uint8)

    def get(self, memory: Array, image: Image) -> Array:
        """What ``image`` holds: int8 [height, width, channels]."""
        size = image.pixels * image.vectors * self.spec.columns
        start = image.address * self.spec.beat_bytes
        raw = memory[start : start + size].view(np.int8)
        return raw.reshape(image.height, image.width, -1)[..., : image.channels]

    def get_sums(self, memory: Array, image: Image) -> Array:
        """What an image of sums holds: int32 [height, width, channels]."""
        size = image.pixels * image.vectors * self.spec.columns
        start = image.address * self.spec.beat_bytes
        raw = memory[start : start + size].reshape(*image.size, -1, 4, self.spec.columns)
        whole = np.ascontiguousarray(raw.swapaxes(-1, -2)).view("<i4")
        return whole.reshape(*image.size, -1)[..., : image.channels]

    # -- layers -------------------------------------------------------------------------------------

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
        spec, window = self.spec, window or Window()
        out = weights.shape[0]
        self._check_sums(name, weights, scale, zero)
        kernel = _Kernel(spec, weights, groups, pattern, nibbles)
        height, width = window.output(x.height, x.width)
        y = self.image(height, width, out, group=4 if raw else 1)
        parameters = self._parameters(weights, scale, zero)
        tables = self._table(scale.table)
        addresses = [self._kernel_data(kernel, n) for n in range(kernel.tiles)]
        plan = self._tiling(name, x, kernel, window, y)
        report = self._begin(name, weights.size * height * width)
        for tile in _tiles(height, width, *plan):
            slots: dict[tuple[int, int], tuple[int, list[Span]]] = {}
            for n in range(kernel.tiles):
                low, high = kernel.ranges[n]
                if (low, high) not in slots:  # grouped: other channels for other outputs
                    slots[low, high] = self._load_tile(
                        x, tile, window, zero, low, high, kernel.pitch
                    )
                self._tile_of_product(
                    report, tile, window, kernel, n, slots[low, high], parameters, scale, tables, y,
                    addresses[n],
                )  # fmt: skip
        return self._end(report, y)

    def _tile_of_product(
        self, report: Report, tile: Tile, window: Window, kernel: _Kernel, n: int,
        held: tuple[int, list[Span]], parameters: int, scale: Scale, tables: int, y: Image,
        parts: list[tuple[int, int, _Part]],
    ) -> None:  # fmt: skip
        spec, pixels = self.spec, tile.pixels
        base, spans = held
        sums = self._half("sums", spec.sum_rows, pixels)
        words = self._half("parameters", spec.parameter_words, spec.columns)
        self._copy("parameters", isa.PARAMETERS, parameters + n * kernel.words, words, spec.columns)
        pitch, step = kernel.pitch, kernel.vectors
        across = window.taken(1, tile.width)
        # k: slices of a pixel, then taps; weights that do not fit at once come in parts.
        for number, (address, index, part) in enumerate(parts):
            rows = self._half("weights", spec.weight_rows, part.rows)
            self._load_weights(kernel, rows, part.rows, address, index)
            v, h = divmod(part.tap, window.kernel[1])
            inside = min(part.taps, window.kernel[1])
            counts = (part.slices, inside, part.taps // inside, tile.width, tile.height)
            strides = (
                step,
                window.dilations[1] * pitch,
                window.dilations[0] * across * pitch,
                window.strides[1] * pitch,
                window.strides[0] * across * pitch,
            )
            start = base + (v * window.dilations[0] * across + h * window.dilations[1]) * pitch
            start += part.slice * step
            self._compute(
                isa.DOT, start, rows, sums, counts, strides, accumulate=number > 0,
                pattern=kernel.number, reads=[*spans, ("weights", rows, rows + part.rows)],
            )  # fmt: skip
            report.computed += math.prod(counts)
        self._finish(tile, n, sums, words, scale, tables, y)

    def add(self, name: str, terms: Sequence[tuple[Image, int]], scale: Scale) -> Image:
        """The sum of images of one size, each times its factor (0 to 65535)."""
        x = terms[0][0]
        y = self.image(x.height, x.width, x.channels)
        parameters, tables = self._vector_parameters(scale), self._table(scale.table)
        report = self._begin(name, len(terms) * x.pixels * x.channels)
        most = min(self.spec.sum_rows, self.spec.output_vectors, self.spec.input_vectors) // 2
        for start in range(0, x.pixels * x.vectors, most):
            count = min(most, x.pixels * x.vectors - start)
            sums = self._half("sums", self.spec.sum_rows, count)
            words = self._half("parameters", self.spec.parameter_words, self.spec.columns)
            self._copy("parameters", isa.PARAMETERS, parameters, words, self.spec.columns)
            for number, (image, factor) in enumerate(terms):
                base = self._half("input", self.spec.input_vectors, count)
                self._copy_vectors(image.address + start * self.spec.vector_beats, base, count)
                self._compute(
                    isa.ADD, base, 0, sums, (1, 1, 1, count, 1), (0, 0, 0, 1, 0),
                    accumulate=number > 0, factor=factor, reads=[("input", base, base + count)],
                )  # fmt: skip
                report.computed += count
            self._requantize(
                sums,
                words,
                scale,
                tables,
                count,
                1,
                y.address + start * self.spec.vector_beats,
                1,
                0,
            )
        return self._end(report, y)

    def pool(
        self, name: str, x: Image, window: Window, scale: Scale, *, maximum: bool, zero: int
    ) -> Image:
        """The maximum, or the sum, under a window; pads are filled with ``zero``."""
        height, width = window.output(x.height, x.width)
        y = self.image(height, width, x.channels)
        parameters, tables = self._vector_parameters(scale), self._table(scale.table)
        taps = window.kernel[0] * window.kernel[1]
        report = self._begin(name, taps * y.pixels * x.channels)
        limit = self._pixels()
        best = max(
            (h * w, w, h)
            for h in range(1, height + 1)
            for w in {width, *(math.ceil(width / d) for d in range(1, width + 1))}
            if h * w <= limit
            and (
                window.taken(0, h) * window.taken(1, w) <= self.spec.input_vectors // 2
                or h * w == 1
            )
        )
        self._check_window(name, window.taken(0, best[2]) * window.taken(1, best[1]))
        for tile in _tiles(height, width, best[2], best[1]):
            across = window.taken(1, tile.width)
            for n in range(x.vectors):
                base, spans = self._load_tile(x, tile, window, zero, n, n + 1, 1)
                sums = self._half("sums", self.spec.sum_rows, tile.pixels)
                words = self._half("parameters", self.spec.parameter_words, self.spec.columns)
                self._copy("parameters", isa.PARAMETERS, parameters, words, self.spec.columns)
                counts = (window.kernel[1], window.kernel[0], 1, tile.width, tile.height)
                strides = (
                    window.dilations[1], window.dilations[0] * across, 0,
                    window.strides[1], window.strides[0] * across,
                )  # fmt: skip
                self._compute(
                    isa.MAXIMUM if maximum else isa.ADD, base, 0, sums, counts, strides,
                    factor=1, reads=spans,
                )  # fmt: skip
                report.computed += math.prod(counts)
                self._finish(tile, n, sums, words, scale, tables, y)
        return self._end(report, y)

    # -- tiles --------------------------------------------------------------------------------------

    def _pixels(self, group: int = 1) -> int:
        """Outputs that one half of the sums and of the output scratchpad takes."""
        return min(self.spec.sum_rows, self.spec.output_vectors // group) // 2

    def _tiling(
        self, name: str, x: Image, kernel: _Kernel, window: Window, y: Image
    ) -> tuple[int, int]:
        """Height and width of tiles for which the slowest of array, reads and writes takes least."""
        spec, (height, width) = self.spec, y.size
        room = spec.input_vectors // 2
        smallest = window.span(0) * window.span(1) * kernel.pitch
        self._check_window(name, smallest)
        best: tuple[float, int, int] | None = None
        for h in sorted({math.ceil(height / d) for d in range(1, height + 1)}):
            for w in sorted({math.ceil(width / d) for d in range(1, width + 1)}):
                area = window.taken(0, h) * window.taken(1, w) * kernel.pitch
                if h * w > self._pixels(y.group) or area > room:
                    continue
                steps = window.kernel[0] * window.kernel[1] * kernel.slices
                array = kernel.tiles * (h * w * steps + 2)
                beats = kernel.tiles * (kernel.beats(steps) + spec.columns)
                beats += area * spec.vector_beats * len(set(kernel.ranges))
                out = kernel.tiles * h * w * spec.vector_beats * y.group
                count = math.ceil(height / h) * math.ceil(width / w)
                cost = count * max(array, beats, out)
                if best is None or cost < best[0]:
                    best = cost, h, w
        assert best is not None
        return best[1], best[2]

    def _check_window(self, name: str, vectors: int) -> None:
        room = self.spec.input_vectors // 2
        if vectors > room:
            raise LowerError(
                Diagnostic(
                    "fpga.window",
                    f"{name}: the inputs of one output take {vectors * self.spec.columns} bytes; half of"
                    f" the input scratchpad is {room * self.spec.columns}",
                    help="a core with more input_vectors, or a narrower layer",
                )
            )

    def _check_sums(self, name: str, weights: Array, scale: Scale, zero: int) -> None:
        """Raise if a sum can leave 32 bits: every product at its largest, plus what is added."""
        flat = weights.reshape(weights.shape[0], -1).astype(np.int64)
        most = np.abs(flat).sum(1) * 128
        total = np.abs(scale.bias - zero * flat.sum(1))
        worst = int((most + total).max())
        if worst >= 1 << 31:
            channel = int((most + total).argmax())
            raise LowerError(
                Diagnostic(
                    "fpga.overflow",
                    f"{name}: the sum of output channel {channel} can reach {worst}, beyond 32 bits",
                    help="split the layer along its inputs, or leave it to the host",
                )
            )

    def _load_tile(
        self, x: Image, tile: Tile, window: Window, zero: int, low: int, high: int, pitch: int
    ) -> tuple[int, list[Span]]:
        """Bring vectors ``low`` to ``high`` of the pixels under ``tile`` on the chip; pads are filled."""
        spec, beats = self.spec, self.spec.vector_beats
        rows, across = window.taken(0, tile.height), window.taken(1, tile.width)
        base = self._half("input", spec.input_vectors, rows * across * pitch)
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
                    x, source, at, (c1 - c0) * count, r1 - r0, x.width * x.vectors, across * pitch
                )
            else:
                for row in range(r1 - r0):
                    self._load_input(
                        x, source + row * x.width * x.vectors * beats, at + row * across * pitch,
                        count, c1 - c0, x.vectors, pitch,
                    )  # fmt: skip
        return base, [("input", base, base + rows * across * pitch)]

    def _load_input(
        self, x: Image, source: int, at: int, inner: int, outer: int, stride: int, step: int
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

    # -- pieces -------------------------------------------------------------------------------------

    def _half(self, pad: str, size: int, count: int) -> int:
        """Where the next ``count`` words go: a half of the scratchpad, by turns."""
        if count > size // 2:
            raise LowerError(
                Diagnostic("fpga.scratchpad", f"{count} words of {pad}; half of it is {size // 2}")
            )
        turn = self._turn[pad] = 1 - self._turn.get(pad, 1)
        return turn * (size // 2)

    def _emit(
        self,
        unit: isa.Unit,
        fields: dict[str, int],
        reads: Sequence[Span] = (),
        writes: Sequence[Span] = (),
    ) -> None:
        self.steps.append(Step(Instruction(unit, fields), reads, writes))

    def _count_in(self, beats: int) -> None:
        if self.reports:
            self.reports[-1].beats_in += beats

    def _copy(self, pad: str, target: int, address: int, base: int, beats: int) -> None:
        self._emit(
            "load",
            {"target": target, "address": address, "base": base, "inner": beats, "outer": 1},
            reads=[("memory", address, address + beats)],
            writes=[(pad, base, base + beats)],
        )
        self._count_in(beats)

    def _copy_vectors(self, address: int, base: int, count: int) -> None:
        beats = self.spec.vector_beats
        self._emit(
            "load",
            {"address": address, "base": base * beats, "inner": count * beats, "outer": 1},
            reads=[("memory", address, address + count * beats)],
            writes=[("input", base, base + count)],
        )
        self._count_in(count * beats)

    def _load_weights(
        self, kernel: _Kernel, rows: int, steps: int, address: int, index: int
    ) -> None:
        beats = kernel.value_beats(steps)
        self._emit(
            "load",
            {
                "target": isa.WEIGHTS, "how": isa.NIBBLES if kernel.nibbles else isa.COPY,
                "address": address, "base": rows * self.spec.weight_beats, "inner": beats, "outer": 1,
            },
            reads=[("memory", address, address + beats)],
            writes=[("weights", rows, rows + steps)],
        )  # fmt: skip
        self._count_in(beats)
        if kernel.pattern is not None:
            beats = steps * self.spec.index_beats
            self._emit(
                "load",
                {
                    "target": isa.INDICES, "address": index, "base": rows * self.spec.index_beats,
                    "inner": beats, "outer": 1,
                },
                reads=[("memory", index, index + beats)],
                writes=[("weights", rows, rows + steps)],
            )  # fmt: skip
            self._count_in(beats)

    def _compute(
        self, what: int, start: int, rows: int, sums: int, counts: Sequence[int], strides: Sequence[int],
        *, accumulate: bool = False, pattern: int = 0, factor: int = 0, reads: Sequence[Span] = (),
    ) -> None:  # fmt: skip
        names = ("k0", "k1", "k2", "m0", "m1")
        moves = isa.deltas(tuple(counts), tuple(strides))
        fields = {"what": what, "accumulate": int(accumulate), "pattern": pattern, "factor": factor}
        fields |= {"input": start, "weights": rows, "sums": sums}
        fields |= dict(zip(names, counts, strict=True))
        fields |= {f"delta_{name}": move for name, move in zip(names, moves, strict=True)}
        own = ("sums", sums, sums + counts[3] * counts[4])
        self._emit("compute", fields, reads=reads, writes=[own])

    def _finish(
        self, tile: Tile, n: int, sums: int, words: int, scale: Scale, tables: int, y: Image
    ) -> None:
        """Requantize a tile of vector ``n`` and store it."""
        pixel = y.vectors * self.spec.vector_beats
        to = y.address + (tile.top * y.width + tile.left) * pixel
        to += n * y.group * self.spec.vector_beats
        self._requantize(
            sums, words, scale, tables, tile.width, tile.height, to, y.vectors, y.width, y.group
        )

    def _requantize(
        self, sums: int, words: int, scale: Scale, tables: int, across: int, down: int, to: int,
        vectors: int, width: int, group: int = 1,
    ) -> None:  # fmt: skip
        count, beats = across * down, self.spec.vector_beats
        output = self._half("output", self.spec.output_vectors, count * group)
        fields = {
            "sums": sums, "parameters": words, "zero": scale.zero, "to_output": 1, "output": output,
            "n0": across, "n1": down, "table": int(tables >= 0), "tables": max(tables, 0),
            "raw": int(group > 1),
        }  # fmt: skip
        own = ("output", output, output + count * group)
        reads = [("sums", sums, sums + count), ("parameters", words, words + self.spec.columns)]
        if tables >= 0:
            reads.append(("tables", tables, tables + 256))
        self._emit("requantize", fields, reads=reads, writes=[own])
        strides = (1, beats, vectors * beats, width * vectors * beats)
        _, _, inner, outer = isa.deltas((beats, group, across, down), strides)
        last = to + (down - 1) * strides[3] + (across - 1) * strides[2] + group * beats
        self._emit(
            "store",
            {
                "output": output,
                "address": to,
                "group": group,
                "n0": across,
                "n1": down,
                "delta_0": inner,
                "delta_1": outer,
            },
            reads=[own],
            writes=[("memory", to, last)],
        )
        self.reports[-1].beats_out += count * group * beats

    def _parameters(self, weights: Array, scale: Scale, zero: int) -> int:
        """What is added has the zero point of the inputs in it: sum (x - z) w = sum x w - z sum w."""
        sums = weights.reshape(weights.shape[0], -1).astype(np.int64).sum(1)
        return self._words(scale.bias - zero * sums, scale.multiplier, scale.shift)

    def _vector_parameters(self, scale: Scale) -> int:
        """One setting for all columns."""
        wide = [
            np.broadcast_to(part, self.spec.columns)
            for part in (scale.bias, scale.multiplier, scale.shift)
        ]
        return self._words(*wide)

    def _words(self, bias: Array, multiplier: Array, shift: Array) -> int:
        columns = self.spec.columns
        room = -(-bias.size // columns) * columns
        word = np.zeros((room, self.spec.beat_bytes // 8), "<u8")
        word[: bias.size, 0] = bias.astype(np.int32).view(np.uint32)
        word[: bias.size, 0] |= multiplier.astype(np.uint64) << np.uint64(32)
        word[: bias.size, 0] |= (shift - 1).astype(np.uint64) << np.uint64(48)
        return self._constant(word)

    def _table(self, table: Array | None) -> int:
        """Load a table, by turns into one of two places; -1 without one."""
        if table is None:
            return -1
        wide = np.zeros((256, self.spec.beat_bytes), np.int8)
        wide[:, 0] = table
        base = self._half("tables", self.spec.table_entries, 256)
        self._copy("tables", isa.TABLES, self._constant(wide), base, 256)
        return base

    def _kernel_data(self, kernel: _Kernel, n: int) -> list[tuple[int, int, _Part]]:
        """Addresses of values and of indices of each part of output tile ``n``."""
        made = []
        for part in kernel.parts():
            values, indices = kernel.packed(n, part)
            at = self._constant(values)
            made.append((at, 0 if indices is None else self._constant(indices), part))
        return made

    def _begin(self, name: str, macs: int) -> Report:
        self.reports.append(Report(name, macs, 0, first=len(self.steps)))
        return self.reports[-1]

    def _end(self, report: Report, y: Image) -> Image:
        report.last = len(self.steps)
        return y


@dataclass(frozen=True)
class _Part:
    """``taps`` taps from ``tap`` on, and of each the slices from ``slice`` on."""

    tap: int
    taps: int
    slice: int
    slices: int

    @property
    def rows(self) -> int:
        """Of weights."""
        return self.taps * self.slices


class _Kernel:
    """Weights in the order in which the array reads them: [tap, slice of channels, column, row]."""

    def __init__(
        self, spec: Spec, weights: Array, groups: int, pattern: Pattern | None, nibbles: bool
    ) -> None:
        self.spec, self.pattern, self.nibbles = spec, pattern, nibbles
        if pattern is not None and pattern not in spec.kept:
            have = ", ".join(map(str, spec.kept)) or "none"
            raise LowerError(
                Diagnostic("fpga.pattern", f"this core has no {pattern}; it has {have}")
            )
        self.number = 0 if pattern is None else 1 + spec.kept.index(pattern)
        out, per, vertical, horizontal = weights.shape
        self.window = vertical, horizontal
        self.taps = vertical * horizontal
        # Activations a step reads, and vectors.
        self.width = spec.rows * (1 if pattern is None else pattern.expansion)
        self.vectors = self.width // spec.columns
        self.tiles = math.ceil(out / spec.columns)
        self.words = spec.columns
        full = math.ceil(per * groups / spec.columns)
        self.weights, self.per, self.groups = weights, per, groups
        self.ranges: list[tuple[int, int]] = []  # vectors of the input that a tile of outputs reads
        each = out // groups
        for n in range(self.tiles):
            first, last = n * spec.columns // each, (min(out, (n + 1) * spec.columns) - 1) // each
            low, high = first * per // spec.columns, math.ceil((last + 1) * per / spec.columns)
            self.ranges.append((0, full) if groups == 1 else (low, high))
        widest = max(high - low for low, high in self.ranges)
        self.slices = math.ceil(widest / self.vectors)
        aligned = max(self.vectors, spec.wide_vectors if pattern else spec.rows // spec.columns)
        self.pitch = math.ceil(widest / aligned) * aligned

    def value_beats(self, steps: int) -> int:
        """Of memory, without indices."""
        size = steps * self.spec.rows * self.spec.columns
        return (size // 2 if self.nibbles else size) // self.spec.beat_bytes

    def beats(self, steps: int) -> int:
        """Of memory, for ``steps`` rows of weights."""
        return self.value_beats(steps) + (steps * self.spec.index_beats if self.pattern else 0)

    def parts(self) -> Iterator[_Part]:
        """Stretches of what is summed over that fit half of the scratchpad, in order.

        Whole lines of taps if one fits, else taps of a line, else slices of a tap.
        """
        limit, across = self.spec.weight_rows // 2, self.window[1]
        most = min(self.taps, limit // self.slices)
        if most >= across:
            most = most // across * across
        if most == 0:
            for tap in range(self.taps):
                for first in range(0, self.slices, limit):
                    yield _Part(tap, 1, first, min(limit, self.slices - first))
            return
        for line in range(0, self.taps, max(most, across)):
            end = min(self.taps, line + max(most, across))
            for tap in range(line, end, most):
                yield _Part(tap, min(most, end - tap), 0, self.slices)

    def packed(self, n: int, part: _Part) -> tuple[Array, Array | None]:
        """Values, and indices if there is a pattern, of tile ``n``."""
        wide = self._wide(n)[part.tap : part.tap + part.taps]  # [tap, activation, column]
        start = part.slice * self.width
        wide = wide[:, start : start + part.slices * self.width]
        rows = wide.reshape(part.rows, self.width, -1).transpose(0, 2, 1)
        if self.pattern is None:
            return self._packed(rows), None
        values, indices = self._sparse(rows)
        return self._packed(values), indices

    def _wide(self, n: int) -> Array:
        """Tile ``n`` with the channels of other groups as zeros: int8 [tap, activation, column]."""
        columns, low = self.spec.columns, self.ranges[n][0] * self.spec.columns
        made = np.zeros((self.taps, self.slices * self.width, columns), np.int8)
        each = self.weights.shape[0] // self.groups
        for column in range(min(columns, self.weights.shape[0] - n * columns)):
            out = n * columns + column
            start = out // each * self.per - low
            flat = self.weights[out].reshape(self.per, -1).T
            made[:, start : start + self.per, column] = flat
        return made

    def _packed(self, values: Array) -> Array:
        if not self.nibbles:
            return values
        flat = values.reshape(-1).astype(np.uint8) & 15
        return flat[::2] | flat[1::2] << 4

    def _sparse(self, rows: Array) -> tuple[Array, Array]:
        """Kept values [step, column, row] and their indices, packed as the core reads them."""
        assert self.pattern is not None
        kept, group = self.pattern.kept, self.pattern.group
        grouped = rows.reshape(*rows.shape[:2], -1, group)
        used = grouped != 0
        if used.sum(-1).max(initial=0) > kept:
            raise LowerError(Diagnostic("fpga.pattern", f"weights do not follow {self.pattern}"))
        order = np.argsort(~used, axis=-1, kind="stable")[..., :kept]
        order = np.sort(order, axis=-1)
        values = np.take_along_axis(grouped, order, -1).reshape(*rows.shape[:2], -1)
        bits = self.spec.index_bits
        numbers = order.reshape(rows.shape[0], -1, 8 // bits).astype(np.uint8)
        packed = (numbers << np.arange(0, 8, bits, dtype=np.uint8)).sum(-1).astype(np.uint8)
        beats = self.spec.index_beats * self.spec.beat_bytes
        return values, np.pad(packed, ((0, 0), (0, beats - packed.shape[1])))


def _tiles(height: int, width: int, down: int, across: int) -> Iterator[Tile]:
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield Tile(top, left, min(down, height - top), min(across, width - left))
