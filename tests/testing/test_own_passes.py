"""NetLathe's own passes keep the laws that it asks of others."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from netlathe import Captured, Context
from netlathe.passes.fold_norms import FoldNorms
from netlathe.pipeline import text
from netlathe.testing import Case, from_text, models, pass_cases

SLICE, ROTATE = "slice(ratio=0.25, round_to=4)", "rotate(online=True)"
CUT = 'slice(parameters=0.2, basis="loss", cut=True, refit=True, round_to=4)'
BLOCKS = "slice(ratio=0.5, adapters=True, round_to=4)"
CACHE = 'quantize_cache(codes="int4")'
QUICK = (
    "cleanup",
    "fold_batch_norm",
    "fold_norms",
    "convert",
    'drop(kind="ffn")',
    "quantize(min_size=0)",
    "tie_blocks",
    'equalize(method="range")',
    "sparsify(min_size=0)",
    CACHE,
)
SLOW = (
    CUT,
    BLOCKS,
    "fold_norms(untie=True)",
    'convert(dtype="bfloat16")',
    "drop",
    'drop(kind="block")',
    "quantize(min_size=0, embeddings=False)",
    'quantize(min_size=0, weights="int4", solver="gptq", vectors="float16", requantize=True)',
    'quantize(min_size=0, weights="int4", low_rank=1, low_rank_basis="input")',
    'quantize(min_size=0, bits=6, formats=("int4", "int8"))',
    'quantize(min_size=0, activations="int8", activation_scales="token", activation_form="qdq")',
    'quantize(min_size=0, activations="uint8", activation_scales="tensor")',
    'quantize(min_size=0, activations="int8", activation_scales="token")',
    "prune(ratio=0.25, round_to=2)",
    SLICE,
    "equalize",
    'equalize(method="awq")',
    ROTATE,
    'sparsify(score="sparsegpt", permute=True, min_size=0)',
    'sparsify(pattern="unstructured", score="wanda", refine=True, sweeps=1, min_size=0)',
)


def folded() -> list[Captured]:
    """Models whose norms have no scales of their own, as slicing and rotating ask for."""
    found = [captured for captured in models() if captured.source in ("encoder", "decoder")]
    for captured in found:
        FoldNorms(untie=True).run(captured.model, Context())
    return found


def cached() -> list[Captured]:
    """Attention over a cache that comes in and goes out with what is new."""
    text = """(
        float[b,2,s,8] q, float[b,2,s,8] k, float[b,2,s,8] v, float[b,2,p,8] past_k,
        float[b,2,p,8] past_v
        ) => (float[b,2,s,8] y, float[b,2,t,8] present_k, float[b,2,t,8] present_v) {
        present_k = Concat<axis = 2>(past_k, k)
        present_v = Concat<axis = 2>(past_v, v)
        y = Attention(q, present_k, present_v)
    }"""
    return [from_text("cache", text)]


def cases(pipeline: str) -> list[Any]:
    """The laws, one test each; those that start a process are slow but for one pass."""
    (pass_,) = text.parse(pipeline)
    found = []
    given = cached() if pipeline == CACHE else None
    for case in pass_cases(pass_, folded() if pipeline in (SLICE, CUT, BLOCKS, ROTATE) else given):
        slow = pipeline in SLOW or (str(case) == "process" and pipeline != "fold_batch_norm")
        marks = [pytest.mark.slow] if slow else []
        found.append(pytest.param(case, id=f"{pipeline}-{case}", marks=marks))
    return found


@pytest.mark.parametrize("case", [c for p in (*QUICK, *SLOW) for c in cases(p)])
def test_our_passes_keep_the_law(case: Case[Any]) -> None:
    case.check()


def test_no_pass_of_ours_is_left_out() -> None:
    ours = {
        entry.name
        for entry in metadata.entry_points(group="netlathe.passes")
        if entry.value.startswith("netlathe.")
    }
    judged = {pass_.name for pipeline in (*QUICK, *SLOW) for pass_ in text.parse(pipeline)}
    assert ours <= judged
