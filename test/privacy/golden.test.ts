import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  clipFactorsSync,
  clippedGradientsSync,
  type PrivateLayer,
  perSampleSquaredNormsSync,
} from '../../lib/privacy/index.ts';
import { everyVariant } from '../helpers/backends.ts';
import { expectNear, floatTensor, type GoldenTensor, intTensor, readGolden } from '../helpers/golden.ts';

interface Golden {
  name: string;
  kind: string;
  arguments: Record<string, unknown>;
  inputs: Record<string, GoldenTensor>;
  squaredNorms: GoldenTensor;
  factors: GoldenTensor;
  gradients: Record<string, GoldenTensor>;
}
const golden = readGolden<{ maxNorm: number; cases: Golden[] }>('privacy/gradients.json');

/** NaN wherever the mask says that nothing is read. */
function spoil(g: Tensor, c: Golden): void {
  const channelsFirst = c.kind === 'group-norm' || c.kind.startsWith('conv');
  const mask = c.inputs['mask'];
  const inner = channelsFirst ? mask.data.length / mask.dims[0] : 1;
  const middle = g.size / mask.data.length;
  for (let i = 0; i < g.size; i++) {
    const row = channelsFirst
      ? Math.floor(i / (middle * inner)) * inner + (i % inner)
      : Math.floor(i / middle);
    if (mask.data[row] === 0) g.data[i] = Number.NaN;
  }
}

function goldenLayer(c: Golden): PrivateLayer {
  const layer: Record<string, unknown> = { kind: c.kind, ...c.arguments };
  for (const [name, t] of Object.entries(c.inputs)) {
    if (name === 'mask') layer[name] = new Tensor('uint8', Uint8Array.from(t.data), t.dims);
    else if (name === 'indices' || name.endsWith('Ids')) layer[name] = intTensor(t);
    else layer[name] = floatTensor(t);
  }
  if (c.inputs['mask'] !== undefined) spoil(layer['gradOutputs'] as Tensor, c);
  return layer as unknown as PrivateLayer;
}

describe.each(everyVariant())('torch.func in float64 on $name', ({ options, use }) => {
  it.each(golden.cases)('$name', (c) => {
    use();
    const layer = goldenLayer(c);
    for (const method of ['auto', 'ghost', 'instantiate'] as const) {
      const squared = perSampleSquaredNormsSync(layer, { ...options, method });
      expectNear(squared.data.map(Math.sqrt), c.squaredNorms.data.map(Math.sqrt), 1e-5);
      const factors = clipFactorsSync(squared, { maxNorm: golden.maxNorm });
      expectNear(factors.data, c.factors.data, 1e-5);
      const sums = clippedGradientsSync(layer, factors, options) as unknown as Record<
        string,
        Tensor<'float32'>
      >;
      expect(Object.keys(sums)).toEqual(Object.keys(c.gradients));
      for (const [name, sum] of Object.entries(sums)) {
        expect(sum.dims).toEqual(c.gradients[name].dims);
        expectNear(sum.data, c.gradients[name].data, 2e-5);
      }
    }
  });
});
