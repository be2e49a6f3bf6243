"""Tied weights become one value: by storage, and for big matrices by equal bytes.

Small and 1-D tensors are never compared by bytes: the all-ones scales of two norms are equal today
and two parameters all the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe.ir import edit, weights
from netlathe.pipeline.ledger import Entry

_LEAST_SIZE = 4096  # elements; smaller matrices are equal by chance or by initialisation
_PROBES = 64  # elements looked at before whole tensors are compared


def merge(graph: ir.Graph) -> list[Entry]:
    """Merge tied initializers of the main graph; the first of each keeps its name."""
    own = [
        value
        for value in graph.initializers.values()
        if weights.is_weight(value) and not value.is_graph_output()
    ]
    entries = _merge(((storage, value) for value in own for storage in _storage(value)), "storage")
    rest = [value for value in own if value.graph is graph]
    return entries + _merge(_by_bytes(rest), "equal bytes")


def _merge(keyed: Iterable[tuple[Hashable, ir.Value]], how: str) -> list[Entry]:
    first: dict[Hashable, ir.Value] = {}
    entries = []
    for key, value in keyed:
        kept = first.setdefault(key, value)
        if kept is value:
            continue
        name = value.name or ""
        edit.redirect(value, kept)
        edit.drop_if_unread(value)
        reason = f"tied to {kept.name} by {how}: one value now"
        entries.append(Entry(name, "applied", reason, detail={"kept": kept.name, "by": how}))
    return entries


def _storage(value: ir.Value) -> list[Hashable]:
    """What identifies the memory or the file range that holds a weight; nothing where unknown."""
    tensor = value.const_value
    if tensor is None or not tensor.shape or tensor.size < 2:
        return []
    kind = (tensor.dtype, tuple(tensor.shape))
    if isinstance(tensor, ir.ExternalTensor):
        return [(*kind, str(tensor.path), tensor.offset, tensor.length)]
    raw: Any = getattr(tensor, "raw", None)
    pointer: Any = getattr(raw, "data_ptr", None)  # a torch tensor; torch itself is an extra
    if pointer is not None:
        return [(*kind, "torch", pointer(), tuple(raw.stride()))] if pointer() else []
    if isinstance(raw, np.ndarray):
        interface = raw.__array_interface__
        return [(*kind, "numpy", interface["data"][0], raw.strides)]
    return [(*kind, "object", id(tensor))]


def _by_bytes(values: list[ir.Value]) -> list[tuple[Hashable, ir.Value]]:
    """Matrices that are equal to another, keyed by their bytes.

    A recipe is not computed to be compared: what it was made from has been compared before.
    """
    alike: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in values:
        tensor = value.const_value
        if tensor is None or weights.is_recipe(tensor) or tensor.dtype == ir.DataType.STRING:
            continue
        if len(tensor.shape) >= 2 and tensor.size >= _LEAST_SIZE:
            alike[tensor.dtype, tuple(tensor.shape)].append(value)
    probed: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for kind, group in alike.items():
        for value in group if len(group) > 1 else []:
            probed[kind, _probe(value)].append(value)
    return [
        ((key, weights.digest(value.const_value)), value)
        for key, group in probed.items()
        for value in group
        if len(group) > 1 and value.const_value is not None
    ]


def _probe(value: ir.Value) -> bytes:
    """A few elements, spread over the tensor."""
    flat = weights.array(value).reshape(-1)
    found = flat[:: max(1, flat.size // _PROBES)].tobytes()
    if value.const_value is not None:  # around each element the system has mapped many pages
        weights.give_back_tensor(value.const_value)
    return found
