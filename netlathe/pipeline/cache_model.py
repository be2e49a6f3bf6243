"""Models and steps as entries of a cache.

A model is its graph as bytes, in which weights are numbered, and its weights. Of the model after a pass
only weights that the pass made are written; the others are those of the model before it. Weights are
written one at a time and mapped when they are read, so a model may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from netlathe.analysis.cost import Cost, ModuleCost
from netlathe.ir import weights
from netlathe.pipeline.cache import digest
from netlathe.pipeline.cache_file import Reader, Writer
from netlathe.pipeline.fingerprint import graph_digest
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.loss import Distance, Loss
from netlathe.pipeline.verification import Check

Array = weights.Array
_FLOATS = "netlathe.floats"  # in a written model's metadata: see _wide_floats
_IN_MEMORY = 4096  # bytes; smaller weights are read into memory, as a map each would be many


class NotFaithfulError(Exception):
    """A model holds something that its written form does not."""


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment: its graph, with weights numbered, and digests of the weights in that order."""

    model: ir.Model
    graph: bytes
    tensors: tuple[ir.TensorProtocol, ...]
    digests: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of everything the model is."""
        return digest({"graph": _sha(self.graph), "weights": list(self.digests)})

    @classmethod
    def of(cls, model: ir.Model, before: Snapshot | None = None) -> Snapshot:
        """Look at ``model``; weights that it shares with ``before`` are not read."""
        tensors = tuple(weights_of(model))
        known = before.known() if before is not None else {}
        digests = tuple(known.get(id(tensor)) or weights.digest(tensor) for tensor in tensors)
        return cls(model, graph_bytes(model), tensors, digests)

    def known(self) -> dict[int, str]:
        """Digests by the ``id`` of the tensor."""
        return {id(t): d for t, d in zip(self.tensors, self.digests, strict=True)}


def weights_of(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The weights that are numbered, in order: all but text, which stays in the graph."""
    for value in _numbered(model):
        assert value.const_value is not None
        yield value.const_value


def _numbered(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING:
                yield value


def graph_bytes(model: ir.Model) -> bytes:
    """The model as ONNX with a number in the place of every weight; nothing of them is read."""
    copy = model.clone()
    for number, value in enumerate(_numbered(copy)):
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            str(number),
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
        )
    copy.metadata_props[_FLOATS] = json.dumps(list(_wide_floats(copy)))
    data: bytes = ir.serde.serialize_model(copy).SerializeToString(deterministic=True)
    return data


def read_graph(data: bytes | memoryview, tensors: Sequence[ir.TensorProtocol]) -> ir.Model:
    """The reverse of :func:`graph_bytes`."""
    model = ir.serde.deserialize_model(onnx.ModelProto.FromString(bytes(data)))
    for value in _numbered(model):
        assert isinstance(value.const_value, ir.ExternalTensor)
        value.const_value = tensors[int(str(value.const_value.location))]
    nodes = list(model.graph.all_nodes())
    for number, name, wide in json.loads(model.metadata_props.pop(_FLOATS)):
        node = nodes[number]
        node.attributes[name] = ir.Attr(name, node.attributes[name].type, wide)
    return model


def check_faithful(model: ir.Model, graph: bytes, tensors: Sequence[ir.TensorProtocol]) -> None:
    """Return if ``graph`` gives back all that ``model`` is.

    Raises:
        NotFaithfulError: it does not.
    """
    read = read_graph(graph, tensors)
    if graph_bytes(read) != graph or graph_digest(read) != graph_digest(model):
        raise NotFaithfulError


def _wide_floats(model: ir.Model) -> Iterator[tuple[int, str, float | list[float]]]:
    """Attributes that hold more digits than ONNX writes down: number of the node, name, value."""
    for number, node in enumerate(model.graph.all_nodes()):
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.FLOAT:
                value = float(attribute.as_float())
                if value != float(np.float32(value)) and math.isfinite(value):
                    yield number, name, value
            elif attribute.type == ir.AttributeType.FLOATS:
                values = [float(item) for item in attribute.as_floats()]
                if values != [float(np.float32(item)) for item in values] and all(
                    map(math.isfinite, values)
                ):
                    yield number, name, values


# -- models ---------------------------------------------------------------------------------------


def write_model(
    model: ir.Model, before: Snapshot, writer: Writer
) -> tuple[dict[str, Any], Snapshot]:
    """Write ``model``, which was made from ``before``; its description and what it is.

    Raises:
        NotFaithfulError: it would be another model when it is read.
    """
    places = {id(tensor): number for number, tensor in enumerate(before.tensors)}
    graph = graph_bytes(model)
    described: list[dict[str, Any]] = []
    digests = []
    written: dict[int, int] = {}
    tensors = tuple(weights_of(model))
    check_faithful(model, graph, tensors)
    for number, tensor in enumerate(tensors):
        if (place := places.get(id(tensor))) is not None:
            described.append({"before": place})
            digests.append(before.digests[place])
        elif (first := written.get(id(tensor))) is not None:
            described.append({"like": first})
            digests.append(digests[first])
        else:
            described.append(write_tensor(tensor, writer))
            digests.append(writer.digest(described[-1]["blob"]))
            written[id(tensor)] = number
    snapshot = Snapshot(model, graph, tensors, tuple(digests))
    return {"graph": writer.add_bytes(graph), "weights": described}, snapshot


def read_model(described: Mapping[str, Any], reader: Reader, before: Snapshot) -> Snapshot:
    """The model that :func:`write_model` wrote, its weights mapped."""
    tensors: list[ir.TensorProtocol] = []
    digests: list[str] = []
    for weight in described["weights"]:
        if "before" in weight:
            tensors.append(before.tensors[weight["before"]])
            digests.append(before.digests[weight["before"]])
        elif "like" in weight:
            tensors.append(tensors[weight["like"]])
            digests.append(digests[weight["like"]])
        else:
            tensors.append(read_tensor(weight, reader))
            digests.append(reader.blob(weight["blob"]).sha256)
    graph = bytes(reader.bytes(described["graph"]))
    return Snapshot(read_graph(graph, tensors), graph, tuple(tensors), tuple(digests))


def write_tensor(tensor: ir.TensorProtocol, writer: Writer) -> dict[str, Any]:
    """The tensor's bytes in ONNX order; the digest of the blob is :func:`weights.digest`'s."""
    if tensor.dtype.bitwidth < 8:
        data: bytes | memoryview = tensor.tobytes()
    else:
        array = np.ascontiguousarray(tensor.numpy())
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        data = little.reshape(-1).view(np.uint8).data
    return {
        "blob": writer.add([data], len(data), weights.digest_prefix(tensor)),
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape.numpy()),
        "name": tensor.name,
        "recipe": weights.is_recipe(tensor),
    }


def read_tensor(weight: Mapping[str, Any], reader: Reader) -> ir.TensorProtocol:
    """The reverse: mapped from the entry's file, which stays locked while the tensor lives."""
    blob = reader.blob(weight["blob"])
    dtype = ir.DataType[weight["dtype"]]
    shape, name = weight["shape"], weight["name"] or ""
    mapped: ir.TensorProtocol = ir.ExternalTensor(
        str(reader.path.resolve()),
        blob.offset,
        blob.length,
        dtype,
        shape=ir.Shape(shape),
        name=name,
    )
    weights.held_by(mapped, reader)  # which keeps the file locked
    if blob.length < _IN_MEMORY:
        mapped = ir.Tensor(mapped.numpy().copy(), dtype=dtype, shape=ir.Shape(shape), name=name)
    if weight["recipe"]:  # equal recipes are not compared, so it stays one
        mapped = weights.derived(mapped, _as_it_is, dtype, shape, name)
    return mapped


def _as_it_is(array: Array) -> Array:
    return array


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- what is known of a step ----------------------------------------------------------------------


def write_entries(entries: Sequence[Entry], writer: Writer) -> list[dict[str, Any]]:
    """A ledger with what was solved for."""
    written = []
    for entry in entries:
        data = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
        data["arrays"] = {name: writer.add_array(array) for name, array in entry.arrays.items()}
        written.append(data)
    return written


def read_entries(described: Sequence[Mapping[str, Any]], reader: Reader) -> list[Entry]:
    """The reverse; arrays are mapped."""
    return [
        Entry(**{**data, "arrays": {n: reader.array(a) for n, a in data["arrays"].items()}})
        for data in described
    ]


def read_cost(data: Mapping[str, Any]) -> Cost:
    """A cost that was written field by field."""
    modules = {path: ModuleCost(**share) for path, share in data["by_module"].items()}
    return Cost(**{**data, "by_module": modules, "unknown": tuple(data["unknown"])})


def read_check(data: Mapping[str, Any]) -> Check:
    """A check that was written field by field."""
    return Check(**{**data, "sizes": tuple(data["sizes"])})


def read_loss(data: Mapping[str, Any] | None) -> Loss | None:
    """A loss that was written field by field."""
    if data is None:
        return None
    outputs = {name: Distance(**distance) for name, distance in data["by_output"].items()}
    return Loss(**{**data, "by_output": outputs})
