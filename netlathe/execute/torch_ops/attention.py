"""Attention, rotary embedding and linear attention.

b batch, h query heads, g key/value heads (h a multiple of g), s queries, t keys, d and v head sizes.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, row
from .storage import TORCH_DTYPE


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    output_count: int = 1,
) -> tuple[Tensor | None, ...]:
    """Attention: (y, present key, present value, scores), 4-D [b, h, s, d] or 3-D [b, s, h * d].

    The order is scores, softcap, masks, softmax. A query that may attend nothing gives zeros, where
    a softmax of -inf alone would give NaN.
    """
    packed = q.dim() == 3
    if packed:
        assert q_num_heads is not None and kv_num_heads is not None
        q, k, v = (
            _heads(q, q_num_heads),
            _heads(k, kv_num_heads),
            _heads(v, kv_num_heads),
        )
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present_key, present_value = k, v
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # g heads are each used by h / g queries
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    # The root on either side keeps float16 scores in range, as the specification has it.
    root = math.sqrt(abs(factor))
    scores = (q * math.copysign(root, factor)) @ (k * root).transpose(-1, -2)  # [b, h, s, t]
    shown = scores
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if qk_matmul_output_mode == 1:
        shown = scores
    allowed = _allowed(q, k, past, nonpad_kv_seqlen, is_causal, left_window_size, right_window_size)
    bias = None
    if attn_mask is not None:
        short = k.shape[2] - attn_mask.shape[-1]
        if attn_mask.dtype == torch.bool:
            mask = F.pad(attn_mask, [0, short])
            allowed = mask if allowed is None else allowed & mask
        else:
            bias = F.pad(attn_mask, [0, short], value=-math.inf)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    if qk_matmul_output_mode == 2:
        shown = scores
    weights = scores
    if softmax_precision is not None:
        weights = weights.to(TORCH_DTYPE[ir.DataType(softmax_precision)])
    weights = torch.softmax(weights, -1)
    if bias is not None or allowed is not None:
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = weights.masked_fill(empty, 0)
    weights = weights.to(q.dtype)
    if qk_matmul_output_mode == 3:
        shown = weights
    y = weights.to(v.dtype) @ v  # [b, h, s, v]
    if packed:
        y = y.transpose(1, 2).flatten(2)
    return y, present_key, present_value, shown


def _heads(x: Tensor, count: int) -> Tensor:
    """[b, s, h * d] -> [b, h, s, d]."""
    return x.reshape(*x.shape[:2], count, x.shape[2] // count).transpose(1, 2)


def _allowed(
    q: Tensor,
    k: Tensor,
    past: int,
    lengths: Tensor | None,
    is_causal: int,
    left: int,
    right: int,
) -> Tensor | None:
    """Which key j query i may attend, from positions alone: None (all) or [b or 1, 1, s, t] bool.

    A query stands at p = i + offset, where offset counts the keys before the block of queries: the
    past, or with an outside cache the valid keys less the queries.
    """
    if is_causal:
        right = 0 if right < 0 else min(right, 0)
    if left < 0 and right < 0 and lengths is None:
        return None
    j = torch.arange(k.shape[2], device=q.device)
    position = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + past
    allowed = None
    if lengths is not None:
        lengths = lengths.reshape(-1, 1, 1, 1)
        position = position + lengths - q.shape[2]
        allowed = (j < lengths).expand(-1, 1, q.shape[2], -1)
    if left >= 0:
        near = j >= position - left
        allowed = near if allowed is None else allowed & near
    if right >= 0:
        seen = j <= position + right
        allowed = seen if allowed is None else allowed & seen
    return allowed


def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """RotaryEmbedding: x [b, h, s, d] or [b, s, h * d].

    The caches are [positions, r / 2] looked up by ``position_ids`` [b, s], or else [b, s, r / 2].
    """
    packed = x.dim() == 3
    if packed:
        assert num_heads is not None
        x = _heads(x, num_heads)
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    cos, sin = cos_cache.unsqueeze(1), sin_cache.unsqueeze(1)  # [b, 1, s, r / 2]
    width = rotary_embedding_dim or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    if interleaved:
        turned = torch.stack([real, imaginary], -1).flatten(-2)
    else:
        turned = torch.cat([real, imaginary], -1)
    y = torch.cat([turned, rest], -1) if rotary_embedding_dim else turned
    return y.transpose(1, 2).flatten(2) if packed else y


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """LinearAttention, token by token, in float32: (output [b, s, h * v], state [b, g, d, v])."""
    q, k, v = (
        _heads(query, q_num_heads).to(torch.promote_types(query.dtype, torch.float32)),
        _heads(key, kv_num_heads).to(torch.promote_types(key.dtype, torch.float32)),
        _heads(value, kv_num_heads).to(torch.promote_types(value.dtype, torch.float32)),
    )
    factor = scale or 1 / math.sqrt(q.shape[-1])
    batch, heads, length, d = k.shape
    if past_state is None:
        state = k.new_zeros(batch, heads, d, v.shape[-1])
    else:
        state = past_state.to(k.dtype)
    groups = q_num_heads // kv_num_heads
    outputs = []
    for t in range(length):
        k_t, v_t = k[:, :, t], v[:, :, t]
        if update_rule in ("gated", "gated_delta"):
            assert decay is not None
            gate = decay[:, t].to(k.dtype).exp().reshape(batch, heads, -1, 1)  # per head or per d
            state = state * gate
        if update_rule in ("delta", "gated_delta"):
            assert beta is not None
            rate = beta[:, t].to(k.dtype).reshape(batch, -1, 1)  # per head or for all
            v_t = rate * (v_t - torch.einsum("bgdv,bgd->bgv", state, k_t))
        state = state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        per_query = state.repeat_interleave(groups, 1)
        outputs.append(factor * torch.einsum("bhdv,bhd->bhv", per_query, q[:, :, t]))
    y = torch.stack(outputs, 1).flatten(2).to(query.dtype)
    return y, state.to(query.dtype if past_state is None else past_state.dtype)


ROWS: dict[str, Row] = {
    "Attention": row(attention, facts=("output_count",)),
    "RotaryEmbedding": row(rotary_embedding),
    "LinearAttention": row(linear_attention),
}
