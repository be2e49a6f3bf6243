"""The executor against ONNX Runtime, and what it promises besides the numbers."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from netlathe.diagnostics import InputError, LowerError
from netlathe.execute import executor, ort
from netlathe.execute.compare import relative_error
from netlathe.execute.executor import ExecutionError, Executor
from tests.execute import text


def block() -> ir.Model:
    """A residual branch whose Reshape is computed from the input's shape."""
    return text.model(
        """
        block (float[batch, sequence, 8] x) => (float[batch, sequence, 8] y, int64[3] dims)
        {
            normal = RMSNormalization<axis = -1>(x, scale)
            wide = MatMul(normal, up)
            biased = Add(wide, bias)
            active = Gelu<approximate = "tanh">(biased)
            back = MatMul(active, down)
            dims = Shape(x)
            zero = Constant<value_ints = [0]>()
            two = Constant<value_ints = [2]>()
            last = Constant<value_ints = [-1]>()
            rows = Slice(dims, zero, two)
            shape = Concat<axis = 0>(rows, last)
            same = Reshape(back, shape)
            y = Add(x, same)
        }
        """,
        {
            "scale": text.normal(8, seed=1),
            "up": text.normal(8, 12, seed=2),
            "bias": text.normal(12, seed=3),
            "down": text.normal(12, 8, seed=4),
        },
    )


def feeds(batch: int, sequence: int) -> dict[str, npt.NDArray[Any]]:
    return {"x": text.normal(batch, sequence, 8, seed=7)}


@pytest.mark.parametrize("sizes", [(2, 5), (1, 3), (3, 1)])
def test_equals_onnx_runtime(sizes: tuple[int, int]) -> None:
    model = block()
    expected = ort.run(model, feeds(*sizes))
    actual = Executor(model).run(feeds(*sizes))
    assert list(actual) == ["y", "dims"]
    assert relative_error(actual["y"].numpy(), expected["y"]) < 1e-6
    assert actual["dims"].tolist() == [*sizes, 8]


def test_any_value_can_be_observed() -> None:
    model = block()
    names = ["normal", "x", "up", "rows", "active"]
    expected = ort.run(model, feeds(2, 5), ["normal", "active"])
    actual = Executor(model).run(feeds(2, 5), names)
    assert list(actual) == names
    assert relative_error(actual["normal"].numpy(), expected["normal"]) < 1e-6
    assert relative_error(actual["active"].numpy(), expected["active"]) < 1e-6
    assert actual["rows"].tolist() == [2, 5]
    assert actual["up"].shape == (8, 12)


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block()
    loaded: list[str] = []
    real = executor.storage.load

    def load(tensor: ir.TensorProtocol, device: torch.device) -> torch.Tensor:
        loaded.append(tensor.name or "")
        return real(tensor, device)

    monkeypatch.setattr(executor.storage, "load", load)
    Executor(model).run(feeds(2, 5), ["normal"])
    assert loaded == ["scale"]


@pytest.mark.parametrize("keep", [False, True])
def test_weights_are_held_one_at_a_time(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    model = block()
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    real = executor.storage.load

    def load(tensor: ir.TensorProtocol, device: torch.device) -> torch.Tensor:
        nonlocal most
        made = real(tensor, device)
        alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(executor.storage, "load", load)
    Executor(model, keep_weights=keep).run(feeds(2, 5))
    assert most == (4 if keep else 1)


def test_torch_state_is_untouched() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    result = Executor(block()).run(feeds(2, 5))["y"]
    assert not result.requires_grad and not result.is_inference()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_default_dtype(), torch.is_grad_enabled())


def test_runs_are_identical_and_ignore_autocast() -> None:
    runner = Executor(block())
    first = runner.run(feeds(2, 5))["y"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = runner.run(feeds(2, 5))["y"]
    assert torch.equal(first, second)


def test_bad_feeds_are_refused_together() -> None:
    with pytest.raises(InputError) as caught:
        Executor(block()).run({"z": np.zeros(1, np.float32)})
    message = str(caught.value)
    assert "no input named 'z'" in message and "'x' is missing" in message
    with pytest.raises(InputError, match="float64, not FLOAT"):
        Executor(block()).run({"x": np.zeros((2, 5, 8))})
    with pytest.raises(InputError, match="has 1 dims, not 3"):
        Executor(block()).run({"x": np.zeros(8, np.float32)})
    with pytest.raises(InputError, match="no value named nothing"):
        Executor(block()).run(feeds(2, 5), ["nothing"])


def test_a_failing_node_is_named() -> None:
    with pytest.raises(ExecutionError) as caught:
        Executor(block()).run({"x": np.zeros((2, 5, 7), np.float32)})
    assert "normal = RMSNormalization" in caught.value.diagnostics[0].at


def test_every_unknown_op_is_listed() -> None:
    model = text.model(
        """
        g (float[2] x) => (float[2] z) { y = com.vendor.Twist(x) z = com.vendor.Turn(y) }
        """
    )
    with pytest.raises(LowerError) as caught:
        Executor(model)
    assert [d.message.split(" ")[0] for d in caught.value.diagnostics] == [
        "com.vendor::Twist",
        "com.vendor::Turn",
    ]


def test_an_unknown_attribute_is_refused() -> None:
    model = text.model(
        """
        g (float[2] x) => (float[2] y) { y = Elu<alpha = 1.0, beta = 2.0>(x) }
        """
    )
    with pytest.raises(LowerError, match="no attribute 'beta'"):
        Executor(model)


def test_model_functions_are_expanded_with_their_attributes() -> None:
    model = text.model(
        """
        g (float[3] x) => (float[3] y, float[3] z)
        { y = own.leak<slope = 0.5>(x) z = own.leak<slope = 0.25>(x) }
        <domain: "own", opset_import: ["" : 23]>
        leak <slope> (a) => (b) { b = LeakyRelu<alpha: float = @slope>(a) }
        """
    )
    result = Executor(model).run({"x": np.array([-4, 0, 2], np.float32)})
    assert result["y"].tolist() == [-2, 0, 2]
    assert result["z"].tolist() == [-1, 0, 2]


def test_a_loop_body_captures_values_and_weights() -> None:
    model = text.model(
        """
        g (int64 trips, float[2] x) => (float[2] total, float[n, 2] seen)
        <float[2] weight = {1.0, 10.0}>
        {
            doubled = Add(x, x)
            total, seen = Loop(trips, , x) <body = body (int64 i, bool go, float[2] state)
                => (bool again, float[2] next, float[2] scan)
            {
                again = Identity(go)
                step = Mul(doubled, weight)
                next = Add(state, step)
                scan = Identity(next)
            }>
        }
        """
    )
    given = {"trips": np.array(3), "x": np.array([1, 2], np.float32)}
    result = Executor(model).run(given)
    assert result["total"].tolist() == [7, 122]
    assert result["seen"].tolist() == [[3, 42], [5, 82], [7, 122]]


def test_an_initializer_that_is_an_input_is_a_default() -> None:
    model = text.model(
        """
        g (float[2] x, float[2] w) => (float[2] y) { y = Mul(x, w) }
        """
    )
    weight = model.graph.inputs[1]
    weight.const_value = ir.Tensor(np.array([2, 3], np.float32), name="w")
    model.graph.initializers["w"] = weight
    x = np.array([1, 1], np.float32)
    assert Executor(model).run({"x": x})["y"].tolist() == [2, 3]
    assert Executor(model).run({"x": x, "w": x})["y"].tolist() == [1, 1]


def test_a_shape_made_of_constants_and_dims() -> None:
    """The expanded LayerNormalization has it: no part of it may land on another device."""
    model = text.model(
        """
        g (float[a, b] x) => (float[a, b] y)
        {
            count = Constant<value_ints = [1]>()
            first = Constant<value_ints = [0]>()
            ones = ConstantOfShape<value = int64[1] {1}>(count)
            dims = Shape(x)
            rows = Slice(dims, first, count)
            shape = Concat<axis = 0>(rows, ones)
            filled = ConstantOfShape<value = float[1] {0.5}>(shape)
            y = Add(x, filled)
        }
        """
    )
    x = text.normal(3, 4)
    assert np.array_equal(Executor(model).run({"x": x})["y"].numpy(), x + np.float32(0.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    model = block()
    on_cpu = Executor(model).run(feeds(2, 5))
    on_gpu = Executor(model, "cuda").run(feeds(2, 5))
    for name, tensor in on_gpu.items():
        assert tensor.device.type == "cuda"
        assert relative_error(tensor.cpu().numpy(), on_cpu[name].numpy()) < 1e-6
    module = Executor(model, "cuda").module()
    x = torch.from_numpy(feeds(2, 5)["x"]).cuda()
    assert relative_error(module(x)["y"].detach().cpu().numpy(), on_cpu["y"].numpy()) < 1e-6
