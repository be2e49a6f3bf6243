"""The ARM backend: kernels for one core each, as a library for TVM's runtime or bare, as C without any.

``form="library"`` makes what target tvm-x86 makes (:mod:`netlathe.backends.tvm.artifact`), cross-linked;
dynamic dims stay dynamic. ``form="bare"`` makes a static library (:mod:`netlathe.backends.tvm.arm.artifact`);
every size is a number, which ``dims`` gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from netlathe.backends.tvm import process, toolchain
from netlathe.backends.tvm.arm import cross
from netlathe.backends.tvm.arm.cores import CORES, Core
from netlathe.diagnostics import Diagnostic, OptionError, did_you_mean
from netlathe.execute import samples
from netlathe.ir import normal
from netlathe.pipeline.interfaces import Artifact, Backend, Target

_FORMS = ("library", "bare")
_DEFAULTS: Mapping[str, Any] = {"form": "library", "dims": "", "prefix": "model"}


class ArmBackend(Backend):
    """Generates code for aarch64.

    Target settings: ``form`` is library or bare. For the bare form, ``dims`` gives every dynamic dim its size
    (``batch=1, sequence=128``), and ``prefix`` begins the names of its files and of what they define in C.
    """

    name: ClassVar[str] = "arm"
    gaps_last: ClassVar[bool] = True

    @classmethod
    def targets(cls) -> Sequence[Target]:
        """``arm-cortex-a72``, ``arm-neoverse-n1``, ``arm-neoverse-v1``."""
        return tuple(
            Target(
                f"arm-{core.name}",
                cls.name,
                f"machine code for {core.name} and what has its instructions, run by TVM's runtime, or"
                " with form=bare by none",
                width_multiple=8,  # two vectors of float32
                settings=_DEFAULTS,
            )
            for core in CORES.values()
        )

    def check(self, target: Target) -> None:
        """Return if the settings are known and what compiles is installed.

        Raises:
            OptionError: a setting is unknown or out of range.
            MissingExtraError: TVM is not installed.
            LowerError: it is, in versions that crash, or there is no cross compiler.
        """
        _settings(target)
        toolchain.check()
        cross.compiler()

    def tools(self, target: Target) -> Mapping[str, str]:
        """TVM, its ffi library and the compiler that links."""
        tvm, ffi = toolchain.installed()
        return {"apache-tvm": tvm, "apache-tvm-ffi": ffi, "linker": cross.version()}

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        """Every node that has no form here, and for the bare form every size that is no number.

        Raises:
            OptionError, MissingExtraError, LowerError: as :meth:`check`; a dim has no size.
        """
        self.check(target)
        machine = _core(target).machine
        if _settings(target)["form"] == "library":
            return process.gaps(model, machine)
        return process.bare_gaps(_sized(model, target), machine)

    def compile(self, model: ir.Model, target: Target) -> Artifact:
        """Lower and compile, in a process of its own.

        Raises:
            LowerError: with everything that :meth:`unsupported` lists, or TVM crashed.
            OptionError, MissingExtraError: as :meth:`unsupported`.
        """
        self.check(target)
        settings, core = _settings(target), _core(target)
        if settings["form"] == "library":
            from netlathe.backends.tvm.artifact import TvmArtifact

            # A copy: its weights are read when the artifact is written.
            return TvmArtifact(model.clone(), core.machine, cross.compiler())
        from netlathe.backends.tvm.arm.artifact import BareArtifact

        return BareArtifact(_sized(model, target), core, settings["prefix"])


def _core(target: Target) -> Core:
    return CORES[target.name.removeprefix("arm-")]


def _settings(target: Target) -> dict[str, str]:
    """The settings over the defaults.

    Raises:
        OptionError: one is unknown or out of range.
    """
    if unknown := sorted(set(target.settings) - set(_DEFAULTS)):
        raise _error(
            f"target {target.name} has no setting {', '.join(unknown)}",
            did_you_mean(unknown[0], list(_DEFAULTS)),
        )
    found = {**_DEFAULTS, **target.settings}
    for key, value in found.items():
        if not isinstance(value, str):
            raise _error(f"setting {key} must be text, got {value!r}")
    if found["form"] not in _FORMS:
        raise _error(
            f"there is no form {found['form']!r}", did_you_mean(found["form"], list(_FORMS))
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", found["prefix"]) or found["prefix"] == "main":
        raise _error(
            f"prefix {found['prefix']!r} cannot begin names in C",
            "lower-case letters, digits and _, a letter first, and not main",
        )
    if found["form"] == "library" and found["dims"]:
        raise _error(
            "dims are for form='bare': in a library dynamic dims stay dynamic",
            "leave dims out, or choose form='bare'",
        )
    _sizes(found["dims"])
    return found


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise _error(
                f"dims takes NAME=SIZE with a positive size, got {part!r}",
                "for example dims='batch=1, sequence=128'",
            )
        if name in sizes:
            raise _error(f"dims gives {name} twice")
        sizes[name] = int(size)
    return sizes


def _sized(model: ir.Model, target: Target) -> ir.Model:
    """A copy of ``model`` in which every dim is a number.

    Raises:
        OptionError: a dim has no size, or is not the model's.
    """
    sizes = _sizes(_settings(target)["dims"])
    known = list(samples.dynamic_dims(model))
    if strange := [name for name in sizes if name not in known]:
        raise _error(
            f"the model has no dynamic dim {', '.join(strange)}",
            did_you_mean(strange[0], known) if known else "it has none: leave dims out",
        )
    if open_ := [name for name in known if name not in sizes]:
        raise _error(
            f"form='bare' needs a size for {', '.join(open_)}",
            "for example dims='" + ", ".join(f"{name}=1" for name in known) + "'",
        )
    made = model.clone()
    for value in made.graph.inputs:
        if not value.is_initializer():
            value.shape = ir.Shape(samples.shape_of(value, sizes))
    normal.normalize(made)
    return made


def _error(message: str, help: str = "") -> OptionError:
    return OptionError(Diagnostic("target.setting", message, help=help))
