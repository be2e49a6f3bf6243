"""REQUANTIZE: 32-bit sums become bytes, by a multiplier and a shift per column, and a table if asked for.

Stages, counted from the cycle that addresses the sums: 1 read; 2 held; 3 bias added; 4 and 5 two products
of 17 and 16 bits by the multiplier (its input and output registers); 6 their sum; 7, 8 shifted; 9 bounded;
10 rounded, zero point and saturation; 11 addresses the table; 12 looked up; 13 held; 14 chosen; 15 at the
scratchpads. A product of 33 by 16 bits at once would set the clock.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value, signed

from netlathe.backends.fpga.core.parts import Delay, Head, Nest, Scratchpad, log2
from netlathe.backends.fpga.spec import Spec

STAGES = 15
HIDDEN = 2  # of these, that who waits for the results takes to begin
LOW = 17  # bits of a sum that the first product takes


class Requantize(Elaboratable):
    """The unit; it owns what it writes: ``output`` and ``hidden``."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.head = Head("requantize")
        self.done = Signal(len(self.head.pushes))
        self.idle = Signal()
        self.sum_row = Signal(range(spec.sum_rows))
        self.sum_data = Signal(32 * spec.columns)
        self.parameter_word = Signal(range(spec.parameter_words))
        self.parameter_data = Signal(64)
        self.table_write, self.table_at = Signal(), Signal(range(spec.table_entries))
        self.table_data = Signal(8)
        vector = 8 * spec.columns
        self.output = Scratchpad("output", spec.output_vectors, 1, vector)
        rows = spec.hidden_vectors // spec.wide_vectors
        self.hidden = Scratchpad("hidden", rows, spec.wide_vectors, vector, far=True)
        self.tables = [
            Scratchpad(f"table{o}", spec.table_entries, 1, 8) for o in range(spec.columns)
        ]

    def elaborate(self, platform: object) -> Module:
        m, spec = Module(), self.spec
        m.submodules.head = head = self.head
        m.submodules.output, m.submodules.hidden = self.output, self.hidden
        m.submodules += self.tables
        f = head.field
        m.submodules.nest = nest = Nest("nest", (2, 12, 12), {"hidden": 18})
        m.d.comb += [
            nest.counts[0].eq(Mux(f["raw"], 0, 1)),  # 0 stands for four: of a sum's bytes
            nest.counts[1].eq(f["n0"]),
            nest.counts[2].eq(f["n1"]),
            nest.bases["hidden"].eq(f["hidden"]),
            nest.deltas["hidden"][0].eq(0),
            nest.deltas["hidden"][1].eq(f["delta_0"]),
            nest.deltas["hidden"][2].eq(f["delta_1"]),
        ]
        keys = ("raw", "table", "to_output", "to_hidden", "tables")
        now = {key: Signal.like(f[key], name=f"now_{key}") for key in keys}
        now["odd"] = Signal(signed(9), name="now_odd")  # twice the zero point, and 1
        pushes, issue, byte = Signal(len(head.pushes)), Signal(), Signal(2)
        row, place = Signal(14), Signal(14)
        word, given = Signal(14), Signal(64, reset_less=True)
        # A one that walks: which column's parameters are asked for, and two cycles later are there.
        starts, asked = Signal(), Signal(spec.columns + 2)
        flight = Signal(range(STAGES + 1))
        parameters = [
            Signal(64, name=f"parameters{o}", reset_less=True) for o in range(spec.columns)
        ]
        m.d.comb += self.parameter_word.eq(word)
        m.d.sync += [given.eq(self.parameter_data), asked.eq(Cat(starts, asked))]
        for o in range(spec.columns):
            with m.If(asked[o + 2]):
                m.d.sync += parameters[o].eq(given)
        with m.If(head.take):
            m.d.comb += nest.start.eq(1)
            m.d.sync += [now[key].eq(f[key]) for key in keys]
            m.d.sync += [
                now["odd"].eq(Cat(1, f["zero"])),
                row.eq(f["sums"]),
                place.eq(f["output"]),
                word.eq(f["parameters"]),
                pushes.eq(head.pushes),
                byte.eq(0),
            ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(~head.valid)
                with m.If(head.ready):
                    m.d.comb += head.accept.eq(1)
                    m.next = "START"
            with m.State("START"):
                m.d.comb += starts.eq(1)
                m.next = "PARAMETERS"
            with m.State("PARAMETERS"):  # one word a cycle; what is read follows by two
                m.d.sync += word.eq(word + 1)
                with m.If(asked[spec.columns + 1]):
                    m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += [issue.eq(1), nest.step.eq(1)]
                m.d.sync += [byte.eq(byte + now["raw"]), place.eq(place + now["to_output"])]
                with m.If(nest.last[0]):
                    m.d.sync += row.eq(row + 1)
                with m.If(nest.last[2]):
                    m.d.sync += flight.eq(STAGES - HIDDEN)
                    m.next = "DRAIN"
            with m.State("DRAIN"):  # parameters and settings are in use until all is nearly written
                m.d.sync += flight.eq(flight - 1)
                with m.If(flight == 1):
                    m.d.comb += self.done.eq(pushes)
                    m.next = "IDLE"
        m.d.comb += self.sum_row.eq(row)

        def late(name: str, value: Value, cycles: int) -> list[Signal]:
            delay = Delay(name, len(value), cycles, reset_less=name != "valid")
            m.submodules[f"late_{name}"] = delay
            m.d.comb += delay.input.eq(value)
            return delay.taps

        before = STAGES - 1  # the last stage is the scratchpads' own
        valid, places = late("valid", issue, before), late("places", place, before)
        hidden, bytes_ = late("hidden", nest.address["hidden"], before), late("bytes", byte, 3)

        results = Cat()
        for o in range(spec.columns):
            results = Cat(results, self._lane(m, o, parameters[o], now, bytes_[3]))
        slot = log2(spec.wide_vectors)
        at = hidden[before]
        m.d.comb += [
            self.output.write.eq(valid[before] & now["to_output"]),
            self.output.write_row.eq(places[before]),
            self.output.write_data.eq(results),
            self.hidden.write_row.eq(at[slot:]),
        ]
        for i in range(spec.wide_vectors):
            own = (at[:slot] == i) if slot else 1
            part = slice(i * 8 * spec.columns, (i + 1) * 8 * spec.columns)
            m.d.comb += [
                self.hidden.write[i].eq(valid[before] & now["to_hidden"] & own),
                self.hidden.write_data[part].eq(results),
            ]
        return m

    def _lane(
        self, m: Module, o: int, parameters: Signal, now: dict[str, Signal], byte: Signal
    ) -> Signal:
        """The pipeline of one column; its result is there in stage 14."""
        bias = parameters[:32].as_signed()
        multiplier, shift = parameters[32:48], parameters[48:54]

        def stage(name: str, width: int, value: Value, *, sign: bool = True) -> Signal:
            shape = signed(width) if sign else width
            made = Signal(shape, name=f"{name}{o}", reset_less=True)
            m.d.sync += made.eq(value)
            return made

        held = stage("held", 32, self.sum_data[32 * o : 32 * o + 32].as_signed())
        biased = stage("biased", 33, held + bias)
        factor = stage("factor", 16, multiplier, sign=False)
        below, beyond = (
            stage("below", LOW, biased[:LOW], sign=False),
            stage("beyond", 33 - LOW, biased[LOW:]),
        )
        low = stage("low", LOW + 16, below * factor, sign=False)
        high = stage("high", 33 - LOW + 16, beyond * factor)
        # Only bits from LOW on are added.
        upper = stage("upper", 50 - LOW, high + low[LOW:])
        under = stage("under", LOW, low[:LOW], sign=False)
        product = Cat(under, upper).as_signed()
        coarse = stage("coarse", 50, product >> (shift & 0x38))
        fine = stage("fine", 50, coarse >> shift[:3])
        # ``fine`` has one bit behind the point. Beyond eleven bits no zero point brings it back into eight.
        above, sign = fine[10:49], fine[49]
        fits = Mux(sign, above.all(), ~above.any())
        bounded = stage("bounded", 11, Mux(fits, fine[:11], Cat((~sign).replicate(10), sign)))
        # (x + 1) / 2 + zero, in one adder: (x + odd) / 2.
        moved = Signal(signed(11), name=f"moved{o}")
        m.d.comb += moved.eq((bounded + now["odd"]) >> 1)
        final = stage("final", 8, Mux(moved > 127, 127, Mux(moved < -128, -128, moved)))
        # The bytes of a sum overtake nothing: they wait as long as the rest takes.
        plain = stage("plain4", 8, biased.word_select(byte, 8), sign=False)
        for number in range(5, 11):
            plain = stage(f"plain{number}", 8, plain, sign=False)

        table = self.tables[o]
        at = stage(
            "at",
            log2(self.spec.table_entries),
            now["tables"] + (final.as_unsigned() ^ 0x80),
            sign=False,
        )
        m.d.comb += [
            table.write.eq(self.table_write),
            table.write_row.eq(self.table_at),
            table.write_data.eq(self.table_data),
            table.read_row.eq(at),
        ]
        found = stage("found", 8, table.read_data, sign=False)
        kept = stage("result", 8, Mux(now["raw"], plain, final), sign=False)
        for number in range(12, 14):
            kept = stage(f"kept{number}", 8, kept, sign=False)
        return stage("chosen", 8, Mux(now["table"], found, kept), sign=False)
