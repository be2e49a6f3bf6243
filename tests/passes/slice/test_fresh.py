"""Fresh models, whose biases are all zeros: nothing is tied by chance, and shared zeros turn with all."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as hf

import netlathe
from netlathe.analysis.axes import analyse, to_rotate, to_scale
from netlathe.analysis.cost import cost
from netlathe.diagnostics import PassError
from netlathe.ir import edit, normal, verify, weights
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.slice import Slice
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Context
from tests.analysis.residual import typed
from tests.pipeline.toy import captured_of

WIDTH = 32


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """A vision transformer as the library makes it, from its files."""
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=WIDTH,
        num_attention_heads=2,
        intermediate_size=48,
        num_hidden_layers=2,
        image_size=16,
        patch_size=8,
    )
    folder = tmp_path_factory.mktemp("vit")
    hf.ViTForImageClassification(config).save_pretrained(folder)
    return netlathe.capture(folder)


def vectors(model: ir.Model) -> dict[str, ir.Value]:
    held = model.graph.initializers.items()
    return {n: v for n, v in held if len(v.shape or ()) == 1 and v.dtype == ir.DataType.FLOAT}


def test_equal_biases_of_a_checkpoint_are_two(captured: Captured) -> None:
    """The library names its layers otherwise than its files do: they are found by their bytes."""
    found = vectors(captured.model)
    assert not [name for name, value in found.items() if len(value.uses()) > 1]
    # two of the ends and the last norm's two; six biases and two norms of two a block
    assert len(found) == 2 + 2 + 2 * (6 + 4)


def merged(captured: Captured) -> ir.Model:
    """The model with vectors of the same numbers stored once, as optimizers of ONNX files do it."""
    model = captured.model.clone()
    first: dict[bytes, ir.Value] = {}
    for value in vectors(model).values():
        kept = first.setdefault(weights.array(value).tobytes(), value)
        if kept is not value:
            edit.redirect(value, kept)
            edit.drop_if_unread(value)
    assert (
        len(vectors(model)) == 4
    )  # zeros and ones of the stream, zeros of the FFN and of the head
    return model


@pytest.mark.parametrize("passes", ["slice(ratio=0.25)", "slice(ratio=0.5, adapters=True)"])
def test_a_model_whose_zeros_are_shared_is_sliced(captured: Captured, passes: str) -> None:
    taken = captured_of(merged(captured))
    data = [captured.sample({"batch": 4}, seed) for seed in (1, 2)]
    compiled = netlathe.compile(taken, f"fold_norms(untie=True), {passes}", calibration=data)
    step = compiled.steps[1]
    assert step.check.against == "simulated reference"
    counts = step.entries[0].detail["parameters"]
    assert counts["before"] == compiled.steps[0].cost_after.params
    assert counts["after"] == cost(compiled.model).params < counts["before"]


def test_parameters_are_counted_for_every_width_that_is_needed(captured: Captured) -> None:
    model = merged(captured)
    FoldNorms(untie=True).run(model, Context())
    normal.normalize(model)
    data = [captured.sample({"batch": 4}, 1)]
    (entry,) = Slice(ratio=0.25).choose(model, Context(calibration=data))
    after = model.clone()
    Slice(ratio=0.25).edit(after, [entry], Context())
    normal.normalize(after)
    assert verify.verify(after) == []
    zeros = [v for v in vectors(after).values() if len(v.uses()) > 1]
    assert {WIDTH, 24} <= {weights.array(v).size for v in zeros}, "of heads, and of the stream"
    assert entry.detail["parameters"]["after"] == cost(after).params


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_only_zeros_are_the_same_in_every_basis(number: float) -> None:
    shared = np.full(8, number, np.float32)
    model = typed("h = MatMul(x, wq) a = Add(h, c) b = MatMul(a, wk) y = Add(b, c)", c=shared)
    axes = analyse(model, boundary=False)
    value = next(v for node in model.graph for v in node.outputs if v.name == "h")
    (group,) = axes.of(value, 2)
    for find in (to_rotate, to_scale):
        if number:
            with pytest.raises(PassError, match="c is shared with other axes"):
                find(axes, group, value, 2)
        else:
            names = {(v.name, dim) for v, dim in find(axes, group, value, 2).exponents}
            assert names == {("h", 2), ("a", 2), ("wq", 1), ("wk", 0)}
