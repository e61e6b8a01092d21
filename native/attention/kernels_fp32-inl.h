// fp32 products on any instruction set.
namespace single {

constexpr int kPair = 1;

HEDDLE_INLINE vf mac(vf x, vf b, vf sum) { return fma(x, b, sum); }
HEDDLE_INLINE vf load_steps(const Vectors& x, int64_t at, int d) { return load_lanes(x, at, d); }
HEDDLE_INLINE vf interleave(const Vectors& x, const int64_t* at, int c, vf* check) {
  const vf v = load_lanes(x, at[0], c);
  *check = fma(v, set1(0.0f), *check);
  return v;
}
HEDDLE_INLINE vf keep_weighted(float x, vf b) { return x == 0.0f ? set1(0.0f) : b; }
HEDDLE_INLINE void store_weights(float* row, int j, vf e) { store(row + j, e); }

#include "attention/micro-inl.h"

}  // namespace single
