"""Device code for sm_90a: tensor copies, barriers in shared memory, and warpgroup products (wgmma).

Instruction by instruction it follows the PTX ISA 8.5, sections 9.7.8.24 (cp.async.bulk.tensor), 9.7.12.15
(mbarrier) and 9.7.14 (wgmma). Tiles lie in shared memory as rows of 128 bytes whose 16-byte pieces are
permuted by row (the 128-byte swizzle), which copies and products know alike: rows of K, or, of halves
that lie the other way round, of 64 lines for each element of K.

Work comes in units: a tile, or half of one where there are so few last tiles that each block gets at most one
of their halves.

Tensor cores keep sums of 8-bit floats with some 14 bits. So those of one stage, 128 elements of K, are added
to float32 in registers, which have room for tiles half as wide.
"""

from __future__ import annotations

from dataclasses import dataclass

from netlathe.backends.tvm.cuda import warpgroup
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES, PROCESSORS
from netlathe.backends.tvm.cuda.operands import Operands, operands
from netlathe.backends.tvm.cuda.warpgroup import CACHE_BYTES, GROUP, LEAVING, PART, ROW_BYTES

# Of a tile: 64 for each multiplying warpgroup; or 64 alone, where one of the two is idle.
ROWS = 128
SHARED = ARCHITECTURES["sm_90a"][1]  # bytes that a block may have
COUNTED = (192, 256, 384, 512)  # for so many rows, or fewer, tiles are chosen
# Measured on an H200: a stage takes so many cycles at least. Products on all multiprocessors let the clock
# fall, so that a cycle of theirs takes as long as so many of what else goes on.
_STAGE, _HOT = 480, 1.36
_LEAVING = 14  # of :data:`LEAVING`, where nothing but rounding is done on the way


@dataclass(frozen=True)
class Shape:
    """A tile of ``rows`` by ``columns``, ``stages`` in flight; ``cluster`` blocks share columns of B."""

    columns: int = 256
    stages: int = 4
    cluster: int = 2
    rows: int = ROWS

    @property
    def stage_bytes(self) -> int:
        """Both operands of one step."""
        return (self.rows + self.columns) * ROW_BYTES

    @property
    def readers(self) -> int:
        """Warpgroups that let a stage go."""
        return self.rows // PART * self.cluster

    @property
    def box_rows(self) -> int:
        """Rows of B that one copy brings: what a block of the cluster copies of a piece."""
        return self.columns // self.cluster // self.pieces

    @property
    def pieces(self) -> int:
        """That a tile may be cut in, each of whole parts of results."""
        return 2 if self.columns % (2 * PART) == 0 else 1

    @property
    def staging_bytes(self) -> int:
        """What results take on their way out, behind the stages."""
        return warpgroup.STAGING_BYTES

    @property
    def shared_bytes(self) -> int:
        """All of shared memory: to align it, the stages, the results, the barriers."""
        return 1024 + self.stages * self.stage_bytes + self.staging_bytes + 2 * self.stages * 8

    def space(self, dtype: str) -> str:
        """The namespace in C++ of its functions."""
        return f"netlathe_{dtype}_{self.rows}_{self.columns}_{self.cluster}"


def shape(rows: int, columns: int, cluster: int) -> Shape:
    """With as many stages as there is room for."""
    one = Shape(columns, 1, cluster, rows)
    room = SHARED - 1024 - one.staging_bytes
    return Shape(columns, room // (one.stage_bytes + 16), cluster, rows)


def chosen(kind: Operands) -> Shape:
    """The tile for operands of this kind and many rows."""
    return shape(ROWS, 128 if kind.is_float8 else 256, 2)


def by_rows(kind: Operands, columns: int, inner: int) -> list[tuple[int, Shape]]:
    """Tiles for a weight [columns, inner] and at most so many rows, in order; :func:`chosen`'s is for more.

    Few rows are few tiles. They get as many rows and columns as let all blocks end together, where few of the
    rows that are multiplied are not there.
    """
    widest, steps = chosen(kind), -(-inner * kind.bytes // ROW_BYTES)
    able = [
        shape(high, wide, 1) for high in (PART, ROWS) for wide in range(PART, widest.columns, 16)
    ]
    able += [widest, shape(ROWS, widest.columns, 1), shape(PART, widest.columns, 1)]
    found: list[tuple[int, Shape]] = []
    for most in reversed(COUNTED):
        made = min(able, key=lambda made: _cycles(made, most, columns, steps))
        if made != (found[-1][1] if found else widest):
            found.append((most, made))
    return found[::-1]


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
    return min(able, key=lambda made: _cycles(made, *given, ROW_BYTES / CACHE_BYTES, _LEAVING))


def _cycles(
    made: Shape,
    rows: int,
    columns: int,
    steps: int,
    count: int = 1,
    line: float = 2,
    leaving: int = LEAVING,
) -> float:
    """What ``count`` products take: a ``line`` of 128 bytes to be there, a column's results to leave."""

    def tile(wide: int) -> float:
        multiplying = made.rows // 32 * wide * _HOT
        reading = line * (made.rows + wide / made.cluster)
        out = leaving * PART * len(warpgroup.parts(wide))
        return steps * max(multiplying, reading, _STAGE) + out

    down = -(-rows // (made.rows * made.cluster))
    tiles = count * down * -(-columns // made.columns)
    rounds, rest = divmod(tiles, PROCESSORS // made.cluster)
    halved = rest * made.pieces <= PROCESSORS // made.cluster
    last = made.columns // (made.pieces if halved else 1)
    return rounds * tile(made.columns) + (tile(last) if rest else 0)


def _multiply(kind: Operands, columns: int) -> str:
    """One instruction: 64 rows by ``columns``."""
    count = columns // 2
    letter, form = ("r", "s32") if kind.sums == "int32" else ("f", "f32")
    # Integers have no signs to choose; halves may be transposed, too.
    signs = "" if kind.sums == "int32" else ", 1, 1"
    turned = f", %{count + 3}, %{count + 4}" if kind.bytes == 2 else ""
    flags = ', "n"(kDownA), "n"(kDownB)' if kind.bytes == 2 else ""
    places = ", ".join(f"%{i}" for i in range(count))
    registers = ", ".join(f'"+{letter}"(d[{i}])' for i in range(count))
    return f"""    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k{kind.deep}.{form}.{kind.a}.{kind.b} {{{places}}},"
        " %{count}, %{count + 1}, p{signs}{turned};\\n}}"
        : {registers}
        : "l"(a), "l"(b), "r"(add){flags});"""


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


_OPERANDS = f"""    const int stage = number % kStages;
    wait(ready(at, stage), (number / kStages) & 1);
    const uint32_t tile = at + stage * kStageBytes;
    const uint64_t a = described<kSlab>(tile + group * kSlab);
    const uint64_t b = described<kSlab>(tile + kRows * {ROW_BYTES});
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
"""
# Products of one stage go on while those of the stage before are waited for.
_STAGES = f"""  for (int k = 0; k < steps; ++k, ++number) {{
{_OPERANDS}#pragma unroll
    for (int part = 0; part < 4; ++part)
      multiply<kN, kDownA, kDownB>(d, a + part * (kDownA ? 128 : 2), b + part * (kDownB ? 128 : 2), 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (k > 0) {{
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (speaks) release<kCluster>(empty(at, (number - 1) % kStages));
    }}
  }}
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold<kN>(d);
  if (speaks) release<kCluster>(empty(at, (number - 1) % kStages));
"""
# Sums of one stage are added to those in registers while products of the next go on.
_STAGES_ADDED = f"""  Sum even[kN / 2] = {{}}, odd[kN / 2] = {{}};
  auto start = [&](Sum* part, int number) {{
{_OPERANDS}#pragma unroll
    for (int step = 0; step < 4; ++step)
      multiply<kN, false, false>(part, a + step * 2, b + step * 2, step > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }};
  auto add = [&](Sum* part, int number) {{
    hold<kN>(part);
    if (speaks) release<kCluster>(empty(at, number % kStages));
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) d[i] += part[i];
  }};
  int k = 0;
  for (; k + 1 < steps; k += 2) {{
    start(even, number + k);
    start(odd, number + k + 1);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    add(even, number + k);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    add(odd, number + k + 1);
  }}
  if (k < steps) {{
    start(even, number + k);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    add(even, number + k);
  }}
"""


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
constexpr int kRows = {shape.rows}, kColumns = {shape.columns};
constexpr int kPieces = {shape.pieces}, kBox = {shape.box_rows}, kSlab = {PART * ROW_BYTES};
using Sum = {whole};

__device__ __forceinline__ uint32_t ready(uint32_t at, int stage) {{
  return at + kStages * kStageBytes + {shape.staging_bytes} + stage * 8;
}}
__device__ __forceinline__ uint32_t empty(uint32_t at, int stage) {{ return ready(at, kStages + stage); }}
// A box of an operand: from this element and row of a matrix on, whose number has kRank - 2 parts.
template <int kRank, bool kToAll = false> __device__ __forceinline__ void copy(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int first, int second, int i = 0, int j = 0,
    int k = 0) {{
  const uint16_t all = (1 << kCluster) - 1;
{_copies()}}}
template <int kN, bool kDownA, bool kDownB>
__device__ __forceinline__ void multiply(Sum* d, uint64_t a, uint64_t b, int add) {{
  if constexpr (kN == kColumns)
{_multiply(kind, shape.columns)}
  else
{_multiply(kind, shape.columns // shape.pieces)}
}}
// Products read and write these registers until they are waited for.
template <int kN> __device__ __forceinline__ void hold(Sum* d) {{
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) asm volatile("" : "+{letter}"(d[i])::"memory");
}}

// Every thread, first and last.
__device__ __forceinline__ void start(uint8_t* shared) {{
  netlathe_warpgroup::start<kStages>(ready(base(shared), 0), {shape.readers});
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
__device__ __forceinline__ void retire() {{ asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }}
// Copies for one unit, whose `high` rows begin at `row`; `before` were copied by this block.
template <int kRankA, bool kDownA, int kRankB, bool kDownB>
__device__ __forceinline__ void produce(
    uint8_t* shared, uint64_t map_a, uint64_t map_b, int64_t before, bool whole, int steps, int high, int row,
    int column, int a0, int a1, int a2, int b0, int b1, int b2) {{
  const CUtensorMap *a = reinterpret_cast<const CUtensorMap*>(map_a);
  const CUtensorMap *b = reinterpret_cast<const CUtensorMap*>(map_b);
  const uint32_t at = kept_base(shared);
  const int wide = whole ? kColumns : kColumns / kPieces, mine = rank<kCluster>();
  const int lines = kDownA ? (high + {PART - 1}) / {PART} * {PART} : high;
  // Of a stage of B each block of the cluster brings some rows of K, or some columns.
  const int own = mine * (kDownB ? {deep} / kCluster : wide / kCluster);
  int number = (int)before * steps;
  for (int k = 0; k < steps; ++k, ++number) {{
    const int stage = number % kStages;
    wait(empty(at, stage), ((number / kStages) & 1) ^ 1);
    const uint32_t to = at + stage * kStageBytes, barrier = ready(at, stage);
    expect(barrier, (lines + wide) * {ROW_BYTES});
    if constexpr (kDownA)
      for (int line = 0; line < lines; line += {PART})
        copy<kRankA>(to + line * {ROW_BYTES}, a, barrier, row + line, k * {deep}, a0, a1, a2);
    else
      copy<kRankA>(to, a, barrier, k * {deep}, row, a0, a1, a2);
    const uint32_t right = to + kRows * {ROW_BYTES};
    constexpr int kBoxes = kDownB ? kColumns / {PART} : kPieces;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {{
      if (box * (kColumns / kBoxes) >= wide) continue;
      const int line = kDownB ? box * {PART} : own + box * kBox;
      if constexpr (kDownB)
        copy<kRankB, (kCluster > 1)>(right + (line + own) * {ROW_BYTES}, b, barrier, column + line,
                                   k * {deep} + own, b0, b1, b2);
      else
        copy<kRankB, (kCluster > 1)>(right + line * {ROW_BYTES}, b, barrier, k * {deep}, column + line, b0,
                                   b1, b2);
    }}
  }}
}}

__device__ __forceinline__ void prepare() {{ asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }}
// Where stages hold two units, warpgroups multiply in turn: the results of one leave while the other does.
__device__ __forceinline__ bool in_turn(int steps) {{ return kRows > {PART} && 2 * steps <= kStages; }}
// Multiplying threads, before the first unit and behind the last.
__device__ __forceinline__ void begin(int steps) {{
  if (in_turn(steps) && threadIdx.x / {GROUP} == 2) pass_turn(1);
}}
__device__ __forceinline__ void end(int steps) {{
  if (in_turn(steps) && threadIdx.x / {GROUP} == 1) await_turn(0);  // the last one that was passed
}}

template <int kN, bool kDownA, bool kDownB>
__device__ __forceinline__ void sum_up(uint8_t* shared, Sum* d, int number, int steps) {{
  const uint32_t at = kept_base(shared);
  const int group = threadIdx.x / {GROUP} - 1;
  const bool speaks = threadIdx.x % {GROUP} == 0;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = 0;
{_STAGES_ADDED if kind.is_float8 else _STAGES}}}
// The sums of one unit, 64 rows of it for each of the two warpgroups; `before` were summed up by this block.
template <bool kDownA, bool kDownB>
__device__ __forceinline__ void consume(uint8_t* shared, Sum* d, int64_t before, bool whole, int steps) {{
  const int group = threadIdx.x / {GROUP} - 1;
  if (in_turn(steps)) await_turn(group);
  if (whole) sum_up<kColumns, kDownA, kDownB>(shared, d, (int)(before * steps), steps);
  else sum_up<kColumns / kPieces, kDownA, kDownB>(shared, d, (int)(before * steps), steps);
  if (in_turn(steps)) pass_turn(group);
}}
}}  // namespace
#endif
"""


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"{shape.space(dtype)}::{function}"
