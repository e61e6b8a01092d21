// Matrix instructions: the last lane to arrive computes for the whole warp, on the lanes' own registers.
#include "interpreter.h"

namespace cuda_host {

namespace {
struct Mma {
  void* d;
  const uint32_t *a, *b;
  float (*widen)(uint16_t);
};
// Byte or 16-bit element k of row or column `line` of a fragment spread over the warp.
int slot(int line, int k, int per_register, int* lane) {
  const int t = k / per_register % 4;
  *lane = line % 8 * 4 + t;
  return k / (4 * per_register);  // which half of k
}
}  // namespace

void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t)) {
  Mma m{d, a, b, widen};
  collective(
      0xffffffffu,
      [](void* const* lanes, uint32_t) {
        auto mine = [&](int l) { return static_cast<Mma*>(lanes[l]); };
        float left[16][16], right[8][16];
        int lane = 0;
        for (int k = 0; k < 16; ++k) {
          for (int r = 0; r < 16; ++r) {
            const int half = slot(r, k, 2, &lane);
            left[r][k] = mine(lane)->widen(static_cast<uint16_t>(mine(lane)->a[half * 2 + r / 8] >> (k % 2 * 16)));
          }
          for (int c = 0; c < 8; ++c) {
            const int half = slot(c, k, 2, &lane);
            right[c][k] = mine(lane)->widen(static_cast<uint16_t>(mine(lane)->b[half] >> (k % 2 * 16)));
          }
        }
        for (int l = 0; l < 32; ++l) {
          for (int i = 0; i < 4; ++i) {
            const int r = l / 4 + i / 2 * 8, c = l % 4 * 2 + i % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += left[r][k] * right[c][k];
            static_cast<float*>(mine(l)->d)[i] += sum;
          }
        }
      },
      &m, 0);
}

void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma m{d, a, b, nullptr};
  collective(
      0xffffffffu,
      [](void* const* lanes, uint32_t) {
        auto mine = [&](int l) { return static_cast<Mma*>(lanes[l]); };
        auto byte = [](uint32_t word, int k) { return static_cast<int32_t>(static_cast<int8_t>(word >> (k % 4 * 8))); };
        for (int l = 0; l < 32; ++l) {
          for (int i = 0; i < 4; ++i) {
            const int r = l / 4 + i / 2 * 8, c = l % 4 * 2 + i % 2;
            int32_t sum = static_cast<int32_t*>(mine(l)->d)[i];
            for (int k = 0; k < 32; ++k) {
              int from = 0;
              int half = slot(r, k, 4, &from);
              const int32_t x = byte(mine(from)->a[half * 2 + r / 8], k);
              half = slot(c, k, 4, &from);
              sum += x * byte(mine(from)->b[half], k);
            }
            static_cast<int32_t*>(mine(l)->d)[i] = sum;
          }
        }
      },
      &m, 0);
}

namespace {
struct Load {
  uint32_t* r;
  const void* row;
  int count;
  bool transposed;
};
}  // namespace

void ldmatrix(uint32_t* r, int count, const void* row, bool transposed) {
  Load m{r, row, count, transposed};
  if (lane() < count * 8 && reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: a row is not 16-byte aligned");
  collective(
      0xffffffffu,
      [](void* const* lanes, uint32_t) {
        auto mine = [&](int l) { return static_cast<Load*>(lanes[l]); };
        for (int i = 0; i < mine(0)->count; ++i) {
          uint16_t m[8][8];
          for (int r = 0; r < 8; ++r) std::memcpy(m[r], mine(i * 8 + r)->row, 16);
          for (int l = 0; l < 32; ++l) {
            const int g = l / 4, t = l % 4 * 2;
            const uint32_t low = mine(0)->transposed ? m[t][g] : m[g][t];
            const uint32_t high = mine(0)->transposed ? m[t + 1][g] : m[g][t + 1];
            mine(l)->r[i] = low | high << 16;
          }
        }
      },
      &m, 0);
}

}  // namespace cuda_host
