"""Are smaller models faster? Latency beside MACs of dropped, sliced and pruned models, one thread.

    python benchmarks/bench_faster.py [--models llama vit] [--runtimes ort tvm] [--folder KEPT] [--busy]
    python benchmarks/bench_faster.py --folder KEPT --profile

Random weights: a LLaMA of 12 layers, 768 wide, at 128 tokens, and a ViT-S at one image. Every variant loses
about 30 % of what it is about, to widths that are multiples of what the target names. All variants of a
model take turns in one process, in ONNX Runtime with its default optimizations, and in what TVM has
compiled. A ratio is that of the medians to the dense model; it is taken several times over, and the middle
one is shown with the least and the largest. `--busy` counts the time of the one thread that computes instead
of the time that passes: for a machine where others work too. `--profile` shows where ONNX Runtime's
time goes, by operator. Bar: the latency of the LLaMA that is sliced and dropped falls at least in proportion
to its MACs, to two digits; that of every other variant to at most a tenth above, for what does not shrink
(embeddings, softmax, activations).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SLACK = 1.1
ROUNDS, TIMES = 20, 5
VOCABULARY = 8192
TARGET = "tvm-x86"
# ONNX Runtime's product takes 32 columns at a time, TVM's one to four vectors of 16: 528 of 768 columns would
# leave half a tile idle.
SLICE = "fold_norms(untie=True), slice(ratio=0.3, round_to=32)"
PRUNE = "prune(scope=('ffn', 'heads'), ratio=0.3, compensate='none')"
# Of scores only one needs no data; which layers and positions go says nothing about time.
VARIANTS = {
    "dense": "cleanup",
    "dropped: 4 of 12 blocks": "cleanup, drop(kind='block', count=4, score='uniform')",
    "dropped: 6 of 12 attentions": "cleanup, drop(kind='attention', count=6, score='uniform')",
    "sliced: 30 % of the width": f"cleanup, {SLICE}",
    "pruned: 30 % of neurons and heads": f"cleanup, {PRUNE}",
    "sliced 30 %, 4 attentions dropped": f"cleanup, drop(count=4, score='uniform'), {SLICE}",
}
STRICT = ("llama", "sliced 30 %, 4 attentions dropped")


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
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each behind a ratio")
    parser.add_argument("--busy", action="store_true", help="count the computing thread's time")
    parser.add_argument(
        "--profile", action="store_true", help="show ONNX Runtime's time by operator"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in the child
    given = parser.parse_args()
    if given.measure:
        measure(given.folder, given.measure, given)
        return 0
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        for name in given.models:
            if given.profile:
                build(name, folder / name, wanted_of(given.variants), ["ort"])
                profile(name, folder / name)
            else:
                good &= compare(name, folder / name, given)
    return 0 if good else 1


def wanted_of(words: list[str] | None) -> list[str]:
    """The variants that were asked for, and the dense model."""
    return [v for v in VARIANTS if not words or v.split()[0].strip(":") in [*words, "dense"]]


def compare(name: str, folder: Path, given: argparse.Namespace) -> bool:
    """Build and measure the variants of a model, and print their rows."""
    names, runtimes = wanted_of(given.variants), given.runtimes
    build(name, folder, names, runtimes)
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    own = {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--runtimes", *runtimes, "--rounds", str(given.rounds)]
        + (["--busy"] if given.busy else []),
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
            ratios = sorted(a / b for a, b in zip(row[runtime], dense[runtime], strict=True))
            ratio = statistics.median(ratios)
            strict = (name, variant) == STRICT
            good &= round(ratio, 2) <= round(share, 2) if strict else ratio <= SLACK * share
            told = f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            cells += [f"{statistics.median(row[runtime]):.1f}", told]
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
                    if parameter.ndim == 1:  # zeros and ones would go, which trained ones are not
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


def opened(place: Path, name: str, profile: str = "") -> tuple[Any, dict[str, Any]]:
    """A session of ONNX Runtime on one thread, and what it is fed with."""
    import onnxruntime
    from bench_tvm import inputs

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = bool(profile), profile
    session = onnxruntime.InferenceSession(
        place / "ort" / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    kinds = {"tensor(int64)": "int64", "tensor(float)": "float32"}
    records = [
        {"name": i.name, "shape": i.shape, "dtype": kinds[i.type]} for i in session.get_inputs()
    ]
    return session, within(inputs(records, CASES[name].dims))


PARTS = {
    "products": {"MatMul", "Gemm", "FusedMatMul", "Conv", "FusedConv"},
    "attention": {"Attention"},
    "norms": {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
    | {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"},
    "activations": {"Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Swish", "Sigmoid", "Mul"},
}


def profile(name: str, folder: Path) -> None:
    """Print what every part takes in each variant, in milliseconds and beside the dense model.

    Of a node counts the least of its times: what others do on the machine only adds to one.
    """
    sessions: dict[str, tuple[Any, dict[str, Any]]] = {}
    for place in sorted(folder.glob("[0-9]*")):
        variant = json.loads((place / "costs.json").read_text())["variant"]
        sessions[variant] = opened(place, name, str(place / "profile"))
    for _ in range(ROUNDS):
        for session, feeds in sessions.values():
            session.run(None, feeds)
    taken: dict[str, dict[str, float]] = {}
    for variant, (session, _) in sessions.items():
        file = Path(session.end_profiling())
        least: dict[str, tuple[str, float]] = {}
        for event in json.loads(file.read_text()):
            if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
                continue
            operator, ms = event["args"]["op_name"], event["dur"] / 1e3
            part = next((part for part, held in PARTS.items() if operator in held), "others")
            least[event["name"]] = part, min(ms, least.get(event["name"], (part, ms))[1])
        file.unlink()
        taken[variant] = {
            part: sum(ms for found, ms in least.values() if found == part)
            for part in (*PARTS, "others")
        }
    print(f"\n| {name}, ONNX Runtime, ms | {' | '.join(taken)} |")
    print("|---" * (1 + len(taken)) + "|")
    dense = taken["dense"] | {"all": sum(taken["dense"].values())}
    for part, whole in dense.items():
        row = [found.get(part, sum(found.values())) for found in taken.values()]
        cells = [f"{ms:.2f} ({ms / whole:.2f})" for ms in row]
        print(f"| {part} | {' | '.join(cells)} |", flush=True)


def measure(folder: Path, name: str, given: argparse.Namespace) -> None:
    """Time all in turn, several times over, and print the medians as JSON."""
    from bench_tvm import inputs

    from netlathe.execute.timing import in_turn

    runtimes = given.runtimes
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for place in sorted(folder.glob("[0-9]*")):
        if not all((place / r).exists() for r in runtimes):
            continue  # it was not asked for
        row = json.loads((place / "costs.json").read_text())
        found[row["variant"]] = row
        feeds: dict[str, Any] = {}
        if "ort" in runtimes:
            session, feeds = opened(place, name)
            runs[f"ort {row['variant']}"] = partial(session.run, None, feeds)
        if "tvm" in runtimes:
            from netlathe.backends.tvm import runtime

            model = runtime.load(place / "tvm", threads=1)
            feeds = feeds or within(inputs(model.inputs, CASES[name].dims))
            runs[f"tvm {row['variant']}"] = partial(model.run, feeds)
    clock = time.thread_time if given.busy else time.perf_counter
    for _ in range(TIMES):
        for key, timing in in_turn(runs, rounds=given.rounds, warmup=1, clock=clock).items():
            where, _, variant = key.partition(" ")
            found[variant].setdefault(where, []).append(timing.median_ms)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
