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
import { allocate, asTensor, makeTensor, product, type Tensor, type TensorLike } from '../tensor.ts';
import { type PrivateLayer, prepareLayer } from './layer.ts';
import type { PreparedLayer } from './layerArguments.ts';
import type { LoraLayer } from './loraLayer.ts';

/** Gradients in the layer's own shapes. */
export interface LayerGradients {
  /**
   * float32: linear `[p, d]`, embedding `[numEmbeddings, p]`, tied embedding `[vocabulary, d]`, experts `[E, p, d]`,
   * normalisation `[p]` or `[C]`, convolution `[C_out, C_in/groups, …kernel]`.
   */
  weight: Tensor<'float32'>;
  /** float32 `[p]`, `[E, p]`, `[C]` or `[C_out]`, where the layer has one. */
  bias?: Tensor<'float32'>;
}

/** Gradients of an adapter. */
export interface LoraGradients {
  /** float32 `[rank, d]`. */
  a: Tensor<'float32'>;
  /** float32 `[p, rank]`. */
  b: Tensor<'float32'>;
}

export interface ClippedGradientsOptions {
  /** Added to, for gradient accumulation; undefined after an abort. Default: fresh zeros. */
  out?: { weight: TensorLike; bias?: TensorLike };
}

export interface LoraClippedGradientsOptions {
  /** Added to, for gradient accumulation; undefined after an abort. Default: fresh zeros. */
  out?: { a: TensorLike; b: TensorLike };
}

type AnyOptions = { out?: ClippedGradientsOptions['out'] | LoraClippedGradientsOptions['out'] };

const OPTIONS: ReadonlySet<string> = new Set(['out', 'backend', 'threads', 'signal']);
type Gradients = Record<string, Tensor<'float32'>>;

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

/** `out`, checked, or fresh zeros: one tensor for each parameter. */
function gradientsOf(p: PreparedLayer, given: object | undefined, inputs: Tensor[]): Gradients {
  if (given !== undefined) checkOptions(given, new Set(p.parameters.map(([name]) => name)), 'out');
  const out: Gradients = {};
  for (const [name, dims] of p.parameters) {
    const value = (given as Record<string, TensorLike> | undefined)?.[name];
    if (given !== undefined && (value === undefined) !== (dims === null)) {
      throw new HeddleError(
        'ERR_ARGUMENT',
        dims === null ? `out.${name}: the layer has no ${name}` : `out.${name}: the layer has a ${name}`,
      );
    }
    if (dims === null) continue;
    if (value === undefined) {
      out[name] = makeTensor('float32', allocate('float32', product(dims)), dims);
    } else {
      out[name] = asTensor(value, `out.${name}`, ['float32']);
      checkOut(out[name], dims, inputs, `out.${name}`);
      inputs.push(out[name]);
    }
  }
  return out;
}

function prepare(
  layer: PrivateLayer | LoraLayer,
  factors: TensorLike | Float32Array,
  options: { out?: object } | undefined,
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
        const into = out[name].data;
        for (let i = 0; i < sum.length; i++) into[i] += sum[i];
      }
      return 0;
    },
  };
  return { op, args: [...p.args, f.data, ...p.parameters.map(([name]) => out[name]?.data ?? null)], out };
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
): Promise<LayerGradients>;
export async function clippedGradients(
  layer: LoraLayer,
  factors: TensorLike | Float32Array,
  options?: LoraClippedGradientsOptions & AsyncOpOptions,
): Promise<LoraGradients>;
export async function clippedGradients(
  layer: PrivateLayer | LoraLayer,
  factors: TensorLike | Float32Array,
  options?: AnyOptions & AsyncOpOptions,
): Promise<LayerGradients | LoraGradients>;
export async function clippedGradients(
  layer: PrivateLayer | LoraLayer,
  factors: TensorLike | Float32Array,
  options?: AnyOptions & AsyncOpOptions,
): Promise<LayerGradients | LoraGradients> {
  const { op, args, out } = prepare(layer, factors, options);
  await call(op, args, options);
  return out as unknown as LayerGradients | LoraGradients;
}

/** {@link clippedGradients} on the calling thread (and helpers, when `threads` > 1). */
export function clippedGradientsSync(
  layer: PrivateLayer,
  factors: TensorLike | Float32Array,
  options?: ClippedGradientsOptions & OpOptions,
): LayerGradients;
export function clippedGradientsSync(
  layer: LoraLayer,
  factors: TensorLike | Float32Array,
  options?: LoraClippedGradientsOptions & OpOptions,
): LoraGradients;
export function clippedGradientsSync(
  layer: PrivateLayer | LoraLayer,
  factors: TensorLike | Float32Array,
  options?: AnyOptions & OpOptions,
): LayerGradients | LoraGradients;
export function clippedGradientsSync(
  layer: PrivateLayer | LoraLayer,
  factors: TensorLike | Float32Array,
  options?: AnyOptions & OpOptions,
): LayerGradients | LoraGradients {
  const { op, args, out } = prepare(layer, factors, options);
  callSync(op, args, options);
  return out as unknown as LayerGradients | LoraGradients;
}
