"""Turns texts into feeds with a folder's own `tokenizer.json`, padded on the right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from netlathe.diagnostics import Diagnostic, InputError
from netlathe.pipeline.pass_ import Feeds

# What travels into an artifact unchanged, besides the weights.
TRAVELLING = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def travelling_files(folder: Path) -> dict[str, Path]:
    """The folder's tokenizer, generation and preprocessing files: name in the artifact -> file."""
    return {name: folder / name for name in TRAVELLING if (folder / name).is_file()}


def tokenizer(
    folder: Path, config: Mapping[str, Any], inputs: Sequence[str], max_length: int | None
) -> Callable[[Sequence[str]], Feeds] | None:
    """A function from texts to the feeds named in ``inputs`` (int64, [batch, sequence]).

    None where the folder has no `tokenizer.json`. Longer texts are cut at ``max_length`` tokens.

    Raises:
        InputError: `tokenizer.json` cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() or "input_ids" not in inputs:
        return None
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_file(str(file))
    except Exception as error:  # the binding raises bare Exception
        raise InputError(
            Diagnostic("hf.tokenizer", f"cannot read the tokenizer: {error}", at=str(file))
        ) from error
    pad_token, pad_id = _padding(folder, config, made)
    made.enable_padding(pad_id=pad_id, pad_token=pad_token)  # to the longest text of the batch
    if max_length is not None:
        made.enable_truncation(max_length)
    else:
        made.no_truncation()

    def tokenize(texts: Sequence[str]) -> Feeds:
        if not texts:
            raise InputError(Diagnostic("hf.texts", "no text to tokenize"))
        rows = made.encode_batch(list(texts))
        columns = {
            "input_ids": [r.ids for r in rows],
            "attention_mask": [r.attention_mask for r in rows],
            "token_type_ids": [r.type_ids for r in rows],
        }
        return {n: np.asarray(c, dtype=np.int64) for n, c in columns.items() if n in inputs}

    return tokenize


def _padding(folder: Path, config: Mapping[str, Any], made: Any) -> tuple[str, int]:
    """The padding token: the tokenizer's own, else the config's, else the end-of-text token."""
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
    for key in ("pad_token", "eos_token"):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and made.token_to_id(token) is not None:
            return token, made.token_to_id(token)
    for key in ("pad_token_id", "eos_token_id"):
        number = config.get(key)
        number = number[0] if isinstance(number, list) else number
        if number is not None and made.id_to_token(number) is not None:
            return made.id_to_token(number), number
    return made.id_to_token(0), 0
