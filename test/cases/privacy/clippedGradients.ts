import type { OpOptions } from '../../../lib/op.ts';
import {
  clippedGradients,
  clippedGradientsSync,
  type LayerGradients,
  type LoraGradients,
} from '../../../lib/privacy/clippedGradients.ts';
import type { Tensor } from '../../../lib/tensor.ts';
import type { CaseSlice, OpCase } from '../case.ts';
import { benchShapes, layerShapes } from './layerShapes.ts';
import { asLinear, type LayerShape, makeLayer, samplesOf, sizes } from './layers.ts';
import { type AnyLayer, fewOutputs } from './slices.ts';

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

/** The plain weight gradient, without clipping, by PyTorch. */
function peerOf(s: LayerShape): Pick<OpCase, 'peers'> {
  const [samples, positions = 1] = s.lead;
  if (s.kind !== 'linear') return {};
  return {
    peers: { pytorch: { op: 'weight_gradients', samples, positions, widths: `${s.inputs},${s.outputs}` } },
  };
}

/** What the reference can do of a layer of real size: two outputs, or all of it where it is small. */
function part(layer: AnyLayer, factors: Float32Array): CaseSlice {
  const few = fewOutputs(layer, 2) ?? { layer, of: (all: Tensor[]) => all, fraction: 1 };
  const run = (o: OpOptions) => outputs(clippedGradientsSync(few.layer, factors, o));
  return { prepared: { run, runAsync: async (o) => run(o) }, fraction: few.fraction, of: few.of };
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
    ...(shape.bench ? peerOf(shape) : {}),
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
        ...(shape.bench ? { slice: part(layer, factors) } : {}),
      };
    },
  };
}

/** Clipped sums of every layer kind. */
export const clippedGradientsCases: OpCase[] = [...layerShapes, ...benchShapes].map(caseOf);
