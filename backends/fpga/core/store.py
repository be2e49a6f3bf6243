"""STORE: sends what the requantizer wrote to memory, a beat a cycle."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal

from netlathe.backends.fpga.core.parts import Head, Nest, log2
from netlathe.backends.fpga.spec import Spec


class Store(Elaboratable):
    """The unit. A scratchpad's read data stays as it is while memory is not ready: no buffer is needed."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.head = Head("store")
        self.done = Signal(len(self.head.pushes))
        self.idle = Signal()
        self.output_row, self.output_enable = Signal(range(spec.output_vectors)), Signal()
        self.output_data = Signal(8 * spec.columns)
        self.valid, self.ready = Signal(), Signal()
        self.address, self.data = Signal(32), Signal(8 * spec.beat_bytes)

    def elaborate(self, platform: object) -> Module:
        m, spec = Module(), self.spec
        m.submodules.head = head = self.head
        f = head.field
        beats = spec.vector_beats
        m.submodules.nest = nest = Nest("nest", (log2(beats) + 1, 3, 12, 12), {"memory": 32})
        m.d.comb += [
            nest.counts[0].eq(beats),
            nest.counts[1].eq(f["group"]),
            nest.counts[2].eq(f["n0"]),
            nest.counts[3].eq(f["n1"]),
            nest.bases["memory"].eq(f["address"]),
            nest.deltas["memory"][0].eq(1),
            nest.deltas["memory"][1].eq(1),
            nest.deltas["memory"][2].eq(f["delta_0"]),
            nest.deltas["memory"][3].eq(f["delta_1"]),
        ]
        place, part = Signal(14), Signal(max(1, log2(beats)))
        pushes = Signal(len(head.pushes))
        m.d.comb += [self.address.eq(nest.address["memory"]), self.output_row.eq(place)]
        m.d.comb += self.data.eq(
            self.output_data
            if beats == 1
            else self.output_data.word_select(part, 8 * spec.beat_bytes)
        )
        with m.If(head.take):
            m.d.comb += nest.start.eq(1)
            m.d.sync += [place.eq(f["output"]), part.eq(0), pushes.eq(head.pushes)]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(~head.valid)
                with m.If(head.ready):
                    m.d.comb += head.accept.eq(1)
                    m.next = "START"
            with m.State("START"):
                m.next = "READ"
            with m.State("READ"):
                m.d.comb += self.output_enable.eq(1)
                m.d.sync += place.eq(place + 1)
                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += self.valid.eq(1)
                with m.If(self.ready):
                    m.d.comb += nest.step.eq(1)
                    m.d.sync += part.eq(Mux(nest.last[0], 0, part + 1))
                    with m.If(nest.last[0]):
                        m.d.comb += self.output_enable.eq(1)
                        m.d.sync += place.eq(place + 1)
                    with m.If(nest.last[3]):
                        m.d.comb += self.done.eq(pushes)
                        m.next = "IDLE"
        return m
