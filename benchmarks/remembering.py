"""A context that keeps scores, for tables of many settings of the same pass on the same model.

Distortions are those of positions by their scores: with them, a context is for one score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from netlathe.pipeline.pass_ import Array, Context


@dataclass(frozen=True)
class Remembering(Context):
    """Lets settings share scores: the time of a score counts in the first row that needs it."""

    known: dict[str, Mapping[str, Array]] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """Scores are kept; what is solved for afterwards depends on the setting."""
        if not name.endswith("widths"):
            return compute()
        if name not in self.known:
            self.known[name] = compute()
        return self.known[name]
