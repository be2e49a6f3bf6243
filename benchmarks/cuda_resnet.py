"""ResNet-50 or ResNeXt-50 on a GPU, in float16 or bfloat16, 64 images or more: against torch, channels last.

    python benchmarks/cuda_resnet.py build DIR          # where nvcc and NetLathe are; no GPU needed
    python DIR/cuda_resnet.py run DIR                   # where the GPU is; torch, tvm_ffi and TVM's runtime

The networks (arXiv 1512.03385, table 1; arXiv 1611.05431, table 1, 32 x 4d) are written out here with their
normalizations folded into convolutions, as the frontend leaves them. Weights are random, made on the GPU, and
the same on both sides. torch runs its convolutions by cuDNN, which may try all its kernels first
(``cudnn.benchmark``), on tensors with channels last. Both sides run from CUDA graphs, in turn; times are
medians of CUDA events, and outputs are compared with torch's in float32 as ||ours - theirs|| / ||theirs||.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_cuda import INSIDE, ROUNDS, Bench
from cuda_conv import rows_by_channels, taps_by_channels

HALVES = ("float16", "bfloat16")
BLOCKS = (3, 4, 6, 3)
# Channels inside of the first stage's blocks, and in how many groups.
NETWORKS = {"ResNet-50": (64, 1), "ResNeXt-50": (128, 32)}


@dataclass(frozen=True)
class Conv:
    """A convolution of ``inputs`` with ``outputs`` channels by square windows, then a bias."""

    name: str
    inputs: int
    outputs: int
    size: int
    stride: int = 1
    group: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the weight."""
        return self.outputs, self.inputs // self.group, self.size, self.size


@dataclass(frozen=True)
class Block:
    """A bottleneck: three convolutions, and one beside them where sizes change."""

    convs: tuple[Conv, Conv, Conv]
    beside: Conv | None


def blocks(network: str) -> list[Block]:
    """The stages' blocks in order."""
    made, inputs = [], 64
    first, group = NETWORKS[network]
    for stage, count in enumerate(BLOCKS):
        width, outputs = first << stage, 256 << stage
        for number in range(count):
            name = f"s{stage}b{number}"
            stride = 2 if stage and not number else 1
            beside = None if number else Conv(f"{name}d", inputs, outputs, 1, stride)
            convs = (
                Conv(f"{name}x", inputs, width, 1),
                Conv(f"{name}y", width, width, 3, stride, group),
                Conv(f"{name}z", width, outputs, 1),
            )
            made.append(Block(convs, beside))
            inputs = outputs
    return made


STEM = Conv("stem", 3, 64, 7, 2)
CLASSES = 1000


# -- building --------------------------------------------------------------------------------------


def graph(network: str, batch: int, half: str) -> Any:
    """The network as IR; of its constants only shapes matter."""
    import onnx_ir as ir

    from netlathe.ir import normal

    body: list[str] = []
    constants: dict[str, tuple[int, ...]] = {"head": (2048, CLASSES), "classes": (CLASSES,)}

    def conv(c: Conv, x: str, out: str) -> None:
        constants[f"{c.name}w"], constants[f"{c.name}b"] = c.shape, (c.outputs,)
        pad = c.size // 2
        how = f"strides = [{c.stride}, {c.stride}], pads = [{pad}, {pad}, {pad}, {pad}]"
        how += f", group = {c.group}"
        body.append(f"{out} = Conv <{how}> ({x}, {c.name}w, {c.name}b)")

    conv(STEM, "image", "c0")
    body.append("r0 = Relu (c0)")
    window = "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]"
    body.append(f"x0 = MaxPool <{window}> (r0)")
    for i, block in enumerate(blocks(network)):
        x, y, z = block.convs
        conv(x, f"x{i}", f"a{i}")
        body.append(f"b{i} = Relu (a{i})")
        conv(y, f"b{i}", f"d{i}")
        body.append(f"e{i} = Relu (d{i})")
        conv(z, f"e{i}", f"f{i}")
        kept = f"x{i}"
        if block.beside is not None:
            kept = f"g{i}"
            conv(block.beside, f"x{i}", kept)
        body.append(f"h{i} = Add (f{i}, {kept})")
        body.append(f"x{i + 1} = Relu (h{i})")
    body.append(f"mean = GlobalAveragePool (x{sum(BLOCKS)})")
    body.append("flat = Flatten (mean)")
    body.append("product = MatMul (flat, head)")
    body.append("y = Add (product, classes)")
    text = "\n".join(body)
    model = ir.from_onnx_text(
        f"""<ir_version: 12, opset_import: ["" : 25]>
        g ({half}[{batch}, 3, 224, 224] image) => ({half}[{batch}, {CLASSES}] y) {{ {text} }}"""
    )
    used = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    dtype = ir.DataType[half.upper()]
    rng = np.random.default_rng(0)  # equal constants would become one
    for name, shape in constants.items():
        value = used[name]
        value.const_value = ir.Tensor(rng.standard_normal(shape).astype(dtype.numpy()), dtype=dtype)
        value.dtype, value.shape = dtype, ir.Shape(shape)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


def build(folder: Path, archs: str, network: str, batch: int, half: str) -> None:
    """Compile it."""
    from netlathe.backends.tvm import process, runtime, toolchain
    from netlathe.backends.tvm.cuda.machine import gpu

    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__)
    beside = [here.with_name(name) for name in ("bench_cuda.py", "cuda_conv.py")]
    for file in (here, *beside, Path(runtime.__file__)):
        shutil.copyfile(file, folder / file.name)
    machine = gpu(archs.split(","))
    built = process.build(
        graph(network, batch, half), machine, folder / "resnet.so", (toolchain.compiler(),)
    )
    recipes = [(p.recipe, p.shape) for p in built.parameters]
    facts = [(r.sources, r.function.__name__, r.numbers, shape) for r, shape in recipes]
    about = {"parameters": facts, "network": network, "batch": batch, "half": half}
    (folder / "resnet.json").write_text(json.dumps(about))


# -- measuring -------------------------------------------------------------------------------------


class Net:
    """Weights on the GPU, as torch has them, and both sides' calls."""

    def __init__(self, bench: Bench) -> None:
        self.bench, torch = bench, bench.torch
        self.main, self.facts = bench.load("resnet")
        self.dtype = getattr(torch, self.facts["half"])
        self.blocks = blocks(self.facts["network"])
        self.weights: dict[str, Any] = {}
        every = [STEM]
        for block in self.blocks:
            every += [*block.convs, *([block.beside] if block.beside else [])]
        for conv in every:
            scale = (2 * conv.group / (conv.inputs * conv.size**2)) ** 0.5
            scale *= 0.5 if conv.name.endswith("z") else 1
            made = torch.randn(conv.shape, device="cuda") * scale
            self.weights[f"{conv.name}w"] = made
            self.weights[f"{conv.name}b"] = 0.1 * torch.randn(conv.outputs, device="cuda")
        self.weights["head"] = torch.randn((2048, CLASSES), device="cuda") / 45
        self.weights["classes"] = torch.randn(CLASSES, device="cuda")
        self.weights = {name: made.to(self.dtype) for name, made in self.weights.items()}

    def ours(self, image: Any) -> Callable[[], Any]:
        """A call of our program, whose parameters are torch's weights laid out anew."""
        given = [image]
        for sources, function, numbers, shape in self.facts["parameters"]:
            weight = self.weights[sources[0]]
            if function == "taps_by_channels":
                weight = taps_by_channels(weight, *numbers)
            elif function == "rows_by_channels":
                weight = rows_by_channels(weight, *numbers)
            elif function == "transposed":
                weight = weight.t()
            given.append(weight.reshape(shape).contiguous())
        bits = self.bench.torch.uint16 if self.facts["half"] == "bfloat16" else self.dtype
        own = [self.bench.ffi.from_dlpack(x.view(bits)) for x in given]
        return lambda: self.main(*own)

    def theirs(self, image: Any, weights: dict[str, Any]) -> Any:
        """torch's result."""
        torch = self.bench.torch

        def conv(c: Conv, x: Any) -> Any:
            w, b = weights[f"{c.name}w"], weights[f"{c.name}b"]
            return torch.conv2d(x, w, b, c.stride, c.size // 2, 1, c.group)

        x = torch.max_pool2d(torch.relu(conv(STEM, image)), 3, 2, 1)
        for block in self.blocks:
            a, b, c = block.convs
            y = conv(c, torch.relu(conv(b, torch.relu(conv(a, x)))))
            x = torch.relu(y + (conv(block.beside, x) if block.beside else x))
        return x.mean((2, 3)) @ weights["head"] + weights["classes"]


def run(folder: Path, write: Path | None) -> None:
    """Measure both sides."""
    bench = Bench(folder.resolve())
    torch = bench.torch
    torch.backends.cudnn.benchmark = True
    net = Net(bench)
    batch = net.facts["batch"]
    image = torch.randn((batch, 3, 224, 224), device="cuda").to(net.dtype)
    ours = net.ours(image)
    found = torch.from_dlpack(ours()[0]).view(net.dtype).float()
    wide = {name: weight.float() for name, weight in net.weights.items()}
    wanted = net.theirs(image.float(), wide)
    error = float((found - wanted).norm() / wanted.norm())
    last = {
        name: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w
        for name, w in net.weights.items()
    }
    turned = image.to(memory_format=torch.channels_last)
    sides: dict[str, Callable[[], Any]] = {"ours": ours, "torch": lambda: net.theirs(turned, last)}
    replays = {}
    for side, call in sides.items():
        kept = [call() for _ in range(3)]
        del kept
        torch.cuda.synchronize()
        graph_ = torch.cuda.CUDAGraph()
        with bench.ffi.use_torch_stream(torch.cuda.graph(graph_)):
            held = call()
        replays[side] = (graph_, held)
    for graph_, _ in replays.values():
        bench.milliseconds(graph_.replay, INSIDE)
    rounds = [
        [bench.milliseconds(graph_.replay, INSIDE) for graph_, _ in replays.values()]
        for _ in range(ROUNDS)
    ]
    mine, peer = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"{bench.results['gpu']}: {net.facts['network']}, {net.facts['half']}, {batch} images: {mine:.3f} ms,"
        f" torch {peer:.3f} ms,"
        f" share {peer / mine:.3f}, error {error:.1e}"
    )
    if write is not None:
        write.write_text(json.dumps({"ms": mine, "torch_ms": peer, "error": error}) + "\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archs", default="sm_90a", help="build: architectures, with commas")
    parser.add_argument("--json", type=Path, help="run: write the numbers here too")
    parser.add_argument("--network", choices=NETWORKS, default="ResNet-50", help="build: which")
    parser.add_argument("--batch", type=int, default=64, help="build: images")
    parser.add_argument("--half", choices=HALVES, default=HALVES[0], help="build: the type")
    given = parser.parse_args()
    if given.what == "build":
        build(given.folder, given.archs, given.network, given.batch, given.half)
    else:
        run(given.folder, given.json)


if __name__ == "__main__":
    main()
