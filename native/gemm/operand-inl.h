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
// or infinity: a run that holds one gets a NaN scale, which makes every output of its row NaN. Writes floats to `whole`,
// or bytes (each xor `flip`) to `q`. Both may be x itself: a chunk is read before it is written.
HEDDLE_INLINE float quantize_run(const float* x, int64_t n, float* whole, int8_t* q, int32_t flip, int32_t* sum) {
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
  const bool zero = !(inverse > 0.0f);
  constexpr int64_t kChunk = 128;
  int32_t lanes[kChunk];
  vi total = set1i(0);
  for (int64_t i0 = 0; i0 < n; i0 += kChunk) {
    const int64_t count = n - i0 < kChunk ? n - i0 : kChunk;
    for (int64_t i = 0; i < count; i += W) {
      const vf v = count - i >= W ? load(x + i0 + i) : load_n(x + i0 + i, static_cast<int>(count - i), 0.0f);
      const vi r = zero ? set1i(0) : to_int(mul(v, set1(inverse)));
      storei(lanes + i, r);
      total = addi(total, r);
    }
    if (whole) {
      for (int64_t i = 0; i < count; ++i) whole[i0 + i] = static_cast<float>(lanes[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) q[i0 + i] = static_cast<int8_t>(lanes[i] ^ flip);
    }
  }
  storei(lanes, total);
  *sum = 0;
  for (int i = 0; i < W; ++i) *sum += lanes[i];
  return finite ? amax / 127.0f : bits_to_float(0x7fc00000u);
}

// o[k][m] = value k of row(m), W x W values at a time, in registers.
template <class Row>
HEDDLE_INLINE void interleave(const Row& row, int rows, int64_t n, float* o) {
  if (rows == 1) {
    const float* x = row(0);
    int64_t k = 0;
    for (; k + W <= n; k += W) store(o + k, load(x + k));
    for (; k < n; ++k) o[k] = x[k];
    return;
  }
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    for (int m0 = 0; m0 < rows; m0 += W) {
      const int count = rows - m0 < W ? rows - m0 : W;
      vf v[W];
      for (int m = 0; m < W; ++m) v[m] = m < count ? load(row(m0 + m) + k) : set1(0.0f);
      transpose(v);
      for (int i = 0; i < W; ++i) {
        float* to = o + (k + i) * rows + m0;
        if (count == W) store(to, v[i]); else store_n(to, v[i], count);
      }
    }
  }
  for (; k < n; ++k) {
    for (int m = 0; m < rows; ++m) o[k * rows + m] = row(m)[k];
  }
}

// The same of rows `stride` floats apart.
HEDDLE_INLINE void interleave_rows(const float* x, int64_t stride, int rows, int64_t n, float* o) {
  interleave([=](int m) { return x + m * stride; }, rows, n, o);
}

// `rows` fp32 rows at x + m * stride, each valid and zero-padded up to steps * unit values; overwritten.
HEDDLE_INLINE void pack_operand(Operand kind, const PackedMatrix& w, float* x, int64_t stride, int rows, char* out) {
  const int64_t padded = w.steps * pack_unit(w.type);
  switch (kind) {
    case Operand::kFloat32:
    case Operand::kFloat32Pair:
      interleave_rows(x, stride, rows, padded, reinterpret_cast<float*>(out));
      return;
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
    case Operand::kIntFloat:
    case Operand::kUint8:
    case Operand::kInt8: {
      const bool whole = kind == Operand::kIntFloat;
      const int64_t group = w.group ? w.group : padded;
      const int64_t groups = w.groups();
      const int64_t words = whole ? padded : padded / 4;  // of a row: floats or quads
      float* o = reinterpret_cast<float*>(out);
      float* scale = o + words * rows;
      int32_t* sums = reinterpret_cast<int32_t*>(scale + groups * rows);
      const int32_t flip = kind == Operand::kUint8 ? 0x80 : 0;  // adding 128 to an int8 flips its top bit
      for (int m = 0; m < rows; ++m) {
        float* row = x + m * stride;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t begin = g * group, end = begin + group < padded ? begin + group : padded;
          int32_t sum = 0;
          // In place: the byte of value i lies before float i, which has been read by then.
          int8_t* q = reinterpret_cast<int8_t*>(row) + begin;
          scale[g * rows + m] = quantize_run(row + begin, end - begin, whole ? row + begin : nullptr, q, flip, &sum);
          if (kind != Operand::kUint8) sums[g * rows + m] = sum;
        }
      }
      interleave_rows(x, stride, rows, words, o);
      return;
    }
  }
}
