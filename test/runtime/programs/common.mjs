// Shared by the programs: inputs with a known answer.
import { Tensor } from '../../../dist/index.js';
import { routeTopK, routeTopKSync } from '../../../dist/moe/index.js';

/** Logits of a simple generator: the same in every thread. */
export function makeLogits(tokens, experts, seed = 1) {
  const data = new Float32Array(tokens * experts);
  let s = seed >>> 0;
  for (let i = 0; i < data.length; i++) {
    s = (Math.imul(s, 1664525) + 1013904223) >>> 0;
    data[i] = s / 2 ** 30 - 2;
  }
  return new Tensor('float32', data, [tokens, experts]);
}

export function sameRouting(a, b) {
  const same = (x, y) => Buffer.from(x.data.buffer).equals(Buffer.from(y.data.buffer));
  return same(a.indices, b.indices) && same(a.weights, b.weights);
}

/** A call that takes about 0.3 ms a row with HEDDLE_ISA=scalar, which is what the programs that need time run with. */
export const slow = { k: 256 };
export const slowExperts = 4096;
export const slowTile = 3; // rows, see route_top_k-inl.h

export { routeTopK, routeTopKSync };
