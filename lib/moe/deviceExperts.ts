// Expert weights on the device: their memory, and the way there (native/moe/experts_device.h).
import { type Steps, step } from '../checkpoint/steps.ts';
import { DeviceData, upload } from '../device.ts';
import { type AsyncOpOptions, call, callSync, type Op } from '../op.ts';

/** What a handle on backend cuda holds. */
export interface DeviceBank {
  data: DeviceData;
  /** What the kernels need to know, in the order of native/binding/experts.cpp. */
  numbers: Float64Array;
}

const layoutOp: Op = { name: 'layoutExpert', reference: () => -3 };

/**
 * Copies packed experts to the device, one after the other: on the host it takes the memory of one.
 * @param use the packed weights; throws once they are disposed
 */
export function* copyExperts(
  use: () => object,
  experts: number,
  expertBytes: number,
  options: Pick<AsyncOpOptions, 'threads' | 'signal'>,
): Steps<DeviceData> {
  const data = DeviceData.allocate('uint8', experts * expertBytes);
  try {
    const image = new Uint8Array(expertBytes);
    for (let e = 0; e < experts; e++) {
      const layout = () => [use(), e, image];
      const copy = [data.subarray(e * expertBytes, (e + 1) * expertBytes), image];
      yield* step(
        () => callSync(layoutOp, layout(), { ...options, backend: 'cpu' }),
        () => call(layoutOp, layout(), { ...options, backend: 'cpu' }),
      );
      yield* step(
        () => callSync(upload, copy, { backend: 'cuda' }),
        () => call(upload, copy, { ...options, backend: 'cuda' }),
      );
    }
  } catch (error) {
    data.release();
    throw error;
  }
  return data;
}
