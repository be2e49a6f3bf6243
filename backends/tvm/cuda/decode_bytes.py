"""Device code of decoding over a cache of int8 or int4: mma.m16n8k32 (PTX ISA 8.5, section 9.7.13.4.10).

It is a part of :mod:`netlathe.backends.tvm.cuda.decode`; beside it,
:mod:`netlathe.backends.tvm.cuda.decode_halves` is for caches of halves. Codes are multiplied as they are. The
other operand becomes integers of 16 bits, 256 high + low, two columns of bytes for each query, as in
:mod:`netlathe.backends.tvm.cuda.limbs`: the largest element of a query is 32512; of weights times the scales
of their values, the largest of every 32 keys. One scale for more keys would lose what many keys with small
weights add up to beside one that is large. Sums of integers are exact.

Values are transposed as they are read from shared memory, as pairs of bytes; one more permutation of bytes
brings four keys together. So these are, of each 32, t, t + 8, t + 16 and t + 24 for a thread t of a quad:
those of which one thread has scores.

Codes of 4 bits are halves of bytes (:mod:`netlathe.ir.coded`): a byte has element i in its lower half and
element i + depth / 2 in its upper one. Masked, and shifted, a register of bytes is two, of 4 elements each:
16 bytes of a key are 32 elements. Zero points are taken off sums: of a score as often as a query's elements
add up to; of results, at the end, as often as the weights times their scales do.
"""

_WIDE = {
    "bf16": "__uint_as_float((uint32_t)bits << 16)",
    "f16": "__half2float(__ushort_as_half(bits))",
}


def source(dtype: str) -> str:
    """What the two have in common: Scales, Words, Queries and Results; queries are ``bf16`` or ``f16``."""
    return f"""
// A number for each key of the ring's tiles, which lie behind it: pieces of 16 bytes, the first of which may
// begin `skip` numbers before the tile does.
template <typename T> struct Numbers {{
  static constexpr int kSize = sizeof(T), kPiece = 16 / kSize, kTaken = kKeys + kPiece;
  const T *of_k, *of_v;
  T* held;
  int skip;
  __device__ __forceinline__ Numbers(const void* k, const void* v, int64_t line, void* behind)
      : of_k(static_cast<const T*>(k) + line), of_v(static_cast<const T*>(v) + line),
        held(static_cast<T*>(behind)), skip((int)(line % kPiece)) {{}}
  // Those of keys from `at` to `last`.
  __device__ __forceinline__ void ask(int slot, bool is_values, int at, int last) const {{
#pragma unroll
    for (int piece = threadIdx.x % 32 * kPiece; piece < kTaken; piece += 32 * kPiece) {{
      const int begin = at - skip + piece;
      fetch(static_cast<uint32_t>(__cvta_generic_to_shared(held + slot * kTaken + piece)),
            (is_values ? of_v : of_k) + begin, max(0, min(16, (last - begin) * kSize)));
    }}
  }}
  // That of the key that score i of the thread is of.
  __device__ __forceinline__ T at(int slot, int i) const {{
    return held[slot * kTaken + skip + threadIdx.x % 32 / 4 + i * 8];
  }}
}};
struct Scales {{
  Numbers<Scale> scales;
  Numbers<uint8_t> zeros;  // of 4 bits
  int skip;
  __device__ __forceinline__ Scales(
      const void* k, const void* v, const void* k_zeros, const void* v_zeros, int64_t line, uint8_t* behind)
      : scales(k, v, line, behind),
        zeros(k_zeros, v_zeros, line, behind + kSlots * scales.kTaken * scales.kSize),
        skip(kBits == 4 ? zeros.skip : scales.skip) {{}}
  __device__ __forceinline__ void ask(int slot, bool is_values, int at, int last) const {{
    scales.ask(slot, is_values, at, last);
    if (kBits == 4) zeros.ask(slot, is_values, at, last);
  }}
  __device__ __forceinline__ float scale(int slot, int i) const {{ return real(scales.at(slot, i)); }}
  __device__ __forceinline__ float zero(int slot, int i) const {{ return zeros.at(slot, i); }}
}};
// Of each byte of four the code that it is, or `part` of it is.
__device__ __forceinline__ uint32_t codes(uint32_t bytes, int part) {{
  return kBits == 8 ? bytes : bytes >> part * 4 & 0x0f0f0f0f;
}}
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
          const int at = kBits == 8 ? step * 32 + half * 16 : step * 16 + half * (kDepth / 2);
          const uint16_t* from = q + (n * 4 + g / 2) * kDepth + at + t * 4;
          if (n * 4 + g / 2 < rows) read(of[n][step][half], from);
        }}
  }}
}};
struct Queries {{
  uint32_t x[kSteps][kN][2];
  float scale[kN];  // of the query the thread has scores of
  float whole[kN];  // what its elements, as integers, add up to
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
      float sum = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {{
          uint32_t high, low;
          limbs(value[step][half], kMost / most, high, low);
          x[step][n][half] = g % 2 ? low : high;
#pragma unroll
          for (int i = 0; i < 4; ++i) sum += rintf(value[step][half][i] * (kMost / most));
        }}
      scale[n] = __shfl_sync(0xffffffffu, most, t * 8) * (scale_ / kMost);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      whole[n] = __shfl_sync(0xffffffffu, sum, t * 8);
    }}
  }}
  // Scores of a tile: of key g + 8 i.
  __device__ __forceinline__ void multiply_keys(
      Scores& s, uint32_t tile, const Scales& scales, int slot) const {{
    const int line = threadIdx.x % 16, piece = threadIdx.x % 32 / 16;
#pragma unroll
    for (int m = 0; m < kKeys / 16; ++m) {{
      int d[kN][4] = {{}};
#pragma unroll
      for (int pair = 0; pair < (kBytes + 16) / 32; ++pair) {{
        uint32_t r[4];  // of two pieces of 16 bytes, or of the last one and what is behind it
        load(r, tile + m * 16 * kBytes + place(line, pair * 2 + piece));
        if (kBits == 8) {{
#pragma unroll
          for (int n = 0; n < kN; ++n) multiply(d[n], r, x[pair][n]);
          continue;
        }}
#pragma unroll
        for (int i = 0; i < 2; ++i) {{
          const uint32_t a[4] = {{codes(r[i * 2], 0), codes(r[i * 2 + 1], 0), codes(r[i * 2], 1),
                                 codes(r[i * 2 + 1], 1)}};
          if (pair * 2 + i < kSteps)
#pragma unroll
            for (int n = 0; n < kN; ++n) multiply(d[n], a, x[pair * 2 + i][n]);
        }}
      }}
#pragma unroll
      for (int i = 0; i < 2; ++i) {{
        const int key = m * 2 + i;
        const float by = scales.scale(slot, key), zero = kBits == 4 ? scales.zero(slot, key) : 0.0f;
#pragma unroll
        for (int n = 0; n < kN; ++n) {{
          const float sum = (float)(d[n][i * 2] * 256 + d[n][i * 2 + 1]);
          s[key][n][0] = (kBits == 4 ? sum - zero * whole[n] : sum) * scale[n] * by;
        }}
      }}
    }}
  }}
}};
// Sums of weighted values: of every 16 elements the thread has 2 g and 2 g + 1.
struct Results {{
  float o[kDepth / 16][kN][2] = {{}};
  float zeros[kN] = {{}};  // what zero points of the thread's keys have added to each of them
  __device__ __forceinline__ void shrink(const float (&by)[kN][kOwn]) {{
#pragma unroll
    for (int n = 0; n < kN; ++n) zeros[n] *= by[n][0];
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) o[d][n][i] *= by[n][0];
  }}
  __device__ __forceinline__ void add(Scores& weights, uint32_t tile, const Scales& scales, int slot) {{
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int key = lane % 8 / 2 + lane % 2 * 8 + lane / 8 % 2 * 16 + lane / 16 * 4;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {{
      const float by = scales.scale(slot, i), zero = kBits == 4 ? scales.zero(slot, i) : 0.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {{
        weights[i][n][0] *= by;
        if (kBits == 4) zeros[n] = fmaf(weights[i][n][0], zero, zeros[n]);
      }}
    }}
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
      for (int piece = 0; piece < kBytes / 16; ++piece) {{
        uint32_t r[4];
        load_turned(r, tile + m * 32 * kBytes + place(key, piece));
        const uint32_t bytes[4] = {{
            __byte_perm(r[0], r[1], 0x6420), __byte_perm(r[0], r[1], 0x7531),
            __byte_perm(r[2], r[3], 0x6420), __byte_perm(r[2], r[3], 0x7531)}};
#pragma unroll
        for (int part = 0; part < 8 / kBits; ++part) {{
          const int d = part * (kBytes / 16) + piece;
          const uint32_t a[4] = {{codes(bytes[0], part), codes(bytes[1], part), codes(bytes[2], part),
                                 codes(bytes[3], part)}};
#pragma unroll
          for (int n = 0; n < kN; ++n) {{
            int sums[4] = {{}};
            multiply(sums, a, w[n]);
#pragma unroll
            for (int i = 0; i < 2; ++i)
              o[d][n][i] += (float)(sums[i * 2] * 256 + sums[i * 2 + 1]) * factor[n];
          }}
        }}
      }}
    }}
  }}
  __device__ __forceinline__ void store(float* to) const {{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kN; ++n) {{
      float off = zeros[n];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) off += __shfl_xor_sync(0xffffffffu, off, mask);
#pragma unroll
      for (int d = 0; d < kDepth / 16; ++d)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          to[(n * 4 + t) * kRow + d * 16 + g * 2 + i] = kBits == 4 ? o[d][n][i] - off : o[d][n][i];
    }}
  }}
}};
"""
