import { HeddleError } from '../../errors.ts';
import { asTensor, checkDims, makeTensor, type Tensor, type TensorLike } from '../../tensor.ts';

/**
 * Which positions of what flows are tokens: uint8 in its leading dims (`[B, T]` of `[B, T, dim]`), 0 marks padding; null
 * where there is none. Positions of padding are computed like others, and nothing that is kept comes from them:
 *
 * - most blocks look at one position at a time;
 * - attention clears padding on the way in and on the way back, and lets nobody look at it; means do not count it; other
 *   blocks that mix positions refuse a mask;
 * - every layer's record carries the mask, so that clipping does not read padding.
 */
export type Mask = Tensor<'uint8'> | null;

/** @internal A mask in the dims of what it belongs to. */
export function asMask(value: TensorLike | undefined, dims: readonly number[], of: string): Mask {
  if (value === undefined) return null;
  const mask = asTensor(value, 'mask', ['uint8']);
  checkDims(mask, dims, 'mask', of);
  return mask;
}

/** @internal x, or a copy with zeros at padding. */
export function clearPadding(x: Tensor<'float32'>, mask: Mask): Tensor<'float32'> {
  if (mask === null) return x;
  const data = x.data.slice();
  const width = mask.size === 0 ? 0 : x.size / mask.size;
  mask.data.forEach((token, i) => {
    if (token === 0) data.fill(0, i * width, (i + 1) * width);
  });
  return makeTensor('float32', data, x.dims);
}

/** @internal What a block that mixes positions says to a mask. */
export function refuseMask(mask: Mask, name: string, block: string): void {
  if (mask === null) return;
  const at = name === '' ? '' : ` of ${name.slice(0, -1)}`;
  throw new HeddleError(
    'ERR_ARGUMENT',
    `mask${at}: ${block} would mix padding with tokens; MeanTokens before it leaves no positions`,
  );
}
