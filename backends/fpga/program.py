"""Programs: instructions in order, and the tokens that keep that order where it matters.

Who builds a program says what each instruction reads and writes; :func:`link` finds every pair of
instructions of different units that touch the same words, one of them writing, and places the fewest
tokens that keep them in order. Within a unit instructions run in order anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from netlathe.backends.fpga.isa import GIVES, TOKEN_BITS, Instruction, Unit
from netlathe.diagnostics import Diagnostic, LowerError

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


def link(steps: Sequence[Step], queue: int = 8) -> list[Instruction]:
    """The instructions, with tokens.

    What is found through a third unit is not waited for again; a wait that an earlier one of the same unit
    covers is left out.

    Raises:
        LowerError: more tokens would be given ahead of their use than a counter of the core holds.
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
    made = [step.instruction for step in steps]
    _count_tokens(made, queue)
    return made


def _count_tokens(program: Sequence[Instruction], queue: int) -> None:
    """Refuse a program whose counters could overflow, however the units run.

    Instructions are handed out in order. So when one gives a token, what is given and unused is at most what
    is so in program order, and what the other unit still has to use of its queue, its head and at work.
    """
    most = (1 << TOKEN_BITS) - 1 - (queue + 2)
    given: dict[tuple[Unit, Unit], int] = {}
    for number, step in enumerate(program):
        for other in step.pops:
            given[other, step.unit] -= 1
        for other in step.pushes:
            pair = step.unit, other
            given[pair] = given.get(pair, 0) + 1
            if given[pair] > most:
                raise LowerError(
                    Diagnostic(
                        "fpga.tokens",
                        f"instruction {number}: {given[pair]} tokens of {step.unit} for {other} are unused;"
                        f" {most} are safe in a counter of {TOKEN_BITS} bits",
                        help="report this with the model",
                    )
                )


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
