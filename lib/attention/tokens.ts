import type { FloatType } from '../dtype.ts';
import { FLOAT_TYPES } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { prepareGather } from '../nn/gatherRows.ts';
import { type AsyncOpOptions, call, callSync, checkOptions, type OpOptions } from '../op.ts';
import { asTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { indexTokens, type KeptTokens } from './keptTokens.ts';
import { inverseOf } from './maskTokens.ts';

export interface GatherTokensOptions {
  /** `[kept, width]` of the type of x. */
  out?: TensorLike;
}

export interface ScatterTokensOptions {
  /** What stands for a token that was dropped (the mask token), `[width]` of the type of `packed`. Default: zeros. */
  fill?: TensorLike;
  /** `[batch, frames * patches, width]` of the type of `packed`. */
  out?: TensorLike;
}

const GATHER: ReadonlySet<string> = new Set(['out', 'backend', 'threads', 'signal']);
const SCATTER: ReadonlySet<string> = new Set([...GATHER, 'fill']);

function prepareGatherTokens(x: TensorLike, tokens: KeptTokens, options: GatherTokensOptions | undefined) {
  checkOptions(options, GATHER, 'gatherTokens');
  const { batch, tokens: kept } = indexTokens(tokens, 'tokens');
  const { frames, patches, indices, batchOffsets } = tokens;
  const input = asTensor(x, 'x', FLOAT_TYPES);
  const d = input.dims;
  const all = frames * patches;
  const three = d.length === 3 && d[0] === batch && d[1] === all;
  const four = d.length === 4 && d[0] === batch && d[1] === frames && d[2] === patches;
  if (!three && !four) {
    throw new HeddleError(
      'ERR_SHAPE',
      `x: expected [${batch}, ${all}, width] or [${batch}, ${frames}, ${patches}, width] as in tokens, got [${d.join(', ')}]`,
    );
  }
  const rows = new Int32Array(kept);
  for (let b = 0; b < batch; b++) {
    for (let i = batchOffsets[b]; i < batchOffsets[b + 1]; i++) rows[i] = b * all + indices[i];
  }
  return prepareGather(input, rows, [kept, d[d.length - 1]], options);
}

/**
 * Packs the kept tokens of each video without gaps: row i of the result is token `tokens.indices[i]` of its batch entry.
 *
 * Its adjoint, and so its backward op, is {@link scatterTokens} without a fill: the gradient of a dropped token is 0.
 *
 * @param x `[batch, frames * patches, width]` or `[batch, frames, patches, width]` float32, bfloat16 or float16
 * @param tokens from {@link maskTokens}
 * @returns `[kept, width]` of the type of x, copied bit by bit
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function gatherTokens(
  x: TensorLike,
  tokens: KeptTokens,
  options?: GatherTokensOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const p = prepareGatherTokens(x, tokens, options);
  await call(p.op, p.args, options);
  return p.out;
}

/** {@link gatherTokens} on the calling thread (and helpers, when `threads` > 1). */
export function gatherTokensSync(
  x: TensorLike,
  tokens: KeptTokens,
  options?: GatherTokensOptions & OpOptions,
): Tensor<FloatType> {
  const p = prepareGatherTokens(x, tokens, options);
  callSync(p.op, p.args, options);
  return p.out;
}

function prepareScatter(packed: TensorLike, tokens: KeptTokens, options: ScatterTokensOptions | undefined) {
  checkOptions(options, SCATTER, 'scatterTokens');
  const { batch, tokens: kept } = indexTokens(tokens, 'tokens');
  const input = asTensor(packed, 'packed', FLOAT_TYPES, 2);
  if (input.dims[0] !== kept) {
    throw new HeddleError('ERR_SHAPE', `packed: expected ${kept} rows as in tokens, got ${input.dims[0]}`);
  }
  const dims = [batch, tokens.frames * tokens.patches, input.dims[1]];
  return prepareGather(input, inverseOf(tokens), dims, options);
}

/**
 * Puts packed tokens back in their places and `fill` where tokens were dropped: the input of a masked autoencoder's
 * decoder.
 *
 * Its adjoint, and so its backward op for `packed`, is {@link gatherTokens}; the gradient of the fill is the sum of the
 * gradient's rows of dropped tokens.
 *
 * @param packed `[kept, width]` float32, bfloat16 or float16
 * @param tokens from {@link maskTokens}
 * @returns `[batch, frames * patches, width]` of the type of `packed`, copied bit by bit
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function scatterTokens(
  packed: TensorLike,
  tokens: KeptTokens,
  options?: ScatterTokensOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const p = prepareScatter(packed, tokens, options);
  await call(p.op, p.args, options);
  return p.out;
}

/** {@link scatterTokens} on the calling thread (and helpers, when `threads` > 1). */
export function scatterTokensSync(
  packed: TensorLike,
  tokens: KeptTokens,
  options?: ScatterTokensOptions & OpOptions,
): Tensor<FloatType> {
  const p = prepareScatter(packed, tokens, options);
  callSync(p.op, p.args, options);
  return p.out;
}
