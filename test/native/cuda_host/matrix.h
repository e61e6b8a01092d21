// Test only: matrix instructions. Each lane hands over copies of its own registers, made here in the kernel's code where
// AddressSanitizer checks them; the last lane to arrive computes for the whole warp (matrix.cpp).
#pragma once

namespace cuda_host {

// One lane's fragments; lane 4 g + t holds
//   a[i]  row g + 8 (i % 2), bytes 4t .. 4t + 3 of half i / 2 of that row's 32 bytes
//   b[i]  the same of column g and half i
//   d[i]  row g + 8 (i / 2), column 2t + i % 2
template <class T>
struct Mma {
  T d[4];
  uint32_t a[4], b[2];
};
void run_mma_bf16(void* const* lanes, uint32_t mask);
void run_mma_f16(void* const* lanes, uint32_t mask);
void run_mma_s8(void* const* lanes, uint32_t mask);

template <class T>
void mma(Collective run, T (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma<T> m{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  collective(0xffffffffu, run, &m, 0);
  for (int i = 0; i < 4; ++i) d[i] = m.d[i];
}

// r: what the lane gets; row: of the matrix whose row it names.
struct MatrixLoad {
  uint32_t r[4];
  uint16_t row[8];
  int count;
  bool transposed;
};
void run_ldmatrix(void* const* lanes, uint32_t mask);

inline void ldmatrix(uint32_t* r, int count, const void* row, bool transposed) {
  MatrixLoad m{{}, {}, count, transposed};
  if (lane() < count * 8) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: a row is not 16-byte aligned");
    for (int i = 0; i < 8; ++i) m.row[i] = static_cast<const uint16_t*>(row)[i];
  }
  collective(0xffffffffu, run_ldmatrix, &m, 0);
  for (int i = 0; i < count; ++i) r[i] = m.r[i];
}

}  // namespace cuda_host
