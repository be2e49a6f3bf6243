"""The emitted fx module: equal to the executor, and as trainable as the module it came from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from netlathe.execute.executor import Executor
from netlathe.execute.fx import to_fx
from tests.execute import text


class Net(nn.Module):
    """A small classifier with a tied weight and a batch norm in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.norm = nn.LayerNorm(12)
        self.ffn = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 12)])
        self.bn = nn.BatchNorm1d(12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.ffn[1](torch.nn.functional.gelu(self.ffn[0](self.norm(x))))
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        return x @ self.embed.weight.T


def net() -> Net:
    torch_rng = torch.Generator().manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_rng) * 0.3 + 0.1)
        assert made.bn.running_mean is not None
        made.bn.running_mean.copy_(torch.randn(12, generator=torch_rng))
    return made


def exported(module: nn.Module) -> ir.Model:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.onnx.export(
        module,
        (ids,),
        dynamo=True,
        opset_version=23,
        optimize=False,
        dynamic_shapes=(dims,),
        input_names=["ids"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    return program.model


IDS = torch.tensor([[1, 4, 2], [19, 0, 7], [3, 3, 3]])


def test_equals_the_executor() -> None:
    model = exported(net())
    module = to_fx(model)
    expected = Executor(model).run({"ids": IDS.numpy()})
    actual = module(IDS)
    assert list(actual) == ["logits"]
    # Up to rounding: torch.matmul chooses its kernel by whether a gradient may be asked for.
    torch.testing.assert_close(actual["logits"], expected["logits"], rtol=1e-6, atol=1e-6)
    assert torch.equal(module(ids=IDS)["logits"], actual["logits"])


def test_weights_keep_their_names_and_kinds() -> None:
    original = net()
    module = to_fx(exported(original))
    parameters = dict(module.named_parameters())
    for name, parameter in original.named_parameters():
        assert torch.equal(parameters[name], parameter), name
    buffers = dict(module.named_buffers())
    assert {"bn.running_mean", "bn.running_var"} <= buffers.keys()
    assert len(parameters) == len(dict(original.named_parameters()))  # the tied weight is one


def test_gradients_equal_eager() -> None:
    original = net()
    module = to_fx(exported(original))
    original(IDS).square().mean().backward()
    module(IDS)["logits"].square().mean().backward()
    trained = dict(module.named_parameters())
    for name, parameter in original.named_parameters():
        gradient = trained[name].grad
        assert gradient is not None and parameter.grad is not None
        scale = float(parameter.grad.square().mean().sqrt())
        assert float((gradient - parameter.grad).abs().max()) < 1e-5 * scale, name


def test_it_can_be_fine_tuned_and_its_weights_moved() -> None:
    module = to_fx(exported(net()))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module(IDS)["logits"].square().mean().item()
    for _ in range(3):
        optimizer.zero_grad()
        loss = module(IDS)["logits"].square().mean()
        loss.backward()
        optimizer.step()
    after = module(IDS)["logits"].square().mean().item()
    assert after < before
    fresh = to_fx(exported(net()))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(IDS)["logits"], module(IDS)["logits"])


def test_double_precision_by_converting_the_module() -> None:
    original = net()
    module = to_fx(exported(original)).double()
    actual = module(IDS)["logits"]
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, original.double()(IDS), rtol=1e-7, atol=1e-7)


def test_bodies_become_submodules() -> None:
    model = text.model(
        """
        g (bool flag, float[2] x) => (float[2] y) <float[2] w = {3.0, 5.0}>
        {
            y = If(flag) <
                then_branch = yes () => (float[2] a) { a = Mul(x, w) },
                else_branch = no () => (float[2] b) { b = Neg(x) }>
        }
        """
    )
    module = to_fx(model)
    x = torch.tensor([1.0, 2.0])
    assert module(torch.tensor(True), x)["y"].tolist() == [3, 10]
    assert module(torch.tensor(False), x)["y"].tolist() == [-1, -2]


def test_names_that_python_or_torch_cannot_take() -> None:
    model = text.model(
        """
        g (float[2] x) => (float[2] y) <float[2] w = {3.0, 5.0}, float[2] v = {1.0, 1.0}>
        { a = Mul(x, w) y = Add(a, v) }
        """
    )
    graph = model.graph
    graph.inputs[0].name = "0/x:0"
    for old, new in (("w", "onnx::MatMul_3"), ("v", "onnx::MatMul_3.forward")):
        value = graph.initializers.pop(old)
        value.name = new
        graph.initializers[new] = value
    module = to_fx(model)
    result = module(_0_x_0=torch.ones(2))["y"]
    assert result.tolist() == [4, 6]
    assert np.prod([p.numel() for p in module.parameters()]) == 4
