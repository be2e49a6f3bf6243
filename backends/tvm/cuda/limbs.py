"""Device code for products of at most four rows with integer weights: x as pairs of bytes.

It is a part of :mod:`netlathe.backends.tvm.cuda.stream`; beside it,
:mod:`netlathe.backends.tvm.cuda.halves` is the other way to multiply what a stage holds.

Unpacking an integer to a half takes three to four instructions for two, far more than multiplying it. So here
the weight stays what it is, and x becomes integers: of every so many elements of a row of x the largest is
32512, and the others are rounded to whole steps, by 2^-16 of the largest at most, where a bfloat16 is rounded
by 2^-9 of itself. Such a number is 256 high + low, two columns of mma.m16n8k32 (PTX ISA 8.5, section
9.7.13.4.10), whose left operand is the weight in bytes; of 4 bits, 16 times the number, which takes three
instructions for eight. Sums of integers are exact; they are scaled to float32 once for each chunk of K.

Every block does this for its share of K, one row before the first product, more between the products of its
first tile. The bytes are kept in the order in which products read them: for each 32 of K, 8 bytes for each
thread of a warp whose column of x has something in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netlathe.backends.tvm.cuda import skinny

if TYPE_CHECKING:
    from netlathe.backends.tvm.cuda.stream import Shape

_AHEAD = 2  # stages of x that are on their way to a team
MOST = 32512  # 127 * 256: of the high byte no more than 127


def bytes_(rows: int, share: int, bits: int) -> int:
    """Shared memory for ``share`` elements of each row, and for their scales; copies start at 128."""
    scales = share // skinny.chunk(bits) * rows * 4
    return -(-(share // 32 * line(rows) + scales) // 128) * 128


def line(rows: int) -> int:
    """Bytes for 32 of K. Some to spare put what a warp keeps of neighbouring lines into different banks."""
    return 64 if rows == 1 else 256 + 32


def order(bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the eight elements of K that a thread has lie in its 8 bytes, as the weight has them."""
    return ((0, 1, 2, 3), (4, 5, 6, 7)) if bits == 8 else ((0, 4, 1, 5), (2, 6, 3, 7))


def packed(values: str, order: tuple[int, ...], byte: int) -> str:
    """A byte of each of four numbers."""
    pick = f"0x{byte + 4}{byte}u"
    low, high = (
        f"__byte_perm({values}[{order[i]}], {values}[{order[i + 1]}], {pick})" for i in (0, 2)
    )
    return f"__byte_perm({low}, {high}, 0x5410u)"


def source(s: Shape, warps: int) -> str:
    """What differs from products of halves: preparing x, multiplying, and where sums lie."""
    first, second = order(s.bits)
    scale = "scale[half] * " if s.group else ""
    least = "1.0f / 16" if s.bits == 4 else "1.0f"
    return f"""
constexpr int kLine = {line(s.held)}, kLimbScales = kHeld + kShare / 32 * kLine;

__device__ __forceinline__ float largest(float a, float b) {{
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}}
// Eight elements of a row of x from `own` on, if there is such a row; kChunk elements have a scale.
__device__ __forceinline__ void keep(uint8_t* to, int row, int own, const uint4& x) {{
  const uint32_t words[4] = {{x.x, x.y, x.z, x.w}};
  float value[8], most = 1e-30f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {{
    value[j] = wide((uint16_t)(words[j / 2] >> (j % 2 * 16)));
    most = largest(most, fabsf(value[j]));
  }}
#pragma unroll
  for (int mask = kChunk / 16; mask > 0; mask /= 2)
    most = largest(most, __shfl_xor_sync(0xffffffffu, most, mask));
  if (row >= kR) return;
  float factor;
  asm("rcp.approx.f32 %0, %1;" : "=f"(factor) : "f"(most));
  factor *= {MOST}.0f;
  uint32_t low[8], high[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {{
    low[j] = __float_as_uint(fmaf(value[j], factor, 12582912.0f));  // its last bits are the integer
    high[j] = low[j] + 128;  // whose low byte, with its sign, is taken off
  }}
  uint8_t* line = to + kHeld + own / 32 * kLine + (row * 2 * 4 + own % 32 / 8) * 8;
  *reinterpret_cast<uint2*>(line) =
      make_uint2({packed("high", first, 1)}, {packed("high", second, 1)});
  *reinterpret_cast<uint2*>(line + 32) =
      make_uint2({packed("low", first, 0)}, {packed("low", second, 0)});
  float* scale = reinterpret_cast<float*>(to + kLimbScales) + own / kChunk * kR + row;
  if (own % kChunk == 0) *scale = most * ({least} / {MOST});
}}
__device__ __forceinline__ void multiply_bytes(
    int* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {{
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}},"
      " {{%0, %1, %2, %3}};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}}
// Eight elements of K of a column as bytes.
__device__ __forceinline__ void bytes_of(const uint4& weight, int p, uint32_t& first, uint32_t& second) {{
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&weight);
  if constexpr (kBits == 8) {{
    first = words[2 * p], second = words[2 * p + 1];
  }} else {{
    asm("lop3.b32 %0, %1, 0xF0F0F0F0, 0x80808080, 0x6A;" : "=r"(first) : "r"(words[p] << 4));  // (a & b) ^ c
    asm("lop3.b32 %0, %1, 0xF0F0F0F0, 0x80808080, 0x6A;" : "=r"(second) : "r"(words[p]));
  }}
}}
// A multiplying warp's 32 columns and one chunk of K in a stage; `limbs`: where x has the stage.
__device__ __forceinline__ void use(
    const uint8_t* at, const uint8_t* limbs, const uint8_t* scales, float* total) {{
  const int warp = threadIdx.x / 32 % {warps}, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int across = warp % kAcross, down = warp / kAcross;
  uint4 weight[4];
  float scale[4];
#pragma unroll
  for (int half = 0; half < 4; ++half) {{
    weight[half] = packed_at(at, across, down, half, lane);
    if (kGroup) scale[half] = scale_at(at, across * 32 + half * 8 + g, down);
  }}
  int sums[2][4] = {{}};
#pragma unroll
  for (int p = 0; p < kChunk / 32; ++p) {{
    uint2 x = make_uint2(0, 0);
    if (kR > 1 || lane < 8)
      x = *reinterpret_cast<const uint2*>(limbs + (down * (kChunk / 32) + p) * kLine + lane * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {{
      uint32_t a[4];
      bytes_of(weight[2 * i], p, a[0], a[2]);
      bytes_of(weight[2 * i + 1], p, a[1], a[3]);
      multiply_bytes(sums[i], a[0], a[1], a[2], a[3], x.x, x.y);
    }}
  }}
  const float factor = reinterpret_cast<const float*>(scales)[down * kR + (kR > 1 ? q : 0)];
#pragma unroll
  for (int half = 0; half < 4; ++half) {{
    const int* pair = sums[half / 2] + half % 2 * 2;
    total[half] += (float)(pair[0] * 256 + pair[1]) * ({scale}factor);
  }}
}}

// What a thread has of x in a stage: on its way from memory, and kept.
constexpr int kTeam = {32 * warps}, kEach = kDeep / 8, kItems = (kR * kEach + kTeam - 1) / kTeam;
__device__ __forceinline__ void fetch(uint4* held, const uint16_t* x, int rows, int inner, int step) {{
#pragma unroll
  for (int i = 0; i < kItems; ++i) {{
    const int item = threadIdx.x % kTeam + i * kTeam, row = item / kEach;
    const int k = (rank() + step * kSplits) * kDeep + item % kEach * 8;
    held[i] = row < rows && k < inner ? *reinterpret_cast<const uint4*>(x + row * (int64_t)inner + k)
                                      : make_uint4(0, 0, 0, 0);
  }}
}}
__device__ __forceinline__ void keep_stage(uint8_t* to, const uint4* held, int step) {{
#pragma unroll
  for (int i = 0; i < kItems; ++i) {{
    const int item = threadIdx.x % kTeam + i * kTeam;
    keep(to, item / kEach, step * kDeep + item % kEach * 8, held[i]);
  }}
}}

// A multiplying warp's share of one tile, sent to the blocks that finish its columns. Where x was not
// prepared a team keeps what it needs of it in the first tile, stage by stage, while weights come.
__device__ __forceinline__ void consume(
    uint8_t* shared, int tile_number, int end, int summing, const void* x_, int rows, int inner) {{
  const uint32_t at = base(shared);
  const int warp = threadIdx.x / 32 % {warps}, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int across = warp % kAcross, down = warp / kAcross, each = share(end);
  const int team = threadIdx.x / {32 * warps};
  const uint16_t* x = static_cast<const uint16_t*>(x_);
  uint8_t* stages = shared + (at - static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  float total[4] = {{}};
  const int before = tile_number * each, first = (before + team) % {s.teams};
  const bool keeps = {int(not s.prepared)} && tile_number == 0;
  uint4 held[{_AHEAD}][kItems];
  if (keeps) {{
    follow();
#pragma unroll
    for (int i = 0; i < {_AHEAD}; ++i) fetch(held[i], x, rows, inner, first + i * {s.teams});
  }}
  if ({int(not s.prepared)} && tile_number == 1)  // the other team may have kept what is needed now
    asm volatile("bar.sync 1, {s.multiplying};" ::: "memory");
  for (int next = first; next < each; next += {_AHEAD * s.teams}) {{
#pragma unroll
    for (int i = 0; i < {_AHEAD}; ++i) {{
      const int step = next + i * {s.teams}, number = before + step, slot = number % kStages;
      if (step >= each) break;
      if (keeps) {{
        keep_stage(stages, held[i], step);
        fetch(held[i], x, rows, inner, step + {_AHEAD * s.teams});
        asm volatile("bar.sync %0, {32 * warps};" ::"r"(3 + team) : "memory");
      }}
      wait(full(at, slot), (number / kStages) & 1);
      if ((rank() + step * kSplits) * kDeep + down * kChunk < end)
        use(stages + slot * kStageBytes, stages + kHeld + step * (kDeep / 32) * kLine,
            stages + kLimbScales + step * (kDeep / kChunk) * kR * 4, total);
      __syncwarp();
      if (lane == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty(at, slot)) : "memory");
    }}
  }}
  if (tile_number > 0) wait<true>(taken(at), (tile_number - 1) & 1);
  if (q < kR)
#pragma unroll
    for (int half = 0; half < 4; ++half) {{
      const int column = across * 32 + half * 8 + g;
      const int place = ((rank() * {s.teams} + team) * kDown + down) * kSlice + column % kSlice;
      const uint32_t to = at_block(at + kSums + (place * kR + q) * 4, column / kSlice);
      asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(total[half]) : "memory");
    }}
  gathered(at, tile_number, summing);
}}
// One result of the block's slice.
__device__ __forceinline__ float sum(uint8_t* shared, int64_t row, int64_t column) {{
  return added(base(shared) + kSums + ((int)column * kR + (int)row) * 4, kSlice * kR * 4);
}}
"""
