// What the files of expert compute on the device hand each other: experts.cu plans, experts_<type>.cu multiply.
#pragma once
#include "cuda/job.h"
#include "moe/experts_device.h"

namespace heddle {

// Rows in one block: the few-rows path streams the weights, the large one is bound by arithmetic. The results have the
// same bits. `Rows` is what a block takes at once.
enum class BlockShape : int32_t { kFew, kSome, kMany };
constexpr int32_t kBlockRows[] = {8, 32, 128};

// Rows to operands: of x, or of h.
struct RowsToOperand {
  const void* from;
  DType type;
  int64_t rows, width, pitch;  // pitch of `from`, in elements
  const int32_t* count;        // rows that exist, on the device; null: all
  int64_t steps, group;
  char* to;
  float* scale;  // int8: one per row
};

// One of the two products of a bank.
struct ExpertProduct {
  const char* bank;  // its experts' images
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
  const int32_t* offsets;      // [experts + 1]: rows of each expert
  const int32_t* first_tile;   // [experts + 1]: row tiles before each expert
  const int32_t* tile_expert;  // [row tiles]
  int64_t most_tiles;          // bound of the row tiles
  // Down: y = product + bias. Up: h = activation(product + bias), written as down's operand or, where that is quantised
  // first, as floats.
  int32_t is_up, gated;
  Activation activation;
  float alpha, limit;
  void* out;
  int64_t out_pitch;  // elements; float8 operands: bytes
  int64_t columns;    // of y, or of h, which is filled up with zeros to whole tiles
};

struct ExpertOps {
  int64_t (*rows)(const RowsToOperand&, heddle_cuda_job&);
  int64_t (*product)(BlockShape, const ExpertProduct&, heddle_cuda_job&);
};
ExpertOps expert_ops_float32();
ExpertOps expert_ops_bfloat16();
ExpertOps expert_ops_int8();
ExpertOps expert_ops_int4(bool small);  // groups of 32, or longer ones
ExpertOps expert_ops_int4_points(bool small);
ExpertOps expert_ops_mxfp4();
ExpertOps expert_ops_float8();

}  // namespace heddle
