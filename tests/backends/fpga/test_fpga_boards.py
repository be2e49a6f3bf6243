"""What is reckoned of boards nobody has here, and the resources that synthesis counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from netlathe.backends.fpga import simulate
from netlathe.backends.fpga.backend import FpgaBackend
from netlathe.backends.fpga.boards import BOARDS, REACHED, REACHED_BEFORE
from netlathe.backends.fpga.core.top import Core
from netlathe.backends.fpga.spec import PATTERNS, Spec

LLAMA_2_7B = (
    6_607_077_376  # weights of its products: 32 layers of 202,375,168, and 131,072,000 of the head
)


def test_the_count_of_weights() -> None:
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert LLAMA_2_7B == 32 * layer + 4096 * 32000


def test_decoding_is_bounded_by_the_bandwidth() -> None:
    u280, vhk158 = BOARDS["fpga-u280"], BOARDS["fpga-vhk158"]
    # 460 GB/s x 0.659 over 6.6 GB; by hand.
    assert u280.tokens_per_second(LLAMA_2_7B, 8) == pytest.approx(303.14e9 / 6.607077e9, rel=1e-4)
    sparse = u280.tokens_per_second(LLAMA_2_7B, 8, PATTERNS["2:4"])
    assert sparse == pytest.approx(u280.tokens_per_second(LLAMA_2_7B, 8) * 8 / 5)
    ratio = vhk158.tokens_per_second(LLAMA_2_7B, 4) / u280.tokens_per_second(LLAMA_2_7B, 4)
    assert ratio == pytest.approx(819 / 460)
    assert REACHED / REACHED_BEFORE == pytest.approx(1.85, abs=0.01)


def test_boards_that_are_reckoned_say_so() -> None:
    for target in FpgaBackend.targets():
        assert BOARDS[target.name].analytical == ("analytical only" in target.help)
    assert not BOARDS["fpga-ecp5-85f"].analytical


@pytest.mark.parametrize(
    ("flow", "multipliers"),
    [("synth_ecp5", "MULT18X18D"), ("synth_xilinx -family xcup", "DSP48E2")],
)
def test_synthesis_counts_the_multipliers_of_the_array(
    flow: str, multipliers: str, tmp_path: Path
) -> None:
    """A small core: 64 for the array, two for each of eight requantizers."""
    from amaranth.back import rtlil

    spec = Spec(
        patterns=(), input_vectors=64, hidden_vectors=16, weight_rows=16, sum_rows=16,
        output_vectors=16, parameter_words=16, table_entries=512,
    )  # fmt: skip
    source = tmp_path / "core.il"
    source.write_text(rtlil.convert(Core(spec), name="core", emit_src=False))
    simulate.yosys(
        ["hierarchy -top core", flow, "tee -q -o stat.json stat -json"], source, cwd=tmp_path
    )
    cells = json.loads((tmp_path / "stat.json").read_text())["design"]["num_cells_by_type"]
    assert cells[multipliers] == 64 + 2 * 8
