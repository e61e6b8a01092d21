// The score pass of route_expert_choice.h.

HEDDLE_INLINE void expert_scores_row(const ExpertChoiceArgs& a, int64_t row) {
  alignas(64) float l[kMaxExperts + W];
  alignas(64) float s[kMaxExperts + W];
  const float m = read_row(a.logits, a.type, row, a.experts, nullptr, l);
  score_row(l, m, a.experts, a.score, s);
  float* column = a.scores + row;
  for (int32_t e = 0; e < a.experts; ++e) column[e * a.tokens] = s[e];
}

Status expert_scores(const ExpertChoiceArgs& a, const Exec& exec) {
  // Whole cache lines of each expert's scores per tile, so that two threads never write the same line in turn.
  const int64_t grain = 64 * (1 + 256 / a.experts);
  const bool done = parallel_for(exec, a.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) expert_scores_row(a, row);
  });
  return done ? kOk : kCancelled;
}
