"""Fidelity of a pruned language model: parameters, perplexity, KL and top-1 agreement with the dense model.

    python benchmarks/bench_prune_quality.py MODEL CALIBRATION VALIDATION

MODEL is a Hugging Face directory or, where there is no transformers, an ONNX file of a language model. A text
is a file of plain text (also .xz), cut by the model's tokenizer.json, or a .npy of token ids. Windows of 512
tokens do not overlap. Calibration takes the first 128; validation every 4th of the first 200, in each of
which tokens 1 to 511 are predicted from the tokens before them; float32. ``--calibrate 16 --windows 32`` is a
quick look. One row a setting; the first is the dense model.
"""

from __future__ import annotations

import argparse
import lzma
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from netlathe.analysis.cost import cost
from netlathe.api import capture
from netlathe.execute.executor import Executor
from netlathe.ir import normal, verify
from netlathe.passes.prune import Prune
from netlathe.pipeline.pass_ import Array, Context, Feeds
from netlathe.pipeline.text import parse

Ids = npt.NDArray[np.int64]
WINDOW = 512
CALIBRATION, VALIDATION, EVERY = 128, 200, 4
BATCH = 4

# The parameters that the peers' settings of the same model leave, and the scores and allocations at them.
SETTINGS = (
    "prune(scope=('ffn',), params=22.34e6)",
    "prune(scope=('ffn',), params=21.59e6)",
    "prune(scope=('ffn',), params=20.92e6)",
    "prune(scope=('ffn',), params=19.78e6)",
    "prune(scope=('ffn', 'heads', 'kv_groups'), params=21.59e6)",
    "prune(scope=('ffn', 'heads', 'kv_groups'), params=19.78e6)",
    *(
        f"prune(scope=('ffn',), params=22.34e6, {rest})"
        for rest in (
            "score='random', compensate='none'",
            "score='l2', compensate='none'",
            "score='group_norm', compensate='none'",
            "score='fpgm', compensate='none'",
            "score='wanda', compensate='none'",
            "score='cfsp', compensate='none'",
            "score='cfsp', allocation='cfsp', compensate='none'",
            "score='flap', allocation='flap', compensate='bias'",
            "score='taylor', allocation='uniform', compensate='none'",
            "score='taylor', compensate='none'",
            "score='obd', allocation='uniform', compensate='none'",
            "score='obd', allocation='layer_adaptive', compensate='none'",
            "score='obd', compensate='none'",
            "score='obd', compensate='bias'",
        )
    ),
)


@dataclass(frozen=True)
class Remembering(Context):
    """Lets settings share scores: the time of a score counts in the first row that needs it."""

    known: dict[str, Mapping[str, Array]] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """Scores are kept; what is solved for afterwards depends on the setting."""
        if not name.endswith("widths"):
            return compute()
        if name not in self.known:
            self.known[name] = compute()
        return self.known[name]


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory, or an ONNX file")
    parser.add_argument("calibration", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("validation", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("--calibrate", type=int, default=CALIBRATION, help="calibration windows")
    parser.add_argument(
        "--windows", type=int, default=VALIDATION, help="validation windows; every 4th is measured"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--setting", action="append", help="a pass in text form, instead of all")
    args = parser.parse_args()
    calibration = windows(args.calibration, args.model, args.calibrate)
    validation = windows(args.validation, args.model, args.windows)[::EVERY]
    model = capture(args.model).model
    feeds = [as_feeds(model, ids) for ids in batches(calibration, BATCH)]
    ctx = Remembering(calibration=feeds, device=args.device)
    print(f"dense model, {len(calibration)} calibration and {len(validation)} validation windows")
    print("| setting | params | MB fp16 | ppl | KL | top-1 | s | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|---|")
    dense = list(log_probabilities(model, validation, args.device))
    row("dense", model, validation, dense, args.device, 0.0)
    for setting in args.setting or SETTINGS:
        (pass_,) = parse(setting)
        assert isinstance(pass_, Prune)
        pruned, start = model.clone(), time.perf_counter()
        entries = pass_.choose(pruned, ctx)
        pass_.edit(pruned, entries, ctx)
        seconds = time.perf_counter() - start
        normal.normalize(pruned)
        verify.check(pruned)
        row(setting, pruned, validation, dense, args.device, seconds)


def row(
    name: str,
    model: ir.Model,
    ids: Ids,
    dense: Sequence[torch.Tensor],
    device: str,
    seconds: float,
) -> None:
    """One row of the table."""
    loss, kl, same, tokens = 0.0, 0.0, 0, 0
    found = log_probabilities(model, ids, device)
    for part, p, q in zip(batches(ids, BATCH), dense, found, strict=True):
        target = torch.from_numpy(part[:, 1:, None]).to(q.device)
        p = p.to(q.device)
        loss -= float(q.gather(-1, target).double().sum())
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += target.numel()
    params = cost(model).params
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"| `{name}` | {params / 1e6:.2f}M | {params * 2 / 1e6:.2f} | {np.exp(loss / tokens):.3f}"
        f" | {kl / tokens:.4f} | {100 * same / tokens:.2f} | {seconds:.1f} | {peak:.0f} |",
        flush=True,
    )


def log_probabilities(model: ir.Model, ids: Ids, device: str) -> Iterator[torch.Tensor]:
    """Of tokens 1 to 511 of each window, a batch at a time; kept on the host."""
    executor = Executor(model, device, keep_weights=True)
    (name, *_) = executor.output_names
    for part in batches(ids, BATCH):
        logits = executor.run(as_feeds(model, part))[name]
        yield torch.log_softmax(logits[:, :-1].float(), -1).cpu()


def as_feeds(model: ir.Model, ids: Ids) -> Feeds:
    """The ids, and a mask of ones where the model takes one."""
    feeds: dict[str, npt.NDArray[Any]] = {"input_ids": ids}
    if any(value.name == "attention_mask" for value in model.graph.inputs):
        feeds["attention_mask"] = np.ones_like(ids)
    return feeds


def batches(ids: Ids, size: int) -> Iterator[Ids]:
    """``size`` windows at a time."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def windows(path: Path, model: Path, count: int) -> Ids:
    """The first ``count`` windows of a text, ``[count, 512]``."""
    if path.suffix == ".npy":
        ids = np.load(path)
    else:
        from tokenizers import Tokenizer

        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids)
    if len(ids) < count * WINDOW:
        sys.exit(f"{path} holds {len(ids) // WINDOW} windows of {WINDOW} tokens, not {count}")
    found: Ids = ids[: count * WINDOW].astype(np.int64).reshape(count, WINDOW)
    return found


if __name__ == "__main__":
    main()
