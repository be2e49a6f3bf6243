"""The zoo's models carry a signal: comparisons relative to it mean something."""

import pytest

from tests import zoo


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n != "minilm"])
def test_every_block_keeps_the_scale_of_its_input(name: str) -> None:
    rms = zoo.block_rms(zoo.build(name))
    assert len(rms) >= 2
    assert all(0.1 <= value <= 10 for value in rms.values()), rms


def test_one_seed_gives_one_model() -> None:
    first, again, other = zoo.build("llama"), zoo.build("llama"), zoo.build("llama", seed=1)
    weights = [m.module.state_dict()["lm_head.weight"] for m in (first, again, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_there_are_twenty() -> None:
    assert len(zoo.NAMES) == 20
