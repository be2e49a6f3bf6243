"""Device code for products of few rows where weights are halves, or become halves, whatever number of rows.

It is a part of :mod:`netlathe.backends.tvm.cuda.stream`, which says what is whose operand; beside it,
:mod:`netlathe.backends.tvm.cuda.limbs` is the other way to multiply what a stage holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netlathe.backends.tvm.cuda.stream import Shape

# Columns between two rows of sums, so that what a warp stores, or reads, is in different banks.
SPARE = 8


def source(s: Shape, warps: int) -> str:
    """What differs from products of bytes: multiplying, and where sums lie."""
    zero = "half_at(at + kZeros + place)" if s.zeros else f"kMagic + {s.zero}u"
    kept, x = "nullptr", _IN_STAGE
    if s.held:
        kept, x = "stages + kHeld + step * kDeep * 2", _KEPT
    return f"""
constexpr int kLine = kSlice + {SPARE}, kPart = {8 * s.tiles} * kLine * 4;  // what a warp has of the sums
{_KEEP if s.held else ""}
// A multiplying warp's 32 columns and one chunk of K in a stage; `rows`: where x that is kept has the stage.
__device__ __forceinline__ void use(
    int thread, const uint8_t* at, const uint8_t* rows, float (*total)[2][4]) {{
  const int warp = thread / 32 % {warps}, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int across = warp % kAcross, down = warp / kAcross, row = dealt(g);
  uint4 weight[4];
  uint32_t zero[4];
  float scale[4];
#pragma unroll
  for (int half = 0; half < 4; ++half) {{
    const int column = across * 32 + half * 8;
    if constexpr (kBits == 16) {{
      const int piece = (down % 2 * 4 + q) ^ row;
      weight[half] = held(at + down / 2 * kColumns * 128 + (column + row) * 128 + piece * 16);
    }} else {{
      weight[half] = packed_at(at, across, down, half, lane);
    }}
    const int place = constant_at(column + g, down);
    if (kGroup) scale[half] = scale_at(at, column + g, down);
    zero[half] = ({zero}) * 0x10001u;
  }}
  float part[kTiles][2][4] = {{}};
  auto& sums = *reinterpret_cast<float (*)[kTiles][2][4]>(kGroup ? &part[0] : total);
#pragma unroll
  for (int p = 0; p < kChunk / 32; ++p) {{
    uint32_t w[4][4];
#pragma unroll
    for (int half = 0; half < 4; ++half) halves<kBits>(weight[half], p, zero[half], w[half]);
    const int k = down * kChunk + p * 32;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {{
      {x}
      const uint32_t x[4] = {{v.x, v.y, v.z, v.w}};
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int two = 0; two < 4; two += 2)
          multiply(sums[tile][i], w[2 * i] + two, w[2 * i + 1] + two, x + two);
    }}
  }}
  if (kGroup)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) total[tile][i][j] += part[tile][i][j] * scale[2 * i + j / 2];
}}

// A multiplying warp's share of one tile, sent to the blocks that finish its columns. The warps that do so
// wait for all of them; the others go on with the next tile.
__device__ __forceinline__ void consume(uint8_t* shared, int tile_number, int end, int summing) {{
  const uint32_t at = base(shared);
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // or what follows from it may be worked out again in each step
  const int warp = thread / 32 % {warps}, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int across = warp % kAcross, down = warp / kAcross, each = share(end);
  const int team = thread / {32 * warps};
  const uint8_t* stages = shared + (at - static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  float total[kTiles][2][4] = {{}};
  const int before = tile_number * each;
  for (int step = (before + team) % {s.teams}; step < each; step += {s.teams}) {{
    const int number = before + step, slot = number % kStages;
    wait(full(at, slot), (number / kStages) & 1);
    if ((rank() + step * kSplits) * kDeep + down * kChunk < end) 
      use(thread, stages + slot * kStageBytes, {kept}, total);
    __syncwarp();
    if (lane == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty(at, slot)) : "memory");
  }}
  clear(at, tile_number);
#pragma unroll
  for (int half = 0; half < 4; ++half) {{
    const int column = across * 32 + half * 8 + (kBits == 16 ? dealt(g) : g);
    const int part = (rank() * {s.teams} + team) * kDown + down;
    const int place = part * kPart + (q * kLine + column % kSlice) * 4;
    const uint32_t to = at_block(at + kSums + place, column / kSlice);
    // Rows were dealt to lanes, too: of each eight, a thread has rows q and q + 4.
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        send(to + (tile * 8 + j * 4) * kLine * 4, total[tile][half / 2][half % 2 * 2 + j]);
  }}
  gathered(at, tile_number, summing);
}}
// One result of the block's slice.
__device__ __forceinline__ float sum(uint8_t* shared, int64_t row, int64_t column) {{
  return added(base(shared) + kSums + ((int)row * kLine + (int)column) * 4, kPart);
}}
"""


# Rows of x in a stage are swizzled as the copy engine does.
_IN_STAGE = """const int piece = (k % 64 / 8 + q) ^ row;
      const uint4 v = held(at + kRows + k / 64 * kTiles * 1024 + (tile * 8 + row) * 128 + piece * 16);"""
_KEPT = """uint4 v = make_uint4(0, 0, 0, 0);
      if (row < kR) v = held(rows + (row * kShare + k + q * 8) * 2);"""
_KEEP = """
// kPiece elements of a row of x from `own` on, if there is such a row.
constexpr int kPiece = 8;
__device__ __forceinline__ void keep(uint8_t* to, int row, int own, const uint4* x) {
  if (row < kR) *reinterpret_cast<uint4*>(to + kHeld + (row * kShare + own) * 2) = *x;
}"""
