"""Device code for sm_90a of products of up to 192 rows, where reading the weight decides the time.

Each multiprocessor should read its share of the weight, and little else. So all rows are one tile, and its
columns as many as there are for each multiprocessor; or two blocks, a cluster, make a tile twice as wide and
share its K, so that each reads half as much of the left operand. Their sums meet in shared memory, where
stages were, and each block adds up and finishes rows of its own (distributed shared memory; PTX ISA 8.5,
sections 5.1.5 and 9.7.8.23, mapa).

Stages, barriers and products are those of :mod:`hopper`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from netlathe.backends.tvm.cuda import hopper, warpgroup
from netlathe.backends.tvm.cuda.machine import PROCESSORS
from netlathe.backends.tvm.cuda.operands import Operands, operands

ROWS = (hopper.ROWS, 192)  # most rows of the one tile
# Clusters of so many blocks that run at one time. Those of 4 are slower whatever the shape: 0.63 to 0.84 of
# torch.matmul where those of 2 reach 1.00 to 1.17.
CLUSTERS = {1: PROCESSORS, 2: PROCESSORS // 2}
# Measured on an H200: while a byte of another block's sums is added up, so many come from the level-2 cache.
_ADDING = 16


@dataclass(frozen=True)
class Shape(hopper.Shape):
    """A tile of ``rows`` by ``columns``, whose K ``splits`` blocks share."""

    cluster: int = 1  # of blocks that share what they read
    splits: int = 1

    @property
    def staging_bytes(self) -> int:
        """None: results leave through the stages, when those are done with."""
        return 0

    def space(self, dtype: str) -> str:
        return f"netlathe_split_{dtype}_{self.rows}_{self.columns}_{self.splits}"


def shape(rows: int, columns: int, splits: int) -> Shape:
    """With as many stages as there is room for."""
    one = Shape(columns, 1, rows=rows, splits=splits)
    return replace(one, stages=(hopper.SHARED - 1024) // (one.stage_bytes + 16))


def rows_of(kind: Operands) -> tuple[int, ...]:
    """Of :data:`ROWS` those that there are kernels for: more sums of floats of 8 bits have no registers."""
    return ROWS[:1] if kind.is_float8 else ROWS


@lru_cache
def chosen(kind: Operands, rows: int, columns: int, inner: int) -> Shape:
    """The shape for a weight [columns, inner] whose blocks read the least, and add up little."""
    steps = -(-inner * kind.bytes // warpgroup.ROW_BYTES)
    widest = hopper.chosen(kind).columns
    if rows > hopper.ROWS:
        widest //= 2  # three warpgroups have fewer registers each

    def cost(made: Shape) -> int:
        tiles = -(-columns // made.columns)
        rounds = -(-tiles // CLUSTERS[made.splits])
        read = -(-steps // made.splits) * (rows + made.columns) * warpgroup.ROW_BYTES
        added = (made.splits - 1) * rows // made.splits * made.columns * 4
        return rounds * (read + _ADDING * added)

    widths, splits = range(32, widest + 1, 16), [n for n in CLUSTERS if n <= steps]
    return min((shape(rows, *each) for each in product(widths, splits)), key=cost)


def source(shape: Shape, dtype: str) -> str:
    """The device functions for one shape; ``dtype`` is the name of :class:`Operands`."""
    kind = operands(dtype)
    deep = warpgroup.ROW_BYTES // kind.bytes
    space = shape.space(dtype)
    row = shape.columns + 8  # of sums: 8 rows of a fragment lie in all banks
    return f"""{hopper.source(shape, dtype)}
#ifndef {space.upper()}_PARTS
#define {space.upper()}_PARTS
namespace {space} {{
// Every thread, first: the warpgroups beyond the last row multiply nothing.
__device__ __forceinline__ void start_part(uint8_t* shared, int high) {{
  asm volatile("griddepcontrol.launch_dependents;");
  const int readers = (high + {warpgroup.PART - 1}) / {warpgroup.PART};
  netlathe_warpgroup::start<kStages>(ready(base(shared), 0), readers);
}}

// `steps` stages from `first` on, of the tile that begins at this column: `high` rows of A.
__device__ __forceinline__ void produce_part(
    uint8_t* shared, uint64_t map_a, uint64_t map_b, int high, int column, int first, int steps) {{
  const CUtensorMap *a = reinterpret_cast<const CUtensorMap*>(map_a);
  const CUtensorMap *b = reinterpret_cast<const CUtensorMap*>(map_b);
  {warpgroup.registers(warpgroup.COPYING, "dec")}
  if (threadIdx.x != 0) return;
  const uint32_t at = base(shared);
  auto copy_a = [&](int k) {{
    copy<2>(at + k % kStages * kStageBytes, a, ready(at, k % kStages), (first + k) * {deep}, 0);
  }};
  auto copy_b = [&](int k) {{
    const uint32_t to = at + k % kStages * kStageBytes + {shape.rows * warpgroup.ROW_BYTES};
    expect(ready(at, k % kStages), (high + kColumns) * {warpgroup.ROW_BYTES});
    copy<2>(to, b, ready(at, k % kStages), (first + k) * {deep}, column);
  }};
  const int ahead = steps < kStages ? steps : kStages;
  for (int k = 0; k < ahead; ++k) copy_b(k);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int k = 0; k < ahead; ++k) copy_a(k);
  for (int k = ahead; k < steps; ++k) {{
    wait(empty(at, k % kStages), ((k / kStages) & 1) ^ 1);
    copy_b(k);
    copy_a(k);
  }}
}}

{adding(shape.splits, 1, shape.rows, shape.columns, row, shape.warpgroups, kind.sums)}
// The sums of all warpgroups, where stages were.
__device__ __forceinline__ void put(uint8_t* shared, const Sum* d) {{
  multiplying_barrier();  // all are done with the stages
  Sum* to = static_cast<Sum*>(__cvta_shared_to_generic(base(shared)));
  const int warp = threadIdx.x / 32 - {warpgroup.GROUP // 32}, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {{
      const int row = warp * 16 + half * 8 + lane / 4, column = j * 8 + lane % 4 * 2;
      const Sum* from = d + j * 4 + half * 2;
      *reinterpret_cast<Pair<Sum>*>(to + row * kRow + column) = {{from[0], from[1]}};
    }}
}}
}}  // namespace
#endif
"""


def adding(
    splits: int, sharing: int, rows: int, columns: int, row: int, warpgroups: int, sums: str
) -> str:
    """How sums of one tile meet that lie where stages were, ``row`` of them in a row.

    Each of ``splits`` blocks has ``sharing`` parts of each, of up to ``rows`` rows. All warpgroups but the
    first, ``warpgroups``, add up.
    """
    letter, form = ("r", "s32") if sums == "int32" else ("f", "f32")
    threads = warpgroups * warpgroup.GROUP
    return f"""
constexpr int kSplits = {splits}, kSharing = {sharing}, kRow = {row}, kPart = {rows} * kRow;
// Every thread, when the sums of all blocks are in shared memory; and again before one of the blocks ends.
__device__ __forceinline__ void meet() {{
  __syncwarp();
  if (kSplits > 1)
    cluster_barrier<kSplits>();
  else
    __syncthreads();
}}
__device__ __forceinline__ void multiplying_barrier() {{
  asm volatile("bar.sync 1, {threads};" ::: "memory");
}}
// Add up what all blocks have of every kSplits-th row, this block's share: 4 neighbouring sums a thread, and
// so many of those on their way at one time.
__device__ __forceinline__ void add_up(uint8_t* shared, int high) {{
  constexpr int kParts = kSplits * kSharing, kQuads = {columns // 4}, kFlying = 4;
  if (kParts == 1) return;
  const int mine = rank<kSplits>(), own = (high - mine + kSplits - 1) / kSplits * kQuads;
  const uint32_t at = base(shared);
  for (int begin = threadIdx.x - {warpgroup.GROUP}; begin < own; begin += kFlying * {threads}) {{
    Sum parts[kFlying][kParts][4] = {{}};
    uint32_t where[kFlying];
#pragma unroll
    for (int i = 0; i < kFlying; ++i) {{
      const int number = begin + i * {threads}, line = number / kQuads * kSplits + mine;
      where[i] = at + (line * kRow + number % kQuads * 4) * 4;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        asm volatile(
            "{{\\n.reg .pred p;\\n.reg .b32 far;\\nsetp.ne.b32 p, %6, 0;\\n"
            "mapa.shared::cluster.u32 far, %4, %5;\\n"
            "@p ld.shared::cluster.v4.{form} {{%0, %1, %2, %3}}, [far];\\n}}"
            : "+{letter}"(parts[i][part][0]), "+{letter}"(parts[i][part][1]), "+{letter}"(parts[i][part][2]),
              "+{letter}"(parts[i][part][3])
            : "r"(where[i] + part % kSharing * kPart * 4), "r"(part / kSharing), "r"((int)(number < own)));
    }}
#pragma unroll
    for (int i = 0; i < kFlying; ++i)
      if (begin + i * {threads} < own) {{
#pragma unroll
        for (int part = 1; part < kParts; ++part)
#pragma unroll
          for (int j = 0; j < 4; ++j) parts[i][0][j] += parts[i][part][j];
        asm volatile("st.shared.v4.{form} [%0], {{%1, %2, %3, %4}};"
                     ::"r"(where[i]), "{letter}"(parts[i][0][0]), "{letter}"(parts[i][0][1]),
                       "{letter}"(parts[i][0][2]), "{letter}"(parts[i][0][3]) : "memory");
      }}
  }}
  multiplying_barrier();
}}
__device__ __forceinline__ Sum total(uint8_t* shared, int64_t row, int64_t column) {{
  return static_cast<const Sum*>(__cvta_shared_to_generic(base(shared)))[row * kRow + column];
}}
"""
