import { encodeFloats } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice } from '../op.ts';
import { decodeMxfp4 } from '../reference/gemm/mxfp4.ts';
import { asTensor, checkDims, makeTensor, Tensor, type TensorLike } from '../tensor.ts';

/**
 * A matrix (or a stack of them) in MXFP4 as gpt-oss stores it on the hub: rows are outputs, every 32 inputs share
 * an exponent.
 */
export interface Mxfp4Blocks {
  /** uint8 `[.., rows, inputs / 32, 16]`: two E2M1 codes in a byte, the low nibble is the earlier input. */
  blocks: TensorLike;
  /** uint8 `[.., rows, inputs / 32]`: e8m0, the value 2^(scale − 127). */
  scales: TensorLike;
}

export function isMxfp4(value: unknown): value is Mxfp4Blocks {
  return value !== null && typeof value === 'object' && ('blocks' in value || 'scales' in value);
}

const PARTS: ReadonlySet<string> = new Set(['blocks', 'scales']);

/**
 * Checks shapes and that every value is a finite float32.
 * @param rank dimensions of the matrix or stack it stands for, if fixed
 * @returns the dims it stands for, `[.., rows, inputs]`, and the bytes
 */
export function checkMxfp4(
  value: Mxfp4Blocks,
  name: string,
  rank?: number,
): { dims: number[]; blocks: Uint8Array; scales: Uint8Array } {
  checkOptions(value, PARTS, name);
  const blocks = asTensor(value.blocks, `${name}.blocks`, ['uint8'], rank && rank + 1);
  const scales = asTensor(value.scales, `${name}.scales`, ['uint8']);
  const outer = blocks.dims.slice(0, -1);
  if (outer.length < 2 || blocks.dims[outer.length] !== 16) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}.blocks: expected [.., rows, inputs / 32, 16], got [${blocks.dims.join(', ')}]`,
    );
  }
  checkDims(scales, outer, `${name}.scales`, 'blocks');
  checkFinite(blocks.data, scales.data, outer, name);
  const dims = [...outer.slice(0, -1), outer[outer.length - 1] * 32];
  return { dims, blocks: blocks.data, scales: scales.data };
}

/** 255 is e8m0's NaN; from 253 on, the larger codes exceed float32, which every product here is made in. */
function checkFinite(blocks: Uint8Array, scales: Uint8Array, dims: readonly number[], name: string): void {
  // The search is native: an expert of gpt-oss has 777,600 scales, looked at whenever it is packed.
  if ([253, 254, 255].every((e) => scales.indexOf(e) < 0)) return;
  for (let g = 0; g < scales.length; g++) {
    const e = scales[g];
    if (e < 253) continue;
    const fail = (what: string) => {
      const at: number[] = [];
      for (let i = dims.length - 1, rest = g; i >= 0; rest = Math.floor(rest / dims[i--])) {
        at.unshift(rest % dims[i]);
      }
      return new HeddleError('ERR_VALUE', `${name}.scales[${at.join(', ')}] is ${e}: ${what}`);
    };
    if (e === 255) throw fail('e8m0 NaN; non-finite scales are not supported');
    // 2^127 leaves room for codes below 2, 2^126 for codes below 4.
    const limit = e === 254 ? 4 : 6;
    for (let i = g * 16; i < (g + 1) * 16; i++) {
      if ((blocks[i] & 7) >= limit || ((blocks[i] >> 4) & 7) >= limit) throw fail('values beyond float32');
    }
  }
}

export interface UnpackMxfp4Options {
  /** Both hold every MXFP4 value exactly. Default float32. */
  type?: 'float32' | 'bfloat16';
}

const UNPACK_OPTIONS: ReadonlySet<string> = new Set(['type']);

/**
 * MXFP4 as stored on the hub (`*_blocks`, `*_scales` of gpt-oss) as plain weights.
 * @param blocks uint8 `[.., rows, inputs / 32, 16]`
 * @param scales uint8 `[.., rows, inputs / 32]`
 * @returns `[.., rows, inputs]`
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_VALUE` for a scale of 255 (NaN) or values beyond float32
 */
export function unpackMxfp4(
  blocks: TensorLike,
  scales: TensorLike,
  options?: UnpackMxfp4Options,
): Tensor<'float32' | 'bfloat16'> {
  checkOptions(options, UNPACK_OPTIONS, 'unpackMxfp4');
  const type = optionChoice(options?.type, ['float32', 'bfloat16'] as const, 'float32', 'type');
  const m = checkMxfp4({ blocks, scales }, 'unpackMxfp4');
  const values = decodeMxfp4(m.blocks, m.scales);
  if (type === 'float32') return makeTensor('float32', values, m.dims);
  return new Tensor('bfloat16', encodeFloats(values, 'bfloat16') as Uint16Array, m.dims);
}
