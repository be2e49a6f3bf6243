"""The ledger: every candidate a pass looked at, as applied, skipped or refused, with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["applied", "skipped", "refused"]


@dataclass(frozen=True)
class Entry:
    """One candidate.

    ``skipped`` means the pass could have acted and chose not to; ``refused`` means that acting would
    have been wrong or impossible. A skip is ``left_out`` where the pass' options ask for it (a count
    that is reached, a list of what to ignore, a least size) or nothing is left to do for it:
    strictness does not object to that.
    ``detail`` is JSON data that says precisely what was decided (axis, bits, indices, score, ...): a
    lossy pass' simulated reference is built from it and from nothing else.
    """

    candidate: str  # name of the value, node or module
    status: Status
    reason: str  # one line; for "applied" it says what was done
    where: str = ""  # module path in the user's model
    detail: Mapping[str, Any] = field(default_factory=dict)
    left_out: bool = False

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON data."""
        return asdict(self)


def count_by_status(entries: list[Entry]) -> dict[Status, int]:
    """Number of entries per status; statuses that do not occur are present with 0."""
    counts = Counter(entry.status for entry in entries)
    return {status: counts[status] for status in ("applied", "skipped", "refused")}
