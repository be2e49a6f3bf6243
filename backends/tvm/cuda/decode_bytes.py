"""Device code of decoding over a cache of int8: mma.m16n8k32 (PTX ISA 8.5, section 9.7.13.4.10).

It is a part of :mod:`netlathe.backends.tvm.cuda.decode`; beside it,
:mod:`netlathe.backends.tvm.cuda.decode_halves` is for caches of halves. Codes are multiplied as they are. The
other operand becomes integers of 16 bits, 256 high + low, two columns of bytes for each query, as in
:mod:`netlathe.backends.tvm.cuda.limbs`: the largest element of a query is 32512; of weights times the scales
of their values, the largest of every 32 keys. One scale for more keys would lose what many keys with small
weights add up to beside one that is large. Sums of integers are exact.

Values are transposed as they are read from shared memory, as pairs of bytes; one more permutation of bytes
brings four keys together. So these are, of each 32, t, t + 8, t + 16 and t + 24 for a thread t of a quad:
those of which one thread has scores.
"""

_WIDE = {
    "bf16": "__uint_as_float((uint32_t)bits << 16)",
    "f16": "__half2float(__ushort_as_half(bits))",
}


def source(dtype: str) -> str:
    """What the two have in common: Scales, Words, Queries and Results; queries are ``bf16`` or ``f16``."""
    return f"""
// Scales of the ring's tiles, which lie behind it: pieces of 16 bytes, the first of which may begin `skip`
// scales before the tile does.
struct Scales {{
  static constexpr int kSize = sizeof(Scale), kPiece = 16 / kSize, kTaken = kKeys + kPiece;
  const Scale *of_k, *of_v;
  Scale* held;
  int skip;
  __device__ __forceinline__ Scales(const void* k, const void* v, int64_t line, void* behind)
      : of_k(static_cast<const Scale*>(k) + line), of_v(static_cast<const Scale*>(v) + line),
        held(static_cast<Scale*>(behind)), skip((int)(line % kPiece)) {{}}
  // Those of keys from `at` to `last`.
  __device__ __forceinline__ void ask(int slot, bool is_values, int at, int last) const {{
    const int piece = threadIdx.x % 32 * kPiece, begin = at - skip + piece;
    if (piece < kTaken)
      fetch(static_cast<uint32_t>(__cvta_generic_to_shared(held + slot * kTaken + piece)),
            (is_values ? of_v : of_k) + begin, max(0, min(16, (last - begin) * kSize)));
  }}
  __device__ __forceinline__ void times(Scores& s, int slot) const {{
    const Scale* own = held + slot * kTaken + skip + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
      for (int n = 0; n < kN; ++n) s[i][n][0] *= real(own[i * 8]);
  }}
}};
__device__ __forceinline__ float wide(uint16_t bits) {{ return {_WIDE[dtype]}; }}
// The larger number, or, if there is one, what is not a number.
__device__ __forceinline__ float largest(float a, float b) {{
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}}
__device__ __forceinline__ void multiply(int* d, const uint32_t* a, const uint32_t* b) {{
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}},"
      " {{%0, %1, %2, %3}};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}}
constexpr float kMost = 32512.0f, kLeast = 1e-30f;  // 127 * 256; what stands for a largest of 0
// Four numbers times `factor`, at most kMost, as integers: the bytes of 256 high + low.
__device__ __forceinline__ void limbs(const float* value, float factor, uint32_t& high, uint32_t& low) {{
  uint32_t l[4], h[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {{
    l[i] = __float_as_uint(fmaf(value[i], factor, 12582912.0f));  // its last bits are the integer
    h[i] = l[i] + 128;  // whose low byte, with its sign, is taken off
  }}
  low = __byte_perm(__byte_perm(l[0], l[1], 0x40), __byte_perm(l[2], l[3], 0x40), 0x5410);
  high = __byte_perm(__byte_perm(h[0], h[1], 0x51), __byte_perm(h[2], h[3], 0x51), 0x5410);
}}
// What a thread has of queries, as they are in memory: zeros where there are no more `rows`.
struct Words {{
  uint2 of[kN][kSteps][2] = {{}};
  __device__ __forceinline__ void load(const uint16_t* q, int rows) {{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {{
          const uint16_t* from = q + (n * 4 + g / 2) * kDepth + step * 32 + half * 16 + t * 4;
          if (n * 4 + g / 2 < rows) of[n][step][half] = *reinterpret_cast<const uint2*>(from);
        }}
  }}
}};
struct Queries {{
  uint32_t x[kSteps][kN][2];
  float scale[kN];  // of the query the thread has scores of
  __device__ __forceinline__ Queries(const Words& words, float scale_) {{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kN; ++n) {{
      float value[kSteps][2][4], most = kLeast;
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {{
          const uint2 pair = words.of[n][step][half];
#pragma unroll
          for (int i = 0; i < 4; ++i) {{
            value[step][half][i] = wide((uint16_t)((i < 2 ? pair.x : pair.y) >> (i % 2 * 16)));
            most = largest(most, fabsf(value[step][half][i]));
          }}
        }}
      most = largest(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = largest(most, __shfl_xor_sync(0xffffffffu, most, 2));
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {{
          uint32_t high, low;
          limbs(value[step][half], kMost / most, high, low);
          x[step][n][half] = g % 2 ? low : high;
        }}
      scale[n] = __shfl_sync(0xffffffffu, most, t * 8) * (scale_ / kMost);
    }}
  }}
  // Scores of a tile: of key g + 8 i.
  __device__ __forceinline__ void multiply_keys(Scores& s, uint32_t tile) const {{
    const int key = threadIdx.x % 16, piece = threadIdx.x % 32 / 16;
#pragma unroll
    for (int m = 0; m < kKeys / 16; ++m) {{
      int d[kN][4] = {{}};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {{
        uint32_t a[4];
        load(a, tile + m * 16 * kBytes + place(key, step * 2 + piece));
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply(d[n], a, x[step][n]);
      }}
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          s[m * 2 + i][n][0] = (float)(d[n][i * 2] * 256 + d[n][i * 2 + 1]) * scale[n];
    }}
  }}
}};
// Sums of weighted values: of every 16 elements the thread has 2 g and 2 g + 1.
struct Results {{
  float o[kDepth / 16][kN][2] = {{}};
  __device__ __forceinline__ void shrink(const float (&by)[kN][kOwn]) {{
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) o[d][n][i] *= by[n][0];
  }}
  __device__ __forceinline__ void add(const Scores& weights, uint32_t tile) {{
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int key = lane % 8 / 2 + lane % 2 * 8 + lane / 8 % 2 * 16 + lane / 16 * 4;
#pragma unroll
    for (int m = 0; m < kKeys / 32; ++m) {{
      uint32_t w[kN][2];
      float factor[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) {{
        float own[4], most = kLeast;
#pragma unroll
        for (int i = 0; i < 4; ++i) {{
          own[i] = weights[m * 4 + i][n][0];
          most = fmaxf(most, fabsf(own[i]));
        }}
        most = over_keys(most);
        factor[n] = most * (1.0f / kMost);
        uint32_t high, low;
        limbs(own, __fdividef(kMost, most), high, low);
#pragma unroll
        for (int half = 0; half < 2; ++half) {{
          const int from = half * 16 + t * 4 + g / 2;
          const uint32_t high_ = __shfl_sync(0xffffffffu, high, from);
          const uint32_t low_ = __shfl_sync(0xffffffffu, low, from);
          w[n][half] = g % 2 ? low_ : high_;
        }}
      }}
#pragma unroll
      for (int d = 0; d < kDepth / 16; ++d) {{
        uint32_t r[4];
        load_turned(r, tile + m * 32 * kBytes + place(key, d));
        const uint32_t a[4] = {{
            __byte_perm(r[0], r[1], 0x6420), __byte_perm(r[0], r[1], 0x7531),
            __byte_perm(r[2], r[3], 0x6420), __byte_perm(r[2], r[3], 0x7531)}};
#pragma unroll
        for (int n = 0; n < kN; ++n) {{
          int sums[4] = {{}};
          multiply(sums, a, w[n]);
#pragma unroll
          for (int i = 0; i < 2; ++i) o[d][n][i] += (float)(sums[i * 2] * 256 + sums[i * 2 + 1]) * factor[n];
        }}
      }}
    }}
  }}
  __device__ __forceinline__ void store(float* to) const {{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) to[(n * 4 + t) * kRow + d * 16 + g * 2 + i] = o[d][n][i];
  }}
}};
"""
