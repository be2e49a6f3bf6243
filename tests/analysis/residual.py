"""Small residual models from text: FFNs, attentions, and attentions with a cache."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from netlathe.ir import normal
from tests.ir.onnx_text import matrix, model

X = "float[b,s,8] x"
FFN = "{v} = RMSNormalization({x}, g) {v}1 = MatMul({v}, up) {v}2 = Relu({v}1) {v}3 = MatMul({v}2, down)"
ATTENTION = """{v} = RMSNormalization({x}, g) {v}q = MatMul({v}, wq) {v}k = MatMul({v}, wk)
    {v}v = MatMul({v}, wv) {v}a = Attention<q_num_heads=2, kv_num_heads=2>({v}q, {v}k, {v}v)
    {v}3 = MatMul({v}a, wo)"""
WEIGHTS: dict[str, Any] = {
    "g": matrix(8),
    "up": matrix(8, 16),
    "down": matrix(16, 8),
    **{name: matrix(8, 8, seed=n) for n, name in enumerate(("wq", "wk", "wv", "wo"))},
}


def ffn(v: str, x: str) -> str:
    """Text of an FFN on ``x`` whose value is ``{v}3``."""
    return FFN.format(v=v, x=x)


def attention(v: str, x: str) -> str:
    """Text of an attention on ``x`` whose value is ``{v}3``."""
    return ATTENTION.format(v=v, x=x)


def typed(body: str, inputs: str = X, outputs: str = "float y", **weights: Any) -> ir.Model:
    """A model from text, in normal form."""
    made = model(inputs, outputs, body, **{**WEIGHTS, **weights})
    normal.normalize(made)
    return made


CACHED_INPUTS = f"{X}, float[b,p,8] k0, float[b,p,8] v0, float[b,p,8] k1, float[b,p,8] v1"
CACHED_OUTPUTS = "float y, float nk0, float nv0, float nk1, float nv1"


def cached(size_from: str = "k1") -> ir.Model:
    """Two attentions with a cache each; a size of one of them is read at the end."""
    layers = " ".join(
        f"""q{i} = MatMul(h{i}, wq) a{i} = MatMul(h{i}, wk) b{i} = MatMul(h{i}, wv)
        nk{i} = Concat<axis=1>(k{i}, a{i}) nv{i} = Concat<axis=1>(v{i}, b{i})
        c{i} = Attention<q_num_heads=2, kv_num_heads=2>(q{i}, nk{i}, nv{i})
        o{i} = MatMul(c{i}, wo) h{i + 1} = Add(h{i}, o{i})"""
        for i in range(2)
    )
    size = f"n = Shape<start=1, end=2>({size_from}) f = Cast<to=1>(n) y = Div(h2, f)"
    return typed(f"h0 = Relu(x) {layers} {size}", CACHED_INPUTS, CACHED_OUTPUTS)
