"""Whether a convolution is computed by :mod:`netlathe.backends.tvm.kernels.winograd`, and how it is cut.

A model of cost decides: the multiply-adds that are left, at the speed of the register tile; the transforms;
and reading the weights from memory, which are 1.8 (m = 2) or 4 times (m = 4) as many. The direct kernel
takes one multiply-add for each product. The ratio of the two is compared with measurements in docs/tvm.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from netlathe.backends.tvm.kernels.conv import Geometry
from netlathe.backends.tvm.kernels.tile import Panels
from netlathe.backends.tvm.machine import Machine
from netlathe.backends.tvm.toom_cook import POINTS, TAPS

# Bytes of a block's transformed tiles and of the sums of a panel: half of a level-2 cache of 1 MiB.
_BLOCK_BYTES = 1 << 19
_UNKNOWN = 14  # rows or columns of a plane that only the run knows: small, as few tiles cost most
_MOST_ROWS = 14  # of a register tile
# Costs are counted in multiply-adds at full speed, 59 in a nanosecond where these were measured: what
# transforms take for each element of a tile, before and after, by m, and a byte that comes from memory.
_FORWARD = {2: 100.0, 4: 330.0}
_BACKWARD = {2: 110.0, 4: 420.0}
_BYTE = 2.0


@dataclass(frozen=True)
class Plan:
    """How a convolution is cut: ``outputs`` of a tile in each direction, ``block`` tiles of a task.

    ``cut`` says how output channels lie in panels, ``parts`` over how many tasks these are spread.
    """

    outputs: int
    block: int
    parts: int
    cut: Panels

    @property
    def inputs(self) -> int:
        """Rows or columns of a transformed tile."""
        return self.outputs + TAPS - 1

    @property
    def positions(self) -> int:
        """Of a transformed tile."""
        return self.inputs**2

    @property
    def part(self) -> int:
        """Panels of a task."""
        return -(-self.cut.count // self.parts)


def plan(
    machine: Machine,
    geometry: Geometry,
    batch: int | None,
    plane: tuple[int | None, int | None],
) -> Plan | None:
    """The cheapest plan for an output of ``plane`` rows and columns, or None if the direct kernel is cheaper.

    None stands for a size that only the run knows: the batch is then taken as 1, rows or columns as 14.
    """
    found = estimates(machine, geometry, batch, plane).values()
    ratio, best = min(found, key=lambda each: each[0], default=(1.0, None))
    return best if ratio < 1.0 else None


def estimates(
    machine: Machine,
    geometry: Geometry,
    batch: int | None,
    plane: tuple[int | None, int | None],
) -> dict[int, tuple[float, Plan]]:
    """Of each m the cost of the cheapest plan over that of the direct kernel, and the plan; or nothing."""
    g, lanes = geometry, machine.lanes("float32")
    if g.kernel != (TAPS, TAPS) or g.groups != 1 or {*g.strides, *g.dilations} != {1}:
        return {}
    if g.inputs < lanes:
        return {}
    images, height, width = batch or 1, plane[0] or _UNKNOWN, plane[1] or _UNKNOWN
    products = TAPS**2 * g.inputs * _whole(g.outputs, lanes)
    direct = products * (images * height * width + 4 * _BYTE)
    found = {}
    for m in POINTS:
        tiles = images * -(-height // m) * -(-width // m)
        costs = [(_cost(made, g, tiles), made) for made in _plans(machine, g, m, tiles)]
        cost, made = min(costs, key=lambda each: each[0])
        found[m] = (cost / direct, made)
    return found


def _whole(count: int, size: int) -> int:
    """The next multiple of ``size``."""
    return -(-count // size) * size


def _plans(machine: Machine, g: Geometry, m: int, tiles: int) -> Iterator[Plan]:
    """Blocks of a few register tiles that fit the cache, and hold no more tiles than there are."""
    lanes = machine.lanes("float32")
    shapes = [
        Panels(g.outputs, lanes, count, rows)
        for count in range(1, 5)
        for rows in range(1, min(_MOST_ROWS, tiles) + 1)
        if rows * count + count + 1 <= machine.registers
    ]
    for cut in shapes:
        for block in range(cut.rows, min(8 * cut.rows, tiles) + 1, cut.rows):
            for parts in (1, 2, 4, 8):
                made = Plan(m, block, parts, cut)
                held = 4 * block * made.positions * (g.inputs + cut.width)
                if parts <= cut.count and (held <= _BLOCK_BYTES or block == cut.rows):
                    yield made


def _cost(made: Plan, g: Geometry, tiles: int) -> float:
    """Multiply-adds at full speed that take as long, on one, two and four threads on the average."""
    cut, m = made.cut, made.outputs
    # A step of the register tile starts a multiply-add for each sum, which the next step waits for. It
    # loads meanwhile, part of it from the level-2 cache: four bytes in the time of each multiply-add.
    sums, loads = cut.rows * cut.vectors, cut.rows + cut.vectors
    step = (max(sums, 1.25 * loads, 8, 5 * cut.vectors) + 0.02 * loads) / sums
    # For each block all weights come by, at no more than the speed of memory if they are many.
    each = max(made.block * step, 4 * _BYTE)
    products = made.positions * g.inputs * made.part * cut.width * each
    forward = _whole(g.inputs, cut.lanes) * _FORWARD[m]
    backward = made.part * cut.width * _BACKWARD[m]
    tasks = -(-tiles // made.block) * made.parts
    rounds = sum(_whole(tasks, threads) for threads in (1, 2, 4)) / 3
    weights = 4 * made.positions * g.inputs * cut.count * cut.width
    return rounds * (products + made.block * (forward + backward)) + _BYTE * weights
