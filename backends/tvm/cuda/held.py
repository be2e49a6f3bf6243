"""Device code for products of few rows that prepare all of x in shared memory, and may normalize it there.

Every block reads whole rows of x anyway. With RMSNormalization in front of the product it measures them
itself, while they are in registers, so that no kernel stands between the one that writes x and this one,
whose weights are on their way already: round(x / sqrt(mean(x^2) + epsilon)) * gain, rounded to halves again,
as the operator has it (ONNX, RMSNormalization). Gains are asked for before anything else. Blocks that share K
read whole rows to measure them, and keep their share.

How x is kept is said by ``keep`` of :mod:`netlathe.backends.tvm.cuda.limbs` (integers) and
:mod:`netlathe.backends.tvm.cuda.halves`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netlathe.backends.tvm.cuda.stream import Shape

ROWS = (1, 4)  # that there are kernels for
MOST = 16384  # elements of x that a block may take time for before the first product


def source(s: Shape, dtype: str, warps: int) -> str:
    """``prepare``, which every multiplying thread calls first, after ``keep``."""
    return f"""
{_norm(s, dtype, warps) if s.normed else ""}
// The block's share of x [rows, inner].
__device__ __forceinline__ void prepare(
    uint8_t* shared, const void* x_, const void* gain_, float epsilon, int rows, int inner) {{
  const uint16_t *x = static_cast<const uint16_t*>(x_), *gains = static_cast<const uint16_t*>(gain_);
  uint8_t* to = shared + (base(shared) - static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  constexpr int kWide = kPiece / 8, kOwn = kShare / kPiece;
  constexpr int kPieces = (kR * kOwn + {s.multiplying - 1}) / {s.multiplying};
  const int count = rows * kOwn;
  auto piece = [](int i) {{ return threadIdx.x + i * {s.multiplying}; }};
  // The first of a thread's eights. Others are 32 elements apart, so that four threads read 64 bytes.
  auto place = [](int piece) {{
    return kWide == 1 ? piece % kOwn * 8 : piece % kOwn / 4 * 128 + piece % 4 * 8;
  }};
  auto read = [&](uint4* to, const uint16_t* from, int piece, int row) {{
#pragma unroll
    for (int w = 0; w < kWide; ++w) {{
      const int own = place(piece) + w * 32, k = (rank() + own / kDeep * kSplits) * kDeep + own % kDeep;
      to[w] = piece < count && k < inner ? *reinterpret_cast<const uint4*>(from + row * (int64_t)inner + k)
                                         : make_uint4(0, 0, 0, 0);
    }}
  }};
  uint4 held[kPieces][kWide];
{_GAINS.replace("$THREADS", str(s.multiplying)) if s.normed else ""}
  follow();
#pragma unroll
  for (int i = 0; i < kPieces; ++i) read(held[i], x, piece(i), piece(i) / kOwn);
  if (kBeside && kAtOnce) launch();  // before, weights of the kernel behind would stand in front of x
{_MEASURED if s.normed else ""}
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {{
    const int row = piece(i) / kOwn;
    if (piece(i) / 32 * 32 >= count) break;  // a warp exchanges what it finds
{_NORMED if s.normed else ""}
    keep(to, row, place(piece(i)), held[i]);
  }}
  asm volatile("bar.sync 1, {s.multiplying};" ::: "memory");
}}
"""


_GAINS = """  // Rows may have their gains in common.
  constexpr int kGains = kOwn % $THREADS == 0 ? kOwn / $THREADS : kPieces;
  uint4 gain[kGains][kWide];
#pragma unroll
  for (int i = 0; i < kGains; ++i) read(gain[i], gains, piece(i), 0);"""
_MEASURED = """  float square[kR] = {};
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    float own = 0.0f;
#pragma unroll
    for (int w = 0; w < kWide; ++w) own += squares(held[i][w]);
#pragma unroll
    for (int row = 0; row < kR; ++row) square[row] += kR == 1 || piece(i) / kOwn == row ? own : 0.0f;
  }
  if (kSplits > 1) others(square, x, rows, inner);
  add_up(to, square);"""
_NORMED = """    const float by = factor(to, row, inner, epsilon);
#pragma unroll
    for (int w = 0; w < kWide; ++w) held[i][w] = normed(held[i][w], gain[i % kGains][w], by);"""


def _norm(s: Shape, dtype: str, warps: int) -> str:
    return f"""
constexpr int kWarps = {warps * s.teams}, kSquares = kHeld + {s.kept_bytes};
// The sum of eight squares.
__device__ __forceinline__ float squares(const uint4& x) {{
  const uint32_t words[4] = {{x.x, x.y, x.z, x.w}};
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {{
    const float value = wide((uint16_t)(words[j / 2] >> (j % 2 * 16)));
    sum = fmaf(value, value, sum);
  }}
  return sum;
}}
// Those of what other blocks of the cluster have of the rows.
__device__ __forceinline__ void others(float* square, const uint16_t* x, int rows, int inner) {{
#pragma unroll 2
  for (int k = threadIdx.x * 8; k < inner; k += {8 * s.multiplying}) {{
    if (k / kDeep % kSplits == rank()) continue;
#pragma unroll
    for (int row = 0; row < kR; ++row)
      if (row < rows) square[row] += squares(*reinterpret_cast<const uint4*>(x + row * (int64_t)inner + k));
  }}
}}
// What each warp has of the sums of squares, in shared memory.
__device__ __forceinline__ void add_up(uint8_t* to, float* square) {{
#pragma unroll
  for (int row = 0; row < kR; ++row) {{
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) square[row] += __shfl_xor_sync(0xffffffffu, square[row], mask);
    if (threadIdx.x % 32 == 0)
      reinterpret_cast<float*>(to + kSquares)[row * kWarps + threadIdx.x / 32] = square[row];
  }}
  asm volatile("bar.sync 1, {s.multiplying};" ::: "memory");
}}
// 1 / sqrt(mean square + epsilon) of a row.
__device__ __forceinline__ float factor(const uint8_t* to, int row, int inner, float epsilon) {{
  const float4* part = reinterpret_cast<const float4*>(to + kSquares) + row * (kWarps / 4);
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps / 4; ++i) square += (part[i].x + part[i].y) + (part[i].z + part[i].w);
  return 1.0f / sqrtf(square / (float)inner + epsilon);
}}
// Eight elements of a row, rounded before and after the gain.
__device__ __forceinline__ uint4 normed(const uint4& x, const uint4& gain, float factor) {{
  uint32_t to[4] = {{x.x, x.y, x.z, x.w}};
  const uint32_t gains[4] = {{gain.x, gain.y, gain.z, gain.w}};
#pragma unroll
  for (int i = 0; i < 4; ++i) {{
    const float low = wide((uint16_t)to[i]) * factor, high = wide((uint16_t)(to[i] >> 16)) * factor;
    asm("cvt.rn.{dtype}x2.f32 %0, %1, %2;" : "=r"(to[i]) : "f"(high), "f"(low));
    asm("mul.rn.{dtype}x2 %0, %1, %2;" : "=r"(to[i]) : "r"(to[i]), "r"(gains[i]));
  }}
  return make_uint4(to[0], to[1], to[2], to[3]);
}}
"""
