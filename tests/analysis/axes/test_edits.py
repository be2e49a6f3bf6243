"""A deletion leaves the function that its masked reference has, on every model and on random ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlathe.analysis.axes import edits
from netlathe.analysis.axes.groups import Axes, analyse
from netlathe.analysis.axes.selection import Selection
from netlathe.execute import compare, ort
from netlathe.execute.executor import Executor
from netlathe.ir import verify
from tests import zoo, zoo_ir
from tests.analysis.axes import graphs
from tests.analysis.axes.masked import mask
from tests.passes.folding import in_float64

Feeds = Mapping[str, npt.NDArray[Any]]
QUICK = ("falcon", "gpt2", "mixtral", "mobilenet_v2", "segformer", "swin")
# Edited and masked compute the same sums in another order: a few hundred roundings of 2 ** -24 a layer.
TOLERANCE = 1e-4
# Where an output nearly cancels it is more: in float64, a few times what a rounding of each weight does.
ROUNDINGS = 8


def choose(axes: Axes, ratio: float, rng: np.random.Generator) -> dict[str, list[int]]:
    """A random share of the positions of every deletable group, by name.

    Where that would empty a dim made of segments, the last of these groups stays whole.
    """
    chosen: dict[str, list[int]] = {}
    for group in axes.groups:
        count = min(max(1, round(ratio * group.size)), group.size - group.least)
        if group.allows("delete") and count > 0:
            chosen[group.name] = rng.choice(group.size, count, replace=False).tolist()
            if _empties_a_dim(axes, selected(axes, chosen)):
                del chosen[group.name]
    return chosen


def selected(axes: Axes, chosen: Mapping[str, list[int]]) -> Selection:
    """What is left without the chosen positions."""
    groups = {group.name: group for group in axes.groups}
    return Selection(
        {
            groups[name].atom: np.setdiff1d(np.arange(groups[name].size), gone)
            for name, gone in chosen.items()
        }
    )


def _empties_a_dim(axes: Axes, selection: Selection) -> bool:
    return any(selection.size(axis) == 0 for dims in axes.related.axes.values() for axis in dims)


def check_deletion(
    made: ir.Model, chosen: Mapping[str, list[int]], feeds: Iterable[Feeds]
) -> float:
    """Delete, and compare with the masked reference; the largest error in float32."""
    edited, reference = made.clone(), made.clone()
    axes = analyse(edited)
    named = {group.name: group for group in axes.groups}
    selection = selected(axes, chosen)
    kept = {
        (value.name or "", dim): at
        for value, dims in axes.related.axes.items()
        for dim, axis in enumerate(dims)
        if (at := selection.of(axis)) is not None
    }
    edits.delete(axes, {named[name]: gone for name, gone in chosen.items()})
    verify.check(edited)
    mask(reference, kept)
    worst = 0.0
    for fed in feeds:
        error = apart(ort.run(edited, fed), ort.run(reference, fed))
        worst = max(worst, error)
        if error > TOLERANCE:
            exact = _in_float64(reference, fed)
            rounding = apart(_in_float64(reference, fed, 2**-24), exact)
            assert apart(_in_float64(edited, fed), exact) <= ROUNDINGS * rounding
    return worst


def apart(actual: Feeds, expected: Feeds) -> float:
    """The largest relative error of any output."""
    return max(compare.relative_error(actual[name], expected[name]) for name in expected)


def _in_float64(model: ir.Model, fed: Feeds, off: float = 0.0) -> dict[str, npt.NDArray[Any]]:
    """The outputs in float64, by torch's operators; with every weight off by up to this share."""
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in fed.items()}
    rng, made = np.random.default_rng(0), in_float64(model)
    for value in made.graph.initializers.values():
        if value.const_value is not None and value.dtype == ir.DataType.DOUBLE and off:
            array = value.const_value.numpy()
            value.const_value = ir.tensor(array * (1 + off * rng.uniform(-1, 1, array.shape)))
    return {name: output.numpy() for name, output in Executor(made).run(wide).items()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in zoo.NAMES]
)
@pytest.mark.parametrize("ratio", [0.3, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_model_without_some_of_every_group_equals_its_masked_reference(
    name: str, ratio: float
) -> None:
    made = zoo_ir.captured(name)
    chosen = choose(analyse(made), ratio, np.random.default_rng(0))
    assert len(chosen) >= 6
    check_deletion(made, chosen, zoo_ir.feeds(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_group_by_itself(name: str) -> None:
    made = zoo_ir.captured(name)
    rng = np.random.default_rng(0)
    for group, positions in choose(analyse(made), 0.4, rng).items():
        check_deletion(made, {group: positions}, zoo_ir.feeds(name)[:1])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in zoo.NAMES]
)
def test_a_model_with_every_group_in_another_order_is_the_same_function(name: str) -> None:
    made = zoo_ir.captured(name)
    edited = made.clone()
    axes = analyse(edited)
    rng = np.random.default_rng(0)
    order = {g: rng.permutation(g.size).tolist() for g in axes.groups if g.allows("permute")}
    edits.permute(axes, order)
    verify.check(edited)
    for fed in zoo_ir.feeds(name):
        expected, actual = ort.run(made, fed), ort.run(edited, fed)
        for output in expected:
            assert compare.relative_error(actual[output], expected[output]) <= TOLERANCE


@pytest.mark.parametrize(
    "models", [graphs.sequences(), graphs.images()], ids=["sequences", "images"]
)
@pytest.mark.parametrize("count", [25, pytest.param(1500, marks=pytest.mark.slow)])
def test_random_models_equal_their_masked_references(
    models: st.SearchStrategy[ir.Model], count: int
) -> None:
    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(models, st.sampled_from((0.2, 0.5, 1.0)), st.integers(0, 99))
    def check(made: ir.Model, ratio: float, seed: int) -> None:
        chosen = choose(analyse(made), ratio, np.random.default_rng(seed))
        check_deletion(made, chosen, [graphs.feeds(made)])

    check()
