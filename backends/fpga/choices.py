"""What is chosen while a program is built, so that another can be built in the same places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Choices:
    """Places in memory and on the chip, and tiles, in the order in which they are asked for."""

    def __init__(self, earlier: Sequence[Any] = ()) -> None:
        self._earlier = list(earlier)
        self._made: list[Any] = []
        self._last_tiles: list[int] = []

    def choose(self, make: Callable[[], T]) -> T:
        """What was chosen here before; the first time, what ``make`` says."""
        number = len(self._made)
        choice: T = self._earlier[number] if self._earlier else make()
        self._made.append(choice)
        return choice

    def last_tile(self, rows: int) -> None:
        """Note how many rows the last tile of a layer has."""
        self._last_tiles.append(rows)

    def slack(self, rows: int) -> int:
        """How many of ``rows`` rows any layer's last tile has: one less can be left out."""
        return min([rows, *self._last_tiles])

    def again(self) -> Choices:
        """The same choices, for another program of the same layers."""
        return Choices(self._made)
