"""Reads what safetensors files hold from their headers alone: the weights stay in the files.

Format: 8 bytes of little-endian header length, the header as JSON (name -> dtype, shape and byte
range), then the data (https://huggingface.co/docs/safetensors). A pickled checkpoint is refused:
loading one can run any code.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> ir.ExternalTensor:
        """A memory-mapped tensor over these bytes, called ``name``, in ``shape`` where one is given."""
        return ir.ExternalTensor(
            self.file.resolve(),  # whole: a download cache links to files in another folder
            self.offset,
            self.length,
            self.dtype,
            name=name,
            shape=ir.Shape(self.shape if shape is None else shape),
        )

    def array(self) -> npt.NDArray[Any]:
        """A memory-mapped view of the values."""
        if not self.length:  # nothing to map
            return np.empty(self.shape, self.dtype.numpy())
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.length,))
        return raw.view(self.dtype.numpy()).reshape(self.shape)


class Files:
    """The files of a checkpoint, each mapped once and privately: nothing written reaches the file."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def array(self, place: StoredTensor) -> npt.NDArray[Any]:
        """The values as a view of the file's map."""
        if not place.length:
            return place.array()
        if place.file not in self._maps:
            with place.file.open("rb") as stream:
                self._maps[place.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        count = place.length // place.dtype.itemsize
        values = np.frombuffer(
            self._maps[place.file], place.dtype.numpy(), int(count), place.offset
        )
        return values.reshape(place.shape)

    def give_back(self) -> None:
        """Give back the memory that having been read takes; what was written is lost."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for held in self._maps.values():
                held.madvise(mmap.MADV_DONTNEED)


class OthersMaps:
    """Where a library has mapped a checkpoint's files by itself.

    It lets go of a map when the last weight in it goes: of a shard of 10 GB, all that was read stays.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        named = {str(file.resolve()) for file in files}
        self._ranges: list[tuple[int, int]] = []
        maps = Path("/proc/self/maps")  # address range, permissions, offset, device, inode, path
        for line in maps.read_text().splitlines() if maps.exists() else ():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in named:
                low, high = (int(end, 16) for end in fields[0].split("-"))
                self._ranges.append((low, high))

    def give_back(self, array: npt.NDArray[Any]) -> None:
        """Give back the pages of ``array``, which has the bytes of the file, if it lies in such a map."""
        start = array.__array_interface__["data"][0]
        end = start + array.nbytes
        if any(low <= start and end <= high for low, high in self._ranges):
            # Pages that are wholly its own: what shares a page with it may have been changed.
            start, end = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE
            if end > start:
                where, size = ctypes.c_void_p(start * mmap.PAGESIZE), (end - start) * mmap.PAGESIZE
                ctypes.CDLL(None).madvise(where, ctypes.c_size_t(size), mmap.MADV_DONTNEED)


class Places:
    """Where in a checkpoint's files the bytes of a weight lie.

    Libraries rename weights when they load them, and merge them (a stack of experts from one file
    entry each). Bytes tell them again: a weight is one tensor of the files, or several in a row. Of
    tensors that are equal, as fresh biases are, each is found once before one is found again.
    """

    def __init__(self, checkpoint: Mapping[str, StoredTensor]) -> None:
        self._named = checkpoint
        self._found: set[str] = set()
        self._starts: dict[tuple[ir.DataType, bytes], list[StoredTensor]] = {}
        for place in checkpoint.values():
            if place.length:
                start = place.array().reshape(-1).view(np.uint8)[:_START].tobytes()
                self._starts.setdefault((place.dtype, start), []).append(place)
        self._lengths = sorted({len(start) for _, start in self._starts}, reverse=True)

    def find(
        self, names: Iterable[str], dtype: ir.DataType, values: npt.NDArray[Any]
    ) -> list[StoredTensor]:
        """The tensors whose bytes, in a row, are those of the contiguous array ``values``.

        Tensors called one of ``names`` are tried first. Empty where the files do not have them.
        """
        wanted = values.reshape(-1).view(np.uint8)
        for name in names:
            place = self._named.get(name)
            if place is not None and place.dtype == dtype and place.shape == values.shape:
                if _same_bytes(place, wanted):
                    self._found.add(place.name)
                    return [place]
        found: list[StoredTensor] = []
        at = 0
        while at < wanted.size:
            place = self._at(dtype, wanted[at:])
            if place is None:
                return []
            found.append(place)
            at += place.length
        self._found.update(place.name for place in found)
        return found

    def _at(self, dtype: ir.DataType, wanted: npt.NDArray[np.uint8]) -> StoredTensor | None:
        """The longest tensor that ``wanted`` starts with."""
        candidates = [
            place
            for length in self._lengths
            for place in self._starts.get((dtype, wanted[:length].tobytes()), ())
            if place.length <= wanted.size
        ]
        candidates.sort(key=lambda place: (-place.length, place.name in self._found))
        return next((p for p in candidates if _same_bytes(p, wanted[: p.length])), None)


_START = 64  # bytes by which candidates are looked up
_CHUNK = 1 << 20


def _same_bytes(place: StoredTensor, wanted: npt.NDArray[np.uint8]) -> bool:
    """Whether the tensor holds these bytes, looked at a chunk at a time."""
    held = place.array().reshape(-1).view(np.uint8)
    return held.size == wanted.size and all(
        np.array_equal(held[i : i + _CHUNK], wanted[i : i + _CHUNK])
        for i in range(0, held.size, _CHUNK)
    )


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
            begin, end = (int(n) for n in item["data_offsets"])
            dtype, shape = item["dtype"], tuple(int(n) for n in item["shape"])
        except (KeyError, ValueError, TypeError) as error:
            raise damaged(f"the entry of {name!r} is malformed ({error!r})") from error
        if dtype not in _DTYPES:
            raise damaged(f"{name!r} has the dtype {dtype!r}, which is not known")
        if not 0 <= begin <= end or min(shape, default=0) < 0:
            raise damaged(f"the entry of {name!r} is malformed (bytes {begin} to {end})")
        if data + end > size:
            raise damaged(f"{name!r} ends at byte {data + end}, the file at {size}")
        itemsize = _DTYPES[dtype].itemsize
        if end - begin != prod(shape) * itemsize:
            raise damaged(f"{name!r} of shape {list(shape)} cannot be {end - begin} bytes long")
        yield StoredTensor(name, file, _DTYPES[dtype], shape, data + begin, end - begin)
