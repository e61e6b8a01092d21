// A layer of experts in one call: dispatch, gate and up with the activation fused, down, weighted combine.
//
//   h = act(x Wg^T + bg) * (x Wu^T + bu)        y = h Wd^T + bd        out[t] = sum_j w[t, j] y[t, j]
//
// Steps:
//   1. routes sorted by expert (stable), rows of x packed into operands of up to max_rows routes
//   2. panels of 16 gate + 16 up columns; the activation turns each tile into 16 columns of h, fp32
//   3. rows of h packed into operands (floats: by the activation itself)
//   4. panels of 32 columns of y, fp32
//   5. combine per token, in slot order j = 0..k-1
// With many groups of rows per thread, one thread takes a group through steps 1 to 4; else each step is a parallel region
// (experts_run.cpp). Scratch: routes * d * 4 bytes and one group's x and h per thread, or routes * (max(d, packed x) + f)
// * 4; nothing that grows with tokens x experts.
//
// Floors, two cores of a shared Sapphire Rapids host, 64 experts, top 8, 2048/768, fp32: one token reads 151 MB, 4.7 ms at
// 32 GB/s. 512 tokens read 1.2 GB (37 ms, hidden behind the products) and do 38.7 Gop, 110 ms at 350 GFLOP/s. One thread
// alone spends of its time there: 65 % in gate and up (92 % of the FMA peak), 32 % in down (91 %), 1.7 % packing x (reads
// each token k times), 1.1 % combining. Two threads take 121 ms on a quiet host.
// Learned: what other guests of the host do moves every figure by a quarter within seconds while a loop of plain FMAs
// keeps its speed, because they share the cores' front ends and caches; only interleaved comparisons mean anything.
//
// Precision: accumulation in fp32 (int32 for integer weights), one chain per output in ascending k; activation and
// combine in fp32. bf16 weights: x and h are rounded to bf16 as operands where the CPU has a fast bf16 dot
// product, and stay fp32 elsewhere. float8: x and h stay fp32. int8: x and h are quantised to int8 per token (scale
// max|x|/127); int4 and MXFP4: per token and group. Bounds against float64 on the same dequantised weights: fp32 and
// float8 5e-6, bf16 5e-3.
//
// A token's result does not depend on the batch, its order, or the threads: rows never mix, and each phase
// computes a row with the same instructions in the same order at every M.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "gemm/activation.h"
#include "gemm/packed.h"

namespace heddle {

struct PackedExpert {
  PackedMatrix gate_up;           // gated: panels of 16 + 16; ungated: plain panels of up
  PackedMatrix down;
  std::vector<float> gate_bias;   // [f], empty without biases
  std::vector<float> up_bias;
  std::vector<float> down_bias;   // [d]
  int64_t bytes() const {
    return gate_up.bytes() + down.bytes() +
           static_cast<int64_t>((gate_bias.size() + up_bias.size() + down_bias.size()) * sizeof(float));
  }
};

struct ExpertBank {
  PackType type = PackType::kFloat32;
  Activation activation = Activation::kSiLU;
  float alpha = 1.702f, limit = 7.0f;
  bool gated = true;
  int64_t hidden = 0, intermediate = 0;
  // The shapes all experts share, without data: slots of `experts` may be empty (packed on first use).
  PackedMatrix gate_up_shape, down_shape;
  std::vector<PackedExpert> experts;

  // One scratch block is kept between calls (a fresh one costs a page fault per 2 MiB); concurrent calls
  // allocate their own.
  std::mutex scratch_mutex;
  HugeBuffer scratch;

  // Sets the shapes; called once, before packing.
  void set_shapes(int64_t group);
  int64_t bytes() const;
  // Bytes of one packed expert, biases (all or none) included.
  int64_t expert_bytes(bool biased) const;
};

// Source pointers of one expert; strides in elements. gate.data == nullptr: ungated.
struct ExpertSource {
  MatrixSource gate, up, down;
  const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
};

struct PackExpertsArgs {
  std::shared_ptr<ExpertBank> bank;
  std::vector<ExpertSource> sources;
  size_t first = 0;  // slot of the first source; no running forward may use the slots that are packed
  PackOptions options;                              // mean_square is taken from the two below
  const float* hidden_mean_square = nullptr;        // [d], for gate and up
  const float* intermediate_mean_square = nullptr;  // [f], for down
};
// As pack_matrix; a bad value's index counts gate [f, d], up [f, d] and down [d, f] of expert after expert.
Status pack_experts(const PackExpertsArgs& args, const Exec& exec);

struct ExpertsForwardArgs {
  std::shared_ptr<ExpertBank> bank;
  std::shared_ptr<ExpertBank> shared;      // every token, weight shared_gate or 1; may be empty
  const float* shared_gate = nullptr;      // [tokens]: multiplies the shared experts' output
  const void* x = nullptr;                 // [tokens, d]
  DType type = DType::kFloat32;
  int64_t tokens = 0, k = 0;
  const int32_t* indices = nullptr;        // [tokens, k], -1 = no expert
  const float* weights = nullptr;          // [tokens, k]
  void* out = nullptr;                     // [tokens, d]
  DType out_type = DType::kFloat32;
  // For layers whose experts are not all in memory, [tokens, k, d]. Without `out`: the experts' outputs are
  // written here, unweighted, only those of the routes present. With `out`: they are taken from here and combined,
  // and no expert is read. A token's result is bitwise that of one call.
  float* routes = nullptr;
};
// kOk, kCancelled, kNoMemory, bad_value(route), kUnsupported for a route to an empty slot.
Status experts_forward(const ExpertsForwardArgs& args, const Exec& exec);

// What an instruction set contributes.
struct ExpertStages {
  // Packs `rows` routes of x (token ids given) into an operand.
  void (*pack_x)(const ExpertsForwardArgs& a, const PackedMatrix& w, Operand kind, const int32_t* token, int rows,
                 float* scratch, char* out);
  // Packs `rows` rows of h into an operand.
  void (*pack_h)(const PackedMatrix& w, Operand kind, float* h, int64_t stride, int rows, char* out);
  // c [rows][32] -> h + 16 or 32 columns.
  void (*activate)(const ExpertBank& b, const PackedExpert& e, int64_t panel, const float* c, int rows, float* h,
                   int64_t stride);
  // The same into the operand of the down product (kinds that pack value by value); c is overwritten.
  void (*activate_operand)(const ExpertBank& b, const PackedExpert& e, int64_t panel, float* c, int rows, char* out);
  // c [rows][32] + bias -> columns [32 panel, d) of y.
  void (*write_down)(const PackedExpert& e, int64_t d, int64_t panel, const float* c, int rows, float* y);
  // out[t] = sum_j w_j y[row_j] (+ gate * shared row).
  void (*combine)(const float* const* y, const float* weight, int64_t count, int64_t d, void* out, DType type, int64_t offset);
};
const ExpertStages& expert_stages(Isa isa);

}  // namespace heddle
