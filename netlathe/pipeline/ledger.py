"""The ledger: every candidate a pass looked at, as applied, skipped or refused, with its reason."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # a command's help must not wait for the imports
    import numpy.typing as npt

Status = Literal["applied", "skipped", "refused"]


@dataclass(frozen=True)
class Entry:
    """One candidate.

    ``skipped`` means the pass could have acted and chose not to; ``refused`` means that acting would
    have been wrong or impossible. A skip is ``left_out`` where the pass' options ask for it (a count
    that is reached, a list of what to ignore, a least size) or nothing is left to do for it:
    strictness does not object to that.
    ``detail`` is JSON data that says precisely what was decided (axis, bits, indices, score, ...), and
    ``arrays`` holds what was solved for (a basis, rounded integers, a bias): a lossy pass' simulated
    reference is built from these and from nothing else. Arrays may be mapped from a file.
    """

    candidate: str  # name of the value, node or module
    status: Status
    reason: str  # one line; for "applied" it says what was done
    where: str = ""  # module path in the user's model
    detail: Mapping[str, Any] = field(default_factory=dict)
    left_out: bool = False
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON data; of an array its dtype, shape and SHA-256 are told."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arrays"}
        if self.arrays:
            data["arrays"] = {name: _describe(array) for name, array in self.arrays.items()}
        return data


def count_by_status(entries: list[Entry]) -> dict[Status, int]:
    """Number of entries per status; statuses that do not occur are present with 0."""
    counts = Counter(entry.status for entry in entries)
    return {status: counts[status] for status in ("applied", "skipped", "refused")}


def _describe(array: npt.NDArray[Any]) -> dict[str, Any]:
    import numpy as np

    digest = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": digest}
