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
import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.tvm import build, runtime, storage, toolchain
from netlathe.backends.tvm.lowering import Lowered
from netlathe.backends.tvm.machine import Machine
from netlathe.diagnostics import Diagnostic, InputError, LowerError, VerifyError
from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.pipeline.interfaces import Artifact
from netlathe.pipeline.pass_ import Feeds

LOADER_FILE = "runtime.py"
_COMPILERS = ("g++", "clang++", "c++")
_CHUNK = 16 << 20

# max|artifact - IR| as a share of the RMS, by the narrowest float in the graph: the project's bar for
# float32 (other orders of sums, other polynomials), and 16 ulp of the half formats.
_BOUND = 1e-4
_NARROW = {ir.DataType.FLOAT16: 16 * 2**-10, ir.DataType.BFLOAT16: 16 * 2**-7}


class TvmArtifact(Artifact):
    """A compiled model. It runs in this process; :meth:`save` writes what runs anywhere."""

    def __init__(self, model: ir.Model, lowered: Lowered, machine: Machine) -> None:
        self.lowered = lowered
        self.machine = machine
        self._model = model
        self._manifest = ""
        self._executable = build.executable(lowered, machine)
        self._main: Any = None
        self._parameters: list[Any] = []
        self._report: dict[str, Any] = {}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run once, in this process.

        Raises:
            InputError: a feed is missing, unknown or of another dtype or shape.
            LowerError: this CPU lacks instructions that the kernels use.
        """
        import tvm
        from tvm import relax

        try:
            arrays = runtime.check_feeds(_inputs(self._model), feeds)
        except runtime.ArtifactError as error:
            raise InputError(Diagnostic("run.feeds", str(error))) from error
        if missing := sorted(set(self.machine.features) - runtime.cpu_features()):
            raise LowerError(
                Diagnostic(
                    "tvm.cpu",
                    f"this CPU lacks {', '.join(missing)}, which features={self.machine.level} use",
                    help="save the artifact and run it where it is meant for",
                )
            )
        if self._main is None:
            self._parameters = [tvm.runtime.tensor(p.make()) for p in self.lowered.parameters]
            machine: Any = relax.VirtualMachine  # its annotation names another Device
            self._main = machine(self._executable, tvm.cpu())["main"]
        given = [tvm.runtime.tensor(np.require(array, requirements="C")) for array in arrays]
        results = self._main(*given, *self._parameters)
        return {
            value.name or "": restored(result.numpy(), value.dtype)
            for value, result in zip(self._model.graph.outputs, results, strict=True)
        }

    def stamp(self, manifest_digest: str) -> None:
        """Record which manifest the artifact belongs to, in ``meta.json``."""
        self._manifest = manifest_digest

    def report(self) -> dict[str, Any]:
        """Kernels, bytes, and how far the artifact is from the IR; complete once saved."""
        return {
            "features": self.machine.level,
            "kernels": self.lowered.kernels,
            "parameters": len(self.lowered.parameters),
            **self._report,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write the four files, then load them with the loader and compare with the IR.

        Raises:
            LowerError: there is no C++ compiler to link with.
            VerifyError: the files compute something else than the IR.
            OSError: the folder cannot be written.
        """
        records = self._write_parameters(folder / runtime.PARAMETERS_FILE)
        self._link(folder / runtime.LIBRARY_FILE)
        meta = self._meta(records, (folder / runtime.PARAMETERS_FILE).stat().st_size)
        (folder / runtime.META_FILE).write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        shutil.copyfile(runtime.__file__, folder / LOADER_FILE)
        names = (
            runtime.LIBRARY_FILE,
            runtime.PARAMETERS_FILE,
            runtime.META_FILE,
            LOADER_FILE,
        )
        files = [folder / name for name in names]
        self._report = {
            "bytes": sum(file.stat().st_size for file in files),
            **self._compare(folder),
        }
        return files

    def _write_parameters(self, path: Path) -> list[dict[str, Any]]:
        whole = sum(
            int(np.prod(p.shape)) * np.dtype(p.dtype).itemsize for p in self.lowered.parameters
        )
        if whole > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        records = []
        with open(path, "xb") as file:
            for parameter in self.lowered.parameters:
                offset = -(-file.tell() // runtime.ALIGNMENT) * runtime.ALIGNMENT
                file.write(b"\0" * (offset - file.tell()))
                array = np.require(parameter.make(), requirements="C")
                data = array.reshape(-1).view(np.uint8).data
                for start in range(0, len(data), _CHUNK):
                    file.write(data[start : start + _CHUNK])
                records.append(
                    {
                        "name": parameter.name,
                        "dtype": parameter.dtype,
                        "shape": list(parameter.shape),
                        "offset": offset,
                        "bytes": array.nbytes,
                    }
                )
        return records

    def _link(self, path: Path) -> None:
        compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
        if compiler is None:
            raise LowerError(
                Diagnostic(
                    "tvm.compiler",
                    "linking the kernels needs a C++ compiler, and none is installed",
                    notes=("looked for " + ", ".join(_COMPILERS),),
                    help="install g++ (apt-get install g++)",
                )
            )
        self._executable.export_library(os.fspath(path), cc=compiler)

    def _meta(self, records: list[dict[str, Any]], parameter_bytes: int) -> dict[str, Any]:
        tvm_version, ffi_version = toolchain.installed()
        return {
            "format": runtime.FORMAT,
            "inputs": _inputs(self._model),
            "outputs": [_record(value) for value in self._model.graph.outputs],
            "dims": samples.dynamic_dims(self._model),
            "architecture": platform.machine(),
            "features": self.machine.level,
            "cpu_features": list(self.machine.features),
            "versions": {
                "netlathe": metadata.version("netlathe"),
                "apache-tvm": tvm_version,
                "apache-tvm-ffi": ffi_version,
            },
            "manifest": self._manifest,
            "parameter_bytes": parameter_bytes,
            "parameters": records,
        }

    def _compare(self, folder: Path) -> dict[str, Any]:
        """The error of the files against the IR in ONNX Runtime, or why there is none."""
        if not runtime.cpu_features().issuperset(self.machine.features):
            return {"not_run": f"this CPU lacks features of {self.machine.level}"}
        feeds = self.sample
        if feeds is None:
            feeds = samples.synthesize(self._model, samples.dynamic_dims(self._model), seed=0)
        feeds = {record["name"]: feeds[record["name"]] for record in _inputs(self._model)}
        expected = ort.run(self._model, feeds)
        actual = runtime.load(folder).run(feeds)
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        worst = max(errors, key=lambda name: errors[name])
        bound = self._bound()
        if not errors[worst] <= bound:
            raise VerifyError(
                Diagnostic(
                    "tvm.differs",
                    f"output {worst!r} of the artifact is off by {errors[worst]:.1e} of its RMS"
                    f" (at most {bound:.1e})",
                    help="report this with the model",
                )
            )
        return {"error": errors[worst], "bound": bound}

    def _bound(self) -> float:
        dtypes = {value.dtype for node in self._model.graph.all_nodes() for value in node.outputs}
        return max([_BOUND, *(bound for dtype, bound in _NARROW.items() if dtype in dtypes)])


def restored(array: npt.NDArray[Any], dtype: ir.DataType | None) -> npt.NDArray[Any]:
    """An output in its own numpy type."""
    if dtype is None or array.dtype == dtype.numpy():
        return array
    if dtype.bitwidth < 8 and dtype.is_integer():
        return array.astype(dtype.numpy())
    return array.view(dtype.numpy())


def _inputs(model: ir.Model) -> list[dict[str, Any]]:
    return [_record(value) for value in model.graph.inputs if not value.is_initializer()]


def _record(value: ir.Value) -> dict[str, Any]:
    assert value.dtype is not None
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
    return {
        "name": value.name,
        "dtype": value.dtype.numpy().name,
        "stored": storage.STORED[value.dtype],
        "shape": shape,
    }
