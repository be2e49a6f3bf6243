"""Whole networks: the core's share found, run, written and read back; equal to ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import netlathe
from benchmarks import bench_fpga
from netlathe.backends.fpga import artifact
from netlathe.backends.fpga.backend import FpgaBackend
from netlathe.backends.fpga.model import Memory
from netlathe.backends.fpga.network import Network, Rtl
from netlathe.backends.fpga.recognise import Pool, Product, Sum
from netlathe.backends.fpga.spec import Spec
from netlathe.cli import main
from netlathe.diagnostics import InputError, LowerError
from netlathe.execute import ort
from netlathe.pipeline.pass_ import Feeds

PASSES = "fold_batch_norm, quantize(activations='int8', min_size=0)"


class Cnn(nn.Module):
    """Convolutions, a depthwise one, a residual sum, a maximum and a mean of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.second = nn.Conv2d(16, 16, 1)
        self.third = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ten numbers for an image."""
        x = self.norm(self.first(x)).relu()
        x = (x + self.second(self.depth(x).relu())).relu()
        x = self.pool(self.third(x).relu())
        return self.last(self.mean(x).flatten(1))


class Mlp(nn.Module):
    """A GELU between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 48), nn.Linear(48, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, 20] to the same."""
        return x + self.down(nn.functional.gelu(self.up(x)))


NETS = {"cnn": (Cnn, (2, 3, 12, 12)), "mlp": (Mlp, (2, 7, 20))}


def _quantized(name: str) -> tuple[netlathe.Compiled, Feeds]:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, *shape[1:]))  # moments of the batch norm
    dynamic = {"x": {0: "batch"}}
    captured = netlathe.capture(net.eval(), args=(torch.randn(shape),), dynamic=dynamic)
    rng = np.random.default_rng(1)
    data = [{"x": rng.standard_normal(shape, np.float32)} for _ in range(4)]
    passes = PASSES if name == "cnn" else PASSES.partition(", ")[2]
    return netlathe.compile(captured, passes, calibration=data), data[0]


@pytest.mark.parametrize("name", NETS)
def test_networks_are_equal_to_the_graph(name: str) -> None:
    compiled, feeds = _quantized(name)
    network = Network(compiled.model, Spec())
    expected = ort.run(compiled.model, feeds)
    for hardware in (False, True):
        got = network.run(feeds, Rtl(hardware))
        for output, array in expected.items():
            np.testing.assert_array_equal(got[output], array)


def test_the_core_takes_what_it_can_of_an_image_network() -> None:
    compiled, feeds = _quantized("cnn")
    network = Network(compiled.model, Spec())
    kinds = [type(operation) for operation in network.found]
    assert kinds.count(Product) == 5 and kinds.count(Sum) == 1 and kinds.count(Pool) == 2
    network.run(feeds)
    layers = network.reports(Memory())
    assert len(layers) == 2 * 8  # two images, a Flatten costs nothing
    by_name = {layer["layer"]: layer for layer in layers}
    macs = {layer["macs"] for layer in by_name.values()}
    assert {144 * 3 * 9 * 16, 144 * 9 * 16, 144 * 16 * 16, 36 * 16 * 9 * 24, 240} <= macs
    assert all(0 < layer["utilization"] <= 1 for layer in layers)
    # Every byte of weights is read, and every byte of output written, at least once.
    (last,) = (layer for layer in layers[:8] if layer["macs"] == 240)
    assert last["bytes_read"] >= 240 and last["bytes_written"] == 4 * 16  # 32-bit sums


def test_results_stay_on_the_chip_where_they_can() -> None:
    """Pixelwise layers and a sum: what lies between them is neither stored nor read."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 32, 1)
            self.down, self.last = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            return self.last(x + self.down(self.up(x).relu()))

    torch.manual_seed(0)
    shape = (1, 16, 6, 6)
    captured = netlathe.capture(Net().eval(), args=(torch.randn(shape),))
    data = [{"x": np.random.default_rng(1).standard_normal(shape, np.float32)}]
    compiled = netlathe.compile(captured, PASSES.partition(", ")[2], calibration=data)
    network = Network(compiled.model, Spec())
    expected = ort.run(compiled.model, data[0])
    for hardware in (False, True):
        for name, array in network.run(data[0], Rtl(hardware)).items():
            np.testing.assert_array_equal(array, expected[name])
    layers = network.reports(Memory())
    assert len(layers) == 5
    assert layers[0]["bytes_read"] >= 36 * 16
    # Weights and parameters (8 bytes a channel), once a tile, and nothing else.
    for layer, (inputs, outputs) in zip(layers[1:3], ((16, 32), (32, 16)), strict=True):
        assert layer["bytes_read"] % (inputs * outputs + 8 * outputs) == 0
    assert layers[3]["bytes_read"] == 8 * 8, "one setting for all columns"
    assert layers[4]["bytes_read"] % (16 * 8 + 8 * 8) == 0
    assert not any(layer["bytes_written"] for layer in layers[:-1])
    assert layers[-1]["bytes_written"] == 36 * 8 * 4, "32-bit sums"


def test_a_sum_that_stays_on_the_chip_leaves_gaps_between_pixels() -> None:
    """24 channels are three vectors of every four: the sum has to be written as products read it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 1)
            self.last = nn.Conv2d(24, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(x + self.second(x))

    torch.manual_seed(0)
    shape = (1, 8, 17, 19)  # more vectors than fit half of the sums
    captured = netlathe.capture(Net().eval(), args=(torch.randn(shape),))
    data = [{"x": np.random.default_rng(1).standard_normal(shape, np.float32)}]
    compiled = netlathe.compile(captured, PASSES.partition(", ")[2], calibration=data)
    network = Network(compiled.model, Spec())
    expected = ort.run(compiled.model, data[0])
    for hardware in (False, True):
        for name, array in network.run(data[0], Rtl(hardware)).items():
            np.testing.assert_array_equal(array, expected[name])
    (added,) = (layer for layer in network.reports(Memory()) if layer["macs"] == 2 * 17 * 19 * 24)
    assert added["bytes_written"] == 0


def test_pruned_weights_take_less_time() -> None:
    torch.manual_seed(0)
    net = nn.Linear(256, 64)
    keep = torch.zeros(64, 64, 4)
    keep[..., :2] = 1
    with torch.no_grad():
        net.weight *= keep.reshape(64, 256)
    captured = netlathe.capture(net, args=(torch.randn(64, 256),))
    data = [{"input": np.random.default_rng(1).standard_normal((64, 256), np.float32)}]
    compiled = netlathe.compile(captured, PASSES.partition(", ")[2], calibration=data)
    cycles = []
    for patterns in ((), ("2:4",)):
        network = Network(compiled.model, Spec(patterns=patterns))
        got = network.run(data[0])
        np.testing.assert_array_equal(got["output"], ort.run(compiled.model, data[0])["output"])
        cycles.append(sum(layer["cycles"] for layer in network.reports(Memory())))
    assert cycles[0] > 1.4 * cycles[1]


@pytest.mark.slow
def test_two_of_four_are_as_right_as_the_masked_network(tmp_path: Path) -> None:
    """Trained on digits: the core's bits are the graph's, and as many images right as in floats."""
    torch.manual_seed(0)
    case = bench_fpga.mlp(tmp_path)
    captured, feeds = netlathe.capture(case.model), case.feeds[""]
    masked = ort.run(netlathe.compile(captured, "sparsify(pattern='2:4')").model, feeds)
    passes = "sparsify(pattern='2:4'), quantize(activations='int8', min_size=0)"
    model = netlathe.compile(captured, passes, calibration=[case.data]).model
    network = Network(model, Spec())
    ((name, got),) = network.run(feeds).items()
    np.testing.assert_array_equal(got, ort.run(model, feeds)[name])
    assert np.linalg.norm(got - masked[name]) <= 0.01 * np.linalg.norm(masked[name])
    right, right_masked = (
        (logits.argmax(1) == case.labels).mean() for logits in (got, masked[name])
    )
    assert right_masked > 0.9 and abs(right - right_masked) <= 0.01
    assert all(layer["utilization"] > 1 for layer in network.reports(Memory()))  # by the pattern


def test_int4_weights_take_half_the_time() -> None:
    """As `quantize` writes them: two products in a multiplier, the same bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 40))
    captured = netlathe.capture(net, args=(torch.randn(96, 256),))
    data = [{"input": np.random.default_rng(1).standard_normal((96, 256), np.float32)}]
    passes = "quantize(weights='int4', activations='int8', min_size=0)"
    model = netlathe.compile(captured, passes, calibration=data).model
    expected = ort.run(model, data[0])
    cycles = []
    for pairs in (False, True):
        network = Network(model, Spec(pairs=pairs))
        np.testing.assert_array_equal(network.run(data[0])["output"], expected["output"])
        layers = network.reports(Memory())
        assert [layer["pairs"] for layer in layers] == [pairs] * 2
        assert (layers[0]["utilization"] > 1) == pairs
        cycles.append(sum(layer["cycles"] for layer in layers))
    assert cycles[0] > 1.7 * cycles[1]
    got = network.run(data[0], Rtl(layers=True))
    np.testing.assert_array_equal(got["output"], expected["output"])


def test_an_artifact_is_written_and_read_back(tmp_path: Path) -> None:
    compiled, feeds = _quantized("cnn")
    compiled.save(tmp_path / "out", target="fpga-ecp5-85f")
    folder = tmp_path / "out"
    held = json.loads((folder / "meta.json").read_text())
    assert held["error"] == 0 and held["cycles"] == sum(layer["cycles"] for layer in held["layers"])
    programs = sorted(folder.glob("launch-*.program"))
    assert len(programs) == len(held["launches"]) > 0
    assert sum(p.stat().st_size for p in programs) == held["instruction_bytes"]
    assert "module core" in (folder / "core.v").read_text()
    assert held["host"] == "tvm-x86" and held["host_parts"]["codes_a_step_apart"] == 0
    expected = ort.run(compiled.model, feeds)
    for host in (None, "onnxruntime"):
        loaded = artifact.load(str(folder), host=host)
        assert loaded.report()["host"] == (host or "tvm-x86")
        for name, array in loaded.run(feeds).items():
            np.testing.assert_array_equal(array, expected[name])
    with pytest.raises(InputError, match="its host is tvm-x86, and 'arm-cortex-a72' was asked for"):
        artifact.load(folder, host="arm-cortex-a72")


def test_a_float_model_is_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mlp.onnx"
    torch.onnx.export(Mlp(), (torch.randn(1, 7, 20),), file, dynamo=True, verbose=False)
    out = tmp_path / "out"
    words = ["compile", str(file), "--passes", "", "--target", "fpga-ecp5-85f", "-o", str(out)]
    assert main(words) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no product of the model is in integers" in said
    assert "quantize(activations='int8')" in said and not out.exists()


def test_files_that_are_no_artifact_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no artifact of an FPGA target"):
        artifact.load(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": 99}')
    ir.save(_quantized("mlp")[0].model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="format 99, and 4 is known"):
        artifact.load(tmp_path)


def test_compile_refuses_what_unsupported_lists() -> None:
    captured = netlathe.capture(Mlp().eval(), args=(torch.randn(2, 7, 20),))
    target, *_ = FpgaBackend.targets()
    (gap,) = FpgaBackend().unsupported(captured.model, target)
    with pytest.raises(LowerError, match=gap.message):
        FpgaBackend().compile(captured.model, target)
