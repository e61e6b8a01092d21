// Floats of a type known at compile time, at element i of p; n elements are left, lanes beyond them read 0.

template <DType T, typename N>
HEDDLE_INLINE vf load_as(const void* p, int64_t i, N n) {
  if constexpr (T == DType::kFloat32) {
    const float* f = static_cast<const float*>(p) + i;
    return n >= W ? load(f) : load_n(f, static_cast<int>(n), 0.0f);
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(p) + i;
    if constexpr (T == DType::kBFloat16) return n >= W ? load_bf16(h) : load_bf16_n(h, static_cast<int>(n));
    else return n >= W ? load_f16(h) : load_f16_n(h, static_cast<int>(n));
  }
}

template <DType T, typename N>
HEDDLE_INLINE void store_as(void* p, int64_t i, vf v, N n) {
  if constexpr (T == DType::kFloat32) {
    float* f = static_cast<float*>(p) + i;
    if (n >= W) store(f, v); else store_n(f, v, static_cast<int>(n));
  } else {
    uint16_t* h = static_cast<uint16_t*>(p) + i;
    if constexpr (T == DType::kBFloat16) {
      if (n >= W) store_bf16(h, v); else store_bf16_n(h, v, static_cast<int>(n));
    } else {
      if (n >= W) store_f16(h, v); else store_f16_n(h, v, static_cast<int>(n));
    }
  }
}

// Calls f with the type as a constant, `decltype(t)::value`, so that a loop need not ask for it.
template <DType T>
struct TypeConstant {
  static constexpr DType value = T;
};
template <typename F>
HEDDLE_INLINE auto with_type(DType type, F f) {
  switch (type) {
    case DType::kBFloat16: return f(TypeConstant<DType::kBFloat16>());
    case DType::kFloat16: return f(TypeConstant<DType::kFloat16>());
    default: return f(TypeConstant<DType::kFloat32>());
  }
}

// The same as store_as with the type known at run time: one well-predicted branch per vector.
template <typename N>
HEDDLE_INLINE void store_to(void* p, DType type, int64_t i, vf v, N n) {
  if (type == DType::kFloat32) store_as<DType::kFloat32>(p, i, v, n);
  else if (type == DType::kBFloat16) store_as<DType::kBFloat16>(p, i, v, n);
  else store_as<DType::kFloat16>(p, i, v, n);
}
