"""The core behind four pins, for place and route: its ports are wider than any package has pins.

Inputs come from a shift register, outputs are caught in registers and folded into one: no path of the core
begins or ends at a pin, and nothing of it is optimized away.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from netlathe.backends.fpga.core.top import Core
from netlathe.backends.fpga.spec import Spec


class Pinned(wiring.Component):
    """Clock and reset, one bit in and one bit out."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        super().__init__({"serial_in": In(1), "serial_out": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.core = core = Core(self.spec)
        members = core.signature.members
        driven = [getattr(core, name) for name, port in members.items() if port.flow == In]
        seen = Cat(*(getattr(core, name) for name, port in members.items() if port.flow == Out))
        chain = Signal(sum(len(port) for port in driven), reset_less=True)
        caught, folded = Signal(len(seen), reset_less=True), Signal(len(seen), reset_less=True)
        m.d.sync += [
            chain.eq(Cat(self.serial_in, chain)),
            caught.eq(seen),
            folded.eq(Cat(Const(0, 1), folded[:-1]) ^ caught),
            self.serial_out.eq(folded[-1]),
        ]
        at = 0
        for port in driven:
            m.d.comb += port.eq(chain[at : at + len(port)])
            at += len(port)
        return m
