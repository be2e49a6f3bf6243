"""Walks through a model once, while the weights behind change: statistics of a prefix as it has become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch

from netlathe.diagnostics import Diagnostic, PassError
from netlathe.execute import calibration
from netlathe.execute.calibration import Held, Sizes, Watch, add_rows, compacted, moved_to, widths
from netlathe.execute.executor import Executor
from netlathe.execute.plan import Program, Slot
from netlathe.execute.statistics import Statistic, StatisticResult
from netlathe.ir import types, weights
from netlathe.pipeline.pass_ import Feeds, Progress

_HOST = torch.device("cpu")


class Walk:
    """Statistics that are asked for one after the other, while the weights behind them change.

    What comes before a value that was asked for is final: its weights are those that :meth:`replace` gave,
    else those of the model. So the walk goes through the model once. On a GPU where they take at most a
    third of the memory that was free it holds the values of every sample where it stands; else in host
    memory at the last narrow place before what was asked for, and it runs what is between again.
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
        self._given: dict[Slot, torch.Tensor] = {}  # weights, until they have been read last
        self._room = 0.0
        if self._executor.device.type == "cuda":
            self._room = torch.cuda.mem_get_info(self._executor.device)[0] / 3
        self._stage_bytes = calibration.stage_bytes_on(self._executor.device)

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

    def replace(self, weight: str, new: ir.TensorProtocol | torch.Tensor) -> None:
        """Let an initializer of the main graph be ``new`` from here on.

        A torch tensor is held until it has been read last; one of the IR is read when it is needed.
        """
        program = self._executor.program
        slot = program.values[weight]
        if isinstance(new, torch.Tensor):
            if self._last.get(slot, -1) >= self._at:
                self._given[slot] = new
        else:
            program.weights[slot] = new

    def collect(self, wanted: Sequence[Statistic]) -> list[StatisticResult]:
        """One result for each of ``wanted``, whose values come no earlier than those before.

        Raises:
            PassError: as :func:`sweep`.
        """
        watches = self._swept(wanted)
        return [calibration.result(watches[statistic]) for statistic in wanted]

    def summed_up(self, wanted: Statistic) -> torch.Tensor:
        """The one result, in float64 on the device; as :meth:`collect`."""
        return calibration.summed_up(self._swept([wanted])[wanted])

    # -- going on -----------------------------------------------------------------------------------

    def _swept(self, wanted: Sequence[Statistic]) -> dict[Statistic, Watch]:
        """The sums that ``wanted`` come from."""
        watches = calibration.watches(self._model, wanted, self._found)
        values = self._executor.program.values
        slots = [(w, tuple(values[v.name or ""] for v in w.values)) for w in watches.values()]
        end = max(self.position(v.name or "") for w in watches.values() for v in w.values)
        watched = [slot for _, own in slots for slot in own]
        stand = self._stand(end, watched)
        for stop in self._stages(stand):
            self._advance(stop)
        between = self._part(stand, end, watched)
        for number in self._tracked(end > stand):
            made = self._run(between, number)
            for watch, own in slots:
                add_rows(watch, [made[slot] for slot in own], self._feeds[number], number)
        self._give_back()
        return watches

    def _stand(self, end: int, watched: Sequence[Slot]) -> int:
        """Where to hold the values of all samples in order to get at ``watched``, there after ``end`` steps.

        What nothing reads later is not held: it is made from there.
        """
        passing = [
            self._made[s] for s in watched if s in self._made and self._last.get(s, -1) < end
        ]
        end = min(passing, default=end)
        if self._bytes(end) <= self._room:
            return end
        return min(range(end, self._at - 1, -1), key=lambda at: self._widths[at])

    def _bytes(self, at: int) -> float:
        """What is held there takes no more, whatever its type."""
        return 8 * len(self._feeds) * self._widths[at]

    def _stages(self, stand: int) -> Iterator[int]:
        """Where to stop on the way: all weights up to the next stop are held at a time."""
        program, at = self._executor.program, self._at
        while at < stand:
            end = min(stand, calibration.furthest(program, self._steps, at, self._stage_bytes))
            if end < stand:
                end = min(range(end, at, -1), key=lambda at: self._widths[at])
            yield end
            at = end

    def _advance(self, stop: int) -> None:
        """Run all samples up to there and hold what is read later."""
        kept = [s for s, at in self._made.items() if at < stop <= self._last.get(s, -1)]
        part = self._part(self._at, stop, kept)
        home = self._executor.device if self._bytes(stop) <= self._room else _HOST
        for number in self._tracked(True):
            values = self._run(part, number)
            self._held[number] = {s: compacted(moved_to(values[s], home)) for s in kept}
        self._at = stop
        self._given = {s: w for s, w in self._given.items() if self._last[s] >= stop}
        self._give_back()

    def _part(self, start: int, stop: int, outputs: list[Slot]) -> Program:
        part = Program(steps=list(self._steps[start:stop]), outputs=outputs)
        part.weights = self._executor.program.weights
        return part

    def _tracked(self, works: bool) -> Iterator[int]:
        numbers = range(len(self._feeds))
        return (
            self._progress.track(numbers, "calibrating", len(numbers)) if works else iter(numbers)
        )

    def _give_back(self) -> None:
        self._executor.release_weights()
        weights.give_back(self._model)

    def _run(self, part: Program, number: int) -> Held:
        """What is held of a sample and what ``part`` makes of it, on the device."""
        device = self._executor.device
        values = {slot: moved_to(value, device) for slot, value in self._held[number].items()}
        values.update(self._executor.feed(self._feeds[number]))
        read = {slot for step in part.steps for slot in step.reads()}
        values.update((s, moved_to(w, device)) for s, w in self._given.items() if s in read)
        start = dict(values)
        self._executor.run_part(part, values)
        return start | values
