// y[m][n] = act(sum_k x[m][k] W[n][k] + bias[n]) with a packed W. Same tiles, chains and bounds as packed.h says:
// a row of y is bitwise the same for every M and thread count.
#pragma once
#include <memory>

#include "gemm/activation.h"
#include "gemm/packed.h"

namespace heddle {

struct LinearArgs {
  std::shared_ptr<PackedMatrix> weight;
  const void* x = nullptr;  // [rows, k]
  DType type = DType::kFloat32;
  int64_t rows = 0;
  const float* bias = nullptr;  // [n]
  LinearActivation activation = LinearActivation::kNone;
  void* out = nullptr;  // [rows, n]
  DType out_type = DType::kFloat32;
};
Status linear(const LinearArgs& args, const Exec& exec);

struct PackMatrixArgs {
  std::shared_ptr<PackedMatrix> matrix;
  PackType type = PackType::kFloat32;
  MatrixSource source;
  int64_t n = 0, k = 0;
  PackOptions options;
};
Status pack_matrix_job(const PackMatrixArgs& args, const Exec& exec);

struct LinearStages {
  void (*pack)(const void* x, DType type, int64_t first_row, int rows, const PackedMatrix& w, Operand kind, float* scratch,
               char* out);
  void (*finish)(const LinearArgs& a, int64_t first_row, int rows, int64_t panel, const float* c);
};
const LinearStages& linear_stages(Isa isa);

}  // namespace heddle
