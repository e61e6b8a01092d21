// The vector parts of linear.h.

#include "gemm/activation-inl.h"

static void linear_pack(const void* x, DType type, int64_t first_row, int rows, const PackedMatrix& w, Operand kind,
                        float* scratch, char* out) {
  const int64_t padded = w.steps * pack_unit(w.type);
  for (int m = 0; m < rows; ++m) widen_row(x, type, (first_row + m) * w.k, w.k, padded, scratch + m * padded);
  pack_operand(kind, w, scratch, padded, rows, out);
}

static void linear_finish(const LinearArgs& a, int64_t first_row, int rows, int64_t panel, const float* c) {
  const int64_t n = a.weight->columns;
  for (int m = 0; m < rows; ++m) {
    for (int i = 0; i < kPanel; i += W) {
      const int64_t column = panel * kPanel + i;
      const int64_t left = n - column;
      if (left <= 0) break;
      const int count = left < W ? static_cast<int>(left) : W;
      vf v = load(c + m * kPanel + i);
      if (a.bias) v = add(v, count == W ? load(a.bias + column) : load_n(a.bias + column, count, 0.0f));
      store_to(a.out, a.out_type, (first_row + m) * n + column, linear_activation(a.activation, v), count);
    }
  }
}

const LinearStages& linear_stages() {
  static const LinearStages s = {linear_pack, linear_finish};
  return s;
}
