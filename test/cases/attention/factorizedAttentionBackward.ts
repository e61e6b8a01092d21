import { factorizedAttentionSync } from '../../../lib/attention/factorizedAttention.ts';
import {
  type FactorizedAttentionBackwardOptions,
  type FactorizedAttentionGradients,
  factorizedAttentionBackward,
  factorizedAttentionBackwardSync,
} from '../../../lib/attention/factorizedAttentionBackward.ts';
import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';
import { decoded } from './attention.ts';
import { BACKWARD_TOLERANCE, compareGradients } from './attentionBackward.ts';
import {
  drawFactorized,
  type FactorizedData,
  type FactorizedShape,
  factorizedName,
  factorizedShapes,
  pairsOf,
} from './factorizedAttention.ts';

function outputs(g: FactorizedAttentionGradients): Tensor[] {
  const list = [g.query, g.key, g.value].map(decoded);
  if (g.bias) list.push(g.bias);
  if (g.classToken) list.push(...[g.classToken.query, g.classToken.key, g.classToken.value].map(decoded));
  return list;
}

const bench: FactorizedShape[] = [
  { name: 'ViT-B time', axis: 'time', frames: 64, patches: 196, heads: 12, dim: 64, bench: true },
  { name: 'ViT-B space', axis: 'space', frames: 64, patches: 196, heads: 12, dim: 64, bench: true },
];

/** The upstream gradients and the forward's results, drawn. */
export function drawUpstream(
  d: FactorizedData,
  type: FloatType,
  random: Random,
  backend: 'auto' | 'reference',
): { g: Tensor<FloatType>; options: FactorizedAttentionBackwardOptions } {
  const { output, logSumExp, classToken } = factorizedAttentionSync(d.q, d.k, d.v, { ...d.options, backend });
  const like = (t: Tensor) =>
    new Tensor(type, encodeFloats(random.normals(t.size), type) as DTypeArrays[FloatType], t.dims);
  const options: FactorizedAttentionBackwardOptions = {
    ...d.options,
    output,
    logSumExp: logSumExp as Tensor,
  };
  if (classToken) options.gradClassToken = like(classToken);
  return { g: like(output), options };
}

/** The forward's small shapes, differentiated. */
export const factorizedAttentionBackwardCases: OpCase[] = [
  ...factorizedShapes.filter((s) => !s.bench && s.name !== 'longer than a panel'),
  ...bench,
].map((shape) => {
  const { dim, valueDim = dim, type = 'float32' } = shape;
  return {
    family: 'attention',
    op: 'factorizedAttentionBackward',
    name: factorizedName(shape),
    tolerance: BACKWARD_TOLERANCE[type],
    flops: 5 * pairsOf(shape) * (dim + valueDim),
    bench: shape.bench,
    prepare(random) {
      const data = drawFactorized(shape, random);
      const { q, k, v } = data;
      const { g, options } = drawUpstream(data, type, random, shape.bench ? 'auto' : 'reference');
      return {
        compare: compareGradients,
        run: (o) => outputs(factorizedAttentionBackwardSync(g, q, k, v, { ...options, ...o })),
        runAsync: async (o) => outputs(await factorizedAttentionBackward(g, q, k, v, { ...options, ...o })),
        timed: (o) => {
          const out = factorizedAttentionBackwardSync(g, q, k, v, { ...options, ...o });
          return () => factorizedAttentionBackwardSync(g, q, k, v, { ...options, ...o, out });
        },
      };
    },
  };
});
