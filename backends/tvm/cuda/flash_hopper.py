"""Device code of attention for sm_90a: tiles of 128 queries by 128 keys; a warpgroup copies, two multiply.

Heads of more than 128 elements have 64 keys a tile, so that results stay in registers.

The online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1) with the order of FlashAttention-3
(arXiv 2407.08608, section 3.2): a warpgroup starts the scores of the next keys before it adds up the values
of the last ones, and while one warpgroup takes exponentials the other multiplies. Keys are walked from the
last to the first, so that blocks that need masks come first.

Instructions as in the PTX ISA 8.5, sections 9.7.8.24 (cp.async.bulk.tensor), 9.7.12.15 (mbarrier) and
9.7.14 (wgmma). Tiles lie in shared memory as slabs of 64 columns: rows of 128 bytes with the 128-byte
swizzle, in which zeros stand for columns behind the head's. Scores are products of rows with rows; values are
the right operand as they lie, keys down.

A bias comes by copies, too: slabs of 64 rows of 128 bytes, in a ring for each multiplying warpgroup, which a
warp of its own fills. It is added to scores in registers, as they are when they have been capped.
"""

from __future__ import annotations

from dataclasses import dataclass

from netlathe.backends.tvm.cuda import flash_bias, warpgroup
from netlathe.backends.tvm.cuda.flash_bias import BYTES
from netlathe.backends.tvm.cuda.machine import ARCHITECTURES
from netlathe.backends.tvm.cuda.warpgroup import GROUP, PART

THREADS = warpgroup.THREADS
ROWS = 128  # queries of a tile: 64 for each multiplying warpgroup
MOST_DEPTH = 256
WIDE = 128  # bytes of a slab's rows
_BIAS_SLAB = PART * WIDE


@dataclass(frozen=True)
class Shape:
    """Heads of ``depth`` elements, a multiple of 8 up to 256.

    ``bias``: the type of what is added to scores, bf16, f16 or f32, or nothing. ``capped``: whether scores
    have a cap.
    """

    depth: int
    bias: str = ""
    capped: bool = False

    @property
    def keys(self) -> int:
        """Of a tile."""
        return 128 if self.depth <= 128 else 64

    @property
    def slabs(self) -> int:
        """Slabs of 64 columns; of 96 columns the last is half empty."""
        return -(-self.depth // 64)

    @property
    def stages(self) -> int:
        """Tiles of keys, and of values, in flight."""
        return max(2, (3 if self.bias else 4) // self.slabs)

    @property
    def columns(self) -> int:
        """Of results that leave at one time."""
        return PART if self.depth <= 128 else PART // 2

    @property
    def staging_bytes(self) -> int:
        """Where they are then."""
        return 2 * PART * self.columns * 4

    @property
    def tile_bytes(self) -> int:
        """The queries, keys and values."""
        return (ROWS + 2 * self.stages * self.keys) * self.slabs * WIDE

    @property
    def pieces(self) -> int:
        """Slabs that a warpgroup's bias of one tile takes."""
        return self.keys * BYTES[self.bias] // WIDE if self.bias else 0

    @property
    def ring(self) -> int:
        """Slabs of the bias that are in flight for each multiplying warpgroup: as many as fit, up to 4."""
        left = ARCHITECTURES["sm_90a"][1] - self._shared_bytes(0)
        return min(4, left // (2 * (_BIAS_SLAB + 16))) if self.bias else 0

    def _shared_bytes(self, ring: int) -> int:
        barriers = 2 + 4 * self.stages + 4 * ring
        return 1024 + self.tile_bytes + 2 * ring * _BIAS_SLAB + self.staging_bytes + 8 * barriers

    @property
    def shared_bytes(self) -> int:
        """All of shared memory: to align it, the tiles, the bias, the results, the barriers."""
        return self._shared_bytes(self.ring)


def source(shape: Shape, dtype: str) -> str:
    """The device functions for one shape; ``dtype`` is ``bf16`` or ``f16``.

    What they take of the problem: query heads of the whole batch and of one of it, how many share a head of
    keys, queries, keys, how many keys the first query sees less one (``offset``), whether queries see
    only what is not behind them, lengths of the batch in int64 or null, and ``section``, the heads worked
    on at one time. With lengths the keys of a sequence end there, and the queries stand at their end.
    """
    space, keys = _space(shape, dtype), shape.keys
    return f"""{warpgroup.SOURCE}
#ifndef {space.upper()}
#define {space.upper()}
#include <cuda_fp16.h>
namespace {space} {{
using namespace netlathe_warpgroup;
constexpr int kDepth = {shape.depth}, kSlabs = {shape.slabs}, kStages = {shape.stages};
constexpr int kRows = {ROWS} * {WIDE}, kSlab = {keys * WIDE};  // bytes of a slab: of queries, of keys
constexpr int kTile = kSlabs * kSlab, kRegisters = {shape.depth // 2};
constexpr int kBiases = kSlabs * kRows + 2 * kStages * kTile;
constexpr int kRing = {shape.ring}, kPieces = {shape.pieces};  // slabs of a bias: in flight, of a tile
constexpr int kStaged = kBiases + 2 * kRing * {_BIAS_SLAB};
constexpr float kLog2E = 1.44269504f;
constexpr bool kAdjusted = {str(bool(shape.bias) or shape.capped).lower()};
#define NETLATHE_PROBLEM \\
  int64_t all, int64_t heads, int64_t groups, int64_t queries, int64_t most, int64_t offset, \\
      int64_t causal, const void *lengths, int64_t section
#define NETLATHE_GIVEN all, heads, groups, queries, most, offset, causal, lengths, section

__device__ __forceinline__ uint32_t key_tile(uint32_t at, int s) {{
  return at + kSlabs * kRows + s * kTile;
}}
__device__ __forceinline__ uint32_t value_tile(uint32_t at, int s) {{ return key_tile(at, kStages + s); }}
__device__ __forceinline__ uint32_t barrier(uint32_t at, int number) {{
  return at + kStaged + {shape.staging_bytes} + number * 8;
}}
// Barriers: the queries are there, have been read; likewise each stage of keys, then of values, and the
// slabs of each warpgroup's bias.
__device__ __forceinline__ uint32_t queries_full(uint32_t at) {{ return barrier(at, 0); }}
__device__ __forceinline__ uint32_t queries_empty(uint32_t at) {{ return barrier(at, 1); }}
__device__ __forceinline__ uint32_t keys_full(uint32_t at, int s) {{ return barrier(at, 2 + s); }}
__device__ __forceinline__ uint32_t keys_empty(uint32_t at, int s) {{ return barrier(at, 2 + kStages + s); }}
__device__ __forceinline__ uint32_t values_full(uint32_t at, int s) {{
  return barrier(at, 2 + 2 * kStages + s);
}}
__device__ __forceinline__ uint32_t values_empty(uint32_t at, int s) {{
  return barrier(at, 2 + 3 * kStages + s);
}}
__device__ __forceinline__ uint32_t bias_full(uint32_t at, int group, int s) {{
  return barrier(at, 2 + 4 * kStages + 2 * group * kRing + s);
}}
__device__ __forceinline__ uint32_t bias_empty(uint32_t at, int group, int s) {{
  return bias_full(at, group, kRing + s);
}}
__device__ __forceinline__ uint32_t bias_slab(uint32_t at, int group, int s) {{
  return at + kBiases + (group * kRing + s) * {_BIAS_SLAB};
}}

__device__ __forceinline__ void copy_box(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, int matrix) {{
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {{%3, %4, %5}}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(matrix) : "memory");
}}
// A tile of a head, from a row on, in slabs of so many bytes.
template <int kBytes>
__device__ __forceinline__ void copy(
    uint32_t to, const CUtensorMap* map, uint32_t barrier, int row, int head) {{
  expect(barrier, kSlabs * kBytes);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) copy_box(to + slab * kBytes, map, barrier, slab * 64, row, head);
}}
__device__ __forceinline__ void fence() {{ asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }}
__device__ __forceinline__ void commit() {{ asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }}
template <int kLeft>
__device__ __forceinline__ void finished() {{
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}}
{_score_product(shape, dtype)}
{_value_products(shape, dtype)}

// -- tiles -------------------------------------------------------------------------------------------

struct Tile {{ int head, top, keys, limit, blocks; }};  // limit: keys that the first query sees
// The tile with a number, if there is one. Rounds go back and forth over the blocks, the longest tiles
// first, so that every block gets about as much; heads of one section share the level-2 cache.
__device__ __forceinline__ bool place(Tile& tile, int64_t round, NETLATHE_PROBLEM) {{
  const int down = ((int)queries + {ROWS - 1}) / {ROWS}, grid = gridDim.x;
  const int count = (int)all, part = (int)section;
  const int number = (int)round * grid + (round & 1 ? grid - 1 - blockIdx.x : blockIdx.x);
  if (number >= down * count) return false;
  const int first = number / (part * down) * part, within = number % (part * down);
  const int wide = min(count - first, part);
  tile.head = first + within % wide;
  tile.top = (down - 1 - within / wide) * {ROWS};
  int keys = (int)most, behind = (int)offset;
  if (lengths) {{
    const int own = (int)static_cast<const int64_t*>(lengths)[tile.head / (int)heads];
    keys = max(0, min(own, keys));
    behind += own - (int)queries;
  }}
  const int seen = causal ? min(min(tile.top + {ROWS}, (int)queries) + behind, keys) : keys;
  tile.keys = keys;
  tile.limit = causal ? tile.top + behind + 1 : keys;
  tile.blocks = seen <= 0 ? 0 : (seen + {keys - 1}) / {keys};
  return true;
}}
__device__ __forceinline__ int64_t tile_head(int64_t round, NETLATHE_PROBLEM) {{
  Tile tile;
  return place(tile, round, NETLATHE_GIVEN) ? tile.head : -1;
}}
__device__ __forceinline__ int64_t tile_top(int64_t round, NETLATHE_PROBLEM) {{
  Tile tile;
  place(tile, round, NETLATHE_GIVEN);
  return tile.top;
}}

// Every thread, first. Stages are empty when both multiplying warpgroups have let them go.
__device__ __forceinline__ void start(uint8_t* shared) {{
  const uint32_t at = base(shared);
  if (threadIdx.x == 0) {{
    set<1>(queries_full(at), 2);
    set<kStages>(keys_full(at, 0), 2);
    set<kStages>(values_full(at, 0), 2);
{_bias_barriers(shape)}  }}
  __syncthreads();
}}

// -- the copying warpgroup -----------------------------------------------------------------------------

__device__ __forceinline__ void produce(
    uint8_t* shared, uint64_t map_q, uint64_t map_k, uint64_t map_v, int64_t rounds, NETLATHE_PROBLEM) {{
  const CUtensorMap *q = reinterpret_cast<const CUtensorMap*>(map_q);
  const CUtensorMap *k = reinterpret_cast<const CUtensorMap*>(map_k);
  const CUtensorMap *v = reinterpret_cast<const CUtensorMap*>(map_v);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  if (threadIdx.x != 0) return;
  const uint32_t at = base(shared);
  int number = 0;  // blocks of keys before this tile
  Tile tile;
  for (int round = 0, turn = 0; round < (int)rounds; ++round) {{
    if (!place(tile, round, NETLATHE_GIVEN)) continue;
    wait(queries_empty(at), (turn++ & 1) ^ 1);
    copy<kRows>(at, q, queries_full(at), tile.top, tile.head);
    const int head = tile.head / (int)groups;
    auto load_keys = [&](int block) {{
      const int count = number + tile.blocks - 1 - block, stage = count % kStages;
      wait(keys_empty(at, stage), ((count / kStages) & 1) ^ 1);
      copy<kSlab>(key_tile(at, stage), k, keys_full(at, stage), block * {keys}, head);
    }};
    auto load_values = [&](int block) {{
      const int count = number + tile.blocks - 1 - block, stage = count % kStages;
      wait(values_empty(at, stage), ((count / kStages) & 1) ^ 1);
      copy<kSlab>(value_tile(at, stage), v, values_full(at, stage), block * {keys}, head);
    }};
    if (tile.blocks > 0) load_keys(tile.blocks - 1);
    for (int block = tile.blocks - 1; block > 0; --block) {{
      load_keys(block - 1);
      load_values(block);
    }}
    if (tile.blocks > 0) load_values(0);
    number += tile.blocks;
  }}
}}
{_bias_copies(shape) if shape.bias else ""}
// -- the multiplying warpgroups --------------------------------------------------------------------------

__device__ __forceinline__ void prepare() {{
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  if (threadIdx.x / {GROUP} == 2) pass_turn(1);
}}
__device__ __forceinline__ void finish() {{
  if (threadIdx.x / {GROUP} == 1) await_turn(0);  // the last turn that was passed
}}

__device__ __forceinline__ float power(float x) {{
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}}
__device__ __forceinline__ void mask(float* s, int first, int limit0, int limit1, const uint8_t* allowed) {{
  const int own = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < {keys // 8}; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) {{
      const int key = own + i * 8 + e;
      const bool open = !allowed || (key < limit1 && allowed[key]);
      if (key >= limit0 || !open) s[i * 4 + e] = -INFINITY;
      if (key >= limit1 || !open) s[i * 4 + 2 + e] = -INFINITY;
    }}
}}
{_adjustment(shape) if shape.bias or shape.capped else ""}
// Scores to weights: 2 to the power of what they are below the largest one so far, in units of `scale`. What
// has been adjusted is what the softmax takes: the largest one is subtracted before all else, as those of
// a row may all be as low as a float can be.
__device__ __forceinline__ void weigh(float* s, float* top, float* whole, float* shrink, float scale) {{
#pragma unroll
  for (int half = 0; half < 2; ++half) {{
    float most = top[half];
#pragma unroll
    for (int i = 0; i < {keys // 8}; ++i)
      most = fmaxf(most, fmaxf(s[i * 4 + half * 2], s[i * 4 + half * 2 + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const float zero = most == -INFINITY ? 0.0f : kAdjusted ? most : most * scale;
    shrink[half] = power(kAdjusted ? (top[half] - zero) * kLog2E : top[half] * scale - zero);
    top[half] = most;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < {keys // 8}; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {{
        float& x = s[i * 4 + half * 2 + e];
        x = power(kAdjusted ? (x - zero) * kLog2E : fmaf(x, scale, -zero));
        sum += x;
      }}
    whole[half] = whole[half] * shrink[half] + sum;
  }}
}}
__device__ __forceinline__ void pack(const float* s, uint32_t* p) {{
#pragma unroll
  for (int i = 0; i < {keys // 4}; ++i)
    asm("cvt.rn.{dtype}x2.f32 %0, %1, %2;" : "=r"(p[i]) : "f"(s[2 * i + 1]), "f"(s[2 * i]));
}}

// The results of a tile, 64 rows of it for each of the two warpgroups. `state`: blocks and tiles so far.
// `scale`: of scores, as powers of 2; where they are adjusted, see there.
__device__ __forceinline__ void consume(
    uint8_t* shared, float* o, int* state, int64_t round, const void* allowed_, float scale, float cap,
    NETLATHE_PROBLEM) {{
  Tile tile;
  if (!place(tile, round, NETLATHE_GIVEN)) return;
  const uint32_t at = base(shared);
  const int group = threadIdx.x / {GROUP} - 1, line = threadIdx.x % {GROUP} / 32 * 16 + threadIdx.x % 32 / 4;
  const bool speaks = threadIdx.x % {GROUP} == 0;
  const int limit = causal ? tile.limit + group * 64 : tile.keys, step = causal ? 1 : 0;
  const int limit0 = min(tile.keys, limit + line * step), limit1 = min(tile.keys, limit + (line + 8) * step);
  const uint8_t* allowed = static_cast<const uint8_t*>(allowed_);
  if (allowed) allowed += tile.head / (int)heads * most;
  const uint64_t q = described<kRows>(at + group * {64 * WIDE});
  int count = state[0];
  state[0] += tile.blocks;
  wait(queries_full(at), state[1]++ & 1);
  float top[2] = {{-INFINITY, -INFINITY}}, whole[2] = {{0.0f, 0.0f}}, shrink[2];
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) o[i] = 0.0f;
  if (tile.blocks > 0) {{
    float s[{keys // 2}];
    uint32_t p[{keys // 4}];
    auto masked = [&](int block, int number) {{
{"      adjust(s, at, group, number, scale, cap);" if shape.bias or shape.capped else ""}
      const int first = block * {keys};
      bool open = first + {keys} <= min(tile.keys, limit);
      if (allowed && open) {{
        const int key = first + threadIdx.x % 32 * {keys // 32};
        bool own = true;
#pragma unroll
        for (int i = 0; i < {keys // 32}; ++i) own = own && allowed[key + i];
        open = __all_sync(0xffffffffu, own);
      }}
      if (!open) mask(s, first, limit0, limit1, allowed);
    }};
    wait(keys_full(at, count % kStages), (count / kStages) & 1);
    fence();
    scores(s, q, described<kSlab>(key_tile(at, count % kStages)));
    commit();
    finished<0>();
    if (speaks) release<1>(keys_empty(at, count % kStages));
    masked(tile.blocks - 1, count);
    weigh(s, top, whole, shrink, scale);
    pack(s, p);
    for (int block = tile.blocks - 2; block >= 0; --block, ++count) {{
      const int now = (count + 1) % kStages, last = count % kStages;
      wait(keys_full(at, now), ((count + 1) / kStages) & 1);
      await_turn(group);
      fence();
      scores(s, q, described<kSlab>(key_tile(at, now)));
      commit();
      wait(values_full(at, last), (count / kStages) & 1);
      values(o, p, described<kSlab>(value_tile(at, last)));
      commit();
      pass_turn(group);
      finished<1>();
      if (speaks) release<1>(keys_empty(at, now));
      masked(block, count + 1);
      weigh(s, top, whole, shrink, scale);
      finished<0>();
      if (speaks) release<1>(values_empty(at, last));
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) o[i] *= shrink[i / 2 % 2];
      pack(s, p);
    }}
    if (speaks) release<1>(queries_empty(at));
    const int last = count % kStages;
    wait(values_full(at, last), (count / kStages) & 1);
    fence();
    values(o, p, described<kSlab>(value_tile(at, last)));
    commit();
    finished<0>();
    if (speaks) release<1>(values_empty(at, last));
  }} else if (speaks) {{
    release<1>(queries_empty(at));
  }}
#pragma unroll
  for (int half = 0; half < 2; ++half) {{
    whole[half] += __shfl_xor_sync(0xffffffffu, whole[half], 1);
    whole[half] += __shfl_xor_sync(0xffffffffu, whole[half], 2);
    whole[half] = whole[half] == 0.0f ? 0.0f : 1.0f / whole[half];
  }}
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) o[i] *= whole[i / 2 % 2];
}}

// The thread's number in its warpgroup, read anew, so that addresses made from it are not kept for all tiles.
__device__ __forceinline__ int member() {{
  int number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number % {GROUP};
}}
// 64 x {shape.columns} results, or fewer columns of them, on their way out.
template <int kColumns> __device__ __forceinline__ void stage(uint8_t* shared, const float* o) {{
  netlathe_warpgroup::stage<kStaged, kColumns, {shape.columns}>(shared, o);
}}
__device__ __forceinline__ float staged(uint8_t* shared, int64_t row, int64_t column) {{
  return netlathe_warpgroup::staged<kStaged, float, {shape.columns}>(shared, row, column);
}}
#undef NETLATHE_PROBLEM
#undef NETLATHE_GIVEN
}}  // namespace
#endif
"""


def _bias_barriers(shape: Shape) -> str:
    """A slab is empty when each warp of its warpgroup has let it go."""
    text = "    for (int group = 0; group < 2; ++group) set<kRing>(bias_full(at, group, 0), 4);\n"
    return text if shape.bias else ""


def _bias_copies(shape: Shape) -> str:
    """Two threads of the copying warpgroup bring the bias, each for one of the others."""
    size = BYTES[shape.bias]
    return f"""
// Matrix b * `by_batch` + h * `by_head` is that of head h; without `by_row` all rows are the first one.
__device__ __forceinline__ void produce_bias(
    uint8_t* shared, uint64_t map_bias, int64_t by_batch, int64_t by_head, int64_t by_row, int64_t rounds,
    NETLATHE_PROBLEM) {{
  if (threadIdx.x != 32 && threadIdx.x != 64) return;
  const CUtensorMap* bias = reinterpret_cast<const CUtensorMap*>(map_bias);
  const uint32_t at = base(shared);
  const int group = threadIdx.x / 32 - 1;
  int slot = 0, parity = 1;
  Tile tile;
  for (int round = 0; round < (int)rounds; ++round) {{
    if (!place(tile, round, NETLATHE_GIVEN)) continue;
    const int matrix = tile.head / (int)heads * (int)by_batch + tile.head % (int)heads * (int)by_head;
    const int row = (tile.top + group * {PART}) * (int)by_row;
    for (int block = tile.blocks - 1; block >= 0; --block)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {{
        wait(bias_empty(at, group, slot), parity);
        expect(bias_full(at, group, slot), {_BIAS_SLAB});
        const int key = block * {shape.keys} + piece * {WIDE // size};
        copy_box(bias_slab(at, group, slot), bias, bias_full(at, group, slot), key, row, matrix);
        if (++slot == kRing) slot = 0, parity ^= 1;
      }}
  }}
}}
"""


def _adjustment(shape: Shape) -> str:
    """Scores, from products of queries and keys, to what the softmax takes: scaled, capped, with the bias."""
    text = flash_bias.source(shape.bias, shape.capped)
    if not shape.bias:
        return f"""{text}
__device__ __forceinline__ void adjust(float* s, uint32_t, int, int, float scale, float cap) {{
#pragma unroll
  for (int i = 0; i < {shape.keys // 2}; ++i) s[i] = scaled(s[i], scale, cap);
}}"""
    return f"""{text}
// The scores of a block of keys, which is so many after the first of all tiles.
__device__ __forceinline__ void adjust(
    float* s, uint32_t at, int group, int number, float scale, float cap) {{
  constexpr int kPair = sizeof(Pair), kSteps = {WIDE} / (4 * kPair);  // 8 keys a step
  const int warp = threadIdx.x % {GROUP} / 32, line = threadIdx.x % 32 / 4, own = threadIdx.x % 4 * kPair;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {{
    const int count = number * kPieces + piece, slot = count % kRing;
    wait(bias_full(at, group, slot), count / kRing & 1);
    const uint32_t row = bias_slab(at, group, slot) + (warp * 16 + line) * {WIDE} + own % 16;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {{
        const uint32_t from = row + half * {8 * WIDE} + (((i * 4 * kPair + own) / 16 ^ line) << 4);
        const Pair bias = *static_cast<const Pair*>(__cvta_shared_to_generic(from));
        float* to = s + (piece * kSteps + i) * 4 + half * 2;
#pragma unroll
        for (int e = 0; e < 2; ++e) to[e] = biased(scaled(to[e], scale, cap), of(bias, e));
      }}
    __syncwarp();
    if (threadIdx.x % 32 == 0) release<1>(bias_empty(at, group, slot));
  }}
}}"""


def _score_product(shape: Shape, dtype: str) -> str:
    """64 x 128 scores: rows of the queries by rows of the keys, 16 columns at a time."""
    count = shape.keys // 2
    places = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(s[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void score(float* s, uint64_t a, uint64_t b, int add) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{shape.keys}k16.f32.{dtype}.{dtype} {{{places}}},"
      " %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"
      : {operands}
      : "l"(a), "l"(b), "r"(add));
}}
__device__ __forceinline__ void scores(float* s, uint64_t q, uint64_t k) {{
#pragma unroll
  for (int part = 0; part < (kDepth + 15) / 16; ++part) {{
    const int within = part % 4 * 2;
    score(s, q + part / 4 * (kRows >> 4) + within, k + part / 4 * (kSlab >> 4) + within, part > 0);
  }}
}}"""


def _value_products(shape: Shape, dtype: str) -> str:
    """64 x depth results: weights in registers by values, 16 keys at a time.

    96 columns are one product of 64 and one of 32: the second half of their last slab holds nothing.
    """
    whole = shape.depth // 64 * 64
    widths = [
        (first, width) for first, width in ((0, whole), (whole, shape.depth - whole)) if width
    ]
    text = ""
    for _, width in widths:
        count = width // 2
        places = ", ".join(f"%{i}" for i in range(count))
        operands = ", ".join(f'"+f"(o[{i}])' for i in range(count))
        taken = ", ".join(f"%{count + i}" for i in range(4))
        text += f"""
__device__ __forceinline__ void weighted{width}(float* o, const uint32_t* p, uint64_t v) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.eq.b32 p, 0, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{dtype}.{dtype} {{{places}}},"
      " {{{taken}}}, %{count + 4}, p, 1, 1, 1;\\n}}"
      : {operands}
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}}"""
    calls = "\n".join(
        f"    weighted{width}(o + {first // 2}, p + 4 * part, v + part * 128 + {first // 64} * (kSlab >> 4));"
        for first, width in widths
    )
    return f"""{text}
__device__ __forceinline__ void values(float* o, const uint32_t* p, uint64_t v) {{
#pragma unroll
  for (int part = 0; part < {shape.keys // 16}; ++part) {{
{calls}
  }}
}}"""


def _space(shape: Shape, dtype: str) -> str:
    adjusted = flash_bias.suffix(shape.bias, shape.capped)
    return f"netlathe_flash_{dtype}_{shape.depth}{adjusted}"


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"{_space(shape, dtype)}::{function}"
