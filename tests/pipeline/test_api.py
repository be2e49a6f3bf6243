"""NetLathe from Python, as a newcomer uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import netlathe
from netlathe.execute import ort
from netlathe.pipeline import registry
from netlathe.pipeline.pass_ import Pass
from tests.ir.onnx_text import matrix, model
from tests.pipeline.test_manifest import onnx_file
from tests.pipeline.toy import Balance, Cut, ReluToMax


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toy passes be installed."""
    known: dict[str, type[Pass]] = {"cut": Cut, "balance": Balance, "relu_to_max": ReluToMax}
    find = registry.find_pass
    monkeypatch.setattr(registry, "find_pass", lambda name: known.get(name) or find(name))


def test_the_package_costs_nothing_to_import() -> None:
    code = (
        "import sys; before = set(sys.modules); import netlathe; new = set(sys.modules) - before;"
        "heavy = new & {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'pydantic', 'sympy'};"
        "assert not heavy, heavy; assert netlathe.__version__;"
        "netlathe.Pass, netlathe.compile, netlathe.Context, netlathe.cost;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in netlathe.__all__:
        assert getattr(netlathe, name) is not None
    assert set(netlathe._HOME) | {"__version__"} == set(netlathe.__all__) == set(dir(netlathe))
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        netlathe.optimise  # noqa: B018


def test_capture_compile_save_and_run(tmp_path: Path) -> None:
    captured = netlathe.capture(onnx_file(tmp_path))
    compiled = netlathe.compile(captured, "relu_to_max, cut(count=1)")
    assert [step.changed for step in compiled.steps] == [True, True]
    artifact = compiled.save(tmp_path / "out")
    feeds = {"x": matrix(3, 6)}
    expected = ort.run(compiled.model, feeds)["y"]
    assert np.allclose(artifact.run(feeds)["y"], expected, atol=1e-5)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["manifest.json", "model.onnx"]
    written = ir.load(tmp_path / "out" / "model.onnx")
    assert np.allclose(ort.run(written, feeds)["y"], expected, atol=1e-5)


def test_passes_may_be_made_in_python(tmp_path: Path) -> None:
    source = onnx_file(tmp_path)
    one = netlathe.compile(source, [ReluToMax(), Cut(count=1)])
    two = netlathe.compile(str(source), "relu_to_max, cut(count=1)")
    feeds = {"x": matrix(3, 6)}
    assert np.array_equal(ort.run(one.model, feeds)["y"], ort.run(two.model, feeds)["y"])


def test_plan(tmp_path: Path) -> None:
    steps = netlathe.plan(onnx_file(tmp_path), "cut(count=3), cut(count=0)")
    assert [step.entries[0].status for step in steps] == ["applied", "skipped"]
    with pytest.raises(netlathe.GateError, match="no candidate"):
        netlathe.plan(onnx_file(tmp_path), "cut(count=0)", strict=True)


def test_calibration_is_feeds_or_a_file(tmp_path: Path) -> None:
    captured = netlathe.capture(onnx_file(tmp_path))
    np.savez(tmp_path / "data.npz", x=matrix(16, 6))
    losses = [
        netlathe.compile(captured, "cut", calibration=data).steps[0].loss
        for data in (tmp_path / "data.npz", [{"x": matrix(16, 6)[:8]}, {"x": matrix(16, 6)[8:]}])
    ]
    assert losses[0] == losses[1] and losses[0] is not None and losses[0].data == "calibration"


@pytest.mark.parametrize("calibration", [None, []])
def test_no_calibration_data_is_told_before_the_capture(calibration: list[Any] | None) -> None:
    with pytest.raises(netlathe.OptionError, match="needs calibration data"):
        netlathe.compile("missing.onnx", "slice", calibration=calibration)


def test_files_travel_along_and_folders_are_not_overwritten(tmp_path: Path) -> None:
    captured = netlathe.capture(onnx_file(tmp_path))
    (tmp_path / "vocab.txt").write_text("a b c")
    captured.files = {"vocab.txt": tmp_path / "vocab.txt"}
    compiled = netlathe.compile(captured, "relu_to_max")
    compiled.save(tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a b c"
    with pytest.raises(netlathe.InputError, match="exists"):
        compiled.save(tmp_path / "out")
    compiled.save(tmp_path / "out", overwrite=True)
    with pytest.raises(netlathe.InputError, match="made from"):
        compiled.save(tmp_path, overwrite=True)  # holds the source


def test_the_config_of_a_model_that_was_wider_is_not_taken_for_its_own(tmp_path: Path) -> None:
    made = model(
        "float[b,4] x", "float[b,2] y", "h = MatMul(x, up) r = Relu(h) y = MatMul(r, down)",
        up=matrix(4, 6), down=matrix(6, 2),
    )  # fmt: skip
    ir.save(made, tmp_path / "m.onnx")
    (tmp_path / "config.json").write_text('{"intermediate_size": 6}')
    captured = netlathe.capture(tmp_path / "m.onnx")
    captured.files = {"config.json": tmp_path / "config.json"}
    same = netlathe.compile(captured, "relu_to_max")
    same.save(tmp_path / "same")
    assert (tmp_path / "same" / "config.json").exists()
    smaller = netlathe.compile(captured, "prune(ratio=0.5)")
    tuned = smaller.with_weights(smaller.module())
    for name, compiled in (("smaller", smaller), ("tuned", tuned)):
        compiled.save(tmp_path / name)
        assert not (tmp_path / name / "config.json").exists()
        kept = (tmp_path / name / "config.original.json").read_text()
        assert kept == '{"intermediate_size": 6}'


def test_saving_uses_the_target_that_was_compiled_for(tmp_path: Path) -> None:
    source = onnx_file(tmp_path)
    target = registry.find_target("onnx", opset=19)[1]
    compiled = netlathe.compile(source, "relu_to_max", target=target)
    compiled.save(tmp_path / "a")
    compiled.save(tmp_path / "b", opset=21)
    compiled.save(tmp_path / "c", "onnx")
    versions = [ir.load(tmp_path / d / "model.onnx").opset_imports[""] for d in "abc"]
    assert versions == [19, 21, 24]
    with pytest.raises(netlathe.OptionError, match="out of range"):
        compiled.save(tmp_path / "d", opset=3)
    assert not (tmp_path / "d").exists()


def test_wrong_settings_and_targets(tmp_path: Path) -> None:
    with pytest.raises(netlathe.OptionError, match="onnx_file has no setting 'cache'"):
        netlathe.capture(onnx_file(tmp_path), cache=True)
    with pytest.raises(netlathe.OptionError, match="no setting 'cash'") as caught:
        netlathe.capture(tmp_path, cash=True)
    assert "did you mean cache?" in str(caught.value)
    with pytest.raises(netlathe.OptionError, match="there is no target 'onxx'"):
        netlathe.compile(tmp_path / "absent.onnx", "relu_to_max", target="onxx")  # before capture
    with pytest.raises(netlathe.OptionError, match="there is no pass 'nope'"):
        netlathe.compile(tmp_path / "absent.onnx", "nope")


@pytest.mark.parametrize("passes", [["cleanup"], None, ReluToMax()])
def test_what_is_no_list_of_passes(passes: Any) -> None:
    with pytest.raises(netlathe.OptionError, match=r"a text or a list of passes, not"):
        netlathe.compile("absent.onnx", passes)
    with pytest.raises(netlathe.OptionError, match=r"a text or a list of passes, not"):
        netlathe.plan("absent.onnx", passes)


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"x": np.zeros((2, 4), np.float32)}, "a list of feeds is wanted"),
        (np.zeros((2, 4), np.float32), "a list of feeds is wanted"),
        ([np.zeros((2, 4), np.float32)], "a list of feeds is wanted"),
        ([{"x": [0.0]}], "'x' is of type list, not an array of numpy"),
    ],
)
def test_calibration_data_of_another_kind(tmp_path: Path, feeds: Any, words: str) -> None:
    with pytest.raises(netlathe.InputError, match=words) as caught:
        netlathe.compile(onnx_file(tmp_path), "relu_to_max", calibration=feeds)
    assert caught.value.diagnostics[0].code == "calibration.feeds"


def test_an_own_pass_in_a_few_lines(tmp_path: Path) -> None:
    """What the docs of the package promise: everything needed is a public name."""

    @netlathe.options
    class Rename(netlathe.Pass):
        """Renames the graph."""

        name = "rename"
        exactness = netlathe.Exact()
        to: str = netlathe.option(default="mine", help="the new name")

        def run(self, model: ir.Model, ctx: netlathe.Context) -> netlathe.Result:
            node = model.graph.node(0)
            old = node.outputs[0].name or ""
            node.outputs[0].name = self.to
            entry = netlathe.Entry(old, "applied", f"renamed to {self.to}")
            return netlathe.Result(True, [entry], {old: self.to})

    compiled = netlathe.compile(onnx_file(tmp_path), [Rename(to="first")])
    assert compiled.steps[0].renamed == {"h": "first"} and compiled.steps[0].check.error == 0.0


def test_the_passes_that_come_with_it_keep_to_the_contract(tmp_path: Path) -> None:
    """Real passes under the manager, without torch: every one changes something and is checked."""
    rng = np.random.default_rng(0)
    weights = {
        "conv": rng.standard_normal((16, 3, 3, 3)) / 5,
        "scale": rng.uniform(0.5, 1.5, 16),
        "shift": rng.standard_normal(16),
        "mean": rng.standard_normal(16) / 10,
        "var": rng.uniform(0.5, 1.5, 16),
        "head": rng.standard_normal((16, 80)) / 4,
    }
    made = model(
        "float[batch,3,8,8] image",
        "float logits",
        "c = Conv<pads = [1,1,1,1]>(image, conv)  b = BatchNormalization(c, scale, shift, mean, var)"
        "  r = Relu(b)  i = Identity(r)  p = GlobalAveragePool(i)  f = Flatten(p)"
        "  logits = MatMul(f, head)",
        **{name: array.astype(np.float32) for name, array in weights.items()},
    )
    ir.save(made, tmp_path / "net.onnx")
    compiled = netlathe.compile(
        tmp_path / "net.onnx", 'fold_batch_norm, quantize(weights="int8", min_size=1)', strict=True
    )
    fold, quantize = compiled.steps
    assert fold.changed and fold.check.error is not None and fold.check.error < 1e-5
    assert quantize.loss is not None and quantize.loss.kl is not None and quantize.loss.top1 == 1.0
    assert quantize.cost_after.bytes < 0.5 * quantize.cost_before.bytes
