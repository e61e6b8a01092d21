#include "training/pooling.h"

#include <algorithm>

namespace heddle {
namespace {

struct Window {
  int64_t y0, y1, x0, x1;
};

Window window(const PoolingArgs& a, int64_t oy, int64_t ox) {
  const int64_t y = oy * a.stride[0] - a.padding[0], x = ox * a.stride[1] - a.padding[1];
  return {std::max<int64_t>(y, 0), std::min<int64_t>(y + a.kernel[0], a.size[0]), std::max<int64_t>(x, 0),
          std::min<int64_t>(x + a.kernel[1], a.size[1])};
}

int64_t grain(const PoolingArgs& a) { return 1 + 16384 / (1 + int64_t{a.size[0]} * a.size[1]); }

}  // namespace

Status pooling(const PoolingArgs& a, const Exec& exec) {
  const int64_t plane = int64_t{a.size[0]} * a.size[1], places = int64_t{a.out_size[0]} * a.out_size[1];
  const float area = static_cast<float>(a.kernel[0]) * static_cast<float>(a.kernel[1]);
  const bool done = parallel_for(exec, a.planes, grain(a), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const float* x = a.x + p * plane;
      float* out = a.out + p * places;
      int32_t* index = a.index ? a.index + p * places : nullptr;
      for (int64_t oy = 0; oy < a.out_size[0]; ++oy) {
        for (int64_t ox = 0; ox < a.out_size[1]; ++ox) {
          const Window w = window(a, oy, ox);
          if (a.average) {
            float sum = 0.0f;
            for (int64_t iy = w.y0; iy < w.y1; ++iy) {
              for (int64_t ix = w.x0; ix < w.x1; ++ix) sum += x[iy * a.size[1] + ix];
            }
            *out++ = sum / area;
            continue;
          }
          int64_t at = w.y0 * a.size[1] + w.x0;
          float best = x[at];
          for (int64_t iy = w.y0; iy < w.y1; ++iy) {
            for (int64_t ix = w.x0; ix < w.x1; ++ix) {
              const float v = x[iy * a.size[1] + ix];
              if (v > best || (v != v && best == best)) best = v, at = iy * a.size[1] + ix;
            }
          }
          *out++ = best;
          *index++ = static_cast<int32_t>(at);
        }
      }
    }
  });
  return done ? kOk : kCancelled;
}

Status pooling_backward(const PoolingArgs& a, const Exec& exec) {
  const int64_t plane = int64_t{a.size[0]} * a.size[1], places = int64_t{a.out_size[0]} * a.out_size[1];
  const float area = static_cast<float>(a.kernel[0]) * static_cast<float>(a.kernel[1]);
  const bool done = parallel_for(exec, a.planes, grain(a), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const float* g = a.x + p * places;
      float* dx = a.out + p * plane;
      std::fill(dx, dx + plane, 0.0f);
      if (!a.average) {
        const int32_t* index = a.index + p * places;
        for (int64_t i = 0; i < places; ++i) dx[index[i]] += g[i];
        continue;
      }
      for (int64_t oy = 0; oy < a.out_size[0]; ++oy) {
        for (int64_t ox = 0; ox < a.out_size[1]; ++ox) {
          const Window w = window(a, oy, ox);
          const float share = *g++ / area;
          for (int64_t iy = w.y0; iy < w.y1; ++iy) {
            for (int64_t ix = w.x0; ix < w.x1; ++ix) dx[iy * a.size[1] + ix] += share;
          }
        }
      }
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
