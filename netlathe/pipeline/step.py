"""What one pass of a compilation did."""

from __future__ import annotations

from dataclasses import dataclass

from netlathe.analysis.cost import Cost
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.loss import Loss
from netlathe.pipeline.pass_ import Pass
from netlathe.pipeline.verification import Check


@dataclass
class Step:
    """One pass of a compilation: what it decided, changed, cost and lost."""

    pass_: Pass
    entries: list[Entry]
    changed: bool
    statistics: dict[str, float]
    renamed: dict[str, str | None]  # old value names to new ones, or to None where removed
    cost_before: Cost
    cost_after: Cost
    check: Check
    loss: Loss | None = None  # to the model before the pass; of a lossy pass that changed something
    total_loss: Loss | None = None  # likewise, to the captured model
    seconds: float = 0.0  # the pass itself, and bringing the model into normal form after it
    check_seconds: float = 0.0  # structure and types, the comparison, cost and loss
    peak_bytes: int = (
        0  # most memory the process has held so far, mapped files included; 0: unknown
    )
    recalled: bool = False  # taken from a cache as it is
    pieces: int = 0  # that the work was cut into, and how many of them were taken from a cache
    recalled_pieces: int = 0
