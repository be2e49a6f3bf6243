"""COMPUTE: the array of multipliers, its accumulators, and the scratchpad of sums.

A cycle takes a row of activations and a row of weights; k is the inner loop, so a sum stays in a
register until it is complete. Stages, counted from the cycle that addresses the scratchpads:

    1 read    2 held    3 of one source    4 selected (sparse, slice, vector)    5 products
    5 + log2(rows) dot products     6 + log2(rows) joined with the sum before
    7 + log2(rows) accumulators, written to sums in the same cycle

What a block RAM gives is held in a register before anything is done with it: it comes late in its cycle.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value, signed

from netlathe.backends.fpga import isa
from netlathe.backends.fpga.core.parts import Delay, Head, Nest, Scratchpad, log2
from netlathe.backends.fpga.spec import Spec


def last_stage(spec: Spec) -> int:
    """In which stage sums are written."""
    return 7 + log2(spec.rows)


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
        self.sums = [Scratchpad(f"sums{i}", spec.sum_rows, 1, 32 * spec.columns) for i in range(2)]

    def elaborate(self, platform: object) -> Module:
        m, spec = Module(), self.spec
        m.submodules.head = head = self.head
        m.submodules.to_add, m.submodules.to_requantize = self.sums
        f, last = head.field, last_stage(spec)
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
        pushes, issue = Signal(len(head.pushes)), Signal()
        first, final, end = nest.first[2], nest.last[2], nest.last[4]
        with m.If(head.take):
            m.d.comb += nest.start.eq(1)
            m.d.sync += [now[key].eq(f[key]) for key in keys]
            m.d.sync += [
                weights.eq(f["weights"]),
                base.eq(f["weights"]),
                row.eq(f["sums"]),
                pushes.eq(head.pushes),
            ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(~head.valid)
                with m.If(head.ready):
                    m.d.comb += head.accept.eq(1)
                    m.next = "START"
            with m.State("START"):
                m.next = "READY"
            with m.State("READY"):  # what the instruction before sums up is written when it is read
                m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += [issue.eq(1), nest.step.eq(1)]
                m.d.sync += weights.eq(Mux(final, base, weights + 1))
                with m.If(final):
                    m.d.sync += row.eq(row + 1)
                with m.If(end):
                    m.next = "IDLE"
        vector = nest.address["input"]
        slot = log2(spec.wide_vectors)
        m.d.comb += [self.activation_row.eq(vector[slot:]), self.weight_row.eq(weights)]

        def late(name: str, value: Value, cycles: int) -> list[Signal]:
            delay = Delay(name, len(value), cycles)
            m.submodules[f"late_{name}"] = delay
            m.d.comb += delay.input.eq(value)
            return delay.taps

        valid, begins = late("valid", issue, last), late("begins", first, last)
        ends, rows = late("ends", issue & final, last), late("rows", row, last)
        given = late("given", Mux(issue & end, pushes, 0), last)
        select = late("select", vector[:slot] if slot else Const(0, 1), 3)
        # Settings travel with the data: the next instruction may start while this one is in flight.
        keep = now["accumulate"]
        afresh, maximum = late("afresh", ~keep, last), late("max", now["what"] == isa.MAXIMUM, last)
        lanes = late("lanes", now["what"] != isa.DOT, 3)
        modes = Cat(now["pattern"] == number + 1 for number in range(len(spec.kept)))
        pattern, source = late("pattern", modes, 3), late("source", now["source"], 2)
        factor = late("factor", now["factor"], 3)

        # -- stages 2 and 3: what the scratchpads gave
        held_input, held_hidden = Signal.like(self.input_data), Signal.like(self.hidden_data)
        held_kernel, held_indices = Signal.like(self.weight_data), Signal.like(self.index_data)
        activations = Signal(8 * spec.wide_bytes)
        kernel = Signal(8 * spec.rows * spec.columns)
        indices = Signal(len(self.index_data))
        m.d.sync += [
            held_input.eq(self.input_data),
            held_hidden.eq(self.hidden_data),
            held_kernel.eq(self.weight_data),
            held_indices.eq(self.index_data),
            activations.eq(Mux(source[2], held_hidden, held_input)),
            kernel.eq(held_kernel),
            indices.eq(held_indices),
        ]
        # -- stages 4 and 5: operands and products
        products = [
            [Signal(signed(25 if p == 0 else 16), name=f"product{o}_{p}") for p in range(spec.rows)]
            for o in range(spec.columns)
        ]
        dense = self._dense(m, activations, select[3])
        single = self._single(m, activations, select[3])
        windows = self._grouped(m, activations, select[3])
        for o in range(spec.columns):
            for p in range(spec.rows):
                place = o * spec.rows + p
                a = Signal(signed(8), name=f"a{o}_{p}")
                w = Signal(signed(17 if p == 0 else 8), name=f"w{o}_{p}")
                weight = kernel[8 * place : 8 * place + 8].as_signed()
                chosen = self._selected(windows, indices, pattern[3], dense, o, p)
                if p == 0:
                    m.d.sync += [
                        a.eq(Mux(lanes[3], single[o], chosen)),
                        w.eq(Mux(lanes[3], factor[3], weight)),
                    ]
                else:
                    m.d.sync += [a.eq(chosen), w.eq(Mux(lanes[3], 0, weight))]
                m.d.sync += products[o][p].eq(a * w)
        # -- the tree, and the accumulators
        write = Cat()
        before = Signal.like(self.sums[0].read_data)
        m.d.sync += before.eq(self.sums[0].read_data)
        for o in range(spec.columns):
            level = products[o]
            while len(level) > 1:
                made = []
                for left, right in zip(level[::2], level[1::2], strict=True):
                    total = Signal(signed(max(len(left), len(right)) + 1))
                    m.d.sync += total.eq(left + right)
                    made.append(total)
                level = made
            # The sum that an instruction goes on with is joined a stage before the accumulator, whose own
            # way round is then no longer than an adder.
            dot, joined = level[0], Signal(signed(32), name=f"joined{o}")
            held = Signal(signed(32), name=f"held{o}")
            earlier = before[32 * o : 32 * o + 32].as_signed()
            with m.If(~begins[last - 2] | afresh[last - 2]):
                m.d.sync += joined.eq(dot)
            with m.Elif(maximum[last - 2]):
                m.d.sync += joined.eq(Mux(dot > earlier, dot, earlier))
            with m.Else():
                m.d.sync += joined.eq(dot + earlier)
            with m.If(valid[last - 1]):
                with m.If(maximum[last - 1]):
                    more = begins[last - 1] | (joined > held)
                    m.d.sync += held.eq(Mux(more, joined, held))
                with m.Else():
                    m.d.sync += held.eq(Mux(begins[last - 1], 0, held) + joined)
            write = Cat(write, held)
        m.d.comb += self.sums[0].read_row.eq(rows[last - 4])
        for pad in self.sums:
            m.d.comb += [
                pad.write.eq(ends[last]),
                pad.write_row.eq(rows[last]),
                pad.write_data.eq(write),
            ]
        m.d.comb += self.done.eq(given[last])
        return m

    # -- which activation a multiplier sees ---------------------------------------------------------

    def _slice(self, m: Module, row: Signal, select: Signal, name: str, size: int) -> Value:
        """The ``size`` bytes of a wide row that are addressed."""
        if size == self.spec.wide_bytes:
            return row
        made = Signal(8 * size, name=name)
        m.d.comb += made.eq(row.word_select(select[log2(size // self.spec.columns) :], 8 * size))
        return made

    def _dense(self, m: Module, row: Signal, select: Signal) -> list[Value]:
        """One byte a multiplier."""
        made = self._slice(m, row, select, "dense", self.spec.rows)
        return [made[8 * p : 8 * p + 8] for p in range(self.spec.rows)]

    def _single(self, m: Module, row: Signal, select: Signal) -> list[Value]:
        """One byte a column: a vector."""
        made = self._slice(m, row, select, "single", self.spec.columns)
        return [made[8 * o : 8 * o + 8].as_signed() for o in range(self.spec.columns)]

    def _grouped(self, m: Module, row: Signal, select: Signal) -> list[Value]:
        """What the multipliers choose from, for each pattern."""
        return [
            self._slice(m, row, select, f"for_{number}", self.spec.rows * pattern.expansion)
            for number, pattern in enumerate(self.spec.kept)
        ]

    def _selected(
        self,
        windows: list[Value],
        indices: Signal,
        mode: Signal,
        dense: list[Value],
        o: int,
        p: int,
    ) -> Value:
        """Of the group that multiplier p belongs to, the activation that its index names."""
        spec = self.spec
        chosen: Value = dense[p].as_signed()
        width = spec.index_bits
        for number, pattern in enumerate(spec.kept):
            index = indices[(o * spec.rows + p) * width :][: log2(pattern.group)]
            start = p // pattern.kept * pattern.group
            group = windows[number][8 * start : 8 * (start + pattern.group)]
            chosen = Mux(mode[number], group.word_select(index, 8).as_signed(), chosen)
        return chosen
