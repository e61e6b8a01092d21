// One step of an optimiser on one parameter, in one pass over memory.
//
//   g = scale * gradient, where `gradient` is the sum that a step has accumulated; it is set to zero on the way.
//   sgd    g += weight_decay p;  b = momentum b + g;  p -= lr (nesterov ? g + momentum b : b)
//   adamw  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//          p = p (1 - lr weight_decay) - lr (m c1) / (sqrt(v c2) + epsilon),  c = 1 / (1 - beta^t)
//   lamb   r = (m c1) / (sqrt(v c2) + epsilon) + weight_decay p;  p -= lr |p| / |r| r  (ratio 1 where a norm is 0)
// as torch.optim.SGD and AdamW have them, and You et al. 2019 (arXiv 1904.00962, without the clipping of |p|).
//
// Precision: fp32; the norms of lamb in fp32 lanes per 16384 elements, then in double, in the order of the elements:
// bits do not depend on the threads. Relative error against float64 <= 1e-6 of the step.
// Cost: memory. sgd reads and writes 12 bytes per element each way, adamw 16, lamb 16 and 12 more.
#pragma once
#include "simd/dispatch.h"

namespace heddle {

enum class UpdateRule : int32_t { kSgd = 0, kAdamW, kLamb };

struct OptimizerUpdateArgs {
  UpdateRule rule = UpdateRule::kSgd;
  int64_t count = 0;
  float* parameter = nullptr;
  float* gradient = nullptr;
  float* first = nullptr;   // sgd: b, or none without momentum; else m
  float* second = nullptr;  // v
  float scale = 1.0f, learning_rate = 0.0f, weight_decay = 0.0f;
  float momentum = 0.0f;  // beta1 of the others
  float beta2 = 0.0f, epsilon = 0.0f;
  float correction1 = 1.0f, correction2 = 1.0f;
  bool nesterov = false;
  float ratio = 1.0f;       // second pass of lamb
  double* norms = nullptr;  // first pass of lamb: [blocks][2], squared norms of p and r; r replaces the gradient
};

constexpr int64_t kUpdateBlock = 16384;

Status optimizer_update(const OptimizerUpdateArgs& args, const Exec& exec);
HEDDLE_DECLARE_OP(optimizer_pass, OptimizerUpdateArgs)
HEDDLE_DECLARE_OP(lamb_finish, OptimizerUpdateArgs)

}  // namespace heddle
