"""The CUDA backend: the TVM backend's op table, with kernels for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from netlathe.backends.tvm import process, toolchain
from netlathe.backends.tvm.cuda import toolkit
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, Gpu, gpu
from netlathe.diagnostics import Diagnostic, OptionError
from netlathe.pipeline.interfaces import Backend, Target

if TYPE_CHECKING:
    from netlathe.backends.tvm.cuda.artifact import CudaArtifact


class CudaBackend(Backend):
    """Generates machine code for NVIDIA GPUs; needs nvcc and no GPU.

    Target setting: ``archs``, a comma-separated list of architectures that the artifact holds code for.
    """

    name: ClassVar[str] = "cuda"
    gaps_last: ClassVar[bool] = True

    @classmethod
    def targets(cls) -> Sequence[Target]:
        """``cuda-sm80``, ``cuda-sm86``, ``cuda-sm89``, ``cuda-sm90``."""
        return tuple(
            Target(
                f"cuda-sm{capability}",
                cls.name,
                f"machine code for NVIDIA GPUs of compute capability {capability / 10}, run by TVM's"
                f" runtime; settings: archs={arch} (a comma-separated list)",
                width_multiple=64,  # a tile of a matrix product is a multiple of that
                settings={"archs": arch},
            )
            for arch, (capability, _) in ARCHITECTURES.items()
        )

    def check(self, target: Target) -> None:
        """Return if the architectures are known and what compiles is installed.

        Raises:
            OptionError: a setting is unknown or out of range.
            MissingExtraError: TVM is not installed.
            LowerError: it is, in versions that crash; there is no nvcc, or one that does not know an
                architecture; or there is no C++ compiler to link with.
        """
        machine = _machine(target)
        toolchain.check()
        toolchain.compiler()
        toolkit.check_archs(machine.archs)
        toolkit.cudart()

    def tools(self, target: Target) -> Mapping[str, str]:
        """TVM, its ffi library, nvcc, the compiler that links, and the architectures."""
        tvm, ffi = toolchain.installed()
        return {
            "apache-tvm": tvm,
            "apache-tvm-ffi": ffi,
            "nvcc": toolkit.version(),
            "linker": toolchain.compiler_version(),
            "archs": ",".join(_machine(target).archs),
        }

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        """Every node that has no form here, found by lowering the model in a process of its own.

        Raises:
            OptionError, MissingExtraError, LowerError: as :meth:`check`.
        """
        self.check(target)
        return process.gaps(model, _machine(target))

    def compile(self, model: ir.Model, target: Target) -> CudaArtifact:
        """Lower and compile, in a process of its own.

        Raises:
            LowerError: with everything that :meth:`unsupported` lists, nvcc refused a kernel, or TVM crashed.
            OptionError, MissingExtraError: as :meth:`check`.
        """
        self.check(target)
        from netlathe.backends.tvm.cuda.artifact import CudaArtifact

        # A copy: its weights are read when the artifact is written.
        return CudaArtifact(model.clone(), _machine(target))


def _machine(target: Target) -> Gpu:
    defaults: dict[str, Any] = next(
        dict(known.settings) for known in CudaBackend.targets() if known.name == target.name
    )
    if unknown := sorted(set(target.settings) - set(defaults)):
        raise OptionError(
            Diagnostic(
                "target.setting",
                f"target {target.name} has no setting {', '.join(unknown)}",
                help="known: " + ", ".join(sorted(defaults)),
            )
        )
    archs = {**defaults, **target.settings}["archs"]
    if not isinstance(archs, str):
        raise OptionError(
            Diagnostic("target.setting", f"setting archs must be names with commas, got {archs!r}")
        )
    return gpu([name.strip() for name in archs.split(",") if name.strip()])
