"""CPU time of the axis analysis against the number of nodes, and on a LLaMA of 7 billion parameters.

    python benchmarks/bench_axes.py [--plot docs/axes-time.svg] [--layers 32]

Models of the curves are put together from the blocks of three families, at their published widths, with
weights that have shapes and no bytes. The LLaMA of 7 billion parameters is a Hugging Face directory with
all its published sizes, captured by the frontend; its file of float16 zeros is one hole and takes no disk.
Bar: 1,000 nodes in about 2 s, the 7B model in about 10 s, a growth exponent of at most 1.2 between 100 and
10,000 nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.analysis.axes import analyse
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.ir import types

RUNS = 3
COUNTS = (100, 300, 1000, 3000, 10000)


class Graph:
    """A graph under construction, with weights that nobody reads."""

    def __init__(self, x: ir.Value) -> None:
        self.x = x
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []

    def op(self, kind: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> Any:
        """A node; its output, or its outputs."""
        node = ir.node(kind, inputs, attributes, num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = f"v{len(self.nodes)}_{index}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def weight(self, *shape: int) -> ir.Value:
        """A weight that has no bytes."""

        def missing() -> ir.TensorProtocol:
            raise AssertionError("the analysis read a weight")

        tensor = ir.LazyTensor(missing, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
        return self._keep(tensor)

    def ints(self, *numbers: int) -> ir.Value:
        """A list of sizes."""
        return self._keep(ir.tensor(np.array(numbers, np.int64)))

    def _keep(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=f"w{len(self.weights)}", const_value=tensor)
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        self.weights.append(value)
        return value

    def model(self, out: ir.Value) -> ir.Model:
        """The finished model, typed."""
        graph = ir.Graph(
            [self.x], [out], nodes=self.nodes, initializers=self.weights, opset_imports={"": 25}
        )
        model = ir.Model(graph, ir_version=10)
        types.annotate(model)
        return model


def llama(blocks: int, width: int = 4096, heads: int = 32, hidden: int = 11008) -> ir.Model:
    """Blocks of LLaMA-7B."""
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "s"]))
    g = Graph(ids)
    head = width // heads
    x = g.op("Gather", g.weight(32000, width), ids, axis=0)
    split, merge = g.ints(0, 0, heads, head), g.ints(0, 0, width)
    for _ in range(blocks):
        n = g.op("RMSNormalization", x, g.weight(width), axis=2, epsilon=1e-6)
        q, k, v = (
            g.op("Transpose", g.op("Reshape", g.op("MatMul", n, g.weight(width, width)), split),
                 perm=[0, 2, 1, 3])
            for _ in range(3)
        )  # fmt: skip
        y = g.op("Transpose", g.op("Attention", q, k, v, scale=head**-0.5), perm=[0, 2, 1, 3])
        y = g.op("MatMul", g.op("Reshape", y, merge), g.weight(width, width))
        x = g.op("Add", x, y)
        n = g.op("RMSNormalization", x, g.weight(width), axis=2, epsilon=1e-6)
        gate = g.op("Swish", g.op("MatMul", n, g.weight(width, hidden)), alpha=1.0)
        y = g.op("Mul", gate, g.op("MatMul", n, g.weight(width, hidden)))
        x = g.op("Add", x, g.op("MatMul", y, g.weight(hidden, width)))
    x = g.op("RMSNormalization", x, g.weight(width), axis=2, epsilon=1e-6)
    return g.model(g.op("MatMul", x, g.weight(width, 32000)))


def _image(width: int) -> ir.Value:
    shape = ir.Shape(["b", width, 56, 56])
    return ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)


def _conv(g: Graph, x: ir.Value, width: int, out: int, kernel: int, group: int = 1) -> ir.Value:
    w = g.weight(out, width // group, kernel, kernel)
    y = g.op("Conv", x, w, pads=[kernel // 2] * 4, group=group, kernel_shape=[kernel, kernel])
    y = g.op("BatchNormalization", y, *(g.weight(out) for _ in range(4)))
    return g.op("Relu", y)


def shuffle_net(blocks: int, width: int = 232) -> ir.Model:
    """Units of ShuffleNetV2 one after another: split, convolve one half, concatenate and shuffle."""
    g = Graph(_image(width))
    half, x = width // 2, g.x
    sizes, grouped, flat = g.ints(half, half), g.ints(0, 2, half, 56, 56), g.ints(0, width, 56, 56)
    for _ in range(blocks):
        keep, y = g.op("Split", x, sizes, outputs=2, axis=1)
        y = _conv(g, _conv(g, y, half, half, 1), half, half, 3, group=half)
        x = g.op("Reshape", g.op("Concat", keep, _conv(g, y, half, half, 1), axis=1), grouped)
        x = g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1, 3, 4]), flat)
    return g.model(_conv(g, x, width, width, 1))


def dense_net(blocks: int, growth: int = 32) -> ir.Model:
    """Stages of DenseNet-121: six layers that each read all before them, then a transition."""
    g = Graph(_image(64))
    x = g.x
    for _ in range(blocks):
        width = 64
        for _ in range(6):
            y = _conv(g, _conv(g, x, width, 4 * growth, 1), 4 * growth, growth, 3)
            x, width = g.op("Concat", x, y, axis=1), width + growth
        x = _conv(g, x, width, 64, 1)
    return g.model(x)


def captured_llama(folder: Path, layers: int) -> ir.Model:
    """LLaMA-2-7B (arXiv 2307.09288, table 1) as the frontend captures it from a directory."""
    width, hidden, vocab = 4096, 11008, 32000
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for layer in range(layers):
        root = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{root}.self_attn.{name}.weight"] = (width, width)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{root}.mlp.{name}.weight"] = (hidden, width)
        shapes[f"{root}.mlp.down_proj.weight"] = (width, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{root}.{name}.weight"] = (width,)
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + at)
    print(f"capturing {at / 2e9:.2f}e9 parameters", flush=True)
    return HuggingFaceDirectory().capture(folder).model


def cpu_seconds(model: ir.Model) -> float:
    """Median CPU time of an analysis."""
    taken = []
    for _ in range(RUNS):
        start = time.process_time()
        analyse(model)
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def curve(make: Callable[[int], ir.Model]) -> list[tuple[int, float]]:
    """(nodes, seconds) for models of about the wanted numbers of nodes."""
    per_block = len(list(make(2).graph)) - len(list(make(1).graph))
    models = [make(max(1, round(count / per_block))) for count in COUNTS]
    return [(len(list(model.graph)), cpu_seconds(model)) for model in models]


FAMILIES: Mapping[str, Callable[[int], ir.Model]] = {
    "llama": llama,
    "shuffle_net": shuffle_net,
    "dense_net": dense_net,
}
COLOURS = ("#1f77b4", "#d62728", "#2ca02c")


def plot(curves: Mapping[str, list[tuple[int, float]]]) -> str:
    """The curves as an SVG with logarithmic axes: 100 to 10,000 nodes, 1 ms to 100 s."""

    def place(nodes: float, seconds: float) -> tuple[float, float]:
        return 60 + 200 * (math.log10(nodes) - 2), 20 + 56 * (2 - math.log10(seconds))

    def line(start: tuple[float, float], end: tuple[float, float], style: str) -> str:
        (x1, y1), (x2, y2) = place(*start), place(*end)
        return f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" {style}/>'

    def text(x: float, y: float, said: str, fill: str = "#444") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" fill="{fill}">{said}</text>'

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="620" height="340" font-size="12">']
    parts.append('<rect width="620" height="340" fill="white"/>')
    for power in range(-3, 3):
        parts.append(line((100, 10.0**power), (10000, 10.0**power), 'stroke="#ddd"'))
        parts.append(text(12, place(100, 10.0**power)[1] + 4, f"{10.0**power:g} s"))
    for nodes in (100, 1000, 10000):
        parts.append(line((nodes, 1e-3), (nodes, 100), 'stroke="#ddd"'))
        parts.append(text(place(nodes, 1)[0] - 16, 318, f"{nodes:,}"))
    parts.append(text(240, 335, "nodes"))
    parts.append(line((100, 0.02), (10000, 0.02 * 100**1.2), 'stroke="#888" stroke-dasharray="4"'))
    parts.append(text(470, place(10000, 0.02 * 100**1.2)[1] + 4, "exponent 1.2", "#888"))
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=True):
        for start, end in pairwise(points):
            parts.append(line(start, end, f'stroke="{colour}" stroke-width="2"'))
        parts.append(text(470, 40 + 18 * COLOURS.index(colour), name, colour))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Print the curves and what they amount to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="write the curves here, as SVG")
    parser.add_argument("--layers", type=int, default=32, help="of the LLaMA that is captured")
    options = parser.parse_args()
    print(f"{'family':12}{'nodes':>8}{'CPU s':>9}{'ms a node':>11}")
    curves = {}
    for name, make in FAMILIES.items():
        points = curves[name] = curve(make)
        for nodes, seconds in points:
            print(f"{name:12}{nodes:8}{seconds:9.3f}{1000 * seconds / nodes:11.3f}")
        (n0, t0), (n1, t1) = points[0], points[-1]
        exponent = math.log(t1 / t0) / math.log(n1 / n0)
        print(f"{name:12}growth exponent {exponent:.2f} (bar 1.2)", flush=True)
    if options.plot:
        options.plot.write_text(plot(curves))
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        model = captured_llama(Path(folder), options.layers)
        took = time.process_time() - start
        seconds = cpu_seconds(model)
    nodes = len(list(model.graph))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"LLaMA-2-7B, {options.layers} layers, captured in {took:.0f} s of CPU: {nodes} nodes,")
    print(f"analysed in {seconds:.2f} s of CPU (bar 10); largest resident set {most:.2f} GiB")


if __name__ == "__main__":
    main()
