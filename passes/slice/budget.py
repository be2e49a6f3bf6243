"""How wide each segment is kept for what is asked, and what that leaves of the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from netlathe.diagnostics import Diagnostic, PassError
from netlathe.passes.slice.narrow import sizes
from netlathe.passes.slice.segments import Layout, Segment

Named = Mapping[str, Segment]  # by the first point of each


def total(layout: Layout) -> int:
    """Parameters before anything goes, without the adapters."""
    return sizes(layout, {}, {}) - sum(int(group.size) ** 2 for group in _adapter_groups(layout))


def left(layout: Layout, named: Named, kept: Mapping[str, int]) -> int:
    """Parameters with these widths, adapters included."""
    return sizes(layout, kept, {name: segment.stretch for name, segment in named.items()})


def by_ratio(named: Named, whole: set[str], ratio: float, multiple: int) -> dict[str, int]:
    """The widths without a share of the directions; those of ``whole`` stay.

    Raises:
        PassError: no multiple is left.
    """
    kept = {}
    for name, segment in named.items():
        width = segment.group.size
        kept[name] = width if name in whole else _narrowed(width, ratio, multiple)
    return kept


def _narrowed(width: int, ratio: float, multiple: int) -> int:
    if ratio == 0:
        return width
    kept = int((1 - ratio) * width) // multiple * multiple  # down, as the paper's code does
    if kept < 1:
        raise PassError(
            Diagnostic(
                "slice.width",
                f"ratio={ratio} of {width} directions leaves no multiple of {multiple}",
                help="give a smaller ratio or round_to",
            )
        )
    return kept


def by_parameters(
    layout: Layout, named: Named, whole: set[str], share: float, multiple: int
) -> dict[str, int]:
    """The greatest equal widths without a share of the parameters; those of ``whole`` stay.

    Raises:
        PassError: no width is narrow enough.
    """
    before = total(layout)
    goal = (1 - share) * before
    widest = max(segment.group.size for segment in named.values())
    least = math.inf
    for step in range(widest // multiple, 0, -1):
        ratio = step * multiple / widest
        kept = {
            name: segment.group.size
            if name in whole
            else max(multiple, int(segment.group.size * ratio) // multiple * multiple)
            for name, segment in named.items()
        }
        count = left(layout, named, kept)
        least = min(least, count)
        if count <= goal:
            return kept
    raise out_of_reach(goal, before, f": the least is {least:.0f}")


def out_of_reach(goal: float, before: int, told: str = "") -> PassError:
    """The error where a budget is met by no widths."""
    return PassError(
        Diagnostic(
            "slice.parameters",
            f"no width leaves {goal:.0f} of {before} parameters{told}",
            help="ask for less with parameters=, or for a smaller round_to",
        )
    )


def check_net(
    pass_: object, named: Named, kept: Mapping[str, int], before: int, after: int
) -> None:
    """Refuse to slice a model to more parameters than it had.

    Raises:
        PassError: with the figure.
    """
    cut = any(kept[name] < segment.group.size for name, segment in named.items())
    if cut and after >= before:
        raise PassError(
            Diagnostic(
                "slice.net",
                f"{pass_} would leave {after} parameters of {before}: adapters add more than"
                " the narrower widths save",
                help="adapters=False shares one basis and needs none, or give a larger ratio",
            )
        )


def _adapter_groups(layout: Layout) -> list[Any]:
    """For each adapter a group of its width."""
    readers = {node.outputs[0].name: node for node in layout.model.graph}
    found = []
    for edge in layout.edges:
        turn = readers[edge.reader].inputs[edge.operand]
        maker = turn.producer() if turn is not None else None
        assert maker is not None and maker.inputs[1] is not None
        found.append(layout.axes.of(maker.inputs[1], 0)[0])
    return found
