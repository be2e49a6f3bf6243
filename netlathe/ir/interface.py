"""Which positions of its inputs and outputs a model still has, where passes have taken some away.

A pruned model may take and give narrower tensors than the one it was made from: a key-value cache with
fewer heads. What was left is recorded in the model by name and dim, in numbers of the first model, so
that data made for that one can be narrowed to fit. The record travels with the ONNX file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Kept = dict[str, dict[int, list[int]]]  # name -> dim -> positions
_KEY = "netlathe.kept"


def kept(model: ir.Model) -> Kept:
    """For inputs and outputs that were narrowed the positions that are left, by dim."""
    held = json.loads(model.metadata_props.get(_KEY, "{}"))
    return {name: {int(dim): at for dim, at in dims.items()} for name, dims in held.items()}


def narrow(model: ir.Model, name: str, dim: int, positions: npt.NDArray[np.int64]) -> None:
    """Record that of a dim of an input or output these positions are left, in their present numbers."""
    record = kept(model)
    dims = record.setdefault(name, {})
    before = dims.get(dim)
    dims[dim] = [int(at) if before is None else before[int(at)] for at in positions]
    model.metadata_props[_KEY] = json.dumps(record, sort_keys=True)


def start_over(model: ir.Model) -> None:
    """Let ``model`` be the first model: data is made for it as it is now."""
    model.metadata_props.pop(_KEY, None)


def fit(array: Array, name: str, to: Mapping[str, Mapping[int, list[int]]], of: Kept) -> Array:
    """An input or output of a model that has ``of`` left, narrowed to what another has left (``to``).

    An array that has the narrower shape already stays as it is.
    """
    for dim, positions in to.get(name, {}).items():
        before = of.get(name, {}).get(dim)
        if array.shape[dim] == len(positions) or (before is not None and before == positions):
            continue
        at = positions if before is None else np.searchsorted(before, positions)
        array = np.take(array, at, axis=dim)
    return array
