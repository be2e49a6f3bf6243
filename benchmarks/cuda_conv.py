"""Convolutions on a GPU, one at a time: against cuDNN, and on ragged shapes against float64.

    python benchmarks/cuda_conv.py build DIR            # where nvcc and NetLathe are; no GPU needed
    python DIR/cuda_conv.py check DIR                   # where the GPU is; torch, tvm_ffi and TVM's runtime
    python DIR/cuda_conv.py speed DIR

Tensors have channels last. Ours adds a bias and applies ReLU, and adds a residual where a row says so; cuDNN,
which may try all its kernels first, makes the bare convolution. Times are of CUDA graphs of 20 calls, in
turn, medians of CUDA events; bytes are those of the input, the result and the residual. Errors are
||ours - reference|| / ||reference||; ``check`` fails above what rounding the result twice gives.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_cuda import ROUNDS, Bench

CALLS = 20
BOUNDS = {"float16": 3.2e-4, "bfloat16": 2.5e-3}


@dataclass(frozen=True)
class Layer:
    """A convolution of [images, inputs, rows, columns] by square windows, a bias, perhaps a residual, ReLU.

    ``pool``: what follows, a MaxPool or AveragePool of 3 x 3 by 2 with a border of 1. ``sizes``: the model
    has names for the images, rows and columns.
    """

    images: int
    inputs: int
    rows: int
    columns: int
    outputs: int
    window: int
    stride: int = 1
    pad: int | None = None  # half of the window
    group: int = 1
    dilation: int = 1
    residual: bool = False
    half: str = "float16"
    pool: str = ""
    sizes: bool = False

    @property
    def border(self) -> int:
        """On all sides."""
        return self.window // 2 if self.pad is None else self.pad

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the result, before a pool."""
        reach = 2 * self.border - self.dilation * (self.window - 1) - 1
        return (self.rows + reach) // self.stride + 1, (self.columns + reach) // self.stride + 1


def square(inputs: int, size: int, outputs: int, window: int, **more: Any) -> Layer:
    """64 images of ``size`` x ``size``."""
    return Layer(64, inputs, size, size, outputs, window, **more)


SPEED = {
    "3 x 3, 64, 56": square(64, 56, 64, 3),
    "3 x 3, 128, 28": square(128, 28, 128, 3),
    "3 x 3, 256, 14": square(256, 14, 256, 3),
    "3 x 3, 512, 7": square(512, 7, 512, 3),
    "3 x 3 by 2, 128, 56": square(128, 56, 128, 3, stride=2),
    "3 x 3, 256, 56": square(256, 56, 256, 3),
    "1 x 1, 64 to 256, 56, residual": square(64, 56, 256, 1, residual=True),
    "1 x 1, 256 to 64, 56": square(256, 56, 64, 1),
    "1 x 1, 256 to 1024, 14, residual": square(256, 14, 1024, 1, residual=True),
    "1 x 1, 1024 to 256, 14": square(1024, 14, 256, 1),
    "1 x 1 by 2, 256 to 512, 56": square(256, 56, 512, 1, stride=2),
    "7 x 7 by 2, 3 to 64, 224": square(3, 224, 64, 7, stride=2),
    "3 x 3, 128 in 32 groups, 56": square(128, 56, 128, 3, group=32),
    "3 x 3 by 2, 256 in 32, 56": square(256, 56, 256, 3, stride=2, group=32),
    "3 x 3, 256 in 32, 28": square(256, 28, 256, 3, group=32),
    "3 x 3 by 2, 512 in 32, 28": square(512, 28, 512, 3, stride=2, group=32),
    "3 x 3, 512 in 32, 14": square(512, 14, 512, 3, group=32),
    "3 x 3 by 2, 1024 in 32, 14": square(1024, 14, 1024, 3, stride=2, group=32),
    "3 x 3, 1024 in 32, 7": square(1024, 7, 1024, 3, group=32),
    "3 x 3, 104 in 13, 28": square(104, 28, 104, 3, group=13),
    "3 x 3, 216 in 9, 28": square(216, 28, 216, 3, group=9),
    "3 x 3, 432 in 9, 14": square(432, 14, 432, 3, group=9),
    "3 x 3, 448 in 4, 28": square(448, 28, 448, 3, group=4),
    "depthwise 3 x 3, 32, 112": square(32, 112, 32, 3, group=32),
    "depthwise 3 x 3, 144, 56": square(144, 56, 144, 3, group=144),
    "depthwise 3 x 3 by 2, 144, 56": square(144, 56, 144, 3, stride=2, group=144),
    "depthwise 3 x 3, 384, 14": square(384, 14, 384, 3, group=384),
    "depthwise 5 x 5, 384, 14": square(384, 14, 384, 5, group=384),
}
RAGGED = [
    Layer(2, 72, 37, 41, 70, 3),
    Layer(3, 40, 14, 15, 40, 3, residual=True),
    Layer(1, 64, 9, 30, 130, 3, pad=2, dilation=2),
    Layer(2, 136, 17, 17, 200, 1, stride=2),
    Layer(2, 136, 17, 17, 200, 1, stride=2, sizes=True),
    Layer(2, 36, 13, 7, 64, 1, residual=True),
    Layer(5, 128, 7, 7, 256, 3, stride=2, sizes=True),
    Layer(1, 48, 33, 20, 96, 5, stride=3),
    Layer(130, 64, 7, 7, 64, 3),
    Layer(2, 3, 37, 41, 70, 7, stride=2, pool="MaxPool"),
    Layer(2, 3, 37, 41, 72, 7, stride=2, sizes=True),
    Layer(2, 40, 21, 23, 37, 3, pad=0, pool="AveragePool"),
    Layer(3, 37, 19, 23, 37, 3, stride=2, group=37, dilation=2),
    Layer(2, 20, 9, 9, 20, 5, group=20, sizes=True),
    Layer(1, 24, 40, 33, 24, 7, pad=2, group=24),
    Layer(2, 32, 9, 9, 64, 3, group=4),
    Layer(2, 96, 17, 19, 96, 3, stride=2, group=24, residual=True),
    Layer(3, 144, 13, 11, 144, 3, group=3, dilation=2),
    Layer(1, 224, 9, 12, 224, 3, group=2, sizes=True),
    Layer(2, 66, 9, 9, 44, 3, group=11),
    Layer(2, 240, 9, 9, 240, 1, group=3),
    Layer(2, 33, 9, 9, 66, 5, group=33),
    Layer(2, 130, 9, 9, 130, 3, group=2),
    Layer(65, 96, 7, 7, 192, 3, group=3, pool="MaxPool"),
    Layer(2, 3, 64, 48, 96, 16, stride=16, pad=0),
    Layer(2, 3, 65, 48, 96, 8, stride=8, pad=3),
]
CHECKS = {
    f"{half} {number}": Layer(**{**asdict(layer), "half": half})
    for half in ("float16", "bfloat16")
    for number, layer in enumerate(RAGGED)
}


# -- building --------------------------------------------------------------------------------------


def graph(layer: Layer) -> Any:
    """The layer as IR, with channels last at its ends; of its constants only shapes matter."""
    import onnx_ir as ir

    from netlathe.ir import normal

    def tensor(channels: int, rows: int | str, columns: int | str) -> str:
        images = "b" if layer.sizes else layer.images
        return f"{layer.half}[{images}, {rows}, {columns}, {channels}]"

    first, turned = "Transpose <perm = [0, 3, 1, 2]>", "Transpose <perm = [0, 2, 3, 1]>"
    stride, pad, dilation = ([n, n] for n in (layer.stride, layer.border, layer.dilation))
    how = f"strides = {stride}, pads = {pad + pad}, dilations = {dilation}, group = {layer.group}"
    body = [f"image = {first} (x)", f"c = Conv <{how}> (image, w, bias)"]
    body.append(f"k = {first} (kept)\nz = Add (c, k)" if layer.residual else "z = Identity (c)")
    body.append("v = Relu (z)")
    if layer.pool:
        window = "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]"
        body.append(f"q = {layer.pool} <{window}> (v)")
    body.append(f"y = {turned} ({'q' if layer.pool else 'v'})")
    end: tuple[int | str, ...] = ("h2", "w2") if layer.sizes or layer.pool else layer.out
    start: tuple[int | str, ...] = ("h", "w") if layer.sizes else (layer.rows, layer.columns)
    given = [f"{tensor(layer.inputs, *start)} x"]
    if layer.residual:
        given.append(f"{tensor(layer.outputs, *end)} kept")
    lines = "\n".join(body)
    model = ir.from_onnx_text(
        f"""<ir_version: 12, opset_import: ["" : 22]>
        g ({", ".join(given)}) => ({tensor(layer.outputs, *end)} y) {{ {lines} }}"""
    )
    used = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    dtype = ir.DataType[layer.half.upper()]
    size = (layer.outputs, layer.inputs // layer.group, layer.window, layer.window)
    for name, shape in (("w", size), ("bias", (layer.outputs,))):
        value = used[name]
        value.const_value = ir.Tensor(np.zeros(shape, dtype.numpy()), dtype=dtype)
        value.dtype, value.shape = dtype, ir.Shape(shape)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


def build(folder: Path, archs: str) -> None:
    """Compile every layer."""
    from netlathe.backends.tvm import process, runtime, toolchain
    from netlathe.backends.tvm.cuda.machine import gpu

    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__)
    for file in (here, here.with_name("bench_cuda.py"), Path(runtime.__file__)):
        shutil.copyfile(file, folder / file.name)
    layers = {**SPEED, **CHECKS}
    models = [graph(layer) for layer in layers.values()]
    libraries = [folder / f"{name}.so" for name in layers]
    linker = (toolchain.compiler(),)
    built = process.build_each(models, gpu(archs.split(",")), libraries, linker)
    for name, made in zip(layers, built, strict=True):
        recipes = [(p.recipe, p.shape) for p in made.parameters]
        facts = [(r.sources, r.function.__name__, r.numbers, shape) for r, shape in recipes]
        (folder / f"{name}.json").write_text(json.dumps({"parameters": facts}))


# -- measuring -------------------------------------------------------------------------------------


def taps_by_channels(weight: Any, channels: int, groups: int, together: int) -> Any:
    """torch's weight [outputs, inputs of a group, r, s] as kernels of tensor cores read it."""
    turned = weight.permute(0, 2, 3, 1)
    made = turned.new_zeros((*turned.shape[:3], channels))
    each, inputs = len(weight) // groups, turned.shape[3]
    for group in range(groups):
        own, first = slice(group * each, (group + 1) * each), group % together * inputs
        made[own, ..., first : first + inputs] = turned[own]
    return made


def rows_by_channels(weight: Any, channels: int, deep: int) -> Any:
    """torch's weight [outputs, inputs, r, s] where a row of the window is one piece."""
    turned = weight.permute(0, 2, 3, 1)
    outputs, down, wide, inputs = turned.shape
    made = turned.new_zeros((outputs, down, deep))
    made[..., : wide * channels].view(outputs, down, wide, channels)[..., :inputs] = turned
    return made


class Both:
    """A layer's inputs and weights on the GPU, and both sides' calls."""

    def __init__(self, bench: Bench, name: str, layer: Layer) -> None:
        self.bench, self.layer, torch = bench, layer, bench.torch
        self.main, self.facts = bench.load(name)
        self.dtype = getattr(torch, layer.half)

        def random(*shape: int, scale: float = 1.0) -> Any:
            return (torch.randn(shape, device="cuda") * scale).to(self.dtype)

        inputs = layer.inputs // layer.group
        self.x = random(layer.images, layer.inputs, layer.rows, layer.columns)
        size = (layer.outputs, inputs, layer.window, layer.window)
        self.weight = random(*size, scale=(inputs * layer.window**2) ** -0.5)
        self.bias = random(layer.outputs)
        self.kept = random(layer.images, layer.outputs, *layer.out) if layer.residual else None

    def ours(self) -> Callable[[], Any]:
        """A call of our program, whose parameters are torch's weights laid out anew."""
        torch = self.bench.torch
        images = [self.x] if self.kept is None else [self.x, self.kept]
        given = [image.permute(0, 2, 3, 1).contiguous() for image in images]
        for (source, *_), function, numbers, shape in self.facts["parameters"]:
            value = self.bias if source == "bias" else self.weight
            if function == "taps_by_channels":
                value = taps_by_channels(value, *numbers)
            elif function == "rows_by_channels":
                value = rows_by_channels(value, *numbers)
            elif function == "taps_first":
                value = value.reshape(value.shape[0], -1).t()
            given.append(value.reshape(shape).contiguous())
        bits = torch.uint16 if self.dtype == torch.bfloat16 else self.dtype
        own = [self.bench.ffi.from_dlpack(x.view(bits)) for x in given]
        return lambda: self.main(*own)

    def convolved(self, x: Any, weight: Any, bias: Any) -> Any:
        """torch's convolution."""
        layer = self.layer
        how = (layer.stride, layer.border, layer.dilation, layer.group)
        return self.bench.torch.conv2d(x, weight, bias, *how)

    def wanted(self) -> Any:
        """The whole layer in float64."""
        functional = self.bench.torch.nn.functional
        y = self.convolved(self.x.double(), self.weight.double(), self.bias.double())
        y = (y if self.kept is None else y + self.kept.double()).relu()
        if self.layer.pool == "MaxPool":
            y = functional.max_pool2d(y, 3, 2, 1)
        elif self.layer.pool:
            y = functional.avg_pool2d(y, 3, 2, 1, count_include_pad=False)
        return y

    def error(self) -> float:
        """Of our result."""
        found = self.bench.torch.from_dlpack(self.ours()()[0]).view(self.dtype)
        wanted = self.wanted()
        return float((found.permute(0, 3, 1, 2).double() - wanted).norm() / wanted.norm())

    def theirs(self) -> Callable[[], Any]:
        """A call of cuDNN's convolution."""
        last = {"memory_format": self.bench.torch.channels_last}
        x, weight = self.x.to(**last), self.weight.to(**last)
        return lambda: self.convolved(x, weight, None)

    def bytes(self) -> int:
        """Of the input, the result and the residual."""
        result = self.layer.images * self.layer.outputs * self.layer.out[0] * self.layer.out[1]
        return 2 * (int(self.x.numel()) + (1 + self.layer.residual) * result)


def check(bench: Bench) -> None:
    """Errors of the ragged layers."""
    worst: dict[str, float] = {}
    for name, layer in CHECKS.items():
        error = Both(bench, name, layer).error()
        worst[layer.half] = max(worst.get(layer.half, 0.0), error)
        print(f"{name:14s} {error:.1e}  {layer}", flush=True)
    print(", ".join(f"{half}: at most {error:.1e}" for half, error in worst.items()))
    if any(not error < BOUNDS[half] for half, error in worst.items()):
        raise SystemExit("beyond the bound")


def speed(bench: Bench) -> None:
    """Times of both sides in turn."""
    torch = bench.torch
    torch.backends.cudnn.benchmark = True
    rate = bench.copy_rate()
    print(f"{bench.results['gpu']}: copies {rate / 1e6:.0f} GB/s")
    for name, layer in SPEED.items():
        both = Both(bench, name, layer)
        graphs = []
        for call in (both.ours(), both.theirs()):
            kept = [call() for _ in range(3)]
            del kept
            torch.cuda.synchronize()
            graph_ = torch.cuda.CUDAGraph()
            with bench.ffi.use_torch_stream(torch.cuda.graph(graph_)):
                for _ in range(CALLS):
                    call()
            bench.milliseconds(graph_.replay, 2)
            graphs.append(graph_)
        rounds = [[bench.milliseconds(g.replay, 1) / CALLS for g in graphs] for _ in range(ROUNDS)]
        ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        work = 2 * layer.images * layer.outputs * layer.out[0] * layer.out[1]
        work *= layer.inputs // layer.group * layer.window**2
        print(
            f"{name:34s} {ours * 1e3:6.1f} us, cuDNN {theirs * 1e3:6.1f}, share {theirs / ours:.2f};"
            f" {work / ours / 1e9:4.0f} TFLOP/s, {both.bytes() / ours / rate:.2f} of a copy's rate,"
            f" error {both.error():.1e}",
            flush=True,
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["build", "check", "speed"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archs", default="sm_90a", help="build: architectures, with commas")
    given = parser.parse_args()
    if given.what == "build":
        build(given.folder, given.archs)
        return
    bench = Bench(given.folder.resolve())
    (check if given.what == "check" else speed)(bench)


if __name__ == "__main__":
    main()
