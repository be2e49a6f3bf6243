"""Device code for sm_90a: tensor copies, barriers in shared memory, and warpgroup products (wgmma).

Instruction by instruction it follows the PTX ISA 8.5, sections 9.7.8.24 (cp.async.bulk.tensor), 9.7.12.15
(mbarrier) and 9.7.14 (wgmma). Tiles lie in shared memory as rows of 128 bytes whose 16-byte pieces are
permuted by row (the 128-byte swizzle), which copies and products know alike.
"""

from __future__ import annotations

from dataclasses import dataclass

# Threads: one warpgroup copies, two multiply. Registers are moved from the first to the others.
THREADS = 384
GROUP = 128
DEEP = 64  # elements of K in a stage: 128 bytes of a half type
ROWS = 128  # of a tile: 64 for each multiplying warpgroup
_STAGING = 2 * 64 * 64 * 4  # bytes: 64 x 64 results of each multiplying warpgroup on their way out


@dataclass(frozen=True)
class Shape:
    """A tile of ``columns`` columns, ``stages`` in flight, and ``cluster`` blocks that share columns of B."""

    columns: int = 256
    stages: int = 4
    cluster: int = 2

    @property
    def stage_bytes(self) -> int:
        """Both operands of one step."""
        return (ROWS + self.columns) * DEEP * 2

    @property
    def shared_bytes(self) -> int:
        """All of shared memory: to align it, the stages, the results, the barriers."""
        return 1024 + self.stages * self.stage_bytes + _STAGING + 2 * self.stages * 8


def source(shape: Shape, dtype: str) -> str:
    """The device functions for one shape; ``dtype`` is ``bf16`` or ``f16``."""
    registers = shape.columns // 2
    places = ", ".join(f"%{i}" for i in range(registers))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(registers))
    share = shape.columns // shape.cluster
    guard = f"NETLATHE_{dtype}_{shape.columns}_{shape.cluster}"
    return f"""
#ifndef {guard}
#define {guard}
namespace netlathe_{dtype}_{shape.columns}_{shape.cluster} {{
constexpr int kStages = {shape.stages}, kStageBytes = {shape.stage_bytes}, kCluster = {shape.cluster};
constexpr int kColumns = {shape.columns}, kShare = {share};

__device__ __forceinline__ uint32_t base(const void* shared) {{
  return (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023u) & ~1023u;
}}
__device__ __forceinline__ uint32_t full(uint32_t at, int stage) {{
  return at + kStages * kStageBytes + {_STAGING} + stage * 8;
}}
__device__ __forceinline__ uint32_t empty(uint32_t at, int stage) {{ return full(at, kStages + stage); }}
__device__ __forceinline__ uint32_t rank() {{
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nAGAIN:\\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\\n@p bra DONE;\\nbra AGAIN;\\nDONE:\\n}}"
      ::"r"(barrier), "r"(parity) : "memory");
}}
__device__ __forceinline__ void release(uint32_t barrier, int cta) {{
  // No .release.cluster: that is a fence for all of memory, and products only read the stage.
  if (kCluster == 1)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  else
    asm volatile(
        "{{\\n.reg .b32 far;\\nmapa.shared::cluster.u32 far, %0, %1;\\n"
        "mbarrier.arrive.shared::cluster.b64 _, [far];\\n}}"
        ::"r"(barrier), "r"(cta) : "memory");
}}
__device__ __forceinline__ void copy(uint32_t to, const CUtensorMap* map, uint32_t barrier, int k, int row) {{
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {{%3, %4}}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row) : "memory");
}}
__device__ __forceinline__ void copy_to_all(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int k, int row) {{
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {{%3, %4}}], [%2], %5;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row), "h"((uint16_t)((1 << kCluster) - 1)) : "memory");
}}
__device__ __forceinline__ uint64_t described(uint32_t at) {{
  return (uint64_t)((at & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}}
__device__ __forceinline__ void multiply(float* d, uint64_t a, uint64_t b, int add) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{registers + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{shape.columns}k16.f32.{dtype}.{dtype} {{{places}}},"
      " %{registers}, %{registers + 1}, p, 1, 1, 0, 0;\\n}}"
      : {operands}
      : "l"(a), "l"(b), "r"(add));
}}
__device__ __forceinline__ void cluster_barrier() {{
  if (kCluster > 1)
    asm volatile("barrier.cluster.arrive.aligned;\\nbarrier.cluster.wait.aligned;" ::: "memory");
}}

// Every thread, first: the barriers. A stage is full when its bytes are there, and empty when every
// multiplying warpgroup that reads it, in any block of the cluster, has let it go.
__device__ __forceinline__ void start(uint8_t* shared) {{
  uint32_t at = base(shared);
  if (threadIdx.x == 0) {{
    for (int stage = 0; stage < kStages; ++stage) {{
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full(at, stage)));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty(at, stage)), "r"(2 * kCluster));
    }}
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }}
  __syncthreads();
  cluster_barrier();
}}
__device__ __forceinline__ void finish() {{ cluster_barrier(); }}

// Where a tile lies: strips of 8 rows of tiles are walked column by column, so that what blocks read at
// one time overlaps in the level-2 cache.
__device__ __forceinline__ void place(int64_t tile, int64_t down, int64_t across, int64_t* where) {{
  const int64_t strip = 8, size = strip * across, first = tile / size * strip;
  const int64_t high = down - first < strip ? down - first : strip, within = tile % size;
  where[0] = first + within % high;
  where[1] = within / high;
}}
__device__ __forceinline__ int64_t tile_row(int64_t tile, int64_t down, int64_t across) {{
  int64_t where[2];
  place(tile, down, across, where);
  return (where[0] * kCluster + (kCluster > 1 ? rank() : 0)) * {ROWS};
}}
__device__ __forceinline__ int64_t tile_column(int64_t tile, int64_t down, int64_t across) {{
  int64_t where[2];
  place(tile, down, across, where);
  return where[1] * kColumns;
}}

__device__ __forceinline__ void produce(
    uint8_t* shared, uint64_t map_a, uint64_t map_b, int64_t first, int64_t step, int64_t tiles,
    int64_t down, int64_t across, int steps) {{
  const CUtensorMap *a = reinterpret_cast<const CUtensorMap*>(map_a);
  const CUtensorMap *b = reinterpret_cast<const CUtensorMap*>(map_b);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  if (threadIdx.x != 0) return;
  const uint32_t at = base(shared);
  const int mine = kCluster > 1 ? rank() : 0;
  int number = 0;
  for (int64_t tile = first; tile < tiles; tile += step) {{
    const int row = (int)tile_row(tile, down, across), column = (int)tile_column(tile, down, across);
    for (int k = 0; k < steps; ++k, ++number) {{
      const int stage = number % kStages;
      wait(empty(at, stage), ((number / kStages) & 1) ^ 1);
      const uint32_t to = at + stage * kStageBytes, barrier = full(at, stage);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kStageBytes)
                   : "memory");
      copy(to, a, barrier, k * {DEEP}, row);
      const uint32_t share = to + {ROWS * DEEP * 2} + mine * kShare * {DEEP * 2};
      if (kCluster > 1) copy_to_all(share, b, barrier, k * {DEEP}, column + mine * kShare);
      else copy(share, b, barrier, k * {DEEP}, column);
    }}
  }}
}}

__device__ __forceinline__ void prepare() {{ asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }}

// The sums of one tile, 64 rows of it for each of the two warpgroups.
__device__ __forceinline__ void consume(uint8_t* shared, float* d, int64_t tile_number, int steps) {{
  const uint32_t at = base(shared);
  const int group = threadIdx.x / {GROUP} - 1;
  const bool speaks = threadIdx.x % {GROUP} == 0;
  int number = (int)(tile_number * steps);
#pragma unroll
  for (int i = 0; i < {registers}; ++i) d[i] = 0.0f;
  for (int k = 0; k < steps; ++k, ++number) {{
    const int stage = number % kStages;
    wait(full(at, stage), (number / kStages) & 1);
    const uint32_t tile = at + stage * kStageBytes;
    uint64_t a = described(tile + group * {64 * DEEP * 2}), b = described(tile + {ROWS * DEEP * 2});
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int part = 0; part < {DEEP // 16}; ++part) multiply(d, a + part * 2, b + part * 2, 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (k > 0) {{
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (speaks)
        for (int cta = 0; cta < kCluster; ++cta) release(empty(at, (number - 1) % kStages), cta);
    }}
  }}
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < {registers}; ++i) asm volatile("" : "+f"(d[i])::"memory");
  if (speaks)
    for (int cta = 0; cta < kCluster; ++cta) release(empty(at, (number - 1) % kStages), cta);
}}

// 64 x 64 results through shared memory, so that neighbouring threads have neighbouring columns. Pieces
// of 8 columns are permuted by row against bank conflicts.
__device__ __forceinline__ float* staging(uint8_t* shared) {{
  return reinterpret_cast<float*>(
      __cvta_shared_to_generic(base(shared) + kStages * kStageBytes)) + (threadIdx.x / {GROUP} - 1) * 4096;
}}
__device__ __forceinline__ void stage(uint8_t* shared, const float* d) {{
  float* to = staging(shared);
  const int warp = threadIdx.x % {GROUP} / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {{
      const int row = warp * 16 + half * 8 + lane / 4;
      const int column = (j ^ (row & 3)) * 8 + lane % 4 * 2;
      const float* from = d + j * 4 + half * 2;
      *reinterpret_cast<float2*>(to + row * 64 + column) = make_float2(from[0], from[1]);
    }}
  asm volatile("bar.sync %0, {GROUP};" ::"r"((int)threadIdx.x / {GROUP}) : "memory");
}}
__device__ __forceinline__ float staged(uint8_t* shared, int64_t row, int64_t column) {{
  return staging(shared)[row * 64 + (((column >> 3) ^ (row & 3)) << 3) + (column & 7)];
}}
__device__ __forceinline__ void unstage() {{
  asm volatile("bar.sync %0, {GROUP};" ::"r"((int)threadIdx.x / {GROUP}) : "memory");
}}
}}  // namespace
#endif
"""


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"netlathe_{dtype}_{shape.columns}_{shape.cluster}::{function}"
