"""The instruction set in numpy: what a program computes, and in how many cycles.

:class:`Machine` runs instructions one after the other; the core runs them side by side as tokens allow,
with the same result if the tokens are right. :func:`cycles` follows the same instructions in time: it
knows when each unit takes, finishes and frees what. Both are compared with the core itself, bit for bit
and cycle for cycle, by the tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from netlathe.backends.fpga import isa
from netlathe.backends.fpga.isa import Instruction, Unit
from netlathe.backends.fpga.spec import Spec

Array = npt.NDArray[Any]

REQUANTIZE_STAGES = 13  # until tokens are given
COMPUTE_WAIT = 3  # until sums that an instruction goes on with are written
JOBS = 4  # loads that have asked and wait for data


def strides(counts: Sequence[int], deltas: Sequence[int]) -> list[int]:
    """The strides of loops from what an address moves by when each steps: :func:`isa.deltas` backwards."""
    made, back = [], 0
    for count, delta in zip(counts, deltas, strict=True):
        made.append(delta + back)
        back += (count - 1) * made[-1]
    return made


def addresses(base: int, counts: Sequence[int], deltas: Sequence[int]) -> Array:
    """Every address of a loop nest, int64, of shape ``counts`` reversed: the innermost loop is last."""
    total = np.asarray(base, np.int64)
    for count, stride in zip(counts, strides(counts, deltas), strict=True):
        total = np.arange(count)[(..., *[None] * total.ndim)] * stride + total
    return total


class Machine:
    """Scratchpads and memory, and what each instruction does to them.

    Args:
        memory: uint8, a whole number of beats; STORE writes into it.
    """

    def __init__(self, spec: Spec, memory: Array) -> None:
        self.spec, self.memory = spec, memory
        self.input = np.zeros(spec.input_vectors * spec.columns, np.int8)
        self.hidden = np.zeros((spec.hidden_vectors, spec.columns), np.int8)
        self.weights = np.zeros(spec.weight_rows * spec.rows * spec.columns, np.int8)
        self.indices = np.zeros(spec.weight_rows * spec.index_beats * spec.beat_bytes, np.uint8)
        self.parameters = np.zeros(spec.parameter_words, np.uint64)
        self.tables = np.zeros(spec.table_entries, np.int8)
        self.sums = np.zeros((spec.sum_rows, spec.columns), np.int32)
        self.output = np.zeros((spec.output_vectors, spec.columns), np.int8)

    def run(self, program: Sequence[Instruction]) -> None:
        """Run instructions in order."""
        for step in program:
            getattr(self, f"_{step.unit}")(step)

    def _load(self, i: Instruction) -> None:
        size, nibbles = self.spec.beat_bytes, i["how"] == isa.NIBBLES
        counts = (i["inner"], i["outer"])
        source = addresses(i["address"], counts, (1, i["delta_memory"])).reshape(-1)
        beats = addresses(i["base"], counts, (2 if nibbles else 1, i["delta_base"]))
        if i["how"] == isa.FILL:
            data = np.full((beats.size, size), i["value"], np.uint8)
        else:
            data = self.memory.reshape(-1, size)[source]
        if nibbles:
            both = np.stack([data & 15, data >> 4], -1).reshape(beats.size, -1).astype(np.int8)
            data = (((both + 8) & 15) - 8).view(np.uint8)
            beats = np.stack([beats, beats + 1], -1)
        beats, data = beats.reshape(-1), data.reshape(beats.size, size)
        target = i["target"]
        if target == isa.PARAMETERS:
            self.parameters[beats] = np.ascontiguousarray(data[:, :8]).view("<u8")[:, 0]
        elif target == isa.TABLES:
            self.tables[beats] = data[:, 0].view(np.int8)
        else:
            pad = {isa.INPUT: self.input, isa.WEIGHTS: self.weights, isa.INDICES: self.indices}
            pad[target].view(np.uint8).reshape(-1, size)[beats] = data

    def _compute(self, i: Instruction) -> None:
        columns = self.spec.columns
        names = ("k0", "k1", "k2", "m0", "m1")
        counts = [i[name] for name in names]
        vectors = addresses(i["input"], counts, [i[f"delta_{name}"] for name in names])
        k, m = int(np.prod(counts[:3])), int(np.prod(counts[3:]))
        vectors = vectors.reshape(m, k)
        pad = self.hidden if i["source"] else self.input.reshape(-1, columns)
        rows = slice(i["sums"], i["sums"] + m)
        if i["what"] in (isa.DOT, isa.PAIRS):
            kernel = (
                self.pairs(i["weights"], k)
                if i["what"] == isa.PAIRS
                else self.kernel(i["weights"], k, i["pattern"])
            )
            width = kernel.shape[1] // columns  # vectors that a step reads
            taken = (vectors[..., None] // width * width + np.arange(width)).reshape(m, -1)
            left = pad[taken].reshape(m, -1).astype(np.float64)
            total = left @ kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
            for number in range(total.shape[1] // columns):
                start = i["sums"] + number * self.spec.sum_rows // 2
                part = total[:, number * columns : (number + 1) * columns].astype(np.int64)
                self._accumulate(slice(start, start + m), part, i["accumulate"])
            return
        values = pad[vectors].astype(np.int64) * i["factor"]  # [m, k, columns]
        if i["what"] == isa.ADD:
            self._accumulate(rows, values.sum(1), i["accumulate"])
            return
        most = values.max(1)
        self.sums[rows] = np.maximum(most, self.sums[rows]) if i["accumulate"] else most

    def _accumulate(self, rows: slice, total: Array, onto: int) -> None:
        earlier = self.sums[rows].astype(np.int64) if onto else 0
        self.sums[rows] = (total + earlier).astype(np.int32)  # modulo 2^32, as the adders

    def pairs(self, start: int, steps: int) -> Array:
        """Weights as int8 [step, activation, two columns]: the low nibbles of all columns, then the high."""
        stored = self.kernel(start, steps, 0)
        return np.concatenate([(stored << 4) >> 4, stored >> 4], -1)

    def kernel(self, start: int, steps: int, pattern: int) -> Array:
        """Weights as int8 [step, activation, column], those that are left out as zeros."""
        spec = self.spec
        size = spec.rows * spec.columns
        stored = self.weights.reshape(-1, size)[start : start + steps]
        stored = stored.reshape(steps, spec.columns, spec.rows)
        if not pattern:
            return stored.transpose(0, 2, 1)
        kept = spec.kept[pattern - 1]
        packed = self.indices.reshape(spec.weight_rows, -1)[start : start + steps]
        per, low = 8 // spec.index_bits, (1 << spec.index_bits) - 1
        shifts = np.arange(per, dtype=np.uint8) * np.uint8(spec.index_bits)
        numbers = (packed[..., None] >> shifts & low).reshape(steps, -1)[:, :size]
        numbers = (numbers & kept.group - 1).reshape(steps, spec.columns, spec.rows)
        place = np.arange(spec.rows) // kept.kept * kept.group + numbers
        wide = np.zeros((steps, spec.rows * kept.expansion, spec.columns), np.int8)
        step, column = np.ogrid[:steps, : spec.columns]
        np.add.at(wide, (step[..., None], place, column[..., None]), stored)
        return wide

    def _requantize(self, i: Instruction) -> None:
        columns, count = self.spec.columns, i["n0"] * i["n1"]
        words = self.parameters[i["parameters"] : i["parameters"] + columns]
        bias = (words & 0xFFFFFFFF).astype(np.uint32).view(np.int32).astype(np.int64)
        multiplier = (words >> np.uint64(32) & np.uint64(0xFFFF)).astype(np.int64)
        shift = (words >> np.uint64(48) & np.uint64(0x3F)).astype(np.int64)
        biased = self.sums[i["sums"] : i["sums"] + count].astype(np.int64) + bias
        if i["raw"]:
            parts = biased[:, None] >> (8 * np.arange(4))[:, None] & 255
            result = parts.reshape(-1, columns).astype(np.uint8).view(np.int8)
            count *= 4
        else:
            rounded = ((biased * multiplier >> shift) + 1) >> 1
            result = np.clip(rounded + i["zero"], -128, 127).astype(np.int8)
        if i["table"]:
            result = self.tables[i["tables"] + result.astype(np.int64) + 128]
        if i["to_output"]:
            self.output[i["output"] : i["output"] + count] = result
        if i["to_hidden"]:
            counts, moves = (i["n0"], i["n1"]), (i["delta_0"], i["delta_1"])
            self.hidden[addresses(i["hidden"], counts, moves).reshape(-1)] = result

    def _store(self, i: Instruction) -> None:
        beats = self.spec.vector_beats
        counts = (beats, i["group"], i["n0"], i["n1"])
        to = addresses(i["address"], counts, (1, 1, i["delta_0"], i["delta_1"])).reshape(-1)
        count = i["group"] * i["n0"] * i["n1"]
        data = self.output[i["output"] : i["output"] + count].view(np.uint8)
        self.memory.reshape(-1, self.spec.beat_bytes)[to] = data.reshape(-1, self.spec.beat_bytes)


# -- time ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """How memory answers: a beat that is asked for comes ``latency`` cycles later, in order.

    ``read`` and ``write`` are beats a cycle as (n, d): in d cycles n are taken, evenly spread.
    """

    latency: int = 16
    read: tuple[int, int] = (1, 1)
    write: tuple[int, int] = (1, 1)


def last_slot(start: int, count: int, rate: tuple[int, int]) -> int:
    """In which cycle the last of ``count`` beats is taken if the first is offered in cycle ``start``."""
    n, d = rate
    index = start * n // d + count
    return -(-index * d // n) - 1


def compute_stages(spec: Spec) -> int:
    """From the last step of a COMPUTE to its tokens: what waits for them finds the sums written."""
    return max(1, 8 + spec.rows.bit_length() - 1 - spec.columns)


@dataclasses.dataclass
class Timing:
    """In which cycle an instruction was accepted by its unit, and in which its tokens were given."""

    taken: int
    done: int


class Clock:
    """When each unit takes an instruction, and when it is done with it.

    Instructions are told one after the other, in the order of the program; the first is offered in cycle 0.
    ``after`` is the cycle in which the last token that an instruction waits for is given (-1: it waits for
    none). Each method gives the cycle in which the tokens of its instruction are given, and leaves in
    :attr:`taken` the one in which it was taken.
    """

    def __init__(self, spec: Spec, memory: Memory) -> None:
        self.spec, self.memory = spec, memory
        self.offered = self.taken = -1
        self._fetched = [
            deque([-1] * spec.queue, spec.queue) for _ in isa.UNITS
        ]  # left their queue
        self._free, self._last = [0] * len(isa.UNITS), [-1] * len(isa.UNITS)
        self._jobs = deque([-1] * JOBS, JOBS)  # when the writing half of LOAD took over
        self._written = -1  # when it was done last
        self._stages = compute_stages(spec)
        self._phases = math.lcm(memory.read[1], memory.write[1])

    def _take(self, unit: int, after: int) -> int:
        """Hand an instruction out; when its unit could take it."""
        queue = self._fetched[unit]
        self.offered = max(self.offered, queue[0]) + 1
        fetched = max(self.offered + 2, self._last[unit] + 1)
        queue.append(fetched)
        return max(fetched + 1, self._free[unit], after + 1)

    def load(self, beats: int, after: int = -1, *, fill: bool = False) -> int:
        """Of memory, or a constant."""
        start = max(self._take(0, after), self._jobs[0] + 1)
        if fill:
            start = max(start, self._written + 1)
            self._jobs.append(start + 2)
            self._written = start + 2 + beats
            self._free[0] = self._written + 1
        else:
            self._jobs.append(max(start + 2, self._written + 1))
            asked = last_slot(start + 2, beats, self.memory.read)
            self._written = asked + self.memory.latency
            self._free[0] = asked + 1
        self.taken, self._last[0] = start, start + 1
        return self._written

    def compute(
        self, steps: int, after: int = -1, *, accumulate: bool = False, pairs: bool = False
    ) -> int:
        """``steps`` of the array."""
        start = self._take(1, after)
        end = start + 2 + steps + COMPUTE_WAIT * accumulate
        self._free[1] = end + 1
        self.taken, self._last[1] = start, start + 1
        return end + self._stages + pairs

    def requantize(self, vectors: int, after: int = -1) -> int:
        """``vectors`` are made."""
        start = self._take(2, after)
        done = start + 3 + self.spec.columns + vectors + REQUANTIZE_STAGES
        self._free[2] = done + 1
        self.taken, self._last[2] = start, start + 1
        return done

    def store(self, beats: int, after: int = -1) -> int:
        """To memory."""
        start = self._take(3, after)
        done = last_slot(start + 3, beats, self.memory.write)
        self._free[3] = done + 1
        self.taken, self._last[3] = start, start + 1
        return done

    @property
    def finished(self) -> int:
        """When REQUANTIZE and STORE are done with all they were given."""
        return max(self._free[2:]) - 1

    def ahead(self, times: Iterable[int]) -> tuple[int, ...]:
        """How far behind the next instruction they lie; 0 for what it cannot have to wait for."""
        now = self.offered
        return tuple([time - now if time > now else 0 for time in times])

    def state(self) -> tuple[int, ...]:
        """All that decides about what comes: where it is the same again, the same follows, only later."""
        times = [*self._free, *self._last, *self._jobs, self._written]
        for queue in self._fetched:
            times += queue
        return self.offered % self._phases, *self.ahead(times)

    def skip(self, cycles: int) -> None:
        """Move everything by that much."""
        self.offered += cycles
        self._free = [time + cycles for time in self._free]
        self._last = [time + cycles for time in self._last]
        self._jobs = deque([time + cycles for time in self._jobs], JOBS)
        self._written += cycles
        for queue in self._fetched:
            queue.extend([time + cycles for time in queue])


def cycles(program: Sequence[Instruction], spec: Spec, memory: Memory) -> list[Timing]:
    """When each instruction starts and ends on the core, the first being offered in cycle 0."""
    clock = Clock(spec, memory)
    tokens: dict[tuple[Unit, Unit], list[int]] = {}  # when each was given
    popped: dict[tuple[Unit, Unit], int] = {}
    times = []
    for step in program:
        unit, after = step.unit, -1
        for other in step.pops:
            pair = (other, unit)
            number = popped.get(pair, 0)
            popped[pair] = number + 1
            after = max(after, tokens[pair][number])
        if unit == "load":
            done = clock.load(step["inner"] * step["outer"], after, fill=step["how"] == isa.FILL)
        elif unit == "compute":
            count = step["k0"] * step["k1"] * step["k2"] * step["m0"] * step["m1"]
            onto, pairs = bool(step["accumulate"]), step["what"] == isa.PAIRS
            done = clock.compute(count, after, accumulate=onto, pairs=pairs)
        elif unit == "requantize":
            done = clock.requantize(step["n0"] * step["n1"] * (4 if step["raw"] else 1), after)
        else:
            vectors = step["group"] * step["n0"] * step["n1"]
            done = clock.store(vectors * spec.vector_beats, after)
        for other in step.pushes:
            tokens.setdefault((unit, other), []).append(done)
        times.append(Timing(clock.taken, done))
    return times
