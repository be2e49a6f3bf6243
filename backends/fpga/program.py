"""Programs: instructions in order, and the tokens that keep that order where it matters.

Who builds a program says what each instruction reads and writes; :func:`link` finds every pair of
instructions of different units that touch the same words, one of them writing, and places the fewest
tokens that keep them in order. Within a unit instructions run in order anyway.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from netlathe.backends.fpga.isa import GIVES, TOKEN_BITS, Instruction, Unit
from netlathe.diagnostics import Diagnostic, LowerError

Span = tuple[str, int, int]  # a scratchpad or "memory", first word, one past the last


@dataclass
class Step:
    """An instruction and the words it reads and writes."""

    instruction: Instruction
    reads: Sequence[Span] = ()
    writes: Sequence[Span] = ()


class _Past:
    """Who last read and last wrote each word of a scratchpad or of memory, as stretches that are alike."""

    def __init__(self) -> None:
        self._starts = [0]
        self._last: list[dict[tuple[Unit, bool], int]] = [{}]  # (unit, wrote) -> step

    def last(
        self, start: int, end: int, unit: Unit, *, writing: bool
    ) -> Iterator[tuple[Unit, int]]:
        """Units and steps that a step of ``unit`` has to stand behind."""
        for number in range(self._cut(start), self._cut(end)):
            for (other, wrote), at in self._last[number].items():
                if other != unit and (writing or wrote):
                    yield other, at

    def touch(self, start: int, end: int, unit: Unit, step: int, *, writing: bool) -> None:
        """Note a use. Who waits for a write waits for all that the write had to wait for."""
        first, last = self._cut(start), self._cut(end)
        if writing:
            self._starts[first:last] = [start]
            self._last[first:last] = [{(unit, True): step}]
        else:
            for number in range(first, last):
                self._last[number][unit, False] = step

    def _cut(self, at: int) -> int:
        """The number of the stretch that begins at word ``at``; one is cut in two for it if need be."""
        number = bisect.bisect_left(self._starts, at)
        if number == len(self._starts) or self._starts[number] != at:
            self._starts.insert(number, at)
            self._last.insert(number, dict(self._last[number - 1]))
        return number


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
                held = past.setdefault(pad, _Past())
                for unit, at in held.last(start, end, mine.unit, writing=writing):
                    needs[unit] = max(needs.get(unit, -1), at)
        for unit, at in needs.items():
            if at > waited.get((mine.unit, unit), -1):
                waited[mine.unit, unit] = at
                assert mine.unit in GIVES[unit], f"{mine.unit} cannot wait for {unit}"
                steps[at].instruction.pushes.add(mine.unit)
                mine.pops.add(unit)
        for spans, writing in ((step.reads, False), (step.writes, True)):
            for pad, start, end in spans:
                past[pad].touch(start, end, mine.unit, number, writing=writing)
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
