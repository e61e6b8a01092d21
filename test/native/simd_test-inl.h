// One region's tests, re-included per instruction set by simd_test.cpp. The plain C++ beside each operation lives
// outside the region, compiled for the oldest CPU. Fused: whether fma rounds once.

constexpr bool kFused = W > 1;

struct Lanes {
  float f[W];
  int32_t i[W];
};

static void expect_f(const char* op, const float* got, const float* want) {
  for (int i = 0; i < W; ++i) {
    plain::check_same(op, i, got[i], want[i]);
  }
}
static void expect_i(const char* op, const int32_t* got, const int32_t* want) {
  for (int i = 0; i < W; ++i) plain::check_same_int(op, i, got[i], want[i]);
}

#define TRY_F(op, expression, lane)                       \
  do {                                                    \
    store(got.f, expression);                             \
    for (int i = 0; i < W; ++i) want.f[i] = (lane);       \
    expect_f(op, got.f, want.f);                          \
  } while (false)
#define TRY_I(op, expression, lane)                       \
  do {                                                    \
    storei(got.i, expression);                            \
    for (int i = 0; i < W; ++i) want.i[i] = (lane);       \
    expect_i(op, got.i, want.i);                          \
  } while (false)
#define TRY_M(op, expression, lane)                       \
  do {                                                    \
    const uint32_t bits = mask_bits(expression);          \
    for (int i = 0; i < W; ++i) {                         \
      plain::check_same_int(op, i, bits >> i & 1u, (lane) ? 1 : 0); \
    }                                                     \
    plain::check_same_int(op, -1, static_cast<int32_t>(static_cast<uint64_t>(bits) >> W), 0); \
  } while (false)

static void run_arithmetic() {
  plain::Draw draw(W);
  float a[W], b[W], c[W];
  int32_t x[W], y[W];
  Lanes got, want;
  for (int round = 0; round < plain::kRounds; ++round) {
    draw.floats(a, W);
    draw.floats(b, W);
    draw.floats(c, W);
    draw.ints(x, W);
    draw.ints(y, W);
    const vf va = load(a), vb = load(b), vc = load(c);
    const vi vx = loadi(x), vy = loadi(y);
    TRY_F("add", add(va, vb), plain::add(a[i], b[i]));
    TRY_F("sub", sub(va, vb), plain::sub(a[i], b[i]));
    TRY_F("mul", mul(va, vb), plain::mul(a[i], b[i]));
    TRY_F("div", div(va, vb), plain::div(a[i], b[i]));
    TRY_F("fma", fma(va, vb, vc), plain::fma(a[i], b[i], c[i], kFused));
    TRY_F("fnma", fnma(va, vb, vc), plain::fma(-a[i], b[i], c[i], kFused));
    TRY_F("max", max(va, vb), a[i] > b[i] ? a[i] : b[i]);
    TRY_F("min", min(va, vb), a[i] < b[i] ? a[i] : b[i]);
    TRY_F("sqrt", sqrt(va), plain::sqrt(a[i]));
    TRY_F("abs", abs(va), plain::flip(a[i], 0x7fffffffu, 0u));
    TRY_F("neg", neg(va), plain::flip(a[i], 0xffffffffu, 0x80000000u));
    TRY_F("set1", set1(a[0]), a[0]);
    TRY_F("as_float", as_float(vx), bits_to_float(static_cast<uint32_t>(x[i])));
    TRY_F("to_float", to_float(vx), static_cast<float>(x[i]));
    TRY_I("as_int", as_int(va), static_cast<int32_t>(float_to_bits(a[i])));
    TRY_I("set1i", set1i(x[0]), x[0]);
    TRY_I("iota", iota(), i);
    TRY_I("addi", addi(vx, vy), plain::wrap(static_cast<uint32_t>(x[i]) + static_cast<uint32_t>(y[i])));
    TRY_I("subi", subi(vx, vy), plain::wrap(static_cast<uint32_t>(x[i]) - static_cast<uint32_t>(y[i])));
    TRY_I("andi", andi(vx, vy), x[i] & y[i]);
    TRY_I("ori", ori(vx, vy), x[i] | y[i]);
    TRY_I("xori", xori(vx, vy), x[i] ^ y[i]);
    TRY_I("maxi", maxi(vx, vy), x[i] > y[i] ? x[i] : y[i]);
    TRY_I("mini", mini(vx, vy), x[i] < y[i] ? x[i] : y[i]);
    TRY_I("shl", shl<5>(vx), plain::wrap(static_cast<uint32_t>(x[i]) << 5));
    TRY_I("sra", sra<7>(vx), x[i] >> 7);
    TRY_I("srl", srl<7>(vx), plain::wrap(static_cast<uint32_t>(x[i]) >> 7));
    TRY_M("lt", lt(va, vb), a[i] < b[i]);
    TRY_M("le", le(va, vb), a[i] <= b[i]);
    TRY_M("gt", gt(va, vb), a[i] > b[i]);
    TRY_M("ge", ge(va, vb), a[i] >= b[i]);
    TRY_M("eq", eq(va, vb), a[i] == b[i]);
    TRY_M("eq self", eq(va, va), a[i] == a[i]);
    TRY_M("not_nan", not_nan(va), a[i] == a[i]);
    TRY_M("eqi", eqi(vx, vy), x[i] == y[i]);
    TRY_M("gti", gti(vx, vy), x[i] > y[i]);
    TRY_M("mask_and", mask_and(lt(va, vb), gti(vx, vy)), a[i] < b[i] && x[i] > y[i]);
    TRY_M("mask_or", mask_or(lt(va, vb), gti(vx, vy)), a[i] < b[i] || x[i] > y[i]);
    TRY_M("mask_not", mask_not(lt(va, vb)), !(a[i] < b[i]));
    TRY_F("select", select(lt(va, vb), va, vc), a[i] < b[i] ? a[i] : c[i]);
    TRY_I("select (int)", select(gti(vx, vy), vx, vy), x[i] > y[i] ? x[i] : y[i]);

    int32_t top = x[0], bottom = x[0];
    for (int i = 1; i < W; ++i) {
      top = x[i] > top ? x[i] : top;
      bottom = x[i] < bottom ? x[i] : bottom;
    }
    plain::check_same_int("reduce_maxi", 0, reduce_maxi(vx), top);
    plain::check_same_int("reduce_mini", 0, reduce_mini(vx), bottom);
    TRY_I("spread_maxi", spread_maxi(vx), top);

    // Finite lanes of moderate size from here on: the order of a sum may differ, its value only slightly.
    double sum = 0.0, size = 0.0;
    float highest = -HUGE_VALF;
    draw.moderate(a, W);
    for (int i = 0; i < W; ++i) {
      sum += a[i];
      size += a[i] < 0.0f ? -a[i] : a[i];
      highest = a[i] > highest ? a[i] : highest;
    }
    plain::check_near("reduce_add", reduce_add(load(a)), sum, size * 4e-7);
    plain::check_same("reduce_max", 0, reduce_max(load(a)), highest);
    TRY_I("to_int", to_int(load(a)), plain::nearest(a[i]));
  }
  for (int i = 0; i < W; ++i) a[i] = static_cast<float>(i % 8) - 3.5f;  // ties go to even
  TRY_I("to_int ties", to_int(load(a)), plain::nearest(a[i]));
}

// Loads and stores, whole and partial: nothing beyond n is read (the sanitizer sees exact buffers) or written.
static void run_memory() {
  plain::Draw draw(W + 1);
  Lanes got, want;
  for (int n = 0; n <= W; ++n) {
    for (int round = 0; round < 50; ++round) {
      float* const a = plain::exact_floats(n);
      uint16_t* const h = plain::exact_halves(n);
      int32_t* const x = plain::exact_ints(n);
      draw.floats(a, n);
      draw.halves(h, n);
      draw.ints(x, n);
      TRY_M("first_n", first_n(n), i < n);
      TRY_F("load_n", load_n(a, n, -7.5f), i < n ? a[i] : -7.5f);
      TRY_F("load_bf16_n", load_bf16_n(h, n), i < n ? bf16_to_float(h[i]) : 0.0f);
      TRY_F("load_f16_n", load_f16_n(h, n), i < n ? f16_to_float(h[i]) : 0.0f);
      float full[W];
      int32_t full_i[W];
      draw.floats(full, W);
      draw.ints(full_i, W);
      store_n(a, load(full), n);
      storei_n(x, loadi(full_i), n);
      for (int i = 0; i < n; ++i) {
        plain::check_same("store_n", i, a[i], full[i]);
        plain::check_same_int("storei_n", i, x[i], full_i[i]);
      }
      store_bf16_n(h, load(full), n);
      for (int i = 0; i < n; ++i) plain::check_same("store_bf16_n", i, bf16_to_float(h[i]), bf16_to_float(float_to_bf16(full[i])));
      store_f16_n(h, load(full), n);
      for (int i = 0; i < n; ++i) plain::check_same("store_f16_n", i, f16_to_float(h[i]), f16_to_float(float_to_f16(full[i])));
      if (n == W) {
        TRY_F("load", load(a), a[i]);
        draw.halves(h, W);
        TRY_F("load_bf16", load_bf16(h), bf16_to_float(h[i]));
        TRY_F("load_f16", load_f16(h), f16_to_float(h[i]));
        store_bf16(h, load(full));
        for (int i = 0; i < W; ++i) plain::check_same_int("store_bf16", i, h[i], plain::quiet_bf16(full[i]));
        store_f16(h, load(full));
        for (int i = 0; i < W; ++i) plain::check_same("store_f16", i, f16_to_float(h[i]), f16_to_float(float_to_f16(full[i])));
      }
      plain::free_exact(a, h, x);
    }
  }
}

#define MEASURE(function, ...)                                             \
  do {                                                                     \
    plain::Sweep sweep(#function, plain::function, __VA_ARGS__);           \
    float in[W], out[W];                                                   \
    while (sweep.next(in, W)) {                                            \
      store(out, function(load(in)));                                      \
      sweep.judge(in, out, W);                                             \
    }                                                                      \
  } while (false)
#define AT(function, x, want)                                              \
  do {                                                                     \
    float out[W];                                                          \
    store(out, function(set1(x)));                                         \
    for (int i = 0; i < W; ++i) plain::check_same(#function " at " #x, i, out[i], want); \
  } while (false)

// The bounds are those of simd/math-inl.h.
static void run_math() {
  const float inf = HUGE_VALF, nan = NAN;
  MEASURE(exp, -87.3365402f, 88.7228317f, plain::kExpUlp);
  AT(exp, 0.0f, 1.0f);
  AT(exp, -0.0f, 1.0f);
  AT(exp, 1e-45f, 1.0f);
  AT(exp, 88.7228394f, inf);  // the first float whose exponential overflows
  AT(exp, inf, inf);
  AT(exp, -87.4f, 0.0f);
  AT(exp, -1e30f, 0.0f);
  AT(exp, -inf, 0.0f);
  AT(exp, nan, nan);
  MEASURE(log_normal, 1.17549435e-38f, 3.40282347e38f, plain::kLogUlp);
  AT(log_normal, 1.0f, 0.0f);
  MEASURE(log1p_unit, 0.0f, 1.0f, plain::kLog1pUlp);
  AT(log1p_unit, 0.0f, 0.0f);
  AT(log1p_unit, 1e-40f, 1e-40f);
  MEASURE(sigmoid, -87.0f, 3.40282347e38f, plain::kSigmoidUlp);
  AT(sigmoid, -87.1f, 0.0f);  // where the true value is under 1.7e-38
  AT(sigmoid, 0.0f, 0.5f);
  AT(sigmoid, inf, 1.0f);
  AT(sigmoid, -inf, 0.0f);
  AT(sigmoid, -1e30f, 0.0f);
  AT(sigmoid, nan, nan);
  MEASURE(sqrt_softplus, -87.3365402f, 3.40282347e38f, plain::kSqrtSoftplusUlp);
  MEASURE(tanh, -3.40282347e38f, 3.40282347e38f, plain::kTanhUlp);
  AT(tanh, 0.0f, 0.0f);
  AT(tanh, 1e-40f, 1e-40f);
  AT(tanh, inf, 1.0f);
  AT(tanh, -inf, -1.0f);
  AT(tanh, nan, nan);
  AT(sqrt_softplus, inf, inf);
  AT(sqrt_softplus, -88.0f, 0.0f);
  AT(sqrt_softplus, -inf, 0.0f);
}

#undef AT
#undef MEASURE
#undef TRY_F
#undef TRY_I
#undef TRY_M
