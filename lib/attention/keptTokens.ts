import { HeddleError } from '../errors.ts';
import { optionInteger } from '../op.ts';

/** The tokens of videos that masking keeps, packed without gaps. */
export interface KeptTokens {
  /** `frame * patches + patch` of each token, ascending within each batch entry. */
  indices: Int32Array;
  /** `[batch + 1]`: where the tokens of each batch entry begin; the total last. */
  batchOffsets: Int32Array;
  frames: number;
  /** Patches of a frame. */
  patches: number;
}

/** Where the frames and patches of packed tokens begin. */
export interface TokenIndex {
  batch: number;
  tokens: number;
  /** `[batch * frames + 1]`, positions in the packed order. */
  frameOffsets: Int32Array;
  /** `[batch * patches + 1]`, positions in `patchOrder`. */
  patchOffsets: Int32Array;
  /** Packed positions by batch entry, patch and frame. */
  patchOrder: Int32Array;
}

/** Checks kept tokens and sorts them by frame and by patch, in one pass each. */
export function indexTokens(t: KeptTokens, name: string): TokenIndex {
  if (t === null || typeof t !== 'object') {
    throw new HeddleError(
      'ERR_OPTION',
      `${name} must be an object with indices, batchOffsets, frames, patches`,
    );
  }
  const frames = optionInteger(t.frames, 0, 2 ** 31 - 1, `${name}.frames`);
  const patches = optionInteger(t.patches, 0, 2 ** 31 - 1, `${name}.patches`);
  const { indices, batchOffsets } = t;
  for (const [x, part] of [
    [indices, 'indices'],
    [batchOffsets, 'batchOffsets'],
  ] as const) {
    if (!(x instanceof Int32Array))
      throw new HeddleError('ERR_OPTION', `${name}.${part} must be an Int32Array`);
  }
  const batch = batchOffsets.length - 1;
  if (batch < 0 || batchOffsets[0] !== 0 || batchOffsets[batch] !== indices.length) {
    throw new HeddleError(
      'ERR_VALUE',
      `${name}.batchOffsets: offsets must start at 0 and end at ${indices.length}`,
    );
  }
  const frameOffsets = new Int32Array(batch * frames + 1);
  const patchOffsets = new Int32Array(batch * patches + 1);
  const patchOrder = new Int32Array(indices.length);
  const all = frames * patches;
  for (let b = 0; b < batch; b++) {
    if (batchOffsets[b + 1] < batchOffsets[b]) {
      throw new HeddleError(
        'ERR_VALUE',
        `${name}.batchOffsets[${b + 1}] is ${batchOffsets[b + 1]}: offsets must not decrease`,
      );
    }
    let before = -1;
    for (let i = batchOffsets[b]; i < batchOffsets[b + 1]; i++) {
      const x = indices[i];
      if (x <= before || x >= all) {
        throw new HeddleError(
          'ERR_VALUE',
          `${name}.indices[${i}] is ${x}: indices must ascend within a batch entry, from 0 to ${all - 1}`,
        );
      }
      before = x;
      frameOffsets[b * frames + Math.floor(x / patches) + 1]++;
      patchOffsets[b * patches + (x % patches) + 1]++;
    }
  }
  for (let i = 1; i < frameOffsets.length; i++) frameOffsets[i] += frameOffsets[i - 1];
  for (let i = 1; i < patchOffsets.length; i++) patchOffsets[i] += patchOffsets[i - 1];
  const next = patchOffsets.slice();
  for (let b = 0; b < batch; b++) {
    for (let i = batchOffsets[b]; i < batchOffsets[b + 1]; i++) {
      patchOrder[next[b * patches + (indices[i] % patches)]++] = i;
    }
  }
  return { batch, tokens: indices.length, frameOffsets, patchOffsets, patchOrder };
}
