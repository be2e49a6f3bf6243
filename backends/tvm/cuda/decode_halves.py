"""Device code of decoding over a cache of halves: mma.m16n8k16 (PTX ISA 8.5, section 9.7.13.4.8).

It is a part of :mod:`netlathe.backends.tvm.cuda.decode`; beside it,
:mod:`netlathe.backends.tvm.cuda.decode_bytes` is for caches of int8. A product has 8 queries, of which each
thread has results of two; values are transposed as they are read from shared memory, and weights, which are
keys by queries, by an instruction of their own.
"""


def source(dtype: str) -> str:
    """What the two have in common: Scales, Words, Queries and Results; ``dtype`` is ``bf16`` or ``f16``."""
    return f"""
struct Scales {{  // of which a cache of halves has none
  static constexpr int skip = 0;
  __device__ Scales(const void*, const void*, const void*, const void*, int64_t, void*) {{}}
  __device__ void ask(int, bool, int, int) const {{}}
}};
__device__ __forceinline__ void multiply(float* d, const uint32_t* a, const uint32_t* b) {{
  asm("mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}},"
      " {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}}
// What a thread has of queries, as they are in memory: zeros where there are no more `rows`.
struct Words {{
  uint32_t of[kSteps][kN][2] = {{}};
  __device__ __forceinline__ void load(const uint16_t* q, int rows) {{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {{
          const uint16_t* from = q + (n * 8 + g) * kDepth + step * 16 + half * 8 + t * 2;
          if (n * 8 + g < rows) read(of[step][n][half], from);
        }}
  }}
}};
struct Queries {{
  const Words& words;
  float scale;
  __device__ __forceinline__ Queries(const Words& words_, float scale_) : words(words_), scale(scale_) {{}}
  // Scores of a tile: of key g + 8 i.
  __device__ __forceinline__ void multiply_keys(Scores& s, uint32_t tile, const Scales&, int) const {{
    const int key = threadIdx.x % 16, piece = threadIdx.x % 32 / 16;
#pragma unroll
    for (int m = 0; m < kKeys / 16; ++m) {{
      float d[kN][4] = {{}};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {{
        uint32_t a[4];
        load(a, tile + m * 16 * kBytes + place(key, step * 2 + piece));
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply(d[n], a, words.of[step][n]);
      }}
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m * 2 + i / 2][n][i % 2] = d[n][i] * scale;
    }}
  }}
}};
// Sums of weighted values: of every 16 elements the thread has g and g + 8.
struct Results {{
  float o[kDepth / 16][kN][4] = {{}};
  __device__ __forceinline__ void shrink(const float (&by)[kN][kOwn]) {{
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[d][n][i] *= by[n][i % 2];
  }}
  __device__ __forceinline__ void add(const Scores& weights, uint32_t tile, const Scales&, int) {{
    const int lane = threadIdx.x % 32, key = lane / 16 * 8 + lane % 8, piece = lane / 8 % 2;
#pragma unroll
    for (int m = 0; m < kKeys / 16; ++m) {{
      uint32_t w[kN][2];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {{
          const float* pair = weights[m * 2 + half][n];
          asm("cvt.rn.{dtype}x2.f32 %0, %1, %2;" : "=r"(w[n][half]) : "f"(pair[1]), "f"(pair[0]));
          asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(w[n][half]));
        }}
#pragma unroll
      for (int d = 0; d < kDepth / 16; ++d) {{
        uint32_t a[4];
        load_turned(a, tile + m * 16 * kBytes + place(key, d * 2 + piece));
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply(o[d][n], a, w[n]);
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
        for (int i = 0; i < 4; ++i)
          to[(n * 8 + t * 2 + i % 2) * kRow + d * 16 + i / 2 * 8 + g] = o[d][n][i];
  }}
}};
"""
