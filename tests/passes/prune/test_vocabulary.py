"""Tokens of a vocabulary go: from the table and the logits, while the ids that the model takes stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from netlathe.analysis import axes as axis_analysis
from netlathe.analysis.cost import Meter, cost
from netlathe.diagnostics import OptionError, PassError
from netlathe.execute import ort
from netlathe.execute.compare import relative_error
from netlathe.frontends.huggingface import HuggingFaceDirectory
from netlathe.frontends.onnx_file import OnnxFile
from netlathe.ir import interface, weights
from netlathe.passes.prune import Prune
from netlathe.passes.prune.candidates import Widths
from netlathe.passes.prune.vocabulary import stand_ins
from netlathe.passes.quantize import Quantize
from netlathe.pipeline import run as manager
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from tests import zoo, zoo_ir
from tests.analysis.residual import typed
from tests.passes.prune.helpers import check, error_to_reference, pruned

V, D = 10, 4
IDS, LOGITS = "int64[b,t] ids", "float logits"
HEAD = "e = Gather(table, ids) h = Relu(e) logits = MatMul(h, head)"


def tables(size: int = V) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    shapes = {"table": (size, D), "head": (D, size)}
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def small(body: str = HEAD, inputs: str = IDS, outputs: str = LOGITS, **more: Any) -> ir.Model:
    return typed(body, inputs, outputs, **tables(), **more)


def vocab(**options: Any) -> Prune:
    return Prune(scope=("vocab",), **{"ratio": 0.4, **options})


def reasons(model: ir.Model, **options: Any) -> str:
    chosen = vocab(**options).choose(model, Context())
    assert {entry.status for entry in chosen} == {"refused"}
    return "; ".join(entry.reason for entry in chosen)


# -- what is left -----------------------------------------------------------------------------------


def test_it_is_the_formula() -> None:
    """logits = relu(table[stand-in of the id]) @ head, at the tokens that stay; -1 is the last id."""
    model = small()
    after, chosen = pruned(model, vocab())
    held, entry = tables(), chosen[0]
    kept, read = entry.arrays["kept"], entry.arrays["stand_ins"]
    assert len(kept) == 6 and read[kept].tolist() == kept.tolist()
    assert all(np.array_equal(e.arrays["kept"], kept) for e in chosen) and len(chosen) == 2
    ids = np.array([[*range(V), -1, -V]])
    expected = np.maximum(held["table"][read[ids]], 0) @ held["head"][:, kept]
    # A sum of 4 products: 4 ulp of float32.
    assert relative_error(ort.run(after, {"ids": ids})["logits"], expected) <= 4 * 2**-23
    assert interface.kept(after) == {"logits": {2: kept.tolist()}}
    assert chosen[1].detail["interface"] == ["logits"]
    assert [str(v.shape) for v in after.graph.outputs] == ["[b,t,6]"]


def test_a_removed_token_is_read_as_the_nearest_that_stays() -> None:
    rows = np.random.default_rng(1).standard_normal((4100, 3))  # more than are compared at a time
    rows[7] = 0
    kept = np.arange(0, 4100, 2)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    nearest = kept[(unit @ unit[kept].T).argmax(1)]
    wanted = np.where(np.arange(4100) % 2 == 0, np.arange(4100), nearest)
    halves = [rows[:, :1], rows[:, 1:]]  # of several tables the rows stand side by side
    np.testing.assert_array_equal(stand_ins(halves, kept), wanted)


@pytest.mark.parametrize("name", zoo_ir.some("llama", "gpt2"))
def test_models_equal_their_reference(name: str) -> None:
    """Of models that give no ids, and classify, all is refused."""
    model = zoo_ir.captured(name)
    chosen = vocab(ratio=0.3).choose(model, Context())
    if not any(entry.status == "applied" for entry in chosen):
        assert name in (
            "convnext",
            "efficientnet",
            "mobilenet_v2",
            "resnet",
            "segformer",
            "swin",
            "vit",
        )
        assert all("looked up in no table" in entry.reason for entry in chosen)
        return
    check(model, vocab(ratio=0.3), zoo_ir.feeds(name))


def test_with_all_other_scopes() -> None:
    every: Any = ("ffn", "kv_groups", "hidden", "vocab")
    chosen = check(zoo_ir.captured("llama"), Prune(ratio=0.5, scope=every), zoo_ir.feeds("llama"))
    assert {e.detail["scope"] for e in chosen if e.status == "applied"} == set(every)


def test_a_wrong_map_differs_from_the_reference() -> None:
    model, pass_ = zoo_ir.captured("gpt2"), vocab()
    after, chosen = pruned(model, pass_)
    feeds = zoo_ir.feeds("gpt2")[:1]
    right = error_to_reference(model, after, pass_, chosen, feeds)
    value = after.graph.initializers["input_ids/map"]
    value.const_value = ir.tensor(np.roll(weights.array(value), 1), name=value.name)
    assert right <= 1e-4 < 1e-2 < error_to_reference(model, after, pass_, chosen, feeds)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_texts_are_those_of_the_reference(name: str) -> None:
    """Greedy decoding: what is picked among the logits is mapped back, and given as the next id."""
    model, pass_ = zoo_ir.captured(name), vocab()
    after, chosen = pruned(model, pass_)
    kept = chosen[0].arrays["kept"]
    positions = np.array(interface.kept(after)["logits"][2])
    prompts = np.arange(zoo.VOCAB).reshape(8, -1)[:, :6]
    assert not np.isin(prompts, kept).all()

    def decode(session: ort.Session, narrow: bool) -> list[list[int]]:
        ids = prompts
        for _ in range(8):
            logits = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
            last = logits[:, -1] if narrow else logits[:, -1, kept]
            ids = np.concatenate([ids, positions[last.argmax(-1)][:, None]], axis=1)
        return ids[:, prompts.shape[1] :].tolist()

    reference = pass_.simulate(model.clone(), chosen).model
    texts = decode(ort.Session(after), True)
    assert texts == decode(ort.Session(reference), False)
    assert len({token for text in texts for token in text}) > 1


# -- which, and how many ----------------------------------------------------------------------------


def test_tokens_that_occur_stay() -> None:
    """Of those that do not, the ones of the larger rows and columns; special ones stay anyway."""
    seen = np.array([[3, 3, 5]])
    ctx = Context(calibration=[{"ids": seen}])
    held = tables()
    rows, columns = np.linalg.norm(held["table"], axis=1), np.linalg.norm(held["head"], axis=0)
    norms = rows / rows.max() + columns / columns.max()
    norms[seen] = np.inf
    for entry in Prune(scope=("vocab",), keep=4).choose(small(), ctx):
        assert entry.arrays["kept"].tolist() == sorted(np.argsort(-norms)[:4].tolist())
        assert "by frequency" in entry.reason
    least = int(norms.argmin())
    (entry, _) = Prune(scope=("vocab",), keep=3, keep_ids=(least,)).choose(small(), ctx)
    assert entry.arrays["kept"].tolist() == sorted([3, 5, least])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["params", "bytes", "macs"])
def test_a_budget_is_kept_with_the_costs_as_they_are(kind: str, tied: bool) -> None:
    model = zoo_ir.captured("gpt2" if tied else "llama")
    options: Any = {kind: 0.8}
    after, chosen = pruned(model, Prune(scope=("vocab", "ffn"), **options))
    assert getattr(cost(after), kind) <= 0.8 * getattr(cost(model), kind)
    axes = axis_analysis.analyse(model)
    kept = {e.detail["group"]: len(e.arrays["kept"]) for e in chosen if e.status == "applied"}
    widths = Widths(axes, {g.atom: kept[g.name] for g in axes.groups if g.name in kept})
    read, (parameters, size) = Meter(model).read(widths.shape), widths.extra()
    found = (read.params + parameters, read.bytes + size, read.macs)
    assert found == (cost(after).params, cost(after).bytes, cost(after).macs)


# -- when it says no --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "why"),
    [
        (
            HEAD.replace("logits", "z") + " logits = Softmax<axis=-1>(z)",
            IDS,
            LOGITS,
            "Softmax looks at several",
        ),
        (HEAD + " best = ArgMax<axis=-1>(logits)", IDS, f"{LOGITS}, int64[b,t,1] best", "ArgMax"),
        (
            HEAD.replace("ids)", "all)") + " ",
            "int64[b,t] ids",
            LOGITS,
            "looks up positions that Abs computes",
        ),
        (
            HEAD + " again = Gather<axis=-1>(logits, two)",
            IDS,
            f"{LOGITS}, float again",
            "logits has 10 positions that are no one axis",
        ),
        (
            HEAD + " x = GatherElements<axis=-1>(logits, ids2)",
            f"{IDS}, int64[b,t,1] ids2",
            f"{LOGITS}, float x",
            "GatherElements looks up positions that graph input ids2 holds",
        ),
        (
            HEAD + " y = Add(logits, bias)",
            f"{IDS}, float[10] bias",
            f"{LOGITS}, float y",
            "graph input bias has it",
        ),
    ],
    ids=["softmax", "argmax", "computed", "constant", "labels", "input"],
)
def test_what_pins_a_vocabulary(body: str, inputs: str, outputs: str, why: str) -> None:
    if "all)" in body:
        body = f"all = Abs(ids) {body}"
    model = small(body, inputs, outputs, two=np.array([1, 2]))
    assert why in reasons(model)


def test_a_table_of_positions_is_no_vocabulary() -> None:
    body = HEAD.replace("h = Relu(e)", "p = Gather(places, at) s = Add(e, p) h = Relu(s)")
    places = np.ones((7, D), np.float32)
    model = small(body, f"{IDS}, int64[b,t] at", places=places + tables()["table"][:7])
    chosen = vocab().choose(model, Context())
    status = {entry.detail["size"]: (entry.status, entry.reason) for entry in chosen}
    assert status[V][0] == "applied"
    assert status[7][0] == "refused" and "no logits of its size come out" in status[7][1]


def test_a_vocabulary_is_pruned_once() -> None:
    after, _ = pruned(small(), vocab())
    assert "its ids are mapped to other ones: it was pruned" in reasons(after)


def test_classes_are_no_vocabulary() -> None:
    assert "graph output logits has it" in reasons(zoo_ir.captured("resnet"))


def test_half_of_a_vocabulary_is_ignored() -> None:
    chosen = vocab(ignore=("lm_head",)).choose(zoo_ir.captured("llama"), Context())
    found = {entry.candidate: (entry.status, entry.reason) for entry in chosen}
    assert found["lm_head:vocab"][0] == "skipped"
    assert found["model.embed_tokens:vocab"][0] == "skipped"
    assert "one vocabulary with lm_head:vocab" in found["model.embed_tokens:vocab"][1]


def test_bad_options() -> None:
    with pytest.raises(PassError, match="keep_ids has 3 to 10, and vocab the tokens 0 to 9"):
        vocab(keep_ids=(3, 10)).choose(small(), Context())
    with pytest.raises(OptionError, match="name vocab in the scope"):
        Prune(ratio=0.3, keep_ids=(1,))
    with pytest.raises(PassError, match="2 must stay"):
        vocab(ratio=0.9, keep_ids=(0, 1)).choose(small(), Context())
    with pytest.raises(
        PassError, match=r"frequency' says nothing about .*: its positions are no tokens"
    ):
        ctx = Context(calibration=zoo_ir.feeds("llama"))
        Prune(ratio=0.3, scope=("ffn",), score="frequency").choose(zoo_ir.captured("llama"), ctx)


# -- in a pipeline ----------------------------------------------------------------------------------


def test_in_a_pipeline(tmp_path: Path) -> None:
    """Verified, its loss measured on what is left, quantized behind it, saved and read again."""
    module: Any = zoo.build("llama").module
    module.save_pretrained(tmp_path / "model")
    captured = HuggingFaceDirectory().capture(tmp_path / "model")
    data = [dict(captured.sample({"batch": 2, "sequence": 6}, seed)) for seed in range(2)]
    compiled = manager.run(captured, [vocab(), Quantize()], Context(calibration=data))
    step = compiled.steps[0]
    assert step.check.against == "simulated reference" and step.loss is not None
    assert step.loss.output == "logits" and step.loss.kl is not None
    assert step.cost_after.params < step.cost_before.params
    entry: Entry = step.entries[-1]
    assert entry.detail["positions"] == interface.kept(compiled.model)["logits"][2]
    compiled.save(tmp_path / "out", "onnx")
    again = OnnxFile().capture(tmp_path / "out" / "model.onnx").model
    assert interface.kept(again) == interface.kept(compiled.model)
