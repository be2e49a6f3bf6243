"""The zoo, and a pre-norm encoder with the parts of BERT, as the tests of slicing take them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.frontends import exporter_metadata
from netlathe.ir import normal
from netlathe.passes.fold_norms import FoldNorms
from netlathe.passes.normalize import raise_operators
from netlathe.pipeline.pass_ import Context
from tests import zoo, zoo_ir

PRE_NORM_BERT = "prenorm_bert"
_RECIPE = zoo.Recipe(
    zoo.hf(
        "RobertaPreLayerNorm",
        "ForMaskedLM",
        vocab_size=zoo.VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=80,
        pad_token_id=0,
    ),
    "text",
    ("logits",),
    ("RobertaPreLayerNormLayer",),
)


def captured(name: str) -> ir.Model:
    """An exported model, raised and in normal form."""
    if name != PRE_NORM_BERT:
        return zoo_ir.captured(name)
    return _pre_norm_bert()[0].clone()


def feeds(name: str, seed: int = 0) -> list[dict[str, npt.NDArray[Any]]]:
    """Feeds at two sizes."""
    if name != PRE_NORM_BERT:
        return zoo_ir.feeds(name, seed)
    made = _pre_norm_bert()[1]
    trials = [made.feeds(sizes, seed + at) for at, sizes in enumerate(made.sizes)]
    return [{key: value.numpy() for key, value in trial.items()} for trial in trials]


def folded(name: str) -> ir.Model:
    """A model with its norms folded."""
    return _folded(name).clone()


def data(name: str) -> Context:
    """A context with a few samples."""
    return Context(calibration=[feed for seed in (5, 6, 7) for feed in feeds(name, seed)])


def wide(fed: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """A feed with its numbers in float64."""
    return {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in fed.items()}


@lru_cache(maxsize=4)
def _folded(name: str) -> ir.Model:
    model = captured(name)
    FoldNorms(untie=True).run(model, Context())
    normal.normalize(model)
    return model


@lru_cache(maxsize=1)
def _pre_norm_bert() -> tuple[ir.Model, zoo.ZooModel]:
    made = zoo.made(PRE_NORM_BERT, _RECIPE)
    model = zoo.export(made)
    exporter_metadata.condense(model)
    normal.normalize(model)
    raise_operators(model)
    normal.normalize(model)
    return model, made
