"""The core: four units, their queues, the tokens between them, and the scratchpads that join them."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from netlathe.backends.fpga import isa
from netlathe.backends.fpga.core.compute import Compute
from netlathe.backends.fpga.core.load import Load
from netlathe.backends.fpga.core.parts import Queue
from netlathe.backends.fpga.core.requantize import Requantize
from netlathe.backends.fpga.core.store import Store
from netlathe.backends.fpga.spec import Spec


class Core(wiring.Component):
    """Ports: a stream of instructions; a read and a write connection to memory, addressed in beats.

    Reads: an address is asked for when ``read_valid`` and ``read_ready`` meet; its beat comes later, in
    order, when ``beat_valid`` and ``beat_ready`` meet. Writes: address and beat together. ``idle`` says that
    nothing is queued or under way.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        beat = 8 * spec.beat_bytes
        super().__init__(
            {
                "instruction_valid": In(1),
                "instruction_ready": Out(1),
                "instruction": In(isa.WIDTH),
                "read_valid": Out(1),
                "read_ready": In(1),
                "read_address": Out(32),
                "beat_valid": In(1),
                "beat_ready": Out(1),
                "beat": In(beat),
                "write_valid": Out(1),
                "write_ready": In(1),
                "write_address": Out(32),
                "write_beat": Out(beat),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m, spec = Module(), self.spec
        load, compute = Load(spec), Compute(spec)
        requantize, store = Requantize(spec), Store(spec)
        units: dict[isa.Unit, Load | Compute | Requantize | Store] = {
            "load": load,
            "compute": compute,
            "requantize": requantize,
            "store": store,
        }
        for name, unit in units.items():
            m.submodules[name] = unit
        heads = {name: unit.head for name, unit in units.items()}

        # -- one queue a unit, filled in program order
        coming: list[Signal] = []
        with m.Switch(self.instruction[:2]):
            for number, name in enumerate(isa.UNITS):
                width = isa.bits(name)
                m.submodules[f"queue_{name}"] = queue = Queue(width, spec.queue)
                head = heads[name]
                coming.append(queue.coming)
                m.d.comb += [
                    queue.put_word.eq(self.instruction[:width]),
                    head.queued.eq(queue.queued),
                    head.queue_word.eq(queue.word),
                    queue.fetch.eq(head.fetch),
                ]
                with m.Case(number):
                    m.d.comb += [
                        self.instruction_ready.eq(queue.room),
                        queue.put.eq(self.instruction_valid & queue.room),
                    ]
        # -- one counter for every unit that another one waits for
        for name in isa.UNITS:
            for other in isa.WAITS[name]:
                count = Signal(isa.TOKEN_BITS, name=f"tokens_{other}_{name}")
                given = units[other].done[isa.GIVES[other].index(name)]
                used, has = heads[name].used[other], heads[name].tokens[other]
                # ``has`` says count != 0, known a cycle ahead.
                m.d.sync += [
                    count.eq(count + given - used),
                    has.eq(given | (count > 1) | (has & ~used)),
                ]

        # -- scratchpads: written by one unit, read by one other
        pads = load.pads
        m.d.comb += [
            pads[isa.INPUT].read_row.eq(compute.activation_row),
            compute.input_data.eq(pads[isa.INPUT].read_data),
            requantize.hidden.read_row.eq(compute.activation_row),
            compute.hidden_data.eq(requantize.hidden.read_data),
            pads[isa.WEIGHTS].read_row.eq(compute.weight_row),
            compute.weight_data.eq(pads[isa.WEIGHTS].read_data),
            compute.sums[1].read_row.eq(requantize.sum_row),
            requantize.sum_data.eq(compute.sums[1].read_data),
            pads[isa.PARAMETERS].read_row.eq(requantize.parameter_word),
            requantize.parameter_data.eq(pads[isa.PARAMETERS].read_data),
            requantize.table_write.eq(load.table_write),
            requantize.table_at.eq(load.table_at),
            requantize.table_data.eq(load.table_data),
            requantize.output.read_row.eq(store.output_row),
            requantize.output.read_enable.eq(store.output_enable),
            store.output_data.eq(requantize.output.read_data),
        ]
        if isa.INDICES in pads:
            m.d.comb += [
                pads[isa.INDICES].read_row.eq(compute.weight_row),
                compute.index_data.eq(pads[isa.INDICES].read_data),
            ]
        # -- memory
        m.d.comb += [
            self.read_valid.eq(load.address_valid),
            load.address_ready.eq(self.read_ready),
            self.read_address.eq(load.address),
            load.data_valid.eq(self.beat_valid),
            self.beat_ready.eq(load.data_ready),
            load.data.eq(self.beat),
            self.write_valid.eq(store.valid),
            store.ready.eq(self.write_ready),
            self.write_address.eq(store.address),
            self.write_beat.eq(store.data),
        ]
        idle = [unit.idle for unit in units.values()]
        m.d.comb += self.idle.eq(Cat(idle).all() & ~Cat(coming).any() & ~self.instruction_valid)
        return m
