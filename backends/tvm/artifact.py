"""The artifact: a library, its constants beside it, a description, and the loader that runs them.

====================  ==========================================================================
model.so              the kernels and the program that calls them
params.bin            the constants, packed for the kernels, each at a multiple of 64 bytes
meta.json             inputs, outputs, dims, CPU features, versions, where each constant lies
runtime.py            the loader: a copy of :mod:`netlathe.backends.tvm.runtime`
====================  ==========================================================================
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import roofline
from netlathe.backends.tvm import judge, packing, process, runtime, toolchain
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.packing import Built, Parameter
from netlathe.diagnostics import Diagnostic, InputError, LowerError
from netlathe.execute import ort, samples
from netlathe.pipeline.interfaces import Artifact
from netlathe.pipeline.pass_ import Feeds

LOADER_FILE = "runtime.py"
# Bytes of a huge page. Linux caches what is written in one piece as one piece, and maps it by one entry: a
# weight that a product reads once is else read at half the speed of memory, as each 4 KiB have theirs.
PAGE = 2 << 20


class TvmArtifact(Artifact):
    """A compiled model. It runs in this process; :meth:`save` writes what runs anywhere.

    The library is made at once, by :mod:`netlathe.backends.tvm.process`; constants are packed when they
    are needed, so ``model`` must stay as it is.

    Raises:
        LowerError: nodes have no form here, or TVM crashed.
    """

    def __init__(
        self,
        model: ir.Model,
        machine: Machine,
        linker: tuple[str, ...] | None = None,
        *,
        compiled: _Compiled | None = None,
    ) -> None:
        self.machine = machine
        self._linker = linker
        self._model = model
        self._manifest = ""
        self._compiled = compiled or _compile([model], machine, linker)[0]
        self._library, self._built = self._compiled.library, self._compiled.built
        self._loaded: runtime.Model | None = None
        self._report: dict[str, Any] = {}

    @classmethod
    def each(
        cls, models: Sequence[ir.Model], machine: Machine, linker: tuple[str, ...] | None = None
    ) -> list[TvmArtifact]:
        """One of every model, compiled by one process.

        Raises:
            LowerError: nodes have no form here, of whichever model, or TVM crashed.
        """
        made = _compile(models, machine, linker)
        return [
            cls(model, machine, linker, compiled=compiled)
            for model, compiled in zip(models, made, strict=True)
        ]

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run once, in this process.

        Raises:
            InputError: a feed is missing, unknown or of another dtype or shape.
            LowerError: this CPU lacks instructions that the kernels use.
        """
        if lack := self.lack():
            raise LowerError(
                Diagnostic(
                    "tvm.cpu", lack, help="save the artifact and run it where it is meant for"
                )
            )
        if self._loaded is None:
            constants = packing.constants(self._model)
            made = [parameter.recipe.make(constants) for parameter in self._built.parameters]
            meta = self._meta([], 0)
            runtime.start_threads(ort.default_threads())
            self._loaded = runtime.Model(meta, self._library, made)
        try:
            return self._loaded.run(feeds)
        except runtime.ArtifactError as error:
            raise InputError(Diagnostic("run.feeds", str(error))) from error

    def lack(self) -> str:
        """Why this machine cannot run the kernels; empty if it can."""
        if platform.machine() != self.machine.architecture:
            return f"the code is for {self.machine.architecture}, and this is {platform.machine()}"
        if missing := sorted(set(self.machine.features) - runtime.cpu_features()):
            return f"this CPU lacks {', '.join(missing)}, which features={self.machine.level} use"
        return ""

    def stamp(self, manifest_digest: str) -> None:
        """Record which manifest the artifact belongs to, in ``meta.json``."""
        self._manifest = manifest_digest

    def report(self) -> dict[str, Any]:
        """Kernels, bytes, and how far the artifact is from the IR; complete once saved."""
        return {
            "features": self.machine.level,
            "kernels": self._built.kernels,
            "parameters": len(self._built.parameters),
            **self._report,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write the files, then load them with the loader, in another process, and compare with the IR.

        Raises:
            LowerError: the kernels crashed.
            VerifyError: the files compute something else than the IR.
            OSError: the folder cannot be written.
        """
        files = self.write(folder)
        self._report = {
            "bytes": sum(file.stat().st_size for file in files),
            **self._compare(folder),
        }
        return files

    def write(self, folder: Path) -> list[Path]:
        """Write the files, and compare nothing.

        Raises:
            OSError: the folder cannot be written.
        """
        records = self._write_parameters(folder / runtime.PARAMETERS_FILE)
        shutil.copyfile(self._library, folder / runtime.LIBRARY_FILE)
        meta = self._meta(records, (folder / runtime.PARAMETERS_FILE).stat().st_size)
        for name in (runtime.LIBRARY_FILE, runtime.PARAMETERS_FILE):
            with open(folder / name, "rb") as file:
                meta["sha256"][name] = hashlib.file_digest(file, "sha256").hexdigest()
        (folder / runtime.META_FILE).write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        shutil.copyfile(runtime.__file__, folder / LOADER_FILE)
        names = (
            runtime.LIBRARY_FILE,
            runtime.PARAMETERS_FILE,
            runtime.META_FILE,
            LOADER_FILE,
        )
        return [folder / name for name in names]

    def _write_parameters(self, path: Path) -> list[dict[str, Any]]:
        whole = sum(
            int(np.prod(p.shape)) * np.dtype(p.dtype).itemsize for p in self._built.parameters
        )
        if whole > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        with open(path, "xb", buffering=PAGE) as file:
            offsets = write_constants(file, self._built.parameters, packing.constants(self._model))
        return [
            {
                "name": parameter.name,
                "dtype": parameter.dtype,
                "shape": list(parameter.shape),
                "offset": offset,
                "bytes": int(np.prod(parameter.shape)) * np.dtype(parameter.dtype).itemsize,
            }
            for parameter, offset in zip(self._built.parameters, offsets, strict=True)
        ]

    def _meta(self, records: list[dict[str, Any]], parameter_bytes: int) -> dict[str, Any]:
        tvm_version, ffi_version = toolchain.installed()
        work = roofline.work(self._model)
        return {
            "format": runtime.FORMAT,
            "inputs": inputs_of(self._model),
            "outputs": packing.records(self._model.graph.outputs),
            "in_place": dict(self._built.in_place),
            "dims": samples.dynamic_dims(self._model),
            "architecture": self.machine.architecture,
            "features": self.machine.level,
            "cpu_features": list(self.machine.features),
            "versions": {
                "netlathe": metadata.version("netlathe"),
                "apache-tvm": tvm_version,
                "apache-tvm-ffi": ffi_version,
            },
            "work": None if work is None else work.to_json(),
            "manifest": self._manifest,
            "sha256": {},
            "parameter_bytes": parameter_bytes,
            "parameters": records,
        }

    def _compare(self, folder: Path) -> dict[str, Any]:
        """The error of the files against the IR in ONNX Runtime, or why there is none."""
        if lack := self.lack():
            return {"not_run": lack}
        return judge.check(
            self._model, self.sample, lambda feeds: process.run(folder, feeds), self._tell
        )

    def _tell(self, model: ir.Model) -> Callable[[Feeds], Feeds]:
        """What runs ``model``, which tells its codes, in a worker as well."""

        def run(feeds: Feeds) -> Feeds:
            with tempfile.TemporaryDirectory(prefix="netlathe-") as folder:
                self.like(model).write(Path(folder))
                return process.run(Path(folder), feeds)

        return run

    def like(self, model: ir.Model) -> TvmArtifact:
        """An artifact of another model for the same machine."""
        return TvmArtifact(model, self.machine, self._linker)


@dataclass(frozen=True)
class _Compiled:
    """A library in a folder that lives as long as this does."""

    scratch: tempfile.TemporaryDirectory[str]
    built: Built

    @property
    def library(self) -> Path:
        """The file."""
        return Path(self.scratch.name) / runtime.LIBRARY_FILE


def _compile(
    models: Sequence[ir.Model], machine: Machine, linker: tuple[str, ...] | None
) -> list[_Compiled]:
    scratch = [tempfile.TemporaryDirectory[str](prefix="netlathe-") for _ in models]
    libraries = [Path(folder.name) / runtime.LIBRARY_FILE for folder in scratch]
    built = process.build_each(models, machine, libraries, linker or (toolchain.compiler(),))
    return [_Compiled(*made) for made in zip(scratch, built, strict=True)]


def write_constants(
    file: BinaryIO, parameters: Sequence[Parameter], constants: Mapping[str, ir.TensorProtocol]
) -> list[int]:
    """Write every parameter, at a multiple of 64 bytes each; where they begin.

    A file that was empty and has a buffer of :data:`PAGE` bytes is written page by page.
    """
    offsets = []
    for parameter in parameters:
        offset = -(-file.tell() // runtime.ALIGNMENT) * runtime.ALIGNMENT
        file.write(b"\0" * (offset - file.tell()))
        array = np.require(parameter.recipe.make(constants), requirements="C")
        data = array.reshape(-1).view(np.uint8).data
        start = 0
        while start < len(data):
            end = start + PAGE - file.tell() % PAGE
            file.write(data[start:end])
            start = end
        offsets.append(offset)
    return offsets


def inputs_of(model: ir.Model) -> list[dict[str, Any]]:
    """The graph's inputs as ``meta.json`` describes them."""
    return packing.records(value for value in model.graph.inputs if not value.is_initializer())
