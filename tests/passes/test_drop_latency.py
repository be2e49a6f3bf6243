"""A latency budget of ``drop`` is kept by a measured table, at the least sum of scores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from netlathe.diagnostics import OptionError, PassError
from netlathe.passes.drop import Drop
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context
from tests import zoo_ir
from tests.passes.test_drop import Given, data, stack, stack_text, typed

# Milliseconds with and without the FFN of each of four layers.
TIMES = [(3.0, 1.0), (3.0, 2.5), (3.0, 0.5), (3.0, 2.0)]
WHOLE = 12.0
SAVED = [a - b for a, b in TIMES]


def table(folder: Path, times: Sequence[tuple[float, float]] = TIMES) -> str:
    """A file of times of f03, f13, ..."""
    rows = [f"f{i}3,{w},{ms}" for i, pair in enumerate(times) for w, ms in enumerate(pair[::-1])]
    file = folder / "times.csv"
    file.write_text("\n".join(["candidate,width,ms", *rows]))
    return str(file)


def applied(entries: Sequence[Entry]) -> set[int]:
    """Which of the candidates go."""
    return {at for at, entry in enumerate(entries) if entry.status == "applied"}


def refused(folder: Path, latency: float, **options: Any) -> PassError:
    """What is said about a latency that cannot be had."""
    pass_ = Drop(**{"kind": "ffn", "latency": latency, "table": table(folder)} | options)
    with pytest.raises(PassError) as caught:
        pass_.choose(stack(4), Given(cosines=[0.5]))
    return caught.value


def test_a_budget_is_kept_at_the_least_sum_of_scores(tmp_path: Path) -> None:
    """Against all sets, tried one by one."""
    rng = np.random.default_rng(7)
    for limit in (11.9, 10.0, 9.5, 8.0, 7.0, 6.0):
        scores = rng.random(4)
        pass_ = Drop(kind="ffn", latency=limit, table=table(tmp_path))
        entries = pass_.choose(stack(4), Given(cosines=list(1.0 - scores)))
        sets = [s for n in range(5) for s in itertools.combinations(range(4), n)]
        enough = [s for s in sets if WHOLE - sum(SAVED[at] for at in s) <= limit]
        best = min(enough, key=lambda s: float(sum(scores[at] for at in s)))
        assert applied(entries) == set(best), limit
        left = WHOLE - sum(e.detail["ms"] for e in entries if e.status == "applied")
        assert left <= limit
    assert entries[2].reason.endswith("; it takes 2.5 ms")
    assert json.loads(json.dumps([e.to_json() for e in entries]))


def test_what_the_edit_saves_is_in_its_statistics(tmp_path: Path) -> None:
    model = stack(4)
    pass_ = Drop(kind="ffn", latency=10.0, table=table(tmp_path), score="uniform")
    entries = pass_.choose(model, Context())
    result = pass_.edit(model, entries, Context())
    assert result.statistics["ms"] == sum(SAVED[at] for at in applied(entries)) >= 2.0


def test_greedy_goes_by_what_is_saved(tmp_path: Path) -> None:
    """With equal scores for all the first to go saves the most; one that saves nothing never goes."""
    times = [(3.0, 3.2), (3.0, 2.9), (3.0, 0.0), (3.0, 2.9)]
    model = typed(stack_text(4))
    options: dict[str, Any] = {"kind": "ffn", "score": "mse", "search": "greedy"}
    pass_ = Drop(latency=9.2, table=table(tmp_path, times), **options)
    entries = pass_.choose(model, Context(calibration=data(2, 5, 8)))
    assert applied(entries) == {2}
    everything = Drop(latency=8.8, table=table(tmp_path, times), **options)
    entries = everything.choose(model, Context(calibration=data(2, 5, 8)))
    assert applied(entries) == {1, 2, 3}


def test_a_model_that_is_fast_enough_stays(tmp_path: Path) -> None:
    pass_ = Drop(kind="ffn", latency=12.0, table=table(tmp_path))
    entries = pass_.choose(stack(4), Context())  # no data is needed
    assert {e.status for e in entries} == {"skipped"}
    assert entries[0].reason == "nothing has to go; it takes 2 ms"


def test_patterns_and_json(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    rows = [{"candidate": "*.mlp", "width": w, "ms": ms} for w, ms in ((0, 0.5), (1, 2.0))]
    file.write_text(json.dumps(rows))
    pass_ = Drop(kind="ffn", latency=2.6, table=str(file))
    entries = pass_.choose(zoo_ir.captured("llama"), Given(cosines=[0.5, 0.9]))
    assert applied(entries) == {1}


def test_what_cannot_go_still_takes_its_time(tmp_path: Path) -> None:
    model = zoo_ir.captured("resnet")
    names = [e.candidate for e in Drop(kind="block", count=0).choose(model, Context())]
    rows = [f"{n},1,2" for n in names] + [f"{names[0]},0,1", f"{names[2]},0,0"]
    file = tmp_path / "times.csv"
    file.write_text("\n".join(["candidate,width,ms", *rows]))
    entries = Drop(kind="block", latency=5.0, table=str(file), score="uniform").choose(
        model, Context()
    )
    assert applied(entries) == {0, 2}
    with pytest.raises(PassError, match=r"4\.9 ms: 5\.0000 ms is the least") as caught:
        Drop(kind="block", latency=4.9, table=str(file)).choose(model, Context())
    assert "its shortcut is not the stream itself" in str(caught.value)


def test_out_of_reach_says_the_least(tmp_path: Path) -> None:
    error = refused(tmp_path, 5.0)
    assert error.diagnostics[0].code == "drop.latency"
    assert "cannot go down to 5 ms: 6.0000 ms is the least" in str(error)
    assert "give latency=6.0000 or more" in str(error)
    entries = Drop(kind="ffn", latency=6.0, table=table(tmp_path)).choose(
        stack(4), Given(cosines=[0.5])
    )
    assert applied(entries) == {0, 1, 2, 3}


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    error = refused(tmp_path, 9.0, table=str(tmp_path / "none.csv"))
    assert error.diagnostics[0].code == "drop.table" and "no table of latencies" in str(error)
    assert "benchmarks/latency_table.py measures one" in str(error)
    lacking = tmp_path / "lacking.csv"
    lacking.write_text("candidate,width,ms\nf03,1,3\nf03,0,1\nf13,1,3\nf23,2,3\nf23,0,1\n")
    error = refused(tmp_path, 9.0, table=str(lacking))
    told = [(d.at, d.message.split(", not")[0]) for d in error.diagnostics]
    assert told == [
        ("f13", "the table has the widths 1 of it"),
        ("f23", "the table has the widths 0, 2 of it"),
        ("f33", "the table lacks it"),
    ]
    error = refused(tmp_path, 9.0, kind="attention")  # measured for another kind
    assert "what is no candidate here" in error.diagnostics[-1].message
    assert "--drop KIND" in str(error)


def test_options() -> None:
    with pytest.raises(OptionError, match="latency and table go together"):
        Drop(latency=3.0)
    with pytest.raises(OptionError, match="latency and table go together"):
        Drop(table="times.csv")
    with pytest.raises(OptionError, match="one of count, params, latency, not count and latency"):
        Drop(count=1, latency=3.0, table="times.csv")
    assert Drop(latency=3.0, table="times.csv").files() == (Path("times.csv"),)
