"""Quantized values with a scale per tensor, per position of an axis, or per block of positions."""

from __future__ import annotations

from netlathe.analysis.axes.signature import Signature, Site, Spot, Table, named


def _scaled(s: Site) -> Signature:
    """Scale and zero point of QuantizeLinear and DequantizeLinear, which lie alike."""
    letters, block = named("d", s.rank()), s.integer("block_size")
    uses: dict[Spot, str] = {}
    if s.rank(1) == 0:
        scale = ""
    elif block:
        axis = s.axis(1)
        scale = " ".join(letters)
        letters[axis] = f"({letters[axis]} m)"
        uses["block_size"] = "m"
    else:
        scale = letters[s.axis(1)] if s.shape(1) != (1,) else "1"
    line = " ".join(letters)
    zero = f", {scale}?"
    linear = "1" if s.node.op_type == "DequantizeLinear" else ""
    return Signature(f"{line}, {scale}{zero} -> {line}", uses=uses, linear=linear)


TABLE: Table = {"DequantizeLinear": _scaled, "QuantizeLinear": _scaled}
