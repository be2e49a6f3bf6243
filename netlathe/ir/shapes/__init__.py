"""Shape rules: for each operator of the default domain, what its outputs are and what must hold.

A rule takes a :class:`netlathe.ir.types.Site` and returns one type per output. It calls ``fail`` where
the operator's definition (ONNX operator specification, opset 25) is violated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from netlathe.ir.shapes import (
    attention,
    contract,
    control,
    elementwise,
    generate,
    index,
    movement,
    norm,
    parts,
    quantized,
    recurrent,
    reduce,
    signal,
    spatial,
)
from netlathe.ir.types import Site, Type

Rule = Callable[[Site], Sequence[Type | None]]

_TABLES: tuple[Mapping[str, Rule], ...] = (
    elementwise.RULES,
    reduce.RULES,
    movement.RULES,
    parts.RULES,
    contract.RULES,
    attention.RULES,
    norm.RULES,
    quantized.RULES,
    index.RULES,
    generate.RULES,
    spatial.RULES,
    recurrent.RULES,
    signal.RULES,
    control.RULES,
)

RULES: dict[str, Rule] = {name: rule for table in _TABLES for name, rule in table.items()}
assert len(RULES) == sum(map(len, _TABLES)), "an operator has two shape rules"
