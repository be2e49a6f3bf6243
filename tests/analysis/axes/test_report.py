"""Groups as rows, in the terminal and in JSON; the same for a module and for its ONNX file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from netlathe.analysis.axes import analyse, report
from netlathe.cli import main
from netlathe.frontends.onnx_file import OnnxFile
from netlathe.ir import normal
from tests import zoo, zoo_ir
from tests.ir.onnx_text import matrix, model


def test_a_row_says_what_must_change_and_what_may_be_done() -> None:
    rows = report(analyse(zoo_ir.captured("llama")), {})
    (ffn,) = [row for row in rows if row.where == "model.layers.0.mlp"]
    assert ffn.members == (
        "model.layers.0.mlp.gate_proj.weight:1",
        "model.layers.0.mlp.up_proj.weight:1",
        "model.layers.0.mlp.down_proj.weight:0",
    )
    assert (ffn.size, ffn.sizes, ffn.pinned) == (160, (), ())
    assert ffn.allowed == "delete, permute, scale"  # the up projection alone: a Swish has the gate
    values = next(
        row for row in rows if row.members[0].startswith("model.layers.0.self_attn.v_proj")
    )
    assert values.allowed == "delete, permute, scale, rotate"
    heads = next(row for row in rows if row.where == "model.layers.0.self_attn")
    assert any(size.startswith("Reshape ") and size.endswith("input 1[2]") for size in heads.sizes)


def test_a_row_names_what_pins_it() -> None:
    rows = report(analyse(zoo_ir.captured("llama")), {})
    (words,) = [row for row in rows if row.where == "model.embed_tokens"]
    assert not words.delete and words.allowed == ""
    (reason,) = words.pinned
    assert reason.startswith("Gather looks up positions that graph input input_ids holds (")
    assert reason.endswith(" in model.embed_tokens)")


def test_a_group_of_which_all_must_stay_says_so() -> None:
    made = model(
        "float[b,s,4] x", "float y",
        "a = MatMul(x, w) u = Concat<axis=2>(a, x) y = MatMul(u, v)",
        w=matrix(4, 1), v=matrix(5, 2),
    )  # fmt: skip
    normal.normalize(made)
    (alone,) = [row for row in report(analyse(made), {}) if row.size == 1]
    assert alone.pinned == ("it is the only position of a dim",)


def test_inspect_shows_the_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no line of the table is folded
    made = model("float[b,4] x", "float[b,2] y", "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)",
                 w=matrix(4, 6), v=matrix(6, 2))  # fmt: skip
    ir.save(made, tmp_path / "m.onnx")
    assert main(["inspect", str(tmp_path / "m.onnx"), "--axes"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["g1", "6", "ffn", "w:1", "and", "1", "more", "delete,", "permute,", "scale"] in lines
    assert main(["inspect", str(tmp_path / "m.onnx"), "--axes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["axes"]
    assert [(row["size"], row["scope"]) for row in rows] == [(4, ""), (6, "ffn"), (2, "vocab")]
    assert rows[0]["pinned"] == ["graph input x has it"]


# -- one model, two ways in -----------------------------------------------------------------------------


def kinds(made: ir.Model) -> Counter[Hashable]:
    """Groups by what they are made of and what may be done to them."""
    return Counter(
        (
            row.size,
            row.least,
            frozenset(row.members),
            row.delete,
            row.permute,
            row.scale,
            row.rotate,
        )
        for row in report(analyse(made), {})
    )


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES if n != "gpt2")]
)
def test_an_onnx_file_has_the_groups_of_the_module(name: str, tmp_path: Path) -> None:
    ir.save(zoo.exported(name), tmp_path / "m.onnx")
    assert kinds(OnnxFile().capture(tmp_path / "m.onnx").model) == kinds(zoo_ir.captured(name))


class _Positional(torch.nn.Module):
    """A zoo model for the exporter of TorchScript, which knows no keyword arguments."""

    def __init__(self, built: zoo.ZooModel) -> None:
        super().__init__()
        self.module, self.names, self.outputs = built.module, tuple(built.kwargs), built.outputs

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.module(**dict(zip(self.names, given, strict=True)))
        return tuple(out[name] for name in self.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext", "llama", "resnet", "segformer", "vit"])
def test_a_file_of_the_old_exporter_has_the_groups_of_the_module(name: str, tmp_path: Path) -> None:
    """Its weights have other names, batch norms are folded: widths, and what may be done, are the same."""
    built = zoo.build(name)
    torch.onnx.export(
        _Positional(built),
        tuple(built.kwargs.values()),
        str(tmp_path / "m.onnx"),
        dynamo=False,
        opset_version=17,
        input_names=list(built.kwargs),
        output_names=list(built.outputs),
        dynamic_axes={key: dict(dims) for key, dims in built.dynamic.items()},
    )
    found, expected = (
        Counter((g.size, g.least) for g in analyse(made).groups if g.allows("delete"))
        for made in (OnnxFile().capture(tmp_path / "m.onnx").model, zoo_ir.captured(name))
    )
    assert found == expected and len(expected) > 3
