// The kernel of bitmap.py, where the layouts are described. Macros that the launcher sets:
//   TILES (groups of 8 tokens of a program), ORDERED (x lies as the operands want it), BF16 (else fp16), BIAS,
//   ACTIVATION (0 none, 1 relu, 2 silu, 3 gelu, 4 gelu_tanh), CHUNK, RING (a power of two), AHEAD
#define CHUNK_BYTES (CHUNK * 128)
#define RING_BYTES (RING * 128)
#define PLAN_BYTES (32 * 8 + 16)  // of two steps: two words of mask for each lane, and two bases
// The ring, its beginning once more (what a read past the end finds), and four plans.
#define WARP_BYTES (RING_BYTES + CHUNK_BYTES + 4 * PLAN_BYTES)
typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy16_if(bool wanted, u32 to, const void* from) {
  asm volatile("{ .reg .pred q; setp.ne.u32 q, %0, 0; @q cp.async.cg.shared.global [%1], [%2], 16; }" ::"r"((u32)wanted), "r"(to), "l"(from)
               : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void arrived() {  // what was committed AHEAD times ago
  asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
  __syncwarp();
}
__device__ __forceinline__ u32 word(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void read(uint4& to, bool wanted, const void* from) {  // zeros where it is not wanted
  to = make_uint4(0, 0, 0, 0);
  asm volatile("{ .reg .pred q; setp.ne.u32 q, %4, 0; @q ld.global.nc.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%5]; }"
               : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w) : "r"((u32)wanted), "l"(from));
}
// The next value of a chain where its bit is set. `one` is 1, but the compiler must not know: additions and masks share a pipe, which is full;
// multiplications have their own.
#define TAKE(v, p, m, bit) \
  asm volatile("{ .reg .pred q; .reg .b32 t; and.b32 t, %2, %3; setp.ne.u32 q, t, 0;" \
               "@q ld.shared.u16 %0, [%1]; @q mad.lo.u32 %1, %4, 128, %1; }" \
               : "+r"(v), "+r"(p) : "r"(m), "r"(1u << (bit)), "r"(one))


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

extern "C" __global__ void __launch_bounds__(256) bitmap_linear(
    const u16* __restrict__ x, const char* __restrict__ plans, const char* __restrict__ values, const int* __restrict__ offsets,
    const int* __restrict__ order, const u16* __restrict__ bias, u16* __restrict__ y, int tokens, int rows, int columns, int stride_x,
    int plan_count, u32 one) {
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x & 31, split = threadIdx.x >> 5, splits = blockDim.x >> 5, block = blockIdx.x;
  const int span = (plan_count + splits - 1) / splits, first = split * span, count = max(0, min(plan_count - first, span));
  const int token0 = blockIdx.y * 8 * TILES;
  const int g = lane >> 2, t = lane & 3;
  const int begin = offsets[block * splits + split], chunks = offsets[block * splits + split + 1] - begin;
  plans += ((long long)block * plan_count + first) * PLAN_BYTES + lane * 16;
  values += (long long)begin * CHUNK_BYTES + lane * 16;
  const u32 ring = (u32)__cvta_generic_to_shared(shared) + split * WARP_BYTES;
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
  fetch(0);
  fetch(1);
  for (int step = 0; step < AHEAD; ++step) {
    issue(min(2 * (step + 1), chunks));
    commit();
  }

  float acc[TILES][4];
  uint4 b[2][TILES];  // operands made of x, of two times 32 columns
#if ORDERED  // (groups of 8 tokens, columns / 32, 32 lanes, 8)
  const u16* mine = x + (long long)blockIdx.y * TILES * 8 * columns + (long long)first * 1024 + lane * 8;
  const long long tile_stride = 8 * columns;
  const int part_stride = 256;
#else  // (tokens, columns)
  const u16* mine = x + (long long)(token0 + g) * stride_x + first * 128 + 8 * t;
  const long long tile_stride = 8 * stride_x;
  const int part_stride = 32;
#endif
  int left = count * 4;
  auto load = [&](uint4* to, int part) {
#pragma unroll
    for (int j = 0; j < TILES; ++j)
      read(to[j], left > part && (ORDERED || token0 + 8 * j + g < tokens), mine + j * tile_stride + part * part_stride);
  };
  load(b[0], 0);
  load(b[1], 1);
#pragma unroll
  for (int j = 0; j < TILES; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
  u32 above = 0, below = 0;  // where the chains of rows g and g + 8 stand, in bytes
  for (int plan = 0; plan < count; ++plan) {
    const u32 told = held + (plan & 3) * PLAN_BYTES;
    u32 bits;
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      if (h % 2 == 0) {  // a step of 64 columns begins
        arrived();
        bits = word(told + lane * 8 + 2 * h);
        const u32 base = word(told + 256 + 2 * h);
        if (h == 0) fetch(plan + 2);
        issue(min((int)(base / CHUNK) + RING / CHUNK, chunks));
        commit();
        above = max(above, base * 128);
        below = max(below, base * 128);
      }
      u32 p = ring + lane * 4 + (above & (RING_BYTES - 1)), q = ring + lane * 4 + 2 + (below & (RING_BYTES - 1));
      above -= p;
      below -= q;
      u32 a[4], c[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 v0 = 0, v1 = 0, w0 = 0, w1 = 0;
        TAKE(v0, p, bits, 8 * (h % 2) + 2 * i);
        TAKE(w0, q, bits, 16 + 8 * (h % 2) + 2 * i);
        TAKE(v1, p, bits, 8 * (h % 2) + 2 * i + 1);
        TAKE(w1, q, bits, 16 + 8 * (h % 2) + 2 * i + 1);
        a[i] = v1 * 65536 + v0;
        c[i] = w1 * 65536 + w0;
      }
      above += p;
      below += q;
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        multiply(acc[j], a[0], c[0], a[1], c[1], b[h % 2][j].x, b[h % 2][j].y);
        multiply(acc[j], a[2], c[2], a[3], c[3], b[h % 2][j].z, b[h % 2][j].w);
      }
      load(b[h % 2], h + 2);
    }
    mine += 4 * part_stride;
    left -= 4;
  }

  __syncthreads();  // the rings are free
  float* parts = (float*)shared;  // (splits, tokens, 16)
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[(split * 8 * TILES + 8 * j + 2 * t + (i & 1)) * 16 + g + 8 * (i >> 1)] = acc[j][i];
  __syncthreads();
  for (int place = threadIdx.x; place < 128 * TILES; place += blockDim.x) {
    const int row = order[block * 16 + (place & 15)], token = token0 + (place >> 4);
    if (token >= tokens || row >= rows) continue;
    float total = 0;
    for (int s = 0; s < splits; ++s) total += parts[s * 128 * TILES + place];
#if BIAS
    total += widen(bias[row]);
#endif
    y[(long long)token * rows + row] = narrow(activate(total));
  }
}
