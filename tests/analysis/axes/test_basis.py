"""Scaling and rotating a stretch leaves every operator, and every model, the function it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.analysis.axes import algebra, basis
from netlathe.analysis.axes.algebra import Axis
from netlathe.analysis.axes.basis import Stretch
from netlathe.analysis.axes.groups import Axes, Group, analyse
from netlathe.diagnostics import PassError
from netlathe.execute import compare, ort
from tests import zoo, zoo_ir
from tests.analysis.axes.cases import CASE_PARAMS, Case
from tests.analysis.axes.test_signatures import TOLERANCE as TOLERANCE_OF_ONE

Array = npt.NDArray[Any]
Find = Callable[[Axes, Group, ir.Value, int], Stretch]
QUICK = ("gpt2", "llama", "mobilenet_v2", "swin")
# Every axis passes an activation, a normalization per channel, or a rotary embedding.
DO_NOT_TURN = ("convnext", "efficientnet", "falcon", "mobilenet_v2", "resnet")
# Factors between 1/2 and 2 keep the magnitudes of the sums; each is rounded once more.
TOLERANCE = 1e-4


def starts(axes: Axes, find: Find) -> Iterator[Stretch]:
    """Every stretch that starts at a float weight, each once."""
    seen: set[frozenset[tuple[ir.Value, int]]] = set()
    for group in axes.groups:
        for member in group.members:
            try:
                stretch = find(axes, group, member.value, member.dim)
            except PassError:
                continue
            if frozenset(stretch.exponents) not in seen:
                seen.add(frozenset(stretch.exponents))
                yield stretch


def factors(stretch: Stretch, rng: np.random.Generator) -> Array:
    """Random factors, negative ones among them where that is allowed."""
    by = 2.0 ** rng.uniform(-1, 1, stretch.group.size)
    return by if stretch.positive else by * rng.choice((-1, 1), stretch.group.size)


def rotation(size: int, rng: np.random.Generator) -> Array:
    """A random orthogonal matrix."""
    q: Array = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return q


def matrix(axis: Axis, atom: Axis, turn: Array) -> Array:
    """What a matrix along an atom is along an axis that has it: a Kronecker product, or blocks."""
    axis = algebra.find(axis)
    if axis is atom:
        return turn
    if axis.form is None:
        return np.eye(int(axis.size))
    if isinstance(axis.form, algebra.Product):
        whole = np.eye(1)
        for factor in axis.form.factors:
            whole = np.kron(whole, matrix(factor, atom, turn))
        return whole
    whole, start = np.zeros((int(axis.size), int(axis.size))), 0
    for part in axis.form.parts:
        end = start + int(part.size)
        whole[start:end, start:end] = matrix(part, atom, turn)
        start = end
    return whole


CHANGES: dict[
    str, tuple[Find, Callable[..., None], Callable[[Stretch, np.random.Generator], Array]]
]
CHANGES = {
    "scale": (basis.to_scale, basis.scale, factors),
    "rotate": (basis.to_rotate, basis.rotate, lambda s, rng: rotation(s.group.size, rng)),
}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))]
)
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("case", CASE_PARAMS)
def test_an_operator_follows_as_its_signature_says(case: Case, kind: str, seed: int) -> None:
    find, change, draw = CHANGES[kind]
    rng = np.random.default_rng(seed)
    for number in range(len(list(starts(analyse(case.build(seed), boundary=False), find)))):
        before, after = case.build(seed), case.build(seed)
        axes = analyse(after, boundary=False)
        stretch = list(starts(axes, find))[number]
        by = draw(stretch, rng)
        change(axes, stretch, by)
        expected, actual = ort.run(before, {}), ort.run(after, {})
        for value in after.graph.outputs:
            wanted = expected[value.name or ""]
            if wanted.dtype.kind == "f":
                wanted = _followed(wanted, value, axes, stretch, by)
            error = compare.relative_error(actual[value.name or ""], wanted)
            assert error <= TOLERANCE_OF_ONE * 4, (value.name, stretch.exponents)


def _followed(output: Array, value: ir.Value, axes: Axes, stretch: Stretch, by: Array) -> Array:
    """What an output is after the change, by the matrix of each of its dims."""
    changed = output.astype(np.float64)
    for (place, dim), exponent in stretch.exponents.items():
        if place is value:
            turn = by if by.ndim == 2 else np.diag(by**exponent)
            whole = matrix(axes.related.axes[value][dim], stretch.group.atom, turn)
            changed = np.moveaxis(np.tensordot(changed, whole, axes=(dim, 0)), -1, dim)
    return changed.astype(output.dtype)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in zoo.NAMES]
)
def test_a_model_stays_the_function_it_was(name: str, kind: str) -> None:
    """Every stretch of the model that can be scaled or rotated, one after the other."""
    find, change, draw = CHANGES[kind]
    made = zoo_ir.captured(name)
    changed = made.clone()
    axes = analyse(changed)
    found = list(starts(axes, find))
    assert found or (kind == "rotate" and name in DO_NOT_TURN)
    for number, stretch in enumerate(found):
        change(axes, stretch, draw(stretch, np.random.default_rng(number)))
    for fed in zoo_ir.feeds(name):
        expected, actual = ort.run(made, fed), ort.run(changed, fed)
        for output in expected:
            assert compare.relative_error(actual[output], expected[output]) <= TOLERANCE
