const SGD = 0;
const LAMB = 2;

/** See native/training/optimizer_update.h; in float64, state rounded to float32. */
export function optimizerUpdateReference(
  rule: number,
  count: number,
  parameter: Float32Array,
  gradient: Float32Array,
  first: Float32Array | null,
  second: Float32Array | null,
  scale: number,
  learningRate: number,
  weightDecay: number,
  momentum: number,
  beta2: number,
  epsilon: number,
  correction1: number,
  correction2: number,
  nesterov: boolean,
): number {
  if (rule === SGD) {
    for (let i = 0; i < count; i++) {
      const g = scale * gradient[i] + weightDecay * parameter[i];
      let d = g;
      if (first !== null) {
        const b = momentum * first[i] + g;
        first[i] = b;
        d = nesterov ? g + momentum * b : b;
      }
      parameter[i] -= learningRate * d;
    }
    gradient.fill(0, 0, count);
    return 0;
  }
  const m = first as Float32Array;
  const v = second as Float32Array;
  const step = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const g = scale * gradient[i];
    const mi = momentum * m[i] + (1 - momentum) * g;
    const vi = beta2 * v[i] + (1 - beta2) * g * g;
    m[i] = mi;
    v[i] = vi;
    step[i] = (mi * correction1) / (Math.sqrt(vi * correction2) + epsilon) + weightDecay * parameter[i];
  }
  let ratio = 1;
  if (rule === LAMB) {
    let p = 0;
    let r = 0;
    for (let i = 0; i < count; i++) {
      p += parameter[i] ** 2;
      r += step[i] ** 2;
    }
    if (p > 0 && r > 0) ratio = Math.sqrt(p / r);
  }
  for (let i = 0; i < count; i++) parameter[i] -= learningRate * ratio * step[i];
  gradient.fill(0, 0, count);
  return 0;
}
