import { allocateAt, type Location } from '../device.ts';
import type { FloatType } from '../dtype.ts';
import { checkOut } from '../op.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';

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
    const count = dims.reduce((a, b) => a * b, 1);
    return makeTensor(type, allocateAt(place ?? 'cpu', type, count), dims);
  }
  const out = asTensor(given, name, [type], undefined, place && 'device');
  checkOut(out, dims, taken, name);
  taken.push(out);
  return out;
}
