"""Seconds and memory of int4 for a model of LLaMA-2-7B's shape: GPTQ layer by layer, and to nearest.

    python benchmarks/bench_scale_quantize.py [--device cuda] [--layers 32 --hidden 4096 --ffn 11008 ...]

Writes a LLaMA with random float16 weights (13.5 GB in safetensors, unless --model has been written before),
then, in a process of its own: capture, and for each of --solvers quantize in groups of 128 with float16
scales (tables stay float16; GPTQ on 128 x 2048 random tokens) and save as ONNX. Products run in float32
without TF32, second moments are summed up in float64.

Prints a line a step and, for GPTQ, a line a layer, with the seconds and the largest resident set so far
(mapped pages of the checkpoint included); the same lines are added to the file --results as they come. What
GPTQ solved is kept in --cache, if that is given: killed and started again with the same --model, it goes on
at the weight where it stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from bench_scale_slice import GIB, peak, write_model

T = TypeVar("T")
WEIGHTS_A_LAYER = 7
HALF = {"weights": "float16", "group_size": 0, "symmetric": True}


class Table:
    """Rows that go to the screen and to a file at once."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._clock = time.monotonic()

    def line(self, text: str) -> None:
        """Add a line as it is."""
        print(text, flush=True)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(text + "\n")

    def step(self, name: str, note: str = "") -> float:
        """Add a row with the seconds since the last one, and return these."""
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self.line(f"| {name} | {seconds:.1f} | {peak():.2f} | {note} |")
        return seconds


class Layers:
    """A row for every layer that was solved."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.seconds: list[float] = []

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` and report."""
        for number, item in enumerate(items, 1):
            if description == "solving" and number == 1:
                self._table.step("look at weights")
            yield item
            if description == "solving" and number % WEIGHTS_A_LAYER == 0:
                self.seconds.append(self._table.step(f"layer {number // WEIGHTS_A_LAYER}"))


def measure(chosen: argparse.Namespace) -> None:
    """Capture, then quantize and save by each solver; a row for each step."""
    import netlathe

    table = Table(chosen.results)
    table.line("\n| step | s | peak RSS GiB | |\n|---|---|---|---|")
    model = netlathe.capture(chosen.model).model
    table.step("capture")
    for solver in chosen.solvers:
        quantize(model.clone(), solver, chosen, table)


def quantize(model: ir.Model, solver: str, chosen: argparse.Namespace, table: Table) -> None:
    """Quantize and save."""
    from netlathe.ir import normal, weights
    from netlathe.passes.quantize import Quantize
    from netlathe.pipeline.cache import Cache
    from netlathe.pipeline.cache_steps import Pieces
    from netlathe.pipeline.pass_ import Context

    pass_ = Quantize(
        weights="int4",
        group_size=chosen.group_size,
        scales="float16",
        solver=solver,  # type: ignore[arg-type]  # one of the two
        clip=chosen.clip,
        sweeps=chosen.sweeps if solver == "gptq" else 0,
        overrides={"embed_tokens": HALF, "lm_head": HALF},  # type: ignore[dict-item]  # an Override
    )
    layers = Layers(table)
    pieces = None
    if chosen.cache is not None:
        shape = {name: getattr(chosen, name) for name in ("layers", "hidden", "ffn", "vocab")}
        data = {name: getattr(chosen, name) for name in ("windows", "tokens", "device")}
        pieces = Pieces(
            Cache(chosen.cache), str(pass_), lambda: {"pass": str(pass_)} | shape | data
        )
    ctx = Context(
        calibration=feeds(model, chosen) if solver == "gptq" else (),
        device=chosen.device,
        progress=layers,
        pieces=pieces,
    )
    start = time.monotonic()
    entries = pass_.choose(model, ctx)
    applied = [entry for entry in entries if entry.status == "applied"]
    note = f"`{pass_}`: {len(applied)} weights"
    if pieces is not None and pieces.count:
        note += f", {pieces.recalled} of {pieces.count} solved before"
    if lost := [entry.detail["error"] for entry in applied if "error" in entry.detail]:
        note += f"; {np.median(lost):.2g} of a product's square lost (median)"
    table.step("choose", note)
    pass_.edit(model, entries, ctx)
    table.step("edit")
    normal.normalize(model)
    table.step("bring into normal form")
    with tempfile.TemporaryDirectory(dir=chosen.model.parent) as folder:
        ir.save(
            model,
            Path(folder) / "model.onnx",
            external_data="model.onnx.data",
            callback=lambda *_: weights.give_back(model),
        )
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / GIB
    table.step("save", f"{size:.2f} GiB")
    whole = time.monotonic() - start
    if layers.seconds:
        table.line(f"\n{np.median(layers.seconds):.2f} s a layer (median)")
    table.line(f"\n{solver}: quantized and saved in {whole:.1f} s, {peak():.2f} GiB at most\n")


def feeds(model: ir.Model, chosen: argparse.Namespace) -> list[dict[str, np.ndarray]]:
    """Random tokens, a window a sample."""
    ids = np.random.default_rng(1).integers(0, chosen.vocab, (chosen.windows, 1, chosen.tokens))
    masked = any(value.name == "attention_mask" for value in model.graph.inputs)
    return [
        {"input_ids": w, **({"attention_mask": np.ones_like(w)} if masked else {})} for w in ids
    ]


def main() -> None:
    """Write the model, then measure in processes of their own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    for name, default in (
        ("layers", 32),
        ("hidden", 4096),
        ("ffn", 11008),
        ("vocab", 32000),
        ("windows", 128),
        ("tokens", 2048),
        ("group-size", 128),
        ("sweeps", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clip", choices=("none", "percentile", "mse"), default="none")
    parser.add_argument("--solvers", nargs="+", choices=("rtn", "gptq"), default=["rtn", "gptq"])
    parser.add_argument("--model", type=Path, help="where the model is written, or lies already")
    parser.add_argument("--cache", type=Path, help="where solved weights are kept, and found again")
    parser.add_argument("--results", type=Path, help="a file that all lines are added to")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen)
        return
    with tempfile.TemporaryDirectory() as held:
        chosen.model = chosen.model or Path(held) / "model"
        table = Table(chosen.results)
        if not (chosen.model / "model.safetensors.index.json").exists():  # written last
            chosen.model.mkdir(parents=True, exist_ok=True)
            total = write_model(chosen.model, chosen)
            table.step("write", f"{total / GIB:.2f} GiB of float16 weights")
        words = [sys.executable, *sys.argv, "--model", str(chosen.model), "--measure"]
        raise SystemExit(subprocess.run(words).returncode)


if __name__ == "__main__":
    main()
