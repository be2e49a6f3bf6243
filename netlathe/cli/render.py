"""What the commands print: tables in a terminal, JSON where asked, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich.progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netlathe.pipeline.ledger import Entry, count_by_status

if TYPE_CHECKING:  # a command's help must not wait for the imports
    from netlathe.analysis.cost import Cost
    from netlathe.pipeline.loss import Loss
    from netlathe.pipeline.pass_ import Pass
    from netlathe.pipeline.step import Step

T = TypeVar("T")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

STATUS_STYLE = {"applied": "green", "skipped": "yellow", "refused": "red"}
_PIPE_WIDTH = 240  # columns where nobody looks: a table in a log or a pipe is not folded
_MOST_ROWS = 12  # of a pass in a ledger that was not asked for in full


# -- progress, on stderr --------------------------------------------------------------------------


class Bars:
    """Progress bars on stderr with time left; silent where stderr is not a terminal."""

    def __init__(self) -> None:
        self._progress: rich.progress.Progress | None = None
        self._running = 0

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` while drawing how many are done; bars may be nested."""
        if not err.is_terminal:
            yield from items
            return
        if self._progress is None:
            self._progress = rich.progress.Progress(console=err, transient=True)
            self._progress.start()
        bar = self._progress.add_task(description, total=total)
        self._running += 1
        try:
            for item in items:
                yield item
                self._progress.advance(bar)
        finally:
            self._progress.remove_task(bar)
            self._running -= 1
            if not self._running:
                self._progress.stop()
                self._progress = None


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Say what goes on, with a spinner in a terminal."""
    if err.is_terminal:
        with err.status(Text(text)):
            yield
    else:
        err.print(Text(text), soft_wrap=True)
        yield


def note(text: str) -> None:
    """Something worth knowing, on stderr."""
    err.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)


class Steps:
    """Tells on stderr which pass runs, and what it did; an observer of the manager."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose

    def started(self, pass_: Pass) -> None:
        """Name the pass."""
        err.print(Text(f"running {pass_}"), soft_wrap=True)

    def finished(self, step: Step) -> None:
        """Say what became of it."""
        text = f"  {counts(step.entries)}; {step.check}"
        if step.recalled:
            text = f"  from the cache: {text.strip()}"
        elif step.recalled_pieces:
            text += f"; {step.recalled_pieces} of {step.pieces} pieces from the cache"
        if self._verbose:
            text += f"; {took(step)}"
        err.print(Text(text, style="dim"), soft_wrap=True)


# -- JSON -----------------------------------------------------------------------------------------


def print_json(data: Any) -> None:
    """Data on stdout, as JSON that a script can read; numbers that JSON lacks become text."""
    print(json.dumps(_plain(data), indent=1, allow_nan=False))


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return str(data) if isinstance(data, Path) else data


# -- tables ---------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; columns whose name starts with ``#`` hold numbers and are aligned right."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        numbers = column.startswith("#")
        made.add_column(
            column.lstrip("#"),
            justify="right" if numbers else "left",
            no_wrap=numbers,
            overflow="fold",  # a long word goes on in the next line: nothing is cut off
        )
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    asked = out.is_terminal or "COLUMNS" in os.environ
    # A console made now: one takes COLUMNS as it is when it is made.
    Console(highlight=False, width=None if asked else _PIPE_WIDTH).print(made)


def line(text: str = "") -> None:
    """A line of plain text, as it is."""
    out.print(Text(text), soft_wrap=True)


def ledger(step: Step, *, every: bool) -> None:
    """What a pass decided: every candidate, or some of those applied or refused, and a count.

    Where there are none, those are shown that it skipped though no option left them out.

    Where a pass says what the outputs of layers lose, those that lose most come first among some.
    """
    shown = [e for e in step.entries if every or e.status != "skipped"]
    shown = shown or [e for e in step.entries if not e.left_out]
    judged = any("error" in e.detail for e in shown)
    if not every and len(shown) > _MOST_ROWS:
        shown = sorted(shown, key=lambda e: -e.detail.get("error", 0.0))[:_MOST_ROWS]
    line(f"\n{step.pass_}: {counts(step.entries)}")
    if shown:
        columns = ["status", "candidate", "where", *(["#lost"] if judged else []), "reason"]
        rows = ((Text(e.status, STATUS_STYLE[e.status]), *_entry(e, judged)) for e in shown)
        table("", columns, rows)
    if hidden := len(step.entries) - len(shown):
        line(f"... and {hidden} more (-v shows them)")


def _entry(entry: Entry, judged: bool) -> tuple[str, ...]:
    lost = entry.detail.get("error")
    share = ("" if lost is None else f"{lost:.2g}",) if judged else ()
    return entry.candidate, entry.where, *share, entry.reason


def steps(dense: Cost, made: Sequence[Step], *, checked: bool) -> None:
    """What every pass made of the model: size and work, loss, and how far it is from its reference."""
    last = made[-1].cost_after if made else dense
    columns = ["", "did", "#parameters", "#weights", "#MACs"]
    rows = [
        ["captured", "", *cost_cells(dense)],
        *([str(step.pass_), counts(step.entries), *cost_cells(step.cost_after)] for step in made),
        ["compiled / captured", "", *ratio_cells(last, dense)],
    ]
    if checked:
        columns += ["loss, to the model before", "checked"]
        total = next((loss(s.total_loss) for s in reversed(made) if s.total_loss), "")
        cells = [["", ""], *([loss(step.loss), _checked(step)] for step in made), [total, ""]]
        rows = [[*row, *more] for row, more in zip(rows, cells, strict=True)]
    table("", columns, rows)


def timings(made: Sequence[Step]) -> None:
    """Time and peak memory of every pass."""
    rows = (
        (str(s.pass_), f"{s.seconds:.2f} s", f"{s.check_seconds:.2f} s", _peak(s)) for s in made
    )
    table("", ("pass", "#time", "#checks", "#peak memory so far"), rows)


def took(step: Step) -> str:
    """Time and memory of one pass, in a few words."""
    return f"{step.seconds:.2f} s, checks {step.check_seconds:.2f} s, peak memory {_peak(step)}"


def _peak(step: Step) -> str:
    return size(step.peak_bytes) if step.peak_bytes else "not known here"


def _checked(step: Step) -> str:
    check = step.check
    if check.error is None:
        return check.reason
    return f"{check.error:.1e} of at most {check.tolerance:.1e}, to the {check.against}"


def loss(found: Loss | None) -> str:
    """How far outputs moved; empty where that was not measured."""
    if found is None:
        return ""
    text = f"cosine {found.cosine:.5f}"
    if found.top1 is not None and found.kl is not None:
        text += f", top-1 {found.top1:.1%}, KL {found.kl:.2g}"
    return text


# -- words and numbers ----------------------------------------------------------------------------


def cost_cells(cost: Cost) -> tuple[str, str, str]:
    """Parameters, bytes and MACs."""
    return count(cost.params), size(cost.bytes), count(cost.macs)


def ratio_cells(after: Cost, before: Cost) -> tuple[str, str, str]:
    """The same as shares of ``before``."""
    return (
        ratio(after.params, before.params),
        ratio(after.bytes, before.bytes),
        ratio(after.macs, before.macs),
    )


def counts(entries: Sequence[Entry]) -> str:
    """``3 applied, 1 skipped``: the statuses that occur."""
    found = count_by_status(list(entries))
    return ", ".join(f"{n} {status}" for status, n in found.items() if n) or "nothing to do"


def size(num_bytes: float) -> str:
    """``90.87 MB``, of 10^6 bytes each, as file managers show them."""
    return f"{count(num_bytes)}B" if num_bytes >= 1e3 else f"{num_bytes:g} B"


def count(number: float | None) -> str:
    """``22.71 M``: a large number by its thousands; a dash where there is none."""
    if number is None:
        return "-"
    for unit, thousands in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= thousands:
            return f"{number / thousands:.2f} {unit}"
    return f"{number:g}"


def ratio(after: float | None, before: float | None) -> str:
    """``0.26``; a dash where a number is missing or 0."""
    return f"{after / before:.3f}" if after is not None and before else "-"


def sizes(dims: Mapping[str, int]) -> str:
    """``batch=2, sequence=16``."""
    return ", ".join(f"{name}={size}" for name, size in dims.items()) or "fixed sizes"
