"""Walks through a model once, while the weights behind change: statistics of a prefix as it has become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import torch

from netlathe.diagnostics import Diagnostic, PassError
from netlathe.execute import calibration
from netlathe.execute.calibration import Held, Sizes, add_rows, compacted, moved_to, widths
from netlathe.execute.executor import Executor
from netlathe.execute.plan import Program, Slot
from netlathe.execute.statistics import Statistic, StatisticResult
from netlathe.ir import types
from netlathe.pipeline.pass_ import Feeds, Progress


class Walk:
    """Statistics that are asked for one after the other, while the weights behind them change.

    What comes before a value that was asked for is final: its weights are those that :meth:`replace` gave,
    else those of the model. So the walk goes through the model once. It holds the values of every
    sample at the last narrow place before what was asked for, and runs what is between again.
    """

    def __init__(
        self, model: ir.Model, feeds: Sequence[Feeds], *, device: str, progress: Progress
    ) -> None:
        if not feeds:
            raise PassError(Diagnostic("calibration.empty", "there are no calibration samples"))
        self._model, self._feeds, self._progress = model, feeds, progress
        self._found = types.infer(model)
        self._executor = Executor(model, device, keep_weights=True)
        for sample in feeds:
            self._executor.feed(sample)
        program = self._executor.program
        self._steps = self._executor.steps(program.outputs)
        self._made = {s: at for at, step in enumerate(self._steps) for s in step.outputs if s}
        self._widths = widths(self._steps, {}, Sizes(model, self._found, feeds[0]))
        self._last: dict[Slot, int] = {}
        for at, step in enumerate(self._steps):
            self._last.update(dict.fromkeys(step.reads(), at))
        self._held: list[Held] = [{} for _ in feeds]
        self._at = 0  # steps that have run

    def position(self, value: str) -> int:
        """After how many steps a value is there: what should be asked for first comes first.

        Raises:
            PassError: no output of the model needs the value.
        """
        slot = self._executor.program.values.get(value)
        if slot is None or (slot not in self._made and slot not in self._executor.program.inputs):
            message = f"calibration data never reaches {value}: no output needs it"
            raise PassError(Diagnostic("calibration.unreached", message))
        return self._made.get(slot, -1) + 1

    def replace(self, weight: str, array: npt.NDArray[Any]) -> None:
        """Let an initializer of the main graph be ``array`` from here on."""
        program = self._executor.program
        program.weights[program.values[weight]] = ir.tensor(array)

    def collect(self, wanted: Sequence[Statistic]) -> list[StatisticResult]:
        """One result for each of ``wanted``, whose values come no earlier than those before.

        Raises:
            PassError: as :func:`sweep`.
        """
        watches = calibration.watches(self._model, wanted, self._found)
        values = self._executor.program.values
        slots = [(w, tuple(values[v.name or ""] for v in w.values)) for w in watches.values()]
        end = max(self.position(v.name or "") for w in watches.values() for v in w.values)
        # The last of the narrowest places: what is before it is not run again.
        stand = min(range(end, self._at - 1, -1), key=lambda at: self._widths[at])
        kept = [s for s, at in self._made.items() if at < stand <= self._last.get(s, -1)]
        before = Program(steps=list(self._steps[self._at : stand]), outputs=kept)
        watched = [slot for _, own in slots for slot in own]
        between = Program(steps=list(self._steps[stand:end]), outputs=watched)
        for part in (before, between):
            part.weights = self._executor.program.weights
        numbers = range(len(self._feeds))
        for number in self._progress.track(numbers, "calibrating", len(numbers)):
            held = self._run(before, self._held[number], number)
            self._held[number] = {
                s: compacted(moved_to(held[s], torch.device("cpu"))) for s in kept
            }
            made = self._run(between, held, number)
            for watch, own in slots:
                add_rows(watch, [made[slot] for slot in own], self._feeds[number], number)
        self._at = stand
        self._executor.release_weights()
        return [calibration.result(watches[statistic]) for statistic in wanted]

    def _run(self, part: Program, held: Held, number: int) -> Held:
        """What is held and what ``part`` makes of it, on the device."""
        values = {slot: moved_to(value, self._executor.device) for slot, value in held.items()}
        values.update(self._executor.feed(self._feeds[number]))
        start = dict(values)
        self._executor.run_part(part, values)
        return start | values
