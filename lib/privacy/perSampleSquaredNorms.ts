import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionChoice,
} from '../op.ts';
import { perSampleSquaredNormsReference } from '../reference/privacy/perSampleSquaredNorms.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { type PrivateLayer, prepareLayer } from './layer.ts';
import type { LoraLayer } from './loraLayer.ts';

/** NormMethod::kByLength; 0 and 1 are instantiate and ghost. */
const BY_LENGTH = 2;
const METHODS = ['auto', 'ghost', 'instantiate'] as const;

export interface SquaredNormsOptions {
  /**
   * How a linear layer's or a convolution's norm is computed (T output places, d = C_in/groups·taps, p = C_out/groups);
   * both are exact. `ghost` multiplies Gram matrices, T²(d + p) operations;
   * `instantiate` forms the gradient block by block, 2Tpd. `auto`: ghost where 2T² ≤ p·d in this call; for adapters
   * and experts, for each matrix and sample by the rows that it has. Embeddings and normalisation layers have one way;
   * of a tied embedding it is the head's.
   */
  method?: (typeof METHODS)[number];
  /** float32 `[B]`. */
  out?: TensorLike;
}

const OPTIONS: ReadonlySet<string> = new Set(['method', 'out', 'backend', 'threads', 'signal']);

function prepare(layer: PrivateLayer | LoraLayer, options: SquaredNormsOptions | undefined) {
  checkOptions(options, OPTIONS, 'perSampleSquaredNorms');
  const p = prepareLayer(layer);
  const method = optionChoice(options?.method, METHODS, 'auto', 'method');
  const ghost = method === 'auto' ? p.preferGhost : method === 'ghost';
  const code = ghost === null ? BY_LENGTH : Number(ghost);
  let out: Tensor<'float32'>;
  if (options?.out === undefined) {
    out = makeTensor('float32', new Float32Array(p.samples), [p.samples]);
  } else {
    out = asTensor(options.out, 'out', ['float32']);
    checkOut(out, [p.samples], p.inputs, 'out');
  }
  const op: Op = {
    name: `${p.stem}SquaredNorms`,
    reference: () => {
      out.data.set(perSampleSquaredNormsReference(p.reference(), ghost ? 'ghost' : 'instantiate'));
      return 0;
    },
  };
  return { op, args: [...p.args, code, out.data], out };
}

/**
 * ‖g_i‖² of every sample's gradient of one layer, weight and bias together, without forming any gradient.
 *
 * Sums over layers give the squared norm of the whole gradient, which {@link clipFactors} turns into factors. A
 * sample's result is bitwise the same in any batch and on any number of threads. A sample with a NaN or an infinity
 * (in what is read: padding is not) gets a result that is not finite; so does one whose squares overflow float32.
 *
 * @returns float32 `[B]`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE` (an index out of range),
 *   `ERR_BACKEND`, `ERR_MEMORY`, `ERR_ABORTED`
 */
export async function perSampleSquaredNorms(
  layer: PrivateLayer | LoraLayer,
  options?: SquaredNormsOptions & AsyncOpOptions,
): Promise<Tensor<'float32'>> {
  const { op, args, out } = prepare(layer, options);
  await call(op, args, options);
  return out;
}

/** {@link perSampleSquaredNorms} on the calling thread (and helpers, when `threads` > 1). */
export function perSampleSquaredNormsSync(
  layer: PrivateLayer | LoraLayer,
  options?: SquaredNormsOptions & OpOptions,
): Tensor<'float32'> {
  const { op, args, out } = prepare(layer, options);
  callSync(op, args, options);
  return out;
}
