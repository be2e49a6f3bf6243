"""The torch backend: a module to fine-tune in memory, and on disk a program that torch alone runs.

An artifact is one file, ``model.pt2``: the graph of ATen ops as JSON and the weights as raw bytes, in
a zip archive without a pickle in it. To run it:

    program = torch.export.load("model.pt2")
    outputs = program.module()(input_ids=..., attention_mask=...)   # a dict by output name

which needs torch, of the version that wrote it or a newer one, and not NetLathe. ``program.state_dict``
holds the weights under their own names.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from netlathe.diagnostics import Diagnostic, InputError, LowerError, VerifyError
from netlathe.execute import plan, samples
from netlathe.execute.compare import relative_error
from netlathe.execute.fx import argument_name, to_fx
from netlathe.execute.torch_ops import storage
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import location
from netlathe.pipeline.interfaces import Artifact, Backend, Target
from netlathe.pipeline.pass_ import Feeds

MODEL_FILE = "model.pt2"

# torch.export follows one path: it cannot keep a choice that depends on data.
_NOT_EXPORTABLE = ("If", "Loop")
_RECURRENT = ("GRU", "LSTM", "RNN")  # loops over the steps of a sequence
# max|program - module| as a share of the RMS: the same ATen ops on the same machine, so only what
# export decomposes may round differently (84 ulp of float32).
_BOUND = 1e-5
# The narrow types have 10 and 7 mantissa bits: 16 ulp.
_NARROW_BOUND = {ir.DataType.FLOAT16: 16 * 2**-10, ir.DataType.BFLOAT16: 16 * 2**-7}
# The size of an unnamed dim while exporting; 0 and 1 would be taken for constants.
_UNNAMED_SIZE = 4
_CHUNK = 16 << 20


class TorchBackend(Backend):
    """Emits the IR as a ``torch.fx`` module and an exported program."""

    name: ClassVar[str] = "torch"

    @classmethod
    def targets(cls) -> Sequence[Target]:
        """One target: torch on any device."""
        return [Target("torch", "torch", "a torch.export program (.pt2) for torch on any device")]

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        """Nodes without a torch function, and control flow or steps that no exported program can hold."""
        found = plan.gaps(model)
        for node in model.graph:
            if node.domain == "" and node.op_type in _NOT_EXPORTABLE:
                found.append(
                    Diagnostic(
                        "torch.control_flow",
                        f"{node.op_type} depends on data, and torch.export keeps one path only",
                        at=show_node(node),
                        where=location(node),
                        help="run the model with the executor, or export it to ONNX",
                    )
                )
            elif node.domain == "" and node.op_type in _RECURRENT and _steps(node) is None:
                found.append(
                    Diagnostic(
                        "torch.recurrence",
                        f"{node.op_type} over any number of steps: torch.export writes out every step",
                        at=show_node(node),
                        where=location(node),
                        help="give the sequence a fixed length, or export the model to ONNX",
                    )
                )
        return found

    def compile(self, model: ir.Model, target: Target) -> TorchArtifact:
        """Emit, export, and compare the program with the module on sample inputs.

        Raises:
            LowerError: with everything that :meth:`unsupported` lists, or with torch's reason.
            VerifyError: the program computes something else than the module.
        """
        if found := self.unsupported(model, target):
            raise LowerError(found)
        module = to_fx(model)
        artifact = TorchArtifact(model, module, _export(model, module))
        _compare(model, artifact)
        return artifact


class TorchArtifact(Artifact):
    """``module`` is a ``torch.fx.GraphModule`` with trainable parameters; ``program`` is what is saved.

    The program has the weights as they were at compilation.
    """

    def __init__(
        self,
        model: ir.Model,
        module: torch.fx.GraphModule,
        program: torch.export.ExportedProgram,
    ) -> None:
        self.module = module
        self.program = program
        self._inputs = {value.name or "": value for value in _inputs(model)}
        self._outputs = {value.name or "": value.dtype for value in model.graph.outputs}
        self._runnable = program.module()

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run the program once, on the CPU.

        Raises:
            InputError: a feed is missing, unknown or of another dtype or shape.
        """
        arrays = {name: np.asarray(array) for name, array in feeds.items()}
        _check_feeds(self._inputs, arrays)
        given = {argument_name(name): storage.from_numpy(a) for name, a in arrays.items()}
        with torch.no_grad():
            results = self._runnable(**given)
        return {
            name: storage.to_numpy(results[name], dtype) for name, dtype in self._outputs.items()
        }

    def save(self, folder: Path) -> list[Path]:
        """Write ``model.pt2``.

        Raises:
            OSError: the folder cannot be written, for instance because the disk is full.
        """
        path = folder / MODEL_FILE
        with tempfile.TemporaryDirectory(dir=folder) as part:
            with open(Path(part, MODEL_FILE), "wb") as file:
                sink = _Sink(file)
                torch.export.save(self.program, cast(IO[bytes], sink))
                if sink.error is not None:
                    raise sink.error
            _copy_archive(Path(part, MODEL_FILE), path)
        return [path]


def _check_feeds(inputs: Mapping[str, ir.Value], feeds: Mapping[str, npt.NDArray[Any]]) -> None:
    problems = [f"there is no input named {name!r}" for name in feeds if name not in inputs]
    problems += [f"input {name!r} is missing" for name in inputs if name not in feeds]
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in inputs.items():
        if name not in feeds:
            continue
        array, dims = feeds[name], list(value.shape or ())
        if value.dtype is not None and array.dtype != value.dtype.numpy():
            problems.append(f"input {name!r} is {array.dtype}, not {value.dtype.numpy()}")
        if value.shape is not None and array.ndim != len(dims):
            problems.append(f"input {name!r} has {array.ndim} dims, not {len(dims)}")
            continue
        for axis, (size, dim) in enumerate(zip(array.shape, dims, strict=False)):
            where = f"axis {axis} of input {name!r}"
            if isinstance(dim, int):
                if size != dim:
                    problems.append(f"{where} is {size}, not {dim}")
            elif dim.value is not None:
                before, other = sizes.setdefault(str(dim), (size, where))
                if size != before:
                    problems.append(f"{where} is {size}, but {other} is {before}: both are {dim}")
    if problems:
        names = ", ".join(inputs)
        raise InputError(
            Diagnostic("run.feeds", "; ".join(sorted(problems)), help=f"the inputs are {names}")
        )


class _Sink(io.BufferedIOBase):
    """Where torch's archive writer writes to.

    That writer ends the whole process when a write fails (a destructor throws), so it is never told:
    after the first error the rest is swallowed, and ``error`` is for whoever waits for the archive.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.error: OSError | None = None
        self._file = file

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """Torch turns to the start when it is done."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Turn to ``offset``."""
        return self._file.seek(offset, whence) if self.error is None else 0

    def write(self, data: Any) -> int:
        """Take everything."""
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


def _inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that the module takes: those without a default value."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _steps(node: ir.Node) -> int | None:
    """How many steps a recurrent node takes; None where that is dynamic or unknown."""
    data = node.inputs[0]
    if data is None or data.shape is None:
        return None
    size = data.shape[1 if node.attributes.get_int("layout", 0) else 0]
    return size if isinstance(size, int) else None


def _export(model: ir.Model, module: torch.fx.GraphModule) -> torch.export.ExportedProgram:
    sizes = samples.dynamic_dims(model)
    examples: dict[str, torch.Tensor] = {}
    dynamic: dict[str, dict[int, Any]] = {}
    for value in _inputs(model):
        name = argument_name(value.name or "")
        shape = list(samples.shape_of(value, sizes))
        dynamic[name] = {}
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                dynamic[name][axis] = torch.export.Dim.DYNAMIC
                shape[axis] = shape[axis] if dim.value is not None else _UNNAMED_SIZE
        assert value.dtype is not None
        examples[name] = torch.zeros(shape, dtype=storage.TORCH_DTYPE[value.dtype])
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, (), examples, dynamic_shapes=dynamic, strict=False
            )
    except Exception as error:  # whatever torch says, it is the reason
        first_line = str(error).strip().split("\n", 1)[0]
        raise LowerError(
            Diagnostic(
                "torch.export",
                f"torch.export cannot capture the model: {first_line}",
                help="netlathe.execute.symbolic.check_symbolic(model) names the node, if a size is"
                " baked in",
            )
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("from_node", None)  # it names functions by their address
    return program


def _copy_archive(source: Path, target: Path) -> None:
    """Copy a .pt2 archive without its example inputs, the one pickle in it, and without its random id.

    torch reads an empty entry as "no examples" and does without the id. Times are fixed as well: the
    same program is the same bytes.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            if entry.filename.endswith("/serialization_id"):
                continue
            info = zipfile.ZipInfo(entry.filename)
            with new.open(info, "w", force_zip64=True) as out:
                if "/sample_inputs/" not in entry.filename:
                    with old.open(entry) as data:
                        shutil.copyfileobj(data, out, _CHUNK)


def _compare(model: ir.Model, artifact: TorchArtifact) -> None:
    feeds = {
        name: array
        for name, array in samples.synthesize(model, {}, 0).items()
        if name in {value.name for value in _inputs(model)}
    }
    actual = artifact.run(feeds)
    given = {argument_name(name): storage.from_numpy(array) for name, array in feeds.items()}
    with torch.no_grad():
        expected = artifact.module(**given)
    dtypes = {v.dtype for v in (*model.graph.inputs, *model.graph.initializers.values())}
    bound = max([_BOUND, *(limit for dtype, limit in _NARROW_BOUND.items() if dtype in dtypes)])
    for value in model.graph.outputs:
        name = value.name or ""
        error = relative_error(actual[name], storage.to_numpy(expected[name], value.dtype))
        if error > bound:
            raise VerifyError(
                Diagnostic(
                    "torch.differs",
                    f"output {name!r} of the exported program is off by {error:.1e} of its RMS"
                    f" (at most {bound:.1e})",
                )
            )
