"""Programs: instructions in order, and the tokens that keep that order where it matters.

Who builds a program says what each instruction reads and writes; :func:`link` finds every pair of
instructions of different units that touch the same words, one of them writing, and places the fewest
tokens that keep them in order. Within a unit instructions run in order anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from netlathe.backends.fpga.isa import GIVES, Instruction, Unit

Span = tuple[str, int, int]  # a scratchpad or "memory", first word, one past the last


@dataclass
class Step:
    """An instruction and the words it reads and writes."""

    instruction: Instruction
    reads: Sequence[Span] = ()
    writes: Sequence[Span] = ()


@dataclass
class _Past:
    """Who last touched a stretch of a scratchpad."""

    spans: list[tuple[int, int, int, Unit, bool]] = field(
        default_factory=list
    )  # ..., step, unit, wrote


def link(steps: Sequence[Step]) -> list[Instruction]:
    """The instructions, with tokens.

    What is found through a third unit is not waited for again; a wait that an earlier one of the same unit
    covers is left out.
    """
    past: dict[str, _Past] = {}
    waited: dict[tuple[Unit, Unit], int] = {}  # (waits, for whom) -> the last step waited for
    for number, step in enumerate(steps):
        mine = step.instruction
        needs: dict[Unit, int] = {}
        for spans, writing in ((step.reads, False), (step.writes, True)):
            for pad, start, end in spans:
                for other_start, other_end, at, unit, wrote in past.get(pad, _Past()).spans:
                    meets = other_start < end and start < other_end
                    if meets and (writing or wrote) and unit != mine.unit:
                        needs[unit] = max(needs.get(unit, -1), at)
        for unit, at in needs.items():
            if at > waited.get((mine.unit, unit), -1):
                waited[mine.unit, unit] = at
                assert mine.unit in GIVES[unit], f"{mine.unit} cannot wait for {unit}"
                steps[at].instruction.pushes.add(mine.unit)
                mine.pops.add(unit)
        for spans, writing in ((step.reads, False), (step.writes, True)):
            for pad, start, end in spans:
                _touch(past.setdefault(pad, _Past()).spans, start, end, number, mine.unit, writing)
    return [step.instruction for step in steps]


def _touch(
    spans: list[tuple[int, int, int, Unit, bool]],
    start: int,
    end: int,
    number: int,
    unit: Unit,
    wrote: bool,
) -> None:
    """Note a use; what it covers of the same unit and kind is forgotten, and by a write all it covers."""
    spans[:] = [
        span
        for span in spans
        if not (start <= span[0] and span[1] <= end)
        or not (wrote or (span[3] == unit and not span[4]))
    ]
    spans.append((start, end, number, unit, wrote))
