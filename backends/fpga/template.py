"""One program for a range of lengths: that of the longest, and what a launch adds to some of its fields.

FlightLLM compiles a language model for the lengths a prompt can have, and lets lengths of a bucket share
instructions ("length adaptive compilation", arXiv 2401.03868). Here rows (tokens, times the batch) are one
axis of every tensor. If places in memory and on the chip, and tiles, are those of the longest, then fewer
rows change nothing but the last tile of every layer; and in its instructions only counts, and what addresses
move by, each by a fixed amount a row:

    field(rows) = field(high) + slope (rows - high)          low <= rows <= high

``low`` is where some layer's last tile has one row left. So a program's patches are a list of fields with
slopes, found by building it a second time, for ``low`` rows and in the same places; a launch is an addition
for each. Tokens stay: fewer rows touch fewer words, so who waits for the longest waits for enough.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from netlathe.backends.fpga import isa, launch
from netlathe.backends.fpga.choices import Choices
from netlathe.backends.fpga.emit import Report
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.launch import Launch
from netlathe.backends.fpga.partition import OnCore
from netlathe.backends.fpga.spec import Spec
from netlathe.diagnostics import Diagnostic, LowerError

RECORD = struct.Struct("<IHHi")
_Numbers = TypeVar("_Numbers", Instruction, Report)


@dataclass(frozen=True)
class Patch:
    """``slope`` times the difference of rows goes to ``width`` bits from ``bit`` on of an instruction."""

    instruction: int
    bit: int
    width: int
    slope: int

    def encode(self) -> bytes:
        """12 bytes, little-endian: instruction (u32), bit (u16), width (u16), slope (i32)."""
        return RECORD.pack(self.instruction, self.bit, self.width, self.slope)


@dataclass(frozen=True)
class Template:
    """A launch for ``high`` rows and what turns it into one for fewer, down to ``low``."""

    low: int
    high: int
    longest: Launch
    shortest: Launch
    patches: tuple[Patch, ...]

    @property
    def bytes(self) -> int:
        """Of instructions and patches."""
        return isa.WIDTH // 8 * len(self.longest.program) + RECORD.size * len(self.patches)

    @property
    def bytes_apart(self) -> int:
        """What as many instructions would take for every length by itself."""
        return isa.WIDTH // 8 * len(self.longest.program) * (self.high - self.low + 1)

    def launch(self, rows: int) -> Launch:
        """The launch for ``rows`` rows: the longest with its instructions patched.

        Raises:
            ValueError: ``rows`` is not from ``low`` to ``high``.
        """
        if not self.low <= rows <= self.high:
            raise ValueError(f"{rows} rows; the template is for {self.low} to {self.high}")
        words = [instruction.encode() for instruction in self.longest.program]
        patch(words, self.patches, rows - self.high)
        builder = dataclasses.replace(self.longest.builder, reports=self._reports(rows))
        return Launch(
            builder,
            [isa.decode(word) for word in words],
            self.longest.memory,
            {v: dataclasses.replace(i, width=rows) for v, i in self.longest.inputs.items()},
            {v: dataclasses.replace(i, width=rows) for v, i in self.longest.outputs.items()},
            own=False,
        )

    def _reports(self, rows: int) -> list[Report]:
        made = []
        for long, short in zip(
            self.longest.builder.reports, self.shortest.builder.reports, strict=True
        ):
            counts = {}
            for name in ("macs", "computed", "beats_in", "beats_out"):
                most, least = getattr(long, name), getattr(short, name)
                counts[name] = most + _slope(most, least, self.high - self.low) * (rows - self.high)
            made.append(dataclasses.replace(long, **counts))
        return made


def patch(words: list[int], patches: Sequence[Patch], difference: int) -> None:
    """Add ``difference`` rows (usually fewer: negative) to the encoded instructions ``words``, in place."""
    for one in patches:
        mask = (1 << one.width) - 1
        word = words[one.instruction]
        field = (word >> one.bit & mask) + one.slope * difference & mask
        words[one.instruction] = word & ~(mask << one.bit) | field << one.bit


def build(part: OnCore, widths: Mapping[ir.Value, int], rows: int, spec: Spec) -> Template:
    """A template whose longest launch has ``rows`` rows.

    Args:
        widths: how many elements a row of each input has.

    Raises:
        LowerError: as :func:`netlathe.backends.fpga.launch.build`.
    """

    def shapes(count: int) -> dict[ir.Value, tuple[int, int]]:
        return {value: (count, width) for value, width in widths.items()}

    choices = Choices()
    longest = launch.build(part, shapes(rows), spec, choices)
    low = rows - choices.slack(rows) + 1
    if low == rows:
        return Template(low, rows, longest, longest, ())
    shortest = launch.build(part, shapes(low), spec, choices.again())
    return Template(low, rows, longest, shortest, tuple(_patches(longest, shortest, rows - low)))


def _patches(longest: Launch, shortest: Launch, rows: int) -> list[Patch]:
    made = []
    pairs = zip(longest.program, shortest.program, strict=True)
    for number, (long, short) in enumerate(pairs):
        bit = sum(isa.HEADER.values())
        for name, width in isa.FIELDS[long.unit].items():
            if slope := _slope(long[name], short[name], rows):
                made.append(Patch(number, bit, abs(width), slope))
            bit += abs(width)
    return made


def _slope(most: int, least: int, rows: int) -> int:
    if rows == 0:
        return 0
    slope, rest = divmod(most - least, rows)
    if rest:
        raise LowerError(
            Diagnostic(
                "fpga.template",
                f"a field goes from {least} to {most} in {rows} rows, by no fixed amount a row",
                help="report this with the model",
            )
        )
    return slope
