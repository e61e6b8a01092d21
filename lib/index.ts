export {
  type BackendInfo,
  type BackendName,
  type Defaults,
  type Info,
  type IsaName,
  info,
  setDefaults,
} from './backend.ts';
export { HeddleError, type HeddleErrorCode } from './errors.ts';
export type { AsyncOpOptions, OpOptions } from './op.ts';
export { type DType, type DTypeArrays, Tensor, type TensorLike } from './tensor.ts';
