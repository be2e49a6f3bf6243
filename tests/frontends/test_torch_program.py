"""Programs that were exported before become graphs, as the object and as the file, and stay as they were."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from netlathe import capture
from netlathe.diagnostics import InputError
from netlathe.execute import ort
from netlathe.execute.torch_ops import storage
from netlathe.frontends.torch_export import translate
from netlathe.frontends.torch_program import TorchProgram
from netlathe.pipeline import registry


class Heads(nn.Module):
    """An embedding that is the head's weight too, an argument that is no tensor, and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, times: int, *, flags: dict[str, torch.Tensor]) -> Any:
        y = self.norm(self.embed(ids).mean(1)) * times + flags["shift"]
        return self.head(self.drop(y)), None, {"pooled": y}


def exported(module: nn.Module | None = None) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    return torch.export.export(
        (module or Heads()).eval(),
        (torch.arange(24).reshape(4, 6) % 16, 2),
        {"flags": {"shift": torch.ones(8)}},
        dynamic_shapes={"ids": {0: auto, 1: auto}, "times": None, "flags": {"shift": None}},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    torch.export.save(exported(), path)
    return path


def test_a_saved_program_keeps_names_modules_and_dims(saved: Path) -> None:
    assert registry.find_frontend(saved) is TorchProgram
    captured = TorchProgram().capture(saved)
    graph = captured.model.graph
    shapes = {str(v.name): v.shape for v in (*graph.inputs, *graph.outputs)}
    assert shapes == {
        "ids": ir.Shape(["batch", "ids_dim1"]),
        "flags.shift": ir.Shape([8]),
        "output_0": ir.Shape(["batch", 16]),
        "output_2.pooled": ir.Shape(["batch", 8]),
    }
    assert captured.dynamic == {"batch": 4, "ids_dim1": 6}
    assert {"norm", "head"} <= {node.metadata_props.get("netlathe.module") for node in graph}
    wide = [
        v.name for v in graph.initializers.values() if v.const_value and v.const_value.size == 128
    ]
    assert len(wide) == 1, "the tied weight is one value"
    module = Heads().eval()
    feeds = {
        "ids": np.random.default_rng(0).integers(0, 16, (3, 9)),
        "flags.shift": np.linspace(-1, 1, 8, dtype=np.float32),
    }
    with torch.no_grad():
        shift = torch.from_numpy(feeds["flags.shift"])
        expected = module(torch.from_numpy(feeds["ids"]), 2, flags={"shift": shift})
    actual = ort.run(captured.model, feeds)
    np.testing.assert_allclose(actual["output_0"], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        actual["output_2.pooled"], expected[2]["pooled"], rtol=1e-4, atol=1e-5
    )


def test_a_program_is_left_as_it_was_and_its_weights_are_bound() -> None:
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    dims = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s")},)
    program = torch.export.export(module, (torch.ones(3, 5, 16),), dynamic_shapes=dims)
    before = str(program.graph)
    captured = capture(program)
    assert str(program.graph) == before
    bound = captured.model.graph.initializers["linear1.bias"].const_value
    assert bound is not None
    with torch.no_grad():
        module.linear1.bias[3] = 42.0
    assert bound.numpy()[3] == 42.0


def test_rounding_moves_a_program_that_cancels() -> None:
    """It calls no modules: its operators are disturbed, to see how far its results mean something."""

    class Cancels(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1e3).relu() - 1e3

    x = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Cancels(), (x,))
    exported = translate(program, (x,), {}, what="the program")
    eps = torch.finfo(torch.float32).eps
    assert 1e3 * eps / 4 < exported.moved(exported.example)["output"] < 8e3 * eps
    assert exported.moved(exported.example) == exported.moved(exported.example)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["program", "module"])
def test_halves_are_captured(kind: str, dtype: torch.dtype) -> None:
    """Their rounding is more than float32's, so that it is always asked how far it moves the outputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)).to(
        dtype
    )
    x = torch.randn(4, 8).to(dtype)
    if kind == "program":
        captured = capture(torch.export.export(module.eval(), (x,)))
    else:
        captured = capture(module, args=(x,))
    feeds = captured.sample(captured.dynamic, 0)
    (actual,) = ort.run(captured.model, feeds).values()
    expected = module(storage.from_numpy(next(iter(feeds.values()))))
    torch.testing.assert_close(storage.from_numpy(actual), expected, rtol=0.05, atol=0.05)


def test_branches_are_no_hindrance() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))

    x = torch.ones(4)
    program = torch.export.export(Branches(), (x,))
    exported = translate(program, (x,), {}, what="the program")
    assert exported.moved(exported.example) == {"output": 0.0}


@pytest.mark.parametrize("mode", ["dropout", "norm", "decomposed"])
def test_training_mode_is_refused(mode: str) -> None:
    module = nn.Dropout() if mode == "dropout" else nn.BatchNorm1d(8)
    program = torch.export.export(module.train(), (torch.ones(4, 8),))
    if mode == "decomposed":
        program = program.run_decompositions()
    with pytest.raises(InputError, match=r"(?s)exported in training mode.*eval\(\)"):
        TorchProgram().capture(program)


def test_example_inputs_can_be_given(saved: Path) -> None:
    program = torch.export.load(saved)
    program.example_inputs = None
    assert TorchProgram().capture(program).dynamic == {"batch": 4, "ids_dim1": 6}  # made up
    ids, flags = torch.zeros(2, 3, dtype=torch.int64), {"shift": torch.zeros(8)}
    captured = TorchProgram(args=(ids, 2), kwargs={"flags": flags}).capture(program)
    assert captured.dynamic == {"batch": 2, "ids_dim1": 3}
    with pytest.raises(InputError, match="do not fit"):
        TorchProgram(args=(ids,)).capture(program)


def test_a_weight_that_is_not_finite_is_named() -> None:
    module = Heads()
    module.norm.bias.data[3] = float("inf")
    with pytest.raises(InputError, match=r"'norm.bias' of the program holds inf at \[3\]"):
        TorchProgram().capture(exported(module))


def test_a_mask_may_hold_minus_infinity() -> None:
    class Masked(nn.Module):
        mask: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.mask).softmax(-1)

    x = torch.ones(4, 4)
    assert capture(torch.export.export(Masked(), (x,))).dynamic == {}
    assert capture(Masked(), args=(x,), dynamic={}).dynamic == {}


@pytest.mark.parametrize("damage", ["cut", "other", "absent"])
def test_files_that_are_no_programs_are_explained(saved: Path, damage: str) -> None:
    words = "cannot load it"
    if damage == "cut":
        saved.write_bytes(saved.read_bytes()[:-200])
    elif damage == "other":
        torch.save({"weight": torch.ones(2)}, saved)
    else:
        saved.unlink()
        words = "no such file"
    with pytest.raises(InputError, match=rf"(?s){words}.*at  {re.escape(str(saved))}"):
        TorchProgram().capture(saved)


def test_what_was_captured_is_found_again(saved: Path, tmp_path: Path) -> None:
    first, second = (capture(saved, cache_dir=tmp_path / "cache") for _ in range(2))
    assert first.dynamic == second.dynamic
    feeds = first.sample(first.dynamic, 0)
    for name, expected in ort.run(first.model, feeds).items():
        np.testing.assert_array_equal(ort.run(second.model, feeds)[name], expected)
