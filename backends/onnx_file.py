"""The ONNX backend: standard operators at opset 17 to 25, checked by ONNX and run before it is done.

An artifact is ``model.onnx`` and, where the weights are large, ``model.onnx.data`` beside it. Saving
is part of the compilation: the file that was written is read back by the ONNX checker and run by ONNX
Runtime, with optimizations off and on, against the IR. The same model gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx_ir as ir
import onnxruntime

from netlathe.backends import opset as opsets
from netlathe.backends import ort_dialect
from netlathe.diagnostics import Diagnostic, LowerError, OptionError, VerifyError
from netlathe.execute import ort, samples
from netlathe.execute.compare import relative_error
from netlathe.ir import coded, weights
from netlathe.pipeline import verification
from netlathe.pipeline.interfaces import Artifact, Backend, Target
from netlathe.pipeline.pass_ import Feeds

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
DIALECT = "onnx-ort"
MANIFEST_KEY = "netlathe.manifest"  # in metadata_props: SHA-256 of the manifest the file came with

# From 25 on ONNX Runtime 1.32 has no kernel for Attention and expands it, all weights dequantized before the
# first product: MiniLM takes 1.1 times as long as at 24.
DEFAULT_OPSET = 24
EXTERNAL_OVER = 64 << 20  # total bytes of weights above which they go to a file of their own
_MOST_INLINE = 1 << 30  # bytes; protobuf holds 2 GiB, and the graph needs some of it
_ALIGNMENT = 4096  # a page: readers map each tensor in place
_INLINE_BYTES = 1024  # smaller tensors stay in the model, where shape inference sees them
_CHUNK = 16 << 20

# max|artifact - IR| as a share of the IR's RMS, by the narrowest float in the graph. Lowered and
# fused forms differ from the IR by rounding alone: 84 ulp of float32, 16 ulp of the half formats.
_BOUNDS = {
    ir.DataType.DOUBLE: 1e-5,
    ir.DataType.FLOAT: 1e-5,
    ir.DataType.FLOAT16: 16 * 2**-10,
    ir.DataType.BFLOAT16: 16 * 2**-7,
}
# With optimizations on, ONNX Runtime reorders sums and uses polynomial erf and tanh.
_OPTIMIZED_FACTOR = 10
# Where activations are rounded to codes, a value half-way between two of them may become the other one:
# integer kernels scale 32-bit sums in float32, and kernels of two opsets (Attention) differ by rounding.
# What one code does to an output depends on the model. So this is asked how far its outputs turn
# (1 - cosine, which grows as the square of the error) where all that it computes is off by up to 64 ulp, with
# which many more codes change; the file may turn them twice as far.
_CODE_ULPS = 64
_MOST_TURNED = 4.0
# By default it also rounds activations to 8 bits where they meet quantized weights. What that costs
# depends on the model, so it is measured and not held to a bound; the file itself is judged without.


class OnnxBackend(Backend):
    """Writes the IR as a standard ONNX model.

    Target settings: ``opset`` (17 to 25) and ``external_over`` (bytes of weights above which they
    are written to ``model.onnx.data``). The target ``onnx-ort`` has ONNX Runtime's own operators for
    quantized weights as well, and ``accuracy_level`` says how these round what they multiply with.
    """

    name = "onnx"

    @classmethod
    def targets(cls) -> Sequence[Target]:
        """``onnx``, opset 24 unless another is set, and ``onnx-ort``."""
        settings = {"opset": DEFAULT_OPSET, "external_over": EXTERNAL_OVER}
        return (
            Target(
                name="onnx",
                backend=cls.name,
                help="standard ONNX, run in ONNX Runtime; settings: opset=17..25, external_over",
                settings=settings,
            ),
            Target(
                name=DIALECT,
                backend=cls.name,
                help="ONNX with ONNX Runtime's operators for quantized weights (MatMulNBits); settings:"
                " opset, external_over, accuracy_level=0 or 1 (products in float32), 4 (in int8)",
                settings={**settings, "accuracy_level": 4},
            ),
        )

    def check(self, target: Target) -> None:
        """Return if the settings are known and within their ranges.

        Raises:
            OptionError: one is not.
        """
        _settings(target)

    def unsupported(self, model: ir.Model, target: Target) -> list[Diagnostic]:
        """Every node that the target's opset cannot express.

        Raises:
            OptionError: a setting is unknown or out of range.
        """
        return opsets.gaps(model, _settings(target).opset)

    def compile(self, model: ir.Model, target: Target) -> OnnxArtifact:
        """Lower a copy of ``model``; weights stay recipes until :meth:`OnnxArtifact.save`.

        Raises:
            LowerError: some nodes have no form at the target's opset; all are listed.
            OptionError: a setting is unknown or out of range.
        """
        settings = _settings(target)
        lowered = model.clone()
        written = None
        if settings.accuracy_level is not None:
            written = ort_dialect.rewrite(lowered, settings.accuracy_level)
        opsets.lower(lowered, settings.opset)
        lowered.producer_name = "netlathe"
        lowered.producer_version = metadata.version("netlathe")
        return OnnxArtifact(lowered, model.clone(), settings, written)


@dataclass(frozen=True)
class _Settings:
    opset: int
    external_over: int
    accuracy_level: int | None = None  # of the dialect only


def _settings(target: Target) -> _Settings:
    defaults = {"opset": DEFAULT_OPSET, "external_over": EXTERNAL_OVER}
    if target.name == DIALECT:
        defaults["accuracy_level"] = 4
    if unknown := sorted(set(target.settings) - set(defaults)):
        raise OptionError(
            Diagnostic(
                "target.setting",
                f"target {target.name} has no setting {', '.join(unknown)}",
                help="known: " + ", ".join(sorted(defaults)),
            )
        )
    values = {**defaults, **target.settings}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise OptionError(
                Diagnostic("target.setting", f"setting {name} must be an integer, got {value!r}")
            )
    if values["opset"] not in opsets.OPSETS:
        low, high = opsets.OPSETS[0], opsets.OPSETS[-1]
        raise OptionError(
            Diagnostic(
                "target.opset",
                f"opset {values['opset']} is out of range",
                help=f"choose an opset from {low} to {high}",
            )
        )
    if not 0 <= values["external_over"] <= _MOST_INLINE:
        raise OptionError(
            Diagnostic(
                "target.setting",
                f"external_over {values['external_over']} is out of range",
                help=f"choose a number of bytes from 0 to {_MOST_INLINE}",
            )
        )
    if values.get("accuracy_level", 0) not in ort_dialect.ACCURACY_LEVELS:
        raise OptionError(
            Diagnostic(
                "target.setting",
                f"accuracy_level {values['accuracy_level']} is none that the CPU provider has",
                help="choose 0 or 1 (products in float32) or 4 (inputs rounded to 8 bits by block)",
            )
        )
    return _Settings(**values)


class OnnxArtifact(Artifact):
    """An ONNX model ready to be written.

    ``model`` is the lowered model. ``sample`` may hold feeds for the check that :meth:`save` makes;
    without, they are synthesized.
    """

    def __init__(
        self,
        model: ir.Model,
        source: ir.Model,
        settings: _Settings,
        written: ort_dialect.Written | None = None,
    ) -> None:
        self.model = model
        self._written = written
        self.sample: Feeds | None = None
        self._source = source  # the IR, which the written file must equal
        self._settings = settings
        self._session: ort.Session | None = None
        self._report: dict[str, Any] = {}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run in ONNX Runtime with its optimizations, as a user of the file would.

        Raises:
            InputError: a feed is missing, unknown or of another dtype or rank.
            RuntimeFailure: ONNX Runtime cannot run the model.
        """
        if self._session is None:
            self._session = ort.Session(self.model, optimize=True, exact=False)
        return self._session.run(feeds)

    def stamp(self, manifest_digest: str) -> None:
        """Record which manifest the file belongs to, in its ``metadata_props``."""
        self.model.metadata_props[MANIFEST_KEY] = manifest_digest

    def report(self) -> dict[str, Any]:
        """What was written and how far it is from the IR; complete once saved.

        ``error_optimizations_off`` and ``_on`` are max|file - IR| / RMS(IR) over all outputs in ONNX
        Runtime, ``bound_*`` what they were held against; where activations are quantized and codes
        change, ``cosine_*`` is held against ``least_cosine_*`` instead. Where weights are quantized,
        ``error_default_settings`` and ``cosine_default_settings`` tell how far a session with default
        settings is off, which rounds activations to 8 bits as well. Where the CPU provider lacks a kernel,
        ``not_run`` says which; the file is then read back and run in the way of
        :mod:`netlathe.execute.ort`, with ``error_read_back``. Of ``onnx-ort``, ``dialect`` counts the
        operators that were written and names the quantized weights that were left in standard form, with
        the reason; errors with optimizations are those at accuracy level 1, and with default
        settings those of the file as it is.
        """
        dialect = {} if self._written is None else {"dialect": dataclasses.asdict(self._written)}
        return {
            "opset": self._settings.opset,
            "ir_version": self.model.ir_version,
            "nodes": sum(1 for _ in self.model.graph.all_nodes()),
            **dialect,
            **self._report,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write into ``folder``, then check and run what was written.

        Peak memory is one weight (all of them where they are small enough to go into the model).

        Raises:
            LowerError: the ONNX checker refuses the file.
            VerifyError: ONNX Runtime cannot run the file, or computes something else from it than
                from the IR.
            OSError: the folder cannot be written, for instance because the disk is full.
        """
        self._session = None
        _check_room(self.model, folder)
        files = [folder / MODEL_FILE]
        model = self.model.clone()
        if weights.num_bytes(model) > self._settings.external_over:
            files.append(folder / DATA_FILE)
            with open(files[1], "xb") as data:
                _externalize(model, data)
        _take_in(model, folder)
        files[0].write_bytes(_serialize(model))
        check_format(files[0])
        self._report = {
            "bytes": sum(file.stat().st_size for file in files),
            **self._compare(files[0]),
        }
        return files

    def _judged(self, file: Path, feeds: Feeds, optimize: bool) -> dict[str, npt.NDArray[Any]]:
        """What the file computes where nothing is rounded that need not be."""
        level = self._settings.accuracy_level
        if not optimize or not level or level == 1:
            return run_file(file, feeds, optimize=optimize)
        return ort.run(ort_dialect.at_level(ir.load(file), 1), feeds, optimize=True)

    def _compare(self, file: Path) -> dict[str, Any]:
        feeds = self.sample
        if feeds is None:
            feeds = samples.synthesize(self._source, samples.dynamic_dims(self._source), seed=0)
        try:
            expected = ort.run(self._source, feeds)
        except ort.RuntimeFailure as error:
            if not lacks_kernel(error):
                raise
            return {"not_run": error.diagnostics[0].message}
        alike = _rounded_alike(self._source, self.model)
        results: dict[str, Any] = {}
        for way in ("optimizations_off", "optimizations_on"):
            optimize = way == "optimizations_on"
            try:
                actual = self._judged(file, feeds, optimize)
            except ort.RuntimeFailure as error:
                if not lacks_kernel(error):
                    raise _failed(file, way, error) from error
                results["not_run"] = error.diagnostics[0].message
                way, optimize = "read_back", False
                actual = ort.run(ir.load(file), feeds)
            if _rounds_activations(self._source):
                results |= _turned(self._source, file, way, actual, expected, feeds)
            else:
                # Its optimizer puts other operators in their place.
                same = () if optimize else alike
                found = compare(
                    self._source, actual, expected, feeds, optimize=optimize, alike=same
                )
                results[f"error_{way}"], results[f"bound_{way}"] = found.error, found.bound
                if not found.error <= found.bound:
                    raise _differs(file, way, found)
            if way == "read_back":
                return results
        if _is_quantized(self._source):
            actual = run_file(file, feeds, optimize=True, exact=False)
            results |= _far(actual, expected, "default_settings")
        return results


def _far(
    actual: Mapping[str, npt.NDArray[Any]],
    expected: Mapping[str, npt.NDArray[Any]],
    way: str,
) -> dict[str, float]:
    """The largest error and the smallest cosine of all outputs."""
    return {
        f"error_{way}": max(relative_error(actual[name], expected[name]) for name in expected),
        f"cosine_{way}": min(_cosine(actual[name], expected[name]) for name in expected),
    }


def _turned(
    model: ir.Model,
    file: Path,
    way: str,
    actual: Mapping[str, npt.NDArray[Any]],
    expected: Mapping[str, npt.NDArray[Any]],
    feeds: Feeds,
) -> dict[str, float]:
    """How far a file is from the IR where both round activations to codes; see :func:`compare`.

    Raises:
        VerifyError: further than codes that change by rounding explain.
    """
    found = _far(actual, expected, way)
    bound = _bound(model) * (_OPTIMIZED_FACTOR if way == "optimizations_on" else 1)
    if found[f"error_{way}"] <= bound:
        return found | {f"bound_{way}": bound}
    moved = verification.disturbed_outputs(model, feeds, _CODE_ULPS)
    least = {
        name: 1 - max(_MOST_TURNED * (1 - _cosine(moved[name], array)), bound**2)
        for name, array in expected.items()
    }
    cosines = {name: _cosine(actual[name], array) for name, array in expected.items()}
    output = min(least, key=lambda name: cosines[name] - least[name])
    if not cosines[output] >= least[output]:
        raise VerifyError(
            Diagnostic(
                "onnx.differs",
                f"output {output!r} of the written file has cosine {cosines[output]:.6f} to the IR's with"
                f" {way.replace('_', ' ')}, at least {least[output]:.6f} where codes change by rounding",
                at=file.name,
                help="choose another opset, and report this with the model",
            )
        )
    return found | {f"cosine_{way}": cosines[output], f"least_cosine_{way}": least[output]}


@dataclass(frozen=True)
class Distance:
    """How far the worst ``output`` is from what it should be, as a share of its RMS."""

    output: str
    error: float
    bound: float


def compare(
    model: ir.Model,
    actual: Mapping[str, npt.NDArray[Any]],
    expected: Mapping[str, npt.NDArray[Any]],
    feeds: Feeds,
    *,
    optimize: bool,
    alike: Collection[str] = (),
) -> Distance:
    """What a file made of ``feeds`` against what ``model``, the IR, makes of them.

    Values named in ``alike``, which the file has to the bit, do not count in how far the model moves.
    """
    factor = _OPTIMIZED_FACTOR if optimize else 1
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    bounds = verification.bounds(
        model,
        errors,
        expected,
        feeds,
        _bound(model) * factor,
        slack=verification.ROUNDINGS * factor,
        alike=alike,
    )
    output = max(errors, key=lambda name: (not errors[name] <= bounds[name], errors[name]))
    return Distance(output, errors[output], bounds[output])


def _differs(file: Path, way: str, found: Distance) -> VerifyError:
    return VerifyError(
        Diagnostic(
            "onnx.differs",
            f"output {found.output!r} of the written file differs from the IR by {found.error:.3g} of"
            f" its RMS with {way.replace('_', ' ')} (bound {found.bound:.3g})",
            at=file.name,
            help="choose another opset, and report this with the model",
        )
    )


def _rounded_alike(model: ir.Model, file: ir.Model) -> set[str]:
    """Values of ``model`` that ``file``, run as it stands, has to the bit.

    Those in half precision are not among them: between its nodes ONNX Runtime leaves their roundings out.
    Nor is what comes of Attention, which is a kernel at one opset and many operators at another.
    """
    halves = {
        value.name
        for node in model.graph
        for value in node.outputs
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    }
    apart = ("Attention",) if model.opset_imports[""] != file.opset_imports[""] else ()
    return verification.computed_alike(model, file, apart) - halves


def _rounds_activations(model: ir.Model) -> bool:
    rounding = ("QuantizeLinear", "DynamicQuantizeLinear", "Round")
    found = any(node.op_type in rounding for node in model.graph.all_nodes())
    return found or bool(coded.coded(model))


def _is_quantized(model: ir.Model) -> bool:
    return any(node.op_type == "DequantizeLinear" for node in model.graph.all_nodes())


def _cosine(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Of the two as vectors; 1 where both are zero."""
    a, e = (array.reshape(-1).astype(np.float64) for array in (actual, expected))
    lengths = float(np.linalg.norm(a) * np.linalg.norm(e))
    return float(a @ e) / lengths if lengths else float(np.array_equal(a, e))


def _check_room(model: ir.Model, folder: Path) -> None:
    """Fail before the first of many gigabytes is written, not with the last."""
    if weights.num_bytes(model) > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder))


def _externalize(model: ir.Model, file: BinaryIO) -> None:
    """Move every large initializer of ``model`` to ``file``, in graph order, page-aligned."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            if tensor.dtype == ir.DataType.STRING:  # only numbers can be external
                continue
            offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.write(b"\0" * (offset - file.tell()))
            _write(tensor, file)
            weights.give_back_tensor(tensor)  # mapped sources, read to be written
            value.const_value = ir.ExternalTensor(
                DATA_FILE,
                offset,
                file.tell() - offset,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=Path(file.name).parent,
            )


def _write(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    """The tensor's bytes in ONNX order; two 4-bit elements share a byte."""
    if tensor.dtype.bitwidth < 8:
        file.write(tensor.tobytes())
        return
    array = np.ascontiguousarray(tensor.numpy())
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    # write() and not tofile(): numpy's error for a full disk does not carry its errno.
    data = little.reshape(-1).view(np.uint8).data
    for start in range(0, len(data), _CHUNK):
        file.write(data[start : start + _CHUNK])


def _take_in(model: ir.Model, folder: Path) -> None:
    """Put into the model itself what is still mapped from the files of its source."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).parent != folder:
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)


def _serialize(model: ir.Model) -> bytes:
    data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return data


def check_format(file: Path) -> None:
    """The ONNX checker with strict shape inference, by path: it also reads models above 2 GB."""
    try:
        onnx.checker.check_model(os.fspath(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LowerError(
            Diagnostic(
                "onnx.checker",
                " ".join(str(error).split()),
                at=file.name,
                help="the ONNX checker refuses the model: report this with the model",
            )
        ) from error


def open_file(
    file: Path, *, optimize: bool, exact: bool = True, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """A session on ``file``, with or without optimizations.

    An ``exact`` one is for judging: it takes as little memory as it can, and computes in the types
    of the graph. Without it weights are packed, and activations rounded to 8 bits where weights are
    quantized, as in an application's session with default settings.

    Raises:
        RuntimeFailure: ONNX Runtime does not take the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors arrive as exceptions
    options.intra_op_num_threads = threads or ort.default_threads()
    options.enable_cpu_mem_arena = False  # memory goes back when a tensor does
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if exact:
        options.add_session_config_entry(ort.ACTIVATIONS, "1")
        # Weights stay mapped from the file instead of being copied into packed form, and are
        # dequantized when they are used, not all of them before.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        return onnxruntime.InferenceSession(
            os.fspath(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's own classes derive from Exception alone
        raise _failure(file, error) from error


def run_file(
    file: Path, feeds: Feeds, *, optimize: bool, exact: bool = True
) -> dict[str, npt.NDArray[Any]]:
    """What ONNX Runtime makes of ``file``, by output name; see :func:`open_file`.

    A file of many weights is run a part at a time, so that memory stays bounded.

    Raises:
        RuntimeFailure: it does not take the file, or fails while running it.
    """
    model = ir.load(file)
    if not ort.fits(model):
        return ort.run(model, feeds, optimize=optimize, exact=exact)
    session = open_file(file, optimize=optimize, exact=exact)
    names = [output.name for output in session.get_outputs()]
    try:
        results: Sequence[Any] = session.run(names, dict(feeds))
    except Exception as error:
        raise _failure(file, error) from error
    return dict(zip(names, results, strict=True))


def _failure(file: Path, error: Exception) -> ort.RuntimeFailure:
    text = " ".join(str(error).split())
    return ort.RuntimeFailure(Diagnostic("run.onnxruntime", text, at=file.name))


def _failed(file: Path, way: str, error: ort.RuntimeFailure) -> VerifyError:
    return VerifyError(
        Diagnostic(
            "onnx.runtime",
            f"ONNX Runtime cannot run the written file with {way.replace('_', ' ')}: "
            + error.diagnostics[0].message,
            at=file.name,
        )
    )


def lacks_kernel(error: ort.RuntimeFailure) -> bool:
    """Whether the model is fine and ONNX Runtime's CPU provider has no kernel for one of its ops."""
    return "NOT_IMPLEMENTED" in str(error)


def _bound(model: ir.Model) -> float:
    dtypes = {value.dtype for node in model.graph.all_nodes() for value in node.outputs}
    return max((_BOUNDS[d] for d in dtypes if d is not None and d in _BOUNDS), default=1e-5)
