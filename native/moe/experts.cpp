// The front of experts.h: packing, and the forward pass up to the combine. The products are in experts_run.cpp;
// everything that touches data per element is in the stages.
#include "moe/experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "moe/experts_run.h"

namespace heddle {
namespace {

Status copy_routes(const ExpertsForwardArgs& a, const BankRun& routed, int64_t d, const Exec& exec) {
  const bool done = parallel_for(exec, a.tokens * a.k, 1 + 65536 / d, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = routed.plan.position[static_cast<size_t>(r)];
      if (row >= 0) std::memcpy(a.routes + r * d, routed.y + row * d, static_cast<size_t>(d) * sizeof(float));
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace

int64_t ExpertBank::bytes() const {
  int64_t n = 0;
  for (const PackedExpert& e : experts) n += e.bytes();
  return n;
}

void ExpertBank::set_shapes(int64_t group) {
  shape_matrix(gate_up_shape, type, gated, intermediate, hidden, group);
  shape_matrix(down_shape, type, false, hidden, intermediate, group);
}

int64_t ExpertBank::expert_bytes(bool biased) const {
  const int64_t biases = biased ? (gated ? 2 : 1) * intermediate + hidden : 0;
  return packed_bytes(gate_up_shape) + packed_bytes(down_shape) + biases * static_cast<int64_t>(sizeof(float));
}

Status pack_experts(const PackExpertsArgs& args, const Exec& exec) {
  ExpertBank& bank = *args.bank;
  const int64_t d = bank.hidden, f = bank.intermediate;
  try {
    for (size_t i = 0; i < args.sources.size(); ++i) {
      const ExpertSource& s = args.sources[i];
      PackedExpert& e = bank.experts[args.first + i];
      const MatrixSource none;
      PackOptions up_options = args.options, down_options = args.options;
      up_options.mean_square = args.hidden_mean_square;
      down_options.mean_square = args.intermediate_mean_square;
      const int64_t size = d * f;
      int64_t before = static_cast<int64_t>(i) * 3 * size + (bank.gated ? 0 : size);
      Status status = pack_matrix(e.gate_up, bank.type, bank.gated ? s.gate : s.up, bank.gated ? s.up : none, f, d, up_options, exec);
      if (status == kOk) {
        before = static_cast<int64_t>(i) * 3 * size + 2 * size;
        status = pack_matrix(e.down, bank.type, s.down, none, d, f, down_options, exec);
      }
      if (status != kOk) return status > 0 ? status + before : status;
      if (s.up_bias) e.up_bias.assign(s.up_bias, s.up_bias + f);
      if (s.gate_bias) e.gate_bias.assign(s.gate_bias, s.gate_bias + f);
      if (s.down_bias) e.down_bias.assign(s.down_bias, s.down_bias + d);
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

Status experts_forward(const ExpertsForwardArgs& a, const Exec& exec) {
  ExpertBank& bank = *a.bank;
  const int64_t routes = a.tokens * a.k;
  const int64_t experts = static_cast<int64_t>(bank.experts.size());
  for (int64_t r = 0; r < routes; ++r) {
    if (a.indices[r] < -1 || a.indices[r] >= experts) return bad_value(r);
  }
  if (a.tokens == 0) return kOk;
  try {
    BankRun routed, shared;
    const int64_t d = bank.hidden;
    const bool combine_only = a.routes && a.out;
    Status s = kOk;
    if (!combine_only) {
      plan_routes(routed.plan, a.indices, a.tokens, a.k, experts, tile_kernels(exec.isa, bank.type).max_rows);
      for (const Plan::Group& g : routed.plan.groups) {
        if (!bank.experts[static_cast<size_t>(g.expert)].down.data) return kUnsupported;
      }
      s = routed.run(a, bank, exec);
      if (s != kOk) return s;
    }
    if (a.routes && !a.out) return copy_routes(a, routed, d, exec);
    if (a.shared) {
      plan_all(shared.plan, a.tokens, tile_kernels(exec.isa, a.shared->type).max_rows);
      s = shared.run(a, *a.shared, exec);
      if (s != kOk) return s;
    }
    const ExpertStages& stages = expert_stages(exec.isa);
    std::atomic<bool> failed{false};
    const bool done = parallel_for(exec, a.tokens, 1 + 65536 / (d * (a.k + 1)), [&](int64_t begin, int64_t end) {
      const size_t slots = static_cast<size_t>(a.k) + 1;
      auto* y = static_cast<const float**>(Workspace::local().get(slots * (sizeof(float*) + sizeof(float))));
      if (!y) return failed.store(true);
      auto* w = reinterpret_cast<float*>(y + slots);
      for (int64_t t = begin; t < end; ++t) {
        int64_t count = 0;
        for (int64_t j = 0; j < a.k; ++j) {
          const int64_t route = t * a.k + j;
          if (a.indices[route] < 0) continue;
          y[count] = combine_only ? a.routes + route * d : routed.y + routed.plan.position[static_cast<size_t>(route)] * d;
          w[count++] = a.weights ? a.weights[t * a.k + j] : 1.0f;
        }
        if (a.shared) {
          y[count] = shared.y + t * d;
          w[count++] = a.shared_gate ? a.shared_gate[t] : 1.0f;
        }
        stages.combine(y, w, count, d, a.out, a.out_type, t * d);
      }
    });
    return failed.load() ? kNoMemory : done ? kOk : kCancelled;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace heddle
