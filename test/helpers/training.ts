import { Tensor } from '../../lib/index.ts';
import {
  Conv2d,
  crossEntropySync,
  Embedding,
  Flatten,
  GroupNorm,
  LayerNorm,
  Linear,
  type PrivateLayer,
  PrivateOptimizer,
  type PrivateOptimizerOptions,
  Residual,
  SelfAttention,
  Sequential,
  Tanh,
} from '../../lib/privacy/index.ts';
import { prepareLayer } from '../../lib/privacy/layer.ts';
import { perSampleGradient } from '../../lib/reference/privacy/perSampleGradient.ts';
import { Random } from '../cases/random.ts';

export const KEY = Uint8Array.from({ length: 32 }, (_, i) => 7 * i + 3);
export const SAMPLER = { sampleRate: 0.01, expectedBatch: 8 };
export const f32 = (data: ArrayLike<number>, dims: number[]) =>
  new Tensor('float32', Float32Array.from(data), dims);

/** A transformer with every kind of layer that a text model has, and a batch for it. */
export function textModel(samples = 6) {
  const model = new Sequential([
    new Embedding(7, 8),
    new Residual(new Sequential([new LayerNorm(8), new SelfAttention(8, 2, { causal: true })])),
    new Linear(8, 7),
  ]).initialize(1);
  const random = new Random(2);
  const ids = new Tensor(
    'int32',
    Int32Array.from({ length: samples * 5 }, () => random.integer(0, 6)),
    [samples, 5],
  );
  return { model, x: ids, labels: ids };
}

export function imageModel(samples = 6) {
  const model = new Sequential([
    new Conv2d(1, 4, 3, { stride: 2 }),
    new GroupNorm(2, 4),
    new Tanh(),
    new Flatten(),
    new Linear(36, 3),
  ]).initialize(1);
  const random = new Random(3);
  const x = f32(random.normals(samples * 64), [samples, 1, 8, 8]);
  const labels = new Tensor(
    'int32',
    Int32Array.from({ length: samples }, () => random.integer(0, 2)),
    [samples],
  );
  return { model, x, labels };
}

export type Problem = ReturnType<typeof textModel> | ReturnType<typeof imageModel>;

export const take = <T extends Tensor>(t: T, from: number, to: number): T => {
  const each = t.size / t.dims[0];
  return new Tensor(t.type, t.data.slice(from * each, to * each) as never, [
    to - from,
    ...t.dims.slice(1),
  ]) as T;
};

export function layersOf({ model, x, labels }: Problem, from = 0, to = x.dims[0], scale = 1, options = {}) {
  const pass = model.forwardSync(take<Tensor>(x, from, to), options);
  const { gradient } = crossEntropySync(pass.output, take(labels, from, to), { scale, ...options });
  return pass.backwardSync(gradient, options);
}

export function optimizerFor(
  model: Sequential,
  more: Partial<PrivateOptimizerOptions> = {},
): PrivateOptimizer {
  return new PrivateOptimizer({
    layers: model.layers,
    algorithm: { type: 'sgd', learningRate: 1 },
    maxNorm: 0.5,
    noiseMultiplier: 0,
    sampler: SAMPLER,
    key: KEY,
    ...more,
  });
}

export const flatten = (model: Sequential) =>
  Float32Array.from(
    Object.values(model.layers).flatMap((p) => Object.values(p).flatMap((t) => Array.from(t.data))),
  );

/** Every sample's whole gradient in float64, parameter after parameter in the order of the model. */
export function naiveGradients(
  model: Sequential,
  layers: Record<string, PrivateLayer>,
  samples: number,
): number[][] {
  return Array.from({ length: samples }, (_, i) =>
    Object.entries(model.layers).flatMap(([name, parameters]) => {
      const own = perSampleGradient(prepareLayer(layers[name]).reference(), i) as Record<
        string,
        Float64Array
      >;
      return Object.keys(parameters).flatMap((p) => Array.from(own[p]));
    }),
  );
}
