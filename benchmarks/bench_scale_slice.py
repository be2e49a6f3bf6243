"""Seconds and memory of dropping and slicing a model of LLaMA-2-7B's shape, layer by layer.

    python benchmarks/bench_scale_slice.py [--device cuda] [--layers 32 --hidden 4096 --ffn 11008 ...]

Writes a LLaMA with random float16 weights and norm scales that are not one (13.5 GB in safetensors, a shard
a layer), then in a process of its own: capture, fold_norms, drop 4 attentions, slice 25 % of the width on
128 x 2048 random tokens, and save as ONNX in float32 (the IR's dtype of such a checkpoint). Matrix products
run in float32 without TF32, moments and eigenvectors in float64. Prints a line a step, with the seconds, the
largest resident set so far (mapped pages of the checkpoint included) and, for the slicing, seconds and
bytes a layer. Progress with the time that is left goes to stderr.

With ``--folder`` the model and the bases that were solved stay there: the same command takes them up.
"""

from __future__ import annotations

import argparse
import json
import mmap
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors.numpy import save_file

T = TypeVar("T")
Array = npt.NDArray[Any]
GIB = 1 << 30
INDEX = "model.safetensors.index.json"
FAMILY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}


class Pieces:
    """Solved bases in files, from which they are mapped: a basis is 48 MiB, and there are 65."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: list[mmap.mmap] = []
        self.seconds = 0.0
        self.taken_up = 0
        folder.mkdir(exist_ok=True)

    def once(self, name: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """What ``compute`` makes, or made in a run before this one."""
        folder = self._folder / name.replace("/", "_")
        if not folder.exists():
            start = time.monotonic()
            made = compute()
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for key, array in made.items():
                np.save(part / f"{key}.npy", array)
            part.rename(folder)
            self.seconds += time.monotonic() - start
        else:
            self.taken_up += 1
        found: dict[str, Array] = {}
        for file in sorted(folder.iterdir()):
            mapped = np.load(file, mmap_mode="r")
            self._maps.append(mapped._mmap)
            found[file.stem] = mapped
        return found

    def give_back(self) -> None:
        """Give back the memory that bases take by having been read."""
        for held in self._maps:
            held.madvise(mmap.MADV_DONTNEED)


class Remaining:
    """Progress with the time that is left, about every ten seconds."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` and report."""
        start = last = time.monotonic()
        for number, item in enumerate(items):
            yield item
            now = time.monotonic()
            if total and now - last > 10:
                last, done = now, number + 1
                left = (now - start) / done * (total - done)
                self._pieces.give_back()
                words = f"  {description} {done}/{total}, {left:.0f} s left, {peak():.2f} GiB"
                print(words, file=sys.stderr, flush=True)


# -- the model ----------------------------------------------------------------------------------------


def write_model(folder: Path, chosen: argparse.Namespace) -> int:
    """A Hugging Face directory, one shard a layer; bytes of its weights."""
    hidden, layers = chosen.hidden, chosen.layers
    heads = hidden // 128 if hidden >= 1024 else 4
    config = FAMILY | {
        "hidden_size": hidden,
        "intermediate_size": chosen.ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": chosen.vocab,
        "max_position_embeddings": max(chosen.tokens, 64),
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    total, where = 0, dict[str, str]()
    sizes = (hidden, chosen.ffn, chosen.vocab)
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(write_shard, folder, n, *sizes) for n in (*range(layers), None)]
        for job in jobs:
            shard, names, size = job.result()
            where.update(dict.fromkeys(names, shard))
            total += size
    described = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(described))
    return total


def write_shard(
    folder: Path, layer: int | None, hidden: int, ffn: int, vocab: int
) -> tuple[str, list[str], int]:
    """The weights of a layer, or (None) what is before and behind; file, names and bytes."""
    rng = np.random.default_rng([0] if layer is None else [1, layer])
    pool = rng.standard_normal(1 << 22, np.float32)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Array:
        """Random numbers cut from a pool at random places: fast, and no two alike."""
        scaled = (pool * np.float32(scale * columns**-0.5)).astype(np.float16)
        return np.resize(np.roll(scaled, int(rng.integers(len(pool)))), (rows, columns))

    def scales() -> Array:
        return rng.uniform(0.5, 1.5, hidden).astype(np.float16)

    if layer is None:
        shard = "model-ends.safetensors"
        tensors = {
            "model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5),
            "model.norm.weight": scales(),
            "lm_head.weight": matrix(vocab, hidden),
        }
    else:
        shard, prefix = f"model-{layer:05}.safetensors", f"model.layers.{layer}"
        tensors = {
            f"{prefix}.self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"
        }
        tensors |= {f"{prefix}.mlp.{n}_proj.weight": matrix(ffn, hidden) for n in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = scales()
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    return shard, list(tensors), sum(tensor.nbytes for tensor in tensors.values())


# -- measuring ----------------------------------------------------------------------------------------


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

    begin = clock = time.monotonic()

    def step(name: str, model: ir.Model, note: str = "") -> None:
        nonlocal clock
        weights.give_back(model)
        pieces.give_back()
        now = time.monotonic()
        params = cost(model).params / 1e9
        print(f"| {name} | {now - clock:.1f} | {peak():.2f} | {params:.3f} | {note} |", flush=True)
        clock = now

    print("| step | s | peak RSS GiB | parameters 1e9 | |\n|---|---|---|---|---|", flush=True)
    pieces = Pieces(folder / "pieces")
    progress = Remaining(pieces)
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
    ctx = Context(calibration=feeds, device=chosen.device, progress=progress, pieces=pieces)
    FoldNorms().run(model, ctx)
    normal.normalize(model)
    step("fold_norms", model)
    drop = Drop(kind="attention", count=chosen.drop)
    few = Context(calibration=feeds[: chosen.drop_windows], device=chosen.device, progress=progress)
    drop.edit(model, drop.choose(model, few), few)
    normal.normalize(model)
    step("drop", model, f"{chosen.drop} attentions, {len(few.calibration)} windows")
    pass_ = Slice(ratio=0.25, adapters=chosen.adapters, round_to=chosen.round_to)
    start = time.monotonic()
    entries = pass_.choose(model, ctx)
    seconds = (time.monotonic() - start) / chosen.layers
    solving = pieces.seconds / chosen.layers
    held = sum(array.nbytes for entry in entries for array in entry.arrays.values())
    pass_.edit(model, entries, ctx)
    normal.normalize(model)
    note = (
        f"`{pass_}`: {seconds:.2f} s and {held / chosen.layers / (1 << 20):.1f} MiB a layer,"
        f" {solving:.2f} s of it for eigenvectors"
    )
    if pieces.taken_up:
        note += f"; {pieces.taken_up} bases taken up"
    step("slice", model, note)
    target = folder / "sliced"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    save(model, target, pieces)
    size = sum(file.stat().st_size for file in target.iterdir()) / GIB
    step("save", model, f"{size:.1f} GiB")
    print(f"| all | {time.monotonic() - begin:.1f} | {peak():.2f} | | |", flush=True)


def save(model: ir.Model, folder: Path, pieces: Pieces) -> None:
    """Write an ONNX file and its weights, several at a time, as the ONNX backend does; run nothing."""
    from netlathe.execute import reading
    from netlathe.ir import weights

    held = [v for v in model.graph.initializers.values() if v.const_value is not None]
    values = [v for v in held if v.const_value is not None and v.const_value.nbytes >= 1024]
    tensors = [v.const_value for v in values if v.const_value is not None]
    name, written = "model.onnx.data", 0
    with open(folder / name, "wb") as file:
        arrays = reading.ahead(tensors, lambda tensor: np.ascontiguousarray(tensor.numpy()))
        for value, tensor, array in zip(values, tensors, arrays, strict=True):
            start = file.tell()
            file.write(array.reshape(-1).view(np.uint8).data)
            value.const_value = ir.ExternalTensor(
                name,
                start,
                file.tell() - start,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=folder,
            )
            del array
            weights.give_back_tensor(tensor)  # pages of the checkpoint that were read
            if file.tell() - written > GIB:
                written = file.tell()
                weights.give_back(model)
                pieces.give_back()
    ir.save(model, folder / "model.onnx")


def check_settings(folder: Path, chosen: argparse.Namespace) -> None:
    """Take up nothing that was made by other settings."""
    settings = {k: v for k, v in vars(chosen).items() if k not in ("folder", "measure")}
    file = folder / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{folder} is of other settings: {file.read_text()}; remove it")
    file.write_text(json.dumps(settings))


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
        "--folder", type=Path, help="where all is kept, and taken up (default: temporary)"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure, chosen)
        return
    with tempfile.TemporaryDirectory() as held:
        folder: Path = chosen.folder or Path(held)
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder, chosen)
        if not (folder / INDEX).exists():
            start = time.monotonic()
            total = write_model(folder, chosen) / GIB
            seconds = time.monotonic() - start
            print(f"{total:.2f} GiB of float16 weights, written in {seconds:.0f} s\n", flush=True)
        words = [sys.executable, *sys.argv, "--measure", str(folder)]
        raise SystemExit(subprocess.run(words).returncode)


if __name__ == "__main__":
    main()
