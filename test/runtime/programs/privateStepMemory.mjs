// What a private step of one layer (norms, factors, clipped sum, noise) takes beyond its tensors, by batch size.
import { Tensor } from '../../../dist/index.js';
import {
  addNoise,
  clipFactors,
  clippedGradients,
  createNoiseKey,
  perSampleSquaredNorms,
} from '../../../dist/privacy/index.js';
import { canMeasure, peakGrowth } from '../../helpers/memory.mjs';

const [positions, inputs, outputs] = [64, 768, 2304];
const filled = (dims) => {
  const data = new Float32Array(dims.reduce((a, b) => a * b));
  for (let i = 0; i < data.length; i++) data[i] = ((i * 2654435761) >>> 8) / 2 ** 23 - 1;
  return new Tensor('float32', data, dims);
};
if (!canMeasure()) {
  console.log(JSON.stringify({ skipped: 'no resettable high-water mark in /proc/self' }));
} else {
  const results = [];
  for (const samples of [1, 8, 64]) {
    const layer = {
      kind: 'linear',
      activations: filled([samples, positions, inputs]),
      gradOutputs: filled([samples, positions, outputs]),
      bias: false,
    };
    const out = { weight: filled([outputs, inputs]) };
    const key = createNoiseKey();
    for (const method of ['ghost', 'instantiate']) {
      const grown = await peakGrowth(async () => {
        const squared = await perSampleSquaredNorms(layer, { method });
        await clippedGradients(layer, await clipFactors(squared, { maxNorm: 1 }), { out });
        await addNoise(out.weight, { key, step: 0, stddev: 1 });
      });
      // 64 gradients of this layer would take 432 MiB.
      results.push({ samples, method, grown, limit: 48 * 2 ** 20 });
    }
  }
  console.log(JSON.stringify({ results }));
}
