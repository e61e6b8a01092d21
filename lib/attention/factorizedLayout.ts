import type { TypedArray } from '../tensor.ts';

/** Numbers of the axes at the native boundary (native/attention/factorized_attention.h). */
export const AXIS_CODE = { joint: 0, time: 1, space: 2, 'split-heads': 3 } as const;

/**
 * Positions in the one array of numbers that a factorized op receives, in the order in which
 * native/binding/attention.cpp reads them.
 */
export const F = {
  axis: 0,
  batch: 1,
  frames: 2,
  patches: 3,
  queryHeads: 4,
  keyHeads: 5,
  headDim: 6,
  valueDim: 7,
  /** Element strides: batch, frame, patch, head, element; of packed tokens 0, 0, token, head, element. */
  queryStrides: 8,
  keyStrides: 13,
  valueStrides: 18,
  outputStrides: 23,
  /** Of the class token: batch, head. */
  classQueryStrides: 28,
  classKeyStrides: 30,
  classValueStrides: 32,
  classOutputStrides: 34,
  /** Strides over batch, sequence, head, query; 0 where the argument is broadcast. */
  biasStrides: 36,
  maskStrides: 40,
  left: 44,
  right: 45,
  scale: 46,
  softcap: 47,
  uniformEmpty: 48,
  /** Packed tokens; 0 with dense ones. */
  tokens: 49,
  /** Strides of their log-sum-exp: batch (added to the packed position), head. */
  lseBatch: 50,
  lseHead: 51,
  count: 52,
} as const;

/** The arguments that both factorized ops start with. */
export type FactorizedArguments = [
  numbers: Float64Array,
  type: number,
  query: TypedArray,
  key: TypedArray,
  value: TypedArray,
  classQuery: TypedArray | null,
  classKey: TypedArray | null,
  classValue: TypedArray | null,
  bias: TypedArray | null,
  biasType: number,
  alibi: Float32Array | null,
  sinks: Float32Array | null,
  mask: Uint8Array | null,
  batchOffsets: Int32Array | null,
  frameOffsets: Int32Array | null,
  patchOffsets: Int32Array | null,
  order: Int32Array | null,
];

/** How many of the arguments those are. */
export const FACTORIZED_ARGUMENTS = 17;
