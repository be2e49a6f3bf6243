"""Writes an output folder whole or not at all.

Everything goes into a hidden folder beside the wanted one, is flushed to disk and then renamed: a
full disk, Ctrl-C or a kill leaves nothing, or what was there before, under the name that the user
gave. What a killed run leaves under a hidden name, the next run that writes there removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from netlathe.diagnostics import Diagnostic, InputError, NetLatheError

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")

MARKER = "manifest.json"  # a folder with this file in it is ours to overwrite
_NEW = re.compile(r"\.(?P<name>.+)\.netlathe-new-[0-9a-f]{8}")
_OLD = re.compile(r"\.(?P<name>.+)\.netlathe-old-[0-9a-f]{8}")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# A writer of C++ (torch's archives) tells of a full disk in words only; below this many free bytes
# no page can be allocated to a file, so the disk is what it died of.
_NO_ROOM = 1 << 16


def check_output(folder: Path, *, overwrite: bool = False, sources: Iterable[Path] = ()) -> Path:
    """Whether ``folder`` may become the output, before any work; its resolved path.

    ``sources`` are files and folders that the work reads, mapped weights among them.

    Raises:
        InputError: ``folder`` is, contains or lies inside a source; it exists (and ``overwrite`` is
            not given, or it is no folder of ours); or it cannot be made where it is.
    """
    wanted = Path(os.path.realpath(folder))
    for source in sources:
        _check_source(folder, wanted, Path(os.path.realpath(source)))
    if wanted.exists():
        _check_replaceable(folder, wanted, overwrite)
    parent = wanted.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(
            Diagnostic(
                "output.parent",
                f"the output cannot be made: {parent} is not a folder",
                at=str(folder),
                help="choose another folder with -o",
            )
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _denied(folder, f"{parent} cannot be written")
    return wanted


def write_whole(
    folder: Path,
    write: Callable[[Path], T],
    *,
    overwrite: bool = False,
    sources: Iterable[Path] = (),
) -> T:
    """Call ``write`` with an empty folder and let that become ``folder``; what ``write`` returns.

    ``folder`` then holds everything, or is as it was before (absent, with the parents that were made
    for it, or the old contents); the latter also for KeyboardInterrupt and SystemExit. An old folder
    is exchanged for the new one in one step where the system can do that.

    Raises:
        InputError: for what :func:`check_output` raises, or because the disk is full.
    """
    wanted = check_output(folder, overwrite=overwrite, sources=sources)
    made: list[Path] = []
    part: Path | None = None
    lock: int | None = None
    try:
        _make_parents(wanted.parent, made)
        _sweep(wanted.parent)
        part, lock = _start(wanted)
        result = write(part)
        _flush(part)
        check_output(folder, overwrite=overwrite)  # another run may have made it since
        _put(part, wanted)
        made.clear()
        sync(wanted.parent)
    except BaseException as error:
        full = part is not None and _no_room(part)
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # somebody else has put something into it
                parent.rmdir()
        if isinstance(error, OSError) and _is_ours(error, wanted):
            raise _explained(folder, error) from error
        if full and isinstance(error, Exception) and not isinstance(error, NetLatheError):
            raise _full(folder) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    return result


def copy_files(files: Mapping[str, Path], folder: Path) -> list[Path]:
    """Copy ``files`` (name in ``folder`` -> source) unchanged and return the copies.

    Raises:
        InputError: a name lies outside ``folder`` or is taken.
    """
    copies = []
    for name, source in sorted(files.items()):
        copy = folder / name
        if not Path(os.path.normpath(copy)).is_relative_to(folder) or copy.exists():
            raise InputError(
                Diagnostic(
                    "output.file",
                    f"the file {name!r} cannot travel into the output: its name is "
                    + ("taken" if copy.exists() else "not one inside a folder"),
                    at=str(source),
                )
            )
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        copies.append(copy)
    return copies


# -- what is refused ------------------------------------------------------------------------------


def _check_source(folder: Path, wanted: Path, source: Path) -> None:
    if wanted == source:
        relation = "is"
    elif source.is_relative_to(wanted):
        relation = "contains"
    elif wanted.is_relative_to(source):
        relation = "lies inside"
    else:
        return
    raise InputError(
        Diagnostic(
            "output.source",
            f"the output {relation} what it is made from: {source}",
            at=str(folder),
            help="choose a folder beside it with -o",
        )
    )


def _check_replaceable(folder: Path, wanted: Path, overwrite: bool) -> None:
    if not wanted.is_dir():
        problem, way_out = "is a file", "choose another folder with -o"
    elif not overwrite:
        problem, way_out = "exists", "choose another folder, or replace it with --overwrite"
    elif any(wanted.iterdir()) and not (wanted / MARKER).is_file():
        problem = f"holds files and no {MARKER}: NetLathe did not write it and does not replace it"
        way_out = "choose another folder, or remove it yourself"
    else:
        return
    raise InputError(
        Diagnostic("output.exists", f"the output {problem}", at=str(folder), help=way_out)
    )


def _denied(folder: Path, reason: str) -> InputError:
    return InputError(
        Diagnostic(
            "output.denied",
            f"the output cannot be written: {reason}",
            at=str(folder),
            help="choose another folder with -o, or change the permissions",
        )
    )


def _full(folder: Path) -> InputError:
    return InputError(
        Diagnostic(
            "output.full",
            "the disk is full: the output does not fit, and nothing of it was kept",
            at=str(folder),
            help="free some space, or choose a folder on another disk with -o",
        )
    )


def _is_ours(error: OSError, wanted: Path) -> bool:
    """Whether it was the output that failed, and not something that was read for it."""
    if error.errno in _FULL:
        return True
    for name in (error.filename, error.filename2):
        path = Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else None
        if path is None:
            continue
        if wanted.is_relative_to(path):  # it or a folder above it
            return True
        if path.is_relative_to(wanted.parent):
            first = path.relative_to(wanted.parent).parts[0]
            if _NEW.fullmatch(first) or _OLD.fullmatch(first):
                return True
    return False


def _explained(folder: Path, error: OSError) -> InputError:
    if error.errno in _FULL:
        return _full(folder)
    reason = error.strerror or str(error)
    if error.errno in _DENIED:
        return _denied(folder, reason)
    return InputError(
        Diagnostic("output.failed", f"the output cannot be written: {reason}", at=str(folder))
    )


def _no_room(part: Path) -> bool:
    return part.exists() and shutil.disk_usage(part).free < _NO_ROOM


# -- hidden folders -------------------------------------------------------------------------------


def _start(wanted: Path) -> tuple[Path, int | None]:
    """A new hidden folder beside ``wanted``, and the lock that says a run is at it."""
    while True:
        part = _hidden(wanted, "new")
        part.mkdir()  # not mkdtemp, whose folders nobody else may read
        try:
            lock = _lock(part)
        except BlockingIOError:  # a run that sweeps here took it for a stale one
            continue
        if part.exists():
            return part, lock
        if lock is not None:
            os.close(lock)


def _hidden(wanted: Path, kind: str) -> Path:
    return wanted.with_name(f".{wanted.name}.netlathe-{kind}-{secrets.token_hex(4)}")


def _lock(folder: Path) -> int | None:
    """A lock that the system releases when this process ends, however it ends; None without one.

    Raises:
        BlockingIOError: another process has it.
    """
    if sys.platform == "win32":
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise
    except OSError:  # some network file systems lock no folders
        os.close(held)
        return None
    return held


def _sweep(parent: Path) -> None:
    """Remove what killed runs left in ``parent``, and put back an old folder they had set aside."""
    for entry in sorted(parent.iterdir()):
        new, old = _NEW.fullmatch(entry.name), _OLD.fullmatch(entry.name)
        if not (new or old) or entry.is_symlink() or not entry.is_dir():
            continue
        try:
            lock = _lock(entry)
        except OSError:  # in use, swept by another run, or another user's
            continue
        if old and not (parent / old["name"]).exists():
            entry.rename(parent / old["name"])
        elif lock is not None:
            shutil.rmtree(entry, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Make ``parent`` and what is missing above it; ``made`` lists them, topmost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir()
        made.append(folder)


# -- to disk --------------------------------------------------------------------------------------


def _flush(folder: Path) -> None:
    """Have every file and folder on disk, contents before the names that lead to them."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            held = os.open(Path(place, name), os.O_RDONLY)
            try:
                os.fsync(held)
            finally:
                os.close(held)
        sync(Path(place))


def sync(folder: Path) -> None:
    """Have the names in a folder on disk."""
    if sys.platform == "win32":  # folders have no handle to flush there
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def _put(part: Path, wanted: Path) -> None:
    """Let ``part`` be ``wanted``, in the place of what was there."""
    if not wanted.exists():
        part.rename(wanted)
        return
    if _exchange(part, wanted):
        old = part
    else:
        old = _hidden(wanted, "old")
        lock = _lock(wanted)  # no other run may take it for a stale one
        wanted.rename(old)
        try:
            part.rename(wanted)
        except BaseException:
            old.rename(wanted)
            raise
        finally:
            if lock is not None:
                os.close(lock)
    shutil.rmtree(old, ignore_errors=True)  # what cannot go now, the next run sweeps


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change names in one step; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done = function(here, os.fsencode(a), here, os.fsencode(b), exchange)
    return bool(done == 0)
