"""What the commands print: tables in a terminal, JSON where asked, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import rich.progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netlathe.pipeline.ledger import Entry, count_by_status

T = TypeVar("T")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

STATUS_STYLE = {"applied": "green", "skipped": "yellow", "refused": "red"}


class Bars:
    """Progress bars on stderr with time left; silent where stderr is not a terminal."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` while drawing how many are done."""
        yield from rich.progress.track(
            items,
            description,
            total=total,
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )


def print_json(data: Any) -> None:
    """Data on stdout, as JSON that a script can read."""
    print(json.dumps(data, indent=1, default=str))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; columns whose name starts with ``#`` hold numbers and are aligned right."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        numbers = column.startswith("#")
        made.add_column(column.lstrip("#"), justify="right" if numbers else "left", no_wrap=numbers)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    out.print(made)


def ledger(entries: Sequence[Entry], *, every: bool) -> None:
    """The ledger: every entry, or those that were applied or refused, and a count of the rest."""
    shown = [e for e in entries if every or e.status != "skipped"]
    table(
        "",
        ("status", "candidate", "where", "reason"),
        ((Text(e.status, STATUS_STYLE[e.status]), e.candidate, e.where, e.reason) for e in shown),
    )
    if hidden := len(entries) - len(shown):
        out.print(f"{hidden} skipped (-v shows them)")


def counts(entries: Sequence[Entry]) -> str:
    """``3 applied, 1 skipped``: the statuses that occur."""
    found = count_by_status(list(entries))
    return ", ".join(f"{n} {status}" for status, n in found.items() if n) or "nothing to do"


def megabytes(count: float) -> str:
    """Bytes in MB (10^6), as file managers show them."""
    return f"{count / 1e6:,.2f} MB"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a sensible number of digits; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}g}"
