"""Convolutions in groups as products: a few groups side by side, with zeros between their weights."""

from __future__ import annotations

from dataclasses import dataclass

WIDE = 64  # outputs that groups side by side have at most, if each has fewer: the narrowest tile
PIECE = 8  # channels that are copied at once


@dataclass(frozen=True)
class Groups:
    """``count`` groups of channels, each of ``inputs`` and ``outputs``.

    A tile of a product is of one bundle: :attr:`together` groups, the last one perhaps of fewer. Its weights
    have all input channels of the bundle, zeros for those of other groups. So what is no number in one
    channel is none in the results of a bundle, and tiles may read the channels of the next one, times zeros.
    What is behind the last channel is not theirs to read: it may be no number.
    """

    count: int
    inputs: int
    outputs: int

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has a window of its own: nothing is summed over channels."""
        return self.inputs == self.outputs == 1

    @property
    def together(self) -> int:
        """Groups in a bundle, so that it begins with a whole piece of channels; 0 where none does."""
        if self.count == 1:
            return 1
        most = min(max(WIDE // self.outputs, 1), self.count)
        each = range(most, 0, -1)
        fits = (n for n in each if n == self.count or n * self.inputs % PIECE == 0)
        return next(fits, 0)

    @property
    def bundles(self) -> int:
        """How many there are."""
        return -(-self.count // self.together)

    @property
    def deep(self) -> int:
        """Input channels of a bundle, as weights have them: whole pieces."""
        return -(-self.together * self.inputs // PIECE) * PIECE

    @property
    def wide(self) -> int:
        """Outputs of a bundle."""
        return self.together * self.outputs

    def tiles(self, columns: int) -> int:
        """How many a bundle takes, each of up to so many outputs."""
        return -(-self.wide // columns)
