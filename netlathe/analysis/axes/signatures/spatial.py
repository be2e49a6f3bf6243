"""Pools and resizing."""

from __future__ import annotations

from netlathe.analysis.axes.signature import Signature, Site, Spot, Table, named
from netlathe.ir import dims

_WINDOW = "slides a window along it"


def _pool(s: Site) -> Signature:
    if s.read(1):
        s.refuse("gives out where its largest elements are")
    positive = s.node.op_type != "AveragePool"
    return Signature("b c *s -> b c *t", fixed={"s t": _WINDOW}, linear="0", positive=positive)


def _global_pool(s: Site) -> Signature:
    ones = " ".join(["1"] * (s.rank() - 2))
    positive = s.node.op_type != "GlobalAveragePool"
    return Signature(
        f"b c *s -> b c {ones}",
        fixed={"s": "pools over it"},
        linear="0",
        positive=positive,
    )


def _resize(s: Site) -> Signature:
    """A dim that keeps its size is copied; where sizes are given, they name it all the same."""
    if s.has(1) and s.text("coordinate_transformation_mode") == "tf_crop_and_resize":
        s.refuse("crops to a region of interest")
    axes = s.integers("axes") or range(s.rank())
    element = {axis % s.rank(): number for number, axis in enumerate(axes)}
    before, after = named("d", s.rank()), named("d", s.rank())
    fixed: dict[str, str] = {}
    uses: dict[Spot, str] = {}
    stretch = s.text("keep_aspect_ratio_policy", "stretch") == "stretch"
    for axis, (given, size) in enumerate(zip(s.shape(), s.out(), strict=True)):
        if axis not in element:
            continue
        if not stretch or not dims.same(given, size):
            after[axis] = f"t{axis}"
            fixed[f"d{axis} t{axis}"] = "interpolates between its positions"
        elif s.has(3) and size != 1:
            uses[3, element[axis]] = f"d{axis}"
    return Signature(
        f"{' '.join(before)}, _, _, _ -> {' '.join(after)}", uses=uses, fixed=fixed, linear="0"
    )


TABLE: Table = {
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    "Resize": _resize,
}
