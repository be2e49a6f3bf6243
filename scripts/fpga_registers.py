"""Move registers into the blocks they stand beside: ECP5's multipliers and block RAMs have their own, unused.

    fpga_registers.py IN.json OUT.json

Both files are netlists as Yosys writes them behind ``synth_ecp5``, which leaves every register in logic. A
register without enable and reset that holds nothing but an input or an output of a MULT18X18D, or what a
DP16KD reads, is deleted and the block's own one is switched on. What a netlist does in any cycle stays the
same (Lattice FPGA-TN-02205 for the multipliers, FPGA-TN-02204 for the memories); what it takes is a block's
clock-to-output instead of that, a wire and a register.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
Bit = int | str  # a net, or a constant


class Netlist:
    """The one module of a flattened netlist, with who drives and who reads each net."""

    def __init__(self, module: dict[str, Any]) -> None:
        self.cells: dict[str, Cell] = module["cells"]
        self.register: dict[Bit, str] = {}  # net -> the register that drives it
        self.readers: dict[Bit, list[tuple[str, str]]] = defaultdict(list)
        for name, cell in self.cells.items():
            for pin, bits in cell["connections"].items():
                for bit in bits:
                    if cell["port_directions"][pin] == "input":
                        self.readers[bit].append((name, pin))
                    elif cell["type"] == "TRELLIS_FF" and pin == "Q":
                        self.register[bit] = name
        for port in module["ports"].values():
            for bit in port["bits"]:
                self.readers[bit].append(("", "port"))  # no cell has this name

    def _plain(self, name: str, clock: Bit | None) -> bool:
        """A register without enable and reset, of that clock."""
        cell = self.cells[name]
        pins, settings = cell["connections"], cell["parameters"]
        return (
            cell["type"] == "TRELLIS_FF"
            and settings["CEMUX"].strip() == "1"
            and settings["CLKMUX"] == "CLK"
            and settings["REGSET"] == "RESET"
            and pins.get("LSR", ["0"]) == ["0"]
            and clock in (None, pins["CLK"][0])
        )

    def before(self, block: str, pins: Sequence[str]) -> tuple[Bit, dict[str, Bit]] | None:
        """The registers that drive ``pins``: their clock, and what drives them.

        None if others than multipliers read them. One that drives several is copied into each.
        """
        taken: dict[str, Bit] = {}
        clock: Bit | None = None
        for pin in pins:
            (bit,) = self.cells[block]["connections"][pin]
            if isinstance(bit, str):
                taken[pin] = bit
                continue
            name = self.register.get(bit)
            alone = all(
                reader and self.cells[reader]["type"] == "MULT18X18D" and p[0] in "AB"
                for reader, p in self.readers[bit]
            )
            if name is None or not alone or not self._plain(name, clock):
                return None
            clock = self.cells[name]["connections"]["CLK"][0]
            taken[pin] = self.cells[name]["connections"]["DI"][0]
        return None if clock is None else (clock, taken)

    def behind(self, block: str, pins: Sequence[str]) -> tuple[Bit, dict[str, Bit]] | None:
        """The registers that ``pins`` drive, if they drive nothing else: the clock, and the nets behind."""
        taken: dict[str, Bit] = {}
        clock: Bit | None = None
        for pin in pins:
            (bit,) = self.cells[block]["connections"].get(pin) or ["x"]
            readers = self.readers[bit] if isinstance(bit, int) else []
            if not readers:
                continue
            name, reader = readers[0]
            if len(readers) > 1 or not name or reader != "DI" or not self._plain(name, clock):
                return None
            clock = self.cells[name]["connections"]["CLK"][0]
            taken[pin] = self.cells[name]["connections"]["Q"][0]
        return None if clock is None else (clock, taken)

    def connect(self, block: str, pins: dict[str, Bit]) -> None:
        """Connect ``pins`` to those nets."""
        for pin, bit in pins.items():
            self.cells[block]["connections"][pin] = [bit]
            if self.cells[block]["port_directions"][pin] == "input":
                self.readers[bit].append((block, pin))


def absorb(module: dict[str, Any]) -> Counter[str]:
    """Move what can be moved; how many blocks got which registers."""
    net, count = Netlist(module), Counter[str]()
    for name, cell in net.cells.items():
        if cell["type"] == "MULT18X18D":
            sides = [net.before(name, [f"{side}{i}" for i in range(18)]) for side in "AB"]
            if sides[0] and sides[1]:  # nextpnr has no timing of a multiplier with one of them
                for side, both in zip("AB", sides, strict=True):
                    assert both is not None
                    _clocked(net, name, both, f"REG_INPUT{side}_CLK")
                count["multiplier, inputs"] += 1
            if found := net.behind(name, [f"P{i}" for i in range(36)]):
                _clocked(net, name, found, "REG_OUTPUT_CLK")
                count["multiplier, output"] += 1
        elif cell["type"] == "DP16KD":
            pins = [f"DO{port}{i}" for port in "AB" for i in range(18)]
            if (found := net.behind(name, pins)) and found[0] == cell["connections"]["CLKB"][0]:
                net.connect(name, found[1])
                cell["parameters"] |= {"REGMODE_A": "OUTREG", "REGMODE_B": "OUTREG"}
                count["memory, output"] += 1
    read = {b for c in net.cells.values() for p, bits in c["connections"].items() for b in bits
            if c["port_directions"][p] == "input"} | {
            b for port in module["ports"].values() for b in port["bits"]}  # fmt: skip
    driven = Counter(
        bits[0]
        for c in net.cells.values()
        for p, bits in c["connections"].items()
        if c["port_directions"][p] == "output" and bits
    )
    for name in [n for n, c in net.cells.items() if c["type"] == "TRELLIS_FF"]:
        q = net.cells[name]["connections"]["Q"][0]
        if driven[q] > 1 or q not in read:  # a block drives it now, or nobody is left to read it
            del net.cells[name]
            count["registers less"] += 1
    return count


def _clocked(net: Netlist, name: str, found: tuple[Bit, dict[str, Bit]], setting: str) -> None:
    clock, pins = found
    net.connect(name, pins)
    cell = net.cells[name]
    cell["parameters"] |= {setting: "CLK0", "GSR": "DISABLED", "RESETMODE": "SYNC"}
    for pin, bit in (("CLK0", clock), ("CE0", "1"), ("RST0", "0")):
        cell["connections"][pin] = [bit]
        cell["port_directions"][pin] = "input"


def main(source: str, target: str) -> None:
    """Read, move, write; say how many."""
    design = json.loads(Path(source).read_text())
    tops = [m for m in design["modules"].values() if int(m["attributes"].get("top", "0"), 2)]
    for what, number in sorted(absorb(tops[0]).items()):
        print(f"{what}: {number}")
    Path(target).write_text(json.dumps(design))


if __name__ == "__main__":
    main(*sys.argv[1:])
