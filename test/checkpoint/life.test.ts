import fs from 'node:fs';
import path from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { describe, expect, it } from 'vitest';
import { CHUNK_BYTES, type FileSource } from '../../lib/checkpoint/file.ts';
import { Checkpoint, openCheckpoint, openCheckpointSync } from '../../lib/checkpoint.ts';
import { CheckpointFolder, f32, refused, using } from '../helpers/checkpointFiles.ts';
import { rejection, thrown } from '../helpers/errors.ts';
import { rawSafetensors, writeSafetensors } from '../helpers/safetensors.ts';

const files = new CheckpointFolder();
const { fresh, sharded } = files;

describe('life of a checkpoint', () => {
  const simple = () => {
    const file = fresh();
    writeSafetensors(file, { a: f32(1, 2, 3) });
    return file;
  };

  it('refuses reads after close, keeps what was read', async () => {
    const c = await openCheckpoint(simple());
    const tensor = await c.read('a');
    c.close();
    c.close();
    for (const error of [
      thrown(() => c.readSync('a')),
      thrown(() => c.readRangeSync('a', 0, 1)),
      thrown(() => c.readBytesSync('a')),
      await rejection(c.read('a')),
      await rejection(c.readRange('a', 0, 1)),
      await rejection(c.readBytes('a')),
    ]) {
      expect(error.code).toBe('ERR_DISPOSED');
    }
    expect(thrown(() => c.readRangeSync('a', 0, 0)).code).toBe('ERR_DISPOSED'); // though nothing is read
    expect(tensor.data).toEqual(new Float32Array([1, 2, 3]));
    expect(c.has('a')).toBe(true);
    expect(c.info('a').dims).toEqual([3]);
  });

  it('closes by Symbol.dispose', () => {
    const c = openCheckpointSync(simple());
    c[Symbol.dispose]();
    expect(thrown(() => c.readSync('a')).code).toBe('ERR_DISPOSED');
  });

  it.skipIf(!fs.existsSync('/proc/self/fd'))(
    'leaves no file open: closed, refused, or closed in mid-read',
    async () => {
      const open = () =>
        fs.readdirSync('/proc/self/fd').filter((fd) => {
          try {
            return fs.readlinkSync(`/proc/self/fd/${fd}`).startsWith(files.root);
          } catch {
            return false;
          }
        }).length;
      const { dir } = sharded();
      const c = await openCheckpoint(dir);
      expect(open()).toBe(2);
      c.close();
      expect(open()).toBe(0);
      fs.truncateSync(path.join(dir, 'b.safetensors'), 50);
      await refused(dir);
      expect(open()).toBe(0);

      const file = fresh();
      const bytes = new Uint8Array(CHUNK_BYTES * 3);
      writeSafetensors(file, { big: { dtype: 'U8', dims: [bytes.length], bytes } });
      const big = await openCheckpoint(file);
      const reading = [big.read('big'), big.read('big')].map(rejection);
      big.close();
      for (const error of await Promise.all(reading)) expect(error.code).toBe('ERR_DISPOSED');
      expect(open()).toBe(0);
    },
  );

  it.skipIf(!fs.existsSync('/proc/self/fd'))(
    'closes the files of a checkpoint that was forgotten',
    async () => {
      setFlagsFromString('--expose-gc');
      const gc = runInNewContext('gc') as () => void;
      const file = simple();
      const isOpen = () =>
        fs.readdirSync('/proc/self/fd').some((fd) => {
          try {
            return fs.readlinkSync(`/proc/self/fd/${fd}`) === fs.realpathSync(file);
          } catch {
            return false;
          }
        });
      // In a function of its own, so that no register of this one keeps the checkpoint.
      const read = () => openCheckpoint(file).then((c) => c.read('a'));
      expect((await read()).data).toEqual(new Float32Array([1, 2, 3]));
      expect(isOpen()).toBe(true);
      for (let i = 0; i < 100 && isOpen(); i++) {
        gc();
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
      expect(isOpen()).toBe(false);
    },
  );

  it('is aborted before, during and not after', async () => {
    const file = fresh();
    const bytes = new Uint8Array(CHUNK_BYTES * 4);
    writeSafetensors(file, { big: { dtype: 'U8', dims: [4, bytes.length / 4], bytes } });
    const c = await openCheckpoint(file);
    const reason = new Error('enough');
    const done = AbortSignal.abort(reason);
    for (const promise of [
      c.read('big', { signal: done }),
      c.readRange('big', 0, 0, { signal: done }),
      c.readBytes('big', { signal: done }),
    ]) {
      const error = await rejection(promise);
      expect(error.code).toBe('ERR_ABORTED');
      expect(error.cause).toBe(reason);
    }
    const during = new AbortController();
    const promise = c.read('big', { signal: during.signal });
    during.abort(reason);
    expect((await rejection(promise)).code).toBe('ERR_ABORTED');

    const after = new AbortController();
    expect((await c.read('big', { signal: after.signal })).size).toBe(bytes.length);
    after.abort();
    expect((await rejection(c.read('big', { signal: 'no' as never }))).code).toBe('ERR_OPTION');
    expect((await rejection(c.read('big', { signal: null as never }))).code).toBe('ERR_OPTION');
    c.close();
  });

  it('notices a file that became shorter', async () => {
    const file = simple();
    const c = openCheckpointSync(file);
    fs.truncateSync(file, fs.statSync(file).size - 1);
    for (const error of [thrown(() => c.readSync('a')), await rejection(c.read('a'))]) {
      expect(error.code).toBe('ERR_CHECKPOINT');
      expect(error.message).toContain(`${file}: tensor "a" could not be read: the file ends at byte`);
    }
    expect(c.readRangeSync('a', 0, 2).data).toEqual(new Float32Array([1, 2]));
    c.close();
  });

  it.skipIf(process.platform === 'win32')('keeps reading the file it opened when that is replaced', () => {
    const file = simple();
    const c = openCheckpointSync(file);
    writeSafetensors(`${file}.new`, { a: f32(7, 8, 9) });
    fs.renameSync(`${file}.new`, file);
    expect(c.readSync('a').data).toEqual(new Float32Array([1, 2, 3]));
    c.close();
  });

  it('gives ERR_MEMORY for a tensor too large for memory, without touching the file', async () => {
    const file = fresh();
    const size = 2 ** 43;
    const head = rawSafetensors(
      JSON.stringify({ a: { dtype: 'U8', shape: [2, size / 2], data_offsets: [0, size] } }),
    );
    fs.writeFileSync(file, head);
    fs.truncateSync(file, head.length + size);
    const c = openCheckpointSync(file);
    expect(c.info('a').byteLength).toBe(size);
    expect(thrown(() => c.readSync('a')).code).toBe('ERR_MEMORY');
    expect((await rejection(c.readBytes('a'))).code).toBe('ERR_MEMORY');
    c.close();
  });

  it('takes mapped memory where the source offers it, and reads where it does not', async () => {
    const memory = new Float32Array([10, 20, 30, 40]);
    const calls: [number, number][] = [];
    let maps = true;
    const source: FileSource = {
      path: 'fake',
      size: 24,
      read: async (offset, target) => source.readSync(offset, target),
      readSync: (_, target) => target.fill(0).byteLength,
      close: () => {},
      map: (offset, length) => {
        calls.push([offset, length]);
        return maps ? memory.buffer.slice(offset - 8, offset - 8 + length) : undefined;
      },
    };
    const info = {
      name: 'a',
      dtype: 'F32',
      type: 'float32' as const,
      dims: [2, 2],
      byteLength: 16,
      file: 'fake',
    };
    const place = { info, source, offset: 8 };
    const base = {
      path: 'fake',
      places: new Map([['a', place]]),
      sources: [source],
      metadata: {},
      config: {},
    };
    const auto = new Checkpoint({ ...base, map: true });
    expect((await auto.read('a')).data).toEqual(memory);
    expect(auto.readRangeSync('a', 1, 1)).toMatchObject({ dims: [1, 2], data: memory.slice(2) });
    expect(calls).toEqual([
      [8, 16],
      [16, 8],
    ]);
    maps = false;
    expect(auto.readSync('a').data).toEqual(new Float32Array(4));
    expect(calls.length).toBe(3);
    expect(new Checkpoint({ ...base, map: false }).readSync('a').data).toEqual(new Float32Array(4));
    expect(calls.length).toBe(3);
  });

  it('gives frozen infos', () => {
    using(openCheckpointSync(simple()), (c) => {
      expect(Object.isFrozen(c.info('a'))).toBe(true);
      expect(Object.isFrozen(c.info('a').dims)).toBe(true);
      expect(Object.isFrozen(c.metadata)).toBe(true);
    });
  });
});
