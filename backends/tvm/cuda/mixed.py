"""Device code for sm_90a of products of more than 16 rows with weights of 8 or 4 bits, read as they are.

A warpgroup multiplies 64 columns of the weight, which are the left operand of wgmma and become halves in
registers, with all rows of x, which the copy engine brings in stages with the weight (PTX ISA 8.5, sections
9.7.14.5, wgmma's fragments and descriptors, and 9.7.8.24, copies). ``columns`` of a tile are those of several
warpgroups, or two share a stage's K; and two blocks, a cluster, may share K, so that each reads half of x.
Sums meet as those of :mod:`split` do. A stage takes as much room as the rows that there are.

The weight is packed for products of few rows: a thread of a quad has eight neighbouring elements of K there
(:mod:`skinny`). Here it needs two of each eight, as x lies in memory order. So it reads what its quad has,
which is one address for four threads, and takes its two out of every word: a shift by the thread's number,
or a choice of two bytes, where those kernels have constants. Scales of groups are multiplied with halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

from netlathe.backends.tvm.cuda import hopper, skinny, split, tilings, warpgroup
from netlathe.backends.tvm.cuda.tilings import Tiling
from netlathe.backends.tvm.cuda.warpgroup import GROUP, PART

# There are kernels for so many rows, or fewer, which are one tile; and those for more, by :mod:`tilings`.
ROWS = (32, 64, 128)
MOST_ROWS = 256  # of a tile of these
SLAB = warpgroup.ROW_BYTES // 2  # elements of K in a swizzled row
_COPYING = 56  # registers of a thread that copies
_SPARE = 4  # columns between two rows of sums, so that what a warp stores is in different banks


@dataclass(frozen=True)
class Shape:
    """A tile of ``columns`` columns and up to ``rows`` rows, whose K ``splits`` blocks share.

    ``sharing`` warpgroups have the same columns, and each a part of a stage's ``deep`` elements of K. Scales,
    zero points and bits are as :class:`stream.Shape` has them.
    """

    bits: int
    rows: int
    columns: int
    sharing: int
    splits: int
    deep: int
    group: int = 0
    zeros: bool = False
    zero: int = 8

    @property
    def warpgroups(self) -> int:
        """That multiply."""
        return self.columns // PART * self.sharing

    @property
    def threads(self) -> int:
        """All of them: one more warpgroup copies."""
        return (1 + self.warpgroups) * GROUP

    @property
    def registers(self) -> int:
        """Of a multiplying thread: what one that copies leaves over; 0 where all have enough."""
        return warpgroup.registers_left(self.warpgroups, _COPYING)

    @property
    def down(self) -> int:
        """Chunks of K in a stage, as the weight is packed."""
        return self.deep // skinny.chunk(self.bits)

    @property
    def boxes(self) -> int:
        """Copies for them."""
        return 1

    @property
    def groups(self) -> int:
        """Groups of K in a stage, for which scales or zero points are copied."""
        return skinny.groups(self.deep, self.group, self.zeros)

    @property
    def fits(self) -> bool:
        """Whether stages and groups have common ends, and there is room for some stages."""
        ends = skinny.common_ends(self.deep, self.group)
        return (
            ends
            and self.stages >= (4 if self.rows <= ROWS[-1] else 3)
            and self.sums_bytes <= self.room
        )

    @property
    def weight_bytes(self) -> int:
        """Of the weight in a stage."""
        return self.columns * self.deep * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Of scales in a stage, and of zero points likewise; copies start at multiples of 128."""
        return skinny.scale_bytes(self.groups, self.columns)

    @property
    def front_bytes(self) -> int:
        """Weights, scales and zero points, in front of x, whose swizzled rows start at multiples of 1024."""
        return -(-(self.weight_bytes + 2 * self.scale_bytes) // 1024) * 1024

    @property
    def stage_bytes(self) -> int:
        """All of a stage, at most."""
        return self.front_bytes + 2 * self.rows * self.deep

    @property
    def sums_bytes(self) -> int:
        """Of all sums, where stages were."""
        return self.sharing * self.rows * (self.columns + _SPARE) * 4

    @property
    def stages(self) -> int:
        """As many as there is room for."""
        return self.room // self.stage_bytes

    @property
    def room(self) -> int:
        """Bytes of all stages."""
        return hopper.SHARED - 1024 - 16 * hopper.MOST_STAGES

    @property
    def widths(self) -> list[int]:
        """Numbers of rows that there are products for, the most first."""
        least = self.rows if self.rows <= ROWS[-1] else self.rows // 2
        return list(range(self.rows, least - 1, -hopper.STEP))

    @property
    def shared_bytes(self) -> int:
        """All of shared memory: to align it, the stages, the barriers."""
        return 1024 + self.room + 16 * hopper.MOST_STAGES


# Fitted to an H200, in cycles: what a product of 16 of K takes beside 1 for two rows, and more for each bit
# where no other warpgroup makes halves meanwhile; to begin and end a tile; to add up a row of all blocks.
_PRODUCT, _ALONE, _TILE, _MEETING = 29, 2, 4500, 16


def _time(s: Shape, rows: int, down: int, *, columns: int, inner: int) -> float:
    """Cycles of the most loaded multiprocessor, if rows are ``down`` tiles."""
    rounds = -(-(-(-columns // s.columns) * down) // split.CLUSTERS[s.splits])
    high = max(-(-rows // (down * hopper.STEP)) * hopper.STEP, s.widths[-1])
    step = s.columns // PART * (_PRODUCT + high / 2) + _ALONE * s.bits * (s.warpgroups == 1)
    return rounds * (inner / 16 / s.splits * step + _TILE + _MEETING * high * (s.splits - 1))


def rows_of(s: Shape) -> int:
    """What a tile has at most."""
    return s.rows


@lru_cache
def chosen(
    bits: int, rows: int, columns: int, inner: int, group: int, zeros: bool, zero: int
) -> Shape | None:
    """The tile for a weight [columns, inner] and all rows, up to 128; None where no stage fits groups."""
    high = -(-rows // 8) * 8
    able = []
    for wide, sharing in ((1, 1), (1, 2), (2, 1), (3, 1)):
        for splits in split.CLUSTERS:
            made = [
                Shape(bits, high, PART * wide, sharing, splits, deep, group, zeros, zero)
                for deep in (256, 128)
                if deep >= 128 * sharing  # a chunk of 4 bits for each
            ]
            able += [s for s in made if s.fits and -(-inner // s.deep) >= splits][:1]
    return min(able, key=lambda s: _time(s, rows, 1, columns=columns, inner=inner), default=None)


@lru_cache
def tiled(
    bits: int, columns: int, inner: int, group: int, zeros: bool, zero: int
) -> tuple[Tiling[Shape], ...]:
    """How more than 128 rows become tiles for a weight [columns, inner]; none where no stage fits groups."""
    able = []
    for wide, splits in ((2, 1), (1, 1), (2, 2)):
        deep = skinny.chunk(bits)
        able.append(Shape(bits, MOST_ROWS, PART * wide, 1, splits, deep, group, zeros, zero))
    able.append(Shape(bits, ROWS[-1], 3 * PART, 1, 1, 128, group, zeros, zero))
    able = [s for s in able if s.fits and -(-inner // s.deep) >= s.splits]
    time = partial(_time, columns=columns, inner=inner)
    return tilings.chosen(ROWS[-1], able[1:], able[0], rows_of, time) if able else ()


_SUM_UP = "    sum_up<{}>(shared, d, high, steps, stages);"


def source(s: Shape, dtype: str) -> str:
    """The device functions for one shape; ``dtype`` is ``bf16`` or ``f16``."""
    zero = "half_at(constants + kZeros)" if s.zeros else f"kMagic + {s.zero}u"
    constants = int(bool(s.group)) + int(s.zeros)
    if s.bits == 8:
        read, two = _WORDS_8, "whole(two_bytes(word, q % 2 ? 0x4342 : 0x4140))"
    else:
        read, two = _WORDS_4, "two_nibbles(word >> 4 * q, zero)"
    return f"""{warpgroup.SOURCE}{skinny.source(dtype)}
#ifndef {_stem(s, dtype).upper()}
#define {_stem(s, dtype).upper()}
namespace {_stem(s, dtype)} {{
using namespace netlathe_warpgroup;
using namespace netlathe_skinny_{dtype};
using Sum = float;
constexpr int kRows = {s.rows}, kColumns = {s.columns}, kGroup = {s.group}, kDeep = {s.deep};
constexpr int kMostStages = {hopper.MOST_STAGES}, kChunk = {skinny.chunk(s.bits)};
constexpr int kShare = kDeep / {s.sharing};  // of K in a stage, for each warpgroup
constexpr int kScales = {s.weight_bytes}, kZeros = kScales + {s.scale_bytes}, kFront = {s.front_bytes};

__device__ __forceinline__ uint32_t ready(uint32_t at, int stage) {{
  return at + {s.room} + stage * 8;
}}
__device__ __forceinline__ uint32_t empty(uint32_t at, int stage) {{ return ready(at, kMostStages + stage); }}
__device__ __forceinline__ int stage_bytes(int high) {{ return kFront + high * kDeep * 2; }}

// Every thread, first.
__device__ __forceinline__ void start(uint8_t* shared) {{
  asm volatile("griddepcontrol.launch_dependents;");
  netlathe_warpgroup::start<kMostStages>(ready(base(shared), 0), {4 * s.warpgroups});
}}
{_COPIES}
// `steps` stages from `first` on, of the tile that begins at this column: one thread copies the weight, and
// one `high` rows of x from `top` on, which the kernel in front may still write.
__device__ __forceinline__ void produce(
    uint8_t* shared, uint64_t map_x, uint64_t map_weight, uint64_t map_scales, uint64_t map_zeros, int high,
    int top, int column, int first, int steps, int stages) {{
  {warpgroup.registers(s.registers and _COPYING, "dec")}
  const uint32_t at = base(shared);
  const int bytes = stage_bytes(high);
  Stage now(0, stages);
  if (threadIdx.x == 0) {{
    for (int k = 0; k < steps; ++k, now.advance(stages)) {{
      const uint32_t to = at + now.stage * bytes, barrier = ready(at, now.stage);
      wait(empty(at, now.stage), now.parity ^ 1);
      constexpr int kBytes = {s.weight_bytes} + {constants} * {s.groups} * kColumns * 2;
      expect(barrier, kBytes + high * kDeep * 2);
      copy_packed(to, map_weight, barrier, (first + k) * (kDeep / kChunk), column / 64);
      const int group = kGroup ? (first + k) * kDeep / (kGroup ? kGroup : 1) : 0;
      if (kGroup) copy(to + kScales, map_scales, barrier, column, group);
      if ({int(s.zeros)}) copy(to + kZeros, map_zeros, barrier, column, group);
    }}
  }} else if (threadIdx.x == 32) {{
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int k = 0; k < steps; ++k, now.advance(stages)) {{
      wait(empty(at, now.stage), now.parity ^ 1);
      const uint32_t to = at + now.stage * bytes + kFront;
      copy_rows(to, map_x, ready(at, now.stage), top, (first + k) * (kDeep / {SLAB}));
    }}
  }}
}}

__device__ __forceinline__ void prepare() {{
  {warpgroup.registers(s.registers, "inc")}
}}
template <int kN> __device__ __forceinline__ void multiply(Sum* d, const uint32_t* w, uint64_t x) {{
{hopper.choice(s.widths, lambda wide: _multiply(wide, dtype), "constexpr (kN == {0})")}
}}
__device__ __forceinline__ uint16_t half_at(uint32_t at) {{
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}}
{read}
// Two elements of K of column g (or g + 8) as halves.
__device__ __forceinline__ uint32_t two_of(uint32_t word, int q, uint32_t zero, uint32_t scale) {{
  const uint32_t two = {two};
  if (kGroup == 0) return two;
  uint32_t scaled;
  asm("mul.rn.{dtype}x2 %0, %1, %2;" : "=r"(scaled) : "r"(two), "r"(scale));
  return scaled;
}}

// One arrival of a warp. With a branch for it ptxas would let products wait for each other.
__device__ __forceinline__ void let_go(uint32_t barrier, bool there) {{
  __syncwarp();
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %1, 0;\\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\\n}}"
      ::"r"(barrier), "r"((int)(there && threadIdx.x % 32 == 0)) : "memory");
}}
// A multiplying warp's sums. Products of 32 of K go on while the next become halves.
template <int kN>
__device__ __forceinline__ void sum_up(uint8_t* shared, Sum* d, int high, int steps, int stages) {{
  const uint32_t at = base(shared);
  const int bytes = stage_bytes(high);
  // The same for all threads of a warp, which the compiler cannot know.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / {GROUP}, 0) - 1;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int across = group / {s.sharing}, own = group % {s.sharing} * kShare;
  const uint32_t packed = (across * kDeep + own) / kChunk * 4096 + warp * 1024 + g * 64;
  const uint32_t column = (across * 64 + warp * 16 + g) * 2;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) d[i] = 0;
  uint32_t a[2][8];
  Stage now(0, stages);
  int last = 0;
  for (int k = 0; k < steps; ++k) {{
    const uint32_t stage = at + now.stage * bytes;
    wait(ready(at, now.stage), now.parity);
#pragma unroll
    for (int chunk = 0; chunk < kShare / kChunk; ++chunk) {{
      const int deep = own + chunk * kChunk, group = kGroup ? deep / {s.group or 1} % {max(1, s.groups)} : 0;
      uint32_t words[kChunk / 32][8], scale[2] = {{}}, zero[2];
      read(stage + packed + chunk * 4096, g, q, words);
#pragma unroll
      for (int half = 0; half < 2; ++half) {{
        const uint32_t constants = stage + column + group * kColumns * 2 + half * 16;
        if (kGroup) scale[half] = half_at(constants + kScales) * 0x10001u;
        zero[half] = ({zero}) * 0x10001u;
      }}
#pragma unroll
      for (int p = 0; p < kChunk / 32; ++p) {{
        uint32_t* halves = a[p % 2];
#pragma unroll
        for (int i = 0; i < 8; ++i) halves[i] = two_of(words[p][i], q, zero[i % 2], scale[i % 2]);
        const int down = deep + p * 32;
        const uint64_t x = described(stage + kFront) + down / {SLAB} * (high * 8) + down % {SLAB} / 8;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        multiply<kN>(d, halves, x);
        multiply<kN>(d, halves + 4, x + 2);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (chunk == 0 && p == 0) let_go(empty(at, last), k > 0);
      }}
    }}
    last = now.stage;
    now.advance(stages);
  }}
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
}}
__device__ __forceinline__ void consume(uint8_t* shared, Sum* d, int high, int steps, int stages) {{
{hopper.choice(s.widths, _SUM_UP.format, "(high > {1})")}
}}
{split.adding(s.splits, s.sharing, s.rows, s.columns, s.columns + _SPARE, s.warpgroups, "float32")}
// The sums of all warpgroups, where stages were: rows of the result are columns of a product.
__device__ __forceinline__ void put(uint8_t* shared, const Sum* d, int high) {{
  multiplying_barrier();  // all are done with the stages
  const int group = threadIdx.x / {GROUP} - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  Sum* to = static_cast<Sum*>(__cvta_shared_to_generic(base(shared))) + group % {s.sharing} * kPart
      + lane % 4 * 2 * kRow + group / {s.sharing} * 64 + warp * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j)
    if (j * 8 < high)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(j * 8 + i % 2) * kRow + i / 2 * 8] = d[j * 4 + i];
}}
}}  // namespace
#endif
"""


_COPIES = """
// Packed columns: dims are 1024 bytes of 16 columns, four times 16, chunks of K, 64 columns.
__device__ __forceinline__ void copy_packed(
    uint32_t to, uint64_t map, uint32_t barrier, int chunk, int across) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %3, %4, %5}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(chunk), "r"(across) : "memory");
}
__device__ __forceinline__ void copy_rows(uint32_t to, uint64_t map, uint32_t barrier, int row, int slab) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(slab) : "memory");
}
__device__ __forceinline__ void copy(uint32_t to, uint64_t map, uint32_t barrier, int across, int down) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(across), "r"(down) : "memory");
}
"""
# What a thread's quad has of a chunk in columns g and g + 8, in turn: eights r, words p of each.
_WORDS_4 = """__device__ __forceinline__ void read(uint32_t at, int g, int q, uint32_t (*to)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0][i]), "=r"(to[1][i]), "=r"(to[2][i]), "=r"(to[3][i])
                 : "r"(at + i % 2 * 512 + (i / 2 ^ g / 2) * 16));
}"""
# The same; of two words that one which has the thread's two bytes.
_WORDS_8 = """__device__ __forceinline__ void read(uint32_t at, int g, int q, uint32_t (*to)[8]) {
#pragma unroll
  for (int p = 0; p < 2; ++p)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(to[p][i]) : "r"(at + i % 2 * 512 + (i / 2 ^ g / 2) * 16 + p * 8 + q / 2 * 4));
}"""


def _multiply(rows: int, dtype: str) -> str:
    """One instruction: 64 columns and 16 of K, in registers, by all rows."""
    count = rows // 2
    places = ", ".join(f"%{i}" for i in range(count))
    weights = ", ".join(f"%{count + i}" for i in range(4))
    registers = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, 1, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{dtype}.{dtype} {{{places}}}, {{{weights}}},"
        " %{count + 4}, p, 1, 1, 0;\\n}}"
        : {registers} : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x));"""


def _stem(s: Shape, dtype: str) -> str:
    zero = "z" if s.zeros else s.zero
    tile = f"{s.rows}_{s.columns}_{s.sharing}_{s.splits}_{s.deep}"
    return f"netlathe_mixed_{dtype}_{s.bits}_{tile}_{s.group}_{zero}"


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"{_stem(shape, dtype)}::{function}"
