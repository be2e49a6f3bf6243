"""The axis groups of a model as rows that a table or a JSON file can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from netlathe.analysis.axes.basis import Stretch, to_rotate, to_scale
from netlathe.analysis.axes.groups import Axes, Group, Member
from netlathe.analysis.axes.relate import ALONE
from netlathe.diagnostics import PassError
from netlathe.ir.provenance import module_path


@dataclass(frozen=True)
class Row:
    """One group. ``delete`` and ``permute`` concern all of it, ``scale`` and ``rotate`` stretches of it."""

    group: str
    size: int
    scope: str  # what the caller sorts it under; "" where it does not
    least: int  # positions that must stay
    where: str  # the module path that all members share
    members: tuple[str, ...]  # weight:dim, with the dim's term where the group is a part of it
    sizes: tuple[str, ...]  # attributes and literals that must change with it
    interface: tuple[str, ...]  # graph inputs and outputs whose shape changes with it
    delete: bool
    permute: bool
    scale: int  # stretches that may be scaled
    rotate: int  # stretches that may be rotated
    pinned: tuple[str, ...]  # why not, naming the operator, the node and its module

    @property
    def allowed(self) -> str:
        """``delete, permute, scale x3``."""
        found = [name for name in ("delete", "permute") if getattr(self, name)]
        for name in ("scale", "rotate"):
            count: int = getattr(self, name)
            found += [name if count == 1 else f"{name} x{count}"] if count else []
        return ", ".join(found)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON data."""
        return asdict(self)


def report(axes: Axes, scopes: Mapping[Group, str]) -> list[Row]:
    """Every axis group of a model, in the order in which nodes read their weights.

    ``scopes`` says for groups which scope of a pass they are in.
    """
    return [_row(axes, group, scopes.get(group, "")) for group in axes.groups]


def _row(axes: Axes, group: Group, scope: str) -> Row:
    return Row(
        group=group.name,
        size=group.size,
        scope=scope,
        least=group.least,
        where=_common([member.where for member in group.members]),
        members=tuple(_member(axes, member) for member in group.members),
        sizes=tuple(
            f"{use.node.op_type} {use.node.name or use.node.outputs[0].name}"
            f" {use.spot if isinstance(use.spot, str) else f'input {use.spot[0]}[{use.spot[1]}]'}"
            for use in group.uses
        ),
        interface=group.interface,
        delete=group.allows("delete"),
        permute=group.allows("permute"),
        scale=_count(axes, group, to_scale),
        rotate=_count(axes, group, to_rotate),
        pinned=_pinned(group),
    )


def _pinned(group: Group) -> tuple[str, ...]:
    reasons = [
        pin.reason + (f" ({_node(pin.node)})" if pin.node is not None else "") for pin in group.pins
    ]
    if group.size <= group.least:
        reasons.append(f"all {group.size} positions must stay" if group.size > 1 else ALONE.reason)
    return tuple(dict.fromkeys(reasons))


def _member(axes: Axes, member: Member) -> str:
    if member.value not in axes.related.axes:  # a constant that others share
        return f"{member.value.name}:{member.dim}"
    term = axes.term(member.value, member.dim)
    whole = len(axes.of(member.value, member.dim)) == 1 and not term.startswith(("(", "["))
    return f"{member.value.name}:{member.dim}" + ("" if whole else f" = {term}")


def _count(axes: Axes, group: Group, find: Callable[[Axes, Group, ir.Value, int], Stretch]) -> int:
    """How many different stretches start at a weight of the group."""
    found = set()
    for member in group.members:
        try:
            found.add(frozenset(find(axes, group, member.value, member.dim).exponents))
        except PassError:
            continue
    return len(found)


def _node(node: ir.Node) -> str:
    name = node.name or node.outputs[0].name or "?"
    path = module_path(node)
    return f"{name} in {path}" if path else name


def _common(paths: Sequence[str]) -> str:
    """The longest path that all start with."""
    shared: list[str] = []
    for steps in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)
