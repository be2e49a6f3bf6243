"""One file of a cache: blobs and a description of them, appearing whole or not at all, checked when read.

    [blob, at a multiple of 64 bytes, or of a page where it is large] ... [description, JSON]
    [SHA-256 of the description] [its length, 8 bytes little-endian] [b"NLCACHE1"]

A file is written under another name, flushed to disk and then renamed. Every blob is described with its
SHA-256, and reading a file compares all of them: bytes are what was written, or the file is
:class:`Damaged`. Blobs are not copied: a reader maps the file. As long as a reader or an array of it lives,
it holds a shared lock on the file, so that nobody takes it for one that is not in use.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

if sys.platform != "win32":
    import fcntl

Array = npt.NDArray[Any]
Bytes = bytes | memoryview

_MAGIC = b"NLCACHE1"
_TAIL = 32 + 8 + len(_MAGIC)  # digest, length, magic
_PAGE = 4096
_ALIGNMENT = 64
_CHUNK = 16 << 20


class Damaged(Exception):
    """A file is not what was written: cut off, or with other bytes in it."""


@dataclass(frozen=True)
class Blob:
    """Where bytes lie in a file; ``sha256`` is taken over a prefix that the reader must know, and them."""

    offset: int
    length: int
    sha256: str


class Sink(Protocol):
    """Where a writer writes to."""

    def write(self, data: Bytes) -> None:
        """Append."""
        ...

    def sync(self) -> None:
        """Have on disk what was written."""
        ...


class Writer:
    """Appends blobs to an empty file."""

    def __init__(self, file: Sink) -> None:
        self._file = file
        self._at = 0
        self._blobs: list[Blob] = []
        self._prefixes: list[str] = []

    def add(self, pieces: Iterable[Bytes], length: int, prefix: str = "") -> int:
        """Write ``length`` bytes that come in pieces; the number of the blob.

        ``prefix`` goes into the digest in front of them, and into the description.
        """
        alignment = _PAGE if length >= _PAGE else _ALIGNMENT
        offset = -(-self._at // alignment) * alignment
        self._write(b"\0" * (offset - self._at))
        state = hashlib.sha256(prefix.encode())
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK):
                part = piece[start : start + _CHUNK]
                state.update(part)
                self._write(part)
        assert self._at == offset + length
        self._blobs.append(Blob(offset, length, state.hexdigest()))
        self._prefixes.append(prefix)
        return len(self._blobs) - 1

    def add_bytes(self, data: bytes) -> int:
        """Write some bytes; the number of the blob."""
        return self.add([data], len(data))

    def add_array(self, array: Array) -> dict[str, Any]:
        """Write an array of numbers, booleans or text; what :meth:`Reader.array` takes.

        Raises:
            TypeError: it holds Python objects.
        """
        held = np.require(array, requirements="C")
        described = {"dtype": _dtype_name(held.dtype), "shape": list(held.shape)}
        data = held.reshape(-1).view(np.uint8).data if held.nbytes else b""
        return {"blob": self.add([data], held.nbytes), **described}

    def digest(self, blob: int) -> str:
        """The SHA-256 of a blob that was written, its prefix included."""
        return self._blobs[blob].sha256

    def finish(self, description: dict[str, Any]) -> None:
        """Write the description behind the blobs and have everything on disk."""
        blobs = [
            {"offset": b.offset, "length": b.length, "sha256": b.sha256, "prefix": prefix}
            for b, prefix in zip(self._blobs, self._prefixes, strict=True)
        ]
        text = json.dumps({"blobs": blobs, **description}, separators=(",", ":")).encode()
        self._write(text)
        self._write(hashlib.sha256(text).digest())
        self._write(len(text).to_bytes(8, "little"))
        self._write(_MAGIC)
        self._file.sync()

    def _write(self, data: Bytes) -> None:
        self._file.write(data)
        self._at += len(data)


class Reader:
    """A file that was found whole; it is mapped, and locked against removal, while this lives.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            with path.open("rb") as file:
                _share(file.fileno())
                if not _is_still(path, file.fileno()):  # replaced or removed before it was locked
                    continue
                self.size = os.fstat(file.fileno()).st_size
                if self.size < _TAIL:
                    raise Damaged(f"it is cut off: {self.size} bytes")
                # The map keeps the open file, and with it the lock.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            break
        self.description = self._describe()
        self._blobs = [
            Blob(blob["offset"], blob["length"], blob["sha256"])
            for blob in self.description["blobs"]
        ]
        for blob, described in zip(self._blobs, self.description["blobs"], strict=True):
            self._check(blob, described["prefix"])
        self.give_back()

    def bytes(self, number: int) -> memoryview:
        """A blob where it lies."""
        blob = self._blobs[number]
        return memoryview(self._map)[blob.offset : blob.offset + blob.length]

    def blob(self, number: int) -> Blob:
        """Where a blob lies in the file."""
        return self._blobs[number]

    def array(self, described: dict[str, Any]) -> Array:
        """An array that :meth:`Writer.add_array` wrote: mapped and read-only, copied where it is small."""
        data = self.bytes(described["blob"])
        dtype = _dtype(described["dtype"])
        made = np.frombuffer(data, dtype).reshape(described["shape"])
        if made.nbytes < _PAGE:
            made = made.copy()
            made.flags.writeable = False
        return made

    def give_back(self) -> None:
        """Give back the memory that having been read takes."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    def _describe(self) -> dict[str, Any]:
        tail = self._map[self.size - _TAIL :]
        length = int.from_bytes(tail[32:40], "little")
        start = self.size - _TAIL - length
        if tail[40:] != _MAGIC or start < 0:
            raise Damaged("it has no end as NetLathe writes it")
        text = self._map[start : self.size - _TAIL]
        if hashlib.sha256(text).digest() != tail[:32]:
            raise Damaged("its description is not what was written")
        description: dict[str, Any] = json.loads(text)
        return description

    def _check(self, blob: Blob, prefix: str) -> None:
        state = hashlib.sha256(prefix.encode())
        with memoryview(self._map) as whole:
            for start in range(blob.offset, blob.offset + blob.length, _CHUNK):
                state.update(whole[start : min(start + _CHUNK, blob.offset + blob.length)])
        if state.hexdigest() != blob.sha256:
            raise Damaged(f"the bytes from {blob.offset} on are not what was written")


def put(part: Path, path: Path) -> None:
    """Let the whole file ``part`` be ``path``; one that is there stays, as somebody may have mapped it."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.rename(part, path)
            return
    part.unlink()


def remove(path: Path) -> bool:
    """Remove a file that nobody reads or writes; False where somebody does, or that cannot be told."""
    if sys.platform == "win32":  # what is open cannot be removed there
        try:
            path.unlink()
        except OSError:
            return False
        return True
    try:
        held = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_still(path, held):
            return False
        path.unlink()
    except OSError:  # in use; not ours; or a file system that locks nothing
        return False
    finally:
        os.close(held)
    return True


def lock(file: io.FileIO) -> None:
    """Hold a file that is being written against :func:`remove`, until it is closed."""
    _share(file.fileno())


def _share(held: int) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
    except OSError:  # a file system that locks nothing: `remove` removes nothing there either
        return


def _is_still(path: Path, held: int) -> bool:
    """Whether an open file still has its name; raises FileNotFoundError where nothing has."""
    now, then = os.stat(path), os.fstat(held)
    return (now.st_dev, now.st_ino) == (then.st_dev, then.st_ino)


def _dtype_name(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "biufcSU":
        return dtype.str
    if hasattr(ml_dtypes, dtype.name):
        return dtype.name
    raise TypeError(f"an array of {dtype} cannot be kept")


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))
