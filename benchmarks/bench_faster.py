"""Are smaller models faster? Latency beside MACs of dropped, sliced and pruned models, one thread.

    python benchmarks/bench_faster.py [--models llama vit] [--runtimes ort tvm] [--folder KEPT]

Random weights: a LLaMA of 12 layers, 768 wide, at 128 tokens, and a ViT-S at one image. Every variant loses
about 30 % of what it is about, to widths that are multiples of what the target names. All variants of a
model take turns in one process, in ONNX Runtime with its default optimizations, and in what TVM has
compiled; ratios are those of the medians to the dense model. Bar: latency falls at least in proportion to
MACs, with a tenth of the ratio for what does not shrink (embeddings, norms, attention itself).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLACK = 1.1
ROUNDS = 20
VOCABULARY = 8192
TARGET = "tvm-x86"
SLICE = "fold_norms(untie=True), slice(ratio=0.3, round_to=16)"
# Of scores only one needs no data; which layers and positions go says nothing about time.
VARIANTS = {
    "dense": "cleanup",
    "dropped: 4 of 12 blocks": "drop(kind='block', count=4, score='uniform')",
    "dropped: 6 of 12 attentions": "drop(kind='attention', count=6, score='uniform')",
    "sliced: 30 % of the width": SLICE,
    "pruned: 30 % of neurons and heads": "prune(scope=('ffn', 'heads'), ratio=0.3, compensate='none')",
    "sliced 30 %, 4 attentions dropped": f"drop(count=4, score='uniform'), {SLICE}",
}


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the sizes it is measured at."""

    dims: Mapping[str, int]
    make: Callable[[], Any]


def llama() -> Any:
    """The language model."""
    import transformers as hf

    config = hf.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    return hf.LlamaForCausalLM(config)


def vit() -> Any:
    """The image classifier."""
    import transformers as hf

    config = hf.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    return hf.ViTForImageClassification(config)


CASES = {
    "llama": Case({"batch": 1, "sequence": 128}, llama),
    "vit": Case({"batch": 1}, vit),
}


def main() -> int:
    """Print the table; 0 where all is within the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runtimes", nargs="+", choices=("ort", "tvm"), default=["ort", "tvm"])
    parser.add_argument("--variants", nargs="+", help="the first words of those to measure")
    parser.add_argument("--folder", type=Path, help="keep what is built, and use it again")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in the child
    given = parser.parse_args()
    if given.measure:
        measure(given.folder, given.measure, given.runtimes)
        return 0
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        for name in given.models:
            good &= compare(name, folder / name, given.runtimes, given.variants)
    return 0 if good else 1


def compare(name: str, folder: Path, runtimes: list[str], wanted: list[str] | None) -> bool:
    """Build and measure the variants of a model, and print their rows."""
    names = [v for v in VARIANTS if not wanted or v.split()[0].strip(":") in [*wanted, "dense"]]
    build(name, folder, names, runtimes)
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    own = {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--runtimes", *runtimes],
        env=os.environ | own,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    shown = {"ort": "ONNX Runtime", "tvm": "TVM"}
    titles = " | ".join(f"{shown[r]} ms | ratio" for r in runtimes)
    print(f"\n| {name} | params | MACs | ratio | {titles} |")
    print("|---" * (4 + 2 * len(runtimes)) + "|")
    good, dense = True, found["dense"]
    for variant in names:
        row = found[variant]
        share = row["macs"] / dense["macs"]
        cells = [f"{row['params'] / 1e6:.2f}M", f"{row['macs'] / 1e9:.2f}G", f"{share:.2f}"]
        for runtime in runtimes:
            ratio = row[runtime] / dense[runtime]
            good &= ratio <= SLACK * share
            cells += [f"{row[runtime]:.1f}", f"{ratio:.2f}"]
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)
    return good


def build(name: str, folder: Path, variants: list[str], runtimes: list[str]) -> None:
    """Write the artifacts that are not there yet."""
    import torch

    import netlathe
    from netlathe.analysis.cost import cost

    captured = None
    for number, (variant, passes) in enumerate(VARIANTS.items()):
        place = folder / str(number)
        lacking = [r for r in runtimes if not (place / r).exists()]
        if variant not in variants or not lacking:
            continue
        if captured is None:
            torch.manual_seed(0)
            module = CASES[name].make()
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.ndim == 1:  # vectors that are equal would be merged
                        parameter.add_(0.02 * torch.randn_like(parameter))
            module.save_pretrained(folder / "source")
            captured = netlathe.capture(folder / "source")
        start = time.perf_counter()
        data = [
            captured.sample({**captured.dynamic, **CASES[name].dims}, seed) for seed in range(8)
        ]
        target = TARGET if "tvm" in runtimes else "onnx"  # without the extra that TVM needs
        compiled = netlathe.compile(captured, passes, calibration=data, target=target, verify=False)
        for runtime in lacking:
            compiled.save(place / runtime, target={"ort": "onnx", "tvm": TARGET}[runtime])
        costs = cost(compiled.model, {**captured.dynamic, **CASES[name].dims})
        made = {"variant": variant, "params": costs.params, "macs": costs.macs}
        (place / "costs.json").write_text(json.dumps(made))
        seconds = time.perf_counter() - start
        print(f"{name}: {variant}: built in {seconds:.0f} s", file=sys.stderr, flush=True)


def within(feeds: dict[str, Any]) -> dict[str, Any]:
    """Ids that are in the vocabulary."""
    return {name: a % VOCABULARY if a.dtype == "int64" else a for name, a in feeds.items()}


def measure(folder: Path, name: str, runtimes: list[str]) -> None:
    """Time all in turn and print the medians as JSON."""
    import onnxruntime
    from bench_tvm import inputs

    from netlathe.execute.timing import in_turn

    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for place in sorted(folder.glob("[0-9]*")):
        if not all((place / r).exists() for r in runtimes):
            continue  # it was not asked for
        row = json.loads((place / "costs.json").read_text())
        found[row["variant"]] = row
        feeds: dict[str, Any] = {}
        if "ort" in runtimes:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(
                place / "ort" / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
            kinds = {"tensor(int64)": "int64", "tensor(float)": "float32"}
            records = [
                {"name": i.name, "shape": i.shape, "dtype": kinds[i.type]}
                for i in session.get_inputs()
            ]
            feeds = within(inputs(records, CASES[name].dims))
            runs[f"ort {row['variant']}"] = lambda s=session, f=feeds: s.run(None, f)
        if "tvm" in runtimes:
            from netlathe.backends.tvm import runtime

            model = runtime.load(place / "tvm", threads=1)
            feeds = feeds or within(inputs(model.inputs, CASES[name].dims))
            runs[f"tvm {row['variant']}"] = lambda m=model, f=feeds: m.run(f)
    for key, timing in in_turn(runs, rounds=ROUNDS, warmup=2).items():
        where, _, variant = key.partition(" ")
        found[variant][where] = timing.median_ms
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
