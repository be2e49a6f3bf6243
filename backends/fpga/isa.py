"""The instruction set: four units, each with its own queue, and tokens that order them.

    LOAD        memory -> input | weights | indices | parameters | tables; or a constant
    COMPUTE     sums[m] (+)= sum over k of input[m, k] weights[k];  or the sum or the maximum of vectors
                in PAIRS a byte of weights is two of int4: the low one is of the column, with sums at m, the
                high one of another, with sums half the scratchpad behind m. k is at least 2, weights dense
    REQUANTIZE  output, hidden = table[saturate(((sums + bias) multiplier + half) >> shift) + zero)]
    STORE       output -> memory

An instruction of 256 bits holds an affine loop nest; a *delta* is what an address moves by when that
loop steps (the inner loops' way back included), so that hardware has one adder an address. Addresses are in
beats (memory and what LOAD writes), vectors (activations, output) or rows (weights, sums).

Tokens: an instruction waits for one token of every counter it pops, and adds one to every counter it pushes
when it is done: an instruction of another unit that must not run before it waits for that token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from netlathe.diagnostics import Diagnostic, LowerError

Unit = Literal["load", "compute", "requantize", "store"]
UNITS: tuple[Unit, ...] = ("load", "compute", "requantize", "store")
WIDTH = 256
TOKEN_BITS = 10  # of a counter of tokens: what can be given ahead of being waited for

# Whose tokens a unit waits for; the units that wait for its own are those that name it here.
WAITS: dict[Unit, tuple[Unit, ...]] = {
    "load": ("compute", "requantize", "store"),
    "compute": ("load", "requantize"),
    "requantize": ("load", "compute", "store"),
    "store": ("load", "requantize"),
}
GIVES: dict[Unit, tuple[Unit, ...]] = {
    unit: tuple(other for other in UNITS if unit in WAITS[other]) for unit in UNITS
}
HEADER = {"unit": 2, "pops": 3, "pushes": 3}

# What LOAD writes to.
INPUT, WEIGHTS, INDICES, PARAMETERS, TABLES = range(5)
# How it gets it: beats as they are, nibbles widened to bytes, a constant byte.
COPY, NIBBLES, FILL = range(3)
# What COMPUTE does.
DOT, ADD, MAXIMUM, PAIRS = range(4)
# Where it reads.
FROM_INPUT, FROM_HIDDEN = range(2)

# Field -> bits, in order behind the header; negative widths are signed.
FIELDS: dict[Unit, dict[str, int]] = {
    "load": {
        "target": 3,
        "how": 2,
        "address": 32,  # of memory, in beats
        "base": 18,  # of the scratchpad, in beats
        "inner": 16,  # beats in a row
        "outer": 14,  # how many times
        "delta_memory": -24,  # when the outer loop steps
        "delta_base": -18,
        "value": 8,  # the byte of FILL
    },
    "compute": {
        "what": 2,
        "accumulate": 1,  # onto what is in sums, else afresh
        "source": 1,
        "pattern": 2,  # 0: dense; else 1 + the place of the pattern in the spec
        "input": 18,
        "weights": 14,
        "sums": 14,
        "k0": 12,
        "k1": 8,
        "k2": 8,
        "m0": 12,
        "m1": 12,
        "delta_k0": -18,
        "delta_k1": -18,
        "delta_k2": -18,
        "delta_m0": -18,
        "delta_m1": -18,
        "factor": 16,  # of ADD and MAXIMUM
    },
    "requantize": {
        "raw": 1,  # 32-bit sums, a byte of each column at a time
        "table": 1,  # look the result up
        "to_output": 1,
        "to_hidden": 1,
        "sums": 14,
        "parameters": 14,
        "tables": 12,
        "zero": -8,
        "output": 14,
        "hidden": 18,
        "n0": 12,
        "n1": 12,
        "delta_0": -18,
        "delta_1": -18,
    },
    "store": {
        "output": 14,
        "address": 32,
        "group": 3,  # vectors that follow each other in memory
        "n0": 12,
        "n1": 12,
        "delta_0": -24,
        "delta_1": -24,
    },
}


@dataclass
class Instruction:
    """One instruction; fields that are not named are 0."""

    unit: Unit
    fields: Mapping[str, int] = field(default_factory=dict)
    pops: set[Unit] = field(default_factory=set)
    pushes: set[Unit] = field(default_factory=set)

    def __getitem__(self, name: str) -> int:
        if name not in FIELDS[self.unit]:
            raise KeyError(f"{self.unit} has no field {name}")
        return self.fields.get(name, 0)

    def encode(self) -> int:
        """The 256 bits.

        Raises:
            LowerError: a number does not fit its field.
        """
        word = UNITS.index(self.unit)
        word |= sum(1 << i for i, u in enumerate(WAITS[self.unit]) if u in self.pops) << 2
        word |= sum(1 << i for i, u in enumerate(GIVES[self.unit]) if u in self.pushes) << 5
        at = sum(HEADER.values())
        for name, width in FIELDS[self.unit].items():
            value, bits = self[name], abs(width)
            low, high = (-(1 << bits - 1), 1 << bits - 1) if width < 0 else (0, 1 << bits)
            if not low <= value < high:
                raise LowerError(
                    Diagnostic(
                        "fpga.field",
                        f"{self.unit}.{name} is {value}; {low} to {high - 1} can be said",
                        help="a smaller tile is needed",
                    )
                )
            word |= (value & (1 << bits) - 1) << at
            at += bits
        return word


def decode(word: int) -> Instruction:
    """The instruction that was encoded as ``word``."""
    unit = UNITS[word & 3]
    pops: set[Unit] = {u for i, u in enumerate(WAITS[unit]) if word >> 2 + i & 1}
    pushes: set[Unit] = {u for i, u in enumerate(GIVES[unit]) if word >> 5 + i & 1}
    at, fields = sum(HEADER.values()), {}
    for name, width in FIELDS[unit].items():
        bits = abs(width)
        value = word >> at & (1 << bits) - 1
        fields[name] = value - (1 << bits) if width < 0 and value >> bits - 1 else value
        at += bits
    return Instruction(unit, {name: value for name, value in fields.items() if value}, pops, pushes)


def bits(unit: Unit) -> int:
    """How many bits of a word mean something to ``unit``."""
    return sum(HEADER.values()) + sum(abs(width) for width in FIELDS[unit].values())


def deltas(counts: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """What an address moves by when each loop steps, the innermost first."""
    made, back = [], 0
    for count, stride in zip(counts, strides, strict=True):
        made.append(stride - back)
        back += (count - 1) * stride
    return tuple(made)
