// From raw products to logits: visibility, softcap, bias, ALiBi. Shared by the forward and the backward.

constexpr float kNegInf = -HUGE_VALF;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// tanh; 2 ULP: odd polynomial near 0 (Cephes), (1 - e^-2|x|) / (1 + e^-2|x|) beyond.
HEDDLE_INLINE vf tanh_lanes(vf x) {
  const vf a = abs(x), z = mul(x, x);
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const vf near = fma(mul(p, z), x, x);
  const vf e = exp2_lanes(mul(a, set1(-2.0f * kLog2e)));
  const vf far = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  const vf signed_far = select(lt(x, set1(0.0f)), neg(far), far);
  return select(lt(a, set1(0.625f)), near, select(not_nan(x), signed_far, x));
}

HEDDLE_INLINE vi load_ids(const int32_t* p, int n) {
  if (n >= W) return loadi(p);
  int32_t t[W];
  for (int i = 0; i < W; ++i) t[i] = i < n ? p[i] : -1;
  return loadi(t);
}

HEDDLE_INLINE vm nonzero(vi x) { return mask_not(eqi(x, set1i(0))); }

// One query row as the logits see it.
struct RowView {
  int64_t position;  // inside the sequence
  int32_t head;
  KeyRange range;
};

HEDDLE_INLINE const uint8_t* block_row(const AttentionProblem& p, const Sequence& s, const RowView& row) {
  const int64_t block = (s.query_begin + row.position) / p.block_query;
  return p.block_mask + s.batch * p.block_stride[0] + row.head * p.block_stride[1] + block * p.block_stride[2];
}

// Lanes of keys [key, key + W) inside a range.
HEDDLE_INLINE vm range_lanes(KeyRange range, int64_t key) {
  const int64_t below = range.lo - key, above = range.hi - key;
  const int lo = below < 0 ? 0 : below > W ? W : static_cast<int>(below);
  const int hi = above < 0 ? 0 : above > W ? W : static_cast<int>(above);
  return mask_and(first_n(hi), mask_not(first_n(lo)));
}

// Lanes of `row` that see keys [key, key + W) of the sequence; n of them exist.
HEDDLE_INLINE vm visible_lanes(const AttentionProblem& p, const Sequence& s, const RowView& row, int64_t key, int n) {
  vm seen = range_lanes(row.range, key);
  const int64_t query = s.query_begin + row.position, at = s.key_begin + key;
  if (p.query_ids) {
    const int32_t id = p.query_ids[s.batch * p.query_id_stride + query];
    const vi ids = load_ids(p.key_ids + s.batch * p.key_id_stride + at, n);
    if (id >= 0) seen = mask_or(seen, mask_and(eqi(ids, set1i(id)), first_n(n < W ? n : W)));
  }
  if (p.mask) {
    const uint8_t* m = p.mask + s.batch * p.mask_stride[0] + s.inner * p.inner_stride.mask +
                       row.head * p.mask_stride[1] + query * p.mask_stride[2];
    seen = mask_and(seen, nonzero(load_bytes(m + at, n)));
  }
  if (p.block_mask) {
    const uint8_t* m = block_row(p, s, row);
    const int last = (n < W ? n : W) - 1;
    if (at / p.block_key == (at + last) / p.block_key) {
      if (!m[at / p.block_key]) seen = first_n(0);
    } else {
      uint8_t t[W] = {};
      for (int i = 0; i <= last; ++i) t[i] = m[(at + i) / p.block_key];
      seen = mask_and(seen, nonzero(load_bytes(t, W)));
    }
  }
  return seen;
}

// Natural logits of lanes from raw products, before masking; *slope is d logit / d (scale * product).
HEDDLE_INLINE vf logit_lanes(const AttentionProblem& p, const Sequence& s, const RowView& row, int64_t key, int n,
                             vf product, vf* slope) {
  vf z = mul(product, set1(p.scale));
  if (p.softcap > 0.0f) {
    const vf t = tanh_lanes(div(z, set1(p.softcap)));
    z = mul(t, set1(p.softcap));
    if (slope) *slope = fnma(t, t, set1(1.0f));
  } else if (slope) {
    *slope = set1(1.0f);
  }
  if (p.bias) {
    z = add(z, load_float(p.bias, p.bias_type, p.bias_at(s, row.position, row.head, key), n));
  }
  if (p.alibi) {
    const int64_t distance = key - (row.position + s.keys - s.queries);
    const vf d = abs(to_float(addi(set1i(static_cast<int32_t>(distance)), iota())));
    z = fnma(set1(p.alibi[row.head]), d, z);
  }
  return z;
}

// Turns the products of sub-panel `sub` in place into logits in units of ln 2 / factor, -Inf where masked.
HEDDLE_INLINE void mask_sub(const AttentionProblem& p, const Sequence& s, const RowView& row, bool transform,
                            int64_t panel_key, int sub, float* scores) {
  const int64_t key = panel_key + sub * kSub;
  if (!transform && row.range.lo <= key && row.range.hi >= key + kSub) return;
  for (int j = 0; j < kSub; j += W) {
    float* at = scores + sub * kSub + j;
    if (!transform) {
      store(at, select(range_lanes(row.range, key + j), load(at), set1(kNegInf)));
      continue;
    }
    const int64_t left = s.keys - key - j;
    const int n = left > W ? W : static_cast<int>(left);
    if (n <= 0) {
      store(at, set1(kNegInf));
      continue;
    }
    const vf z = logit_lanes(p, s, row, key + j, n, load(at), nullptr);
    store(at, select(visible_lanes(p, s, row, key + j, n), z, set1(kNegInf)));
  }
}

// Whether any of `rows` consecutive rows may see a key of the sub-panel at `key`; exact but for `mask`.
HEDDLE_INLINE bool sub_is_seen(const AttentionProblem& p, const Sequence& s, const RowView* rows, int count, int64_t key) {
  const int64_t end = key + kSub < s.keys ? key + kSub : s.keys;
  for (int r = 0; r < count; ++r) {
    bool seen = rows[r].range.lo < end && rows[r].range.hi > key;
    if (!seen && p.query_ids) {
      const int32_t id = p.query_ids[s.batch * p.query_id_stride + s.query_begin + rows[r].position];
      const int32_t* ids = p.key_ids + s.batch * p.key_id_stride + s.key_begin;
      for (int64_t j = key; id >= 0 && j < end && !seen; ++j) seen = ids[j] == id;
    }
    if (seen && p.block_mask) {
      const uint8_t* m = block_row(p, s, rows[r]);
      seen = false;
      for (int64_t b = (s.key_begin + key) / p.block_key; b <= (s.key_begin + end - 1) / p.block_key; ++b) seen |= m[b] != 0;
    }
    if (seen) return true;
  }
  return false;
}
