"""How many rows become how many tiles, and of which kernel, where their number is known at run time only.

A weight has few kernels, each for tiles of up to so many rows. With the rows that there are, tiles of one
kernel or of another, and more or fewer of them, let all blocks end together: a model of what a kernel takes
says which. The table for a weight is made when it is compiled; the host looks it up before a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, TypeVar

from tvm import tirx

from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.tir import Expr, i64, known, select

Shape = TypeVar("Shape", bound=Hashable)

_MOST, _STEP = 1024, 16  # for so many rows, or fewer, in such steps tiles are chosen
_WORST = 1.1  # times what would be least: any of these rows may take so much, for the sake of few kernels
_MORE = 4  # numbers of tiles that are tried: the least, and more


@dataclass(frozen=True)
class Tiling(Generic[Shape]):
    """``down`` tiles of ``shape`` for up to ``most`` rows; for any number, None, as few tiles as it takes."""

    most: int | None
    shape: Shape
    down: int | None


def chosen(
    beyond: int,
    able: Sequence[Shape],
    widest: Shape,
    rows_of: Callable[[Shape], int],
    time: Callable[[Shape, int, int], float],
) -> tuple[Tiling[Shape], ...]:
    """Tilings of more rows than ``beyond``, in order; the last is of ``widest``.

    Others are of it or of those ``able``, which are added one by one, first that from which all numbers of
    rows together gain most. ``rows_of`` a shape are the most rows of its tile; ``time(shape, rows, down)`` is
    what a product takes.
    """
    counted = range(beyond + _STEP, _MOST + 1, _STEP)

    @cache
    def best(shape: Shape, rows: int) -> tuple[float, int]:
        least = -(-rows // rows_of(shape))
        return min((time(shape, rows, down), down) for down in range(least, least + _MORE))

    def all_time(shapes: Sequence[Shape]) -> float:
        return sum(min(best(shape, rows)[0] for shape in shapes) / rows for rows in counted)

    def worst(shapes: Sequence[Shape]) -> float:
        times = [[best(shape, rows)[0] for shape in shapes] for rows in counted]
        least = [min(best(shape, rows)[0] for shape in [widest, *able]) for rows in counted]
        return max(min(each) / one for each, one in zip(times, least, strict=True))

    taken = [widest]
    while worst(taken) > _WORST:
        taken.append(min(able, key=lambda shape: all_time([*taken, shape])))
    found: list[Tiling[Shape]] = [Tiling(None, widest, None)]
    for rows in reversed(counted):
        shape = min(taken, key=lambda shape: best(shape, rows))
        tiling = Tiling(rows, shape, best(shape, rows)[1])
        if replace(tiling, most=found[-1].most) != found[-1]:
            found.append(tiling)
    return tuple(found[::-1])


def looked_up(
    code: GpuCode,
    rows: Expr,
    tilings: Sequence[Tiling[Shape]],
    rows_of: Callable[[Shape], int],
    launch: Callable[[Shape, Expr], None],
) -> None:
    """``launch`` the shape that the number of rows has, with so many tiles down."""
    *others, last = tilings
    number, most = known(rows), rows_of(last.shape)
    if number is not None:
        found = next((t for t in others if t.most is not None and number <= t.most), last)
        launch(found.shape, i64(found.down or -(-number // most)))
        return
    shapes = list(dict.fromkeys(tiling.shape for tiling in tilings))
    which, down = i64(shapes.index(last.shape)), tirx.floordiv(rows + i64(most - 1), i64(most))
    for tiling in reversed(others):
        fits = rows <= i64(tiling.most)
        which = select(fits, i64(shapes.index(tiling.shape)), which)
        down = select(fits, i64(tiling.down), down)
    which, down = code.given(which), code.given(down)

    def launched(index: int) -> None:
        if index + 1 == len(shapes):
            launch(shapes[index], down)
        else:
            these, rest = lambda: launch(shapes[index], down), lambda: launched(index + 1)
            code.branch(which == i64(index), these, rest)

    launched(0)
