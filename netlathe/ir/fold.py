"""Constant folding: what reads only constants becomes a constant, but no big weight is made for it.

Three ways, by what a node does:

* a weight that is transposed, reshaped, cast or scaled becomes a lazy recipe over the same tensor;
* other constant nodes are evaluated together by ONNX Runtime with its optimizations off, or one by
  one by `onnx.reference` where ONNX Runtime has no kernel;
* a node stays where its inputs or its result are too big, and the ledger says so.

A weight that something else reads as well (a tied embedding) stays one initializer: what derives
from it stays in the graph. DequantizeLinear stays always, and so does BitShift, which takes bits
apart that were packed: folding them would undo a quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime

from netlathe.ir import edit, provenance, weights
from netlathe.ir.defaults import OPSET
from netlathe.ir.movement import holds
from netlathe.ir.work import Work

Array = npt.NDArray[Any]

# A derived weight up to this size is computed now, a bigger one whenever it is read.
LAZY_BYTES = 16 << 10
# Most bytes of constants that one evaluated node may read, and make without making them fewer.
MOST_READ = 16 << 20
MOST_MADE = 1 << 20
# Weights that must stay one value where they are read in two ways.
_WEIGHT_SIZE = 4096

_IR_VERSION = 10  # of the ONNX format; enough for every dtype, known to every runtime

_DRAWN = frozenset(
    {"Bernoulli", "Multinomial"}
    | {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_NEVER = _DRAWN | {"BitShift", "Constant", "DequantizeLinear", "Dropout", "Identity"}
# Results of these are at most as big as what they read, even where no type is known.
_NOT_BIGGER = frozenset(
    {"Cast", "Concat", "Gather", "Neg", "Reshape", "Shape", "Size", "Slice", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)


def fold(graph: ir.Graph, work: Work) -> None:
    """Fold every constant node of ``graph`` and its subgraphs; nodes must be in order."""
    nodes = [node for node in graph.all_nodes() if node.domain == ""]
    chosen = _choose(nodes, work)
    for node in [node for node in chosen if _derive(node, work)]:
        del chosen[node]
    _evaluate_all(list(chosen), work)


def _choose(nodes: Sequence[ir.Node], work: Work) -> dict[ir.Node, None]:
    """The nodes to fold, in order."""
    chosen: dict[ir.Node, None] = {}
    lazy: set[ir.Node] = set()
    for node in nodes:
        reads = [value for value in node.inputs if value is not None]
        constant = node.op_type not in _NEVER and all(
            weights.is_weight(value) or value.producer() in chosen for value in reads
        )
        graphs = any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())
        if not constant or not reads or graphs or provenance.STORED in node.metadata_props:
            continue
        follows = node.op_type in _MOVEMENTS and reads[0].producer() in lazy
        if follows or _recipe(node, work) is not None:
            lazy.add(node)
            chosen[node] = None
        elif _affordable(node, reads, work):
            chosen[node] = None
    # A weight with a reader that stays must stay; so must then all that derive from it.
    dropped = True
    while dropped:
        dropped = False
        for node in list(chosen):
            makers = [v.producer() for v in node.inputs if v is not None]
            kept = any(maker is not None and maker not in chosen for maker in makers)
            if kept or any(_is_shared(value, node, chosen) for value in node.inputs):
                del chosen[node]
                dropped = True
    return chosen


def _is_shared(value: ir.Value | None, node: ir.Node, chosen: Mapping[ir.Node, None]) -> bool:
    """Whether ``value`` is a weight matrix that something not to be folded reads too."""
    if value is None or not weights.is_weight(value) or value.const_value is None:
        return False
    tensor = value.const_value
    big = tensor.size >= _WEIGHT_SIZE or node.op_type == "Transpose"
    if len(tensor.shape) < 2 or not big or tensor.dtype.is_integer():
        return False
    return value.is_graph_output() or any(user not in chosen for user in value.consumers())


def _affordable(node: ir.Node, reads: Sequence[ir.Value], work: Work) -> bool:
    read = [_num_bytes(value, work) for value in dict.fromkeys(reads)]
    made = [_num_bytes(value, work) for value in node.outputs]
    known_read = sum(size for size in read if size is not None)
    if None in read or None in made:
        return node.op_type in _NOT_BIGGER and known_read <= LAZY_BYTES
    result = sum(size for size in made if size is not None)
    if known_read <= MOST_READ and result <= max(MOST_MADE, known_read):
        return True
    big = "reads" if known_read > MOST_READ else "would make"
    amount = known_read if known_read > MOST_READ else result
    if node.op_type not in ("ConstantOfShape", "Expand", "Range", "Tile"):  # made small on purpose
        work.unfolded[node.outputs[0].name or ""] = (node, f"{big} {amount >> 20} MiB of constants")
    return False


def _num_bytes(value: ir.Value, work: Work) -> int | None:
    type_ = work.type(value)
    if type_.dtype is None or type_.shape is None or type_.dtype == ir.DataType.STRING:
        return None
    sizes = [dim for dim in type_.shape if isinstance(dim, int)]
    if len(sizes) != len(type_.shape):
        return None
    return math.ceil(math.prod(sizes) * type_.dtype.itemsize)


# -- weights as recipes ---------------------------------------------------------------------------


def _derive(node: ir.Node, work: Work) -> bool:
    """Replace a node that derives a weight from a weight by that weight's recipe."""
    made = _recipe(node, work)
    source = node.inputs[0]
    if made is None or source is None or not weights.is_weight(source):
        return False
    tensor = made()
    if tensor.nbytes <= LAZY_BYTES:
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    alone = len(source.uses()) == 1 and not source.is_graph_output()
    _become(node.outputs[0], tensor, work, source.name if alone else None)
    return True


def _recipe(node: ir.Node, work: Work) -> Callable[[], ir.TensorProtocol] | None:
    """How to derive the node's result from the tensor it reads, where that can be lazy."""
    source = node.inputs[0] if node.inputs else None
    if not weights.is_weight(source) or source is None or source.const_value is None:
        return None
    base = source.const_value
    if base.dtype == ir.DataType.STRING:
        return None
    name = node.outputs[0].name or "derived"
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm")
        return None if perm is None else lambda: weights.transposed(base, perm, name)
    if node.op_type in _MOVEMENTS:
        known = work.shape(node.outputs[0])
        shape = [dim for dim in known or () if isinstance(dim, int)]
        if known is None or len(shape) != len(known) or math.prod(shape) != base.size:
            return None
        return lambda: weights.derived(base, lambda a: a.reshape(shape), base.dtype, shape, name)
    dims = base.shape.numpy()
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        halved = base.dtype == ir.DataType.FLOAT and to in (
            ir.DataType.FLOAT16,
            ir.DataType.BFLOAT16,
        )
        if to != ir.DataType.BOOL and (holds(base.dtype, to) or halved):
            return lambda: weights.derived(base, lambda a: _cast(a, to), to, dims, name)
        return None
    if node.op_type in _SCALE and base.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        other = edit.const_array(node.inputs[1])
        if other is not None and other.size == 1 and other.ndim <= len(dims):
            scale = _SCALE[node.op_type]
            return lambda: weights.derived(base, lambda a: scale(a, other), base.dtype, dims, name)
    return None


_MOVEMENTS = frozenset({"Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_SCALE: Mapping[str, Callable[[Array, Array], Array]] = {"Div": np.divide, "Mul": np.multiply}


def _cast(array: Array, to: ir.DataType) -> Array:
    with np.errstate(over="ignore"):  # beyond the range is infinity, as in ONNX
        return array.astype(to.numpy())


def _become(
    output: ir.Value, tensor: ir.TensorProtocol, work: Work, name: str | None = None
) -> None:
    """Let an initializer that holds ``tensor`` stand for ``output``, called ``name`` or like it."""
    node = output.producer()
    assert node is not None
    name = name or output.name
    outputs_name = output.is_graph_output() and name == output.name
    value = work.constant(node, tensor, f"{output.name}_value")
    work.found.types[value] = work.type(value)
    edit.redirect(output, value)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    edit.remove_dead(graph, [node])
    if name and not outputs_name and name not in graph.initializers:
        value.name = name
    work.changed = True
    work.folded += 1


# -- evaluation -----------------------------------------------------------------------------------


def evaluate(value: ir.Value) -> Array | None:
    """What nodes make of constants alone, such as a dequantized weight; None of anything else.

    Nothing is folded: the model stays as it is.
    """
    nodes: dict[ir.Node, None] = {}
    stack = [value.producer()]
    while stack:
        node = stack.pop()
        if node is None or node.op_type in _DRAWN:
            return None
        if node in nodes:
            continue
        nodes[node] = None
        reads = [v for v in node.inputs if v is not None and not weights.is_weight(v)]
        stack += [v.producer() for v in reads]
    graph = value.graph
    if not nodes or not isinstance(graph, ir.Graph):
        return None
    order = [node for node in graph if node in nodes]
    if len(order) < len(nodes):
        return None  # partly made in another graph
    proto = _proto(order, [value], {})
    try:
        return _by_onnxruntime(proto)[0]
    except Exception:  # ONNX Runtime lacks a kernel
        return _by_reference(proto)[0]


def _evaluate_all(nodes: Sequence[ir.Node], work: Work) -> None:
    """Evaluate constant nodes and put initializers in the place of what others read of them."""
    if not nodes:
        return
    inside = set(nodes)
    wanted = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(user not in inside for user in value.consumers())
    ]
    if not wanted:
        return
    arrays: dict[ir.Value, Array]
    try:
        arrays = dict(zip(wanted, _by_onnxruntime(_proto(nodes, wanted, {})), strict=True))
    except Exception:  # ONNX Runtime lacks a kernel for one of them: find out which
        arrays = _one_by_one(nodes, work)
    for value in wanted:
        array = arrays.get(value)
        if array is None:
            continue
        tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=value.name)
        _become(value, tensor, work)


def _by_onnxruntime(proto: onnx.ModelProto) -> list[Array]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(result) for result in session.run(None, {})]


def _by_reference(proto: onnx.ModelProto) -> list[Array]:
    results: Any = onnx.reference.ReferenceEvaluator(proto).run(None, {})
    return [np.asarray(result) for result in results]


def _one_by_one(nodes: Sequence[ir.Node], work: Work) -> dict[ir.Value, Array]:
    """Evaluate node after node, each by whichever evaluator can."""
    arrays: dict[ir.Value, Array] = {}
    for node in nodes:
        reads = [value for value in node.inputs if value is not None]
        if not all(value in arrays or weights.is_weight(value) for value in reads):
            continue  # one before it could not be evaluated
        outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        proto = _proto([node], outputs, arrays)
        reasons = []
        for evaluate in (_by_onnxruntime, _by_reference):
            try:
                arrays.update(zip(outputs, evaluate(proto), strict=True))
                break
            except Exception as error:  # evaluators raise anything where they lack a kernel
                reasons.append(" ".join(str(error).split())[:200])
        else:
            work.unfolded[node.outputs[0].name or ""] = (node, "; ".join(reasons))
    return arrays


def _proto(
    nodes: Sequence[ir.Node], wanted: Sequence[ir.Value], arrays: Mapping[ir.Value, Array]
) -> onnx.ModelProto:
    """A model without inputs that computes ``wanted``; ``arrays`` are values already known."""
    graph = onnx.GraphProto(name="constants")
    graph.node.extend(ir.serde.serialize_node(node) for node in nodes)
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in wanted)
    for value in dict.fromkeys(v for node in nodes for v in node.inputs if v is not None):
        known = arrays.get(value)
        tensor = ir.tensor(known) if known is not None else value.const_value
        if tensor is None or (known is None and not weights.is_weight(value)):
            continue
        held = graph.initializer.add()
        ir.serde.serialize_tensor_into(held, ir.Tensor(tensor.numpy(), dtype=tensor.dtype))
        held.name = value.name or ""
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION
    )
