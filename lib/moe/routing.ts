// What the expert ops check of a routing.
import { type DeviceData, readElement } from '../device.ts';
import { HeddleError } from '../errors.ts';
import { asTensor, type Tensor } from '../tensor.ts';
import type { Routing } from './routeTopK.ts';

/** Indices int32 and weights float32, both `[tokens, k]`. Whether the ids exist is found by the kernels. */
export function checkRouting(
  routing: Routing,
  tokens: number,
  device?: 'device',
): { indices: Tensor<'int32'>; weights: Tensor<'float32'>; k: number } {
  if (routing === null || typeof routing !== 'object')
    throw new HeddleError('ERR_ARGUMENT', 'routing: expected { indices, weights }');
  const indices = asTensor(routing.indices, 'routing.indices', ['int32'], 2, device);
  const weights = asTensor(routing.weights, 'routing.weights', ['float32'], 2, device);
  const k = indices.dims[1];
  for (const [t, name] of [
    [indices, 'routing.indices'],
    [weights, 'routing.weights'],
  ] as const) {
    if (t.dims[0] !== tokens || t.dims[1] !== k) {
      throw new HeddleError('ERR_SHAPE', `${name}: expected [${tokens}, ${k}], got [${t.dims.join(', ')}]`);
    }
  }
  return { indices, weights, k };
}

/** The error for route `index`, whose id no expert has. */
export function routeIdError(index: number, k: number, ids: Int32Array | DeviceData): HeddleError {
  return new HeddleError(
    'ERR_VALUE',
    `routing.indices[${Math.floor(index / k)}, ${index % k}] is ${readElement(ids, index)}: expected -1 or the id of an expert`,
  );
}
