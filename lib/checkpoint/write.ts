/** Writing safetensors files: whole or not at all. */
import fs from 'node:fs';
import { dirname } from 'node:path';
import { HeddleError } from '../errors.ts';
import type { DType, Tensor } from '../tensor.ts';
import { type Steps, step } from './steps.ts';

const NAMES: Readonly<Record<DType, string>> = {
  float32: 'F32',
  float64: 'F64',
  float16: 'F16',
  bfloat16: 'BF16',
  int8: 'I8',
  uint8: 'U8',
  int32: 'I32',
  int64: 'I64',
  float8_e4m3: 'F8_E4M3',
  float8_e5m2: 'F8_E5M2',
};

/** The parts of a file: prefix and header, then each tensor's bytes in place. */
function partsOf(
  tensors: Readonly<Record<string, Tensor>>,
  metadata: Readonly<Record<string, string>>,
): Uint8Array[] {
  const header: Record<string, unknown> = { __metadata__: metadata };
  const data: Uint8Array[] = [];
  let at = 0;
  // The widest types first keep every tensor aligned to its elements.
  const list = Object.entries(tensors).sort(
    ([, a], [, b]) => b.data.BYTES_PER_ELEMENT - a.data.BYTES_PER_ELEMENT,
  );
  for (const [name, t] of list) {
    const end = at + t.data.byteLength;
    header[name] = { dtype: NAMES[t.type], shape: t.dims, data_offsets: [at, end] };
    data.push(new Uint8Array(t.data.buffer, t.data.byteOffset, t.data.byteLength));
    at = end;
  }
  const text = Buffer.from(JSON.stringify(header));
  const padded = Buffer.alloc(Math.ceil(text.length / 8) * 8, ' ');
  padded.set(text);
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(padded.length));
  return [prefix, padded, ...data];
}

/**
 * Writes a safetensors file beside `path`, brings it to the disk, and puts it in the place of `path`: a crash leaves the
 * old file or the new one, never a part.
 * @throws HeddleError `ERR_CHECKPOINT` where it cannot be written
 */
export function* writeSafetensors(
  path: string,
  tensors: Readonly<Record<string, Tensor>>,
  metadata: Readonly<Record<string, string>>,
): Steps<void> {
  const temporary = `${path}.${process.pid}.tmp`;
  const parts = partsOf(tensors, metadata);
  try {
    yield* step(
      () => {
        const fd = fs.openSync(temporary, 'w', 0o600);
        try {
          for (const part of parts) {
            for (let at = 0; at < part.length; ) at += fs.writeSync(fd, part, at);
          }
          fs.fsyncSync(fd);
        } finally {
          fs.closeSync(fd);
        }
        fs.renameSync(temporary, path);
        syncDirectory(path);
      },
      async () => {
        const file = await fs.promises.open(temporary, 'w', 0o600);
        try {
          for (const part of parts) {
            for (let at = 0; at < part.length; ) at += (await file.write(part, at)).bytesWritten;
          }
          await file.sync();
        } finally {
          await file.close();
        }
        await fs.promises.rename(temporary, path);
        syncDirectory(path);
      },
    );
  } catch (cause) {
    fs.rmSync(temporary, { force: true });
    throw new HeddleError('ERR_CHECKPOINT', `${path}: cannot be written: ${(cause as Error).message}`, {
      cause,
    });
  }
}

/** Makes the renaming itself last; where directories cannot be synced (Windows) the system does it. */
function syncDirectory(path: string): void {
  let fd: number | undefined;
  try {
    fd = fs.openSync(dirname(path), 'r');
    fs.fsyncSync(fd);
  } catch {
  } finally {
    if (fd !== undefined) fs.closeSync(fd);
  }
}
