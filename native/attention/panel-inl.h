// Sizes of attention's panels, and elements of any type. HEDDLE_ATTENTION_ROWS is set by isa_<isa>.cpp: the rows of
// a micro-kernel, so that rows x 2 sums, 2 columns and 1 broadcast fill the registers.

constexpr int kRows = HEDDLE_ATTENTION_ROWS;
constexpr int kRowStride = (kRows + W - 1) / W * W;  // of packed q
constexpr int kColumns = 2 * W;                      // of a micro-kernel
constexpr int kSub = 32;                             // keys that are computed or skipped together
constexpr int kMaxPanel = 512;                       // keys packed together
constexpr int kScoreStride = kMaxPanel + 16;         // not a power of two: rows would alias in L1
constexpr bool kLazyShift = W >= 16;                 // see weigh_by_shift; exp2_lanes must take any x
constexpr float kLargestSum = 65536.0f;              // of a panel's weights before a row's shift is raised
static_assert(kSub % kColumns == 0, "a sub-panel is whole micro-kernels");

// Keys of a panel: K and V together at most half a MiB. It depends on the head dims alone, as the sums do.
HEDDLE_INLINE int panel_keys(int dim, int value_dim) {
  int n = kMaxPanel;
  while (n > kSub && n * (dim + value_dim) * 4 > (512 << 10)) n /= 2;
  return n;
}

struct Run {  // sub-panels [begin, end) of a panel
  int begin, end;
};

HEDDLE_INLINE int64_t dtype_bytes(DType type) { return type == DType::kFloat32 ? 4 : type == DType::kInt8 ? 1 : 2; }

HEDDLE_INLINE vf load_float(const void* p, DType type, int64_t i, int n) {
  if (type == DType::kFloat32) {
    const float* f = static_cast<const float*>(p) + i;
    return n >= W ? load(f) : load_n(f, n, 0.0f);
  }
  if (type == DType::kInt8) {
    return to_float(sra<24>(shl<24>(load_bytes(static_cast<const uint8_t*>(p) + i, n < W ? n : W))));
  }
  const uint16_t* h = static_cast<const uint16_t*>(p) + i;
  if (type == DType::kBFloat16) return n >= W ? load_bf16(h) : load_bf16_n(h, n);
  return n >= W ? load_f16(h) : load_f16_n(h, n);
}

HEDDLE_INLINE float read_float(const void* p, DType type, int64_t i) {
  if (type == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return type == DType::kBFloat16 ? bf16_to_float(h) : f16_to_float(h);
}

HEDDLE_INLINE void store_float(void* p, DType type, int64_t i, vf v, int n) {
  if (type == DType::kFloat32) {
    float* f = static_cast<float*>(p) + i;
    return n >= W ? store(f, v) : store_n(f, v, n);
  }
  uint16_t* h = static_cast<uint16_t*>(p) + i;
  if (type == DType::kBFloat16) return n >= W ? store_bf16(h, v) : store_bf16_n(h, v, n);
  return n >= W ? store_f16(h, v) : store_f16_n(h, v, n);
}

// Vectors of a strided tensor, found by the index of their first element.
struct Vectors {
  const void* data;
  DType type;
  int64_t element_stride;
  int dim;
};

// The index of a vector of zeros. (A prefix may lie before the tensor, at a negative index.)
constexpr int64_t kNoVector = INT64_MIN;

// Elements [d, d + W) of the vector at `at`, zeros beyond its end.
HEDDLE_INLINE vf load_lanes(const Vectors& x, int64_t at, int d) {
  if (at == kNoVector) return set1(0.0f);
  const int n = x.dim - d;
  if (x.element_stride == 1) return load_float(x.data, x.type, at + d, n);
  float t[W] = {};
  for (int i = 0; i < W && i < n; ++i) t[i] = read_float(x.data, x.type, at + (d + i) * x.element_stride);
  return load(t);
}
