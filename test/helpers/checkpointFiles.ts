/** Checkpoints on disk for the tests of the reader, and what they expect of errors. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, expect } from 'vitest';
import { type Checkpoint, openCheckpoint, openCheckpointSync } from '../../lib/checkpoint.ts';
import type { HeddleError } from '../../lib/errors.ts';
import { rejection, thrown } from './errors.ts';
import { bytesOf, type TensorBytes, writeSafetensors } from './safetensors.ts';

interface IndexJson {
  metadata?: unknown;
  weight_map: Record<string, unknown>;
}

/** A folder that lives as long as the test file that asks for it. */
export class CheckpointFolder {
  root = '';
  private count = 0;

  constructor() {
    beforeAll(() => {
      this.root = fs.mkdtempSync(path.join(os.tmpdir(), 'heddle-checkpoint-'));
    });
    afterAll(() => {
      fs.rmSync(this.root, { recursive: true, force: true });
    });
  }

  /** A path in a new folder. */
  readonly fresh = (name = 'm.safetensors'): string => {
    const dir = path.join(this.root, `d${this.count++}`);
    fs.mkdirSync(dir);
    return path.join(dir, name);
  };

  /** A new file of any content. */
  readonly write = (bytes: Uint8Array | string, name?: string): string => {
    const file = this.fresh(name);
    fs.writeFileSync(file, bytes);
    return file;
  };

  /** Shards `a`, `b` with one tensor each, and an index; `edit` may damage the index. */
  readonly sharded = (
    edit: (index: IndexJson) => unknown = (index) => index,
  ): { dir: string; index: string } => {
    const index = this.fresh('model.safetensors.index.json');
    const dir = path.dirname(index);
    writeSafetensors(path.join(dir, 'a.safetensors'), { x: f32(1, 2) }, { format: 'pt', only: 'a' });
    writeSafetensors(path.join(dir, 'b.safetensors'), { y: f32(3), z: f32(4, 5, 6) }, { format: 'np' });
    const content = edit({
      metadata: { total_size: 24 },
      weight_map: { x: 'a.safetensors', y: 'b.safetensors', z: 'b.safetensors' },
    });
    fs.writeFileSync(index, typeof content === 'string' ? content : JSON.stringify(content));
    return { dir, index };
  };
}

export const f32 = (...values: number[]): TensorBytes => ({
  dtype: 'F32',
  dims: [values.length],
  bytes: bytesOf(new Float32Array(values)),
});

/** Opens both ways; both must be refused with the same ERR_CHECKPOINT that says all of `parts`. */
export const refused = async (file: string, ...parts: (string | RegExp)[]): Promise<HeddleError> => {
  const sync = thrown(() => openCheckpointSync(file));
  const async = await rejection(openCheckpoint(file));
  expect(sync.code).toBe('ERR_CHECKPOINT');
  expect(async.code).toBe('ERR_CHECKPOINT');
  expect(async.message).toBe(sync.message);
  for (const part of parts) expect(sync.message).toMatch(part);
  return sync;
};

/** Closes the checkpoint after use. */
export const using = <T>(checkpoint: Checkpoint, body: (c: Checkpoint) => T): T => {
  try {
    return body(checkpoint);
  } finally {
    checkpoint.close();
  }
};
