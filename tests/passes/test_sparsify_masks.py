"""Masks, the weights that make up for them, and orders of channels, against their formulas in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from netlathe.ir.sparsity import Pattern, keeps
from netlathe.passes.quantize import gptq
from netlathe.passes.sparsify import dsnot, masks, permute, sparsegpt
from netlathe.passes.sparsify.form import form_of

Array = np.ndarray[Any, np.dtype[Any]]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Array, Array]:
    """A weight and the second moment of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    x *= np.exp(rng.standard_normal(columns))
    return rng.standard_normal((rows, columns)), x.T @ x / len(x)


# -- masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "3:4"])
def test_n_of_m_stay_in_every_group(text: str) -> None:
    pattern = Pattern.parse(text)
    scores = np.random.default_rng(0).random((12, 32))
    kept = masks.select(scores, pattern, 0.0, "row")
    for row, start in itertools.product(range(12), range(0, 32, pattern.m)):
        group = slice(start, start + pattern.m)
        assert kept[row, group].sum() == pattern.n
        inside = scores[row, group]
        assert inside[kept[row, group]].min() > inside[~kept[row, group]].max()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77])
def test_a_share_goes_from_every_row_or_from_the_layer(ratio: float) -> None:
    scores = np.random.default_rng(0).random((12, 30)) * np.arange(1, 13)[:, None]
    free = Pattern.parse("unstructured")
    by_row = masks.select(scores, free, ratio, "row")
    assert set((~by_row).sum(1)) == {round(ratio * 30)}
    for row in range(12):
        assert scores[row][by_row[row]].min() > scores[row][~by_row[row]].max()
    whole = masks.select(scores, free, ratio, "layer")
    assert (~whole).sum() == round(ratio * 360)
    assert scores[whole].min() > scores[~whole].max()


def test_tiles_go_whole_by_the_sum_of_their_scores() -> None:
    scores = np.random.default_rng(0).random((8, 12))
    kept = masks.select(scores, Pattern.parse("2x3"), 0.5, "layer")
    sums = {
        (r, c): scores[r : r + 2, c : c + 3].sum()
        for r, c in itertools.product(range(0, 8, 2), range(0, 12, 3))
    }
    gone = sorted(sums, key=sums.__getitem__)[: len(sums) // 2]
    for (r, c), _ in sums.items():
        assert kept[r : r + 2, c : c + 3].tolist() == [[(r, c) not in gone] * 3] * 2


def test_of_equal_scores_the_last_go() -> None:
    kept = masks.select(np.ones((2, 4)), Pattern.parse("2:4"), 0.0, "row")
    assert kept.tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("text", ["", "2:2", "0:4", "4", "1x1", "0x4", "2:4:8", "-1:4", "nm"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|keeps|tile"):
        Pattern.parse(text)


# -- SparseGPT --------------------------------------------------------------------------------------


def by_the_book(w: Array, h: Array, pattern: Pattern, ratio: float, damping: float) -> Array:
    """Optimal brain surgery from the left, with a dense inverse of what is left for each column.

    arXiv 2301.00774, equations 2 to 4 and figure 4: masks are chosen for 128 columns at a time, or as
    N:M reaches a group.
    """
    w, columns = w.copy(), len(h)
    h = h + damping * np.mean(np.diagonal(h)) * np.eye(columns)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(columns)]
    own = np.array([inverse[0, 0] for inverse in inverses])
    width = {"n:m": pattern.m, "tiles": 128 // pattern.n * pattern.n}.get(pattern.kind, 128)
    stays = np.ones(w.shape, bool)
    for j in range(columns):
        if j % width == 0:
            part = slice(j, min(j + width, columns))
            cost = w[:, part] ** 2 / own[part]
            if pattern.kind == "n:m":
                last = np.argsort(cost, axis=1)[:, : pattern.m - pattern.n]
                for row in range(len(w)):
                    stays[row, j + last[row]] = False
            elif pattern.kind == "tiles":
                tile = {
                    (r, c): cost[r : r + pattern.m, c : c + pattern.n].sum()
                    for r in range(0, cost.shape[0], pattern.m)
                    for c in range(0, cost.shape[1], pattern.n)
                }
                for r, c in sorted(tile, key=tile.__getitem__)[: round(ratio * len(tile))]:
                    stays[r : r + pattern.m, j + c : j + c + pattern.n] = False
            else:
                count = round(ratio * cost.size)
                stays[:, part] = cost > np.sort(cost, axis=None)[count - 1]
        gone = np.where(stays[:, j], 0.0, w[:, j] / own[j])
        w[:, j:] -= gone[:, None] * inverses[j][0]
        w[~stays[:, j], j] = 0
    return w


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "1:4", "4x4", "1x8"])
def test_sparsegpt_is_optimal_brain_surgery_from_the_left(text: str) -> None:
    w, h = problem(16, 160)
    pattern = Pattern.parse(text)
    found, kept, damping = sparsegpt.solve(w, h, pattern, 0.5, damping=0.01)
    wanted = by_the_book(w, h, pattern, 0.5, 0.01)
    assert np.array_equal(kept, wanted != 0)
    assert damping == 0.01
    # 160 steps in float64, on a second moment whose condition damping holds below 1e4 times 160.
    assert np.abs(found - wanted).max() <= 1e-9 * np.abs(w).max()
    assert keeps(found, pattern, 1, 0)


def test_sparsegpt_loses_less_than_a_mask_alone() -> None:
    w, h = problem(16, 64, seed=2)
    pattern = Pattern.parse("2:4")
    found, kept, _ = sparsegpt.solve(w, h, pattern, 0.5, damping=0.01)
    wanda = masks.select(w**2 * np.diagonal(h), pattern, 0.5, "row")
    lost = [gptq.error(w, made, h) for made in (found, np.where(kept, w, 0), np.where(wanda, w, 0))]
    assert lost[0] < 0.8 * min(lost[1:])


def test_inputs_that_are_never_fed_go_first_and_singular_ones_are_damped() -> None:
    w, h = problem(6, 16)
    h[5], h[:, 5] = 0, 0
    h[6:8], h[:, 6:8] = 0, 0
    h[6:8, 6:8] = 1  # two inputs that are one
    found, kept, damping = sparsegpt.solve(w, h, Pattern.parse("2:4"), 0.5, damping=1e-300)
    assert 1e-300 < damping <= 1.0 and np.isfinite(found).all()
    assert not kept[:, 5].any()
    with pytest.raises(ValueError, match="NaN"):
        sparsegpt.solve(w, h * np.nan, Pattern.parse("2:4"), 0.5, damping=0.01)


def test_descent_ends_at_the_least_squares_under_the_mask() -> None:
    w, h = problem(5, 24)
    kept = masks.select(w**2, Pattern.parse("2:4"), 0.5, "row")
    made, lost = np.where(kept, w, 0.0), []
    lost.append(gptq.error(w, made, h))
    for _ in range(5):
        made = sparsegpt.descend(w, h, made, kept, 1, damping=0.0)
        lost.append(gptq.error(w, made, h))
        assert not made[~kept].any()
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.8 * lost[0]
    made = sparsegpt.descend(w, h, made, kept, 4000, damping=0.0)
    for row, at in zip(range(5), kept, strict=True):
        best = np.linalg.solve(h[np.ix_(at, at)], h[at] @ w[row])
        assert np.allclose(made[row, at], best, rtol=1e-6, atol=1e-6)


# -- DSnoT ------------------------------------------------------------------------------------------


def swapped(w: Array, kept: Array, mean: Array, square: Array, group: int) -> Array:
    """arXiv 2310.08915, section 3, for one row: swap after swap until one would not help."""
    kept, variance = kept.copy(), square - mean**2
    for _ in range(dsnot.MOST_SWAPS):
        eps = sum(w[j] * mean[j] for j in range(len(w)) if not kept[j])
        gains = {
            j: np.sign(eps) * w[j] * mean[j] / variance[j] for j in range(len(w)) if not kept[j]
        }
        grown = max(gains, key=gains.__getitem__)
        costs = {
            j: w[j] ** 2 * square[j]
            for j in range(len(w))
            if kept[j] and j // group == grown // group and eps * w[j] * mean[j] < 0
        }
        if gains[grown] <= 0 or not costs:
            break
        pruned = min(costs, key=costs.__getitem__)
        if abs(eps - w[grown] * mean[grown] + w[pruned] * mean[pruned]) >= abs(eps):
            break
        kept[grown], kept[pruned] = True, False
    return kept


@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_swaps_are_those_of_the_paper(text: str) -> None:
    rng = np.random.default_rng(3)
    w, mean = rng.standard_normal((20, 32)), rng.standard_normal(32)
    square, pattern = mean**2 + rng.random(32) + 0.1, Pattern.parse(text)
    kept = masks.select(w**2 * square, pattern, 0.5, "row")
    found = dsnot.refine(w, kept, mean, square, pattern)
    group = 4 if text == "2:4" else 32
    for row in range(20):
        assert np.array_equal(found[row], swapped(w[row], kept[row], mean, square, group))
    assert np.array_equal(found.sum(1), kept.sum(1)) and (found != kept).any()
    off = [np.abs(np.where(k, 0, w * mean).sum(1)).mean() for k in (kept, found)]
    assert off[1] < 0.8 * off[0]


# -- forms and orders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "sums", "shape"),
    [
        ((8, 6), {0}, (6, 8)),
        ((6, 8), {1}, (6, 8)),
        ((6, 4, 3, 3), {1, 2, 3}, (6, 36)),  # a convolution
        ((4, 6, 3, 3), {0, 2, 3}, (6, 36)),  # a transposed one
        ((5, 8, 6), {1}, (30, 8)),  # experts
    ],
)
def test_a_weight_and_its_matrix(
    dims: tuple[int, ...], sums: set[int], shape: tuple[int, int]
) -> None:
    form = form_of(dims, frozenset(sums))
    assert form is not None and form.shape == shape
    array = np.arange(np.prod(dims)).reshape(dims)
    matrix = form.matrix(array)
    assert np.array_equal(form.back(matrix), array)
    # Neighbours in a row follow each other along the axis that groups run along.
    assert (np.diff(matrix[0, : dims[form.axis]]) == array.strides[form.axis] // 8).all()
    kept = masks.select(np.random.default_rng(0).random(shape), Pattern.parse("2:4"), 0.5, "row")
    if dims[form.axis] % 4 == 0:
        assert keeps(form.back(kept), Pattern.parse("2:4"), form.axis, form.rows)


def test_an_order_is_found_that_keeps_as_much_as_the_best() -> None:
    columns = np.random.default_rng(4).random((8, 3)).astype(np.float32)
    pattern = Pattern.parse("2:4")

    def kept(order: Any) -> float:
        groups = columns[list(order)].reshape(2, 4, 3)
        return float(np.sort(groups, axis=1)[:, 2:].sum())

    best = max(kept(order) for order in itertools.permutations(range(8)))
    order, (before, after) = permute.best_order(columns, pattern)
    assert sorted(order) == list(range(8))
    total = columns.sum()
    assert np.isclose(before, kept(range(8)) / total) and np.isclose(after, kept(order) / total)
    assert after > before
    # Swaps stop where no single one helps: with two groups that is at most a little short of the best.
    assert after * total >= 0.98 * best


def test_an_order_is_the_same_every_time_and_stays_where_it_is_best() -> None:
    columns = np.random.default_rng(4).random((32, 40)).astype(np.float32)
    first, _ = permute.best_order(columns, Pattern.parse("2:4"))
    again, _ = permute.best_order(columns, Pattern.parse("2:4"))
    assert np.array_equal(first, again)
    _, (before, after) = permute.best_order(columns[first], Pattern.parse("2:4"))
    assert after <= before * 1.0002
