"""The table: every ONNX op of the default domain that works on tensors, and its torch function."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    activation,
    attention,
    cast,
    control,
    elementwise,
    linear,
    loss,
    movement,
    normalization,
    quantize,
    recurrent,
    reduce,
    resize,
    sequence,
    signal,
    text,
    vision,
    window,
)
from .row import Row

_FAMILIES = (
    activation,
    attention,
    cast,
    control,
    elementwise,
    linear,
    loss,
    movement,
    normalization,
    quantize,
    recurrent,
    reduce,
    resize,
    sequence,
    signal,
    text,
    vision,
    window,
)

TABLE: Mapping[str, Row] = {op: entry for family in _FAMILIES for op, entry in family.ROWS.items()}
