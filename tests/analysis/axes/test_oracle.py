"""The symbolic groups are exactly the smallest deletions that are consistent position by position."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlathe.analysis.axes.groups import Axes, analyse
from tests import zoo, zoo_ir
from tests.analysis.axes import graphs
from tests.analysis.axes.oracle import Oracle, claimed

QUICK = ("falcon", "gpt2", "mixtral", "resnet", "segformer", "swin")


def check_exact(made: ir.Model, axes: Axes, oracle: Oracle, most: int) -> int:
    """Compare what goes with up to ``most`` positions of every dim of every weight; how many."""
    claims = {deletion for each in claimed(axes).values() for deletion in each}
    with_position: dict[tuple[str, int, int], set[frozenset[tuple[str, int, int]]]] = {}
    for deletion in claims:
        for place in deletion:
            with_position.setdefault(place, set()).add(deletion)
    rng = np.random.default_rng(0)
    checked = 0
    for value in made.graph.initializers.values():
        if value not in axes.related.data or value not in axes.related.axes:
            continue
        for dim, size in enumerate(value.shape or ()):
            assert isinstance(size, int)
            some = range(size) if size <= most else sorted(rng.choice(size, most, replace=False))
            for position in map(int, some):
                place = (value.name or "", dim, position)
                found = set(oracle.minimal(*place))
                assert found == with_position.get(place, set()), (place, axes.term(value, dim))
                checked += 1
    return checked


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in zoo.NAMES],
)
def test_the_groups_of_a_model_are_those_of_the_oracle(name: str) -> None:
    made = zoo_ir.captured(name)
    axes = analyse(made)
    fed = zoo_ir.feeds(name)[0]
    assert check_exact(made, axes, Oracle(made, fed), most=4 if name in QUICK else 64) > 50


@pytest.mark.parametrize(
    "models", [graphs.sequences(), graphs.images()], ids=["sequences", "images"]
)
@pytest.mark.parametrize("count", [25, pytest.param(1500, marks=pytest.mark.slow)])
def test_the_groups_of_random_models_are_those_of_the_oracle(
    models: st.SearchStrategy[ir.Model], count: int
) -> None:
    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(models)
    def check(made: ir.Model) -> None:
        axes = analyse(made)
        check_exact(made, axes, Oracle(made, graphs.feeds(made)), most=64)

    check()
