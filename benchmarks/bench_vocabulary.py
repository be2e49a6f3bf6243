"""What a smaller vocabulary costs a language model: parameters, tokens that a text loses, and fidelity.

    python benchmarks/bench_vocabulary.py MODEL CALIBRATION VALIDATION --keep 6144 [--windows N]

MODEL is a Hugging Face directory or an ONNX file of a language model; see ``language.py`` for the texts and
the protocol. ``gone`` is the share of the validation text's tokens that were removed, which are read as
others. KL is that to the dense model among the tokens that stay, in nats; top-1 says how often the dense
model's first choice is picked. Perplexities are of the tokens 1 to 511 that stay: the dense model's over its
whole vocabulary, and the pruned one's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from language import Ids, as_feeds, batches, feeds, texts

from netlathe.analysis.cost import cost
from netlathe.api import capture
from netlathe.execute.executor import Executor
from netlathe.ir import interface, normal
from netlathe.passes.prune import Prune
from netlathe.pipeline.pass_ import Context


def logits(model: ir.Model, ids: Ids) -> Iterator[torch.Tensor]:
    """Those of tokens 1 to 511 of some windows at a time, ``[windows, 511, v]``."""
    executor = Executor(model, "cpu", keep_weights=True)
    for part in batches(ids):
        yield executor.run(as_feeds(model, part))["logits"][:, :-1].float()


def row(dense: ir.Model, pruned: ir.Model, ids: Ids) -> str:
    """How far a pruned model is from the dense one."""
    kept = torch.tensor(interface.kept(pruned)["logits"][2])
    kl, same, whole, narrow, stays, tokens = 0.0, 0, 0.0, 0.0, 0, 0
    pairs = zip(batches(ids), logits(dense, ids), logits(pruned, ids), strict=True)
    for part, before, after in pairs:
        q, every, target = torch.log_softmax(after, -1), torch.log_softmax(before, -1), part[:, 1:]
        p = torch.log_softmax(before[..., kept], -1)
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        same += int((kept[q.argmax(-1)] == before.argmax(-1)).sum())
        left = torch.isin(torch.from_numpy(target), kept)
        wanted = torch.from_numpy(target)[left][:, None]
        whole -= float(every[left].gather(-1, wanted).double().sum())
        narrow -= float(q[left].gather(-1, torch.searchsorted(kept, wanted)).double().sum())
        stays, tokens = stays + len(wanted), tokens + target.size
    shown = (math.exp(whole / stays), math.exp(narrow / stays))
    gone = 100 * (1 - stays / tokens)
    return f"{gone:.1f}% | {kl / tokens:.4f} | {100 * same / tokens:.2f} | {shown[0]:.3f} | {shown[1]:.3f}"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory, or an ONNX file")
    parser.add_argument("calibration", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("validation", type=Path, help="text, text.xz or ids.npy")
    parser.add_argument("--keep", type=int, action="append", required=True, help="tokens that stay")
    parser.add_argument("--windows", type=int, metavar="N", help="a quick look at N windows")
    args = parser.parse_args()
    dense = capture(args.model).model
    seen, ids = texts(args.model, args.calibration, args.validation, args.windows)
    ctx = Context(calibration=feeds(dense, seen))
    print("| tokens | score | params | gone | KL | top-1 | dense | pruned |")
    print("|---|---|---|---|---|---|---|---|")
    for keep in args.keep:
        for score in ("frequency", "l2"):
            pass_ = Prune(scope=("vocab",), keep=keep, score=score, compensate="none")
            model = dense.clone()
            pass_.edit(model, pass_.choose(model, ctx), ctx)
            normal.normalize(model)
            params = f"{cost(model).params / 1e6:.2f}M"
            print(f"| {keep} | {score} | {params} | {row(dense, model, ids)} |", flush=True)


if __name__ == "__main__":
    main()
