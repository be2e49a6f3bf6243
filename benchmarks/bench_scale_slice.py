"""Seconds and memory of dropping and slicing a model of LLaMA-2-7B's shape, layer by layer.

    python benchmarks/bench_scale_slice.py [--device cuda] [--layers 32 --hidden 4096 --ffn 11008 ...]

Writes a LLaMA with random float16 weights and norm scales that are not one (13.5 GB in safetensors, a shard
a layer), then in a process of its own: capture, fold_norms, drop 4 attentions, slice 25 % of the width on
128 x 2048 random tokens, and save as ONNX in float32 (the IR's dtype of such a checkpoint). Matrix products
run in float32 without TF32, moments and eigenvectors in float64. Prints a line a step, with the seconds, the
largest resident set so far (mapped pages of the checkpoint included) and, for the slicing, seconds and
bytes a layer. Progress with the time that is left goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

T = TypeVar("T")
GIB = 1 << 30
FAMILY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}


class Remaining:
    """Progress with the time that is left, about every ten seconds."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` and report."""
        start = last = time.monotonic()
        for number, item in enumerate(items):
            yield item
            now = time.monotonic()
            if total and now - last > 10:
                last, done = now, number + 1
                left = (now - start) / done * (total - done)
                print(f"  {description} {done}/{total}, {left:.0f} s left", file=sys.stderr)


def write_model(folder: Path, chosen: argparse.Namespace) -> int:
    """A Hugging Face directory, one shard a layer; bytes of its weights."""
    hidden, ffn, layers, vocab = chosen.hidden, chosen.ffn, chosen.layers, chosen.vocab
    heads = hidden // 128 if hidden >= 1024 else 4
    config = FAMILY | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": max(chosen.tokens, 64),
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 22, np.float32)).astype(np.float16)
    index: dict[str, str] = {}
    total = 0

    def matrix(*shape: int) -> np.ndarray[Any, Any]:
        """Random rows cut from a pool at random places: fast, and no two alike."""
        size = int(np.prod(shape))
        repeated = np.resize(np.roll(pool, int(rng.integers(len(pool)))), size).reshape(shape)
        return np.asarray(repeated * np.float16(shape[-1] ** -0.5))

    def scales() -> np.ndarray[Any, Any]:
        return rng.uniform(0.5, 1.5, hidden).astype(np.float16)

    def write(shard: str, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        nonlocal total
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, shard))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"
        }
        tensors |= {f"{prefix}.mlp.{n}_proj.weight": matrix(ffn, hidden) for n in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = scales()
        write(f"model-{layer:05}.safetensors", tensors)
    write(
        "model-ends.safetensors",
        {
            "model.embed_tokens.weight": matrix(vocab, hidden) * np.float16(hidden**0.5),
            "model.norm.weight": scales(),
            "lm_head.weight": matrix(vocab, hidden),
        },
    )
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described))
    return total


def peak() -> float:
    """The largest resident set of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def measure(folder: Path, chosen: argparse.Namespace) -> None:
    """Capture, fold, drop, slice and save; a row for each."""
    import netlathe
    from netlathe.analysis.cost import cost
    from netlathe.ir import normal, weights
    from netlathe.passes.drop import Drop
    from netlathe.passes.fold_norms import FoldNorms
    from netlathe.passes.slice import Slice
    from netlathe.pipeline.pass_ import Context

    clock = time.monotonic()

    def step(name: str, model: ir.Model, note: str = "") -> None:
        nonlocal clock
        normal.normalize(model)
        weights.give_back(model)
        now = time.monotonic()
        params = cost(model).params / 1e9
        print(f"| {name} | {now - clock:.1f} | {peak():.2f} | {params:.3f} | {note} |", flush=True)
        clock = now

    print("| step | s | peak RSS GiB | parameters 1e9 | |\n|---|---|---|---|---|")
    model = netlathe.capture(folder).model
    step("capture", model)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, chosen.vocab, (chosen.windows, chosen.tokens))
    inputs = {value.name for value in model.graph.inputs}
    feeds = []
    for row in ids:
        fed = {"input_ids": row[None]}
        if "attention_mask" in inputs:
            fed["attention_mask"] = np.ones_like(row[None])
        feeds.append(fed)
    ctx = Context(calibration=feeds, device=chosen.device, progress=Remaining())
    FoldNorms().run(model, ctx)
    step("fold_norms", model)
    drop = Drop(kind="attention", count=chosen.drop)
    few = Context(
        calibration=feeds[: chosen.drop_windows], device=chosen.device, progress=Remaining()
    )
    drop.edit(model, drop.choose(model, few), few)
    step("drop", model, f"{chosen.drop} attentions, {len(few.calibration)} windows")
    pass_ = Slice(ratio=0.25, adapters=chosen.adapters, round_to=chosen.round_to)
    start = time.monotonic()
    entries = pass_.choose(model, ctx)
    seconds = (time.monotonic() - start) / chosen.layers
    held = sum(array.nbytes for entry in entries for array in entry.arrays.values())
    pass_.edit(model, entries, ctx)
    note = f"`{pass_}`: {seconds:.2f} s and {held / chosen.layers / (1 << 20):.1f} MiB a layer"
    step("slice", model, note)
    target = folder / "sliced"
    target.mkdir()
    ir.save(
        model,
        target / "model.onnx",
        external_data="model.onnx.data",
        callback=lambda *_: weights.give_back(model),  # pages of the checkpoint that were read
    )
    size = sum(file.stat().st_size for file in target.iterdir()) / GIB
    step("save", model, f"{size:.1f} GiB")


def main() -> None:
    """Write the model, then measure in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    for name, default in (
        ("layers", 32),
        ("hidden", 4096),
        ("ffn", 11008),
        ("vocab", 32000),
        ("windows", 128),
        ("tokens", 2048),
        ("drop", 4),
        ("drop-windows", 16),
        ("round-to", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--one-basis", dest="adapters", action="store_false")
    parser.add_argument(
        "--folder", type=Path, help="where the model is written (default: temporary)"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure, chosen)
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as held:
        folder = Path(held)
        start = time.monotonic()
        total = write_model(folder, chosen)
        print(
            f"{total / GIB:.2f} GiB of float16 weights, written in {time.monotonic() - start:.0f} s\n"
        )
        sys.stdout.flush()
        words = [sys.executable, *sys.argv, "--measure", str(folder)]
        raise SystemExit(subprocess.run(words).returncode)


if __name__ == "__main__":
    main()
