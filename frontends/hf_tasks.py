"""What a Hugging Face model is called with and what a user expects of it, by kind of model.

Each task wraps the model (attribute ``model``) so that it takes and returns plain tensors under the
names the graph will have, and makes example inputs from the config.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.auto import modeling_auto

from netlathe.diagnostics import CaptureError, Diagnostic, InputError

BATCH, SEQUENCE = 2, 7  # of the example; odd, so that no dim is taken for another
PAST = 3
TARGET = 5
INNER = "model"  # attribute of every wrapper that holds the model

Dims = dict[int, str]


@dataclass(frozen=True)
class Task:
    """A wrapped model, example inputs, their dynamic dims, and sizes to compare at."""

    name: str
    module: nn.Module
    kwargs: Mapping[str, Any]
    dynamic: Mapping[str, Dims]
    sizes: tuple[Mapping[str, int], ...]


class _Plain(nn.Module):
    """Returns the one output a user of this kind of model asks for."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._outputs = tuple(outputs)
        self._no_cache = "use_cache" in inspect.signature(model.forward).parameters

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._no_cache:
            got = self.model(**inputs, use_cache=False)
        else:
            got = self.model(**inputs)
        found = [n for n in self._outputs if torch.is_tensor(getattr(got, n, None))]
        return {found[0]: getattr(got, found[0])} if found else {}


class _Cached(nn.Module):
    """A causal language model whose key-value cache comes in and goes out as tensors.

    ``past_key_values[layer]["key" | "value"]`` is [batch, kv_heads, past, head_dim]; the attention
    mask covers past and new tokens. Positions count the tokens the mask lets through, as `generate`
    does, so rows of a batch may be padded on the left.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._takes_positions = "position_ids" in parameters

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Sequence[Mapping[str, torch.Tensor]],
    ) -> dict[str, Any]:
        from transformers import DynamicCache

        cache = DynamicCache([(layer["key"], layer["value"]) for layer in past_key_values])
        past = past_key_values[0]["key"].shape[2]
        torch._check(attention_mask.shape[1] == past + input_ids.shape[1])  # type: ignore[no-untyped-call]  # torch gives it no types
        extra: dict[str, Any] = {self._cache_name: cache}
        if self._takes_positions:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            extra["position_ids"] = positions[:, past:]
        got = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **extra
        )
        layers = getattr(got, self._cache_name).layers
        present = [{"key": layer.keys, "value": layer.values} for layer in layers]
        return {"logits": got.logits, "present": present}


class _SentenceEncoder(nn.Module):
    """Token states pooled into one vector a text, as sentence-transformers does it."""

    def __init__(self, model: nn.Module, pooling: str, normalize: bool) -> None:
        super().__init__()
        self.model = model
        self._pooling = pooling
        self._normalize = normalize

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        got = self.model(input_ids=input_ids, attention_mask=attention_mask)
        states = got.last_hidden_state  # [b, s, d]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)  # [b, s, 1]
        if self._pooling == "cls":
            vector = states[:, 0]
        elif self._pooling == "max":
            vector = states.masked_fill(mask == 0, -1e9).amax(1)
        else:
            vector = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        if self._normalize:
            vector = nn.functional.normalize(vector, p=2.0, dim=1)
        return {"sentence_embedding": vector}


# -- which task -----------------------------------------------------------------------------------


def make_task(model: nn.Module, config: Any, folder: Path, *, cache: bool) -> Task:
    """Decide what the model is for and wrap it.

    Raises:
        InputError: the folder asks for something that cannot be read or done.
    """
    architecture = type(model).__name__
    causal = architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if cache and (not causal or config.is_encoder_decoder):
        raise InputError(
            Diagnostic(
                "hf.cache",
                f"{architecture} is not a causal language model: it has no cache to capture",
                at=str(folder),
                help="leave out cache",
            )
        )
    kind = str(getattr(model, "main_input_name", "input_ids"))
    if cache:
        return _cached(model, config)
    if (folder / "modules.json").is_file():
        return _sentences(model, config, folder)
    if config.is_encoder_decoder:
        return _seq2seq(model, config, kind)
    if kind == "input_ids":
        return _text(model, config)
    if kind == "pixel_values":
        return _image(model, config, folder)
    raise CaptureError(
        Diagnostic(
            "hf.input",
            f"{architecture} takes {kind!r}, and how to make examples of that is not known",
            at=str(folder),
            help="load the model yourself and capture it as a module with example inputs",
        )
    )


_TEXT_DIMS: Mapping[str, Dims] = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "sequence"},
}
_TEXT_SIZES = ({"batch": BATCH, "sequence": SEQUENCE}, {"batch": 3, "sequence": 12})


def _ids(config: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    """Random token ids, int64 [batch, length]."""
    vocab = config.get_text_config().vocab_size
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(min(3, vocab - 1), vocab, (batch, length), generator=rng)


def _mask(batch: int, length: int) -> torch.Tensor:
    """Ones, with the second row padded on the right, int64 [batch, length]."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, -2:] = 0
    return mask


def _text_kwargs(config: Any) -> dict[str, torch.Tensor]:
    return {
        "input_ids": _ids(config, BATCH, SEQUENCE, 0),
        "attention_mask": _mask(BATCH, SEQUENCE),
    }


def _text(model: nn.Module, config: Any) -> Task:
    kwargs, dynamic = _text_kwargs(config), dict(_TEXT_DIMS)
    # Text pairs need segment ids; a bare encoder or a masked model is used on single texts.
    heads = ("SequenceClassification", "QuestionAnswering", "MultipleChoice", "NextSentence")
    takes = inspect.signature(model.forward).parameters
    if "token_type_ids" in takes and any(h in type(model).__name__ for h in heads):
        kwargs["token_type_ids"] = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        dynamic["token_type_ids"] = {0: "batch", 1: "sequence"}
    module = _Plain(model, ("logits", "last_hidden_state", "start_logits"))
    return Task("text", module, kwargs, dynamic, _TEXT_SIZES)


def _cached(model: nn.Module, config: Any) -> Task:
    module = _Cached(model)
    with torch.no_grad():  # the cache's shapes, from the model itself: heads differ per family
        got = model(input_ids=_ids(config, 1, 2, 0), use_cache=True)
    layers = getattr(got, module._cache_name).layers
    rng = torch.Generator().manual_seed(1)
    past: list[dict[str, torch.Tensor]] = []
    dynamic: dict[str, Dims] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total_sequence"},
    }
    for i, layer in enumerate(layers):
        _, heads, _, key_width = layer.keys.shape
        value_width = layer.values.shape[-1]
        past.append(
            {
                "key": torch.randn(BATCH, heads, PAST, key_width, generator=rng),
                "value": torch.randn(BATCH, heads, PAST, value_width, generator=rng),
            }
        )
        for side in ("key", "value"):
            dynamic[f"past_key_values.{i}.{side}"] = {0: "batch", 2: "past_sequence"}
    kwargs = {
        "input_ids": _ids(config, BATCH, SEQUENCE, 0),
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64),
        "past_key_values": past,
    }
    sizes = (
        {"batch": 3, "sequence": 1, "past_sequence": 6},  # a decoding step
        {"batch": 1, "sequence": 5, "past_sequence": 0},  # a prompt
    )
    return Task("text with cache", module, kwargs, dynamic, sizes)


def _seq2seq(model: nn.Module, config: Any, kind: str) -> Task:
    target = {"decoder_input_ids": _ids(config, BATCH, TARGET, 1)}
    target_dims: Mapping[str, Dims] = {"decoder_input_ids": {0: "batch", 1: "decoder_sequence"}}
    module = _Plain(model, ("logits", "last_hidden_state"))
    if kind == "input_ids":
        sizes = tuple(
            {**at, "decoder_sequence": t} for at, t in zip(_TEXT_SIZES, (TARGET, 9), strict=True)
        )
        kwargs = _text_kwargs(config) | target
        return Task("text to text", module, kwargs, {**_TEXT_DIMS, **target_dims}, sizes)
    if kind == "input_features" and hasattr(config, "max_source_positions"):
        rng = torch.Generator().manual_seed(0)
        # Two frames a position: the encoder's second convolution has stride 2.
        shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        features = {"input_features": torch.randn(shape, generator=rng)}
        dims: Mapping[str, Dims] = {"input_features": {0: "batch"}, **target_dims}
        both = ({"batch": 2, "decoder_sequence": TARGET}, {"batch": 3, "decoder_sequence": 9})
        return Task("speech to text", module, features | target, dims, both)
    raise CaptureError(
        Diagnostic(
            "hf.input",
            f"{type(model).__name__} encodes {kind!r}, and how to make examples is not known",
            help="load the model yourself and capture it as a module with example inputs",
        )
    )


def _image(model: nn.Module, config: Any, folder: Path) -> Task:
    height, width = _image_size(config, folder)
    channels = int(getattr(config, "num_channels", 3))
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, channels, height, width, generator=rng)
    module = _Plain(model, ("logits", "last_hidden_state"))
    sizes = ({"batch": BATCH}, {"batch": 3})
    dims: Mapping[str, Dims] = {"pixel_values": {0: "batch"}}
    return Task("image", module, {"pixel_values": pixels}, dims, sizes)


def _image_size(config: Any, folder: Path) -> tuple[int, int]:
    """Height and width: the config's, else the preprocessor's, else 224."""
    size: Any = getattr(config, "image_size", None)
    file = folder / "preprocessor_config.json"
    if size is None and file.is_file():
        settings = json.loads(file.read_text("utf-8"))
        size = settings.get("crop_size") if settings.get("do_center_crop") else None
        size = size or settings.get("size")
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return (int(size), int(size)) if size else (224, 224)


def _sentences(model: nn.Module, config: Any, folder: Path) -> Task:
    file = folder / "modules.json"
    try:
        modules = json.loads(file.read_text("utf-8"))
        kinds = [str(m["type"]).rsplit(".", 1)[-1] for m in modules]
        paths = [str(m["path"]) for m in modules]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            Diagnostic("hf.modules", f"cannot read the module list: {error!r}", at=str(file))
        ) from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            Diagnostic(
                "hf.modules",
                f"a sentence encoder made of {' -> '.join(kinds)} is not supported",
                at=str(file),
                help="supported: Transformer -> Pooling, with or without -> Normalize",
            )
        )
    pooling_file = folder / paths[1] / "config.json"
    try:
        settings = json.loads(pooling_file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            Diagnostic("hf.pooling", f"cannot read the pooling: {error}", at=str(pooling_file))
        ) from error
    modes = [k for k, v in settings.items() if k.startswith("pooling_mode_") and v is True]
    known = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    if len(modes) != 1 or modes[0] not in known:
        raise InputError(
            Diagnostic(
                "hf.pooling",
                f"pooling by {' and '.join(modes) or 'nothing'} is not supported",
                at=str(pooling_file),
                help="supported, one at a time: " + ", ".join(known),
            )
        )
    module = _SentenceEncoder(model, known[modes[0]], "Normalize" in kinds)
    return Task("sentences", module, _text_kwargs(config), _TEXT_DIMS, _TEXT_SIZES)
