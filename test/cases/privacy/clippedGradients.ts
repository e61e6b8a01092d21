import {
  clippedGradients,
  clippedGradientsSync,
  type LayerGradients,
  type LoraGradients,
} from '../../../lib/privacy/clippedGradients.ts';
import type { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import { benchShapes, layerShapes } from './layerShapes.ts';
import { asLinear, type LayerShape, makeLayer, samplesOf, sizes } from './layers.ts';

function outputs(g: LayerGradients | LoraGradients): Tensor[] {
  return Object.values(g);
}

function work(shape: LayerShape): { flops?: number; bytes?: number } {
  if (shape.conv !== undefined) {
    const { samples, places, inputs, outputs, groups } = asLinear(shape);
    return { flops: 2 * samples * places * inputs * outputs * groups };
  }
  const rows = shape.lead.reduce((a, b) => a * b, 1);
  const d = shape.inputs ?? 0;
  const p = shape.outputs ?? 0;
  if (shape.kind === 'linear' || shape.kind === 'experts') return { flops: 2 * rows * d * p };
  if (shape.kind === 'lora')
    return { flops: 4 * rows * (d + p) * (shape.rank ?? 0), bytes: 4 * rows * (d + p) };
  if (shape.kind === 'tied-embedding') return { flops: 2 * rows * d * (shape.numEmbeddings ?? 0) };
  return { bytes: 4 * rows * (shape.outputs ?? 1) * (shape.kind === 'embedding' ? 1 : 2) };
}

function caseOf(shape: LayerShape): OpCase {
  return {
    family: 'privacy',
    op: 'clippedGradients',
    name: `${shape.name} [${shape.lead.join(', ')}] ${sizes(shape)}`,
    tolerance: 2e-6,
    ...work(shape),
    items: { unit: 'sample', count: samplesOf(shape) },
    bench: shape.bench,
    verify: !shape.bench,
    prepare(random) {
      const layer = makeLayer(shape, random);
      // Every third sample is left out, as a non-finite one would be.
      const factors = Float32Array.from({ length: samplesOf(shape) }, (_, i) =>
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
