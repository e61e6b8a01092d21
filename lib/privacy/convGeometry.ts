import { HeddleError } from '../errors.ts';
import { optionInteger } from '../op.ts';

/** Largest size, kernel, stride, padding, dilation and number of channels. */
export const MAX_EXTENT = 2 ** 20;

/** How a kernel moves over one to three axes; every list has one entry per axis. */
export interface ConvGeometry {
  size: readonly number[];
  outSize: readonly number[];
  kernel: readonly number[];
  stride: readonly number[];
  padding: readonly number[];
  dilation: readonly number[];
}

/** One number for all axes, or one per axis. */
export function perAxis(value: unknown, axes: number, min: number, name: string): number[] {
  const list = Array.isArray(value) ? value : new Array(axes).fill(value);
  if (list.length !== axes) {
    throw new HeddleError('ERR_OPTION', `${name} must be one number or ${axes}, got [${list.join(', ')}]`);
  }
  return list.map((v) => optionInteger(v, min, MAX_EXTENT, name));
}

/** Output places along one axis; below 1 where the kernel does not fit. */
export function outputSize(
  size: number,
  kernel: number,
  stride: number,
  padding: number,
  dilation = 1,
): number {
  return Math.floor((size + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1;
}

/** What the kernels read: axes padded in front to three with size 1, kernel 1, stride 1, padding 0, dilation 1. */
export function geometryNumbers(g: ConvGeometry): Int32Array {
  const three = (list: readonly number[], fill: number) => [
    ...new Array(3 - list.length).fill(fill),
    ...list,
  ];
  return Int32Array.of(
    ...three(g.size, 1),
    ...three(g.outSize, 1),
    ...three(g.kernel, 1),
    ...three(g.stride, 1),
    ...three(g.padding, 0),
    ...three(g.dilation, 1),
  );
}
