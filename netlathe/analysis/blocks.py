"""Which residual branches make up one block: attention and FFN, with or without cross-attention.

Module paths say it where they are known: in ``decoder.block.3.layer.2`` the block is the item of the
innermost list whose items hold an attention and something else. Otherwise the order on the stream
says it: an attention, one that attends to an encoder, an FFN. A branch that belongs to no other is a
block of its own (of a ResNet, of ConvNeXt).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from netlathe.analysis import operators
from netlathe.ir import weights
from netlathe.ir.provenance import module_path

if TYPE_CHECKING:
    from netlathe.analysis.branches import Branch


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive branches that are one layer to the model's author, or a single branch."""

    branches: tuple[Branch, ...]
    start: ir.Value  # the stream before it
    end: ir.Value  # the stream after it, behind the norm of a post-norm model; shaped like start
    reason: str = ""  # why it cannot be removed as a whole

    @property
    def module_path(self) -> str:
        """The longest path that all its branches share."""
        shared = []
        for parts in zip(*(b.module_path.split(".") for b in self.branches), strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        return ".".join(shared)


def blocks(branches: Sequence[Branch]) -> list[Block]:
    """The blocks that ``branches``, all that a model has, make up; in order."""
    members: dict[int, list[Branch]] = defaultdict(list)
    for branch in branches:
        members[branch.block].append(branch)
    return [_block(members[number]) for number in sorted(members)]


def _block(branches: Sequence[Branch]) -> Block:
    start, last = branches[0].split, branches[-1]
    end = last.norm.outputs[0] if last.norm is not None else last.total
    while not _shaped_like(end, start) and (reshaped := _only_reshape(end)) is not None:
        end = reshaped
    reason = next((b.reason for b in branches if b.reason), "")
    if not reason and not _shaped_like(end, start):
        reason = "the stream has another shape behind it than before"
    return Block(tuple(branches), start, end, reason)


def _shaped_like(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and b.shape is not None and a.shape == b.shape


def _only_reshape(value: ir.Value) -> ir.Value | None:
    readers = [node for node in value.consumers() if node.op_type != "Shape"]
    if len(readers) != 1 or readers[0].op_type not in operators.RESHAPES:
        return None
    return readers[0].outputs[0]


# -- numbering ------------------------------------------------------------------------------------


def number_blocks(branches: Sequence[Branch]) -> list[int]:
    """The number of the block that each branch belongs to, counting up in the order of branches."""
    items = _Items(branches)
    open_blocks: list[list[Branch]] = []
    numbers = []
    for branch in branches:
        for number in range(len(open_blocks) - 1, -1, -1):
            block = open_blocks[number]
            if _follows(block[-1], branch):
                if _belongs(block, branch, items):
                    block.append(branch)
                    numbers.append(number)
                else:
                    number = -1
                break
        else:
            number = -1
        if number < 0:
            numbers.append(len(open_blocks))
            open_blocks.append([branch])
    return numbers


def _belongs(block: Sequence[Branch], branch: Branch, items: _Items) -> bool:
    """Whether ``branch``, which comes next on the stream, is part of ``block``."""
    last = block[-1]
    if branch.total is last.total:
        return True
    here, there = items.innermost(last), items.innermost(branch)
    if here and there:
        return here == there
    if items.outermost(last) != items.outermost(branch) or last.kind != "attention":
        return False
    return branch.kind != "attention" or (branch.crosses and not last.crosses)


def _follows(before: Branch, after: Branch) -> bool:
    """Whether nothing but norms, activations and reshapes lies between two branches of a stream."""
    if after.total is before.total:
        return True
    value: ir.Value | None = after.split
    while value is not None:
        if value is before.total:
            return True
        maker = value.producer()
        if maker is None or maker.op_type not in _ON_STREAM:
            return False
        sources = [v for v in maker.inputs if v is not None and not weights.is_weight(v)]
        value = sources[0] if len(sources) == 1 else None
    return False


_ON_STREAM = operators.ELEMENTWISE | operators.RESHAPES | operators.NORMS | {"BatchNormalization"}


class _Items:
    """The items of module lists that branches lie in, outermost first: ``layers.1.blocks.0`` is one."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        held: dict[str, list[Branch]] = defaultdict(list)
        for branch in branches:
            for item in _items(branch.module_path):
                held[item].append(branch)
        self._lists = {_list_of(item) for item, inside in held.items() if _is_block(item, inside)}

    def innermost(self, branch: Branch) -> str:
        """The item that is a block, if the lists of the model tell."""
        found = [item for item in _items(branch.module_path) if _list_of(item) in self._lists]
        return found[-1] if found else ""

    def outermost(self, branch: Branch) -> str:
        """The item of the outermost list."""
        return next(_items(branch.module_path), "")


def _items(path: str) -> Iterator[str]:
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            yield ".".join(parts[: index + 1])


def _list_of(item: str) -> str:
    """The list that an item is of; corresponding lists of all stages are one."""
    return ".".join("*" if part.isdigit() else part for part in item.split("."))


def _is_block(item: str, branches: Sequence[Branch]) -> bool:
    attends = {branch.kind == "attention" for branch in branches}
    joined_here = [b for b in branches if module_path(b.join) == item]
    return len(attends) == 2 or len(joined_here) > 1
