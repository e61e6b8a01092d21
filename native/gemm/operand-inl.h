// Packs rows of x into the operand of one tile. Every row is packed alone: its bits do not depend on the others.

HEDDLE_INLINE float load_element(const void* x, DType type, int64_t i) {
  switch (type) {
    case DType::kBFloat16: return bf16_to_float(static_cast<const uint16_t*>(x)[i]);
    case DType::kFloat16: return f16_to_float(static_cast<const uint16_t*>(x)[i]);
    default: return static_cast<const float*>(x)[i];
  }
}

// One row of `type` as floats, zero beyond n up to `padded`.
HEDDLE_INLINE void widen_row(const void* x, DType type, int64_t offset, int64_t n, int64_t padded, float* out) {
  int64_t i = 0;
  if (type == DType::kFloat32) {
    const float* f = static_cast<const float*>(x) + offset;
    for (; i + W <= n; i += W) store(out + i, load(f + i));
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(x) + offset;
    if (type == DType::kBFloat16) {
      for (; i + W <= n; i += W) store(out + i, load_bf16(h + i));
    } else {
      for (; i + W <= n; i += W) store(out + i, load_f16(h + i));
    }
  }
  for (; i < n; ++i) out[i] = load_element(x, type, offset + i);
  for (; i < padded; ++i) out[i] = 0.0f;
}

// Quantises n floats (n a multiple of 4) to round(x * 127 / max|x|); returns the scale. Integers cannot carry a NaN
// or infinity: a run that holds one gets a NaN scale, which makes every output of its row NaN.
HEDDLE_INLINE float quantize_run(const float* x, int64_t n, int8_t* q, int32_t* sum) {
  vf top = set1(0.0f), odd = set1(0.0f);  // odd: NaN once a value was not finite
  for (int64_t i = 0; i < n; i += W) {
    const vf v = n - i >= W ? load(x + i) : load_n(x + i, static_cast<int>(n - i), 0.0f);
    top = max(top, abs(v));
    odd = add(odd, mul(v, set1(0.0f)));
  }
  const bool finite = reduce_add(odd) == 0.0f;
  const float amax = reduce_max(top);
  float inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
  if (!finite || !(inverse < HUGE_VALF)) inverse = 0.0f;
  int32_t total = 0;
  int32_t lanes[W];
  for (int64_t i = 0; i < n; i += W) {
    const int64_t left = n - i < W ? n - i : W;
    const vf v = left == W ? load(x + i) : load_n(x + i, static_cast<int>(left), 0.0f);
    storei(lanes, to_int(mul(v, set1(inverse))));
    for (int64_t j = 0; j < left; ++j) {
      q[i + j] = inverse > 0.0f ? static_cast<int8_t>(lanes[j]) : int8_t{0};
      total += q[i + j];
    }
  }
  *sum = total;
  return finite ? amax / 127.0f : bits_to_float(0x7fc00000u);
}

// `rows` fp32 rows at x + m * stride, each valid and zero-padded up to steps * unit values; overwritten.
HEDDLE_INLINE void pack_operand(Operand kind, const PackedMatrix& w, float* x, int64_t stride, int rows, char* out) {
  const int64_t padded = w.steps * pack_unit(w.type);
  switch (kind) {
    case Operand::kFloat32: {
      float* o = reinterpret_cast<float*>(out);
      // 16 values of k at a time keep both sides in L1.
      for (int64_t k0 = 0; k0 < padded; k0 += 16) {
        const int64_t k1 = k0 + 16 < padded ? k0 + 16 : padded;
        for (int m = 0; m < rows; ++m) {
          const float* row = x + m * stride;
          for (int64_t k = k0; k < k1; ++k) o[k * rows + m] = row[k];
        }
      }
      return;
    }
    case Operand::kFloat32Pair: {
      float* o = reinterpret_cast<float*>(out);
      for (int64_t s0 = 0; s0 < w.steps; s0 += 8) {
        const int64_t s1 = s0 + 8 < w.steps ? s0 + 8 : w.steps;
        for (int m = 0; m < rows; ++m) {
          const float* row = x + m * stride;
          for (int64_t s = s0; s < s1; ++s) {
            o[(s * rows + m) * 2] = row[2 * s];
            o[(s * rows + m) * 2 + 1] = row[2 * s + 1];
          }
        }
      }
      return;
    }
    case Operand::kBFloat16: {
      uint32_t* o = reinterpret_cast<uint32_t*>(out);
      for (int64_t s0 = 0; s0 < w.steps; s0 += 8) {
        const int64_t s1 = s0 + 8 < w.steps ? s0 + 8 : w.steps;
        for (int m = 0; m < rows; ++m) {
          const float* row = x + m * stride;
          uint16_t h[16];
          if (s1 - s0 == 8 && W <= 16) {
            for (int i = 0; i < 16; i += W) store_bf16(h + i, load(row + 2 * s0 + i));
          } else {
            for (int64_t i = 0; i < 2 * (s1 - s0); ++i) h[i] = float_to_bf16(row[2 * s0 + i]);
          }
          for (int64_t s = s0; s < s1; ++s) {
            o[s * rows + m] = h[2 * (s - s0)] | static_cast<uint32_t>(h[2 * (s - s0) + 1]) << 16;
          }
        }
      }
      return;
    }
    case Operand::kIntFloat: {
      const int64_t group = w.group ? w.group : padded;
      const int64_t groups = w.groups();
      float* o = reinterpret_cast<float*>(out);
      float* scale = o + padded * rows;
      int32_t* sums = reinterpret_cast<int32_t*>(scale + groups * rows);
      for (int m = 0; m < rows; ++m) {
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t begin = g * group, end = begin + group < padded ? begin + group : padded;
          int32_t sum = 0;
          int8_t* q = reinterpret_cast<int8_t*>(x + m * stride + begin);
          scale[g * rows + m] = quantize_run(x + m * stride + begin, end - begin, q, &sum);
          sums[g * rows + m] = sum;
          for (int64_t i = begin; i < end; ++i) o[i * rows + m] = q[i - begin];
        }
      }
      return;
    }
    case Operand::kUint8:
    case Operand::kInt8: {
      const bool grouped = kind == Operand::kInt8;
      const int64_t group = w.group ? w.group : padded;
      const int64_t groups = w.groups();
      uint32_t* o = reinterpret_cast<uint32_t*>(out);
      float* scale = reinterpret_cast<float*>(out + padded * rows);
      int32_t* sums = reinterpret_cast<int32_t*>(scale + groups * rows);
      const uint32_t flip = grouped ? 0u : 0x80808080u;  // adding 128 to an int8 flips its top bit
      for (int m = 0; m < rows; ++m) {
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t begin = g * group, end = begin + group < padded ? begin + group : padded;
          int32_t sum = 0;
          // In place: the byte of value i lies before float i, which has been read by then.
          int8_t* q = reinterpret_cast<int8_t*>(x + m * stride + begin);
          scale[g * rows + m] = quantize_run(x + m * stride + begin, end - begin, q, &sum);
          if (grouped) sums[g * rows + m] = sum;
          for (int64_t i = 0; i < end - begin; i += 4) {
            uint32_t quad;
            memcpy(&quad, q + i, 4);
            o[(begin + i) / 4 * rows + m] = quad ^ flip;
          }
        }
      }
      return;
    }
  }
}
