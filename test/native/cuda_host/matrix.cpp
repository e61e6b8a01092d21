// What a warp's matrix instructions compute, on the copies of registers that matrix.h hands over.
#include "interpreter.h"

namespace cuda_host {

namespace {

// left[row][k] and right[k][column] from words of Elements each.
template <int Elements, class T, class Widen>
void spread(void* const* lanes, T (&left)[16][8 * Elements], T (&right)[8 * Elements][8], const Widen& widen) {
  for (int l = 0; l < 32; ++l) {
    const auto& m = *static_cast<const Mma<T>*>(lanes[l]);
    const int g = l / 4, k = l % 4 * Elements;
    for (int e = 0; e < Elements; ++e) {
      for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][i / 2 * 4 * Elements + k + e] = widen(m.a[i], e);
      for (int i = 0; i < 2; ++i) right[i * 4 * Elements + k + e][g] = widen(m.b[i], e);
    }
  }
}

// d += left right, k ascending.
template <int Elements, class T, class Widen>
void multiply(void* const* lanes, const Widen& widen) {
  T left[16][8 * Elements], right[8 * Elements][8];
  spread<Elements>(lanes, left, right, widen);
  for (int r = 0; r < 16; ++r) {
    T sum[8] = {};
    for (int k = 0; k < 8 * Elements; ++k) {
      for (int c = 0; c < 8; ++c) sum[c] += left[r][k] * right[k][c];
    }
    for (int c = 0; c < 8; ++c) static_cast<Mma<T>*>(lanes[r % 8 * 4 + c / 2])->d[r / 8 * 2 + c % 2] += sum[c];
  }
}

}  // namespace

void run_mma_bf16(void* const* lanes, uint32_t) {
  multiply<2, float>(lanes, [](uint32_t w, int e) { return heddle::bf16_to_float(static_cast<uint16_t>(w >> (e * 16))); });
}
void run_mma_f16(void* const* lanes, uint32_t) {
  multiply<2, float>(lanes, [](uint32_t w, int e) { return heddle::f16_to_float(static_cast<uint16_t>(w >> (e * 16))); });
}
void run_mma_s8(void* const* lanes, uint32_t) {
  multiply<4, int32_t>(lanes, [](uint32_t w, int e) { return int32_t{static_cast<int8_t>(w >> (e * 8))}; });
}

void run_ldmatrix(void* const* lanes, uint32_t) {
  auto mine = [&](int l) { return static_cast<MatrixLoad*>(lanes[l]); };
  const bool transposed = mine(0)->transposed;
  for (int i = 0; i < mine(0)->count; ++i) {
    const uint16_t* m[8];
    for (int r = 0; r < 8; ++r) m[r] = mine(i * 8 + r)->row;
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4 * 2;
      const uint32_t low = transposed ? m[t][g] : m[g][t], high = transposed ? m[t + 1][g] : m[g][t + 1];
      mine(l)->r[i] = low | high << 16;
    }
  }
}

}  // namespace cuda_host
