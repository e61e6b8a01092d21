import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import type { SourceType } from '../../../lib/gemm/weights.ts';
import {
  type ExpertSources,
  type ExpertWeights,
  expertsForward,
  expertsForwardSync,
  type PackExpertsOptions,
  packExpertsSync,
} from '../../../lib/moe/experts.ts';
import type { Routing } from '../../../lib/moe/routeTopK.ts';
import type { OpOptions } from '../../../lib/op.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';

export interface Shape {
  name: string;
  tokens: number;
  experts: number;
  k: number;
  hidden: number;
  intermediate: number;
  options?: PackExpertsOptions;
  layout?: 'separate' | 'stacked' | 'concatenated' | 'gpt-oss' | 'ungated';
  biases?: boolean;
  shared?: number;
  source?: SourceType;
  /** int4: mean squares of the inputs weight the scale search. */
  calibrated?: boolean;
  xType?: FloatType;
  /** Routes that go nowhere (id -1). */
  masked?: boolean;
  /** All tokens on one expert: the others are empty. */
  crowded?: boolean;
}

const base = { tokens: 37, experts: 6, k: 3, hidden: 52, intermediate: 36 };
const grouped = { tokens: 37, experts: 6, k: 3, hidden: 160, intermediate: 96 };

const shapes: Shape[] = [
  { name: 'SwiGLU', ...base },
  { name: 'SwiGLU, stacked', ...base, layout: 'stacked' },
  { name: 'SwiGLU, concatenated', ...base, layout: 'concatenated' },
  { name: 'one token', ...base, tokens: 1 },
  { name: 'no tokens', ...base, tokens: 0 },
  { name: 'crowded expert', ...base, tokens: 53, crowded: true },
  { name: 'masked routes', ...base, masked: true },
  { name: 'shared expert', ...base, shared: 44 },
  { name: 'gpt-oss', ...base, layout: 'gpt-oss', biases: true, options: { activation: 'clamped-swiglu' } },
  { name: 'biases', ...base, biases: true },
  { name: 'GeGLU tanh', ...base, options: { activation: 'gelu-tanh' } },
  { name: 'GeGLU erf', ...base, options: { activation: 'gelu' } },
  { name: 'ReLU squared, ungated', ...base, layout: 'ungated', options: { activation: 'relu-squared' } },
  {
    name: 'ReLU, ungated, biases',
    ...base,
    layout: 'ungated',
    biases: true,
    options: { activation: 'relu' },
  },
  { name: 'identity', ...base, options: { activation: 'identity' } },
  { name: 'odd sizes', tokens: 5, experts: 3, k: 2, hidden: 33, intermediate: 17 },
  { name: 'size 1', tokens: 3, experts: 2, k: 1, hidden: 1, intermediate: 1 },
  { name: 'k-blocks', tokens: 33, experts: 1, k: 1, hidden: 6300, intermediate: 3 },
  { name: 'bf16 x', ...base, xType: 'bfloat16' },
  { name: 'fp16 sources and x', ...base, source: 'float16', xType: 'float16' },
  { name: 'bf16', ...base, source: 'bfloat16' },
  {
    name: 'bf16 odd',
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
    options: { type: 'bfloat16', activation: 'clamped-swiglu' },
  },
  { name: 'int8', ...base, options: { type: 'int8' } },
  { name: 'int8 shared', ...base, options: { type: 'int8' }, shared: 40, biases: true },
  { name: 'int4 g32', ...grouped, options: { type: 'int4' } },
  { name: 'int4 g64', ...grouped, hidden: 128, intermediate: 192, options: { type: 'int4', groupSize: 64 } },
  {
    name: 'int4 g128',
    ...grouped,
    hidden: 128,
    intermediate: 256,
    options: { type: 'int4', groupSize: 128 },
  },
  { name: 'mxfp4', ...grouped, options: { type: 'mxfp4' } },
  { name: 'int4 zero points', ...grouped, options: { type: 'int4', symmetric: false } },
  {
    name: 'int4 g64 zero points',
    ...grouped,
    hidden: 128,
    intermediate: 192,
    options: { type: 'int4', groupSize: 64, symmetric: false },
  },
  { name: 'int4 search', ...grouped, calibrated: true, options: { type: 'int4' } },
  {
    name: 'int4 gpt-oss zero points, search',
    ...grouped,
    layout: 'gpt-oss',
    biases: true,
    calibrated: true,
    options: { type: 'int4', symmetric: false, activation: 'clamped-swiglu' },
  },
  { name: 'float8', ...grouped, options: { type: 'float8' } },
  {
    name: 'float8 odd',
    tokens: 9,
    experts: 3,
    k: 2,
    hidden: 133,
    intermediate: 131,
    options: { type: 'float8' },
  },
  {
    name: 'float8 gpt-oss',
    ...grouped,
    layout: 'gpt-oss',
    biases: true,
    options: { type: 'float8', activation: 'clamped-swiglu' },
  },
  { name: 'float8 ungated, shared', ...base, layout: 'ungated', shared: 40, options: { type: 'float8' } },
  { name: 'DeepSeek float8', ...grouped, hidden: 260, source: 'float8_e4m3', shared: 33 },
  {
    name: 'DeepSeek float8, concatenated',
    ...grouped,
    intermediate: 130,
    source: 'float8_e4m3',
    layout: 'concatenated',
  },
  {
    name: 'DeepSeek float8 to int8',
    ...grouped,
    intermediate: 130,
    source: 'float8_e4m3',
    layout: 'stacked',
    options: { type: 'int8' },
  },
  {
    name: 'mxfp4 gpt-oss',
    ...grouped,
    layout: 'gpt-oss',
    biases: true,
    options: { type: 'mxfp4', activation: 'clamped-swiglu' },
  },
];

function stacked(random: Random, dims: number[], fanIn: number, type: SourceType): Tensor<SourceType> {
  if (type === 'float8_e4m3') {
    const codes = Uint8Array.from(
      { length: dims.reduce((a, b) => a * b) },
      () => random.integer(0, 126) | (random.integer(0, 1) << 7),
    );
    return new Tensor(type, codes, dims);
  }
  const values = random.normals(
    dims.reduce((a, b) => a * b),
    fanIn ** -0.5,
  );
  return new Tensor(type, encodeFloats(values, type) as never, dims);
}

function split(t: Tensor<SourceType>): Tensor<SourceType>[] {
  const [count, ...dims] = t.dims;
  const size = dims.reduce((a, b) => a * b);
  return Array.from(
    { length: count },
    (_, i) => new Tensor(t.type, t.data.subarray(i * size, (i + 1) * size) as never, dims),
  );
}

export function sourcesOf(s: Shape, random: Random): ExpertSources {
  const { experts: e, hidden: d, intermediate: f } = s;
  const type = s.source ?? 'float32';
  const make = (dims: number[], fanIn: number) => stacked(random, dims, fanIn, type);
  switch (s.layout) {
    case 'gpt-oss':
      return {
        gateUp: make([e, d, 2 * f], d),
        down: make([e, f, d], f),
        interleaved: true,
        layout: 'in-out',
      };
    case 'concatenated':
      return { gateUp: make([e, 2 * f, d], d), down: make([e, d, f], f) };
    case 'stacked':
      return { gate: make([e, f, d], d), up: make([e, f, d], d), down: make([e, d, f], f) };
    case 'ungated':
      return { up: make([e, f, d], d), down: make([e, d, f], f) };
    default:
      return {
        gate: split(make([e, f, d], d)),
        up: split(make([e, f, d], d)),
        down: split(make([e, d, f], f)),
      };
  }
}

/** Factors of 128 x 128 blocks for every matrix of a float8 source. */
function scalesOf(s: Shape, random: Random): PackExpertsOptions['scales'] {
  if (s.source !== 'float8_e4m3') return undefined;
  const { experts: e, hidden: d, intermediate: f } = s;
  const make = (n: number, k: number) => {
    const dims = [e, Math.ceil(n / 128), Math.ceil(k / 128)];
    const values = Float32Array.from(
      { length: dims.reduce((a, b) => a * b) },
      () => 2e-4 * (0.5 + random.uniform()),
    );
    return new Tensor('float32', values, dims);
  };
  if (s.layout === 'concatenated') return { gateUp: make(2 * f, d), down: make(d, f) };
  return { gate: make(f, d), up: make(f, d), down: make(d, f) };
}

function calibrationOf(s: Shape, random: Random): PackExpertsOptions['calibration'] {
  if (!s.calibrated) return undefined;
  const make = (size: number) => Float32Array.from({ length: size }, () => random.uniform() ** 4);
  return { hidden: make(s.hidden), intermediate: make(s.intermediate) };
}

export function biasesOf(s: Shape, random: Random): PackExpertsOptions['biases'] {
  const { experts: e, hidden: d, intermediate: f } = s;
  const make = (width: number) => new Tensor('float32', random.normals(e * width, 0.3), [e, width]);
  if (s.layout === 'gpt-oss') return { gateUp: make(2 * f), down: make(d) };
  if (s.layout === 'ungated') return { up: make(f), down: make(d) };
  return { gate: make(f), up: make(f), down: make(d) };
}

export function routingOf(s: Shape, random: Random): Routing {
  const { tokens, k, experts } = s;
  const indices = new Int32Array(tokens * k);
  for (let t = 0; t < tokens; t++) {
    const start = s.crowded ? 0 : random.integer(0, experts - 1);
    for (let j = 0; j < k; j++) {
      indices[t * k + j] =
        s.masked && random.uniform() < 0.3 ? -1 : (start + j * (s.crowded ? 1 : 2)) % experts;
    }
  }
  const weights = Float32Array.from({ length: tokens * k }, () => random.uniform());
  return {
    indices: new Tensor('int32', indices, [tokens, k]),
    weights: new Tensor('float32', weights, [tokens, k]),
  };
}

const TOLERANCE = {
  float32: 5e-6,
  bfloat16: 5e-3,
  int8: 5e-3,
  int4: 5e-3,
  mxfp4: 5e-3,
  float8: 5e-6,
} as const;

/** Expert compute: every activation, layout and weight type, at odd sizes. */
export const expertsForwardCases: OpCase[] = shapes.map((s) => {
  const type =
    s.options?.type ??
    (s.source === 'bfloat16' ? 'bfloat16' : s.source === 'float8_e4m3' ? 'float8' : 'float32');
  return {
    family: 'moe',
    op: 'expertsForward',
    name: `${s.name} T=${s.tokens} E=${s.experts} k=${s.k} d=${s.hidden} f=${s.intermediate} ${type}`,
    tolerance: TOLERANCE[type],
    flops: s.tokens * s.k * s.hidden * s.intermediate * (s.layout === 'ungated' ? 4 : 6),
    prepare(random) {
      const sources = sourcesOf(s, random);
      const biases = s.biases ? biasesOf(s, random) : undefined;
      const sharedShape: Shape = { ...s, experts: 1, intermediate: s.shared ?? 1, layout: 'separate' };
      const scales = scalesOf(s, random);
      const sharedScales = scalesOf(sharedShape, random);
      const calibration = calibrationOf(s, random);
      const sharedSources = s.shared === undefined ? undefined : sourcesOf(sharedShape, random);
      const gate =
        s.shared === undefined ? undefined : new Tensor('float32', random.normals(s.tokens), [s.tokens]);
      const xType = s.xType ?? 'float32';
      const x = new Tensor(xType, encodeFloats(random.normals(s.tokens * s.hidden), xType) as never, [
        s.tokens,
        s.hidden,
      ]);
      const routing = routingOf(s, random);
      const packed = new Map<string, { weights: ExpertWeights; shared?: ExpertWeights }>();
      const pack = (o: OpOptions) => {
        const backend = o.backend ?? 'auto';
        let p = packed.get(backend);
        if (p === undefined) {
          p = {
            weights: packExpertsSync(sources, { ...s.options, biases, scales, calibration, backend }),
            shared:
              sharedSources &&
              packExpertsSync(sharedSources, { ...s.options, scales: sharedScales, backend }),
          };
          packed.set(backend, p);
        }
        return { weights: p.weights, options: { ...o, shared: p.shared, sharedGate: gate } };
      };
      return {
        run(o) {
          const { weights, options } = pack(o);
          return [expertsForwardSync(x, routing, weights, options)];
        },
        async runAsync(o) {
          const { weights, options } = pack(o);
          return [await expertsForward(x, routing, weights, options)];
        },
        dispose() {
          for (const { weights, shared } of packed.values()) {
            weights.dispose();
            shared?.dispose();
          }
          packed.clear();
        },
      };
    },
  };
});
