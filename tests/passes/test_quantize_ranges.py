"""What finds scales, zero points and codebooks, and where scales lie, against formulas written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.ir import normal
from netlathe.passes.quantize import Quantize
from netlathe.passes.quantize.fit import k_means
from netlathe.passes.sparsify import Sparsify
from netlathe.pipeline.pass_ import Context
from tests.ir.onnx_text import matrix
from tests.passes.test_quantize_schemes import checked, groups_of, product, read, settled

Array = np.ndarray[Any, np.dtype[Any]]
HALVES: dict[str, Any] = {"symmetric": False, "zeros": "float", "scales": "float16"}


def heavy(*shape: int, seed: int = 0) -> Array:
    """Numbers with a few that are far off, as weights have them."""
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.05).astype(np.float32)


# -- zero points between codes --------------------------------------------------------------------------


@pytest.mark.parametrize("scales, digits", [("float32", 24), ("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_fractional_zero_points_are_the_formula(bits: int, scales: str, digits: int) -> None:
    w = heavy(64, 6)
    options = {"weights": f"int{bits}", "group_size": 32, **HALVES, "scales": scales}
    after, _ = checked(product(w), Quantize(min_size=0, **options))
    wide, made = groups_of(w, 32), groups_of(read(after), 32)
    low, high = np.minimum(wide.min(-1), 0)[..., None], np.maximum(wide.max(-1), 0)[..., None]
    step = (high - low) / (2**bits - 1)
    # The ends of the range are codes: off by half a step at most, and by what scale and zero point round.
    off = 0.5 + 2**bits * 2.0 * 2.0**-digits
    assert np.abs(made - wide).max(-1, keepdims=True).max() <= (off * step).max()
    assert (np.abs(made - wide) <= off * step).all()
    levels = np.unique(np.rint((made - low) / step))
    assert len(levels) <= 2**bits


def half_quadratic(w: Array, bits: int) -> tuple[float, float, Array]:
    """The published algorithm for one group, step by step: the norm before and after, and the zero points."""
    p, beta, top = 0.7, 10.0, 2**bits - 1
    scale = float(np.float16((max(w.max(), 0) - min(w.min(), 0)) / top))
    zero = float(np.float16(-min(w.min(), 0) / scale))

    def rounded(z: float) -> Array:
        return np.array([min(max(float(np.rint(x / scale + z)), 0.0), top) for x in w])

    tried = []
    codes = rounded(zero)
    for _ in range(21):
        rest = w / scale - (codes - zero)
        tried.append((float(np.sum(np.abs(rest) ** p)), zero))
        far = [np.sign(r) * max(abs(r) - abs(r) ** (p - 1) / beta, 0.0) if r else 0.0 for r in rest]
        zero = float(np.float16(np.mean(codes - (w / scale - np.array(far)))))
        codes, beta = rounded(zero), beta * 1.01
    best = min(tried)
    return tried[0][0], best[0], np.array([(c - best[1]) * scale for c in rounded(best[1])])


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_hqq_is_its_formula_in_float64(bits: int) -> None:
    w = heavy(64, 6, seed=bits)
    options = {"weights": f"int{bits}", "group_size": 32, "clip": "hqq", **HALVES}
    after, _ = checked(product(w), Quantize(min_size=0, **options))
    wide, made = groups_of(w, 32).reshape(-1, 32), groups_of(read(after), 32).reshape(-1, 32)
    fell = 0
    for group, mine in zip(wide, made, strict=True):
        first, least, wanted = half_quadratic(group, bits)
        assert np.abs(mine - wanted).max() <= 2.0**-23 * np.abs(wanted).max() * 2
        fell += least < first
    assert fell >= 6, "of 12 groups"


@pytest.mark.parametrize("bits", [4, 2])
def test_least_squares_of_scale_and_zero_point(bits: int) -> None:
    """No line through (code, weight) is nearer than the one that is stored, for the codes that it has."""
    w = heavy(64, 6, seed=7)
    made = {}
    for name, options in (
        ("integer", {"symmetric": False}),
        ("float", {"symmetric": False, "zeros": "float"}),
    ):
        pass_ = Quantize(min_size=0, weights=f"int{bits}", group_size=32, clip="mse", **options)  # type: ignore[arg-type]
        made[name] = groups_of(read(checked(product(w), pass_)[0]), 32)
    wide = groups_of(w, 32)
    errors = {name: np.square(found - wide).sum(-1) for name, found in made.items()}
    assert errors["float"].sum() < errors["integer"].sum()
    for group, mine in zip(wide.reshape(-1, 32), made["float"].reshape(-1, 32), strict=True):
        line = np.polyfit(mine, group, 1)
        best = np.square(np.polyval(line, mine) - group).sum()
        assert np.square(mine - group).sum() <= 1.02 * best  # of the last fit codes may still move


# -- codebooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_fitted_codebook_is_a_fixed_point_of_k_means(bits: int) -> None:
    w = heavy(256, 24)
    after, (entry,) = checked(
        product(w),
        Quantize(min_size=0, weights=f"codebook{bits}", group_size=32),  # type: ignore[arg-type]
    )
    table = np.array(entry.detail["codebook"])
    assert len(table) == 2**bits and 0.0 in table and (np.diff(table) > 0).all()
    wide, made = groups_of(w, 32), groups_of(read(after), 32)
    scale = np.abs(wide).max(-1, keepdims=True).astype(np.float32).astype(np.float64)
    units, weigh = wide / scale, np.broadcast_to(scale**2, wide.shape)
    at = np.abs(units[..., None] - table).argmin(-1)
    assert np.array_equal(made, (table[at] * scale).astype(np.float32))
    moved = table.copy()  # by one step on the numbers themselves
    for place in range(len(table)):
        if table[place] and (mine := at == place).any():
            moved[place] = (weigh * units)[mine].sum() / weigh[mine].sum()
    error, less = ((weigh * np.square(units[..., None] - t).min(-1)).sum() for t in (table, moved))
    assert error <= less * (1 + 1e-4), "bins of 2 / 2^14 stand for the numbers in them"
    if bits == 4:
        fixed, _ = checked(product(w), Quantize(min_size=0, weights="nf4", group_size=32))
        other = np.square(groups_of(read(fixed), 32) - wide).sum()
        assert np.square(made - wide).sum() < other


def test_codebooks_of_few_numbers_and_of_none() -> None:
    bins = np.zeros(1 << 14)
    for filled in ((), (5,), (5, 16000)):
        count = bins.copy()
        count[list(filled)] = 1.0
        middles = (np.arange(len(bins)) + 0.5) * (2 / len(bins)) - 1
        table = k_means(count, count * middles, 8)
        assert len(set(table)) == 8 and 0.0 in table and np.abs(table).max() <= 1.01
        assert all(np.abs(table - middles[at]).min() <= 1e-3 for at in filled)


def test_a_codebook_that_is_given() -> None:
    table = (-1.0, -0.25, 0.0, 0.5)
    w = heavy(64, 6)
    pass_ = Quantize(min_size=0, weights="codebook2", codebook=table, group_size=32)
    after, _ = checked(product(w), pass_)
    wide, made = groups_of(w, 32), groups_of(read(after), 32)
    scale = np.abs(wide).max(-1, keepdims=True).astype(np.float32).astype(np.float64)
    nearest = np.array(table)[np.abs((wide / scale)[..., None] - table).argmin(-1)]
    assert np.array_equal(made, (nearest * scale).astype(np.float32))


# -- groups along outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "nf4", "float8e4m3fn", "mxfp4"])
def test_groups_along_outputs(name: Any) -> None:
    w = matrix(24, 64)
    size = 0 if name == "mxfp4" else 16
    options: dict[str, Any] = {"weights": name, "group_size": size, "group_axis": "output"}
    _, (entry,) = checked(product(w), Quantize(min_size=0, **options))
    assert entry.reason.endswith(f"one per {size or 32} elements along axis 1")
    # The same as groups along the contraction of the transposed weight.
    after, _ = checked(product(w), Quantize(min_size=0, **options))
    turned = {**options, "group_axis": "input"}
    other, _ = checked(product(np.ascontiguousarray(w.T)), Quantize(min_size=0, **turned))
    assert np.array_equal(read(after), read(other).T)
    convolution = settled("float[b,4,9,s] x", "y = Conv (x, w)", w=matrix(32, 4, 3, 3))
    checked(convolution, Quantize(min_size=0, **options))
    (left,) = Quantize(min_size=0, **{**options, "group_size": size or 32}).choose(
        product(matrix(64, 24)), Context()
    )
    assert left.status == "skipped" and "do not divide the 24 outputs" in left.reason


# -- every scheme by every solver ---------------------------------------------------------------------------

SOLVED: list[dict[str, Any]] = [
    {"weights": "int4", "group_size": 16, "symmetric": False, "zeros": "float"},
    {"weights": "int3", "group_size": 16, **HALVES, "clip": "mse"},
    {"weights": "int2", "group_size": 16, **HALVES, "clip": "hqq"},
    {"weights": "int4", "group_size": 16, "group_axis": "output", "clip": "mse"},
    {"weights": "int8", "per_tensor": True},
    {"weights": "nf4", "per_tensor": True},
    {"weights": "codebook3", "group_size": 16},
    {"weights": "float8e4m3fn"},
    {"weights": "float8e5m2", "group_size": 16, "clip": "mse"},
    {"weights": "float4e2m1", "group_size": 16},
    {"weights": "mxfp4", "group_axis": "output"},
    {"weights": "nvfp4"},
]


@pytest.mark.parametrize("scheme", SOLVED, ids=str)
@pytest.mark.parametrize("what", ["product", "convolution"])
def test_gptq_solves_every_scheme_and_layout(what: str, scheme: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    if what == "product":
        before = product(heavy(64, 32))
        mixed = (
            rng.normal(size=(3, 80, 64)) @ rng.normal(size=(64, 64)) * np.exp(rng.normal(size=64))
        )
        fed = {"x": mixed.astype(np.float32)}
    else:
        body = "y = Conv <group=2> (x, w)"
        before = settled("float[b,8,9,s] x", body, w=heavy(64, 4, 4, 2))
        fed = {"x": np.cumsum(rng.normal(size=(2, 8, 9, 12)), -1).astype(np.float32)}
    ctx = Context(calibration=[fed])
    exact = ort.run(before, fed)["y"]
    lost = {}
    for solver in ("rtn", "gptq"):
        pass_ = Quantize(min_size=0, solver=solver, **scheme)  # type: ignore[arg-type]
        chosen = pass_.choose(before.clone(), ctx)
        after = before.clone()
        pass_.edit(after, chosen, ctx)
        normal.normalize(after)
        reference = pass_.simulate(before.clone(), chosen).model
        wanted = ort.run(reference, inputs_of(before, fed))["y"]
        assert np.array_equal(ort.run(after, inputs_of(after, fed))["y"], wanted)
        lost[solver] = np.square(wanted.astype(np.float64) - exact).sum()
    assert lost["gptq"] < lost["rtn"]
    assert abs(chosen[0].detail["error"] - lost["gptq"] / np.square(exact).sum()) <= 1e-4
    assert "gptq" in chosen[0].reason


def test_sparse_weights_keep_their_zeros() -> None:
    before = product(matrix(64, 32))
    sparsify = Sparsify(min_size=0)
    sparsify.edit(before, sparsify.choose(before, Context()), Context())
    (entry,) = Quantize(min_size=0, weights="int4", **HALVES).choose(before.clone(), Context())
    assert entry.status == "skipped" and "no code for zero" in entry.reason
    held = before.graph.initializers["w"].const_value
    assert held is not None
    zeros = held.numpy() == 0
    for name in ("codebook4", "codebook3", "float8e4m3fn"):
        after, _ = checked(before.clone(), Quantize(min_size=0, weights=name))  # type: ignore[arg-type]
        assert (read(after)[zeros] == 0).all()


def test_overrides_take_away_what_says_nothing_then() -> None:
    made = settled(
        "float[b,s,64] x",
        "h = MatMul (x, w) y = MatMul (h, v)",
        w=matrix(64, 64),
        v=matrix(64, 64, seed=1),
    )
    pass_ = Quantize(
        min_size=0,
        weights="int4",
        group_size=32,
        group_axis="output",
        clip="hqq",
        **HALVES,
        overrides={"v": {"weights": "int8", "group_size": 0, "symmetric": True}},
    )
    first, second = pass_.choose(made, Context())
    assert "zero points between codes" in first.reason
    assert second.reason.startswith("int8, 64 scales") and "whole range" in second.reason
