"""Devices the core is built for, or reckoned for: what is measured, and what is arithmetic alone.

A board that is not measured has a core that was never placed on it: cycles come from the same model, clock
and bandwidth from the vendor's and the paper's figures, and every report says ``analytical``.
"""

from __future__ import annotations

from dataclasses import dataclass

from netlathe.backends.fpga.model import Memory
from netlathe.backends.fpga.spec import Pattern, Spec


@dataclass(frozen=True)
class Board:
    """A device and the core on it.

    ``bandwidth``: bytes a second of its memory at best; ``reached``: the share of that counted on.
    """

    name: str
    spec: Spec
    what: str
    clock_mhz: float
    bandwidth: float
    reached: float
    analytical: bool

    @property
    def memory(self) -> Memory:
        """Beats a cycle that the bandwidth gives, in sixteenths; at most one."""
        beats = self.bandwidth * self.reached / (self.clock_mhz * 1e6 * self.spec.beat_bytes)
        return Memory(64 if self.analytical else 16, (max(1, min(16, int(16 * beats))), 16))

    def tokens_per_second(
        self, weights: float, bits: float, pattern: Pattern | None = None
    ) -> float:
        """How fast a language model can decode if it reads every weight once a token, and nothing else.

        ``weights``: how many; ``bits`` each. A pattern leaves N of M and adds an index to each that it
        leaves. Activations stay on the chip, as FlightLLM has them (arXiv 2401.03868).
        """
        index = 0 if pattern is None else (pattern.group - 1).bit_length()
        kept = 1.0 if pattern is None else pattern.kept / pattern.group
        return self.bandwidth * self.reached / (weights * kept * (bits + index) / 8)


# Of the HBM's bandwidth FlightLLM reaches 65.9 %, and 35.6 % without activations kept on the chip (its
# introduction). 460 and 819 GB/s are the vendors' figures of the HBM, 225 MHz is a nominal clock.
REACHED, REACHED_BEFORE = 0.659, 0.356
_LARGE = Spec(
    rows=32, columns=32, beat_bytes=32, input_vectors=8192, weight_rows=2048, sum_rows=1024,
    output_vectors=4096, parameter_words=2048,
)  # fmt: skip
BOARDS = {
    board.name: board
    for board in (
        Board(
            "fpga-ecp5-85f", Spec(), "an 8 x 8 int8 array for Lattice ECP5-85F", 100.0, 800e6, 1.0,
            analytical=False,
        ),
        Board(
            "fpga-u280", _LARGE, "analytical only: a 32 x 32 array at an Alveo U280's bandwidth",
            225.0, 460e9, REACHED, analytical=True,
        ),
        Board(
            "fpga-vhk158", _LARGE, "analytical only: a 32 x 32 array at a Versal VHK158's bandwidth",
            225.0, 819e9, REACHED, analytical=True,
        ),
    )
}  # fmt: skip
