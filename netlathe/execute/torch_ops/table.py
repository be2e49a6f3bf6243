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
    signal,
    text,
    vision,
    window,
)
from .row import Row, row
from . import host

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
    signal,
    text,
    vision,
    window,
)

TABLE: Mapping[str, Row] = {op: row for family in _FAMILIES for op, row in family.ROWS.items()}
