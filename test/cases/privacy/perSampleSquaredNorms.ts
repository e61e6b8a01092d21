import type { OpOptions } from '../../../lib/op.ts';
import {
  perSampleSquaredNorms,
  perSampleSquaredNormsSync,
  type SquaredNormsOptions,
} from '../../../lib/privacy/perSampleSquaredNorms.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { CaseSlice, OpCase } from '../case.ts';
import { benchShapes, layerShapes } from './layerShapes.ts';
import { asLinear, type LayerShape, makeLayer, samplesOf, sizes } from './layers.ts';
import { type AnyLayer, oneSample } from './slices.ts';

function work(s: LayerShape, method: SquaredNormsOptions['method']): { flops?: number; bytes?: number } {
  if (s.conv !== undefined) {
    const { samples, places, inputs, outputs, groups } = asLinear(s);
    const pairs = method === 'ghost' ? (places + 1) * (inputs + outputs) : 2 * inputs * outputs;
    return { flops: samples * groups * places * pairs };
  }
  const rows = s.lead.reduce((a, b) => a * b, 1);
  const t = rows / s.lead[0];
  const d = s.inputs ?? 0;
  const p = s.outputs ?? 1;
  // Bounds from below: the head's or the larger matrices' products alone.
  if (s.kind === 'tied-embedding') return { flops: rows * (t + 1) * (d + (s.numEmbeddings ?? 0)) };
  if (s.kind === 'lora') return { flops: 2 * rows * (d + p) * (s.rank ?? 0), bytes: 4 * rows * (d + p) };
  if (s.kind === 'experts') return { bytes: 4 * rows * (d + p) };
  if (s.kind !== 'linear') return { bytes: 4 * rows * p * (s.kind === 'embedding' ? 1 : 2) };
  if (t === 1) return { flops: 2 * rows * (d + p), bytes: 4 * rows * (d + p) };
  // The ghost norm's symmetric half: t(t + 1)/2 pairs.
  return { flops: method === 'ghost' ? rows * (t + 1) * (d + p) : 2 * rows * d * p };
}

/** The same norms by PyTorch, where it has a way. */
function peerOf(s: LayerShape, method: SquaredNormsOptions['method']): Pick<OpCase, 'peers'> {
  const [samples, positions = 1] = s.lead;
  const { inputs = 0, outputs = 0, numEmbeddings = 0 } = s;
  if (s.kind === 'linear') {
    const op = method === 'ghost' ? 'ghost_norm' : 'vmap_norm';
    return { peers: { pytorch: { op, samples, positions, inputs, outputs } } };
  }
  if (s.kind !== 'embedding') return {};
  return {
    peers: { pytorch: { op: 'embedding_norm', samples, positions, width: outputs, rows: numEmbeddings } },
  };
}

/** What the reference can do of a layer of real size: the first sample. */
function firstSample(layer: AnyLayer, method: SquaredNormsOptions['method'], samples: number): CaseSlice {
  const one = oneSample(layer, 0);
  const run = (o: OpOptions) => [perSampleSquaredNormsSync(one, { method, ...o })];
  return {
    prepared: { run, runAsync: async (o) => run(o) },
    fraction: 1 / samples,
    of: ([t]) => [new Tensor('float32', (t.data as Float32Array).slice(0, 1), [1])],
  };
}

function caseOf(shape: LayerShape, method: SquaredNormsOptions['method']): OpCase {
  return {
    family: 'privacy',
    op: 'perSampleSquaredNorms',
    name: `${shape.name} [${shape.lead.join(', ')}] ${sizes(shape)} ${method}`,
    tolerance: 2e-6,
    ...work(shape, method),
    items: { unit: 'sample', count: samplesOf(shape) },
    bench: shape.bench,
    ...(shape.bench ? peerOf(shape, method) : {}),
    verify: !shape.bench,
    prepare(random) {
      const layer = makeLayer(shape, random);
      return {
        run: (o) => [perSampleSquaredNormsSync(layer, { method, ...o })],
        runAsync: async (o) => [await perSampleSquaredNorms(layer, { method, ...o })],
        timed: (o) => {
          const out = perSampleSquaredNormsSync(layer, { method, ...o });
          return () => perSampleSquaredNormsSync(layer, { method, ...o, out });
        },
        ...(shape.bench ? { slice: firstSample(layer, method, samplesOf(shape)) } : {}),
      };
    },
  };
}

function methods(shape: LayerShape): readonly ('auto' | 'ghost' | 'instantiate')[] {
  if (shape.kind === 'lora' || shape.kind === 'experts') {
    return shape.bench ? ['auto'] : ['auto', 'ghost', 'instantiate'];
  }
  return shape.kind === 'linear' || shape.kind === 'tied-embedding' || shape.conv !== undefined
    ? ['ghost', 'instantiate']
    : ['auto'];
}

/** Norms of every layer kind; linear ones and convolutions both ways. */
export const squaredNormsCases: OpCase[] = [...layerShapes, ...benchShapes].flatMap((shape) =>
  methods(shape).map((method) => caseOf(shape, method)),
);
