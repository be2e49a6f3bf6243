"""Measured latencies: a table of what a model takes with each candidate at some widths.

CSV with ``candidate, width, ms`` in its first line, or JSON: a list of objects with these names. A candidate
goes by its name or by a pattern of its module path. A width is how many positions it has, or 1 and 0 with
and without it. Rows of all candidates at their full width add up to the whole model.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from netlathe.diagnostics import Diagnostic, PassError
from netlathe.ir.provenance import matches


@dataclass(frozen=True)
class Table:
    """Rows of a candidate's name or pattern, its width, and milliseconds."""

    rows: Sequence[tuple[str, float, float]]

    def of(self, name: str, modules: Iterable[str]) -> tuple[list[float], list[float]]:
        """Widths of a candidate in rising order, and milliseconds at each."""
        own = sorted(
            (width, ms)
            for row, width, ms in self.rows
            if row == name or any(matches(path, row) for path in modules)
        )
        return [width for width, _ in own], [ms for _, ms in own]


def read(path: Path, code: str) -> Table:
    """The table in a file.

    Raises:
        PassError: with ``code``; there is no such file, or it is no such table.
    """
    try:
        text = path.read_text("utf-8")
        listed = json.loads(text) if path.suffix == ".json" else csv.DictReader(text.splitlines())
        return Table([(str(r["candidate"]), float(r["width"]), float(r["ms"])) for r in listed])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PassError(
            Diagnostic(
                code,
                f"no table of latencies: {type(error).__name__}: {error}",
                at=str(path),
                help="CSV (or a JSON list of objects) with the columns candidate, width, ms;"
                " benchmarks/latency_table.py measures one",
            )
        ) from error
