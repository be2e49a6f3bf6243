"""Device code of attention with few queries, as decoding has them: bound by reading keys and values once.

Keys are split over blocks, each with the online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1);
a second launch merges the parts. The query heads that share a head of keys are rows of one tile of 16, so
that keys are read once for all of them. A warp takes 16 or 32 keys at a time, straight into registers: no two
threads need the same bytes, and up to 64 KB are on their way to a multiprocessor. A block asks for the first
of them before the kernel in front has ended. That may be writing one of the rows, so that they come as far as
the level-2 cache, where both see the same.

Products are mma.m16n8k16 (PTX ISA 8.5, section 9.7.13.4.8). What is summed over may come in any order as
long as both operands agree: so every thread reads 16 neighbouring bytes of a key, and, of a value,
neighbouring columns, each of which is a column of a product of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from netlathe.backends.tvm.cuda import skinny

WARPS = 4
THREADS = 32 * WARPS
ROWS = 16  # of a block: query heads that share keys, by queries
BLOCKS = 2  # that a multiprocessor holds
MERGERS = 4  # teams that share the parts of a row
AHEAD = (
    32 << 10
)  # bytes of keys, and as many of values, that a block asks for before it may read them
DEPTHS = (64, 96, 128)


@dataclass(frozen=True)
class Shape:
    """Heads of ``depth`` elements; a cache of halves, or of int8 with scales of ``scale_bits``.

    ``hopper``: for sm_90a alone, whose code takes a few registers less.
    """

    depth: int
    bits: int = 16
    scale_bits: int = 16
    hopper: bool = False

    @property
    def tiles(self) -> int:
        """How many times 16 keys a warp takes at once: as many as registers have room for."""
        roomy = self.bits == 8 and self.hopper and self.depth == 128
        return 2 if self.depth == 64 or roomy else 1

    @property
    def step(self) -> int:
        """Keys that a block takes at once."""
        return WARPS * 16 * self.tiles

    @property
    def partial(self) -> int:
        """Floats of one row of a part: its results, its largest score, its sum of weights."""
        return self.depth + 2

    @property
    def shared_floats(self) -> int:
        """What the warps of a block exchange."""
        return WARPS * ROWS * self.partial

    @property
    def line(self) -> int:
        """Neighbouring columns of a value that a thread reads."""
        return 8 if self.bits == 16 or self.depth == 64 else 16


def source(shape: Shape, dtype: str) -> str:
    """The device functions; ``dtype`` is ``bf16`` or ``f16``."""
    guard = f"NETLATHE_DECODE_{dtype}_{shape.depth}_{shape.bits}_{shape.scale_bits}"
    span = 512 // shape.bits  # columns of a key that the four threads of a quad cover at once
    return f"""{skinny.source(dtype)}
#ifndef {guard}
#define {guard}
namespace {_space(shape, dtype)} {{
using netlathe_skinny_{dtype}::from_bytes;
constexpr int kDepth = {shape.depth}, kBits = {shape.bits}, kRow = {shape.partial};
constexpr int kSpan = {span}, kPieces = (kDepth + kSpan - 1) / kSpan, kSteps = kSpan / 32;  // of keys
constexpr int kLine = {shape.line}, kSlabs = (kDepth + 8 * kLine - 1) / (8 * kLine);  // of values
constexpr int kWords = kLine * kBits / 32;
constexpr int kTiles = {shape.tiles}, kKeys = 16 * kTiles;  // of a warp at a time

__device__ __forceinline__ void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {{
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}},"
      " {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}}
__device__ __forceinline__ float power(float x) {{
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}}
// Bytes that are read once; zeros for columns that a head of 96 has not.
template <int kCount>
__device__ __forceinline__ void stream(uint32_t* to, const void* from, int column) {{
  if constexpr (kDepth == 96) {{
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = 0;
    if (column >= kDepth) return;
  }}
  if constexpr (kCount == 4)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {{%0, %1, %2, %3}}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
  else
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {{%0, %1}}, [%2];"
                 : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}}
// A scale, as it is and as a number: it becomes one where it is used, so that nothing waits where it is read.
using Scale = uint{shape.scale_bits}_t;
__device__ __forceinline__ Scale scale_at(const void* scales, int64_t at) {{
  return static_cast<const Scale*>(scales)[at];
}}
__device__ __forceinline__ float real(Scale bits) {{ return {_NUMBER[shape.scale_bits]}; }}
// The halves of 16 bytes of a key, 2 in a register, 4 registers for every 32 columns of the span.
__device__ __forceinline__ void halves(const uint32_t* from, uint32_t* to) {{
#pragma unroll
  for (int i = 0; i < 4; ++i) {{
    if constexpr (kBits == 16) to[i] = from[i];
    else from_bytes(from[i], to + 2 * i);
  }}
}}
// Column j of the lines of two values, one in each half of a register; of int8 columns j and j + 1.
__device__ __forceinline__ void turned(const uint32_t* low, const uint32_t* high, int j, uint32_t* to) {{
  if constexpr (kBits == 16) {{
    to[0] = __byte_perm(low[j / 2], high[j / 2], 0x5410);
    to[1] = __byte_perm(low[j / 2], high[j / 2], 0x7632);
  }} else {{
    from_bytes(__byte_perm(low[j / 4], high[j / 4], j % 4 ? 0x7362 : 0x5140), to);
  }}
}}

// Ask for the beginning of what `part` will read.
__device__ __forceinline__ void ahead(
    const void* k, const void* v, const void* lengths, int64_t block, int64_t parts, int64_t tiles,
    int64_t heads, int64_t most) {{
  constexpr int kBytes = kDepth * kBits / 8;  // of a key
  const int64_t number = block / tiles % parts, pair = block / tiles / parts;
  int64_t count = most;
  if (lengths) count = max((int64_t)0, min(static_cast<const int64_t*>(lengths)[pair / heads], count));
  const int64_t chunk = (count + parts * kKeys - 1) / (parts * kKeys) * kKeys;
  const int64_t first = number * chunk, own = min(count - first, chunk) * kBytes;
#pragma unroll
  for (int i = 0; i < {AHEAD} / 128 / {THREADS}; ++i) {{
    const int64_t at = (i * {THREADS} + threadIdx.x) * 128;
    if (at >= own) break;
    const int64_t place = (pair * most + first) * kBytes + at;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint8_t*>(k) + place));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint8_t*>(v) + place));
  }}
}}

// One part of the keys of one head, for 16 rows: what they add up to, by the softmax of this part alone, into
// its place in `work` [heads of keys, parts, rows, kRow]. Row r is query r % queries of query head r /
// queries of those that share the keys. Query 0 sees `offset` + 1 keys, each behind it one more, or, not
// `causal`, all. `most`: keys there is room for; with `lengths` a sequence has so many, and its queries stand
// at the end.
__device__ __forceinline__ void part(
    float* shared, const void* q_, const void* k_, const void* v_, const void* k_scales,
    const void* v_scales, const void* allowed_, const void* lengths, void* work, float scale, int64_t block,
    int64_t parts_, int64_t groups, int64_t heads, int64_t queries_, int64_t most, int64_t offset,
    int64_t causal) {{
  const int queries = (int)queries_, parts = (int)parts_, rows = (int)groups * queries;
  const int tiles = (rows + {ROWS - 1}) / {ROWS}, first = (int)block % tiles * {ROWS};
  const int number = (int)block / tiles % parts, pair = (int)block / tiles / parts, batch = pair / (int)heads;
  int count = (int)most, limit = (int)offset + 1;
  if (lengths) {{
    const int own = (int)static_cast<const int64_t*>(lengths)[batch];
    count = max(0, min(own, count));
    limit += own - queries;
  }}
  const int chunk = (count + parts * kKeys - 1) / (parts * kKeys) * kKeys;
  const int end = min(count, (number + 1) * chunk);
  const int64_t line = (int64_t)pair * most;
  const uint16_t* q = static_cast<const uint16_t*>(q_) + (int64_t)pair * rows * kDepth;
  const uint8_t* k = static_cast<const uint8_t*>(k_) + line * (kDepth * kBits / 8);
  const uint8_t* v = static_cast<const uint8_t*>(v_) + line * (kDepth * kBits / 8);
  const uint8_t* allowed = static_cast<const uint8_t*>(allowed_);
  if (allowed) allowed += batch * most;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  uint32_t held_k[2 * kTiles][kPieces][4], held_v[kSlabs][4 * kTiles][kWords];
  Scale scale_k[4 * kTiles], scale_v[4 * kTiles];  // of keys 8 n + 2 t + e, at 2 n + e
  // Beyond the end the last key is read again: it counts for nothing there.
  auto fetch_keys = [&](int at) {{
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {{
        const int key = min(at + n * 8 + g, end - 1), column = p * kSpan + t * (kSpan / 4);
        stream<4>(held_k[n][p], k + ((int64_t)key * kDepth + column) * kBits / 8, column);
      }}
    if constexpr (kBits == 8) {{
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i)
        scale_k[i] = scale_at(k_scales, line + min(at + i / 2 * 8 + t * 2 + i % 2, end - 1));
    }}
  }};
  auto fetch_values = [&](int at) {{
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {{
      const int key = min(at + i / 2 * 8 + t * 2 + i % 2, end - 1);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {{
        const int column = (slab * 8 + g) * kLine;
        stream<kWords>(held_v[slab][i], v + ((int64_t)key * kDepth + column) * kBits / 8, column);
      }}
      if constexpr (kBits == 8) scale_v[i] = scale_at(v_scales, line + key);
    }}
  }};
  int at = number * chunk + warp * kKeys;
  if (at < end) {{
    fetch_keys(at);
    fetch_values(at);
  }}

  int limits[2];
  uint32_t x[kPieces * kSteps][2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {{
    const int row = first + g + half * 8;
    limits[half] = causal ? min(end, limit + row % queries) : end;
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {{
        const int column = p * kSpan + t * (kSpan / 4) + n * 8;
        uint4 w = make_uint4(0, 0, 0, 0);
        if (row < rows && column < kDepth) w = *reinterpret_cast<const uint4*>(q + row * kDepth + column);
        const uint32_t words[4] = {{w.x, w.y, w.z, w.w}};
#pragma unroll
        for (int i = 0; i < 4; ++i) x[p * kSteps + n][i / 2][i % 2 * 2 + half] = words[i];
      }}
  }}
  float o[kSlabs][kLine][4] = {{}}, top[2] = {{-INFINITY, -INFINITY}}, whole[2] = {{0.0f, 0.0f}};
  for (; at < end; at += {WARPS} * kKeys) {{
    float s[2 * kTiles][4] = {{}};
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {{
        uint32_t y[4 * kSteps];
        halves(held_k[n][p], y);
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i)
          multiply(s[n], x[p * kSteps + i / 2][i % 2], y[2 * i], y[2 * i + 1]);
      }}
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {{
        const int key = at + n * 8 + t * 2 + i % 2;
        const bool open = key < limits[i / 2] && (!allowed || allowed[key]);
        const float factor = kBits == 8 ? scale * real(scale_k[n * 2 + i % 2]) : scale;
        s[n][i] = open ? s[n][i] * factor : -INFINITY;
      }}
    fetch_keys(at + {WARPS} * kKeys);
    float shrink[2];
    uint32_t w[kTiles][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {{
      float most_ = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2 * kTiles; ++n) most_ = fmaxf(most_, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      most_ = fmaxf(most_, __shfl_xor_sync(0xffffffffu, most_, 1));
      most_ = fmaxf(most_, __shfl_xor_sync(0xffffffffu, most_, 2));
      most_ = fmaxf(most_, top[half]);
      const float zero = most_ == -INFINITY ? 0.0f : most_;
      shrink[half] = power(top[half] - zero);
      top[half] = most_;
      whole[half] *= shrink[half];
#pragma unroll
      for (int n = 0; n < 2 * kTiles; ++n) {{
        float a = power(s[n][half * 2] - zero), b = power(s[n][half * 2 + 1] - zero);
        whole[half] += a + b;
        if constexpr (kBits == 8) a *= real(scale_v[n * 2]), b *= real(scale_v[n * 2 + 1]);
        asm("cvt.rn.{dtype}x2.f32 %0, %1, %2;" : "=r"(w[n / 2][n % 2 * 2 + half]) : "f"(b), "f"(a));
      }}
    }}
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {{
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
        for (int j = 0; j < kLine; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[slab][j][i] *= shrink[i / 2];
    }}
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int j = 0; j < kLine; j += 2) {{
          uint32_t near[2], far[2];
          turned(held_v[slab][4 * tile], held_v[slab][4 * tile + 1], j, near);
          turned(held_v[slab][4 * tile + 2], held_v[slab][4 * tile + 3], j, far);
          multiply(o[slab][j], w[tile], near[0], far[0]);
          multiply(o[slab][j + 1], w[tile], near[1], far[1]);
        }}
    fetch_values(at + {WARPS} * kKeys);
  }}

  // The warps' parts as one.
  float* own = shared + warp * {ROWS} * kRow;
#pragma unroll
  for (int half = 0; half < 2; ++half) {{
    whole[half] += __shfl_xor_sync(0xffffffffu, whole[half], 1);
    whole[half] += __shfl_xor_sync(0xffffffffu, whole[half], 2);
    float* row = own + (g + half * 8) * kRow;
    if (t == 0) row[kDepth] = top[half], row[kDepth + 1] = whole[half];
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int j = 0; j < kLine; ++j) {{
          const int column = (slab * 8 + t * 2 + e) * kLine + j;
          if (column < kDepth) row[column] = o[slab][j][half * 2 + e];
        }}
  }}
  __syncthreads();
  float* to = static_cast<float*>(work) + ((int64_t)pair * parts + number) * rows * kRow;
  for (int item = threadIdx.x; item < {ROWS} * kDepth; item += {THREADS}) {{
    const int row = item / kDepth, column = item % kDepth;
    if (first + row >= rows) break;
    const float* from = shared + row * kRow;
    float most_ = -INFINITY, value = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < {WARPS}; ++i) most_ = fmaxf(most_, from[i * {ROWS} * kRow + kDepth]);
    const float zero = most_ == -INFINITY ? 0.0f : most_;
#pragma unroll
    for (int i = 0; i < {WARPS}; ++i) {{
      const float factor = power(from[i * {ROWS} * kRow + kDepth] - zero);
      value += factor * from[i * {ROWS} * kRow + column];
      sum += factor * from[i * {ROWS} * kRow + kDepth + 1];
    }}
    float* line_ = to + (first + row) * kRow;
    line_[column] = value;
    if (column == 0) line_[kDepth] = most_, line_[kDepth + 1] = sum;
  }}
}}

// A column of a row, `block` of [heads of keys, rows]: its parts as one. Each of {MERGERS} teams of kDepth
// threads takes every {MERGERS}th part, 16 at a time; the result is that of the first.
__device__ __forceinline__ float merged(
    float* shared, const void* work, int64_t block, int64_t parts_, int64_t rows_) {{
  const int parts = (int)parts_, rows = (int)rows_, lane = threadIdx.x % 32;
  const int team = threadIdx.x / kDepth, column = threadIdx.x % kDepth;
  const int64_t stride = (int64_t)rows * kRow;
  const float* from = static_cast<const float*>(work);
  from += ((int)block / rows * parts + team) * stride + (int)block % rows * kRow;
  float top = -INFINITY, value = 0.0f, sum = 0.0f;
  for (int left = parts - team; left > 0; left -= 16 * {MERGERS}, from += 16 * {MERGERS} * stride) {{
    const bool own = lane < 16 && lane * {MERGERS} < left;
    const float score = own ? from[lane * {MERGERS} * stride + kDepth] : -INFINITY;
    const float weights = own ? from[lane * {MERGERS} * stride + kDepth + 1] : 0.0f;
    float held[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      held[i] = i * {MERGERS} < left ? from[i * {MERGERS} * stride + column] : 0.0f;
    float most = fmaxf(top, score);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
    const float zero = most == -INFINITY ? 0.0f : most;
    const float factor = power(score - zero), shrink = power(top - zero);
    top = most;
    sum = sum * shrink + factor * weights;
    value *= shrink;
#pragma unroll
    for (int i = 0; i < 16; ++i) value += __shfl_sync(0xffffffffu, factor, i) * held[i];
  }}
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  float* row = shared + team * kRow;
  row[column] = value;
  if (column == 0) row[kDepth] = top, row[kDepth + 1] = sum;
  __syncthreads();
  value = 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < {MERGERS}; ++i) top = fmaxf(top, shared[i * kRow + kDepth]);
  const float zero = top == -INFINITY ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < {MERGERS}; ++i) {{
    const float factor = power(shared[i * kRow + kDepth] - zero);
    value += factor * shared[i * kRow + column];
    sum += factor * shared[i * kRow + kDepth + 1];
  }}
  return sum == 0.0f ? 0.0f : value / sum;
}}
// An int8 vector's element in the half type.
__device__ __forceinline__ uint16_t widened(
    const void* codes, const void* scales, int64_t vector, int64_t column) {{
  const float scale = real(scale_at(scales, vector));
  const float value = static_cast<const int8_t*>(codes)[vector * kDepth + column] * scale;
  uint16_t bits;
  asm("cvt.rn.{dtype}.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}}
}}  // namespace
#endif
"""


_NUMBER = {32: "__uint_as_float(bits)", 16: "__half2float(__ushort_as_half(bits))"}


def _space(shape: Shape, dtype: str) -> str:
    return f"netlathe_decode_{dtype}_{shape.depth}_{shape.bits}_{shape.scale_bits}"


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"{_space(shape, dtype)}::{function}"
