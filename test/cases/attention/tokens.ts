import { type MaskTokensOptions, maskTokens } from '../../../lib/attention/maskTokens.ts';
import {
  gatherTokens,
  gatherTokensSync,
  scatterTokens,
  scatterTokensSync,
} from '../../../lib/attention/tokens.ts';
import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { Tensor } from '../../../lib/tensor.ts';
import { compareOutputs, type OpCase } from '../case.ts';
import { decoded } from './attention.ts';

interface Shape {
  mask: MaskTokensOptions;
  width: number;
  type?: FloatType;
  fill?: boolean;
  bench?: boolean;
}

const shapes: Shape[] = [
  { mask: { frames: 4, patches: 9, ratio: 0.75, seed: 1, batch: 3 }, width: 33 },
  { mask: { frames: 4, patches: 9, ratio: 0.5, kind: 'tube', seed: 2 }, width: 1, fill: true },
  {
    mask: { frames: 5, patches: 3, ratio: 0.5, kind: 'frame', seed: 3, batch: 2 },
    width: 16,
    type: 'bfloat16',
    fill: true,
  },
  { mask: { frames: 3, patches: 3, ratio: 0, seed: 4, batch: 2 }, width: 7, type: 'float16' },
  { mask: { frames: 3, patches: 3, ratio: 0.9, seed: 4, batch: 0 }, width: 7 },
  { mask: { frames: 2, patches: 5, ratio: 0.3, seed: 5 }, width: 0 },
  { mask: { frames: 40, patches: 50, ratio: 0.6, seed: 6 }, width: 300, fill: true },
  { mask: { frames: 16, patches: 196, ratio: 0.75, seed: 7, batch: 4 }, width: 768, bench: true },
];

/** Copies, so compared bit by bit. */
export const tokenCases: OpCase[] = shapes.flatMap(({ mask, width, type = 'float32', fill, bench }) => {
  const { frames, patches, ratio, kind = 'random', batch = 1 } = mask;
  const all = batch * frames * patches;
  const name = `${kind} B=${batch} T=${frames} N=${patches} p=${ratio} d=${width} ${type}${fill ? ' fill' : ''}`;
  const size = type === 'float32' ? 4 : 2;
  const kept = maskTokens(mask).indices.length;
  const common = { family: 'attention', name, tolerance: 0, bench };
  const exact = (a: Tensor[], e: Tensor[]) => {
    const c = compareOutputs(a, e);
    return c.ulp > 0 ? { ...c, mismatches: 1, detail: 'rows differ' } : c;
  };
  const gather: OpCase = {
    ...common,
    op: 'gatherTokens',
    bytes: 2 * kept * width * size,
    prepare(random) {
      const tokens = maskTokens(mask);
      const data = encodeFloats(random.normals(all * width), type) as never;
      const x = new Tensor(type, data, [batch, frames * patches, width]);
      return {
        run: (o) => [decoded(gatherTokensSync(x, tokens, o))],
        runAsync: async (o) => [decoded(await gatherTokens(x, tokens, o))],
        compare: exact,
        timed: (o) => {
          const out = gatherTokensSync(x, tokens, o);
          return () => gatherTokensSync(x, tokens, { ...o, out });
        },
      };
    },
  };
  const scatter: OpCase = {
    ...common,
    op: 'scatterTokens',
    bytes: (kept + all) * width * size,
    prepare(random) {
      const tokens = maskTokens(mask);
      const packed = new Tensor(type, encodeFloats(random.normals(kept * width), type) as never, [
        kept,
        width,
      ]);
      const row = fill
        ? new Tensor(type, encodeFloats(random.normals(width), type) as never, [width])
        : undefined;
      return {
        run: (o) => [decoded(scatterTokensSync(packed, tokens, { ...o, fill: row }))],
        runAsync: async (o) => [decoded(await scatterTokens(packed, tokens, { ...o, fill: row }))],
        compare: exact,
        timed: (o) => {
          const out = scatterTokensSync(packed, tokens, { ...o, fill: row });
          return () => scatterTokensSync(packed, tokens, { ...o, fill: row, out });
        },
      };
    },
  };
  return [gather, scatter];
});
