"""Device code that merges the parts of decoding: those of a block's warps, and those of blocks.

It is a part of :mod:`netlathe.backends.tvm.cuda.decode`. A part of a row is kRow floats: sums of weighted
values, the largest score, the sum of weights. Parts are added in the same order each time.
"""

TEAMS = 4  # teams that share the parts of a row


def source() -> str:
    """The functions; kDepth and kRow are the shape's."""
    return f"""
// Four columns of a row, as several parts add up to them.
struct Sum {{
  float top = -INFINITY, whole = 0.0f;
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  // `rest`: the part's largest score and its sum of weights.
  __device__ __forceinline__ void add(const float4& part, const float2& rest) {{
    const float most = fmaxf(top, rest.x), zero = most == -INFINITY ? 0.0f : most;
    const float own = power(top - zero), other = power(rest.x - zero);
    value.x = value.x * own + part.x * other, value.y = value.y * own + part.y * other;
    value.z = value.z * own + part.z * other, value.w = value.w * own + part.w * other;
    whole = whole * own + rest.y * other, top = most;
  }}
  __device__ __forceinline__ void store(float* row, int column) const {{
    *reinterpret_cast<float4*>(row + column) = value;
    if (column == 0) *reinterpret_cast<float2*>(row + kDepth) = make_float2(top, whole);
  }}
}};
// A column of a row, `block` of [heads of keys, rows]: its parts as one. Each of {TEAMS} teams of kDepth
// threads takes every {TEAMS}th part, 16 at a time; the result is that of the first.
__device__ __forceinline__ float merged(
    float* shared, const void* work, int64_t block, int64_t parts_, int64_t rows_) {{
  const int parts = (int)parts_, rows = (int)rows_, lane = threadIdx.x % 32;
  const int team = threadIdx.x / kDepth, column = threadIdx.x % kDepth;
  const int64_t stride = (int64_t)rows * kRow;
  const float* from = static_cast<const float*>(work);
  from += ((int)block / rows * parts + team) * stride + (int)block % rows * kRow;
  float top = -INFINITY, value = 0.0f, sum = 0.0f;
  for (int left = parts - team; left > 0; left -= 16 * {TEAMS}, from += 16 * {TEAMS} * stride) {{
    const bool own = lane < 16 && lane * {TEAMS} < left;
    const float score = own ? from[lane * {TEAMS} * stride + kDepth] : -INFINITY;
    const float weights = own ? from[lane * {TEAMS} * stride + kDepth + 1] : 0.0f;
    float held[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      held[i] = i * {TEAMS} < left ? from[i * {TEAMS} * stride + column] : 0.0f;
    float most = fmaxf(top, score);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
    const float zero = most == -INFINITY ? 0.0f : most;
    const float factor = power(score - zero), shrink = power(top - zero);
    top = most;
    sum = sum * shrink + factor * weights;
    value *= shrink;
#pragma unroll
    for (int i = 0; i < 16; ++i) value += __shfl_sync(0xffffffffu, factor, i) * held[i];
  }}
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  float* row = shared + team * kRow;
  row[column] = value;
  if (column == 0) row[kDepth] = top, row[kDepth + 1] = sum;
  __syncthreads();
  value = 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < {TEAMS}; ++i) top = fmaxf(top, shared[i * kRow + kDepth]);
  const float zero = top == -INFINITY ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < {TEAMS}; ++i) {{
    const float factor = power(shared[i * kRow + kDepth] - zero);
    value += factor * shared[i * kRow + column];
    sum += factor * shared[i * kRow + kDepth + 1];
  }}
  return sum == 0.0f ? 0.0f : value / sum;
}}
"""
