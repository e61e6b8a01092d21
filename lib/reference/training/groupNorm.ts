/** See native/training/group_norm.h. */
export function groupNormReference(
  samples: number,
  channels: number,
  spatial: number,
  groups: number,
  epsilon: number,
  x: Float32Array,
  weight: Float32Array,
  bias: Float32Array | null,
  out: Float32Array,
  normalized: Float32Array,
  rstd: Float32Array,
): number {
  const n = (channels / groups) * spatial;
  if (n === 0) return 0;
  for (let row = 0; row < samples * groups; row++) {
    const at = row * n;
    let mean = 0;
    for (let i = 0; i < n; i++) mean += x[at + i] / n;
    let variance = 0;
    for (let i = 0; i < n; i++) variance += (x[at + i] - mean) ** 2;
    const scale = 1 / Math.sqrt(variance / n + epsilon);
    rstd[row] = scale;
    for (let i = 0; i < n; i++) {
      const c = (row % groups) * (channels / groups) + Math.floor(i / spatial);
      const v = (x[at + i] - mean) * scale;
      normalized[at + i] = v;
      out[at + i] = weight[c] * v + (bias === null ? 0 : bias[c]);
    }
  }
  return 0;
}

/** See native/training/group_norm.h. */
export function groupNormBackwardReference(
  samples: number,
  channels: number,
  spatial: number,
  groups: number,
  _epsilon: number,
  gradOutput: Float32Array,
  weight: Float32Array,
  _bias: null,
  out: Float32Array,
  normalized: Float32Array,
  rstd: Float32Array,
): number {
  const n = (channels / groups) * spatial;
  if (n === 0) return 0;
  const h = new Float64Array(n);
  for (let row = 0; row < samples * groups; row++) {
    const at = row * n;
    let mean = 0;
    let dot = 0;
    for (let i = 0; i < n; i++) {
      const c = (row % groups) * (channels / groups) + Math.floor(i / spatial);
      h[i] = weight[c] * gradOutput[at + i];
      mean += h[i] / n;
      dot += (h[i] * normalized[at + i]) / n;
    }
    for (let i = 0; i < n; i++) out[at + i] = rstd[row] * (h[i] - mean - normalized[at + i] * dot);
  }
  return 0;
}
