import { type FileSource, fill, openSource, readHeaderBytes } from '../checkpoint/file.ts';
import { headerLength, PREFIX_BYTES, parseHeader } from '../checkpoint/header.ts';
import { runAsync } from '../checkpoint/steps.ts';
import type { FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  asTensor,
  BYTES_PER_ELEMENT,
  makeTensor,
  product,
  type Tensor,
  type TensorLike,
  type TypedArray,
} from '../tensor.ts';

/** Element types of streamed keys and values. */
export type BlockType = FloatType | 'int8';
export const BLOCK_TYPES: readonly BlockType[] = ['float32', 'bfloat16', 'float16', 'int8'];

/** Consecutive keys and values. */
export interface KeyValueBlock {
  /** `[tokens, keyHeads, dim]` float32, bfloat16, float16 or int8. */
  keys: TensorLike;
  /** `[tokens, keyHeads, valueDim]` of the same type. */
  values: TensorLike;
  /** For int8: factors `[tokens, keyHeads]` of the vectors. Default 1. */
  keyScales?: Float32Array;
  valueScales?: Float32Array;
}

/** A tensor in a file: the name of one in a safetensors file, or where raw little-endian elements are. */
export type FileTensor =
  | string
  | { type: BlockType; dims: readonly [number, number, number]; offset?: number };

/** Keys and values in a file that is read block by block; `valuesPath` where they are in two files. */
export interface KeyValueFile {
  path: string;
  valuesPath?: string;
  keys: FileTensor;
  values: FileTensor;
}

/** Where keys and values come from: memory (a memory map too), a file, or blocks in key order. */
export type KeyValueSource =
  | KeyValueBlock
  | KeyValueFile
  | Iterable<KeyValueBlock>
  | AsyncIterable<KeyValueBlock>;

/** Blocks in order and, where the source knows it, how many tokens they have in all. */
export interface Blocks {
  iterator: AsyncIterator<KeyValueBlock> | Iterator<KeyValueBlock>;
  tokens?: number;
}

const BLOCK_BYTES = 8 * 2 ** 20;
/** Blocks of whole parts of the kernel give the same bits whatever their size. */
const PART = 1024;

function tokensPerBlock(bytesPerToken: number, wanted: number | undefined): number {
  return wanted ?? Math.max(PART, Math.floor(BLOCK_BYTES / Math.max(1, bytesPerToken) / PART) * PART);
}

function view(t: Tensor, begin: number, end: number): Tensor {
  const size = t.dims[1] * t.dims[2];
  const data = t.data.subarray(begin * size, end * size) as TypedArray;
  return makeTensor(t.type, data, [end - begin, t.dims[1], t.dims[2]]);
}

function* memoryBlocks(block: KeyValueBlock, k: Tensor, v: Tensor, step: number): Generator<KeyValueBlock> {
  const heads = k.dims[1];
  for (let at = 0; at === 0 || at < k.dims[0]; at += step) {
    const end = Math.min(k.dims[0], at + step);
    yield {
      keys: view(k, at, end),
      values: view(v, at, end),
      keyScales: block.keyScales?.subarray(at * heads, end * heads),
      valueScales: block.valueScales?.subarray(at * heads, end * heads),
    };
  }
}

interface Place {
  source: FileSource;
  name: string;
  type: BlockType;
  dims: readonly number[];
  offset: number;
}

async function locateTensor(source: FileSource, tensor: FileTensor, name: string): Promise<Place> {
  if (typeof tensor !== 'string') {
    const { type, dims, offset = 0 } = tensor;
    if (!BLOCK_TYPES.includes(type)) {
      throw new HeddleError(
        'ERR_DTYPE',
        `${name}: type ${String(type)} is not one of ${BLOCK_TYPES.join(', ')}`,
      );
    }
    const good =
      Array.isArray(dims) && dims.length === 3 && dims.every((d) => Number.isSafeInteger(d) && d >= 0);
    if (!good) throw new HeddleError('ERR_SHAPE', `${name}: dims must be [tokens, heads, dim]`);
    const bytes = product(dims) * BYTES_PER_ELEMENT[type];
    if (!Number.isSafeInteger(offset) || offset < 0 || offset + bytes > source.size) {
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: [${dims.join(', ')}] ${type} from byte ${String(offset)} on need ${bytes} bytes, ${source.path} has ${source.size}`,
      );
    }
    return { source, name, type, dims, offset };
  }
  const bytes = await runAsync(
    readHeaderBytes(source, (prefix) => headerLength(prefix, source.size, source.path)),
  );
  const begin = PREFIX_BYTES + bytes.byteLength;
  const found = parseHeader(bytes, source.size - begin, source.path).tensors.find((t) => t.name === tensor);
  if (found === undefined) {
    throw new HeddleError('ERR_CHECKPOINT', `${source.path}: has no tensor '${tensor}' for ${name}`);
  }
  if (!BLOCK_TYPES.includes(found.type as BlockType)) {
    throw new HeddleError(
      'ERR_DTYPE',
      `${name}: '${tensor}' is ${found.dtype}; allowed: ${BLOCK_TYPES.join(', ')}`,
    );
  }
  if (found.dims.length !== 3) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: '${tensor}' must be [tokens, heads, dim], got [${found.dims.join(', ')}]`,
    );
  }
  return { source, name, type: found.type as BlockType, dims: found.dims, offset: begin + found.begin };
}

/** Reads tokens [begin, end) into `room`, or into memory of its own when they do not fill it. */
async function readTokens(p: Place, begin: number, end: number, room: ArrayBuffer, signal?: AbortSignal) {
  const row = p.dims[1] * p.dims[2] * BYTES_PER_ELEMENT[p.type];
  const bytes = (end - begin) * row;
  const target = bytes === room.byteLength ? room : new ArrayBuffer(bytes);
  await runAsync(fill(p.source, p.offset + begin * row, target, p.name, signal));
  const ctor = { float32: Float32Array, bfloat16: Uint16Array, float16: Uint16Array, int8: Int8Array }[
    p.type
  ];
  return makeTensor(p.type, new ctor(target), [end - begin, p.dims[1], p.dims[2]]);
}

async function* fileBlocks(
  k: Place,
  v: Place,
  step: number,
  signal?: AbortSignal,
): AsyncGenerator<KeyValueBlock> {
  try {
    const room = (p: Place) =>
      new ArrayBuffer(Math.min(step, p.dims[0]) * p.dims[1] * p.dims[2] * BYTES_PER_ELEMENT[p.type]);
    // In turns: one block is read while the other is being computed.
    const rooms = [0, 1].map(() => [room(k), room(v)]);
    for (let at = 0, turn = 0; at === 0 || at < k.dims[0]; at += step, turn ^= 1) {
      const end = Math.min(k.dims[0], at + step);
      const [keys, values] = await Promise.all([
        readTokens(k, at, end, rooms[turn][0], signal),
        readTokens(v, at, end, rooms[turn][1], signal),
      ]);
      yield { keys, values };
    }
  } finally {
    k.source.close();
    v.source.close();
  }
}

async function openFile(
  file: KeyValueFile,
  wanted: number | undefined,
  signal?: AbortSignal,
): Promise<Blocks> {
  const opened: FileSource[] = [];
  try {
    opened.push(await runAsync(openSource(file.path)));
    opened.push(file.valuesPath === undefined ? opened[0] : await runAsync(openSource(file.valuesPath)));
    const k = await locateTensor(opened[0], file.keys, 'keys');
    const v = await locateTensor(opened[1], file.values, 'values');
    if (v.dims[0] !== k.dims[0]) {
      throw new HeddleError('ERR_SHAPE', `values: expected ${k.dims[0]} tokens as in keys, got ${v.dims[0]}`);
    }
    const row = (p: Place) => p.dims[1] * p.dims[2] * BYTES_PER_ELEMENT[p.type];
    const step = tokensPerBlock(row(k) + row(v), wanted);
    return { iterator: fileBlocks(k, v, step, signal), tokens: k.dims[0] };
  } catch (error) {
    for (const source of opened) source.close();
    throw error;
  }
}

/** The blocks of a source. */
export async function openBlocks(
  source: KeyValueSource,
  blockTokens: number | undefined,
  signal?: AbortSignal,
): Promise<Blocks> {
  if (source === null || typeof source !== 'object') {
    throw new HeddleError(
      'ERR_ARGUMENT',
      `source: expected keys and values, a file or an iterable, got ${source === null ? 'null' : typeof source}`,
    );
  }
  if (Symbol.asyncIterator in source) return { iterator: source[Symbol.asyncIterator]() };
  if (Symbol.iterator in source) return { iterator: source[Symbol.iterator]() };
  if ('path' in source) return openFile(source, blockTokens, signal);
  const k = asTensor(source.keys, 'keys', BLOCK_TYPES, 3);
  const v = asTensor(source.values, 'values', BLOCK_TYPES, 3);
  if (v.dims[0] !== k.dims[0]) {
    throw new HeddleError('ERR_SHAPE', `values: expected ${k.dims[0]} tokens as in keys, got ${v.dims[0]}`);
  }
  const bytes = (k.dims[1] * k.dims[2] + v.dims[1] * v.dims[2]) * BYTES_PER_ELEMENT[k.type];
  const step = tokensPerBlock(bytes, blockTokens);
  return { iterator: memoryBlocks(source, k, v, step), tokens: k.dims[0] };
}
