import {
  clippedGradients,
  clippedGradientsSync,
  type LayerGradients,
} from '../../../lib/privacy/clippedGradients.ts';
import type { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import { asLinear, benchShapes, type LayerShape, layerShapes, makeLayer } from './layers.ts';

function outputs(g: LayerGradients): Tensor[] {
  return (g.bias === undefined ? [g.weight] : [g.weight, g.bias]) as Tensor[];
}

function work(shape: LayerShape): { flops?: number; bytes?: number } {
  if (shape.conv !== undefined) {
    const { samples, places, inputs, outputs, groups } = asLinear(shape);
    return { flops: 2 * samples * places * inputs * outputs * groups };
  }
  const rows = shape.lead.reduce((a, b) => a * b, 1);
  if (shape.kind === 'linear') return { flops: 2 * rows * (shape.inputs ?? 0) * (shape.outputs ?? 0) };
  return { bytes: 4 * rows * (shape.outputs ?? 1) * (shape.kind === 'embedding' ? 1 : 2) };
}

function caseOf(shape: LayerShape): OpCase {
  return {
    family: 'privacy',
    op: 'clippedGradients',
    name: `${shape.name} [${shape.lead.join(', ')}] d=${shape.inputs ?? '-'} p=${shape.outputs ?? '-'}`,
    tolerance: 2e-6,
    ...work(shape),
    items: { unit: 'sample', count: shape.lead[0] },
    bench: shape.bench,
    verify: !shape.bench,
    prepare(random) {
      const layer = makeLayer(shape, random);
      // Every third sample is left out, as a non-finite one would be.
      const factors = Float32Array.from({ length: shape.lead[0] }, (_, i) =>
        i % 3 === 2 ? 0 : 0.1 + random.uniform(),
      );
      if (shape.bench) factors.fill(0.5);
      return {
        run: (o) => outputs(clippedGradientsSync(layer, factors, o)),
        runAsync: async (o) => outputs(await clippedGradients(layer, factors, o)),
        timed: (o) => {
          const out = clippedGradientsSync(layer, factors, o);
          return () => clippedGradientsSync(layer, factors, { ...o, out });
        },
      };
    },
  };
}

/** Clipped sums of every layer kind. */
export const clippedGradientsCases: OpCase[] = [...layerShapes, ...benchShapes].map(caseOf);
