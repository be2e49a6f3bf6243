"""Reads an ONNX file of opset 7 to 25, its external data mapped, and brings it to the IR's opset.

Nothing outside the file's own folder is ever read: a model file is data from someone else.

    OnnxFile().capture("resnet.onnx")
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import google.protobuf.message
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from netlathe.diagnostics import Diagnostic, InputError, OptionError
from netlathe.execute import ort, samples
from netlathe.frontends.compare import Original
from netlathe.frontends.exporter_metadata import condense
from netlathe.frontends.finish import finish
from netlathe.frontends.finite import check_finite
from netlathe.frontends.onnx_opset import NEWEST, raise_opset
from netlathe.ir import dims, normal, weights
from netlathe.pipeline import verification
from netlathe.pipeline.interfaces import Captured, Frontend
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Feeds

MAX_PROTO = (1 << 31) - 1  # bytes; protobuf's own limit, larger models keep weights beside the file


class OnnxFile(Frontend):
    """An ``.onnx`` file, with or without external data.

    ``sizes`` are those of dynamic dims to work at (``{"batch": 1}``), ``fixed`` those of dims that are to
    have one size only: exporters declare dims dynamic that the graph holds a number for.
    """

    name: ClassVar[str] = "onnx_file"

    def __init__(
        self, sizes: Mapping[str, int] | None = None, fixed: Mapping[str, int] | None = None
    ) -> None:
        self.sizes = _checked("sizes", sizes or {})
        self.fixed = _checked("fixed", fixed or {})
        for name in self.sizes.keys() & self.fixed.keys():
            raise OptionError(
                Diagnostic(
                    "dims.fixed",
                    f"dim {name!r} is to be fixed, so there is no size of it to work at",
                    help="leave it out of --dims (from Python: sizes)",
                )
            )

    @classmethod
    def accepts(cls, source: Any) -> bool:
        """A path of no directory, and no program of torch's; whether it is ONNX :meth:`capture` says."""
        if not isinstance(source, str | Path):
            return False
        return not Path(source).is_dir() and Path(source).suffix != ".pt2"

    def sources(self, source: str | Path) -> Mapping[str, Path]:
        """The file and its external data.

        Raises:
            InputError: what is wrong with them.
        """
        path = Path(source)
        files = weights.files(_to_ir(read_proto(path), path))
        data = {f"data/{os.path.relpath(file, path.parent)}": file for file in sorted(files)}
        return {path.name: path, **data}

    def capture(self, source: str | Path) -> Captured:
        """Capture the model in the file ``source``.

        Raises:
            InputError: the file, its external data or its opset cannot be read, or a weight is not
                finite.
            OptionError: there is no such dim.
            CaptureError: the graph in normal form is not the same function, or it does not run at the sizes
                asked for.
        """
        path = Path(source)
        proto = read_proto(path)
        original = _to_ir(proto, path)
        floats = _floats(original)
        check_finite(floats, str(path), allow=_masks(original), bounds=_bounds(original))
        weights.give_back(original)
        _settle_inputs(original)
        model, entries = _in_newest(proto, path)  # over the same weights
        condense(model)
        samples.check_dims(self.fixed, samples.dynamic_dims(model), str(path))
        if self.fixed:
            for graph in (original.graph, model.graph):
                _fix(graph, self.fixed)
            named = ", ".join(f"{name}={size}" for name, size in self.fixed.items())
            entries.append(
                Entry(
                    "dims",
                    "applied",
                    f"fixed at {named}, as asked for",
                    detail={"fixed": self.fixed},
                )
            )
        dynamic = samples.dynamic_dims(model)
        samples.check_dims(self.sizes, dynamic, str(path))

        def run(feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
            return ort.run(original, feeds)

        def intermediates(feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
            names = [
                str(v.name)
                for node in original.graph
                for v in node.outputs
                if v.name and isinstance(v.type, ir.TensorType | None)
            ]
            return ort.run(original, feeds, names)

        def moved(feeds: Feeds) -> dict[str, float]:
            typed, _ = _in_newest(proto, path)  # it has the types that disturbing needs to know
            _fix(typed.graph, self.fixed)
            normal.normalize(typed)
            return verification.moved_by_rounding(typed, ort.run(typed, feeds), feeds)

        return finish(
            model,
            Original(
                run=run,
                intermediates=intermediates,
                moved=moved,
                asked=frozenset(self.sizes),
                fixable=True,
            ),
            source=str(path),
            frontend=self.name,
            dynamic={**dynamic, **self.sizes},
            entries=entries,
        )


def _checked(setting: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes by name, each a positive integer.

    Raises:
        OptionError: one is not.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise OptionError(
                Diagnostic(
                    "dims.size",
                    f"{setting} takes a positive integer for dim {name!r}, not {size!r}",
                    help=f"for example {setting}={{{name!r}: 1}}",
                )
            )
    return {name: int(size) for name, size in sizes.items()}


# -- reading --------------------------------------------------------------------------------------


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def _is_of_a_hub(path: Path) -> bool:
    """Whether it is an organisation and a model, as hubs name them, rather than a path."""
    name = path.as_posix()
    return (
        _HUB_NAME.fullmatch(name) is not None
        and not name.endswith((".onnx", ".pt2"))
        and not path.parent.is_dir()
    )


def read_proto(path: Path) -> onnx.ModelProto:
    """The model in ``path``, its external data checked but not loaded.

    Raises:
        InputError: with everything that is wrong with the file or its external data.
    """
    if not path.is_file():
        help_ = ""
        if _is_of_a_hub(path):
            help_ = f"NetLathe downloads nothing: `hf download {path} --local-dir {path.name}`, then give"
            help_ += f" {path.name}"
        raise InputError(
            Diagnostic("onnx.missing", "there is no such file", at=str(path), help=help_)
        )
    size = path.stat().st_size
    if size > MAX_PROTO:
        raise InputError(
            Diagnostic(
                "onnx.size",
                f"{size} bytes are more than an ONNX file can hold ({MAX_PROTO})",
                at=str(path),
                help="models over 2 GB keep their weights in external data",
            )
        )
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise InputError(Diagnostic("onnx.not_onnx", "the file is empty", at=str(path)))
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except google.protobuf.message.DecodeError as error:
        if head[:1] != b"\x08":  # every ONNX file we know of starts with its ir_version
            raise _not_onnx(path) from error
        raise InputError(
            Diagnostic(
                "onnx.truncated",
                "the file starts as an ONNX model and then breaks off or is damaged",
                at=str(path),
                notes=(f"{size} bytes",),
                help="copy or export the file again",
            )
        ) from error
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        if head[:1] == b"\x08" and proto.ir_version:
            raise InputError(
                Diagnostic(
                    "onnx.truncated",
                    "the model has no graph or no opset: the file is not whole",
                    at=str(path),
                    notes=(f"{size} bytes",),
                    help="copy or export the file again",
                )
            )
        raise _not_onnx(path)
    _check_structure(proto, path)
    _check_external(proto, path)
    return proto


def declared_dims(path: Path) -> list[str]:
    """The names of the dynamic dims of the model in ``path``.

    Raises:
        InputError: see :func:`read_proto`.
    """
    model = _to_ir(read_proto(path), path)
    _settle_inputs(model)
    return list(samples.dynamic_dims(model))


def _in_newest(proto: onnx.ModelProto, path: Path) -> tuple[ir.Model, list[Entry]]:
    """The model at the IR's opset, without functions, and what was done for it."""
    model = _to_ir(proto, path)
    entries = _settle_inputs(model)
    _tell_shapes(model, proto)
    version = raise_opset(model)
    if version != NEWEST:
        entries.append(Entry("opset", "applied", f"raised from {version} to {NEWEST}"))
    if model.functions:
        names = ", ".join(sorted({f.name for f in model.functions.values()}))
        common_passes.InlinePass()(model)
        entries.append(Entry("functions", "applied", f"inlined {names}"))
    return model, entries


def _to_ir(proto: onnx.ModelProto, path: Path) -> ir.Model:
    """The model with its external data mapped from the file's folder."""
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # a deserializer meets whatever a damaged file holds
        raise InputError(
            Diagnostic(
                "onnx.malformed",
                f"the model cannot be understood: {type(error).__name__}: {error}",
                at=str(path),
            )
        ) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def _not_onnx(path: Path) -> InputError:
    return InputError(
        Diagnostic(
            "onnx.not_onnx",
            "not an ONNX model file",
            at=str(path),
            help="give an .onnx file, a .pt2 file that torch.export.save wrote, or a Hugging Face directory"
            " with config.json and safetensors",
        )
    )


def _check_structure(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse a graph that uses values nothing makes: what a cut or edited file looks like."""
    graph = proto.graph
    made = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    made |= {s.values.name for s in graph.sparse_initializer}
    made |= {name for node in graph.node for name in node.output}
    wanted = [(name, node.name or node.op_type) for node in graph.node for name in node.input]
    wanted += [(v.name, "the graph's outputs") for v in graph.output]
    dangling = [(name, user) for name, user in wanted if name and name not in made]
    wrong = [
        Diagnostic("onnx.dangling", f"{user} uses {name!r}, which nothing makes", at=str(path))
        for name, user in dangling[:8]
    ]
    if not graph.output:
        wrong.append(Diagnostic("onnx.outputs", "the graph has no outputs", at=str(path)))
    if wrong:
        raise InputError(wrong)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph, its nodes' attributes and their subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        yield from _attribute_tensors(node)


def _attribute_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from _tensors(subgraph)


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse external data that is missing, too short, or anywhere but in the model's folder."""
    wrong: list[Diagnostic] = []
    root = path.parent.resolve()
    tensors = [
        *_tensors(proto.graph),
        *(t for f in proto.functions for node in f.node for t in _attribute_tensors(node)),
    ]
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        info = {e.key: e.value for e in tensor.external_data}
        problem = _external_problem(tensor, info, root)
        if problem:
            code, message, way_out = problem
            wrong.append(Diagnostic(code, message, at=str(path), help=way_out))
    if wrong:
        shown = wrong[:8]
        if len(wrong) > len(shown):
            last = shown[-1]
            more = f"{len(wrong) - len(shown)} more tensors have the same kind of problem"
            shown[-1] = Diagnostic(
                last.code, last.message, at=last.at, notes=(more,), help=last.help
            )
        raise InputError(shown)


def _external_problem(
    tensor: onnx.TensorProto, info: dict[str, str], root: Path
) -> tuple[str, str, str] | None:
    """Code, message and help for what is wrong with one external tensor; None when it is fine."""
    name, location = tensor.name, info.get("location", "")
    outside = (
        not location
        or os.path.isabs(location)
        or "\\" in location
        or not (root / location).resolve().is_relative_to(root)  # follows links and ..
    )
    if outside:
        return (
            "onnx.external_path",
            f"external data of {name!r} lies outside the model's folder: {location!r}",
            "copy the data file itself (not a link) beside the model",
        )
    file = root / location
    if not file.is_file():
        return (
            "onnx.external_missing",
            f"external data of {name!r} is missing: {location}",
            f"put {Path(location).name} beside the model",
        )
    if file.stat().st_nlink > 1:  # onnx-ir and onnx refuse to read such a file
        return (
            "onnx.external_path",
            f"external data of {name!r} has a second name (a hard link), which may lie outside the"
            f" model's folder: {location!r}",
            "copy the data file itself beside the model",
        )
    itemsize = ir.DataType(tensor.data_type).itemsize
    needed = int(np.ceil(float(np.prod(tensor.dims, dtype=np.int64)) * itemsize))
    try:
        offset = int(info.get("offset", "0"))
        length = int(info.get("length", str(needed)))
    except ValueError:
        offset = length = -1
    if offset < 0 or length != needed:
        return (
            "onnx.external_length",
            f"external data of {name!r} is said to be {info.get('length')} bytes at"
            f" {info.get('offset', '0')}; its shape {list(tensor.dims)} needs {needed}",
            "export the model again",
        )
    if offset + length > file.stat().st_size:
        return (
            "onnx.external_short",
            f"external data file {location} is too short: {name!r} ends at byte"
            f" {offset + length}, the file at {file.stat().st_size}",
            "copy the data file again",
        )
    return None


# -- settling -------------------------------------------------------------------------------------


def _settle_inputs(model: ir.Model) -> list[Entry]:
    """Take weights off the list of inputs, and give anonymous dims names."""
    entries: list[Entry] = []
    graph = model.graph
    for value in list(graph.inputs):
        if value.name in graph.initializers:
            graph.inputs.remove(value)
            reason = "a weight was listed as an input with a default: it is a weight only"
            entries.append(Entry(str(value.name), "applied", reason))
            continue
        if value.shape is None:
            raise InputError(
                Diagnostic(
                    "onnx.input_rank",
                    f"graph input {value.name!r} has no shape, not even a rank",
                    help="export the model with shapes; dims may be symbolic",
                )
            )
        named = [
            _dim(dim, samples.unnamed_dim(value, axis)) for axis, dim in enumerate(value.shape)
        ]
        value.shape = ir.Shape(named)
    inside = [value for node in graph.all_nodes() for value in node.outputs]
    for value in [*inside, *graph.outputs]:
        if value.shape is not None and not value.is_graph_input():
            value.shape = ir.Shape([_dim(dim, None) for dim in value.shape])
    return entries


def _fix(graph: ir.Graph, fixed: Mapping[str, int]) -> None:
    """Give dims one size, wherever they are recorded."""
    at = {dims.symbol(name): size for name, size in fixed.items()}
    inside = [value for node in graph.all_nodes() for value in node.outputs]
    for value in {*graph.inputs, *inside, *graph.outputs}:
        if value.shape is not None:
            settled = [dims.settle(dims.from_ir(dim), at) for dim in value.shape]
            value.shape = ir.Shape([dims.to_ir(dim) for dim in settled])


def _dim(dim: int | ir.SymbolicDim, unknown: str | None) -> int | str | None:
    """``dim``, or ``unknown`` where it tells nothing: -1, or a name such as "?" (Paddle's exporter)."""
    if isinstance(dim, int):
        return dim if dim >= 0 else unknown
    readable = dim.value is not None and any(map(str.isalnum, dim.value))
    return dim.value if readable else unknown


# operator -> the opset from which raising it no longer asks for its data's shape
_ASKS_SHAPE: Mapping[str, int] = {
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), 13),  # took all dims from one on together
    "GroupNormalization": 21,  # had one scale a group, not a channel
}


def _tell_shapes(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Shapes that raising to the IR's opset asks for: files seldom have those of inner values."""
    version = model.opset_imports.get("", NEWEST)
    read = {
        node.inputs[0].name: node.inputs[0]
        for node in model.graph
        if version < _ASKS_SHAPE.get(node.op_type, 0)
        and node.inputs
        and node.inputs[0] is not None
        and node.inputs[0].shape is None
    }
    if not read:
        return
    for told in onnx.shape_inference.infer_shapes(proto).graph.value_info:
        if told.name in read and told.type.tensor_type.HasField("shape"):
            read[told.name].shape = ir.Shape(
                dim.dim_value if dim.HasField("dim_value") else None
                for dim in told.type.tensor_type.shape.dim
            )


def _floats(model: ir.Model) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            yield name, tensor.numpy()


def _masks(model: ir.Model) -> frozenset[str]:
    """Initializers that only elementwise operators read, or that are padded with: they may hold -inf."""
    return frozenset(_read_only_by(model, _ELEMENTWISE | _COMPARING, padding=True))


def _bounds(model: ir.Model) -> frozenset[str]:
    """Initializers that are only compared with: bounds, of which infinity is one that never binds."""
    return frozenset(_read_only_by(model, _COMPARING))


_COMPARING = frozenset(
    {"Clip", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Where"}
)
_ELEMENTWISE = frozenset({"Add", "Cast", "Concat", "Expand", "Slice", "Unsqueeze"})


def _read_only_by(
    model: ir.Model, op_types: frozenset[str], *, padding: bool = False
) -> Iterator[str]:
    """Initializers that only ``op_types`` read, and Pad for what it pads with where that counts."""
    for name, value in model.graph.initializers.items():
        if all(
            use.node.op_type in op_types
            or (padding and use.node.op_type == "Pad" and use.idx == _PADDED_WITH)
            for use in value.uses()
        ):
            yield name


_PADDED_WITH = 2  # the operand of Pad
