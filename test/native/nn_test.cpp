// Block ops and tubelet embedding on every instruction set of this machine against float64, in buffers of the exact
// size, so that the address sanitizer sees every element read or written beyond them.
#include "check.h"

#include <cmath>
#include <cstdlib>
#include <memory>

#include "attention/patch_embed.h"
#include "nn/elementwise.h"
#include "nn/gather_rows.h"
#include "nn/norm.h"

using namespace heddle;

namespace {

check::Random draw(1);

// A heap block of exactly n elements of a type, filled with normal-like numbers.
struct Block {
  Block(DType t, int64_t n, bool random = true) : type(t), count(n), data(std::malloc(static_cast<size_t>(n) * static_cast<size_t>(dtype_size(t)))) {
    for (int64_t i = 0; i < n; ++i) set(i, random ? static_cast<float>(4 * draw.uniform() - 2) : 0.0f);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { std::free(data); }
  void set(int64_t i, float v) {
    if (type == DType::kFloat32) f()[i] = v;
    else if (type == DType::kBFloat16) static_cast<uint16_t*>(data)[i] = float_to_bf16(v);
    else static_cast<uint16_t*>(data)[i] = float_to_f16(v);
  }
  double at(int64_t i) const {
    if (type == DType::kFloat32) return static_cast<float*>(data)[i];
    const uint16_t h = static_cast<uint16_t*>(data)[i];
    return type == DType::kBFloat16 ? bf16_to_float(h) : f16_to_float(h);
  }
  float* f() { return static_cast<float*>(data); }

  DType type;
  int64_t count;
  void* data;
};

double tolerance(DType t) { return t == DType::kFloat32 ? 5e-6 : t == DType::kFloat16 ? 2e-3 : 1.6e-2; }

#define NEAR(got, want, t)                                                                              \
  do {                                                                                                  \
    const double g_ = (got), w_ = (want);                                                               \
    CHECK(std::fabs(g_ - w_) <= (t) * (1 + std::fabs(w_)), "%s: %g, expected %g", isa_name(e.isa), g_, w_); \
  } while (false)

template <class F>
void everywhere(F f) {
  for (const Isa isa : {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512}) {
    if (!isa_available(isa)) continue;
    Exec e;
    e.isa = isa;
    e.threads = 2;
    for (const DType t : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) f(e, t);
  }
}

constexpr int64_t kWidths[] = {1, 7, 16, 33, 70, 130, 1100};

struct Statistics {
  double mean = 0, rstd = 0;
};
template <class F>
Statistics statistics(int64_t width, bool centred, double epsilon, F at) {
  Statistics s;
  if (centred) {
    for (int64_t i = 0; i < width; ++i) s.mean += at(i) / static_cast<double>(width);
  }
  double square = 0;
  for (int64_t i = 0; i < width; ++i) square += std::pow(at(i) - s.mean, 2) / static_cast<double>(width);
  s.rstd = 1 / std::sqrt(square + epsilon);
  return s;
}

}  // namespace

TEST(norm) {
  everywhere([](const Exec& e, DType type) {
    for (const int64_t width : kWidths) {
      for (int variant = 0; variant < 4; ++variant) {
        const int64_t rows = 3;
        const bool centred = variant % 2 == 0, residual = variant >= 2;
        Block x(type, rows * width), r(type, rows * width), w(DType::kFloat32, width), b(DType::kFloat32, width);
        Block out(type, rows * width, false), sum(type, rows * width, false), rstd(DType::kFloat32, rows, false);
        NormArgs a;
        a.x = x.data;
        a.residual = residual ? r.data : nullptr;
        a.type = a.out_type = type;
        a.rows = rows;
        a.width = width;
        a.weight = w.f();
        a.bias = centred ? b.f() : nullptr;
        a.centred = centred;
        a.unit_offset = residual;
        a.epsilon = 1e-3;
        a.out = out.data;
        a.sum = sum.data;
        a.rstd = rstd.f();
        CHECK(norm(a, e) == kOk, "%s", isa_name(e.isa));
        for (int64_t row = 0; row < rows; ++row) {
          auto v = [&](int64_t i) { return x.at(row * width + i) + (residual ? r.at(row * width + i) : 0); };
          const Statistics s = statistics(width, centred, a.epsilon, v);
          NEAR(rstd.at(row), s.rstd, 5e-6);
          for (int64_t i = 0; i < width; ++i) {
            const double y = (v(i) - s.mean) * s.rstd * (w.at(i) + (residual ? 1 : 0)) + (centred ? b.at(i) : 0);
            NEAR(out.at(row * width + i), y, tolerance(type));
            NEAR(sum.at(row * width + i), v(i), tolerance(type));
          }
        }
      }
    }
  });
}

TEST(norm_backward) {
  everywhere([](const Exec& e, DType type) {
    for (const int64_t width : kWidths) {
      const int64_t rows = width < 100 ? 130 : 3;
      for (const bool centred : {true, false}) {
        Block x(type, rows * width), g(type, rows * width), h(type, rows * width), w(DType::kFloat32, width);
        Block gx(type, rows * width, false), gw(DType::kFloat32, width), gb(DType::kFloat32, width);
        NormBackwardArgs a;
        a.grad_out = g.data;
        a.x = x.data;
        a.grad_sum = h.data;
        a.type = type;
        a.rows = rows;
        a.width = width;
        a.weight = w.f();
        a.centred = centred;
        a.epsilon = 1e-3;
        a.grad_x = gx.data;
        a.grad_weight = gw.f();
        a.grad_bias = centred ? gb.f() : nullptr;
        CHECK(norm_backward(a, e) == kOk, "%s", isa_name(e.isa));
        std::vector<double> weight(static_cast<size_t>(width)), bias(weight);
        for (int64_t row = 0; row < rows; ++row) {
          auto v = [&](int64_t i) { return x.at(row * width + i); };
          const Statistics s = statistics(width, centred, a.epsilon, v);
          double plain = 0, along = 0;
          for (int64_t i = 0; i < width; ++i) {
            const double xh = (v(i) - s.mean) * s.rstd, gi = g.at(row * width + i);
            plain += centred ? gi * w.at(i) / static_cast<double>(width) : 0;
            along += gi * w.at(i) * xh / static_cast<double>(width);
            weight[static_cast<size_t>(i)] += gi * xh;
            bias[static_cast<size_t>(i)] += gi;
          }
          for (int64_t i = 0; i < width; ++i) {
            const double xh = (v(i) - s.mean) * s.rstd, gi = g.at(row * width + i);
            // rstd reaches 30 where a row has one element: the terms that cancel are that much larger.
            NEAR(gx.at(row * width + i), s.rstd * (gi * w.at(i) - plain - xh * along) + h.at(row * width + i),
                 tolerance(type) * (1 + s.rstd));
          }
        }
        for (int64_t i = 0; i < width; ++i) {
          NEAR(gw.at(i), weight[static_cast<size_t>(i)], 5e-5);
          if (centred) NEAR(gb.at(i), bias[static_cast<size_t>(i)], 5e-5);
        }
      }
    }
  });
}

TEST(elementwise) {
  everywhere([](const Exec& e, DType type) {
    for (const int64_t width : kWidths) {
      const int64_t rows = 5, n = rows * width;
      Block x(type, n), y(type, n), out(type, n, false), gate(DType::kFloat32, width), mean(type, width, false);
      for (const bool tanh : {false, true}) {
        GeluArgs a;
        a.x = x.data;
        a.type = type;
        a.count = n;
        a.tanh = tanh;
        a.out = out.data;
        CHECK(gelu(a, e) == kOk, "%s", isa_name(e.isa));
        for (int64_t i = 0; i < n; ++i) {
          const double v = x.at(i);
          const double inner = 0.7978845608028654 * (v + 0.044715 * v * v * v);
          NEAR(out.at(i), 0.5 * v * (1 + (tanh ? std::tanh(inner) : std::erf(v * 0.7071067811865476))), tolerance(type));
        }
      }
      for (const int64_t gates : {int64_t{0}, int64_t{1}, width}) {
        AddResidualArgs a;
        a.x = x.data;
        a.y = y.data;
        a.type = type;
        a.rows = rows;
        a.width = width;
        a.gate = gates ? gate.f() : nullptr;
        a.gates = gates;
        a.out = out.data;
        CHECK(add_residual(a, e) == kOk, "%s", isa_name(e.isa));
        for (int64_t i = 0; i < n; ++i) {
          const double g = gates == 0 ? 1 : gate.at(gates == 1 ? 0 : i % width);
          NEAR(out.at(i), x.at(i) + g * y.at(i), tolerance(type));
        }
      }
      MeanTokensArgs m;
      m.x = x.data;
      m.type = type;
      m.batch = 1;
      m.tokens = rows;
      m.width = width;
      m.out = mean.data;
      CHECK(mean_tokens(m, e) == kOk, "%s", isa_name(e.isa));
      for (int64_t i = 0; i < width; ++i) {
        double sum = 0;
        for (int64_t t = 0; t < rows; ++t) sum += x.at(t * width + i);
        NEAR(mean.at(i), sum / static_cast<double>(rows), tolerance(type));
      }
    }
  });
}

TEST(gather_rows) {
  Exec e;
  e.threads = 2;
  Block x(DType::kFloat32, 4 * 9), fill(DType::kFloat32, 9), out(DType::kFloat32, 6 * 9, false);
  const int32_t index[] = {3, -1, 0, 0, -1, 2}, bad[] = {0, -2}, worse[] = {0, 0, 4};
  GatherRowsArgs a;
  a.x = x.data;
  a.rows = 4;
  a.row_bytes = 9 * 4;
  a.index = index;
  a.count = 6;
  a.fill = fill.data;
  a.out = out.data;
  CHECK(gather_rows(a, e) == kOk, "refused");
  for (int64_t i = 0; i < 6 * 9; ++i) {
    const int32_t from = index[i / 9];
    NEAR(out.at(i), from < 0 ? fill.at(i % 9) : x.at(from * 9 + i % 9), 0);
  }
  a.index = bad;
  a.count = 2;
  CHECK(gather_rows(a, e) == bad_value(1), "accepted -2");
  a.index = worse;
  a.count = 3;
  CHECK(gather_rows(a, e) == bad_value(2), "accepted 4");
}

TEST(patch_embed) {
  everywhere([](const Exec& e, DType type) {
    if (type == DType::kFloat16) return;
    // [2, 4, 3, 7, 10], tubelets of [2, 3, 4] with stride [2, 2, 3] from [0, 1, 0]; both orders of k.
    const int64_t C = 3, T = 4, H = 7, X = 10, dim = 37, k = C * 24, tokens = 2 * 2 * 3;
    Block video(type, 2 * T * C * H * X), w(DType::kFloat32, dim * k), bias(DType::kFloat32, dim);
    Block out(DType::kFloat32, 2 * tokens * dim, false);
    const float scale[] = {1.0f, 0.5f, 2.0f}, shift[] = {0.0f, -1.0f, 0.25f};
    PatchEmbedArgs a;
    PatchProblem& q = a.problem;
    a.weight = std::make_shared<PackedMatrix>();
    PackMatrixArgs p;
    p.matrix = a.weight;
    p.source.data = w.data;
    p.source.n_stride = k;
    p.n = dim;
    p.k = k;
    CHECK(pack_matrix_job(p, e) == kOk, "%s", isa_name(e.isa));
    q.video = video.data;
    q.type = type;
    q.batch = 2;
    q.channels = C;
    q.batch_stride = T * C * H * X;
    q.channel_stride = H * X;
    const int64_t pixel[] = {C * H * X, X, 1}, grid[] = {2, 2, 3}, size[] = {2, 3, 4}, step[] = {2, 2, 3};
    for (int i = 0; i < 3; ++i) {
      q.pixel_stride[i] = pixel[i];
      q.grid[i] = grid[i];
      q.size[i] = size[i];
      q.step[i] = step[i];
    }
    q.start = X;
    q.scale = scale;
    q.shift = shift;
    q.bias = bias.f();
    q.out = out.data;
    q.out_rows = tokens;
    for (const bool last : {false, true}) {
      q.channels_last = last;
      CHECK(patch_embed(a, e) == kOk, "%s", isa_name(e.isa));
      for (int64_t r = 0; r < 2 * tokens; ++r) {
        const int64_t b = r / tokens, t = r % tokens / 6, y = r % 6 / 3, x = r % 3;
        for (int64_t n = 0; n < dim; ++n) {
          double sum = bias.at(n);
          for (int64_t i = 0; i < k; ++i) {
            const int64_t c = last ? i % C : i / 24, d = last ? i / C : i % 24;
            const int64_t at = b * q.batch_stride + c * H * X + (2 * t + d / 12) * pixel[0] +
                               (1 + 2 * y + d / 4 % 3) * X + 3 * x + d % 4;
            sum += w.at(n * k + i) * (video.at(at) * scale[c] + shift[c]);
          }
          NEAR(out.at(r * dim + n), sum, 1e-5);
        }
      }
    }
  });
}
