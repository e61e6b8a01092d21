// Rows whose columns are positions (channels first) without the padded ones: group-norm and convolutions.
#pragma once
#include <cstring>
#include <new>
#include <vector>

#include "core/dtype.h"
#include "privacy/kernels.h"

namespace heddle {

// out[i] = row[places[i]], widened to fp32.
inline void gather_row(const RowSource& s, int64_t row, const std::vector<int64_t>& places, float* out) {
  const int64_t at = row * s.stride;
  const auto* half = static_cast<const uint16_t*>(s.data) + at;
  size_t i = 0;
  switch (s.type) {
    case DType::kBFloat16:
      for (int64_t p : places) out[i++] = bf16_to_float(half[p]);
      return;
    case DType::kFloat16:
      for (int64_t p : places) out[i++] = f16_to_float(half[p]);
      return;
    default:
      for (int64_t p : places) out[i++] = static_cast<const float*>(s.data)[at + p];
  }
}

// Places of one sample that are not padding, ascending; mask [samples, count], 0: padding.
inline void unpadded(const uint8_t* mask, int64_t sample, int64_t count, std::vector<int64_t>& places) {
  places.clear();
  for (int64_t p = 0; p < count; ++p) {
    if (mask[sample * count + p]) places.push_back(p);
  }
}

// One sample's rows: in place without a mask, else copied one at a time.
class UnpaddedRows {
 public:
  // False without memory.
  bool begin(const uint8_t* mask, int64_t sample, int64_t count) try {
    masked_ = mask != nullptr, count_ = count;
    if (!masked_) return true;
    unpadded(mask, sample, count, places_);
    copy_.resize(places_.size());
    count_ = static_cast<int64_t>(places_.size());
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
  int64_t count() const { return count_; }
  // Valid until the next call; read it as row 0.
  RowSource row(const RowSource& s, int64_t index) {
    if (!masked_) return {static_cast<const char*>(s.data) + index * s.stride * dtype_size(s.type), s.type, s.stride};
    gather_row(s, index, places_, copy_.data());
    return {copy_.data(), DType::kFloat32, count_};
  }

 private:
  bool masked_ = false;
  int64_t count_ = 0;
  std::vector<int64_t> places_;
  std::vector<float> copy_;
};

}  // namespace heddle
