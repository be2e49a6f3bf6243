"""The published networks: their groups are what their papers say, in PyTorch and in ONNX files."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from netlathe.analysis.axes import Axes, analyse
from tests import zoo
from tests.analysis.axes.oracle import Oracle
from tests.analysis.axes.test_edits import check_deletion, choose
from tests.analysis.axes.test_oracle import check_exact
from tests.published import networks
from tests.published.expected import EXPECTED

QUICK = networks.some("super_resolution", "unet")


def deletable(axes: Axes) -> Counter[int]:
    """How many groups of each size may lose positions."""
    return Counter(group.size for group in axes.groups if group.allows("delete"))


@pytest.mark.parametrize("name", networks.some(*networks.NAMES[::8]))
def test_every_block_keeps_the_scale_of_its_input(name: str) -> None:
    rms = zoo.block_rms(networks.build(name))
    assert len(rms) >= 4
    assert all(0.1 <= value <= 10 for value in rms.values()), rms


@pytest.mark.parametrize("name", QUICK)
def test_the_groups_are_what_the_structure_says(name: str) -> None:
    axes = analyse(networks.captured(name))
    assert deletable(axes) == EXPECTED[name].sizes
    pinned = [group for group in axes.groups if not group.allows("delete")]
    reasons = {pin.reason for group in pinned for pin in group.pins}
    assert not any("no axis signature" in reason for reason in reasons), reasons
    assert not any("no common split" in reason for reason in reasons), reasons
    found = {word for word in EXPECTED[name].pinned if any(word in reason for reason in reasons)}
    assert found == set(EXPECTED[name].pinned)


@pytest.mark.parametrize("name", QUICK)
def test_an_exported_file_has_the_groups_of_the_module(name: str) -> None:
    file, module = (
        Counter((g.size, g.least, g.allows("permute")) for g in axes.groups if g.allows("delete"))
        for axes in (analyse(networks.from_file(name)), analyse(networks.captured(name)))
    )
    assert file == module


@pytest.mark.parametrize("name", QUICK)
def test_the_groups_are_those_of_the_oracle(name: str) -> None:
    made = networks.captured(name)
    assert check_exact(made, analyse(made), Oracle(made, networks.feeds(name)[0]), most=4) > 100


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("ratio", [0.5, pytest.param(0.3, marks=pytest.mark.slow)])
def test_deletions_equal_their_masked_reference(name: str, ratio: float) -> None:
    made = networks.captured(name)
    chosen = choose(analyse(made), ratio, np.random.default_rng(0))
    assert sum(EXPECTED[name].sizes.values()) >= len(chosen) >= 10
    check_deletion(made, chosen, networks.feeds(name))
