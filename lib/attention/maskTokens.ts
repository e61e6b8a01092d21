import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice, optionInteger } from '../op.ts';
import { asTensor, type TensorLike } from '../tensor.ts';
import { indexTokens, type KeptTokens } from './keptTokens.ts';
import { philox } from './philox.ts';

/** Kept tokens with everything that ops on either axis need. */
export interface TokenMask extends KeptTokens {
  batch: number;
  /** `[batch * frames + 1]`: where the tokens of each frame begin; for attention within frames, as `segments`. */
  timeOffsets: Int32Array;
  /** Positions in `indices` by batch entry, patch and time: the rows of attention within patches. */
  patchOrder: Int32Array;
  /** `[batch * patches + 1]`: where the tokens of each patch begin in `patchOrder`. */
  patchOffsets: Int32Array;
  /** `[batch * frames * patches]`: position of each token in `indices`, or -1. */
  inverse: Int32Array;
}

export interface MaskTokensOptions {
  frames: number;
  /** Patches of a frame. */
  patches: number;
  /** Share p of the tokens (tube: patches; frame: frames) to drop; n - floor(p n) are kept. At least 0, below 1. */
  ratio: number;
  /**
   * `'random'`: each token for itself (MAE-ST). `'tube'`: the same patches in all frames (VideoMAE). `'frame'`: whole
   * frames. Default `'random'`.
   */
  kind?: 'random' | 'tube' | 'frame';
  /** 0 to 2^53 - 1. The mask is a pure function of it, of the batch entry and of the other options. */
  seed: number;
  /** Batch entries, each with a mask of its own. Default 1. */
  batch?: number;
}

const OPTIONS: ReadonlySet<string> = new Set(['frames', 'patches', 'ratio', 'kind', 'seed', 'batch']);
const KINDS = ['random', 'tube', 'frame'] as const;
const MAX = 2 ** 31 - 1;

function checkTotal(batch: number, frames: number, patches: number, name: string): void {
  if (batch * frames * patches > MAX) {
    throw new HeddleError(
      'ERR_OPTION',
      `${name}: ${batch} x ${frames} x ${patches} tokens are more than ${MAX}`,
    );
  }
}

function finish(indices: Int32Array, batchOffsets: Int32Array, frames: number, patches: number): TokenMask {
  const kept = { indices, batchOffsets, frames, patches };
  const { batch, frameOffsets, patchOffsets, patchOrder } = indexTokens(kept, 'tokens');
  return {
    ...kept,
    batch,
    timeOffsets: frameOffsets,
    patchOrder,
    patchOffsets,
    inverse: inverseOf(kept),
  };
}

/** @internal `[batch * frames * patches]`: position of each token among the kept ones, or -1. */
export function inverseOf(t: KeptTokens): Int32Array {
  const all = t.frames * t.patches;
  const inverse = new Int32Array((t.batchOffsets.length - 1) * all).fill(-1);
  for (let b = 0; b + 1 < t.batchOffsets.length; b++) {
    for (let i = t.batchOffsets[b]; i < t.batchOffsets[b + 1]; i++) inverse[b * all + t.indices[i]] = i;
  }
  return inverse;
}

/** The `count` of `n` items with the smallest random numbers, ascending: every subset is equally likely. */
function sample(n: number, count: number, seed: number, batch: number, kind: number): Int32Array {
  const key: [number, number] = [seed >>> 0, Math.floor(seed / 2 ** 32)];
  const numbers = new Float64Array(n);
  for (let i = 0; i < n; i += 2) {
    const w = philox([i >>> 1, batch, kind, 0], key);
    for (let j = 0; j < 2 && i + j < n; j++) numbers[i + j] = w[2 * j] * 2 ** 21 + (w[2 * j + 1] >>> 11);
  }
  const limit = numbers.slice().sort()[count - 1];
  let ties = count;
  for (const x of numbers) if (x < limit) ties--;
  const kept = new Int32Array(count);
  let at = 0;
  for (let i = 0; i < n; i++) {
    if (numbers[i] < limit || (numbers[i] === limit && ties-- > 0)) kept[at++] = i;
  }
  return kept;
}

/**
 * Draws which tokens of videos a masked model computes. Random numbers come from Philox4x32-10 by token: the same on
 * every machine, and a batch entry's mask does not depend on the number of entries.
 *
 * @returns kept tokens for `factorizedAttention`, `VideoEncoder`, {@link gatherTokens} and `patchEmbed`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_OPTION`: for a ratio outside [0, 1), and for a mask that keeps nothing
 */
export function maskTokens(options: MaskTokensOptions): TokenMask {
  if (options === undefined || options === null) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      'maskTokens: options with frames, patches, ratio and seed are required',
    );
  }
  checkOptions(options, OPTIONS, 'maskTokens');
  const frames = optionInteger(options.frames, 1, MAX, 'frames');
  const patches = optionInteger(options.patches, 1, MAX, 'patches');
  const batch = optionInteger(options.batch ?? 1, 0, MAX, 'batch');
  const seed = optionInteger(options.seed, 0, Number.MAX_SAFE_INTEGER, 'seed');
  const kind = optionChoice(options.kind, KINDS, 'random', 'kind');
  const { ratio } = options;
  if (typeof ratio !== 'number' || !(ratio >= 0 && ratio < 1)) {
    throw new HeddleError('ERR_OPTION', `ratio must be at least 0 and below 1, got ${String(ratio)}`);
  }
  checkTotal(batch, frames, patches, 'maskTokens');
  const n = kind === 'random' ? frames * patches : kind === 'tube' ? patches : frames;
  const count = n - Math.floor(ratio * n);
  if (count === 0) throw new HeddleError('ERR_OPTION', `ratio ${ratio} keeps none of ${n}`);
  const each = kind === 'random' ? count : kind === 'tube' ? count * frames : count * patches;
  const indices = new Int32Array(batch * each);
  const batchOffsets = Int32Array.from({ length: batch + 1 }, (_, b) => b * each);
  for (let b = 0; b < batch; b++) {
    const drawn = sample(n, count, seed, b, KINDS.indexOf(kind));
    const own = indices.subarray(b * each, (b + 1) * each);
    if (kind === 'random') own.set(drawn);
    else if (kind === 'tube')
      own.forEach((_, i) => {
        own[i] = Math.floor(i / count) * patches + drawn[i % count];
      });
    else
      own.forEach((_, i) => {
        own[i] = drawn[Math.floor(i / patches)] * patches + (i % patches);
      });
  }
  return finish(indices, batchOffsets, frames, patches);
}

/**
 * Kept tokens of any mask.
 * @param keep uint8 `[batch, frames, patches]`; what is not 0 is kept
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`
 */
export function tokensFromMask(keep: TensorLike): TokenMask {
  const { data, dims } = asTensor(keep, 'keep', ['uint8'], 3);
  const [batch, frames, patches] = dims;
  checkTotal(batch, frames, patches, 'keep');
  const all = frames * patches;
  const indices = new Int32Array(data.reduce((count, x) => count + (x === 0 ? 0 : 1), 0));
  const batchOffsets = new Int32Array(batch + 1);
  let at = 0;
  for (let b = 0; b < batch; b++) {
    for (let i = 0; i < all; i++) if (data[b * all + i] !== 0) indices[at++] = i;
    batchOffsets[b + 1] = at;
  }
  return finish(indices, batchOffsets, frames, patches);
}
