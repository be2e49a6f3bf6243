"""What a message says stays short enough to be read."""

from __future__ import annotations

from netlathe.diagnostics import did_you_mean


def test_names_that_are_near_are_shown_alone() -> None:
    assert did_you_mean("prun", ["drop", "prune", "quantize"]) == "did you mean prune?"
    near = did_you_mean("int9", ["int8", "int6", "int5", "nf4"])
    assert near == "did you mean int8, int6 or int5?"


def test_a_few_known_names_are_all_shown() -> None:
    assert did_you_mean("x", ["quantize", "drop"]) == "known: drop, quantize"


def test_of_many_known_names_some_are_shown() -> None:
    said = did_you_mean("nosuch", [f"layers.{at:03}" for at in range(500)])
    assert said.startswith("known: layers.000, ") and said.endswith("layers.023 and 476 more")
