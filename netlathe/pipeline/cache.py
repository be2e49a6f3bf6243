"""A folder of finished work, found again by what it was made from, safe to share and to be killed in.

The name of an entry is the SHA-256 of its *material*: everything that its contents depend on. An entry
appears whole or not at all, is checked whenever it is read, and is never changed. So two runs may share a
folder at any time: at worst both do the same work. An entry that is damaged is removed, told about and
made again. What was used least recently goes when the folder grows beyond its limit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from netlathe.diagnostics import Diagnostic, InputError, OptionError
from netlathe.pipeline import cache_file
from netlathe.pipeline.cache_file import Damaged, Reader, Writer
from netlathe.pipeline.output import sync

Kind = Literal["capture", "step", "piece", "artifact"]
Material = Mapping[str, Any]  # JSON data

FOLDER_VARIABLE = "NETLATHE_CACHE"  # environment variable: where the user's cache lies
DEFAULT_LIMIT = 20 * 10**9  # bytes
_FORMAT = "v1"
# https://bford.info/cachedir/: tools that make backups leave such a folder out.
_TAG = "CACHEDIR.TAG"
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"
_LIMIT_FILE = "limit"
_OURS = "netlathe"  # stands in the tag: a folder without it is not ours to write to
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def user_folder() -> Path:
    """Where the cache of this user lies: $NETLATHE_CACHE, else the system's place for caches."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return base / "netlathe" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "netlathe"
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "netlathe"


@dataclass(frozen=True)
class Held:
    """An entry as it lies in the folder."""

    path: Path
    kind: Kind
    size: int  # bytes
    used: float  # seconds since the epoch


class Cache:
    """A cache folder, made where there is none.

    ``told`` is called with a line for whatever a user should know: an entry that was damaged, or one
    too large to keep. Without it the lines are kept in ``notes``.
    """

    def __init__(self, folder: str | Path, told: Callable[[str], None] | None = None) -> None:
        """Open ``folder``.

        Raises:
            InputError: it is a file, cannot be written, or holds what NetLathe did not write.
        """
        self.folder = Path(folder)
        self.notes: list[str] = []
        self.tell = told or self.notes.append
        self._entries = self.folder / _FORMAT
        self._parts = self.folder / "tmp"
        self._size: int | None = None  # bytes of all entries, once it was counted
        with self._explaining():
            self._open()

    # -- entries ----------------------------------------------------------------------------------

    def read(self, kind: Kind, material: Material) -> Reader | None:
        """The entry that was made from ``material``; None where there is none or it was damaged."""
        path = self._path(kind, material)
        with self._explaining():
            try:
                found = Reader(path)
                if found.description["material"] != _plain(material):
                    raise Damaged("it was made from something else")
                os.utime(path)  # used now
            except FileNotFoundError:
                return None
            except Damaged as damage:
                path.unlink(missing_ok=True)
                self.tell(f"a cache entry was damaged, and is made again: {path}: {damage}")
                return None
        return found

    def write(
        self, kind: Kind, material: Material, write: Callable[[Writer], Mapping[str, Any]]
    ) -> bool:
        """Make the entry of ``material``: ``write`` adds blobs and returns its description.

        False where it is too large to keep, which is told.

        Raises:
            InputError: the folder cannot be written any more, or its disk is full. Entries that were
                there still are.
        """
        path = self._path(kind, material)
        part = self._parts / secrets.token_hex(8)
        try:
            with self._explaining():
                self._parts.mkdir(exist_ok=True)  # cleared by somebody since
                file = open(part, "xb", buffering=0)  # closed below; closing writes nothing
            with file:
                cache_file.lock(file)
                writer = Writer(_Bounded(file, self.limit, self._explaining))
                described = write(writer)
                writer.finish({"kind": kind, "material": _plain(material), **described})
                size = file.tell()
                with self._explaining():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    cache_file.put(part, path)
                    sync(path.parent)
        except _TooLargeError:
            part.unlink(missing_ok=True)
            limit = show(self.limit)
            self.tell(
                f"not kept in the cache, as it alone is more than the limit of {limit}: {kind}"
            )
            return False
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self._grown(size)
        return True

    # -- the whole --------------------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """How many bytes the entries may take."""
        try:
            return int((self.folder / _LIMIT_FILE).read_text("ascii"))
        except (FileNotFoundError, ValueError):
            return DEFAULT_LIMIT

    def set_limit(self, limit: int) -> None:
        """Let the entries take at most ``limit`` bytes, from now on and for everybody."""
        part = self._parts / secrets.token_hex(8)
        with self._explaining():
            part.write_text(str(limit), "ascii")
            os.replace(part, self.folder / _LIMIT_FILE)
        self._trim(limit)

    def held(self) -> list[Held]:
        """Every entry, the one that was used longest ago first."""
        found = []
        for path in self._entries.glob("??/*.*"):
            kind = path.suffix[1:]
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if kind in get_args(Kind):
                found.append(Held(path, kind, status.st_size, status.st_mtime))  # type: ignore[arg-type]  # it is one of them
        return sorted(found, key=lambda entry: entry.used)

    def clear(self) -> tuple[int, int]:
        """Remove all entries that no run uses; how many went, and how many are left."""
        gone = [entry for entry in self.held() if cache_file.remove(entry.path)]
        self._size = None
        return len(gone), len(self.held())

    def _grown(self, size: int) -> None:
        if self._size is None:
            self._size = sum(entry.size for entry in self.held())
        else:
            self._size += size
        if self._size > self.limit:
            self._trim(self.limit)

    def _trim(self, limit: int) -> None:
        entries = self.held()
        total = sum(entry.size for entry in entries)
        for entry in entries:
            if total <= limit:
                break
            if cache_file.remove(entry.path):
                total -= entry.size
        self._size = total

    # -- the folder -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _explained(self.folder, error) from error

    def _open(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", str(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        tag = self.folder / _TAG
        if not self._is_ours(tag):
            if any(not path.name.startswith(".netlathe-") for path in self.folder.iterdir()):
                if not self._is_ours(tag):  # another run may have made it since
                    raise _foreign(self.folder)
            part = self.folder / f".netlathe-{secrets.token_hex(4)}"
            part.write_text(f"{_SIGNATURE}\n# A cache of {_OURS}.\n", "ascii")
            os.replace(part, tag)
        self._parts.mkdir(exist_ok=True)
        self._entries.mkdir(exist_ok=True)
        probe = self._parts / secrets.token_hex(8)  # permissions alone do not tell
        probe.touch()
        probe.unlink()
        for left in self._parts.iterdir():  # by runs that were killed
            cache_file.remove(left)

    @staticmethod
    def _is_ours(tag: Path) -> bool:
        try:
            return _OURS in tag.read_text("ascii", errors="replace")
        except FileNotFoundError:
            return False

    def _path(self, kind: Kind, material: Material) -> Path:
        name = digest(material)
        return self._entries / name[:2] / f"{name[2:]}.{kind}"


def digest(material: Material) -> str:
    """SHA-256 of JSON data, as hex."""
    text = json.dumps(material, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_size(text: str) -> int:
    """Bytes, from ``20G`` or ``500M``: a number with K, M, G or T, of 10^3, 10^6, ... bytes.

    Raises:
        OptionError: it is no such text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(
            Diagnostic("cache.limit", f"{text!r} is no size", help="for example 20G or 500M")
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show(size: float) -> str:
    """``20.00 GB``, of 10^9 bytes."""
    for unit in ("T", "G", "M", "k"):
        scale = _UNITS[unit.upper()]
        if size >= scale:
            return f"{size / scale:.2f} {unit}B"
    return f"{size:g} B"


class _TooLargeError(Exception):
    """An entry alone takes more than all may."""


class _Bounded:
    """A file that takes so many bytes, and explains why it takes no more."""

    def __init__(
        self,
        file: io.FileIO,
        limit: int,
        explaining: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._file = file
        self._left = limit
        self._explaining = explaining

    def write(self, data: bytes | memoryview) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise _TooLargeError
        left = memoryview(data)
        with self._explaining():
            while len(left):
                left = left[self._file.write(left) :]

    def sync(self) -> None:
        with self._explaining():
            os.fsync(self._file.fileno())


def _plain(material: Material) -> Any:
    """As it is after it was written and read."""
    return json.loads(json.dumps(material, allow_nan=False))


def _foreign(folder: Path) -> InputError:
    return InputError(
        Diagnostic(
            "cache.foreign",
            f"the folder holds files and no {_TAG} of NetLathe: it is no cache",
            at=str(folder),
            help="name another folder with --cache",
        )
    )


def _explained(folder: Path, error: OSError) -> InputError:
    way_out = (
        f"name another folder with --cache or ${FOLDER_VARIABLE}, or work without one: --no-cache"
    )
    if error.errno in _FULL:
        return InputError(
            Diagnostic(
                "cache.full",
                "the disk of the cache is full",
                at=str(folder),
                notes=("what was finished is kept: the same command goes on from there",),
                help="free some space (`netlathe cache --clear` gives the cache's own back), or"
                f" {way_out}",
            )
        )
    reason = error.strerror or str(error)
    if error.errno == errno.ENOTDIR:
        code, reason = "cache.not_a_folder", f"{error.filename or folder} is not a folder"
    else:
        code = "cache.denied"
    return InputError(
        Diagnostic(code, f"the cache cannot be used: {reason}", at=str(folder), help=way_out)
    )
