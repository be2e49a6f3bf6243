"""Prune a network hard, fine-tune what is left with plain PyTorch, and take the weights back.

    python examples/recover.py --params 0.1 --steps 3000

A small ResNet learns scikit-learn's handwritten digits. Most of its parameters are then pruned away: inner
channels and those of the residual stream at once, scored on training images. What comes out is a module like
any other: the loop that trained the network tunes it, and its weights go back into the compiled model, on
which more passes run. Every row is an ONNX file in ONNX Runtime, on 400 images that neither training nor
pruning has seen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

import netlathe
from netlathe.passes.prune import Prune

BATCH = 64
TRAINING = 150  # steps of the dense network
TEST = 400  # of 1,797 images


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, width, h, w] -> [b, width, h, w]"""
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(y)))


class Net(nn.Module):
    """A ResNet for 8x8 images of ten digits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(3)))
        self.head = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[b, 1, 8, 8] -> logits [b, 10]"""
        x = torch.relu(self.stem_norm(self.stem(image)))
        return self.head(self.blocks(x).mean((2, 3)))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 1, 8, 8] with values from 0 to 1 and labels [n], in a fixed random order."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = torch.tensor(np.asarray(pixels)[order], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return images, torch.tensor(np.asarray(labels)[order])


def train(module: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """AdamW with a rate that warms up and falls; images are shifted by up to a pixel. Returns seconds."""
    start = time.perf_counter()
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for _ in range(steps):
        index = torch.randint(len(images), (BATCH,), generator=rng)
        down, right = torch.randint(-1, 2, (2,), generator=rng).tolist()
        shifted = torch.roll(images[index], (down, right), (2, 3))
        logits = module(shifted)
        if isinstance(logits, dict):  # a compiled model names its outputs
            (logits,) = logits.values()
        loss = nn.functional.cross_entropy(logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def accuracy(folder: Path, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Share of right answers of the artifact in ``folder``, run by ONNX Runtime."""
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    logits = np.asarray(session.run(None, {"image": images})[0])
    return float((logits.argmax(1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("out/recover"))
    parser.add_argument("--steps", type=int, default=150, help="of tuning (default: 150)")
    parser.add_argument("--params", type=float, default=0.2, help="share to keep (default: 0.2)")
    arguments = parser.parse_args()
    images, labels = digits()
    seen, seen_labels = images[TEST:], labels[TEST:]

    def show(name: str, compiled: netlathe.Compiled, seconds: float) -> None:
        folder = arguments.output / name.replace(", ", "-")
        compiled.save(folder, overwrite=True)
        right = accuracy(folder, images[:TEST].numpy(), labels[:TEST].numpy())
        size = netlathe.cost(compiled.model)
        print(
            f"{name:11} {size.params:10,} {size.bytes:8,} {seconds:8.1f}  {right:8.2%}", flush=True
        )

    print(f"{'model':11} {'parameters':>10} {'bytes':>8} {'seconds':>8}  {'accuracy':>8}")
    torch.manual_seed(0)
    net = Net()
    seconds = train(net, seen, seen_labels, TRAINING)
    captured = netlathe.capture(net.eval(), args=(seen[:2],), dynamic={"image": {0: "batch"}})
    show("dense", netlathe.compile(captured, ""), seconds)

    calibration = [{"image": part.numpy()} for part in seen[:512].split(BATCH)]
    start = time.perf_counter()
    pruned = netlathe.compile(captured, [Prune(params=arguments.params)], calibration=calibration)
    show("pruned", pruned, time.perf_counter() - start)

    module = pruned.module()
    seconds = train(module, seen, seen_labels, arguments.steps)
    tuned = pruned.with_weights(module)
    show("tuned", tuned, seconds)

    start = time.perf_counter()
    small = netlathe.compile(tuned.captured, 'fold_batch_norm, quantize(weights="int8")')
    show("tuned, int8", small, time.perf_counter() - start)


if __name__ == "__main__":
    main()
