"""The judge of every raise: ONNX Runtime, on the matched nodes and on their replacement.

Both sides become small models over the same inputs and run, with optimizations off, on seeded random
data at two sizes of every dynamic dim. Half-precision regions are judged in float32, where a wrong
formula is not hidden by rounding. Weights that both sides read become random inputs; everything that
only one side reads (an epsilon, a cos table that was halved) keeps its bytes. Regions that are equal in
structure, attributes, shapes and kept constants are judged once.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from netlathe.execute import samples
from netlathe.ir.edit import const_array
from netlathe.passes.normalize.match import NoMatch
from netlathe.passes.normalize.rewrite import Trial

TOLERANCE = 1e-5  # max|raised - matched| as a share of the RMS: two float32 orders of summation
JUDGE_OPSET = (
    24  # the raised ops are those of opset 25; ONNX Runtime 1.32 expands Swish up to 24 only
)
MAX_NODES = 256  # a region that reaches further back than this is not a construct
SIZES = (
    (2, 5, 7, 11, 13, 17),
    (3, 4, 9, 8, 10, 14),
)  # the first, second, ... dynamic dim in two runs
TIMES = (1, 2, 4, 8, 16, 32, 64)  # as large, where strides leave nothing of a dim
LARGEST = 1 << 23  # elements of an input that was made larger
_BODIES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
_TAKE_SHAPES = frozenset({"Reshape", "Expand", "Tile", "Slice"})  # all but their first operand
HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
FLOATS = HALF | {ir.DataType.FLOAT, ir.DataType.DOUBLE}


@dataclass
class Judge:
    """Compares regions and remembers what it has judged already."""

    seen: dict[str, float | str] = field(default_factory=dict)
    sessions: int = 0

    def error(self, pairs: Mapping[ir.Value, ir.Value], trial: Trial) -> float:
        """The largest difference between matched and raised values, as a share of their RMS.

        ``pairs`` maps each matched value to the one that shall replace it. Data is "normal" (RMS 1),
        "wide" (RMS 4, so that clipped ranges are left) or in "small_rows" (some scaled down to 1e-4,
        where a misplaced epsilon shows).

        Raises:
            NoMatch: a side cannot be run on its own (an untyped value, a region without an end).
        """
        region = _Region.of(pairs)
        key = region.key(trial)
        if key not in self.seen:
            try:
                self.seen[key] = self._run(region, trial)
            except NoMatch as refusal:
                self.seen[key] = refusal.reason
        verdict = self.seen[key]
        if isinstance(verdict, str):
            raise NoMatch(verdict)
        return verdict

    def _run(self, region: _Region, trial: Trial) -> float:
        worst = 0.0
        sessions = [_session(region, side) for side in (region.before, region.after)]
        self.sessions += 2
        for run, sizes in enumerate(SIZES):
            feeds = region.feeds(sizes, np.random.default_rng(run), trial)
            matched, raised = (_outputs(session, feeds) for session in sessions)
            worst = max([worst, *map(relative_error, raised, matched)])
        return worst


def relative_error(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """max|actual - expected| over the RMS of ``expected``; infinite where shapes or NaNs differ."""
    if actual.shape != expected.shape:
        return float("inf")
    if not np.array_equal(np.isfinite(actual), np.isfinite(expected)):
        return float("inf")
    finite = np.isfinite(expected)
    if not finite.any():
        return 0.0
    a, e = actual[finite].astype(np.float64), expected[finite].astype(np.float64)
    rms = float(np.sqrt(np.mean(e * e)))
    difference = float(np.max(np.abs(a - e)))
    return difference / rms if rms > 0 else (0.0 if difference == 0 else float("inf"))


# -- cutting the two sides out of the graph -------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    nodes: Sequence[ir.Node]  # topological
    outputs: Sequence[ir.Value]


@dataclass(frozen=True)
class _Region:
    before: _Side
    after: _Side
    inputs: Sequence[ir.Value]  # fed with random data, in a canonical order
    constants: Sequence[ir.Value]  # kept by value

    @classmethod
    def of(cls, pairs: Mapping[ir.Value, ir.Value]) -> _Region:
        raised = _walk(pairs.values(), stops=frozenset(), into_graph=False)
        matched = _walk(pairs.keys(), stops=frozenset(raised.leaves), into_graph=True)
        shared = set(matched.leaves) & set(raised.leaves)
        inputs: list[ir.Value] = []
        constants: list[ir.Value] = []
        for leaf in dict.fromkeys([*raised.leaves, *matched.leaves]):
            (constants if _kept(leaf, leaf in shared) else inputs).append(leaf)
        return cls(
            _Side(matched.nodes, list(pairs.keys())),
            _Side(raised.nodes, list(pairs.values())),
            inputs,
            constants,
        )

    def key(self, trial: Trial) -> str:
        """A digest of everything that the verdict depends on."""
        ids = {value: i for i, value in enumerate([*self.inputs, *self.constants])}
        text: list[str] = [trial]
        text += [f"{value.dtype} {value.shape}" for value in self.inputs]
        for value in self.constants:
            array = const_array(value)
            assert array is not None
            digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            text.append(f"{array.dtype}{array.shape}{digest}")
        for side in (self.before, self.after):
            for node in side.nodes:
                ids.update({value: len(ids) + i for i, value in enumerate(node.outputs)})
                read = [None if value is None else ids[value] for value in node.inputs]
                attributes = sorted(
                    f"{a.name}={_attribute_text(a)}" for a in node.attributes.values()
                )
                text.append(f"{node.op_type} {read} {attributes} {[ids[v] for v in node.outputs]}")
            text.append(str([ids[value] for value in side.outputs]))
        return hashlib.sha256("\n".join(text).encode()).hexdigest()

    def feeds(
        self, sizes: Sequence[int], rng: np.random.Generator, trial: Trial
    ) -> dict[str, npt.NDArray[Any]]:
        """Random data for the inputs with the dynamic dims at ``sizes``, by position."""
        symbols = sorted({n for v in self.inputs if _shape(v) for n in samples.free_dims(v)})
        if len(symbols) > len(sizes):
            raise NoMatch(f"depends on {len(symbols)} dynamic dims, too many to try")
        empty: list[ir.Value] = []
        for times in TIMES:
            bound = {name: times * size for name, size in zip(symbols, sizes, strict=False)}
            fed = [(value, samples.shape_of(value, bound)) for value in self.inputs]
            if times > 1 and any(math.prod(shape) > LARGEST for _, shape in fed):
                break
            empty = [value for value, shape in fed if min(shape, default=1) < 1]
            if not empty:
                return {f"i{i}": _random(*each, rng, trial) for i, each in enumerate(fed)}
        what = f"{empty[0].name} has the shape {empty[0].shape}"
        raise NoMatch(f"{what}, of which nothing is left at the sizes that can be tried")


@dataclass
class _Walk:
    nodes: list[ir.Node] = field(default_factory=list)  # topological
    leaves: list[ir.Value] = field(default_factory=list)


def _walk(roots: Iterable[ir.Value], *, stops: frozenset[ir.Value], into_graph: bool) -> _Walk:
    """The nodes behind ``roots``: down to ``stops``, constants and inputs.

    The raised side (``into_graph`` false) ends where the graph's own nodes begin, as its nodes are not in
    the graph yet; only operands that are shapes are followed further, to the values whose shape they are.
    """
    walk = _Walk()
    seen: set[ir.Value] = set()
    made: set[ir.Node] = set()

    def visit(value: ir.Value, into_graph: bool) -> None:
        if value in seen:
            return
        seen.add(value)
        node = value.producer()
        at_edge = node is not None and node.graph is not None and not into_graph
        if node is None or value in stops or at_edge or const_array(value) is not None:
            walk.leaves.append(value)
            return
        if node in made:
            return
        if len(walk.nodes) == MAX_NODES:
            raise NoMatch(f"reaches back further than {MAX_NODES} nodes", node)
        if any(a.type in _BODIES for a in node.attributes.values()):
            raise NoMatch(f"contains {node.op_type}, which has a body of its own", node)
        made.add(node)
        for i, read in enumerate(node.inputs):
            if read is None:
                continue
            if node.op_type == "Shape" and node.domain == "":
                if read not in seen and read not in walk.leaves:  # only its shape matters
                    seen.add(read)
                    walk.leaves.append(read)
            else:
                is_shape = i > 0 and node.op_type in _TAKE_SHAPES
                visit(read, into_graph or is_shape)
        walk.nodes.append(node)

    for root in roots:
        visit(root, into_graph)
    return walk


def _kept(leaf: ir.Value, shared: bool) -> bool:
    """Whether a leaf keeps its bytes: a constant, unless it is a weight that both sides read."""
    array = const_array(leaf)
    return array is not None and not (shared and array.size > 1 and leaf.dtype in FLOATS)


def _shape(value: ir.Value) -> ir.Shape:
    if value.shape is None or value.dtype is None:
        raise NoMatch(f"{value.name} is not typed")
    if any(isinstance(d, ir.SymbolicDim) and d.value is None for d in value.shape):
        raise NoMatch(f"{value.name} has an unknown dimension")
    return value.shape


def _random(
    value: ir.Value, shape: Sequence[int], rng: np.random.Generator, trial: Trial
) -> npt.NDArray[Any]:
    if value.dtype == ir.DataType.BOOL:
        mask = rng.random(shape) < 0.8
        mask[..., :1], mask[..., 1:2] = True, False  # no row of a mask is all one or the other
        return mask
    if value.dtype is not None and value.dtype not in FLOATS:
        return rng.integers(0, 3, shape).astype(value.dtype.numpy())
    data = rng.standard_normal(shape)
    if trial == "wide":
        data *= 4.0
    if trial == "small_rows" and len(shape) > 1:
        data *= 10.0 ** rng.integers(-4, 2, (*shape[:-1], 1))
    return data.astype(np.float64 if value.dtype == ir.DataType.DOUBLE else np.float32)


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return hashlib.sha256(attribute.as_tensor().tobytes()).hexdigest()
    return str(attribute.value)


# -- running them ---------------------------------------------------------------------------------


def _session(region: _Region, side: _Side) -> onnxruntime.InferenceSession:
    copies: dict[ir.Value, ir.Value] = {}
    for i, value in enumerate(region.inputs):
        dtype = _judged_dtype(value.dtype)
        copies[value] = ir.Value(
            name=f"i{i}", type=ir.TensorType(dtype), shape=ir.Shape([None] * len(_shape(value)))
        )
    initializers = []
    for i, value in enumerate(region.constants):
        array = const_array(value)
        assert array is not None
        if value.dtype in HALF:
            array = array.astype(np.float32)
        tensor = ir.tensor(array)
        copies[value] = ir.Value(
            name=f"c{i}",
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        initializers.append(copies[value])
    nodes = []
    for n, node in enumerate(side.nodes):
        outputs = [ir.Value(name=f"n{n}_{i}") for i in range(len(node.outputs))]
        copies.update(zip(node.outputs, outputs, strict=True))
        nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else copies[value] for value in node.inputs],
                [_judged_attribute(node, a) for a in node.attributes.values()],
                outputs=outputs,
            )
        )
    results = []
    for i, value in enumerate(side.outputs):  # Identity: an output may be an input or listed twice
        result = ir.Value(name=f"o{i}", type=ir.TensorType(_judged_dtype(value.dtype)))
        nodes.append(ir.Node("", "Identity", [copies[value]], outputs=[result]))
        results.append(result)
    graph = ir.Graph(
        [copies[value] for value in region.inputs],
        results,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": _opset(side)},
        name="region",
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what fails here becomes a ledger row
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except _RUNTIME_ERRORS as error:
        raise NoMatch(f"ONNX Runtime does not take it: {_first_line(error)}") from error


def _opset(side: _Side) -> int:
    """25, the IR's; but 24 with Swish, which ONNX Runtime 1.32 expands up to there only.

    At 25 it expands Attention by the standard's own definition instead of taking its kernel.
    """
    return 24 if any(node.op_type == "Swish" for node in side.nodes) else 25


def _outputs(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    wanted = {i.name for i in session.get_inputs()}
    try:
        results = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
    except _RUNTIME_ERRORS as error:
        raise NoMatch(f"ONNX Runtime cannot run it: {_first_line(error)}") from error
    return [np.asarray(result) for result in results]


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Every exception class that ONNX Runtime's binding raises; it has no common base."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    named = ("Fail", "InvalidArgument", "InvalidGraph", "NotImplemented", "RuntimeException")
    return tuple(getattr(state, name) for name in named)


_RUNTIME_ERRORS = _runtime_errors()


def _first_line(error: Exception) -> str:
    """The part of ONNX Runtime's message that says what is wrong."""
    text = str(error).splitlines()[0].rpartition("Status Message: ")[2]
    return text.split(".cc:")[-1][-160:]


def _judged_dtype(dtype: ir.DataType | None) -> ir.DataType:
    assert dtype is not None
    return ir.DataType.FLOAT if dtype in HALF else dtype


def _judged_attribute(node: ir.Node, attribute: ir.Attr) -> ir.Attr:
    """Casts to half precision become casts to float32; everything else is kept."""
    names_a_dtype = attribute.name in ("to", "dtype", "softmax_precision", "stash_type")
    if names_a_dtype and ir.DataType(attribute.as_int()) in HALF:
        return ir.Attr(attribute.name, ir.AttributeType.INT, int(ir.DataType.FLOAT))
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALF:
        return ir.AttrTensor(
            attribute.name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
        )
    return attribute
