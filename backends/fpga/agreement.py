"""The core itself beside its model: the same bits, and every beat in the same cycle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from netlathe.backends.fpga import isa, simulate
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.model import Array, Machine, Memory, cycles
from netlathe.backends.fpga.simulate import Run
from netlathe.backends.fpga.spec import Spec
from netlathe.diagnostics import Diagnostic, VerifyError


def run(
    program: Sequence[Instruction],
    memory: Array,
    spec: Spec,
    behaviour: Memory,
    waves: Path | None = None,
) -> Run:
    """Run ``program`` on the simulated core and on the model, which must agree; what the core did.

    Args:
        memory: uint8, a whole number of beats; left as it is.
        behaviour: how memory answers.
        waves: where to write a VCD file.

    Raises:
        VerifyError: a byte of memory differs afterwards, or the cycle in which an instruction's last beat is
            asked for or sent.
        MissingExtraError, LowerError: as :func:`netlathe.backends.fpga.simulate.run`.
    """
    ran = simulate.run(program, memory, spec, behaviour, waves=waves)
    expected = memory.copy()
    Machine(spec, expected).run(program)
    wrong = np.flatnonzero(ran.memory != expected)
    if wrong.size:
        raise _differs(
            f"byte {wrong[0]} of memory, the first of {wrong.size} that differ, is"
            f" {ran.memory[wrong[0]]} on the core and {expected[wrong[0]]} on its model"
        )
    _compare_times(program, spec, behaviour, ran)
    return ran


def _compare_times(program: Sequence[Instruction], spec: Spec, behaviour: Memory, ran: Run) -> None:
    asked = sent = 0
    for number, (step, time) in enumerate(
        zip(program, cycles(program, spec, behaviour), strict=True)
    ):
        if step.unit == "load" and step["how"] != isa.FILL:
            asked += step["inner"] * step["outer"]
            seen, said = int(ran.asked[asked - 1]), time.done - behaviour.latency
        elif step.unit == "store":
            sent += step["group"] * step["n0"] * step["n1"] * spec.vector_beats
            seen, said = int(ran.sent[sent - 1]), time.done
        else:
            continue
        if seen != said:
            raise _differs(
                f"the last beat of instruction {number} ({step.unit}) is in cycle {seen} on the core and"
                f" {said} on its model"
            )
    if asked != ran.asked.size or sent != ran.sent.size:
        raise _differs(
            f"the core asked for {ran.asked.size} beats and sent {ran.sent.size}; the program says"
            f" {asked} and {sent}"
        )


def _differs(what: str) -> VerifyError:
    return VerifyError(Diagnostic("fpga.rtl", what, help="report this with the model"))
