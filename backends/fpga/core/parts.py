"""What the units are made of: scratchpads in banks, loop nests, delays, and the end of a queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value, signed
from amaranth.lib.memory import Memory

from netlathe.backends.fpga import isa


def log2(size: int) -> int:
    """Of a power of two."""
    return size.bit_length() - 1


class Scratchpad(Elaboratable):
    """``rows`` of ``banks`` words of ``width`` bits: a word is written at a time, a row is read.

    ``write`` marks the banks that are written in this cycle, each with its part of ``data``. Banks lie all
    over the chip, so each has registers of its own (``near_*``) for what comes to it: a write is there to be
    read two cycles later, and what is read follows ``read_row`` by a cycle, or by two if reads are ``far``.
    What is read in the cycle in which it is written is undefined: block RAMs leave it open, and tokens keep
    it from happening.
    """

    def __init__(self, name: str, rows: int, banks: int, width: int, *, far: bool = False) -> None:
        self.name, self.rows, self.banks, self.width, self.far = name, rows, banks, width, far
        self.write = Signal(banks, name=f"{name}_write")
        self.write_row = Signal(range(rows), name=f"{name}_write_row")
        self.write_data = Signal(banks * width, name=f"{name}_write_data")
        self.read_row = Signal(range(rows), name=f"{name}_read_row")
        self.read_enable = Signal(init=1, name=f"{name}_read_enable")
        self.read_data = Signal(banks * width, name=f"{name}_read_data")

    def elaborate(self, platform: object) -> Module:
        m = Module()

        def near(name: str, value: Value) -> Signal:
            made = Signal(len(value), name=f"near_{name}", reset_less=True)
            m.d.sync += made.eq(value)
            return made

        for bank in range(self.banks):
            part = slice(bank * self.width, (bank + 1) * self.width)
            memory = Memory(shape=self.width, depth=self.rows, init=[])
            m.submodules[f"bank{bank}"] = memory
            write, read = memory.write_port(), memory.read_port()
            m.d.comb += [
                write.addr.eq(near(f"write_row{bank}", self.write_row)),
                write.data.eq(near(f"write_data{bank}", self.write_data[part])),
                write.en.eq(near(f"write{bank}", self.write[bank])),
                read.addr.eq(near(f"read_row{bank}", self.read_row) if self.far else self.read_row),
                read.en.eq(self.read_enable),
                self.read_data[part].eq(read.data),
            ]
        return m


class Nest(Elaboratable):
    """Counters of a loop nest, the innermost first, and the addresses that they move.

    ``start`` takes over counts, deltas and bases; every ``step`` moves on. ``last`` says for each loop
    whether it and the loops inside it stand at their end.
    """

    def __init__(self, name: str, counts: Sequence[int], addresses: Mapping[str, int]) -> None:
        self.name = name
        self.start, self.step = Signal(name=f"{name}_start"), Signal(name=f"{name}_step")
        self.counts = [Signal(w, name=f"{name}_count{i}") for i, w in enumerate(counts)]
        self.bases = {n: Signal(w, name=f"{name}_{n}_base") for n, w in addresses.items()}
        self.deltas = {
            n: [Signal(signed(w), name=f"{name}_{n}_delta{i}") for i in range(len(counts))]
            for n, w in addresses.items()
        }
        self.address = {n: Signal(w, name=f"{name}_{n}") for n, w in addresses.items()}
        self.first = Signal(len(counts), name=f"{name}_first")
        self.last = Signal(len(counts), name=f"{name}_last")

    def elaborate(self, platform: object) -> Module:
        m = Module()
        depth = len(self.counts)
        left = [Signal.like(count, name=f"left{i}") for i, count in enumerate(self.counts)]
        # Flags are kept beside the counters: compared a cycle ahead, they are not on the adders' path.
        zero = [Signal(name=f"zero{i}") for i in range(depth)]
        end = [Signal(name=f"end{i}") for i in range(depth)]
        once = [Signal(name=f"once{i}") for i in range(depth)]
        limits = [Signal.like(count, name=f"limit{i}") for i, count in enumerate(self.counts)]
        moves = {
            n: [Signal(signed(len(d)), name=f"{n}_move{i}") for i, d in enumerate(ds)]
            for n, ds in self.deltas.items()
        }
        carry: Value = self.step
        for i in range(depth):
            m.d.comb += [
                self.first[i].eq(Cat(*zero[: i + 1]).all()),
                self.last[i].eq(Cat(*end[: i + 1]).all()),
            ]
            with m.If(carry):
                m.d.sync += [
                    left[i].eq(Mux(end[i], limits[i], left[i] - 1)),
                    zero[i].eq(end[i]),
                    end[i].eq(Mux(end[i], once[i], left[i] == 1)),
                ]
            carry = carry & end[i]
        with m.If(self.step):
            for name, address in self.address.items():
                move = moves[name][depth - 1]
                for i in reversed(range(depth - 1)):
                    move = Mux(end[i], move, moves[name][i])
                m.d.sync += address.eq(address + move)
        with m.If(self.start):
            for i in range(depth):
                m.d.sync += [
                    left[i].eq(self.counts[i] - 1),
                    zero[i].eq(1),
                    limits[i].eq(self.counts[i] - 1),
                    once[i].eq(self.counts[i] == 1),
                    end[i].eq(self.counts[i] == 1),
                ]
            for name, address in self.address.items():
                m.d.sync += address.eq(self.bases[name])
                m.d.sync += [
                    move.eq(delta)
                    for move, delta in zip(moves[name], self.deltas[name], strict=True)
                ]
        return m


class Delay(Elaboratable):
    """A signal, 0 to ``cycles`` cycles late: ``taps[n]`` is n cycles behind ``input``."""

    def __init__(self, name: str, like: int, cycles: int, *, reset_less: bool) -> None:
        self.input = Signal(like, name=f"{name}_0")
        self.taps = [self.input] + [
            Signal(like, name=f"{name}_{i + 1}", reset_less=reset_less) for i in range(cycles)
        ]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for earlier, later in zip(self.taps, self.taps[1:], strict=False):
            m.d.sync += later.eq(earlier)
        return m


class Queue(Elaboratable):
    """Words in order, ``depth`` at most: ``put`` if there is ``room``, ``fetch`` if one is ``queued``.

    What comes stands in a register before it is written, and both flags are registers: a word is there to be
    fetched two cycles after it was put.
    """

    def __init__(self, width: int, depth: int) -> None:
        self.width, self.depth = width, depth
        self.put, self.room, self.coming = Signal(), Signal(init=1), Signal()
        self.put_word = Signal(width)
        self.fetch, self.queued = Signal(), Signal()
        self.word = Signal(width)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.memory = memory = Memory(shape=self.width, depth=self.depth, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        puts, held = Signal(range(self.depth + 1)), Signal(range(self.depth + 1))
        comes, come_word = self.coming, Signal(self.width, reset_less=True)
        m.d.sync += [comes.eq(self.put), come_word.eq(self.put_word)]
        m.d.comb += [write.en.eq(comes), write.data.eq(come_word), self.word.eq(read.data)]
        with m.If(comes):
            m.d.sync += write.addr.eq(write.addr + 1)
        with m.If(self.fetch):
            m.d.sync += read.addr.eq(read.addr + 1)
        # Words that were put, and those of them that are in memory.
        with m.If(self.put & ~self.fetch):
            m.d.sync += [puts.eq(puts + 1), self.room.eq(puts != self.depth - 1)]
        with m.Elif(self.fetch & ~self.put):
            m.d.sync += [puts.eq(puts - 1), self.room.eq(1)]
        with m.If(comes & ~self.fetch):
            m.d.sync += [held.eq(held + 1), self.queued.eq(1)]
        with m.Elif(self.fetch & ~comes):
            m.d.sync += [held.eq(held - 1), self.queued.eq(held != 1)]
        return m


class Head(Elaboratable):
    """The next instruction of a unit, taken apart, and whether it may start.

    It stands in a register, which takes what the queue offers while it is empty; ``fetch`` if that is one.
    ``ready``: there is one and the tokens it waits for are there. In the cycle behind ``accept`` those are
    used and ``take`` says that the unit starts with it: a register, as hundreds of bits wait for that signal.
    The bits in ``pushes`` say which units get a token when it is done.
    """

    def __init__(self, unit: isa.Unit) -> None:
        self.unit = unit
        self.queued, self.queue_word = (
            Signal(name="queued"),
            Signal(isa.bits(unit), name="queue_word"),
        )
        self.fetch = Signal(name="fetch")
        self.word = Signal(isa.bits(unit), name="word", reset_less=True)
        self.valid = Signal(name="valid")  # there is one here or in the queue
        self.tokens = {other: Signal(name=f"has_{other}") for other in isa.WAITS[unit]}
        self.used = {other: Signal(name=f"use_{other}") for other in isa.WAITS[unit]}
        self.ready, self.accept, self.take = Signal(name="ready"), Signal(), Signal(name="take")
        self.pushes = Signal(len(isa.GIVES[unit]), name="pushes")
        self.field: dict[str, Signal] = {
            name: Signal(signed(-width) if width < 0 else width, name=name)
            for name, width in isa.FIELDS[unit].items()
        }

    def elaborate(self, platform: object) -> Module:
        m = Module()
        waits = [~self.word[2 + i] | has for i, has in enumerate(self.tokens.values())]
        full = Signal()
        m.d.sync += self.take.eq(self.accept)
        with m.If(self.take):
            m.d.sync += full.eq(0)
        with m.If(self.fetch):
            m.d.sync += full.eq(1)
        with m.If(~full):  # hundreds of bits wait for this: a register alone
            m.d.sync += self.word.eq(self.queue_word)
        m.d.comb += [
            self.fetch.eq(self.queued & ~full),
            self.valid.eq(full | self.queued),
            self.ready.eq(full & Cat(*waits).all()),
            self.pushes.eq(self.word[5 : 5 + len(self.pushes)]),
        ]
        for i, used in enumerate(self.used.values()):
            m.d.comb += used.eq(self.take & self.word[2 + i])
        at = sum(isa.HEADER.values())
        for name, width in isa.FIELDS[self.unit].items():
            m.d.comb += self.field[name].eq(self.word[at : at + abs(width)])
            at += abs(width)
        return m
