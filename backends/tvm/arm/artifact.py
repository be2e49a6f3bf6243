"""The bare artifact: a static library with a C entry point, its weights as one file, and nothing else.

====================  ==========================================================================
NAME.h, libNAME.a     what a program includes and links
NAME.weights          the constants: mapped or read, 64 bytes of identity first
NAME.c                the entry point, as it lies compiled in the library: every call, every place
main.c                the model as a program; :meth:`BareArtifact.run` is made of it
meta.json             inputs, outputs, CPU features, versions, digests
====================  ==========================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.backends.tvm import judge, packing, process, runtime, toolchain
from netlathe.backends.tvm.arm import cross, emulator, source
from netlathe.backends.tvm.arm.cores import Core
from netlathe.backends.tvm.artifact import inputs_of, write_constants
from netlathe.diagnostics import Diagnostic, InputError, LowerError
from netlathe.pipeline.interfaces import Artifact
from netlathe.pipeline.pass_ import Feeds

FORMAT = 1


class BareArtifact(Artifact):
    """A compiled model; ``model``, whose sizes are all numbers, must stay as it is.

    Raises:
        LowerError: nodes have no form here, TVM crashed, or there is no cross compiler.
    """

    def __init__(self, model: ir.Model, core: Core, name: str) -> None:
        self.core = core
        self.name = name
        self._model = model
        self._compiler, self._archiver = cross.compiler(), cross.archiver()
        self._program = process.bare(model, core.machine, name)
        self._inputs = source.tensors(inputs_of(model))
        self._outputs = source.tensors(packing.records(model.graph.outputs))
        self._manifest = ""
        self._report: dict[str, Any] = {}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run once, as a program of its own: on this machine if it is one, else in qemu's user mode.

        Raises:
            InputError: a feed is missing, unknown or of another dtype or shape.
            LowerError: nothing here can run it.
        """
        self._require_emulator()
        with tempfile.TemporaryDirectory(prefix="netlathe-") as folder:
            self._write(Path(folder))
            return self._run(Path(folder), feeds)

    def stamp(self, manifest_digest: str) -> None:
        """Record which manifest the artifact belongs to, in ``meta.json``."""
        self._manifest = manifest_digest

    def report(self) -> dict[str, Any]:
        """Kernels, bytes, and how far the artifact is from the IR; complete once saved."""
        return {
            "core": self.core.name,
            "kernels": self._program.kernels,
            "calls": len(self._program.steps),
            "arena_bytes": self._program.arena,
            "tensor_bytes": self._program.tensors,
            **self._report,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write the files, then build the program, run it and compare with the IR, where that can be done.

        Raises:
            LowerError: the cross compiler failed, or the program crashed.
            VerifyError: the program computes something else than the IR.
            OSError: the folder cannot be written.
        """
        files = self._write(folder)
        if emulator.command(self.core) is None:
            checked: dict[str, Any] = {
                "not_run": "this machine is no aarch64, and qemu-aarch64 is not installed"
            }
        else:
            checked = judge.check(
                self._model,
                self._fitting(),
                lambda feeds: self._run(folder, feeds),
                lambda model: BareArtifact(model, self.core, self.name).run,
            )
        self._report = {"bytes": sum(file.stat().st_size for file in files), **checked}
        return files

    def _fitting(self) -> Feeds | None:
        """The sample, if it has the sizes that the artifact was built for."""
        if self.sample is not None:
            sizes = {tensor.name: tensor.shape for tensor in self._inputs}
            if all(np.shape(self.sample[name]) == shape for name, shape in sizes.items()):
                return self.sample
        return None

    def _require_emulator(self) -> None:
        if emulator.command(self.core) is None:
            raise LowerError(
                Diagnostic(
                    "tvm.cpu",
                    f"the code is for {self.core.name}, and nothing here can run it",
                    help="save the artifact and run it where it is meant for, or install qemu"
                    " (apt-get install qemu-user)",
                )
            )

    def _write(self, folder: Path) -> list[Path]:
        weights = folder / f"{self.name}.weights"
        offsets, digest = self._write_weights(weights)
        texts = source.Source(
            self.name,
            self.core.name,
            self.core.features,
            self._inputs,
            self._outputs,
            self._program,
            offsets,
            weights.stat().st_size,
            digest,
        )
        (folder / f"{self.name}.h").write_text(texts.header(), "utf-8")
        (folder / f"{self.name}.c").write_text(texts.entry(), "utf-8")
        (folder / "main.c").write_text(texts.main(), "utf-8")
        library = folder / f"lib{self.name}.a"
        self._archive(folder, library)
        files = [folder / f"{self.name}.h", library, weights, folder / f"{self.name}.c"]
        meta = {
            "format": FORMAT,
            "core": self.core.name,
            "cpu_features": list(self.core.features),
            "inputs": inputs_of(self._model),
            "outputs": packing.records(self._model.graph.outputs),
            "arena_bytes": self._program.arena,
            "versions": {
                "netlathe": metadata.version("netlathe"),
                "apache-tvm": toolchain.installed()[0],
                "compiler": cross.version(),
            },
            "manifest": self._manifest,
            "sha256": {file.name: _digest(file).hex() for file in files},
        }
        (folder / runtime.META_FILE).write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        return [*files, folder / "main.c", folder / runtime.META_FILE]

    def _write_weights(self, path: Path) -> tuple[tuple[int, ...], bytes]:
        """Where each constant begins, and the SHA-256 of all that comes behind the first 64 bytes."""
        with open(path, "xb") as file:
            file.write(b"\0" * source.HEADER)
            offsets = write_constants(
                file, self._program.parameters, packing.constants(self._model)
            )
        with open(path, "r+b") as file:
            file.seek(source.HEADER)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0)
            file.write(source.MAGIC + digest)
        return tuple(offsets), digest

    def _archive(self, folder: Path, library: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="netlathe-") as name:
            kernels, entry = Path(name) / "kernels.o", Path(name) / "entry.o"
            kernels.write_bytes(self._program.object)
            text = str(folder / f"{self.name}.c")
            # A path in the object would make the same model give other bytes elsewhere.
            flags = ["-O2", "-g0", f"-ffile-prefix-map={folder}=."]
            toolchain.run([*self._compiler, *flags, "-c", text, "-o", str(entry)])
            toolchain.run([*self._archiver, "rcsD", str(library), str(kernels), str(entry)])

    def _run(self, folder: Path, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Build ``main.c`` and run it in a folder of its own."""
        try:
            arrays = runtime.check_feeds(inputs_of(self._model), feeds)
        except runtime.ArtifactError as error:
            raise InputError(Diagnostic("run.feeds", str(error))) from error
        with tempfile.TemporaryDirectory(prefix="netlathe-") as name:
            made = build_program(folder, self.name, Path(name))
            done = run_program(
                self.core,
                made,
                folder / f"{self.name}.weights",
                self._inputs,
                self._outputs,
                arrays,
            )
            if isinstance(done, dict):
                return {
                    record["name"]: runtime.restored(done[record["name"]], record["dtype"])
                    for record in packing.records(self._model.graph.outputs)
                }
        if done.returncode == 2:
            raise LowerError(Diagnostic("tvm.cpu", done.stderr.strip()))
        raise LowerError(
            Diagnostic(
                "tvm.crash",
                f"the program ended with exit code {done.returncode}",
                notes=tuple(f"it printed: {line}" for line in done.stderr.splitlines()),
                help="report this with the model; target onnx does not use TVM",
            )
        )


def build_program(folder: Path, name: str, scratch: Path) -> Path:
    """The program of ``main.c``, linked statically into ``scratch``."""
    made = scratch / name
    command = [*cross.compiler(), "-O2", "-static", str(folder / "main.c")]
    if "zig" in os.path.basename(command[0]):  # its glibc cannot be linked statically
        command = [part.replace("linux-gnu.2.28", "linux-musl") for part in command]
    toolchain.run([*command, str(folder / f"lib{name}.a"), "-lm", "-o", str(made)])
    return made


def run_program(
    core: Core,
    program: Path,
    weights: Path,
    inputs: tuple[source.Tensor, ...],
    outputs: tuple[source.Tensor, ...],
    arrays: list[npt.NDArray[Any]],
) -> dict[str, npt.NDArray[Any]] | subprocess.CompletedProcess[str]:
    """Outputs by name, as they lie in memory; or the process that failed."""
    with tempfile.TemporaryDirectory(prefix="netlathe-") as name:
        folder = Path(name)
        for tensor, array in zip(inputs, arrays, strict=True):
            np.require(array, requirements="C").tofile(folder / f"in_{tensor.c_name}")
        names = [f"in_{t.c_name}" for t in inputs], [f"out_{t.c_name}" for t in outputs]
        files = [str(folder / item) for group in names for item in group]
        done = emulator.run(core, [str(program), str(weights), *files])
        if done.returncode:
            return done
        return {
            t.name: np.fromfile(folder / f"out_{t.c_name}", np.dtype(t.dtype)).reshape(t.shape)
            for t in outputs
        }


def _digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
