/** See native/training/cross_entropy.h. */
export function crossEntropyReference(
  rows: number,
  classes: number,
  logits: Float32Array,
  labels: Int32Array,
  scale: Float32Array,
  losses: Float32Array,
  gradient: Float32Array,
  prediction: Int32Array,
): number {
  for (let r = 0; r < rows; r++) if (labels[r] < -1 || labels[r] >= classes) return r + 1;
  for (let r = 0; r < rows; r++) {
    const x = logits.subarray(r * classes, (r + 1) * classes);
    let top = -Infinity;
    for (const v of x) if (v > top) top = v;
    prediction[r] = Math.max(0, x.indexOf(top));
    const label = labels[r];
    if (label < 0) {
      losses[r] = 0;
      gradient.fill(0, r * classes, (r + 1) * classes);
      continue;
    }
    let sum = 0;
    for (const v of x) sum += Math.exp(v - top);
    losses[r] = Math.log(sum) + top - x[label];
    for (let c = 0; c < classes; c++) {
      gradient[r * classes + c] = scale[r] * (Math.exp(x[c] - top) / sum - (c === label ? 1 : 0));
    }
  }
  return 0;
}
