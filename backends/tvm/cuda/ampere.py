"""Device code for sm_80 and later: copies that do not wait (cp.async) and products of a warp (mma).

A block of 8 warps makes 128 x 128 results, each warp 64 x 32 of them; 4 stages of 64 bytes of K are in
flight. Instructions as in the PTX ISA 8.5, sections 9.7.8.22 (cp.async), 9.7.13.4.8 and 9.7.13.4.10
(mma.m16n8k16, and m16n8k32 of 8 bits) and 9.7.13.4.15 (ldmatrix). The 16-byte pieces of a tile's rows are
permuted by row against bank conflicts. In bytes, all kinds of operands lie alike. Halves may lie the other
way round, what is summed over down: then a stage is 32 rows of 256 bytes, and ldmatrix transposes.
"""

from __future__ import annotations

from netlathe.backends.tvm.cuda.operands import operands

TILE = 128
THREADS = 256
ROW_BYTES = 64  # of K in a stage
STAGES = 4
SHARED_BYTES = STAGES * 2 * TILE * ROW_BYTES  # exactly what 128 x 128 results of 4 bytes take, too
assert SHARED_BYTES == TILE * TILE * 4


def source(dtype: str) -> str:
    """The device functions; ``dtype`` is the name of :class:`Operands`."""
    kind = operands(dtype)
    deep, piece = ROW_BYTES // kind.bytes, 16 // kind.bytes
    letter, form, whole = ("r", "s32", "int") if kind.sums == "int32" else ("f", "f32", "float")
    return f"""
#ifndef NETLATHE_AMPERE_{dtype}
#define NETLATHE_AMPERE_{dtype}
namespace netlathe_ampere_{dtype} {{
using Element = uint{8 * kind.bytes}_t;
using Sum = {whole};
template <bool kDown = false> __device__ __forceinline__ uint32_t piece(uint32_t tile, int row, int at) {{
  if (kDown) return tile + row * {2 * TILE} + ((at ^ (row & 7)) << 4);
  return tile + row * {ROW_BYTES} + ((at ^ ((row >> 1) & 3)) << 4);
}}
template <bool kDown> __device__ __forceinline__ void load(uint32_t from, uint32_t* to) {{
  if (kDown)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%0, %1, %2, %3}}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %1, %2, %3}}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}}
// Four parts of an operand, 8 lines by 16 bytes: two by lines, from `line` on, and two by K, in this order or
// by K first.
template <bool kDown, bool kDeepFirst>
__device__ __forceinline__ void load(uint32_t tile, int line, int k, uint32_t* to) {{
  const int lane = threadIdx.x % 32, first = lane / 8 % 2, second = lane / 16;
  line += (kDeepFirst ? second : first) * 8;
  const int deep = k * 2 + (kDeepFirst ? first : second);
  const int row = lane % 8;
  load<kDown>(kDown ? piece<true>(tile, deep * 8 + row, line / 8) : piece(tile, line + row, deep), to);
}}
__device__ __forceinline__ void multiply(Sum* d, const uint32_t* a, uint32_t b0, uint32_t b1) {{
  asm volatile(
      "mma.sync.aligned.m16n8k{kind.deep}.row.col.{form}.{kind.a}.{kind.b}.{form} {{%0, %1, %2, %3}},"
      " {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+{letter}"(d[0]), "+{letter}"(d[1]), "+{letter}"(d[2]), "+{letter}"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}}
// An operand of `lines` lines in memory, a line (where kDown: an element of all lines) `pitch` elements long.
template <bool kDown = false> struct Side {{
  const Element* from;
  int64_t pitch, lines, inner, first;
  // One stage, of lines from `first` on: two pieces a thread, zeros beyond the end.
  __device__ __forceinline__ void copy(uint32_t tile, int64_t k) const {{
#pragma unroll
    for (int part = 0; part < 2; ++part) {{
      const int number = part * {THREADS} + threadIdx.x;
      const int row = kDown ? number / 16 : number / 4, at = kDown ? number % 16 : number % 4;
      const int64_t down = (kDown ? k : first) + row, across = (kDown ? first : k) + at * {piece};
      const int64_t left = (kDown ? lines : inner) - across;  // elements in this row
      const bool inside = down < (kDown ? inner : lines) && left > 0;
      const int bytes = inside ? (int)min(left * {kind.bytes}, (int64_t)16) : 0;
      const Element* source = inside ? from + down * pitch + across : from;
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                   ::"r"(piece<kDown>(tile, row, at)), "l"(source), "r"(bytes) : "memory");
    }}
  }}
}};
// The block's 128 x 128 sums, left in shared memory. copy_a(tile, k) starts a stage of A.
template <bool kDownA = false, typename CopyA, bool kDownB>
__device__ __forceinline__ void tile_product(
    uint8_t* shared, const CopyA& copy_a, const Side<kDownB>& b, int64_t inner) {{
  constexpr int kBytes = {TILE * ROW_BYTES};
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int down = warp / 4 * 64, across = warp % 4 * 32;
  const int steps = (int)((inner + {deep - 1}) / {deep});
  Sum sums[4][4][4] = {{}};
#pragma unroll
  for (int stage = 0; stage < {STAGES - 1}; ++stage) {{
    if (stage < steps) {{
      copy_a(base + stage * 2 * kBytes, (int64_t)stage * {deep});
      b.copy(base + stage * 2 * kBytes + kBytes, (int64_t)stage * {deep});
    }}
    asm volatile("cp.async.commit_group;" ::: "memory");
  }}
  for (int step = 0; step < steps; ++step) {{
    asm volatile("cp.async.wait_group {STAGES - 2};" ::: "memory");
    __syncthreads();
    const int ahead = step + {STAGES - 1};
    if (ahead < steps) {{
      const uint32_t to = base + ahead % {STAGES} * 2 * kBytes;
      copy_a(to, (int64_t)ahead * {deep});
      b.copy(to + kBytes, (int64_t)ahead * {deep});
    }}
    asm volatile("cp.async.commit_group;" ::: "memory");
    const uint32_t at = base + step % {STAGES} * 2 * kBytes;
#pragma unroll
    for (int k = 0; k < {ROW_BYTES // 32}; ++k) {{
      uint32_t x[4][4], y[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load<kDownA, false>(at, down + i * 16, k, x[i]);
#pragma unroll
      for (int j = 0; j < 2; ++j) load<kDownB, true>(at + kBytes, across + j * 16, k, y[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(sums[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
    }}
  }}
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  Sum* to = reinterpret_cast<Sum*>(shared);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {{
        const int row = down + i * 16 + half * 8 + lane / 4;
        const int column = (across + j * 8) ^ ((row & 3) * 8);
        *reinterpret_cast<{whole}2*>(to + row * {TILE} + column + lane % 4 * 2) =
            {{sums[i][j][half * 2], sums[i][j][half * 2 + 1]}};
      }}
  __syncthreads();
}}
template <bool kDownA = false, bool kDownB = false>
__device__ __forceinline__ void product(
    uint8_t* shared, const void* a_, int64_t at_a, int64_t pitch_a, const void* b_, int64_t at_b,
    int64_t pitch_b, int64_t rows, int64_t inner, int64_t columns, int64_t top, int64_t left) {{
  const Side<kDownA> a{{static_cast<const Element*>(a_) + at_a, pitch_a, rows, inner, top}};
  const Side<kDownB> b{{static_cast<const Element*>(b_) + at_b, pitch_b, columns, inner, left}};
  auto copy_a = [&](uint32_t tile, int64_t k) {{ a.copy(tile, k); }};
  tile_product<kDownA>(shared, copy_a, b, inner);
}}
__device__ __forceinline__ Sum sum(const uint8_t* shared, int64_t row, int64_t column) {{
  return reinterpret_cast<const Sum*>(shared)[row * {TILE} + (column ^ ((row & 3) * 8))];
}}
}}  // namespace
#endif
"""


def name(dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"netlathe_ampere_{dtype}::{function}"
