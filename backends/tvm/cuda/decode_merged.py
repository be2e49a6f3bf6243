"""Device code that merges the parts of decoding: those of a block's warps, and those of blocks.

It is a part of :mod:`netlathe.backends.tvm.cuda.decode`. A part of a row is kRow floats: sums of weighted
values, the largest score, the sum of weights. Parts are added in the same order each time.
"""

# Of a block that merges what blocks have left: threads, and columns that it merges. Many small blocks read
# their share of the parts sooner than few large ones.
THREADS, COLUMNS = 128, 32


def source(warps: int) -> str:
    """The functions; kDepth and kRow are the shape's. A block of the first kernel has ``warps``."""
    return f"""
// What a part with this largest score is multiplied with beside one whose largest is `top`.
__device__ __forceinline__ float shrunk(float score, float top) {{
  return power(score - (top == -INFINITY ? 0.0f : top));
}}
// Two columns of a row as the block's warps add up to them, whose parts are `stride` floats apart.
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
  if (column == 0) *reinterpret_cast<float2*>(to + kDepth) = make_float2(top, whole);
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
// {COLUMNS} columns of a row, `block` of [heads of keys, rows, columns], as all its parts add up to them: the
// result of thread i is that of column i. {THREADS // 8} parts are read at a time, by 8 threads each.
__device__ __forceinline__ float merged(
    float* shared, const void* work, int64_t block, int64_t parts_, int64_t rows_) {{
  constexpr int kAcross = kDepth / {COLUMNS}, kTeams = {THREADS // 8};
  const int parts = (int)parts_, rows = (int)rows_, row = (int)block / kAcross, stride = rows * kRow;
  const int lane = threadIdx.x % 32, own = threadIdx.x / 8;
  const int column = (int)block % kAcross * {COLUMNS} + threadIdx.x % 8 * 4;
  const float* from = static_cast<const float*>(work);
  from += (int64_t)(row / rows) * parts * stride + row % rows * kRow;
  let_go();
  wait_in_front();
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float score = -INFINITY, top = -INFINITY, sum = 0.0f;
  if (own < parts) {{
    value = *reinterpret_cast<const float4*>(from + own * stride + column);
    score = from[own * stride + kDepth];
  }}
  // Every warp finds the largest score and the sum of weights itself.
  for (int i = lane; i < parts; i += 32) {{
    const float2 rest = *reinterpret_cast<const float2*>(from + i * stride + kDepth);
    const float most = fmaxf(top, rest.x);
    sum = sum * shrunk(top, most) + rest.y * shrunk(rest.x, most), top = most;
  }}
  float most = top;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
  sum *= shrunk(top, most);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  const float factor = shrunk(score, most);
  value.x *= factor, value.y *= factor, value.z *= factor, value.w *= factor;
  for (int i = own + kTeams; i < parts; i += kTeams) {{
    const float4 next = *reinterpret_cast<const float4*>(from + i * stride + column);
    const float other = shrunk(from[i * stride + kDepth], most);
    value.x += next.x * other, value.y += next.y * other;
    value.z += next.z * other, value.w += next.w * other;
  }}
#pragma unroll
  for (int mask = 8; mask < 32; mask *= 2) {{
    value.x += __shfl_xor_sync(0xffffffffu, value.x, mask);
    value.y += __shfl_xor_sync(0xffffffffu, value.y, mask);
    value.z += __shfl_xor_sync(0xffffffffu, value.z, mask);
    value.w += __shfl_xor_sync(0xffffffffu, value.w, mask);
  }}
  if (lane < 8) reinterpret_cast<float4*>(shared)[threadIdx.x / 32 * 8 + lane] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < {THREADS // 32}; ++i) total += shared[i * {COLUMNS} + lane];
  return sum == 0.0f ? 0.0f : __fdividef(total, sum);
}}
"""
