import { describe, expect, it } from 'vitest';
import { factorizedAttentionBackwardSync, factorizedAttentionSync } from '../../lib/attention/index.ts';
import { drawFactorized, type FactorizedShape } from '../cases/attention/factorizedAttention.ts';
import {
  drawUpstream,
  factorizedAttentionBackwardCases,
} from '../cases/attention/factorizedAttentionBackward.ts';
import { Random } from '../cases/random.ts';
import { testCases } from '../helpers/cases.ts';
import { relativeError } from '../helpers/golden.ts';

testCases(factorizedAttentionBackwardCases);

describe('factorizedAttentionBackward against finite differences of the forward (reference)', () => {
  const base = { batch: 2, frames: 3, patches: 2, heads: 2, dim: 3 };
  const shapes: FactorizedShape[] = [
    { name: 'joint, causal', axis: 'joint', ...base, causal: true },
    { name: 'time, softcap, bias', axis: 'time', ...base, softcap: 1.5, bias: '1SHQ' },
    { name: 'split heads', axis: 'split-heads', ...base },
    { name: 'class token', axis: 'space', ...base, classToken: true, bias: '11HQ' },
    { name: 'kept', axis: 'time', ...base, keep: { share: 0.6 } },
  ];
  it.each(shapes)('$name', (shape) => {
    const random = new Random(12);
    const data = drawFactorized(shape, random);
    const { q, k, v } = data;
    const { g, options } = drawUpstream(data, 'float32', random, 'reference');
    const backend = 'reference';
    const sum = (x: ArrayLike<number>, y: ArrayLike<number>) =>
      Array.from(x).reduce((total, value, i) => total + value * y[i], 0);
    // float32 outputs round at 6e-8: a step of 2^-6 and central differences leave an error near 1e-4.
    const loss = () => {
      const r = factorizedAttentionSync(q, k, v, { ...data.options, backend });
      const classes = r.classToken
        ? sum(r.classToken.data as Float32Array, options.gradClassToken!.data as Float32Array)
        : 0;
      return sum(r.output.data as Float32Array, g.data as Float32Array) + classes;
    };
    const d = factorizedAttentionBackwardSync(g, q, k, v, { ...options, backend });
    const c = data.options.classToken;
    const pairs = [
      [q, d.query],
      [k, d.key],
      [v, d.value],
      [data.options.bias, d.bias],
      [c?.query, d.classToken?.query],
      [c?.key, d.classToken?.key],
      [c?.value, d.classToken?.value],
    ] as const;
    for (const [input, gradient] of pairs) {
      expect(input === undefined).toBe(gradient === undefined);
      if (input === undefined || gradient === undefined) continue;
      const x = input.data as Float32Array;
      const step = 2 ** -6;
      const numeric = x.map((value, i) => {
        const at = (shifted: number) => {
          x[i] = shifted;
          return loss();
        };
        const difference = at(value + step) - at(value - step);
        x[i] = value;
        return difference / (2 * step);
      });
      expect(relativeError(gradient.data as Float32Array, numeric)).toBeLessThan(1e-3);
    }
  });
});
