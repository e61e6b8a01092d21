/** Writes safetensors files for tests, good ones and damaged ones. */
import fs from 'node:fs';

export interface TensorBytes {
  dtype: string;
  dims: readonly number[];
  bytes: Uint8Array;
}

/** The header of tensors laid one after the other, in the order given. */
export function headerOf(
  tensors: Readonly<Record<string, TensorBytes>> | readonly (readonly [string, TensorBytes])[],
  metadata?: Readonly<Record<string, string>>,
): { text: string; data: Buffer } {
  const list = (Array.isArray(tensors) ? tensors : Object.entries(tensors)) as [string, TensorBytes][];
  const parts: string[] = [];
  if (metadata !== undefined) parts.push(`"__metadata__":${JSON.stringify(metadata)}`);
  let at = 0;
  for (const [name, { dtype, dims, bytes }] of list) {
    const entry = { dtype, shape: dims, data_offsets: [at, at + bytes.byteLength] };
    parts.push(`${JSON.stringify(name)}:${JSON.stringify(entry)}`);
    at += bytes.byteLength;
  }
  return { text: `{${parts.join(',')}}`, data: Buffer.concat(list.map(([, t]) => t.bytes)) };
}

/** The bytes of a file: length prefix (the true one unless `length` says otherwise), header, data. */
export function rawSafetensors(
  header: string | Uint8Array,
  data: Uint8Array = new Uint8Array(0),
  length?: bigint,
): Buffer {
  const text = typeof header === 'string' ? Buffer.from(header) : Buffer.from(header);
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(length ?? BigInt(text.byteLength));
  return Buffer.concat([prefix, text, data]);
}

/** Writes a file with any header text and data, for damage of every kind. */
export function writeRawSafetensors(
  file: string,
  header: string | Uint8Array,
  data?: Uint8Array,
  length?: bigint,
): void {
  fs.writeFileSync(file, rawSafetensors(header, data, length));
}

/** Writes a valid file (as long as dtype, dims and bytes agree). */
export function writeSafetensors(
  file: string,
  tensors: Parameters<typeof headerOf>[0],
  metadata?: Readonly<Record<string, string>>,
): void {
  const { text, data } = headerOf(tensors, metadata);
  writeRawSafetensors(file, text, data);
}

/** The bytes of a typed array. */
export function bytesOf(array: ArrayBufferView): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}
