"""A pruned model is tuned as a plain PyTorch module, and its weights come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import netlathe
from netlathe.diagnostics import InputError
from netlathe.execute import ort
from netlathe.execute.fx import to_fx, weights_of
from netlathe.ir import interface
from netlathe.pipeline.fingerprint import graph_digest, weights_digest
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.run import Compiled
from tests.execute import text


class Net(nn.Module):
    """A tied vocabulary around a gated FFN, with a batch norm and a table that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.gate = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("order", torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[b, s] -> [b, s, 11]"""
        x = self.embed(ids)
        x = x + self.down(self.up(x) * torch.sigmoid(self.gate(x)))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)[..., self.order]
        return torch.matmul(x, self.embed.weight.T)


IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def pruned() -> Compiled:
    torch.manual_seed(0)
    net = Net().eval()
    captured = netlathe.capture(net, args=(IDS,), dynamic={"ids": {0: "batch", 1: "sequence"}})
    return netlathe.compile(captured, 'prune(ratio=0.5, scope=["ffn"])')


def tune(module: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(steps):
        (logits,) = module(ids=IDS).values()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), (IDS.flatten() + 1) % 11)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def output(module: nn.Module) -> npt.NDArray[np.float32]:
    (logits,) = module(ids=IDS).values()
    return np.asarray(logits.detach())


def from_runtime(compiled: Compiled) -> npt.NDArray[np.float32]:
    (logits,) = ort.run(compiled.model, {"ids": IDS.numpy()}).values()
    return np.asarray(logits)


def test_what_is_a_parameter(pruned: Compiled) -> None:
    module = pruned.module()
    parameters = dict(module.named_parameters())
    assert {"embed.weight", "up.bias", "norm.weight"} <= set(parameters)
    assert all(p.requires_grad and p.is_leaf for p in parameters.values())
    assert parameters["up.bias"].shape == (8,)
    buffers = dict(module.named_buffers())
    assert {"norm.running_mean", "norm.running_var"} <= set(buffers)
    assert set(module.state_dict()) == set(parameters) | set(buffers)


def test_the_round_trip_is_bit_equal(pruned: Compiled) -> None:
    again = pruned.with_weights(pruned.module())
    assert weights_digest(again.model) == weights_digest(pruned.model)
    assert graph_digest(again.model) == graph_digest(pruned.model)
    assert not [e for e in again.captured.entries if e.reason == "tuned outside"]


def test_tuned_weights_come_back(pruned: Compiled, tmp_path: Path) -> None:
    before = weights_digest(pruned.model)
    module = pruned.module()
    tune(module)
    back = pruned.with_weights(module.state_dict())
    assert weights_digest(pruned.model) == before
    for name, tensor in back.module().state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name

    back.save(tmp_path / "out")
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (actual,) = session.run(None, {"ids": IDS.numpy()})
    expected = output(module)
    # One forward of a few dozen float32 operations on each side: 84 ulp are 1e-5.
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-5, atol=1e-5)
    old = from_runtime(pruned)
    assert np.abs(old - expected).max() > 1e-2


def test_a_tuned_module_may_be_trained_on(pruned: Compiled) -> None:
    module = pruned.module()
    tune(module)
    back = pruned.with_weights(module)
    taken = weights_digest(back.model)
    tune(module)
    assert weights_digest(back.model) == taken


def test_the_tie_stays(pruned: Compiled) -> None:
    module = pruned.module()
    tune(module)
    back = pruned.with_weights(module)
    shapes = [list(v.shape or ()) for v in back.model.graph.initializers.values()]
    assert shapes.count([11, 8]) + shapes.count([8, 11]) == 1
    assert len(list(back.module().parameters())) == len(list(module.parameters()))


def test_passes_go_on_from_the_tuned_model(pruned: Compiled) -> None:
    module = pruned.module()
    tune(module)
    back = pruned.with_weights(module)
    folded = netlathe.compile(back.captured, "fold_batch_norm, cleanup")
    actual = from_runtime(folded)
    expected = output(module)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)  # as above
    again = netlathe.compile(back.captured, 'prune(ratio=0.5, scope=["ffn"])')
    assert again.module().get_parameter("up.bias").shape == (4,)


def test_the_manifest_tells(pruned: Compiled, tmp_path: Path) -> None:
    module = pruned.module()
    tune(module)
    back = pruned.with_weights(module)
    back.save(tmp_path / "out")
    made = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))["compilation"]
    ledger = {entry["candidate"]: entry for entry in made["capture"]}
    assert made["source"]["frontend"] == "tuned"
    assert made["source"]["weights"] == weights_digest(back.model)
    assert ledger["up.bias"]["reason"] == "tuned outside"
    assert ledger["norm.running_mean"]["status"] == "skipped"
    origin = ledger["weights"]["detail"]
    assert origin["weights"] == weights_digest(back.model) != weights_digest(pruned.model)
    assert "prune" in origin["compilation"]["pipeline"]
    assert "equal to the original at 2 sizes" in ledger["capture"]["reason"]


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("up.bias", lambda t: t.new_zeros(16), "tuned.shape"),
        ("up.bias", lambda t: t.double(), "tuned.dtype"),
        ("up.bias", lambda t: t * float("nan"), "weights.not_finite"),
        ("up.bias", None, "tuned.missing"),
        ("up.bais", lambda t: t, "tuned.unknown"),
    ],
)
def test_wrong_weights_are_refused(
    pruned: Compiled, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None, code: str
) -> None:
    state = pruned.module().state_dict()
    if change is None:
        del state[name]
    else:
        state[name] = change(state["up.bias"])
    with pytest.raises(InputError) as caught:
        pruned.with_weights(state)
    (problem,) = caught.value.diagnostics
    assert problem.code == code
    assert name in problem.message
    assert problem.help


def test_all_that_is_wrong_is_listed(pruned: Compiled) -> None:
    state = {"_orig_mod." + n: t for n, t in pruned.module().state_dict().items()}
    with pytest.raises(InputError) as caught:
        pruned.with_weights(state)
    codes = [d.code for d in caught.value.diagnostics]
    assert codes == ["tuned.unknown"] * len(state) + ["tuned.missing"] * len(state)


def test_integers_are_no_weights(pruned: Compiled) -> None:
    state = pruned.module().state_dict()
    (name,) = [n for n, t in state.items() if t.dtype == torch.int64 and t.numel() == 8]
    state[name] = state[name].flip(0)
    with pytest.raises(InputError) as caught:
        pruned.with_weights(state)
    assert [d.code for d in caught.value.diagnostics] == ["tuned.constant"]


def test_the_dtype_is_kept(pruned: Compiled) -> None:
    half = netlathe.compile(pruned.captured, 'convert(dtype="float16")')
    state = {
        n: t * 1.5 if t.dtype == torch.float16 else t for n, t in half.module().state_dict().items()
    }
    back = half.with_weights(state)
    kinds = {n: v.dtype for n, v in half.model.graph.initializers.items()}
    assert {n: v.dtype for n, v in back.model.graph.initializers.items()} == kinds
    assert ir.DataType.FLOAT16 in kinds.values()


def test_the_names_of_a_tied_weight_must_agree() -> None:
    model = text.model(
        """
        g (bool flag, float[2] x) => (float[2] z)
        {
            y = Add(x, w)
            z = If(flag) <
                then_branch = yes () => (float[2] a) { a = Mul(y, w) },
                else_branch = no () => (float[2] b) { b = Sub(y, w) }>
        }
        """,
        {"w": text.normal(2)},
    )
    model.graph.opset_imports[""] = 25
    names = weights_of(model)
    assert sorted(names) == ["body_0.w", "body_1.w", "w"]
    assert len({id(tensor) for tensor in names.values()}) == 1
    feeds = {"flag": np.asarray(True), "x": np.ones(2, np.float32)}
    captured = Captured(model, "made here", "text", {}, lambda sizes, seed: feeds)
    state = to_fx(model).state_dict()
    tuned = {name: tensor + 1 for name, tensor in state.items()}
    back = Compiled(captured, model, []).with_weights(tuned)
    expected = (1 + tuned["w"]) * tuned["w"]
    np.testing.assert_array_equal(ort.run(back.model, feeds)["z"], expected.numpy())
    with pytest.raises(InputError) as caught:
        Compiled(captured, model, []).with_weights({**tuned, "body_1.w": state["w"]})
    assert [d.code for d in caught.value.diagnostics] == ["tuned.tie"]


def test_a_narrowed_input_is_the_first_of_its_capture() -> None:
    source = "g (float[2, {}] past) => (float[2, 3] z) {{ z = MatMul(past, w) }}"
    dense = text.model(source.format(4), {"w": text.normal(4, 3)})
    model = text.model(source.format(2), {"w": text.normal(4, 3)[[0, 2]]})
    for made in (dense, model):
        made.graph.opset_imports[""] = 25
    interface.narrow(model, "past", 1, np.asarray([0, 2]))
    past = text.normal(2, 4, seed=1)
    captured = Captured(dense, "made here", "text", {}, lambda sizes, seed: {"past": past})
    back = Compiled(captured, model, []).with_weights({"w": torch.ones(2, 3)})
    np.testing.assert_array_equal(back.captured.sample({}, 0)["past"], past[:, [0, 2]])
    # Positions are numbered anew: a later pass that narrows it speaks of two, not of four.
    assert interface.kept(model) == {"past": {1: [0, 2]}}
    assert interface.kept(back.model) == {}
