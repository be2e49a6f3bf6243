"""Axis signatures of the operators of the default domain (opset 25): one table, keyed by operator.

An operator that is not in the table pins what it touches.
"""

from __future__ import annotations

from netlathe.analysis.axes.signature import Maker, Signature, Table
from netlathe.analysis.axes.signatures import (
    attention,
    contract,
    elementwise,
    lookup,
    movement,
    norm,
    quantized,
    reduce,
    segments,
    spatial,
)

_TABLES: tuple[Table, ...] = (
    elementwise.TABLE,
    reduce.TABLE,
    movement.TABLE,
    segments.TABLE,
    contract.TABLE,
    attention.TABLE,
    norm.TABLE,
    lookup.TABLE,
    spatial.TABLE,
    quantized.TABLE,
)

TABLE: dict[str, Signature | Maker] = {
    op: entry for table in _TABLES for op, entry in table.items()
}
assert len(TABLE) == sum(map(len, _TABLES)), "an operator has two axis signatures"
