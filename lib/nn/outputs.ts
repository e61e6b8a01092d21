import { allocateAt, type Location } from '../device.ts';
import type { FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { checkOut } from '../op.ts';
import { asTensor, checkDims, type DType, makeTensor, product, Tensor, type TensorLike } from '../tensor.ts';

function sameMemory(a: Tensor<DType>, b: Tensor<DType>): boolean {
  return a.type === b.type && a.data.byteOffset === b.data.byteOffset && a.data.length === b.data.length;
}

/**
 * The output of an op that works element by element: a fresh tensor, or the one given, which may be one of `inPlace`
 * itself but may not otherwise overlap them or `others`. `place`: where the op computes.
 */
export function elementwiseOutput(
  given: TensorLike | undefined,
  type: FloatType,
  dims: readonly number[],
  inPlace: readonly (Tensor<DType> | null)[],
  others: readonly (Tensor<DType> | null)[],
  name: string,
  place: Location = 'cpu',
): Tensor<FloatType> {
  if (given === undefined) {
    const count = product(dims);
    return makeTensor(type, allocateAt(place, type, count), dims);
  }
  const out = asTensor(given, name, [type], undefined, place === 'cuda' ? 'device' : undefined);
  const apart = inPlace.filter((t) => t === null || t.data.buffer !== out.data.buffer || !sameMemory(t, out));
  checkOut(out, dims, [...apart, ...others], name);
  return out;
}

/** A float32 vector of `width` elements, or null; `device`: as `asTensor` takes it. */
export function optionalVector(
  value: TensorLike | undefined,
  width: number,
  name: string,
  device?: 'device',
): Tensor<'float32'> | null {
  if (value === undefined) return null;
  const t = asTensor(value, name, ['float32'], undefined, device);
  checkDims(t, [width], name);
  return t;
}

/** A tensor of x's type and dims, or null; `device` as for `asTensor`. */
export function optionalLike(
  value: TensorLike | undefined,
  x: Tensor<FloatType>,
  name: string,
  device?: 'device',
): Tensor<FloatType> | null {
  if (value === undefined) return null;
  const t = asTensor(value, name, [x.type], undefined, device);
  checkDims(t, x.dims, name, 'x');
  return t;
}

/** Rows and width of `[..., width]`; width must be at least 1. */
export function rowsOf(x: Tensor<FloatType>, name: string): [rows: number, width: number] {
  const width = x.dims.length === 0 ? 0 : x.dims[x.dims.length - 1];
  if (width === 0) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected [..., width] with a width of at least 1, got [${x.dims.join(', ')}]`,
    );
  }
  return [x.size / width, width];
}

/** `out` as given, for `placeOf`; what is no Tensor of heddle's is on the CPU. */
export function givenTensor(value: TensorLike | undefined): Tensor | null {
  return value instanceof Tensor ? value : null;
}
