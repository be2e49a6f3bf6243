"""Whole networks on the FPGA overlay: what runs there, how long, and whether the numbers are the graph's.

    python benchmarks/bench_fpga.py [--networks mlp,cnn,mobilenet_v2,resnet18,minilm,llama_decode] [--layers]

Networks have their published structure and weights drawn from a seed (MiniLM its own). MobileNetV2 and
ResNet-18 take 96 x 96 images, MiniLM 32 tokens, the LLaMA (12 layers, 384 wide, 6 heads over 2) 32 tokens, or
one behind 32 in its cache. Each is quantized with ``quantize(activations='int8')`` and run on the instruction
set's model; outputs are compared with ONNX Runtime on the same graph, its optimizations off. Cycles are the
core's, with a memory of one beat of 8 bytes a cycle; the host's parts are not in them. A line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import netlathe
from netlathe.backends.fpga.layers import Builder
from netlathe.backends.fpga.model import Memory, cycles
from netlathe.backends.fpga.network import Network
from netlathe.backends.fpga.program import link
from netlathe.backends.fpga.spec import PATTERNS, Spec
from netlathe.backends.fpga.tensors import Scale, Window
from netlathe.execute import ort
from netlathe.pipeline.interfaces import Captured
from tests import zoo
from tests.zoo import Recipe, hf

Feeds = dict[str, npt.NDArray[Any]]
INTEGER = "quantize(activations='int8', min_size=0)"
LLAMA = {
    "num_hidden_layers": 12, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A captured network, its passes, calibration data and what it is run with."""

    captured: Captured
    passes: str
    data: list[Feeds]
    feeds: Feeds


def _images(module: nn.Module, shape: tuple[int, ...], name: str) -> Case:
    rng = np.random.default_rng(0)
    data = [{name: rng.standard_normal((2, *shape), np.float32)} for _ in range(4)]
    dynamic = {name: {0: "batch"}}
    sample = {name: torch.from_numpy(data[0][name])}
    captured = netlathe.capture(module.eval(), kwargs=sample, dynamic=dynamic)
    return Case(captured, f"fold_batch_norm, {INTEGER}", data, {name: data[0][name][:1]})


def mlp() -> Case:
    """64 - 256 - 256 - 10."""
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    return _images(net, (64,), "input")


def cnn() -> Case:
    """Three convolutions over images of 8 x 8 pixels, as the handwritten digits are."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return _images(net, (1, 8, 8), "input")


def mobilenet_v2() -> Case:
    """At 96 x 96."""
    make = hf("MobileNetV2", "ForImageClassification", image_size=96, tf_padding=False)
    calmed = ("reduce_1x1.normalization", 0.5)
    recipe = Recipe(make, "image", ("logits",), (), {"side": 96}, calmed=calmed)
    return _images(zoo.made("mobilenet_v2", recipe).module, (3, 96, 96), "pixel_values")


def resnet18() -> Case:
    """At 96 x 96."""
    make = hf(
        "ResNet", "ForImageClassification", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512],
        layer_type="basic", num_labels=1000,
    )  # fmt: skip
    recipe = Recipe(make, "image", ("logits",), (), {"side": 96})
    return _images(zoo.made("resnet18", recipe).module, (3, 96, 96), "pixel_values")


def minilm() -> Case:
    """The real one, 32 tokens."""
    rng = np.random.default_rng(0)
    model = zoo.build("minilm")
    captured = netlathe.capture(model.module, kwargs=model.kwargs, dynamic=model.dynamic)
    data: list[Feeds] = [
        {
            "input_ids": rng.integers(1000, 20000, (1, 32)),
            "attention_mask": np.ones((1, 32), np.int64),
        }
        for _ in range(4)
    ]
    return Case(captured, f"fold_norms, {INTEGER}", data, data[0])


def llama(new: int, past: int, settings: Mapping[str, int] = LLAMA) -> Case:
    """``new`` tokens behind ``past`` in the cache."""
    rng = np.random.default_rng(0)
    recipe = Recipe(hf("Llama", "ForCausalLM", None, **settings), "text", ("logits",), ())
    with tempfile.TemporaryDirectory() as folder:
        zoo.made("llama", recipe).module.save_pretrained(folder)  # type: ignore[operator]
        captured = netlathe.capture(folder, cache=True)
    head = settings["hidden_size"] // settings["num_attention_heads"]

    def feeds(count: int, before: int) -> Feeds:
        found: Feeds = {}
        for value in captured.model.graph.inputs:
            name = value.name or ""
            if name == "input_ids":
                found[name] = rng.integers(3, settings["vocab_size"], (1, count))
            elif name == "attention_mask":
                found[name] = np.ones((1, count + before), np.int64)
            else:
                shape = (1, settings["num_key_value_heads"], before, head)
                found[name] = rng.standard_normal(shape, np.float32)
        return found

    data = [feeds(16, 8) for _ in range(3)]
    return Case(captured, f"fold_norms, {INTEGER}", data, feeds(new, past))


NETWORKS: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "cnn": cnn,
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "minilm": minilm,
    "llama_prefill": lambda: llama(32, 0),
    "llama_decode": lambda: llama(1, 32),
}


def measured(case: Case) -> dict[str, Any]:
    """Shares, cycles and bytes, and the largest difference from ONNX Runtime."""
    compiled = netlathe.compile(case.captured, case.passes, calibration=case.data)
    network = Network(compiled.model, Spec())
    start = time.perf_counter()
    got = network.run(case.feeds)
    seconds = time.perf_counter() - start
    expected = ort.run(compiled.model, case.feeds)
    reports = network.reports(Memory())
    taken, macs = (sum(one[key] for one in reports) for key in ("cycles", "macs"))
    return {
        **network.shares(),
        "difference": max(float(np.abs(got[k] - expected[k]).max()) for k in expected),
        "cycles": taken,
        "utilization": macs / taken / 64,
        "bytes": sum(one["bytes_read"] + one["bytes_written"] for one in reports),
        "energy_proxy_uj": sum(one["energy_proxy_uj"] for one in reports),
        "seconds": seconds,
    }


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
    size: tuple[int, int], inputs: int, outputs: int, side: int, groups: int, pattern: str
) -> int:
    """Cycles of one layer alone, its first load to its last beat."""
    spec, builder = Spec(), Builder(Spec())
    pad = side // 2
    window = Window((side, side), pads=(pad, pad, pad, pad))
    weights = np.zeros((outputs, inputs // groups, side, side), np.int8)
    ones = np.ones(outputs, np.int64)
    builder.product(
        "layer", builder.image(*size, inputs), weights, Scale(0 * ones, ones << 15, 20 * ones), window,
        groups=groups, pattern=PATTERNS[pattern] if pattern else None,
    )  # fmt: skip
    return max(when.done for when in cycles(link(builder.steps), spec, Memory()))


def layers() -> None:
    """Dense, and 2:4 where there are no groups."""
    for name, size, inputs, outputs, side, groups in LAYERS:
        macs = size[0] * size[1] * outputs * inputs // groups * side * side
        dense = layer(size, inputs, outputs, side, groups, "")
        found = {"layer": name, "cycles": dense, "macs_a_cycle": macs / dense}
        if groups == 1:
            sparse = layer(size, inputs, outputs, side, groups, "2:4")
            found |= {"cycles_2:4": sparse, "faster": dense / sparse}
        print(json.dumps(found), flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--layers", action="store_true", help="single layers instead")
    args = parser.parse_args()
    if args.layers:
        layers()
        return
    for name in args.networks.split(","):
        torch.manual_seed(0)
        print(json.dumps({"network": name, **measured(NETWORKS[name]())}), flush=True)


if __name__ == "__main__":
    main()
