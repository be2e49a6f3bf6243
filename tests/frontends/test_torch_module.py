"""Modules become graphs with the user's names, checked against the module, which stays as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from netlathe.diagnostics import CaptureError, InputError
from netlathe.execute import ort
from netlathe.frontends.torch_fx import TorchFx
from netlathe.frontends.torch_module import TorchModule
from netlathe.frontends.torch_signature import named_leaves
from tests import zoo


def relative_difference(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.sqrt(np.mean(expected**2)))


class Branches(nn.Module):
    """Two linear layers with one weight, a dropout, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        y = self.drop(self.first(x)) + extra["shift"]
        return {"wide": self.second(torch.relu(y)), "inner": y}


def branches_inputs() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(3, 8, generator=rng),
        "extra": {"shift": torch.randn(3, 8, generator=rng)},
    }


BRANCHES_DYNAMIC = {"x": {0: "batch"}, "extra.shift": {0: "batch"}}


def test_names_modes_and_ties_are_kept() -> None:
    module = Branches().train()
    module.first.eval()
    weight = module.first.weight
    captured = TorchModule(kwargs=branches_inputs(), dynamic=BRANCHES_DYNAMIC).capture(module)
    graph = captured.model.graph
    assert [v.name for v in graph.inputs] == ["x", "extra.shift"]
    assert [v.name for v in graph.outputs] == ["wide", "inner"]
    assert captured.dynamic == {"batch": 3}
    matrices = [
        v for v in graph.initializers.values() if v.const_value and v.const_value.size == 64
    ]
    assert [v.name for v in matrices] == ["first.weight"], "the tied weight is one value"
    assert not any(node.op_type == "Dropout" for node in graph)
    paths = {node.metadata_props.get("netlathe.module") for node in graph}
    assert {"first", "second"} <= paths
    # the module is as it was
    assert module.training and module.drop.training and not module.first.training
    assert module.second.weight is weight and weight.requires_grad
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_weights_are_bound_and_not_copied() -> None:
    conv = nn.Conv2d(3, 4, 3)
    module = nn.Sequential(conv, nn.ReLU())
    captured = TorchModule(args=(torch.zeros(2, 3, 8, 8),), dynamic={}).capture(module)
    bound = captured.model.graph.initializers["0.weight"].const_value
    assert bound is not None
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = 42.0
    assert bound.numpy()[0, 0, 0, 0] == 42.0


def test_dims_are_inferred_and_stated() -> None:
    captured = TorchModule(args=(torch.zeros(4, 8),)).capture(nn.Linear(8, 2))
    graph = captured.model.graph
    assert graph.inputs[0].shape == ir.Shape(["batch", 8])
    stated = [e for e in captured.entries if e.candidate == "batch"]
    assert "inferred" in stated[0].reason


def test_dims_may_be_given_as_a_list_per_input() -> None:
    named = TorchModule(args=(torch.zeros(4, 8),), dynamic={"input": ["rows", None]})
    captured = named.capture(nn.Linear(8, 2))
    assert captured.model.graph.inputs[0].shape == ir.Shape(["rows", 8])
    assert captured.model.graph.outputs[0].shape == ir.Shape(["rows", 2])
    assert captured.dynamic == {"rows": 4}


def test_no_dynamic_dims_fix_every_shape() -> None:
    captured = TorchModule(args=(torch.zeros(1, 8),), dynamic={}).capture(nn.Linear(8, 2))
    assert captured.model.graph.inputs[0].shape == ir.Shape([1, 8])
    assert captured.dynamic == {}


@dataclasses.dataclass
class Pair:
    left: int
    right: tuple[int, int]


def test_leaves_have_stable_names() -> None:
    assert dict(named_leaves(1, "output")) == {"output": 1}
    assert dict(named_leaves((1, 2), "output")) == {"output_0": 1, "output_1": 2}
    assert dict(named_leaves({"a": 1, "b": [2, 3]}, "output")) == {"a": 1, "b.0": 2, "b.1": 3}
    assert dict(named_leaves(Pair(1, (2, 3)), "o")) == {"left": 1, "right.0": 2, "right.1": 3}


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = x + 1
        return y, y, x


def test_one_value_may_be_several_outputs() -> None:
    captured = TorchModule(args=(torch.zeros(3, 2),), dynamic={"x": {0: "n"}}).capture(Same())
    assert [v.name for v in captured.model.graph.outputs] == ["output_0", "output_1", "output_2"]
    got = ort.run(captured.model, {"x": np.full((4, 2), 5, np.float32)})
    assert got["output_0"][0, 0] == got["output_1"][0, 0] == 6
    assert got["output_2"][0, 0] == 5


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), DataDependent()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_exporter_failure_names_the_module() -> None:
    with pytest.raises(CaptureError) as caught:
        TorchModule(args=(torch.ones(3, 4),), dynamic={"x": {0: "batch"}}).capture(Outer())
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "torch.export"
    assert diagnostic.where == "layers.1"
    assert "data-dependent" in diagnostic.message
    assert diagnostic.help


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_experts_that_cannot_be_exported_say_which_can(experts: str) -> None:
    built = zoo.build("mixtral")
    config: Any = built.module.config
    config._experts_implementation = experts
    with pytest.raises(CaptureError) as refused:
        TorchModule(kwargs=built.kwargs, dynamic=built.dynamic).capture(built.module)
    (diagnostic,) = refused.value.diagnostics
    assert "experts_implementation='batched_mm'" in (diagnostic.help or "")
    assert diagnostic.where == "model.layers.0.mlp.experts"


class FixedLength(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(6, -1) * torch.ones(6, 4)


def test_a_dim_that_the_module_fixes_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        TorchModule(args=(torch.ones(6, 4),), dynamic={"x": {0: "rows"}}).capture(FixedLength())
    assert "leave that dim out" in caught.value.diagnostics[0].help
    assert any("rows = 6" in note for note in caught.value.diagnostics[0].notes)


class CutTable(nn.Module):
    """As GPT-Neo's mask: cut to the length of the input, which may be the table's, at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 4))
        self.mask = nn.Buffer(torch.ones(64, 64).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        scores = x @ x.mT * self.mask[64 - length : 64, :64][:, :length]
        return scores @ (x + self.table[:length])


def test_a_dim_that_the_module_bounds_has_that_bound() -> None:
    captured = TorchModule(
        args=(torch.randn(2, 7, 4),), dynamic={"x": {0: "batch", 1: "length"}}
    ).capture(CutTable())
    reasons = {entry.candidate: entry.reason for entry in captured.entries}
    assert "to 64" in reasons["length"]
    assert "could not prove" in reasons["dims"]


class Attend(nn.Module):
    """Attention over leading dims of any number, its keys and values broadcast over the heads."""

    def __init__(self, leading: tuple[int, ...], shared: bool) -> None:
        super().__init__()
        self.leading, self.shared = leading, shared
        self.linear = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length = x.shape[0], x.shape[1]
        q, k, v = (
            t.reshape(batch, length, *self.leading, -1).movedim(1, -2)
            for t in self.linear(x).chunk(3, dim=-1)
        )
        if self.shared:
            k, v = k[:, :1], v[:, :1]
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("leading", "shared"),
    [((4,), True), ((), False), ((2, 2), False), ((2, 2), True), ((2, 1, 2), False)],
)
def test_attention_over_any_leading_dims_is_captured(
    leading: tuple[int, ...], shared: bool
) -> None:
    """MobileNetV4 shares keys among heads; Twins and Hiera have windows beside the heads."""
    x = torch.randn(2, 5, 8)
    captured = TorchModule(args=(x,), dynamic={"x": {0: "batch", 1: "length"}}).capture(
        Attend(leading, shared)
    )
    assert "Attention" in {node.op_type for node in captured.model.graph}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"args": (torch.ones(3, 4), 1, 2)}, "do not fit"),
        ({"args": (torch.ones(3, 5),)}, "fails on the example inputs"),
        ({"args": (torch.ones(3, 4),), "dynamic": {"y": {0: "b"}}}, "not a tensor input"),
        ({"args": (torch.ones(3, 4),), "dynamic": {"input": {2: "b"}}}, "axis 2"),
        ({"args": (torch.ones(1, 4),), "dynamic": {"input": {0: "b"}}}, "below 2"),
    ],
)
def test_wrong_inputs_are_explained(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TorchModule(**settings).capture(nn.Linear(4, 4))


def test_a_weight_that_is_not_finite_is_named() -> None:
    module = nn.Linear(4, 4)
    module.weight.data[2, 1] = float("nan")
    with pytest.raises(InputError, match=r"'weight' of Linear holds nan at \[2, 1\]"):
        TorchModule(args=(torch.ones(3, 4),)).capture(module)


def test_a_traced_graph_is_captured() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x) * 2

    net, x = Net(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    traced = torch.fx.symbolic_trace(net)
    exported = torch.export.export(
        net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    for graph_module in (traced, exported):
        assert TorchFx.accepts(graph_module) and not TorchModule.accepts(graph_module)
        captured = TorchFx(args=(x,), dynamic={"x": {0: "batch"}}).capture(graph_module)
        feeds = {"x": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)}
        expected = net(torch.from_numpy(feeds["x"])).detach().numpy()
        (actual,) = ort.run(captured.model, feeds).values()
        assert relative_difference(actual, expected) <= 1e-5
        assert "block.0.weight" in captured.model.graph.initializers
