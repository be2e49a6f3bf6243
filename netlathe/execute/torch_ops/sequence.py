"""Sequences of tensors, as Python lists. The exporter writes a split by sizes in this way.

Only inside a graph: a graph's inputs and outputs are tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .row import Ints, Row, ints, number, row


def sequence_construct(*inputs: Tensor) -> list[Tensor]:
    """SequenceConstruct."""
    return list(inputs)


def sequence_empty(*, dtype: int = 1) -> list[Tensor]:
    """SequenceEmpty; a list has no element type."""
    return []


def sequence_at(input_sequence: list[Tensor], position: Ints) -> Tensor:
    """SequenceAt."""
    index: int = number(position)
    return input_sequence[index]


def sequence_insert(
    input_sequence: list[Tensor], tensor: Tensor, position: Ints | None = None
) -> list[Tensor]:
    """SequenceInsert: before ``position``, at the end without one."""
    result = list(input_sequence)
    result.insert(len(result) if position is None else number(position), tensor)
    return result


def sequence_erase(input_sequence: list[Tensor], position: Ints | None = None) -> list[Tensor]:
    """SequenceErase: the last without a position."""
    result = list(input_sequence)
    del result[-1 if position is None else number(position)]
    return result


def sequence_length(input_sequence: list[Tensor]) -> Tensor:
    """SequenceLength."""
    return torch.tensor(len(input_sequence), dtype=torch.int64)


def split_to_sequence(
    input: Tensor, split: Ints | None = None, *, axis: int = 0, keepdims: int = 1
) -> list[Tensor]:
    """SplitToSequence: into parts of one size (a scalar) or of the sizes given; without, of size 1,
    whose axis ``keepdims`` may drop."""
    if split is None:
        parts = list(torch.split(input, 1, axis))
        return parts if keepdims else [part.squeeze(axis) for part in parts]
    scalar = split.dim() == 0 if isinstance(split, Tensor) else not isinstance(split, list)
    return list(torch.split(input, number(split) if scalar else ints(split), axis))


def concat_from_sequence(input_sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """ConcatFromSequence."""
    return torch.stack(input_sequence, axis) if new_axis else torch.cat(input_sequence, axis)


ROWS: dict[str, Row] = {
    "SequenceConstruct": row(sequence_construct),
    "SequenceEmpty": row(sequence_empty),
    "SequenceAt": row(sequence_at, "position"),
    "SequenceInsert": row(sequence_insert, "position"),
    "SequenceErase": row(sequence_erase, "position"),
    "SequenceLength": row(sequence_length),
    "SplitToSequence": row(split_to_sequence, "split"),
    "ConcatFromSequence": row(concat_from_sequence),
}
