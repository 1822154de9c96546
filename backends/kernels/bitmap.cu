// The kernel of bitmap.py, where the layouts are described. Macros that the launcher sets:
//   TILES (groups of 8 tokens of a program), GROUPS (blocks of a program), THREADS, BF16 (else fp16), BIAS,
//   ACTIVATION (0 none, 1 relu, 2 silu, 3 gelu, 4 gelu_tanh), CHUNK, RING (a power of two), AHEAD
// A warp works on one block and one run of its columns; the GROUPS warps of a run share what they read of x.
#define CHUNK_BYTES (CHUNK * 128)
#define RING_BYTES (RING * 128)
#define PLAN_BYTES (32 * 8 + 16)  // of two steps: two words of mask for each lane, and two bases
// The ring, its beginning once more (what a read past the end finds), and four plans.
#define WARP_BYTES (RING_BYTES + CHUNK_BYTES + 4 * PLAN_BYTES)
#define X_BYTES (TILES * 1024)  // of a step: for each half of it and each tile 16 bytes of each lane
#define X_SLOTS 4               // AHEAD + 1, two plans
#if AHEAD != 3
#error "where a step's part of x lies is written for AHEAD 3"
#endif
#define X_PARTS ((2 * TILES + GROUPS - 1) / GROUPS)
typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy16_if(bool wanted, u32 to, const void* from) {
  asm volatile("{ .reg .pred q; setp.ne.u32 q, %0, 0; @q cp.async.cg.shared.global [%1], [%2], 16; }" ::"r"((u32)wanted), "r"(to), "l"(from)
               : "memory");
}
__device__ __forceinline__ void copy16_or_zeros(u32 bytes, u32 to, const void* from) {  // 16 bytes or 0; through L1: programs read the same
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void arrived(u32 run) {  // what the warps of a run committed AHEAD times ago
  asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
#if GROUPS > 1
  asm volatile("bar.sync %0, %1;" ::"r"(run + 1), "n"(32 * GROUPS) : "memory");
#else
  __syncwarp();
#endif
}
__device__ __forceinline__ u32 word(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ uint4 words(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

// What a lane owns of a step: eight places of each of four chains, which advance side by side, because a chain waits for itself. Bit 4 i + c
// of `bits` says that chain c keeps its place i; so four tests in a row are of neighbouring bits, and one instruction makes them.
__device__ __forceinline__ void take(const char* shared, u32 (*to)[8], u32* at, u32 bits) {
  const u32 odd = bits >> 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bool kept[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) kept[c] = (i & 1 ? odd : bits) >> (i / 2 * 8 + c) & 1;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      to[c][i] = 0;
      if (kept[c]) {
        to[c][i] = *(const u16*)(shared + at[c]);
        at[c] += 128;
      }
    }
  }
}

__device__ __forceinline__ void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
#if BF16
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float widen(u16 v) {
  float f;
#if BF16
  asm("mov.b32 %0, {0, %1};" : "=f"(f) : "h"(v));
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
#endif
  return f;
}

__device__ __forceinline__ u16 narrow(float f) {
  u16 v;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}

__device__ __forceinline__ float activate(float y) {
#if ACTIVATION == 1
  return y > 0 ? y : 0;
#elif ACTIVATION == 2
  return y / (1 + expf(-y));
#elif ACTIVATION == 3
  return 0.5f * y * (1 + erff(y * 0.7071067811865476f));
#elif ACTIVATION == 4
  return y / (1 + expf(-1.5957691216057308f * (y + 0.044715f * y * y * y)));
#else
  return y;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) bitmap_linear(
    const u16* __restrict__ x, const char* __restrict__ plans, const char* __restrict__ values, const int* __restrict__ offsets,
    const int* __restrict__ order, const u16* __restrict__ bias, u16* __restrict__ y, int tokens, int rows, int stride_x, int plan_count,
    int blocks) {
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int split = warp / GROUPS, splits = warps / GROUPS, group = warp % GROUPS;
  const bool real = blockIdx.x * GROUPS + group < blocks;  // else a warp does another's work once more, and keeps the result to itself
  const int block = real ? blockIdx.x * GROUPS + group : blocks - 1;
  const int span = (plan_count + splits - 1) / splits, first = split * span, count = max(0, min(plan_count - first, span));
  const int token0 = blockIdx.y * 8 * TILES;
  const int g = lane >> 2, t = lane & 3;
  const int begin = offsets[block * splits + split], chunks = offsets[block * splits + split + 1] - begin;
  const int row = order[block * 16 + (lane & 15)];
  plans += ((long long)block * plan_count + first) * PLAN_BYTES + lane * 16;
  values += (long long)begin * CHUNK_BYTES + lane * 16;
  const u32 ring_at = warp * WARP_BYTES, ring = (u32)__cvta_generic_to_shared(shared) + ring_at;
  const u32 held = ring + RING_BYTES + CHUNK_BYTES;

  int issued = 0;
  auto issue = [&](int until) {
#pragma unroll 1
    for (; issued < until; ++issued) {
      const u32 at = issued * CHUNK_BYTES & (RING_BYTES - 1), to = ring + at + lane * 16;
#pragma unroll
      for (int part = 0; part < CHUNK_BYTES; part += 512) copy16(to + part, values + part);
      if (at == 0)
#pragma unroll
        for (int part = 0; part < CHUNK_BYTES; part += 512) copy16(to + RING_BYTES + part, values + part);
      values += CHUNK_BYTES;
    }
  };
  auto fetch = [&](int plan) {
    copy16_if(plan < count && lane < PLAN_BYTES / 16, held + (plan & 3) * PLAN_BYTES + lane * 16, plans + plan * PLAN_BYTES);
  };
  // Of x each warp of a run copies a part: for some tiles and halves of a step 8 tokens of 32 columns.
  const u32 slots = (u32)__cvta_generic_to_shared(shared) + warps * WARP_BYTES + split * X_SLOTS * X_BYTES + lane * 16;
  const u16* from[X_PARTS];
  u32 bytes[X_PARTS];
#pragma unroll
  for (int i = 0; i < X_PARTS; ++i) {
    const int part = i * GROUPS + group, half = part / TILES, token = token0 + part % TILES * 8 + g;
    bytes[i] = token < tokens ? 16 : 0;
    from[i] = x + (long long)min(token, tokens - 1) * stride_x + first * 128 + half * 32 + 8 * t;
  }
  auto fetch_x = [&](u32 slot, int step) __attribute__((always_inline)) {
    if (step < 2 * count)
#pragma unroll
      for (int i = 0; i < X_PARTS; ++i)
        if (X_PARTS * GROUPS == 2 * TILES || i * GROUPS + group < 2 * TILES)
          copy16_or_zeros(bytes[i], slot + (i * GROUPS + group) * 512, from[i]);
#pragma unroll
    for (int i = 0; i < X_PARTS; ++i) from[i] += 64;
  };
  fetch(0);
  fetch(1);
  for (int step = 0; step < AHEAD; ++step) {
    fetch_x(slots + step * X_BYTES, step);
    issue(min(2 * (step + 1), chunks));
    commit();
  }

  float acc[2][TILES][4];  // of the first and the second 32 columns of all steps: fewer products in a row wait for each other
#pragma unroll
  for (int i = 0; i < 8 * TILES; ++i) acc[0][0][i] = 0;
  u32 v[4][8];  // what the chains hold: of rows g and g + 8 in the first 32 columns, then in the next
  u32 above = 0, below = 0;  // where the chains of rows g and g + 8 stand, in bytes
  for (int plan = 0; plan < count; ++plan) {
    const u32 told = held + (plan & 3) * PLAN_BYTES;
    const u32 own = slots + (plan & 1) * 2 * X_BYTES, other = slots + (~plan & 1) * 2 * X_BYTES;
#pragma unroll
    for (int s = 0; s < 2; ++s) {  // steps of 64 columns
      arrived(split);
      const u32 bits = word(told + lane * 8 + 4 * s), base = word(told + 256 + 4 * s);
      if (s == 0) fetch(plan + 2);
      fetch_x(s ? own : other + X_BYTES, 2 * plan + s + AHEAD);  // where the step before lay
      issue(min((int)(base / CHUNK) + RING / CHUNK, chunks));
      commit();
      above = max(above, base * 128);
      below = max(below, base * 128);
      const u32 middle[2] = {above + 128 * __popc(bits & 0x11111111), below + 128 * __popc(bits & 0x22222222)};
      u32 at[4] = {ring_at + lane * 4 + (above & (RING_BYTES - 1)), ring_at + lane * 4 + 2 + (below & (RING_BYTES - 1)),
                   ring_at + lane * 4 + (middle[0] & (RING_BYTES - 1)), ring_at + lane * 4 + 2 + (middle[1] & (RING_BYTES - 1))};
      above = middle[0] + 128 * __popc(bits & 0x44444444);
      below = middle[1] + 128 * __popc(bits & 0x88888888);
      take(shared, v, at, bits);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32 a[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = __byte_perm(v[2 * h + i / 4][2 * (i % 4)], v[2 * h + i / 4][2 * (i % 4) + 1], 0x5410);
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
          const uint4 b = words(own + s * X_BYTES + (h * TILES + j) * 512);
          multiply(acc[h][j], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
          multiply(acc[h][j], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
        }
      }
    }
  }

  for (int rest = count; rest < span; ++rest) {  // shorter runs pass as many barriers: a tool that looks for races counts them
    arrived(split);
    arrived(split);
  }
  __syncthreads();  // the rings are free
  float* parts = (float*)shared;  // (splits, groups, tokens, 16)
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[(warp * 8 * TILES + 8 * j + 2 * t + (i & 1)) * 16 + g + 8 * (i >> 1)] = acc[0][j][i] + acc[1][j][i];
  __syncthreads();
  for (int place = split * 32 + lane; place < 128 * TILES; place += splits * 32) {
    const int token = token0 + (place >> 4);
    if (token >= tokens || row >= rows || !real) continue;
    float total = 0;
    for (int s = 0; s < splits; ++s) total += parts[(s * GROUPS + group) * 128 * TILES + place];
#if BIAS
    total += widen(bias[row]);
#endif
    y[(long long)token * rows + row] = narrow(activate(total));
  }
}
