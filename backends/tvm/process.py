"""Runs what may crash in a process of its own: TVM while it compiles, kernels on their first run.

The caller's process loads no part of TVM. A job and its answer are pickled into a folder that only
this user can read, and both ends are this package. What the worker prints is shown if it dies.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy.typing as npt
import onnx_ir as ir

import netlathe
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.packing import Built
from netlathe.diagnostics import Diagnostic, InputError, LowerError
from netlathe.pipeline.pass_ import Feeds

if TYPE_CHECKING:
    from netlathe.backends.tvm.arm.plan import Program

JOB, ANSWER = "job", "answer"

# Larger constants do not travel: lowering looks at types and at the few numbers that decide shapes.
_MOST_BYTES = 1 << 16
_SHOWN = 12  # last lines of what a dead worker printed
# What a full disk makes of a job is told by many parts, or by none: a linker in words, the C library's
# writers not at all. Below so many free bytes no page can be allocated to a file.
_FULL, _NO_ROOM = os.strerror(errno.ENOSPC), 1 << 16


@dataclass(frozen=True)
class Lower:
    """See whether every node of ``model``, an ONNX file without its large weights, has a form."""

    model: bytes
    machine: Machine


@dataclass(frozen=True)
class Build:
    """Compile ``model``, likewise, into ``library``."""

    model: bytes
    machine: Machine
    library: Path
    linker: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """Load the artifact in ``folder`` and run it once."""

    folder: Path
    feeds: Feeds


@dataclass(frozen=True)
class Bare:
    """Compile ``model``, whose sizes are numbers, to a program without a runtime; or only plan it."""

    model: bytes
    machine: Machine
    prefix: str
    only_plan: bool


@dataclass(frozen=True)
class Each:
    """Do ``jobs`` one after the other; if some cannot be done, say why of all of them."""

    jobs: tuple[Job, ...]


Job: TypeAlias = Lower | Build | Run | Bare | Each


@dataclass(frozen=True)
class Refused:
    """The job cannot be done, for these reasons."""

    diagnostics: tuple[Diagnostic, ...]


@dataclass(frozen=True)
class Failed:
    """An exception that nobody expected."""

    traceback: str


class WorkerError(Exception):
    """The worker raised what is a defect of NetLathe; the message is its traceback."""


def gaps(model: ir.Model, machine: Machine) -> list[Diagnostic]:
    """Every node that has no form here; or that TVM crashed over them."""
    return gaps_each([model], machine)


def gaps_each(models: Sequence[ir.Model], machine: Machine) -> list[Diagnostic]:
    """:func:`gaps` of several models, in one worker."""
    try:
        _answer(Each(tuple(Lower(_packed(model), machine) for model in models)), "lowering")
    except LowerError as error:
        return list(error.diagnostics)
    return []


def bare_gaps(model: ir.Model, machine: Machine) -> list[Diagnostic]:
    """What keeps ``model`` from being a program without a runtime; or that TVM crashed over it."""
    try:
        bare(model, machine, "model", only_plan=True)
    except LowerError as error:
        return list(error.diagnostics)
    return []


def build(model: ir.Model, machine: Machine, library: Path, linker: tuple[str, ...]) -> Built:
    """Compile in a worker.

    Raises:
        LowerError: nodes have no form here, or TVM crashed.
    """
    return build_each([model], machine, [library], linker)[0]


def build_each(
    models: Sequence[ir.Model],
    machine: Machine,
    libraries: Sequence[Path],
    linker: tuple[str, ...],
) -> list[Built]:
    """:func:`build` for several models, in one worker: most of the time for a small one is its start."""
    jobs = (
        Build(_packed(model), machine, library, linker)
        for model, library in zip(models, libraries, strict=True)
    )
    made: list[Built] = _answer(Each(tuple(jobs)), "compiling")
    return made


def bare(model: ir.Model, machine: Machine, prefix: str, *, only_plan: bool = False) -> Program:
    """Compile to a program without a runtime in a worker; with ``only_plan`` without its kernels.

    Raises:
        LowerError: nodes have no form here, sizes are decided by data, or TVM crashed.
    """
    made: Program = _answer(Bare(_packed(model), machine, prefix, only_plan), "compiling")
    return made


def run(folder: Path, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
    """Run the artifact in ``folder`` in a worker.

    Raises:
        LowerError: it crashed.
    """
    return run_each([(folder, feeds)])[0]


def run_each(calls: Sequence[tuple[Path, Feeds]]) -> list[dict[str, npt.NDArray[Any]]]:
    """:func:`run` for several artifacts, in one worker."""
    jobs = tuple(Run(folder, feeds) for folder, feeds in calls)
    found: list[dict[str, npt.NDArray[Any]]] = _answer(Each(jobs), "running the artifact")
    return found


def _packed(model: ir.Model) -> bytes:
    """The model with types and no contents where constants are large."""
    light = model.clone()
    for value in light.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _MOST_BYTES:
            value.const_value = ir.ExternalTensor(
                "weights-stay-where-they-are",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
    return ir.serde.serialize_model(light).SerializeToString()


def _answer(job: Job, doing: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="netlathe-") as name:
        folder = Path(name)
        try:
            return _asked(folder, job, doing)
        except Exception as error:
            if shutil.disk_usage(folder).free < _NO_ROOM or _FULL in str(error):
                raise _no_room(folder.parent, doing) from error
            raise


def _asked(folder: Path, job: Job, doing: str) -> Any:
    (folder / JOB).write_bytes(pickle.dumps(job))
    printed = folder / "printed"
    status = _spawn(folder, printed)
    if not (folder / ANSWER).is_file():
        raise _crash(status, doing, printed.read_text("utf-8", "replace"))
    answer = pickle.loads((folder / ANSWER).read_bytes())
    if isinstance(answer, Refused):
        raise LowerError(answer.diagnostics)
    if isinstance(answer, Failed):
        raise WorkerError(answer.traceback)
    return answer


def _spawn(folder: Path, printed: Path) -> int:
    """Run the worker to its end; however this process leaves, the worker is gone."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "netlathe.backends.tvm.worker",
        str(folder),
        str(os.getpid()),
    ]
    ours = os.path.dirname(os.path.dirname(os.path.abspath(netlathe.__file__)))
    paths = os.pathsep.join([path for path in sys.path if path] + [ours])
    with open(printed, "wb") as output:
        worker = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": paths},
        )
        try:
            return worker.wait()
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _no_room(folder: Path, doing: str) -> InputError:
    return InputError(
        Diagnostic(
            "tvm.full",
            f"{doing} found no room for its temporary files",
            at=str(folder),
            help="free some space there, or name another folder in TMPDIR",
        )
    )


def _crash(status: int, doing: str, printed: str) -> LowerError:
    lines = printed.strip().splitlines()[-_SHOWN:]
    notes = tuple(f"it printed: {line}" for line in lines)
    if status == -signal.SIGKILL:
        message = f"{doing} was killed, as the system does when memory runs out"
        advice = "free memory, or compile on a larger machine"
    elif status < 0:
        message = (
            f"{doing} crashed with {signal.Signals(-status).name}; your process was not touched"
        )
        advice = "report this with the model; target onnx does not use TVM"
    else:
        message = f"{doing} ended without an answer (exit code {status})"
        advice = "report this with the model; target onnx does not use TVM"
    return LowerError(Diagnostic("tvm.crash", message, notes=notes, help=advice))
