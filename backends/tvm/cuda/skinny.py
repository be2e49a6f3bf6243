"""Device code for products with few rows before sm_90a, and for weights of 8 and 4 bits on every GPU.

A block makes 16 columns of the result: its 8 warps share K, and their sums meet in shared memory. The
weight is the left operand of mma.m16n8k16 (PTX ISA 8.5, section 9.7.13.4.8), the rows of x are the 8
columns of the right one. The order of K inside a product is free as long as both operands agree, so
that every thread reads 16 neighbouring bytes of a row of the weight, and of x.

Weights of 8 and 4 bits are packed so (:func:`netlathe.backends.tvm.cuda.packing.quantized`): 64 columns and
one chunk of K are 4096 neighbouring bytes, 1024 for every 16 of them, and thread q of a quad finds, in 16
bytes, K = 32 p + 8 q + e for p below 2 or 4 and e below 8, which lie in a swizzle. Integers become halves by
placing bits under an exponent and taking off what that and the zero point add: four or five instructions for
two elements.
"""

from __future__ import annotations

WARPS = 8
THREADS = 32 * WARPS
COLUMNS = 16  # of the result, for a block
MOST_ROWS = 16


def chunk(bits: int) -> int:
    """How much of K the 16 bytes of the four threads of a quad cover."""
    return 4 * 128 // bits


def groups(deep: int, group: int, zeros: bool) -> int:
    """Groups of ``group`` of K among ``deep``, a stage, for which scales or zero points are copied."""
    return max(1, deep // group) if group else int(zeros)


def common_ends(deep: int, group: int) -> bool:
    """Whether stages that are ``deep`` and groups have them: no stage has parts of two groups."""
    return not group or deep % group == 0 or group % deep == 0


def scale_bytes(groups: int, columns: int) -> int:
    """Of the scales of a stage, and of its zero points likewise; copies start at multiples of 128."""
    return -(-groups * columns * 2 // 128) * 128


def source(dtype: str) -> str:
    """The device functions; ``dtype`` is ``bf16`` or ``f16``."""
    magic = "0x4300u" if dtype == "bf16" else "0x6400u"  # 128 or 1024, whose last bits count ones
    if dtype == "bf16":
        spread = "__byte_perm(w, 0x43434343u, pick)"
        whole = "minus(two & 0xFF7FFF7Fu, two & 0xFF80FF80u)"  # 128 + low bits, less 128 or (negative) 256
    else:
        spread = "__byte_perm(w ^ 0x80808080u, 0x64646464u, pick)"
        whole = "minus(two, 0x64806480u)"
    widened = (
        "__uint_as_float((uint32_t)bits << 16)"
        if dtype == "bf16"
        else "__half2float(__ushort_as_half(bits))"
    )
    return f"""
#ifndef NETLATHE_SKINNY_{dtype}
#define NETLATHE_SKINNY_{dtype}
#include <cuda_fp16.h>
namespace netlathe_skinny_{dtype} {{
constexpr uint32_t kMagic = {magic};
__device__ __forceinline__ float wide(uint16_t bits) {{ return {widened}; }}
__device__ __forceinline__ uint32_t minus(uint32_t a, uint32_t b) {{
  uint32_t d;
  {_MINUS[dtype]}
  return d;
}}
__device__ __forceinline__ void multiply(float* d, const uint32_t* w, const uint32_t* u, const uint32_t* x) {{
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}},"
      " {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(w[0]), "r"(u[0]), "r"(w[1]), "r"(u[1]), "r"(x[0]), "r"(x[1]));
}}
// Two bytes under an exponent, which `pick` has, and 4 between them and behind; and those as halves.
__device__ __forceinline__ uint32_t two_bytes(uint32_t w, uint32_t pick) {{ return {spread}; }}
__device__ __forceinline__ uint32_t whole(uint32_t two) {{ return {whole}; }}
// The lowest nibbles of both halves of a word. `zero` is twice the half that is kMagic and the zero point.
__device__ __forceinline__ uint32_t two_nibbles(uint32_t w, uint32_t zero) {{
  uint32_t two;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;"  // (a & b) | c
      : "=r"(two) : "r"(w), "r"(0x000F000Fu), "r"(kMagic * 0x10001u));
  return minus(two, zero);
}}
__device__ __forceinline__ void from_bytes(uint32_t w, uint32_t* to) {{
  const uint32_t low = two_bytes(w, 0x4140), high = two_bytes(w, 0x4342);
  to[0] = whole(low), to[1] = whole(high);
}}
__device__ __forceinline__ void from_nibbles(uint32_t w, uint32_t zero, uint32_t* to) {{
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = two_nibbles(w >> (4 * i), zero);
}}
// The halves of 16 bytes of weight: word p is K = 32 p + 8 q + (0 .. 7), 4 registers of 2.
template <int kBits>
__device__ __forceinline__ void halves(const uint4& w, int p, uint32_t zero, uint32_t* to) {{
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&w);
  if constexpr (kBits == 16) {{
    for (int i = 0; i < 4; ++i) to[i] = words[i];
  }} else if constexpr (kBits == 8) {{
    from_bytes(words[2 * p], to);
    from_bytes(words[2 * p + 1], to + 2);
  }} else {{
    from_nibbles(words[p], zero, to);
  }}
}}
__device__ __forceinline__ uint4 streamed(const uint4* at) {{
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}}

// Sums over the warp's share of K into its part of `sums`, [warp][row of x][column], for 16 * kRows
// columns from `first` on and 8 * kTiles rows. kGroup: rows of K that share a scale; 0: none, or one for a
// column, which the caller applies. kZero: what 4 bits stand for zero, or -1 where `zeros` has it for every
// group, as kMagic and it. Scales and zero points are [groups, columns], padded to a multiple of 64 columns.
template <int kBits, int kTiles, int kRows, int kGroup, int kZero>
__device__ __forceinline__ void product(
    const void* __restrict__ x_, const void* __restrict__ weight, const void* __restrict__ scales_,
    const void* __restrict__ zeros_, float* sums, int rows, int inner, int padded, int columns, int first) {{
  const uint16_t *x = static_cast<const uint16_t*>(x_), *scales = static_cast<const uint16_t*>(scales_);
  const uint16_t* zeros = static_cast<const uint16_t*>(zeros_);
  constexpr int kChunk = 4 * 128 / kBits, kPieces = kChunk / 32, kHalves = 2 * kRows;
  constexpr int kAhead = (kBits == 4 ? 2 : 4) / kRows, kStep = {WARPS} * kChunk * kAhead;
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int stride = (columns + 63) / 64 * 64;
  const uint4* from[kHalves];
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {{
    const int64_t sixteen = first / 16 + half / 2;
    const int64_t row = kBits == 16 ? first + g + half * 8 : sixteen / 4 * 64;
    from[half] = static_cast<const uint4*>(weight) + row * padded * kBits / 128
        + (kBits == 16 ? q : sixteen % 4 * 64 + half % 2 * 32 + g * 4 + (q ^ g / 2));
  }}
  float total[kTiles][kRows][4] = {{}};
  uint4 held[2][kAhead][kHalves];
  uint16_t scale[2][kAhead][kHalves], zero[2][kAhead][kHalves];

  auto fetch = [&](int buffer, int start) {{
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {{
        const int k = start + n * kChunk, here = first + g + half * 8;
        // With 16 bits rows are as they are: their last chunk may end early.
        const bool inside = here < columns && (kBits == 16 ? k + q * 8 < inner : k < padded);
        const int at = kBits == 16 ? k * kBits / 128 : k / kChunk * 256;
        held[buffer][n][half] = inside ? streamed(from[half] + at) : make_uint4(0, 0, 0, 0);
        const int64_t group = (int64_t)(kGroup ? k / (kGroup ? kGroup : 1) : 0) * stride + here;
        if (kGroup) scale[buffer][n][half] = inside ? scales[group] : 0;
        if (kZero < 0) zero[buffer][n][half] = inside ? zeros[group] : 0;
      }}
  }};
  auto use = [&](int buffer, int start) {{
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {{
      const int k = start + n * kChunk;
      float part[kTiles][kRows][4] = {{}};
      uint32_t offset[kHalves];
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        offset[half] = (kZero < 0 ? zero[buffer][n][half] : kMagic + kZero) * 0x10001u;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {{
        uint32_t w[kHalves][4], r[kTiles][4];
        const int own = k + p * 32 + q * 8;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {{
          const int row = tile * 8 + g;
          uint4 v = make_uint4(0, 0, 0, 0);
          if (row < rows && own < inner) v = *reinterpret_cast<const uint4*>(x + row * inner + own);
          r[tile][0] = v.x, r[tile][1] = v.y, r[tile][2] = v.z, r[tile][3] = v.w;
        }}
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          halves<kBits>(held[buffer][n][half], p, offset[half], w[half]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {{
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int two = 0; two < 4; two += 2)
              multiply(part[tile][i], w[2 * i] + two, w[2 * i + 1] + two, r[tile] + two);
        }}
      }}
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {{
          const int half = 2 * i + j / 2;
          const float factor = kGroup ? wide(scale[buffer][n][half]) : 1.0f;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) total[tile][i][j] += part[tile][i][j] * factor;
        }}
    }}
  }};

  int start = threadIdx.x / 32 * kChunk * kAhead;
  fetch(0, start);
  while (start < padded) {{
    fetch(1, start + kStep);
    use(0, start);
    start += kStep;
    if (start >= padded) break;
    fetch(0, start + kStep);
    use(1, start);
    start += kStep;
  }}
  float* to = sums + threadIdx.x / 32 * {MOST_ROWS} * {COLUMNS} * kRows;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        to[(tile * 8 + q * 2 + j % 2) * {COLUMNS} * kRows + i * 16 + g + j / 2 * 8] = total[tile][i][j];
}}
template <int kRows>
__device__ __forceinline__ float sum(const float* sums, int64_t row, int64_t column) {{
  float value = 0.0f;
#pragma unroll
  for (int warp = 0; warp < {WARPS}; ++warp)
    value += sums[(warp * {MOST_ROWS} + row) * {COLUMNS} * kRows + column];
  return value;
}}
// One chunk of a quantized weight as plain halves [columns, inner], scaled: a thread for each 16 bytes.
template <int kBits, int kGroup, int kZero>
__device__ __forceinline__ void expand(
    const void* __restrict__ weight, const void* __restrict__ scales_, const void* __restrict__ zeros_,
    uint16_t* __restrict__ to, int64_t inner, int64_t padded, int64_t columns, int64_t piece) {{
  const uint16_t* scales = static_cast<const uint16_t*>(scales_);
  const uint16_t* zeros = static_cast<const uint16_t*>(zeros_);
  constexpr int kChunk = 4 * 128 / kBits, kPieces = kChunk / 32;
  const int64_t chunks = padded / kChunk, q = piece % 4 ^ piece / 8 % 4, k = piece / 256 % chunks * kChunk;
  const int64_t column = piece / 256 / chunks * 64 + piece % 256 / 4;
  if (column >= columns) return;
  const int64_t group = (kGroup ? k / (kGroup ? kGroup : 1) : 0) * ((columns + 63) / 64 * 64) + column;
  const uint4 held = streamed(static_cast<const uint4*>(weight) + piece);
  const uint32_t zero = (kZero < 0 ? zeros[group] : kMagic + kZero) * 0x10001u;
  const float scale = wide(scales[group]);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {{
    uint32_t w[4];
    halves<kBits>(held, p, zero, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {{
      const float low = wide((uint16_t)w[i]) * scale, high = wide((uint16_t)(w[i] >> 16)) * scale;
      asm("cvt.rn.{dtype}x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(high), "f"(low));
    }}
    const int64_t own = k + p * 32 + q * 8;
    uint4* place = reinterpret_cast<uint4*>(to + column * inner + own);
    if (own < inner) *place = make_uint4(w[0], w[1], w[2], w[3]);
  }}
}}
}}  // namespace
#endif
"""


# bf16 has no packed subtraction before sm_90: there it is a product and a sum.
_MINUS = {
    "bf16": (
        'asm("{.reg .b32 one; mov.b32 one, 0xBF80BF80; fma.rn.bf16x2 %0, %2, one, %1;}"'
        ' : "=r"(d) : "r"(a), "r"(b));'
    ),
    "f16": 'asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));',
}


def name(dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"netlathe_skinny_{dtype}::{function}"
