import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import { clipFactorsSync, clippedGradientsSync, perSampleSquaredNormsSync } from '../../lib/privacy/index.ts';
import { compareOutputs, sameBits } from '../cases/case.ts';
import { type LayerShape, makeLayer, outputSize, samplesOf } from '../cases/privacy/layers.ts';
import { type AnyLayer, expertRows, oneSample, sampleTensors } from '../cases/privacy/slices.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';

/** Four samples of every kind. */
const kinds: LayerShape[] = [
  { name: 'linear', kind: 'linear', lead: [4, 9], inputs: 19, outputs: 33, bias: true },
  { name: 'linear, one position', kind: 'linear', lead: [4], inputs: 19, outputs: 33, bias: true },
  { name: 'embedding', kind: 'embedding', lead: [4, 9], outputs: 33, numEmbeddings: 5 },
  { name: 'layer-norm', kind: 'layer-norm', lead: [4, 9], outputs: 33, bias: true },
  { name: 'rms-norm', kind: 'rms-norm', lead: [4, 9], outputs: 33, bias: false },
  { name: 'group-norm', kind: 'group-norm', lead: [4, 6, 5, 3], bias: true },
  {
    name: 'conv1d',
    kind: 'conv1d',
    lead: [4, 4, 17],
    outputs: 6,
    bias: true,
    conv: { kernel: 3, dilation: 2, groups: 2 },
  },
  {
    name: 'conv2d',
    kind: 'conv2d',
    lead: [4, 2, 5, 6],
    outputs: 3,
    bias: true,
    conv: { kernel: 3, padding: 1 },
  },
  {
    name: 'conv3d',
    kind: 'conv3d',
    lead: [4, 2, 3, 4, 4],
    outputs: 2,
    bias: true,
    conv: { kernel: 2, stride: [1, 2, 1] },
  },
  { name: 'tied embedding', kind: 'tied-embedding', lead: [4, 9], inputs: 19, numEmbeddings: 7 },
  { name: 'lora', kind: 'lora', lead: [4, 9], inputs: 19, outputs: 33, rank: 3 },
  {
    name: 'experts',
    kind: 'experts',
    lead: [40],
    inputs: 19,
    outputs: 13,
    samples: 4,
    experts: 3,
    bias: true,
  },
];

const GRADIENTS = ['gradOutputs', 'gradEmbeddings', 'gradLogits'];

/** One element of a sample in the tensor `name`. */
function elementOf(layer: AnyLayer, t: Tensor, sample: number): number {
  if (layer.kind !== 'experts') return (t.size / t.dims[0]) * sample + 1;
  const routed = expertRows(layer, sample).find(
    (row) => (layer.expertIds.data as Int32Array)[row] >= 0,
  ) as number;
  return (t.size / t.dims[0]) * routed + 1;
}

/** The layer with a mask of one value everywhere. */
function masked(shape: LayerShape, layer: AnyLayer, value: number): AnyLayer {
  let dims = shape.lead;
  if (shape.kind === 'group-norm') dims = [shape.lead[0], ...shape.lead.slice(2)];
  if (shape.conv !== undefined) dims = [shape.lead[0], ...outputSize(shape)];
  const mask = Tensor.zeros('uint8', dims);
  mask.data.fill(value);
  return { ...layer, mask };
}

describe.each(everyVariant())('edges on $name', ({ options, use }) => {
  describe.each(kinds)('$name', (shape) => {
    const make = () => makeLayer(shape, new Random(12));
    const sums = (layer: AnyLayer, factors: Float32Array | Tensor): Tensor[] =>
      Object.values(clippedGradientsSync(layer, factors, options));
    const methods = ['auto', 'ghost', 'instantiate'] as const;

    it('a NaN or an infinity in anything that is read is reported and stays with its sample', () => {
      use();
      const clean = make();
      for (const method of methods) {
        const expected = perSampleSquaredNormsSync(clean, { ...options, method });
        for (const [name, t] of sampleTensors(clean)) {
          if (t.type !== 'float32') continue;
          for (const bad of [Number.NaN, Infinity]) {
            const layer = make();
            const data = (layer as unknown as Record<string, Tensor>)[name].data as Float32Array;
            data[elementOf(layer, t, 1)] = bad;
            const squared = perSampleSquaredNormsSync(layer, { ...options, method });
            expect(Array.from(squared.data, Number.isFinite)).toEqual([true, false, true, true]);
            for (const i of [0, 2, 3]) expect(squared.data[i]).toBe(expected.data[i]);
            const factors = clipFactorsSync(squared, { maxNorm: 0.5 });
            expect(factors.nonFinite).toEqual([1]);
            const same = sums(clean, factors);
            expect(same.every((s) => (s.data as Float32Array).every(Number.isFinite))).toBe(true);
            expect(sameBits(sums(layer, factors), same)).toBe(true);
          }
        }
      }
    });

    it('a zero gradient has norm 0 and adds nothing, by every rule', () => {
      use();
      const layer = make();
      for (const [name, t] of sampleTensors(layer)) {
        if (!GRADIENTS.includes(name)) continue;
        if (layer.kind === 'experts') {
          const width = t.size / t.dims[0];
          for (const row of expertRows(layer, 2))
            (t.data as Float32Array).fill(0, row * width, (row + 1) * width);
        } else {
          (t.data as Float32Array).fill(0, (t.size / 4) * 2, (t.size / 4) * 3);
        }
      }
      for (const method of methods) {
        const squared = perSampleSquaredNormsSync(layer, { ...options, method });
        expect(squared.data[2]).toBe(0);
        for (const mode of ['abadi', 'auto-s', 'auto-v', 'indicator'] as const) {
          const factors = clipFactorsSync(squared, { maxNorm: 1, mode });
          expect(Number.isFinite(factors.data[2])).toBe(true);
          const without = Float32Array.from(factors.data);
          without[2] = 0;
          const [a, b] = [sums(layer, factors), sums(layer, without)];
          expect(compareOutputs(a, b).relative).toBeLessThan(1e-6);
        }
      }
    });

    it('an empty batch gives no norms and a sum of zeros', () => {
      use();
      const lead = shape.kind === 'experts' ? [0] : [0, ...shape.lead.slice(1)];
      const layer = makeLayer(
        { ...shape, lead, ...(shape.kind === 'experts' ? { samples: 0 } : {}) },
        new Random(1),
      );
      for (const method of methods) {
        expect(perSampleSquaredNormsSync(layer, { ...options, method }).dims).toEqual([0]);
      }
      const out = sums(layer, new Float32Array(0));
      expect(out.length).toBeGreaterThan(0);
      for (const t of out) {
        expect(t.size).toBeGreaterThan(0);
        expect((t.data as Float32Array).every((x) => Object.is(x, 0))).toBe(true);
      }
    });

    it('a sample alone has the bits that it has in a batch', () => {
      use();
      const layer = make();
      for (const method of methods) {
        const all = perSampleSquaredNormsSync(layer, { ...options, method });
        for (let i = 0; i < samplesOf(shape); i++) {
          const one = perSampleSquaredNormsSync(oneSample(layer, i), { ...options, method });
          expect(one.data[0]).toBe(all.data[i]);
        }
      }
      const only = Float32Array.of(0, 0.75, 0, 0);
      expect(sameBits(sums(layer, only), sums(oneSample(layer, 1), Float32Array.of(0.75)))).toBe(true);
    });

    it('nothing is read where everything is padding, and a mask of ones changes no bit', () => {
      use();
      const layer = make();
      const factors = Float32Array.of(1, 0.5, 0.25, 2);
      for (const method of methods) {
        const whole = perSampleSquaredNormsSync(layer, { ...options, method });
        const ones = perSampleSquaredNormsSync(masked(shape, layer, 1), { ...options, method });
        expect(sameBits([ones], [whole])).toBe(true);
      }
      expect(sameBits(sums(masked(shape, layer, 1), factors), sums(layer, factors))).toBe(true);
      for (const [, t] of sampleTensors(layer))
        if (t.type === 'float32') (t.data as Float32Array).fill(Number.NaN);
      const nothing = masked(shape, layer, 0);
      for (const method of methods) {
        const squared = perSampleSquaredNormsSync(nothing, { ...options, method });
        expect(Array.from(squared.data)).toEqual([0, 0, 0, 0]);
      }
      for (const t of sums(nothing, factors))
        expect((t.data as Float32Array).every((x) => x === 0)).toBe(true);
    });
  });
});
