"""Weights in the order in which the array reads them: dense, by pattern, in 8 or 4 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from netlathe.backends.fpga.spec import Pattern, Spec
from netlathe.backends.fpga.tensors import Array
from netlathe.diagnostics import Diagnostic, LowerError


@dataclass(frozen=True)
class Part:
    """``taps`` taps from ``tap`` on, and of each the slices from ``slice`` on."""

    tap: int
    taps: int
    slice: int
    slices: int

    @property
    def rows(self) -> int:
        """Of weights."""
        return self.taps * self.slices


class Kernel:
    """Weights in the order in which the array reads them: [tap, slice of channels, column, row].

    Args:
        weights: int8 [out, in / groups, vertical, horizontal].
        nibbles: stored in 4 bits, and widened by LOAD.
        paired: stored in 4 bits, and multiplied by twos: a tile is of two vectors of outputs.

    Raises:
        LowerError: the core lacks the pattern.
    """

    def __init__(
        self, spec: Spec, weights: Array, groups: int, pattern: Pattern | None, nibbles: bool,
        paired: bool = False,
    ) -> None:  # fmt: skip
        self.spec, self.pattern, self.nibbles, self.paired = spec, pattern, nibbles, paired
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
        self.lanes = spec.columns * self.together
        self.tiles = math.ceil(out / self.lanes)
        full = math.ceil(per * groups / spec.columns)
        self.weights, self.per, self.groups = weights, per, groups
        self.ranges: list[tuple[int, int]] = []  # vectors of the input that a tile of outputs reads
        each = out // groups
        for n in range(self.tiles):
            first, last = n * self.lanes // each, (min(out, (n + 1) * self.lanes) - 1) // each
            low, high = first * per // spec.columns, math.ceil((last + 1) * per / spec.columns)
            self.ranges.append((0, full) if groups == 1 else (low, high))
        widest = max(high - low for low, high in self.ranges)
        self.slices = math.ceil(widest / self.vectors)
        aligned = max(self.vectors, spec.wide_vectors if pattern else spec.rows // spec.columns)
        self.pitch = math.ceil(widest / aligned) * aligned

    @property
    def together(self) -> int:
        """Vectors of outputs in a tile; the last one may have one less."""
        return 2 if self.paired else 1

    @property
    def outputs(self) -> int:
        """Vectors of outputs in all."""
        out: int = self.weights.shape[0]
        return math.ceil(out / self.spec.columns)

    def vectors_of(self, n: int) -> range:
        """The vectors of outputs of tile ``n``."""
        return range(n * self.together, min(self.outputs, (n + 1) * self.together))

    def value_beats(self, steps: int) -> int:
        """Of memory, without indices."""
        size = steps * self.spec.rows * self.spec.columns
        return (size // 2 if self.nibbles else size) // self.spec.beat_bytes

    def beats(self, steps: int) -> int:
        """Of memory, for ``steps`` rows of weights."""
        return self.value_beats(steps) + (steps * self.spec.index_beats if self.pattern else 0)

    def parts(self) -> Iterator[Part]:
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
                    yield Part(tap, 1, first, min(limit, self.slices - first))
            return
        for line in range(0, self.taps, max(most, across)):
            end = min(self.taps, line + max(most, across))
            for tap in range(line, end, most):
                yield Part(tap, min(most, end - tap), 0, self.slices)

    def packed(self, n: int, part: Part) -> tuple[Array, Array | None]:
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
        """Tile ``n`` with the channels of other groups as zeros: int8 [tap, activation, output]."""
        lanes, low = self.lanes, self.ranges[n][0] * self.spec.columns
        made = np.zeros((self.taps, self.slices * self.width, lanes), np.int8)
        each = self.weights.shape[0] // self.groups
        for column in range(min(lanes, self.weights.shape[0] - n * lanes)):
            out = n * lanes + column
            start = out // each * self.per - low
            flat = self.weights[out].reshape(self.per, -1).T
            made[:, start : start + self.per, column] = flat
        return made

    def _packed(self, values: Array) -> Array:
        """Values [step, output, row] as memory holds them."""
        if self.paired:
            low, high = np.split(values.astype(np.uint8), 2, axis=1)
            return (low & 15) | high << 4
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


def kernels(
    spec: Spec, weights: Array, groups: int, pattern: Pattern | None, nibbles: bool
) -> list[Kernel]:
    """The ways to lay ``weights`` out: one output a column, and pairs of them where the core can.

    Pairs are of dense int4 weights that read the same inputs (two columns of an N:M pattern would not; nor do
    those of most grouped convolutions), and every instruction has to add up two steps at least: the two sums
    of a column are written one after the other. Half of the parameters has to have room for both vectors.
    """
    single = Kernel(spec, weights, groups, pattern, nibbles)
    if not (spec.pairs and nibbles and pattern is None):
        return [single]
    pairs = Kernel(spec, weights, groups, pattern, nibbles=False, paired=True)
    same_inputs = pairs.slices == single.slices
    steps = min(part.rows for part in pairs.parts())
    able = same_inputs and steps > 1 and 2 * pairs.lanes <= spec.parameter_words
    return [single, pairs] if able else [single]
