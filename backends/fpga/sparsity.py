"""N:M patterns of weights: which one a layer follows, and whether the core has it."""

from __future__ import annotations

import numpy as np

from netlathe.backends.fpga.recognise import Product
from netlathe.backends.fpga.spec import PATTERNS, Pattern, Spec
from netlathe.backends.fpga.tensors import Array
from netlathe.diagnostics import Diagnostic, LowerError

# Groups in which a pattern is looked for that a core might not have.
GROUPS = (4, 8, 16)


def pattern_of(product: Product, spec: Spec) -> Pattern | None:
    """The first pattern of the core that the weights follow; None: they are taken as dense.

    Few inputs and grouped convolutions are always dense: there a pattern saves nothing. So is all on a core
    without patterns.

    Raises:
        LowerError: the weights follow a pattern that the core lacks, and none that it has.
    """
    wide = product.weights.transpose(0, 2, 3, 1)  # along the inputs, tap by tap
    if product.groups != 1 or wide.shape[-1] < spec.rows * 2 or not spec.kept:
        return None
    for pattern in spec.kept:
        if _most(wide, pattern.group) <= pattern.kept:
            return pattern
    for group in GROUPS:
        kept = _most(wide, group)
        if kept <= group // 2:
            have = ", ".join(map(str, spec.kept))
            raise LowerError(
                Diagnostic(
                    "fpga.pattern",
                    f"{product.name}: its weights are {kept}:{group}, and this core has {have}",
                    help=_advice(wide, spec),
                )
            )
    return None


def _most(wide: Array, group: int) -> int:
    """The most weights of a group that are not zero."""
    pad = -wide.shape[-1] % group
    grouped = np.pad(wide, ((0, 0),) * 3 + ((0, pad),))
    return int((grouped.reshape(-1, group) != 0).sum(1).max(initial=0))


def _advice(wide: Array, spec: Spec) -> str:
    able = [name for name, p in PATTERNS.items() if _most(wide, p.group) <= p.kept]
    if able:
        return f"build a core that has it: the target's setting patterns={able[0]}"
    return (
        f"sparsify(pattern={str(spec.kept[0])!r}), or the target's setting patterns=none,"
        " which computes the zeros too"
    )
