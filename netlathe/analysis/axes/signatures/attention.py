"""Attention and rotary embeddings."""

from __future__ import annotations

from netlathe.analysis.axes.signature import Signature, Site, Table
from netlathe.ir import dims

_SEQUENCE = "weighs positions of a sequence against each other"
_PAIRS = "turns pairs of positions"


def _attention(s: Site) -> Signature:
    """n key/value heads, each shared by r query heads; h wide keys, v wide values; p past positions.

    In 3-D form the heads stand side by side in the last dim. The mask broadcasts; one that is shorter
    than the keys has positions of its own (m).
    """
    if s.rank(0) == 3:
        query, key, value, out = "b s (n r h)", "b t (n h)", "b t (n v)", "b s (n r v)"
    else:
        query, key, value, out = "b (n r) s h", "b n t h", "b n t v", "b (n r) s v"
    total = "(p|t)" if s.has(4) else "t"
    mask = _mask(s, total)
    past = ("b n p h", "b n p v") if s.has(4) else ("", "")
    inputs = f"{query}, {key}, {value}, {mask}?, {past[0]}?, {past[1]}?, b?"
    outputs = [out, f"b n {total} h", f"b n {total} v", f"b (n r) s {total}"]
    stated = {"q_num_heads": "(n r)", "kv_num_heads": "n"}  # 4-D inputs may leave them out
    # The caches that it gives out are keys and values as they come in.
    plain = len(s.node.outputs) == 1 and not s.has(4)
    sequence = "s t" + " p" * s.has(4) + " m" * mask.endswith("m")
    return Signature(
        f"{inputs} -> {', '.join(outputs[: len(s.node.outputs)])}",
        uses={name: term for name, term in stated.items() if s.integer(name)},
        fixed={sequence: _SEQUENCE},
        linear="2" if plain else "",
        inner="0*1" if plain else "",
    )


def _mask(s: Site, total: str) -> str:
    if not s.has(3):
        return ""
    length, keys = s.shape(3)[-1], s.shape(1)[-2]
    if s.has(4):
        keys = dims.add(keys, s.shape(4)[2])
    whole = length == 1 or dims.same(length, keys)
    return " ".join(["b", "(n r)", "s", total if whole else "m"][4 - s.rank(3) :])


def _rotary(s: Site) -> Signature:
    """Pairs of positions turn together: (2 p), or (p 2) interleaved; what follows them (e) stays.

    The tables hold a cosine and a sine per pair, by sequence position or, with position ids, by
    position in the table (m).
    """
    pairs = "p two" if s.integer("interleaved") else "two p"
    packed = s.rank(0) == 3
    width = s.shape(0)[-1]
    heads = s.integer("num_heads") if packed else 1
    if not isinstance(width, int) or not heads:
        s.refuse("has heads of unknown size")
    turned = s.integer("rotary_embedding_dim") or width // heads
    head = f"({pairs}|e)" if turned < width // heads else f"({pairs})"
    x = f"b s (n {head})" if packed else f"b n s {head}"
    table, ids = ("m p", "b s") if s.has(3) else ("b s p", "")
    stated = {"num_heads": "n", "rotary_embedding_dim": f"({pairs})"}
    return Signature(
        f"{x}, {table}, {table}, {ids}? -> {x}",
        sizes={"two": 2},
        uses={name: term for name, term in stated.items() if s.integer(name)},
        fixed={"two": _PAIRS},
        linear="0*1 + 0*2" + " + 0" * (turned < width // heads),
        reads={3: "m"} if s.has(3) else {},
    )


TABLE: Table = {"Attention": _attention, "RotaryEmbedding": _rotary}
