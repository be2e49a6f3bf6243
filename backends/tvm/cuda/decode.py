"""Device code of attention with few queries, as decoding has them: bound by reading keys and values once.

Keys are split over blocks, each with the online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1).
The parts are merged by a second launch (:mod:`netlathe.backends.tvm.cuda.decode_merged`), unless a head has
one alone. Query heads that share a head of keys are columns of one product, so that keys are read once for
all of them. Keys are its left operand, and values, transposed, that of the second product; there is one way
for caches of halves (:mod:`netlathe.backends.tvm.cuda.decode_halves`) and one for those of int8 and int4
(:mod:`netlathe.backends.tvm.cuda.decode_bytes`).

Each warp copies tiles of keys and of values to shared memory for itself, and waits for no other. Blocks start
before the kernels in front have ended. Where it is known which keys those may be writing
(:mod:`netlathe.backends.tvm.cuda.early`), all others are asked for at once, and these when they have ended;
else all are. It is known of caches that are inputs of the model, of which the call writes nothing or, by
TensorScatter, some rows, if what says which rows and how many keys there are was in memory before. A model
with one Attention goes without that, and so does a cache that a kernel has just made, as of Concat: on sm_90a
it is asked for too, but thrown away and read again, most of it then from the level-2 cache. Until the kernels
in front have ended a warp asks for little at a time, since what those read comes behind all that is on its
way.
"""

from __future__ import annotations

from dataclasses import dataclass

from netlathe.backends.tvm.cuda import decode_bytes, decode_halves, decode_merged, flash_bias

WARPS = 8
THREADS = 32 * WARPS
CODED_DEPTHS = (64, 96, 128)  # of heads of int8 and int4
_TILE = 4 << 10  # most bytes of keys that a warp takes at once, unless 16 keys are more
# Bytes of keys and values that a warp asks for ahead. sm_86 and sm_89 have no room for more than the latter.
FAR, NEAR = 24 << 10, 8 << 10
# The most of keys of up to 64 bytes: no multiprocessor has room for two blocks of a node, which would leave
# another one without.
_SMALL = 16 << 10
_PEEKED = 16 << 10  # bytes that it reads before they are sure to be there, where it asks for FAR


@dataclass(frozen=True)
class Shape:
    """Heads of ``depth`` elements; a cache of halves, or of int8 or int4 with scales of ``scale_bits``.

    ``products``, 1 or 2, are side by side. A warp asks for ``ahead`` bytes, FAR or NEAR, before it needs
    them. Halves are multiples of 16 up to 256, or, NEAR, up to 128; ``bias`` and ``capped`` are as in
    ``flash_hopper``.
    """

    depth: int
    bits: int = 16
    scale_bits: int = 16
    products: int = 1
    ahead: int = NEAR
    bias: str = ""
    capped: bool = False

    @property
    def rows(self) -> int:
        """Of a block: query heads that share keys, by queries."""
        return self.columns * self.products

    @property
    def columns(self) -> int:
        """Queries of a product. With codes, one takes two columns."""
        return 8 if self.bits == 16 else 4

    @property
    def steps(self) -> int:
        """Of a product over the elements of a key."""
        return self.depth // (16 if self.bits == 16 else 32)

    @property
    def bytes(self) -> int:
        """Of a key, or of a value."""
        return self.depth * self.bits // 8

    @property
    def keys(self) -> int:
        """Of a tile: as many as a product takes, or twice as many."""
        least = 16 if self.bits == 16 else 32
        return least * max(1, _TILE // (least * self.bytes))

    @property
    def step(self) -> int:
        """Keys that a block takes at once."""
        return WARPS * self.keys

    @property
    def slots(self) -> int:
        """Tiles, of keys and of values in turn, that a warp asks for."""
        ahead = min(self.ahead, _SMALL) if self.bytes <= 64 else self.ahead
        return ahead // (self.keys * self.bytes)

    @property
    def few(self) -> int:
        """Tiles of a warp that are on their way at one time until the kernels in front have ended."""
        return -(-_TILE // (self.keys * self.bytes))

    @property
    def peeked(self) -> int:
        """Tiles that are read before that although they may change: those that there is time for.

        The first warp of a block reads none: it waits, and tells the others.
        """
        return min(self.slots, -(-_PEEKED // (self.keys * self.bytes))) if self.ahead == FAR else 0

    @property
    def queries_first(self) -> bool:
        """Whether queries are asked for in front of the tiles that are not read early, or behind them.

        Measured: 0.3 microseconds less of 10 to 15 with small keys, 0.1 to 0.5 more of 17 to 33 with others.
        """
        return self.bytes < 128

    @property
    def scale_bytes(self) -> int:
        """What scales and zero points of a tile take in shared memory: pieces of 16 bytes, see `Scales`."""
        scales = self.keys * self.scale_bits // 8 + 16
        return {16: 0, 8: scales, 4: scales + self.keys + 16}[self.bits]

    @property
    def partial(self) -> int:
        """Floats of one row of a part: results, the largest score, the sum of weights, two zeros."""
        return self.depth + 4

    @property
    def ring_bytes(self) -> int:
        """Of a warp: tiles, in whose place its part of the results lies at the end."""
        tiles = self.slots * (self.keys * self.bytes + self.scale_bytes)
        return -(-max(tiles, self.rows * self.partial * 4) // 128) * 128

    @property
    def shared_bytes(self) -> int:
        """Of a block: the rings, and behind them whether kernels in front have ended."""
        return WARPS * self.ring_bytes + 16


def source(shape: Shape, dtype: str) -> str:
    """The device functions; ``dtype`` is ``bf16`` or ``f16``."""
    space, s = _space(shape, dtype), shape
    products = decode_halves if s.bits == 16 else decode_bytes
    return f"""
#ifndef {space.upper()}
#define {space.upper()}
#include <cuda_fp16.h>
namespace {space} {{
constexpr int kDepth = {s.depth}, kBits = {s.bits}, kRow = {s.partial};
constexpr int kKeys = {s.keys}, kSlots = {s.slots}, kBytes = {s.bytes};  // of a key
constexpr int kFew = {s.few}, kPeeked = {s.peeked};      // tiles, see `start`
constexpr bool kQueriesFirst = {str(s.queries_first).lower()};
constexpr int kTile = kKeys * kBytes, kCopies = kTile / 512, kRing = {s.ring_bytes};
constexpr int kSteps = {s.steps};                        // of a product over the elements of a key
constexpr int kN = {s.products}, kColumns = {s.columns};   // products side by side, queries of each
constexpr int kRows = kN * kColumns, kOwn = kColumns / 4;  // of a product, that a thread has results of
constexpr float kLog2E = 1.44269504f;
constexpr bool kAdjusted = {str(bool(s.bias) or s.capped).lower()};  // scores are, and no powers of 2 then
using Scores = float[kKeys / 8][kN][kOwn];               // of key g + 8 i of a tile, for thread g of a quad

__device__ __forceinline__ float power(float x) {{
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}}
// The weight of a score beside a larger one, whose is 1.
__device__ __forceinline__ float weight(float score, float top) {{
  return power(kAdjusted ? (score - top) * kLog2E : score - top);
}}
{flash_bias.source(s.bias, s.capped) if s.bias or s.capped else ""}
// The largest number of all threads with results of the same columns.
__device__ __forceinline__ float over_keys(float x) {{
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}}
// A scale, as it is and as a number.
using Scale = uint{s.scale_bits}_t;
__device__ __forceinline__ float real(Scale bits) {{ return {_NUMBER[s.scale_bits]}; }}

// Where 16 bytes of a key are in a tile. Of 8 keys in a row, and of 4 in a row and the 4 that are 8 further,
// those of one place in the key lie in different banks.
__device__ __forceinline__ int place(int key, int piece) {{
  const int turn = (key & 3) | ((key >> 2 ^ key >> 3) & 1) << 2;
  return key * kBytes + (piece ^ turn >> {_shift(s.bytes // 16)}) * 16;
}}
__device__ __forceinline__ void load(uint32_t* to, uint32_t from) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}}
__device__ __forceinline__ void load_turned(uint32_t* to, uint32_t from) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}}
// An asynchronous copy of 16 bytes, of which `count` are there: zeros for the others.
__device__ __forceinline__ void fetch(uint32_t to, const void* from, int count) {{
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(to), "l"(from), "r"(count) : "memory");
}}
// All but the last kLeft groups of the warp's copies have arrived.
template <int kLeft> __device__ __forceinline__ void arrived() {{
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
  __syncwarp();
}}
// The kernel behind may start; and wait for those in front.
__device__ __forceinline__ void let_go() {{
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}}
__device__ __forceinline__ void wait_in_front() {{
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}}
// What kernels in front have made, read behind the wait whatever the kernel's pointers promise
// (`GpuCode.is_alone`).
__device__ __forceinline__ void read(uint32_t& to, const void* from) {{
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(to) : "l"(from) : "memory");
}}
__device__ __forceinline__ void read(uint2& to, const void* from) {{
  asm volatile("ld.global.v2.b32 {{%0, %1}}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from) : "memory");
}}
{products.source(dtype)}
{decode_merged.source(WARPS)}
// One part of the keys of one head, for kRows rows: what they add up to, by the softmax of this part alone,
// into its place in `work` [heads of keys, parts, rows, kRow]. Row r is query r % queries of query head r /
// queries of those that share the keys. Query 0 sees `offset` + 1 keys, each behind it one more, or, not
// `causal`, all. `most`: keys there is room for; with `lengths` a sequence has so many, and its queries stand
// at the end.
//
// `early`: keys, values and lengths were there before any kernel that may still run, but for the keys that
// kernels in front write: `fresh` of them from `fresh_from` [batch] on, where that is not null. All others
// are asked for before those kernels have ended.
//
// `bias`, for kernels that have one: lines of `line_` elements in matrices of `matrix`; query i of head h in
// sequence b has line i * `by_row` of matrix b * `by_batch` + h * `by_head`.
template <bool early>
__device__ __forceinline__ void part(
    uint8_t* shared, const void* q_, const void* k_, const void* v_, const void* k_scales,
    const void* v_scales, const void* k_zeros, const void* v_zeros, const void* allowed_,
    const void* lengths, const void* fresh_from, void* work, const void* bias, float scale, float cap,
    int64_t block, int64_t parts_, int64_t groups, int64_t heads, int64_t queries_, int64_t most,
    int64_t offset, int64_t causal, int64_t fresh, int64_t matrix, int64_t line_, int64_t by_batch,
    int64_t by_head, int64_t by_row) {{
  const int queries = (int)queries_, parts = (int)parts_, rows = (int)groups * queries;
  const int tiles = (rows + kRows - 1) / kRows, number = (int)block % parts;
  const int first = (int)block / parts % tiles * kRows;
  const int pair = (int)block / parts / tiles, batch = pair / (int)heads;
  const int64_t line = (int64_t)pair * most;
  const uint16_t* q = static_cast<const uint16_t*>(q_) + ((int64_t)pair * rows + first) * kDepth;
  const uint8_t* k = static_cast<const uint8_t*>(k_) + line * kBytes;
  const uint8_t* v = static_cast<const uint8_t*>(v_) + line * kBytes;
  const volatile uint8_t* allowed = static_cast<const volatile uint8_t*>(allowed_);  // see `read`
  if (allowed) allowed += batch * most;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* ring = reinterpret_cast<float*>(shared + warp * kRing);
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
  int places[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i)
    places[i] = place((i * 32 + lane) * 16 / kBytes, (i * 32 + lane) * 16 % kBytes / 16);

  // Which keys are this part's. What is read of the lengths before the kernel in front has ended is a guess
  // unless they are `early`.
  int length = (int)most, begin, end;
  auto number_at = [&](const void* from) {{ return (int)static_cast<const volatile int64_t*>(from)[batch]; }};
  auto divide = [&]() {{
    if (lengths) length = number_at(lengths);
    const int count = max(0, min(length, (int)most));
    const int chunk = (count + parts * kKeys - 1) / (parts * kKeys) * kKeys;
    begin = number * chunk, end = min(count, begin + chunk);
  }};
  divide();
  let_go();
  // The tiles of keys and of values lie in turn in the warp's ring.
  Scales scales(k_scales, v_scales, k_zeros, v_zeros, line, shared + warp * kRing + kSlots * kTile);
  // Ask for a tile from key `at` on, with zeros behind the end.
  auto ask = [&](int slot, bool is_values, int at) {{
    if (at >= end) return;
    const int left = min(end - at, kKeys) * kBytes - lane * 16;
    const uint8_t* source = (is_values ? v : k) + (int64_t)at * kBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      fetch(base + slot * kTile + places[i], source + i * 512, left > i * 512 ? 16 : 0);
    scales.ask(slot, is_values, at, min(end, at + kKeys));
  }};
  auto asked = []() {{ asm volatile("cp.async.commit_group;" ::: "memory"); }};
  constexpr int kStep = {WARPS} * kKeys;
  int at, slot = 0;
  // Ask for as many tiles as there is room for, those of which `wanted` says so; `slowly`: for few at a time.
  auto start = [&](bool slowly, auto wanted) {{
    at = begin + warp * kKeys;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {{
      const int own = at + i / 2 * kStep;
      if (wanted(i, own)) ask(i, i % 2, own);
      asked();
      if (slowly && i + 1 >= kFew && i + 1 < kSlots) arrived<kFew - 1>();
    }}
  }};
  const int fresh_first = early && fresh_from ? number_at(fresh_from) : 0;
  const int fresh_last = early && fresh_from ? fresh_first + (int)fresh : 0;
  auto is_late = [&](int at) {{
    return at < end && (scales.skip > 0 || (at < fresh_last && at + kKeys > fresh_first));
  }};
  // The first warp waits for the kernels in front, and the others read tiles that may change until these have
  // ended: what they ask for from then on would only stand in front of the same tiles, asked for once more.
  volatile bool& have_ended = *reinterpret_cast<volatile bool*>(shared + {WARPS} * kRing);
  if (early) {{
    start(true, [&](int, int at) {{ return !is_late(at); }});
  }} else if (kPeeked > 0) {{
    if (threadIdx.x == 0) have_ended = false;
    __syncthreads();
    if (warp > 0) start(true, [&](int i, int) {{ return i < kPeeked && !have_ended; }});
  }}
  wait_in_front();
  if (!early && kPeeked > 0 && threadIdx.x == 0) have_ended = true;
  Words words;
  if (kQueriesFirst) words.load(q, rows - first);
  if (early) {{
    bool some = false;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) some = some || is_late(at + i / 2 * kStep);
    if (some) {{
      start(false, [&](int, int at) {{ return is_late(at); }});
      arrived<0>();
    }}
  }} else {{
    const int guess = length;
    auto all = [](int, int) {{ return true; }};
    arrived<0>();
    start(false, all);
#if __CUDA_ARCH__ >= 900
    // Most of these are in the level-2 cache: two more, behind them, keep memory busy meanwhile.
    if (kPeeked > 0 && lane < 2) {{
      const int behind = kSlots + lane, own = at + behind / 2 * kStep, count = min(end - own, kKeys) * kBytes;
      const uint8_t* source = (behind % 2 ? v : k) + (int64_t)own * kBytes;
      if (count > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(count));
    }}
#endif
    if (lengths) divide();
    if (__any_sync(0xffffffffu, length != guess)) {{
      arrived<0>();
      start(false, all);
    }}
  }}
  // Which keys of the next tile may be seen: the lane's of every 32.
  bool open[(kKeys + 31) / 32];
  auto look = [&](int at) {{
#pragma unroll
    for (int i = 0; i < (kKeys + 31) / 32; ++i) {{
      const int key = at + i * 32 + lane;
      open[i] = !allowed || (key < end && allowed[key]);
    }}
  }};
  look(at);
{_BIAS if s.bias else ""}  if (!kQueriesFirst) words.load(q, rows - first);
  const Queries x(words, scale);
  Results o;
  const int limit = (int)offset + 1 + (lengths ? length - queries : 0);
  int limits[kN][kOwn];
  float top[kN][kOwn], whole[kN][kOwn] = {{}};
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {{
      const int row = first + n * kColumns + t * kOwn + e;
      limits[n][e] = causal ? min(end, limit + row % queries) : end;
      top[n][e] = -INFINITY;
    }}

  // The slot's tile is no longer needed: ask for another in its place.
  auto taken = [&](int next, bool is_values) {{
    __syncwarp();
    ask(slot, is_values, next);
    asked();
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }};
  for (; at < end; at += kStep) {{
    uint32_t seen[(kKeys + 31) / 32];
#pragma unroll
    for (int i = 0; i < (kKeys + 31) / 32; ++i) seen[i] = __ballot_sync(0xffffffffu, open[i]);
    if (allowed) look(at + kStep);
    arrived<kSlots - 1>();
    Scores s;
    x.multiply_keys(s, base + slot * kTile, scales, slot);
{_adjustment(s)}    taken(at + kSlots / 2 * kStep, kSlots % 2);
    bool grown = false;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {{
          const bool is_seen = seen[i / 4] >> (i % 4 * 8 + g) & 1;
          s[i][n][e] = is_seen && at + i * 8 + g < limits[n][e] ? s[i][n][e] : -INFINITY;
          grown = grown || s[i][n][e] > top[n][e];
        }}
    if (__any_sync(0xffffffffu, grown)) {{
      float shrink[kN][kOwn];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {{
          float most_ = s[0][n][e];
#pragma unroll
          for (int i = 1; i < kKeys / 8; ++i) most_ = fmaxf(most_, s[i][n][e]);
          most_ = fmaxf(over_keys(most_), top[n][e]);
          shrink[n][e] = most_ == -INFINITY ? 1.0f : weight(top[n][e], most_);
          top[n][e] = most_;
          whole[n][e] *= shrink[n][e];
        }}
      o.shrink(shrink);
    }}
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {{
        const float zero = top[n][e] == -INFINITY ? 0.0f : top[n][e];
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) {{
          s[i][n][e] = weight(s[i][n][e], zero);
          whole[n][e] += s[i][n][e];
        }}
      }}
    arrived<kSlots - 1>();
    o.add(s, base + slot * kTile, scales, slot);
    taken(at + (kSlots + 1) / 2 * kStep, (kSlots + 1) % 2);
  }}

  // The warps' parts as one.
  arrived<0>();
  o.store(ring);
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {{
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2)
        whole[n][e] += __shfl_xor_sync(0xffffffffu, whole[n][e], mask);
      float* row = ring + (n * kColumns + t * kOwn + e) * kRow;
      if (g == 0) row[kDepth] = top[n][e], row[kDepth + 1] = whole[n][e];
    }}
  __syncthreads();
  if (parts == 1) return;  // the rest is done by `result`
  float* to = static_cast<float*>(work) + (((int64_t)pair * parts + number) * rows + first) * kRow;
  const int items = min(kRows, rows - first) * (kDepth / 2);
  for (int item = threadIdx.x; item < items; item += {THREADS}) {{
    const int row = item / (kDepth / 2) * kRow;
    merge_warps(reinterpret_cast<const float*>(shared) + row, kRing / 4, item % (kDepth / 2) * 2, to + row);
  }}
}}
// A column of one of the block's rows, where its part is all there is.
__device__ __forceinline__ float result(const void* shared, int64_t row, int64_t column) {{
  return merged_warps(static_cast<const float*>(shared) + row * kRow, kRing / 4, (int)column);
}}
// The element of a vector of codes in the half type.
__device__ __forceinline__ uint16_t widened(
    const void* codes, const void* scales, const void* zeros, int64_t vector, int64_t column) {{
  const float scale = real(static_cast<const Scale*>(scales)[vector]);
  int code = static_cast<const int8_t*>(codes)[vector * kBytes + column % kBytes];
  if (kBits == 4) code = (column < kBytes ? code : code >> 4) & 15;
  if (kBits == 4) code -= static_cast<const uint8_t*>(zeros)[vector];
  const float value = code * scale;
  uint16_t bits;
  asm("cvt.rn.{dtype}.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}}
}}  // namespace
#endif
"""


_NUMBER = {32: "__uint_as_float(bits)", 16: "__half2float(__ushort_as_half(bits))"}
# A thread's elements of the bias of the next tile, which are read a tile ahead.
_BIAS = """  const volatile Element* biases[kN][kOwn];  // see `read`
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const int row = min(first + n * kColumns + t * kOwn + e, rows - 1);
      const int64_t head = pair % (int)heads * groups + row / queries;
      const int64_t at = (batch * by_batch + head * by_head) * matrix + row % queries * by_row * line_;
      biases[n][e] = static_cast<const volatile Element*>(bias) + at;
    }
  Element added[kKeys / 8][kN][kOwn];
  auto look_at_bias = [&](int at) {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
          const int key = at + i * 8 + g;
          added[i][n][e] = key < end ? biases[n][e][key] : Element(0);
        }
  };
  look_at_bias(at);
"""


def _adjustment(shape: Shape) -> str:
    """Scores, from products of queries and keys, to what the softmax takes: capped, with the bias."""
    if not shape.bias and not shape.capped:
        return ""
    value = "scaled(s[i][n][e], 1.0f, cap)"
    if shape.bias:
        added = "added[i][n][e]" if shape.bias == "f32" else "of(added[i][n][e], 0)"
        value = f"biased({value}, {added})"
    ahead = "    look_at_bias(at + kStep);\n" if shape.bias else ""
    return f"""#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < kOwn; ++e) s[i][n][e] = {value};
{ahead}"""


def _shift(pieces: int) -> int:
    """Of a key's pieces of 16 bytes those that change places are neighbours among 8, 4, 2 or 1."""
    return next(shift for shift in range(4) if pieces % (8 >> shift) == 0)


def _space(shape: Shape, dtype: str) -> str:
    s = shape
    sizes = f"{s.depth}_{s.bits}_{s.scale_bits}_{s.products}_{s.ahead}"
    return f"netlathe_decode_{dtype}_{sizes}{flash_bias.suffix(s.bias, s.capped)}"


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"{_space(shape, dtype)}::{function}"
