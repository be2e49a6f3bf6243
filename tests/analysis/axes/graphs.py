"""Random models put together from the blocks that real ones are made of.

A model is a stream that blocks read and write: sequences ``[b, s, width]`` or images
``[b, width, 8, 8]`` with dynamic b and s. Sizes are small and often equal to each other by chance, which
is when a wrong alignment would go unnoticed by its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st

from netlathe.ir import normal

Draw = Callable[[Any], Any]


class Builder:
    """A graph under construction; values carry no types until `finish`."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """A node; its output, or its outputs if there are several."""
        node = ir.node(kind, inputs, attributes, num_outputs=outputs)
        for value in node.outputs:
            value.name = f"v{sum(len(n.outputs) for n in self.nodes)}_{value.index()}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, array: Any) -> ir.Value:
        """An initializer."""
        tensor = ir.tensor(np.asarray(array))
        name = f"w{len(self.weights)}"
        value = ir.Value(name=name, const_value=tensor)
        self.weights.append(value)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """A list of sizes."""
        return self.constant(np.array(numbers, np.int64))

    def weight(self, *shape: int, fan_in: int = 1) -> ir.Value:
        """Random numbers that keep the scale of what they multiply."""
        array = self.rng.standard_normal(shape) / np.sqrt(fan_in)
        return self.constant(array.astype(np.float32))

    def choose(self, *options: Any) -> Any:
        """One of several."""
        return self.draw(st.sampled_from(options))

    def finish(self, x: ir.Value, out: ir.Value) -> ir.Model:
        """The model, in normal form."""
        out.name = "out"
        graph = ir.Graph(
            [x],
            [out],
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": 25},
            name="g",
        )
        model = ir.Model(graph, ir_version=10)
        normal.normalize(model)
        return model


# -- sequences [b, s, width] ------------------------------------------------------------------------------


def _linear(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    y = b.op("MatMul", x, b.weight(width, out, fan_in=width))
    return b.op("Add", y, b.weight(out)) if b.choose(True, False) else y


def _norm(b: Builder, x: ir.Value, width: int) -> ir.Value:
    scale = b.weight(width)
    if b.choose(True, False):
        return b.op("RMSNormalization", x, scale, axis=-1, epsilon=0.01)
    return b.op("LayerNormalization", x, scale, b.weight(width), axis=-1, epsilon=0.01)


def _act(b: Builder, x: ir.Value) -> ir.Value:
    return b.op(b.choose("Relu", "Sigmoid", "Tanh", "Gelu", "Neg"), x)


def _ffn(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    hidden = b.choose(2, 3, 4, 6)
    kind = b.choose("plain", "gated", "fused")
    if kind == "plain":
        y = _act(b, _linear(b, x, width, hidden))
    elif kind == "gated":
        gate = b.op("Swish", _linear(b, x, width, hidden))
        y = b.op("Mul", gate, _linear(b, x, width, hidden))
    else:
        both = _linear(b, x, width, 2 * hidden)
        up, gate = b.op("Split", both, b.ints(hidden, hidden), outputs=2, axis=2)
        y = b.op("Mul", up, b.op("Sigmoid", gate))
    return _linear(b, y, hidden, out)


def _attention(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Grouped queries, separate or fused projections, one operator or several."""
    kv, r, h = b.choose(1, 2, 3), b.choose(1, 2), b.choose(2, 4)
    layout = b.choose("separate", "fused", "stacked")
    if layout == "separate":
        q, k, v = (_linear(b, x, width, heads * h) for heads in (kv * r, kv, kv))
    elif layout == "fused":
        every = _linear(b, x, width, (kv * r + 2 * kv) * h)
        q, k, v = b.op("Split", every, b.ints(kv * r * h, kv * h, kv * h), outputs=3, axis=2)
    else:  # per kv head: its queries, its key, its value
        every = b.op("Reshape", _linear(b, x, width, kv * (r + 2) * h), b.ints(0, 0, kv, r + 2, h))
        q = b.op("Slice", every, b.ints(0), b.ints(r), b.ints(3))
        k = b.op("Gather", every, b.constant(np.array(r)), axis=3)
        v = b.op("Gather", every, b.constant(np.array(-1)), axis=3)
    q, k, v = (
        b.op("Transpose", b.op("Reshape", y, b.ints(0, 0, heads, h)), perm=[0, 2, 1, 3])
        for y, heads in ((q, kv * r), (k, kv), (v, kv))
    )
    if b.choose(True, False):
        q, k = _turned(b, x, width, h, q, k)
    if r == 1 and b.choose(True, False):
        scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
        y = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    else:
        y = b.op("Attention", q, k, v, scale=0.5)
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.ints(0, 0, kv * r * h))
    return _linear(b, y, kv * r * h, out)


def _turned(b: Builder, x: ir.Value, width: int, h: int, *heads: ir.Value) -> tuple[ir.Value, ...]:
    """Heads whose pairs of positions, all or half of them, are turned; by angles that the data say."""
    pairs = b.choose(*sorted({h // 2, max(h // 4, 1)}))
    tables = (b.op(act, _linear(b, x, width, pairs)) for act in ("Cos", "Sin"))
    part = {} if 2 * pairs == h else {"rotary_embedding_dim": 2 * pairs}
    options = {"interleaved": b.choose(0, 1), **part}
    cosine, sine = tables
    return tuple(b.op("RotaryEmbedding", y, cosine, sine, **options) for y in heads)


def _parallel(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Attention and FFN side by side, on one input."""
    return b.op("Add", _attention(b, x, width, out), _ffn(b, x, width, out))


def _shared_expert(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Experts, and an FFN behind a gate of one position that all rows go through."""
    gate = b.op("Sigmoid", b.op("MatMul", x, b.weight(width, 1, fan_in=width)))
    return b.op("Add", _experts(b, x, width, out), b.op("Mul", gate, _ffn(b, x, width, out)))


def _experts(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """The best k of several experts, looked up by the router's choice."""
    experts, k, hidden = b.choose(3, 4, 5), b.choose(1, 2), b.choose(2, 3)
    scores = b.op("Softmax", _linear(b, x, width, experts), axis=-1)
    best, index = b.op("TopK", scores, b.ints(k), outputs=2, axis=-1)
    up = b.op("Gather", b.weight(experts, width, hidden, fan_in=width), index, axis=0)
    down = b.op("Gather", b.weight(experts, hidden, out, fan_in=hidden), index, axis=0)
    row = b.op("Unsqueeze", x, b.ints(2, 3))  # [b, s, 1, 1, width]
    y = b.op("MatMul", _act(b, b.op("MatMul", row, up)), down)  # [b, s, k, 1, out]
    y = b.op("Mul", b.op("Squeeze", y, b.ints(3)), b.op("Unsqueeze", best, b.ints(3)))
    return b.op("ReduceSum", y, b.ints(2), keepdims=0)


def _concat_split(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Put together at one boundary, taken apart at another."""
    one, two = b.choose(2, 3, 5), b.choose(3, 4, 6)
    y = b.op("Concat", _linear(b, x, width, one), _act(b, _linear(b, x, width, two)), axis=2)
    at = b.draw(st.integers(1, one + two - 1))
    left, right = b.op("Split", y, b.ints(at, one + two - at), outputs=2, axis=2)
    if at * 2 == one + two and b.choose(True, False):
        return _linear(b, b.op("Mul", left, right), at, out)
    return b.op("Add", _linear(b, left, at, out), _linear(b, right, one + two - at, out))


def _shuffle(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """The positions of (g c) as (c g), and what they become regrouped once more."""
    g, c = b.choose(2, 3, 4), b.choose(2, 3, 4)
    y = b.op("Reshape", _linear(b, x, width, g * c), b.ints(0, 0, g, c))
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 1, 3, 2]), b.ints(0, 0, g * c))
    if b.choose(True, False):  # where this meets an axis that is not shuffled, they are one
        y = b.op("Add", y, _linear(b, x, width, g * c))
    return _linear(b, y, g * c, out)


def _slices(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Halves that swap places, as rotary embeddings have it; or every second position."""
    half = b.choose(2, 3)
    y = _linear(b, x, width, 2 * half)
    if b.choose(True, False):
        low = b.op("Slice", y, b.ints(0), b.ints(half), b.ints(2))
        high = b.op("Slice", y, b.ints(half), b.ints(2**62), b.ints(2))
        y = b.op("Add", y, b.op("Concat", b.op("Neg", high), low, axis=2))
        return _linear(b, y, 2 * half, out)
    even = b.op("Slice", y, b.ints(0), b.ints(2**62), b.ints(2), b.ints(2))
    odd = b.op("Slice", y, b.ints(1), b.ints(2**62), b.ints(2), b.ints(2))
    return _linear(b, b.op("Mul", even, b.op("Tanh", odd)), half, out)


def _selection(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Constant positions, in any order, some of them twice."""
    wide = b.choose(3, 5)
    chosen = b.draw(st.lists(st.integers(-wide, wide - 1), min_size=1, max_size=6))
    y = b.op("Gather", _linear(b, x, width, wide), b.ints(*chosen), axis=2)
    return _linear(b, y, len(chosen), out)


def _pad_width(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Zeros before and after: an identity shortcut to a wider stream."""
    wide = b.choose(2, 3)
    y = b.op("Pad", _linear(b, x, width, wide), b.ints(1, 2), None, b.ints(2))
    return _linear(b, b.op("Add", y, _linear(b, x, width, wide + 3)), wide + 3, out)


SEQUENCE = (
    _ffn,
    _attention,
    _parallel,
    _experts,
    _shared_expert,
    _concat_split,
    _shuffle,
    _slices,
    _selection,
    _pad_width,
)


@st.composite
def sequences(draw: Draw, most: int = 4) -> ir.Model:
    """A model ``x [b, s, 3] -> out [b, s, 2]`` of up to ``most`` blocks."""
    b = Builder(draw)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 3]))
    width = draw(st.sampled_from((2, 3, 4, 6)))
    y = _linear(b, x, 3, width)
    for _ in range(draw(st.integers(1, most))):
        block = draw(st.sampled_from(SEQUENCE))
        inner = _norm(b, y, width) if draw(st.booleans()) else y
        if draw(st.booleans()):
            y = b.op("Add", y, block(b, inner, width, width))
        else:
            out = draw(st.sampled_from((2, 3, 4, 6)))
            y, width = block(b, inner, width, out), out
    return b.finish(x, _linear(b, y, width, 2))


# -- images [b, width, 8, 8] ------------------------------------------------------------------------------


def _conv(b: Builder, x: ir.Value, width: int, out: int, kernel: int = 1, group: int = 1) -> Any:
    inner = width // group
    w = b.weight(out, inner, kernel, kernel, fan_in=inner * kernel**2)
    pads = [kernel // 2] * 4
    bias = [b.weight(out)] if b.choose(True, False) else []
    return b.op("Conv", x, w, *bias, pads=pads, group=group)


def _batch_norm(b: Builder, x: ir.Value, width: int) -> ir.Value:
    variance = b.constant(np.square(b.rng.standard_normal(width)).astype(np.float32) + 0.5)
    return b.op("BatchNormalization", x, *(b.weight(width) for _ in range(3)), variance)


def _plain(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    y = _batch_norm(b, _conv(b, x, width, 4, 3), 4)
    return _conv(b, _act(b, y), 4, out)


def _grouped(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    g, i, o = b.choose(2, 3), b.choose(1, 2), b.choose(1, 2)
    y = _conv(b, _conv(b, x, width, g * i), g * i, g * o, 3, group=g)
    return _conv(b, _act(b, y), g * o, out)


def _shuffled(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Grouped convolutions with a channel shuffle between them."""
    g, c = b.choose(2, 3), b.choose(2, 4)
    y = _conv(b, _conv(b, x, width, g * c), g * c, g * c, group=g)
    y = b.op("Reshape", y, b.ints(0, g, c, 8, 8))
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3, 4]), b.ints(0, g * c, 8, 8))
    group = b.choose(1, g, g * c) if c % g == 0 else b.choose(1, g * c)
    return _conv(b, _conv(b, y, g * c, g * c, 3, group=group), g * c, out)


def _units(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Units of ShuffleNetV2, of which each shuffles what the one before shuffled."""
    half = b.choose(2, 3, 4, 6)
    y = _conv(b, x, width, 2 * half)
    for _ in range(b.choose(1, 2, 3)):
        keep, other = b.op("Split", y, b.ints(half, half), outputs=2, axis=1)
        other = _conv(b, _act(b, _conv(b, other, half, half)), half, half, 3, group=half)
        y = b.op("Concat", keep, _conv(b, other, half, half), axis=1)
        y = b.op("Reshape", y, b.ints(0, 2, half, 8, 8))
        y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3, 4]), b.ints(0, 2 * half, 8, 8))
    return _conv(b, y, 2 * half, out)


def stage(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Units of ShuffleNetV1, grouped all through, behind an input that is concatenated or is not."""
    g, c = b.choose(2, 3), b.choose(4, 6)
    stem = g * b.choose(0, 1, 2)  # the input is as wide, where it is concatenated
    y = _conv(b, x, width, stem or g * c)
    for first in (True, False) if stem else (False, False):
        inner, made = g * b.choose(g, 2, 3), g * c - stem if first else g * c
        z = _conv(b, y, stem if first else g * c, inner, group=1 if first else g)
        z = b.op("Reshape", z, b.ints(0, g, inner // g, 8, 8))
        z = b.op("Reshape", b.op("Transpose", z, perm=[0, 2, 1, 3, 4]), b.ints(0, inner, 8, 8))
        z = _conv(b, _conv(b, z, inner, inner, 3, group=inner), inner, made, group=g)
        y = b.op("Concat", y, z, axis=1) if first else b.op("Add", y, z)
    return _conv(b, y, g * c, out)


def _pixels(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Pixel shuffle and back."""
    c = b.choose(2, 3)
    y = b.op("DepthToSpace", _conv(b, x, width, 4 * c), blocksize=2, mode=b.choose("DCR", "CRD"))
    y = b.op("SpaceToDepth", _batch_norm(b, y, c), blocksize=2)
    return _conv(b, y, 4 * c, out)


def _branches(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Branches put together, a part of them taken on: DenseNet, ShuffleNet and YOLO necks."""
    widths = [b.choose(2, 3, 4) for _ in range(3)]
    y = b.op("Concat", *(_act(b, _conv(b, x, width, w)) for w in widths), axis=1)
    y = _batch_norm(b, y, sum(widths))
    at = b.draw(st.integers(1, sum(widths) - 1))
    left, right = b.op("Split", y, b.ints(at, sum(widths) - at), outputs=2, axis=1)
    y = b.op("Concat", _conv(b, left, at, 3), right, axis=1)
    return _conv(b, y, 3 + sum(widths) - at, out)


def _excite(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    """Squeeze and excite."""
    y = b.op("GlobalAveragePool", x)
    y = _conv(b, _act(b, _conv(b, y, width, 3)), 3, width)
    return _conv(b, b.op("Mul", x, b.op("Sigmoid", y)), width, out)


def _group_norm(b: Builder, x: ir.Value, width: int, out: int) -> ir.Value:
    g, c = b.choose(2, 3), b.choose(2, 3)
    y = _conv(b, x, width, g * c)
    scale, bias = b.weight(g * c), b.weight(g * c)
    y = b.op("GroupNormalization", y, scale, bias, num_groups=g, epsilon=0.01)
    return _conv(b, y, g * c, out)


IMAGE = (_plain, _grouped, _shuffled, _units, stage, _pixels, _branches, _excite, _group_norm)


@st.composite
def images(draw: Draw, most: int = 4) -> ir.Model:
    """A model ``x [b, 3, 8, 8] -> out [b, 2]`` of up to ``most`` blocks."""
    b = Builder(draw)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 3, 8, 8]))
    width = draw(st.sampled_from((2, 3, 4, 6)))
    y = _conv(b, x, 3, width, 3)
    for _ in range(draw(st.integers(1, most))):
        block = draw(st.sampled_from(IMAGE))
        if draw(st.booleans()):
            y = b.op("Add", y, block(b, y, width, width))
        else:
            out = draw(st.sampled_from((2, 3, 4, 6)))
            y, width = block(b, y, width, out), out
    y = b.op("Reshape", b.op("GlobalAveragePool", y), b.ints(0, -1))
    return b.finish(x, b.op("MatMul", y, b.weight(width, 2, fan_in=width)))


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    """Random data for the one input, at sizes that no axis of the model has."""
    (x,) = model.graph.inputs
    shape = [
        {"b": 2, "s": 7}[str(d)] if isinstance(d, ir.SymbolicDim) else d for d in x.shape or ()
    ]
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
