"""Captured models in a cache: found by the contents of the files that they come from.

Weights stay in those files. Only what a capture has made itself, such as a folded constant, is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from netlathe.ir import weights
from netlathe.pipeline import cache_model
from netlathe.pipeline.cache import Cache, Material
from netlathe.pipeline.cache_file import Reader, Writer
from netlathe.pipeline.cache_keys import code_of, toolchain
from netlathe.pipeline.interfaces import Captured, Frontend
from netlathe.pipeline.manifest import file_digest


def capture(frontend: Frontend, source: Any, cache: Cache) -> Captured:
    """What ``frontend`` makes of ``source``, taken from ``cache`` where it is there.

    Raises:
        As :meth:`Frontend.capture`; the cache cannot be used.
    """
    files = frontend.sources(source)
    material = None if files is None else _material(frontend, source, files)
    if files is None or material is None:
        return frontend.capture(source)
    if (reader := cache.read("capture", material)) is not None:
        cache.tell(f"{source} is as it was: its captured form is taken from the cache")
        return _read(frontend, source, files, reader)
    captured = frontend.capture(source)

    def write(writer: Writer) -> Mapping[str, Any]:
        return _describe(captured, files, writer)

    try:
        cache.write("capture", material, write)
    except cache_model.NotFaithfulError:
        cache.tell(f"the captured form of {source} is not kept: ONNX does not hold all of it")
    return captured


def _material(frontend: Frontend, source: Any, files: Mapping[str, Path]) -> Material | None:
    try:
        settings = json.loads(json.dumps(vars(frontend), allow_nan=False))
    except (TypeError, ValueError):
        return None
    if (code := code_of(frontend)) is None:
        return None
    return {
        "toolchain": toolchain(),
        "frontend": frontend.name,
        "code": code,
        "settings": settings,
        "source": str(source),  # messages and entries name it
        "files": {name: file_digest(file) for name, file in files.items()},
    }


def _describe(captured: Captured, files: Mapping[str, Path], writer: Writer) -> dict[str, Any]:
    model = captured.model
    graph = cache_model.graph_bytes(model)
    tensors = list(cache_model.weights_of(model))
    cache_model.check_faithful(model, graph, tensors)
    places = {str(file.resolve()): name for name, file in files.items()}
    return {
        "graph": writer.add_bytes(graph),
        "weights": [
            {"digest": weights.digest(tensor), **_describe_tensor(tensor, places, writer)}
            for tensor in tensors
        ],
        "entries": cache_model.write_entries(captured.entries, writer),
        "dynamic": dict(captured.dynamic),
        "facts": dict(captured.facts),
    }


def _read(frontend: Frontend, source: Any, files: Mapping[str, Path], reader: Reader) -> Captured:
    known = reader.description
    tensors = []
    for described in known["weights"]:
        tensor = _read_tensor(described, files, reader)
        if "blob" not in described or weights.is_recipe(tensor):
            weights.recall_digest(tensor, described["digest"])
        tensors.append(tensor)
    model = cache_model.read_graph(reader.bytes(known["graph"]), tensors)
    captured = frontend.recall(source, model, known["dynamic"], known["facts"])
    captured.entries = cache_model.read_entries(known["entries"], reader)
    return captured


def _describe_tensor(
    tensor: ir.TensorProtocol, places: Mapping[str, str], writer: Writer
) -> dict[str, Any]:
    """How a weight is found or made again: where it lies, from what it is made, or its bytes."""
    if isinstance(tensor, ir.ExternalTensor):
        name = places.get(str(Path(tensor.path).resolve()))
        if name is not None and tensor.offset is not None and tensor.length is not None:
            return {
                "file": name,
                "offset": tensor.offset,
                "length": tensor.length,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape.numpy()),
                "name": tensor.name,
            }
    elif (recipe := weights.known_recipe(tensor)) is not None:
        kind, perm, bases = recipe
        return {
            "recipe": kind,
            "perm": list(perm),
            "of": [_describe_tensor(base, places, writer) for base in bases],
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape.numpy()),
            "name": tensor.name,
        }
    return cache_model.write_tensor(tensor, writer)


def _read_tensor(
    described: Mapping[str, Any], files: Mapping[str, Path], reader: Reader
) -> ir.TensorProtocol:
    if "blob" in described:
        return cache_model.read_tensor(described, reader)
    dtype, shape = ir.DataType[described["dtype"]], described["shape"]
    name = described["name"] or ""
    if "file" in described:
        return ir.ExternalTensor(
            str(files[described["file"]].resolve()),
            described["offset"],
            described["length"],
            dtype,
            shape=ir.Shape(shape),
            name=name,
        )
    bases = [_read_tensor(base, files, reader) for base in described["of"]]
    if described["recipe"] == "transpose":
        return weights.transposed(bases[0], described["perm"], name)
    if described["recipe"] == "join":
        return weights.joined(bases, shape, name)
    return weights.converted(bases[0], dtype, name)
