"""A wrong graph is refused, and the first wrong node is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from netlathe.diagnostics import CaptureError
from netlathe.execute import ort, samples
from netlathe.frontends import compare, torch_export
from netlathe.frontends.torch_module import TorchModule
from netlathe.ir import normal
from netlathe.pipeline.pass_ import Feeds
from tests.ir.onnx_text import model


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_the_first_wrong_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch_export.condense

    def spoil(model: ir.Model, strip: object) -> None:
        tanh = [node for node in model.graph if node.op_type == "Tanh"][2]
        tanh.op_type = "Sigmoid"  # as a wrong translation would
        real(model, strip)  # type: ignore[arg-type]  # passed through unchanged

    monkeypatch.setattr(torch_export, "condense", spoil)
    with pytest.raises(CaptureError) as caught:
        TorchModule(args=(torch.ones(3, 8),), dynamic={"x": {0: "batch"}}).capture(Tower())
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "capture.differs"
    assert diagnostic.where == "layers.2.1"
    assert "Sigmoid" in diagnostic.at


def test_a_difference_that_only_other_sizes_show_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape literal that happens to be right for the example is wrong for every other batch."""
    real = torch_export.condense

    def bake(model: ir.Model, strip: object) -> None:
        node = next(node for node in model.graph if node.op_type == "Add")
        ones = ir.node("Expand", [node.inputs[0], _constant(model, [3, 8])])
        model.graph.insert_before(node, ones)
        node.replace_input_with(0, ones.outputs[0])
        real(model, strip)  # type: ignore[arg-type]  # passed through unchanged

    monkeypatch.setattr(torch_export, "condense", bake)
    with pytest.raises(Exception, match=r"[Ee]xpand|broadcast|differs"):
        TorchModule(args=(torch.ones(3, 8),), dynamic={"x": {0: "batch"}}).capture(Tower())


def _constant(model: ir.Model, values: list[int]) -> ir.Value:
    tensor = ir.tensor(np.asarray(values, dtype=np.int64), name="baked")
    value = ir.Value(
        name="baked",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([len(values)]),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def _detector(last: str, far: float) -> ir.Model:
    """What says "no" everywhere: 1e-8."""
    body = f"t = Tanh(x)  h = Add(t, far)  y = {last}(h)"
    made = model("float[b,8] x", "float y", body, far=far)
    normal.normalize(made)
    return made


def _check(made: ir.Model, original: compare.Original) -> Any:
    sample = partial(samples.synthesize, made)
    return compare.check_same(made, original, {"b": 2}, sample, what="the detector")[0]


@pytest.mark.parametrize("last", ["Sigmoid", "Softplus"])
def test_the_last_bit_of_a_sigmoid_is_no_difference(last: str) -> None:
    """A detector of text that sees none says 1e-8 everywhere, and another kernel 1e-7 here and there."""
    made = _detector(last, -18.0)

    def run(feeds: Feeds) -> dict[str, Any]:
        return {"y": ort.run(made, feeds)["y"] + np.float32(2.0**-23)}

    def inner(feeds: Feeds) -> dict[str, Any]:
        return ort.run(made, feeds, ["t", "h", "y"])

    original = compare.Original(run=run, intermediates=inner, moved=lambda feeds: {"y": 0.01})
    if last == "Softplus":
        with pytest.raises(CaptureError, match=r"capture\.differs"):
            _check(made, original)
        return
    assert "told apart" not in _check(made, original).reason
    blind = _check(made, dataclasses.replace(original, intermediates=lambda feeds: {}))
    assert blind.status == "applied" and "y was not told apart" in blind.reason


def test_what_a_sigmoid_reads_tells_two_detectors_apart_that_see_nothing() -> None:
    real = _detector("Sigmoid", -18.0)
    original = compare.Original(
        run=lambda feeds: ort.run(real, feeds),
        intermediates=lambda feeds: ort.run(real, feeds, ["t", "h", "y"]),
    )
    assert _check(_detector("Sigmoid", -18.0), original).status == "applied"
    with pytest.raises(CaptureError, match=r"the first value that differs: 'h'"):
        _check(_detector("Sigmoid", -17.0), original)


def test_rounding_of_an_ill_conditioned_model_is_no_difference() -> None:
    """Outputs that amplify every rounding error are compared with how far rounding moves them."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x)
            return (y + 1e4).cumsum(1) - (y + 1e4).sum(1, keepdim=True) * 0.999

    torch.manual_seed(0)
    model = Cancels()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    captured = TorchModule(args=(x,), dynamic={"x": {0: "batch"}}).capture(model)
    assert captured.entries[-1].candidate == "capture"


def test_sizes_stay_within_bounds() -> None:
    grown = compare._other_sizes({"s": 64, "b": 2}, {"s": (2, 64)}, lambda n: 2 * n)
    assert grown == {"s": 63, "b": 4}


@pytest.mark.parametrize("example", [False, True])
def test_a_size_is_not_compared_twice_for_a_second_one(example: bool) -> None:
    """A model that runs at the bound of its one dim and nowhere else: is it right elsewhere? No telling."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 25]>
        g (float[n] x) => (float[n] y) { y = Neg(x) }
    """)
    tried = []

    def run(feeds: Feeds) -> dict[str, Any]:
        tried.append(len(feeds["x"]))
        if tried[-1] != 16:
            raise ValueError("16 it is")
        return {"y": -feeds["x"]}

    def sample(sizes: Mapping[str, int], seed: int) -> Feeds:
        return {"x": np.ones(sizes["n"], np.float32)}

    given = sample({"n": 16}, 0) if example else None
    original = compare.Original(run, run, example=given, bounds={"n": (1, 16)})
    with pytest.raises(CaptureError, match=r"itself fails at n=15.*16 it is"):
        compare.check_same(model, original, {"n": 16}, sample, what="it")
    assert tried == [16, 15]


def test_a_model_that_does_not_run_is_run_once() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 25]>
        g (float[4] x) => (float[4] y) { y = Neg(x) }
    """)
    tried = []

    def run(feeds: Feeds) -> dict[str, Any]:
        tried.append(feeds)
        raise ValueError("never")

    original = compare.Original(run, run)
    with pytest.raises(CaptureError) as caught:
        compare.check_same(model, original, {}, lambda _sizes, _seed: {"x": np.ones(4)}, what="it")
    (told,) = caught.value.diagnostics
    assert (len(tried), told.notes, told.help) == (1, (), "")
