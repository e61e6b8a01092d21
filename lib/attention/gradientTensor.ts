import { allocateAt, type Location } from '../device.ts';
import type { FloatType } from '../dtype.ts';
import { checkOut } from '../op.ts';
import { asTensor, checkDims, makeTensor, product, type Tensor, type TensorLike } from '../tensor.ts';

/** What a backward pass is given besides the forward's inputs, in the type and dims that the forward makes it. */
export function tensorOfShape<T extends FloatType>(
  value: TensorLike,
  type: T,
  dims: readonly number[],
  name: string,
): Tensor<T> {
  const t = asTensor(value, name, [type], undefined, 'device');
  checkDims(t, dims, name);
  return t;
}

/**
 * A gradient: fresh, at `place`, or the one given, which may overlap none of `taken` and then joins them. Ops that take
 * device tensors name the place, and have asked `placeOf` with the one given.
 */
export function gradientTensor<T extends FloatType>(
  given: TensorLike | undefined,
  type: T,
  dims: readonly number[],
  taken: Tensor[],
  name: string,
  place?: Location,
): Tensor<T> {
  if (given === undefined) {
    return makeTensor(type, allocateAt(place ?? 'cpu', type, product(dims)), dims);
  }
  const out = asTensor(given, name, [type], undefined, place && 'device');
  checkOut(out, dims, taken, name);
  taken.push(out);
  return out;
}
