"""Running the IR in ONNX Runtime, the judge of what we export, without ever holding all weights.

The graph is cut into consecutive ranges of nodes whose weights fit ``max_bytes``; each range is one
session, fed with what the ranges before it left. A model below that size is one session. Weights of
a session are handed over where they lie (mapped files stay mapped): as inputs, because ONNX Runtime
copies initializers, unless optimizations are on, which look at constants.
Optimizations are off unless asked for, so that what runs is what stands in the graph, but for four
things that ONNX Runtime has no CPU kernel for: Swish (opset 25) runs as Sigmoid and Mul, RoiAlign as the
same operator of opset 21, constants of float4e2m1 and float8e8m0 as those of a wider type, and
arithmetic in half precision as float32 arithmetic that is rounded after every node. (ONNX Runtime by
itself computes float16 in float32 as well, but leaves the roundings out between nodes; with
optimizations on, it may.)
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from netlathe.diagnostics import Diagnostic, InputError, NetLatheError
from netlathe.execute import reading
from netlathe.ir import weights
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import module_path

Arrays = dict[str, npt.NDArray[Any]]

SEGMENT_BYTES = 512 << 20
# By default ONNX Runtime rounds activations to 8 bits where they meet quantized weights (MatMulNBits at
# accuracy level 4). At level 1 they stay float32.
ACTIVATIONS = "session.qdq_matmulnbits_accuracy_level"
THREADS_VARIABLE = "NETLATHE_THREADS"  # environment variable: how many threads ONNX Runtime may use
# Weights up to this size are written into the session's model: shape inference looks at them.
_INLINE_BYTES = 4096
# dtypes whose numpy arrays ONNX Runtime takes as they are.
_NUMPY_DTYPES = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.INT32,
        ir.DataType.UINT32,
        ir.DataType.INT64,
        ir.DataType.UINT64,
        ir.DataType.BOOL,
    }
)


# Whole-byte dtypes that numpy lacks: they are handed over as the integers that hold their bits. The
# rest (4 bits and less, strings) is written into the session's model.
_AS_BITS: dict[ir.DataType, type[np.unsignedinteger[Any]]] = {
    ir.DataType.BFLOAT16: np.uint16,
    ir.DataType.FLOAT8E4M3FN: np.uint8,
    ir.DataType.FLOAT8E4M3FNUZ: np.uint8,
    ir.DataType.FLOAT8E5M2: np.uint8,
    ir.DataType.FLOAT8E5M2FNUZ: np.uint8,
}
# ONNX Runtime's CPU provider computes with neither of these: constants are handed over in a type that holds
# the same numbers.
_WIDER: dict[ir.DataType, ir.DataType] = {
    ir.DataType.FLOAT4E2M1: ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E8M0: ir.DataType.FLOAT,
}
# Integers of less than a byte live inside a session only: at its edge they are Cast to and from these.
_WIDENED: dict[ir.DataType, ir.DataType] = {
    ir.DataType.INT4: ir.DataType.INT8,
    ir.DataType.UINT4: ir.DataType.UINT8,
    ir.DataType.INT2: ir.DataType.INT8,
    ir.DataType.UINT2: ir.DataType.UINT8,
}
# Operators with a kernel for an older opset only, in which they mean the same.
_OLDER: dict[str, int] = {"RoiAlign": 21}
# What moves or converts bits runs on half precision as it is.
_RUNS_ON_HALVES = frozenset({"Cast", "Identity", "If", "Loop", "Scan"})


class RuntimeFailure(NetLatheError):
    """ONNX Runtime refused a model or failed while running it."""


def run(
    model: ir.Model,
    feeds: Mapping[str, npt.NDArray[Any]],
    outputs: Sequence[str] | None = None,
    *,
    optimize: bool = False,
    exact: bool = True,
    max_bytes: int = SEGMENT_BYTES,
    threads: int | None = None,
) -> Arrays:
    """Evaluate ``model`` on ``feeds`` and return ``outputs`` by name (default: the graph's outputs).

    Any tensor of the main graph may be asked for; bfloat16, the 8-bit floats and integers of less than
    a byte come back as ``ml_dtypes`` arrays. ``max_bytes`` bounds the weights held at once, ``threads``
    is how many threads may compute (default: NETLATHE_THREADS, else all that this process may use).
    Unless ``exact``, optimizations may round activations to 8 bits where weights are quantized.

    Raises:
        InputError: a feed is missing, unknown or of another dtype or rank; or an output is unknown.
        RuntimeFailure: ONNX Runtime does not accept or cannot run the graph, and the node is named;
            or a result is no tensor.
    """
    session = Session(
        model, outputs, optimize=optimize, exact=exact, max_bytes=max_bytes, threads=threads
    )
    results = session.run(feeds)
    del session
    weights.give_back(model)
    return results


def run_each(model: ir.Model, samples: Sequence[Mapping[str, npt.NDArray[Any]]]) -> list[Arrays]:
    """:func:`run` on several feeds of the same inputs; weights that are not held at once are read once."""
    session = Session(model)
    results = session.run_each(samples)
    del session
    weights.give_back(model)
    return results


def fits(model: ir.Model) -> bool:
    """Whether the weights of ``model`` are few enough to be held at once, dequantized ones too."""
    return sum(_held(node, v) for node in model.graph for v in _reads(node)) <= SEGMENT_BYTES


@dataclass(frozen=True)
class _Segment:
    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int | None  # of the default domain; None: the model's


@dataclass(frozen=True)
class _Prepared:
    session: onnxruntime.InferenceSession
    weights: dict[str, onnxruntime.OrtValue]  # fed in every run
    constants: dict[str, onnxruntime.OrtValue]  # read where they lie, so they must live on


class Session:
    """A model prepared to run several times.

    With one segment the ONNX Runtime session is kept; with more, each is made anew for every run, so
    that memory stays bounded.
    """

    def __init__(
        self,
        model: ir.Model,
        outputs: Sequence[str] | None = None,
        *,
        optimize: bool = False,
        exact: bool = True,
        max_bytes: int = SEGMENT_BYTES,
        threads: int | None = None,
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._optimize = optimize
        self._exact = exact
        # Half types whose arithmetic runs in float32, rounded after every node.
        self._rounded = {ir.DataType.BFLOAT16} | (set() if optimize else {ir.DataType.FLOAT16})
        self._threads = threads or default_threads()
        values = (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))
        self._narrow = {
            value.name: value.dtype
            for value in values
            if value.name and value.dtype is not None and value.dtype in _WIDENED
        }
        self.outputs = tuple(
            dict.fromkeys(outputs if outputs is not None else _names(model.graph.outputs))
        )
        self._segments = list(self._cut(max_bytes))
        self._kept: _Prepared | None = None

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Evaluate once; see :func:`run` for what it raises."""
        return self.run_each([feeds])[0]

    def run_each(self, samples: Sequence[Mapping[str, npt.NDArray[Any]]]) -> list[Arrays]:
        """Evaluate several times, reading every weight once; see :func:`run` for what it raises."""
        helds = [self._given(feeds) for feeds in samples]
        for number, segment in enumerate(self._segments):
            prepared = self._kept or self._session(segment, helds[0])
            if len(self._segments) == 1:
                self._kept = prepared
            later = {name for rest in self._segments[number + 1 :] for name in rest.inputs}
            for at, held in enumerate(helds):
                inputs = {self._edge(name): held[name] for name in segment.inputs}
                try:
                    results = prepared.session.run_with_ort_values(
                        [self._edge(name) for name in segment.outputs], inputs | prepared.weights
                    )
                except Exception as error:
                    raise self._failure(error, segment.nodes) from error
                made = held | dict(zip(segment.outputs, results, strict=True))
                helds[at] = {n: a for n, a in made.items() if n in later or n in self.outputs}
            del prepared  # before the next segment's weights are read
            if len(self._segments) > 1:
                weights.give_back(self._model)
        return [{name: self._result(name, held) for name in self.outputs} for held in helds]

    def _given(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, onnxruntime.OrtValue]:
        """The feeds, and the defaults of inputs that were not given."""
        self._check(feeds)
        held = {name: self._held(name, array) for name, array in feeds.items()}
        for value in self._graph.inputs:
            if value.name and value.name not in held and value.const_value is not None:
                held[value.name] = self._held(value.name, value.const_value.numpy())
        return held

    def _result(self, name: str, held: Mapping[str, onnxruntime.OrtValue]) -> npt.NDArray[Any]:
        if name in held:
            if not held[name].is_tensor():
                raise RuntimeFailure(
                    Diagnostic(
                        "run.result", f"{name!r} is no tensor, and only tensors are returned"
                    )
                )
            array = _from_ort(held[name])
            return array.astype(self._narrow[name].numpy()) if name in self._narrow else array
        tensor = self._graph.initializers[name].const_value
        assert tensor is not None  # _cut accepts no other name
        return tensor.numpy()

    def _held(self, name: str, array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
        if name in self._narrow:
            array = array.astype(_WIDENED[self._narrow[name]].numpy())
        return _to_ort(array)

    def _edge(self, name: str) -> str:
        """What a value is called where it enters or leaves a session."""
        return f"{name}/widened" if name in self._narrow else name

    # -- cutting ----------------------------------------------------------------------------------

    def _cut(self, max_bytes: int) -> Iterator[_Segment]:
        producers = {v.name: node for node in self._graph for v in node.outputs if v.name}
        known = producers.keys() | set(_names(self._graph.inputs)) | self._graph.initializers.keys()
        if unknown := [name for name in self.outputs if name not in known]:
            raise InputError(
                Diagnostic("run.output", f"the model has no value named {', '.join(unknown)}")
            )
        needed = _ancestors(producers, self.outputs)
        ranges: list[list[ir.Node]] = [[]]
        size = 0
        held: set[str] = set()
        opset: int | None = None
        for node in self._graph:
            if node not in needed:
                continue
            sizes = {v.name: _held(node, v) for v in _reads(node) if v.name and v.is_initializer()}
            new = sum(count for name, count in sizes.items() if name not in held)
            wanted = self._opset_for(node)
            if ranges[-1] and (size + new > max_bytes or wanted != opset):
                ranges.append([])
                size, held = 0, set()
                new = sum(sizes.values())
            ranges[-1].append(node)
            opset = wanted
            size += new
            held |= sizes.keys()
        ranges = [nodes for nodes in ranges if nodes]
        read_later: set[str] = set(self.outputs)
        cut: list[_Segment] = []
        for nodes in reversed(ranges):
            made = {v.name for node in nodes for v in node.outputs if v.name}
            reads = {
                v.name
                for node in nodes
                for v in _reads(node)
                if v.name and v.name not in made and not _is_weight(v)
            }
            outputs = tuple(sorted(made & read_later))
            opset = self._opset_for(nodes[0])
            cut.append(_Segment(tuple(nodes), tuple(sorted(reads)), outputs, opset))
            read_later |= reads
        yield from reversed(cut)

    def _opset_for(self, node: ir.Node) -> int | None:
        """The older opset that ``node`` has to run in; None where it runs in the model's."""
        older = _OLDER.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        return older if older and self._graph.opset_imports.get("", 0) > older else None

    # -- sessions ---------------------------------------------------------------------------------

    def _session(self, segment: _Segment, held: Mapping[str, onnxruntime.OrtValue]) -> _Prepared:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        settings.intra_op_num_threads = self._threads
        settings.inter_op_num_threads = 1
        settings.enable_cpu_mem_arena = False
        # In the graph's own order: by default all weights are dequantized before the first is used.
        settings.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        settings.graph_optimization_level = (
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            if self._optimize
            else onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        )
        if not self._optimize:
            settings.add_session_config_entry("session.disable_prepacking", "1")
        if self._exact:
            settings.add_session_config_entry(ACTIVATIONS, "1")
        proto, given = self._proto(segment, held)
        constants: dict[str, onnxruntime.OrtValue] = {}
        if self._optimize:
            settings.add_external_initializers(list(given), list(given.values()))
            given, constants = {}, given
        try:
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise self._failure(error, segment.nodes) from error
        return _Prepared(session, given, constants)

    def _proto(
        self, segment: _Segment, held: Mapping[str, onnxruntime.OrtValue]
    ) -> tuple[onnx.ModelProto, dict[str, onnxruntime.OrtValue]]:
        """The segment as a model, and the weights that it is given from outside."""
        graph = onnx.GraphProto(name=self._graph.name or "main")
        for name in segment.inputs:
            if name in self._narrow:
                to = self._narrow[name].value
                graph.node.append(onnx.helper.make_node("Cast", [self._edge(name)], [name], to=to))
        for node in segment.nodes:
            graph.node.extend(_runnable(node, self._rounded))
        for name in segment.outputs:
            if name in self._narrow:
                to = _WIDENED[self._narrow[name]].value
                graph.node.append(onnx.helper.make_node("Cast", [name], [self._edge(name)], to=to))
        read = {v.name: v for node in segment.nodes for v in _reads(node) if v.name}
        for name in segment.inputs:
            by_declaration = read[name].is_graph_input() and name not in self._narrow
            if by_declaration or not held[name].is_tensor():
                graph.input.append(ir.serde.serialize_value(read[name]))
            else:  # by what it is: a recorded type may be absent
                element = held[name].element_type()
                edge = self._edge(name)
                graph.input.append(onnx.helper.make_tensor_value_info(edge, element, None))
        graph.output.extend(onnx.ValueInfoProto(name=self._edge(n)) for n in segment.outputs)
        # CastLike reads a type, not numbers.
        typed = {v for node in segment.nodes if node.op_type == "CastLike" for v in node.inputs[1:]}
        outside: dict[str, ir.TensorProtocol] = {}
        for name, value in sorted(read.items()):
            tensor = value.const_value
            if tensor is None or not _is_weight(value):
                continue
            if tensor.dtype in _WIDER and value not in typed:
                tensor = weights.converted(tensor, _WIDER[tensor.dtype], name)
            dims = tensor.shape.numpy()
            whole = tensor.dtype in _NUMPY_DTYPES or tensor.dtype in _AS_BITS
            if tensor.nbytes <= _INLINE_BYTES or not whole:
                inline = onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=dims)
                if tensor.dtype == ir.DataType.STRING:
                    ir.serde.serialize_tensor_into(inline, tensor)
                else:
                    inline.raw_data = tensor.tobytes()
                graph.initializer.append(inline)
                continue
            outside[name] = tensor
            if not self._optimize:
                element = tensor.dtype.value
                graph.input.append(onnx.helper.make_tensor_value_info(name, element, dims))
                continue
            told = graph.initializer.add(name=name, data_type=tensor.dtype.value, dims=dims)
            told.data_location = onnx.TensorProto.EXTERNAL
            told.external_data.add(key="location", value="memory")
        # On the CPU a value shares the memory of an array, and keeps the array alive.
        values = reading.ahead(list(outside.values()), lambda tensor: _to_ort(tensor.numpy()))
        given = dict(zip(outside, values, strict=True))
        versions = dict(self._graph.opset_imports)
        if segment.opset is not None:
            versions[""] = segment.opset
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in versions.items()]
        functions = [ir.serde.serialize_function(f) for f in self._model.functions.values()]
        proto = onnx.helper.make_model(
            graph, opset_imports=opsets, functions=functions, ir_version=self._model.ir_version
        )
        return proto, given

    # -- errors -----------------------------------------------------------------------------------

    def _check(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        problems = []
        inputs = {value.name: value for value in self._graph.inputs if value.name}
        for name in feeds.keys() - inputs.keys():
            problems.append(f"there is no input named {name!r}")
        read = {name for segment in self._segments for name in segment.inputs}
        for name, value in inputs.items():
            array = feeds.get(name)
            if array is None:
                if name in read and name not in self._graph.initializers:
                    problems.append(f"input {name!r} is missing")
                continue
            if array.dtype.kind in "OUS" or array.dtype.name == "float4_e2m1fn":
                problems.append(f"input {name!r} is {array.dtype}, which cannot be handed over")
            elif value.dtype is not None and array.dtype != value.dtype.numpy():
                problems.append(f"input {name!r} is {array.dtype}, not {value.dtype.numpy()}")
            if value.shape is not None and array.ndim != len(value.shape):
                problems.append(f"input {name!r} has {array.ndim} dims, not {len(value.shape)}")
        if problems:
            raise InputError(
                Diagnostic(
                    "run.feeds",
                    "; ".join(sorted(problems)),
                    help=f"the inputs are {', '.join(inputs)}",
                )
            )

    def _failure(self, error: Exception, nodes: Sequence[ir.Node]) -> RuntimeFailure:
        text = " ".join(str(error).split())

        def said(name: str | None) -> bool:
            return bool(name) and (f"'{name}'" in text or f'"{name}"' in text)

        named = [n for n in nodes if said(n.name)]
        named = named or [n for n in nodes if any(said(v.name) for v in n.outputs)]
        return RuntimeFailure(
            Diagnostic(
                "run.onnxruntime",
                text,
                at=show_node(named[0]) if named else "",
                where=module_path(named[0]) if named else "",
            )
        )


def default_threads() -> int:
    """NETLATHE_THREADS, else the number of CPUs this process may run on.

    Raises:
        InputError: NETLATHE_THREADS is not a positive number.
    """
    given = os.environ.get(THREADS_VARIABLE)
    if given is None:
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if not given.isdigit() or int(given) < 1:
        raise InputError(
            Diagnostic(
                "run.threads", f"{THREADS_VARIABLE} must be a positive number, not {given!r}"
            )
        )
    return int(given)


def _to_ort(array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
    array = np.ascontiguousarray(array).reshape(array.shape)  # a scalar stays one
    dtype = ir.DataType.from_numpy(array.dtype)
    bits = _AS_BITS.get(dtype)
    if bits is None:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(bits), dtype.value)


def _from_ort(value: onnxruntime.OrtValue) -> npt.NDArray[Any]:
    if ir.DataType(value.element_type()) not in _AS_BITS:
        array: npt.NDArray[Any] = value.numpy()
        return array
    dtype = ir.DataType(value.element_type())
    shape = tuple(value.shape())
    size = int(np.prod(shape, dtype=np.int64)) * dtype.numpy().itemsize
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, dtype.numpy()).reshape(shape)


def _runnable(node: ir.Node, rounded: Collection[ir.DataType]) -> list[onnx.NodeProto]:
    """The node as ONNX Runtime can run it; only what it has no kernel for is spelled differently."""
    if node.domain in ("", "ai.onnx") and node.op_type not in _RUNS_ON_HALVES:
        dtypes = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None}
        # With a type that is not known, only ONNX Runtime can tell what to widen, and it can float16.
        known = None not in dtypes or ir.DataType.BFLOAT16 in dtypes
        if known and not dtypes.isdisjoint(rounded):
            return _in_float32(node, rounded)
    return _spelled(_serialized(node))


def _serialized(node: ir.Node) -> onnx.NodeProto:
    """The node with all that its subgraphs hold: a session has no folder to find mapped weights in."""
    proto = ir.serde.serialize_node(node)
    for attribute in proto.attribute:
        if attribute.type != onnx.AttributeProto.GRAPH:
            continue
        inner = node.attributes[attribute.name].as_graph()
        for told in attribute.g.initializer:
            tensor = inner.initializers[told.name].const_value
            if told.data_location == onnx.TensorProto.EXTERNAL and tensor is not None:
                told.ClearField("external_data")
                told.ClearField("data_location")
                told.raw_data = tensor.tobytes()
        if any(_holds_graphs(made) for made in inner):
            del attribute.g.node[:]
            attribute.g.node.extend(_serialized(made) for made in inner)
    return proto


def _holds_graphs(node: ir.Node) -> bool:
    return any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values())


def _spelled(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Swish as Sigmoid and Mul; anything else, and what its subgraphs hold, likewise."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = [made for old in attribute.g.node for made in _spelled(old)]
            del attribute.g.node[:]
            attribute.g.node.extend(inner)
    if node.op_type != "Swish" or node.domain not in ("", "ai.onnx"):
        return [node]
    alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
    (x,), (y,), made = node.input, node.output, []
    scaled = x
    if alpha != 1.0:
        scaled = f"{y}/scaled"
        factor = onnx.helper.make_node("Constant", [], [f"{y}/alpha"], value_float=alpha)
        like = onnx.helper.make_node("CastLike", [f"{y}/alpha", x], [f"{y}/alpha_like"])
        times = onnx.helper.make_node("Mul", [x, f"{y}/alpha_like"], [scaled])
        made = [factor, like, times]
    gate = onnx.helper.make_node("Sigmoid", [scaled], [f"{y}/gate"], name=node.name)
    return [*made, gate, onnx.helper.make_node("Mul", [x, f"{y}/gate"], [y])]


def _in_float32(node: ir.Node, rounded: Collection[ir.DataType]) -> list[onnx.NodeProto]:
    """A node in half precision as float32 arithmetic on widened inputs, its results rounded."""
    proto = _serialized(node)
    before, after = [], []
    for position, value in enumerate(node.inputs):
        if value is not None and value.dtype in rounded:
            wide = f"{node.outputs[0].name}/input_{position}"
            to: int = onnx.TensorProto.FLOAT
            before.append(onnx.helper.make_node("Cast", [value.name or ""], [wide], to=to))
            proto.input[position] = wide
    for position, value in enumerate(node.outputs):
        if value.name and value.dtype is not None and value.dtype in rounded:
            wide, to = f"{value.name}/wide", value.dtype.value
            after.append(onnx.helper.make_node("Cast", [wide], [value.name], to=to))
            proto.output[position] = wide
    for attribute in proto.attribute:
        # output_dtype of QuantizeLinear's family, dtype of generators
        if attribute.name.endswith("dtype") and attribute.i in rounded:
            attribute.i = int(onnx.TensorProto.FLOAT)
    return [*before, *_spelled(proto), *after]


def _names(values: Iterable[ir.Value]) -> list[str]:
    return [value.name for value in values if value.name]


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def _held(node: ir.Node, weight: ir.Value) -> int:
    """Bytes that ``weight`` takes while ``node`` runs.

    Dequantized weights count: where ONNX Runtime expands a node, it makes all of them first.
    """
    tensor = weight.const_value
    if tensor is None:
        return 0
    wide = 4 * tensor.size if node.op_type == "DequantizeLinear" else 0  # float32
    return tensor.nbytes + wide


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads from the main graph, captures of its subgraphs included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type != ir.AttributeType.GRAPH:
            continue
        inner = attribute.as_graph()
        own = {id(value) for value in (*inner.inputs, *inner.initializers.values())}
        own.update(id(value) for made in inner for value in made.outputs)
        reads = [value for made in inner for value in _reads(made)]
        reads += [value for value in inner.outputs if value is not None]
        yield from (value for value in reads if id(value) not in own)


def _ancestors(producers: Mapping[str, ir.Node], outputs: Iterable[str]) -> set[ir.Node]:
    needed: set[ir.Node] = set()
    stack = [producers[name] for name in outputs if name in producers]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        stack += [producers[v.name] for v in _reads(node) if v.name and v.name in producers]
    return needed
