"""Tied blocks share weights that are stored once, keep norms of their own, and are told apart rightly."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import netlathe
from netlathe.analysis.cost import cost
from netlathe.diagnostics import OptionError, PassError
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of, relative_error
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.ir import normal, verify, weights
from netlathe.passes.quantize import Quantize
from netlathe.passes.tie_blocks import TieBlocks
from netlathe.pipeline import run
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Feeds, Result
from tests import zoo, zoo_ir
from tests.analysis.residual import CACHED_INPUTS, CACHED_OUTPUTS, attention, ffn, typed
from tests.ir.onnx_text import matrix
from tests.pipeline.toy import captured_of

# The project's bar for parity with eager torch: max|difference| as a share of the RMS, float32.
BOUND = 1e-5


def tied(model: ir.Model, pass_: TieBlocks, feeds: Sequence[Feeds]) -> tuple[ir.Model, Result]:
    """An edited copy, which verifies, in normal form."""
    ctx = Context(calibration=feeds)
    after = model.clone()
    result = pass_.edit(after, pass_.choose(model, ctx), ctx)
    normal.normalize(after)
    assert verify.verify(after) == []
    return after, result


def stack(count: int, scale: Sequence[float] = ()) -> ir.Model:
    """FFNs one after the other, each with weights of its own; up's of a scale."""
    scale = scale or [1.0] * count
    own: dict[str, Any] = {}
    body = "h0 = Relu(x)"
    for i in range(count):
        text = ffn(f"f{i}", f"h{i}").replace(" up)", f" up{i})").replace(" down)", f" down{i})")
        body += f" {text} h{i + 1} = Add(h{i}, f{i}3)"
        own[f"up{i}"] = np.float32(scale[i]) * matrix(8, 16, seed=20 + i)
        own[f"down{i}"] = matrix(16, 8, seed=40 + i)
    return typed(f"{body} y = Tanh(h{count})", **own)


def data(count: int = 3) -> list[Feeds]:
    """Samples of the one input ``x``."""
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal((2, 5, 8)).astype(np.float32)} for _ in range(count)]


def partners(entries: Sequence[Entry]) -> dict[str, str]:
    """What gives its weights up -> whose it uses."""
    return {e.candidate: e.detail["with"] for e in entries if e.status == "applied"}


# -- what is tied ---------------------------------------------------------------------------------

EAGER = [
    ("llama", "block", "model.layers.1"),
    pytest.param("phi", "ffn", "model.layers.1.mlp", marks=pytest.mark.slow),
    pytest.param("minilm", "attention", "encoder.layer.1.attention", marks=pytest.mark.slow),
    ("vit", "block", "vit.layers.1"),
    ("whisper", "block", "model.decoder.layers.1"),
    ("convnext", "block", "convnext.encoder.stages.0.layers.1"),
]


@pytest.mark.parametrize(("name", "kind", "block"), EAGER)
def test_tying_is_copying_the_weights_of_the_module(name: str, kind: Any, block: str) -> None:
    """Against eager torch: all parameters of one block are those of the other, but for norms."""
    model = zoo_ir.captured(name)
    every = TieBlocks(kind=kind, count=0).choose(model, Context())
    others = [e.where for e in every if e.where and not e.where.startswith(block)]
    pass_ = TieBlocks(kind=kind, ignore=tuple(dict.fromkeys(others)))
    after, result = tied(model, pass_, zoo_ir.feeds(name)[:1])
    (entry,) = [e for e in result.entries if e.status == "applied"]
    assert entry.where.startswith(block)
    source = entry.detail["with"][: len(block)]
    recipe = zoo.build(name)
    one, other = recipe.module.get_submodule(block), recipe.module.get_submodule(source)
    norms = {path for path, m in one.named_modules() if "norm" in type(m).__name__.lower()}
    with torch.no_grad():
        own = dict(other.named_parameters())
        for path, parameter in one.named_parameters():
            if path.rpartition(".")[0] not in norms:
                parameter.copy_(own[path])
    for sizes in recipe.sizes:
        given = recipe.feeds(sizes, 5)
        with torch.no_grad():
            expected = recipe.module(**given)
        actual = ort.run(after, {key: tensor.numpy() for key, tensor in given.items()})
        for output in recipe.outputs:
            assert relative_error(actual[output], expected[output].numpy()) < BOUND
    assert cost(model).params - cost(after).params == entry.detail["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_it_equals_its_reference_on_every_family(name: str) -> None:
    """Every kind that a model has two alike of; the others are refused with the reason."""
    model, feeds = zoo_ir.captured(name), zoo_ir.feeds(name)
    found = 0
    for kind in ("attention", "ffn", "block"):
        pass_ = TieBlocks(kind=kind)
        try:
            after, result = tied(model, pass_, feeds)
        except PassError as error:
            assert error.diagnostics[0].notes, name
            continue
        if not result.changed:
            continue
        found += 1
        reference = pass_.simulate(model.clone(), result.entries)
        for feed in feeds:
            actual = ort.run(after, inputs_of(after, feed))
            expected = ort.run(reference.model, feed)
            for output, array in actual.items():
                assert relative_error(array, expected[output]) <= reference.tolerance
    # Of these two every stage of the tiny model has one residual block.
    assert found or name in ("resnet", "efficientnet")


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """Parameters, the file of weights and every backend say so; all compute the same."""
    captured = captured_of(zoo_ir.captured("llama"))
    feeds = zoo_ir.feeds("llama")
    whole = netlathe.compile(captured, "cleanup", calibration=feeds)
    compiled = netlathe.compile(captured, "tie_blocks(score='kl')", calibration=feeds)
    gone = compiled.steps[0].statistics["parameters"]
    # q and o of 64 x 64, k and v of 32 x 64; three of 160 x 64
    assert gone == 2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64
    whole.save(tmp_path / "whole")
    compiled.save(tmp_path / "tied")
    sizes = {
        name: sum(f.stat().st_size for f in (tmp_path / name).glob("model.onnx*"))
        for name in ("whole", "tied")
    }
    assert sizes["whole"] - sizes["tied"] == pytest.approx(4 * gone, rel=0.02)
    proto = onnx.load(tmp_path / "tied" / "model.onnx")
    held = [tensor.name for tensor in proto.graph.initializer]
    assert not [name for name in held if "layers.1.mlp" in name and "norm" not in name]
    module = compiled.module()
    names = [name for name, _ in module.named_parameters()]
    assert sum(p.numel() for p in module.parameters()) == cost(compiled.model).params
    assert len(names) == len(set(names)) and not [n for n in names if "layers.1.mlp" in n]
    for feed in feeds:
        expected = ort.run(compiled.model, feed)["logits"]
        with torch.no_grad():
            found = module(**{key: torch.from_numpy(array) for key, array in feed.items()})
        assert relative_error(found["logits"].numpy(), expected) < BOUND


def test_tuned_weights_come_back_tied() -> None:
    captured = captured_of(zoo_ir.captured("llama"))
    compiled = netlathe.compile(
        captured, "tie_blocks(kind='ffn')", calibration=zoo_ir.feeds("llama")
    )
    module = compiled.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.01)
    tuned = compiled.with_weights(module)
    assert cost(tuned.model).params == cost(compiled.model).params
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (
        weights.array(m.graph.initializers[name]) for m in (compiled.model, tuned.model)
    )
    assert np.allclose(after, before * np.float32(1.01))


@pytest.mark.slow
def test_in_tvm(tmp_path: Path) -> None:
    """The artifact packs a shared weight once, and computes the same."""
    pytest.importorskip("tvm", reason="the tvm extra is not installed")
    from netlathe.backends.tvm import runtime

    captured = captured_of(zoo_ir.captured("llama"))
    sizes = {}
    for name, passes in (("whole", "cleanup"), ("tied", "tie_blocks")):
        compiled = netlathe.compile(captured, passes, calibration=zoo_ir.feeds("llama"))
        compiled.save(tmp_path / name, target="tvm-x86")
        files = [f for f in (tmp_path / name).rglob("*") if f.is_file() and "params" in f.name]
        sizes[name] = sum(f.stat().st_size for f in files)
    loaded = runtime.load(tmp_path / "tied", threads=1)
    for feed in zoo_ir.feeds("llama"):
        expected = ort.run(compiled.model, feed)["logits"]
        assert relative_error(loaded.run(feed)["logits"], expected) < 1e-4
    gone = 4 * compiled.steps[0].statistics["parameters"]
    assert sizes["whole"] - sizes["tied"] == pytest.approx(gone, rel=0.05)


def test_caches_stay_as_they_are() -> None:
    layers = " ".join(
        f"""q{i} = MatMul(h{i}, wq{i}) a{i} = MatMul(h{i}, wk{i}) b{i} = MatMul(h{i}, wv{i})
        nk{i} = Concat<axis=1>(k{i}, a{i}) nv{i} = Concat<axis=1>(v{i}, b{i})
        c{i} = Attention<q_num_heads=2, kv_num_heads=2>(q{i}, nk{i}, nv{i})
        o{i} = MatMul(c{i}, wo{i}) h{i + 1} = Add(h{i}, o{i})"""
        for i in range(2)
    )
    own = {f"w{p}{i}": matrix(8, 8, seed=9 * i + n) for i in (0, 1) for n, p in enumerate("qkvo")}
    body = f"h0 = Relu(x) {layers} y = Tanh(h2)"
    model = typed(body, CACHED_INPUTS, CACHED_OUTPUTS, **own)
    rng = np.random.default_rng(0)
    feed = {n: rng.standard_normal((2, 3, 8)).astype(np.float32) for n in ("k0", "v0", "k1", "v1")}
    feed["x"] = rng.standard_normal((2, 5, 8)).astype(np.float32)
    after, result = tied(model, TieBlocks(kind="attention"), [feed])
    assert partners(result.entries) == {"o0": "o1"} or partners(result.entries) == {"o1": "o0"}
    for old, new in (
        (model.graph.inputs, after.graph.inputs),
        (model.graph.outputs, after.graph.outputs),
    ):
        assert [v.name for v in old] == [v.name for v in new]
    ((gone, kept),) = [(k[1], v[1]) for k, v in partners(result.entries).items()]
    copied = model.clone()
    for part in "qkvo":
        held = copied.graph.initializers
        held[f"w{part}{gone}"].const_value = held[f"w{part}{kept}"].const_value
    expected = ort.run(copied, feed)
    for name, array in ort.run(after, feed).items():
        assert relative_error(array, expected[name]) < BOUND


@pytest.mark.slow
def test_text_is_generated_through_all_caches(tmp_path: Path) -> None:
    module: Any = zoo.build("llama").module
    module.save_pretrained(tmp_path)
    captured = HuggingFaceDirectory(cache=True).capture(tmp_path)
    model = captured.model
    after, _ = tied(
        model, TieBlocks(ignore=("model.layers.0",)), [captured.sample(captured.dynamic, 0)]
    )
    assert [(v.name, v.shape) for v in after.graph.inputs] == [
        (v.name, v.shape) for v in model.graph.inputs
    ]
    assert [v.name for v in after.graph.outputs] == [v.name for v in model.graph.outputs]
    one, other = module.model.layers[1], module.model.layers[0]
    with torch.no_grad():
        for part in ("self_attn", "mlp"):
            getattr(one, part).load_state_dict(getattr(other, part).state_dict())
    ids = torch.randint(3, zoo.VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    names = [v.name or "" for v in after.graph.inputs if "past" in (v.name or "")]
    past = {name: np.zeros((2, 2, 0, 16), np.float32) for name in names}
    new = ids.numpy()
    with torch.no_grad():
        for _ in range(3):
            mask = np.ones(ids.shape, np.int64)
            got = ort.run(after, {"input_ids": new, "attention_mask": mask, **past})
            whole = module(input_ids=ids).logits.numpy()
            assert relative_error(got["logits"], whole[:, -new.shape[1] :]) < BOUND
            past = {n: got[n.replace("past_key_values", "present")] for n in past}
            new = got["logits"][:, -1:].argmax(-1)
            ids = torch.cat([ids, torch.from_numpy(new)], 1)


# -- choosing -------------------------------------------------------------------------------------


def test_those_that_lose_least_go_and_everyone_is_accounted_for() -> None:
    model, feeds = stack(4), data()
    pass_ = TieBlocks(kind="ffn", score="mse")
    entries = pass_.choose(model, Context(calibration=feeds))
    lost = {}
    for one, other in [(a, b) for a in range(4) for b in range(4) if abs(a - b) == 1]:
        changed = model.clone()
        held = changed.graph.initializers
        for part in ("up", "down"):
            held[f"{part}{one}"].const_value = held[f"{part}{other}"].const_value
        runs = [(ort.run(model, f)["y"], ort.run(changed, f)["y"]) for f in feeds]
        error = sum(float(((a - b).astype(np.float64) ** 2).sum()) for a, b in runs)
        lost[one, other] = error / sum(float((a.astype(np.float64) ** 2).sum()) for a, _ in runs)
    one, other = min(lost, key=lost.__getitem__)
    assert partners(entries) == {f"f{one}3": f"f{other}3"}
    for at, entry in enumerate(entries):
        best = min(value for (block, _), value in lost.items() if block == at)
        # float32 models whose outputs move by some 1e-6
        assert entry.detail["score"] == pytest.approx(best, rel=1e-3)
    assert [e.status for e in entries].count("skipped") == 3
    assert entries[other].reason == f"f{one}3 uses its weights"
    assert json.loads(json.dumps([e.to_json() for e in entries]))


def test_greedy_looks_again_after_each() -> None:
    model, feeds = stack(5), data()
    options: dict[str, Any] = {"kind": "ffn", "search": "greedy", "count": 2, "distance": 2}
    entries = TieBlocks(**options).choose(model, Context(calibration=feeds))
    made = {int(k[1]): int(v[1]) for k, v in partners(entries).items()}

    def lost(ties: dict[int, int]) -> float:
        changed = model.clone()
        held = changed.graph.initializers
        for one, other in ties.items():
            for part in ("up", "down"):
                held[f"{part}{one}"].const_value = model.graph.initializers[
                    f"{part}{other}"
                ].const_value
        runs = [(ort.run(model, f)["y"], ort.run(changed, f)["y"]) for f in feeds]
        return sum(float(((a - b).astype(np.float64) ** 2).sum()) for a, b in runs)

    near = [(a, b) for a in range(5) for b in range(5) if 0 < abs(a - b) <= 2]
    first = min(near, key=lambda pair: lost(dict([pair])))
    free = [(a, b) for a, b in near if a not in first and b != first[0]]
    second = min(free, key=lambda pair: lost(dict([first, pair])))
    assert made == dict([first, second])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_as_many_as_asked_for_can_be_tied(count: int) -> None:
    """Two of three in a row can give theirs up: the choice of the best never runs into a dead end."""
    for seed in range(6):
        scale = list(np.random.default_rng(seed).uniform(0.5, 2.0, 6))
        pass_, ctx = TieBlocks(kind="ffn", count=count), Context(calibration=data(1))
        entries = pass_.choose(stack(6, scale), ctx)
        made = partners(entries)
        assert len(made) == count and not set(made) & set(made.values())
        assert all(abs(int(a[1]) - int(b[1])) == 1 for a, b in made.items())


def test_a_number_of_parameters() -> None:
    model = stack(4)
    total = cost(model).params
    after, result = tied(model, TieBlocks(kind="ffn", params=0.6), data())
    assert len(partners(result.entries)) == 2
    assert cost(after).params <= 0.6 * total
    with pytest.raises(PassError, match=r"cannot remove \d+ parameters: the 2 ffn") as caught:
        TieBlocks(kind="ffn", params=0.2).choose(model, Context())
    assert caught.value.diagnostics[0].code == "tie_blocks.goal"


def test_ignored_ones_keep_their_weights_and_lend_them() -> None:
    model = zoo_ir.captured("llama")
    pass_ = TieBlocks(ignore=("layers.0",))
    entries = pass_.choose(model, Context(calibration=zoo_ir.feeds("llama")[:1]))
    assert [e.status for e in entries] == ["skipped", "applied"]
    assert entries[0].reason == "ignored: it matches 'layers.0'"
    with pytest.raises(PassError, match=r"ignore='layers\.7' matches no block"):
        TieBlocks(ignore=("layers.7",)).choose(model, Context())


def test_nothing_to_do_and_no_candidates() -> None:
    model = stack(3)
    entries = TieBlocks(kind="ffn", count=0).choose(model, Context())
    assert {e.reason for e in entries} == {"nothing has to go"}
    assert not TieBlocks().edit(model, entries, Context()).changed
    entries = TieBlocks(kind="attention").choose(model, Context())
    assert entries == [Entry("attention", "skipped", "the model has no residual attention")]


# -- what cannot be tied ----------------------------------------------------------------------------


def why(model: ir.Model, **options: Any) -> str:
    """The reasons for which nothing can be tied."""
    given: dict[str, Any] = {"kind": "ffn"} | options
    with pytest.raises(PassError) as caught:
        TieBlocks(**given).choose(model, Context())
    return str(caught.value)


def pair(first: str, second: str, **own: Any) -> ir.Model:
    """Two branches f03 and f13."""
    body = f"h0 = Relu(x) {first} h1 = Add(h0, f03) {second} h2 = Add(h1, f13) y = Tanh(h2)"
    return typed(body, **own)


def test_blocks_that_are_not_alike_are_told_apart() -> None:
    one = ffn("f0", "h0")
    wide: dict[str, Any] = {"up1": matrix(8, 24), "down1": matrix(24, 8)}
    other = ffn("f1", "h1").replace(" up)", " up1)").replace(" down)", " down1)")
    assert "down has the shape [16,8], and down1 [24,8]" in why(pair(one, other, **wide))
    same = {"up1": matrix(8, 16, seed=5), "down1": matrix(16, 8, seed=6)}
    assert "has another Tanh where this has Relu" in why(
        pair(one, other.replace("Relu", "Tanh"), **same)
    )
    own = "f1q = MatMul(h1, up1) f12 = Relu(f1q) f13 = MatMul(f12, down1)"  # no norm before it
    assert "reads h1 where this reads" in why(pair(one, own, **same)) or "another" in why(
        pair(one, own, **same)
    )
    assert "the model has no other" in why(typed(f"h0 = Relu(x) {one} y = Add(h0, f03)"))


def test_weights_that_others_read_stay() -> None:
    """A layer that shares with an earlier one has nothing to give; one that lent cannot give later."""
    model = stack(3)
    after, result = tied(model, TieBlocks(kind="ffn"), data())
    ((gone, kept),) = partners(result.entries).items()
    again = TieBlocks(kind="ffn", count=0).choose(after, Context())
    reasons = {e.candidate: e.reason for e in again if e.status == "refused"}
    assert set(reasons) <= {gone, kept}
    assert all(
        "read outside of it" in reason or "no weights" in reason for reason in reasons.values()
    )
    third, _ = tied(after, TieBlocks(kind="ffn"), data())  # the one that is left
    assert cost(third).params == cost(model).params - 2 * 2 * 8 * 16


def test_quantized_weights_are_tied_before() -> None:
    model = stack(2)
    Quantize(min_size=0).run(model, Context())
    normal.normalize(model)
    assert "is quantized: tie before" in why(model)


def test_attention_and_ffn_are_no_pair() -> None:
    body = (
        f"h0 = Relu(x) {attention('f0', 'h0')} h1 = Add(h0, f03) {ffn('f1', 'h1')} y = Add(h1, f13)"
    )
    assert "has other branches" in why(typed(body), kind="block") or "no other" in why(
        typed(body), kind="block"
    )


def test_options() -> None:
    wrong: Any
    for wrong in ({"kind": "joint"}, {"count": -1}, {"distance": 0}, {"score": "cosine"}):
        with pytest.raises(OptionError):
            TieBlocks(**wrong)
    with pytest.raises(OptionError, match="one of count and params"):
        TieBlocks(count=1, params=0.5)
    with pytest.raises(PassError, match=r"tie_blocks.* needs calibration data"):
        TieBlocks(kind="ffn").choose(stack(2), Context())
    with pytest.raises(PassError, match="which score='kl' compares") as caught:
        TieBlocks(kind="ffn", score="kl").choose(stack(2), Context(calibration=data()))
    assert caught.value.diagnostics[0].code == "tie_blocks.outputs"


def test_the_manager_checks_it_and_passes_go_on_behind_it() -> None:
    captured = captured_of(stack(4))
    passes = [TieBlocks(kind="ffn", count=2), Quantize(min_size=0)]
    ctx = Context(calibration=[captured.sample({"b": 2, "s": 6}, seed) for seed in range(2)])
    compiled = run.run(captured, passes, ctx)
    assert compiled.steps[0].check.against == "simulated reference"
    assert [step.check.error for step in compiled.steps] == [0.0, 0.0]
    held = compiled.model.graph.initializers
    codes = [v for v in held.values() if v.dtype == ir.DataType.INT8 and len(v.shape or ()) == 2]
    assert len(codes) == 4  # of two FFNs: a shared weight is quantized once
    assert len(list(itertools.chain(*(v.uses() for v in codes)))) >= 4
