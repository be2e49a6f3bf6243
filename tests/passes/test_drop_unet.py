"""Dropping works across the skips of a U-Net: what is removable there, and that the right thing goes."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import netlathe
from netlathe.analysis.cost import cost
from netlathe.diagnostics import PassError
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.passes.drop import Drop
from netlathe.pipeline import run
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Context
from tests.passes.test_drop import BOUND, dropped, silenced

WIDTHS = (8, 16)


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), the shortcut projected where widths differ."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, wide), nn.GroupNorm(4, out)
        self.conv1 = nn.Conv2d(wide, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(4, out)
        self.shortcut = nn.Conv2d(wide, out, 1) if wide != out else nn.Identity()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """[b, wide, h, w] and [b, 4] to [b, out, h, w]."""
        inner = self.conv1(nn.functional.silu(self.norm1(x))) + self.time(t)[:, :, None, None]
        result: torch.Tensor = self.shortcut(x) + self.conv2(nn.functional.silu(self.norm2(inner)))
        return result


class UNet(nn.Module):
    """Two stages down and up, concatenating skips; two blocks a stage."""

    def __init__(self) -> None:
        super().__init__()
        a, b = WIDTHS
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        self.down = nn.ModuleList([Residual(a, a), Residual(a, a)])
        self.shrink = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Residual(b, b), Residual(b, b)])
        self.grow = nn.ConvTranspose2d(b, a, 2, stride=2)
        self.up = nn.ModuleList([Residual(2 * a, a), Residual(a, a)])
        self.head = nn.Conv2d(a, 3, 3, padding=1)

    def forward(self, image: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """[b, 3, h, w] and [b, 4] to [b, 3, h, w]."""
        x = self.stem(image)
        for block in self.down:
            x = block(x, t)
        skip = x
        x = self.shrink(x)
        for block in self.middle:
            x = block(x, t)
        x = torch.cat([self.grow(x), skip], 1)
        for block in self.up:
            x = block(x, t)
        result: torch.Tensor = self.head(x)
        return result


REMOVABLE = ("down.0", "down.1", "middle.0", "middle.1", "up.1")


@lru_cache(maxsize=1)
def built() -> tuple[UNet, Captured]:
    torch.manual_seed(3)
    module = UNet().eval()
    args = (torch.randn(2, 3, 8, 8), torch.randn(2, 4))
    dynamic: dict[str, dict[int, str]] = {"image": {0: "batch"}, "t": {0: "batch"}}
    return module, netlathe.capture(module, args=args, dynamic=dynamic)


def feed(seed: int, batch: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.standard_normal((batch, 3, 8, 8)).astype(np.float32),
        "t": rng.standard_normal((batch, 4)).astype(np.float32),
    }


def test_which_blocks_can_go() -> None:
    """All whose shortcut is the stream; the one behind the Concat, whose shortcut is projected, cannot."""
    _, captured = built()
    entries = Drop(kind="block", count=0).choose(captured.model, Context())
    assert [e.where for e in entries if e.status != "refused"] == list(REMOVABLE)
    with pytest.raises(PassError, match="cannot remove 6 of 5 block candidates: 5 can go"):
        Drop(kind="block", count=6).choose(captured.model, Context())


@pytest.mark.parametrize("gone", [*[(at,) for at in range(5)], (0, 1, 2, 3, 4)])
def test_dropping_is_silencing_the_last_convolution(gone: tuple[int, ...]) -> None:
    module, captured = built()
    model = captured.model
    free = [e.where for e in Drop(kind="block", count=0).choose(model, Context())]
    keep = [where for where in free if where in REMOVABLE and REMOVABLE.index(where) not in gone]
    pass_ = Drop(kind="block", count=len(gone), score="uniform", ignore=tuple(keep))
    after, result = dropped(model, pass_, Context())
    applied = [e.where for e in result.entries if e.status == "applied"]
    assert applied == [REMOVABLE[at] for at in gone]
    given = feed(1)
    # Convolution and time embedding of a block that is gone are gone with it.
    left = set(after.graph.initializers)
    assert not [n for n, at in itertools.product(left, gone) if n.startswith(f"{REMOVABLE[at]}.")]
    with silenced(module, *(f"{REMOVABLE[at]}.conv2" for at in gone)), torch.no_grad():
        expected = module(**{k: torch.from_numpy(v) for k, v in given.items()})
    (actual,) = ort.run(after, given).values()
    assert relative_error(actual, expected.numpy()) < BOUND


def test_the_knapsack_by_the_output() -> None:
    """LAPTOP-Diff: output error of each, the least sum of them at a number of parameters; checked."""
    _, captured = built()
    ctx = Context(calibration=[feed(seed) for seed in (7, 8)])
    compiled = run.run(captured, [Drop(kind="block", score="mse", params=0.75)], ctx)
    assert compiled.steps[0].check.against == "simulated reference"
    assert cost(compiled.model).params <= 0.75 * cost(captured.model).params
    entries = [e for e in compiled.steps[0].entries if e.status != "refused"]
    total = cost(captured.model).params
    sets = [
        s
        for n in range(len(entries) + 1)
        for s in itertools.combinations(range(len(entries)), n)
        if sum(entries[at].detail["parameters"] for at in s) >= 0.25 * total
    ]
    best = min(sets, key=lambda s: float(sum(entries[at].detail["score"] for at in s)))
    assert {at for at, e in enumerate(entries) if e.status == "applied"} == set(best)


def test_scores_are_those_of_a_feature_map() -> None:
    """1 - cosine over the channels of every pixel, in float64, by the module itself."""
    module, captured = built()
    given = feed(9)
    entries = Drop(kind="block").choose(captured.model, Context(calibration=[given]))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            seen[path] = (args[0], out)

        return hook

    handles = [module.get_submodule(path).register_forward_hook(watch(path)) for path in REMOVABLE]
    with torch.no_grad():
        module(**{k: torch.from_numpy(v) for k, v in given.items()})
    for handle in handles:
        handle.remove()
    for path in REMOVABLE:
        x, y = (t.double() for t in seen[path])
        expected = 1 - float(nn.functional.cosine_similarity(x, y, dim=1).mean())
        (entry,) = [e for e in entries if e.where == path]
        assert entry.detail["score"] == pytest.approx(expected, abs=2e-5)
