/**
 * The safetensors header: parsing and validation.
 *
 * Format: https://github.com/huggingface/safetensors#format. Rules follow the validation of the reference
 * reader (`safetensors/src/tensor.rs`: `read_metadata`, `Metadata::validate`), and are stricter in two
 * places where the specification is: duplicate keys are refused, and so is `"__metadata__": null`.
 */
import { HeddleError } from '../errors.ts';
import type { DType } from '../tensor.ts';
import { decodeUtf8, type Fail, members, parseValue, quote } from './json.ts';

/** Bytes before the header: its length as an unsigned little-endian 64-bit integer. */
export const PREFIX_BYTES = 8;

/** The reference reader's own limit. */
export const MAX_HEADER_BYTES = 100_000_000;

/** Longest text accepted for one field of a tensor's entry: a shape of thousands of dimensions. */
const MAX_FIELD_LENGTH = 65_536;

/** Three are defined; readers ignore others, and so do we, within reason. */
const MAX_FIELDS = 64;
const MAX_METADATA_KEYS = 65_536;

/** Every element type of the format: its size, and heddle's type where heddle has one. */
const DTYPES: ReadonlyMap<string, { readonly bits: number; readonly type: DType | undefined }> = new Map([
  ['F64', { bits: 64, type: 'float64' }],
  ['F32', { bits: 32, type: 'float32' }],
  ['F16', { bits: 16, type: 'float16' }],
  ['BF16', { bits: 16, type: 'bfloat16' }],
  ['F8_E4M3', { bits: 8, type: 'float8_e4m3' }],
  ['F8_E5M2', { bits: 8, type: 'float8_e5m2' }],
  ['I64', { bits: 64, type: 'int64' }],
  ['I32', { bits: 32, type: 'int32' }],
  ['I8', { bits: 8, type: 'int8' }],
  ['U8', { bits: 8, type: 'uint8' }],
  ['BOOL', { bits: 8, type: 'uint8' }],
  ['I16', { bits: 16, type: undefined }],
  ['U16', { bits: 16, type: undefined }],
  ['U32', { bits: 32, type: undefined }],
  ['U64', { bits: 64, type: undefined }],
  ['C64', { bits: 64, type: undefined }],
  ['F8_E8M0', { bits: 8, type: undefined }],
  ['F8_E4M3FNUZ', { bits: 8, type: undefined }],
  ['F8_E5M2FNUZ', { bits: 8, type: undefined }],
  ['F6_E2M3', { bits: 6, type: undefined }],
  ['F6_E3M2', { bits: 6, type: undefined }],
  ['F4', { bits: 4, type: undefined }],
]);

/** One tensor as the header describes it; offsets count from the start of the data section. */
export interface HeaderTensor {
  readonly name: string;
  readonly dtype: string;
  readonly type: DType | undefined;
  readonly dims: readonly number[];
  readonly begin: number;
  readonly end: number;
}

export interface Header {
  /** In the order of the header. */
  readonly tensors: readonly HeaderTensor[];
  readonly metadata: Readonly<Record<string, string>>;
}

/**
 * A maker of `ERR_CHECKPOINT` errors that name `file` and, where there is one, the subject.
 * @param tensor true when `subject` is a tensor's name; it is quoted only once an error is made
 */
export function failIn(file: string, subject = '', tensor = false): Fail {
  return (reason, cause) => {
    const named = tensor ? `tensor ${quote(subject)} ` : subject && `${subject} `;
    const message = `${file}: ${named}${reason}`;
    return new HeddleError('ERR_CHECKPOINT', message, cause === undefined ? undefined : { cause });
  };
}

/**
 * The header's length, from the first bytes of the file, checked against the format's limit and the file.
 * @param prefix the first `PREFIX_BYTES` bytes
 */
export function headerLength(prefix: ArrayBuffer, fileSize: number, file: string): number {
  const fail = failIn(file);
  const length = new DataView(prefix).getBigUint64(0, true);
  if (length > BigInt(MAX_HEADER_BYTES)) {
    throw fail(`the header claims ${length} bytes; the format allows ${MAX_HEADER_BYTES}`);
  }
  if (Number(length) > fileSize - PREFIX_BYTES) {
    throw fail(`truncated: the header claims ${length} bytes, the file has ${fileSize} in all`);
  }
  return Number(length);
}

/**
 * Parses and validates a header.
 * @param bytes the header's own bytes
 * @param dataBytes size of the data section, the rest of the file
 */
export function parseHeader(bytes: ArrayBuffer, dataBytes: number, file: string): Header {
  const fail = failIn(file, 'the header');
  const tensors: HeaderTensor[] = [];
  let metadata: Record<string, string> = Object.create(null);
  for (const { key, value } of members(decodeUtf8(bytes, fail), fail)) {
    if (key === '__metadata__') metadata = parseMetadata(value, file);
    else tensors.push(parseTensor(key, value, file));
  }
  checkCoverage(tensors, dataBytes, file);
  return { tensors, metadata: Object.freeze(metadata) };
}

function parseMetadata(text: string, file: string): Record<string, string> {
  const fail = failIn(file, '__metadata__');
  // Without a prototype, a key `__proto__` is a key like any other.
  const metadata: Record<string, string> = Object.create(null);
  for (const { key, value } of members(text, fail, MAX_METADATA_KEYS)) {
    if (value[0] !== '"')
      throw fail(`must map strings to strings; the value of ${quote(key)} is ${quote(value)}`);
    metadata[key] = parseValue(value, fail) as string;
  }
  return metadata;
}

function parseTensor(name: string, text: string, file: string): HeaderTensor {
  const fail = failIn(file, name, true);
  const fields = new Map<string, unknown>();
  for (const { key, value } of members(text, fail, MAX_FIELDS)) {
    if (value.length > MAX_FIELD_LENGTH)
      throw fail(`has a field ${quote(key)} of ${value.length} characters`);
    fields.set(key, parseValue(value, fail));
  }
  for (const key of ['dtype', 'shape', 'data_offsets']) {
    if (!fields.has(key)) throw fail(`has no ${key}`);
  }

  const dtype = fields.get('dtype');
  const known = DTYPES.get(dtype as string);
  if (known === undefined) {
    throw fail(`has the unknown dtype ${show(dtype)}; known: ${[...DTYPES.keys()].join(', ')}`);
  }

  const dims = fields.get('shape');
  if (!isSizes(dims)) throw fail(`has the shape ${show(dims)}; it must be an array of non-negative integers`);

  const offsets = fields.get('data_offsets');
  if (!isSizes(offsets) || offsets.length !== 2) {
    throw fail(`has the data_offsets ${show(offsets)}; they must be two non-negative integers`);
  }
  const [begin, end] = offsets;
  if (begin > end) throw fail(`has data_offsets [${begin}, ${end}], which end before they begin`);

  let bits = known.bits;
  // Like the reference reader: an overflow on the way counts even when a later dimension is zero.
  for (const dim of dims) {
    bits *= dim;
    if (bits > Number.MAX_SAFE_INTEGER) throw fail(`has the shape ${show(dims)}, whose size overflows`);
  }
  if (bits % 8 !== 0) throw fail(`of ${dtype} ${show(dims)} does not fill whole bytes`);
  if (end - begin !== bits / 8) {
    throw fail(`of ${dtype} ${show(dims)} needs ${bits / 8} bytes, its data_offsets hold ${end - begin}`);
  }
  return { name, dtype: dtype as string, type: known.type, dims: Object.freeze(dims), begin, end };
}

/** The tensors must tile the data section: no overlap, no hole, nothing before or after. */
function checkCoverage(tensors: readonly HeaderTensor[], dataBytes: number, file: string): void {
  for (const { name, begin, end } of tensors) {
    if (end > dataBytes) {
      throw failIn(
        file,
        `tensor ${quote(name)}`,
      )(
        `lies outside the file (truncated?): data_offsets [${begin}, ${end}], data section of ${dataBytes} bytes`,
      );
    }
  }
  const sorted = [...tensors].sort((a, b) => a.begin - b.begin || a.end - b.end);
  let covered = 0;
  for (const { name, begin, end } of sorted) {
    if (begin !== covered) {
      throw failIn(
        file,
        `tensor ${quote(name)}`,
      )(
        begin < covered
          ? `overlaps another tensor: it begins at byte ${begin}, bytes up to ${covered} are taken`
          : `leaves a hole: it begins at byte ${begin}, the tensors before it end at ${covered}`,
      );
    }
    covered = end;
  }
  if (covered !== dataBytes) {
    throw failIn(file)(`${dataBytes - covered} bytes after the last tensor belong to no tensor`);
  }
}

function isSizes(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((v) => Number.isSafeInteger(v) && v >= 0 && !Object.is(v, -0));
}

function show(value: unknown): string {
  const text = JSON.stringify(value);
  return text.length > 160 ? text.slice(0, 160) + '…' : text;
}
