"""Every claim of every signature, by brute force: edit the operands, run the operator, compare.

After a deletion the operator must compute what it computed with the deleted positions "not there" (see
`cases`), at the positions that are kept; after a permutation, the same elements in the new order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.analysis.axes import edits, relate
from netlathe.analysis.axes.groups import Axes, Group, analyse
from netlathe.analysis.axes.relate import signature_of
from netlathe.analysis.axes.selection import Selection
from netlathe.analysis.axes.signature import Signature
from netlathe.analysis.axes.signatures import TABLE
from netlathe.diagnostics import NetLatheError
from netlathe.execute import compare, ort
from netlathe.ir import types
from tests.analysis.axes.cases import CASE_PARAMS, CASES, Case

Array = npt.NDArray[Any]
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]
# Sums of at most 64 products of float32, each rounded: 64 * 2 ** -24 of their size, which is up to
# sqrt(64) times the RMS of the result; functions such as Exp lose a few bits more.
TOLERANCE = 64 * 2.0**-24 * 8


def test_every_operator_of_the_table_has_a_case() -> None:
    built = [case.build(0) for case in CASES]
    assert set(TABLE) <= {node.op_type for model in built for node in model.graph}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASE_PARAMS)
def test_a_deletion_leaves_what_the_kept_positions_compute(case: Case, seed: int) -> None:
    check_deletions(case, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASE_PARAMS)
def test_a_permutation_moves_what_the_operator_computes(case: Case, seed: int) -> None:
    check_permutations(case, seed)


def check_deletions(case: Case, seed: int) -> None:
    """Delete some of each group, and of all of them; compare with what "not there" gives."""
    rng = np.random.default_rng(seed)
    axes = analyse(case.build(seed), boundary=False)
    for chosen in _choices([group for group in axes.groups if group.allows("delete")]):
        removed = {group.name: _some(group, rng) for group in chosen}
        selection = _selection(
            axes, {name: _others(axes, name, gone) for name, gone in removed.items()}
        )
        if _leaves_a_dim_empty(axes, selection):
            continue
        before, after = case.build(seed), case.build(seed)
        edited = analyse(after, boundary=False)
        edits.delete(edited, {_named(edited, name): gone for name, gone in removed.items()})
        _fill(before, case, seed, axes, selection)
        _compare(before, after, axes, selection)


def check_permutations(case: Case, seed: int) -> None:
    """Reorder each group, and all of them; compare with the reordered outputs."""
    rng = np.random.default_rng(seed)
    axes = analyse(case.build(seed), boundary=False)
    for chosen in _choices([group for group in axes.groups if group.allows("permute")]):
        order = {group.name: rng.permutation(group.size) for group in chosen}
        after = case.build(seed)
        edited = analyse(after, boundary=False)
        edits.permute(edited, {_named(edited, name): list(at) for name, at in order.items()})
        _compare(case.build(seed), after, axes, _selection(axes, order))


def _choices(groups: list[Group]) -> list[list[Group]]:
    """Each group by itself, and all of them."""
    return [[group] for group in groups] + ([groups] if len(groups) > 1 else [])


def _some(group: Group, rng: np.random.Generator) -> list[int]:
    """Positions that may go."""
    count = int(rng.integers(1, group.size - group.least + 1))
    positions: list[int] = rng.choice(group.size, count, replace=False).tolist()
    return positions


def _others(axes: Axes, name: str, gone: list[int]) -> Array:
    return np.setdiff1d(np.arange(_named(axes, name).size), gone)


def _named(axes: Axes, name: str) -> Group:
    (found,) = [group for group in axes.groups if group.name == name]
    return found


def _selection(axes: Axes, kept: Mapping[str, Array]) -> Selection:
    return Selection({_named(axes, name).atom: at for name, at in kept.items()})


def _leaves_a_dim_empty(axes: Axes, selection: Selection) -> bool:
    return any(selection.size(axis) == 0 for dims in axes.related.axes.values() for axis in dims)


def _fill(before: ir.Model, case: Case, seed: int, axes: Axes, selection: Selection) -> None:
    """Put what "not there" means into the operands at the positions that are gone."""
    known = {value.name: dims for value, dims in axes.related.axes.items()}
    for name, absent in case.absent.items():
        value = before.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()
        kept = np.ones((1,) * array.ndim, np.bool_)
        for dim, axis in enumerate(known[name]):
            if (at := selection.of(axis)) is not None:
                shape = [-1 if other == dim else 1 for other in range(array.ndim)]
                kept = kept & np.isin(np.arange(array.shape[dim]), at).reshape(shape)
        filled = (
            absent(array, kept, case.drawn(seed))
            if callable(absent)
            else np.where(kept, array, np.array(absent, array.dtype))
        )
        value.const_value = ir.tensor(filled)


def _compare(before: ir.Model, after: ir.Model, axes: Axes, selection: Selection) -> None:
    known = {value.name: dims for value, dims in axes.related.axes.items()}
    positions = {value.name: axis for value, axis in axes.related.positions.items()}
    expected, actual = ort.run(before, {}), ort.run(after, {})
    for value in after.graph.outputs:
        name = value.name or ""
        wanted = expected[name]
        for dim, axis in enumerate(known[name]):
            if (at := selection.of(axis)) is not None:
                wanted = np.take(wanted, at, axis=dim)
        if name in positions and (at := selection.of(positions[name])) is not None:
            new = np.full(int(positions[name].size), -1)  # type: ignore[arg-type]  # it is fixed
            new[at] = np.arange(len(at))
            wanted = new[wanted]
        assert compare.relative_error(actual[name], wanted) <= TOLERANCE, name
        recorded = types.recorded(value).shape
        assert recorded == actual[name].shape


# -- the tests above can fail ---------------------------------------------------------------------------


WRONG = [
    ("Conv grouped", "(g i)", "(i g)"),
    ("Conv grouped", "(g o)", "(o g)"),
    ("ConvTranspose", "(g o)", "(o g)"),
    ("GroupNormalization", "(g c)", "(c g)"),
    ("DepthToSpace", "(r q c)", "(c r q)"),
    ("SpaceToDepth", "(r q c)", "(c r q)"),
    ("Attention", "b (n r) s h", "b (r n) s h"),
    ("Attention", "b (n r) s v", "b (r n) s v"),
    ("Attention packed", "(n r h)", "(n h r)"),
    ("RotaryEmbedding", "two p", "p two"),
    ("RotaryEmbedding interleaved", "p two", "two p"),
    ("MatMul", "... m k, ... k n", "... k m, ... k n"),
    ("Concat", "(x0|x1|x2)", "(x1|x0|x2)"),
    ("Concat then Split", "x0, d0 x1", "x1, d0 x0"),
    ("Slice 2:5:1", "-> d0 x1", "-> d0 p1"),
    ("Gather several", "-> (", "-> (x0|"),
    ("Tile", "(r0 d0)", "(d0 r0)"),
    ("Transpose", "-> d2 d0 d1", "-> d2 d1 d0"),
    ("Expand", "d0 1 d2", "d0 1 d0"),
    ("TopK", "-> d0 k d2", "-> d2 k d0"),
    ("Einsum", "b q_upper j", "q_upper b j"),
    ("DequantizeLinear blocks", "(d0 m)", "(m d0)"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), WRONG)
def test_a_wrong_signature_is_found(
    name: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = [case for case in CASES if case.name == name]
    changed = []

    def mistaken(node: ir.Node, *rest: Any) -> Signature:
        signature = signature_of(node, *rest)
        changed.append(right in signature.rule)
        return replace(signature, rule=signature.rule.replace(right, wrong))

    monkeypatch.setattr(relate, "signature_of", mistaken)
    found = []
    for seed in range(6):
        try:
            check_deletions(case, seed)
            check_permutations(case, seed)
        except (AssertionError, NetLatheError, ValueError, IndexError) as error:
            found.append(error)
    assert any(changed), "there is nothing to get wrong"
    assert found
