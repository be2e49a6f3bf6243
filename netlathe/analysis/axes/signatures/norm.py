"""Normalizations. Along ``d`` they divide by a norm or deviation, which knows how many positions d has."""

from __future__ import annotations

from netlathe.analysis.axes.signature import Signature, Site, Table, named

_STATISTICS = "takes statistics along it"


def _layer_norm(s: Site) -> Signature:
    """LayerNormalization and RMSNormalization over all dims from ``axis`` on.

    Scale and bias may have fewer dims, or dims of one position. LayerNormalization's second and third
    output, the mean and the inverse deviation, have no counterpart over other positions.
    """
    rank, axis = s.rank(), s.axis(-1)
    rows, width = named("b", axis), named("d", rank - axis)
    layer = s.node.op_type == "LayerNormalization"

    def aligned(index: int) -> str:
        return " ".join(width[len(width) - s.rank(index) :]) if s.has(index) else ""

    ones = ["1"] * len(width)
    statistics = ["", *[f", {' '.join(rows + ones)}"] * (len(s.node.outputs) - 1)]
    read = any(s.read(index) for index in (1, 2))
    line = " ".join(rows + width)
    bias = f", {aligned(2)}?" if layer else ""
    return Signature(
        f"{line}, {aligned(1)}{bias} -> {line}{''.join(statistics)}",
        fixed={" ".join(width): "gives out its statistics"} if read else {},
        normalizes=" ".join(width),
        linear="1 + 2" if s.has(2) else "1",
        turns="" if layer else " ".join(width),
    )


def _batch_norm(s: Site) -> Signature:
    if s.integer("training_mode"):
        s.refuse("is in training mode")
    return Signature("b c *s, c, c, c, c -> b c *s", linear="1 + 2")


def _group_norm(_: Site) -> Signature:
    return Signature(
        "b (g c) *s, (g c), (g c) -> b (g c) *s",
        uses={"num_groups": "g"},
        fixed={"s": _STATISTICS},
        normalizes="c",
        linear="1 + 2",
    )


def _lp_norm(s: Site) -> Signature:
    letters = " ".join(named("d", s.rank()))
    return Signature(f"{letters} -> {letters}")


def _mean_variance(s: Site) -> Signature:
    letters = named("d", s.rank())
    axes = s.integers("axes") or (0, 2, 3)
    along = " ".join(letters[axis] for axis in axes)
    line = " ".join(letters)
    return Signature(f"{line} -> {line}", fixed={along: _STATISTICS})


TABLE: Table = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": Signature(
        "b c *s, c, c -> b c *s", fixed={"s": _STATISTICS}, linear="1 + 2"
    ),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    "LRN": Signature("b c *s -> b c *s", fixed={"c": "mixes neighbouring positions"}),
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
}
