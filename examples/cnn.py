"""Train a small convolutional network on handwritten digits, compile it, and count what it still gets right.

    python examples/cnn.py

The module is ordinary PyTorch. Batch norms are folded into the convolutions before them, which is exact
up to rounding; then weights are stored in 8 bits, or everything is computed in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

import netlathe

RECIPES = {
    "dense": "",
    "folded": "fold_batch_norm",
    "int8": 'fold_batch_norm, quantize(weights="int8")',
    "float16": 'fold_batch_norm, convert(dtype="float16")',
}


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
    """1,797 images [n, 1, 8, 8] with values from 0 to 1, and their labels [n]."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(np.asarray(pixels), dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return images, torch.tensor(np.asarray(labels))


def train(images: torch.Tensor, labels: torch.Tensor, *, epochs: int = 8) -> Net:
    """Adam with a falling learning rate; the same seed gives the same network."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(net(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return net.eval()


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
    parser.add_argument("--output", type=Path, default=Path("out/cnn"))
    arguments = parser.parse_args()
    images, labels = digits()
    train_images, test_images = images[:1400], images[1400:]
    net = train(train_images, labels[:1400])

    captured = netlathe.capture(net, args=(test_images[:2],), dynamic={"image": {0: "batch"}})
    print(f"{'recipe':9} {'bytes':>9}  {'accuracy':>8}  {'checked by'}")
    for name, passes in RECIPES.items():
        compiled = netlathe.compile(captured, passes)
        compiled.save(arguments.output / name, overwrite=True)
        right = accuracy(arguments.output / name, test_images.numpy(), labels[1400:].numpy())
        check = compiled.steps[-1].check if compiled.steps else "the capture itself"
        print(f"{name:9} {netlathe.cost(compiled.model).bytes:9,}  {right:8.2%}  {check}")


if __name__ == "__main__":
    main()
