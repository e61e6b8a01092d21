/** Activations of a gated (or plain) feed-forward layer. */
export type Activation =
  | 'silu'
  | 'clamped-swiglu'
  | 'gelu-tanh'
  | 'gelu'
  | 'relu-squared'
  | 'relu'
  | 'identity';

/** In the order of their native numbers (native/moe/experts.h). */
export const ACTIVATIONS: readonly Activation[] = [
  'silu',
  'clamped-swiglu',
  'gelu-tanh',
  'gelu',
  'relu-squared',
  'relu',
  'identity',
];

export const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

/** erf to float64 accuracy: Taylor series for small x, continued fraction of erfc beyond. */
export function erf(x: number): number {
  const a = Math.abs(x);
  if (a > 6) return Math.sign(x);
  if (a < 2.5) {
    let term = a;
    let sum = a;
    for (let n = 1; n < 100 && Math.abs(term) > 1e-18 * Math.abs(sum); n++) {
      term *= (-a * a) / n;
      sum += term / (2 * n + 1);
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI);
  }
  let fraction = a;
  for (let n = 60; n >= 1; n--) fraction = a + n / 2 / fraction;
  return Math.sign(x) * (1 - Math.exp(-a * a) / (Math.sqrt(Math.PI) * fraction));
}

export function geluTanh(x: number): number {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}

export function gelu(x: number): number {
  return 0.5 * x * (1 + erf(x / Math.SQRT2));
}

/** act(gate) * up; see native/moe/experts.h. `up` is 1 for ungated layers. */
export function gatedActivation(
  kind: Activation,
  gate: number,
  up: number,
  alpha: number,
  limit: number,
): number {
  switch (kind) {
    case 'silu':
      return gate * sigmoid(gate) * up;
    case 'clamped-swiglu': {
      const g = Math.min(gate, limit);
      const u = Math.min(Math.max(up, -limit), limit);
      return g * sigmoid(alpha * g) * (u + 1);
    }
    case 'gelu-tanh':
      return geluTanh(gate) * up;
    case 'gelu':
      return gelu(gate) * up;
    case 'relu-squared':
      return Math.max(gate, 0) ** 2 * up;
    case 'relu':
      return Math.max(gate, 0) * up;
    case 'identity':
      return gate * up;
  }
}

/**
 * Derivatives of {@link gatedActivation} with respect to `gate` and `up`. Beyond a clamp the derivative is 0, at its
 * edge 1; that of relu at 0 is 0.
 */
export function gatedActivationGradient(
  kind: Activation,
  gate: number,
  up: number,
  alpha: number,
  limit: number,
): [gate: number, up: number] {
  switch (kind) {
    case 'silu': {
      const s = sigmoid(gate);
      return [s * (1 + gate * (1 - s)) * up, gate * s];
    }
    case 'clamped-swiglu': {
      const g = Math.min(gate, limit);
      const u = Math.min(Math.max(up, -limit), limit);
      const s = sigmoid(alpha * g);
      return [gate > limit ? 0 : s * (1 + alpha * g * (1 - s)) * (u + 1), Math.abs(up) > limit ? 0 : g * s];
    }
    case 'gelu-tanh': {
      const t = Math.tanh(Math.sqrt(2 / Math.PI) * (gate + 0.044715 * gate ** 3));
      const slope = Math.sqrt(2 / Math.PI) * (1 + 3 * 0.044715 * gate ** 2);
      return [(0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * slope) * up, geluTanh(gate)];
    }
    case 'gelu': {
      const density = Math.exp((-gate * gate) / 2) / Math.sqrt(2 * Math.PI);
      return [(0.5 * (1 + erf(gate / Math.SQRT2)) + gate * density) * up, gelu(gate)];
    }
    case 'relu-squared':
      return [2 * Math.max(gate, 0) * up, Math.max(gate, 0) ** 2];
    case 'relu':
      return [(gate > 0 ? 1 : Number.isNaN(gate) ? NaN : 0) * up, Math.max(gate, 0)];
    case 'identity':
      return [up, gate];
  }
}
