// route_top_k on every instruction set against a plain float64 version, on buffers of exactly the right size (the
// address sanitizer sees any step outside), odd sizes included.
#include "moe/route_top_k.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "check.h"

using namespace heddle;

namespace {

constexpr double kInf = HUGE_VAL;

struct Problem {
  RouteTopKArgs args;
  std::vector<float> logits;  // as the kernel reads them, NaN included
  std::vector<uint16_t> halves;
  std::vector<float> exact;  // a heap block of its own for fp32
  std::vector<float> bias;
  std::vector<uint8_t> mask;
  std::vector<int32_t> indices;
  std::vector<float> weights;
  std::string name;
};

std::unique_ptr<Problem> make_problem(check::Random& random, DType type, int64_t tokens, int32_t experts, int32_t k) {
  auto p = std::make_unique<Problem>();
  RouteTopKArgs& a = p->args;
  a.type = type;
  a.tokens = tokens;
  a.experts = experts;
  a.k = k;
  const size_t n = static_cast<size_t>(tokens * experts);
  p->logits.resize(n);
  p->halves.resize(type == DType::kFloat32 ? 0 : n);
  for (size_t i = 0; i < n; ++i) {
    float x = static_cast<float>((random.uniform() + random.uniform() + random.uniform() - 1.5) * 8.0);
    if (random.below(5) == 0) x = std::nearbyint(x);  // ties
    if (random.below(200) == 0) x = NAN;
    if (random.below(300) == 0) x = random.below(2) ? HUGE_VALF : -HUGE_VALF;
    if (type == DType::kBFloat16) x = bf16_to_float(p->halves[i] = float_to_bf16(x));
    if (type == DType::kFloat16) x = f16_to_float(p->halves[i] = float_to_f16(x));
    p->logits[i] = x;
  }
  p->exact = p->logits;
  p->exact.shrink_to_fit();
  a.logits = type == DType::kFloat32 ? static_cast<const void*>(p->exact.data()) : p->halves.data();
  p->indices.assign(static_cast<size_t>(tokens * k), -77);
  p->weights.assign(static_cast<size_t>(tokens * k), NAN);
  a.indices = p->indices.data();
  a.weights = p->weights.data();
  return p;
}

double score_of(RouterScore score, double x) {
  if (score == RouterScore::kSigmoid) return 1.0 / (1.0 + std::exp(-x));
  return std::sqrt(std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))));
}

struct Row {
  std::vector<double> logit, score, choice;  // choice: what selection compares; -inf for what may not be chosen
  std::vector<bool> exists;
};

Row reference_row(const Problem& p, int64_t t) {
  const RouteTopKArgs& a = p.args;
  Row r;
  const int32_t e = a.experts;
  double top = -kInf;
  for (int32_t i = 0; i < e; ++i) {
    const float x = p.logits[static_cast<size_t>(t * e + i)];
    r.exists.push_back(!a.mask || a.mask[t * a.mask_stride + i]);
    r.logit.push_back(std::isnan(x) || !r.exists.back() ? -kInf : x);
    top = std::max(top, r.logit.back());
  }
  if (std::isinf(top)) {  // the limit: equal shares among the largest
    for (int32_t i = 0; i < e; ++i) r.logit[i] = r.logit[i] == top && r.exists[i] ? 0.0 : -kInf;
    top = 0.0;
  }
  double sum = 0.0;
  for (double x : r.logit) sum += std::exp(x - top);
  for (int32_t i = 0; i < e; ++i) {
    const double x = r.logit[i];
    r.score.push_back(a.router.score == RouterScore::kSoftmax ? std::exp(x - top) / sum : score_of(a.router.score, x));
    const bool raw = a.router.over_selected;
    r.choice.push_back((raw ? x : r.score.back()) + (a.selection_bias ? a.selection_bias[i] : 0.0));
  }
  if (a.group_count > 1 && a.group_keep < a.group_count) {
    const int32_t size = e / a.group_count;
    std::vector<std::pair<double, int32_t>> groups;
    for (int32_t g = 0; g < a.group_count; ++g) {
      std::vector<double> c;
      for (int32_t i = g * size; i < (g + 1) * size; ++i) c.push_back(r.exists[i] ? r.choice[i] : -kInf);
      std::sort(c.rbegin(), c.rend());
      groups.push_back({-(a.group_top2 ? c[0] + c[1] : c[0]), g});
    }
    std::stable_sort(groups.begin(), groups.end());
    for (int32_t j = a.group_keep; j < a.group_count; ++j) {
      for (int32_t i = 0; i < size; ++i) r.exists[groups[j].second * size + i] = false;
    }
  }
  return r;
}

double weight_of(const RouterOptions& o, const Row& r, const std::vector<int32_t>& ids, int32_t id) {
  double top = -kInf, sum = 0.0;
  for (int32_t i : ids) top = i < 0 ? top : std::max(top, r.logit[i]);
  auto value = [&](int32_t i) {
    if (i < 0) return 0.0;
    const bool relative = o.score == RouterScore::kSoftmax && (o.over_selected || o.normalize);
    if (!relative || (o.normalize && !o.over_selected && (o.epsilon != 0.0f || o.floor != 0.0f))) return r.score[i];
    return top == -kInf ? 1.0 : std::exp(r.logit[i] - top);  // the same ratios, without underflow
  };
  for (int32_t i : ids) sum += value(i);
  if (!o.normalize && !o.over_selected) return value(id) * o.scale;
  if (!o.over_selected) sum = std::max(sum + o.epsilon, static_cast<double>(o.floor));
  return sum > 0.0 ? value(id) / sum * o.scale : 0.0;
}

void check_result(const Problem& p, const char* isa) {
  const RouteTopKArgs& a = p.args;
  // Selection compares fp32 scores: two that differ by less than this may come out in either order.
  const double slack = a.selection_bias || a.group_top2 ? 2e-6 : 0.0;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const Row r = reference_row(p, t);
    const std::vector<int32_t> ids(p.indices.begin() + t * a.k, p.indices.begin() + (t + 1) * a.k);
    std::vector<bool> chosen(static_cast<size_t>(a.experts), false);
    const int64_t available = std::count(r.exists.begin(), r.exists.end(), true);
    double last = kInf;
    const double top = *std::max_element(r.logit.begin(), r.logit.end());
    for (int32_t j = 0; j < a.k; ++j) {
      const int32_t id = ids[j];
      if (j >= available) {
        CHECK(id == -1, "%s %s row %lld: id %d where no expert is left", isa, p.name.c_str(), (long long)t, id);
        continue;
      }
      if (id < 0 || id >= a.experts || chosen[id] || !r.exists[id]) {
        CHECK(false, "%s %s row %lld: id %d is out of range, doubled or excluded", isa, p.name.c_str(), (long long)t, id);
        return;
      }
      chosen[id] = true;
      CHECK(slack > 0.0 || j == 0 || r.logit[ids[j - 1]] > r.logit[id] || ids[j - 1] < id, "%s %s row %lld: tie order", isa,
            p.name.c_str(), (long long)t);
      CHECK(r.choice[id] <= last + slack, "%s %s row %lld: not in order", isa, p.name.c_str(), (long long)t);
      last = r.choice[id];
    }
    for (int32_t i = 0; i < a.experts && available >= a.k; ++i) {
      if (!r.exists[i] || chosen[i]) continue;
      const bool smaller = slack > 0.0 ? r.choice[i] <= last + slack
                                       : r.logit[i] < r.logit[ids[a.k - 1]] || (r.logit[i] == r.logit[ids[a.k - 1]] && i > ids[a.k - 1]);
      CHECK(smaller, "%s %s row %lld: expert %d was passed over", isa, p.name.c_str(), (long long)t, i);
    }
    for (int32_t j = 0; j < a.k; ++j) {
      const double want = weight_of(a.router, r, ids, ids[j]), got = p.weights[static_cast<size_t>(t * a.k + j)];
      // l - max(l) is rounded to fp32 before the exponential, so the bound grows with the distance.
      const double distance = ids[j] < 0 || std::isinf(r.logit[ids[j]]) ? 0.0 : top - r.logit[ids[j]];
      CHECK(std::fabs(got - want) <= (1e-6 + 0x1p-24 * distance) * std::fabs(want) + 1e-37, "%s %s row %lld weight %d: %.9g, expected %.9g", isa,
            p.name.c_str(), (long long)t, j, got, want);
    }
  }
}

void run_everywhere(Problem& p) {
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    std::vector<int32_t> first_ids;
    std::vector<float> first_weights;
    for (int threads : {1, 2, 4}) {
      std::fill(p.indices.begin(), p.indices.end(), -77);
      std::fill(p.weights.begin(), p.weights.end(), NAN);
      Exec exec;
      exec.isa = isa;
      exec.threads = threads;
      const Status status = route_top_k(p.args, exec);
      CHECK(status == kOk, "%s %s: status %lld", isa_name(isa), p.name.c_str(), (long long)status);
      if (threads == 1) {
        check_result(p, isa_name(isa));
        first_ids = p.indices;
        first_weights = p.weights;
      } else {
        const bool same = p.indices.empty() ||
                          (std::memcmp(first_ids.data(), p.indices.data(), first_ids.size() * 4) == 0 &&
                           std::memcmp(first_weights.data(), p.weights.data(), first_weights.size() * 4) == 0);
        CHECK(same, "%s %s: bits depend on the threads", isa_name(isa), p.name.c_str());
      }
    }
  }
}

constexpr int32_t kExperts[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 60, 64, 65, 127, 128, 160, 255, 257, 1000, 4096};

}  // namespace

TEST(sizes_and_types) {
  check::Random random(11);
  for (int32_t experts : kExperts) {
    for (DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (int32_t k : {1, 2, 6, 8, experts}) {
        if (k > experts || (k == experts && k > 300)) continue;
        auto p = make_problem(random, type, experts > 300 ? 3 : 37, experts, k);
        p->name = "E=" + std::to_string(experts) + " k=" + std::to_string(k) + " type " + std::to_string(int(type));
        run_everywhere(*p);
      }
    }
  }
}

TEST(router_options) {
  check::Random random(12);
  for (int32_t experts : {5, 24, 75, 256}) {
    for (RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid, RouterScore::kSqrtSoftplus}) {
      for (int variant = 0; variant < 5; ++variant) {
        auto p = make_problem(random, DType::kFloat32, 41, experts, 4);
        RouterOptions& o = p->args.router;
        o.score = score;
        o.normalize = variant > 0;
        if (variant == 2) o.epsilon = 1e-3f;
        if (variant == 3) o.floor = 0.25f;
        if (variant == 4 && score == RouterScore::kSoftmax) o.over_selected = true;
        if (variant == 4) o.scale = 2.5f;
        p->name = "E=" + std::to_string(experts) + " score " + std::to_string(int(score)) + " variant " + std::to_string(variant);
        run_everywhere(*p);
      }
    }
  }
}

TEST(bias_groups_and_masks) {
  check::Random random(13);
  for (int32_t experts : {8, 24, 72, 256}) {
    for (int variant = 0; variant < 8; ++variant) {
      auto p = make_problem(random, DType::kFloat32, 29, experts, 3);
      RouteTopKArgs& a = p->args;
      a.router.score = RouterScore::kSigmoid;
      if (variant & 1) {
        for (int32_t i = 0; i < experts; ++i) p->bias.push_back(static_cast<float>(random.uniform() - 0.5));
        a.selection_bias = p->bias.data();
      }
      if (variant & 2) {
        a.group_count = 4;
        a.group_keep = 2;
        a.group_top2 = (variant & 1) != 0;
      }
      if (variant & 4) {
        for (int64_t i = 0; i < a.tokens * experts; ++i) p->mask.push_back(random.below(3) != 0);
        a.mask = p->mask.data();
        a.mask_stride = experts;
      }
      p->name = "E=" + std::to_string(experts) + " variant " + std::to_string(variant);
      // Groups whose scores nearly tie may be kept either way: avoid special values there.
      if (a.group_top2 || (variant & 2)) {
        for (size_t i = 0; i < p->logits.size(); ++i) p->exact[i] = p->logits[i] = static_cast<float>(random.uniform() * 8 - 4);
      }
      run_everywhere(*p);
    }
  }
}

TEST(replay_refuses_ids_out_of_range) {
  check::Random random(14);
  auto p = make_problem(random, DType::kFloat32, 4, 10, 3);
  std::vector<int32_t> given = {0, 1, 2, 3, -1, 5, 6, 7, 8, 9, 0, 1};
  p->args.given = given.data();
  Exec exec;
  exec.isa = best_isa();
  CHECK(route_top_k(p->args, exec) == kOk, "valid ids");
  CHECK(p->indices == given, "the ids are copied");
  for (int32_t bad : {10, -2, INT32_MAX, INT32_MIN}) {
    given[7] = bad;
    CHECK(route_top_k(p->args, exec) == bad_value(7), "id %d", bad);
  }
}

TEST(cancelled_before_the_start) {
  check::Random random(15);
  auto p = make_problem(random, DType::kFloat32, 64, 32, 2);
  std::atomic<int32_t> cancel{1};
  Exec exec;
  exec.user_cancel = &cancel;
  exec.threads = 2;
  CHECK(route_top_k(p->args, exec) == kCancelled, "status");
}
