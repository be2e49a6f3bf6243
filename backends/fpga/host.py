"""The host's side: what runs the parts of a network that the core does not.

By default that is machine code which the TVM backend makes of each part; ``onnxruntime`` names ONNX Runtime
with its optimizations off instead, whose numbers everything is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.tvm import process, runtime, toolchain
from netlathe.backends.tvm.arm import cross
from netlathe.backends.tvm.arm.cores import CORES
from netlathe.backends.tvm.artifact import TvmArtifact
from netlathe.backends.tvm.machine import Machine, machine
from netlathe.diagnostics import (
    Diagnostic,
    InputError,
    MissingExtraError,
    OptionError,
    VerifyError,
    did_you_mean,
)
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.pipeline.pass_ import Feeds

Array = npt.NDArray[Any]

REFERENCE, X86 = "onnxruntime", "tvm-x86"
NAMES = (X86, *(f"arm-{name}" for name in CORES), REFERENCE)
# Of a float output of a part, as a share of its RMS: what the TVM backend is held to.
_BOUND = 1e-4


class Host(Protocol):
    """Runs parts by their numbers."""

    name: str

    def run(self, number: int, feeds: Feeds) -> dict[str, Array]:
        """Outputs of a part, by name."""
        ...


class Reference:
    """ONNX Runtime, optimizations off."""

    name = REFERENCE

    def __init__(self, parts: Mapping[int, ir.Model]) -> None:
        self._sessions = {number: ort.Session(model) for number, model in parts.items()}

    def run(self, number: int, feeds: Feeds) -> dict[str, Array]:
        """Outputs of a part, by name."""
        return self._sessions[number].run(feeds)


class Compiled:
    """Each part as an artifact of the TVM backend.

    Args:
        name: a target of the TVM backend, for x86-64 or for an ARM core.

    Raises:
        LowerError: nodes have no form there: every one of every part is listed.
    """

    def __init__(self, name: str, parts: Mapping[int, ir.Model]) -> None:
        self.name, self._parts = name, parts
        made = TvmArtifact.each(list(parts.values()), _machine(name), _linker(name))
        self._artifacts = dict(zip(parts, made, strict=True))

    def run(self, number: int, feeds: Feeds) -> dict[str, Array]:
        """Outputs of a part, by name, in this process.

        Raises:
            LowerError: this CPU lacks instructions that the code uses.
        """
        return self._artifacts[number].run(feeds)

    def lack(self) -> str:
        """Why this machine cannot run the parts; empty if it can."""
        return next(iter(self._artifacts.values())).lack() if self._artifacts else ""

    def save(self, folder: Path) -> list[Path]:
        """Write every part to a folder of its own, which ``runtime.py`` in it loads."""
        files = []
        for number, artifact in self._artifacts.items():
            own = folder_of(folder, number)
            own.mkdir()
            files += artifact.write(own)
        return files

    def check(
        self, folder: Path, calls: Sequence[tuple[int, Feeds, Mapping[str, Array]]]
    ) -> dict[str, float]:
        """Run what was saved, in another process, on the feeds of each part; compare with its outputs.

        Codes of 8 bits may lie a step apart where a float does at its last bit: the share that does is told.

        Raises:
            VerifyError: an output is beyond its bound.
            LowerError: it crashed.
        """
        found = process.run_each([(folder_of(folder, number), feeds) for number, feeds, _ in calls])
        error, steps, codes = 0.0, 0, 0
        for (number, _, expected), outputs in zip(calls, found, strict=True):
            for name, right in expected.items():
                if right.dtype == np.int8:
                    apart = np.abs(outputs[name].astype(int) - right)
                    steps, codes = steps + int((apart > 0).sum()), codes + apart.size
                    off, bound = float(apart.max(initial=0)), 1.0
                else:
                    off, bound = relative_error(outputs[name], right), _BOUND
                    error = max(error, off)
                if not off <= bound:
                    raise VerifyError(
                        Diagnostic(
                            "fpga.host",
                            f"{name!r}, made by part {number} on {self.name}, is off by {off:.1e}"
                            f" (at most {bound:.1e})",
                            help="report this with the model",
                        )
                    )
        return {"error": error, "codes_a_step_apart": steps / codes if codes else 0.0}


class Saved:
    """The parts that :meth:`Compiled.save` wrote, each loaded when it is needed first."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self._loaded: dict[int, runtime.Model] = {}

    def run(self, number: int, feeds: Feeds) -> dict[str, Array]:
        """Outputs of a part, by name, in this process.

        Raises:
            MissingExtraError: TVM's runtime is not installed.
            InputError: a file is missing or damaged, or this CPU lacks instructions.
        """
        if number not in self._loaded:
            _installed()
            try:
                self._loaded[number] = runtime.load(folder_of(self._folder, number))
            except runtime.ArtifactError as error:
                raise InputError(
                    Diagnostic(
                        "fpga.host",
                        f"part {number} of the host, for {self.name}: {error}",
                        help=f"load the artifact with host={REFERENCE!r} to run it without",
                    )
                ) from error
        return self._loaded[number].run(feeds)


def folder_of(folder: Path, number: int) -> Path:
    """Where a part lies in an artifact."""
    return folder / f"host-{number}"


def require(name: str) -> None:
    """Return if ``name`` is a host and what makes its code is installed.

    Raises:
        OptionError: there is no such host.
        MissingExtraError: it is made by TVM, which is not installed.
        LowerError: TVM is there in versions that crash, or no compiler to link with.
    """
    if name not in NAMES:
        raise OptionError(
            Diagnostic(
                "fpga.host",
                f"there is no host {name!r}",
                help=did_you_mean(name, list(NAMES)),
            )
        )
    if name != REFERENCE:
        _installed()
        toolchain.check()
        _linker(name)


def _installed() -> None:
    try:
        toolchain.installed()
    except MissingExtraError as error:
        lacking = error.diagnostics[0].message.partition("(")[2].rstrip(")")
        raise MissingExtraError(
            Diagnostic(
                "extra.missing",
                f"the host's part of an FPGA target needs the 'tvm' extra ({lacking})",
                help="pip install 'netlathe[tvm]', or let ONNX Runtime be the host:"
                f" --set host={REFERENCE}, or host={REFERENCE!r} where an artifact is loaded",
            )
        ) from error


def gaps(name: str, parts: Mapping[int, ir.Model]) -> list[Diagnostic]:
    """Every node of the host's parts that has no form on ``name``."""
    if name == REFERENCE or not parts:
        return []
    return process.gaps_each(list(parts.values()), _machine(name))


def make(name: str, parts: Mapping[int, ir.Model]) -> Reference | Compiled:
    """The host called ``name``.

    Raises:
        LowerError: with all that :func:`gaps` lists.
        OptionError, MissingExtraError: as :func:`require`.
    """
    require(name)
    return Reference(parts) if name == REFERENCE else Compiled(name, parts)


def _machine(name: str) -> Machine:
    return machine("native") if name == X86 else CORES[name.removeprefix("arm-")].machine


def _linker(name: str) -> tuple[str, ...]:
    return (toolchain.compiler(),) if name == X86 else cross.compiler()
