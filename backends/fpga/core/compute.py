"""COMPUTE: the array of multipliers, its accumulators, and the scratchpad of sums.

A cycle takes a row of activations and a row of weights; k is the inner loop, so a sum stays in a
register until it is complete. Stages, counted from the cycle in which the loop nest addresses a step:

    1 held    2 the address is at the scratchpads    3 read    4 held (the block RAMs' own registers)
    5 of one source    6 selected (sparse, slice, vector)    7 operands, 8 products (the multipliers' own)
    8 + log2(rows) dot products    9 + log2(rows) compared with, 10 + log2(rows) joined with the sum before
    11 + log2(rows) accumulators    12 + log2(rows) at the scratchpads of sums, which are written

Two int4 weights share a multiplier as (high << 13) + low, of 18 bits. The sum of four such products with
int8 still says what both of its parts are, so behind two levels of the tree they go apart. The high one
takes a cycle more: the two sums of a column are joined, and written, one after the other by the same ports.

A signal that all columns wait for has a register in every column (``near_*``): they lie all over the chip.
"""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value, signed

from netlathe.backends.fpga import isa
from netlathe.backends.fpga.core.parts import Delay, Head, Nest, Scratchpad, log2
from netlathe.backends.fpga.spec import Spec


def last_stage(spec: Spec) -> int:
    """In which stage sums are written."""
    return 12 + log2(spec.rows)


def done_stage(spec: Spec) -> int:
    """In which stage tokens are given.

    Operands have been read by then. The requantizer begins to read sums columns + 5 cycles after its token,
    and has to find them written. Those of pairs are written, and their tokens given, a cycle later.
    """
    return max(1, last_stage(spec) - 4 - spec.columns)


FOUR = 4  # products of pairs in a sum that can be taken apart
LOW = 13  # bits of its low part


# An instruction that goes on with sums waits until the one before has written them: it may be a single row.
WAIT = 3


def _pair(byte: Value) -> Value:
    """(high << 13) + low of two nibbles: below a negative low one the high one is less by one."""
    low, high, borrow = byte[:4], Cat(byte[4:], byte[7]), byte[3]
    less = []
    for bit in high:
        less.append(bit ^ borrow)
        borrow = borrow & ~bit
    return Cat(low, low[3].replicate(LOW - 4), *less).as_signed()


class Compute(Elaboratable):
    """The unit; it reads what LOAD wrote and ``hidden``, and owns two copies of the sums.

    One copy is read to accumulate, the other by the requantizer.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.head = Head("compute")
        self.done = Signal(len(self.head.pushes))
        self.idle = Signal()
        wide = 8 * spec.wide_bytes
        self.activation_row = Signal(range(max(spec.input_vectors, spec.hidden_vectors)))
        self.input_data, self.hidden_data = Signal(wide), Signal(wide)
        self.weight_row = Signal(range(spec.weight_rows))
        self.weight_data = Signal(8 * spec.rows * spec.columns)
        self.index_data = Signal(8 * spec.beat_bytes * spec.index_beats)
        self.sums = [
            Scratchpad(f"sums{i}", spec.sum_rows, 1, 32 * spec.columns, far=i == 0)
            for i in range(2)
        ]

    def elaborate(self, platform: object) -> Module:
        m, spec = Module(), self.spec
        m.submodules.head = head = self.head
        m.submodules.to_add, m.submodules.to_requantize = self.sums
        f, last = head.field, last_stage(spec) - 1
        m.submodules.nest = nest = Nest("nest", (12, 8, 8, 12, 12), {"input": 18})
        for i, name in enumerate(("k0", "k1", "k2", "m0", "m1")):
            m.d.comb += [
                nest.counts[i].eq(f[name]),
                nest.deltas["input"][i].eq(f[f"delta_{name}"]),
            ]
        m.d.comb += nest.bases["input"].eq(f["input"])

        keys = ("what", "accumulate", "source", "pattern", "factor")
        now = {key: Signal.like(f[key], name=f"now_{key}") for key in keys}
        weights, base, row = Signal(14), Signal(14), Signal(14)
        pushes, wait = Signal(len(head.pushes)), Signal(range(WAIT + 1))
        # The nest's own flags turn its counters; all else sees them held, a cycle later.
        vector = Signal(len(nest.address["input"]), reset_less=True)
        issue, first, final, end = Signal(), Signal(), Signal(), Signal()
        m.d.sync += [
            vector.eq(nest.address["input"]),
            issue.eq(nest.step),
            first.eq(nest.step & nest.first[2]),
            final.eq(nest.step & nest.last[2]),
            end.eq(nest.step & nest.last[4]),
        ]
        with m.If(issue):
            m.d.sync += [weights.eq(Mux(final, base, weights + 1)), row.eq(row + final)]
        with m.If(head.take):
            m.d.comb += nest.start.eq(1)
            m.d.sync += [now[key].eq(f[key]) for key in keys]
            m.d.sync += [
                weights.eq(f["weights"]),
                base.eq(f["weights"]),
                row.eq(f["sums"]),
                pushes.eq(head.pushes),
                wait.eq(Mux(f["accumulate"], WAIT, 0)),
            ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(~head.valid)
                with m.If(head.ready):
                    m.d.comb += head.accept.eq(1)
                    m.next = "START"
            with m.State("START"):
                m.next = "READY"
            with m.State("READY"):
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == 0):
                    m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += nest.step.eq(1)
                with m.If(nest.last[4]):
                    m.next = "IDLE"
        slot = log2(spec.wide_vectors)
        m.d.comb += [self.activation_row.eq(vector[slot:]), self.weight_row.eq(weights)]

        def late(name: str, value: Value, cycles: int) -> list[Signal]:
            """Behind stage 1: tap n is there in stage n + 1."""
            flags = name in ("ends", "given")
            delay = Delay(name, len(value), cycles, reset_less=not flags)
            m.submodules[f"late_{name}"] = delay
            m.d.comb += delay.input.eq(value)
            return delay.taps

        def stage(name: str, width: int, value: Value, *, sign: bool = False) -> Signal:
            made = Signal(signed(width) if sign else width, name=name, reset_less=True)
            m.d.sync += made.eq(value)
            return made

        tree = log2(spec.rows)
        dot_stage, before_end, done = 7 + tree, last - 1, done_stage(spec) - 1
        begins, rows = late("begins", first, before_end), late("rows", row, before_end)
        ends = late("ends", final, before_end)
        given = late("given", Mux(end, pushes, 0), done + 1)
        select = late("select", vector[:slot] if slot else Const(0, 1), 4)
        # Settings travel with the data: the next instruction may start while this one is in flight.
        goes_on, source = (
            late("goes_on", now["accumulate"], dot_stage + 1),
            late("source", now["source"], 3),
        )
        maximum = late("max", now["what"] == isa.MAXIMUM, dot_stage + 1)
        vectors = (now["what"] == isa.ADD) | (now["what"] == isa.MAXIMUM)
        lanes, factor = late("lanes", vectors, 4), late("factor", now["factor"], 4)
        paired = late("paired", now["what"] == isa.PAIRS, before_end)
        modes = Cat(now["pattern"] == number + 1 for number in range(len(spec.kept)))
        sparse, pattern = late("sparse", now["pattern"] != 0, 4), late("pattern", modes, 4)

        # -- stages 4 and 5: what the scratchpads gave
        held_input = stage("held_input", len(self.input_data), self.input_data)
        held_hidden = stage("held_hidden", len(self.hidden_data), self.hidden_data)
        held_kernel = stage("held_kernel", len(self.weight_data), self.weight_data)
        held_indices = stage("held_indices", len(self.index_data), self.index_data)
        chosen = Mux(source[3], held_hidden, held_input)
        activations = stage("activations", 8 * spec.wide_bytes, chosen)
        kernel = stage("kernel", len(held_kernel), held_kernel)
        indices = stage("indices", len(held_indices), held_indices)
        # -- stage 6
        dense = stage("dense", 8 * spec.rows, self._slice(activations, select[4], spec.rows))
        single = stage(
            "single", 8 * spec.columns, self._slice(activations, select[4], spec.columns)
        )
        windows = [
            self._slice(activations, select[4], spec.rows * kept.expansion) for kept in spec.kept
        ]
        # -- stages 7 and 8: operands and products
        products: list[list[Signal]] = []
        for o in range(spec.columns):
            near_lanes = stage(f"near_lanes{o}", 1, lanes[3])
            near_lanes_late = stage(f"near_lanes_late_{o}", 1, lanes[4])
            near_sparse = stage(f"near_sparse{o}", 1, sparse[4])
            near_pairs = stage(f"near_pairs{o}", 1, paired[3]) if spec.pairs else Const(0)
            products.append([])
            for p in range(spec.rows):
                place = o * spec.rows + p
                byte = kernel[8 * place : 8 * place + 8]
                weight: Value = Mux(near_pairs, _pair(byte), byte.as_signed())
                taken: Value = dense[8 * p : 8 * p + 8]
                if spec.kept:
                    picked = self._picked(windows, indices, pattern[4], o, p)
                    taken = Mux(near_sparse, stage(f"picked{o}_{p}", 8, picked), taken)
                if p == 0:  # vectors have this multiplier of a column to themselves
                    taken = Mux(near_lanes_late, single[8 * o : 8 * o + 8], taken)
                    weight = Mux(near_lanes, factor[4], weight)
                else:
                    weight = Mux(near_lanes, 0, weight)
                width = 18 if spec.pairs else 17 if p == 0 else 8
                a = stage(f"a{o}_{p}", 8, taken, sign=True)
                w = stage(
                    f"w{o}_{p}", width, stage(f"weight{o}_{p}", width, weight, sign=True), sign=True
                )
                products[-1].append(
                    stage(f"product{o}_{p}", 16 if width == 8 else 25, a * w, sign=True)
                )

        # -- the tree, and the accumulators
        def added(level: Sequence[Value], count: int) -> Sequence[Value]:
            """Sums by twos, a register behind each adder, until there are ``count``."""
            while len(level) > count:
                made: list[Value] = []
                for left, right in zip(level[::2], level[1::2], strict=True):
                    total = Signal(signed(max(len(left), len(right)) + 1), reset_less=True)
                    m.d.sync += total.eq(left + right)
                    made.append(total)
                level = made
            return level

        def accumulated(o: str, dot: Value, earlier: Value, at: int, *, maxima: bool) -> Signal:
            """The sum of a column, from its dot product that is there in stage ``at`` + 1.

            The sum that an instruction goes on with is joined before the accumulator, whose own way round
            is then no longer than an adder.
            """
            near_joins = stage(f"near_joins{o}", 1, begins[at] & goes_on[at])
            near_begins = stage(f"near_begins{o}", 1, begins[at + 1])
            new = stage(f"new{o}", len(dot), dot, sign=True)
            old = stage(f"old{o}", 32, earlier, sign=True)
            held = Signal(signed(32), name=f"held{o}", reset_less=True)
            if not maxima:
                joined = stage(f"joined{o}", 32, Mux(near_joins, new + old, new), sign=True)
                m.d.sync += held.eq(Mux(near_begins, 0, held) + joined)
                return held
            near_max = stage(f"near_max{o}", 1, maximum[at])
            near_max_late = stage(f"near_max_late{o}", 1, maximum[at + 1])
            greater = stage(f"greater{o}", 1, (earlier - dot)[-1])  # the sign
            both = Mux(near_max, Mux(greater, new, old), new + old)
            joined = stage(f"joined{o}", 32, Mux(near_joins, both, new), sign=True)
            with m.If(near_max_late):
                m.d.sync += held.eq(Mux(near_begins | (held - joined)[-1], joined, held))
            with m.Else():
                m.d.sync += held.eq(Mux(near_begins, 0, held) + joined)
            return held

        before = stage("before", len(self.sums[0].read_data), self.sums[0].read_data)
        again, second = Signal(), Signal()  # the other sums' turn to be read, and to be written
        if spec.pairs:
            m.d.sync += [
                again.eq(begins[dot_stage - 3] & paired[dot_stage - 3]),
                second.eq(ends[before_end] & paired[before_end]),
            ]
        write = Cat()
        for o in range(spec.columns):
            earlier = before[32 * o : 32 * o + 32].as_signed()
            twos = added(products[o], spec.rows // 2)
            level = added(twos, spec.rows // FOUR)
            if not spec.pairs:
                (dot,) = added(level, 1)
                write = Cat(write, accumulated(f"{o}", dot, earlier, dot_stage, maxima=True))
                continue
            near_apart = stage(f"near_apart{o}", 1, paired[8])
            low_parts, high_parts = self._apart(m, twos, level, near_apart)
            ((dot,), (high_dot,)) = added(low_parts, 1), added(high_parts, 1)
            held = accumulated(f"{o}", dot, earlier, dot_stage, maxima=True)
            held_high = accumulated(f"{o}_high", high_dot, earlier, dot_stage + 1, maxima=False)
            near_second = stage(f"near_second{o}", 1, ends[before_end] & paired[before_end])
            write = Cat(write, Mux(near_second, held_high, held))
        half = spec.sum_rows // 2
        late_row = stage("late_row", len(row), rows[before_end])
        m.d.comb += self.sums[0].read_row.eq(
            Mux(again, rows[dot_stage - 2] | half, rows[dot_stage - 3])
        )
        for pad in self.sums:
            m.d.comb += [
                pad.write.eq(ends[before_end] | second),
                pad.write_row.eq(Mux(second, late_row | half, rows[before_end])),
                pad.write_data.eq(write),
            ]
        m.d.comb += self.done.eq(
            Mux(paired[done], 0, given[done]) | Mux(paired[done + 1], given[done + 1], 0)
        )
        return m

    def _apart(
        self, m: Module, twos: Sequence[Value], level: Sequence[Value], near_apart: Signal
    ) -> tuple[list[Value], list[Value]]:
        """Of sums of four products: the low parts of pairs, or what is no pair; a cycle later the high parts.

        A low part of four is from -4064 to 4096: what of its 13 bits looks like -4096 is 4096, which both
        sums of two have 2048 for. That is seen a cycle ahead.
        """
        low: list[Value] = []
        high: list[Value] = []
        for number, total in enumerate(level):
            # Of four products of int8; vectors have the first multiplier and its width.
            whole = total if number == 0 else total[:18]
            part = total[:LOW]
            most = Signal(name=f"most{number}", reset_less=True)
            m.d.sync += most.eq(Cat(two[:LOW] == 2048 for two in twos[2 * number :][:2]).all())
            negative = part[-1] & ~most
            low.append(Mux(near_apart, Cat(part, negative).as_signed(), whole.as_signed()))
            rest = Signal(signed(LOW + 1), reset_less=True)
            m.d.sync += rest.eq(total[LOW:].as_signed() + negative)
            high.append(rest)
        return low, high

    # -- which activation a multiplier sees ---------------------------------------------------------

    def _slice(self, row: Signal, select: Signal, size: int) -> Value:
        """The ``size`` bytes of a wide row that are addressed."""
        if size == self.spec.wide_bytes:
            return row
        return row.word_select(select[log2(size // self.spec.columns) :], 8 * size)

    def _picked(self, windows: list[Value], indices: Signal, mode: Signal, o: int, p: int) -> Value:
        """Of the group that multiplier p belongs to, the activation that its index names."""
        spec, picked = self.spec, Value.cast(Const(0, 8))
        for number, pattern in enumerate(spec.kept):
            index = indices[(o * spec.rows + p) * spec.index_bits :][: log2(pattern.group)]
            start = p // pattern.kept * pattern.group
            group = windows[number][8 * start : 8 * (start + pattern.group)].word_select(index, 8)
            picked = group if len(spec.kept) == 1 else Mux(mode[number], group, picked)
        return picked
