import type { DTypeArrays, TypedArray } from '../tensor.ts';

/**
 * Positions in the one array of numbers that an attention op receives, in the order in which
 * native/binding/attention.cpp reads them.
 */
export const N = {
  batch: 0,
  queries: 1,
  keys: 2,
  queryHeads: 3,
  keyHeads: 4,
  headDim: 5,
  valueDim: 6,
  /** Element strides: batch, sequence, head, element. */
  queryStrides: 7,
  keyStrides: 11,
  valueStrides: 15,
  /** Strides over batch, head, query; the key stride is 1. 0 where the argument is broadcast. */
  biasStrides: 19,
  maskStrides: 22,
  blockStrides: 25,
  blockQuery: 28,
  blockKey: 29,
  queryIdStride: 30,
  keyIdStride: 31,
  /** Keys visible left and right of the diagonal, -1 unbounded; causal is a right side of 0. */
  left: 32,
  right: 33,
  scale: 34,
  softcap: 35,
  uniformEmpty: 36,
  segments: 37,
  count: 38,
} as const;

/** The arguments that every attention op starts with. */
export type AttentionArguments = [
  numbers: Float64Array,
  type: number,
  query: TypedArray,
  key: TypedArray,
  value: TypedArray,
  bias: TypedArray | null,
  biasType: number,
  alibi: Float32Array | null,
  sinks: Float32Array | null,
  mask: Uint8Array | null,
  blockMask: Uint8Array | null,
  queryIds: Int32Array | null,
  keyIds: Int32Array | null,
  queryOffsets: DTypeArrays['int32'] | null,
  keyOffsets: DTypeArrays['int32'] | null,
];
