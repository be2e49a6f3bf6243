"""Registers that place and route finds in multipliers and block RAMs: the netlist does the same as before."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).parents[3] / "scripts" / "fpga_registers.py"
SPEC = importlib.util.spec_from_file_location("fpga_registers", SOURCE)
assert SPEC is not None and SPEC.loader is not None
registers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(registers)

CLOCK = 1
WIDE = 4  # bits of a factor, and of a word read


def _cell(kind: str, inputs: dict[str, Any], outputs: dict[str, int], **settings: str) -> Any:
    pins = {**inputs, **outputs}
    return {
        "type": kind,
        "parameters": settings,
        "connections": {pin: [bit] for pin, bit in pins.items()},
        "port_directions": {p: "output" if p in outputs else "input" for p in pins},
    }


def _register(data: int, to: int, enable: str = "1 ") -> Any:
    pins = {"CLK": CLOCK, "DI": data, "LSR": "0", "CE": "1"}
    return _cell(
        "TRELLIS_FF", pins, {"Q": to}, CEMUX=enable, CLKMUX="CLK", REGSET="RESET"
    )  # fmt: skip


def _netlist(*, enable: str = "1 ", watched: bool = False) -> dict[str, Any]:
    """A word that is addressed is read, held, and multiplied, held on both sides, by one from outside.

    Inputs are nets 10 to 17, address and factor; outputs nets 80 to 87. ``watched``: a factor as
    it is held is an output too.
    """
    cells: dict[str, Any] = {}
    reads = {f"DOB{i}": 20 + i for i in range(WIDE)}
    cells["memory"] = _cell(
        "DP16KD", {"CLKB": CLOCK, **{f"ADB{i}": 10 + i for i in range(WIDE)}}, reads,
        REGMODE_A="NOREG", REGMODE_B="NOREG",
    )  # fmt: skip
    factors: dict[str, Any] = {f"{side}{i}": "0" for side in "AB" for i in range(18)}
    for i in range(WIDE):
        cells[f"held{i}"] = _register(20 + i, 30 + i)
        cells[f"a{i}"] = _register(30 + i, 40 + i, enable)
        cells[f"b{i}"] = _register(14 + i, 50 + i)
        factors[f"A{i}"], factors[f"B{i}"] = 40 + i, 50 + i
    cells["product"] = _cell("MULT18X18D", factors, {f"P{i}": 60 + i for i in range(2 * WIDE)})
    for i in range(2 * WIDE):
        cells[f"p{i}"] = _register(60 + i, 80 + i)
    outputs = [80 + i for i in range(2 * WIDE)] + [40 + i for i in range(WIDE) if watched]
    return {
        "cells": cells,
        "ports": {
            "in": {"direction": "input", "bits": [CLOCK, *range(10, 18)]},
            "out": {"direction": "output", "bits": outputs},
        },
    }


def _run(module: dict[str, Any], given: np.ndarray) -> list[list[int]]:
    """Outputs in every cycle; every register holds 0 at first. Of memory word n holds 7 n + 3."""
    cells = module["cells"].values()
    state: dict[int, list[int]] = {id(c): [0, 0, 0] for c in cells}
    seen = []
    for row in given:
        value: dict[Any, int] = {"0": 0, "1": 1, "x": 0}
        value |= {10 + i: int(bit) for i, bit in enumerate(row)}

        def number(cell: Any, name: str, value: dict[Any, int] = value) -> int:
            pins = cell["connections"]
            found = (value[pins[f"{name}{i}"][0]] << i for i in range(18) if f"{name}{i}" in pins)
            return sum(found)

        def drive(cell: Any, name: str, word: int, value: dict[Any, int] = value) -> None:
            for pin, (bit,) in cell["connections"].items():
                if pin.startswith(name) and pin[len(name) :].isdigit():
                    value[bit] = word >> int(pin[len(name) :]) & 1

        # What registers hold comes first; a multiplier without may need it.
        for cell in cells:
            if cell["type"] == "TRELLIS_FF":
                value[cell["connections"]["Q"][0]] = state[id(cell)][0]
            elif cell["type"] == "DP16KD":
                drive(cell, "DOB", state[id(cell)][cell["parameters"]["REGMODE_B"] == "OUTREG"])
        new = {}
        for cell in cells:
            held, how = state[id(cell)], cell["parameters"]
            if cell["type"] == "MULT18X18D":
                inside = "REG_INPUTA_CLK" in how
                product = held[0] * held[1] if inside else number(cell, "A") * number(cell, "B")
                drive(cell, "P", held[2] if "REG_OUTPUT_CLK" in how else product)
                new[id(cell)] = [number(cell, "A"), number(cell, "B"), product]
        for cell in cells:
            if cell["type"] == "TRELLIS_FF":
                new[id(cell)] = [value[cell["connections"]["DI"][0]], 0, 0]
            elif cell["type"] == "DP16KD":
                new[id(cell)] = [7 * number(cell, "ADB") + 3, state[id(cell)][0], 0]
        state = new
        seen.append([value[bit] for bit in module["ports"]["out"]["bits"]])
    return seen


def _left(module: dict[str, Any]) -> int:
    return sum(cell["type"] == "TRELLIS_FF" for cell in module["cells"].values())


def test_registers_move_and_the_netlist_does_the_same() -> None:
    given = np.random.default_rng(0).integers(0, 2, (60, 8))
    module = _netlist()
    before = _run(module, given)
    assert np.any(before[10:]) and _left(module) == 5 * WIDE
    count = registers.absorb(module)
    assert _run(module, given) == before
    assert _left(module) == 0
    assert count == {
        "multiplier, inputs": 1, "multiplier, output": 1, "memory, output": 1,
        "registers less": 5 * WIDE,
    }  # fmt: skip


def test_a_register_that_is_read_elsewhere_stays() -> None:
    given = np.random.default_rng(1).integers(0, 2, (60, 8))
    module = _netlist(watched=True)
    before = _run(module, given)
    count = registers.absorb(module)
    assert _run(module, given) == before
    assert count["multiplier, inputs"] == 0 and count["memory, output"] == 1
    assert _left(module) == 2 * WIDE


def test_registers_with_an_enable_stay_and_so_does_the_other_side() -> None:
    module = _netlist(enable="CE")
    count = registers.absorb(module)
    assert count["multiplier, inputs"] == 0 and count["multiplier, output"] == 1
    assert _left(module) == 2 * WIDE
