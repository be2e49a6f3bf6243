"""A decoder whose cache grows as one whose cache has room: what a server keeps, and writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, normal

ROOM = "room"


def with_room(model: ir.Model) -> ir.Model:
    """A LLaMA as it is captured with ``cache=True``, with caches [batch, heads, room, depth].

    Where the model joins a cache with the keys or values of new tokens, by Concat, the result writes these
    into the cache, by TensorScatter, behind the tokens that are there. The input ``first`` (int64 [batch])
    says how many those are, in the place of ``attention_mask``; positions count on from there, and Attention
    reads so many and the new ones. ``model`` is in normal form, and is left as it was.

    Raises:
        ValueError: the model has no such caches, or none that rotary embeddings give positions to.
    """
    made = model.clone()
    graph = made.graph
    given = {value.name: value for value in graph.inputs}
    joined = [
        node
        for node in graph
        if node.op_type == "Concat" and node.inputs[0] in graph.inputs and len(node.inputs) == 2
    ]
    positions = _positions(graph)
    if not joined or positions is None or not {"input_ids", "attention_mask"} <= given.keys():
        raise ValueError("this is no decoder with rotary embeddings and a cache that grows")
    ids = given["input_ids"]
    assert ids.shape is not None
    first = ir.Value(name="first", type=ir.TensorType(ir.DataType.INT64))
    first.shape = ir.Shape([ids.shape[0]])
    graph.inputs.append(first)

    def new(op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        node = edit.node(op_type, inputs, attributes)
        graph.append(node)
        return node.outputs[0]

    one = edit.constant(graph, np.array([1]), "second_axis")
    number = [edit.constant(graph, np.array(n), "number") for n in (0, 1)]
    count = new("Shape", ids, start=1, end=2)
    new_ones = new("Range", number[0], new("Squeeze", count), number[1])
    edit.redirect(positions, new("Add", new("Unsqueeze", first, one), new_ones))
    total = new("Add", first, count)
    for node in joined:
        cache, result = node.inputs[0], node.outputs[0]
        assert cache is not None and cache.shape is not None
        cache.shape = ir.Shape([*cache.shape[:2], ROOM, cache.shape[3]])
        written = new("TensorScatter", cache, node.inputs[1], first, axis=2)
        written.type, written.shape = cache.type, cache.shape
        edit.redirect(result, written)
    for node in [node for node in graph if node.op_type == "Attention"]:
        kept = {name: node.attributes.get_float(name, 0.0) for name in ("scale", "softcap")}
        attends = edit.node(
            "Attention", [*node.inputs[:3], None, None, None, total], {"is_causal": 1, **kept}
        )
        edit.replace(node, [attends], {node.outputs[0]: attends.outputs[0]}, "with_room")
    edit.remove_dead(graph)
    graph.inputs.remove(given["attention_mask"])
    normal.normalize(made)
    return made


def _positions(graph: ir.Graph) -> ir.Value | None:
    """The integers [batch, sequence] that the angles of the rotary embedding are made of."""
    value = next((node.inputs[0] for node in graph if node.op_type == "Cos"), None)
    while value is not None and (value.dtype != ir.DataType.INT64 or len(value.shape or ()) != 2):
        maker = value.producer()
        value = None if maker is None else maker.inputs[0]
    return value


def feeds_with_room(
    feeds: Mapping[str, npt.NDArray[Any]], room: int
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of :func:`with_room` that mean what ``feeds`` of the model before do, which mask nothing.

    Behind the tokens that are there the caches are NaN: nothing may read that.
    """
    made = {"input_ids": feeds["input_ids"]}
    for name, cache in feeds.items():
        if name in ("input_ids", "attention_mask"):
            continue
        batch, heads, past, depth = cache.shape
        made[name] = np.full((batch, heads, room, depth), np.nan, cache.dtype)
        made[name][:, :, :past] = cache
        made["first"] = np.full(batch, past)
    return made
