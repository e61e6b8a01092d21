// Grouped products on the device: rows that are sorted by the matrix they go through (moe/experts.cu), or one matrix and all
// rows (gemm/linear.cu). Those plan, product_<type>.cu multiply.
//
// A product is a list of (matrix, rows, outputs) that as many blocks as fit work through. Weights are the operand A of the
// matrix instructions and rows the operand B, so that a block can take 8 rows (decode: the weights are streamed once) or
// 128 (prefill) with the same instructions in the same order of k: a row's result does not depend on the path. Weights go
// through shared memory in the order of the lanes, without bank conflicts, and are widened in registers.
//
// Precision, as on the CPU: float32 is fused multiply-adds in fp32. float8: rows are split into three bf16 whose sum is
// exact, times the codes, which bf16 holds exactly. bfloat16: rows are rounded to bf16. Integer types: rows are int8 per
// row (or row and group) and the products of a group exact. Sums are fp32.
#pragma once
#include "cuda/job.h"
#include "gemm/device_matrix.h"

namespace heddle {

// Rows in one block: the few-rows path streams the weights, the large one is bound by arithmetic. The results have the
// same bits. `Rows` is what a block takes at once.
enum class BlockShape : int32_t { kFew, kSome, kMany };
constexpr int32_t kBlockRows[] = {8, 32, 128};
inline BlockShape block_shape(int64_t rows) {
  return rows <= 8 ? BlockShape::kFew : rows <= 48 ? BlockShape::kSome : BlockShape::kMany;
}

// Rows to operands.
struct RowsToOperand {
  const void* from;
  DType type;
  int64_t rows, width, pitch;  // pitch of `from`, in elements
  const int32_t* count;        // rows that exist, on the device; null: all
  int64_t steps, group;
  char* to;
  float* scale;  // int8: one per row
};

// A product; matrices are called experts.
struct GroupedProduct {
  const char* bank;  // the experts' images
  int64_t expert_bytes;
  MatrixImage matrix;
  int64_t group;
  int32_t experts;
  // Rows of x are found by way of the routes, rows of h stand in their order.
  const char* rows;
  int64_t row_bytes;
  const float* row_scale;
  const int32_t* order;  // route of each row; null: row i is row i
  int32_t routes_per_row;
  const int32_t* offsets;      // [experts + 1]: rows of each expert; null: one expert and `all` rows
  const int32_t* first_tile;   // [experts + 1]: row tiles before each expert
  const int32_t* tile_expert;  // [row tiles]
  int32_t all;
  int64_t most_tiles;  // bound of the row tiles
  // Plain: y = activation(product + bias). Up: h = activation(gate) * up, or clamped SwiGLU, written as down's operand
  // or, where that is quantised first, as floats.
  int32_t is_up, gated, clamped;
  LinearActivation activation;
  float alpha, limit;
  const float* bias;  // of a plain product, in place of the image's; may be null
  void* out;
  DType out_type;     // of y
  int64_t out_pitch;  // elements; float8 operands: bytes
  int64_t columns;    // of y, or of h, which is filled up with zeros to whole tiles
  // The steps of a plain product may be cut into parts, each of which writes a plane of y.
  int32_t parts = 1;
};

struct ProductOps {
  int64_t (*rows)(const RowsToOperand&, heddle_cuda_job&);
  int64_t (*product)(BlockShape, const GroupedProduct&, heddle_cuda_job&);
};
ProductOps product_ops_float32();
ProductOps product_ops_bfloat16();
ProductOps product_ops_int8();
ProductOps product_ops_int4(bool small);  // groups of 32, or longer ones
ProductOps product_ops_int4_points(bool small);
ProductOps product_ops_mxfp4();
ProductOps product_ops_float8();

inline ProductOps product_ops(PackType type, int64_t group, bool points) {
  switch (type) {
    case PackType::kBFloat16: return product_ops_bfloat16();
    case PackType::kInt8: return product_ops_int8();
    case PackType::kInt4: return points ? product_ops_int4_points(group == 32) : product_ops_int4(group == 32);
    case PackType::kMxfp4: return product_ops_mxfp4();
    case PackType::kFloat8: return product_ops_float8();
    default: return product_ops_float32();
  }
}

// Rows as operands.
struct OperandRows {
  const char* data = nullptr;
  const float* scale = nullptr;
  int64_t row_bytes = 0;
};

// Rows of `r` as the product reads them: themselves where they are that already, else in the job's memory.
inline int64_t make_operand(const ProductOps& ops, PackType type, RowsToOperand r, heddle_cuda_job& job, OperandRows* out) {
  const bool same = (type == PackType::kBFloat16 && r.type == DType::kBFloat16) ||
                    (type == PackType::kFloat32 && r.type == DType::kFloat32);
  const int64_t size = r.type == DType::kFloat32 ? 4 : 2;
  if (same && r.width % kImagePad == 0 && is_aligned(16, {r.from}, r.pitch * size)) {
    *out = {static_cast<const char*>(r.from), nullptr, r.pitch * size};
    return kOk;
  }
  out->row_bytes = r.steps * kImageRowBytes[static_cast<int>(type)];
  out->data = r.to = job.scratch<char>(r.rows * out->row_bytes);
  if (type == PackType::kInt8) out->scale = r.scale = job.scratch<float>(r.rows);
  return job.no_memory ? kNoMemory : ops.rows(r, job);
}

}  // namespace heddle
