import type { FloatType } from '../dtype.ts';
import { checkOut } from '../op.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';

/** A gradient: fresh, or the one given, which may overlap none of `taken` and then joins them. */
export function gradientTensor<T extends FloatType>(
  given: TensorLike | undefined,
  type: T,
  dims: readonly number[],
  taken: Tensor[],
  name: string,
): Tensor<T> {
  if (given === undefined) {
    const count = dims.reduce((a, b) => a * b, 1);
    return makeTensor(type, allocate(type, count), dims);
  }
  const out = asTensor(given, name, [type]);
  checkOut(out, dims, taken, name);
  taken.push(out);
  return out;
}
