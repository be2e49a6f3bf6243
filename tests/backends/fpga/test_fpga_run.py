"""Artifacts: layers, or all of a small network, on the simulated core; the host; what is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import netlathe
from netlathe.backends.fpga import agreement, artifact, backend, model, simulate
from netlathe.backends.fpga import host as hosts
from netlathe.backends.fpga.artifact import FpgaArtifact
from netlathe.backends.fpga.boards import BOARDS
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.model import Memory, Timing
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.tvm import toolchain
from netlathe.backends.tvm.arm import cross
from netlathe.diagnostics import (
    InputError,
    LowerError,
    MissingExtraError,
    OptionError,
    VerifyError,
)
from netlathe.execute import ort
from netlathe.pipeline.pass_ import Feeds

BOARD = BOARDS["fpga-ecp5-85f"]
INTEGER = "quantize(activations='int8', min_size=0)"


class Net(nn.Module):
    """Three convolutions, of which the last reads what stays on the chip, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.third, self.last = nn.Conv2d(24, 16, 3, padding=1, stride=2), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 3, 9, 9] to ten numbers each."""
        x = self.third(self.second(self.first(x).relu()).relu()).relu()
        return self.last(x.mean((2, 3)))


def _compiled(
    net: nn.Module, shape: Sequence[int], dynamic: Mapping[int, str] | None = None
) -> tuple[netlathe.Compiled, Feeds]:
    torch.manual_seed(0)
    (name,) = inspect.signature(net.forward).parameters
    named = {name: dict(dynamic or {0: "batch"})}
    captured = netlathe.capture(net.eval(), args=(torch.randn(tuple(shape)),), dynamic=named)
    rng = np.random.default_rng(1)
    data = [{name: rng.standard_normal(shape, np.float32)} for _ in range(3)]
    return netlathe.compile(captured, INTEGER, calibration=data), data[0]


@pytest.fixture(scope="module")
def small() -> tuple[netlathe.Compiled, Feeds]:
    torch.manual_seed(0)
    compiled, feeds = _compiled(Net(), (2, 3, 9, 9))
    return compiled, {"x": feeds["x"][:1]}


def _artifact(compiled: netlathe.Compiled, host: str = hosts.REFERENCE) -> FpgaArtifact:
    return FpgaArtifact(compiled.model.clone(), BOARD, host)


# -- on the core itself -------------------------------------------------------------------------------


def test_a_whole_network_runs_on_the_simulated_core(
    small: tuple[netlathe.Compiled, Feeds],
) -> None:
    compiled, feeds = small
    made = _artifact(compiled)
    expected = ort.run(compiled.model, feeds)
    for name, array in made.run(feeds, rtl=True).items():
        np.testing.assert_array_equal(array, expected[name])
    (ran,) = made.report()["rtl"]
    assert ran["layers"] == [operation.name for operation in made.network.found]
    # The last beat is sent where the model says; some cycles later the core says that it is idle.
    said = sum(layer["cycles"] for layer in made.network.reports(BOARD.memory))
    assert said <= ran["cycles"] <= said + 64


def test_single_layers_run_on_the_simulated_core(small: tuple[netlathe.Compiled, Feeds]) -> None:
    compiled, feeds = small
    made = _artifact(compiled)
    names = [operation.name for operation in made.network.found]
    expected = ort.run(compiled.model, feeds)
    for name, array in made.run(feeds, rtl=[names[1], names[-1]]).items():
        np.testing.assert_array_equal(array, expected[name])
    assert [ran["layers"] for ran in made.report()["rtl"]] == [[names[1]], [names[-1]]]
    made.run(feeds)
    assert made.report()["rtl"] == []


def test_a_core_that_differs_from_its_model_is_an_error(
    small: tuple[netlathe.Compiled, Feeds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a cycle, and by a bit."""
    compiled, feeds = small
    made = _artifact(compiled)

    def late(program: Sequence[Instruction], spec: Spec, memory: Memory) -> list[Timing]:
        times = model.cycles(program, spec, memory)
        last = next(n for n in reversed(range(len(program))) if program[n].unit == "store")
        return [replace(t, done=t.done + (n == last)) for n, t in enumerate(times)]

    with monkeypatch.context() as patched:
        patched.setattr(agreement, "cycles", late)
        with pytest.raises(VerifyError, match=r"instruction \d+ \(store\) is in cycle \d+ on"):
            made.run(feeds, rtl=True)

    def flipped(*arguments: object, **options: object) -> simulate.Run:
        ran = run(*arguments, **options)  # type: ignore[arg-type]
        ran.memory[-1] ^= 1
        return ran

    run = simulate.run
    monkeypatch.setattr(simulate, "run", flipped)
    with pytest.raises(VerifyError, match=r"byte \d+ of memory, the first of 1 that differ"):
        made.run(feeds, rtl=True)


def test_layers_that_are_not_there_are_refused(small: tuple[netlathe.Compiled, Feeds]) -> None:
    compiled, feeds = small
    made = _artifact(compiled)
    name = made.network.found[0].name
    with pytest.raises(InputError, match=f"the core has no layer '{name}x'") as caught:
        made.run(feeds, rtl=[name + "x"])
    assert name in (caught.value.diagnostics[0].help or "")
    with pytest.raises(InputError, match="nothing runs there"):
        made.run(feeds, vcd="waves")
    with pytest.raises(InputError, match="input 'x' is missing"):
        made.run({})


@pytest.mark.slow
def test_waves_are_written_for_every_launch(
    small: tuple[netlathe.Compiled, Feeds], tmp_path: Path
) -> None:
    compiled, feeds = small
    made = _artifact(compiled)
    names = [operation.name for operation in made.network.found[:2]]
    made.run(feeds, rtl=names, vcd=tmp_path / "waves")
    files = sorted(file.name for file in (tmp_path / "waves").iterdir())
    assert files == ["launch-0.vcd", "launch-1.vcd"]
    assert [Path(ran["waves"]).name for ran in made.report()["rtl"]] == files
    for file in files:
        text = (tmp_path / "waves" / file).read_text()
        assert "$enddefinitions $end" in text and text.count("\n#") > 100


# -- the host -----------------------------------------------------------------------------------------


def test_feeds_that_do_not_fit_are_refused(small: tuple[netlathe.Compiled, Feeds]) -> None:
    compiled, feeds = small
    made = _artifact(compiled)
    for wrong, words in (
        (feeds["x"].astype(np.float64), "input 'x' is float64, not float32"),
        (feeds["x"][..., :-1], "axis 3 of input 'x' is 8, not 9"),
        (feeds["x"][:0], "has no row to compute"),
    ):
        with pytest.raises(InputError, match=words):
            made.run({"x": wrong})


def test_hosts_are_named(small: tuple[netlathe.Compiled, Feeds]) -> None:
    with pytest.raises(OptionError, match="there is no host 'tvm-x68'") as caught:
        _artifact(small[0], "tvm-x68")
    assert "tvm-x86" in (caught.value.diagnostics[0].help or "")


def test_without_tvm_the_host_says_what_to_install(
    small: tuple[netlathe.Compiled, Feeds], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled, feeds = small
    version = metadata.version

    def lacking(name: str) -> str:
        if name.startswith("apache-tvm"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(toolchain.metadata, "version", lacking)
    target, *_ = backend.FpgaBackend.targets()
    words = r"the host's part of an FPGA target needs the 'tvm' extra \(apache-tvm is not installed"
    with pytest.raises(MissingExtraError, match=words) as caught:
        backend.FpgaBackend().check(target)
    help_ = caught.value.diagnostics[0].help or ""
    assert "pip install 'netlathe[tvm]'" in help_ and "--set host=onnxruntime" in help_
    chosen = replace(target, settings={"host": hosts.REFERENCE})
    made = backend.FpgaBackend().compile(compiled.model, chosen)
    made.save(tmp_path)
    loaded = artifact.load(tmp_path)
    assert loaded.report()["host"] == hosts.REFERENCE and not list(tmp_path.glob("host-*"))
    for name, array in ort.run(compiled.model, feeds).items():
        np.testing.assert_array_equal(loaded.run(feeds)[name], array)
    loaded.network.host = hosts.Saved(hosts.X86, tmp_path)
    with pytest.raises(MissingExtraError, match=words):
        loaded.run(feeds)


def test_the_host_s_code_is_checked_part_by_part(
    small: tuple[netlathe.Compiled, Feeds], tmp_path: Path
) -> None:
    compiled, feeds = small
    made = _artifact(compiled, hosts.X86)
    code = made.network.host
    assert isinstance(code, hosts.Compiled)
    code.save(tmp_path)
    made.network.host = hosts.Reference(made.network.hosted)
    made.network.run(feeds)
    calls = made.network.last.host
    assert code.check(tmp_path, calls)["codes_a_step_apart"] == 0
    number, given, right = calls[-1]
    ((name, array),) = right.items()
    assert array.dtype == np.float32
    wrong = {name: array + np.float32(0.01) * np.abs(array).max()}
    with pytest.raises(VerifyError, match=f"'{name}', made by part {number} on tvm-x86, is off by"):
        code.check(tmp_path, [(number, given, wrong)])
    (tmp_path / f"host-{number}" / "model.so").write_bytes(b"")
    with pytest.raises(InputError, match=f"part {number} of the host, for tvm-x86"):
        hosts.Saved(hosts.X86, tmp_path).run(number, given)


def test_an_arm_core_can_be_the_host(
    small: tuple[netlathe.Compiled, Feeds], tmp_path: Path
) -> None:
    try:
        cross.compiler()
    except LowerError as error:
        pytest.skip(f"nothing was compiled for ARM: {error.diagnostics[0].help}")
    compiled, feeds = small
    made = _artifact(compiled, "arm-cortex-a72")
    made.save(tmp_path)
    assert json.loads((tmp_path / "host-0" / "meta.json").read_text())["architecture"] == "aarch64"
    if lack := made.report()["host_parts"].get("not_run"):
        assert "the code is for aarch64" in lack
        with pytest.raises(LowerError, match="the code is for aarch64"):
            made.run(feeds)
    exact = artifact.load(tmp_path, host=hosts.REFERENCE)
    for name, array in ort.run(compiled.model, feeds).items():
        np.testing.assert_array_equal(exact.run(feeds)[name], array)


def test_what_the_host_cannot_do_is_listed(small: tuple[netlathe.Compiled, Feeds]) -> None:
    model_ = small[0].model.clone()
    output = model_.graph.outputs[0]
    for kind in ("Scramble", "Stir"):
        node = ir.node(kind, [output], domain="com.example", outputs=[ir.Value(name=kind)])
        node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
        model_.graph.append(node)
        model_.graph.outputs.append(node.outputs[0])
    model_.opset_imports["com.example"] = 1
    target, *_ = backend.FpgaBackend.targets()
    lacks = backend.FpgaBackend().unsupported(model_, target)
    assert [kind for lack in lacks for kind in ("Scramble", "Stir") if kind in str(lack)] == [
        "Scramble",
        "Stir",
    ]
    with pytest.raises(LowerError, match="Scramble"):
        backend.FpgaBackend().compile(model_, target)


def test_sizes_that_only_the_core_knows_get_a_name(tmp_path: Path) -> None:
    """The mean over an image of any size is the host's, behind a convolution that halves the image."""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).relu().mean((2, 3)))

    compiled, _ = _compiled(Halved(), (2, 3, 9, 9), {0: "batch", 2: "height", 3: "width"})
    made = _artifact(compiled, hosts.X86)
    for shape in ((1, 3, 9, 9), (2, 3, 8, 13)):
        feeds = {"x": np.random.default_rng(3).standard_normal(shape, np.float32)}
        for name, array in ort.run(compiled.model, feeds).items():
            np.testing.assert_array_equal(made.run(feeds)[name], array)


# -- bad input ----------------------------------------------------------------------------------------


def _linear(net: nn.Linear) -> netlathe.Compiled:
    return _compiled(net, (4, net.in_features))[0]


def test_a_layer_beyond_the_scratchpads_is_refused_with_the_numbers() -> None:
    compiled = _linear(nn.Linear(40_000, 8))
    target, *_ = backend.FpgaBackend.targets()
    (lack,) = backend.FpgaBackend().unsupported(compiled.model, target)
    assert "take 40000 bytes; half of the input scratchpad is 32768" in lack.message
    with pytest.raises(LowerError, match="take 40000 bytes"):
        backend.FpgaBackend().compile(compiled.model, target)


def test_a_layer_beyond_half_of_the_weights_is_split() -> None:
    """4,400 inputs: 550 rows of weights a vector of outputs; 512 fit at once."""
    compiled, feeds = _compiled(nn.Linear(4400, 16), (3, 4400))
    made = _artifact(compiled)
    for name, array in ort.run(compiled.model, feeds).items():
        np.testing.assert_array_equal(made.run(feeds)[name], array)
    (launch,) = made.network.launches.values()
    assert sum(i.unit == "compute" and i["accumulate"] == 1 for i in launch.program) > 0


def test_sums_beyond_32_bits_are_refused_before_any_run() -> None:
    compiled = _linear(nn.Linear(64, 16))
    (bias,) = (n for n in compiled.model.graph if n.op_type == "Add")
    held = bias.inputs[1]
    assert held is not None and held.const_value is not None
    large = np.full(held.const_value.numpy().shape, 2**31 - 1000, np.int32)
    held.const_value = ir.tensor(large, name=held.name)
    target, *_ = backend.FpgaBackend.targets()
    with pytest.raises(LowerError, match=r"sum of output channel \d+ can reach \d+, beyond 32"):
        backend.FpgaBackend().compile(compiled.model, target)


def _pruned(kept: int, group: int) -> netlathe.Compiled:
    torch.manual_seed(0)
    net = nn.Linear(64, 16)
    keep = torch.zeros(16, 64 // group, group)
    keep[..., :kept] = 1
    with torch.no_grad():
        net.weight *= keep.reshape(16, 64)
    return _linear(net)


@pytest.mark.parametrize(
    ("kept", "group", "advice"),
    [(4, 8, "patterns=4:8"), (6, 16, "sparsify(pattern='2:4')"), (3, 8, "patterns=4:8")],
)
def test_patterns_that_the_core_lacks_are_refused(kept: int, group: int, advice: str) -> None:
    compiled = _pruned(kept, group)
    target, *_ = backend.FpgaBackend.targets()
    (lack,) = backend.FpgaBackend().unsupported(compiled.model, target)
    assert f"its weights are {kept}:{group}, and this core has 2:4" in lack.message
    assert advice in (lack.help or "")
    # As advised: a core that has it, or one without patterns, which is as large as for dense weights.
    for patterns in ("4:8", "none") if "patterns=4:8" in advice else ("none",):
        chosen = replace(target, settings={"patterns": patterns, "host": hosts.REFERENCE})
        made = backend.FpgaBackend().compile(compiled.model, chosen)
        name = made.network.model.graph.inputs[0].name or ""
        feeds = {name: np.random.default_rng(2).standard_normal((4, 64), np.float32)}
        for output, array in ort.run(compiled.model, feeds).items():
            np.testing.assert_array_equal(made.run(feeds)[output], array)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patterns": "3:7"}, "known patterns: 2:4, 4:8, 1:4"),
        ({"lengths": "1, many"}, "'many' in setting lengths is no row count"),
        ({"lengths": "0"}, "'0' in setting lengths is no row count"),
        ({"hosts": "tvm-x86"}, "no setting hosts"),
        ({"host": 4}, "setting host must be text"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], words: str) -> None:
    target, *_ = backend.FpgaBackend.targets()
    with pytest.raises(OptionError) as caught:
        backend.FpgaBackend().check(replace(target, settings=settings))
    assert words in str(caught.value)
