"""What kernels of warpgroups on sm_90a have in common: stages with barriers, and results on their way out.

One warpgroup of a block copies stages into shared memory, two multiply them. A stage has two barriers, all of
them behind the stages: it is full when its bytes are there, and empty when every multiplying warpgroup that
reads it, in any block of the cluster, has let it go. Instructions follow the PTX ISA 8.5, sections 9.7.12.15
(mbarrier), 9.7.12.6 (barrier.cluster) and 9.7.14.5 (wgmma's descriptors).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from netlathe.backends.tvm.cuda.code import GpuCode
from netlathe.backends.tvm.tir import Expr

# One warpgroup copies, two multiply; registers are moved from the first to the others.
THREADS, GROUP = 384, 128
COPYING = 40  # registers of a thread that copies, where others need more
ROW_BYTES = 128  # of K in a stage: a row of the 128-byte swizzle
PART = 64  # rows and columns of results that a warpgroup brings out at one time
STAGING_BYTES = 2 * PART * PART * 4  # of shared memory for that
# Measured on an H200: bytes that a multiprocessor gets from the level-2 cache in a cycle, and cycles that a
# column of a tile's results takes on its way out.
CACHE_BYTES, LEAVING = 40, 50

_NAMESPACE = "netlathe_warpgroup"
SOURCE = f"""
#ifndef NETLATHE_WARPGROUP
#define NETLATHE_WARPGROUP
namespace {_NAMESPACE} {{
__device__ __forceinline__ uint32_t base(const void* shared) {{
  return (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023u) & ~1023u;
}}
// The same in a register: or it may be worked out again in each step of a loop.
__device__ __forceinline__ uint32_t kept_base(const void* shared) {{
  uint32_t at = base(shared);
  asm volatile("" : "+r"(at));
  return at & ~1023u;  // what the compiler does not know any more
}}
template <int kCluster> __device__ __forceinline__ int rank() {{
  uint32_t r = 0;
  if (kCluster > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nAGAIN:\\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\\n@p bra DONE;\\nbra AGAIN;\\nDONE:\\n}}"
      ::"r"(barrier), "r"(parity) : "memory");
}}
// In every block. No .release.cluster: that is a fence for all of memory, and products only read the stage.
template <int kCluster> __device__ __forceinline__ void release(uint32_t barrier) {{
#pragma unroll
  for (int cta = 0; cta < kCluster; ++cta)
    if (kCluster == 1)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
    else
      asm volatile(
          "{{\\n.reg .b32 far;\\nmapa.shared::cluster.u32 far, %0, %1;\\n"
          "mbarrier.arrive.shared::cluster.b64 _, [far];\\n}}"
          ::"r"(barrier), "r"(cta) : "memory");
}}
// The stage of a step of K, and the parity of its turn.
struct Stage {{
  int stage, parity;
  __device__ __forceinline__ Stage(int number, int stages)
      : stage(number % stages), parity(number / stages & 1) {{}}
  __device__ __forceinline__ void advance(int stages) {{
    if (++stage == stages) stage = 0, parity ^= 1;
  }}
}};
__device__ __forceinline__ void expect(uint32_t barrier, int bytes) {{
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}}
// Rows of 128 bytes; `kSlab` bytes on are the next columns, where these are not what is summed over.
template <int kSlab = 16> __device__ __forceinline__ uint64_t described(uint32_t at) {{
  return (uint64_t)((at & 0x3FFFF) >> 4) | ((uint64_t)(kSlab >> 4) << 16) | (64ull << 32) | (1ull << 62);
}}
template <int kCluster> __device__ __forceinline__ void cluster_barrier() {{
  if (kCluster > 1)
    asm volatile("barrier.cluster.arrive.aligned;\\nbarrier.cluster.wait.aligned;" ::: "memory");
}}
// One thread: the barriers of stages, those for full ones and then those for empty ones, which `readers`
// warpgroups let go.
template <int kStages> __device__ __forceinline__ void set(uint32_t barriers, int readers) {{
  for (int stage = 0; stage < kStages; ++stage) {{
    const uint32_t full = barriers + stage * 8, empty = full + kStages * 8;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty), "r"(readers));
  }}
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}}
// Every thread, first.
template <int kStages> __device__ __forceinline__ void start(uint32_t barriers, int readers) {{
  if (threadIdx.x == 0) set<kStages>(barriers, readers);
  __syncthreads();
}}
// Multiplying warpgroups take turns: named barriers 4 and 5 are their permissions to start products.
__device__ __forceinline__ void await_turn(int group) {{
  asm volatile("bar.sync %0, {2 * GROUP};" ::"r"(4 + group) : "memory");
}}
__device__ __forceinline__ void pass_turn(int group) {{
  asm volatile("bar.arrive %0, {2 * GROUP};" ::"r"(5 - group) : "memory");
}}

// 64 rows of up to 64 results through shared memory, so that neighbouring threads have neighbouring columns.
// Pieces of 8 columns are permuted by row against bank conflicts. Rows are kPitch floats apart.
template <typename Sum> struct alignas(8) Pair {{ Sum first, second; }};
template <int kStages, int kPitch> __device__ __forceinline__ void* staging(uint8_t* shared) {{
  float* first = static_cast<float*>(__cvta_shared_to_generic(base(shared) + kStages));
  return first + (threadIdx.x / {GROUP} - 1) * {PART} * kPitch;
}}
template <bool kTurned> __device__ __forceinline__ int permuted(int row) {{
  return (kTurned ? row / 2 : row) & 3;  // rows that a warp stores at one time
}}
template <int kStages, int kWide, int kPitch = {PART}, bool kTurned = false, typename Sum>
__device__ __forceinline__ void stage(uint8_t* shared, const Sum* d) {{
  Sum* to = static_cast<Sum*>(staging<kStages, kPitch>(shared));
  const int warp = threadIdx.x % {GROUP} / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kWide / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {{
      const Sum* from = d + j * 4 + half * 2;
      const int line = warp * 16 + half * 8 + lane / 4;
      if constexpr (kTurned) {{
#pragma unroll
        for (int i = 0; i < 2; ++i) {{
          const int row = j * 8 + lane % 4 * 2 + i;
          to[row * kPitch + (line / 8 ^ permuted<true>(row)) * 8 + line % 8] = from[i];
        }}
      }} else {{
        const int column = (j ^ permuted<false>(line)) * 8 + lane % 4 * 2;
        *reinterpret_cast<Pair<Sum>*>(to + line * kPitch + column) = {{from[0], from[1]}};
      }}
    }}
  asm volatile("bar.sync %0, {GROUP};" ::"r"((int)threadIdx.x / {GROUP}) : "memory");
}}
// One sum, or as many neighbouring ones as a vector has.
template <int kStages, typename T, int kPitch = {PART}, bool kTurned = false>
__device__ __forceinline__ T staged(uint8_t* shared, int64_t row, int64_t column) {{
  const float* from = static_cast<const float*>(staging<kStages, kPitch>(shared));
  from += row * kPitch + (((column >> 3) ^ permuted<kTurned>(row)) << 3) + (column & 7);
  return *reinterpret_cast<const T*>(from);
}}
__device__ __forceinline__ void unstage() {{
  asm volatile("bar.sync %0, {GROUP};" ::"r"((int)threadIdx.x / {GROUP}) : "memory");
}}
}}  // namespace
#endif
"""
_VECTORS = {"float32": "float", "int32": "int", "float32x4": "float4", "int32x4": "int4"}


def registers_left(warpgroups: int, copying: int = COPYING) -> int:
    """Registers of a multiplying thread, if so many warpgroups do and those that copy have so many.

    0 where a thread has enough as it is: one warpgroup leaves none to move.
    """
    if warpgroups == 1:
        return 0
    return min(232, ((64 << 10) // GROUP - copying) // warpgroups // 8 * 8)


def registers(count: int, way: str) -> str:
    """C++ by which every thread of a warpgroup gets so many registers: ``inc`` or ``dec``; 0: none."""
    return f'asm volatile("setmaxnreg.{way}.sync.aligned.u32 {count};");' if count else ""


def parts(columns: int) -> list[tuple[int, int]]:
    """How columns of results leave: the first of each part, and how many, a power of two up to 64."""
    found, first = [], 0
    while first < columns:
        wide = min(PART, 1 << (columns - first).bit_length() - 1)
        found.append((first, wide))
        first += wide
    return found


class Staging:
    """The way out of a warpgroup's sums: 64 rows and up to 64 columns at a time through shared memory.

    They lie behind ``stages`` bytes of stages. Where products are ``turned`` it is 64 columns and up to 64
    rows at a time.
    """

    def __init__(self, code: GpuCode, shared: Expr, stages: int, turned: bool = False) -> None:
        self._code, self._shared = code, shared
        self._stages, self._turned = stages, str(turned).lower()

    def bring_out(
        self,
        sums: Any,
        lines: int,
        whole: Expr | None,
        results: Callable[[int, int, bool], None],
        there: Callable[[int], Expr | None] = lambda _: None,
    ) -> None:
        """``results(first, wide, inside)`` for :func:`parts` of the right operand's lines.

        They may take sums from :meth:`at`. ``inside`` is for tiles that are ``whole``: without conditions
        loads and stores of all steps may overlap. Parts are left out where ``there`` of their first line, if
        it says so, is false.
        """
        code = self._code
        for first, wide in parts(lines):
            held = there(first)
            with contextlib.nullcontext() if held is None else code.when(held):
                stage = f"{_NAMESPACE}::stage<{self._stages}, {wide}, {PART}, {self._turned}>"
                code.run(stage, SOURCE, self._shared, code.address(sums, first // 2))

                def given(inside: bool, first: int = first, wide: int = wide) -> None:
                    results(first, wide, inside)

                if whole is None:
                    given(False)
                else:
                    code.branch(whole, partial(given, True), partial(given, False))
                code.run(f"{_NAMESPACE}::unstage", SOURCE)

    def at(self, dtype: str, row: Expr, column: Expr) -> Expr:
        """What the part has in this place: a sum, or a vector of those from there on."""
        name = f"{_NAMESPACE}::staged<{self._stages}, {_VECTORS[dtype]}, {PART}, {self._turned}>"
        return self._code.call(name, SOURCE, dtype, self._shared, row, column)
