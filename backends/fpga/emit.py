"""Instructions and the data that memory holds at the start, written one by one.

Every scratchpad is a ring with room for two tiles or more: what comes next is loaded while the array works.
Tensors lie in memory as pixels of whole vectors, [height, width, channels / columns, columns]; a linear
layer has one pixel a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from netlathe.backends.fpga import isa
from netlathe.backends.fpga.choices import Choices
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.kernel import Kernel, Part
from netlathe.backends.fpga.program import Span, Step
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.tensors import MEMORY, Array, Image, Place, Scale, Tile
from netlathe.diagnostics import Diagnostic, LowerError


@dataclass
class Report:
    """What a layer asks for, counted while it is built."""

    name: str
    macs: int  # of the layer
    computed: int  # cycles of the array
    paired: bool = False  # two int4 products in each multiplier
    beats_in: int = 0
    beats_out: int = 0
    first: int = 0  # its first instruction
    last: int = 0


@dataclass
class Emitter:
    """Instructions of one layer after the other, and what memory holds at the start."""

    spec: Spec
    steps: list[Step] = field(default_factory=list)
    beats: int = 0  # of memory, in use
    data: list[tuple[int, Array]] = field(default_factory=list)  # (beat, bytes)
    reports: list[Report] = field(default_factory=list)
    choices: Choices = field(default_factory=Choices)
    _ends: dict[str, int] = field(default_factory=dict)

    # -- memory -------------------------------------------------------------------------------------

    def image(
        self, height: int, width: int, channels: int, *, group: int = 1, place: Place = MEMORY
    ) -> Image:
        """Room for a tensor; ``group`` bytes an element."""
        vectors = math.ceil(channels / self.spec.columns) * group
        address = -1
        if place.stored:
            address = self._room(height * width * vectors * self.spec.vector_beats)
        pitch = self.spec.hidden_pitch(channels)
        return Image(address, height, width, channels, vectors, group, place.hidden, pitch)

    def _room(self, beats: int) -> int:
        start = self.choices.choose(lambda: self.beats)
        self.beats = start + beats
        return start

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

    # -- pieces -------------------------------------------------------------------------------------

    def _next(self, pad: str, size: int, count: int, align: int = 1) -> int:
        """Where the next ``count`` words go: behind the last, or at the start again."""
        if count > size // 2:
            raise LowerError(
                Diagnostic("fpga.scratchpad", f"{count} words of {pad}; half of it is {size // 2}")
            )
        behind = -(-self._ends.get(pad, 0) // align) * align
        base = self.choices.choose(lambda: behind if behind + count <= size else 0)
        self._ends[pad] = base + count
        return base

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
        self, kernel: Kernel, rows: int, steps: int, address: int, index: int
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
        *, accumulate: bool = False, pattern: int = 0, factor: int = 0, source: int = isa.FROM_INPUT,
        reads: Sequence[Span] = (),
    ) -> None:  # fmt: skip
        names = ("k0", "k1", "k2", "m0", "m1")
        moves = isa.deltas(tuple(counts), tuple(strides))
        fields = {"what": what, "accumulate": int(accumulate), "pattern": pattern, "factor": factor}
        fields |= {"input": start, "weights": rows, "sums": sums, "source": source}
        fields |= dict(zip(names, counts, strict=True))
        fields |= {f"delta_{name}": move for name, move in zip(names, moves, strict=True)}
        starts = [sums, sums + self.spec.sum_rows // 2] if what == isa.PAIRS else [sums]
        own = [("sums", start, start + counts[3] * counts[4]) for start in starts]
        self._emit("compute", fields, reads=reads, writes=own)

    def _finish(
        self, tile: Tile, n: int, sums: int, words: int, scale: Scale, tables: int, y: Image
    ) -> None:
        """Requantize a tile of vector ``n``, and store or keep it."""
        first = tile.top * y.width + tile.left
        to = y.address + (first * y.vectors + n * y.group) * self.spec.vector_beats
        self._requantize(
            sums, words, scale, tables, tile.width, tile.height, to, y.vectors, y.width, y,
            y.hidden + first * y.pitch + n, (y.pitch, y.width * y.pitch),
        )  # fmt: skip

    def _requantize(
        self, sums: int, words: int, scale: Scale, tables: int, across: int, down: int, to: int,
        vectors: int, width: int, y: Image, at: int, steps: tuple[int, int],
    ) -> None:  # fmt: skip
        """``to``: beats of memory; ``at``: vectors of ``hidden``, ``steps`` apart; as ``y`` lies there."""
        group, count, beats = y.group, across * down, self.spec.vector_beats
        stored, kept = y.address >= 0, y.hidden >= 0
        output = self._next("output", self.spec.output_vectors, count * group) if stored else 0
        fields = {
            "sums": sums, "parameters": words, "zero": scale.zero, "to_output": int(stored),
            "output": output, "n0": across, "n1": down, "table": int(tables >= 0),
            "tables": max(tables, 0), "raw": int(group > 1),
        }  # fmt: skip
        own = ("output", output, output + count * group)
        writes: list[Span] = [own] if stored else []
        if kept:
            move, back = isa.deltas((across, down), steps)
            fields |= {"to_hidden": 1, "hidden": at, "delta_0": move, "delta_1": back}
            writes.append(("hidden", at, at + (across - 1) * steps[0] + (down - 1) * steps[1] + 1))
        reads = [("sums", sums, sums + count), ("parameters", words, words + self.spec.columns)]
        if tables >= 0:
            reads.append(("tables", tables, tables + 256))
        self._emit("requantize", fields, reads=reads, writes=writes)
        if not stored:
            return
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
        """Load a table; -1 without one."""
        if table is None:
            return -1
        wide = np.zeros((256, self.spec.beat_bytes), np.int8)
        wide[:, 0] = table
        base = self._next("tables", self.spec.table_entries, 256)
        self._copy("tables", isa.TABLES, self._constant(wide), base, 256)
        return base

    def _kernel_data(self, kernel: Kernel, n: int) -> list[tuple[int, int, Part]]:
        """Addresses of values and of indices of each part of output tile ``n``."""
        made = []
        for part in kernel.parts():
            values, indices = kernel.packed(n, part)
            at = self._constant(values)
            made.append((at, 0 if indices is None else self._constant(indices), part))
        return made

    def _begin(self, name: str, macs: int, *, paired: bool = False) -> Report:
        self.reports.append(Report(name, macs, 0, paired, first=len(self.steps)))
        return self.reports[-1]

    def _end(self, report: Report, y: Image) -> Image:
        report.last = len(self.steps)
        return y


def refuse_overflow(name: str, weights: Array, scale: Scale, zero: int) -> None:
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
