import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import {
  type LayerNormOptions,
  layerNorm,
  layerNormSync,
  type NormResult,
  rmsNorm,
  rmsNormSync,
} from '../../../lib/nn/norm.ts';
import {
  layerNormBackward,
  layerNormBackwardSync,
  rmsNormBackward,
  rmsNormBackwardSync,
} from '../../../lib/nn/normBackward.ts';
import { type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import { decoded } from '../attention/attention.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';

interface Shape {
  dims: number[];
  kind?: 'layer' | 'rms';
  type?: FloatType;
  outType?: FloatType;
  residual?: boolean;
  unitOffset?: boolean;
  /** No weight and bias. */
  plain?: boolean;
  /** Mean of the rows. */
  mean?: number;
  bench?: boolean;
}

const shapes: Shape[] = [
  { dims: [5, 768] },
  { dims: [3, 1] },
  { dims: [1, 7, 33] },
  { dims: [300, 130], residual: true },
  { dims: [4, 64], plain: true },
  { dims: [4, 65], unitOffset: true },
  { dims: [6, 70], mean: 3000 },
  { dims: [0, 20] },
  { dims: [3, 20000] },
  { dims: [9, 100], type: 'bfloat16', residual: true },
  { dims: [9, 100], type: 'bfloat16', outType: 'float32' },
  { dims: [9, 99], outType: 'bfloat16', residual: true },
  { dims: [9, 35], type: 'float16' },
  { dims: [5, 768], kind: 'rms' },
  { dims: [40, 37], kind: 'rms', residual: true, unitOffset: true },
  { dims: [2, 50], kind: 'rms', plain: true },
  { dims: [9, 51], kind: 'rms', type: 'bfloat16' },
  { dims: [16384, 768], bench: true },
  { dims: [16384, 768], residual: true, bench: true },
  { dims: [16384, 768], type: 'bfloat16', bench: true },
  { dims: [16384, 768], kind: 'rms', bench: true },
];

const TOLERANCE: Readonly<Record<FloatType, number>> = { float32: 1e-6, float16: 1e-3, bfloat16: 5e-3 };

function tensor(
  random: Random,
  dims: readonly number[],
  type: FloatType,
  scale = 1,
  mean = 0,
): Tensor<FloatType> {
  const values = random.normals(
    dims.reduce((a, b) => a * b, 1),
    scale,
  );
  for (let i = 0; i < values.length; i++) values[i] += mean;
  return new Tensor(type, encodeFloats(values, type) as DTypeArrays[FloatType], dims);
}

function nameOf(s: Shape): string {
  const words = [`[${s.dims}]`, s.type ?? 'float32'];
  if (s.outType) words.push(`to ${s.outType}`);
  for (const word of ['residual', 'unitOffset', 'plain'] as const) if (s[word]) words.push(word);
  if (s.mean) words.push(`mean ${s.mean}`);
  return words.join(' ');
}

const bytesOf = (type: FloatType | undefined) => (type === undefined || type === 'float32' ? 4 : 2);

/** Norms of rows, with every output. */
export const normCases: OpCase[] = shapes.map((s) => {
  const { kind = 'layer', type = 'float32' } = s;
  const size = s.dims.reduce((a, b) => a * b, 1);
  const width = s.dims[s.dims.length - 1];
  return {
    family: 'nn',
    op: `${kind}Norm`,
    name: nameOf(s),
    tolerance: TOLERANCE[s.outType === 'bfloat16' ? s.outType : type],
    bytes: size * (bytesOf(type) * (s.residual ? 3 : 1) + bytesOf(s.outType ?? type)),
    bench: s.bench,
    prepare(random) {
      const x = tensor(random, s.dims, type, 1, s.mean);
      const options: LayerNormOptions = {
        epsilon: 1e-6,
        unitOffset: s.unitOffset,
        outType: s.outType,
        returnSum: s.residual,
        returnStatistics: !s.bench,
      };
      if (!s.plain) {
        options.weight = tensor(random, [width], 'float32');
        if (kind === 'layer') options.bias = tensor(random, [width], 'float32');
      }
      if (s.residual) options.residual = tensor(random, s.dims, type);
      const outputs = (r: NormResult) => {
        const list = [r.output, r.sum, r.rstd].flatMap((t) => (t === undefined ? [] : [decoded(t)]));
        // The mean is a sum of large terms that cancel: its error is held against the spread.
        const { mean, rstd } = r;
        if (mean && rstd) {
          const pairs = mean.data.map((value, i) => Math.hypot(value, 1 / rstd.data[i]) + value);
          list.push(new Tensor('float32', pairs, mean.dims));
        }
        return list;
      };
      const sync = kind === 'layer' ? layerNormSync : rmsNormSync;
      const later = kind === 'layer' ? layerNorm : rmsNorm;
      return {
        run: (o) => outputs(sync(x, { ...options, ...o })),
        runAsync: async (o) => outputs(await later(x, { ...options, ...o })),
        timed: (o) => {
          const out = sync(x, { ...options, ...o });
          return () => sync(x, { ...options, ...o, out });
        },
      };
    },
  };
});

const backwardShapes: (Shape & { statistics?: boolean; gradSum?: boolean })[] = [
  { dims: [5, 768] },
  { dims: [3, 1] },
  { dims: [130, 33], statistics: true },
  { dims: [2, 65, 64], plain: true, gradSum: true },
  { dims: [6, 70], mean: 3000 },
  { dims: [0, 20] },
  { dims: [70, 100], type: 'bfloat16', unitOffset: true, gradSum: true },
  { dims: [9, 35], type: 'float16', statistics: true },
  { dims: [5, 768], kind: 'rms' },
  { dims: [70, 37], kind: 'rms', unitOffset: true, statistics: true, gradSum: true },
  { dims: [9, 51], kind: 'rms', type: 'bfloat16' },
  { dims: [16384, 768], statistics: true, bench: true },
];

/** Gradients of norms: of x, weight and bias. */
export const normBackwardCases: OpCase[] = backwardShapes.map((s) => {
  const { kind = 'layer', type = 'float32' } = s;
  const size = s.dims.reduce((a, b) => a * b, 1);
  const width = s.dims[s.dims.length - 1];
  const flags = `${s.statistics ? ' statistics' : ''}${s.gradSum ? ' gradSum' : ''}`;
  return {
    family: 'nn',
    op: `${kind}NormBackward`,
    name: nameOf(s) + flags,
    tolerance: TOLERANCE[type],
    bytes: 3 * size * bytesOf(type),
    bench: s.bench,
    prepare(random) {
      const x = tensor(random, s.dims, type, 1, s.mean);
      const g = tensor(random, s.dims, type);
      const weight = s.plain ? undefined : tensor(random, [width], 'float32');
      const gradSum = s.gradSum ? tensor(random, s.dims, type) : undefined;
      const common = { epsilon: 1e-6, unitOffset: s.unitOffset, weight };
      const forward = { ...common, returnStatistics: true, backend: 'reference' as const };
      const statistics: { mean?: Tensor; rstd?: Tensor } = {};
      if (s.statistics && kind === 'layer') {
        const { mean, rstd } = layerNormSync(x, forward);
        Object.assign(statistics, { mean, rstd });
      } else if (s.statistics) statistics.rstd = rmsNormSync(x, forward).rstd;
      const options = { ...common, ...statistics, gradSum };
      const sync = kind === 'layer' ? layerNormBackwardSync : rmsNormBackwardSync;
      const later = kind === 'layer' ? layerNormBackward : rmsNormBackward;
      const outputs = (r: { x: Tensor; weight: Tensor; bias?: Tensor }) =>
        [r.x, r.weight, r.bias].flatMap((t) => (t === undefined ? [] : [decoded(t)]));
      return {
        run: (o) => outputs(sync(g, x, { ...options, ...o })),
        runAsync: async (o) => outputs(await later(g, x, { ...options, ...o })),
        timed: (o) => {
          const out = sync(g, x, { ...options, ...o });
          return () => sync(g, x, { ...options, ...o, out });
        },
      };
    },
  };
});
