"""Attention in one kernel: what it computes. :mod:`netlathe.backends.tvm.kernels.heads` does it on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from netlathe.backends.tvm.cuda import flash, product_attention, warp_attention
from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.heads import fused
from netlathe.backends.tvm.kernels.reduce import COMBINE
from netlathe.backends.tvm.tir import Code, Expr
from netlathe.backends.tvm.values import Ready, Store, Value
from netlathe.ir.dims import Dim


@dataclass(frozen=True)
class Plain:
    """Which keys are seen. ``causal``: query i sees those up to i + ``offset``, else all of them.

    ``lengths`` [b]: the keys of a sequence end there, and its queries stand at that end. ``allowed`` [b, t]:
    keys that any query may see at all. ``mask`` [b or 1, h or 1, s or 1, t]: what is added to each score, or
    whether it counts.
    """

    causal: bool
    offset: Dim
    lengths: Ready | None = None
    allowed: Ready | None = None
    mask: Ready | None = None


@dataclass(frozen=True)
class Spec:
    """b batch, h heads, s queries, t keys, d and v sizes of a head; h a multiple of the key heads."""

    q: Value  # [b, h, s, d]
    k: Value  # [b, h / groups, t, d]
    v: Value  # [b, h / groups, t, v]
    groups: int
    scale: float
    softcap: float
    # (code, b, h, i, j) -> what is added to the score, or None
    bias: Callable[[Code, Expr, Expr, Expr, Expr], Expr] | None
    # (code, b, h, i, j) -> whether query i may attend key j, or None
    allowed: Callable[[Code, Expr, Expr, Expr, Expr], Expr] | None
    # (code, b, i) -> how many leading keys the queries up to i may attend at most, or None for all
    limit: Callable[[Code, Expr, Expr], Expr] | None
    # what bias, allowed and limit say, for kernels that know no more than that; None if they say more
    plain: Plain | None = None
    # codes of k, codes of v, scales of k, scales of v: int8 caches that k and v are read from; of int4 ones,
    # whose bytes have two codes, zero points of k and of v too
    coded: tuple[Ready, ...] | None = None


def attention(kernel: Kernel, spec: Spec, store: Store) -> str:
    """store([b, h, query, v], element)."""
    code = kernel.code
    if isinstance(code, GpuCode) and code.on_host:
        if spec.plain is not None:
            return flash.attention(kernel, code, spec, store)
        in_memory = all(isinstance(value, Ready) for value in (spec.q, spec.k, spec.v))
        suits = in_memory and product_attention.suits(spec.q, spec.k, spec.v)
        how = product_attention.attention if suits else warp_attention.attention
        return how(kernel, code, spec, COMBINE, store)
    fused(kernel, spec, store)
    return "attention.fused"
