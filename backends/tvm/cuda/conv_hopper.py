"""Device code of convolutions for sm_90a: boxes of places by the copy engine, products by warpgroups.

A row of the product is a place of the result, a column one of its channels, K are taps by channels (implicit
GEMM; arXiv 1410.0759, section 3). Each of two warpgroups multiplies a box of up to 64 places, images x rows x
columns: what one tap reads for them is a box of the input too, whose steps are the strides, and which may
reach over the edge, where the copy engine writes zeros. So one thread copies, and padding costs nothing.

Instructions and swizzled tiles are as in :mod:`hopper`. Sums leave through shared memory, 4 neighbouring
channels a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from netlathe.backends.tvm.cuda import warpgroup
from netlathe.backends.tvm.cuda.groups import Groups
from netlathe.backends.tvm.cuda.machine import PROCESSORS
from netlathe.backends.tvm.cuda.warpgroup import (
    CACHE_BYTES,
    GROUP,
    LEAVING,
    ROW_BYTES,
    STAGING_BYTES,
)

DEEP = ROW_BYTES // 2  # channels in a stage
PLACES = 64  # of a box: the rows of a warpgroup's product
LANES = 4  # neighbouring results of a thread


@dataclass(frozen=True)
class Shape:
    """A tile of two boxes by ``columns`` outputs, ``stages`` in flight, ``blocks`` to a multiprocessor.

    ``cluster`` blocks share what they read of the weight.
    """

    columns: int
    stages: int
    blocks: int = 1
    cluster: int = 1

    @property
    def stage_bytes(self) -> int:
        """Both operands of one step."""
        return (2 * PLACES + self.columns) * DEEP * 2

    @property
    def shared_bytes(self) -> int:
        """All of shared memory: to align it, the stages, the results, the barriers."""
        return 1024 + self.stages * self.stage_bytes + STAGING_BYTES + 2 * self.stages * 8

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that copies, and of one that multiplies: what blocks share, moved to the latter."""
        return (56, 224) if self.blocks == 1 else (48, 96)


MOST_STRIDE = 8  # that the copy engine can take
NARROW = 16  # channels: three quarters of what a stage copies would be zeros
SHAPES = (Shape(64, 3, 2), Shape(128, 5), Shape(256, 4, 1, 2))


@dataclass(frozen=True)
class Box:
    """Places that a warpgroup multiplies at one time: ``images`` x ``rows`` x ``columns``."""

    images: int
    rows: int
    columns: int

    @property
    def places(self) -> int:
        """At most :data:`PLACES`."""
        return self.images * self.rows * self.columns


@lru_cache
def box(images: int, rows: int, columns: int, stride: tuple[int, int]) -> Box:
    """The box of which the fewest cover a result of these sizes; of those, the one with the longest rows.

    What a box covers of the input is limited to 256 elements a dim by the copy engine.
    """

    def count(made: Box) -> int:
        return -(-images // made.images) * -(-rows // made.rows) * -(-columns // made.columns)

    each = range(1, PLACES + 1)
    fits = [
        Box(b, h, w)
        for h, w in product(each, each)
        if h * w <= PLACES and (h - 1) * stride[0] < 256 and (w - 1) * stride[1] < 256
        for b in {min(images, PLACES // (h * w)), 1}
        if h <= rows and w <= columns
    ]
    return min(fits, key=lambda made: (count(made), -made.columns, -made.rows, made.images))


def chosen(boxes: int | None, groups: Groups, steps: int) -> Shape:
    """The shape that takes the fewest cycles for ``boxes`` boxes, many if that is known at run time only.

    What is read comes from the level-2 cache for all multiprocessors at one rate; products go round by
    round. Results of a tile leave when it is done, while the other block of a multiprocessor goes on.
    """

    def cycles(shape: Shape) -> int:
        across = groups.bundles * groups.tiles(shape.columns)
        tiles = -(-(boxes or 1 << 16) // (2 * shape.cluster)) * across
        rounds = -(-tiles * shape.cluster // (PROCESSORS * shape.blocks))
        own = (2 * PLACES + shape.columns // shape.cluster) * DEEP * 2
        reading = tiles * shape.cluster * steps * own // (PROCESSORS * CACHE_BYTES)
        multiplying = rounds * shape.blocks * steps * 4 * shape.columns
        return max(reading, multiplying) + rounds * shape.columns * LEAVING

    return min(SHAPES, key=cycles)


def source(shape: Shape, dtype: str) -> str:
    """The device functions for one shape; ``dtype`` is ``bf16`` or ``f16``."""
    registers = shape.columns // 2
    places = ", ".join(f"%{i}" for i in range(registers))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(registers))
    space = _space(shape, dtype)
    copying, multiplying = shape.registers
    return f"""{warpgroup.SOURCE}
#ifndef {space.upper()}
#define {space.upper()}
namespace {space} {{
using namespace netlathe_warpgroup;
constexpr int kStages = {shape.stages}, kStageBytes = {shape.stage_bytes}, kCluster = {shape.cluster};
constexpr int kColumns = {shape.columns}, kShare = kColumns / kCluster;
constexpr int kBoxBytes = {PLACES * DEEP * 2};

__device__ __forceinline__ uint32_t ready(uint32_t at, int stage) {{
  return at + kStages * kStageBytes + {STAGING_BYTES} + stage * 8;
}}
__device__ __forceinline__ uint32_t empty(uint32_t at, int stage) {{ return ready(at, kStages + stage); }}
__device__ __forceinline__ void copy_box(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int channel, int column, int row, int image) {{
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {{%3, %4, %5, %6}}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(channel), "r"(column), "r"(row), "r"(image) : "memory");
}}
__device__ __forceinline__ void copy_weight(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int channel, int tap, int output) {{
  if (kCluster == 1)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {{%3, %4, %5}}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(channel), "r"(tap), "r"(output) : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {{%3, %4, %5}}], [%2], %6;"
        ::"r"(to), "l"(map), "r"(barrier), "r"(channel), "r"(tap), "r"(output),
          "h"((uint16_t)((1 << kCluster) - 1)) : "memory");
}}
__device__ __forceinline__ void multiply(float* d, uint64_t a, uint64_t b) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{shape.columns}k16.f32.{dtype}.{dtype} {{{places}}},"
      " %{registers}, %{registers + 1}, 1, 1, 1, 0, 0;"
      : {operands}
      : "l"(a), "l"(b));
}}

// Every thread, first and last.
__device__ __forceinline__ void start(uint8_t* shared) {{
  netlathe_warpgroup::start<kStages>(ready(base(shared), 0), 2 * kCluster);
  cluster_barrier<kCluster>();
}}
__device__ __forceinline__ void finish() {{ cluster_barrier<kCluster>(); }}

// The number of the box that warpgroup `group` of this block multiplies in a tile.
__device__ __forceinline__ int box_number(int tile, int across, int group) {{
  return (tile / across * kCluster + rank<kCluster>()) * 2 + group;
}}

// Copies for every step of every tile: `channels` of each of `down` x `wide` taps. A box is kImages x kRows x
// kBox places; a plane has `high` x `long_` boxes. A bundle of groups has `tiles_each` tiles, the next one is
// `apart` channels and `outputs` outputs on.
template <int kImages, int kRows, int kBox, int kDown, int kAcross, int kDilatedDown, int kDilatedAcross,
          int kAbove, int kBefore>
__device__ __forceinline__ void produce(
    uint8_t* shared, uint64_t map_x, uint64_t map_w, int first, int step, int tiles, int across, int high,
    int long_, int down, int wide, int tiles_each, int apart, int channels, int outputs) {{
  const CUtensorMap *x = reinterpret_cast<const CUtensorMap*>(map_x);
  const CUtensorMap *w = reinterpret_cast<const CUtensorMap*>(map_w);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 {copying};");
  if (threadIdx.x != 0) return;
  const uint32_t at = base(shared);
  constexpr int kBytes = kImages * kRows * kBox * {DEEP * 2} * 2 + kColumns * {DEEP * 2};
  int stage = 0, parity = 1;
  for (int tile = first; tile < tiles; tile += step) {{
    int image[2], row[2], column[2];
#pragma unroll
    for (int group = 0; group < 2; ++group) {{
      const int number = box_number(tile, across, group), line = number / long_;
      column[group] = number % long_ * (kBox * kAcross) - kBefore;
      row[group] = line % high * (kRows * kDown) - kAbove;
      image[group] = line / high * kImages;
    }}
    const int bundle = tile % across / tiles_each, first_channel = bundle * apart, mine = rank<kCluster>();
    const int output = bundle * outputs + tile % across % tiles_each * kColumns + mine * kShare;
    for (int i = 0; i < down; ++i)
      for (int j = 0; j < wide; ++j)
        for (int channel = 0; channel < channels; channel += {DEEP}) {{
          wait(empty(at, stage), parity);
          const uint32_t to = at + stage * kStageBytes, barrier = ready(at, stage);
          expect(barrier, kBytes);
#pragma unroll
          for (int group = 0; group < 2; ++group)
            copy_box(to + group * kBoxBytes, x, barrier, first_channel + channel,
                     column[group] + j * kDilatedAcross, row[group] + i * kDilatedDown, image[group]);
          copy_weight(to + 2 * kBoxBytes + mine * kShare * {DEEP * 2}, w, barrier, channel, i * wide + j,
                      output);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }}
  }}
}}

__device__ __forceinline__ void prepare() {{
  asm volatile("setmaxnreg.inc.sync.aligned.u32 {multiplying};");
}}

// The sums of one warpgroup's box.
__device__ __forceinline__ void consume(uint8_t* shared, float* d, int tile_number, int steps) {{
  const uint32_t at = base(shared);
  const int group = threadIdx.x / {GROUP} - 1;
  const bool speaks = threadIdx.x % {GROUP} == 0;
  int stage = tile_number * steps % kStages, parity = tile_number * steps / kStages & 1, before = 0;
#pragma unroll
  for (int i = 0; i < {registers}; ++i) d[i] = 0.0f;
  for (int k = 0; k < steps; ++k) {{
    wait(ready(at, stage), parity);
    const uint32_t tile = at + stage * kStageBytes;
    const uint64_t a = described(tile + group * kBoxBytes), b = described(tile + 2 * kBoxBytes);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int part = 0; part < {DEEP // 16}; ++part) multiply(d, a + part * 2, b + part * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (k > 0) {{
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (speaks) release<kCluster>(empty(at, before));
    }}
    before = stage;
    if (++stage == kStages) stage = 0, parity ^= 1;
  }}
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < {registers}; ++i) asm volatile("" : "+f"(d[i])::"memory");
  if (speaks) release<kCluster>(empty(at, before));
}}
}}  // namespace
#endif
"""


def _space(shape: Shape, dtype: str) -> str:
    return f"netlathe_convolve_{dtype}_{shape.columns}_{shape.stages}_{shape.cluster}"


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"{_space(shape, dtype)}::{function}"
