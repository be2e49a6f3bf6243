"""Device code of attention for sm_80 and later: a block of 4 warps makes 64 queries, 64 keys at a time.

The online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1). Queries stay in registers, keys and
values come by copies that do not wait, one tile of each ahead. Instructions as in the PTX ISA 8.5, sections
9.7.8.22 (cp.async), 9.7.13.4.8 (mma.m16n8k16) and 9.7.13.4.15 (ldmatrix). 16-byte pieces of a row in shared
memory are permuted by row against bank conflicts. Rows have 64, 96 or 128 columns there: zeros stand behind
smaller heads. Each thread reads its own elements of a bias, in front of the products that they are added to.
"""

from __future__ import annotations

from dataclasses import dataclass

from netlathe.backends.tvm.cuda import flash_bias

THREADS = 128
ROWS = 64  # queries of a block, 16 for each warp
KEYS = 64
MOST_DEPTH = 128


@dataclass(frozen=True)
class Shape:
    """Heads of ``depth`` elements, a multiple of 8 up to 128; the rest as of ``flash_hopper``."""

    depth: int
    bias: str = ""
    capped: bool = False

    @property
    def wide(self) -> int:
        """Columns of a row in shared memory."""
        return next(wide for wide in (64, 96, 128) if self.depth <= wide)

    @property
    def shared_bytes(self) -> int:
        """Two tiles of keys and two of values; the block's results in float32 take half of that."""
        return 4 * KEYS * self.wide * 2


def source(shape: Shape, dtype: str) -> str:
    """The device functions for one shape; ``dtype`` is ``bf16`` or ``f16``."""
    # 12 pieces: only fours may be permuted
    swizzle = "(row >> 1) & 3" if shape.wide == 96 else "row & 7"
    space, adjusted = _space(shape, dtype), bool(shape.bias) or shape.capped
    return f"""
#ifndef {space.upper()}
#define {space.upper()}
#include <cuda_fp16.h>
namespace {space} {{
constexpr int kDepth = {shape.depth}, kWide = {shape.wide}, kPieces = kWide / 8, kTile = {KEYS} * kWide * 2;
constexpr int kSteps = (kDepth + 15) / 16;  // of a product over the elements of a head
constexpr float kLog2E = 1.44269504f;
constexpr bool kAdjusted = {str(adjusted).lower()};

__device__ __forceinline__ uint32_t piece(uint32_t tile, int row, int at) {{
  return tile + row * kWide * 2 + ((at ^ ({swizzle})) << 4);
}}
__device__ __forceinline__ void load(uint32_t from, uint32_t* to) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}}
__device__ __forceinline__ void load_turned(uint32_t from, uint32_t* to) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}}
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
{flash_bias.source(shape.bias, shape.capped) if adjusted else ""}
// A tile of a head's rows from `first` on; zeros beyond the last. One group of copies.
__device__ __forceinline__ void copy(uint32_t tile, const uint16_t* from, int rows, int first) {{
#pragma unroll
  for (int part = 0; part < {KEYS} * kPieces / {THREADS}; ++part) {{
    const int number = part * {THREADS} + threadIdx.x, row = number / kPieces, at = number % kPieces;
    const bool inside = first + row < rows && at * 8 < kDepth;
    const uint16_t* source = inside ? from + (int64_t)(first + row) * kDepth + at * 8 : from;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(piece(tile, row, at)), "l"(source), "r"(inside ? 16 : 0) : "memory");
  }}
}}
__device__ __forceinline__ void commit() {{ asm volatile("cp.async.commit_group;" ::: "memory"); }}
// All but the last group of copies are there, for every thread.
__device__ __forceinline__ void arrived() {{
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();
}}

// The results of queries from `top` on, left in shared memory as float32. `head` counts the query heads of
// the whole batch; `limit`: how many keys query `top` sees, and `step` how many more each query behind it.
// A bias of the head begins at element `place` and has lines of `line_`, or, where `by_row` is 0, one alone.
__device__ __forceinline__ void attend(
    uint8_t* shared, const void* q_, const void* k_, const void* v_, const void* allowed_, const void* bias_,
    float scale, float cap, int64_t head, int64_t kv, int64_t queries, int64_t keys, int64_t most,
    int64_t top, int64_t limit_, int64_t step, int64_t place, int64_t line_, int64_t by_row) {{
  const uint16_t* q = static_cast<const uint16_t*>(q_) + head * queries * kDepth;
  const uint16_t* k = static_cast<const uint16_t*>(k_) + kv * most * kDepth;
  const uint16_t* v = static_cast<const uint16_t*>(v_) + kv * most * kDepth;
  const uint8_t* allowed = static_cast<const uint8_t*>(allowed_);
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = warp * 16 + lane / 4;
  const int end = (int)keys, limit = (int)(limit_ < keys ? limit_ : keys);
  const int limit0 = min(end, (int)(limit_ + line * step));
  const int limit1 = min(end, (int)(limit_ + (line + 8) * step));
  const int64_t behind = (queries - top < {ROWS} ? queries - top : {ROWS}) - 1;
  const int seen = min(end, (int)(limit_ + behind * step));
  const int blocks = seen <= 0 ? 0 : (seen + {KEYS - 1}) / {KEYS};

  uint32_t x[kSteps][4];
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
#pragma unroll
    for (int part = 0; part < 4; ++part) {{
      const int64_t row = top + line + part % 2 * 8;
      const uint16_t* from = q + row * kDepth + i * 16 + part / 2 * 8 + lane % 4 * 2;
      const bool inside = row < queries && i * 16 + part / 2 * 8 < kDepth;
      x[i][part] = inside ? *reinterpret_cast<const uint32_t*>(from) : 0;
    }}
{_bias_rows(shape)}  float o[2 * kSteps][4] = {{}};
  float top_[2] = {{-INFINITY, -INFINITY}}, whole[2] = {{0.0f, 0.0f}};
  if (blocks > 0) {{
    copy(base + (blocks - 1) % 2 * kTile, k, end, (blocks - 1) * {KEYS});
    commit();
    copy(base + (2 + (blocks - 1) % 2) * kTile, v, end, (blocks - 1) * {KEYS});
    commit();
  }}
  for (int block = blocks - 1; block >= 0; --block) {{
    const int first = block * {KEYS};
    const uint32_t keys_at = base + block % 2 * kTile, values_at = base + (2 + block % 2) * kTile;
{_bias_loads(shape)}    arrived();
    if (block > 0) copy(base + (block - 1) % 2 * kTile, k, end, first - {KEYS});
    commit();
    float s[{KEYS // 8}][4] = {{}};
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < {KEYS // 16}; ++j) {{
        uint32_t y[4];
        load(piece(keys_at, j * 16 + lane % 8 + lane / 16 * 8, i * 2 + lane / 8 % 2), y);
        multiply(s[2 * j], x[i], y[0], y[1]);
        multiply(s[2 * j + 1], x[i], y[2], y[3]);
      }}
{_adjustment(shape)}    if (allowed || first + {KEYS} > limit) {{
#pragma unroll
      for (int i = 0; i < {KEYS // 8}; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {{
          const int key = first + i * 8 + lane % 4 * 2 + e;
          const bool open = !allowed || (key < end && allowed[key]);
          if (key >= limit0 || !open) s[i][e] = -INFINITY;
          if (key >= limit1 || !open) s[i][2 + e] = -INFINITY;
        }}
    }}
    uint32_t p[{KEYS // 16}][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {{
      float most_ = top_[half];
#pragma unroll
      for (int i = 0; i < {KEYS // 8}; ++i) most_ = fmaxf(most_, fmaxf(s[i][half * 2], s[i][half * 2 + 1]));
      most_ = fmaxf(most_, __shfl_xor_sync(0xffffffffu, most_, 1));
      most_ = fmaxf(most_, __shfl_xor_sync(0xffffffffu, most_, 2));
      // Where nothing may be attended yet all scores are -inf, and weights are zero.
      const float zero = most_ == -INFINITY ? 0.0f : kAdjusted ? most_ : most_ * scale;
      const float shrink = power(kAdjusted ? (top_[half] - zero) * kLog2E : top_[half] * scale - zero);
      top_[half] = most_;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < {KEYS // 8}; ++i) {{
        float w[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {{
          const float x = s[i][half * 2 + e];
          w[e] = power(kAdjusted ? (x - zero) * kLog2E : fmaf(x, scale, -zero));
        }}
        sum += w[0] + w[1];
        asm("cvt.rn.{dtype}x2.f32 %0, %1, %2;" : "=r"(p[i / 2][i % 2 * 2 + half]) : "f"(w[1]), "f"(w[0]));
      }}
      whole[half] = whole[half] * shrink + sum;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {{
        o[i][half * 2] *= shrink;
        o[i][half * 2 + 1] *= shrink;
      }}
    }}
    arrived();
    if (block > 0) copy(base + (2 + (block - 1) % 2) * kTile, v, end, first - {KEYS});
    commit();
#pragma unroll
    for (int i = 0; i < {KEYS // 16}; ++i)
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {{
        uint32_t y[4];
        load_turned(piece(values_at, i * 16 + lane % 16, j * 2 + lane / 16), y);
        multiply(o[2 * j], p[i], y[0], y[1]);
        multiply(o[2 * j + 1], p[i], y[2], y[3]);
      }}
  }}
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  float* to = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int half = 0; half < 2; ++half) {{
    float sum = whole[half] + __shfl_xor_sync(0xffffffffu, whole[half], 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int row = line + half * 8;
#pragma unroll
    for (int i = 0; i < kDepth / 8; ++i)
      *reinterpret_cast<float2*>(to + row * kWide + ((i ^ (row & 3)) << 3) + lane % 4 * 2) =
          make_float2(o[i][half * 2] * factor, o[i][half * 2 + 1] * factor);
  }}
  __syncthreads();
}}
__device__ __forceinline__ float result(const uint8_t* shared, int64_t row, int64_t column) {{
  const float* from = reinterpret_cast<const float*>(shared) + row * kWide;
  return from[(((column >> 3) ^ (row & 3)) << 3) + (column & 7)];
}}
}}  // namespace
#endif
"""


def _bias_rows(shape: Shape) -> str:
    """Where a thread's two rows of a bias begin; those behind the last query are as that."""
    if not shape.bias:
        return ""
    return """  const Pair* biases[2];
  for (int half = 0; half < 2; ++half) {
    const int64_t row = top + line + half * 8 < queries ? top + line + half * 8 : queries - 1;
    biases[half] = static_cast<const Pair*>(bias_) + (place + row * by_row * line_ + lane % 4 * 2) / 2;
  }
"""


def _bias_loads(shape: Shape) -> str:
    if not shape.bias:
        return ""
    return f"""    Pair bias[{KEYS // 8}][2] = {{}};
#pragma unroll
    for (int i = 0; i < {KEYS // 8}; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (first + i * 8 + lane % 4 * 2 < line_) bias[i][half] = biases[half][(first + i * 8) / 2];
"""


def _adjustment(shape: Shape) -> str:
    if not shape.bias and not shape.capped:
        return ""
    value = "scaled(s[i][e], scale, cap)"
    if shape.bias:
        value = f"biased({value}, of(bias[i][e / 2], e % 2))"
    return f"""#pragma unroll
    for (int i = 0; i < {KEYS // 8}; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][e] = {value};
"""


def _space(shape: Shape, dtype: str) -> str:
    adjusted = flash_bias.suffix(shape.bias, shape.capped)
    return f"netlathe_flash_ampere_{dtype}_{shape.depth}{adjusted}"


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"{_space(shape, dtype)}::{function}"
