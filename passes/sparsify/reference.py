"""The model that a sparse one must equal, from its ledger alone and without the code that edits.

Weights get their zeros, and their values, in the order in which channels were: an order is no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Equivalent, Reference
from netlathe.pipeline.verification import tolerance

Array = npt.NDArray[Any]

# The same numbers bit for bit in the same kernels; what is left is room for one that adds in another
# order where its weight is a constant: 4 ulp of float32.
SAME = 4 * 2.0**-23
# Channels in another order: sums of k products of rounded numbers, k up to some thousands.
REORDERED = 2.0**-16


def build(before: ir.Model, chosen: Sequence[Entry]) -> Reference:
    """``before``, which is consumed, with sparse weights."""
    values = {v.name: v for graph in before.graphs() for v in graph.initializers.values()}
    reordered = False
    for entry in chosen:
        if entry.status != "applied":
            continue
        if "order_of" in entry.detail:
            reordered = True
            continue
        value = values[entry.detail["value"]]
        assert value.const_value is not None
        array = value.const_value.numpy()
        if "weight" in entry.arrays:
            made = np.array(entry.arrays["weight"], array.dtype)
        else:
            flat = array.reshape(-1).copy()
            bits = (entry.arrays["kept"][:, None] >> np.arange(7, -1, -1, dtype=np.uint8)) & 1
            flat[bits.reshape(-1)[: flat.size] == 0] = 0
            made = flat.reshape(array.shape)
        dtype = value.const_value.dtype
        value.const_value = ir.Tensor(np.ascontiguousarray(made), dtype=dtype, name=value.name)
    bound = tolerance(Equivalent(REORDERED), before) if reordered else SAME
    return Reference(before, bound, reordered=reordered)
