"""What can be pruned: axis groups sorted into scopes by structure, with the weights that know them.

A candidate is one axis group (:class:`netlathe.analysis.axes.Group`) whose positions can go: the channels
of a convolution, the neurons of an FFN, heads, experts. Its positions are numbered from 0 to ``size`` - 1,
whatever they are in a tensor: of 8 heads of 64, position 3 is rows 192 to 255 of a projection. ``Part``
holds, for every weight that has the axis, which of its rows belong to which position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.axes import Axes, Group

Positions: TypeAlias = npt.NDArray[np.int64]
Scope = Literal["channels", "ffn", "heads", "kv_groups", "experts", "hidden", "vocab"]
Role = Literal["writes", "reads", "acts", "holds"]


@dataclass(frozen=True, eq=False)
class Part:
    """A dim of a weight along which positions of a candidate lie.

    ``role`` says what the weight is to the axis:

    ``writes``  a product or a lookup that makes it: its output has the axis, its other operand has not
    ``reads``   a product that sums over it: ``activation`` is what the weight is multiplied with, and
                ``axis`` the dim of the activation that is summed over
    ``acts``    works on each position by itself: a bias, a gain, batch-norm statistics, a depthwise
                kernel, the groups of a grouped convolution
    ``holds``   a slice for each position: an expert's weights, a row of a table
    """

    value: ir.Value  # the initializer
    dim: int
    role: Role
    node: ir.Node  # the operator that computes with it; the weight may reach it through moves
    index: Positions  # [size of the dim]: the position that a row belongs to; -1: to none
    activation: ir.Value | None = None  # of "reads": the other operand
    axis: int = 0  # of "reads": the activation's dim that is summed over
    bias: ir.Value | None = None  # of "writes": the bias that the operator itself adds (Conv)

    def rows(self, position: int) -> Positions:
        """The rows of ``value`` along ``dim`` that belong to a position."""
        return np.flatnonzero(self.index == position)


@dataclass(frozen=True, eq=False)
class Candidate:
    """An axis group that may lose positions.

    ``least`` positions must stay, and what stays must be a multiple of ``multiple``. ``parameters`` and
    ``macs`` are those of one position while nothing else is pruned (all positions cost the same).
    """

    name: str  # unique in the model: "model.layers.0.mlp:ffn"
    scope: Scope
    where: str  # module path that its weights have in common
    group: Group
    axes: Axes
    size: int
    least: int
    multiple: int
    parameters: int
    macs: int
    parts: tuple[Part, ...]
    refused: str = ""  # why none of its positions can go
    pinned_by: tuple[str, ...] = field(default=())  # operators and modules that say so

    def with_role(self, role: Role) -> list[Part]:
        """The parts of one role, in the order in which the graph reads them."""
        return [part for part in self.parts if part.role == role]

    @property
    def writers(self) -> list[Part]:
        """Weights whose product makes the axis."""
        return self.with_role("writes")

    @property
    def readers(self) -> list[Part]:
        """Weights that sum over the axis."""
        return self.with_role("reads")

    def index(self, value: ir.Value, dim: int) -> Positions:
        """For each row of a dim of any value of the model the position it belongs to; -1: to none.

        A statistic ``s`` over the channels of an activation becomes one per position by
        ``np.bincount(index[index >= 0], s[index >= 0], minlength=size)``.
        """
        raise NotImplementedError


def find(axes: Axes, *, multiple: int = 1) -> list[Candidate]:
    """All candidates of a model, in the order of its nodes; what cannot be pruned is among them."""
    raise NotImplementedError
