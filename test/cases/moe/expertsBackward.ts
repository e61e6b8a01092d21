import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import {
  type ExpertGradients,
  type ExpertsBackwardOptions,
  expertsBackward,
  expertsBackwardSync,
} from '../../../lib/moe/expertsBackward.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import { biasesOf, routingOf, type Shape, sourcesOf } from './expertsForward.ts';

interface BackwardShape extends Shape {
  options?: ExpertsBackwardOptions;
  gradType?: FloatType;
}

const base = { tokens: 37, experts: 6, k: 3, hidden: 52, intermediate: 36 };

const shapes: BackwardShape[] = [
  { name: 'SwiGLU', ...base },
  { name: 'SwiGLU, stacked', ...base, layout: 'stacked' },
  { name: 'SwiGLU, concatenated', ...base, layout: 'concatenated', biases: true },
  { name: 'one token', ...base, tokens: 1 },
  { name: 'no tokens', ...base, tokens: 0, biases: true },
  { name: 'crowded expert', ...base, tokens: 53, crowded: true },
  { name: 'masked routes', ...base, masked: true },
  { name: 'gpt-oss', ...base, layout: 'gpt-oss', biases: true, options: { activation: 'clamped-swiglu' } },
  {
    name: 'gpt-oss, clamps at work',
    ...base,
    layout: 'gpt-oss',
    biases: true,
    options: { activation: 'clamped-swiglu', alpha: 1.3, limit: 0.4 },
  },
  { name: 'GeGLU tanh', ...base, biases: true, options: { activation: 'gelu-tanh' } },
  { name: 'GeGLU erf', ...base, options: { activation: 'gelu' } },
  { name: 'ReLU squared, ungated', ...base, layout: 'ungated', options: { activation: 'relu-squared' } },
  { name: 'ReLU, ungated', ...base, layout: 'ungated', biases: true, options: { activation: 'relu' } },
  { name: 'ReLU', ...base, options: { activation: 'relu' } },
  { name: 'identity', ...base, options: { activation: 'identity' } },
  { name: 'odd sizes', tokens: 5, experts: 3, k: 2, hidden: 33, intermediate: 17 },
  { name: 'panels', tokens: 40, experts: 3, k: 2, hidden: 130, intermediate: 97, biases: true },
  { name: 'size 1', tokens: 3, experts: 2, k: 1, hidden: 1, intermediate: 1 },
  { name: 'many routes', tokens: 1500, experts: 2, k: 2, hidden: 9, intermediate: 7, biases: true },
  { name: 'bf16 gradient and x', ...base, xType: 'bfloat16', gradType: 'bfloat16' },
  { name: 'fp16 throughout', ...base, source: 'float16', xType: 'float16', gradType: 'float16' },
  { name: 'bf16', ...base, source: 'bfloat16', biases: true },
  {
    name: 'bf16 of fp32, odd',
    tokens: 9,
    experts: 3,
    k: 2,
    hidden: 33,
    intermediate: 19,
    options: { type: 'bfloat16' },
  },
  {
    name: 'bf16 gpt-oss',
    ...base,
    layout: 'gpt-oss',
    biases: true,
    source: 'bfloat16',
    xType: 'bfloat16',
    options: { activation: 'clamped-swiglu' },
  },
  {
    name: 'bf16 ungated',
    ...base,
    source: 'bfloat16',
    layout: 'ungated',
    options: { activation: 'gelu-tanh' },
  },
];

/** The gradients in a fixed order, lists spread. */
export function gradientList(g: ExpertGradients): Tensor[] {
  const { x, weights, gate, up, gateUp, down, biases } = g;
  return [x, weights, gate, up, gateUp, down, ...Object.values(biases ?? {})].flatMap((t) =>
    t === undefined ? [] : Array.isArray(t) ? t : [t],
  );
}

const TOLERANCE = { float32: 1e-5, bfloat16: 1e-2 } as const;

/** Gradients of expert compute: every activation, layout and weight type, at odd sizes. */
export const expertsBackwardCases: OpCase[] = shapes.map((s) => {
  const type = s.options?.type ?? (s.source === 'bfloat16' ? 'bfloat16' : 'float32');
  return {
    family: 'moe',
    op: 'expertsBackward',
    name: `${s.name} T=${s.tokens} E=${s.experts} k=${s.k} d=${s.hidden} f=${s.intermediate} ${type}`,
    tolerance: TOLERANCE[type],
    flops: s.tokens * s.k * s.hidden * s.intermediate * (s.layout === 'ungated' ? 10 : 16),
    prepare(random) {
      const sources = sourcesOf(s, random);
      const biases = s.biases ? biasesOf(s, random) : undefined;
      const tokens = (t: FloatType) =>
        new Tensor(t, encodeFloats(random.normals(s.tokens * s.hidden), t) as never, [s.tokens, s.hidden]);
      const x = tokens(s.xType ?? 'float32');
      const gradient = tokens(s.gradType ?? 'float32');
      const routing = routingOf(s, random);
      return {
        run(o) {
          return gradientList(
            expertsBackwardSync(gradient, x, routing, sources, { ...s.options, ...o, biases }),
          );
        },
        async runAsync(o) {
          return gradientList(
            await expertsBackward(gradient, x, routing, sources, { ...s.options, ...o, biases }),
          );
        },
      };
    },
  };
});
