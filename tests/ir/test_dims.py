"""Expressions for dims come out as the sizes that they are."""

from __future__ import annotations

from typing import Any

import pytest

from netlathe.ir import dims


@pytest.mark.parametrize(("choose", "pick"), [(dims.largest, max), (dims.smallest, min)])
def test_a_choice_that_is_subtracted_stays_what_it_is(choose: Any, pick: Any) -> None:
    s = dims.symbol("sequence")
    made = dims.subtract(dims.product((2, s)), choose(dims.subtract(64, s), choose(s, 7)))
    for size in (0, 3, 32, 64, 100):
        assert dims.evaluate(made, {s: size}) == 2 * size - pick(64 - size, size, 7)


@pytest.mark.parametrize("positions", [1, 64])
def test_the_last_positions_of_a_table_beside_a_sequence_are_as_many(positions: int) -> None:
    """MPT adds bias[:, max(0, 64 - sequence):] to scores of a sequence: what comes out is a sequence."""
    s = dims.symbol("sequence")
    start = dims.largest(0, dims.subtract(positions, s))
    assert dims.broadcast([(s,), (dims.subtract(positions, start),)]).shape == (s,)


@pytest.mark.parametrize("choose", [dims.largest, dims.smallest])
def test_a_choice_less_itself_is_gone(choose: Any) -> None:
    s = dims.symbol("sequence")
    chosen = choose(64, s)
    assert dims.subtract(chosen, chosen) == 0
    assert dims.subtract(dims.add(chosen, 7), chosen) == 7
    assert dims.subtract(dims.product((2, chosen)), chosen) == chosen
