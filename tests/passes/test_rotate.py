"""Rotating keeps every network what it was, turns what it says by what it says, and refuses the rest."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import netlathe
from netlathe.diagnostics import OptionError, PassError
from netlathe.execute import compare, ort
from netlathe.execute.executor import Executor
from netlathe.ir import normal, verify, weights
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.quantize import Quantize
from netlathe.passes.rotate import Rotate
from netlathe.passes.rotate.hadamard import (
    factors,
    hadamard,
    random_hadamard,
    random_orthogonal,
)
from netlathe.pipeline.pass_ import Context, Result
from tests import zoo_ir
from tests.ir.onnx_text import matrix, model, ops
from tests.passes.folding import in_float64

Array = npt.NDArray[Any]
NAMES = (
    "llama", "gpt2", "vit", "opt", "minilm", "resnet", "phi", "gemma", "falcon", "qwen2", "whisper",
    "t5", "mixtral",
)  # fmt: skip
ALL, RANDOM, PCA = Rotate(online=True), Rotate(basis="random"), Rotate(basis="pca", heads=False)
QUICK = {("llama", ALL), ("llama", PCA), ("gpt2", RANDOM), ("vit", ALL)}
CASES = [
    pytest.param(name, pass_, marks=[] if (name, pass_) in QUICK else [pytest.mark.slow])
    for name in NAMES
    for pass_ in (ALL, RANDOM, PCA)
]
EXACT, EXACT_DOUBLE = 1e-4, 1e-10  # the bars; float32 stays a tenth below its own


@lru_cache(maxsize=4)
def _folded(name: str) -> ir.Model:
    made = zoo_ir.captured(name)
    FoldNorms(untie=True).run(made, Context())
    normal.normalize(made)
    return made


def folded(name: str) -> ir.Model:
    """A zoo model with its norms folded."""
    return _folded(name).clone()


def rotated(made: ir.Model, pass_: Rotate, ctx: Context | None = None) -> Result:
    """Run a pass; the model is in normal form and verifies."""
    result = pass_.run(made, ctx or Context())
    normal.normalize(made)
    assert verify.verify(made) == []
    return result


def turned(result: Result, kind: str) -> list[str]:
    """What was turned in one way."""
    return [
        entry.candidate
        for entry in result.entries
        if entry.status == "applied" and entry.detail["kind"] == kind
    ]


# -- the function stays -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pass_"), CASES, ids=str)
def test_outputs_stay(name: str, pass_: Rotate) -> None:
    made = folded(name)
    result = rotated(made, pass_, Context(calibration=zoo_ir.feeds(name, 5)))
    names = [entry.candidate for entry in result.entries]
    assert len(names) == len(set(names))
    if name not in ("minilm", "resnet"):  # a post-norm stream, and no stream at all
        assert turned(result, "stream")
    assert result.changed == any(entry.status == "applied" for entry in result.entries)
    for fed in zoo_ir.feeds(name):
        got, wanted = ort.run(made, fed), ort.run(zoo_ir.captured(name), fed)
        for key in wanted:
            assert compare.relative_error(got[key], wanted[key]) <= EXACT


@pytest.mark.parametrize("name", ["opt", pytest.param("vit", marks=pytest.mark.slow)])
def test_in_float64_outputs_stay_to_rounding(name: str) -> None:
    made = in_float64(folded(name))
    before = made.clone()
    result = rotated(made, ALL)
    assert turned(result, "stream") and turned(result, "head") and turned(result, "online")
    for fed in zoo_ir.feeds(name):
        wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in fed.items()}
        got, wanted = Executor(made).run(wide), Executor(before).run(wide)
        for key in wanted:
            error = compare.relative_error(got[key].numpy(), wanted[key].numpy())
            assert error <= EXACT_DOUBLE


# -- by formula ---------------------------------------------------------------------------------------


def test_every_weight_takes_in_what_the_ledger_says() -> None:
    """In float64: Q into what writes to the stream, Q' into what reads it, the head's basis between."""
    made = folded("llama")
    held = {v.name: weights.array(v).astype(np.float64) for v in made.graph.initializers.values()}
    result = rotated(made, Rotate())
    now = {v.name: weights.array(v) for v in made.graph.initializers.values()}
    stream, *heads = (entry for entry in result.entries if entry.status == "applied")
    q = stream.arrays["basis"].astype(np.float64)
    h = heads[0].arrays["basis"].astype(np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(64), atol=1e-6)
    layer = "model.layers.0"
    expected = {
        "model.embed_tokens.weight": held["model.embed_tokens.weight"] @ q,
        f"{layer}.self_attn.q_proj.weight": q.T @ held[f"{layer}.self_attn.q_proj.weight"],
        f"{layer}.self_attn.v_proj.weight": (
            (q.T @ held[f"{layer}.self_attn.v_proj.weight"]).reshape(64, 2, 16) @ h
        ).reshape(64, 32),
        f"{layer}.self_attn.o_proj.weight": np.einsum(
            "nhd,hk->nkd", held[f"{layer}.self_attn.o_proj.weight"].reshape(4, 16, 64) @ q, h
        ).reshape(64, 64),
        f"{layer}.mlp.down_proj.weight": held[f"{layer}.mlp.down_proj.weight"] @ q,
        "lm_head.weight": q.T @ held["lm_head.weight"],
    }
    for name, array in expected.items():
        np.testing.assert_allclose(now[name], array, atol=1e-6 * np.abs(array).max())


def products(width: int) -> ir.Model:
    """y = Gelu(x) W1 + Gelu(x) W2, which nothing can be folded into."""
    made = model(
        f"float[b,s,{width}] x",
        "float y",
        "g = Gelu(x) a = MatMul(g, one) c = MatMul(g, two) y = Add(a, c)",
        one=matrix(width, 10, seed=1),
        two=matrix(width, 10, seed=2),
    )
    normal.normalize(made)
    return made


@pytest.mark.parametrize(("width", "orders"), [(24, (2, 12)), (28, (1, 28)), (160, (8, 20))])
def test_one_transform_stands_in_front_of_all_products(width: int, orders: tuple[int, int]) -> None:
    made = products(width)
    before = made.clone()
    result = rotated(made, Rotate(online=True))
    (entry,) = (e for e in result.entries if e.status == "applied")
    assert (entry.candidate, entry.detail["orders"]) == ("g", list(orders))
    # two products there were, and one for each factor
    assert ops(made)["MatMul"] == 2 + (1 if orders[0] == 1 else 2)
    left, right = (hadamard(order) for order in orders)
    assert left is not None and right is not None
    q = np.kron(left.astype(np.float64), right) / np.sqrt(width)
    for name in ("one", "two"):
        now = weights.array(made.graph.initializers[name])
        held = weights.array(before.graph.initializers[name]).astype(np.float64)
        np.testing.assert_allclose(now, q.T @ held, atol=1e-6 * np.abs(held).max())
    fed = {"x": matrix(2, 3, width, seed=3)}
    assert compare.relative_error(ort.run(made, fed)["y"], ort.run(before, fed)["y"]) <= EXACT


def test_the_signs_are_no_weights_to_quantize() -> None:
    made = products(160)
    rotated(made, Rotate(online=True))
    entries = Quantize(min_size=0).choose(made, Context())
    assert {entry.candidate for entry in entries if entry.status == "applied"} == {"one", "two"}


def test_an_outlier_is_spread() -> None:
    """What it is for: one channel that stands out makes all equal (QuaRot, fig. 1)."""
    x = np.full((1, 64), 0.1)
    x[0, 5] = 10
    spread = np.abs(x @ random_hadamard(64, np.random.default_rng(0)))
    assert spread.max() < 2 * np.sqrt((x**2).mean())


# -- matrices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 28, 36, 40, 44, 52, 76, 100, 108, 148, 344])
def test_hadamard_matrices(order: int) -> None:
    found = hadamard(order)
    assert found is not None and found.dtype == np.int8
    wide = found.astype(np.int64)
    assert (np.abs(wide) == 1).all()
    assert (wide @ wide.T == order * np.eye(order)).all()


def test_orders_without_a_matrix() -> None:
    assert [order for order in range(1, 120) if order % 4 == 0 and hadamard(order) is None] == [
        92,
        116,
    ]
    assert hadamard(3) is hadamard(6) is hadamard(0) is None


def test_factors_are_near_each_other() -> None:
    """Widths of known models: LLaMA 7B, 13B, 3.1 8B and 70B, Qwen2 7B."""
    wanted = {1024: (32, 32), 11008: (32, 344), 13824: (108, 128), 14336: (112, 128)}
    wanted |= {28672: (128, 224), 18944: (128, 148)}
    assert {size: factors(size) for size in wanted} == wanted
    assert factors(22) is None


@pytest.mark.parametrize("size", [16, 12, 22, 7])
@pytest.mark.parametrize("draw", [random_hadamard, random_orthogonal])
def test_drawn_bases_are_orthogonal_and_repeatable(size: int, draw: Any) -> None:
    found = draw(size, np.random.default_rng(3))
    np.testing.assert_allclose(found @ found.T, np.eye(size), atol=1e-12)
    assert np.array_equal(found, draw(size, np.random.default_rng(3)))
    assert not np.array_equal(found, draw(size, np.random.default_rng(4)))


# -- what is left, and why ----------------------------------------------------------------------------


def test_norms_must_be_folded() -> None:
    entries = rotated(zoo_ir.captured("llama"), Rotate()).entries
    (stream,) = (entry for entry in entries if entry.candidate == "embedding")
    assert stream.status == "refused" and "run fold_norms first" in stream.reason


def test_post_norm_streams_are_refused() -> None:
    result = rotated(folded("minilm"), Rotate())
    refused = [entry for entry in result.entries if entry.status == "refused"]
    assert len(refused) == 12 and all("post-norm" in entry.reason for entry in refused)
    assert len(turned(result, "head")) == 6  # which no norm concerns


def test_heads_as_wide_as_there_are_tokens_stay() -> None:
    """The channel attention of DaViT: no weight has such a width."""
    made = model(
        "float[b,8,6] x",
        "float y",
        "v = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(v) h = Unsqueeze(t, one) y = Attention(h, h, h)",
        w=matrix(6, 6),
        one=np.array([1]),
    )
    normal.normalize(made)
    (entry,) = [e for e in rotated(made, Rotate()).entries if e.candidate == "h"]
    assert entry.status == "refused" and "no weight has the positions of a head" in entry.reason


def test_what_is_not_asked_for_is_in_the_ledger() -> None:
    result = rotated(folded("llama"), Rotate(heads=False))
    left = {e.candidate: e.reason for e in result.entries if e.status == "skipped"}
    assert all(entry.left_out for entry in result.entries if entry.status == "skipped")
    # values of heads, what they make, and the FFN's inner width, of two layers
    assert sorted("heads=False" in reason for reason in left.values()) == [False] * 4 + [True] * 2


def test_an_odd_width_has_no_transform() -> None:
    result = rotated(products(22), Rotate(online=True))
    (entry,) = result.entries
    assert entry.status == "refused" and "no Hadamard matrix" in entry.reason


@pytest.mark.parametrize("earlier", ["quantize", "sparsify"])
def test_it_comes_before_what_it_would_undo(earlier: str) -> None:
    with pytest.raises(OptionError, match="cannot come behind"):
        netlathe.plan("no such model", f"{earlier}, rotate")


def test_pca_asks_for_data() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Rotate(basis="pca").run(folded("llama"), Context())
