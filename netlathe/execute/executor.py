"""Runs the IR in torch: any value can be observed, weights are held one at a time.

    Executor(model, device="cuda").run(feeds, outputs=["add_7"])

Weights are read when the first node that needs them runs and given back after the last, activations
likewise. torch's global state (gradient mode, generators, default dtype, precision switches) is as
before afterwards, and results are deterministic. For gradients use :meth:`Executor.module`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from netlathe.diagnostics import Diagnostic, InputError, NetLatheError
from netlathe.execute import plan, reading
from netlathe.execute.fx import fixed, to_fx
from netlathe.execute.plan import Program, Slot, Step
from netlathe.execute.torch_ops import storage
from netlathe.execute.torch_ops.host import to_tensor
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import location
from netlathe.pipeline.pass_ import LABELS

Feed = npt.NDArray[Any] | torch.Tensor


class ExecutionError(NetLatheError):
    """A node failed while it ran."""


@dataclass(frozen=True)
class _Schedule:
    """The steps that some outputs need, and after each the slots that nobody reads any more."""

    steps: tuple[Step, ...]
    done: tuple[tuple[Slot, ...], ...]


class Executor:
    """A model prepared to run on ``device`` any number of times.

    ``keep_weights`` holds every weight on the device after its first use, which is faster where the
    model fits; without it one run never holds more than the weights of the node that runs, and those
    that later nodes share.

    Raises:
        LowerError: with every node that has no row in the table.
    """

    def __init__(
        self, model: ir.Model, device: str | torch.device = "cpu", *, keep_weights: bool = False
    ) -> None:
        self.model = model
        self.device = torch.device(device)
        if (
            self.device.type == "cuda" and self.device.index is None
        ):  # "the current one" is a thread's
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._program = plan.plan(model)
        self._keep = keep_weights
        self._kept: dict[Slot, torch.Tensor] = {}
        self._fixed: dict[Program, set[Slot]] = {}
        self._schedules: dict[tuple[Program, tuple[Slot, ...]], _Schedule] = {}

    @property
    def output_names(self) -> list[str]:
        """The graph's outputs, in order."""
        return list(self._program.output_names)

    def run(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Evaluate once, without gradients, and return ``outputs`` by name (default: the graph's).

        Any value of the main graph may be asked for. Feeds are arrays or tensors; results are tensors
        on the executor's device, in the storage type of their ONNX type.

        Raises:
            InputError: a feed is missing, unknown or of another dtype or rank; or an output is unknown.
            ExecutionError: a node failed; it is named.
        """
        program = self._program
        if outputs is None:
            wanted = dict(zip(program.output_names, program.outputs, strict=True))
        else:
            if unknown := [name for name in outputs if name not in program.values]:
                raise InputError(
                    Diagnostic("run.output", f"the model has no value named {', '.join(unknown)}")
                )
            wanted = {name: program.values[name] for name in outputs}
        with torch.inference_mode(False), torch.no_grad(), _exact_arithmetic(self.device):
            values: dict[Slot, Any] = {**self.feed(feeds)}
            results = self._run(program, values, tuple(wanted.values()))
        return dict(zip(wanted, results, strict=True))

    def module(self) -> torch.fx.GraphModule:
        """The model as a module on the executor's device, whose parameters take gradients."""
        return to_fx(self.model).to(self.device)

    # -- in parts, for many samples: see netlathe.execute.calibration -------------------------------

    @property
    def program(self) -> Program:
        """The plan of the whole graph."""
        return self._program

    def steps(self, wanted: Sequence[Slot]) -> tuple[Step, ...]:
        """The steps of the plan that ``wanted`` need, in order."""
        return self._schedule(self._program, tuple(wanted)).steps

    def run_part(self, part: Program, values: dict[Slot, Any], *, gradients: bool = False) -> None:
        """Run the steps of ``part`` that its outputs need, on ``values``, which hold what they read.

        Afterwards ``values`` hold the outputs, and nothing that the steps alone have read or made. With
        ``gradients`` torch records what is done, and weights can be differentiated by.

        Raises:
            ExecutionError: a node failed; it is named.
        """
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            _exact_arithmetic(self.device),
        ):
            self._run_steps(part, values, tuple(part.outputs))

    def release_weights(self) -> None:
        """Give back the weights that ``keep_weights`` holds; they are read again when needed."""
        self._kept.clear()

    def feed(self, feeds: Mapping[str, Feed]) -> dict[Slot, torch.Tensor]:
        """``feeds`` on the device, by slot; labels that no input takes are left out.

        Raises:
            InputError: a feed is missing, unknown or of another dtype or rank.
        """
        problems = []
        inputs = {slot.name: slot for slot in self._program.inputs}
        recorded = {value.name: value for value in self.model.graph.inputs}
        values: dict[Slot, torch.Tensor] = {}
        for name, feed in feeds.items():
            if name not in inputs and name == LABELS:
                continue
            if name not in inputs:
                problems.append(f"there is no input named {name!r}")
                continue
            tensor = (
                feed if isinstance(feed, torch.Tensor) else storage.from_numpy(np.asarray(feed))
            )
            value = recorded[name]
            if value.dtype is not None and tensor.dtype != storage.TORCH_DTYPE.get(value.dtype):
                problems.append(f"input {name!r} is {tensor.dtype}, not {value.dtype.name}")
            if value.shape is not None and tensor.dim() != len(value.shape):
                problems.append(f"input {name!r} has {tensor.dim()} dims, not {len(value.shape)}")
            values[inputs[name]] = tensor.to(self.device)
        for name, slot in inputs.items():
            if name not in feeds and slot not in self._program.weights:
                problems.append(f"input {name!r} is missing")
        if problems:
            raise InputError(
                Diagnostic(
                    "run.feeds",
                    "; ".join(problems),
                    help=f"the inputs are {', '.join(inputs)}",
                )
            )
        return values

    # -- running ----------------------------------------------------------------------------------

    def _run(
        self, program: Program, values: dict[Slot, Any], wanted: tuple[Slot, ...]
    ) -> list[torch.Tensor]:
        self._run_steps(program, values, wanted)
        return [self._on_device(self._value(program, values, slot)) for slot in wanted]

    def _run_steps(
        self, program: Program, values: dict[Slot, Any], wanted: tuple[Slot, ...]
    ) -> None:
        schedule = self._schedule(program, wanted)
        if self._keep:
            self._hold(program, schedule, values)
        for step, done in zip(schedule.steps, schedule.done, strict=True):
            args = [self._value(program, values, arg) for arg in step.args]
            kwargs = {k: self._value(program, values, arg) for k, arg in step.kwargs.items()}
            result = self._call(step, args, kwargs)
            results = result if step.returns_tuple else (result,)
            # A function may give more than the node asks for: they are in the op's order.
            for slot, made in zip(step.outputs, results, strict=False):
                if slot is not None:
                    values[slot] = made
            del args, kwargs, result, results
            for slot in done:
                values.pop(slot, None)

    def _value(self, program: Program, values: dict[Slot, Any], arg: Any) -> Any:
        if isinstance(arg, Program):
            return _Body(self, arg)
        if not isinstance(arg, Slot) or arg in values:
            return values[arg] if isinstance(arg, Slot) else arg
        if arg in self._kept:
            return self._differentiable(program, arg, self._kept[arg])
        weight = self._differentiable(program, arg, self._load(program.weights[arg]))
        if self._keep:
            self._kept[arg] = weight
        else:
            values[arg] = weight
        return weight

    def _hold(self, program: Program, schedule: _Schedule, values: Mapping[Slot, Any]) -> None:
        """Read what will be kept anyway, several weights at a time."""
        read = dict.fromkeys(slot for step in schedule.steps for slot in step.reads())
        there = self._kept.keys() | values.keys()
        slots = [slot for slot in read if slot in program.weights and slot not in there]
        tensors = [program.weights[slot] for slot in slots]
        self._kept.update(zip(slots, reading.ahead(tensors, self._load), strict=True))

    def _differentiable(self, program: Program, slot: Slot, weight: torch.Tensor) -> torch.Tensor:
        """The weight, which takes gradients where torch records them and training changes it."""
        floating = weight.is_floating_point() and weight.dtype not in storage.FLOAT8
        if torch.is_grad_enabled() and floating and weight.dim():
            if program not in self._fixed:
                self._fixed[program] = fixed(program)
            if slot not in self._fixed[program]:
                weight.requires_grad_()
        return weight

    def _call(self, step: Step, args: list[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return step.function(*args, **kwargs)
        except NetLatheError:  # a node of a body, which is named already
            raise
        except Exception as error:
            raise ExecutionError(failure(step, "execute.op", error)) from error

    def _load(self, tensor: ir.TensorProtocol) -> torch.Tensor:
        return storage.load(tensor, self.device)

    def _on_device(self, value: Any) -> torch.Tensor:
        tensor = value if isinstance(value, torch.Tensor) else to_tensor(value)
        return tensor.to(self.device)

    def _schedule(self, program: Program, wanted: tuple[Slot, ...]) -> _Schedule:
        key = (program, wanted)
        if key not in self._schedules:
            self._schedules[key] = _make_schedule(program, wanted)
        return self._schedules[key]


class _Body:
    """A nested graph as the callable that the control-flow rows expect."""

    def __init__(self, executor: Executor, program: Program) -> None:
        self._executor = executor
        self._program = program

    def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slots = (*self._program.inputs, *self._program.captured)
        bound = dict(zip(slots, values, strict=True))
        return tuple(self._executor._run(self._program, bound, tuple(self._program.outputs)))


def _make_schedule(program: Program, wanted: tuple[Slot, ...]) -> _Schedule:
    needed = set(wanted)
    steps: list[Step] = []
    for step in reversed(program.steps):
        if needed.intersection(slot for slot in step.outputs if slot is not None):
            steps.append(step)
            needed.update(step.reads())
    done: list[tuple[Slot, ...]] = []  # last step first, as are the steps here
    read_later = set(wanted)
    for step in steps:
        here = {*step.reads(), *(slot for slot in step.outputs if slot is not None)}
        done.append(tuple(here - read_later))
        read_later |= here
    return _Schedule(tuple(reversed(steps)), tuple(reversed(done)))


def failure(step: Step, code: str, error: Exception) -> Diagnostic:
    """The diagnostic for a step that raised: torch's words, and the node and module."""
    return Diagnostic(
        code,
        " ".join(str(error).split()) or type(error).__name__,
        at=show_node(step.node),
        where=location(step.node),
    )


@contextlib.contextmanager
def _exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No reduced-precision products, no autotuned kernels and no autocast while running."""
    if device.type != "cuda":
        with torch.autocast("cpu", enabled=False):
            yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with (
            torch.autocast("cuda", enabled=False),
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            yield
    finally:
        matmul.allow_tf32 = before
