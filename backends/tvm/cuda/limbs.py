"""Device code for products of at most four rows with integer weights: x as pairs of bytes.

It is a part of :mod:`netlathe.backends.tvm.cuda.stream`; beside it,
:mod:`netlathe.backends.tvm.cuda.halves` is the other way to multiply what a stage holds.

Unpacking an integer to a half takes three to four instructions for two, far more than multiplying it. So here
the weight stays what it is, and x becomes integers: of every so many elements of a row of x the largest is
32512, and the others are rounded to whole steps, by 2^-16 of the largest at most, where a bfloat16 is rounded
by 2^-9 of itself. Such a number is 256 high + low, two columns of mma.m16n8k32 (PTX ISA 8.5, section
9.7.13.4.10), whose left operand is the weight in bytes. Sums of integers are exact; they are scaled to
float32 once for each chunk of K.

Every block does this for its share of K before the first product (see
:mod:`netlathe.backends.tvm.cuda.held`). The bytes are kept in the order in which products read them, 8 for
each thread of a warp. Of one row a chunk of K has a scale, of several 128 elements.

*One row* leaves columns of the product free, which save instructions. The 16 bytes of one column of the
weight that a thread has are the four registers of the left operand as they are: words 0 and 2 are in row g,
1 and 3 in row g + 8, as if of another column of the weight. Columns 0 and 1 of the right operand have x for
words 0 and 2, columns 2 and 3 for words 1 and 3; the sums of each with the other words are not read. Nor are
nibbles taken apart: of bytes 16 h + l that are multiplied with x for h, and of l alone with y, 16 times x for
l less x for h, the sum is 16 times what is wanted. y is at most 17 times as large as x, has its own columns,
4 to 7, and is rounded as finely with regard to l. Offsets, as 4 bits hold value + 8, are sums of x and y, a
product with bytes of eight.

*Several rows* take all columns, and bytes 16 times a number of 4 bits: three instructions for eight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netlathe.backends.tvm.cuda import skinny

if TYPE_CHECKING:
    from netlathe.backends.tvm.cuda.stream import Shape

MOST = 32512  # 127 * 256: of the high byte no more than 127
_SCALED = 128  # elements of each of several rows that have a scale: four eights of four threads
# NaN where one of the two is.
LARGEST = """
__device__ __forceinline__ float largest(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}"""


def measured(deep: int) -> str:
    """A thread's eight elements, and the largest size of one in ``deep`` of K."""
    return f"""float value[8], most = 1e-30f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {{
    value[j] = wide((uint16_t)(words[j / 2] >> (j % 2 * 16)));
    most = largest(most, fabsf(value[j]));
  }}
#pragma unroll
  for (int mask = {deep // 16}; mask > 0; mask /= 2)
    most = largest(most, __shfl_xor_sync(0xffffffffu, most, mask));"""


def bytes_(rows: int, share: int, bits: int) -> int:
    """Shared memory for ``share`` elements of each row, and for their scales; copies start at 128."""
    scales = share // scaled(rows, bits) * rows * 4
    return -(-(share // per_line(rows) * line(rows) + scales) // 128) * 128


def scaled(rows: int, bits: int) -> int:
    """Elements of a row that have a scale."""
    return skinny.chunk(bits) if rows == 1 else _SCALED


def line(rows: int) -> int:
    """Bytes for 128 elements of x, or for 32 of each of four rows.

    Some to spare put what a warp keeps of neighbouring lines into different banks.
    """
    return 256 + (32 if rows == 1 else 8)


def per_line(rows: int) -> int:
    """Elements of K that a line is for."""
    return 128 if rows == 1 else 32


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


def source(s: Shape, dtype: str, warps: int) -> str:
    """What differs from products of halves: preparing x, multiplying, and where sums lie."""
    one = s.held == 1
    return f"""
constexpr int kLine = {line(s.held)}, kPerLine = {per_line(s.held)};
constexpr int kLimbScales = kHeld + kShare / kPerLine * kLine;
{_keep_one(s) if one else _keep(s, dtype)}
{_mma("u8" if one and s.bits == 4 else "s8")}
{_use_one(s, warps) if one else _use(s, warps)}

// A multiplying warp's share of one tile, sent to the blocks that finish its columns.
__device__ __forceinline__ void consume(uint8_t* shared, int tile_number, int end, int summing) {{
  const uint32_t at = base(shared);
  const int warp = threadIdx.x / 32 % {warps}, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int across = warp % kAcross, down = warp / kAcross, each = share(end);
  const int team = threadIdx.x / {32 * warps};
  uint8_t* stages = shared + (at - static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  float total[4] = {{}};
  const int before = tile_number * each, first = (before + team) % {s.teams};
#pragma unroll 2
  for (int step = first; step < each; step += {s.teams}) {{
    const int number = before + step, slot = number % kStages;
    wait(full(at, slot), (number / kStages) & 1);
    if (kWhole || (rank() + step * kSplits) * kDeep + down * kChunk < end)
      use(at, stages, slot, step, total);
    __syncwarp();
    if (lane == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty(at, slot)) : "memory");
  }}
  clear(at, tile_number);
  {_sent_one(s) if one else _sent(s)}
  gathered(at, tile_number, summing);
}}
// One result of the block's slice.
__device__ __forceinline__ float sum(uint8_t* shared, int64_t row, int64_t column) {{
  return added(base(shared) + kSums + ((int)column * kR + (int)row) * 4, kSlice * kR * 4);
}}
"""


def _mma(left: str) -> str:
    return f"""
__device__ __forceinline__ void multiply_bytes(
    int* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {{
  asm("mma.sync.aligned.m16n8k32.row.col.s32.{left}.s8.s32"
      " {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}}"""


# Integers are the last bits of floats of this size. 128 more round the high byte up where the low one, with
# its sign, takes that off.
_INTEGERS = """uint32_t low[8], high[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    low[j] = __float_as_uint(fmaf(value[j], factor, 12582912.0f));
    high[j] = low[j] + 128;
  }"""
# x for the high nibbles of a word, in the order of its bytes, then y for the low ones.
_NIBBLES = """uint32_t low[8], high[8];
  const float more = factor * (16.0f / 17), less = factor * (1.0f / 17);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    constexpr int kHigh[4] = {2, 6, 3, 7}, kLow[4] = {0, 4, 1, 5};
    const float x = value[kHigh[j]], y = fmaf(value[kLow[j]], more, -x * less);
    low[j] = __float_as_uint(fmaf(x, factor, 12582912.0f));
    low[j + 4] = __float_as_uint(y + 12582912.0f);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) high[j] = low[j] + 128;"""


def _keep(s: Shape, dtype: str) -> str:
    """Several rows: 32 bytes for each limb of a row, in the order in which the weight has them."""
    first, second = (", ".join(map(str, four)) for four in order(s.bits))
    return f"""// The larger of two halves, and of the two beside them.
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {{
  uint32_t c;
  asm("max.NaN.{dtype}x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}}
// Every fourth eight from `own` on of a row of x, if there is such a row; {_SCALED} elements have a scale.
constexpr int kPiece = 32;
__device__ __forceinline__ void keep(uint8_t* to, int row, int own, const uint4* x) {{
  const uint32_t* words = reinterpret_cast<const uint32_t*>(x);
  uint32_t two = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) two = larger(two, words[i] & 0x7FFF7FFFu);
  two = larger(two, two >> 16 | two << 16);
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) two = larger(two, __shfl_xor_sync(0xffffffffu, two, mask));
  if (row >= kR) return;
  const float most = wide((uint16_t)two) + 1e-30f;
  float factor;
  asm("rcp.approx.f32 %0, %1;" : "=f"(factor) : "f"(most));
  factor *= {MOST}.0f;
  uint8_t* line = to + kHeld + own / 32 * kLine + row * 64 + own % 32;
#pragma unroll
  for (int p = 0; p < 4; ++p) {{
    uint32_t both[8], high[2], low[2];  // integers, and 128 to round the high byte, as bits of floats
#pragma unroll
    for (int j = 0; j < 8; ++j) {{
      const float value = wide((uint16_t)(words[p * 4 + j / 2] >> (j % 2 * 16)));
      both[j] = __float_as_uint(fmaf(value, factor, 12583040.0f));
    }}
#pragma unroll
    for (int half = 0; half < 2; ++half) {{
      constexpr int kOrder[2][4] = {{{{{first}}}, {{{second}}}}};
      const int* at = kOrder[half];
      const uint32_t front = __byte_perm(both[at[0]], both[at[1]], 0x5140);
      const uint32_t back = __byte_perm(both[at[2]], both[at[3]], 0x5140);
      high[half] = __byte_perm(front, back, 0x7632);
      low[half] = __byte_perm(front, back, 0x5410) ^ 0x80808080u;  // without the 128
    }}
    *reinterpret_cast<uint2*>(line + p * kLine) = make_uint2(high[0], high[1]);
    *reinterpret_cast<uint2*>(line + p * kLine + 32) = make_uint2(low[0], low[1]);
  }}
  float* scales = reinterpret_cast<float*>(to + kLimbScales);
  if (own % {_SCALED} == 0) scales[own / {_SCALED} * kR + row] = most * ({least(s.bits)} / {MOST});
}}"""


def _keep_one(s: Shape) -> str:
    """One row: words are dealt to columns by their number, odd or even, and to registers by its half."""
    if s.bits == 8:
        made, next_ = _INTEGERS, 64
        place = "own % 128 / 64 * 128 + own / 32 % 2 * 4"
    else:
        made, next_ = _NIBBLES, 128
        place = "own / 32 % 2 * 64 + own / 64 % 2 * 4"
    word = "*reinterpret_cast<uint32_t*>(line + {}) = {};"
    stores = [
        word.format(half * next_ + 32 * (1 - byte), packed(values, four, byte))
        for half, four in enumerate(((0, 1, 2, 3), (4, 5, 6, 7)))
        for values, byte in (("high", 1), ("low", 0))
    ]
    return f"""{LARGEST}
// Eight elements of x from `own` on; kChunk elements have a scale.
constexpr int kPiece = 8;
__device__ __forceinline__ void keep(uint8_t* to, int row, int own, const uint4* x) {{
  const uint32_t words[4] = {{x->x, x->y, x->z, x->w}};
  {measured(skinny.chunk(s.bits))}
  if (row > 0) return;
  float factor;
  asm("rcp.approx.f32 %0, %1;" : "=f"(factor) : "f"(most));
  factor *= {MOST}.0f;
  {made}
  uint8_t* line = to + kHeld + own / 128 * kLine + {place} + own % 32 / 8 * 8;
  {" ".join(stores)}
  float* scales = reinterpret_cast<float*>(to + kLimbScales);
  if (own % kChunk == 0) scales[own / kChunk] = most * ({least(s.bits)} / {MOST});
}}"""


def least(bits: int) -> str:
    """Nibbles are multiplied 16 times as large as they are."""
    return "1.0f / 16" if bits == 4 else "1.0f"


def _use(s: Shape, warps: int) -> str:
    scale = "scale[half] * " if s.group else ""
    return f"""// Eight elements of K of a column as bytes.
__device__ __forceinline__ void bytes_of(const uint4& weight, int p, uint32_t& first, uint32_t& second) {{
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&weight);
  if constexpr (kBits == 8) {{
    first = words[2 * p], second = words[2 * p + 1];
  }} else {{
    asm("lop3.b32 %0, %1, 0xF0F0F0F0, 0x80808080, 0x6A;" : "=r"(first) : "r"(words[p] << 4));  // (a & b) ^ c
    asm("lop3.b32 %0, %1, 0xF0F0F0F0, 0x80808080, 0x6A;" : "=r"(second) : "r"(words[p]));
  }}
}}
// A multiplying warp's 32 columns and one chunk of K in a stage, of which x is number `step`.
__device__ __forceinline__ void use(uint32_t, const uint8_t* stages, int slot, int step, float* total) {{
  const int warp = threadIdx.x / 32 % {warps}, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int across = warp % kAcross, down = warp / kAcross;
  const uint8_t* at = stages + slot * kStageBytes;
  const uint8_t* limbs = stages + kHeld + step * (kDeep / kPerLine) * kLine;
  const uint8_t* scales = stages + kLimbScales + step * (kDeep / {_SCALED}) * kR * 4;
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
    const uint2 x = *reinterpret_cast<const uint2*>(limbs + (down * (kChunk / 32) + p) * kLine + lane * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {{
      uint32_t a[4];
      bytes_of(weight[2 * i], p, a[0], a[2]);
      bytes_of(weight[2 * i + 1], p, a[1], a[3]);
      multiply_bytes(sums[i], a[0], a[1], a[2], a[3], x.x, x.y);
    }}
  }}
  const float factor = reinterpret_cast<const float*>(scales)[down * kChunk / {_SCALED} * kR + q];
#pragma unroll
  for (int half = 0; half < 4; ++half) {{
    const int* pair = sums[half / 2] + half % 2 * 2;
    total[half] += (float)(pair[0] * 256 + pair[1]) * ({scale}factor);
  }}
}}"""


def _use_one(s: Shape, warps: int) -> str:
    four = s.bits == 4
    low = ", ".join(f"w.{part} & 0x0F0F0F0Fu" for part in "xyzw")
    nibbles = f"multiply_bytes(d, {low}, y[0], y[1]);" if four else ""
    scale = "scale[half] * " if s.group else ""
    return f"""
// A multiplying warp's 32 columns and one chunk of K in a stage, of which x is number `step`. Addresses are
// in shared memory, where all but two of their parts are known before the first stage.
__device__ __forceinline__ void use(uint32_t at, const uint8_t*, int slot, int step, float* total) {{
  const int warp = threadIdx.x / 32 % {warps}, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int across = warp % kAcross, down = warp / kAcross;
  const uint32_t from = at + packed_place(across, down, 0, lane) + slot * kStageBytes;
  const uint32_t scales = at + kScales + constant_at(across * 32 + g, down) + slot * kStageBytes;
  uint4 weight[4];
  float scale[4], factor;
#pragma unroll
  for (int half = 0; half < 4; ++half) {{
    uint4& w = weight[half];
    asm volatile("ld.shared.v4.u32 {{%0, %1, %2, %3}}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(from + half * 512));
  }}
  if (kGroup)
#pragma unroll
    for (int half = 0; half < 4; ++half) {{
      uint16_t bits;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(scales + half * 16));
      scale[half] = wide(bits);
    }}
  const int k = down * kChunk, own = k / 128 * kLine + k % 128 * 2 + lane % {32 if four else 16} * 8;
  uint2 kept;
  asm volatile("ld.shared.v2.u32 {{%0, %1}}, [%2];"
               : "=r"(kept.x), "=r"(kept.y) : "r"(at + kHeld + own + step * (kDeep / kPerLine) * kLine));
  asm volatile("ld.shared.f32 %0, [%1];"
               : "=f"(factor) : "r"(at + kLimbScales + down * 4 + step * (kDeep / kChunk) * 4));
  {_SPLIT if four else _WHOLE}
#pragma unroll
  for (int half = 0; half < 4; ++half) {{
    const uint4 w = weight[half];
    int d[4] = {{}};
    multiply_bytes(d, w.x, w.y, w.z, w.w, x[0], x[1]);
    {nibbles}
    const int sum = (q % 2 ? d[2] : d[0]) * 256 + (q % 2 ? d[3] : d[1]){" - offset" if four else ""};
    total[half] += (float)sum * ({scale}factor);
  }}
}}"""


_WHOLE = """const uint32_t x[2] = {kept.x, kept.y};
  if (q >= 2) factor = 0.0f;  // no columns of x"""
# Threads of columns 0 to 3 have x, the others y; zeros are in the columns that are the other's.
_SPLIT = """const bool first = lane < 16;
  const uint32_t x[2] = {first ? kept.x : 0, first ? kept.y : 0};
  const uint32_t y[2] = {first ? 0 : kept.x, first ? 0 : kept.y};
  int ones[4] = {};
  multiply_bytes(ones, 0x08080808u, 0x08080808u, 0x08080808u, 0x08080808u, kept.x, kept.y);
  const int offset = (ones[0] * 256 + ones[1]) * (q < 2 ? 17 : 1);
  if (q >= 2) factor *= 17.0f;"""


def _sent(s: Shape) -> str:
    return f"""if (q < kR)
#pragma unroll
    for (int half = 0; half < 4; ++half) {{
      const int column = across * 32 + half * 8 + g;
      const int place = ((rank() * {s.teams} + team) * kDown + down) * kSlice + column % kSlice;
      send(at_block(at + kSums + (place * kR + q) * 4, column / kSlice), total[half]);
    }}"""


def _sent_one(s: Shape) -> str:
    """Each thread of a quad adds up one of the four columns that all of them have a part of."""
    return f"""float low = q % 2 ? total[1] : total[0], high = q % 2 ? total[3] : total[2];
  low += __shfl_xor_sync(0xffffffffu, q % 2 ? total[0] : total[1], 1);
  high += __shfl_xor_sync(0xffffffffu, q % 2 ? total[2] : total[3], 1);
  const float whole = (q < 2 ? low : high) + __shfl_xor_sync(0xffffffffu, q < 2 ? high : low, 2);
  const int column = across * 32 + q * 8 + g;
  const int place = ((rank() * {s.teams} + team) * kDown + down) * kSlice + column % kSlice;
  send(at_block(at + kSums + place * 4, column / kSlice), whole);"""
