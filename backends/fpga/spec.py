"""What a core is built as: the size of its array, its scratchpads and its connection to memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from netlathe.diagnostics import Diagnostic, OptionError


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every M weights along the contraction at most N are not zero."""

    kept: int
    group: int

    @property
    def expansion(self) -> int:
        """How many activations stand behind one multiplier."""
        return self.group // self.kept

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


PATTERNS = {str(pattern): pattern for pattern in (Pattern(2, 4), Pattern(4, 8), Pattern(1, 4))}


@dataclass(frozen=True)
class Spec:
    """Parameters of the overlay; every depth is a power of two.

    The array multiplies ``rows`` int8 activations with ``rows`` int8 weights of each of ``columns`` output
    channels in every cycle. A *vector* is ``columns`` bytes: what the requantizer writes in a cycle. A *beat*
    is ``beat_bytes`` bytes: what memory delivers in a cycle.

    Raises:
        OptionError: the numbers do not fit each other.
    """

    rows: int = 8
    columns: int = 8
    beat_bytes: int = 8
    patterns: tuple[str, ...] = ("2:4",)
    pairs: bool = True  # a multiplier takes two int4 weights: two outputs a column
    input_vectors: int = 8192  # activations that memory delivers
    hidden_vectors: int = 4096  # activations that stay on the chip
    weight_rows: int = 1024  # of rows x columns bytes
    sum_rows: int = 512  # of columns 32-bit sums
    output_vectors: int = 2048
    parameter_words: int = 512  # one a channel: bias, multiplier, shift
    table_entries: int = 1024  # of activation functions, 256 each
    queue: int = 8  # instructions a unit holds
    kept: tuple[Pattern, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(self._pattern(name) for name in self.patterns))
        sizes = {
            name: getattr(self, name)
            for name in (
                "rows", "columns", "beat_bytes", "input_vectors", "hidden_vectors", "weight_rows",
                "sum_rows", "output_vectors", "parameter_words", "table_entries", "queue",
            )
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 2 or size & (size - 1):
                raise self._wrong(f"{name} is {size}", "a power of two from 2 on is asked for")
        if not 8 <= self.beat_bytes <= self.columns <= self.rows:
            raise self._wrong(
                f"rows {self.rows}, columns {self.columns}, beat_bytes {self.beat_bytes}",
                "8 <= beat_bytes <= columns <= rows is asked for",
            )
        for pattern in self.kept:
            if self.rows % pattern.kept:
                raise self._wrong(f"{pattern} in {self.rows} rows", "rows must be a multiple of N")

    @staticmethod
    def _wrong(what: str, help_: str) -> OptionError:
        return OptionError(Diagnostic("fpga.spec", f"no such core: {what}", help=help_))

    def _pattern(self, name: str) -> Pattern:
        if name not in PATTERNS:
            raise self._wrong(f"pattern {name}", "known patterns: " + ", ".join(PATTERNS))
        return PATTERNS[name]

    # -- derived ------------------------------------------------------------------------------------

    @property
    def expansion(self) -> int:
        """Activations read for one multiplier by the widest pattern."""
        return max((pattern.expansion for pattern in self.kept), default=1)

    @property
    def wide_bytes(self) -> int:
        """Bytes of a row of an activation scratchpad."""
        return self.rows * self.expansion

    @property
    def wide_vectors(self) -> int:
        """Vectors in such a row."""
        return self.wide_bytes // self.columns

    @property
    def index_bits(self) -> int:
        """Bits of an index, as stored: a power of two."""
        largest = max((min(p.group, 8) for p in self.kept), default=0)
        return 0 if not largest else 2 if largest <= 4 else 4

    def hidden_pitch(self, channels: int) -> int:
        """Vectors from pixel to pixel in ``hidden``: whole rows, which patterns read at once."""
        row = self.columns * self.wide_vectors
        return -(-channels // row) * self.wide_vectors

    @property
    def vector_beats(self) -> int:
        """Beats of a vector."""
        return self.columns // self.beat_bytes

    @property
    def weight_beats(self) -> int:
        """Beats of a row of weights."""
        return self.rows * self.columns // self.beat_bytes

    @property
    def index_beats(self) -> int:
        """Beats of a row of indices; at least one."""
        return max(1, self.rows * self.columns * self.index_bits // 8 // self.beat_bytes)
