"""Device code for sm_90a: tensor copies, barriers in shared memory, and warpgroup products (wgmma).

Instruction by instruction it follows the PTX ISA 8.5, sections 9.7.8.24 (cp.async.bulk.tensor), 9.7.12.15
(mbarrier) and 9.7.14 (wgmma). Tiles lie in shared memory as rows of 128 bytes whose 16-byte pieces are
permuted by row (the 128-byte swizzle), which copies and products know alike: rows of K, or, of halves
that lie the other way round, of 64 lines for each element of K.

The left operand of a warpgroup product has 64 lines, the right one any multiple of 8. So where there are not
many rows, columns of the weight are the left operand and all rows of a tile, which there are as many of as
must be, the right one: 129 rows are multiplied as 144, not as 192. Such shapes are ``turned``, and their
stages take as much room as those rows do: what a multiprocessor has on its way decides there.

Work comes in units: a tile, or half of one where there are so few last tiles that each block gets at most one
of their halves.

Tensor cores keep sums of 8-bit floats with some 14 bits. So those of one stage, 128 elements of K, are added
to float32 in registers, which have room for tiles half as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

from netlathe.backends.tvm.cuda import tilings, warpgroup
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, PROCESSORS
from netlathe.backends.tvm.cuda.operands import Operands, operands
from netlathe.backends.tvm.cuda.tilings import Tiling
from netlathe.backends.tvm.cuda.warpgroup import CACHE_BYTES, COPYING, GROUP, PART, ROW_BYTES

# Of a tile: 64 for each multiplying warpgroup; or 64 alone, where one of the two is idle.
ROWS = 128
SHARED = ARCHITECTURES["sm_90a"][1]  # bytes that a block may have
# Measured on an H200: a stage takes so many cycles at least. Products on all multiprocessors let the clock
# fall, so that a cycle of theirs takes as long as so many of what else goes on.
_STAGE, _HOT = 480, 1.36
MOST_STAGES = 12  # of a turned shape, whose stages have as many rows as there are
STEP = 16  # between numbers of rows that there are products for, where they are the right operand
# The same for weights that no cache holds: while tensor cores run, 128 bytes of shared memory take so many
# cycles to be read and to be written. A stage takes so many at least.
_READING, _WRITING, _LEAST = 1.4, 0.78, 407
_HALF = 1.12  # times what a tile of half the columns takes: its stages are half empty
_LEAVING = 14  # of :data:`LEAVING`, where nothing but rounding is done on the way


@dataclass(frozen=True)
class Shape:
    """A tile of ``rows`` by ``columns``, ``stages`` in flight; ``cluster`` blocks share columns of B.

    Rows are the left operand and columns the right one, or, ``turned``, the other way round.
    """

    columns: int = 256
    stages: int = 4
    cluster: int = 2
    rows: int = ROWS
    turned: bool = False

    @property
    def left(self) -> int:
        """Lines of the left operand of products."""
        return self.columns if self.turned else self.rows

    @property
    def right(self) -> int:
        """Lines of the right one, at most."""
        return self.rows if self.turned else self.columns

    @property
    def warpgroups(self) -> int:
        """That multiply, 64 lines of the left operand each."""
        return self.left // PART

    @property
    def threads(self) -> int:
        """All of them: one more warpgroup copies."""
        return (1 + self.warpgroups) * GROUP

    @property
    def registers(self) -> int:
        """Of a multiplying thread: what one that copies leaves over; 0 where all have enough."""
        return warpgroup.registers_left(self.warpgroups)

    @property
    def widths(self) -> list[int]:
        """Of the right operand, that there are products for: the widest first."""
        if self.turned:
            return list(range(self.rows, self.rows // 2 - 1, -STEP))
        return [self.columns // piece for piece in range(1, self.pieces + 1)]

    @property
    def stage_bytes(self) -> int:
        """Both operands of one step, at most."""
        return (self.rows + self.columns) * ROW_BYTES

    @property
    def readers(self) -> int:
        """Warpgroups that let a stage go."""
        return self.warpgroups * self.cluster

    @property
    def box_rows(self) -> int:
        """Rows of B that one copy brings: what a block of the cluster copies of a piece."""
        return self.columns if self.turned else self.columns // self.cluster // self.pieces

    @property
    def pieces(self) -> int:
        """That a tile may be cut in, each of whole parts of results."""
        return 2 if self.columns % (2 * PART) == 0 and not self.turned else 1

    @property
    def staging_bytes(self) -> int:
        """What results take on their way out, behind the stages."""
        return self.warpgroups * warpgroup.STAGING_BYTES // 2

    @property
    def room(self) -> int:
        """Bytes of all stages."""
        return self.stages * self.stage_bytes

    @property
    def most_stages(self) -> int:
        """That there are barriers for."""
        return MOST_STAGES if self.turned else self.stages

    @property
    def shared_bytes(self) -> int:
        """All of shared memory: to align it, the stages, the results, the barriers."""
        return 1024 + self.room + self.staging_bytes + 2 * self.most_stages * 8

    def space(self, dtype: str) -> str:
        """The namespace in C++ of its functions."""
        way = "turned_" if self.turned else ""
        return f"netlathe_{dtype}_{way}{self.rows}_{self.columns}_{self.cluster}"


def shape(rows: int, columns: int, cluster: int, turned: bool = False) -> Shape:
    """With as many stages as there is room for."""
    one = Shape(columns, 1, cluster, rows, turned)
    room = SHARED - 1024 - one.staging_bytes
    return replace(one, stages=room // (one.stage_bytes + 16))


def chosen(kind: Operands) -> Shape:
    """The tile for operands of this kind and many rows."""
    return shape(ROWS, 128 if kind.is_float8 else 256, 2)


def rows_of(made: Shape) -> int:
    """What a tile, or those of a cluster, have at most."""
    return made.rows * made.cluster


@lru_cache
def tiled(kind: Operands, columns: int, inner: int, beyond: int) -> tuple[Tiling[Shape], ...]:
    """How rows become tiles for a weight [columns, inner], if there are more than ``beyond``."""
    steps = -(-inner * kind.bytes // ROW_BYTES)
    able = [shape(ROWS, wide, 1) for wide in range(PART, chosen(kind).columns + 1, 16)]
    able += [shape(chosen(kind).columns, wide, 1, True) for wide in (PART, ROWS)]
    return tilings.chosen(
        beyond, able, chosen(kind), rows_of, partial(_time, columns=columns, steps=steps)
    )


def _time(made: Shape, rows: int, down: int, *, columns: int, steps: int) -> float:
    """Cycles that ``down`` tiles, or clusters of them, of rows take by a weight that no cache holds."""
    high = -(-rows // (down * made.cluster * 8)) * 8

    def tile(across: int) -> float:
        right = max(-(-high // STEP) * STEP, made.widths[-1]) if made.turned else across
        parts = made.left // PART
        multiplying = parts * 2 * right * _HOT
        shared = parts * (64 + right) * _READING + (high + across) * _WRITING
        out = _LEAVING * PART * len(warpgroup.parts(right))
        time = steps * max(multiplying, shared, _LEAST) + out
        return time * (_HALF if across < made.columns else 1)

    return _turns(made, down * -(-columns // made.columns), tile)


def _turns(made: Shape, tiles: int, tile: Callable[[int], float]) -> float:
    """What the most loaded block takes if ``tile`` is what one of so many columns does."""
    most = PROCESSORS // made.cluster
    rounds, rest = divmod(tiles, most)
    halved = rest * made.pieces <= most
    last = made.columns // (made.pieces if halved else 1)
    return rounds * tile(made.columns) + (tile(last) if rest else 0)


def for_sizes(
    kind: Operands,
    rows: int | None,
    inner: int | None,
    columns: int | None,
    count: int | None,
    down: bool,
) -> Shape:
    """The tile for ``count`` products of these sizes; what is not known is taken for large.

    Where the right operand lies ``down``, columns are copied 64 at a time.
    """
    widths = range(PART, chosen(kind).columns + 1, PART if down else 16)
    able = [shape(high, wide, 1) for high in (PART, ROWS) for wide in widths]
    able += [shape(ROWS, wide, 2) for wide in widths if wide % 32 == 0]
    steps = -(-(inner or 2048) * kind.bytes // ROW_BYTES)
    given = (rows or 2048, columns or 2048, steps, count or 16)
    return min(able, key=lambda made: _cycles(made, *given))


def _cycles(made: Shape, rows: int, columns: int, steps: int, count: int) -> float:
    """Cycles that ``count`` products of two computed matrices take."""

    def tile(across: int) -> float:
        multiplying = made.rows // 32 * across * _HOT
        reading = (made.rows + across / made.cluster) * ROW_BYTES / CACHE_BYTES
        out = _LEAVING * PART * len(warpgroup.parts(across))
        return steps * max(multiplying, reading, _STAGE) + out

    down = -(-rows // (made.rows * made.cluster))
    return _turns(made, count * down * -(-columns // made.columns), tile)


def _multiply(kind: Operands, columns: int, is_turned: bool) -> str:
    """One instruction: 64 lines of the left operand by ``columns`` of the right one."""
    count = columns // 2
    letter, form = ("r", "s32") if kind.sums == "int32" else ("f", "f32")
    # Integers have no signs to choose; halves may be transposed, too.
    signs = "" if kind.sums == "int32" else ", 1, 1"
    types = f"{kind.b}.{kind.a}" if is_turned else f"{kind.a}.{kind.b}"
    turned = f", %{count + 3}, %{count + 4}" if kind.bytes == 2 else ""
    flags = ', "n"(kDownA), "n"(kDownB)' if kind.bytes == 2 else ""
    places = ", ".join(f"%{i}" for i in range(count))
    registers = ", ".join(f'"+{letter}"(d[{i}])' for i in range(count))
    return f"""    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k{kind.deep}.{form}.{types} {{{places}}},"
        " %{count}, %{count + 1}, p{signs}{turned};\\n}}"
        : {registers}
        : "l"(a), "l"(b), "r"(add){flags});"""


def choice(widths: Sequence[int], text: Callable[[int], str], condition: str) -> str:
    """C++ that does one thing for each width, where a condition of it and the next holds; else the last."""
    found = ""
    for wide, narrower in pairwise(widths):
        found += f"  if {condition.format(wide, narrower)} {{\n{text(wide)}\n  }} else\n"
    return found + f"  {{\n{text(widths[-1])}\n  }}"


def _copies() -> str:
    """The instruction of each rank, to this block or to all of the cluster."""
    text = ""
    for rank in range(2, 6):
        names = ("first", "second", "i", "j", "k")[:rank]
        places = ", ".join(f"%{3 + n}" for n in range(rank))
        given = ", ".join(f'"r"({name})' for name in names)
        for cast, mask, last in (
            ("", "", ""),
            (".multicast::cluster", f", %{3 + rank}", ', "h"(all)'),
        ):
            text += f"""  if constexpr (kRank == {rank} && {"kToAll" if cast else "!kToAll"})
    asm volatile(
        "cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{cast}"
        " [%0], [%1, {{{places}}}], [%2]{mask};"
        ::"r"(to), "l"(map), "r"(barrier), {given}{last} : "memory");
"""
    return text


_OPERANDS = f"""    wait(ready(at, now.stage), now.parity);
    const uint32_t tile = at + now.stage * bytes;
    const uint64_t a = described<kSlab>(tile + group * kSlab);
    const uint64_t b = described<kSlab>(tile + kLeft * {ROW_BYTES});
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
"""
# Products of one stage go on while those of the stage before are waited for.
_STAGES = f"""  int last = 0;
  for (int k = 0; k < steps; ++k) {{
{_OPERANDS}#pragma unroll
    for (int part = 0; part < 4; ++part)
      multiply<kN, kDownA, kDownB>(d, a + part * (kDownA ? 128 : 2), b + part * (kDownB ? 128 : 2), 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (k > 0) {{
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (speaks) release<kCluster>(empty(at, last));
    }}
    last = now.stage;
    now.advance(stages);
  }}
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold(d);
  if (speaks) release<kCluster>(empty(at, last));
"""
# Sums of one stage are added to those in registers while products of the next go on.
_STAGES_ADDED = f"""  Sum even[kN / 2] = {{}}, odd[kN / 2] = {{}};
  auto start = [&](Sum* part, Stage now) {{
{_OPERANDS}#pragma unroll
    for (int step = 0; step < 4; ++step)
      multiply<kN, false, false>(part, a + step * 2, b + step * 2, step > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }};
  auto add = [&](Sum* part, Stage now) {{
    hold(part, kN / 2);
    if (speaks) release<kCluster>(empty(at, now.stage));
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) d[i] += part[i];
  }};
  int k = 0;
  for (; k + 1 < steps; k += 2) {{
    const Stage first = now;
    start(even, now);
    now.advance(stages);
    start(odd, now);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    add(even, first);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    add(odd, now);
    now.advance(stages);
  }}
  if (k < steps) {{
    start(even, now);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    add(even, now);
  }}
"""


_SUM_UP = "    sum_up<{}, kDownA, kDownB>(shared, d, bytes, (int)before, steps, stages);"


def source(shape: Shape, dtype: str) -> str:
    """The device functions for one shape; ``dtype`` is the name of :class:`Operands`."""
    kind = operands(dtype)
    deep = ROW_BYTES // kind.bytes
    letter, whole = ("r", "int") if kind.sums == "int32" else ("f", "float")
    space = shape.space(dtype)
    return f"""{warpgroup.SOURCE}
#ifndef {space.upper()}
#define {space.upper()}
namespace {space} {{
using namespace netlathe_warpgroup;
constexpr int kStages = {shape.stages}, kStageBytes = {shape.stage_bytes}, kCluster = {shape.cluster};
constexpr int kMostStages = {shape.most_stages};
constexpr int kRows = {shape.rows}, kColumns = {shape.columns}, kLeft = {shape.left}, kRight = {shape.right};
constexpr int kSums = kRight / 2;  // of a thread
constexpr int kPieces = {shape.pieces}, kBox = {shape.box_rows}, kSlab = {PART * ROW_BYTES};
using Sum = {whole};

__device__ __forceinline__ uint32_t ready(uint32_t at, int stage) {{
  return at + kStages * kStageBytes + {shape.staging_bytes} + stage * 8;
}}
__device__ __forceinline__ uint32_t empty(uint32_t at, int stage) {{ return ready(at, kMostStages + stage); }}
__device__ __forceinline__ int stage_bytes(int wide) {{
  return {"(kLeft + wide) * " + str(ROW_BYTES) if shape.turned else "kStageBytes"};
}}
// A box of an operand: from this element and row of a matrix on, whose number has kRank - 2 parts.
template <int kRank, bool kToAll = false> __device__ __forceinline__ void copy(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int first, int second, int i = 0, int j = 0,
    int k = 0) {{
  const uint16_t all = (1 << kCluster) - 1;
{_copies()}}}
template <int kN, bool kDownA, bool kDownB>
__device__ __forceinline__ void multiply(Sum* d, uint64_t a, uint64_t b, int add) {{
{choice(shape.widths, lambda wide: _multiply(kind, wide, shape.turned), "constexpr (kN == {0})")}
}}
// Products read and write these registers until they are waited for.
__device__ __forceinline__ void hold(Sum* d, int count = kSums) {{
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+{letter}"(d[i])::"memory");
}}

// Every thread, first and last.
__device__ __forceinline__ void start(uint8_t* shared) {{
  asm volatile("griddepcontrol.launch_dependents;");
  netlathe_warpgroup::start<kMostStages>(ready(base(shared), 0), {shape.readers});
  cluster_barrier<kCluster>();
}}
__device__ __forceinline__ void finish() {{ cluster_barrier<kCluster>(); }}
// Where a unit lies: rows of tiles, a column, a matrix. Units from `full` on are halves of tiles. Strips of 8
// rows of tiles are walked column by column, so that what blocks read at one time overlaps in the level-2
// cache.
struct Place {{ int row, column, matrix; }};
__device__ __forceinline__ Place place(int64_t unit_, int64_t full_, int64_t down_, int64_t across_) {{
  const int unit = (int)unit_, full = (int)full_, down = (int)down_, across = (int)across_;
  const int number = unit < full ? unit : full + (unit - full) / kPieces;
  const int matrix = number / (down * across), tile = number - matrix * (down * across);
  const int strip = 8, size = strip * across, first = tile / size * strip;
  const int high = min(down - first, strip), within = tile % size, half = (unit - full) % kPieces;
  const int column = within / high * kColumns + (unit < full ? 0 : half * (kColumns / kPieces));
  return {{first + within % high, column, matrix}};
}}
__device__ __forceinline__ int64_t top(
    int64_t unit, int64_t full, int64_t down, int64_t across, int64_t high) {{
  return (int64_t)(place(unit, full, down, across).row * kCluster + rank<kCluster>()) * high;
}}
__device__ __forceinline__ int64_t left(int64_t unit, int64_t full, int64_t down, int64_t across) {{
  return place(unit, full, down, across).column;
}}
__device__ __forceinline__ int64_t matrix(int64_t unit, int64_t full, int64_t down, int64_t across) {{
  return place(unit, full, down, across).matrix;
}}

// The copying warpgroup, of which one thread goes on.
__device__ __forceinline__ void retire() {{ {warpgroup.registers(shape.registers and COPYING, "dec")} }}
// Copies for one unit: the left operand, A, from `left` on, and of the right one, B, from `right` on, what
// this block brings for its cluster. `before` units were copied by this block. The first copies of the
// weight, which is B, or A where the shape is turned, do not wait for the kernels in front.
template <int kRankA, bool kDownA, int kRankB, bool kDownB>
__device__ __forceinline__ void produce(
    uint8_t* shared, uint64_t map_a, uint64_t map_b, int64_t before, int high, int wide, int steps,
    int stages, int left, int right, int a0, int a1, int a2, int b0, int b1, int b2) {{
  const CUtensorMap *a = reinterpret_cast<const CUtensorMap*>(map_a);
  const CUtensorMap *b = reinterpret_cast<const CUtensorMap*>(map_b);
  const uint32_t at = kept_base(shared);
  const int bytes = stage_bytes(wide), mine = rank<kCluster>();
  const int lines = kDownA ? (high + {PART - 1}) / {PART} * {PART} : high;
  // Of a stage of B each block of the cluster brings some of K, or some lines.
  const int own = mine * (kDownB ? {deep} / kCluster : wide / kCluster);
  auto copy_a = [&](int k, int stage) {{
    const uint32_t to = at + stage * bytes;
    if constexpr (kDownA)
      for (int line = 0; line < lines; line += {PART})
        copy<kRankA>(to + line * {ROW_BYTES}, a, ready(at, stage), left + line, k * {deep}, a0, a1, a2);
    else
      copy<kRankA>(to, a, ready(at, stage), k * {deep}, left, a0, a1, a2);
  }};
  auto copy_b = [&](int k, int stage) {{
    const uint32_t to = at + stage * bytes + kLeft * {ROW_BYTES}, barrier = ready(at, stage);
    constexpr int kBoxes = kDownB ? kRight / {PART} : kPieces;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {{
      if (box * (kRight / kBoxes) >= wide) continue;
      const int line = kDownB ? box * {PART} : own + box * kBox;
      if constexpr (kDownB)
        copy<kRankB, (kCluster > 1)>(to + (line + own) * {ROW_BYTES}, b, barrier, right + line,
                                   k * {deep} + own, b0, b1, b2);
      else
        copy<kRankB, (kCluster > 1)>(to + line * {ROW_BYTES}, b, barrier, k * {deep}, right + line, b0, b1,
                                   b2);
    }}
  }};
  auto copy_weight = [&](int k, int stage) {{
    expect(ready(at, stage), (lines + wide) * {ROW_BYTES});
    {"copy_a" if shape.turned else "copy_b"}(k, stage);
  }};
  const int ahead = before ? 0 : min(steps, stages);
  for (int k = 0; k < ahead; ++k) copy_weight(k, k);
  if (before == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
  Stage now((int)before * steps, stages);
  for (int k = 0; k < steps; ++k, now.advance(stages)) {{
    if (k >= ahead) {{
      wait(empty(at, now.stage), now.parity ^ 1);
      copy_weight(k, now.stage);
    }}
    {"copy_b" if shape.turned else "copy_a"}(k, now.stage);
  }}
}}

__device__ __forceinline__ void prepare() {{ {warpgroup.registers(shape.registers, "inc")} }}
// Where stages hold two units, warpgroups multiply in turn: the results of one leave while the other does.
__device__ __forceinline__ bool in_turn(int steps) {{ return kLeft > {PART} && 2 * steps <= kStages; }}
// Multiplying threads, before the first unit and behind the last.
__device__ __forceinline__ void begin(int steps) {{
  if (in_turn(steps) && threadIdx.x / {GROUP} == 2) pass_turn(1);
}}
__device__ __forceinline__ void end(int steps) {{
  if (in_turn(steps) && threadIdx.x / {GROUP} == 1) await_turn(0);  // the last one that was passed
}}

template <int kN, bool kDownA, bool kDownB>
__device__ __forceinline__ void sum_up(
    uint8_t* shared, Sum* d, int bytes, int before, int steps, int stages) {{
  const uint32_t at = kept_base(shared);
  const int group = threadIdx.x / {GROUP} - 1;
  const bool speaks = threadIdx.x % {GROUP} == 0;
  Stage now(before * steps, stages);
#pragma unroll
  for (int i = 0; i < kSums; ++i) d[i] = 0;
{_STAGES_ADDED if kind.is_float8 else _STAGES}}}
// The sums of one unit, of `wide` lines of the right operand; `before` were summed up by this block.
template <bool kDownA, bool kDownB>
__device__ __forceinline__ void consume(
    uint8_t* shared, Sum* d, int64_t before, int wide, int steps, int stages) {{
  const int group = threadIdx.x / {GROUP} - 1, bytes = stage_bytes(wide);
  if (in_turn(steps)) await_turn(group);
{choice(shape.widths, _SUM_UP.format, "(wide > {1})")}
  if (in_turn(steps)) pass_turn(group);
}}
}}  // namespace
#endif
"""


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"{shape.space(dtype)}::{function}"
