"""Networks whose joins defeat other tools: groups as the oracle has them, deletions as their reference."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from netlathe.analysis.axes import analyse
from netlathe.frontends.torch_module import TorchModule
from netlathe.pipeline.interfaces import Captured
from tests.analysis.axes.architectures import IMAGES, image_network, qwen2_moe
from tests.analysis.axes.oracle import Oracle
from tests.analysis.axes.test_edits import check_deletion, choose
from tests.analysis.axes.test_oracle import check_exact

QUICK = ("cat_slice", "pixel_shuffle", "shufflenet", "unet")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*IMAGES, "qwen2_moe")
]


@lru_cache(maxsize=2)
def captured(name: str) -> Captured:
    if name == "qwen2_moe":
        ids = {"input_ids": torch.arange(12).reshape(2, 6)}
        dims = {"input_ids": {0: "batch", 1: "sequence"}}
        return TorchModule(kwargs=ids, dynamic=dims).capture(qwen2_moe())
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return TorchModule(args=(x,), dynamic={"x": {0: "batch"}}).capture(image_network(name))


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_those_of_the_oracle(name: str) -> None:
    model, sample = captured(name).model, captured(name).sample
    axes = analyse(model)
    fed = sample({"batch": 2, "sequence": 7} if name == "qwen2_moe" else {"batch": 2}, 0)
    assert check_exact(model, axes, Oracle(model, fed), most=16) > 40
    assert not any("no common split" in pin.reason for group in axes.groups for pin in group.pins)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.5, pytest.param(0.3, marks=pytest.mark.slow)])
def test_deletions_equal_their_masked_reference(name: str, ratio: float) -> None:
    model, sample = captured(name).model, captured(name).sample
    chosen = choose(analyse(model), ratio, np.random.default_rng(0))
    assert len(chosen) >= 2
    check_deletion(model, chosen, [sample({}, seed) for seed in range(2)])
