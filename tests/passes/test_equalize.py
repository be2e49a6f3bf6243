"""Equalizing keeps every network what it was, finds the factors of the papers, and says what it leaves."""

from __future__ import annotations

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
from netlathe.passes.equalize import Equalize, factors
from netlathe.passes.quantize import Quantize
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Result
from tests import zoo_ir
from tests.ir.onnx_text import matrix, model
from tests.passes.folding import in_float64

Array = npt.NDArray[Any]
NAMES = (
    "llama", "resnet", "minilm", "mobilenet_v2", "gpt2", "opt", "vit", "mixtral", "whisper", "t5",
    "convnext", "qwen2", "phi", "gemma", "falcon",
)  # fmt: skip
SMOOTH, RANGE = Equalize(), Equalize(method="range")
SEARCH = Equalize(method="awq", weights="int3", group_size=16)
QUICK = {("llama", SMOOTH), ("llama", SEARCH), ("resnet", SMOOTH), ("minilm", RANGE)}
CASES = [
    pytest.param(name, pass_, marks=[] if (name, pass_) in QUICK else [pytest.mark.slow])
    for name in NAMES
    for pass_ in (SMOOTH, SEARCH, RANGE)
]
# Every weight is rounded once more and so are products of it: see passes/equalize TOLERANCE.
EXACT = 1e-5
EXACT_DOUBLE = 1e-12


def equalized(made: ir.Model, pass_: Equalize, ctx: Context) -> Result:
    """Run a pass; the model is in normal form and verifies."""
    result = pass_.run(made, ctx)
    normal.normalize(made)
    assert verify.verify(made) == []
    return result


def data(name: str) -> Context:
    """A context with a few samples of a zoo model."""
    return Context(calibration=[feed for seed in (5, 6) for feed in zoo_ir.feeds(name, seed)])


def by_name(result: Result) -> dict[str, Entry]:
    """Entries by candidate; each stands there once."""
    found = {entry.candidate: entry for entry in result.entries}
    assert len(found) == len(result.entries)
    return found


# -- the function stays -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pass_"), CASES, ids=str)
def test_outputs_stay(name: str, pass_: Equalize) -> None:
    made = zoo_ir.captured(name)
    before = {v.name: weights.array(v).copy() for v in made.graph.initializers.values()}
    result = equalized(made, pass_, data(name))
    after = {v.name: weights.array(v) for v in made.graph.initializers.values()}
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    told = {
        name
        for entry in result.entries
        if entry.status == "applied"
        for name in (*entry.detail["makers"], *entry.detail["readers"])
    }
    assert told <= changed  # and what else changes is beside them, as a bias is
    assert result.changed == bool(changed)
    for fed in zoo_ir.feeds(name):
        got, wanted = ort.run(made, fed), ort.run(zoo_ir.captured(name), fed)
        for key in wanted:
            assert compare.relative_error(got[key], wanted[key]) <= EXACT


@pytest.mark.parametrize("name", ["opt", pytest.param("resnet", marks=pytest.mark.slow)])
def test_in_float64_outputs_stay_to_rounding(name: str) -> None:
    made = in_float64(zoo_ir.captured(name))
    before = made.clone()
    feeds = [
        {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in fed.items()}
        for fed in zoo_ir.feeds(name)
    ]
    result = equalized(made, Equalize(alpha=0.8), Context(calibration=feeds))
    assert result.changed
    for fed in feeds:
        got, wanted = Executor(made).run(fed), Executor(before).run(fed)
        for key in wanted:
            error = compare.relative_error(got[key].numpy(), wanted[key].numpy())
            assert error <= EXACT_DOUBLE


def test_a_factor_belongs_to_a_position_of_each_shared_head() -> None:
    """Two query heads read one value head: o_proj's rows of both are divided by the same factors."""
    made = zoo_ir.captured("llama")  # 4 query heads, 2 key/value heads of 16
    held = {v.name: weights.array(v).astype(np.float64) for v in made.graph.initializers.values()}
    pass_ = Equalize(ignore=("input_layernorm.weight",))  # it would scale the rows of v_proj too
    result = equalized(made, pass_, data("llama"))
    v_proj, o_proj = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "vo")
    (entry,) = (e for e in result.entries if v_proj in e.detail.get("makers", ()))
    by = entry.arrays["factors"]
    assert by.shape == (32,)
    now = {v.name: weights.array(v) for v in made.graph.initializers.values()}
    np.testing.assert_allclose(now[v_proj], held[v_proj] * by, rtol=1e-6)
    shared = np.repeat(by.reshape(2, 1, 16), 2, axis=1).reshape(64, 1)
    np.testing.assert_allclose(now[o_proj], held[o_proj] / shared, rtol=1e-6)


# -- the factors --------------------------------------------------------------------------------------


def ffn(**more: Array) -> ir.Model:
    """y = relu(norm(x) @ up + bias) @ down."""
    held = {
        "scale": np.abs(matrix(16)) + 1,
        "up": matrix(16, 24, seed=1),
        "bias": matrix(24, seed=2),
        "down": matrix(24, 16, seed=3),
    }
    made = model(
        "float[b,16] x",
        "float y",
        "n = RMSNormalization<axis=-1, epsilon=0.001>(x, scale)"
        " h = MatMul(n, up) a = Add(h, bias) r = Relu(a) y = MatMul(r, down)",
        **(held | more),
    )
    normal.normalize(made)
    return made


def sample() -> dict[str, Array]:
    """Rows with channels of quite different sizes."""
    return {"x": matrix(50, 16, seed=4) * np.logspace(-1, 1, 16, dtype=np.float32)}


def inside(x: Array, made: ir.Model) -> tuple[Array, Array]:
    """n and r of :func:`ffn`, in float64."""
    held = {v.name: weights.array(v).astype(np.float64) for v in made.graph.initializers.values()}
    wide = x.astype(np.float64)
    n = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.001) * held["scale"]
    return n, np.maximum(n @ held["up"] + held["bias"], 0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_smoothquant_by_its_formula(alpha: float) -> None:
    made = ffn()
    n, r = inside(sample()["x"], made)
    up, down = (
        weights.array(made.graph.initializers[k]).astype(np.float64) for k in ("up", "down")
    )
    found = by_name(equalized(made, Equalize(alpha=alpha), Context(calibration=[sample()])))
    s = np.abs(n).max(0) ** alpha / np.abs(up).max(1) ** (1 - alpha)
    np.testing.assert_allclose(1 / found["n"].arrays["factors"], s, rtol=1e-5)
    s = np.abs(r).max(0) ** alpha / np.abs(down).max(1) ** (1 - alpha)
    np.testing.assert_allclose(1 / found["r"].arrays["factors"], s, rtol=1e-5)


def test_awq_takes_the_best_of_its_grid() -> None:
    """The error is that of the outputs themselves, with the weight that quantize makes of it."""
    made = ffn()
    n, _ = inside(sample()["x"], made)
    up = weights.array(made.graph.initializers["up"]).astype(np.float64)

    def error(s: Array) -> float:
        scaled = (up * s[:, None]).astype(np.float32)
        alone = model("float[b,16] x", "float y", "y = MatMul(x, w)", w=scaled)
        normal.normalize(alone)
        pass_ = Quantize(weights="int3", group_size=8, min_size=0)
        (entry,) = pass_.choose(alone, Context())
        reference = pass_.simulate(alone, [entry]).model
        (name,) = (v.name for v in reference.graph.initializers.values() if len(v.shape or ()) == 2)
        rounded = weights.array(reference.graph.initializers[str(name)]).astype(np.float64)
        return float((((n / s) @ rounded - n @ up) ** 2).sum() / len(n))

    errors = {0.0: error(np.ones(16))}
    for step in range(1, 20):
        s = np.abs(n).mean(0) ** (step / 20)
        errors[step / 20] = error(s / np.sqrt(s.max() * s.min()))
    pass_ = Equalize(method="awq", weights="int3", group_size=8, ignore=("down",))
    entry = by_name(equalized(made, pass_, Context(calibration=[sample()])))["n"]
    assert entry.detail["alpha"] == min(errors, key=lambda alpha: errors[alpha])
    np.testing.assert_allclose(entry.detail["error_before"], errors[0.0], rtol=1e-4)
    np.testing.assert_allclose(entry.detail["error_after"], min(errors.values()), rtol=1e-4)


def test_ranges_of_neighbours_become_equal() -> None:
    made = zoo_ir.captured("opt")
    for node in made.graph:  # Relu is what carries a scale
        assert node.op_type != "Gelu"
    before = {v.name: weights.array(v).astype(np.float64) for v in made.graph.initializers.values()}
    entries = equalized(made, Equalize(method="range"), Context()).entries
    applied = [entry for entry in entries if entry.status == "applied"]
    assert len(applied) == 4  # v to o and fc1 to fc2, of two layers
    for entry in applied:
        (maker,) = (n for n in entry.detail["makers"] if len(before[n].shape) == 2)
        (reader,) = entry.detail["readers"]
        r1, r2 = np.abs(before[maker]).max(0), np.abs(before[reader]).max(1)
        np.testing.assert_allclose(entry.arrays["factors"], np.sqrt(r2 / r1), rtol=1e-12)
        now = [weights.array(made.graph.initializers[name]) for name in (maker, reader)]
        np.testing.assert_allclose(np.abs(now[0]).max(0), np.abs(now[1]).max(1), rtol=1e-6)


SEPARABLE = """h = Conv<pads=[0,0,0,0]>(x, first, bias) r = Relu(h)
    d = Conv<group=8, pads=[1,1,1,1]>(r, depth) q = LeakyRelu<alpha=0.1>(d) y = Conv(q, last)"""


def test_a_depthwise_convolution_is_a_layer_between_two() -> None:
    """Three layers in a row: the sweeps end where both pairs are equal (arXiv 1906.04721, sec. 4.1)."""
    made = model(
        "float[b,4,6,6] x",
        "float y",
        SEPARABLE,
        first=matrix(8, 4, 1, 1, seed=1)
        * np.logspace(-2, 2, 8, dtype=np.float32)[:, None, None, None],
        bias=matrix(8, seed=2),
        depth=matrix(8, 1, 3, 3, seed=3),
        last=matrix(4, 8, 1, 1, seed=4),
    )
    normal.normalize(made)
    before = made.clone()
    found = by_name(equalized(made, Equalize(method="range"), Context()))
    assert [found[name].status for name in "rq"] == ["applied", "applied"]
    assert found["x"].status == "refused" and "outside" in found["x"].reason
    now = {v.name: np.abs(weights.array(v)) for v in made.graph.initializers.values()}
    ranges = [
        now["first"].max((1, 2, 3)),
        now["depth"].max((1, 2, 3)),
        now["last"].max((0, 2, 3)),
    ]
    np.testing.assert_allclose(ranges[0], ranges[1], rtol=1e-3)
    np.testing.assert_allclose(ranges[1], ranges[2], rtol=1e-3)
    fed = {"x": matrix(2, 4, 6, 6, seed=5)}
    assert compare.relative_error(ort.run(made, fed)["y"], ort.run(before, fed)["y"]) <= EXACT


def test_channels_of_zeros_keep_their_scale() -> None:
    up = matrix(16, 24, seed=1)
    up[:, 3] = 0
    down = matrix(24, 16, seed=3)
    down[5] = 0
    made = ffn(up=up, down=down)
    by = by_name(equalized(made, Equalize(method="range"), Context()))["r"].arrays["factors"]
    assert by[3] == by[5] == 1 and (np.delete(by, [3, 5]) != 1).all()


# -- what is left, and why ----------------------------------------------------------------------------


def test_the_ledger_gives_reasons() -> None:
    entries = equalized(zoo_ir.captured("gpt2"), Equalize(), data("gpt2")).entries
    refused = {entry.candidate: entry.reason for entry in entries if entry.status == "refused"}
    assert len(refused) == 3  # two FFNs with a Gelu, and the head, which is the embedding too
    assert sum("Gelu is not linear" in reason for reason in refused.values()) == 2
    assert sum("LayerNormalization is not linear" in reason for reason in refused.values()) == 1


def test_a_value_that_others_see_is_refused() -> None:
    made = model(
        "float[b,6] x",
        "float n, float y",
        "n = RMSNormalization<axis=-1>(x, scale) y = MatMul(n, up)",
        scale=np.ones(6, np.float32),
        up=matrix(6, 8),
    )
    normal.normalize(made)
    (entry,) = equalized(made, Equalize(method="range"), Context()).entries
    assert entry.status == "refused" and "n is seen from outside" in entry.reason


def test_what_is_ignored_stays() -> None:
    made = ffn()
    pass_ = Equalize(ignore=("down",))
    found = by_name(equalized(made, pass_, Context(calibration=[sample()])))
    assert found["r"].status == "skipped" and found["r"].left_out
    assert found["n"].status == "applied"
    with pytest.raises(PassError, match="matches nothing that can be scaled"):
        Equalize(ignore=("donw",)).run(ffn(), Context(calibration=[sample()]))


def test_awq_refuses_what_it_cannot_judge() -> None:
    made = ffn()
    pass_ = Equalize(method="awq", group_size=24)
    found = by_name(equalized(made, pass_, Context(calibration=[sample()])))
    assert (
        found["n"].status == "refused" and "groups of 24 do not divide the 16" in found["n"].reason
    )
    assert found["r"].status == "applied"


def test_it_comes_before_quantize() -> None:
    with pytest.raises(OptionError, match="cannot come behind"):
        netlathe.plan("no such model", "quantize, equalize")


def test_data_is_asked_for() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Equalize().run(ffn(), Context())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "range", "alpha": 0.7}, "alpha says nothing"),
        ({"method": "smoothquant", "group_size": 32}, "group_size says nothing"),
        ({"method": "awq", "weights": "float16", "group_size": 32}, "float16"),
        ({"alpha": 1.5}, "alpha"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Equalize(**given)


def test_some_outputs_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight in which every output stands there twice, half give the whole error."""
    up = np.repeat(matrix(16, 12, seed=1), 2, axis=1)
    pass_ = Equalize(method="awq", weights="int3", group_size=8, ignore=("down",))
    found = []
    for most in (1 << 22, 16 * 12):
        monkeypatch.setattr(factors, "AT_MOST", most)
        entries = by_name(equalized(ffn(up=up), pass_, Context(calibration=[sample()])))
        found.append(entries["n"].detail)
    for key in ("alpha", "error_before", "error_after"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-9)
