/**
 * Every error heddle throws is a `HeddleError`; branch on `code`, show `message` to people.
 *
 * | code | thrown when |
 * |---|---|
 * | `ERR_ARGUMENT` | an argument is missing or is not of the documented kind |
 * | `ERR_SHAPE` | dimensions do not fit each other, or data does not fit its dimensions |
 * | `ERR_DTYPE` | an element type is not supported here |
 * | `ERR_OPTION` | an option has a value that is not allowed |
 * | `ERR_VALUE` | an element of an input is outside its documented range (for example an expert id) |
 * | `ERR_BACKEND` | the backend or instruction set asked for cannot run here |
 * | `ERR_ABORTED` | the `AbortSignal` fired; `cause` holds its reason |
 * | `ERR_DISPOSED` | a handle was used after `dispose()` |
 * | `ERR_CHECKPOINT` | a checkpoint file is damaged, incomplete or not supported |
 * | `ERR_MEMORY` | native memory could not be allocated, or a byte limit was reached |
 * | `ERR_INTERNAL` | a defect in heddle: please report it |
 */
export type HeddleErrorCode =
  | 'ERR_ARGUMENT'
  | 'ERR_SHAPE'
  | 'ERR_DTYPE'
  | 'ERR_OPTION'
  | 'ERR_VALUE'
  | 'ERR_BACKEND'
  | 'ERR_ABORTED'
  | 'ERR_DISPOSED'
  | 'ERR_CHECKPOINT'
  | 'ERR_MEMORY'
  | 'ERR_INTERNAL';

/** The one error class of heddle. */
export class HeddleError extends Error {
  readonly code: HeddleErrorCode;

  constructor(code: HeddleErrorCode, message: string, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'HeddleError';
    this.code = code;
  }
}
