"""Device code for products of few rows that keep all of x in shared memory, and may normalize it before.

Every block reads whole rows of x anyway. With RMSNormalization in front of the product it measures them
itself, so that no kernel stands between the one that writes x and this one, whose weights are on their way
already: round(x / sqrt(mean(x^2) + epsilon)) * gain, rounded to halves again, as the operator has it (ONNX,
RMSNormalization). Gains are asked for before anything else. Blocks that share K read whole rows to
measure them, and keep their share.

How x is kept is said by ``keep`` of :mod:`netlathe.backends.tvm.cuda.limbs` (integers) and
:mod:`netlathe.backends.tvm.cuda.halves`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netlathe.backends.tvm.cuda.stream import Shape

ROWS = (1, 4)  # that there are kernels for
MOST = 16384  # elements of x that a block may take time for


def source(s: Shape, dtype: str, warps: int) -> str:
    """``prepare``, which every multiplying thread calls first, after ``keep``."""
    measured = "measure(to, x, rows, inner);" if s.normed else ""
    normed = "held[i] = normed(held[i], gain[i], factor(to, item / kEach, inner, epsilon));"
    return f"""
{_norm(s, dtype, warps) if s.normed else ""}
// The block's share of x [rows, inner].
__device__ __forceinline__ void prepare(
    uint8_t* shared, const void* x_, const void* gain_, float epsilon, int rows, int inner) {{
  const uint16_t *x = static_cast<const uint16_t*>(x_), *gains = static_cast<const uint16_t*>(gain_);
  uint8_t* to = shared + (base(shared) - static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  constexpr int kEach = kShare / 8, kItems = (kR * kEach + {s.multiplying - 1}) / {s.multiplying};
  const int count = rows * kEach;
  uint4 held[kItems], gain[kItems];
  auto place = [&](int item) {{
    const int own = item % kEach * 8;
    return (rank() + own / kDeep * kSplits) * kDeep + own % kDeep;
  }};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {{
    const int item = threadIdx.x + i * {s.multiplying}, k = place(item);
    gain[i] = make_uint4(0, 0, 0, 0);
    if ({int(s.normed)} && item < count && k < inner)
      gain[i] = *reinterpret_cast<const uint4*>(gains + k);
  }}
  follow();
  {measured}
#pragma unroll
  for (int i = 0; i < kItems; ++i) {{
    const int item = threadIdx.x + i * {s.multiplying}, k = place(item);
    held[i] = make_uint4(0, 0, 0, 0);
    if (item < count && k < inner)
      held[i] = *reinterpret_cast<const uint4*>(x + item / kEach * (int64_t)inner + k);
  }}
#pragma unroll
  for (int i = 0; i < kItems; ++i) {{
    const int item = threadIdx.x + i * {s.multiplying};
    if (item >= count) break;  // whole warps do
    {normed if s.normed else ""}
    keep(to, item / kEach, item % kEach * 8, held[i]);
  }}
  asm volatile("bar.sync 1, {s.multiplying};" ::: "memory");
}}
"""


def _norm(s: Shape, dtype: str, warps: int) -> str:
    return f"""
constexpr int kWarps = {warps * s.teams}, kSquares = kHeld + {s.kept_bytes};
// What each warp has of the sums of squares, in shared memory.
__device__ __forceinline__ void measure(uint8_t* to, const uint16_t* x, int rows, int inner) {{
  float square[kR] = {{}};
#pragma unroll {max(1, 4 // s.held)}
  for (int k = threadIdx.x * 8; k < inner; k += {8 * s.multiplying}) {{
    uint4 held[kR];
#pragma unroll
    for (int row = 0; row < kR; ++row) {{
      held[row] = make_uint4(0, 0, 0, 0);
      if (row < rows) held[row] = *reinterpret_cast<const uint4*>(x + row * (int64_t)inner + k);
    }}
#pragma unroll
    for (int row = 0; row < kR; ++row) {{
      const uint32_t words[4] = {{held[row].x, held[row].y, held[row].z, held[row].w}};
#pragma unroll
      for (int j = 0; j < 8; ++j) {{
        const float value = wide((uint16_t)(words[j / 2] >> (j % 2 * 16)));
        square[row] = fmaf(value, value, square[row]);
      }}
    }}
  }}
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
