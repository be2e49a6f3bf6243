"""What a model costs: parameters, bytes of weights, and multiply-accumulates at given sizes.

Parameters are what training sets, counted as torch counts them: the elements of every floating-point
initializer of at least one dim, and of every integer one that a quantized operator reads as its data.
They are not scalars (an epsilon, a factor), integers (shapes, indices), the running mean and variance
of a BatchNormalization, the scales and zero points of quantized data, or the sizes of a Resize. So a
weight counts the same before and after its quantization. A constant table that no file tells from a
weight (rotary frequencies, a window mask) counts. A tied weight counts once.

Bytes are those of all initializers, scales and constants among them, four-bit data packed.

MACs are those of matrix products, convolutions, attention and recurrent layers, whatever their number
format; an attention mask saves none. Elementwise arithmetic, normalization, reductions, resampling and
Fourier transforms count nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import onnx_ir as ir
import sympy

from netlathe.execute import samples
from netlathe.ir import dims, provenance, types
from netlathe.ir.dims import Dim
from netlathe.ir.printing import show_node
from netlathe.ir.provenance import module_path

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ModuleCost:
    """The share of one module. ``macs`` is None where the size of one of its products is not known."""

    params: int
    bytes: int
    macs: int | None


@dataclass(frozen=True)
class Cost:
    """The whole model, and the share of every module by its path ("" where no path is known).

    A weight belongs to the module that reads it first. ``macs`` is None where some are not known;
    ``unknown`` then shows the nodes to blame.
    """

    params: int
    bytes: int
    macs: int | None
    by_module: Mapping[str, ModuleCost]
    unknown: tuple[str, ...] = ()


def cost(model: ir.Model, sizes: Mapping[str, int] | None = None) -> Cost:
    """The cost of ``model`` with its dynamic dims at ``sizes``; no weight is read.

    Dims that ``sizes`` leaves out take their default of :func:`samples.dynamic_dims`. Of the branches
    of an If the most expensive one counts; the body of a Loop or Scan once per iteration.
    """
    return Meter(model, sizes).read()


def macs_in_names(model: ir.Model) -> dict[ir.Node, Dim]:
    """The MACs of every node of the main graph that has some, in the names of the dynamic dims.

    None where they are not known, or the node holds a graph of its own.
    """
    counter = _InNames(types.infer(model), {})
    found: dict[ir.Node, Dim] = {}
    for node in model.graph:
        macs = counter.one(node)
        if macs is None or macs != 0:
            found[node] = macs
    return found


Narrowed = Callable[[ir.Value], Sequence[Dim] | None]


class Meter:
    """Costs one model, also with other sizes than its own: what it would cost if it were narrower.

    ``narrowed`` gives the sizes of a value's dims where they are other ones, None where they are not.
    """

    def __init__(self, model: ir.Model, sizes: Mapping[str, int] | None = None) -> None:
        self._model = model
        at = {dims.symbol(name): n for name, n in samples.dynamic_dims(model).items()}
        at |= {dims.symbol(name): n for name, n in (sizes or {}).items()}
        self._counter = _Counter(types.infer(model), at)
        self._parameters = {value for value in _initializers(model) if is_parameter(value)}

    def read(self, narrowed: Narrowed = lambda value: None) -> Cost:
        """The cost, as :func:`cost` gives it."""
        counter = self._counter.narrow(narrowed)
        macs = counter.graph(self._model.graph)
        params, size = Counter[str](), Counter[str]()
        for value in _initializers(self._model):
            tensor = value.const_value
            if tensor is not None:
                path = module_path(value)
                sizes = narrowed(value)
                count = tensor.size if sizes is None else _elements(tensor, sizes)
                params[path] += int(count * _codes_in(value)) if value in self._parameters else 0
                size[path] += tensor.nbytes if sizes is None else _bytes(tensor.dtype, count)
        paths = sorted({*params, *size, *macs, *counter.unknown})
        by_module = {
            path: ModuleCost(
                params[path], size[path], None if path in counter.unknown else macs[path]
            )
            for path in paths
        }
        unknown = tuple(text for nodes in counter.unknown.values() for text in nodes)
        total = None if unknown else macs.total()
        return Cost(params.total(), size.total(), total, by_module, unknown)

    def macs(self, node: ir.Node, narrowed: Narrowed = lambda value: None) -> int | None:
        """The MACs of one node of the main graph; None where they are not known."""
        return self._counter.narrow(narrowed).one(node)


def _elements(tensor: ir.TensorProtocol, sizes: Sequence[Dim]) -> int:
    held = zip(tensor.shape.numpy(), sizes, strict=True)
    return math.prod(int(old if new is None else new) for old, new in held)


def _bytes(dtype: ir.DataType, count: int) -> int:
    return -(-count * dtype.bitwidth // 8)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


# -- parameters -----------------------------------------------------------------------------------

_QUANTIZED_DATA: Mapping[str, frozenset[int]] = {
    "BitShift": frozenset({0}),  # bit planes
    "ConvInteger": frozenset({1}),
    "DequantizeLinear": frozenset({0}),
    "MatMulInteger": frozenset({0, 1}),
    "QLinearConv": frozenset({3, 8}),
    "QLinearMatMul": frozenset({0, 3}),
}
# Inputs that hold no parameter even if they are floats.
_NOT_TRAINED: Mapping[str, frozenset[int]] = {
    "BatchNormalization": frozenset({3, 4}),
    "DequantizeLinear": frozenset({1}),
    "QLinearConv": frozenset({1, 4, 6}),
    "QLinearMatMul": frozenset({1, 4, 6}),
    "QuantizeLinear": frozenset({1}),
    "Resize": frozenset({1, 2}),
}
# Between quantized data and the operator that reads it as such.
_MOVEMENTS = frozenset(
    {"Concat", "Gather", "GatherND", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)


def is_parameter(value: ir.Value) -> bool:
    """Whether an initializer holds parameters, as this module defines them."""
    tensor = value.const_value
    if tensor is None or not len(tensor.shape):
        return False
    roles = list(_roles(value))
    if tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 16:
        return not roles or any(
            position not in _NOT_TRAINED.get(node.op_type, ()) for node, position in roles
        )
    # 8-bit and smaller floats are data of a quantized operator as integers are.
    return any(position in _QUANTIZED_DATA.get(node.op_type, ()) for node, position in roles)


def _codes_in(value: ir.Value) -> Fraction:
    """Parameters that an element holds: of bit planes [bits, bytes, 1] one byte has a bit of eight."""
    if any(node.op_type == "BitShift" for node in value.consumers()):
        assert value.const_value is not None
        return Fraction(8, value.const_value.shape.numpy()[0])
    return Fraction(1)


def trains(node: ir.Node, index: int) -> bool:
    """Whether a floating-point vector that a node reads as an input holds parameters."""
    return index not in _NOT_TRAINED.get(node.op_type, ())


def _roles(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Who computes with ``value``, and as which input; looked for through nodes that only move it."""
    stack, seen = [value], {value}
    while stack:
        for node, position in stack.pop().uses():
            widened = provenance.STORED in node.metadata_props
            moved = node.op_type in _MOVEMENTS and (position == 0 or node.op_type == "Concat")
            if widened or moved:
                stack += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
            else:
                yield node, position


# -- multiply-accumulates -------------------------------------------------------------------------


class _UnknownSizeError(Exception):
    """A product whose operands have a dim that only the data decides."""


class _Counter:
    def __init__(self, found: types.Inference, at: Mapping[sympy.Symbol, int]) -> None:
        self._found = found
        self._at = at
        self._sizes: dict[Dim, int | None] = {}
        self._narrowed: Narrowed = lambda value: None
        self.unknown: dict[str, list[str]] = {}  # by module path

    def narrow(self, narrowed: Narrowed) -> _Counter:
        """A counter of the same model that takes the sizes of some dims from ``narrowed``."""
        other = _Counter(self._found, self._at)
        other._sizes, other._narrowed = self._sizes, narrowed
        return other

    def one(self, node: ir.Node) -> int | None:
        """The MACs of a node; None where they are not known."""
        try:
            return self._node(node).total()
        except _UnknownSizeError:
            return None

    def graph(self, graph: ir.Graph) -> Counter[str]:
        """MACs of the nodes of ``graph`` by module path; what cannot be known goes to ``unknown``."""
        macs = Counter[str]()
        for node in graph:
            try:
                macs.update(self._node(node))
            except _UnknownSizeError:
                self.unknown.setdefault(module_path(node), []).append(show_node(node))
        return macs

    def _node(self, node: ir.Node) -> Counter[str]:
        bodies = [
            self.graph(attribute.as_graph())
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.GRAPH
        ]
        if bodies and node.op_type == "If":
            return max(bodies, key=lambda body: body.total())
        if bodies:
            return self._repeated(node, bodies)
        if node.domain and any(_is_weight_like(value) for value in node.inputs):
            raise _UnknownSizeError  # it may well be a product
        rule = _MACS.get(node.op_type) if not node.domain else None
        return Counter({module_path(node): rule(self, node)} if rule else {})

    def _repeated(self, node: ir.Node, bodies: list[Counter[str]]) -> Counter[str]:
        body = sum(bodies, Counter[str]())
        if not body.total():
            return body
        times = self._iterations(node)
        return Counter({path: times * macs for path, macs in body.items()})

    def _iterations(self, node: ir.Node) -> int:
        if node.op_type == "Loop":
            contents = self._found.contents(node.inputs[0])
            if contents is None:
                raise _UnknownSizeError
            return self.size(contents[0])
        axes = node.attributes.get("scan_input_axes")
        return self.shape(node, -1)[axes.as_ints()[-1] if axes is not None else 0]

    def shape(self, node: ir.Node, index: int) -> Sizes:
        """The shape of an input of ``node``."""
        return self._of(node.inputs[index])

    def made(self, node: ir.Node) -> int:
        """The number of elements of the first output."""
        return math.prod(self._of(node.outputs[0]))

    def _of(self, value: ir.Value | None) -> Sizes:
        shape = self._found.type(value).shape
        if shape is None:
            raise _UnknownSizeError
        sizes = None if value is None else self._narrowed(value)
        if sizes is None:
            return tuple(self.size(dim) for dim in shape)
        pairs = zip(shape, sizes, strict=True)
        return tuple(self.size(dim if n is None else n) for dim, n in pairs)

    def size(self, dim: Dim) -> int:
        """A dim as a number."""
        if isinstance(dim, int):
            return dim
        if dim not in self._sizes:
            self._sizes[dim] = dims.evaluate(dim, self._at)
        known = self._sizes[dim]
        if known is None:
            raise _UnknownSizeError
        return known


class _InNames(_Counter):
    """Leaves names in sizes as they are."""

    def one(self, node: ir.Node) -> Any:
        """The MACs of a node; None where they are not known."""
        if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            return None
        return super().one(node)

    def size(self, dim: Dim) -> Any:
        """The dim itself."""
        if dim is None:
            raise _UnknownSizeError
        return dim


def _is_weight_like(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) > 1


def _matmul(c: _Counter, node: ir.Node) -> int:
    return c.made(node) * c.shape(node, 0)[-1]  # ... m k, ... k n -> ... m n


def _gemm(c: _Counter, node: ir.Node) -> int:
    transposed = node.attributes.get("transA")
    a = c.shape(node, 0)
    return c.made(node) * a[0 if transposed is not None and transposed.as_int() else 1]


def _conv(weight: int) -> Callable[[_Counter, ir.Node], int]:
    def rule(c: _Counter, node: ir.Node) -> int:
        return c.made(node) * math.prod(c.shape(node, weight)[1:])  # [o, i/g, *k]

    return rule


def _conv_transpose(c: _Counter, node: ir.Node) -> int:
    return math.prod(c.shape(node, 0)) * math.prod(c.shape(node, 1)[1:])  # [i, o/g, *k]


def _attention(c: _Counter, node: ir.Node) -> int:
    """q k^T and its product with v, over past and present keys."""
    q, k, v = (c.shape(node, index) for index in range(3))
    if len(q) == 3:  # heads packed: [b, s, n h]
        heads = node.attributes["q_num_heads"].as_int()
        kv_heads = node.attributes["kv_num_heads"].as_int()
        batch, length, head_size = q[0], q[1], q[2] // heads
        keys, value_size = k[1], v[2] // kv_heads
    else:
        batch, heads, length, head_size = q
        keys, value_size = k[2], v[3]
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        keys += c.shape(node, 4)[2]
    return batch * heads * length * keys * (head_size + value_size)


def _einsum(c: _Counter, node: ir.Node) -> int:
    """One pass over all letters per pair of operands: what contracting them in order costs at most."""
    left = node.attributes["equation"].as_string().replace(" ", "").partition("->")[0]
    sizes: dict[object, int] = {}
    for index, term in enumerate(left.split(",")):
        shape = c.shape(node, index)
        before, _, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        names = [*before, *range(-hidden, 0), *after]  # dots align at the right
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return (len(node.inputs) - 1) * math.prod(sizes.values())


def _recurrent(c: _Counter, node: ir.Node) -> int:
    x, w, r = (c.shape(node, index) for index in range(3))  # [s, b, i], [d, g h, i], [d, g h, h]
    return x[0] * x[1] * (math.prod(w) + math.prod(r))


_MACS: Mapping[str, Callable[[_Counter, ir.Node], int]] = {
    "Attention": _attention,
    "Conv": _conv(1),
    "ConvInteger": _conv(1),
    "ConvTranspose": _conv_transpose,
    "DeformConv": _conv(1),
    "Einsum": _einsum,
    "GRU": _recurrent,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearConv": _conv(3),
    "QLinearMatMul": _matmul,
    "RNN": _recurrent,
}
