// What every file of tile products shares: prefetching and the table of kernels by number of rows. Included inside
// a region.

// A tile that has its panel to itself streams it: bytes ahead of the current step that are asked into L1 and into L2.
// The hardware prefetcher stops at every 4 KiB page, and L1's few line fill buffers cannot cover the latency of memory:
// asking 8 KiB ahead into L2 brought a stream over weights from 25 to 30 GB/s at 1 to 2 rows and from 22 to 26 at 8 (two
// cores, 33 GB/s peak).
constexpr int64_t kNear = 1024, kFar = 8192;

// The requests of N steps from `step` on. They take a load slot each, so one line is asked once: where several tiles
// share a block, the first brings it to L1 and all of them bring what follows to L2.
template <int N>
HEDDLE_INLINE void prefetch_steps(const TileCall& t, const char* b, int64_t step) {
  if (t.prefetch) {
    const char* at = t.prefetch + step * t.prefetch_stride;
    HEDDLE_UNROLL(4)
    for (int i = 0; i < N; ++i) {
      if (i == 0 || N * t.prefetch_stride > 64 * i) HEDDLE_PREFETCH_L2(at + 64 * i);
    }
  }
  if (t.resident) return;
  const char* at = b + step * kStepBytes;
  HEDDLE_UNROLL(8)
  for (int i = 0; i < 2 * N; ++i) {
    if (!t.prefetch) HEDDLE_PREFETCH_L2(at + kFar + 64 * i);
    HEDDLE_PREFETCH(at + kNear + 64 * i);
  }
}

// The same for a panel that is widened step by step.
HEDDLE_INLINE void prefetch_near(const int32_t* step) {
  HEDDLE_PREFETCH(reinterpret_cast<const char*>(step) + kNear);
  HEDDLE_PREFETCH(reinterpret_cast<const char*>(step) + kNear + 64);
}

// Bits of 2^(e - 127) / 2 of an e8m0 exponent, the scale of doubled E2M1 values. e = 0 and 1 need subnormals.
HEDDLE_INLINE int32_t e8m0_half(int32_t e) {
  const int32_t normal = static_cast<int32_t>(static_cast<uint32_t>(e - 1) << 23), tiny = e > 0 ? 0x00400000 : 0x00200000;
  return normal > tiny ? normal : tiny;
}

template <template <int> class Kernel, int MR>
HEDDLE_INLINE void fill_kernels(TileKernels& k) {
  if constexpr (MR > 0) {
    k.tile[MR] = Kernel<MR>::run;
    fill_kernels<Kernel, MR - 1>(k);
  }
}
template <template <int> class Kernel, int MR>
HEDDLE_INLINE TileKernels make_kernels() {
  TileKernels t;
  t.max_rows = MR;
  fill_kernels<Kernel, MR>(t);
  return t;
}
