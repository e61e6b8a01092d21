// What forwards of one expert layer take beyond weights, input and output. Arguments: type.
import { Tensor } from '../../../dist/index.js';
import { expertsForward, packExperts, routeTopK } from '../../../dist/moe/index.js';
import { canMeasure, peakGrowth } from '../../helpers/memory.mjs';

const [type] = process.argv.slice(2);
const [experts, hidden, intermediate, k] = [8, 512, 768, 4];
let seed = 1;
const random = (dims) => {
  const data = new Float32Array(dims.reduce((a, b) => a * b));
  for (let i = 0; i < data.length; i++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    data[i] = seed / 2 ** 31 - 1;
  }
  return new Tensor('float32', data, dims);
};
if (!canMeasure()) {
  console.log(JSON.stringify({ skipped: 'no resettable high-water mark in /proc/self' }));
} else {
  const weights = await packExperts(
    {
      gate: random([experts, intermediate, hidden]),
      up: random([experts, intermediate, hidden]),
      down: random([experts, hidden, intermediate]),
    },
    { type },
  );
  const results = [];
  for (const tokens of [1, 64, 8192]) {
    const x = random([tokens, hidden]);
    const routing = await routeTopK(random([tokens, experts]), { k });
    const out = random([tokens, hidden]); // written once, so that its pages are there
    const grown = await peakGrowth(() => expertsForward(x, routing, weights, { out }));
    const limit = k * tokens * (intermediate + hidden) * 4 + 64 * 2 ** 20;
    results.push({ tokens, grown, limit });
  }
  console.log(JSON.stringify({ results }));
}
