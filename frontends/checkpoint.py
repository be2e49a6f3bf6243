"""Reads what safetensors files hold from their headers alone: the weights can stay in the files.

Format: 8 bytes of little-endian header length, the header as JSON (name -> dtype, shape and byte
range), then the data (https://huggingface.co/docs/safetensors). A pickled checkpoint is refused:
loading one can run any code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit

_DTYPES: Mapping[str, ir.DataType] = {
    "BOOL": ir.DataType.BOOL,
    "U8": ir.DataType.UINT8,
    "I8": ir.DataType.INT8,
    "I16": ir.DataType.INT16,
    "U16": ir.DataType.UINT16,
    "I32": ir.DataType.INT32,
    "U32": ir.DataType.UINT32,
    "I64": ir.DataType.INT64,
    "U64": ir.DataType.UINT64,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F32": ir.DataType.FLOAT,
    "F64": ir.DataType.DOUBLE,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, by its place in a file; ``offset`` and ``length`` are bytes."""

    name: str
    file: Path
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int

    def tensor(self, name: str) -> ir.ExternalTensor:
        """A memory-mapped tensor over these bytes, called ``name``."""
        return ir.ExternalTensor(
            self.file.name,
            self.offset,
            self.length,
            self.dtype,
            name=name,
            shape=ir.Shape(self.shape),
            base_dir=self.file.parent,
        )

    def array(self) -> npt.NDArray[Any]:
        """A memory-mapped view of the values."""
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.length,))
        return raw.view(self.dtype.numpy()).reshape(self.shape)


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors checkpoint, single or sharded, by name.

    Raises:
        InputError: there is none, only a pickled one, or a file is missing, truncated or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _files(folder):
        tensors.update((t.name, t) for t in _read_header(file))
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                Diagnostic("hf.index", f"cannot read the shard index: {error!r}", at=str(index))
            ) from error
        outside = [s for s in shards if Path(s).name != s]
        missing = [s for s in shards if not (folder / s).is_file()]
        if outside or missing:
            raise InputError(
                Diagnostic(
                    "hf.shard",
                    f"the index names a shard outside the folder: {outside[0]}"
                    if outside
                    else f"{len(missing)} of {len(shards)} shards are missing: "
                    + ", ".join(missing[:4]),
                    at=str(index),
                    help="download the checkpoint again",
                )
            )
        return [folder / s for s in shards]
    pickled = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    )
    if pickled:
        raise InputError(
            Diagnostic(
                "hf.pickle",
                f"the weights are pickled ({pickled[0]}); loading a pickle can run any code",
                at=str(folder),
                help="convert them where you trust them: load the model with transformers and call"
                " save_pretrained(folder), which writes safetensors",
            )
        )
    raise InputError(
        Diagnostic(
            "hf.weights",
            f"a config without weights: neither {SINGLE} nor {INDEX} is there",
            at=str(folder),
            help="put the safetensors files beside config.json",
        )
    )


def _read_header(file: Path) -> Iterator[StoredTensor]:
    size = file.stat().st_size

    def damaged(reason: str) -> InputError:
        return InputError(
            Diagnostic(
                "hf.safetensors",
                f"not a whole safetensors file: {reason}",
                at=str(file),
                help="download the file again",
            )
        )

    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise damaged(f"{size} bytes cannot hold a header of {length}")
        try:
            header = json.loads(stream.read(length))
            items = {k: v for k, v in header.items() if k != "__metadata__"}
        except (ValueError, AttributeError) as error:
            raise damaged(f"the header is not JSON ({error})") from error
    data = 8 + length
    for name, item in items.items():
        try:
            begin, end = item["data_offsets"]
            dtype, shape = item["dtype"], tuple(int(n) for n in item["shape"])
        except (KeyError, ValueError, TypeError) as error:
            raise damaged(f"the entry of {name!r} is malformed ({error!r})") from error
        if dtype not in _DTYPES:
            raise damaged(f"{name!r} has the dtype {dtype!r}, which is not known")
        if data + end > size:
            raise damaged(f"{name!r} ends at byte {data + end}, the file at {size}")
        itemsize = _DTYPES[dtype].itemsize
        if end - begin != prod(shape) * itemsize:
            raise damaged(f"{name!r} of shape {list(shape)} cannot be {end - begin} bytes long")
        yield StoredTensor(name, file, _DTYPES[dtype], shape, data + begin, end - begin)
