"""Accuracy of pruned image classifiers against the share of parameters removed, by score and by allocation.

    python benchmarks/bench_prune_vision.py [--plot docs/pruning-vision.svg]

A small ResNet and a small ViT are trained on scikit-learn's handwritten digits (1,797 labelled images of 8x8
pixels; a third is held out), one of each for every seed. The training images are the calibration data, with
their labels, which ``taylor`` alone looks at. Pruned networks are not tuned afterwards. Accuracy is that on
the images held out, the mean over the seeds. The plot needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from remembering import Remembering
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from netlathe.analysis.cost import cost
from netlathe.api import capture
from netlathe.execute.executor import Executor
from netlathe.ir import normal, verify
from netlathe.passes.prune import Prune
from netlathe.pipeline.pass_ import LABELS
from netlathe.pipeline.text import parse

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

BATCH = 64
HELD_OUT = 1 / 3
REMOVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


# -- the networks -----------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip connection, which may change the shape."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.skip = (
            nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if (width, stride) != (out, 1)
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, width, h, w] -> [b, out, h / stride, w / stride]"""
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.skip(x) + self.second_norm(self.second(y)))


class ResNet(nn.Module):
    """Three stages of two blocks, 16 to 64 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        shapes = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
        self.blocks = nn.Sequential(*(Residual(*shape) for shape in shapes))
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[b, 1, 8, 8] -> logits [b, 10]"""
        x = torch.relu(self.stem_norm(self.stem(image)))
        return self.head(self.blocks(x).mean((2, 3)))


class Block(nn.Module):
    """Attention and an FFN, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, tokens, width] -> the same"""
        y = self.attention_norm(x)
        q, k, v = (
            made(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for made in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.ffn_norm(x))))


class ViT(nn.Module):
    """Four blocks of 8 heads over 16 patches of 2x2 pixels, 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 64, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(16, 64))
        self.blocks = nn.Sequential(*(Block(64, heads=8) for _ in range(4)))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[b, 1, 8, 8] -> logits [b, 10]"""
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Network:
    """How a network is trained, and what of it is pruned."""

    make: Callable[[], nn.Module]
    epochs: int
    rate: float
    scope: str
    scores: Sequence[str]


SCORES = (
    "random", "l1", "l2", "group_norm", "fpgm", "wanda", "flap", "cfsp", "taylor", "obd", "optin",
)  # fmt: skip
NETWORKS = {
    "ResNet": Network(
        ResNet, 15, 3e-3, "('channels', 'hidden')",
        (*SCORES, "bn_gamma"),
    ),
    "ViT": Network(ViT, 40, 1e-3, "('ffn', 'heads')", SCORES),
}  # fmt: skip
ALLOCATIONS = ("uniform", "global", "isomorphic", "flap", "layer_adaptive")


def settings(network: Network) -> Mapping[str, Sequence[tuple[str, str]]]:
    """(name, options of the pass) of the rows, in panels."""
    plain = "compensate='none'"
    return {
        "scores, uniform allocation": [
            (score, f"score='{score}', allocation='uniform', {plain}") for score in network.scores
        ],
        "allocations": [
            *((f"obd, {how}", f"score='obd', allocation='{how}', {plain}") for how in ALLOCATIONS),
            *((f"l2, {how}", f"score='l2', allocation='{how}', {plain}") for how in ALLOCATIONS),
            ("taylor, global", f"score='taylor', allocation='global', {plain}"),
            ("obd, global, least_squares", "score='obd', allocation='global'"),
        ],
    }


# -- training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Pixels ``[n, 1, 8, 8]`` from 0 to 1, and labels ``[n]``."""

    pixels: torch.Tensor
    labels: torch.Tensor


def digits(seed: int) -> tuple[Images, Images]:
    """Images to train with and images that are held out, of each class the same share."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        np.asarray(pixels, np.float32).reshape(-1, 1, 8, 8) / 16,
        np.asarray(labels, np.int64),
        test_size=HELD_OUT,
        random_state=seed,
        stratify=labels,
    )
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return Images(train_x, train_y), Images(test_x, test_y)


def train(network: Network, images: Images, seed: int) -> nn.Module:
    """AdamW with a rate that rises and falls; the same seed gives the same network."""
    torch.manual_seed(seed)
    net = network.make()
    steps = network.epochs * -(-len(images.labels) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.rate, steps)
    for _ in range(network.epochs):
        for index in torch.randperm(len(images.labels)).split(BATCH):
            loss = nn.functional.cross_entropy(net(images.pixels[index]), images.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


# -- measuring --------------------------------------------------------------------------------------


@dataclass
class Curve:
    """Shares of right answers ``[seeds]`` at each share of parameters removed."""

    accuracy: dict[float, list[float]] = field(default_factory=dict)

    def add(self, removed: float, accuracy: float) -> None:
        """Note down what one more seed gives."""
        self.accuracy.setdefault(removed, []).append(accuracy)

    def mean(self, removed: float) -> float:
        """Over the seeds."""
        return statistics.mean(self.accuracy[removed])


def accuracy(model: ir.Model, images: Images) -> float:
    """Share of right answers."""
    logits = Executor(model).run({"image": images.pixels.numpy()})["output"]
    return float((logits.argmax(-1) == images.labels).double().mean())


def pruned(model: ir.Model, setting: str, contexts: Mapping[str, Remembering]) -> ir.Model:
    """A copy with what the setting leaves; there is a context for each score."""
    (pass_,) = parse(setting)
    assert isinstance(pass_, Prune) and pass_.score is not None
    ctx = contexts[pass_.score]
    made = model.clone()
    pass_.edit(made, pass_.choose(made, ctx), ctx)
    normal.normalize(made)
    verify.check(made)
    return made


def measure(network: Network, seeds: int) -> dict[str, dict[str, Curve]]:
    """The curves of each panel; removed 0 is the dense network."""
    panels = {
        panel: {name: Curve() for name, _ in rows} for panel, rows in settings(network).items()
    }
    for seed in range(seeds):
        start = time.perf_counter()
        training, test = digits(seed)
        net = train(network, training, seed)
        taken = time.perf_counter() - start
        model = capture(net, args=(training.pixels[:2],), dynamic={"image": {0: "batch"}}).model
        parts = zip(training.pixels.split(BATCH), training.labels.split(BATCH), strict=True)
        feeds = [{"image": image.numpy(), LABELS: label.numpy()} for image, label in parts]
        contexts = {score: Remembering(calibration=feeds, seed=seed) for score in network.scores}
        dense = accuracy(model, test)
        print(
            f"seed {seed}: {cost(model).params} parameters, trained in {taken:.0f} s,"
            f" {100 * accuracy(model, training):.1f} % of {len(training.labels)} training images and"
            f" {100 * dense:.1f} % of {len(test.labels)} held out",
            flush=True,
        )
        known: dict[str, float] = {}  # a setting may be in both panels
        for panel, rows in settings(network).items():
            for name, options in rows:
                curve = panels[panel][name]
                curve.add(0.0, dense)
                for removed in REMOVED:
                    setting = f"prune(scope={network.scope}, params={1 - removed:.1f}, {options})"
                    if setting not in known:
                        known[setting] = accuracy(pruned(model, setting, contexts), test)
                    curve.add(removed, known[setting])
    return panels


# -- showing ----------------------------------------------------------------------------------------


def table(panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """Accuracy in percent, one row a setting, one column a share."""
    shares = (0.0, *REMOVED)
    lines = ["| parameters removed | " + " | ".join(f"{100 * s:.0f} %" for s in shares) + " |"]
    lines.append("|---" * (len(shares) + 1) + "|")
    for curves in panels.values():
        for name, curve in curves.items():
            cells = " | ".join(f"{100 * curve.mean(share):.1f}" for share in shares)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def plot(found: Mapping[str, Mapping[str, Mapping[str, Curve]]], file: Path) -> None:
    """A row of panels for each network, as an SVG that has the same bytes each time."""
    # With the extra bench; the tables do without.
    import matplotlib  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    matplotlib.rcParams.update(
        {"svg.hashsalt": "netlathe", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    )
    figure = Figure(figsize=(12, 4.5 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False, sharex=True, sharey=True)
    for row, (network, panels) in zip(grid, found.items(), strict=True):
        for axes, (panel, curves) in zip(row, panels.items(), strict=True):
            draw(axes, curves)
            axes.set_title(f"{network}: {panel}")
    for axes in grid[0]:  # the first network has all curves
        axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    made = io.StringIO()
    figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None})
    lines = [line.strip() for line in made.getvalue().splitlines()]
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


def draw(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Accuracy, as the table has it, over the share removed. An allocation has one colour, dashed for l2."""
    shares = (0.0, *REMOVED)
    for number, (name, curve) in enumerate(curves.items()):
        colour = f"C{number % len(ALLOCATIONS) if name.startswith(('obd, ', 'l2, ')) else number}"
        axes.plot(
            [100 * share for share in shares],
            [round(100 * curve.mean(share), 1) for share in shares],
            label=name,
            color="black" if name.endswith("least_squares") else colour,
            linestyle="--" if name.startswith("l2, ") else "-",
        )
    axes.set(xlabel="parameters removed, %", ylabel="accuracy, %")
    axes.set(xticks=range(0, 71, 10), yticks=range(0, 101, 20))
    axes.set_xlim(0, 100 * shares[-1])
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=2, help="how many are trained of each")
    parser.add_argument("--plot", type=Path, help="write the curves here, as SVG")
    options = parser.parse_args()
    found = {}
    for name, network in NETWORKS.items():
        print(f"\n{name}\n")
        found[name] = measure(network, options.seeds)
        print(f"\n{table(found[name])}", flush=True)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
