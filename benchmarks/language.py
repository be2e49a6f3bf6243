"""What benchmarks of language models share: windows of text, and how far a model is from the dense one.

Windows of 512 tokens do not overlap. Calibration takes the first 128; validation every 4th of the first
200, in each of which tokens 1 to 511 are predicted from the tokens before them, in float32. A text is a file
of plain text (also .xz), cut by the model's tokenizer.json, or a .npy of token ids.
"""

from __future__ import annotations

import lzma
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from netlathe.execute.executor import Executor
from netlathe.pipeline.pass_ import Feeds

Ids = npt.NDArray[np.int64]
WINDOW = 512
CALIBRATION, VALIDATION, EVERY = 128, 200, 4
BATCH = 4


def windows(path: Path, model: Path, count: int) -> Ids:
    """The first ``count`` windows of a text, ``[count, 512]``."""
    if path.suffix == ".npy":
        ids = np.load(path).reshape(-1)
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


def texts(model: Path, calibration: Path, validation: Path, quick: int | None) -> tuple[Ids, Ids]:
    """Windows for calibration and for validation; of a ``quick`` look so many, and half as many."""
    count, every = (quick, 2) if quick else (VALIDATION, EVERY)
    return windows(calibration, model, quick or CALIBRATION), windows(validation, model, count)[
        ::every
    ]


def batches(ids: Ids, size: int = BATCH) -> Iterator[Ids]:
    """``size`` windows at a time."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def feeds(model: ir.Model, ids: Ids) -> list[Feeds]:
    """The windows as the model takes them, some at a time."""
    return [as_feeds(model, part) for part in batches(ids)]


def as_feeds(model: ir.Model, ids: Ids) -> Feeds:
    """The ids, and a mask of ones and an empty cache where the model takes them."""
    made: dict[str, npt.NDArray[Any]] = {"input_ids": ids}
    for value in model.graph.inputs:
        if value.name == "attention_mask":
            made["attention_mask"] = np.ones_like(ids)
        elif value.name and value.name.startswith("past_key_values."):
            assert value.shape is not None and value.dtype is not None
            _, heads, _, width = (d if isinstance(d, int) else 0 for d in value.shape)
            made[value.name] = np.zeros((len(ids), heads, 0, width), value.dtype.numpy())
    return made


class Fidelity(NamedTuple):
    """Perplexity, KL to the dense model in nats a token, and the share of equal first choices."""

    perplexity: float
    kl: float
    top1: float

    def __str__(self) -> str:
        return f"{self.perplexity:.3f} | {self.kl:.4f} | {100 * self.top1:.2f}"


class Judge:
    """Holds what the dense model says of the validation windows."""

    def __init__(self, dense: ir.Model, ids: Ids, device: str) -> None:
        self._ids, self._device = ids, device
        self._dense = list(self._log_probabilities(dense))

    def of(self, model: ir.Model) -> Fidelity:
        """How far a model is from the dense one."""
        loss, kl, same, tokens = 0.0, 0.0, 0, 0
        found = self._log_probabilities(model)
        for part, p, q in zip(batches(self._ids), self._dense, found, strict=True):
            target = torch.from_numpy(part[:, 1:, None])
            loss -= float(q.gather(-1, target).double().sum())
            kl += float((p.exp() * (p - q)).sum(-1).double().sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += target.numel()
        return Fidelity(math.exp(loss / tokens), kl / tokens, same / tokens)

    def _log_probabilities(self, model: ir.Model) -> Iterator[torch.Tensor]:
        """Of tokens 1 to 511 of each window, on the host, some windows at a time."""
        executor = Executor(model, self._device, keep_weights=True)
        (name, *_) = executor.output_names
        for part in batches(self._ids):
            logits = executor.run(as_feeds(model, part))[name]
            yield torch.log_softmax(logits[:, :-1].float(), -1).cpu()
