"""Device code that merges the parts of decoding: those of a block's warps, and those of blocks.

It is a part of :mod:`netlathe.backends.tvm.cuda.decode`. A part of a row is kRow floats: sums of weighted
values, the largest score, the sum of weights, two zeros. Parts are added in the same order each time.

Zeros are there so that parts leave no gap: with gaps a call of one sequence took longer. The level-2 cache
keeps 32 bytes at a time, and of those that are not wholly written it probably reads the rest from memory when
the merging kernel asks for them.
"""

# Of a block that merges what blocks have left: threads, and columns that it merges. Many small blocks read
# their share of the parts sooner than few large ones.
THREADS, COLUMNS = 128, 32
_TEAMS, _AT_ONCE = THREADS // 32, 4
# Floats of shared memory. It lies beside the rings of blocks that decode: more of it lets those start later.
SHARED = THREADS + 2 * _TEAMS


def source(warps: int) -> str:
    """The functions; kDepth and kRow are the shape's. A block of the first kernel has ``warps``."""
    return f"""
// What a part with this largest score is multiplied with beside one whose largest is `top`.
__device__ __forceinline__ float shrunk(float score, float top) {{
  return weight(score, top == -INFINITY ? 0.0f : top);
}}
// Two columns of a row as the block's warps add up to them, whose parts are `stride` floats apart. Nothing of
// the row is left out.
__device__ __forceinline__ void merge_warps(const float* row, int stride, int column, float* to) {{
  float2 part[{warps}], rest[{warps}];
#pragma unroll
  for (int i = 0; i < {warps}; ++i) {{
    part[i] = *reinterpret_cast<const float2*>(row + i * stride + column);
    rest[i] = *reinterpret_cast<const float2*>(row + i * stride + kDepth);
  }}
  float top = rest[0].x, whole = 0.0f;
#pragma unroll
  for (int i = 1; i < {warps}; ++i) top = fmaxf(top, rest[i].x);
  float2 value = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int i = 0; i < {warps}; ++i) {{
    const float factor = shrunk(rest[i].x, top);
    value.x += part[i].x * factor, value.y += part[i].y * factor, whole += rest[i].y * factor;
  }}
  *reinterpret_cast<float2*>(to + column) = value;
  static_assert(kRow == kDepth + 4);
  if (column == 0) *reinterpret_cast<float4*>(to + kDepth) = make_float4(top, whole, 0.0f, 0.0f);
}}
// The result in one column, where there is no part but theirs.
__device__ __forceinline__ float merged_warps(const float* row, int stride, int column) {{
  float part[{warps}], top = -INFINITY, value = 0.0f, whole = 0.0f;
  float2 rest[{warps}];
#pragma unroll
  for (int i = 0; i < {warps}; ++i) {{
    part[i] = row[i * stride + column], rest[i] = *reinterpret_cast<const float2*>(row + i * stride + kDepth);
    top = fmaxf(top, rest[i].x);
  }}
#pragma unroll
  for (int i = 0; i < {warps}; ++i) {{
    const float factor = shrunk(rest[i].x, top);
    value += part[i] * factor, whole += rest[i].y * factor;
  }}
  return whole == 0.0f ? 0.0f : __fdividef(value, whole);
}}
// {COLUMNS} columns of a row, `block` of [heads of keys, rows, columns], as all its parts add up to them: a
// thread's result is that of its lane's column. A warp reads every {_TEAMS}th part, {_AT_ONCE} at one time.
__device__ __forceinline__ float merged(
    float* shared, const void* work, int64_t block, int64_t parts_, int64_t rows_) {{
  constexpr int kAcross = (kDepth + {COLUMNS - 1}) / {COLUMNS}, kTeams = {_TEAMS}, kAtOnce = {_AT_ONCE};
  const int parts = (int)parts_, rows = (int)rows_, row = (int)block / kAcross, stride = rows * kRow;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own = (int)block % kAcross * {COLUMNS} + lane;
  const int column = kDepth % {COLUMNS} ? min(own, kDepth - 1) : own;
  const float* from = static_cast<const float*>(work);
  from += (int64_t)(row / rows) * parts * stride + row % rows * kRow;
  let_go();
  wait_in_front();
  float top = -INFINITY, value = 0.0f, whole = 0.0f;
  // One more beside what is there: its column, its largest score and its sum of weights.
  auto add = [&](float other, float2 rest) {{
    const float factor = shrunk(rest.x, top);
    value += other * factor, whole += rest.y * factor;
  }};
  for (int i = warp; i < parts; i += kTeams * kAtOnce) {{
    const float before = top;
    float next[kAtOnce];
    float2 rest[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {{
      const float* part = from + (i + j * kTeams) * stride;
      const bool is_there = i + j * kTeams < parts;
      next[j] = is_there ? part[column] : 0.0f;
      rest[j] = is_there ? *reinterpret_cast<const float2*>(part + kDepth) : make_float2(-INFINITY, 0.0f);
    }}
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) top = fmaxf(top, rest[j].x);
    const float shrink = shrunk(before, top);
    value *= shrink, whole *= shrink;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) add(next[j], rest[j]);
  }}
  float2* tops = reinterpret_cast<float2*>(shared + {THREADS});
  shared[threadIdx.x] = value;
  if (lane == 0) tops[warp] = make_float2(top, whole);
  __syncthreads();
  float2 rest[kTeams];
  top = -INFINITY, value = 0.0f, whole = 0.0f;
#pragma unroll
  for (int i = 0; i < kTeams; ++i) rest[i] = tops[i], top = fmaxf(top, rest[i].x);
#pragma unroll
  for (int i = 0; i < kTeams; ++i) add(shared[i * 32 + lane], rest[i]);
  return whole == 0.0f ? 0.0f : __fdividef(value, whole);
}}
"""
