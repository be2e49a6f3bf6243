"""What a compilation is made with, as JSON data: for the manifest, and to look things up in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netlathe.pipeline import registry
from netlathe.pipeline.fingerprint import feeds_digest
from netlathe.pipeline.interfaces import Target
from netlathe.pipeline.pass_ import Feeds, Pass


def describe_pass(pass_: Pass) -> dict[str, Any]:
    """Which pass, of which version, from which distribution, with which options and files."""
    described = {
        "name": pass_.name,
        "version": pass_.version,
        "from": registry.distribution_of(pass_),
        "exactness": type(pass_.exactness).__name__.lower(),
        "options": pass_.option_values(),
    }
    if pass_.files():
        described["files"] = [_digest(path) for path in pass_.files()]
    return described


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none, which the pass that needs it explains."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def describe_calibration(calibration: Sequence[Feeds]) -> dict[str, Any] | None:
    """How many feeds, and a digest over them in order; None where there are none."""
    if not calibration:
        return None
    state = hashlib.sha256()
    for feeds in calibration:
        state.update(feeds_digest(feeds).encode())
    return {"feeds": len(calibration), "sha256": state.hexdigest()}


def describe_target(target: Target) -> dict[str, Any]:
    """Everything that a pass or a backend may read from a target."""
    return {
        "name": target.name,
        "backend": target.backend,
        "width_multiple": target.width_multiple,
        "dtypes": sorted(dtype.name for dtype in target.dtypes),
        "settings": dict(target.settings),
    }
