"""Instructions, specs and the order that tokens keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlathe.backends.fpga import isa, model
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.program import Step, link
from netlathe.backends.fpga.spec import Spec
from netlathe.diagnostics import LowerError, OptionError


@st.composite
def instructions(draw: st.DrawFn) -> Instruction:
    unit = draw(st.sampled_from(isa.UNITS))
    fields = {}
    for name, width in isa.FIELDS[unit].items():
        bits = abs(width)
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if width < 0 else (0, (1 << bits) - 1)
        if value := draw(st.integers(low, high)):
            fields[name] = value
    pops = draw(st.sets(st.sampled_from(isa.WAITS[unit])))
    return Instruction(unit, fields, pops, draw(st.sets(st.sampled_from(isa.GIVES[unit]))))


@given(instructions())
def test_decoding_undoes_encoding(instruction: Instruction) -> None:
    word = instruction.encode()
    assert 0 <= word < 1 << isa.WIDTH
    assert isa.decode(word) == instruction


def test_a_number_beyond_its_field_is_refused() -> None:
    with pytest.raises(LowerError, match=r"compute\.k0 is 4096; 0 to 4095"):
        Instruction("compute", {"k0": 4096}).encode()
    with pytest.raises(LowerError, match=r"requantize\.zero is 128; -128 to 127"):
        Instruction("requantize", {"zero": 128}).encode()


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.integers(-9, 9), min_size=4, max_size=4),
)
def test_deltas_walk_the_nest(counts: list[int], strides: list[int]) -> None:
    strides = strides[: len(counts)]
    moves = isa.deltas(tuple(counts), tuple(strides))
    assert model.strides(counts, moves) == strides
    walked, at = [], 5
    for place in np.ndindex(*counts[::-1]):
        inner_first = place[::-1]
        if any(place):
            level = next(i for i, p in enumerate(inner_first) if p)
            at += moves[level]
        walked.append(at)
        assert at == 5 + sum(p * s for p, s in zip(inner_first, strides, strict=True))
    assert walked == model.addresses(5, counts, moves).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rows": 12}, "rows is 12"),
        ({"rows": 8, "columns": 16}, "8 <= beat_bytes <= columns <= rows"),
        ({"patterns": ("3:7",)}, "known patterns: 2:4, 4:8, 1:4"),
    ],
)
def test_impossible_cores_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Spec(**settings)  # type: ignore[arg-type]


def _steps() -> list[Step]:
    load = Step(Instruction("load"), writes=[("input", 0, 4)])
    compute = Step(Instruction("compute"), reads=[("input", 2, 3)], writes=[("sums", 0, 1)])
    again = Step(Instruction("load"), writes=[("input", 0, 4)])
    elsewhere = Step(Instruction("load"), writes=[("input", 8, 9)])
    return [load, compute, again, elsewhere]


def test_tokens_stand_where_words_are_shared_and_nowhere_else() -> None:
    load, compute, again, elsewhere = link(_steps())
    assert load.pushes == {"compute"} and not load.pops
    assert compute.pops == {"load"} and compute.pushes == {"load"}
    assert again.pops == {"compute"} and not again.pushes
    assert not elsewhere.pops and not elsewhere.pushes


def test_more_tokens_than_a_counter_holds_are_refused() -> None:
    def steps(count: int) -> list[Step]:
        loads = [Step(Instruction("load"), writes=[("input", i, i + 1)]) for i in range(count)]
        sums = ("sums", 0, 1)
        return loads + [
            Step(Instruction("compute"), reads=[("input", i, i + 1)], writes=[sums])
            for i in range(count)
        ]

    safe = 2**isa.TOKEN_BITS - 1 - 10  # eight queued, one at the head, one at work
    assert sum(len(i.pops) for i in link(steps(safe))) == safe
    with pytest.raises(
        LowerError, match=f"{safe + 1} tokens of load for compute are unused; {safe} "
    ):
        link(steps(safe + 1))


def test_one_wait_covers_what_came_before() -> None:
    first = Step(Instruction("load"), writes=[("input", 0, 1)])
    second = Step(Instruction("load"), writes=[("input", 1, 2)])
    reader = Step(Instruction("compute"), reads=[("input", 0, 2)], writes=[("sums", 0, 1)])
    later = Step(Instruction("compute"), reads=[("input", 0, 1)], writes=[("sums", 1, 2)])
    made = link([first, second, reader, later])
    assert [sorted(i.pushes) for i in made] == [[], ["compute"], [], []]
    assert [sorted(i.pops) for i in made] == [[], [], ["load"], []]


def test_a_write_over_a_part_leaves_the_rest() -> None:
    both = Step(Instruction("load"), writes=[("input", 0, 4)])
    reader = Step(Instruction("compute"), reads=[("input", 0, 4)], writes=[("sums", 0, 1)])
    half = Step(Instruction("load"), writes=[("input", 0, 2)])
    again = Step(Instruction("compute"), reads=[("input", 0, 1)], writes=[("sums", 0, 1)])
    rest = Step(Instruction("load"), writes=[("input", 2, 4)])
    made = link([both, reader, half, again, rest])
    # The last load waits for the first reader: that its other half was written since changes nothing.
    assert [sorted(i.pops) for i in made] == [[], ["load"], ["compute"], ["load"], []]
    assert [sorted(i.pops) for i in link([both, reader, rest])] == [[], ["load"], ["compute"]]
