"""Accuracy of quantized image classifiers, with and without equalized layers and corrected biases.

    python benchmarks/bench_quantize_vision.py [--seeds 3]

The ResNet and the ViT of ``bench_prune_vision.py`` and a small MobileNet (inverted residuals around
depthwise convolutions) are trained on scikit-learn's handwritten digits (1,797 labelled images of 8x8
pixels; a third is held out), one of each for every seed. The training images are the calibration data.
Numbers are means over the seeds: accuracy on the images held out, and the error of the logits, as a share
of their RMS.

Batch norms of the MobileNet are spread: each channel's scale is multiplied by a factor drawn from 1/16 to
16, and the kernel behind it divided by the same. That is the same function with the uneven ranges that
large MobileNets grow (arXiv 1906.04721, fig. 2), which so short a training does not give.
"""

from __future__ import annotations

import argparse
import math
import statistics

import numpy as np
import onnx_ir as ir
import torch
from bench_prune_vision import BATCH, NETWORKS, Images, Network, accuracy, digits, train
from torch import nn

from netlathe.api import capture
from netlathe.execute.executor import Executor
from netlathe.ir import normal, verify
from netlathe.pipeline.pass_ import Context
from netlathe.pipeline.text import parse

SPREAD = 16.0


class Inverted(nn.Module):
    """1x1, depthwise 3x3 and linear 1x1 convolutions with batch norms, around a skip where shapes allow."""

    def __init__(self, width: int, out: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        inner = width * expand
        self.expand = nn.Conv2d(width, inner, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(inner)
        self.depth = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.depth_norm = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, out, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(out)
        self.skips = width == out and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, width, h, w] -> [b, out, h / stride, w / stride]"""
        y = torch.relu(self.expand_norm(self.expand(x)))
        y = torch.relu(self.depth_norm(self.depth(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.skips else y


class MobileNet(nn.Module):
    """Five inverted residuals, 16 to 32 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        shapes = ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1))
        self.blocks = nn.Sequential(*(Inverted(*shape) for shape in shapes))
        self.head = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[b, 1, 8, 8] -> logits [b, 10]"""
        x = torch.relu(self.stem_norm(self.stem(image)))
        return self.head(self.blocks(x).mean((2, 3)))


def spread(net: nn.Module, seed: int) -> nn.Module:
    """The same function with factors between the layers of every inverted residual."""
    draw = torch.Generator().manual_seed(seed)
    for block in net.modules():
        if isinstance(block, Inverted):
            for norm, behind in (
                (block.expand_norm, block.depth),
                (block.depth_norm, block.project),
            ):
                exponent = 2 * torch.rand(norm.num_features, generator=draw) - 1
                factor = torch.pow(SPREAD, exponent)
                own = [-1, 1, 1, 1] if behind.groups > 1 else [1, -1, 1, 1]
                with torch.no_grad():
                    norm.weight.mul_(factor)
                    norm.bias.mul_(factor)
                    behind.weight.div_(factor.reshape(own))
    return net


SCHEMES = {
    "int8 weights, one scale a tensor": "per_tensor=True",
    "int4 weights, one scale a channel": "weights='int4'",
    "int4 weights, one scale a tensor": "weights='int4', per_tensor=True",
    "w8a8 static, one scale a channel": "activations='int8'",
    "w8a8 static, one scale a tensor": "activations='int8', per_tensor=True",
}
BEFORE = {"-": [], "range": ["equalize(method='range')"], "smoothquant": ["equalize"]}


def main() -> None:
    """Train, quantize, print one table a network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--network", choices=("ResNet", "MobileNet", "ViT"), action="append")
    args = parser.parse_args()
    mobile = Network(MobileNet, 25, 5e-3, "", ())
    for name, network in {**NETWORKS, "MobileNet": mobile}.items():
        if not args.network or name in args.network:
            show(name, network, args.seeds)


def show(name: str, network: Network, seeds: int) -> None:
    """The table of one network."""
    found: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    dense = []
    for seed in range(seeds):
        training, test = digits(seed)
        net = train(network, training, seed)
        net = spread(net, seed) if name == "MobileNet" else net
        model = capture(net, args=(training.pixels[:2],), dynamic={"image": {0: "batch"}}).model
        dense.append(accuracy(model, test))
        logits = _logits(model, test)
        for scheme, options in SCHEMES.items():
            for before, first in BEFORE.items():
                for corrected in (False, True):
                    last = f"quantize({options}, min_size=0, correct_bias={corrected})"
                    passes = ["fold_batch_norm", *first, last]
                    made = quantized(model, ", ".join(passes), training)
                    error = np.sqrt(((_logits(made, test) - logits) ** 2).mean())
                    share = float(error / np.sqrt((logits**2).mean()))
                    key = scheme, before, corrected
                    found.setdefault(key, []).append((accuracy(made, test), share))
    print(f"\n{name}: {100 * statistics.mean(dense):.1f} % in float32, {seeds} seeds")
    print("accuracy in % (error of the logits); with b: biases corrected\n")
    columns = [(before, b) for before in BEFORE for b in (False, True)]
    print("| scheme | " + " | ".join(before + " b" * b for before, b in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for scheme in SCHEMES:
        cells = []
        for before, b in columns:
            right, errors = zip(*found[scheme, before, b], strict=True)
            cells.append(f"{100 * statistics.mean(right):.1f} ({_short(statistics.mean(errors))})")
        print(f"| {scheme} | " + " | ".join(cells) + " |", flush=True)


def _short(number: float) -> str:
    return f"{number:.{max(0, 1 - math.floor(math.log10(number))) if number < 1 else 1}f}"


def _logits(model: ir.Model, images: Images) -> np.ndarray:
    found: np.ndarray = Executor(model).run({"image": images.pixels.numpy()})["output"].numpy()
    return found.astype(np.float64)


def quantized(model: ir.Model, setting: str, images: Images) -> ir.Model:
    """A copy that went through the passes of a setting."""
    made = model.clone()
    feeds = [{"image": part.numpy()} for part in images.pixels.split(BATCH)]
    for pass_ in parse(setting):
        pass_.run(made, Context(calibration=feeds))
        normal.normalize(made)
        verify.check(made)
    return made


if __name__ == "__main__":
    main()
