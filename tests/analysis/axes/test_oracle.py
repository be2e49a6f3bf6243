"""The symbolic groups are exactly the smallest deletions that are consistent position by position."""

from __future__ import annotations

from typing import Any

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


class Told(graphs.Builder):
    """A builder that is told what to choose; without biases."""

    def __init__(self, *choices: int) -> None:
        super().__init__(lambda strategy: 0)
        self.choices = list(choices)

    def choose(self, *options: Any) -> Any:
        """The next choice."""
        return False if True in options else self.choices.pop(0)


@pytest.mark.parametrize(
    "choices",
    [(3, 4, 2, 3, 3), (3, 4, 2, 3, 2), (3, 6, 2, 2, 3)],
    ids=["groups that stay", "a view that does not fit", "two views alike at their ends"],
)
def test_stages_whose_groups_are_not_those_of_their_parts(choices: tuple[int, ...]) -> None:
    """A stage of g groups of c: the groups of its second convolution are not those of what it reads.

    What stays there is known only from nodes further on; what the views have in common may go.
    """
    b = Told(*choices)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 3, 8, 8]))
    y = b.op("Reshape", b.op("GlobalAveragePool", graphs.stage(b, x, 3, 2)), b.ints(0, -1))
    made = b.finish(x, b.op("MatMul", y, b.weight(2, 2)))
    axes = analyse(made)
    assert check_exact(made, axes, Oracle(made, graphs.feeds(made)), most=64) > 50
    assert sum(group.allows("delete") for group in axes.groups) >= 2
