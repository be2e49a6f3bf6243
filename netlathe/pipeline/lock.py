"""Holds a compilation against the manifest of an earlier one, which it must not differ from.

The lock is ``manifest.json`` in the output folder. It may stand there alone, under version control; what is
compiled then appears beside it, or nothing does and every difference is explained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from netlathe.diagnostics import Diagnostic, GateError, InputError

_FILE = "manifest.json"
_MOST = 12  # differences of a kind that are shown one by one
_ABSENT = "(nothing)"

# Parts of a manifest: what is said where one differs, and the way out.
_ANEW = "to make a new lock, compile without --locked and with --overwrite"
_PARTS: Mapping[str, tuple[str, str]] = {
    "versions": ("other versions are installed", "install the locked ones, or"),
    "source": ("the model is another one", "use the model that was locked, or"),
    "pipeline": ("other passes were asked for", "ask for the locked ones, or"),
    "passes": ("the passes are other versions of theirs, or have other options", ""),
    "seed": ("the seed is another one", "give --seed as it was locked, or"),
    "calibration": ("the calibration data are others", "use the data that were locked, or"),
    "target": ("the target is another one", "ask for the locked one, or"),
}
_RESULTS: Mapping[str, tuple[str, str]] = {
    "capture": ("the model was captured in another way", ""),
    "steps": ("the passes decided or measured something else", ""),
    "result": ("the graph that came out is another one", ""),
}


def load(folder: Path) -> dict[str, Any]:
    """The manifest in ``folder``.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    file = folder / _FILE
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict) or not {"compilation", "artifact"} <= found.keys():
            raise ValueError("it is no manifest of a compilation")
    except FileNotFoundError as error:
        raise InputError(
            Diagnostic(
                "lock.missing",
                f"there is no {_FILE} to hold the compilation against",
                at=str(folder),
                help="compile once without --locked: the manifest that this writes is the lock",
            )
        ) from error
    except (OSError, ValueError) as error:
        message = f"the lock cannot be read: {error}"
        raise InputError(Diagnostic("lock.read", message, at=str(file), help=_ANEW)) from error
    return found


def check_inputs(lock: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Check what a compilation starts from; ``inputs`` are parts of its manifest.

    Raises:
        GateError: it differs from the lock; every difference is shown.
    """
    _check(lock["compilation"], _plain(inputs), _PARTS)


def check(lock: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Check a manifest that is whole, the digests of the files that were written included.

    Raises:
        GateError: it differs from the lock in anything but times; every difference is shown.
    """
    known = {**_PARTS, **_RESULTS}
    made = _plain(made)
    _check(lock["compilation"], made["compilation"], known)
    told = ("files were written with other bytes", "")
    _check(lock["artifact"], made["artifact"], {"files": told})
    if lock.get("format") != made["format"] or lock["compilation"] != made["compilation"]:
        message = "the lock was written by another version of NetLathe"
        raise GateError(Diagnostic("lock.format", message, help=_ANEW))


def _check(
    locked: Mapping[str, Any], now: Mapping[str, Any], parts: Mapping[str, tuple[str, str]]
) -> None:
    problems = []
    for part, (message, way_out) in parts.items():
        was, is_ = locked.get(part), now.get(part)
        if part == "versions":
            was, is_ = _of_both(was, is_)
        found = list(_differences(was, is_, part))
        if not found:
            continue
        notes = found[:_MOST]
        if more := len(found) - len(notes):
            notes.append(f"and {more} more")
        help_ = f"{way_out} {_ANEW}".strip()
        problems.append(Diagnostic(f"lock.{part}", message, notes=tuple(notes), help=help_))
    if problems:
        raise GateError(problems)


def _of_both(locked: Any, now: Any) -> tuple[Any, Any]:
    """Versions of what took part in both; what one did without follows from another difference."""
    if not isinstance(locked, dict) or not isinstance(now, dict):
        return locked, now
    both = locked.keys() & now.keys()
    return {name: locked[name] for name in both}, {name: now[name] for name in both}


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """As it is after it was written and read."""
    read: dict[str, Any] = json.loads(json.dumps(data))
    return read


def _differences(locked: Any, now: Any, at: str) -> Iterator[str]:
    """Where two pieces of JSON data differ, in words."""
    if isinstance(locked, dict) and isinstance(now, dict):
        for key in sorted(locked.keys() | now.keys()):
            yield from _differences(locked.get(key), now.get(key), f"{at}.{key}")
    elif isinstance(locked, list) and isinstance(now, list):
        if len(locked) != len(now):
            yield f"{at}: {len(locked)} locked, {len(now)} here"
        for number, (a, b) in enumerate(zip(locked, now, strict=False)):
            yield from _differences(a, b, f"{at}[{_name(a, number)}]")
    elif locked != now:
        yield f"{at}: locked {_show(locked)}, here {_show(now)}"


def _name(item: Any, number: int) -> str:
    """What a list's item is known by."""
    if isinstance(item, dict):
        for key in ("candidate", "pass", "name"):
            if key in item:
                return str(item[key])
    return str(number)


def _show(value: Any) -> str:
    if value is None:
        return _ABSENT
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"{text[:12]}..."
    return text if len(text) <= 120 else f"{text[:117]}..."
