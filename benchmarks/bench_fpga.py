"""Whole networks on the FPGA overlay: what runs there, how long, and whether the numbers are the graph's.

    python benchmarks/bench_fpga.py [--networks mlp,cnn,mobilenet_v2,resnet18,minilm,llama]
    python benchmarks/bench_fpga.py --weights int4   # all but the first and the last layer; --correct-bias
    python benchmarks/bench_fpga.py --layers         # single layers
    python benchmarks/bench_fpga.py --lengths        # the LLaMA's instructions, shared between lengths

Each network goes through the shell: ``netlathe compile MODEL --passes ... --target fpga-ecp5-85f -o OUT``,
its host in TVM's code, and what was written is loaded and run. MLP and CNN are trained for seconds on
scikit-learn's digits (8 x 8 pixels); MiniLM has its own weights; MobileNetV2, ResNet-18 (both at 96 x 96)
and the LLaMA (12 layers, 384 wide, 6 heads over 2) have their published structure and weights drawn from a
seed. MiniLM takes 32 tokens, the LLaMA 32 tokens and then one token behind 32 in its cache.

Outputs are compared with ONNX Runtime on the integer graph, its optimizations off: with ONNX Runtime as the
host bit for bit (``difference``). TVM's code adds floats in another order: what that does to the outputs of
the host's parts is checked when they are written; of the whole, ``loss`` is the distance from the network
before quantization, as a share of its norm, and ``loss_tvm`` the same with TVM's code. ``steps`` is the
largest difference from the same network with float scales (``activation_form='qdq'``), in steps of an int8
over the range of the output, and ``loss_float_scales`` that network's own distance: below 8 bits its weights
have scales of either sign, so their codes differ and only the distances compare. Cycles are the core's, with
a memory of one beat of 8 bytes a cycle; the host's parts are not in them. A line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from sklearn.datasets import load_digits
from torch import nn

import netlathe
from netlathe.backends.fpga import artifact
from netlathe.backends.fpga.artifact import FpgaArtifact
from netlathe.backends.fpga.layers import Builder
from netlathe.backends.fpga.model import Memory, cycles
from netlathe.backends.fpga.network import Network
from netlathe.backends.fpga.program import link
from netlathe.backends.fpga.spec import PATTERNS, Spec
from netlathe.backends.fpga.tensors import Scale, Window
from netlathe.cli import main as shell
from netlathe.execute import ort
from tests import zoo
from tests.zoo import Recipe, hf

Feeds = dict[str, npt.NDArray[Any]]
TARGET = "fpga-ecp5-85f"
LLAMA = {
    "num_hidden_layers": 12, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What the shell is given, and what the artifact is run with."""

    model: Path
    before: str  # passes in front of quantize
    data: Feeds  # calibration; the first axis counts samples
    feeds: Mapping[str, Feeds]  # runs by name; "" if there is one
    options: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()  # modules whose weights stay int8: the first and the last layer
    labels: npt.NDArray[Any] | None = None  # of the first run


@dataclass
class Found:
    """One network, compiled and run: the numbers, and what they come from."""

    numbers: list[dict[str, Any]]
    artifact: FpgaArtifact
    case: Case = field(repr=False)


# -- networks -----------------------------------------------------------------------------------------


def _digits(net: nn.Sequential, shape: tuple[int, ...], folder: Path) -> Case:
    """Trained on four fifths of the images, run on the rest."""
    found: Any = load_digits()
    images = (found.data / 16).astype(np.float32).reshape(-1, *shape)
    train, test = slice(0, 1437), slice(1437, None)
    x, y = torch.from_numpy(images[train]), torch.from_numpy(found.target[train]).long()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    batches = torch.Generator().manual_seed(0)
    for _ in range(400):
        chosen = torch.randint(len(x), (256,), generator=batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    model = _written(net, {"input": images[:2]}, folder)
    run = {"": {"input": images[test]}}
    wide = ("0", str(len(net) - 1))
    return Case(model, "", {"input": images[:256]}, run, wide=wide, labels=found.target[test])


def _written(module: nn.Module, sample: Feeds, folder: Path) -> Path:
    """The module as an ONNX file whose batch is free."""
    captured = netlathe.capture(
        module.eval(),
        kwargs={name: torch.from_numpy(array) for name, array in sample.items()},
        dynamic={name: {0: "batch"} for name in sample},
    )
    ir.save(captured.model, folder / "model.onnx")
    return folder / "model.onnx"


def mlp(folder: Path) -> Case:
    """64 - 256 - 256 - 10."""
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    return _digits(net, (64,), folder)


def cnn(folder: Path) -> Case:
    """Three convolutions."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return _digits(net, (1, 8, 8), folder)


def _photos(name: str, recipe: Recipe, first: str, folder: Path) -> Case:
    noise = np.random.default_rng(0).standard_normal((8, 3, 96, 96), np.float32)
    model = _written(zoo.made(name, recipe).module, {"pixel_values": noise[:2]}, folder)
    data, run = {"pixel_values": noise}, {"": {"pixel_values": noise[:1]}}
    return Case(model, "fold_batch_norm, ", data, run, wide=(first, "classifier"))


def mobilenet_v2(folder: Path) -> Case:
    """At 96 x 96."""
    make = hf("MobileNetV2", "ForImageClassification", image_size=96, tf_padding=False)
    calmed = ("reduce_1x1.normalization", 0.5)
    recipe = Recipe(make, "image", ("logits",), (), {"side": 96}, calmed=calmed)
    return _photos("mobilenet_v2", recipe, "mobilenet_v2.conv_stem.first_conv", folder)


def resnet18(folder: Path) -> Case:
    """At 96 x 96."""
    make = hf(
        "ResNet", "ForImageClassification", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512],
        layer_type="basic", num_labels=1000,
    )  # fmt: skip
    recipe = Recipe(make, "image", ("logits",), (), {"side": 96})
    return _photos("resnet18", recipe, "resnet.embedder", folder)


def minilm(folder: Path) -> Case:
    """The real one, 32 tokens."""
    rng = np.random.default_rng(0)
    data: Feeds = {
        "input_ids": rng.integers(1000, 20000, (4, 32)),
        "attention_mask": np.ones((4, 32), np.int64),
    }
    run = {name: array[:1] for name, array in data.items()}
    return Case(zoo.minilm_folder(), "fold_norms, ", data, {"": run})


def llama(folder: Path, settings: Mapping[str, int] = LLAMA) -> Case:
    """32 tokens, and one behind 32 in the cache."""
    rng = np.random.default_rng(0)
    recipe = Recipe(hf("Llama", "ForCausalLM", None, **settings), "text", ("logits",), ())
    zoo.made("llama", recipe).module.save_pretrained(folder)  # type: ignore[operator]
    head = settings["hidden_size"] // settings["num_attention_heads"]

    def feeds(samples: int, count: int, before: int) -> Feeds:
        found: Feeds = {
            "input_ids": rng.integers(3, settings["vocab_size"], (samples, count)),
            "attention_mask": np.ones((samples, count + before), np.int64),
        }
        shape = (samples, settings["num_key_value_heads"], before, head)
        for layer in range(settings["num_hidden_layers"]):
            for kind in ("key", "value"):
                found[f"past_key_values.{layer}.{kind}"] = rng.standard_normal(shape, np.float32)
        return found

    runs = {"prefill": feeds(1, 32, 0), "decode": feeds(1, 1, 32)}
    options = ("--kv-cache",)
    return Case(folder, "fold_norms, ", feeds(3, 16, 8), runs, options, wide=("lm_head",))


NETWORKS: dict[str, Callable[[Path], Case]] = {
    "mlp": mlp,
    "cnn": cnn,
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "minilm": minilm,
    "llama": llama,
}


# -- measuring ----------------------------------------------------------------------------------------


def measured(name: str, folder: Path, weights: str = "int8", correct_bias: bool = False) -> Found:
    """Compile from the shell in ``folder``, load, run: see the first lines of this file.

    ``weights`` is the format of all but the first and the last layer.
    """
    torch.manual_seed(0)
    source, out, data = folder / "source", folder / "out", folder / "data.npz"
    source.mkdir()
    case = NETWORKS[name](source)
    np.savez(data, allow_pickle=False, **case.data)
    passes = f"{case.before}quantize(activations='int8', min_size=0)"
    if weights != "int8":
        wide = ", ".join(f"'{module}': {{'weights': 'int8'}}" for module in case.wide)
        narrow = f"weights='{weights}', clip='mse', overrides={{{wide}}}"
        passes = passes.replace("min_size=0", f"min_size=0, {narrow}")
    if correct_bias:
        passes = passes.replace("min_size=0", "min_size=0, correct_bias=True")
    words = ["compile", str(case.model), "--passes", passes, "--calibration", str(data)]
    words += ["--target", TARGET, "-o", str(out), "--no-cache", *case.options]
    if (code := shell(words)) != 0:
        raise SystemExit(f"netlathe {' '.join(words)} ended with exit code {code}")
    settings: dict[str, Any] = {"cache": True} if "--kv-cache" in case.options else {}
    float_scales = netlathe.compile(
        netlathe.capture(case.model, **settings),
        passes.replace("activations='int8'", "activations='int8', activation_form='qdq'"),
        calibration=[case.data],
    )
    exact, usual = artifact.load(out, host="onnxruntime"), artifact.load(out)
    numbers = []
    for run, feeds in case.feeds.items():
        found = _run(exact, feeds)
        expected = ort.run(exact.network.model, feeds)
        got, hosted = found.pop("outputs"), usual.run(feeds)
        other = ort.run(float_scales.model, feeds)
        dense = ort.run(float_scales.dense, feeds)
        numbers.append(
            {
                "network": " ".join((name, run)).strip(),
                "weights": weights,
                **found,
                "difference": max(float(np.abs(got[k] - expected[k]).max()) for k in expected),
                "difference_tvm": max(
                    float(np.abs(hosted[k] - expected[k]).max()) for k in expected
                ),
                "loss": max(_distance(got[k], dense[k]) for k in expected),
                "loss_tvm": max(_distance(hosted[k], dense[k]) for k in expected),
                "loss_float_scales": max(_distance(other[k], dense[k]) for k in expected),
                "steps": max(_steps(got[k], other[k]) for k in expected),
            }
        )
        if case.labels is not None:
            (logits,), (float_logits,) = got.values(), other.values()
            numbers[-1]["accuracy"] = float((logits.argmax(1) == case.labels).mean())
            numbers[-1]["accuracy_float_scales"] = float(
                (float_logits.argmax(1) == case.labels).mean()
            )
    return Found(numbers, usual, case)


def _run(made: FpgaArtifact, feeds: Feeds) -> dict[str, Any]:
    made.run(feeds)  # programs are made
    start = time.perf_counter()
    outputs = made.run(feeds)
    seconds = time.perf_counter() - start
    layers = made.network.reports(Memory())
    taken, macs = (sum(one[key] for one in layers) for key in ("cycles", "macs"))
    samples = next(iter(feeds.values())).shape[0]
    return {
        **made.network.shares(),
        "cycles": taken / samples,
        "utilization": macs / taken / 64,
        "macs_by_pairs": sum(one["macs"] for one in layers if one["pairs"]) / macs,
        "bytes": sum(one["bytes_read"] + one["bytes_written"] for one in layers) / samples,
        "energy_proxy_uj": sum(one["energy_proxy_uj"] for one in layers) / samples,
        "seconds": seconds / samples,
        "outputs": outputs,
    }


def _distance(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _steps(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.abs(got - expected).max()) / (float(np.ptp(expected)) / 255)


# Name, size, inputs, outputs, pixels of the kernel's side, groups.
LAYERS = (
    ("128 x 256 x 128", (1, 128), 256, 128, 1, 1),
    ("256 x 1024 x 256", (1, 256), 1024, 256, 1, 1),
    ("3x3, 64 to 64 channels, 56 x 56", (56, 56), 64, 64, 3, 1),
    ("3x3, 256 to 256 channels, 14 x 14", (14, 14), 256, 256, 3, 1),
    ("depthwise 3x3, 64 channels, 56 x 56", (56, 56), 64, 64, 3, 64),
    ("1 x 4096 x 4096", (1, 1), 4096, 4096, 1, 1),
)


def layer(
    size: tuple[int, int], inputs: int, outputs: int, side: int, groups: int, kind: str
) -> int:
    """Cycles of one layer alone, its first load to its last beat; ``kind``: int8, int4 or a pattern."""
    spec, builder = Spec(), Builder(Spec())
    pad = side // 2
    window = Window((side, side), pads=(pad, pad, pad, pad))
    weights = np.zeros((outputs, inputs // groups, side, side), np.int8)
    ones = np.ones(outputs, np.int64)
    builder.product(
        "layer", builder.image(*size, inputs), weights, Scale(0 * ones, ones << 15, 20 * ones), window,
        groups=groups, pattern=PATTERNS.get(kind), nibbles=kind == "int4",
    )  # fmt: skip
    return max(when.done for when in cycles(link(builder.steps), spec, Memory()))


def layers() -> None:
    """int8 and int4, and 2:4 where there are no groups."""
    for name, size, inputs, outputs, side, groups in LAYERS:
        macs = size[0] * size[1] * outputs * inputs // groups * side * side
        dense = layer(size, inputs, outputs, side, groups, "int8")
        found = {"layer": name, "cycles": dense, "macs_a_cycle": macs / dense}
        for kind in ("2:4", "int4") if groups == 1 else ("int4",):
            other = layer(size, inputs, outputs, side, groups, kind)
            found |= {f"cycles_{kind}": other, f"faster_{kind}": dense / other}
        print(json.dumps(found), flush=True)


LENGTHS = (1, 16, 32, 64, 96, 128)


def lengths(folder: Path) -> None:
    """Bytes of the LLaMA's instructions, shared between lengths, and cycles with and without."""
    case = llama(folder)
    captured = netlathe.capture(case.model, cache=True)
    passes = f"{case.before}quantize(activations='int8', min_size=0)"
    model = netlathe.compile(captured, passes, calibration=[case.data]).model
    plain, shared = Network(model, Spec()), Network(model, Spec(), LENGTHS)
    shared.prepare()
    templates = [one for found in shared.templates.values() for one in found]
    together, apart = sum(one.bytes for one in templates), sum(one.bytes_apart for one in templates)
    covered = [
        rows
        for rows in range(1, LENGTHS[-1] + 1)
        if all(any(t.low <= rows <= t.high for t in found) for found in shared.templates.values())
    ]
    print(json.dumps({"templates": len(templates), "bytes": together, "bytes_apart": apart}))
    print(json.dumps({"lengths_of_all_layers": len(covered), "of": LENGTHS[-1]}))
    for rows in (1, 10, 24, 48, 112):
        feeds = dict(case.feeds["prefill"])
        feeds["input_ids"] = np.ones((1, rows), np.int64)
        feeds["attention_mask"] = np.ones((1, rows), np.int64)
        taken = []
        for network in (plain, shared):
            network.run(feeds)
            taken.append(sum(one["cycles"] for one in network.reports(Memory())))
        found = {"rows": rows, "cycles_own": taken[0], "cycles_patched": taken[1]}
        print(json.dumps(found), flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--weights", default="int8", help="of all but the first and last layer")
    parser.add_argument("--correct-bias", action="store_true", help="quantize(correct_bias=True)")
    parser.add_argument("--layers", action="store_true", help="single layers instead")
    parser.add_argument("--lengths", action="store_true", help="instructions of the LLaMA instead")
    args = parser.parse_args()
    if args.layers:
        layers()
        return
    if args.lengths:
        with tempfile.TemporaryDirectory() as folder:
            lengths(Path(folder))
        return
    for name in args.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            for numbers in measured(name, Path(folder), args.weights, args.correct_bias).numbers:
                print(json.dumps(numbers), flush=True)


if __name__ == "__main__":
    main()
