import { erf } from '../gemm/activation.ts';

/** In the order of native/training/activation.h. */
export const ELEMENTWISE = [
  'relu',
  'tanh',
  'relu-backward',
  'tanh-backward',
  'gelu-backward',
  'gelu-tanh-backward',
] as const;
export type Elementwise = (typeof ELEMENTWISE)[number];

const C = Math.sqrt(2 / Math.PI);

function geluDerivative(x: number): number {
  return 0.5 * (1 + erf(x / Math.SQRT2)) + (x * Math.exp(-0.5 * x * x)) / Math.sqrt(2 * Math.PI);
}

function geluTanhDerivative(x: number): number {
  const t = Math.tanh(C * (x + 0.044715 * x ** 3));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * C * (1 + 3 * 0.044715 * x * x);
}

const FUNCTIONS: Readonly<Record<Elementwise, (x: number, y: number) => number>> = {
  relu: (x) => Math.max(0, x),
  tanh: Math.tanh,
  'relu-backward': (g, y) => (y > 0 ? g : 0),
  'tanh-backward': (g, y) => g * (1 - y * y),
  'gelu-backward': (g, x) => g * geluDerivative(x),
  'gelu-tanh-backward': (g, x) => g * geluTanhDerivative(x),
};

/** See native/training/activation.h. */
export function elementwiseReference(
  kind: number,
  count: number,
  x: Float32Array,
  y: Float32Array | null,
  out: Float32Array,
): number {
  const f = FUNCTIONS[ELEMENTWISE[kind]];
  for (let i = 0; i < count; i++) out[i] = f(x[i], y === null ? 0 : y[i]);
  return 0;
}
