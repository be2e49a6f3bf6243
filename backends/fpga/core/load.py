"""LOAD: asks memory for beats and writes them, or a constant, into a scratchpad.

Two halves: one asks, one writes what comes. While the data of an instruction is on its way the next one
already asks, so memory's latency is paid once. A FILL has no data to wait for: it starts when all that was
asked for has arrived, and nothing is asked for until it is done.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib.fifo import SyncFIFO

from netlathe.backends.fpga import isa
from netlathe.backends.fpga.core.parts import Head, Nest, Scratchpad, log2
from netlathe.backends.fpga.spec import Spec

AHEAD = 4  # instructions that have asked and not yet received all


class Load(Elaboratable):
    """The unit; ``pads`` are written by LOAD alone."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.head = Head("load")
        beat = 8 * spec.beat_bytes
        self.address_valid, self.address_ready = Signal(), Signal()
        self.address = Signal(32)
        self.data_valid, self.data_ready, self.data = Signal(), Signal(), Signal(beat)
        self.done = Signal(len(self.head.pushes))  # tokens that are given in this cycle
        self.idle = Signal()
        wide = spec.wide_bytes // spec.beat_bytes
        self.pads: dict[int, Scratchpad] = {
            isa.INPUT: Scratchpad(
                "input", spec.input_vectors // spec.wide_vectors, wide, beat, far=True
            ),
            isa.WEIGHTS: Scratchpad("weights", spec.weight_rows, spec.weight_beats, beat, far=True),
            isa.PARAMETERS: Scratchpad("parameters", spec.parameter_words, 1, 64),
        }
        if spec.index_bits:
            self.pads[isa.INDICES] = Scratchpad(
                "indices", spec.weight_rows, spec.index_beats, beat, far=True
            )
        # One copy a column; an entry a beat.
        self.table_write, self.table_at = Signal(), Signal(range(spec.table_entries))
        self.table_data = Signal(8)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.head = head = self.head
        for target, pad in self.pads.items():
            m.submodules[f"pad{target}"] = pad
        f = head.field
        m.submodules.ask = ask = Nest("ask", (16, 14), {"memory": 32})
        # What the writing half has to know.
        keys = ("target", "how", "base", "inner", "outer", "delta_base", "value")
        job = Cat(*(f[key] for key in keys), head.pushes)
        m.submodules.jobs = jobs = SyncFIFO(width=len(job), depth=AHEAD)
        fill, busy = f["how"] == isa.FILL, Signal()
        m.d.comb += [
            ask.counts[0].eq(f["inner"]),
            ask.counts[1].eq(f["outer"]),
            ask.bases["memory"].eq(f["address"]),
            ask.deltas["memory"][0].eq(1),
            ask.deltas["memory"][1].eq(f["delta_memory"]),
            jobs.w_data.eq(job),
            self.address.eq(ask.address["memory"]),
        ]
        filling = Signal()  # a FILL was handed over and is not done
        may = head.ready & jobs.w_rdy & ~filling & (~fill | ~(busy | jobs.r_rdy))
        m.d.comb += [jobs.w_en.eq(head.take), ask.start.eq(head.take)]
        with m.FSM(name="asking"):
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(~busy & ~jobs.r_rdy & ~head.valid)
                with m.If(may):
                    m.d.comb += head.accept.eq(1)
                    m.next = "START"
            with m.State("START"):
                with m.If(fill):
                    m.d.sync += filling.eq(1)
                    m.next = "IDLE"
                with m.Else():
                    m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += self.address_valid.eq(1)
                with m.If(self.address_ready):
                    m.d.comb += ask.step.eq(1)
                    with m.If(ask.last[1]):
                        m.next = "IDLE"

        # -- the half that writes
        m.submodules.put = put = Nest("put", (16, 14), {"pad": 18})
        now = {key: Signal.like(f[key], name=f"now_{key}") for key in keys}
        pushes = Signal(len(head.pushes))
        split = Cat(*(now[key] for key in keys), pushes)
        arrived, fills = Signal(), Signal()
        word, at = jobs.r_data, 0
        parts = {}
        for key in keys:
            parts[key] = word[at : at + len(f[key])]
            at += len(f[key])
        m.d.comb += [
            put.counts[0].eq(parts["inner"]),
            put.counts[1].eq(parts["outer"]),
            put.bases["pad"].eq(parts["base"]),
            put.deltas["pad"][0].eq(Mux(parts["how"] == isa.NIBBLES, 2, 1)),
            put.deltas["pad"][1].eq(parts["delta_base"].as_signed()),
        ]
        with m.FSM(name="writing"):
            with m.State("IDLE"):
                with m.If(jobs.r_rdy):
                    m.d.comb += [jobs.r_en.eq(1), put.start.eq(1)]
                    m.d.sync += [split.eq(jobs.r_data), fills.eq(parts["how"] == isa.FILL)]
                    m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += [
                    busy.eq(1),
                    self.data_ready.eq(~fills),
                    arrived.eq(fills | self.data_valid),
                    put.step.eq(arrived),
                ]
                with m.If(arrived & put.last[1]):
                    m.d.comb += self.done.eq(pushes)
                    m.d.sync += filling.eq(0)
                    m.next = "IDLE"

        # What is written stands in registers first, and once more in those of its bank.
        beat, ways = 8 * self.spec.beat_bytes, len(self.pads) + 1
        where = Signal(len(put.address["pad"]), reset_less=True)
        data, wide = Signal(beat, reset_less=True), Signal(2 * beat, reset_less=True)
        pair, hit = Signal(), Signal(ways)
        constant = Cat(*(now["value"] for _ in range(self.spec.beat_bytes)))
        # A beat of nibbles becomes two beats of bytes with the sign extended, low nibble first.
        nibbles = [self.data[4 * i : 4 * i + 4].as_signed() for i in range(beat // 4)]
        m.d.sync += [
            where.eq(put.address["pad"]),
            data.eq(Mux(fills, constant, self.data)),
            wide.eq(Cat(*(Cat(n, n[3], n[3], n[3], n[3]) for n in nibbles))),
            pair.eq(now["how"] == isa.NIBBLES),
            hit.eq(Cat(arrived & (now["target"] == t) for t in (*self.pads, isa.TABLES))),
        ]
        for number, (target, pad) in enumerate(self.pads.items()):
            lanes = log2(pad.banks)
            bank, row = where[:lanes], where[lanes:]
            for i in range(pad.banks):
                own = (bank == i) if lanes else 1
                part = pad.write_data[i * pad.width : (i + 1) * pad.width]
                if pad.banks > 1 and target == isa.WEIGHTS:
                    half = wide[(i % 2) * beat : (i % 2 + 1) * beat]
                    both = (bank >> 1) == i // 2
                    m.d.comb += pad.write[i].eq(hit[number] & Mux(pair, both, own))
                    m.d.comb += part.eq(Mux(pair, half, data))
                else:
                    m.d.comb += [pad.write[i].eq(hit[number] & own), part.eq(data)]
            m.d.comb += pad.write_row.eq(row)
        m.d.comb += [
            self.table_write.eq(hit[-1]),
            self.table_at.eq(where),
            self.table_data.eq(data),
        ]
        return m
