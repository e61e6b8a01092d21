import type { OpOptions } from '../../../lib/op.ts';
import { clipFactorsSync } from '../../../lib/privacy/clipFactors.ts';
import { clippedGradientsSync } from '../../../lib/privacy/clippedGradients.ts';
import { addNoiseSync } from '../../../lib/privacy/gaussianNoise.ts';
import type { LinearLayer } from '../../../lib/privacy/layer.ts';
import { perSampleSquaredNormsSync } from '../../../lib/privacy/perSampleSquaredNorms.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import { makeLayer } from './layers.ts';
import { oneSample } from './slices.ts';

/** The linear layers of one block of GPT-2 small: qkv, projection, and the two of the feed-forward part. */
const widths: [inputs: number, outputs: number][] = [
  [768, 2304],
  [768, 768],
  [768, 3072],
  [3072, 768],
];
const [samples, positions] = [8, 512];
const flops = widths.reduce((sum, [d, p]) => {
  const rows = samples * positions;
  return sum + 2 * rows * d * p + Math.min(rows * (positions + 1) * (d + p), 2 * rows * d * p);
}, 0);

/**
 * A whole private step, norms, factors, clipped sums and noise, against what the plain gradients of the same layers
 * cost, and against per-sample gradients by vmap.
 */
export const privateStepCases: OpCase[] = ['plain gradients', 'per-sample gradients by vmap'].map(
  (peer, i) => ({
    family: 'privacy',
    op: 'privateStep',
    name: `linear layers of a GPT-2 small block [${samples}, ${positions}], peer: ${peer}`,
    tolerance: 1e-5,
    flops,
    items: { unit: 'sample', count: samples },
    bench: true,
    verify: false,
    peers: {
      pytorch: {
        op: i === 0 ? 'weight_gradients' : 'vmap_clipped_sum',
        samples,
        positions,
        widths: widths.flat().join(),
      },
    },
    prepare(random) {
      const layers = widths.map(([inputs, outputs]) => {
        const shape = {
          name: '',
          kind: 'linear' as const,
          lead: [samples, positions],
          inputs,
          outputs,
          bias: false,
        };
        return makeLayer(shape, random) as LinearLayer;
      });
      const out = widths.map(([d, p]) => ({ weight: Tensor.zeros('float32', [p, d]) }));
      const key = Uint8Array.from({ length: 32 }, () => random.integer(0, 255));
      const norms = (list: LinearLayer[], o: OpOptions, method: 'auto' | 'instantiate') =>
        list.map((layer) => perSampleSquaredNormsSync(layer, { method, ...o }));
      let step = 0;
      const whole = (o: OpOptions) => {
        const squared = norms(layers, o, 'auto');
        const factors = clipFactorsSync(squared, { maxNorm: 1 });
        layers.forEach((layer, l) => {
          out[l].weight.data.fill(0);
          clippedGradientsSync(layer, factors, { ...o, out: out[l] });
          addNoiseSync(out[l].weight, { ...o, key, step: step++, stddev: 1 });
        });
        return squared;
      };
      const first = layers.map((layer) => oneSample(layer, 0) as LinearLayer);
      const slice = (o: OpOptions) => norms(first, o, 'instantiate');
      return {
        run: whole,
        runAsync: async (o) => whole(o),
        timed: (o) => () => whole(o),
        slice: {
          prepared: { run: slice, runAsync: async (o) => slice(o) },
          fraction: 1 / samples,
          of: (squared) =>
            squared.map((t) => new Tensor('float32', (t.data as Float32Array).slice(0, 1), [1])),
        },
      };
    },
  }),
);
