import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
} from '../op.ts';
import { clippedGradientsReference } from '../reference/privacy/clippedGradients.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { type PreparedLayer, type PrivateLayer, prepareLayer } from './layer.ts';

/** Gradients in the layer's own shapes. */
export interface LayerGradients {
  /** float32: linear `[p, d]`, embedding `[numEmbeddings, p]`, normalisation `[p]` or `[C]`, convolution `[C_out, C_in/groups, …kernel]`. */
  weight: Tensor<'float32'>;
  /** float32 `[p]`, `[C]` or `[C_out]`, where the layer has one. */
  bias?: Tensor<'float32'>;
}

export interface ClippedGradientsOptions {
  /** Added to, for gradient accumulation; undefined after an abort. Default: fresh zeros. */
  out?: { weight: TensorLike; bias?: TensorLike };
}

const OPTIONS: ReadonlySet<string> = new Set(['out', 'backend', 'threads', 'signal']);
const OUT_KEYS: ReadonlySet<string> = new Set(['weight', 'bias']);

function asFactors(value: TensorLike | Float32Array, samples: number): Tensor<'float32'> {
  const t =
    value instanceof Float32Array
      ? makeTensor('float32', value, [value.length])
      : asTensor(value, 'factors', ['float32'], 1);
  if (t.dims[0] !== samples) {
    throw new HeddleError('ERR_SHAPE', `factors: expected [${samples}], got [${t.dims[0]}]`);
  }
  for (let i = 0; i < samples; i++) {
    const f = t.data[i];
    if (!(f >= 0 && f < Infinity)) {
      throw new HeddleError(
        'ERR_VALUE',
        `factors: element ${i} is ${f}: expected a finite number of at least 0`,
      );
    }
  }
  return t;
}

function gradientsOf(
  p: PreparedLayer,
  given: ClippedGradientsOptions['out'],
  inputs: Tensor[],
): LayerGradients {
  const fresh = (dims: number[]) =>
    makeTensor(
      'float32',
      allocate(
        'float32',
        dims.reduce((a, b) => a * b, 1),
      ),
      dims,
    );
  if (given === undefined) {
    return p.bias === null ? { weight: fresh(p.weight) } : { weight: fresh(p.weight), bias: fresh(p.bias) };
  }
  checkOptions(given, OUT_KEYS, 'out');
  const weight = asTensor(given.weight, 'out.weight', ['float32']);
  checkOut(weight, p.weight, inputs, 'out.weight');
  if ((given.bias === undefined) !== (p.bias === null)) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      p.bias === null ? 'out.bias: the layer has no bias' : 'out.bias: the layer has a bias',
    );
  }
  if (p.bias === null) return { weight };
  const bias = asTensor(given.bias as TensorLike, 'out.bias', ['float32']);
  checkOut(bias, p.bias, [...inputs, weight], 'out.bias');
  return { weight, bias };
}

function prepare(
  layer: PrivateLayer,
  factors: TensorLike | Float32Array,
  options: ClippedGradientsOptions | undefined,
) {
  checkOptions(options, OPTIONS, 'clippedGradients');
  const p = prepareLayer(layer);
  const f = asFactors(factors, p.samples);
  const out = gradientsOf(p, options?.out, [...p.inputs, f]);
  const op: Op = {
    name: `${p.stem}ClippedGradients`,
    reference: () => {
      const sums = clippedGradientsReference(p.reference(), f.data);
      for (const [name, sum] of Object.entries(sums)) {
        const into = (name === 'weight' ? out.weight : (out.bias as Tensor<'float32'>)).data;
        for (let i = 0; i < sum.length; i++) into[i] += sum[i];
      }
      return 0;
    },
  };
  return { op, args: [...p.args, f.data, out.weight.data, out.bias?.data ?? null], out };
}

/**
 * Σ_i c_i·g_i for every parameter of one layer: the clipped sum of a private step by book-keeping, at the price of
 * the plain gradient, with memory that does not depend on the batch.
 *
 * A sample with factor 0 is not read, so that its NaN or infinity (for which {@link clipFactors} gives 0) does not
 * spread. Terms are added in the order of samples and positions: the bits do not depend on the threads.
 *
 * @param factors float32 `[B]`, each finite and at least 0
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE` (an index or a factor out
 *   of range), `ERR_BACKEND`, `ERR_MEMORY`, `ERR_ABORTED`
 */
export async function clippedGradients(
  layer: PrivateLayer,
  factors: TensorLike | Float32Array,
  options?: ClippedGradientsOptions & AsyncOpOptions,
): Promise<LayerGradients> {
  const { op, args, out } = prepare(layer, factors, options);
  await call(op, args, options);
  return out;
}

/** {@link clippedGradients} on the calling thread (and helpers, when `threads` > 1). */
export function clippedGradientsSync(
  layer: PrivateLayer,
  factors: TensorLike | Float32Array,
  options?: ClippedGradientsOptions & OpOptions,
): LayerGradients {
  const { op, args, out } = prepare(layer, factors, options);
  callSync(op, args, options);
  return out;
}
