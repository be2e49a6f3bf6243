"""Device code for products of 9 to 16 rows with integer weights on sm_90a: x as pairs of bytes.

It is a part of :mod:`netlathe.backends.tvm.cuda.stream`; beside it,
:mod:`netlathe.backends.tvm.cuda.halves` and :mod:`netlathe.backends.tvm.cuda.limbs` are the other ways to
multiply what a stage holds.

With so many rows both unpacking and multiplying take their time: of a quarter of an H200's multiprocessor an
mma.m16n8k16 takes 6.1 cycles and a logical instruction 2, and the two hardly overlap. So, as in :mod:`limbs`,
the weight becomes bytes, by three instructions for eight, and a row of x two columns of bytes, with a scale
for every 128 elements of K. Here the products are those of a warpgroup, m64n32k32 (PTX ISA 8.5, section
9.7.14), which take 17 cycles where mma takes 24, and read x from shared memory by themselves; and weights of
8 bits, too, out of the swizzle that they have in memory, which takes 25 cycles and no instruction.

x is made bytes once, by a launch of its own, in the order in which products read it, and comes along with the
weight. 128 of K are a record: for each 16 of K and 8 columns a core matrix, 8 by 16 bytes, then the scales
of the rows, and 16 times their sums, which are what zero points are multiplied with.

A warpgroup takes two parts of a stage, each of 64 columns and one record. Of 4 bits it unpacks the second
while the first is multiplied; more warpgroups, or unpacking ahead into the next stage, were slower. Of 8 bits
these are all of the stage, and warpgroups take turns.

Up to 8 rows take no longer by halves, which need no kernel in front (:func:`stream.chosen_pairs`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netlathe.backends.tvm.cuda import halves, limbs

if TYPE_CHECKING:
    from netlathe.backends.tvm.cuda.stream import Shape

DEEP = 128  # elements of K in a record
TILES = 2  # of 8 rows; one tile takes no longer by halves
# Bytes of a record: two for each element, and two floats for each row; copies start at 128. And threads of a
# block of the kernel in front, which makes one: one for 8 elements of a row.
RECORD = 16 * TILES * DEEP + 128
THREADS = TILES * DEEP


def sharing(s: Shape) -> int:
    """Warpgroups that share K in a tile."""
    return 2 if s.columns == 64 or s.bits == 8 else 1  # otherwise each has columns of its own


def turns(s: Shape) -> int:
    """Warpgroups that take turns with the stages."""
    return 2 if s.bits == 8 else 1


def readers(s: Shape) -> int:
    """Warps that let a stage go."""
    return 8 // turns(s)


def records(s: Shape) -> str:
    """How they are copied: those of a stage."""
    return f"""
constexpr int kRecord = {RECORD}, kCore = {256 * TILES}, kFloats = kRecord - 128;
__device__ __forceinline__ void copy_records(
    uint32_t to, const void* from, uint32_t barrier, int k, uint64_t policy) {{
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;"
      ::"r"(to), "l"(static_cast<const uint8_t*>(from) + k / {DEEP} * (int64_t)kRecord),
      "r"(kDeep / {DEEP} * kRecord), "r"(barrier), "l"(policy) : "memory");
}}"""


def source(s: Shape) -> str:
    """The kernel in front, and what differs from other products: multiplying, and where sums lie."""
    return f"{_front(s)}{_back(s)}"


def _front(s: Shape) -> str:
    packed = limbs.packed
    first, second = limbs.order(s.bits)
    place, stores = "own / 32 * 2 * kCore + own % 32 / 8 * 4", [0, "kCore"]
    if s.bits == 8:  # in the order of a row's 64 bytes
        place, stores = "(own / 64 * 4 + own % 32 / 8) * kCore + own / 32 % 2 * 8", [0, 4]
    words = "\n  ".join(
        f"*reinterpret_cast<uint32_t*>(to + {at} + {128 * (1 - byte)}) = {packed(values, four, byte)};"
        for values, byte in (("high", 1), ("low", 0))
        for at, four in zip(stores, (first, second), strict=True)
    )
    return f"""
{limbs.LARGEST}
// One record: 8 elements of a row for each thread.
__device__ __forceinline__ void front(const void* x_, void* to_, int number, int rows, int inner) {{
  const int row = threadIdx.x / {DEEP // 8}, own = threadIdx.x % {DEEP // 8} * 8, k = number * {DEEP} + own;
  const uint16_t* x = static_cast<const uint16_t*>(x_);
  uint4 held = make_uint4(0, 0, 0, 0);
  if (row < rows && k < inner) held = *reinterpret_cast<const uint4*>(x + row * (int64_t)inner + k);
  const uint32_t words[4] = {{held.x, held.y, held.z, held.w}};
  {limbs.measured(DEEP)}
  float factor;
  asm("rcp.approx.f32 %0, %1;" : "=f"(factor) : "f"(most));
  factor *= {limbs.MOST}.0f;
  uint32_t low[8], high[8];
  int sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {{
    low[j] = __float_as_uint(fmaf(value[j], factor, 12582912.0f));  // its last bits are the integer
    high[j] = low[j] + 128;  // whose low byte, with its sign, is taken off
    sum += (int)low[j] - 0x4B400000;
  }}
#pragma unroll
  for (int mask = {DEEP // 16}; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  // Of 32 of K there are two rows of cores, 16 bytes for 8 columns each: high bytes of 8 rows, then low ones.
  // Rows are dealt so that a thread, which has two neighbouring columns of a product, has rows q and q + 4.
  const int place = row / 8 * 8 + row % 4 * 2 + row / 4 % 2;
  uint8_t* record = static_cast<uint8_t*>(to_) + number * (int64_t)kRecord;
  uint8_t* to = record + {place} + place / 8 * 256 + place % 8 * 16;
  {words}
  if (own == 0) {{
    float* floats = reinterpret_cast<float*>(record + kFloats) + place;
    floats[0] = most * ({limbs.least(s.bits)} / {limbs.MOST});
    floats[16] = (float)sum * 16;
  }}
}}
"""


def _multiply(s: Shape, name: str, how: str, adds: str) -> str:
    """The weight is four registers, or, of 8 bits, one: where it lies, as descriptors begin."""
    width, eight = 16 * TILES, s.bits == 8
    count, words = width // 2, 1 if eight else 4
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"{how}r"(d[{i}])' for i in range(count))
    given = ", ".join(f'"r"(w[{i}])' for i in range(words))
    x = count + words
    left = "w" if eight else "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
    described = f"mov.b64 w, {{%{count}, %{x + 2}}};\\n" if eight else ""
    high = ', "n"(512 / 16 | 2 << 30)' if eight else ""
    return f"""
__device__ __forceinline__ void multiply_{name}(int* d, const uint32_t* w, uint32_t x) {{
  asm volatile(
      "{{\\n.reg .pred p;\\n.reg .b64 x, w;\\nmov.b64 x, {{%{x}, %{x + 1}}};\\n{described}"
      "setp.ne.b32 p, {adds}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{width}k32.s32.s8.s8 {{{sums}}}, {left}, x, p;\\n}}"
      : {outputs} : {given}, "r"(x), "n"(8){high});
}}"""


def _back(s: Shape) -> str:
    eight = s.bits == 8
    # Of part i: the 64 columns of the tile, and the record of the stage.
    if eight:
        across, number = {64: ("0", "i"), 128: ("i", "0")}[s.columns]
        first = "(before + group) % 2"
    else:
        across = {64: "0", 128: "group", 256: "group + i % 2 * 2"}[s.columns]
        number = {64: "group + 2 * i", 128: "i", 256: "0"}[s.columns]
        first = "0"
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(8 * TILES))
    wide = s.columns == (128 if eight else 256)  # a warpgroup has two times 64 columns
    width = 16 * TILES
    # Records, and bytes of weights, from one part of a warpgroup to the next.
    step = 0 if wide else 2 if s.columns == 64 and not eight else 1
    apart = 4096 if s.columns == 128 and not eight else 8192
    own = "" if eight else " + unit * 1024 + (lane ^ lane / 8) * 16"
    zero = "8.0f + wide(kMagic) - constant_of(own + kZeros)" if s.zeros else f"{8 - s.zero}.0f"
    return f"""
constexpr int kWide = {1 + wide}, kSharing = {sharing(s)};
// What a warpgroup has of the sums.
constexpr int kLine = (kSlice + {halves.SPARE}) * 4, kPart = {8 * TILES} * kLine;
constexpr bool kOffset = {str(not eight and (s.zeros or s.zero != 8)).lower()};
{_multiply(s, "first", "=", "0")}
{_multiply(s, "more", "+", "1")}
{"" if eight else _UNPACK}
// 64 columns times one record, on its way: products, and factors of columns and rows. Cores lie without a
// swizzle: kCore bytes from one to the next along K, 128 along columns.
struct Part {{
  int sums[{width // 2}];
  float scale[2], offset[2];
  float2 rows[{TILES}], totals[{TILES}];
}};
// What a thread reads of a stage, and where products read x.
struct Places {{
  uint32_t weight, constants[2], rows, x;
}};
__device__ __forceinline__ float2 floats_at(uint32_t at) {{
  float2 v;
  asm volatile("ld.shared.v2.f32 {{%0, %1}}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
  return v;
}}
__device__ __forceinline__ float constant_of(uint32_t at) {{
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return wide(v);
}}
__device__ __forceinline__ void begin(
    uint32_t stage, int i, const Places& from, uint32_t (*a)[4], Part& part) {{
  const uint32_t at = stage + from.weight + i * {apart};
#pragma unroll
  for (int half = 0; half < 2; ++half) {{
    const uint32_t own = stage + from.constants[i] + half * 16;
    part.scale[half] = kGroup ? constant_of(own + kScales) : 1.0f;
    if (kOffset) part.offset[half] = {zero};
  }}
#pragma unroll
  for (int tile = 0; tile < {TILES}; ++tile) {{
    const uint32_t rows = stage + from.rows + {step} * i * kRecord + tile * 32;
    part.rows[tile] = floats_at(rows);
    if (kOffset) part.totals[tile] = floats_at(rows + 64);
  }}
  const uint32_t x = (stage + from.x + {step} * i * kRecord) / 16 & 0x3FFF | kCore / 16 << 16;
  {_BYTES if eight else _NIBBLES}
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}}
// All parts but the last `kLeft` are there; the sums of this one are not read before.
template <int kLeft> __device__ __forceinline__ void landed(Part& part) {{
  int* d = part.sums;
  asm volatile("wgmma.wait_group.sync.aligned %{width // 2};" : {outputs} : "n"(kLeft) : "memory");
}}
__device__ __forceinline__ void add(const Part& part, float* total) {{
#pragma unroll
  for (int tile = 0; tile < {TILES}; ++tile)
#pragma unroll
    for (int j = 0; j < 4; ++j) {{
      float value = (float)(part.sums[tile * 8 + j] * 256 + part.sums[tile * 8 + 4 + j]);
      if (kOffset) value = fmaf(part.offset[j / 2], j % 2 ? part.totals[tile].y : part.totals[tile].x, value);
      value *= j % 2 ? part.rows[tile].y : part.rows[tile].x;
      total[tile * 4 + j] = fmaf(value, part.scale[j / 2], total[tile * 4 + j]);
    }}
}}

// A multiplying warp's share of one tile, sent to the blocks that finish its columns.
__device__ __forceinline__ void consume(uint8_t* shared, int tile_number, int end, int summing) {{
  const uint32_t at = base(shared);
  // The same for all threads of a warp, which the compiler cannot know.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int unit = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4;
  const int each = share(end), before = tile_number * each;
  Places from;
#pragma unroll
  for (int i = 1; i >= 0; --i) {{
    const int across = {across}, down = ({number}) * ({DEEP} / kChunk);
    from.weight = (across * kDown + down) * 4096{own};
    from.constants[i] = constant_at(across * 64 + unit * 16 + lane / 4, down);
    from.x = kRows + ({number}) * kRecord;
  }}
  from.rows = from.x + kFloats + q * 8;
  float total[kWide][{4 * TILES}] = {{}};
  uint32_t a[2][4][4];
  Part part[2];
  for (int step = {first}; step < each; step += {turns(s)}) {{
    const int number = before + step, slot = number % kStages;
    const uint32_t stage = at + slot * kStageBytes;
    wait(full(at, slot), (number / kStages) & 1);
    begin(stage, 0, from, a[0], part[0]);
    begin(stage, 1, from, a[1], part[1]);
    landed<1>(part[0]);
    add(part[0], total[0]);
    landed<0>(part[1]);
    add(part[1], total[kWide - 1]);
    __syncwarp();
    if (lane == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty(at, slot)) : "memory");
  }}
  clear(at, tile_number);
#pragma unroll
  for (int i = 0; i < kWide; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {{
      const int column = ({across}) * 64 + unit * 16 + half * 8 + lane / 4;
      const int number = rank() * kSharing + (kSharing > 1 ? group : 0);
      const int place = number * kPart + q * kLine + column % kSlice * 4;
      const uint32_t to = at_block(at + kSums + place, column / kSlice);
#pragma unroll
      for (int j = 0; j < {2 * TILES}; ++j)
        send(to + (j / 2 * 8 + j % 2 * 4) * kLine, total[i][j / 2 * 4 + half * 2 + j % 2]);
    }}
  gathered(at, tile_number, summing);
}}
// One result of the block's slice.
__device__ __forceinline__ float sum(uint8_t* shared, int64_t row, int64_t column) {{
  return added(base(shared) + kSums + (int)row * kLine + (int)column * 4, kPart);
}}
"""


_BYTES = """asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const uint32_t w = (at + p / 2 * 4096 + p % 2 * 32) / 16 & 0x3FFF | 1 << 16;
    const uint32_t own = x + p * (2 * kCore / 16);
    p == 0 ? multiply_first(part.sums, &w, own) : multiply_more(part.sums, &w, own);
  }"""
_UNPACK = """// Eight elements of K of a column as bytes, 16 times what they are less 8.
__device__ __forceinline__ void bytes_of(uint32_t word, uint32_t& first, uint32_t& second) {
  asm("lop3.b32 %0, %1, 0xF0F0F0F0, 0x80808080, 0x6A;" : "=r"(first) : "r"(word << 4));  // (a & b) ^ c
  asm("lop3.b32 %0, %1, 0xF0F0F0F0, 0x80808080, 0x6A;" : "=r"(second) : "r"(word));
}
__device__ __forceinline__ uint4 four_at(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}"""
_NIBBLES = """const uint4 weight[2] = {four_at(at), four_at(at + 512)};
  const uint32_t *even = reinterpret_cast<const uint32_t*>(weight), *odd = even + 4;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    bytes_of(even[p], a[p][0], a[p][2]);
    bytes_of(odd[p], a[p][1], a[p][3]);
  }
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const uint32_t own = x + p * (2 * kCore / 16);
    p == 0 ? multiply_first(part.sums, a[p], own) : multiply_more(part.sums, a[p], own);
  }"""
