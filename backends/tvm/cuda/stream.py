"""Device code for products with few rows on sm_90a: weights stream through shared memory.

One warp copies; one or two teams of eight multiply, taking turns with the stages, or one of twelve. A cluster
of ``splits`` blocks makes ``columns`` columns of the result, its blocks sharing K stage by stage; each adds
up a slice of the columns from what all of them send it. A block walks over tiles and its copies run ahead
through them, so that some 100 to 200 KB are there, or on their way, at every multiprocessor. Weights wait for
nothing: their first stages are asked for before the kernel in front of this one has ended (griddepcontrol);
only what it may have written is waited for, and no more of them stand in front of that than keep memory busy.
Blocks with few stages take half of a multiprocessor, so that those of the kernel behind begin beside them,
and memory does not stand still while one kernel ends and the next begins.

The weight is the left operand of mma.m16n8k16 (PTX ISA 8.5, section 9.7.13.4.8), the rows of x are the 8
columns of the right one. The order of K inside a product is free as long as both operands agree, so that a
thread reads 16 neighbouring bytes of either: K = 32 p + 8 q + e for thread q of a quad, as
:mod:`netlathe.backends.tvm.cuda.skinny` has it, which unpacks the weights. Other instructions follow
sections 9.7.8.24 (cp.async.bulk), 9.7.12.15 (mbarrier) and 9.7.12.13 (griddepcontrol).

Few large copies matter: one thread starts a copy in some 80 ns, so that a stage is two or three of them, over
arrays of three and four dims. So does waiting on the block's own barriers without ``.cluster``, which would
empty the level-1 cache each time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from netlathe.backends.tvm.cuda import halves, held, limbs, pairs, skinny

# Clusters of so many blocks, one to a multiprocessor, that are on an H200 at once: its parts of 16 or 18
# multiprocessors leave some over. More than these would wait for the first ones to end.
CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
_PIECE = 2 << 10  # bytes of the weight in a stage for every warp
_SHARED = 225 << 10  # of a block, below the 227 KB there are
_HALF = 112 << 10  # of one that leaves room for another
_STAGES_OF_NIBBLES = 10  # at most: more were no faster
_SMALL = 4  # stages of a tile: see Shape.pace
_BRIEF = 8  # the same, and those of a block that is beside others


@dataclass(frozen=True)
class Shape:
    """A tile of ``columns`` columns and 8 * ``tiles`` rows; ``splits`` blocks share its K.

    There are tiles of 32, 64, 96, 128 and 256 columns. ``group`` rows of K share a scale, 0: one for each
    column or none. Zero points are given where ``zeros`` says so, else ``zero`` of 4 bits stands for zero.
    ``held``: x is kept in shared memory, for at most so many rows of ``inner`` elements (see
    :mod:`netlathe.backends.tvm.cuda.held`), ``normed`` before; as integers where the weight is of integers.
    0: it comes along with the weight; ``pairs``: as a kernel in front has made it (see
    :mod:`netlathe.backends.tvm.cuda.pairs`). ``beside``: a block leaves half of a multiprocessor to one of
    the kernel behind, which may begin when nearly all stages have been asked for, or x that is kept, if all
    of them have room.
    """

    bits: int
    tiles: int
    columns: int
    splits: int
    group: int = 0
    zeros: bool = False
    zero: int = 8
    held: int = 0
    inner: int = 0
    normed: bool = False
    pairs: bool = False
    beside: bool = False

    @property
    def rows(self) -> int:
        """Of the result."""
        return self.held if self.limbs else 8 * self.tiles

    @property
    def limbs(self) -> bool:
        """Whether x is kept as integers (see :mod:`netlathe.backends.tvm.cuda.limbs`)."""
        return self.held > 0 and self.bits < 16

    @property
    def share(self) -> int:
        """What a block has of K, of rows that are kept."""
        return -(-self.inner // self.deep // self.splits) * self.deep

    @property
    def kept_bytes(self) -> int:
        """Of x, where it is kept."""
        if self.limbs:
            return limbs.bytes_(self.held, self.share, self.bits)
        return 2 * self.held * self.share if self.held else 0

    @property
    def held_bytes(self) -> int:
        """Of x, and what each warp has of its sums of squares."""
        return self.kept_bytes + (4 * self.warps * self.teams * self.held if self.normed else 0)

    @property
    def able(self) -> bool:
        """Whether keeping x takes a block less time than it saves, which is more where x becomes integers.

        Tiles of 96 columns do better with short rows alone: stages are larger, and fewer warps prepare x.
        """
        most = held.MOST if self.normed or self.columns == 96 else 4 * held.MOST
        return not self.held or self.inner * self.held <= most

    def brief(self, columns: int, inner: int) -> bool:
        """Whether a block does well with half of a multiprocessor: it has few stages, and little beside them.

        Measured with up to four rows of integers, and 8 and 16 rows. Clusters take longer: sums that blocks
        send each other stand behind weights of the kernel behind. So do several rows of integers where not
        all stages have room beside x; and more rows where half of a multiprocessor has room for all stages or
        for one, where it has to be filled more than three times, and where its registers are too few.
        """
        stages, ring = -(-inner // self.deep), replace(self, beside=True).stages
        if self.held:
            few = (self.held == 1 or ring >= stages) and not self.normed
        else:
            registers = self.warps == 8 and (self.bits == 8 or self.tiles == 1)
            few = registers and 1 < ring < stages <= 3 * ring
        whole = self.splits == 1 and columns <= CLUSTERS[1] * self.columns
        return self.bits < 16 and few and whole and stages <= _BRIEF

    @property
    def warps(self) -> int:
        """Of a team: each has 32 columns of a stage, and as much of K as the others."""
        return 12 if self.columns % 3 == 0 else 8

    @property
    def stage_weights(self) -> int:
        """Bytes of the weight in a stage."""
        return _PIECE * self.warps

    @property
    def boxes(self) -> int:
        """Copies for them: packed columns are taken by 64, by multiples of these, or by 32."""
        return self.columns // 32 if self.bits < 16 and self.columns % 64 else 1

    @property
    def stage_rows(self) -> int:
        """Bytes of x in a stage."""
        if self.pairs:
            return self.deep // pairs.DEEP * pairs.RECORD
        return 0 if self.held else 16 * self.tiles * self.deep

    @property
    def teams(self) -> int:
        """Two where a thread keeps few registers, as unpacking takes time, and stages have room."""
        large = self.pairs or (self.beside and not self.held)
        return 2 if self.tiles == 1 and self.warps == 8 and not large else 1

    @property
    def turns(self) -> int:
        """How many take turns with the stages: teams, or the warpgroups of pairs."""
        return pairs.turns(self) if self.pairs else self.teams

    @property
    def multiplying(self) -> int:
        """Threads of the teams."""
        return 32 * self.warps * self.teams

    @property
    def threads(self) -> int:
        """All of them: one more warp copies."""
        return self.multiplying + 32

    @property
    def deep(self) -> int:
        """What a stage has of K."""
        return self.stage_weights * 8 // self.bits // self.columns

    @property
    def down(self) -> int:
        """Warps that share K in a stage: each has one chunk of it."""
        return self.warps * 32 // self.columns

    @property
    def groups(self) -> int:
        """Groups of K in a stage, for which scales or zero points are copied."""
        return skinny.groups(self.deep, self.group, self.zeros)

    @property
    def fits(self) -> bool:
        """Whether stages and groups have common ends."""
        return skinny.common_ends(self.deep, self.group)

    @property
    def scale_bytes(self) -> int:
        """Of scales in a stage, and of zero points likewise; copies start at multiples of 128."""
        return skinny.scale_bytes(self.groups, self.columns)

    @property
    def stage_bytes(self) -> int:
        """Weights, rows of x, scales and zero points; swizzled rows start at multiples of 1024."""
        return -(-(self.stage_weights + self.stage_rows + 2 * self.scale_bytes) // 1024) * 1024

    @property
    def parts(self) -> int:
        """Sums of a result: one of each warp, or warpgroup, that shares its K."""
        shared = pairs.sharing(self) if self.pairs else self.down
        return self.splits * self.teams * shared

    @property
    def sums_bytes(self) -> int:
        """What the warps of the cluster send a block."""
        if self.limbs:
            return self.multiplying * self.rows * 4
        return self.parts * self.rows * (self.slice + halves.SPARE) * 4

    @property
    def stages(self) -> int:
        """As many as there is room for, so that who takes turns has always the same ones.

        A stage that was another's could still be on its way when it is waited for again: a parity of its
        barrier stands for two times.
        """
        room = (_HALF if self.beside else _SHARED) - 2048 - self.sums_bytes - self.held_bytes
        count = room // self.stage_bytes
        if self.limbs and self.bits == 4:
            count = min(count, _STAGES_OF_NIBBLES)
        return count // self.turns * self.turns

    @property
    def ahead(self) -> int:
        """Stages of weights that are asked for before x, if it comes along with them.

        x stands behind all of these, and multiplying behind x: the longer that takes, the fewer they are, as
        measured. What is beside other blocks has few stages; one of them is left for x to overtake.
        """
        if self.held or self.bits == 16:
            return self.stages
        if self.beside:
            return max(1, self.stages - 1)
        if self.pairs:
            return self.stages * 2 // 3
        return max(1, self.stages * self.bits // (8 + 4 * self.tiles))

    @property
    def pace(self) -> int:
        """Stages on their way at a time before the kernel in front has ended; 0: all there is room for.

        As many as keep memory busy: what is asked for beyond that only stands in front of x, of which
        blocks with few stages, or all of several rows of 4 bits or to normalize, have less time to wait. How
        many are best was measured.
        """
        if not self.limbs:
            return 0
        stages = self.share // self.deep
        if stages <= _SMALL:
            return 2
        if self.held == 1 or self.splits > 1:
            return 3
        if self.bits == 4 or self.normed:
            return 2
        return 4 if stages <= _BRIEF else 3

    @property
    def shared_bytes(self) -> int:
        """To align it, the stages, the sums, the rows that are kept, the barriers."""
        room = self.stages * self.stage_bytes + self.sums_bytes + self.held_bytes
        return 1024 + room + 16 * self.stages + 16

    @property
    def slice(self) -> int:
        """Columns that a block of the cluster finishes."""
        return self.columns // self.splits


# Costs are in the time of 16 KB of weights, fitted to an H200. What bytes of x cost, of what those of weights
# do, and what sharing K between twice as many blocks costs a tile, by bits of the weight.
_UNIT = 16 << 10
_OF_X = 0.1
_SHARING = {16: 9.0, 8: 8.0, 4: 8.0}
# The same where several rows become integers, and how many elements do in that time.
_SHARING_INTEGERS = 2.0
_INTEGERS = 8192
# Pairs: what weights of 8 and 4 bits cost, the kernel in front, and more where a tile has over 64 columns.
_OF_PAIRS = {8: 0.9, 4: 0.75}
_FRONT = 3.0
_WIDE = {8: 0.0, 4: 2.0}
# One row times 4 bits: a kernel whose blocks have up to so many stages each takes no longer for some having
# fewer tiles than others, since the one behind begins where they are done.
_SHORT = 16


def _cost(shape: Shape, columns: int, inner: int) -> float:
    """Of the most loaded block."""
    s = shape
    across = -(-columns // s.columns)
    rounds = -(-across // CLUSTERS[s.splits])
    stages = -(-inner // s.deep) / s.splits
    tile = stages * (s.stage_weights + _OF_X * s.stage_rows) / _UNIT
    if s.pairs:
        more = _WIDE[s.bits] if s.columns > 64 else 0.0
        return _OF_PAIRS[s.bits] * rounds * tile + _FRONT + more
    before, sharing, least = 0.0, _SHARING[s.bits], 0
    if s.held > 1 and s.bits < 16:
        before, sharing = s.held * s.share / _INTEGERS, _SHARING_INTEGERS
    if s.held == 1 and s.bits == 4 and across > CLUSTERS[s.splits]:
        least = _SHORT
    return max(before + rounds * (tile + sharing * (s.splits.bit_length() - 1)), least)


def chosen(
    bits: int,
    tiles: int,
    columns: int,
    inner: int,
    group: int,
    zeros: bool,
    zero: int,
    held: int = 0,
    normed: bool = False,
) -> Shape | None:
    """The tile that the most loaded block is done with first.

    None where groups of K do not fit stages, or keeping ``held`` rows of x would take a block too long.
    """
    wide: tuple[int, ...] = (64, 32) if held else (128, 96, 64, 32)
    if held > 1 and bits == 4 and not normed:
        wide = (96, *wide)
    shapes = [
        Shape(bits, tiles, across, splits, group, zeros, zero, held, inner if held else 0, normed)
        for across in wide
        # More blocks that share K of several rows are slower.
        for splits in ((1, 2, 4, 8) if held <= 1 else (1, 2))
    ]
    able = [s for s in shapes if s.fits and -(-inner // s.deep) >= s.splits and s.able]
    best = min(able, key=lambda shape: _cost(shape, columns, inner), default=None)
    if best is None or not best.brief(columns, inner):
        return best
    return replace(best, beside=True)


def chosen_pairs(
    bits: int, columns: int, inner: int, group: int, zeros: bool, zero: int
) -> Shape | None:
    """The same with integers where a kernel in front makes x bytes; None where :func:`chosen` is faster.

    Clusters were slower in all cases. 8 bits are unpacked in less time: they gain only where no block has a
    second tile.
    """
    if group % pairs.DEEP:
        return None
    tiles = pairs.TILES
    wide = (256, 128, 64) if bits == 4 else (128, 64)
    shapes = [Shape(bits, tiles, across, 1, group, zeros, zero, pairs=True) for across in wide]
    shapes = [s for s in shapes if s.fits and (bits == 4 or columns <= s.columns * CLUSTERS[1])]
    if (other := chosen(bits, tiles, columns, inner, group, zeros, zero)) is not None:
        shapes.append(other)
    best = min(shapes, key=lambda shape: _cost(shape, columns, inner), default=None)
    return best if best is not None and best.pairs else None


def source(shape: Shape, dtype: str) -> str:
    """The device functions for one shape; ``dtype`` is ``bf16`` or ``f16``."""
    s = shape
    return f"""{skinny.source(dtype)}
#ifndef NETLATHE_{_stem(s, dtype)}
#define NETLATHE_{_stem(s, dtype)}
namespace netlathe_{_stem(s, dtype)} {{
using namespace netlathe_skinny_{dtype};
constexpr int kBits = {s.bits}, kTiles = {s.tiles}, kColumns = {s.columns};
constexpr int kSplits = {s.splits}, kGroup = {s.group};
constexpr int kChunk = 512 / kBits, kAcross = kColumns / 32, kDown = {s.down}, kDeep = {s.deep};
constexpr int kStages = {s.stages}, kAhead = {s.ahead}, kPace = {s.pace}, kStageBytes = {s.stage_bytes};
constexpr int kBoxes = {s.boxes}, kGroups = {s.groups};
constexpr int kRows = {s.stage_weights}, kScales = kRows + {s.stage_rows}, kZeros = kScales + {s.scale_bytes};
constexpr int kSlice = {s.slice}, kSums = kStages * kStageBytes;
constexpr int kR = {s.held}, kShare = {s.share}, kHeld = kSums + {s.sums_bytes};
constexpr int kBarriers = kHeld + {s.held_bytes};
constexpr bool kBeside = {str(s.beside).lower()};
constexpr bool kAtOnce = kR > 0 && kShare <= kStages * kDeep;  // a tile's stages all have room
constexpr bool kWhole = {str(s.held > 0 and s.share * s.splits == s.inner).lower()};  // K ends with a stage

__device__ __forceinline__ uint32_t base(const void* shared) {{
  return (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023u) & ~1023u;
}}
__device__ __forceinline__ uint32_t full(uint32_t at, int stage) {{ return at + kBarriers + stage * 8; }}
__device__ __forceinline__ uint32_t empty(uint32_t at, int stage) {{ return full(at, kStages + stage); }}
__device__ __forceinline__ uint32_t ready(uint32_t at) {{ return full(at, 2 * kStages); }}
__device__ __forceinline__ uint32_t taken(uint32_t at) {{ return full(at, 2 * kStages + 1); }}
__device__ __forceinline__ int rank() {{
  if (kSplits == 1) return 0;
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return (int)r;
}}
__device__ __forceinline__ void set(uint32_t barrier, int count) {{
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}}
// `far`: what other blocks of the cluster did before they arrived is seen, too.
template <bool far = false>
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {{
  if (far && kSplits > 1)
    asm volatile(
        "{{\\n.reg .pred p;\\nAGAIN:\\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\\n"
        "@p bra DONE;\\nbra AGAIN;\\nDONE:\\n}}"
        ::"r"(barrier), "r"(parity) : "memory");
  else
    asm volatile(
        "{{\\n.reg .pred p;\\nAGAIN:\\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\\n@p bra DONE;\\nbra AGAIN;\\nDONE:\\n}}"
        ::"r"(barrier), "r"(parity) : "memory");
}}
__device__ __forceinline__ uint32_t at_block(uint32_t address, int block) {{
  if (kSplits == 1) return address;
  uint32_t far;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(far) : "r"(address), "r"(block));
  return far;
}}
// A sum for a block of the cluster, or for this one.
__device__ __forceinline__ void send(uint32_t to, float sum) {{
  if (kSplits == 1) asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(sum) : "memory");
  else asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(sum) : "memory");
}}
// One arrival of the warp, after what its threads did, at the same barrier of every block of the cluster.
__device__ __forceinline__ void tell_all(uint32_t barrier) {{
  __syncwarp();
  if (kSplits == 1) {{
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }} else if (threadIdx.x % 32 < kSplits)
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];"
                 ::"r"(at_block(barrier, threadIdx.x % 32)) : "memory");
}}
// Everything that kernels in front have written is there.
__device__ __forceinline__ void follow() {{ asm volatile("griddepcontrol.wait;" ::: "memory"); }}
// The kernel behind may begin, where there is room for it.
__device__ __forceinline__ void launch() {{ asm volatile("griddepcontrol.launch_dependents;"); }}

// Every thread, first. `summing` warps finish a tile.
__device__ __forceinline__ void start(uint8_t* shared, int summing) {{
  const uint32_t at = base(shared);
  if (threadIdx.x == 0) {{
    for (int stage = 0; stage < kStages; ++stage) {{
      set(full(at, stage), 1);
      set(empty(at, stage), {pairs.readers(s) if s.pairs else s.warps});
    }}
    set(ready(at), {s.warps * s.teams} * kSplits);
    set(taken(at), summing * kSplits);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }}
  if (!kBeside) launch();
  __syncthreads();
  if (kSplits > 1) asm volatile("barrier.cluster.arrive;" ::: "memory");
}}
// There is room for the sums of a tile: the cluster's blocks have begun, and have read those of the last one.
// Nor do kernels in front read any more what results may overwrite.
__device__ __forceinline__ void clear(uint32_t at, int tile_number) {{
  if (tile_number > 0) {{
    wait<true>(taken(at), (tile_number - 1) & 1);
  }} else {{
    follow();
    if (kSplits > 1) asm volatile("barrier.cluster.wait;" ::: "memory");
  }}
}}

// A box of a matrix; or one of rows of 128 bytes, which are what is 64 elements of K deep.
__device__ __forceinline__ void copy(
    uint32_t to, uint64_t map, uint32_t barrier, int across, int down, uint64_t policy) {{
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {{%3, %4}}], [%2], %5;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(across), "r"(down), "l"(policy) : "memory");
}}
__device__ __forceinline__ void copy_rows(
    uint32_t to, uint64_t map, uint32_t barrier, int row, int k, uint64_t policy) {{
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {{%3, %4, %5}}], [%2], %6;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(k / 64), "l"(policy) : "memory");
}}
// Packed columns: dims are 1024 bytes of 16 columns, four times 16, chunks of K, 64 columns.
__device__ __forceinline__ void copy_packed(
    uint32_t to, uint64_t map, uint32_t barrier, int column, int chunk, uint64_t policy) {{
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {{%3, %4, %5, %6}}], [%2], %7;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(0), "r"(column % 64 / 16), "r"(chunk), "r"(column / 64),
      "l"(policy) : "memory");
}}
{pairs.records(s) if s.pairs else ""}
// Stages of this block's share of K in a tile.
__device__ __forceinline__ int share(int end) {{
  return ((end + kDeep - 1) / kDeep - rank() + kSplits - 1) / kSplits;
}}

// The copying warp. `end` is where K ends in memory; tiles from `first` on, every `step`-th of `tiles`.
__device__ __forceinline__ void produce(
    uint8_t* shared, {"const void*" if s.pairs else "uint64_t"} x, uint64_t map_weight, uint64_t map_scales,
    uint64_t map_zeros, int first, int step, int tiles, int end) {{
  if (threadIdx.x != {s.multiplying}) return;
  const uint32_t at = base(shared);
  const int each = share(end), count = (tiles - first + step - 1) / step * each;
  uint64_t once, often;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));

  auto place = [&](int number, int& tile, int& k) {{
    tile = first + number / each * step;
    k = (rank() + number % each * kSplits) * kDeep;
  }};
  auto constants = [&](int number) {{
    int tile, k;
    place(number, tile, k);
    const int slot = number % kStages, left = tile * kColumns;
    const uint32_t to = at + slot * kStageBytes, barrier = full(at, slot);
    constexpr int kConstants = {int(bool(s.group)) + int(s.zeros)} * kGroups * kColumns * 2;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(barrier), "r"(kScales + kConstants) : "memory");
    if (kBits == 16) copy_rows(to, map_weight, barrier, left, k, once);
    else
      for (int box = 0; box < kBoxes; ++box)
        copy_packed(to + box * (kRows / kBoxes), map_weight, barrier, left + box * 32, k / kChunk, once);
    const int group = kGroup ? k / (kGroup ? kGroup : 1) : 0;
    if (kGroup) copy(to + kScales, map_scales, barrier, left, group, once);
    if ({int(s.zeros)}) copy(to + kZeros, map_zeros, barrier, left, group, once);
  }};
  auto inputs = [&](int number) {{
    if (kR > 0) return;  // all of x is there before
    int tile, k;
    place(number, tile, k);
    const int slot = number % kStages;
    const uint32_t to = at + slot * kStageBytes + kRows, barrier = full(at, slot);
    {"copy_records(to, x, barrier, k, often)" if s.pairs else "copy_rows(to, x, barrier, 0, k, often)"};
  }};
  const int ahead = min(count, kAhead);
  // It takes a microsecond to begin: by then the last stage has been asked for, and is not behind its own.
  const int late = max(count - 2, min(count, kStages) - 1);
  auto ask = [&](int number) {{
    constants(number);
    if (kBeside && !kAtOnce && number == late) launch();  // else see `prepare`
  }};
  for (int number = 0; number < ahead; ++number) {{
    if (kPace > 0 && number >= kPace) wait(full(at, number - kPace), 0);
    ask(number);
  }}
  if (kR == 0) follow();
  for (int number = 0; number < ahead; ++number) inputs(number);
  for (int number = ahead; number < count; ++number) {{
    wait(empty(at, number % kStages), ((number / kStages) & 1) ^ 1);  // at first they are
    ask(number);
    inputs(number);
  }}
}}

__device__ __forceinline__ uint4 held(const uint8_t* at) {{ return *reinterpret_cast<const uint4*>(at); }}
__device__ __forceinline__ uint16_t half_at(const uint8_t* at) {{
  return *reinterpret_cast<const uint16_t*>(at);
}}
// Rows of swizzled tiles are dealt to lanes so that eight neighbours read all banks: 0 4 1 5 2 6 3 7.
__device__ __forceinline__ int dealt(int g) {{ return g / 2 + g % 2 * 4; }}

// Where a stage has the 16 bytes of a column that the thread of a quad has, of packed weights; and the scale.
__device__ __forceinline__ int packed_place(int across, int down, int half, int lane) {{
  constexpr int kOf64 = kColumns % 64 == 0 ? 4 : 2;  // sixteens side by side
  const int place = (across * 2 / kOf64 * kDown + down) * kOf64 + across * 2 % kOf64;
  return place * 1024 + (lane ^ lane / 8) * 16 + half * 512;
}}
__device__ __forceinline__ uint4 packed_at(const uint8_t* at, int across, int down, int half, int lane) {{
  return held(at + packed_place(across, down, half, lane));
}}
__device__ __forceinline__ int constant_at(int column, int down) {{
  const int group = kGroup ? down * kChunk / (kGroup ? kGroup : 1) % (kGroups ? kGroups : 1) : 0;
  return (group * kColumns + column) * 2;
}}
__device__ __forceinline__ float scale_at(const uint8_t* at, int column, int down) {{
  return wide(half_at(at + kScales + constant_at(column, down)));
}}
// The number of the warp among those that finish a tile, which take turns, if it is below `summing`.
__device__ __forceinline__ int turn(int tile_number, int summing) {{
  constexpr int kWarps = {s.warps * s.teams};
  return (threadIdx.x / 32 + kWarps - tile_number * summing % kWarps) % kWarps;
}}
// The warp has sent its sums; those that finish the tile wait for all of them.
__device__ __forceinline__ void gathered(uint32_t at, int tile_number, int summing) {{
  const bool sums = turn(tile_number, summing) < summing;
  if (kSplits == 1) {{
    if (sums) asm volatile("bar.sync 2, {s.multiplying};" ::: "memory");
    else asm volatile("bar.arrive 2, {s.multiplying};" ::: "memory");
  }} else {{
    tell_all(ready(at));
    if (sums) wait<true>(ready(at), tile_number & 1);
  }}
}}
// What the warps of the cluster sent for one result, `stride` bytes apart.
__device__ __forceinline__ float added(uint32_t at, int stride) {{
  float values[4] = {{}};
#pragma unroll 16
  for (int part = 0; part < {s.parts}; ++part) {{
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at + part * stride));
    values[part % 4] += v;
  }}
  return (values[0] + values[1]) + (values[2] + values[3]);
}}
{_multiplied(s, dtype)}
{held.source(s, dtype, s.warps) if s.held else ""}
// The slice has been read: others may send the next.
__device__ __forceinline__ void release(uint8_t* shared) {{ tell_all(taken(base(shared))); }}
}}  // namespace
#endif
"""


def _multiplied(s: Shape, dtype: str) -> str:
    if s.pairs:
        return pairs.source(s)
    return limbs.source(s, dtype, s.warps) if s.limbs else halves.source(s, s.warps)


def _stem(shape: Shape, dtype: str) -> str:
    s = shape
    zero = "z" if s.zeros else s.zero
    held_ = f"_{s.held}_{s.inner}{'n' * s.normed}" if s.held else ""
    how = "pairs" if s.pairs else "stream"
    beside = "_beside" if s.beside else ""
    return (
        f"{how}_{dtype}_{s.bits}_{s.tiles}_{s.columns}_{s.splits}_{s.group}_{zero}{held_}{beside}"
    )


def name(shape: Shape, dtype: str, function: str) -> str:
    """The function's name in C++."""
    return f"netlathe_{_stem(shape, dtype)}::{function}"
