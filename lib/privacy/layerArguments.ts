/** @internal What the layer kinds of this family have in common: arguments, and the checked form. */
import { DTYPE_CODE, decodeFloats, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import type { Layer } from '../reference/privacy/layers.ts';
import { asTensor, checkDims, sameDims, type Tensor, type TensorLike } from '../tensor.ts';

/** A checked layer: what the native ops and the reference take. */
export interface PreparedLayer {
  /** Native ops are `<stem>SquaredNorms` and `<stem>ClippedGradients`. */
  stem: string;
  /** In the order of native/binding/privacy.cpp. */
  args: unknown[];
  samples: number;
  /** Whether the ghost norm is the cheaper one; null: each gradient's own length decides. */
  preferGhost: boolean | null;
  inputs: Tensor[];
  /** Dimensions of every parameter in the order of the native op; null: the layer has none. */
  parameters: [name: string, dims: number[] | null][];
  reference(): Layer;
}

/** Floats as the reference reads them. */
export function values(t: Tensor<FloatType>): Float32Array {
  return t.type === 'float32' ? (t.data as Float32Array) : decodeFloats(t.data, t.type);
}

export function featureTensor(value: TensorLike, name: string, rank = 2): Tensor<FloatType> {
  const t = asTensor(value, name, FLOAT_TYPES);
  if (t.dims.length < rank) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected at least ${rank} dimensions, got [${t.dims.join(', ')}]`,
    );
  }
  return t;
}

export function checkLeading(
  dims: readonly number[],
  lead: readonly number[],
  name: string,
  of: string,
): void {
  if (!sameDims(dims, lead)) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected leading dims [${lead.join(', ')}] as in ${of}, got [${dims.join(', ')}]`,
    );
  }
}

export function asMask(value: TensorLike | undefined, lead: readonly number[]): Tensor<'uint8'> | null {
  if (value === undefined) return null;
  const t = asTensor(value, 'layer.mask', ['uint8']);
  checkDims(t, lead, 'layer.mask');
  return t;
}

export function asBoolean(value: unknown, fallback: boolean | undefined): boolean {
  const v = value === undefined ? fallback : value;
  if (typeof v !== 'boolean') {
    throw new HeddleError('ERR_ARGUMENT', `layer.bias: expected true or false, got ${String(value)}`);
  }
  return v;
}

export interface Rows {
  samples: number;
  positions: number;
  inputs: number;
  outputs: number;
  input: Tensor<FloatType> | null;
  gradOutputs: Tensor<FloatType>;
  indices?: Int32Array;
  paddingIndex?: number;
  mask?: Tensor<'uint8'> | null;
  bias: boolean;
}

export function argsOf(r: Rows): unknown[] {
  return [
    r.samples,
    r.positions,
    r.inputs,
    r.outputs,
    r.input === null ? null : r.input.data,
    r.input === null ? 0 : DTYPE_CODE[r.input.type],
    r.gradOutputs.data,
    DTYPE_CODE[r.gradOutputs.type],
    r.indices ?? null,
    r.paddingIndex ?? -1,
    r.mask?.data ?? null,
    r.bias,
  ];
}

export function tensorsOf(r: Rows): Tensor[] {
  return [r.input, r.gradOutputs, r.mask ?? null].filter((t) => t !== null) as Tensor[];
}

/** Indices from `least` to `count` − 1 wherever they are read. */
export function checkIndices(
  given: Tensor<'int32' | 'int64'>,
  count: number,
  mask: Uint8Array | undefined,
  name = 'layer.indices',
  least = 0,
): Int32Array {
  const out = given.type === 'int32' ? (given.data as Int32Array) : new Int32Array(given.data.length);
  for (let i = 0; i < out.length; i++) {
    const id = given.data[i];
    const readable = mask === undefined || mask[i] !== 0;
    if (readable && (id < least || id >= count)) {
      throw new HeddleError('ERR_VALUE', `${name}: element ${i} is ${id}: expected ${least} to ${count - 1}`);
    }
    if (given.type === 'int64') out[i] = readable ? Number(id) : 0;
  }
  return out;
}
