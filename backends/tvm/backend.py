"""The TVM backend: kernels of our own in a library that runs without NetLathe.

An artifact is a folder (see :mod:`netlathe.backends.tvm.artifact`) that needs TVM's runtime library
and its ffi package, 6 MB together. Dynamic dims stay dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from netlathe.backends.tvm import process, toolchain
from netlathe.backends.tvm.machine import Machine, machine
from netlathe.diagnostics import Diagnostic, OptionError, did_you_mean
from netlathe.pipeline.interfaces import Backend, Target

if TYPE_CHECKING:
    from netlathe.backends.tvm.artifact import TvmArtifact

_DEFAULTS: dict[str, Any] = {"features": "native"}


class TvmBackend(Backend):
    """Generates code for x86-64.

    Target setting: ``features``, the instructions that kernels may use: ``avx2``, ``avx512``,
    ``avx512vnni``, or ``native`` for the best of them that this CPU has.
    """

    name: ClassVar[str] = "tvm"
    gaps_last: ClassVar[bool] = True

    @classmethod
    def targets(cls) -> Sequence[Target]:
        """``tvm-x86``."""
        return (
            Target(
                "tvm-x86",
                cls.name,
                "machine code for x86-64 CPUs, run by TVM's runtime;"
                " settings: features=native, avx2, avx512 or avx512vnni",
                width_multiple=16,  # one vector of float32
                settings=_DEFAULTS,
            ),
        )

    def check(self, target: Target) -> None:
        """Return if the settings are known and what compiles is installed.

        Raises:
            OptionError: a setting is unknown or out of range.
            MissingExtraError: TVM is not installed.
            LowerError: it is, in versions that crash, or there is no C++ compiler to link with.
        """
        _machine(target)
        toolchain.check()
        toolchain.compiler()

    def tools(self, target: Target) -> Mapping[str, str]:
        """TVM, its ffi library and the compiler that links, and the CPU features of the target."""
        tvm, ffi = toolchain.installed()
        return {
            "apache-tvm": tvm,
            "apache-tvm-ffi": ffi,
            "linker": toolchain.compiler_version(),
            "features": _machine(target).level,
        }

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        """Every node that has no form here, found by lowering the model in a process of its own.

        Raises:
            OptionError, MissingExtraError, LowerError: as :meth:`check`.
        """
        self.check(target)
        return process.gaps(model, _machine(target))

    def compile(self, model: ir.Model, target: Target) -> TvmArtifact:
        """Lower and compile, in a process of its own.

        Raises:
            LowerError: with everything that :meth:`unsupported` lists, or TVM crashed.
            OptionError, MissingExtraError: as :meth:`check`.
        """
        self.check(target)
        from netlathe.backends.tvm.artifact import TvmArtifact

        # A copy: its weights are read when the artifact is written.
        return TvmArtifact(model.clone(), _machine(target))


def _machine(target: Target) -> Machine:
    if unknown := sorted(set(target.settings) - set(_DEFAULTS)):
        raise OptionError(
            Diagnostic(
                "target.setting",
                f"target {target.name} has no setting {', '.join(unknown)}",
                help=did_you_mean(unknown[0], list(_DEFAULTS)),
            )
        )
    level = {**_DEFAULTS, **target.settings}["features"]
    if not isinstance(level, str):
        raise OptionError(
            Diagnostic("target.setting", f"setting features must be a name, got {level!r}")
        )
    return machine(level)
