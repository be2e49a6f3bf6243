"""What slicing a language model costs: KL to the dense model, perplexity and top-1 by net parameters.

    python benchmarks/bench_slice_quality.py MODEL_DIR CALIBRATION TEXT [--device cuda] [--windows N]

MODEL_DIR is a Hugging Face directory. CALIBRATION and TEXT are UTF-8 text files (.txt or .txt.xz), which the
directory's tokenizer cuts into windows of 512 tokens, or .npy arrays of ids ``[windows, 512]``.
Calibration takes the first 128 windows, the comparison every 4th of the first 200 (of an array: all).
Tokens 1..511 of a window are predicted from those before them, in float32; KL is in nats a token.

Rows named SliceGPT are the paper's method (arXiv 2401.15024): a basis a block, adapters on the skips, the
head whole. The rows after each have as many parameters or fewer, adapters counted.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

import netlathe
from netlathe.analysis.cost import cost
from netlathe.execute.executor import Executor
from netlathe.ir import normal
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.slice import Slice
from netlathe.pipeline.pass_ import Context

WINDOW = 512
CALIBRATION_WINDOWS, TEST_WINDOWS, EVERY = 128, 200, 4
AT_ONCE = 4
RATIOS = (0.10, 0.20, 0.25, 0.30)  # of the paper's rows
Ids = npt.NDArray[np.int64]


def windows(path: Path, folder: Path, count: int, every: int) -> Ids:
    """Token ids ``[windows, 512]`` of a text, or as an array holds them."""
    if path.suffix == ".npy":
        held: Ids = np.load(path).astype(np.int64)
        return held[:count]
    from tokenizers import Tokenizer

    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    whole = len(ids) // WINDOW
    return ids[: whole * WINDOW].reshape(whole, WINDOW)[:count:every]


def feeds(model: ir.Model, ids: Ids) -> Iterator[dict[str, Ids]]:
    """The windows as the model takes them, a few at a time."""
    inputs = {value.name for value in model.graph.inputs}
    for start in range(0, len(ids), AT_ONCE):
        part = ids[start : start + AT_ONCE]
        made = {"input_ids": part}
        if "attention_mask" in inputs:
            made["attention_mask"] = np.ones_like(part)
        yield made


class Judge:
    """Holds what the dense model says of the test windows."""

    def __init__(self, dense: ir.Model, ids: Ids, device: str) -> None:
        self.ids, self.device = ids, device
        self.dense = [logs.cpu() for logs in self._log_probabilities(dense)]

    def _log_probabilities(self, model: ir.Model) -> Iterator[torch.Tensor]:
        executor = Executor(model, self.device, keep_weights=True)
        for fed in feeds(model, self.ids):
            logits = executor.run(fed, ["logits"])["logits"]
            yield torch.log_softmax(logits[:, :-1].float(), -1)

    def __call__(self, model: ir.Model) -> tuple[float, float, float]:
        """(perplexity, KL to the dense model, share of equal first choices)."""
        loss = divergence = hits = count = 0.0
        for number, logs in enumerate(self._log_probabilities(model)):
            ids = torch.from_numpy(self.ids[number * AT_ONCE :][: len(logs), 1:]).to(logs.device)
            dense = self.dense[number].to(logs.device)
            loss -= logs.gather(-1, ids[..., None]).double().sum().item()
            divergence += (dense.exp() * (dense - logs)).sum(-1).double().sum().item()
            hits += (dense.argmax(-1) == logs.argmax(-1)).sum().item()
            count += ids.numel()
        return math.exp(loss / count), divergence / count, hits / count


def row(name: str, pass_: Slice | None, model: ir.Model, judge: Judge, ctx: Context) -> int:
    """Slice, measure and print one row; the parameters that are left."""
    start = time.perf_counter()
    made = model.clone()
    width = ""
    if pass_ is not None:
        entries = pass_.choose(made, ctx)
        pass_.edit(made, entries, ctx)
        normal.normalize(made)
        kept = sorted({e.detail["kept"] for e in entries if e.status == "applied"})
        width = "/".join(map(str, kept))
    seconds = time.perf_counter() - start
    params = cost(made).params
    perplexity, divergence, same = judge(made)
    shown = f"`{pass_}`" if pass_ is not None else ""
    print(
        f"| {name} | {shown} | {width} | {params / 1e6:.2f}M | {perplexity:.3f} | {divergence:.4f}"
        f" | {100 * same:.2f} | {seconds:.1f} |",
        flush=True,
    )
    return params


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, help="quick: this many of both")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--round-to", type=int, default=8)
    chosen: Any = parser.parse_args(argv)
    calibration = windows(chosen.calibration, chosen.model, CALIBRATION_WINDOWS, 1)
    test = windows(chosen.text, chosen.model, TEST_WINDOWS, EVERY)
    if chosen.windows:
        calibration, test = calibration[: chosen.windows], test[: chosen.windows]
    captured = netlathe.capture(chosen.model)
    model = captured.model.clone()
    FoldNorms(untie=True).run(model, Context())
    normal.normalize(model)
    ctx = Context(calibration=list(feeds(model, calibration)), device=chosen.device)
    judge = Judge(captured.model, test, chosen.device)
    print(
        f"torch {torch.__version__}, {chosen.device}, {len(calibration)} and {len(test)} windows\n"
    )
    print("| method | pass | width | parameters | perplexity | KL | top-1 % | s |")
    print("|---|---|---|---|---|---|---|---|")
    total = row("dense", None, model, judge, ctx)
    for ratio in chosen.ratios:
        paper = Slice(ratio=ratio, adapters=True, full="head", round_to=chosen.round_to)
        try:
            params = row("SliceGPT", paper, model, judge, ctx)
        except netlathe.NetLatheError as error:
            print(f"| SliceGPT | `{paper}` | refused: {error.diagnostics[0].message} | | | | | |")
            params = int(total * (1 - ratio / 2))
        share = 1 - params / total
        for basis in ("pca", "loss"):
            for refit in (False, True):
                pass_ = Slice(parameters=share, basis=basis, refit=refit, round_to=chosen.round_to)
                row("one basis", pass_, model, judge, ctx)


if __name__ == "__main__":
    main()
